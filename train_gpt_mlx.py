"""Train on Apple Silicon with MLX: same settings, shards, log and artifact as train_gpt.py.

    PRESET=cpu python train_gpt_mlx.py          a small model
    PRESET=consensus python train_gpt_mlx.py    the records' model, for MAX_WALLCLOCK_SECONDS

In the order of the file: bridge, rounding, model, optimisers, runtime, micro-batches, training,
checkpoints, export, scores, main.

Everything that does not depend on the machine is imported from train_gpt: settings, data,
schedules, averages, quantiser, artifact and initial weights. This file has what MLX computes: the
model, its gradients, the optimisers, and rounding during training. Tensors passed between the two
share the memory of MLX's arrays. tests/golden/oracle.npz holds both to the same numbers.

Ten functions (`main`, `warm_up`, `train`, `switch`, checkpoints, averages, rounding, export; 190
lines) go through the same steps as train_gpt's, but are not shared. train_gpt.py imports nothing
of this repository, so it would have to declare every step as an interface, for this one caller,
and its readers would have to look for each step behind that interface. Every function that
train_gpt can offer unchanged is imported.

Shapes in names: B sequences, T positions, D model width, H query heads, G key/value heads,
C head width, R half of the channels that RoPE turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

import train_gpt
from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, run_reporting
from fairway.scoring.neural import plan
from fairway.scoring.settings import EvalConfig
from train_gpt import (
    BOS_ID,
    GPTQ_BATCHES,
    HEAD,
    LEAST_K,
    LOOKUP_SHARE,
    NEWTON_SCHULZ,
    PLAIN_BITS,
    POLAR_EXPRESS,
    PRESETS,
    Artifact,
    Averages,
    Config,
    Data,
    Factors,
    Log,
    Report,
    Runtime,
    TokenStream,
    UserError,
    bits_per_byte,
    code_bytes,
    file_sha256,
    fit_artifact,
    gptq_factor,
    levels,
    load_data,
    log_errors,
    log_step,
    lr_scale,
    mean_nats,
    momentum_at,
    predict_size,
    progress_of,
    quantised,
    read_checkpoint,
    replacing,
    rope_tables,
    save,
    tensor_bits,
    validate,
    weights_of,
)

try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten, tree_unflatten

    MLX_MISSING = ""
except ImportError as e:
    if __name__ != "__main__":
        raise
    # --help works without MLX: these stand-ins are enough to define the classes below.
    MLX_MISSING = f"{e}; pip install -r requirements-apple.txt"
    mx, nn = None, SimpleNamespace(Module=object, Linear=object)

# Names and order are those of train_gpt.GPT's parameters, and so of the artifact.
Weights: TypeAlias = "dict[str, mx.array]"
# A forward and backward pass may hold this much: a quarter of a Mac with 16 GB.
ACTIVATION_BYTES = 4 << 30


# ==== BRIDGE ======================================================================================
# PyTorch only holds and rounds numbers here. None of its models, gradients or optimisers run.
def to_tensors(weights: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """Return tensors that share the arrays' memory; never write to them."""
    return {n: torch.from_numpy(np.asarray(w)) for n, w in weights.items()}


def to_arrays(tensors: Mapping[str, Tensor]) -> Weights:
    """Copy tensors into MLX arrays."""
    return {n: mx.array(t.detach().numpy()) for n, t in tensors.items()}


def to_ids(tokens: np.ndarray) -> mx.array:
    """Copy tokens into an int32 array of the same shape."""
    return mx.array(tokens.astype(np.int32))


def first_weights(cfg: Config) -> Weights:
    """Draw train_gpt's initial weights, so that both trainers start from the same bits."""
    model = train_gpt.GPT(cfg)
    train_gpt.initialise(model, cfg)
    return to_arrays(dict(model.named_parameters()))


# ==== ROUNDING ====================================================================================
# The export rounds by train_gpt.quantised. Training computes the same on MLX's device. For equal
# steps the results are equal to the bit. The steps are equal, or neighbours in bf16, because MLX
# adds up a mean in another order.
def row_steps(weight: mx.array, k: float, bits: int) -> mx.array:
    """Return the quantiser's step of each row, [rows, 1]; 1 for a row of zeros."""
    rms = mx.sqrt(mx.mean(mx.square(weight), axis=1, keepdims=True))
    step = (rms * (max(k, LEAST_K[bits]) / levels(bits))).astype(mx.bfloat16).astype(mx.float32)
    return mx.where(step > 0, step, 1.0)


def round_weight(weight: mx.array, k: float, bits: int) -> mx.array:
    """Round one tensor to the values that an artifact with this k can hold."""
    if bits == PLAIN_BITS:  # fp16 ends at 65504; a larger value would become infinite
        return mx.clip(weight, -65504, 65504).astype(mx.float16).astype(mx.float32)
    step = row_steps(weight, k, bits)
    return mx.clip(mx.round(weight / step), -levels(bits), levels(bits)) * step


def round_weights(weights: Weights, k: float, cfg: Config) -> Weights:
    """Round all tensors, each to its own bit width."""
    return {n: round_weight(w, k, tensor_bits(n, cfg)) for n, w in weights.items()}


# ==== MODEL =======================================================================================
# From the leaves to the root, as in train_gpt, but in fp32 throughout.
EPSILON = float(np.finfo(np.float32).eps)  # PyTorch's rms_norm uses it for fp32


def normalised(x: mx.array) -> mx.array:
    """Scale the last axis to a root mean square of 1."""
    return mx.fast.rms_norm(x, None, EPSILON)


def rotate(x_BHTC: mx.array, cos_TR: mx.array, sin_TR: mx.array) -> mx.array:
    """Apply RoPE to the first 2R channels of each head."""
    # By tables of float64 angles, not mx.fast.rope: angles of late positions need more than fp32.
    half = cos_TR.shape[-1]
    a, b, rest = mx.split(x_BHTC, [half, 2 * half], axis=-1)
    return mx.concatenate([a * cos_TR + b * sin_TR, b * cos_TR - a * sin_TR, rest], axis=-1)


