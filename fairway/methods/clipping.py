"""Clip search: the step of each row that costs least, instead of one rule for all rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.methods.error_correcting import ErrorCorrecting
from fairway.methods.integers import absmax_steps
from fairway.methods.layer_inputs import output_errors
from fairway.methods.stored import Codes
from train_gpt import to_codes

CLIPS = torch.linspace(1.0, 0.3, 36).tolist()  # parts of a row's absolute maximum


@dataclass(frozen=True)
class ClipSearch(ErrorCorrecting):
    """Codes of `bits` bits to nearest, with a step for each row that is searched: of 36 clips, from
    the row's absolute maximum to 0.3 of it, the one with the least squared error of the weights,
    or, with by = outputs, of the outputs on training text. The bigram table, which has no inputs,
    goes by weights.
    """

    bits: int
    by: str

    def stored(self, weight: Tensor, hessian: Tensor | None) -> Codes:
        return with_best_clip(weight, self.bits, hessian if self.by == "outputs" else None)


def with_best_clip(weight: Tensor, bits: int, hessian: Tensor | None) -> Codes:
    """Round each row with the clip of least error in weights, or in outputs with a Hessian."""
    widest = absmax_steps(weight, bits)
    best, steps = torch.full((len(weight),), torch.inf), widest
    for clip in CLIPS:
        step = (widest * clip).bfloat16().float()
        errors = to_codes(weight, step, bits) * step - weight
        cost = errors.square().sum(1) if hessian is None else output_errors(errors, hessian)
        steps = torch.where((cost < best)[:, None], step, steps)
        best = torch.minimum(best, cost)
    return Codes(to_codes(weight, steps, bits).to(torch.int8), steps)
