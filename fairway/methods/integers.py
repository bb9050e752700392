"""Weight-only rounding to integers, by rows or by groups of columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import with_stored
from fairway.methods.stored import Codes, Floats, Stored
from train_gpt import GPT, LEAST_K, PLAIN_BITS, levels, quantise, row_steps, tensor_bits, to_codes

NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)  # ranges, as parts of the widest


def by_groups(weight: Tensor, group: int) -> Tensor:
    """Return [rows * groups, columns of a group], with zeros after each row's last group.

    As many groups as `group` columns each need, and all of one width, as `spread` assumes.
    """
    columns = weight.size(1)
    width = -(-columns // -(-columns // group))
    return F.pad(weight, (0, -columns % width)).reshape(-1, width)


def absmax_steps(weight: Tensor, bits: int) -> Tensor:
    """Return the step of each row by its absolute maximum, exact in bfloat16: nothing is clipped.

    bfloat16 rounds to nearest, so that a step may be a little too small: one more ulp covers all.
    """
    step = weight.float().abs().amax(dim=1, keepdim=True) / levels(bits) * (1 + 2**-8)
    step = step.bfloat16().float()
    return step.masked_fill(step == 0, 1.0)


def rounded_matrix(weight: Tensor, bits: int, group: int, k: float) -> Codes:
    """Round a matrix: with steps of k * rms, or of the absolute maximum where k is 0."""
    parts = by_groups(weight.detach(), group) if group else weight.detach()
    steps = row_steps(parts, k, bits) if k else absmax_steps(parts, bits)
    codes = to_codes(parts, steps, bits).view(len(weight), -1)[:, : weight.size(1)]
    return Codes(codes.to(torch.int8), steps.view(len(weight), -1))


def plain(p: Tensor) -> Stored:
    """Vectors as the artifact holds them: float16."""
    return Floats(quantise(p.detach(), 0.0, PLAIN_BITS).values)


def is_matrix(name: str, model: GPT) -> bool:
    """Return whether the artifact holds a parameter as codes: matrices and embeddings."""
    return tensor_bits(name, model.cfg) != PLAIN_BITS


def with_matrices(model: GPT, stored_as: Callable[[str, Tensor], Stored]) -> GPT:
    """Return a copy of a model: each matrix as `stored_as` stores it, vectors as float16."""
    stored = {
        name: stored_as(name, p.detach()) if is_matrix(name, model) else plain(p)
        for name, p in model.named_parameters()
    }
    return with_stored(model, stored)


def nearest(weight: Tensor, bits: int, group: int = 0) -> Codes:
    """Round to nearest as the rows intN-rms and intN-gM do: where error correction starts."""
    return rounded_matrix(weight, bits, group, 0.0 if group else LEAST_K[bits])


@dataclass(frozen=True)
class Integers(Method):
    """Each matrix as integer codes of `bits` bits times a step, for each row, or for each `group`
    columns of a row; vectors as float16. The step is k times the root mean square over the largest
    code, which clips a few weights, or with k = 0 the absolute maximum over the largest code, which
    clips none. The artifact uses k * rms for rows. Codes are entropy-coded, or packed two a byte
    where a codec does better on that.
    """

    bits: int
    group_columns: int = 0
    k: float = 0.0
    group = "weight-only"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return with_matrices(
            model, lambda _, w: rounded_matrix(w, self.bits, self.group_columns, self.k)
        )


@dataclass(frozen=True)
class OffsetIntegers(Method):
    """Each matrix as codes of `bits` bits times a step plus an offset, both for each `group`
    columns of a row; vectors as float16. Codes run from 0 to the largest, so that 2 bits have four
    values, where signed codes have three. Of some ranges around the group's middle, from its
    smallest to its largest weight and narrower, the one with the least squared error is taken.
    """

    bits: int
    group_columns: int
    group = "weight-only"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return with_matrices(model, lambda _, w: offset_codes(w, self.bits, self.group_columns))


def offset_codes(weight: Tensor, bits: int, group: int) -> Codes:
    """Round a matrix to codes with a step and an offset for each group of columns of a row."""
    rows, columns = weight.shape
    parts = by_groups(weight, group)
    low, high = parts.amin(dim=1, keepdim=True), parts.amax(dim=1, keepdim=True)
    best = torch.full_like(low, torch.inf)
    codes, steps, offsets = torch.zeros_like(parts), torch.ones_like(low), torch.zeros_like(low)
    for narrow in NARROWER:
        step = ((high - low) * narrow / (2**bits - 1)).bfloat16().float()
        step = step.masked_fill(step == 0, 1.0)
        offset = ((high + low - (high - low) * narrow) / 2).bfloat16().float()
        trial = ((parts - offset) / step).round().clamp(0, 2**bits - 1)
        error = (trial * step + offset - parts).square().sum(dim=1, keepdim=True)
        better = error < best
        best, codes = torch.where(better, error, best), torch.where(better, trial, codes)
        steps, offsets = torch.where(better, step, steps), torch.where(better, offset, offsets)
    codes = codes.view(rows, -1)[:, :columns].to(torch.int8)
    return Codes(codes, steps.view(rows, -1), offsets.view(rows, -1))
