"""Products of int8 codes: weights in codes for each row, activations rounded to int8 too."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from fairway.methods.integers import Integers, rounded_matrix
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import stored_of, with_stored
from fairway.methods.stored import Codes, InputStep
from train_gpt import GPT

LARGEST, ROWS = 127, 16  # code; rows of calibration
EXACT_COLUMNS = 1040  # float32 sums so many products of two codes without rounding


# ==== PRODUCTS ====================================================================================
@functools.cache
def has_exact_products() -> bool:
    """Return whether this processor multiplies int8 exactly; some sum pairs in 16 bits."""
    codes = torch.full((32, 64), LARGEST, dtype=torch.int8)
    return bool((torch._int_mm(codes, codes.T) == 64 * LARGEST**2).all())


def product(x_codes_NK: Tensor, codes_MK: Tensor) -> Tensor:
    """Return the exact product of two matrices of int8 codes, float32[N, M]."""
    if has_exact_products():
        return torch._int_mm(x_codes_NK, codes_MK.T).float()
    dtype = torch.float32 if codes_MK.size(1) <= EXACT_COLUMNS else torch.float64
    return (x_codes_NK.to(dtype) @ codes_MK.T.to(dtype)).float()


class Int8Linear(nn.Linear):
    """A linear layer that multiplies int8 codes, with a step for each token or one for all."""

    def __init__(self, weight: nn.Parameter, stored: Codes | InputStep):
        nn.Module.__init__(self)
        self.weight, self.bias = weight, None
        base = stored.base if isinstance(stored, InputStep) else stored
        self.step = stored.step if isinstance(stored, InputStep) else None
        self.codes, self.steps, self.scales = base.codes, base.steps[:, 0], base.scales

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).float()
        rows = rows if self.scales is None else rows * self.scales
        step = self.step
        if step is None:
            step = (rows.abs().amax(dim=1, keepdim=True) / LARGEST).clamp(min=2.0**-24)
        codes = torch.round(rows / step).clamp_(-LARGEST, LARGEST).to(torch.int8)
        y = product(codes, self.codes) * step * self.steps
        return y.view(*x.shape[:-1], -1).type_as(x)


def linear_layers(model: GPT) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield each linear layer: the name of its weight, the module that holds it, its name there."""
    for place, module in list(model.named_modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                yield f"{place}.{name}.weight", module, name


def on_int8(model: GPT) -> GPT:
    """Let the linear layers of a model multiply the codes that it remembers."""
    stored = stored_of(model)
    for name, module, own in linear_layers(model):
        setattr(module, own, Int8Linear(getattr(module, own).weight, stored[name]))
    return model


# ==== CALIBRATION =================================================================================
@torch.no_grad()
def largest_inputs(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return the largest absolute input of each column of each linear layer, by its weight."""
    largest: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        seen = inputs[0].abs().flatten(0, -2).amax(dim=0)
        largest[name] = torch.maximum(largest.get(name, seen), seen)

    hooks = [
        getattr(module, own).register_forward_pre_hook(functools.partial(note, name))
        for name, module, own in linear_layers(model)
    ]
    for row in tokens:
        model.logits(row[None])
    for hook in hooks:
        hook.remove()
    return largest


def smoothing(weight: Tensor, largest: Tensor) -> Tensor:
    """Return the factor of each input column that gives activations and weights an equal range.

    SmoothQuant, arXiv 2211.10438, with half of the difficulty moved: the factor of a column is the
    root of its largest weight over its largest input, exact in bfloat16.
    """
    columns = weight.abs().amax(dim=0).clamp(min=1e-5) / largest.clamp(min=1e-5)
    return columns.sqrt().bfloat16().float()


# ==== METHODS =====================================================================================
@dataclass(frozen=True)
class Int8Activations(Method):
    """Weights as in the row int8, and the input of each linear layer rounded to int8 as well, so
    that a layer multiplies whole numbers. The step of an input is its largest value over 127: of
    each token as it comes, or one for all tokens, the largest in sixteen sequences of calibration
    text, which then ships with the weights. With smoothing, each column of inputs is multiplied by
    a factor and the weights are divided by it, so that outliers of a few columns do not decide the
    step. The output head, which shares its weight with the embedding, keeps float inputs.
    """

    calibrated_by: str = ""  # training or random text; or each token has a step of its own
    smooth: bool = False
    group = "activations"
    code = ("activations.py", "integers.py")

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        rounded = Integers(8).apply(model, calibration)
        if not self.calibrated_by:
            return on_int8(rounded)
        largest = largest_inputs(model, calibration.rows(self.calibrated_by, ROWS))
        stored, weights = dict(stored_of(rounded)), dict(model.named_parameters())
        for name, inputs in largest.items():
            codes, weight = stored[name], weights[name].detach()
            if self.smooth:
                factor = smoothing(weight, inputs)
                codes = replace(rounded_matrix(weight / factor, 8, 0, 0.0), scales=factor)
                inputs = inputs * factor
            step = (inputs.max() / LARGEST).clamp(min=2.0**-24).reshape(1)
            stored[name] = InputStep(codes, step)
        return on_int8(with_stored(model, stored))

    def load(self, folder: Path) -> GPT:
        return on_int8(super().load(folder))