def without_own_value(y_BHTC: mx.array, v_BGTC: mx.array) -> mx.array:
    """Remove from each head's output its component along the position's own value (XSA)."""
    B, H, T, C = y_BHTC.shape
    square = mx.sum(mx.square(v_BGTC), axis=-1, keepdims=True)
    own = (v_BGTC * mx.rsqrt(mx.maximum(square, 1e-24)))[:, :, None]
    y = y_BHTC.reshape(B, v_BGTC.shape[1], -1, T, C)
    return (y - mx.sum(y * own, axis=-1, keepdims=True) * own).reshape(B, H, T, C)


class Linear(nn.Linear):
    """A matrix without bias. While `watch` is set, it is called with each input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.watch = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.watch:
            self.watch(x)
        return super().__call__(x)


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and normalised queries and keys."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        D, H, G, C = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.width, self.exclusive = C, layer >= cfg.num_layers - cfg.xsa_last_n
        self.q, self.k, self.v = Linear(D, H * C), Linear(D, G * C), Linear(D, G * C)
        self.proj = Linear(D, D)
        self.q_gain = mx.full((H,), cfg.qk_gain_init)
        if cfg.attn_gate:
            self.gate = mx.zeros((H, min(12, D)))

    def __call__(self, x_BTD: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        B, T, D = x_BTD.shape
        q, k, v = (
            linear(x_BTD).reshape(B, T, -1, self.width).swapaxes(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        q = rotate(normalised(q), *rope) * self.q_gain[:, None, None]
        k = rotate(normalised(k), *rope)
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.width**-0.5, mask="causal")
        y = (without_own_value(y, v) if self.exclusive else y).swapaxes(1, 2)
        if "gate" in self:
            y = y * (2 * mx.sigmoid(x_BTD[..., : self.gate.shape[1]] @ self.gate.T))[..., None]
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    """Two matrices with a squared leaky ReLU between them."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden, self.slope = int(cfg.mlp_mult * cfg.model_dim), cfg.leaky_slope
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        hidden = self.fc(x_BTD)
        return self.proj(mx.square(mx.maximum(hidden, self.slope * hidden)))


class Block(nn.Module):
    """Attention and MLP, one after the other in one lane, or side by side in two lanes.

    The input is a learned mix of the residual stream and the embedding x0.
    """

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp, D = Attention(cfg, layer), MLP(cfg), cfg.model_dim
        self.attn_scale, self.mlp_scale = mx.ones(D), mx.ones(D)
        self.resid_mix = mx.stack([mx.ones(D), mx.zeros(D)])
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        if 0 < cfg.parallel_start_layer <= layer:
            self.lane_mix = mx.ones((2, 2))

    def read(self, x: mx.array) -> mx.array:
        """Normalise a sub-layer's input."""
        return normalised(x) * self.norm_scale

    def __call__(self, x: mx.array, lane: mx.array, x0: mx.array, rope) -> tuple[mx.array, ...]:
        """Return both lanes after this block; the same array twice while there is one lane."""
        mixed = self.resid_mix[0] * x + self.resid_mix[1] * x0
        attended = self.attn_scale * self.attn(self.read(mixed), rope)
        if "lane_mix" not in self:
            mixed = mixed + attended
            mixed = mixed + self.mlp_scale * self.mlp(self.read(mixed))
            return mixed, mixed
        written = self.mlp_scale * self.mlp(self.read(lane))
        return tuple(
            old + share[0] * attended + share[1] * written
            for old, share in zip((mixed, lane), self.lane_mix, strict=True)
        )


class BigramHash(nn.Module):
    """An embedding of the last two tokens, hashed into a small table."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.last, self.scale = cfg.bigram_vocab_size - 1, mx.array(0.05)

    def buckets(self, tokens_BT: mx.array) -> mx.array:
        """Return train_gpt's buckets; the first position has the last bucket."""
        t = tokens_BT.astype(mx.uint32)  # it holds the largest product of a token below 65,536
        pairs = ((36313 * t[:, 1:]) ^ (27191 * t[:, :-1])) % self.last
        return mx.pad(pairs, ((0, 0), (1, 0)), constant_values=mx.array(self.last, mx.uint32))

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        return self.proj(self.table(self.buckets(tokens_BT))) * self.scale


