"""Low-rank repair: the largest parts of the rounding error, as two small factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.methods.error_correcting import ErrorCorrecting
from fairway.methods.integers import offset_codes, rounded_matrix
from fairway.methods.layer_inputs import input_rms
from fairway.methods.stored import Codes, Repaired, Stored
from train_gpt import LEAST_K

FACTOR_BITS = 6


@dataclass(frozen=True)
class LowRankRepair(ErrorCorrecting):
    """LQER: int-rms, with steps of k if k is given, and the `rank` largest singular parts of its
    error as a product of two factors of 6 bits, which is added. With weighted, the error is first
    multiplied by the root mean square of each input on training text, so that the parts that change
    the outputs are repaired. Factors have signed codes and a step for each row, or with offsets
    also an offset for each row. The bigram table is rounded to nearest.
    """

    bits: int
    rank: int
    weighted: bool = False
    offsets: bool = False
    k: float = 0.0

    def stored(self, weight: Tensor, hessian: Tensor | None) -> Stored:
        base = rounded_matrix(weight, self.bits, 0, self.k or LEAST_K[self.bits])
        if hessian is None:
            return base
        inputs = input_rms(hessian) if self.weighted else torch.ones(weight.size(1))
        return repaired(weight, base, self.rank, inputs, self.offsets)


def repaired(
    weight: Tensor, base: Codes, rank: int, inputs: Tensor, offsets: bool = False
) -> Repaired:
    """Store the largest parts of the error of `base`, weighted by the size of inputs, as factors.

    The left vectors have length 1: all of a part's size is in its row of the right factor, which
    has a step of its own.
    """
    error = (weight - base.weight()) * inputs
    left, sizes, right = torch.linalg.svd(error, full_matrices=False)
    right = sizes[:rank, None] * right[:rank] / inputs
    return Repaired(base, factor(left[:, :rank], offsets), factor(right, offsets))


def factor(values: Tensor, offsets: bool) -> Codes:
    """Round a factor by rows, with or without offsets."""
    if offsets:
        return offset_codes(values, FACTOR_BITS, values.size(1))
    return rounded_matrix(values, FACTOR_BITS, 0, 0.0)
