"""The model once more, as the Neural Engine likes it: [1, channels, 1, positions], 1x1 convolutions in place of matrix
products, heads as the third axis, and no operation that depends on how many positions there are.

Everything that reads tokens (embedding, hashed bigram, SmearGate) is left to the host: x0 comes in. Shapes in names:
D width, C channels of a head, H query heads, G key/value heads, R pairs that RoPE turns, T positions, S = slots + T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.coreml import layout
from fairway.coreml.layout import Dims, Interface
from train_gpt import GPT, Attention, Block

EPS = torch.finfo(torch.float32).eps  # of F.rms_norm in fp32
TINY = 1e-24  # of F.normalize


class Precision(NamedTuple):
    """Of the numbers between operations. In fp16 nothing may pass 65,504, and nothing below 6e-5 has all its digits:
    what is measured on real text decides what is scaled, and how."""

    name: str
    scales: Mapping[
        str, float
    ]  # of what is squared, powers of two by module name; 1 where none is given
    peaks: Mapping[
        str, float
    ]  # of norms: each position is scaled so that this is its largest value; else it is not
    eps: float  # at least this much in the root of a norm


EXACT = Precision("fp32", {}, {}, 0.0)


def dims_of(model: GPT, slots: int) -> Dims:
    cfg = model.cfg
    parted = [model.blocks[i].lane_mix is not None for i in model.passes(model.looping)]
    return Dims(
        cfg.model_dim,
        cfg.num_heads,
        cfg.num_kv_heads,
        cfg.model_dim // cfg.num_heads,
        model.cos.size(1),
        cfg.vocab_size,
        tuple(parted),
        slots,
    )


@torch.no_grad()
def host_tables(model: GPT) -> dict[str, np.ndarray]:
    """What fairway.coreml.host looks up."""
    tables = {"embed": model.tok_emb.weight}
    if model.bigram is not None:
        tables["bigram"] = model.bigram.proj(model.bigram.table.weight) * model.bigram.scale
    if model.smear is not None:
        tables["smear"] = torch.sigmoid(model.smear.gate)
    return {name: table.detach().numpy().copy() for name, table in tables.items()}


def conv(weight_OI: Tensor) -> nn.Conv2d:
    """A matrix as a 1x1 convolution over [1, I, 1, T]."""
    outputs, inputs = weight_OI.shape
    made = nn.Conv2d(inputs, outputs, 1, bias=False)
    made.weight = nn.Parameter(weight_OI.detach().clone()[:, :, None, None], requires_grad=False)
    return made


class Norm(nn.Module):
    """RMS norm over axis 1. The norm of a position that was scaled is the same, but for eps; so where squares would
    leave fp16's range, at one end or the other, each position is scaled to a peak that suits it."""

    def __init__(self, name: str, precision: Precision, gain: float = 1.0, eps: float = EPS):
        super().__init__()
        self.peak, self.eps, self.gain = precision.peaks.get(name), max(eps, precision.eps), gain

    def forward(self, x: Tensor) -> Tensor:
        if self.peak is not None:
            x = x * (self.peak / (x.abs().amax(dim=1, keepdim=True) + self.eps))
        root = torch.rsqrt((x * x).mean(dim=1, keepdim=True) + self.eps)
        return x * (root if self.gain == 1 else root * self.gain)


class Squared(nn.Module):
    """Of a LeakyReLU; what comes in was scaled by `scale` in the matrix before, and is scaled back in the one after."""

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, h: Tensor) -> Tensor:
        h = F.leaky_relu(h, self.slope) if self.slope else F.relu(h)
        return h * h


