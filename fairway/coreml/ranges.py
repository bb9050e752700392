"""Measure how large values between operations become on real text, and scale them to fit fp16.

fp16 ends at 65,504: a squared activation overflows at 256, and a sum of 512 squares at 11.3. The
input of a squared activation is scaled by a power of two, which loses no digit and folds into the
matrices on both sides. Before a norm, one scale is not enough: in a trained model positions differ
thirtyfold in size (cpu preset), so each position gets its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fairway.coreml import graph
from fairway.coreml.graph import Norm, Precision, SquaredReLU
from fairway.coreml.host import Embedding, attention_mask, rotary_tables
from train_gpt import GPT, UserError

FP16_MAX = 65504.0
MARGIN = 4.0  # other text may have values this many times as large as the measured ones
MIN_SCALE = 2.0**-6  # the matrix after a square is divided by its square, and must fit fp16 too
MIN_RMS = 0.3  # of a position before a norm: below it, the eps of fp16 changes it by over 3e-4
EPS = 6.2e-5  # fp16 holds all its digits down to here
WINDOW = 256  # tokens in one forward pass


class RangeError(UserError):
    """Values do not fit fp16, whatever the scale."""


class ActivationRange(NamedTuple):
    """The largest value of a tensor, and the largest and least RMS of a position."""

    peak: float
    rms: float
    least_rms: float
    channels: int

    def joined(self, other: ActivationRange) -> ActivationRange:
        """Return the range of both tensors together."""
        return ActivationRange(
            max(self.peak, other.peak),
            max(self.rms, other.rms),
            min(self.least_rms, other.least_rms),
            self.channels,
        )


def activation_range(x: Tensor) -> ActivationRange:
    """Return the range of [1, channels, ..., T]; positions of zeros alone do not count."""
    rms = x.square().mean(dim=1).sqrt()
    positive = rms[rms > 0]
    least = float(positive.min()) if len(positive) else 1.0
    return ActivationRange(float(x.abs().max()), float(rms.max()), least, x.size(1))


class RangeRecorder:
    """Collects ranges from hooks on the graph: the inputs of each norm and each square by name.

    The output of each matrix is recorded as NAME.made, unless it is the input of a square.
    """

    def __init__(self, shards: Mapping[str, nn.Module]):
        self.ranges: dict[str, ActivationRange] = {}
        self.hooks = []
        for shard in shards.values():
            for name, module in shard.named_modules():
                if isinstance(module, Norm | SquaredReLU):
                    self.watch_input(module, "head.norm" if name == "norm" else name)
                elif isinstance(module, nn.Conv2d) and not name.endswith(".fc"):
                    self.watch_output(module, f"{name}.made")

    def watch_input(self, module: nn.Module, name: str) -> None:
        self.hooks.append(
            module.register_forward_pre_hook(lambda m, inputs: self.record(name, inputs[0]))
        )

    def watch_output(self, module: nn.Module, name: str) -> None:
        self.hooks.append(
            module.register_forward_hook(lambda m, inputs, output: self.record(name, output))
        )

    def record(self, name: str, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise RangeError(
                f"{name}: its values are infinite or NaN; the artifact's weights are too large"
            )
        new = activation_range(x)
        self.ranges[name] = self.ranges[name].joined(new) if name in self.ranges else new

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def measure_ranges(
    model: GPT, tables: Mapping[str, np.ndarray], tokens: np.ndarray
) -> dict[str, ActivationRange]:
    """Run the graph in fp32 over a text, and return the range of each tensor that fp16 may break.

    Keys are the names of norms and squared activations (their inputs), NAME.made (the output of
    each other matrix) and "stream" (the residual stream between passes).
    """
    dims, embed = graph.model_dims(model, 0), Embedding(tables)
    shards = graph.build_shards(model, dims, list(range(dims.passes + 1)), [0, dims.vocab])
    interfaces = {name: shard.interface for name, shard in shards.items()}
    empty = torch.zeros(1, dims.head, dims.kv_heads, 0)
    cache = {f"{c}{n}": empty for n in range(dims.passes) for c in "kv"}
    recorder = RangeRecorder(shards)
    for first in range(0, len(tokens), WINDOW):
        piece = tokens[first : first + WINDOW].tolist()
        cos, sin = rotary_tables(0, len(piece), dims.rotary, model.cfg.rope_base)
        mask = attention_mask(np.zeros(0, np.int64), 0, len(piece), len(piece), len(piece))
        tensors = {
            name: torch.from_numpy(array)[None, :, None]
            for name, array in (("x0", embed(piece, [])), ("cos", cos), ("sin", sin))
        }
        tensors |= cache | {"mask": torch.from_numpy(mask)[None, None]}
        graph.run_shards(shards, interfaces, tensors)
        for nth in range(1, dims.passes + 1):
            recorder.record("stream", tensors[f"x{nth}"])
    recorder.close()
    return recorder.ranges


def norm_peak(r: ActivationRange) -> float | None:
    """Return the peak to scale each position to before a norm, or None if all fit as they are."""
    limit = math.sqrt(FP16_MAX / r.channels) / MARGIN  # values of this size can be squared, summed
    if r.rms <= limit and r.least_rms >= MIN_RMS:
        return None
    return 2.0 ** math.floor(math.log2(limit))


def square_scale(name: str, r: ActivationRange) -> float:
    """Return the power of two that brings the input of a square into range: 1 if it fits."""
    limit = math.sqrt(FP16_MAX) / MARGIN
    scale = 1.0 if r.peak <= limit else 2.0 ** math.floor(math.log2(limit / r.peak))
    if scale < MIN_SCALE:
        raise RangeError(
            f"the input of {name} has values of up to {r.peak:.0f}, which fp16 cannot square, even "
            f"scaled by {MIN_SCALE:g}; take --precision fp32"
        )
    return scale


def plan_fp16(ranges: Mapping[str, ActivationRange]) -> Precision:
    """Return the fp16 precision for measured ranges; raise RangeError if no scale helps."""
    for name, r in ranges.items():
        if (name == "stream" or name.endswith(".made")) and r.peak * MARGIN > FP16_MAX:
            source = "the stream between passes"
            if name != "stream":
                source = f"the output of {name.removesuffix('.made')}"
            raise RangeError(
                f"{source} has values of up to {r.peak:.0f}; fp16 ends at {FP16_MAX:.0f}; take "
                "--precision fp32"
            )
    squares = {name: square_scale(name, r) for name, r in ranges.items() if name.endswith(".act")}
    norms = {name: norm_peak(r) for name, r in ranges.items() if "norm" in name.split(".")[-1]}
    return Precision(
        "fp16",
        {name: scale for name, scale in squares.items() if scale != 1},
        {name: peak for name, peak in norms.items() if peak},
        EPS,
    )


def ranges_line(ranges: Mapping[str, ActivationRange], precision: Precision) -> str:
    """Return one log line: the largest input of a square, the stream, and what was scaled."""
    squared = {name: r.peak for name, r in ranges.items() if name.endswith(".act")}
    name = max(squared, key=squared.get)
    scaled = ", ".join(f"{n} by {s:g}" for n, s in precision.scales.items()) or "no activation"
    return (
        f"ranges: pre-activation at most {squared[name]:.2f} ({name}; fp16 squares up to "
        f"{math.sqrt(FP16_MAX):.0f}), stream {ranges['stream'].peak:.1f}; scaled: {scaled}, "
        f"{len(precision.peaks)} norms by position"
    )
