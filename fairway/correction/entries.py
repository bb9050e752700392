"""The codecs' interface: entries of a correction table, and what is known about the rows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fairway.compression.leb128 import read_number
from train_gpt import UserError

THRESHOLD = 2.0**-10  # tokens below this probability are in the tail
MOST_CACHED = 1 << 26  # probabilities: half a GiB


class CorrectionError(UserError):
    """A correction table that is damaged, hostile, or not of this artifact and this split."""


class Entries(NamedTuple):
    """Listed rows and their right tokens. Row j predicts token j + 1 of the split."""

    positions: np.ndarray  # int64[m], strictly increasing
    tokens: np.ndarray  # int64[m]


@dataclass(frozen=True)
class ModelView:
    """The model's opinion of each row, from the text before it: known to writer and reader alike.

    Codecs that do not use the model read only `rows` and `vocab_size`. `distributions(positions)`
    returns float64[m, V]; the same positions must always give the same bits.
    """

    rows: int
    vocab_size: int
    threshold: float = THRESHOLD
    tail: np.ndarray | None = None  # float32 or float64[rows]: summed probability of the tail
    distributions: Callable[[np.ndarray], np.ndarray] | None = None

    def cached_for(self, rows: np.ndarray) -> ModelView:
        """Return a view that computes the distributions of these rows once, if they fit in memory.

        A search for the best entries encodes subsets of the same rows again and again.
        """
        if self.distributions is None or len(rows) * self.vocab_size > MOST_CACHED:
            return self
        compute = functools.cache(lambda: self.distributions(rows))

        def lookup(positions: np.ndarray) -> np.ndarray:
            return compute()[np.searchsorted(rows, positions)]

        return replace(self, distributions=lookup)


def check_entries(positions: np.ndarray, tokens: np.ndarray, view: ModelView) -> Entries:
    """Return entries as int64, or refuse those that no table of this view may hold."""
    positions, tokens = np.asarray(positions, dtype=np.int64), np.asarray(tokens, dtype=np.int64)
    if positions.ndim != 1 or positions.shape != tokens.shape:
        raise CorrectionError(
            f"the correction table lists {positions.size} positions but {tokens.size} tokens"
        )
    if not len(positions):
        return Entries(positions, tokens)
    if not (np.diff(positions) > 0).all():
        raise CorrectionError("the correction table's positions do not increase")
    if positions[0] < 0 or positions[-1] >= view.rows:
        row = positions[0] if positions[0] < 0 else positions[-1]
        raise CorrectionError(
            f"the correction table lists row {row}, but the split has {view.rows} rows"
        )
    if tokens.min() < 0 or tokens.max() >= view.vocab_size:
        raise CorrectionError(
            f"the correction table lists token {tokens.max()}, but the vocabulary has "
            f"{view.vocab_size}"
        )
    return Entries(positions, tokens)


def read_count(payload: bytes, view: ModelView) -> tuple[int, int]:
    """Return the number of entries, with which each payload starts, and where that number ends."""
    try:
        count, end = read_number(payload, 0)
    except ValueError as e:
        raise CorrectionError(
            f"the correction table's number of entries: {e}; build the table again"
        ) from None
    if count > view.rows:
        raise CorrectionError(
            f"the correction table lists {count} entries, but the split has {view.rows} rows; "
            "build the table again"
        )
    return count, end


def skipped_rows(positions: np.ndarray) -> np.ndarray:
    """Return int64[m], the number of rows between each entry and the one before it.

    >>> skipped_rows(np.array([2, 3, 7]))
    array([2, 0, 3])
    """
    return np.diff(positions, prepend=-1) - 1


def position_entropy(entries: int, rows: int) -> float:
    """Return the bits that say which rows are listed, if all rows are equally likely.

    This is rows x h(entries / rows), where h is the entropy of a yes or no.
    """
    if not 0 < entries < rows:
        return 0.0
    rate = entries / rows
    return -(entries * np.log2(rate) + (rows - entries) * np.log1p(-rate) / np.log(2))
