"""The decoding strategies by name and the numbers that they take, as the command line and the code
see them.

This module imports neither torch nor numpy, so that `fairway generate --help` answers at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple


class StrategyOption(NamedTuple):
    """One number of a strategy: its default, which values it accepts, and both in words."""

    default: float
    accepts: Callable[[float], bool]
    range_words: str
    help: str


STRATEGY_NAMES = ("greedy", "temperature", "top-k", "top-p", "min-p", "typical")
STRATEGY_OPTIONS = {
    "temperature": StrategyOption(
        0.8,
        lambda x: 0 < x < math.inf,
        "more than 0 (to take the best token always: --strategy greedy)",
        "below 1: safer; above 1: bolder",
    ),
    "top_k": StrategyOption(
        40, lambda x: x >= 1, "a whole number of at least 1", "sample among the K best tokens"
    ),
    "top_p": StrategyOption(
        0.9,
        lambda x: 0 < x <= 1,
        "more than 0 and at most 1",
        "sample among the fewest best tokens that together have this probability",
    ),
    "min_p": StrategyOption(
        0.1,
        lambda x: 0 <= x < 1,
        "at least 0 and less than 1",
        "sample among the tokens with at least this fraction of the best token's probability",
    ),
    "typical": StrategyOption(
        0.9,
        lambda x: 0 < x <= 1,
        "more than 0 and at most 1",
        "sample among the tokens whose surprise is nearest to the entropy, "
        "up to this probability together",
    ),
    "repetition_penalty": StrategyOption(
        1.0,
        lambda x: 1 <= x < math.inf,
        "at least 1 (1: no penalty)",
        "make tokens that the text already holds less likely",
    ),
}
DRAFT_KINDS = ("none", "ngram", "suffix", "layers", "layers:K")


def option_name(field: str) -> str:
    """`option_name("top_k")` is "--top-k"."""
    return f"--{field.replace('_', '-')}"
