"""Averages of late weights against the last weights, before and after rounding."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairway.methods.integers import Integers
from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.parcel import with_stored
from fairway.methods.subject import is_rounded_from, read_state
from train_gpt import GPT, LEAST_K, Averages, Buffer

SETTINGS = {"swa": "SWA_START_FRAC below 1", "ema": "EMA_DECAY above 0"}


def averages_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the averages of a run by name, each as one buffer of all weights."""
    averages = Averages()
    for name, value in checkpoint["averages"].items():
        setattr(averages, name, value)
    return {name: flat for name, (flat,) in averages.candidates().items()}


@torch.no_grad()
def with_values(model: GPT, values: dict[str, Tensor]) -> GPT:
    changed = copy.deepcopy(model)
    for name, p in changed.named_parameters():
        p.copy_(values[name])
    return changed


@dataclass(frozen=True)
class Averaged(Method):
    """Weights that a run left in its checkpoint: the last ones, their plain average over late steps
    (SWA), or their exponential average (EMA). With 0 bits they ship as float32, otherwise rounded
    by the root mean square of rows, so that the rows show whether an average that is better in
    floating point is still better after rounding. The trainer itself ships whichever of them is
    best on held-out training text: in floating point, those weights are the baseline.
    """

    weights: str  # last, swa or ema
    bits: int = 0
    group = "averaging"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        values = self.values(model, calibration)
        own = dict(model.named_parameters())
        if not self.bits and all(torch.equal(own[n], w) for n, w in values.items()):
            raise NotHere(f"the run kept its {self.weights} weights; see the row fp32")
        changed = with_values(model, values)
        if not self.bits:
            return with_stored(changed, {})
        return Integers(self.bits, k=LEAST_K[self.bits]).apply(changed, calibration)

    def values(self, model: GPT, calibration: Calibration) -> dict[str, Tensor]:
        """Return each parameter's value in the checkpoint, by name."""
        if calibration.checkpoint is None:
            raise NotHere("no checkpoint.pt lies next to the model; keep the one of its run")
        saved = read_state(calibration.checkpoint)
        if not is_rounded_from(model.state_dict(), saved["model"]):
            raise NotHere(f"{calibration.checkpoint} is of another run; move it elsewhere")
        if self.weights == "last":
            return saved["model"]
        averages = averages_of(saved)
        if self.weights not in averages:
            setting = SETTINGS[self.weights]
            raise NotHere(f"the run kept no {self.weights.upper()}; train with {setting}")
        names = [name for name, _ in model.named_parameters()]
        return dict(zip(names, Buffer(model, averages[self.weights]).params, strict=True))
