"""Products of one to four rows, which a step of decoding makes, from the side that MKL is fast at.

Multiplying a few rows by a large matrix takes the time of reading the matrix, and MKL reads it
faster in W x^T than in x W^T. A single row is doubled for that. docs/RESULTS.md has the times.
Other libraries (Apple's) are left alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_gpt import GPT

MOST_ROWS = 4
LEAST_WEIGHTS = 1 << 16  # smaller matrices stay in cache: MKL is as fast from either side


def multiplied(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T, as F.linear does but for rounding."""
    rows = x.numel() // x.size(-1)
    if rows > MOST_ROWS or weight.numel() < LEAST_WEIGHTS or torch.is_grad_enabled():
        return F.linear(x, weight)
    few = x.reshape(rows, -1)
    few = (torch.cat([few, few]) if rows == 1 else few).contiguous()
    return (weight @ few.mT).mT[:rows].contiguous().view(*x.shape[:-1], -1)


class FewRowsLinear(nn.Linear):
    """A linear layer without bias that computes by `multiplied`."""

    def forward(self, x: Tensor) -> Tensor:
        return multiplied(x, self.weight)


class FewRowsModel(GPT):
    """A model whose head computes by `multiplied`."""

    def head(self, x: Tensor, pieces: Tensor | None = None) -> Tensor:
        if pieces is not None:
            return super().head(x, pieces)
        cap = self.cfg.logit_softcap
        return cap * torch.tanh(multiplied(x, self.tok_emb.weight) / cap)


def for_few_rows(model: nn.Module) -> None:
    """Let a model on the CPU compute by `multiplied`; layers that a method has replaced stay."""
    if next(model.parameters()).device.type != "cpu" or not torch.backends.mkl.is_available():
        return
    if type(model) is GPT:
        model.__class__ = FewRowsModel
    for layer in model.modules():
        if type(layer) is nn.Linear and type(layer.weight.data) is Tensor:
            layer.__class__ = FewRowsLinear
