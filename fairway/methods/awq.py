"""AWQ: columns that meet large inputs get finer steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fairway.methods.error_correcting import ErrorCorrecting
from fairway.methods.integers import nearest
from fairway.methods.layer_inputs import input_rms, output_errors
from fairway.methods.stored import Codes

EXPONENTS = torch.linspace(0, 1, 21).tolist()  # 0 scales nothing


@dataclass(frozen=True)
class ActivationScaled(ErrorCorrecting):
    """AWQ's idea, searched by its own measure: before rounding, each column is multiplied by a
    power of the root mean square of its input on training text, and the file holds the inverse,
    bfloat16 for each column. Of 21 exponents from 0 to 1, each matrix takes the one with the least
    squared error of its outputs. Steps are those of int-rms, or of int-g with `group_columns`.
    """

    bits: int
    group_columns: int = 0

    def stored(self, weight: Tensor, hessian: Tensor | None) -> Codes:
        if hessian is None:
            return nearest(weight, self.bits, self.group_columns)
        return best_scaled(weight, self.bits, self.group_columns, hessian)


def best_scaled(weight: Tensor, bits: int, group: int, hessian: Tensor) -> Codes:
    """Return the codes and column scales of least output error, over the exponents."""
    logs = input_rms(hessian).log()
    trials = [scaled(weight, bits, group, exponent * logs) for exponent in EXPONENTS]
    costs = [float(output_errors(t.weight() - weight, hessian).sum()) for t in trials]
    return trials[costs.index(min(costs))]


def scaled(weight: Tensor, bits: int, group: int, logs: Tensor) -> Codes:
    """Round a matrix whose columns are multiplied by exp(logs), up to a factor for all.

    The factor makes the geometric mean 1. What the file holds is the inverse.
    """
    inverse = (logs.mean() - logs).exp().bfloat16().float()
    return replace(nearest(weight / inverse, bits, group), scales=inverse)
