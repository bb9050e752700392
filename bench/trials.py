"""Techniques of others as patches of the trainer, so that the ladder can price them.

`with-NAME` of bench/ladder.py trains `frontier` with one of them. A patch replaces parts of
train_gpt in the process of one run, for training and for scoring. What pays moves into the trainer
as a setting, and its patch goes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train_gpt
from train_gpt import BOS_ID, GPT, Attention, Averages, BigramHash, Muon, normalised

Patch = dict[str, Any]  # "Muon.step" → what stands there instead
GATE_INPUTS = 12  # channels that a gate reads, as in ATTN_GATE


def extended(part: type[nn.Module], add: Callable[[Any], None]) -> Callable[..., None]:
    """Return an __init__ of a module that also adds parameters."""
    original = part.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any) -> None:
        original(self, *args)
        add(self)

    return init


# ==== OPTIMISER ===================================================================================
def cautious() -> Patch:
    """Decay a weight only where the step of Muon also shrinks it (modded-nanogpt, PR #328)."""
    original = Muon.step

    @torch.no_grad()
    def step(self: Muon) -> None:
        group = self.param_groups[0]
        decay, before = group["wd"], [bank.clone() for bank in group["params"]]
        group["wd"] = 0.0
        original(self)
        group["wd"] = decay
        for bank, old in zip(group["params"], before, strict=True):
            shrinking = (bank - old) * old < 0
            bank.sub_(old * shrinking, alpha=group["lr"] * decay)

    return {"Muon.step": step}


def row_floor() -> Patch:
    """Give each row of Muon's update at least half of the mean length of a row."""
    original = train_gpt.orthogonalised

    def orthogonalised(g: Tensor, *args: Any) -> Tensor:
        update = original(g, *args)
        length = update.norm(dim=-1, keepdim=True)
        least = 0.5 * length.mean(dim=-2, keepdim=True)
        return update * (length.maximum(least) / (length + 1e-7))

    return {"orthogonalised": orthogonalised}


def soap() -> Patch:
    """Divide Muon's momentum by its root mean square in the eigenbases of its covariances."""
    original, decay, every = Muon.share, 0.95, 10

    def share(self: Muon, bank: Tensor) -> Any:
        states = self.__dict__.setdefault("soap", {})
        if bank.shape not in states:
            sides = [torch.zeros(len(bank), n, n) for n in bank.shape[1:]]
            states[bank.shape] = [0, sides, [], torch.zeros_like(bank)]
        state = states[bank.shape]
        sides, square = state[1], state[3]
        for side, gram in zip(sides, (bank @ bank.mT, bank.mT @ bank), strict=True):
            side.lerp_(gram, 1 - decay)
        if state[0] % every == 0:
            state[2] = [torch.linalg.eigh(side)[1] for side in sides]
        state[0] += 1
        left, right = state[2]
        turned = left.mT @ bank @ right
        square.lerp_(turned.square(), 1 - decay)
        size = (square / (1 - decay ** state[0])).sqrt()
        size = size.maximum(0.01 * size.mean(dim=(1, 2), keepdim=True)).clamp(min=1e-12)
        return original(self, left @ (turned / size) @ right.mT)

    return {"Muon.share": share}


def cosine() -> Patch:
    """Let the rate fall along a cosine, not along a line."""

    def lr_scale(progress: float, cfg: train_gpt.Config) -> float:
        part = max(0.0, (progress - 1 + cfg.warmdown_frac) / cfg.warmdown_frac)
        return max(cfg.min_lr, 0.5 + 0.5 * math.cos(math.pi * part))

    return {"lr_scale": lr_scale}


def tail_ema() -> Patch:
    """Begin the moving average at 80 % of the run."""
    original = Averages.update

    def update(self: Averages, params: list, step: int, progress: float, cfg: Any) -> None:
        if progress >= 0.8:
            original(self, params, step, progress, cfg)

    return {"Averages.update": update}


# ==== MODEL =======================================================================================
def documents() -> Patch:
    """Let no position attend to a document before its own (varlen attention's mask)."""
    original, read = GPT.embed, GPT.from_embedded

    def embed(self: GPT, tokens_BT: Tensor) -> Tensor:
        number = (tokens_BT == BOS_ID).cumsum(1)
        self.same_document = (number[:, None, :, None] == number[:, None, None, :]).tril()
        return original(self, tokens_BT)

    def from_embedded(self: GPT, x0: Tensor, rope: Any, **part: Any) -> Tensor:
        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            gqa = q.size(1) != k.size(1)
            return F.scaled_dot_product_attention(q, k, v, self.same_document, enable_gqa=gqa)

        return read(self, x0, rope, attention, **part)

    return {"GPT.embed": embed, "GPT.from_embedded": from_embedded}


def learned_xsa() -> Patch:
    """Remove a learned part of a position's own value, one number a head; at first none."""
    original = Attention.forward

    def add(self: Attention) -> None:
        self.own = nn.Parameter(torch.zeros(self.q_gain.shape))

    def forward(self: Attention, x_BTD: Tensor, rope: Any, attention: Callable) -> Tensor:
        def exclusive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = attention(q, k, v)
            without = train_gpt.without_own_value(y, v)
            return y + self.own.type_as(y)[:, None, None] * (without - y)

        return original(self, x_BTD, rope, exclusive)

    return {"Attention.__init__": extended(Attention, add), "Attention.forward": forward}


def half_gate() -> Patch:
    """Gate each head by a sigmoid of half of the product, at first a half (#1855)."""
    original = Attention.forward

    def add(self: Attention) -> None:
        self.opening = nn.Parameter(torch.zeros(len(self.q_gain), GATE_INPUTS))

    def forward(self: Attention, x_BTD: Tensor, rope: Any, attention: Callable) -> Tensor:
        gate = torch.sigmoid(0.5 * F.linear(x_BTD[..., :GATE_INPUTS], self.opening))

        def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v) * gate.mT[..., None].type_as(v)

        return original(self, x_BTD, rope, gated)

    return {"Attention.__init__": extended(Attention, add), "Attention.forward": forward}