class Attended(nn.Module):
    """Attention.forward of train_gpt over keys and values in slots, then those of the call itself."""

    def __init__(self, source: Attention, out_scale_D: Tensor, name: str, precision: Precision):
        super().__init__()
        self.heads, self.width, self.exclusive = len(source.q_gain), source.width, source.exclusive
        self.q, self.k, self.v = conv(source.q.weight), conv(source.k.weight), conv(source.v.weight)
        self.proj = conv(source.proj.weight * out_scale_D[:, None])
        self.norm_q, self.norm_k = (
            Norm(f"{name}.norm_q", precision),
            Norm(f"{name}.norm_k", precision),
        )
        self.norm_own = (
            Norm(f"{name}.norm_own", precision, self.width**-0.5, TINY) if self.exclusive else None
        )
        self.gain_H = nn.Buffer(
            (source.q_gain.detach() / math.sqrt(self.width))[None, None, :, None].clone()
        )
        self.gate = None if source.gate is None else conv(source.gate)

    def as_heads(self, x: Tensor) -> Tensor:
        """[1, n C, 1, T] -> [1, C, n, T]"""
        return torch.cat(x.split(self.width, dim=1), dim=2)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, k_CGS: Tensor, v_CGS: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.turn(self.norm_q(self.as_heads(self.q(x))), *rope) * self.gain_H
        k = self.turn(self.norm_k(self.as_heads(self.k(x))), *rope)
        v = self.as_heads(self.v(x))
        own = None if self.norm_own is None else self.norm_own(v)
        y = self.weighted(q, torch.cat([k_CGS, k], dim=3), torch.cat([v_CGS, v], dim=3), mask, own)
        if self.gate is not None:  # [1, H, 1, T] -> [1, 1, H, T]
            y = y * (2 * torch.sigmoid(self.gate(x[:, : self.gate.in_channels]))).transpose(1, 2)
        return self.proj(torch.cat(y.split(1, dim=2), dim=1)), k, v

    def weighted(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own: Tensor | None) -> Tensor:
        """[1, C, H, T]: the values that each query head looks at; its key/value head serves H/G of them. `own`: each
        token's own value as a vector of length 1, along which nothing is taken (XSA)."""
        q, k, v = q.permute(0, 2, 3, 1), k.transpose(1, 2), v.transpose(1, 2)  # H T C, G C S
        share, groups = self.heads // k.size(1), k.size(1)
        owns, found = [None] * groups if own is None else own.split(1, dim=2), []
        for q_hTC, k_1CS, v_1CS, own_C1T in zip(
            q.split(share, dim=1), k.split(1, dim=1), v.split(1, dim=1), owns, strict=True
        ):
            p = torch.softmax(torch.matmul(q_hTC, k_1CS) + mask, dim=-1)
            y = torch.matmul(p, v_1CS.transpose(2, 3)).permute(0, 3, 1, 2)
            found.append(
                y if own_C1T is None else y - (y * own_C1T).sum(dim=1, keepdim=True) * own_C1T
            )
        return torch.cat(found, dim=2)

    @staticmethod
    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """RoPE on the first 2R channels of each head."""
        half, width = cos.size(1), x.size(1)
        a, b, *rest = x.split([half, half, *[width - 2 * half][: width > 2 * half]], dim=1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=1)


