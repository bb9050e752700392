"""What every codec of a correction table takes and gives, and what both of its sides know beforehand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from train_gpt import UserError, need

THRESHOLD = 2.0**-10  # a token of less probability is in the tail
MOST_HELD = 1 << 26  # probabilities: half a GiB


class CorrectionError(UserError):
    """A correction table that is damaged, hostile, or not of this artifact and this split."""


class Entries(NamedTuple):
    """Listed rows and their right tokens; row j is about target tokens[j + 1]."""

    positions: np.ndarray  # int64[m], strictly increasing
    tokens: np.ndarray  # int64[m]


@dataclass(frozen=True)
class View:
    """The model's own opinion of each row, formed from the text before it: known when writing and when reading.

    Codecs that ask nothing of the model use `rows` and `vocab_size` alone. `distributions(positions)` gives float64
    [m, V]; it must give the same bits whenever it is asked for the same positions.
    """

    rows: int
    vocab_size: int
    threshold: float = THRESHOLD
    tail: np.ndarray | None = (
        None  # float32[rows] or float64: the probability of all tokens in the tail
    )
    distributions: Callable[[np.ndarray], np.ndarray] | None = None

    def holding(self, rows: np.ndarray) -> View:
        """The same view for codecs that see these rows again and again: asks once, when first asked, if all fit."""
        if self.distributions is None or len(rows) * self.vocab_size > MOST_HELD:
            return self
        kept = functools.cache(lambda: self.distributions(rows))
        return replace(
            self, distributions=lambda positions: kept()[np.searchsorted(rows, positions)]
        )


def checked(positions: np.ndarray, tokens: np.ndarray, view: View) -> Entries:
    """Entries that a table of this view may hold, as int64."""
    positions, tokens = np.asarray(positions, dtype=np.int64), np.asarray(tokens, dtype=np.int64)
    need(
        positions.ndim == 1 and positions.shape == tokens.shape,
        f"the correction table lists {positions.size} positions but {tokens.size} tokens",
        CorrectionError,
    )
    if not len(positions):
        return Entries(positions, tokens)
    need(
        (np.diff(positions) > 0).all(),
        "the correction table's positions do not increase",
        CorrectionError,
    )
    need(
        0 <= positions[0] and positions[-1] < view.rows,
        f"the correction table lists row "
        f"{positions[0] if positions[0] < 0 else positions[-1]}, but the split has {view.rows} rows",
        CorrectionError,
    )
    need(
        0 <= tokens.min() and tokens.max() < view.vocab_size,
        f"the correction table lists token {tokens.max()}, but "
        f"the vocabulary has {view.vocab_size}",
        CorrectionError,
    )
    return Entries(positions, tokens)


def gaps_of(positions: np.ndarray) -> np.ndarray:
    """Rows left out before each position: int64[m], none negative."""
    return np.diff(positions, prepend=-1) - 1


def scatter_bits(entries: int, rows: int) -> float:
    """Entropy in bits of which rows are listed, were each listed at the same rate: rows x h(entries / rows)."""
    if not 0 < entries < rows:
        return 0.0
    rate = entries / rows
    return -(entries * np.log2(rate) + (rows - entries) * np.log1p(-rate) / np.log(2))
