"""A model driven token by token: the engine interface, the reader around it, and plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from fairway.decoding.strategies import Strategy, draw, log_softmax

PROMPT_PIECE = 128  # prompt tokens read at once: enough to fill a forward, little memory


class Engine(Protocol):
    """The calls that decoding makes to a model. scoring.memory.Memory implements it in PyTorch,
    fairway.coreml.engine.ShardEngine in CoreML.
    """

    read: int  # number of tokens read so far

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor: ...
    def crop(self, length: int) -> None: ...
    def pick(self, rows: torch.Tensor) -> None: ...


class EngineSource(Protocol):
    """A way to run the model other than in PyTorch: fairway.coreml.engine has one."""

    context: int  # tokens that the model sees at a time
    most: int  # tokens that one call takes
    calls: int  # calls so far, of all engines together

    def new_engine(self) -> Engine: ...


class Reader:
    """An engine that takes token lists and returns float64 logits, at most `most` tokens a call."""

    def __init__(
        self, engine: Engine, device: torch.device | str = "cpu", most: int = PROMPT_PIECE
    ):
        self.engine, self.device, self.most = engine, device, most

    @property
    def length(self) -> int:
        """Number of tokens read so far."""
        return self.engine.read

    def batch(self, tokens_BT: Sequence[Sequence[int]]) -> np.ndarray:
        """Read B streams of T tokens; return each position's logits for the next token,
        float64[B, T, V].
        """
        tokens = torch.tensor(tokens_BT, dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            return self.engine.logits(tokens).float().cpu().numpy().astype(np.float64)

    def read(self, tokens: Sequence[int]) -> np.ndarray:
        """Read T tokens of one stream; return float64[T, V]."""
        return self.batch([tokens])[0]

    def last(
        self, tokens: Sequence[int], on_progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Read one token or more, in pieces; return the last logits, float64[V]. `on_progress` is
        called with the size of each piece.
        """
        for first in range(0, len(tokens), self.most):
            piece = tokens[first : first + self.most]
            logits = self.read(piece)[-1]
            if on_progress:
                on_progress(len(piece))
        return logits

    def crop(self, length: int) -> None:
        """Forget all tokens after the first `length`."""
        if length < self.length:
            self.engine.crop(length)

    def pick(self, rows: Sequence[int]) -> None:
        """Replace the streams by copies of the streams with these numbers."""
        with torch.inference_mode():
            self.engine.pick(torch.tensor(rows, dtype=torch.int64, device=self.device))


class GeneratedToken(NamedTuple):
    """A token and its log-probability in nats, by the model's own distribution."""

    token: int
    logp: float


def decode_plainly(
    reader: Reader, prompt: Sequence[int], strategy: Strategy, rng: np.random.Generator
) -> Iterator[GeneratedToken]:
    """Yield tokens after the prompt without end, one forward each. The reader must have read the
    prompt except its last token.
    """
    text = list(prompt)
    while True:
        logits = reader.read(text[-1:])[0]
        text.append(draw(strategy.distribution(logits, text), rng))
        yield GeneratedToken(text[-1], float(log_softmax(logits)[text[-1]]))
