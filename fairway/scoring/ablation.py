"""Other mixtures of the same columns: what each expert gains, and experts that know older text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fairway.scoring.columns import Columns
from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import EXPERTS, Mixture
from fairway.scoring.mixed import DEFAULT_EXPERTS, chunks, count_ahead, find_matches
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text

THREE = ("neural", "ngram", "match")
# Name: settings and experts of each mixture. Every expert alone is weighed by online EM, so that
# the rows differ in their expert only. docs/RESULTS.md has each gain, and what was tried and
# dropped.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{f"+ {e}": (dict(mix_weights="em"), ("neural", e)) for e in EXPERTS[3:]},
    "+ temperature": (dict(mix_weights="em"), ("neural", "sharp", "flat")),
    "all, linear": (dict(mix_weights="exponential"), THREE),
    "all, log": (dict(mix_mode="log"), THREE),
    "online EM": (dict(mix_weights="em"), THREE),
    "contextual": (dict(mix_weights="sets"), THREE),
    "contextual, chain": (dict(mix_weights="sets"), (*THREE, "chain")),
}


def ablation(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    matches: Matches,
    vocab_size: int,
    cfg: EvalConfig,
    threads: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Return the sum of log-probabilities of each of VARIANTS, in one pass over the columns.

    `on_progress` gets the number of rows that are scored so far.
    """
    mixtures = {
        name: Mixture(vocab_size, replace(cfg, **settings), experts)
        for name, (settings, experts) in VARIANTS.items()
    }
    sums = dict.fromkeys(mixtures, 0.0)
    with count_ahead(tokens, vocab_size, cfg, threads) as counted:
        for chunk in chunks(tokens, sizes, columns, matches, counted):
            for name, mixture in mixtures.items():
                sums[name] += float(mixture.fill(chunk.inputs).sum())
            if on_progress:
                on_progress(chunk.first + len(chunk.inputs.targets))
    return sums


def delayed(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    vocab_size: int,
    cfg: EvalConfig,
    delay: int,
    threads: int = 1,
) -> float:
    """Return the sum of log-probabilities if experts know text `delay` tokens old; linear."""
    matches, total = find_matches(tokens, vocab_size, cfg, delay), 0.0
    mixture = Mixture(vocab_size, replace(cfg, mix_mode="linear"), DEFAULT_EXPERTS)
    with count_ahead(tokens, vocab_size, cfg, threads, delay) as counted:
        for chunk in chunks(tokens, sizes, columns, matches, counted):
            total += float(mixture.fill(chunk.inputs).sum())
    return total


def as_rows(sums: Mapping[str, float], text: Text, base: float) -> list[dict[str, Any]]:
    """Return name, bits per byte and gain over `base` of each mixture, for a table and for JSON."""
    bpb = {name: -total / np.log(2) / text.bytes for name, total in sums.items()}
    return [dict(name=name, bpb=value, gain=base - value) for name, value in bpb.items()]
