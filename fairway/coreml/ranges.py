"""How large the numbers between operations become on real text, and how they are scaled to survive fp16.

fp16 ends at 65,504, which a squared activation passes at 256, and a sum of 512 squares at 12. What is squared after a
matrix is scaled by a power of two, which costs no digit and is folded into the matrices on both sides. Before a norm
the stream of a trained model spans too much for one scale (positions differ thirtyfold on the cpu preset), so each has
its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fairway.coreml import graph
from fairway.coreml.graph import Norm, Precision, Squared
from fairway.coreml.host import Embedding, mask_of, rotations
from train_gpt import GPT, UserError, need

LARGEST = 65504.0
ROOM = 4.0  # other text may have values this many times as large as what was measured
LEAST_SCALE = 2.0**-6  # the matrix after a square is divided by the square of this, and is fp16 too
LEAST_RMS = (
    0.3  # of a position before a norm: the eps that fp16 needs then moves it by 3e-4 of itself
)
EPS = 6.2e-5  # the least number that fp16 has all its digits for
WINDOW = 256  # tokens that are measured at once


class RangeError(UserError):
    """Values that fp16 cannot hold, however they are scaled."""


class Range(NamedTuple):
    """Of what goes into a module: the largest value, and the largest and least root mean square of a position."""

    peak: float
    rms: float
    least_rms: float
    channels: int

    def joined(self, other: Range) -> Range:
        return Range(
            max(self.peak, other.peak),
            max(self.rms, other.rms),
            min(self.least_rms, other.least_rms),
            self.channels,
        )


def range_of(x: Tensor) -> Range:
    """[1, channels, ..., T]; a position that is all zero has no size."""
    rms = x.square().mean(dim=1).sqrt()
    return Range(
        float(x.abs().max()),
        float(rms.max()),
        float(rms[rms > 0].min()) if (rms > 0).any() else 1.0,
        x.size(1),
    )


@torch.no_grad()
def measure(model: GPT, tables: Mapping[str, np.ndarray], tokens: np.ndarray) -> dict[str, Range]:
    """What each norm and each squared activation of the graph is given, over a text; NAME.made: what each other matrix
    makes; stream: what is between passes."""
    dims, embed = graph.dims_of(model, 0), Embedding(tables)
    chain = graph.shards(model, dims, list(range(dims.passes + 1)), [0, dims.vocab])
    names = {
        m: "head.norm" if name == "norm" else name
        for shard in chain.values()
        for name, m in shard.named_modules()
        if isinstance(m, Norm | Squared)
    }
    found: dict[str, Range] = {}

    def note(name: str, x: Tensor) -> None:
        need(
            bool(torch.isfinite(x).all()),
            f"{name} is given values that are no numbers; the artifact's weights are too large",
            RangeError,
        )
        found[name] = found[name].joined(range_of(x)) if name in found else range_of(x)

    hooks = [m.register_forward_pre_hook(lambda m, args: note(names[m], args[0])) for m in names]
    hooks += [
        m.register_forward_hook(lambda m, args, out, name=name: note(f"{name}.made", out))
        for shard in chain.values()
        for name, m in shard.named_modules()
        if isinstance(m, nn.Conv2d) and not name.endswith(".fc")
    ]  # what that makes is what is squared
    for first in range(0, len(tokens), WINDOW):
        piece = tokens[first : first + WINDOW].tolist()
        cos, sin = rotations(0, len(piece), dims.rotary, model.cfg.rope_base)
        mask = mask_of(np.zeros(0, np.int64), 0, len(piece), len(piece), len(piece))
        have = {
            name: torch.from_numpy(array)[None, :, None]
            for name, array in (("x0", embed(piece, [])), ("cos", cos), ("sin", sin))
        } | {"mask": torch.from_numpy(mask)[None, None]}
        have |= {
            f"{c}{n}": torch.zeros(1, dims.head, dims.kv_heads, 0)
            for n in range(dims.passes)
            for c in "kv"
        }
        graph.run_chain(chain, {name: shard.interface for name, shard in chain.items()}, have)
        for nth in range(1, dims.passes + 1):
            note("stream", have[f"x{nth}"])
    for hook in hooks:
        hook.remove()
    return found


def peak_for(r: Range) -> float | None:
    """The largest value that each position is to have before a norm; None where all fit as they are."""
    most = math.sqrt(LARGEST / r.channels) / ROOM  # channels of this size can be squared and summed
    return (
        None if r.rms <= most and r.least_rms >= LEAST_RMS else 2.0 ** math.floor(math.log2(most))
    )


def scale_for(name: str, r: Range) -> float:
    """Of what is squared: 1 where that serves."""
    most = math.sqrt(LARGEST) / ROOM
    scale = 1.0 if r.peak <= most else 2.0 ** math.floor(math.log2(most / r.peak))
    need(
        scale >= LEAST_SCALE,
        f"{name} is given values of up to {r.peak:.0f}, which fp16 cannot square, even scaled "
        f"by {LEAST_SCALE:g}; take --precision fp32",
        RangeError,
    )
    return scale


def half_precision(found: Mapping[str, Range]) -> Precision:
    """fp16 for a model that was measured; refused where it cannot hold."""
    for name, r in found.items():
        what = "the stream between passes" if name == "stream" else name.removesuffix(".made")
        need(
            name != "stream" and not name.endswith(".made") or r.peak * ROOM <= LARGEST,
            f"{what} has values of up to "
            f"{r.peak:.0f}; fp16 ends at {LARGEST:.0f}; take --precision fp32",
            RangeError,
        )
    scales = {
        name: scale
        for name, r in found.items()
        if name.endswith(".act") and (scale := scale_for(name, r)) != 1
    }
    norms = {name: r for name, r in found.items() if "norm" in name.split(".")[-1]}
    return Precision(
        "fp16", scales, {name: peak for name, r in norms.items() if (peak := peak_for(r))}, EPS
    )


def told(found: Mapping[str, Range], precision: Precision) -> str:
    """One line: the largest value before a square, and what was scaled."""
    squared = {name: r.peak for name, r in found.items() if name.endswith(".act")}
    name = max(squared, key=squared.get)
    scaled = ", ".join(f"{n} by {s:g}" for n, s in precision.scales.items()) or "no activation"
    return (
        f"ranges: pre-activation {squared[name]:.2f} at most ({name}; fp16 squares up to "
        f"{math.sqrt(LARGEST):.0f}), stream {found['stream'].peak:.1f}; scaled: {scaled}, "
        f"{len(precision.peaks)} norms by position"
    )
