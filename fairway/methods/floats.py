"""Baselines: the weights in a floating-point type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairway.methods.error_correcting import clamped
from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.parcel import with_stored
from fairway.methods.stored import Floats
from train_gpt import GPT

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FloatWeights(Method):
    """Every parameter in one floating-point type. fp32 is the baseline that all rows are compared
    with; bf16 keeps its range and drops 16 bits of each value, fp16 keeps three bits more.
    """

    type: str
    group = "baselines"
    error_bound = 2.0**-8

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        kind = TYPES[self.type]
        return with_stored(
            model, {n: Floats(p.detach().to(kind)) for n, p in model.named_parameters()}
        )


@dataclass(frozen=True)
class Clamped(Method):
    """fp32 with each matrix clamped to the range of the model's own quantiser. Training with
    rounding never sees weights outside it, so that such a model may score better with the clamp,
    and error-correcting methods keep to it where it does on calibration text.
    """

    group = "baselines"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        result = clamped(model)
        pairs = zip(model.parameters(), result.parameters(), strict=True)
        if all(torch.equal(before, after) for before, after in pairs):
            raise NotHere("no weight lies outside the quantiser's range; fp32 is this row")
        return with_stored(result, {})