class SmearGate(nn.Module):
    """Mix a learned share of the previous position's embedding into each channel.

    The first position of a document gets nothing from the document before it.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gate = mx.zeros(dim)

    def __call__(self, x_BTD: mx.array, tokens_BT: mx.array) -> mx.array:
        before = mx.concatenate([x_BTD[:, :1], x_BTD[:, :-1]], axis=1)
        before = mx.where((tokens_BT == BOS_ID)[..., None], x_BTD, before)
        return x_BTD + mx.sigmoid(self.gate) * (before - x_BTD)


class GPT(nn.Module):
    """A U-Net of blocks over tied embeddings: skips lead from the first half to the second."""

    passes = train_gpt.GPT.passes  # the layers in the order in which they run

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.looping = cfg, False  # looping: depth recurrence is on
        self.watch = None  # as in Linear: called with what is multiplied by the embedding
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        if cfg.bigram_vocab_size:
            self.bigram = BigramHash(cfg)
        if cfg.smear_gate:
            self.smear = SmearGate(cfg.model_dim)
        self.blocks = [Block(cfg, i) for i in range(cfg.num_layers)]
        skips = max(len(self.passes(looping)) // 2 for looping in (False, True))
        self.skip_weights = mx.ones((skips, cfg.model_dim))
        if cfg.skip_gates:
            self.skip_gates = mx.zeros((skips, cfg.model_dim))
        rope_dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
        tables = rope_tables(cfg.train_seq_len, rope_dims, cfg.rope_base)
        # MLX does not count arrays as parameters if their names begin with an underscore.
        self._cos, self._sin = (mx.array(t.numpy()) for t in tables)

    def embed(self, tokens_BT: mx.array) -> mx.array:
        """Return x0 [B, T, D]: token and bigram embeddings, normalised, then smeared."""
        x = self.tok_emb(tokens_BT)
        x = normalised(x + self.bigram(tokens_BT) if "bigram" in self else x)
        return self.smear(x, tokens_BT) if "smear" in self else x

    def logits(self, tokens_BT: mx.array, pieces: mx.array | None = None) -> mx.array:
        """Return [B, T, V], or of a part of V: what each position predicts to come next."""
        T, cap = tokens_BT.shape[1], self.cfg.logit_softcap
        if len(self._cos) < T:
            raise UserError(
                f"{T} tokens in a sequence, but the model's TRAIN_SEQ_LEN is {len(self._cos)}"
            )
        rope, order, skips = (self._cos[:T], self._sin[:T]), self.passes(self.looping), []
        x = lane = x0 = self.embed(tokens_BT)
        for i, layer in enumerate(order):
            if i >= len(order) // 2 and skips:
                skip = self.skip_weights[i - len(order) // 2] * skips.pop()
                if "skip_gates" in self:
                    gate = mx.sigmoid(self.skip_gates[i - len(order) // 2])
                    x, lane, skip = gate * x, gate * lane, (1 - gate) * skip
                x, lane = x + skip, lane + skip
            x, lane = self.blocks[layer](x, lane, x0, rope)
            if i < len(order) // 2:
                skips.append(x)
        weight = self.tok_emb.weight if pieces is None else self.tok_emb.weight[pieces]
        x = normalised((x + lane) / 2)
        if self.watch:
            self.watch(x)
        return cap * mx.tanh(x @ weight.T / cap)

    def __call__(self, tokens_BT: mx.array, targets_BT: mx.array, *sample: mx.array) -> mx.array:
        """Return the cross-entropy of each target, [B, T], in nats, perhaps over a sample of V."""
        if not sample:
            return nn.losses.cross_entropy(self.logits(tokens_BT), targets_BT, reduction="none")
        pieces, places, chances = sample
        logits = self.logits(tokens_BT, pieces) - chances
        places_BT = places.reshape(targets_BT.shape)
        return nn.losses.cross_entropy(logits, places_BT, reduction="none")

    def holding(self, weights: Weights) -> GPT:
        """Put these weights into the model and return it."""
        self.update(tree_unflatten(list(weights.items())))
        return self


def build_model(artifact: Artifact) -> GPT:
    """Build the model of an artifact; a tensor that is missing or unknown is an error."""
    model = GPT(artifact.config)
    model.load_weights(list(to_arrays(artifact.weights).items()), strict=True)
    model.looping = artifact.header["looping"]
    return model


def loss_function(model: GPT, weights: Weights | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the model's loss, with `weights` if given, as a function from tensors to a tensor.

    train_gpt.mean_nats calls it.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        evaluated = model if weights is None else model.holding(weights)
        return torch.from_numpy(np.asarray(evaluated(to_ids(x.numpy()), to_ids(y.numpy()))))

    return loss


# ==== OPTIMISERS ==================================================================================
# The same arithmetic as train_gpt's: Muon for matrices, AdamW for embeddings and everything else.
def orthogonalised(
    g: mx.array, steps: int, coefficients: list[tuple[float, float, float]]
) -> mx.array:
    """Return matrices [n, rows, cols] with their singular values moved to about one."""
    x = g.swapaxes(-1, -2) if (tall := g.shape[-2] > g.shape[-1]) else g
    x = x / (mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True)) * 1.01 + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(-1, -2) if tall else x


def clip_gradients(gradients: Weights, limit: float) -> Weights:
    """Scale all gradients so that their common norm is at most `limit`.

    The formula is that of torch.nn.utils.clip_grad_norm_.
    """
    norm = mx.sqrt(sum(mx.sum(mx.square(g)) for g in gradients.values()))
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return {n: g * scale for n, g in gradients.items()}


class Optimiser:
    """Muon and AdamW with their state; each parameter is in exactly one group."""

    def __init__(self, weights: Weights, cfg: Config):
        embeddings = [n for n in weights if n in ("tok_emb.weight", "bigram.table.weight")]
        self.matrices = [n for n in weights if n.endswith(".weight") and n not in embeddings]
        scalars = [n for n in weights if not n.endswith(".weight")]
        self.adam_groups = (
            (embeddings, cfg.tied_embed_lr, cfg.embed_wd),
            (scalars, cfg.scalar_lr, cfg.adam_wd),
        )
        assert sorted(self.matrices + embeddings + scalars) == sorted(weights), "each exactly once"
        self.cfg, self.count = cfg, 0  # count: AdamW's steps, for its bias correction
        zeros = {n: mx.zeros_like(w) for n, w in weights.items()}
        self.momentum = {n: zeros[n] for n in self.matrices}
        self.first, self.second = ({n: zeros[n] for n in embeddings + scalars} for _ in range(2))

    def step(self, weights: Weights, gradients: Weights, scale: float, momentum: float) -> Weights:
        """Return the new weights, in the same order. `scale` multiplies all learning rates."""
        self.count += 1
        new = dict(weights)
        self.update_by_muon(new, gradients, self.cfg.matrix_lr * scale, momentum)
        for names, lr, wd in self.adam_groups:
            self.update_by_adamw(new, gradients, names, lr * scale, wd)
        return new

    def update_by_muon(self, new: Weights, gradients: Weights, lr: float, momentum: float) -> None:
        """Take a step of orthogonalised Nesterov momentum with decoupled weight decay."""
        cfg, by_shape = self.cfg, {}
        coefficients = POLAR_EXPRESS if cfg.muon_polar_express else NEWTON_SCHULZ
        for n in self.matrices:
            self.momentum[n] = momentum * self.momentum[n] + gradients[n]
            direction = gradients[n] + momentum * self.momentum[n]
            if cfg.muon_row_normalize:
                norm = mx.sqrt(mx.sum(mx.square(direction), axis=1, keepdims=True))
                direction = direction / (norm + 1e-7)
            by_shape.setdefault(direction.shape, {})[n] = direction
        for (rows, columns), group in by_shape.items():  # one batched product for each shape
            stack = mx.stack(list(group.values()))
            directions = orthogonalised(stack, cfg.muon_backend_steps, coefficients)
            rate = lr * max(1, rows / columns) ** 0.5
            for n, direction in zip(group, directions, strict=True):
                new[n] = new[n] * (1 - lr * cfg.muon_wd) - rate * direction

    def update_by_adamw(
        self, new: Weights, gradients: Weights, names: list[str], lr: float, wd: float
    ) -> None:
        """Take a step of AdamW for the parameters `names`."""
        cfg = self.cfg
        first, second = 1 - cfg.beta1**self.count, math.sqrt(1 - cfg.beta2**self.count)
        for n in names:
            g = gradients[n]
            self.first[n] = self.first[n] + (1 - cfg.beta1) * (g - self.first[n])
            self.second[n] = cfg.beta2 * self.second[n] + (1 - cfg.beta2) * mx.square(g)
            new[n] = new[n] * (1 - lr * wd) - lr / first * self.first[n] / (
                mx.sqrt(self.second[n]) / second + cfg.adam_eps
            )

    def state(self) -> dict[str, Any]:
        """Return the state as a checkpoint stores it."""
        return {"count": self.count} | {
            part: to_tensors(getattr(self, part)) for part in ("momentum", "first", "second")
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `state()` returned."""
        self.count = state["count"]
        for part in ("momentum", "first", "second"):
            setattr(self, part, to_arrays(state[part]))


