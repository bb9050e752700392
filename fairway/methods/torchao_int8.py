"""Dynamic int8 of torchao, a library that PyTorch's makers maintain."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fairway.methods.activations import linear_layers
from fairway.methods.integers import Integers
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import stored_of, with_stored
from fairway.methods.stored import Codes
from train_gpt import GPT


def by_torchao(model: GPT) -> GPT:
    """Let torchao replace the weights of linear layers by its own int8 tensors."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    # Its settings for torch.compile would change those of the whole process.
    quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    return model


@torch.no_grad()
def on_torchao(model: GPT) -> GPT:
    """Let a model compute by torchao, with the codes that it remembers."""
    model = by_torchao(model)
    for name, module, own in linear_layers(model):
        weight, stored = getattr(module, own).weight, stored_of(model)[name]
        weight.qdata.copy_(stored.codes)
        weight.scale.copy_(stored.steps.view_as(weight.scale))
    return model


@dataclass(frozen=True)
class TorchaoInt8(Method):
    """Weights and inputs of the linear layers in int8 by torchao: codes and row steps are the
    library's, the steps rounded to bfloat16 as every file here holds them, and each token has the
    step of its largest value. Embeddings and vectors are as in the row int8.
    """

    group = "activations"
    needs = ("torchao",)
    requirements = "requirements-methods.txt"
    code = ("activations.py", "torchao_int8.py")

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        rounded = Integers(8).apply(model, calibration)
        stored, library = dict(stored_of(rounded)), by_torchao(with_stored(model, {}))
        for name, module, own in linear_layers(library):
            weight: nn.Parameter = getattr(module, own).weight
            steps = weight.scale.view(-1, 1).bfloat16().float()
            stored[name] = Codes(weight.qdata.clone(), steps)
        return on_torchao(with_stored(model, stored))

    def load(self, folder: Path) -> GPT:
        return on_torchao(super().load(folder))
