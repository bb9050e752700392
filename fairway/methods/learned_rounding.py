"""Learned rounding: up or down by gradient steps, a block at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fairway.methods.error_correcting import as_trained
from fairway.methods.integers import nearest, with_matrices
from fairway.methods.layer_inputs import block_calls
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import stored_of, with_stored
from fairway.methods.stored import Codes
from train_gpt import GPT, levels

LEAST_SCALE, MOST_SCALE = 0.5, 1.5  # of a row's step, against int-rms
PASS_ROWS = 4  # sequences of a gradient step


@dataclass(frozen=True)
class LearnedRounding(Method):
    """AutoRound's idea, written anew: int-rms, then for one block after the other an offset in
    [-0.5, 0.5] is added to each weight, in steps, before rounding, and each row's step is scaled.
    Both take `steps` steps along the sign of the gradient, at a rate that falls to zero, of the
    squared difference between the block's outputs and those of the float model on training text;
    rounding lets gradients through. The block reads what the rounded blocks before it write.
    """

    bits: int
    steps: int = 120
    calibration_rows: int = 32
    group = "error-correcting"
    seeded = True

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        tokens = calibration.training(self.calibration_rows)
        model = as_trained(model, tokens)
        result = with_matrices(model, lambda _, w: nearest(w, self.bits))
        parts = tokens.split(PASS_ROWS)
        for layer, block in enumerate(model.blocks):
            examples = []
            for part in parts:
                rounded = block_calls(result, layer, part)
                wanted = block_calls(model, layer, part)
                examples += [(r[0], w[1]) for r, w in zip(rounded, wanted, strict=True)]
            learned = learn(block, result.blocks[layer], examples, self.bits, self.steps)
            stored = {f"blocks.{layer}.{name}": codes for name, codes in learned.items()}
            result = with_stored(result, stored_of(result) | stored)
        return result


class Offsets(nn.Module):
    """A matrix that is rounded with learned offsets and step scales; its output is the weight."""

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.weight, self.start, self.most = weight, nearest(weight, bits).steps, levels(bits)
        self.offset = nn.Parameter(torch.zeros_like(weight))
        self.scale = nn.Parameter(torch.ones_like(self.start))

    def codes_and_steps(self) -> tuple[Tensor, Tensor]:
        steps = straight_through(self.start * self.scale, lambda s: s.bfloat16().float())
        codes = straight_through(self.weight / steps + self.offset, torch.round)
        return codes.clamp(-self.most, self.most), steps

    def forward(self) -> Tensor:
        codes, steps = self.codes_and_steps()
        return codes * steps

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """Take a step against the sign of the gradients, and keep to the bounds."""
        for p, low, high in ((self.offset, -0.5, 0.5), (self.scale, LEAST_SCALE, MOST_SCALE)):
            p.sub_(rate * p.grad.sign()).clamp_(low, high)
            p.grad = None

    @torch.no_grad()
    def stored(self) -> Codes:
        codes, steps = self.codes_and_steps()
        return Codes(codes.to(torch.int8), steps)


def straight_through(value: Tensor, change) -> Tensor:
    """Return change(value), to the last bit, with the gradient of `value`."""
    return change(value).detach() + (value - value.detach())


def learn(block: nn.Module, rounded: nn.Module, examples: list, bits: int, steps: int):
    """Return the codes of a block's matrices, learned from inputs and wanted outputs."""
    others = {n: p.detach() for n, p in rounded.named_parameters()}
    weights = {n: p.detach() for n, p in block.named_parameters() if n.endswith(".weight")}
    matrices = {n: Offsets(w, bits) for n, w in weights.items()}
    for step in range(steps):
        inputs, wanted = examples[step % len(examples)]
        values = others | {n: m() for n, m in matrices.items()}
        outputs = functional_call(block, values, inputs)
        loss = sum((o - w).square().mean() for o, w in zip(outputs, wanted, strict=True))
        loss.backward()
        for m in matrices.values():
            m.move((1 - step / steps) / steps)
    return {n: m.stored() for n, m in matrices.items()}
