"""The work that a runtime does itself, in numpy: embeddings, RoPE tables and the attention mask.

A runtime in another language can be compared with this module, number by number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fairway.coreml.layout import MASKED

EPS = np.float32(2.0**-23)  # of F.rms_norm in fp32
BOS = 1  # the first token of a document; SmearGate does not reach across it


class Embedding:
    """Look up x0, float32[width, T], for T tokens: embedding, hashed bigram, norm and SmearGate."""

    def __init__(self, tables: Mapping[str, np.ndarray]):
        """Take the tables that `fairway.coreml.graph.host_tables` returns.

        `embed` is [vocab, width]. `bigram` [buckets, width] is already projected and scaled, and
        `smear` [width] is already a sigmoid; a model without these features lacks the table.
        """
        self.tables = {name: np.asarray(table, np.float32) for name, table in tables.items()}

    def __call__(self, tokens: Sequence[int], before: Sequence[int]) -> np.ndarray:
        """Embed `tokens`; `before` holds the last two tokens before them, fewer at the start."""
        ids = np.array([*before, *tokens], np.int64)
        x = self.tables["embed"][ids]
        if "bigram" in self.tables:
            x = x + self.tables["bigram"][self.buckets(ids)]
        x = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True, dtype=np.float32) + EPS)
        if "smear" in self.tables:
            previous = np.concatenate([x[:1], x[:-1]])
            previous[ids == BOS] = x[ids == BOS]
            x = x + self.tables["smear"] * (previous - x)
        return np.ascontiguousarray(x[len(before) :].T)

    def buckets(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bigram bucket of each token: (36313 current xor 27191 previous) mod (n - 1).

        The first token has no predecessor and takes the last bucket, n - 1.
        """
        last = len(self.tables["bigram"]) - 1
        return np.concatenate(
            [[last], np.bitwise_xor(36313 * tokens[1:], 27191 * tokens[:-1]) % last]
        )


def rotary_tables(first: int, count: int, rotary: int, base: float) -> tuple[np.ndarray, ...]:
    """Return cos and sin, float32[rotary, count], for `count` positions from `first` on.

    Angles are computed in float64: at position 1,000 a float32 angle is off by 6e-5.
    """
    frequency = base ** -(np.arange(rotary, dtype=np.float64) / rotary)
    angle = np.outer(frequency, np.arange(first, first + count, dtype=np.float64))
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def state_inputs(
    positions: np.ndarray, first: int, count: int, tokens: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mask and write of one call of shards with state, both float32[tokens, places].

    The call holds `count` real tokens from position `first` on, padded to `tokens`. `positions`,
    int64[places], holds the position of the token at each place, those of this call included.
    """
    rows = first + np.arange(tokens)[:, None]
    visible = (positions >= 0) & (positions <= rows) & (positions > rows - window)
    write = (positions == rows) & (np.arange(tokens)[:, None] < count)
    return np.where(visible, 0.0, MASKED).astype(np.float32), write.astype(np.float32)


def attention_mask(
    positions: np.ndarray, first: int, count: int, tokens: int, window: int = 0
) -> np.ndarray:
    """Return the mask of one call, float32[tokens, slots + tokens]: 0 where a token may look.

    The call holds `count` real tokens from position `first` on, padded to `tokens`. `positions`,
    int64[slots], holds the position of the token in each slot, or -1. A token sees the last
    `window` tokens, itself included; 0 means as many as there are slots. For example,
    attention_mask([0, 1, -1], 2, 1, 2) lets the first token see slots 0 and 1, and itself.
    """
    rows = first + np.arange(tokens)[:, None]
    keys = np.concatenate([positions, first + np.arange(tokens)])[None, :]
    real = np.concatenate([positions >= 0, np.arange(tokens) < count])[None, :]
    # A padding token sees itself: a softmax over nothing is not a number.
    visible = (real | (keys == rows)) & (keys <= rows) & (keys > rows - (window or len(positions)))
    return np.where(visible, 0.0, MASKED).astype(np.float32)
