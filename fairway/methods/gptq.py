"""GPTQ: the error of each rounded column moves to the columns after it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fairway.methods.error_correcting import ErrorCorrecting
from fairway.methods.integers import nearest
from fairway.methods.stored import Codes, spread
from train_gpt import gptq_codes, gptq_factor


@dataclass(frozen=True)
class GPTQ(ErrorCorrecting):
    """The steps of int-rms, or of int-g where `group_columns` is set, with codes by GPTQ: columns
    are rounded one after the other, those with the largest inputs first, and the error that each
    makes in the outputs is corrected in the columns that are left. The inputs come from 128
    sequences of training text, of the model's own samples, or of random tokens. The embedding is
    corrected as the head that it also is; the bigram table is rounded to nearest.
    """

    bits: int
    group_columns: int = 0
    source: str = "training"

    def stored(self, weight: Tensor, hessian: Tensor | None) -> Codes:
        start = nearest(weight, self.bits, self.group_columns)
        return start if hessian is None else corrected(weight, start, self.bits, hessian)


def corrected(weight: Tensor, start: Codes, bits: int, hessian: Tensor) -> Codes:
    """Return codes by GPTQ with the steps of `start`."""
    parts = (weight, spread(start.steps, weight.size(1)), *gptq_factor(hessian)[:2])
    codes = gptq_codes(bits, *(part[None] for part in parts))[0]
    return Codes(codes.to(start.codes.dtype), start.steps)
