"""Other mixtures of the same columns: what each expert adds, and what experts that know only older text add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fairway.scoring.columns import Columns
from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import EXPERTS, Mixture
from fairway.scoring.mixed import DEFAULT_EXPERTS, chunks, find_matches, make_ngram
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text

THREE = ("neural", "ngram", "match")
# name: settings and experts of each mixture that is tried on the same columns.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{f"+ {e}": (dict(mix_weights="em"), ("neural", e)) for e in EXPERTS[3:]},
    "+ temperature": (dict(mix_weights="em"), ("neural", "sharp", "flat")),
    "all, linear": (dict(mix_weights="exponential"), THREE),
    "all, log": (dict(mix_mode="log"), THREE),
    "fixed share": (dict(mix_weights="share"), THREE),
    "online EM": (dict(mix_weights="em"), THREE),
    "contextual": (dict(mix_weights="sets"), THREE),
    "contextual, chain": (dict(mix_weights="sets"), (*THREE, "chain")),
    "gate, chain": (dict(mix_weights="gate"), (*THREE, "chain")),
}


def ablation(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    matches: Matches,
    vocab_size: int,
    cfg: EvalConfig,
    told: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Sum of log-probabilities for each mixture of VARIANTS, all in one pass over the columns."""
    tried = {
        name: Mixture(vocab_size, replace(cfg, **settings), experts)
        for name, (settings, experts) in VARIANTS.items()
    }
    sums = dict.fromkeys(tried, 0.0)
    for chunk in chunks(tokens, sizes, columns, matches, make_ngram(vocab_size, cfg, tokens)):
        for name, mixture in tried.items():
            sums[name] += float(mixture.fill(chunk.inputs).sum())
        if told:
            told(chunk.first + len(chunk.inputs.targets))
    return sums


def delayed(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    vocab_size: int,
    cfg: EvalConfig,
    delay: int,
) -> float:
    """Sum of log-probabilities of a linear mixture whose experts know only text that is `delay` tokens old."""
    matches, total = find_matches(tokens, vocab_size, cfg, delay), 0.0
    mixture = Mixture(vocab_size, replace(cfg, mix_mode="linear"), DEFAULT_EXPERTS)
    for chunk in chunks(
        tokens, sizes, columns, matches, make_ngram(vocab_size, cfg, tokens, delay)
    ):
        total += float(mixture.fill(chunk.inputs).sum())
    return total


def as_rows(sums: Mapping[str, float], text: Text, base: float) -> list[dict[str, Any]]:
    """Bits per byte and gain over `base` of each, for a table and for JSON."""
    found = {name: -total / np.log(2) / text.bytes for name, total in sums.items()}
    return [dict(name=name, bpb=bpb, gain=base - bpb) for name, bpb in found.items()]