def gated_smear() -> Patch:
    """Add a part of the embedding before that one gate of 12 inputs opens, a number a position."""

    class GatedSmear(nn.Module):
        def __init__(self, _dim: int):
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(1, GATE_INPUTS))
            self.scale = nn.Parameter(torch.tensor(0.0))

        def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
            before = F.pad(x_BTD[:, :-1], (0, 0, 1, 0))
            before = before.masked_fill((tokens_BT == BOS_ID)[..., None], 0.0)
            gate = self.scale * torch.sigmoid(F.linear(x_BTD[..., :GATE_INPUTS], self.gate))
            return x_BTD + gate * before

    return {"SmearGate": GatedSmear}


def signs() -> Patch:
    """Give a row of BigramHash a sign by a second hash, so that two pairs in a row differ."""

    def forward(self: BigramHash, tokens_BT: Tensor) -> Tensor:
        pair = torch.bitwise_xor(40503 * tokens_BT[:, 1:], 60013 * tokens_BT[:, :-1])
        sign = F.pad(1 - 2 * (pair >> 7 & 1), (1, 0), value=1)
        rows = self.table(self.buckets(tokens_BT)) * sign[..., None]
        return self.proj(rows) * self.scale

    return {"BigramHash.forward": forward}


# ==== STREAM ======================================================================================
def capped(self: GPT, hidden: Tensor, weight: Tensor) -> Tensor:
    """Return logits within LOGIT_SOFTCAP, as the trainer does."""
    cap = self.cfg.logit_softcap
    return cap * torch.tanh(F.linear(hidden, weight).float() / cap)


def keep(_self: GPT, _i: int, outputs: list[Tensor]) -> Tensor:
    """Go on with the last output, as the trainer does."""
    return outputs[-1]


def stream(after: Callable = keep, head: Callable = capped) -> Callable:
    """Return GPT.from_embedded with another stream between blocks, or another head."""

    def from_embedded(
        self: GPT,
        x0: Tensor,
        rope: Any,
        attention: Callable = train_gpt.attend,
        pieces: Tensor | None = None,
        first: int = 0,
    ) -> Tensor:
        x, lane, order, skips, outputs = x0, x0, self.passes(self.looping), [], [x0]
        half = len(order) // 2
        for i, layer in enumerate(order):
            if i >= half and skips:
                skip = self.skip_weights[i - half].type_as(x) * skips.pop()
                if self.skip_gates is not None:
                    gate = torch.sigmoid(self.skip_gates[i - half]).type_as(x)
                    x, lane, skip = gate * x, gate * lane, (1 - gate) * skip
                x, lane = x + skip, lane + skip
            apart = lane is not x
            x, lane = self.blocks[layer](x, lane, x0, rope, attention)
            if i < half:
                skips.append(x)
            outputs.append(x)
            if (mixed := after(self, i, outputs)) is not x:
                x, lane = mixed, lane if apart else mixed
        weight = self.tok_emb.weight if pieces is None else self.tok_emb.weight[pieces]
        return head(self, normalised((x + lane)[:, first:] / 2), weight)

    return from_embedded


