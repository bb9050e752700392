"""Adam without the class of torch.optim, whose first step imports torch._dynamo: 2.6 s of processor
time in every test process.
"""

from collections.abc import Iterable

import torch
from torch.optim.adam import adam


class PlainAdam:
    """torch's own Adam update for a few parameters."""

    def __init__(self, parameters: Iterable[torch.Tensor], rate: float, beta2: float = 0.999):
        self.parameters, self.rate, self.beta2 = list(parameters), rate, beta2
        self.means = [torch.zeros_like(p) for p in self.parameters]
        self.squares = [torch.zeros_like(p) for p in self.parameters]
        self.steps = [torch.tensor(0.0) for _ in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient, and drop the gradients."""
        used = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        adam(
            [self.parameters[i] for i in used],
            [self.parameters[i].grad for i in used],
            [self.means[i] for i in used],
            [self.squares[i] for i in used],
            [],
            [self.steps[i] for i in used],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=self.beta2,
            lr=self.rate,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        for p in self.parameters:
            p.grad = None
