"""Baselines: the weights in a floating-point type."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fairway.methods.method import Calibration, Method
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