def dense() -> Patch:
    """Let each block read a learned sum of the outputs of all before it (a static MUDD)."""

    def add(self: GPT) -> None:
        count = self.cfg.num_layers
        self.depth_weights = nn.Parameter(torch.eye(count + 1)[1:])

    def after(self: GPT, i: int, outputs: list[Tensor]) -> Tensor:
        weights = self.depth_weights[i].type_as(outputs[0])
        return sum(w * x for w, x in zip(weights, outputs, strict=False))

    return {"GPT.__init__": extended(GPT, add), "GPT.from_embedded": stream(after=after)}


def two_caps() -> Patch:
    """Learn the bound of positive and of negative logits apart (AsymLogit, #2135)."""

    def add(self: GPT) -> None:
        self.caps = nn.Parameter(torch.zeros(2))

    def head(self: GPT, hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        up, down = self.cfg.logit_softcap * self.caps.exp()
        return up * torch.tanh(logits.relu() / up) - down * torch.tanh((-logits).relu() / down)

    return {"GPT.__init__": extended(GPT, add), "GPT.from_embedded": stream(head=head)}


def two_ahead() -> Patch:
    """Also predict the token after the next, through one matrix, at a tenth of the loss."""
    original = GPT.forward

    def add(self: GPT) -> None:
        self.ahead = train_gpt.linear(self.cfg.model_dim, self.cfg.model_dim)

    def head(self: GPT, hidden: Tensor, weight: Tensor) -> Tensor:
        self.read = hidden, weight
        return capped(self, hidden, weight)

    def forward(self: GPT, tokens_BT: Tensor, targets_BT: Tensor, sample: Any = None) -> Tensor:
        nats = original(self, tokens_BT, targets_BT, sample)
        if not torch.is_grad_enabled():
            return nats
        hidden, weight = self.read
        logits = capped(self, normalised(self.ahead(hidden[:, :-1])), weight)
        places = targets_BT if sample is None else sample[1].view_as(targets_BT)
        logits = logits if sample is None else logits - sample[2]
        later = F.cross_entropy(logits.flatten(0, 1), places[:, 1:].flatten(), reduction="none")
        return nats + 0.1 * F.pad(later.view(len(nats), -1), (0, 1))

    model = {"GPT.__init__": extended(GPT, add), "GPT.from_embedded": stream(head=head)}
    return {**model, "GPT.forward": forward}


# ==== ROUNDING ====================================================================================
CLIPS = {".attn.": 13 / 12.85, ".mlp.": 11.5 / 12.85, "tok_emb": 14 / 12.85}  # k of each, to k


def clips() -> Patch:
    """Give attention, MLP and embeddings steps of their own (#1855), at the export, not in QAT."""
    quantised, predicted_bytes = train_gpt.quantised, train_gpt.predicted_bytes

    def parts(state: train_gpt.Tensors, k: float) -> list[tuple[dict[str, Tensor], float]]:
        ratio = {n: next((r for key, r in CLIPS.items() if key in n), 1.0) for n in state}
        ratios = sorted(set(ratio.values()))
        return [({n: state[n] for n in state if ratio[n] == r}, k * r) for r in ratios]

    def by_group(state: train_gpt.Tensors, k: float, cfg: Any, factors: Any) -> dict:
        rounded = {}
        for own, own_k in parts(state, k):
            rounded |= quantised(own, own_k, cfg, {n: factors[n] for n in own if n in factors})
        return {n: rounded[n] for n in state}

    def bytes_by_group(state: train_gpt.Tensors, k: float, cfg: Any) -> int:
        sizes = [predicted_bytes(own, own_k, cfg) for own, own_k in parts(state, k)]
        return sum(sizes) - predicted_bytes({}, k, cfg) * (len(sizes) - 1)

    return {"quantised": by_group, "predicted_bytes": bytes_by_group}


# ==== BY NAME =====================================================================================
TRIALS: dict[str, Callable[[], Patch]] = {
    trial.__name__: trial
    for trial in (
        cautious,
        row_floor,
        soap,
        cosine,
        tail_ema,
        documents,
        learned_xsa,
        half_gate,
        gated_smear,
        signs,
        dense,
        two_caps,
        two_ahead,
        clips,
    )
}


def apply(name: str) -> None:
    """Patch the trainer in this process; the empty name patches nothing."""
    for place, new in (TRIALS[name]() if name else {}).items():
        owner, _, attribute = place.rpartition(".")
        setattr(getattr(train_gpt, owner) if owner else train_gpt, attribute, new)