# ==== RUNTIME =====================================================================================
# One process and one device: the Mac's GPU if MLX finds one, else the CPU.
def set_up_runtime(cfg: Config, env: Mapping[str, str]) -> Runtime:
    """Choose MLX's device. The Runtime's own device is a CPU, where the tensors lie."""
    world = env.get("WORLD_SIZE", "1")
    if world != "1":
        raise UserError(
            f"WORLD_SIZE is {world}; this trainer uses one Mac: start train_gpt_mlx.py without "
            "torchrun, or train_gpt.py with it"
        )
    if cfg.device == "cuda":
        raise UserError(
            "DEVICE is cuda; this trainer is for Apple Silicon: use train_gpt.py, or unset DEVICE"
        )
    metal = mx.metal.is_available()
    if cfg.device == "mps" and not metal:
        raise UserError("DEVICE is mps, but MLX finds no Apple GPU; unset DEVICE")
    gpu = metal and cfg.device != "cpu"
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    name = mx.device_info()["device_name"] if gpu else platform.machine()
    return Runtime(0, 1, torch.device("cpu"), f"mlx {'gpu' if gpu else 'cpu'} {name}")


def log_header(log: Log, cfg: Config, rt: Runtime, data: Data, preset: str) -> None:
    """Log source, versions and settings to the file, and the hashes of all inputs everywhere."""
    source, settings = Path(__file__).read_text(encoding="utf-8"), dataclasses.asdict(cfg)
    rule = "=" * 100
    log(
        f"{source}\n{rule}\nRunning Python {sys.version}\nRunning MLX {mx.__version__}\n"
        f"Running PyTorch {torch.__version__}\n{platform.platform()}\n{rule}\n"
        f"settings: {json.dumps(settings)}",
        screen=False,
    )
    texts = {
        "code": source.encode(),
        "settings": json.dumps(settings, sort_keys=True).encode(),
        "tokenizer": data.tokenizer_path.read_bytes(),
        "train_gpt": Path(train_gpt.__file__).read_bytes(),
    }
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()}
    hashes["data"] = data.fingerprint
    start = dict(
        run_id=log.run_id,
        preset=preset,
        device=rt.name,
        torch=str(torch.__version__),
        mlx=mx.__version__,
    )
    lines = (start, {f"{name}_sha256": value for name, value in hashes.items()})
    log(
        "\n".join(" ".join(f"{name}:{value}" for name, value in line.items()) for line in lines),
        "start",
        settings=settings,
        sha256=hashes,
        world_size=1,
        python=sys.version,
        **start,
    )


def progress_printer(label: str) -> Callable[[float], None]:
    """Return `on_progress(fraction)`, which prints LABEL, percent and ETA every ten seconds."""
    start, printed = time.perf_counter(), 0

    def on_progress(fraction: float) -> None:
        nonlocal printed
        seconds = time.perf_counter() - start
        if seconds < 10 * (printed + 1):
            return
        printed = seconds // 10
        eta = seconds / fraction - seconds
        print(f"{label} {100 * fraction:.0f}% eta:{eta:.0f}s", file=sys.stderr, flush=True)

    return on_progress


# ==== MICRO-BATCHES ===============================================================================
# A Mac's memory is smaller than an H100's, so a pass gets as many sequences as fit in it.
def activation_bytes(cfg: Config) -> int:
    """Estimate the memory that one token needs in a forward and backward pass.

    Each layer keeps its activations and attention scores. One layer at a time needs as much again.
    The logits exist six times. Fitted on MLX's CPU build, the estimate is 2 to 18 % too high: for
    a sequence of 2,048 tokens of the consensus preset it says 3.5 GB, and 3.1 GB were used.
    """
    layers = len(GPT.passes(SimpleNamespace(cfg=cfg), True))
    hidden = int(cfg.mlp_mult * cfg.model_dim)
    per_layer = 16 * cfg.model_dim + 4 * hidden + 5 * cfg.num_heads * cfg.train_seq_len // 4
    return 4 * ((layers + 1) * per_layer + 6 * cfg.vocab_size)


