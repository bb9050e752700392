"""Inputs of the matrices of a model, and calls of its blocks, on calibration text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from train_gpt import GPT, Config, Runtime, TokenStream, collect_factors


class CalibrationRun(NamedTuple):
    """The part of a training run that `collect_factors` reads: a model, and text for it."""

    cfg: Config
    rt: Runtime
    model: GPT
    stream: TokenStream


def hessians(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Return the sum of x x^T over the inputs x of each matrix, [columns, columns].

    The trainer's function collects them from 128 sequences; tokens [128, T] are those. The bigram
    table is only looked up, so that it has no entry.
    """
    rt = Runtime(0, 1, torch.device("cpu"), "cpu")
    run = CalibrationRun(model.cfg, rt, model, TokenStream([tokens.numpy().reshape(-1)]))
    return collect_factors(run, lambda hessian: hessian)


def output_errors(errors: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared change of each output, [rows], for errors [rows, columns] of a matrix."""
    return ((errors @ hessian) * errors).sum(dim=1)


def input_rms(hessian: Tensor) -> Tensor:
    """Return the size of each input channel, [columns], up to a factor; a dead one is not zero."""
    rms = hessian.diagonal().sqrt()
    return rms.clamp(min=1e-4 * float(rms.max()) + 1e-30)


@torch.no_grad()
def block_calls(
    model: GPT, layer: int, tokens: Tensor
) -> list[tuple[tuple[Any, ...], tuple[Tensor, ...]]]:
    """Return inputs and outputs of each call of a block: several, if depth recurrence is on."""
    calls = []
    hook = model.blocks[layer].register_forward_hook(
        lambda _module, inputs, outputs: calls.append((inputs, tuple(outputs)))
    )
    try:
        model.logits(tokens)
    finally:
        hook.remove()
    return calls