class Pass(nn.Module):
    """Block.forward of train_gpt, one pass of it, on [1, D, 1, T]. What a matrix's output is multiplied by is in it."""

    def __init__(
        self,
        source: Block,
        skip_D: Tensor | None,
        name: str,
        precision: Precision,
    ):
        super().__init__()
        squared = precision.scales.get(f"{name}.act", 1.0)
        column = lambda vector: nn.Buffer(vector.detach().clone()[None, :, None, None])  # noqa: E731
        self.keep, self.again = map(column, source.resid_mix)
        self.skip = None if skip_D is None else column(skip_D)
        self.norm_attn = Norm(f"{name}.norm_attn", precision, source.norm_scale)
        self.norm_mlp = Norm(f"{name}.norm_mlp", precision, source.norm_scale)
        self.attn = Attended(source.attn, source.attn_scale, f"{name}.attn", precision)
        self.fc, self.act = conv(source.mlp.fc.weight * squared), Squared(source.mlp.slope)
        self.proj = conv(source.mlp.proj.weight * source.mlp_scale[:, None] / squared**2)
        self.lane_mix = None if source.lane_mix is None else source.lane_mix.tolist()

    def mlp(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.fc(self.norm_mlp(x))))

    def forward(
        self,
        x: Tensor,
        lane: Tensor,
        x0: Tensor,
        skip: Tensor | None,
        rope,
        mask: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both lanes after this pass (one tensor for both where they have not parted), and its keys and values."""
        together = lane is x
        if skip is not None:
            x, lane = (part + self.skip * skip for part in (x, lane))
        lane = x if together else lane
        mixed = self.keep * x + self.again * x0
        attended, k, v = self.attn(self.norm_attn(mixed), rope, mask, k, v)
        if self.lane_mix is None:
            mixed = mixed + attended
            mixed = mixed + self.mlp(mixed)
            return mixed, mixed, k, v
        written = self.mlp(lane)
        new = (
            old + to[0] * attended + to[1] * written
            for old, to in zip((mixed, lane), self.lane_mix, strict=True)
        )
        return *new, k, v


class Layers(nn.Module):
    """A shard of passes first to end - 1."""

    def __init__(self, model: GPT, dims: Dims, first: int, end: int, precision: Precision = EXACT):
        super().__init__()
        self.first, self.end, self.dims, order = first, end, dims, model.passes(model.looping)
        self.interface = layout.layers(first, end, dims)
        self.passes = nn.ModuleDict(
            {str(nth): pass_of(model, order, nth, precision) for nth in range(first, end)}
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        have = dict(zip(self.interface.inputs, inputs, strict=True))
        x, x0 = have[f"x{self.first}"], have["x0"]
        lane = have.get(f"lane{self.first}", x)
        for nth in range(self.first, self.end):
            source = layout.skip_of(nth, self.dims.passes)
            skip = have[f"x{source}"] if source else None
            x, lane, have[f"k{nth}_new"], have[f"v{nth}_new"] = self.passes[str(nth)](
                x,
                lane,
                x0,
                skip,
                (have["cos"], have["sin"]),
                have["mask"],
                have[f"k{nth}"],
                have[f"v{nth}"],
            )
            have |= {f"x{nth + 1}": x, f"lane{nth + 1}": lane}
        return tuple(have[name] for name in self.interface.outputs)


def pass_of(model: GPT, order: list[int], nth: int, precision: Precision) -> Pass:
    skip = model.skip_weights[nth - len(order) // 2] if layout.skip_of(nth, len(order)) else None
    return Pass(model.blocks[order[nth]], skip, f"passes.{nth}", precision)


class Head(nn.Module):
    """The last norm, and the logits of tokens split[nth] to split[nth + 1] - 1."""

    def __init__(
        self, model: GPT, dims: Dims, nth: int, split: list[int], precision: Precision = EXACT
    ):
        super().__init__()
        self.interface = layout.head(nth, split, dims)
        self.norm = Norm("head.norm", precision)
        self.out, self.cap = (
            conv(model.tok_emb.weight[split[nth] : split[nth + 1]]),
            model.cfg.logit_softcap,
        )

    def forward(self, x: Tensor, lane: Tensor | None = None) -> Tensor:
        x = x if lane is None else (x + lane) * 0.5
        return self.cap * torch.tanh(self.out(self.norm(x)) * (1 / self.cap))


def shards(
    model: GPT, dims: Dims, cuts: list[int], split: list[int], precision: Precision = EXACT
) -> dict[str, Layers | Head]:
    """The whole chain, in order; cuts: where shards of passes begin, and the end."""
    chain: dict[str, Layers | Head] = {}
    for nth, (first, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        chain[f"layers{nth}"] = Layers(model, dims, first, end, precision)
    for nth in range(len(split) - 1):
        chain[f"head{nth}"] = Head(model, dims, nth, split, precision)
    return {name: shard.eval() for name, shard in chain.items()}


def run_chain(
    chain: Mapping[str, Callable], interfaces: Mapping[str, Interface], have: dict
) -> dict:
    """Every shard in order, each fed by name; `have` grows by what they give."""
    for name, shard in chain.items():
        given = shard(*(have[n] for n in interfaces[name].inputs))
        have |= zip(
            interfaces[name].outputs, given if isinstance(given, tuple) else (given,), strict=True
        )
    return have
