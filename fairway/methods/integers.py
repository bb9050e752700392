"""Weight-only rounding to integers, by rows or by groups of columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import with_stored
from fairway.methods.stored import Codes, Floats, Stored
from train_gpt import GPT, PLAIN_BITS, levels, quantise, row_steps, tensor_bits, to_codes


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
        stored = {
            name: plain(p)
            if tensor_bits(name, model.cfg) == PLAIN_BITS
            else rounded_matrix(p, self.bits, self.group_columns, self.k)
            for name, p in model.named_parameters()
        }
        return with_stored(model, stored)
