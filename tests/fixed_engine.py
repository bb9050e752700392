"""Engines and readers for the decoding tests, and the exact probabilities of their texts."""

import numpy as np
import torch

from fairway.decoding.reader import Reader
from fairway.decoding.strategies import log_softmax


class Fixed:
    """An engine without a model: the last two tokens look the logits up. It accepts pieces of at
    most `most` tokens.
    """

    def __init__(self, table: np.ndarray, most: int = 1000):
        self.table, self.most, self.streams = table.astype(np.float32), most, None  # [V, V, V]

    @property
    def read(self) -> int:
        return len(self.streams[0]) if self.streams else 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.dtype == torch.int64 and 1 <= tokens.size(1) <= self.most
        self.streams = self.streams or [[] for _ in tokens]
        out = []
        for stream, piece in zip(self.streams, tokens.tolist(), strict=True):
            before = [0, *stream][-1:] + piece
            stream += piece
            out.append(self.table[before[:-1], before[1:]])
        return torch.from_numpy(np.stack(out))

    def crop(self, length: int) -> None:
        if not 0 <= length <= self.read:
            raise ValueError(length)
        self.streams = [stream[:length] for stream in self.streams]

    def pick(self, rows: torch.Tensor) -> None:
        self.streams = [list(self.streams[row]) for row in rows.tolist()]


def table(V: int, seed: int = 0, spread: float = 1.5) -> np.ndarray:
    """Return random logits, float64[V, V, V], for `Fixed`."""
    return np.random.default_rng(seed).normal(0, spread, (V, V, V))


def reader_after(engine, prompt: list[int], most: int = 128) -> Reader:
    """Return a reader that has read the prompt except its last token."""
    reader = Reader(engine, most=most)
    if len(prompt) > 1:
        reader.last(prompt[:-1])
    return reader


def logp_of(logits: np.ndarray, prompt: list[int], tokens: tuple[int, ...]) -> float:
    """Return the log-probability of `tokens` after a prompt, by the logits of `Fixed`."""
    text, total = [0, *prompt], 0.0
    for token in tokens:
        total += log_softmax(logits[text[-2], text[-1]])[token]
        text.append(token)
    return float(total)
