"""Synthetic text, for scorers that are certified without shards."""

from __future__ import annotations

import numpy as np

from train_gpt import BOS_ID


def synthetic_tokens(vocab_size: int, n: int, seed: int = 0) -> np.ndarray:
    """Return uint16[n]: documents of about 200 tokens, in which few tokens are frequent and each
    has four usual followers, so that a scorer has something to learn.
    """
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), [BOS_ID])
    frequency = 1 / np.arange(1, len(ordinary) + 1)
    frequency /= frequency.sum()
    followers = rng.permuted(rng.choice(ordinary, (vocab_size, 4), p=frequency), axis=1)
    tokens, independent = np.empty(n, np.uint16), rng.choice(ordinary, n, p=frequency)
    current, choice, kind = BOS_ID, rng.integers(0, 4, n), rng.random(n)
    for i in range(n):
        if i == 0 or kind[i] < 0.005:
            current = BOS_ID
        elif kind[i] < 0.3:
            current = independent[i]
        else:
            current = followers[current, choice[i]]
        tokens[i] = current
    return tokens
