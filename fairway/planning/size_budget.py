"""The artifact's bytes, and the rounding step `k` that the budget of bytes forces.

Steps are k * rms / levels, so k sets the entropy of the codes, and with it the size: about
7.05 - log2 k bits for a six-bit weight. Codes of normal weights stand in for those of trained ones,
as in the trainer's own prediction before training.
"""

from __future__ import annotations

import functools
import lzma
import math
from typing import Any, NamedTuple

from fairway.planning.trainer_settings import trainer_names, trainer_source_path
from fairway.planning.workload import count_parameters
from fairway.records.files import read_bytes

LEAST_K, MOST_K = 1.2, 64.0  # the trainer's grid
# Bits in the trainer's prediction: header, each tensor, each fp16 value, each row's step.
HEADER_BITS, TENSOR_BITS, PLAIN_BITS, STEP_BITS = 8000, 640, 14, 10
# Two points of the challenge's tokenizers, packed: 100,298 bytes at 1,024 pieces, 141,515 at 8,192.
TOKENIZER_BYTES, PIECE_BYTES = 94_400, 5.75


class SizePlan(NamedTuple):
    """The artifact at the finest steps that fit its budget."""

    k: float
    fits: bool
    weight_bits: float  # mean over matrices and embeddings
    error: float  # of a weight, relative to its row's rms: step / sqrt(12)
    model_bytes: int
    tokenizer_bytes: int
    code_bytes: int
    budget_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.tokenizer_bytes + self.code_bytes


@functools.cache
def code_entropy(step: float, levels: int) -> float:
    """Return the bits of a standard normal value rounded to multiples of `step`, clipped."""
    edges = [(code + 0.5) * step for code in range(levels)]
    above = [0.5 * math.erfc(edge / math.sqrt(2)) for edge in edges]  # P(|code| > i) / 2
    sides = [a - b for a, b in zip(above, [*above[1:], 0.0], strict=True)]
    cells = [1 - 2 * above[0], *sides, *sides]
    return -sum(p * math.log2(p) for p in cells if p > 0)


def code_bits(k: float, bits: int) -> float:
    """Return the bits of one weight at this k; below the trainer's least k, nothing gets finer."""
    levels = trainer_names()["levels"](bits)
    return code_entropy(max(k, trainer_names()["LEAST_K"][bits]) / levels, levels)


def matrix_groups(cfg: Any) -> list[tuple[int, int, int]]:
    """Return (bits, weights, rows) of the attention, the MLPs and the embeddings."""
    held = count_parameters(cfg)
    groups = ((cfg.attn_bits, held.attention), (cfg.mlp_bits, held.mlp))
    groups += ((cfg.embed_bits, held.bigram + held.embeddings),)
    return [(b, sum(r * c for r, c in shapes), sum(r for r, _ in shapes)) for b, shapes in groups]


def model_bytes_at(cfg: Any, k: float) -> float:
    """Return the bytes of the artifact without its tokenizer, as the trainer predicts them."""
    held = count_parameters(cfg)
    bits = HEADER_BITS + TENSOR_BITS * held.tensors + PLAIN_BITS * held.plain
    for group_bits, weights, rows in matrix_groups(cfg):
        bits += weights * code_bits(k, group_bits) + rows * STEP_BITS
    return bits / 8


@functools.cache
def trainer_code_bytes() -> int:
    """Return the bytes that the trainer counts for itself, packed."""
    source = read_bytes(trainer_source_path())
    packed = lzma.compress(source, preset=9 | lzma.PRESET_EXTREME)
    return len(packed) + trainer_names()["CODE_STUB_BYTES"]


def size_plan(cfg: Any) -> SizePlan:
    """Find the least k whose artifact fits SIZE_BUDGET_BYTES, by bisection."""
    tokenizer = round(TOKENIZER_BYTES + PIECE_BYTES * cfg.vocab_size) * cfg.embed_tokenizer
    target = cfg.size_budget_bytes - cfg.size_margin_bytes - trainer_code_bytes() - tokenizer
    low, high = LEAST_K, MOST_K
    if model_bytes_at(cfg, low) <= target:
        high = low
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        fits = model_bytes_at(cfg, middle) <= target
        low, high = (low, middle) if fits else (middle, high)
    groups = matrix_groups(cfg)
    weights = sum(count for _, count, _ in groups)
    used = [max(high, trainer_names()["LEAST_K"][bits]) for bits, _, _ in groups]
    parts = list(zip(groups, used, strict=True))
    return SizePlan(
        used[1],
        model_bytes_at(cfg, high) <= target,
        sum(count * code_bits(k, bits) for (bits, count, _), k in parts) / weights,
        used[1] / trainer_names()["levels"](cfg.mlp_bits) / math.sqrt(12),
        round(model_bytes_at(cfg, high)),
        tokenizer,
        trainer_code_bytes(),
        cfg.size_budget_bytes,
    )
