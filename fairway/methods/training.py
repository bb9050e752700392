"""A few more steps of the trainer, with rounded or pruned weights in every pass."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.methods.integers import Integers, by_groups, plain
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import with_stored
from fairway.methods.stored import Codes, spread
from train_gpt import (
    GPT,
    LEAST_K,
    PLAIN_BITS,
    PRESETS,
    Buffer,
    Config,
    Runtime,
    make_run,
    names_with_role,
    quantise,
    rounded_banks,
    take_step,
    tensor_bits,
    to_codes,
    use_weights,
)

STEPS = 100
RATE = 0.3  # of the peak rates of the preset `cpu`: the weights are trained already
TEMPERATURE = 2.0  # of both distributions in distillation
Loss = Callable[[Tensor, Tensor], Tensor]  # of inputs and targets [B, T]: nats [B, T]


def tuning_settings(cfg: Config, bits: int, steps: int) -> Config:
    """Return settings for a short run at `bits` bits whose rates fall in a line to zero.

    An artifact holds no optimiser settings, so those of the preset `cpu` stand for them.
    """
    optimiser = names_with_role(Config, "optimiser")
    values = {n: v for n, v in PRESETS["cpu"].items() if n in optimiser}
    for name in ("matrix_lr", "scalar_lr", "tied_embed_lr"):
        values[name] *= RATE
    values |= {"iterations": steps, "warmdown_frac": 1.0, "max_wallclock_seconds": 0.0}
    values |= {"attn_bits": bits, "mlp_bits": bits, "embed_bits": bits, "qat_start_frac": 0.0}
    return replace(cfg, **values)


def fine_tuned(
    model: GPT,
    calibration: Calibration,
    bits: int,
    steps: int,
    *,
    loss_of: Callable[[GPT], Loss] = lambda student: student,
    round_fn: Callable = rounded_banks,
    kept: Mapping[str, Tensor] | None = None,
) -> GPT:
    """Return a copy with float weights that were trained for `steps` steps on training text.

    Every pass sees weights rounded to `bits` bits, and their gradients move the float weights
    (straight-through). Weights where `kept` is 0 stay zero.
    """
    student = copy.deepcopy(model)
    student.cfg = cfg = tuning_settings(model.cfg, bits, steps)
    rows = steps * cfg.train_batch_tokens // cfg.train_seq_len + 1  # one more: the last target
    tokens = calibration.training(rows).flatten().numpy()
    device = student.cos.device
    run = make_run(cfg, Runtime(0, 1, device, device.type), None, None, student, [tokens])
    run.loss_fn, run.round_fn, run.qat = loss_of(student), round_fn, True
    mask = Buffer(student, torch.ones_like(run.weights.flat))
    for (name, _), ones in zip(student.named_parameters(), mask.params, strict=True):
        if kept and name in kept:
            ones.copy_(kept[name])
    for step in range(steps):
        run.weights.flat.mul_(mask.flat)
        take_step(run, step / steps)
    run.weights.flat.mul_(mask.flat)
    use_weights(run.params, [w.clone() for w in run.weights.params])
    student.cfg = model.cfg
    return student


def taught_by(teacher: GPT) -> Callable[[GPT], Loss]:
    """Return the loss of a student: the KL divergence from the teacher's distribution, both at
    TEMPERATURE, times its square so that gradients keep their size.
    """

    def of_student(student: GPT) -> Loss:
        def nats(inputs: Tensor, _targets: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = (teacher.logits(inputs) / TEMPERATURE).log_softmax(dim=-1)
            found = (student.logits(inputs) / TEMPERATURE).log_softmax(dim=-1)
            apart = F.kl_div(found, wanted, reduction="none", log_target=True).sum(dim=-1)
            return TEMPERATURE**2 * apart

        return nats

    return of_student


@dataclass(frozen=True)
class Tuned(Method):
    """Quantisation-aware fine-tuning: the float weights take some steps of the trainer, on training
    text, with every matrix rounded to `bits` bits in each pass, and are then rounded as the row of
    the same bits without training: steps of k times the root mean square of each row. At 2 bits
    the codes are -1, 0 and 1. The row of 6 bits is the control: it gets the same steps, so that
    what more training gains can be told from what training at few bits gains.
    """

    bits: int
    steps: int = STEPS
    group = "few bits with training"
    seeded = True

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        tuned = fine_tuned(model, calibration, self.bits, self.steps)
        return Integers(self.bits, k=LEAST_K[self.bits]).apply(tuned, calibration)


def absmean_steps(weight: Tensor, columns: int) -> Tensor:
    """Return the mean absolute value of each row and group of columns, exact in bfloat16."""
    counts = by_groups(torch.ones_like(weight[:1]), columns).sum(dim=1)
    sums = by_groups(weight.abs(), columns).sum(dim=1).view(len(weight), -1)
    steps = (sums / counts).bfloat16().float()
    return steps.masked_fill(steps == 0, 1.0)


def ternary_matrix(weight: Tensor, columns: int) -> Codes:
    """Round a matrix to -1, 0 or 1 times the absolute mean of each row and group of columns."""
    steps = absmean_steps(weight, columns)
    return Codes(to_codes(weight, spread(steps, weight.size(1)), 2).to(torch.int8), steps)


@dataclass(frozen=True)
class Ternary(Method):
    """Ternary weights with training: each weight is -1, 0 or 1 times the mean absolute value of its
    row's group of columns, as in BitNet b1.58. The float weights take some steps of the trainer
    with weights rounded so in each pass, the gradients go straight through the rounding, and the
    last weights are rounded in the same way.
    """

    columns: int = 64
    steps: int = STEPS
    group = "few bits with training"
    seeded = True

    def rounded(self, banks: list[Tensor], _steps: list, bits: list[int]) -> list[Tensor]:
        """Round stacks of matrices as a pass of training sees them."""
        return [
            quantise(w, 0.0, b).weight()
            if b == PLAIN_BITS
            else ternary_matrix(w.flatten(0, 1), self.columns).weight().view_as(w)
            for w, b in zip(banks, bits, strict=True)
        ]

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        tuned = fine_tuned(model, calibration, 2, self.steps, round_fn=self.rounded)
        stored = {
            name: plain(p)
            if tensor_bits(name, model.cfg) == PLAIN_BITS
            else ternary_matrix(p.detach(), self.columns)
            for name, p in tuned.named_parameters()
        }
        return with_stored(tuned, stored)
