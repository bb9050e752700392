"""The model in the layout that the Neural Engine prefers: [1, channels, 1, positions].

Matrix products are 1x1 convolutions, heads are the third axis, and no operation depends on the
number of positions. The host does everything that reads tokens (embedding, hashed bigram,
SmearGate), so the graph starts at x0. The layout follows Apple, "Deploying Transformers on the
Apple Neural Engine". Letters in names are axes: D width, C channels of a head, H query heads,
G key/value heads, R pairs that RoPE rotates, T positions, S = slots + T.
"""

from __future__ import annotations

import functools
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
NORMALIZE_EPS = 1e-24  # of F.normalize, squared


class Precision(NamedTuple):
    """The precision between operations, and the scales that keep values inside the range of fp16.

    In fp16 no value may exceed 65,504, and values below 6e-5 lose digits. The scales come from
    values measured on real text (fairway/coreml/ranges.py).
    """

    name: str
    scales: Mapping[str, float]  # of inputs of a square, powers of two by module name; default 1
    peaks: Mapping[str, float]  # by norm: scale each position to this largest value; default: as is
    eps: float  # lower bound of the eps inside the root of a norm


EXACT = Precision("fp32", {}, {}, 0.0)


def model_dims(model: GPT, slots: int) -> Dims:
    """Return the numbers from which the shapes of all shards follow."""
    cfg = model.cfg
    parted = [model.blocks[layer].lane_mix is not None for layer in model.passes(model.looping)]
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
    """Return the tables that `fairway.coreml.host.Embedding` looks up."""
    tables = {"embed": model.tok_emb.weight}
    if model.bigram is not None:
        tables["bigram"] = model.bigram.proj(model.bigram.table.weight) * model.bigram.scale
    if model.smear is not None:
        tables["smear"] = torch.sigmoid(model.smear.gate)
    return {name: table.detach().numpy().copy() for name, table in tables.items()}


def conv_from_matrix(weight_OI: Tensor) -> nn.Conv2d:
    """Return the 1x1 convolution over [1, I, 1, T] that multiplies by this matrix."""
    outputs, inputs = weight_OI.shape
    module = nn.Conv2d(inputs, outputs, 1, bias=False)
    module.weight = nn.Parameter(weight_OI.detach().clone()[:, :, None, None], requires_grad=False)
    return module


def as_column(vector: Tensor) -> nn.Buffer:
    """Return a vector [D] as a buffer [1, D, 1, 1]."""
    return nn.Buffer(vector.detach().clone()[None, :, None, None])


class Norm(nn.Module):
    """RMS norm over axis 1.

    Scaling a position does not change its norm, apart from eps. Where the squares would leave the
    range of fp16 at either end, each position is therefore first scaled to a safe peak.
    """

    def __init__(self, name: str, precision: Precision, gain: float = 1.0, eps: float = EPS):
        super().__init__()
        self.peak, self.eps, self.gain = precision.peaks.get(name), max(eps, precision.eps), gain

    def forward(self, x: Tensor) -> Tensor:
        if self.peak is not None:
            x = x * (self.peak / (x.abs().amax(dim=1, keepdim=True) + self.eps))
        root = torch.rsqrt((x * x).mean(dim=1, keepdim=True) + self.eps)
        return x * (root if self.gain == 1 else root * self.gain)


class SquaredReLU(nn.Module):
    """The square of a LeakyReLU.

    The matrix before it holds the scale of its input, and the matrix after it the inverse.
    """

    def __init__(self, slope: float):
        super().__init__()
        self.slope = slope

    def forward(self, h: Tensor) -> Tensor:
        h = F.leaky_relu(h, self.slope) if self.slope else F.relu(h)
        return h * h


Join = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split_heads(x: Tensor, width: int) -> Tensor:
    """Reshape [1, n C, 1, T] to [1, C, n, T]."""
    return torch.cat(x.split(width, dim=1), dim=2)


def placed(x_CGT: Tensor, write: Tensor) -> Tensor:
    """Return [1, C, G, places]: each token's column at its place, zeros elsewhere."""
    flat = torch.cat(x_CGT.split(1, dim=2), dim=1).transpose(1, 2)
    return split_heads(torch.matmul(flat, write).transpose(1, 2), x_CGT.size(1))