def micro_tokens(cfg: Config) -> int:
    """Return the tokens of a pass: whole sequences, at most an eighth of the batch."""
    limit = cfg.micro_batch_tokens or ACTIVATION_BYTES // activation_bytes(cfg)
    sequences = max(1, limit // cfg.train_seq_len)
    return min(cfg.train_batch_tokens // 8, sequences * cfg.train_seq_len)


# ==== TRAINING ====================================================================================
# The loop of train_gpt with two differences. A step may take minutes, so a signal ends it between
# micro-batches, and a line is logged at least once a minute.
@dataclass
class Run:
    """The state of a run; a checkpoint stores what is needed to continue it.

    Some of train_gpt's functions take a Run of this class as their own.
    """

    cfg: Config
    rt: Runtime
    log: Log
    data: Data
    model: GPT  # the structure; `weights` has the numbers
    weights: Weights
    optimiser: Optimiser
    stream: TokenStream
    averages: Averages = field(default_factory=Averages)
    # Loss and gradients, by whether depth recurrence is on and whether the loss is over a sample.
    gradient_functions: dict[tuple[bool, bool], Callable] = field(default_factory=dict)
    step: int = 0
    train_s: float = 0.0  # seconds until the clock was last started
    k: float = 0.0  # the quantiser's: predicted first, then measured during the run
    qat: bool = False
    measured: bool = False  # the size, in the middle of the run
    clock: float | None = None
    loss: Tensor | None = None  # of the last step
    signum: int = 0
    saved_at: float = field(default_factory=time.perf_counter)
    reserve_s: float = 0.0  # kept of the clock for the choices at the end
    news: Report = Report(0, 0.0, 0.0, 0)  # of the step that is logged
    logged: tuple[int, float] = (0, 0.0)  # step and clock of the last line

    elapsed = train_gpt.Run.elapsed

    def set_clock(self, running: bool) -> None:
        """Start or stop the clock of the training time, after MLX has finished its work."""
        mx.synchronize()
        self.train_s, self.clock = self.elapsed(), time.perf_counter() if running else None

    @property
    def params(self) -> list[Tensor]:
        """The weights as tensors, in the order of the names."""
        return list(to_tensors(self.weights).values())

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss at the current weights, for train_gpt.mean_nats."""
        return loss_function(self.model, self.weights)


def set_up(cfg: Config, rt: Runtime, data: Data, log: Log) -> Run:
    """Build the run, log its shapes, and check that its artifact can fit."""
    weights = first_weights(cfg)
    optimiser, stream = Optimiser(weights, cfg), TokenStream(data.train)
    run = Run(cfg, rt, log, data, GPT(cfg), weights, optimiser, stream)
    names = {n for n, _ in tree_flatten(run.model.parameters())}
    assert names == set(weights), "the names of train_gpt.GPT"
    shapes = {n: [*w.shape] for n, w in weights.items()}
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data.tokenizer_path}")
    log(
        f"train_loader:dataset:{data.folder.name} train_shards:{len(data.train)} "
        f"tokens:{sum(map(len, data.train))}"
    )
    log(
        f"val_loader:shards pattern={data.folder}/*_val_*.bin tokens:{len(data.val) - 1} "
        f"bytes:{data.val_bytes}"
    )
    count, size = sum(w.size for w in weights.values()), micro_tokens(cfg)
    log(f"model_params:{count}", "model", parameters=count, tensors=shapes)
    passes = 8 * -(-cfg.train_batch_tokens // 8 // size)
    log(
        f"world_size:1 grad_accum_steps:{passes} micro_batch_tokens:{size}\nsdp_backends:mlx\n"
        f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}\n"
        f"tie_embeddings:True embed_lr:{cfg.tied_embed_lr} head_lr:0.0 matrix_lr:{cfg.matrix_lr} "
        f"scalar_lr:{cfg.scalar_lr}\ntrain_batch_tokens:{cfg.train_batch_tokens} "
        f"train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} "
        f"max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\nseed:{cfg.seed}"
    )
    # Normal rows, as after training: initial zeros would compress too well.
    noise = torch.Generator().manual_seed(0)
    weights_like_trained = {n: torch.randn(s, generator=noise) for n, s in shapes.items()}
    update_k(run, "before training", weights_like_trained)
    if cfg.compile:
        log("compile:mx.compile runs with the first step")
    return run


def size_inputs(run: Run) -> SimpleNamespace:
    """Return the run as train_gpt's functions on sizes read it, with this file as counted code."""
    files = ",".join(filter(None, (str(Path(__file__)), run.cfg.extra_code_files)))
    model = SimpleNamespace(
        named_parameters=lambda: to_tensors(run.weights).items(), looping=run.model.looping
    )
    cfg = dataclasses.replace(run.cfg, extra_code_files=files)
    return SimpleNamespace(cfg=cfg, model=model, data=run.data, log=run.log, k=run.k)


def update_k(run: Run, when: str, tensors: Mapping[str, Tensor]) -> None:
    """Set `run.k` to the finest step whose predicted artifact fits, and log the prediction."""
    inputs = size_inputs(run)
    predict_size(inputs, when, tensors)
    run.k = inputs.k


def gradient_function(run: Run, sampled: bool = False) -> Callable:
    """Return a function of weights, inputs, targets and, if `sampled`, their sample.

    It returns ((mean loss, sum of nats), gradients of the mean).
    """
    looping, model, count = run.model.looping, run.model, run.cfg.train_batch_tokens

    def losses(weights: Weights, x: mx.array, y: mx.array, *sample: mx.array):
        nats = model.holding(weights)(x, y, *sample)
        return mx.sum(nats) / count, mx.sum(nats)

    # Compiled code keeps the layers that it was traced with; samples have another shape each time.
    key = looping, sampled
    if key not in run.gradient_functions:
        function, compiled = mx.value_and_grad(losses), run.cfg.compile and not sampled
        run.gradient_functions[key] = mx.compile(function) if compiled else function
    return run.gradient_functions[key]


def accumulate_gradients(
    run: Run, weights: Weights, sampled: bool = False
) -> tuple[Tensor, Weights] | None:
    """Return the batch's mean loss and its gradients.

    Return None as soon as a signal has come.
    """
    cfg, length = run.cfg, run.cfg.train_seq_len
    eighth, size = cfg.train_batch_tokens // 8, micro_tokens(cfg)
    rows, gradients_of = cfg.train_batch_tokens // length, gradient_function(run, sampled)
    tokens = run.stream.sequences(rows, length)
    sums, plain = {n: mx.zeros_like(w) for n, w in weights.items()}, 0.0
    on_progress = progress_printer("first step")
    for start in (i for part in range(8) for i in range(part * eighth, (part + 1) * eighth, size)):
        if run.signum:
            return None
        end = min(start + size, (start // eighth + 1) * eighth)
        own = tokens[start // length : end // length]
        x, y = to_ids(own[:, :-1]), to_ids(own[:, 1:])
        drawn = train_gpt.sample(run, torch.from_numpy(own[:, 1:])) if sampled else ()
        sample = [mx.array(part.numpy()) for part in drawn]
        (_, nats), gradients = gradients_of(weights, x, y, *sample)
        sums = {n: total + gradients[n] for n, total in sums.items()}
        # Without it, MLX would keep the activations of every micro-batch until the sums are read.
        mx.eval(sums, nats)
        plain += nats.item()
        if run.step == 0:  # later steps have log lines
            on_progress(end / cfg.train_batch_tokens)
    return torch.tensor(plain / cfg.train_batch_tokens), sums


def take_step(run: Run, progress: float) -> bool:
    """Take one optimiser step and return True; after a signal, change nothing and return False."""
    # Straight-through estimator: gradients at the rounded weights update the exact ones.
    weights = round_weights(run.weights, run.k, run.cfg) if run.qat else run.weights
    result = accumulate_gradients(run, weights, progress < run.cfg.sampled_frac)
    if result is None:
        return False
    run.stream.at += run.cfg.train_batch_tokens
    run.loss, gradients = result
    if run.cfg.grad_clip_norm:
        gradients = clip_gradients(gradients, run.cfg.grad_clip_norm)
    scale, momentum = lr_scale(progress, run.cfg), momentum_at(run.step, run.cfg)
    run.weights = run.optimiser.step(run.weights, gradients, scale, momentum)
    mx.eval(run.weights, run.optimiser.momentum, run.optimiser.first, run.optimiser.second)
    run.step += 1
    return True


def warm_up(run: Run) -> None:
    """Take WARMUP_STEPS steps that compile kernels outside the clock, then undo them exactly."""
    cfg, weights = run.cfg, run.weights
    for i in range(cfg.warmup_steps):
        run.model.looping = bool(cfg.num_loops) and 2 * i >= cfg.warmup_steps
        take_step(run, 1.0)  # as at the end, where the loss is over all pieces
        if i == 0 or (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
            run.log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    if cfg.max_wallclock_seconds:
        rehearse(run)
    run.weights, run.optimiser, run.averages = weights, Optimiser(weights, cfg), Averages()
    run.stream = TokenStream(run.data.train)
    run.model.looping, run.step, run.loss = False, 0, None


def rehearse(run: Run) -> None:
    """Make the choices that end a run, for the time that they take: the clock keeps it free."""
    cfg, flat = run.cfg, list(to_tensors(run.weights).values())
    run.averages.swa, run.averages.swa_count = flat * (cfg.swa_start_frac < 1), 1
    run.averages.ema, run.model.looping = flat * bool(cfg.ema_decay), bool(cfg.num_loops)
    log, began = run.log, time.perf_counter()
    run.log = lambda *_, **__: None
    choose(run)
    run.log, run.reserve_s = log, 1.5 * (time.perf_counter() - began) + 0.2
    if (need := run.reserve_s) > (cap := cfg.max_wallclock_seconds) / 2:
        message = f"MAX_WALLCLOCK_SECONDS is {cap}; the choices at its end need {need:.1f} s"
        raise UserError(f"{message}, more than half; raise it, or lower HOLDOUT_TOKENS")


def train(run: Run) -> None:
    """Train until ITERATIONS or the clock ends the run, then write a checkpoint."""
    cfg, run.logged = run.cfg, (run.step, run.elapsed())
    run.set_clock(True)
    while True:
        elapsed, signum = run.elapsed(), run.signum
        progress = progress_of(run.step, elapsed, cfg, run.reserve_s)
        if run.loss is not None and not math.isfinite(run.loss.item()):
            path = checkpoint_path(cfg)
            raise UserError(
                f"the loss of step {run.step} is not finite; the last checkpoint: "
                f"{path if path.exists() else None}; lower MATRIX_LR or set GRAD_CLIP_NORM"
            )
        # The last step is the last that ends before the reserve.
        pace = elapsed / max(run.step, 1)
        over = progress_of(run.step, elapsed + pace, cfg, run.reserve_s) >= 1
        log_now = run.step % cfg.train_log_every == 0 or run.step <= 10 or over
        if run.step > run.logged[0] and (log_now or elapsed - run.logged[1] > 60):
            run.news = Report(run.step, run.loss.item(), elapsed, 0)
            log_step(run)
        since_saved = time.perf_counter() - run.saved_at
        if signum or 0 < cfg.checkpoint_seconds <= since_saved:
            save_checkpoint(run)
        if signum:
            run.log(f"stopped by {signal.Signals(signum).name}: RESUME=1 continues")
            sys.exit(128 + signum)
        if over or cfg.val_loss_every and run.step % cfg.val_loss_every == 0:
            validate(run)
        if over:
            break
        switch(run, progress)
        if take_step(run, progress):
            at = progress_of(run.step, elapsed, cfg, run.reserve_s)
            run.averages.update(run.params, run.step, at, cfg)
    if run.step < cfg.iterations:
        run.log(
            f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms "
            f"step:{run.step}/{cfg.iterations}"
        )
    save_checkpoint(run)  # before the export: if that fails, the weights are safe


def switch(run: Run, progress: float) -> None:
    """Turn on depth recurrence and rounding at their fractions; predict the size at half time."""
    cfg = run.cfg
    round_now = not run.qat and cfg.qat_start_frac < 1 and progress >= cfg.qat_start_frac
    if cfg.num_loops and not run.model.looping and progress >= cfg.loop_at_frac:
        run.model.looping = True
        passes = len(run.model.passes(True))
        run.log(f"layer_loop:enabled step:{run.step} passes:{passes}", "loop", step=run.step)
    if run.step and (round_now or not run.measured and progress >= 0.5):
        run.measured = progress >= 0.5
        update_k(run, "on the way", to_tensors(run.weights))
    if round_now:
        run.qat = True
        log_rounding(run)


def log_rounding(run: Run) -> None:
    """Log the largest difference in a token's loss that rounding makes in the forward pass."""
    tokens = to_ids(run.stream.peek(run.cfg.train_seq_len + 1))[None]
    exact, rounded = (
        run.model.holding(weights)(tokens[:, :-1], tokens[:, 1:])
        for weights in (run.weights, round_weights(run.weights, run.k, run.cfg))
    )
    worst = mx.max(mx.abs(exact - rounded)).item()
    run.log(
        f"qat:on step:{run.step} k:{run.k:.3f} max_loss_difference:{worst:.6f}",
        "qat",
        step=run.step,
        k=run.k,
        max_loss_difference=worst,
    )


# ==== CHECKPOINTS =================================================================================
# A full disk costs the checkpoint, never the run.
def checkpoint_path(cfg: Config) -> Path:
    """Return a path that is not train_gpt's: neither trainer reads the other's checkpoint."""
    return Path(cfg.out_dir) / "checkpoint_mlx.pt"


def save_checkpoint(run: Run) -> None:
    """Replace the checkpoint by the current state, unless a weight is not finite."""
    run.set_clock(False)
    if all(bool(mx.all(mx.isfinite(w))) for w in run.weights.values()):
        scalars = ("step", "train_s", "k", "qat", "measured", "loss")
        state = dict(
            settings=dataclasses.asdict(run.cfg),
            run_id=run.log.run_id,
            data=run.data.fingerprint,
            scalars={name: getattr(run, name) for name in scalars},
            looping=run.model.looping,
            stream=run.stream.at,
            model=to_tensors(run.weights),
            averages=vars(run.averages),
            optimiser=run.optimiser.state(),
        )
        path = checkpoint_path(run.cfg)
        try:
            save(path, state)
            run.log(f"checkpoint:{path} step:{run.step}", "checkpoint", step=run.step)
        except OSError as e:
            run.log(f"warning: no checkpoint written, the previous one stays ({e})")
    run.saved_at = time.perf_counter()
    run.set_clock(True)


def restore(run: Run, saved: dict[str, Any]) -> None:
    """Continue from a checkpoint that train_gpt.read_checkpoint has read."""
    if saved["data"] != run.data.fingerprint:
        raise UserError(
            f"{run.data.folder} has other shards than the checkpoint's run; set DATA_PATH, or "
            "start again without RESUME"
        )
    run.weights = to_arrays(saved["model"])
    run.optimiser.load(saved["optimiser"])
    vars(run).update(saved["scalars"])
    vars(run.averages).update(saved["averages"])
    run.model.looping, run.stream.at = saved["looping"], saved["stream"]
    run.log(
        f"resumed step:{run.step} train_time:{1000 * run.train_s:.0f}ms", "resume", step=run.step
    )


# ==== EXPORT ======================================================================================
# Averages and GPTQ ship only if they lower the loss on training tokens that were held out.
def exported_weights(
    weights: Mapping[str, Tensor], run: Run, factors: Factors | None = None
) -> Weights:
    """Return the values that the artifact would hold for these weights at the current k."""
    rounded = quantised(weights, run.k, run.cfg, factors or {})
    return to_arrays(weights_of(rounded))


def best_on_holdout(run: Run, candidates: dict[str, Weights], event: str) -> str:
    """Return the name of the candidate with the lowest loss, and log all losses."""
    losses = {
        name: mean_nats(loss_function(run.model, weights), run.data.holdout, run.cfg, run.rt, event)
        for name, weights in candidates.items()
    }
    best = min(losses, key=losses.get)
    text = " ".join(f"{n}:{v:.4f}" for n, v in losses.items())
    run.log(f"{event}:{text} kept:{best}", event, kept=best, **losses)
    return best


def settle_weights(run: Run) -> None:
    """Keep the last weights, SWA or EMA, whichever has the lowest loss when rounded."""
    averages = {
        name: dict(zip(run.weights, values, strict=True))
        for name, values in run.averages.candidates().items()
    }
    if not averages:
        return
    if run.averages.swa_count:
        run.log(f"swa:averaged {run.averages.swa_count} checkpoints")
    candidates = {"last": to_tensors(run.weights)} | averages
    rounded = {name: exported_weights(weights, run) for name, weights in candidates.items()}
    run.weights = to_arrays(candidates[best_on_holdout(run, rounded, "averages")])


def collect_factors(run: Run) -> Factors:
    """Return GPTQ's factor of each matrix, from the inputs that GPTQ_BATCHES batches give it."""
    matrices = {f"{n}.weight": m for n, m in run.model.named_modules() if isinstance(m, Linear)}
    sizes = {n: m.weight.shape[1] for n, m in matrices.items()} | {HEAD: run.cfg.model_dim}
    hessians = {n: mx.zeros((size, size)) for n, size in sizes.items()}
    matrices[HEAD] = run.model

    def add(name: str, x: mx.array) -> None:
        x = x.reshape(-1, x.shape[-1])
        hessians[name] = hessians[name] + x.T @ x

    for name, matrix in matrices.items():
        matrix.watch = functools.partial(add, name)
    model, length = run.model.holding(run.weights), run.cfg.train_seq_len
    for i in range(GPTQ_BATCHES):
        batch = run.stream.peek(8 * length, 8 * length * i).reshape(8, -1)
        model.logits(to_ids(batch))
        mx.eval(hessians)
    for matrix in matrices.values():
        matrix.watch = None
    found = to_tensors(hessians)
    found[HEAD].diagonal().add_(LOOKUP_SHARE * found[HEAD].diagonal().mean())
    return {name: gptq_factor(h) for name, h in found.items()}


def choose_rounding(run: Run) -> Factors:
    """Return GPTQ's factors if it has the lower loss, else none."""
    if not run.cfg.gptq:
        return {}
    factors = collect_factors(run)
    run.log(f"gptq:collected {len(factors)} Hessians train_time:{1000 * run.elapsed():.0f}ms")
    gptq = exported_weights(to_tensors(run.weights), run, factors)
    nearest = exported_weights(to_tensors(run.weights), run)
    best = best_on_holdout(run, {"nearest": nearest, "gptq": gptq}, "rounding")
    return factors if best == "gptq" else {}


def choose(run: Run) -> Factors:
    """Choose weights and rounding inside the clock, because both read training tokens."""
    settle_weights(run)
    factors, cap = choose_rounding(run), run.cfg.max_wallclock_seconds
    run.set_clock(False)
    over = f" over the cap of {cap} s" if 0 < cap < run.train_s else ""
    run.log(f"chosen:train_time:{1000 * run.train_s:.0f}ms reserve:{run.reserve_s:.2f}s{over}")
    return factors


def export(run: Run, factors: Factors) -> Path:
    """Write the artifact, and return its path."""
    inputs, out = size_inputs(run), Path(run.cfg.out_dir)
    bits, budget = max(run.cfg.attn_bits, run.cfg.mlp_bits), run.cfg.size_budget_bytes
    path = out / f"final_model.int{bits}.ptz"
    code = code_bytes(inputs.cfg)
    plain = save(out / "final_model.pt", to_tensors(run.weights))
    run.log(f"Serialized model: {plain} bytes\nCode size: {code} bytes packed")
    blob, rounded, codec = fit_artifact(inputs, factors)
    run.k = inputs.k
    with replacing(path) as f:
        f.write(blob)
    log_errors(inputs, rounded)
    run.log(
        f"Serialized model int{bits}+{codec}: {len(blob)} bytes "
        f"(k:{run.k:.3f} ratio:{plain / len(blob):.2f}x)"
    )
    total = len(blob) + code
    run.log(
        f"Total submission size int{bits}+{codec}: {total} bytes "
        f"(budget:{budget} left:{budget - total})",
        "artifact",
        path=str(path),
        codec=codec,
        k=run.k,
        bytes=len(blob),
        code_bytes=code,
        budget_bytes=budget,
        sha256=file_sha256(path),
    )
    return path


# ==== SCORES ======================================================================================
# Only the bytes on disk count: the artifact is read back and its model built again.
def sliding_nats(model: GPT, tokens: np.ndarray, cfg: Config, scoring: EvalConfig) -> float:
    """Return the mean cross-entropy of tokens[1:], each scored once, in eval_final.py's windows."""
    length, total, on_progress = cfg.train_seq_len, 0.0, progress_printer("sliding windows")
    windows = plan(tokens, length, min(scoring.eval_stride, length), scoring.eval_documents)
    rows = max(1, cfg.val_batch_size // 8 // length)
    for i in range(0, len(windows.start), rows):
        start, first, end = (part[i : i + rows, None] for part in windows)
        positions = start + np.arange(length + 1)
        batch = tokens[np.minimum(positions, len(tokens) - 1)]
        nats = np.asarray(model(to_ids(batch[:, :-1]), to_ids(batch[:, 1:])))
        scored = (positions[:, :-1] >= first) & (positions[:, :-1] < end)
        total += nats[scored].sum(dtype=np.float64)
        on_progress(min(1.0, (i + rows) / len(windows.start)))
    return float(total) / (len(tokens) - 1)


def score_artifact(run: Run, path: Path, scoring: EvalConfig) -> None:
    """Log the artifact's score, first in windows side by side, then in sliding windows."""
    artifact = read_artifact(path)
    model, tokens = build_model(artifact), run.data.val
    label = f"final_{path.suffixes[0][1:]}_{artifact.header['codec']}"

    def side_by_side() -> float:
        return mean_nats(loss_function(model), tokens, run.cfg, run.rt, "scoring the artifact")

    def sliding() -> float:
        return sliding_nats(model, tokens, run.cfg, scoring)

    for name, event, extra, score in (
        (f"{label}_roundtrip", "final", "", side_by_side),
        (f"{label}_sliding_window", "sliding", f" stride:{scoring.eval_stride}", sliding),
    ):
        start, nats = time.perf_counter(), score()
        bpb, seconds = bits_per_byte(nats, run.data), time.perf_counter() - start
        run.log(
            f"{name} val_loss:{nats:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms{extra}"
        )
        run.log(
            f"{name}_exact val_loss:{nats:.8f} val_bpb:{bpb:.8f}{extra}",
            event,
            label=name,
            loss=nats,
            bpb=bpb,
            eval_seconds=seconds,
            tokens=len(tokens) - 1,
            bytes=run.data.val_bytes,
        )


# ==== MAIN ========================================================================================
HELP = {  # settings whose meaning here differs from train_gpt's
    "resume": "1 continues from OUT_DIR/checkpoint_mlx.pt",
    "compile": "mx.compile of loss and gradients",
    "device": "unset: the GPU of a Mac, else the CPU; mps: that GPU",
    "micro_batch_tokens": "most tokens in a forward pass; 0 = as many as fit in "
    f"{ACTIVATION_BYTES >> 30} GiB of activations",
    "eval_stride": "tokens between the sliding windows of the final score",
    "eval_documents": "those windows start again at each BOS",
}


def help_text() -> str:
    """Return what this file is, and a line for each setting: name, default, meaning."""
    scoring = [f for f in fields(EvalConfig) if f.name in ("eval_stride", "eval_documents")]
    lines = [f"PRESET  one of {', '.join(PRESETS)} (unset: cpu); values: train_gpt.py --help\n"]
    for f in [*fields(Config), *scoring]:
        default = int(f.default) if type(f.default) is bool else f.default
        lines.append(f"{f.name.upper():27} {default!s:>9}  {HELP.get(f.name, f.metadata['help'])}")
    description = "\n\n".join(__doc__.split("\n\n")[:2])  # the rest is for readers of this file
    return "\n".join([description, "", *lines])


def read_scoring_settings(env: Mapping[str, str]) -> EvalConfig:
    """Return the settings of the final sliding windows, with eval_final.py's defaults."""
    scoring = EvalConfig.from_env(env)
    for name, value in (("eval_mode", "sliding"), ("eval_seq_len", 0)):
        if getattr(scoring, name) != value:
            raise UserError(
                f"{name.upper()} is {getattr(scoring, name)}, but this trainer scores its artifact "
                "in sliding windows of TRAIN_SEQ_LEN; unset it here and set it for eval_final.py"
            )
    return scoring


def main(env: Mapping[str, str] = os.environ) -> None:
    """Train, export and score one model, as the settings in `env` say."""
    preset = env.get("PRESET") or "cpu"
    cfg, scoring = Config.from_env(env, preset), read_scoring_settings(env)
    saved = read_checkpoint(cfg, checkpoint_path(cfg)) if cfg.resume else None
    data, rt = load_data(cfg), set_up_runtime(cfg, env)
    log = Log(cfg, rt, saved["run_id"] if saved else cfg.run_id or uuid.uuid4().hex[:12])
    log_header(log, cfg, rt, data, preset)
    run = set_up(cfg, rt, data, log)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda s, _: setattr(run, "signum", s))
    warm_up(run)
    if saved:
        restore(run, saved)
    train(run)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    path = export(run, choose(run))
    score_artifact(run, path, scoring)
    log.close()


def command() -> int:
    """Parse the command line, run `main`, and add advice to errors of memory and packages."""
    usage = "[SETTING=VALUE ...] python train_gpt_mlx.py"
    Parser(prog="train_gpt_mlx.py", usage=usage, description=help_text()).parse_args()
    if MLX_MISSING:
        raise UserError(MLX_MISSING)
    # run_reporting lets a closed pipe end the process; here it may only cost lines of the log.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        main()
    except ModuleNotFoundError as e:
        raise UserError(f"{e}; pip install -r requirements.txt") from e
    except (MemoryError, RuntimeError) as e:
        texts = ("allocate", "Insufficient Memory")  # MLX raises RuntimeError on either platform
        if not isinstance(e, MemoryError) and not any(text in str(e) for text in texts):
            raise
        message = (str(e) or "out of memory").splitlines()[0]
        raise UserError(f"{message}; set MICRO_BATCH_TOKENS to half of the log's value") from e
    return 0


def run_main() -> int:
    """Return the exit code of `command`, with its errors reported as one line each."""
    try:
        return run_reporting("train_gpt_mlx", command)
    except SystemExit as stop:  # after --help, or a signal
        return int(stop.code or 0)


if __name__ == "__main__":
    code = run_main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
