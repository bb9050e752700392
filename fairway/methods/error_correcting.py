"""Error correction: the text, the model that methods keep to, and the loop over its matrices."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fairway.methods.integers import is_matrix, with_matrices
from fairway.methods.layer_inputs import hessians
from fairway.methods.method import Calibration, Method
from fairway.methods.stored import Stored
from train_gpt import GPT, GPTQ_BATCHES, levels, row_steps, tensor_bits

PASS_ROWS = 8  # sequences that decide whether a model is clamped


class ErrorCorrecting(Method):
    """A method that rounds each matrix with a look at its inputs."""

    source: ClassVar[str] = "training"  # of text: training, sampled or random
    group = "error-correcting"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        tokens = calibration.rows(self.source, 8 * GPTQ_BATCHES)
        model = as_trained(model, tokens)
        found = hessians(model, tokens)
        return with_matrices(model, lambda name, w: self.stored(w, found.get(name)))

    @abstractmethod
    def stored(self, weight: Tensor, hessian: Tensor | None) -> Stored:
        """Round a matrix; without a Hessian it is looked up, never multiplied by an input."""


@torch.no_grad()
def clamped(model: GPT) -> GPT:
    """Return a copy of a model with its matrices clamped to the range of its own quantiser."""
    copied = copy.deepcopy(model)
    for name, p in copied.named_parameters():
        if is_matrix(name, model):
            bits = tensor_bits(name, model.cfg)
            most = levels(bits) * row_steps(p, 0.0, bits)
            p.copy_(p.clamp(-most, most))
    return copied


@torch.no_grad()
def as_trained(model: GPT, tokens: Tensor) -> GPT:
    """Return the clamped model, or the model as it is: the lower loss on `tokens` decides.

    Training with rounding sees no weight beyond the range, so that the float weights, with those
    outside, compute something else: an error-correcting method would repair what training clipped.
    """
    part, candidates = tokens[:PASS_ROWS], (model, clamped(model))
    losses = [m(part[:, :-1], part[:, 1:]).mean().item() for m in candidates]
    return candidates[losses.index(min(losses))]
