"""What a runtime does itself: embeddings of tokens, rotations of positions, and the mask; in numpy, so that a runtime
in any language can be held against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fairway.coreml.layout import MASKED

EPS = np.float32(2.0**-23)  # of F.rms_norm in fp32
BOS = 1  # nothing is smeared across it


class Embedding:
    """[width, T] of tokens, with all that looks at the token before: the hashed bigram and the SmearGate."""

    def __init__(self, tables: Mapping[str, np.ndarray]):
        """embed [vocab, width]; bigram [buckets, width], projected and scaled already; smear [width], a sigmoid
        already; the last two where the model has them."""
        self.tables = {name: np.asarray(table, np.float32) for name, table in tables.items()}

    def __call__(self, tokens: Sequence[int], before: Sequence[int]) -> np.ndarray:
        """`before`: the two tokens before them, or as many as there were."""
        all_of = np.array([*before, *tokens], np.int64)
        x = self.tables["embed"][all_of]
        if "bigram" in self.tables:
            x = x + self.tables["bigram"][self.buckets(all_of)]
        x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True, dtype=np.float32) + EPS)
        if "smear" in self.tables:
            last = np.concatenate([x[:1], x[:-1]])
            last[all_of == BOS] = x[all_of == BOS]
            x = x + self.tables["smear"] * (last - x)
        return np.ascontiguousarray(x[len(before) :].T)

    def buckets(self, tokens: np.ndarray) -> np.ndarray:
        """(36313 cur xor 27191 prev) mod (buckets - 1); the first token of a text has the last bucket."""
        last = len(self.tables["bigram"]) - 1
        return np.concatenate(
            [[last], np.bitwise_xor(36313 * tokens[1:], 27191 * tokens[:-1]) % last]
        )


def rotations(first: int, count: int, rotary: int, base: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32[rotary, count], of float64 angles, for positions from `first` on."""
    frequency = base ** -(np.arange(rotary, dtype=np.float64) / rotary)
    angle = np.outer(frequency, np.arange(first, first + count, dtype=np.float64))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def mask_of(
    positions: np.ndarray, first: int, count: int, tokens: int, window: int = 0
) -> np.ndarray:
    """float32[tokens, slots + tokens] for a call of `count` tokens from position `first`, filled up to `tokens`.

    positions: int64[slots], of the token in each slot, or -1. A token looks back on `window` tokens, itself included
    (0: as many as there are slots): mask_of([0, 1, -1], 2, 1, 2) lets the first see slots 0 and 1, and itself."""
    at = first + np.arange(tokens)[:, None]
    keys = np.concatenate([positions, first + np.arange(tokens)])[None, :]
    real = np.concatenate([positions >= 0, np.arange(tokens) < count])[None, :] | (
        keys == at
    )  # a filler sees itself
    seen = real & (keys <= at) & (keys > at - (window or len(positions)))
    return np.where(seen, 0.0, MASKED).astype(np.float32)
