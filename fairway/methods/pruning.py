"""Fewer weights: the smallest ones set to zero, and a short training that may repair the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fairway.methods.integers import Integers, rounded_matrix
from fairway.methods.method import Calibration, Method
from fairway.methods.training import STEPS, fine_tuned, taught_by
from train_gpt import GPT, LEAST_K

EMBEDDINGS = "tok_emb.weight", "bigram.table.weight"  # the first is the output head, too
BITS = 6
ROUNDING = Integers(BITS, k=LEAST_K[BITS])  # of all that is left, so that a row changes one thing


def largest_weights(weight: Tensor, share: float) -> Tensor:
    """Return 1 for the weights that stay when the smallest `share` of a matrix is dropped."""
    dropped = round(share * weight.numel())
    order = weight.abs().flatten().argsort(stable=True)
    kept = torch.ones(weight.numel())
    kept[order[:dropped]] = 0
    return kept.view_as(weight)


def two_of_four(weight: Tensor) -> Tensor:
    """Return 1 for the two largest of every four neighbours in a row; the rest of a row stays."""
    whole = weight.size(1) // 4 * 4
    fours = weight[:, :whole].abs().reshape(-1, 4)
    kept = torch.ones_like(weight)
    chosen = torch.zeros_like(fours).scatter_(1, fours.argsort(dim=1, stable=True)[:, 2:], 1.0)
    kept[:, :whole] = chosen.view(len(weight), whole)
    return kept


def kept_weights(model: GPT, choose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return which weights of each matrix stay; embeddings and head are spared."""
    return {
        name: choose(p.detach())
        for name, p in model.named_parameters()
        if name.endswith(".weight") and name not in EMBEDDINGS
    }


@torch.no_grad()
def without_dropped(model: GPT, kept: dict[str, Tensor]) -> GPT:
    """Return a copy with zeros where `kept` has zeros."""
    pruned = copy.deepcopy(model)
    for name, p in pruned.named_parameters():
        if name in kept:
            p.mul_(kept[name])
    return pruned


@dataclass(frozen=True)
class Pruned(Method):
    """Magnitude pruning: the given share of each matrix's weights, those of least absolute value,
    becomes zero. Embeddings, and the head that shares them, are spared. What is left is rounded to
    6 bits by the root mean square of rows, and the entropy coder is paid less for the zeros: no
    positions are stored.
    """

    share: float
    group = "fewer weights"

    def kept(self, model: GPT) -> dict[str, Tensor]:
        return kept_weights(model, lambda weight: largest_weights(weight, self.share))

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return ROUNDING.apply(without_dropped(model, self.kept(model)), calibration)

    def spared(self, model: GPT) -> dict[str, Tensor]:
        """Return embeddings and head as rounding alone leaves them."""
        named = dict(model.named_parameters())
        rounded = {
            n: rounded_matrix(named[n], BITS, 0, ROUNDING.k) for n in EMBEDDINGS if n in named
        }
        return {name: codes.weight() for name, codes in rounded.items()}


@dataclass(frozen=True)
class TwoOfFour(Pruned):
    """The 2:4 pattern that GPUs multiply faster: of every four neighbours in a row, the two of
    least absolute value become zero. Embeddings and head are spared, what is left is rounded to 6
    bits, and the size is that of the entropy-coded codes. A CPU gains no speed from the pattern.
    """

    share: float = 0.5

    def kept(self, model: GPT) -> dict[str, Tensor]:
        return kept_weights(model, two_of_four)


@dataclass(frozen=True)
class PrunedTuned(Method):
    """Magnitude pruning, then some steps of the trainer in which the dropped weights stay zero and
    the others are seen rounded to 6 bits. Without a teacher, the steps minimise the loss on
    training text. With one they are a distillation: the student learns the distribution of the
    float model at temperature 2 on the same text. The two rows together show what the teacher
    adds, or costs. Embeddings are not pruned, but they are trained.
    """

    share: float
    distilled: bool
    steps: int = STEPS
    group = "fewer weights"
    seeded = True

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        kept = Pruned(self.share).kept(model)
        loss = {"loss_of": taught_by(model)} if self.distilled else {}
        tuned = fine_tuned(model, calibration, BITS, self.steps, kept=kept, **loss)
        return ROUNDING.apply(tuned, calibration)
