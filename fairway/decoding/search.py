"""A model driven token by token: how an engine is read, plain decoding, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fairway.decoding.strategies import Strategy, draw, log_softmax
from train_gpt import need

PIECE = 128  # tokens of a prompt that are read at once
MOST_BEAMS = 256


class Engine(Protocol):
    """All that decoding asks of a model: fairway.scoring.memory.Memory has it, and any other may."""

    read: int  # tokens so far

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...
    def crop(self, length: int) -> None: ...
    def pick(self, rows: torch.Tensor) -> None: ...


class Reader:
    """An engine with tokens going in and float64 logits coming out; never more than `most` tokens at once."""

    def __init__(self, engine: Engine, device: torch.device | str = "cpu", most: int = PIECE):
        self.engine, self.device, self.most = engine, device, most

    @property
    def length(self) -> int:
        """Tokens that have been read."""
        return self.engine.read

    def batch(self, tokens_BT: Sequence[Sequence[int]]) -> np.ndarray:
        """float64[B, T, V]: what each position says of the token after it."""
        tokens = torch.tensor(tokens_BT, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            return self.engine.logits(tokens).float().cpu().numpy().astype(np.float64)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """float64[T, V] of one stream."""
        return self.batch([tokens])[0]

    def last(self, tokens: Sequence[int], told: Callable[[int], None] | None = None) -> np.ndarray:
        """float64[V] after any number of tokens, at least one; `told` hears how many each piece of them had."""
        for first in range(0, len(tokens), self.most):
            piece = tokens[first : first + self.most]
            logits = self.read(piece)[-1]
            if told:
                told(len(piece))
        return logits

    def crop(self, length: int) -> None:
        if length < self.length:
            self.engine.crop(length)

    def pick(self, rows: Sequence[int]) -> None:
        """The streams become those of these numbers."""
        with torch.inference_mode():
            self.engine.pick(torch.tensor(rows, dtype=torch.int64, device=self.device))


class Step(NamedTuple):
    token: int
    logp: float  # by the model's own distribution, in nats


def plain(
    reader: Reader, prompt: Sequence[int], strategy: Strategy, rng: np.random.Generator
) -> Iterator[Step]:
    """Tokens after the prompt, one forward each, without end. The reader has read the prompt but for its last token."""
    text = list(prompt)
    while True:
        logits = reader.read(text[-1:])[0]
        text.append(draw(strategy.distribution(logits, text), rng))
        yield Step(text[-1], float(log_softmax(logits)[text[-1]]))


# ==== BEAM SEARCH =====================================================================================================
class Found(NamedTuple):
    """A text that beam search came upon."""

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool

    @property
    def logp(self) -> float:
        return sum(self.logps)

    def score(self, length_penalty: float) -> float:
        """log p / length^penalty: 0 is the likeliest text, 1 the best mean; more favours longer texts."""
        return self.logp / max(len(self.tokens), 1) ** length_penalty


def beam(
    reader: Reader,
    prompt: Sequence[int],
    width: int,
    tokens: int,
    length_penalty: float = 1.0,
    best: int = 1,
    ended: Callable[[tuple[int, ...]], bool] = lambda tokens: False,
    told: Callable[[int], None] | None = None,
) -> list[Found]:
    """The `best` texts of at most so many tokens, best first, by a search that goes on with the `width` likeliest at
    each step. The reader has read the prompt but for its last token; `ended` says of a text that it is complete."""
    need(1 <= width <= MOST_BEAMS, f"--beams is {width}; it must be 1 to {MOST_BEAMS}")
    need(1 <= best <= width, f"--n-best is {best}, but --beams is {width}; it must be 1 to {width}")
    need(
        0 <= length_penalty < float("inf"),
        f"--length-penalty is {length_penalty:g}; it must be at least 0",
    )
    alive, done, last = [Found((), (), False)], [], [prompt[-1]]
    for _ in range(tokens):
        logp = log_softmax(reader.batch([[token] for token in last])[:, 0])
        longer = likeliest(alive, logp, 2 * width, ended)
        done += [found for _, found in longer[:width] if found.ended]
        growing = [pair for pair in longer if not pair[1].ended][:width]
        alive = [found for _, found in growing]
        if told:
            told(1)
        if not alive or settled(alive, done, tokens, length_penalty, best):
            break
        reader.pick([row for row, _ in growing])
        last = [found.tokens[-1] for found in alive]
    return sorted(done + alive, key=lambda found: -found.score(length_penalty))[:best]


def likeliest(
    alive: list[Found], logp: np.ndarray, count: int, ended: Callable[[tuple[int, ...]], bool]
) -> list[tuple[int, Found]]:
    """The likeliest texts that are one token longer, each with the row that it goes on from; logp: float64[B, V]."""
    sums = (np.array([found.logp for found in alive])[:, None] + logp).ravel()
    count = min(count, int(np.isfinite(sums).sum()))
    need(count, "the model gives no token a probability: this artifact cannot be decoded here")
    top = np.argpartition(-sums, count - 1)[:count]
    longer = []
    for at in top[np.lexsort((top, -sums[top]))].tolist():
        row, token = divmod(at, logp.shape[1])
        tokens = (*alive[row].tokens, token)
        longer.append(
            (row, Found(tokens, (*alive[row].logps, float(logp[row, token])), ended(tokens)))
        )
    return longer


def settled(
    alive: list[Found], done: list[Found], tokens: int, length_penalty: float, best: int
) -> bool:
    """Whether no text that is still growing can become one of the best: its log-probability can only fall, so that
    it scores at most what it would if it were already as long as it may get."""
    if len(done) < best:
        return False
    bar = sorted(found.score(length_penalty) for found in done)[-best]
    return max(found.logp for found in alive) / tokens**length_penalty <= bar