class CachedAttention(nn.Module):
    """Attention of train_gpt over keys and values of earlier calls and of this one.

    `join` takes the call's keys and values [1, C, G, T] and returns all, [1, C, G, S].
    """

    def __init__(self, source: Attention, out_scale_D: Tensor, name: str, precision: Precision):
        super().__init__()
        self.heads, self.width = len(source.q_gain), source.width
        self.q, self.k, self.v = map(
            conv_from_matrix, (source.q.weight, source.k.weight, source.v.weight)
        )
        self.proj = conv_from_matrix(source.proj.weight * out_scale_D[:, None])
        self.norm_q = Norm(f"{name}.norm_q", precision)
        self.norm_k = Norm(f"{name}.norm_k", precision)
        self.norm_own = None
        if source.exclusive:
            self.norm_own = Norm(f"{name}.norm_own", precision, self.width**-0.5, NORMALIZE_EPS)
        gain_H = source.q_gain.detach() / math.sqrt(self.width)
        self.gain_H = nn.Buffer(gain_H[None, None, :, None].clone())
        self.gate = None if source.gate is None else conv_from_matrix(source.gate)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, join: Join) -> Tensor:
        """Return the output [1, D, 1, T]."""
        q = self.rotate(self.norm_q(split_heads(self.q(x), self.width)), *rope) * self.gain_H
        k = self.rotate(self.norm_k(split_heads(self.k(x), self.width)), *rope)
        v = split_heads(self.v(x), self.width)
        own = None if self.norm_own is None else self.norm_own(v)
        y = self.attend(q, *join(k, v), mask, own)
        if self.gate is not None:  # [1, H, 1, T] -> [1, 1, H, T]
            y = y * (2 * torch.sigmoid(self.gate(x[:, : self.gate.in_channels]))).transpose(1, 2)
        return self.proj(torch.cat(y.split(1, dim=2), dim=1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own: Tensor | None) -> Tensor:
        """Return the attended values, [1, C, H, T]; H/G query heads share a key/value head.

        `own` holds each token's own value as a vector of length 1. Its direction is removed from
        the result (exclusive self-attention, XSA).
        """
        q, k, v = q.permute(0, 2, 3, 1), k.transpose(1, 2), v.transpose(1, 2)  # H T C, G C S
        share, groups = self.heads // k.size(1), k.size(1)
        owns, outputs = [None] * groups if own is None else own.split(1, dim=2), []
        for q_hTC, k_1CS, v_1CS, own_C1T in zip(
            q.split(share, dim=1), k.split(1, dim=1), v.split(1, dim=1), owns, strict=True
        ):
            p = torch.softmax(torch.matmul(q_hTC, k_1CS) + mask, dim=-1)
            y = torch.matmul(p, v_1CS.transpose(2, 3)).permute(0, 3, 1, 2)
            if own_C1T is not None:
                y = y - (y * own_C1T).sum(dim=1, keepdim=True) * own_C1T
            outputs.append(y)
        return torch.cat(outputs, dim=2)

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply RoPE to the first 2R channels of each head."""
        half, width = cos.size(1), x.size(1)
        a, b, *rest = x.split([half, half, *[width - 2 * half][: width > 2 * half]], dim=1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin, *rest], dim=1)


class LayerPass(nn.Module):
    """One pass of Block of train_gpt on [1, D, 1, T]; output scales are folded into the weights."""

    def __init__(
        self,
        source: Block,
        skip_D: Tensor | None,
        gate_D: Tensor | None,
        name: str,
        precision: Precision,
    ):
        super().__init__()
        scale = precision.scales.get(f"{name}.act", 1.0)
        self.keep, self.again = map(as_column, source.resid_mix)
        self.skip = None if skip_D is None else as_column(skip_D)
        self.gate = None if gate_D is None else as_column(gate_D)
        self.norm_attn = Norm(f"{name}.norm_attn", precision, source.norm_scale)
        self.norm_mlp = Norm(f"{name}.norm_mlp", precision, source.norm_scale)
        self.attn = CachedAttention(source.attn, source.attn_scale, f"{name}.attn", precision)
        self.fc = conv_from_matrix(source.mlp.fc.weight * scale)
        self.act = SquaredReLU(source.mlp.slope)
        self.proj = conv_from_matrix(source.mlp.proj.weight * source.mlp_scale[:, None] / scale**2)
        self.lane_mix = None if source.lane_mix is None else source.lane_mix.tolist()

    def mlp(self, x: Tensor) -> Tensor:
        return self.proj(self.act(self.fc(self.norm_mlp(x))))

    def forward(
        self,
        x: Tensor,
        lane: Tensor,
        x0: Tensor,
        skip: Tensor | None,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        join: Join,
    ) -> tuple[Tensor, Tensor]:
        """Return both lanes after this pass.

        Before the lanes part, `lane` is the same tensor object as `x`, and so are the results.
        """
        together = lane is x
        if self.gate is not None:
            x, lane = self.gate * x, self.gate * lane
        if skip is not None:
            x, lane = (part + self.skip * skip for part in (x, lane))
        lane = x if together else lane
        mixed = self.keep * x + self.again * x0
        attended = self.attn(self.norm_attn(mixed), rope, mask, join)
        if self.lane_mix is None:
            mixed = mixed + attended
            mixed = mixed + self.mlp(mixed)
            return mixed, mixed
        written = self.mlp(lane)
        first, second = (
            old + to[0] * attended + to[1] * written
            for old, to in zip((mixed, lane), self.lane_mix, strict=True)
        )
        return first, second


class LayersShard(nn.Module):
    """A shard of passes `first` to `end` - 1; keys and values are inputs and outputs, or states."""

    def __init__(
        self,
        model: GPT,
        dims: Dims,
        first: int,
        end: int,
        precision: Precision = EXACT,
        states: int = 0,
    ):
        super().__init__()
        self.first, self.end, self.dims, order = first, end, dims, model.passes(model.looping)
        self.interface = layout.layers_interface(first, end, dims, states)
        for name, shape in self.interface.states.items():
            self.register_buffer(name, torch.zeros(shape))
        self.passes = nn.ModuleDict(
            {str(nth): layer_pass(model, order, nth, precision) for nth in range(first, end)}
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Take and return tensors in the order of `interface`."""
        have = dict(zip(self.interface.inputs, inputs, strict=True))
        x, x0 = have[f"x{self.first}"], have["x0"]
        lane = have.get(f"lane{self.first}", x)
        if self.interface.states:
            have["keep"] = 1 - have["write"].sum(dim=2, keepdim=True)
        join = self.updated if self.interface.states else self.extended
        for nth in range(self.first, self.end):
            source = layout.skip_source(nth, self.dims.passes)
            x, lane = self.passes[str(nth)](
                x,
                lane,
                x0,
                have[f"x{source}"] if source else None,
                (have["cos"], have["sin"]),
                have["mask"],
                functools.partial(join, have, nth),
            )
            have |= {f"x{nth + 1}": x, f"lane{nth + 1}": lane}
        return tuple(have[name] for name in self.interface.outputs)

    def extended(self, have: dict, nth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs' keys and values of a pass, followed by those of the call."""
        have |= {f"k{nth}_new": k, f"v{nth}_new": v}
        return torch.cat([have[f"k{nth}"], k], dim=3), torch.cat([have[f"v{nth}"], v], dim=3)

    def updated(self, have: dict, nth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state's keys and values of a pass, with those of the call at their places.

        The last pass writes the states: coremltools 9 cannot convert two that are written last.
        """
        new = {f"k{nth}": k, f"v{nth}": v}
        for state in self.interface.states:
            for at, row in enumerate(self.rows(state)):
                if row in new:
                    old = getattr(self, state)[at : at + 1]
                    have[row] = old * have["keep"] + placed(new[row], have["write"])
        if nth == self.end - 1:
            for state in self.interface.states:
                getattr(self, state).copy_(torch.cat([have[row] for row in self.rows(state)]))
        return have[f"k{nth}"], have[f"v{nth}"]

    def rows(self, state: str) -> list[str]:
        """Return what the rows of a state hold: k0, v0, k1, ... or those of one kind."""
        kinds = {"kv": "kv", "keys": "k", "values": "v"}[state]
        return [f"{kind}{nth}" for nth in range(self.first, self.end) for kind in kinds]


def layer_pass(model: GPT, order: list[int], nth: int, precision: Precision) -> LayerPass:
    """Return pass `nth`; `order` holds the layer of each pass."""
    skip, gate = None, None
    if layout.skip_source(nth, len(order)):
        skip = model.skip_weights[nth - len(order) // 2]
        if model.skip_gates is not None:
            gate = torch.sigmoid(model.skip_gates[nth - len(order) // 2])
            skip = (1 - gate) * skip
    return LayerPass(model.blocks[order[nth]], skip, gate, f"passes.{nth}", precision)


class HeadShard(nn.Module):
    """The last norm, and the logits of tokens split[nth] to split[nth + 1] - 1."""

    def __init__(
        self, model: GPT, dims: Dims, nth: int, split: list[int], precision: Precision = EXACT
    ):
        super().__init__()
        self.interface = layout.head_interface(nth, split, dims)
        self.norm = Norm("head.norm", precision)
        self.out = conv_from_matrix(model.tok_emb.weight[split[nth] : split[nth + 1]])
        self.cap = model.cfg.logit_softcap

    def forward(self, x: Tensor, lane: Tensor | None = None) -> Tensor:
        x = x if lane is None else (x + lane) * 0.5
        return self.cap * torch.tanh(self.out(self.norm(x)) * (1 / self.cap))


def build_shards(
    model: GPT,
    dims: Dims,
    cuts: list[int],
    split: list[int],
    precision: Precision = EXACT,
    states: int = 0,
) -> dict[str, LayersShard | HeadShard]:
    """Return all shards by name, in the order in which they run.

    `cuts` holds the first pass of each shard and the number of passes; `split` does the same for
    the vocabulary.
    """
    shards: dict[str, LayersShard | HeadShard] = {}
    for nth, (first, end) in enumerate(zip(cuts, cuts[1:], strict=False)):
        shards[f"layers{nth}"] = LayersShard(model, dims, first, end, precision, states)
    for nth in range(len(split) - 1):
        shards[f"head{nth}"] = HeadShard(model, dims, nth, split, precision)
    return {name: shard.eval() for name, shard in shards.items()}


def run_shards(
    shards: Mapping[str, Callable], interfaces: Mapping[str, Interface], tensors: dict
) -> dict:
    """Run every shard in order on the tensors that it names; add its outputs to `tensors`."""
    for name, shard in shards.items():
        outputs = shard(*(tensors[n] for n in interfaces[name].inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        tensors |= zip(interfaces[name].outputs, outputs, strict=True)
    return tensors
