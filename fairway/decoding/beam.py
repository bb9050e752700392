"""Beam search: grow the likeliest texts side by side, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from fairway.decoding.reader import Reader
from fairway.decoding.strategies import log_softmax
from train_gpt import UserError

MOST_BEAMS = 256


class Hypothesis(NamedTuple):
    """A text that beam search considers: its tokens after the prompt and their
    log-probabilities.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    ended: bool

    @property
    def logp(self) -> float:
        """Log-probability of the text, in nats."""
        return sum(self.logps)

    def score(self, length_penalty: float) -> float:
        """Return log p / length^penalty. A penalty of 0 ranks by likelihood, 1 by the mean
        log-probability; larger ones favour longer texts.
        """
        return self.logp / max(len(self.tokens), 1) ** length_penalty


def beam_search(
    reader: Reader,
    prompt: Sequence[int],
    width: int,
    tokens: int,
    length_penalty: float = 1.0,
    best: int = 1,
    is_complete: Callable[[tuple[int, ...]], bool] = lambda tokens: False,
    on_progress: Callable[[int], None] | None = None,
) -> list[Hypothesis]:
    """Return the `best` texts of at most `tokens` tokens, best first.

    Each step goes on with the `width` likeliest texts. The reader must have read the prompt except
    its last token; `is_complete(tokens)` is true for a text that needs no more tokens.
    """
    check_beam_options(width, best, length_penalty)
    alive, done, last = [Hypothesis((), (), False)], [], [prompt[-1]]
    for _ in range(tokens):
        logp = log_softmax(reader.batch([[token] for token in last])[:, 0])
        # Twice the width: at most `width` continuations can be complete, so `width` remain alive.
        longer = likeliest_continuations(alive, logp, 2 * width, is_complete)
        done += [text for _, text in longer[:width] if text.ended]
        growing = [pair for pair in longer if not pair[1].ended][:width]
        alive = [text for _, text in growing]
        if on_progress:
            on_progress(1)
        if not alive or cannot_improve(alive, done, tokens, length_penalty, best):
            break
        reader.pick([row for row, _ in growing])
        last = [text.tokens[-1] for text in alive]
    return sorted(done + alive, key=lambda text: -text.score(length_penalty))[:best]


def check_beam_options(width: int, best: int, length_penalty: float) -> None:
    """Raise UserError for a number that beam search cannot take."""
    if not 1 <= width <= MOST_BEAMS:
        raise UserError(f"--beams is {width}; it must be 1 to {MOST_BEAMS}")
    if not 1 <= best <= width:
        raise UserError(f"--n-best is {best}, but --beams is {width}; it must be 1 to {width}")
    if not 0 <= length_penalty < float("inf"):
        raise UserError(f"--length-penalty is {length_penalty:g}; it must be at least 0")


def likeliest_continuations(
    alive: list[Hypothesis],
    logp: np.ndarray,
    count: int,
    is_complete: Callable[[tuple[int, ...]], bool],
) -> list[tuple[int, Hypothesis]]:
    """Return the `count` likeliest texts that are one token longer, each with the number of the
    stream that it continues; logp is float64[B, V].
    """
    sums = (np.array([text.logp for text in alive])[:, None] + logp).ravel()
    count = min(count, int(np.isfinite(sums).sum()))
    if not count:
        raise UserError(
            "the model gives no token a probability: this artifact cannot be decoded here; check "
            "it with eval_final.py"
        )
    top = np.argpartition(-sums, count - 1)[:count]
    longer = []
    # Equal sums are ordered by their position, so that the same search gives the same texts.
    for at in top[np.lexsort((top, -sums[top]))].tolist():
        row, token = divmod(at, logp.shape[1])
        tokens = (*alive[row].tokens, token)
        logps = (*alive[row].logps, float(logp[row, token]))
        longer.append((row, Hypothesis(tokens, logps, is_complete(tokens))))
    return longer


def cannot_improve(
    alive: list[Hypothesis],
    done: list[Hypothesis],
    tokens: int,
    length_penalty: float,
    best: int,
) -> bool:
    """Return True if no text that still grows can become one of the `best`.

    A log-probability can only fall as a text grows, so the highest score that a growing text can
    reach is its present log-probability at the largest length, `tokens`.
    """
    if len(done) < best:
        return False
    worst_of_best = sorted(text.score(length_penalty) for text in done)[-best]
    return max(text.logp for text in alive) / tokens**length_penalty <= worst_of_best
