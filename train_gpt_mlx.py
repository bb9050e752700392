"""Train on Apple Silicon what train_gpt.py trains elsewhere: the same settings, shards, schedule, log and artifact.

    PRESET=cpu python train_gpt_mlx.py          a small model; --help lists every setting
    PRESET=consensus python train_gpt_mlx.py    that of the records, for ten minutes or MAX_WALLCLOCK_SECONDS

What is the same on any machine is imported from train_gpt: settings, data, schedules, averages, quantiser, artifact,
initial weights. Here is what MLX does: the model, its gradients, the optimisers, and rounding in training. Between the
two go tensors that share the memory of MLX's arrays. tests/golden/oracle.npz holds both to the same numbers.
Shapes in names: B sequences, T positions, D model width, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
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

try:
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten, tree_unflatten
except ImportError as e:
    if __name__ != "__main__":
        raise
    sys.exit(f"train_gpt_mlx: error: {e}; pip install -r requirements-apple.txt")
import numpy as np
import torch
from torch import Tensor

import train_gpt
from fairway.scoring.neural import plan
from fairway.scoring.settings import EvalConfig
from train_gpt import (
    BOS_ID,
    LEAST_K,
    NEWTON_SCHULZ,
    PLAIN_BITS,
    POLAR_EXPRESS,
    PRESETS,
    Artifact,
    Averages,
    Config,
    Data,
    Log,
    Runtime,
    TokenStream,
    UserError,
    bits_per_byte,
    code_bytes,
    file_sha256,
    fit_artifact,
    levels,
    load_data,
    log_errors,
    log_step,
    lr_scale,
    mean_nats,
    momentum_at,
    need,
    predict_size,
    progress_of,
    quantised,
    read_artifact,
    read_checkpoint,
    replacing,
    rope_tables,
    save,
    tensor_bits,
    validate,
)

Weights: TypeAlias = (
    "dict[str, mx.array]"  # by the names of train_gpt.GPT, in its order, which is the artifact's
)
ACTIVATION_BYTES = 4 << 30  # that one forward and backward pass may hold: a quarter of a 16 GB Mac


# ==== BRIDGE ==========================================================================================================
# PyTorch only holds and rounds numbers here: no model, gradient or optimiser of it runs.
def tensors(weights: Mapping[str, mx.array]) -> dict[str, Tensor]:
    """Views of arrays: nothing is copied, and nothing may be written to."""
    return {n: torch.from_numpy(np.asarray(w)) for n, w in weights.items()}


def arrays(named: Mapping[str, Tensor]) -> Weights:
    return {n: mx.array(t.detach().numpy()) for n, t in named.items()}


def ids(tokens: np.ndarray) -> mx.array:
    return mx.array(tokens.astype(np.int32))


def first_weights(cfg: Config) -> Weights:
    """Those that train_gpt draws from this seed: both trainers start from the same bits."""
    model = train_gpt.GPT(cfg)
    train_gpt.initialise(model, cfg)
    return arrays(dict(model.named_parameters()))


# ==== ROUNDING ========================================================================================================
# The export rounds by train_gpt.quantised. Training does the same on the device: to the bit for equal steps, and steps
# are equal or, since a mean adds up in another order, neighbours in bf16.
def row_steps(weight: mx.array, k: float, bits: int) -> mx.array:
    rms = mx.sqrt(mx.mean(mx.square(weight), axis=1, keepdims=True))
    step = (rms * (max(k, LEAST_K[bits]) / levels(bits))).astype(mx.bfloat16).astype(mx.float32)
    return mx.where(step > 0, step, 1.0)


def rounded(weight: mx.array, k: float, bits: int) -> mx.array:
    if bits == PLAIN_BITS:
        return mx.clip(weight, -65504, 65504).astype(mx.float16).astype(mx.float32)
    step = row_steps(weight, k, bits)
    return mx.clip(mx.round(weight / step), -levels(bits), levels(bits)) * step


def rounded_weights(weights: Weights, k: float, cfg: Config) -> Weights:
    return {n: rounded(w, k, tensor_bits(n, cfg)) for n, w in weights.items()}


# ==== MODEL ===========================================================================================================
# Leaf to root, as in train_gpt, in fp32 throughout.
EPSILON = float(np.finfo(np.float32).eps)  # what PyTorch's rms_norm takes for fp32


def normalised(x: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, None, EPSILON)


def rotate(x_BHTC: mx.array, cos_TR: mx.array, sin_TR: mx.array) -> mx.array:
    """RoPE on the first 2R channels of each head, by tables: angles of late positions need more than fp32."""
    half = cos_TR.shape[-1]
    a, b, rest = mx.split(x_BHTC, [half, 2 * half], axis=-1)
    return mx.concatenate([a * cos_TR + b * sin_TR, b * cos_TR - a * sin_TR, rest], axis=-1)


def without_own_value(y_BHTC: mx.array, v_BGTC: mx.array) -> mx.array:
    """XSA: take out of each head's output its part along the position's own value."""
    B, H, T, C = y_BHTC.shape
    own = (v_BGTC * mx.rsqrt(mx.maximum(mx.sum(mx.square(v_BGTC), axis=-1, keepdims=True), 1e-24)))[
        :, :, None
    ]
    y = y_BHTC.reshape(B, v_BGTC.shape[1], -1, T, C)
    return (y - mx.sum(y * own, axis=-1, keepdims=True) * own).reshape(B, H, T, C)


class Linear(nn.Linear):
    """A matrix; while `watch` is set, it is shown what the matrix multiplies."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)
        self.watch = None

    def __call__(self, x: mx.array) -> mx.array:
        if self.watch:
            self.watch(x)
        return super().__call__(x)


class Attention(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        D, H, G, C = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.width, self.exclusive = C, layer >= cfg.num_layers - cfg.xsa_last_n
        self.q, self.k, self.v, self.proj = (
            Linear(D, H * C),
            Linear(D, G * C),
            Linear(D, G * C),
            Linear(D, D),
        )
        self.q_gain = mx.full((H,), cfg.qk_gain_init)
        if cfg.attn_gate:
            self.gate = mx.zeros((H, min(12, D)))

    def __call__(self, x_BTD: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        B, T, D = x_BTD.shape
        q, k, v = (
            part(x_BTD).reshape(B, T, -1, self.width).swapaxes(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = (
            rotate(normalised(q), *rope) * self.q_gain[:, None, None],
            rotate(normalised(k), *rope),
        )
        y = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.width**-0.5, mask="causal")
        y = (without_own_value(y, v) if self.exclusive else y).swapaxes(1, 2)
        if "gate" in self:
            y = y * (2 * mx.sigmoid(x_BTD[..., : self.gate.shape[1]] @ self.gate.T))[..., None]
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden, self.slope = int(cfg.mlp_mult * cfg.model_dim), cfg.leaky_slope
        self.fc, self.proj = Linear(cfg.model_dim, hidden), Linear(hidden, cfg.model_dim)

    def __call__(self, x_BTD: mx.array) -> mx.array:
        hidden = self.fc(x_BTD)
        return self.proj(mx.square(mx.maximum(hidden, self.slope * hidden)))


class Block(nn.Module):
    """Attention, then MLP, on a mix of the stream with the embedding x0; or each in a lane of its own."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp, D = Attention(cfg, layer), MLP(cfg), cfg.model_dim
        self.attn_scale, self.mlp_scale, self.resid_mix = (
            mx.ones(D),
            mx.ones(D),
            mx.stack([mx.ones(D), mx.zeros(D)]),
        )
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        if 0 < cfg.parallel_start_layer <= layer:
            self.lane_mix = mx.ones((2, 2))

    def read(self, x: mx.array, condition: mx.array | None) -> mx.array:
        """A sub-layer's input; on an extra pass, scaled and shifted for that pass (AdaLN)."""
        x = normalised(x) * self.norm_scale
        return x if condition is None else x * (1 + condition[0]) + condition[1]

    def __call__(
        self, x: mx.array, lane: mx.array, x0: mx.array, rope, condition
    ) -> tuple[mx.array, mx.array]:
        """Both lanes after this block; where they have not parted, one array stands for both."""
        mixed = self.resid_mix[0] * x + self.resid_mix[1] * x0
        attended = self.attn_scale * self.attn(self.read(mixed, condition), rope)
        if "lane_mix" in self:
            written, to = self.mlp_scale * self.mlp(self.read(lane, condition)), self.lane_mix
            new = tuple(
                old + to[i, 0] * attended + to[i, 1] * written
                for i, old in enumerate((mixed, lane))
            )
        else:
            mixed = mixed + attended
            mixed = mixed + self.mlp_scale * self.mlp(self.read(mixed, condition))
            new = (mixed, mixed)
        if condition is None:
            return new
        return new[0] + condition[2] * (new[0] - x), new[1] + condition[2] * (new[1] - lane)


class BigramHash(nn.Module):
    """An embedding of the last two tokens, hashed into a small table."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = Linear(cfg.bigram_dim, cfg.model_dim)
        self.last, self.scale = cfg.bigram_vocab_size - 1, mx.array(0.05)

    def buckets(self, tokens_BT: mx.array) -> mx.array:
        """As train_gpt's; in uint32, which holds the largest product of a token below 65,536."""
        t = tokens_BT.astype(mx.uint32)
        pairs = ((36313 * t[:, 1:]) ^ (27191 * t[:, :-1])) % self.last
        return mx.pad(pairs, ((0, 0), (1, 0)), constant_values=mx.array(self.last, mx.uint32))

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        return self.proj(self.table(self.buckets(tokens_BT))) * self.scale


class SmearGate(nn.Module):
    """Each channel takes a learned part of the embedding before it; nothing crosses a BOS."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = mx.zeros(dim)

    def __call__(self, x_BTD: mx.array, tokens_BT: mx.array) -> mx.array:
        before = mx.concatenate([x_BTD[:, :1], x_BTD[:, :-1]], axis=1)
        before = mx.where((tokens_BT == BOS_ID)[..., None], x_BTD, before)
        return x_BTD + mx.sigmoid(self.gate) * (before - x_BTD)


class GPT(nn.Module):
    """U-Net of blocks over tied embeddings: the first half of the passes feeds the second by skips."""

    passes = train_gpt.GPT.passes  # (layer, extra pass) in the order in which they run

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.looping = (
            cfg,
            False,
        )  # looping: set once the run is far enough for depth recurrence
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        if cfg.bigram_vocab_size:
            self.bigram = BigramHash(cfg)
        if cfg.smear_gate:
            self.smear = SmearGate(cfg.model_dim)
        self.blocks = [Block(cfg, i) for i in range(cfg.num_layers)]
        self.skip_weights = mx.ones(
            (max(len(self.passes(on)) // 2 for on in (0, 1)), cfg.model_dim)
        )
        if cfg.num_loops and cfg.loop_adaln:
            self.loop_conditions = mx.zeros(
                (cfg.num_loops, cfg.loop_end - cfg.loop_start + 1, 3, cfg.model_dim)
            )
        tables = rope_tables(
            cfg.train_seq_len, cfg.rope_dims or cfg.model_dim // cfg.num_heads, cfg.rope_base
        )
        self._cos, self._sin = (mx.array(t.numpy()) for t in tables)  # an underscore: no parameters

    def embed(self, tokens_BT: mx.array) -> mx.array:
        x = self.tok_emb(tokens_BT)
        x = normalised(x + self.bigram(tokens_BT) if "bigram" in self else x)
        return self.smear(x, tokens_BT) if "smear" in self else x

    def logits(self, tokens_BT: mx.array) -> mx.array:
        """[B, T, V]: what each position says of the token after it."""
        T, cap = tokens_BT.shape[1], self.cfg.logit_softcap
        need(
            T <= len(self._cos),
            f"{T} tokens in a sequence, but the model's TRAIN_SEQ_LEN is {len(self._cos)}",
        )
        rope, order, skips = (self._cos[:T], self._sin[:T]), self.passes(self.looping), []
        x = lane = x0 = self.embed(tokens_BT)
        for i, (layer, extra) in enumerate(order):
            if i >= len(order) // 2 and skips:
                skip = self.skip_weights[i - len(order) // 2] * skips.pop()
                x, lane = x + skip, lane + skip
            conditioned = extra and "loop_conditions" in self
            condition = (
                self.loop_conditions[extra - 1, layer - self.cfg.loop_start]
                if conditioned
                else None
            )
            x, lane = self.blocks[layer](x, lane, x0, rope, condition)
            if i < len(order) // 2:
                skips.append(x)
        return cap * mx.tanh(normalised((x + lane) / 2) @ self.tok_emb.weight.T / cap)

    def __call__(self, tokens_BT: mx.array, targets_BT: mx.array) -> mx.array:
        """Cross-entropy of every target, [B, T], in nats."""
        return nn.losses.cross_entropy(self.logits(tokens_BT), targets_BT, reduction="none")

    def holding(self, weights: Weights) -> GPT:
        self.update(tree_unflatten(list(weights.items())))
        return self


def build_model(artifact: Artifact) -> GPT:
    """The model that an artifact describes: strict, every tensor named once."""
    model = GPT(artifact.config)
    model.load_weights(list(arrays(artifact.weights).items()), strict=True)
    model.looping = artifact.header["looping"]
    return model


def loss_of(model: GPT, weights: Weights | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss as train_gpt.mean_nats calls it: tensors in and out, MLX in between."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        judged = model if weights is None else model.holding(weights)
        return torch.from_numpy(np.asarray(judged(ids(x.numpy()), ids(y.numpy()))))

    return loss


# ==== OPTIMISERS ======================================================================================================
# PyTorch's arithmetic, step by step: Muon for matrices, AdamW for embeddings and for everything else.
def orthogonalised(
    g: mx.array, steps: int, coefficients: list[tuple[float, float, float]]
) -> mx.array:
    """Matrices [n, rows, cols] with their singular values pushed to about one."""
    x = g.swapaxes(-1, -2) if (tall := g.shape[-2] > g.shape[-1]) else g
    x = x / (mx.sqrt(mx.sum(mx.square(x), axis=(-2, -1), keepdims=True)) * 1.01 + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.swapaxes(-1, -2) if tall else x


def clipped(gradients: Weights, most: float) -> Weights:
    """As torch.nn.utils.clip_grad_norm_: scaled down to a norm of `most`, all together."""
    norm = mx.sqrt(sum(mx.sum(mx.square(g)) for g in gradients.values()))
    scale = mx.minimum(most / (norm + 1e-6), 1.0)
    return {n: g * scale for n, g in gradients.items()}


class Optimiser:
    """Both optimisers and their state; each parameter in exactly one group."""

    def __init__(self, weights: Weights, cfg: Config):
        embeddings = [n for n in weights if n in ("tok_emb.weight", "bigram.table.weight")]
        self.matrices = [n for n in weights if n.endswith(".weight") and n not in embeddings]
        scalars = [n for n in weights if not n.endswith(".weight")]
        self.adam = (
            (embeddings, cfg.tied_embed_lr, cfg.embed_wd),
            (scalars, cfg.scalar_lr, cfg.adam_wd),
        )
        assert sorted(self.matrices + embeddings + scalars) == sorted(weights), "each exactly once"
        self.cfg, self.count = cfg, 0  # of AdamW's steps, for its bias correction
        zeros = {n: mx.zeros_like(w) for n, w in weights.items()}
        self.momentum = {n: zeros[n] for n in self.matrices}
        self.first, self.second = ({n: zeros[n] for n in embeddings + scalars} for _ in range(2))

    def step(self, weights: Weights, gradients: Weights, scale: float, momentum: float) -> Weights:
        """New weights, in the old order; `scale` is the schedule's part of the learning rates."""
        self.count += 1
        new = dict(weights)
        self.muon(new, gradients, self.cfg.matrix_lr * scale, momentum)
        for names, lr, wd in self.adam:
            self.adamw(new, gradients, names, lr * scale, wd)
        return new

    def muon(self, new: Weights, gradients: Weights, lr: float, momentum: float) -> None:
        """Nesterov momentum, orthogonalised, with decoupled weight decay; matrices of a shape go together."""
        cfg, by_shape = self.cfg, {}
        coefficients = POLAR_EXPRESS if cfg.muon_polar_express else NEWTON_SCHULZ
        for n in self.matrices:
            self.momentum[n] = momentum * self.momentum[n] + gradients[n]
            moved = gradients[n] + momentum * self.momentum[n]
            if cfg.muon_row_normalize:
                moved = moved / (mx.sqrt(mx.sum(mx.square(moved), axis=1, keepdims=True)) + 1e-7)
            by_shape.setdefault(moved.shape, []).append((n, moved))
        for shape, own in by_shape.items():
            directions = orthogonalised(
                mx.stack([moved for _, moved in own]), cfg.muon_backend_steps, coefficients
            )
            for (n, _), direction in zip(own, directions, strict=True):
                new[n] = (
                    new[n] * (1 - lr * cfg.muon_wd)
                    - lr * max(1, shape[0] / shape[1]) ** 0.5 * direction
                )

    def adamw(
        self, new: Weights, gradients: Weights, names: list[str], lr: float, wd: float
    ) -> None:
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
        return {"count": self.count} | {
            part: tensors(getattr(self, part)) for part in ("momentum", "first", "second")
        }

    def load(self, state: dict[str, Any]) -> None:
        self.count = state["count"]
        for part in ("momentum", "first", "second"):
            setattr(self, part, arrays(state[part]))


# ==== RUNTIME =========================================================================================================
def set_up_runtime(cfg: Config, env: Mapping[str, str]) -> Runtime:
    """The Mac's GPU where there is one. train_gpt's Runtime: one rank, and a CPU for the tensors in between."""
    world = env.get("WORLD_SIZE", "1")
    need(
        world == "1",
        f"WORLD_SIZE is {world}; one Mac trains alone: start train_gpt_mlx.py without torchrun, or "
        "train_gpt.py with it",
    )
    need(
        cfg.device != "cuda",
        "DEVICE is cuda; this trainer is for Apple Silicon: use train_gpt.py, or unset DEVICE",
    )
    metal = mx.metal.is_available()
    need(cfg.device != "mps" or metal, "DEVICE is mps, but MLX sees no GPU of a Mac; unset it")
    gpu = metal and cfg.device != "cpu"
    mx.set_default_device(mx.gpu if gpu else mx.cpu)
    name = mx.device_info()["device_name"] if gpu else platform.machine()
    return Runtime(0, 1, torch.device("cpu"), f"mlx {'gpu' if gpu else 'cpu'} {name}")


def log_header(log: Log, cfg: Config, rt: Runtime, data: Data, preset: str) -> None:
    """As train_gpt's: source, versions and hardware into the file; hashes of all that decides the run, everywhere."""
    source, settings = Path(__file__).read_text(encoding="utf-8"), dataclasses.asdict(cfg)
    log(
        f"{source}\n{'=' * 100}\nRunning Python {sys.version}\nRunning MLX {mx.__version__}\nRunning PyTorch "
        f"{torch.__version__}\n{platform.platform()}\n{'=' * 100}\nsettings: {json.dumps(settings)}",
        screen=False,
    )
    texts = {
        "code": source.encode(),
        "settings": json.dumps(settings, sort_keys=True).encode(),
        "tokenizer": data.tokenizer_path.read_bytes(),
        "train_gpt": Path(train_gpt.__file__).read_bytes(),
    }
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()} | {
        "data": data.fingerprint
    }
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


def progress_lines(label: str) -> Callable[[float], None]:
    """Tells on the screen how far something is, every five seconds, as train_gpt.mean_nats does."""
    began, said = time.perf_counter(), 0

    def tell(part: float) -> None:
        nonlocal said
        seconds = time.perf_counter() - began
        if seconds < 5 * (said + 1):
            return
        said = seconds // 5
        print(
            f"{label} {100 * part:.0f}% eta:{seconds / part - seconds:.0f}s",
            file=sys.stderr,
            flush=True,
        )

    return tell


# ==== MICRO-BATCHES ===================================================================================================
def activation_bytes(cfg: Config) -> int:
    """Memory that a token takes in a forward and backward pass: what each layer keeps, attention's scores included, as
    much again while one is at work, and six copies of the logits. Fitted on MLX's CPU build: 2 to 18 % too much; of
    consensus, a sequence of 2,048 is given 3.5 GB and took 3.1."""
    layers, hidden = (
        len(GPT.passes(SimpleNamespace(cfg=cfg), True)),
        int(cfg.mlp_mult * cfg.model_dim),
    )
    kept = 16 * cfg.model_dim + 4 * hidden + 5 * cfg.num_heads * cfg.train_seq_len // 4
    return 4 * ((layers + 1) * kept + 6 * cfg.vocab_size)


def micro_tokens(cfg: Config) -> int:
    """Tokens of a pass: whole sequences, at most an eighth of the batch, as in train_gpt."""
    most = cfg.micro_batch_tokens or ACTIVATION_BYTES // activation_bytes(cfg)
    return min(cfg.train_batch_tokens // 8, max(1, most // cfg.train_seq_len) * cfg.train_seq_len)


# ==== TRAINING ========================================================================================================
@dataclass
class Run:
    """What a run holds; a checkpoint keeps what is needed to go on from it. train_gpt's functions read it too."""

    cfg: Config
    rt: Runtime
    log: Log
    data: Data
    model: GPT  # the structure; the numbers are in `weights`
    weights: Weights
    optimiser: Optimiser
    stream: TokenStream
    averages: Averages = field(default_factory=Averages)
    passes: dict[bool, Callable] = field(
        default_factory=dict
    )  # loss and gradients, without and with loops
    step: int = 0
    train_s: float = 0.0  # until the clock was last started
    k: float = 0.0  # of the quantiser: predicted, then measured on the way
    qat: bool = False
    measured: bool = False  # the size, at mid-run
    clock: float | None = None
    loss: Tensor | None = None  # of the last step
    signum: int = 0
    saved_at: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        return self.train_s + (time.perf_counter() - self.clock if self.clock is not None else 0.0)

    def set_clock(self, running: bool) -> None:
        mx.synchronize()
        self.train_s, self.clock = self.elapsed(), time.perf_counter() if running else None

    @property
    def params(self) -> list[Tensor]:
        return list(tensors(self.weights).values())

    @property
    def loss_fn(self) -> Callable[[Tensor, Tensor], Tensor]:
        return loss_of(self.model, self.weights)


def set_up(cfg: Config, rt: Runtime, data: Data, log: Log) -> Run:
    weights = first_weights(cfg)
    run = Run(
        cfg, rt, log, data, GPT(cfg), weights, Optimiser(weights, cfg), TokenStream(data.train)
    )
    assert {n for n, _ in tree_flatten(run.model.parameters())} == set(weights), (
        "the names of train_gpt.GPT"
    )
    shapes = {n: [*w.shape] for n, w in weights.items()}
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data.tokenizer_path}")
    log(
        f"train_loader:dataset:{data.folder.name} train_shards:{len(data.train)} tokens:{sum(map(len, data.train))}"
    )
    log(
        f"val_loader:shards pattern={data.folder}/*_val_*.bin tokens:{len(data.val) - 1} bytes:{data.val_bytes}"
    )
    count, size = sum(w.size for w in weights.values()), micro_tokens(cfg)
    log(f"model_params:{count}", "model", parameters=count, tensors=shapes)
    log(
        f"world_size:1 grad_accum_steps:{8 * -(-cfg.train_batch_tokens // 8 // size)} micro_batch_tokens:{size}\n"
        f"sdp_backends:mlx\nattention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}\n"
        f"tie_embeddings:True embed_lr:{cfg.tied_embed_lr} head_lr:0.0 matrix_lr:{cfg.matrix_lr} "
        f"scalar_lr:{cfg.scalar_lr}\n"
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\nseed:{cfg.seed}"
    )
    noise = torch.Generator().manual_seed(
        0
    )  # rows as they will be once trained: codes depend on shape, not on scale
    look_at_size(
        run,
        "before training",
        {n: torch.randn(shape, generator=noise) for n, shape in shapes.items()},
    )
    if cfg.compile:
        log("compile:mx.compile runs with the first step")
    return run


def as_sized(run: Run) -> SimpleNamespace:
    """A run as train_gpt's functions on sizes read it: this file is code that counts, too."""
    files = ",".join(filter(None, (str(Path(__file__)), run.cfg.extra_code_files)))
    held = SimpleNamespace(
        named_parameters=lambda: tensors(run.weights).items(), looping=run.model.looping
    )
    return SimpleNamespace(
        cfg=dataclasses.replace(run.cfg, extra_code_files=files),
        model=held,
        data=run.data,
        log=run.log,
        k=run.k,
    )


def look_at_size(run: Run, when: str, state: Mapping[str, Tensor]) -> None:
    sized = as_sized(run)
    predict_size(sized, when, state)
    run.k = sized.k


def gradient_function(run: Run) -> Callable:
    """(loss that is minimised, nats in all), gradients: of weights, inputs, targets, and the weights of these."""
    looping, model, count = run.model.looping, run.model, run.cfg.train_batch_tokens

    def losses(
        weights: Weights, x: mx.array, y: mx.array, share: mx.array
    ) -> tuple[mx.array, mx.array]:
        nats = model.holding(weights)(x, y)
        return mx.sum(nats * share) / count, mx.sum(nats)

    if (
        looping not in run.passes
    ):  # one each: compiled code keeps the layers that it was traced with
        found = mx.value_and_grad(losses)
        run.passes[looping] = mx.compile(found) if run.cfg.compile else found
    return run.passes[looping]


def accumulate_gradients(run: Run, weights: Weights) -> tuple[Tensor, Weights] | None:
    """The batch's plain mean loss, and the gradients of the mean that is minimised, one micro-batch at a time; None
    after a signal, since a step may take minutes."""
    cfg, length, eighth, size = (
        run.cfg,
        run.cfg.train_seq_len,
        run.cfg.train_batch_tokens // 8,
        micro_tokens(run.cfg),
    )
    tokens, shares, gradients_of = (
        run.stream.take(cfg.train_batch_tokens),
        None,
        gradient_function(run),
    )
    if cfg.byte_loss_alpha:  # a target's bytes over the batch's mean, blended with one
        count = run.data.table.count(tokens).astype(np.float32)
        shares = 1 - cfg.byte_loss_alpha + cfg.byte_loss_alpha * count / max(count.mean(), 1e-6)
    sums, plain = {n: mx.zeros_like(w) for n, w in weights.items()}, 0.0
    tell = progress_lines("first step")
    for start in (i for part in range(8) for i in range(part * eighth, (part + 1) * eighth, size)):
        if run.signum:
            return None
        end = min(start + size, (start // eighth + 1) * eighth)
        x, y = (ids(a[start:end].reshape(-1, length)) for a in (tokens, tokens[1:]))
        share = mx.array(1.0) if shares is None else mx.array(shares[start:end].reshape(-1, length))
        (_, nats), gradients = gradients_of(weights, x, y, share)
        sums = {n: total + gradients[n] for n, total in sums.items()}
        mx.eval(sums, nats)  # now: what is not evaluated keeps the activations of every micro-batch
        plain += nats.item()
        if run.step == 0:
            tell(end / cfg.train_batch_tokens)  # later ones have lines of their own
    return torch.tensor(plain / cfg.train_batch_tokens), sums


def take_step(run: Run, progress: float) -> bool:
    """One optimiser step; or none, and nothing changed, because a signal came."""
    # Straight-through: gradients at the rounded weights, the update to those behind them.
    seen, at = (
        rounded_weights(run.weights, run.k, run.cfg) if run.qat else run.weights,
        run.stream.at,
    )
    if (found := accumulate_gradients(run, seen)) is None:
        run.stream.at = at
        return False
    run.loss, gradients = found
    if run.cfg.grad_clip_norm:
        gradients = clipped(gradients, run.cfg.grad_clip_norm)
    scale, momentum = lr_scale(progress, run.cfg), momentum_at(run.step, run.cfg)
    run.weights = run.optimiser.step(run.weights, gradients, scale, momentum)
    mx.eval(run.weights, run.optimiser.momentum, run.optimiser.first, run.optimiser.second)
    run.step += 1
    return True


def warm_up(run: Run) -> None:
    """Steps that compile kernels and fill caches outside the clock, then are undone to the bit."""
    cfg, kept = run.cfg, run.weights
    for i in range(cfg.warmup_steps):
        run.model.looping = bool(cfg.num_loops) and 2 * i >= cfg.warmup_steps
        take_step(run, 0.0)
        if i == 0 or (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
            run.log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    run.weights, run.optimiser, run.stream = kept, Optimiser(kept, cfg), TokenStream(run.data.train)
    run.model.looping, run.step, run.loss = False, 0, None


def train(run: Run) -> None:
    cfg, last, saved = run.cfg, (run.step, run.elapsed()), checkpoint_path(run.cfg)
    run.set_clock(True)
    while True:
        elapsed, signum = run.elapsed(), run.signum
        progress = progress_of(run.step, elapsed, cfg)
        need(
            run.loss is None or math.isfinite(run.loss.item()),
            f"the loss of step {run.step} is not finite; the "
            f"last checkpoint: {saved if saved.exists() else None}; lower MATRIX_LR or set GRAD_CLIP_NORM",
        )
        due = (
            run.step % cfg.train_log_every == 0
            or run.step <= 10
            or progress >= 1
            or elapsed - last[1] > 60
        )
        if run.step > last[0] and due:
            last = log_step(run, elapsed, progress, last)
        if (
            signum
            or cfg.checkpoint_seconds
            and time.perf_counter() - run.saved_at >= cfg.checkpoint_seconds
        ):
            save_checkpoint(run)
        if signum:
            run.log(f"stopped by {signal.Signals(signum).name}: RESUME=1 continues")
            sys.exit(128 + signum)
        if progress >= 1 or cfg.val_loss_every and run.step % cfg.val_loss_every == 0:
            validate(run)
        if progress >= 1:
            break
        switch(run, progress)
        if take_step(run, progress):
            run.averages.update(run.params, run.step, progress_of(run.step, elapsed, cfg), cfg)
    if run.step < cfg.iterations:
        run.log(
            f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{run.step}/{cfg.iterations}"
        )
    save_checkpoint(run)  # whatever happens to the export, the weights are safe
    run.set_clock(False)


def switch(run: Run, progress: float) -> None:
    """What changes on the way: depth recurrence, the mid-run look at the size, rounding."""
    cfg, rounds = (
        run.cfg,
        not run.qat and run.cfg.qat_start_frac < 1 and progress >= run.cfg.qat_start_frac,
    )
    if cfg.num_loops and not run.model.looping and progress >= cfg.loop_at_frac:
        run.model.looping = True
        run.log(
            f"layer_loop:enabled step:{run.step} passes:{len(run.model.passes(True))}",
            "loop",
            step=run.step,
        )
    if run.step and (rounds or not run.measured and progress >= 0.5):
        run.measured = progress >= 0.5
        look_at_size(run, "on the way", tensors(run.weights))
    if rounds:
        run.qat = True
        log_rounding(run)


def log_rounding(run: Run) -> None:
    """Proof that rounding reaches the forward pass: the difference that it makes there."""
    tokens = ids(run.stream.peek(run.cfg.train_seq_len + 1))[None]
    plain, seen = (
        run.model.holding(w)(tokens[:, :-1], tokens[:, 1:])
        for w in (run.weights, rounded_weights(run.weights, run.k, run.cfg))
    )
    worst = mx.max(mx.abs(plain - seen)).item()
    run.log(
        f"qat:on step:{run.step} k:{run.k:.3f} max_loss_difference:{worst:.6f}",
        "qat",
        step=run.step,
        k=run.k,
        max_loss_difference=worst,
    )


# ==== CHECKPOINTS =====================================================================================================
def checkpoint_path(cfg: Config) -> Path:
    return (
        Path(cfg.out_dir) / "checkpoint_mlx.pt"
    )  # not train_gpt's: neither takes the other's for its own


def save_checkpoint(run: Run) -> None:
    """All state, replaced in one move. A full disk costs the checkpoint, never the run."""
    run.set_clock(False)
    if all(bool(mx.all(mx.isfinite(w))) for w in run.weights.values()):
        state = dict(
            settings=dataclasses.asdict(run.cfg),
            run_id=run.log.run_id,
            data=run.data.fingerprint,
            scalars={
                name: getattr(run, name)
                for name in ("step", "train_s", "k", "qat", "measured", "loss")
            },
            looping=run.model.looping,
            stream=run.stream.at,
            model=tensors(run.weights),
            averages=vars(run.averages),
            optimiser=run.optimiser.state(),
        )
        try:
            save(checkpoint_path(run.cfg), state)
            run.log(
                f"checkpoint:{checkpoint_path(run.cfg)} step:{run.step}",
                "checkpoint",
                step=run.step,
            )
        except OSError as e:
            run.log(f"warning: no checkpoint written, the last one stays ({e})")
    run.saved_at = time.perf_counter()
    run.set_clock(True)


def restore(run: Run, saved: dict[str, Any]) -> None:
    need(
        saved["data"] == run.data.fingerprint,
        f"{run.data.folder} has other shards than the checkpoint's run; set "
        "DATA_PATH, or start again without RESUME",
    )
    run.weights = arrays(saved["model"])
    run.optimiser.load(saved["optimiser"])
    vars(run).update(saved["scalars"])
    vars(run.averages).update(saved["averages"])
    run.model.looping, run.stream.at = saved["looping"], saved["stream"]
    run.log(
        f"resumed step:{run.step} train_time:{1000 * run.train_s:.0f}ms", "resume", step=run.step
    )


# ==== EXPORT ==========================================================================================================
def as_shipped(
    weights: Mapping[str, Tensor], run: Run, hessians: Mapping[str, Tensor] | None = None
) -> Weights:
    """What the artifact would hold at this k."""
    return arrays(
        {n: r.weight() for n, r in quantised(weights, run.k, run.cfg, hessians or {}).items()}
    )


def best_on_holdout(run: Run, tried: dict[str, Weights], what: str) -> str:
    score = {
        name: mean_nats(loss_of(run.model, weights), run.data.holdout, run.cfg, run.rt, what)
        for name, weights in tried.items()
    }
    kept = min(score, key=score.get)
    run.log(
        f"{what}:" + " ".join(f"{n}:{v:.4f}" for n, v in score.items()) + f" kept:{kept}",
        what,
        kept=kept,
        **score,
    )
    return kept


def settle_weights(run: Run) -> None:
    """Last, SWA or EMA: whichever, rounded as it would ship, does best."""
    averages = {
        name: dict(zip(run.weights, values, strict=True))
        for name, values in run.averages.candidates().items()
    }
    if not averages:
        return
    if run.averages.swa_count:
        run.log(f"swa:averaged {run.averages.swa_count} checkpoints")
    tried = {"last": tensors(run.weights)} | averages
    kept = best_on_holdout(
        run, {name: as_shipped(weights, run) for name, weights in tried.items()}, "averages"
    )
    run.weights = arrays(tried[kept])


def collect_hessians(run: Run) -> dict[str, Tensor]:
    """sum of x x^T over training tokens, for every matrix that multiplies activations."""
    watched = {f"{n}.weight": m for n, m in run.model.named_modules() if isinstance(m, Linear)}
    hessians = {n: mx.zeros((m.weight.shape[1], m.weight.shape[1])) for n, m in watched.items()}

    def watch(name: str, x: mx.array) -> None:
        x = x.reshape(-1, x.shape[-1])
        hessians[name] = hessians[name] + x.T @ x

    for n, m in watched.items():
        m.watch = lambda x, n=n: watch(n, x)
    model, length = run.model.holding(run.weights), run.cfg.train_seq_len
    batches = [run.stream.take(8 * length)[:-1].reshape(8, -1) for _ in range(run.cfg.gptq_batches)]
    for batch in batches:
        model.logits(ids(batch))
        mx.eval(hessians)
    for m in watched.values():
        m.watch = None
    return tensors(hessians)


def choose_rounding(run: Run) -> dict[str, Tensor]:
    """Hessians, made inside the training clock, if GPTQ pays on held-out training tokens; else none."""
    if not run.cfg.gptq:
        return {}
    run.set_clock(True)
    hessians, cap = collect_hessians(run), run.cfg.max_wallclock_seconds
    gptq = as_shipped(tensors(run.weights), run, hessians)
    run.set_clock(False)
    run.log(
        f"gptq:collected {len(hessians)} Hessians train_time:{1000 * run.train_s:.0f}ms"
        + (
            f" (over MAX_WALLCLOCK_SECONDS={cap}; raise GPTQ_RESERVE_SECONDS)"
            if 0 < cap < run.train_s
            else ""
        )
    )
    kept = best_on_holdout(
        run, {"nearest": as_shipped(tensors(run.weights), run), "gptq": gptq}, "rounding"
    )
    return hessians if kept == "gptq" else {}


def export(run: Run) -> Path:
    """Choose the weights and their rounding, write the artifact."""
    settle_weights(run)
    hessians, cfg, log, bits = (
        choose_rounding(run),
        run.cfg,
        run.log,
        max(run.cfg.attn_bits, run.cfg.mlp_bits),
    )
    sized, path = as_sized(run), Path(cfg.out_dir) / f"final_model.int{bits}.ptz"
    code, raw = (
        code_bytes(sized.cfg),
        save(Path(cfg.out_dir) / "final_model.pt", tensors(run.weights)),
    )
    log(f"Serialized model: {raw} bytes\nCode size: {code} bytes")
    blob, kept, codec = fit_artifact(sized, hessians)
    run.k = sized.k
    with replacing(path) as f:
        f.write(blob)
    log_errors(sized, kept)
    log(
        f"Serialized model int{bits}+{codec}: {len(blob)} bytes (k:{run.k:.3f} ratio:{raw / len(blob):.2f}x)"
    )
    log(
        f"Total submission size int{bits}+{codec}: {len(blob) + code} bytes (budget:{cfg.size_budget_bytes} "
        f"left:{cfg.size_budget_bytes - len(blob) - code})",
        "artifact",
        path=str(path),
        codec=codec,
        k=run.k,
        bytes=len(blob),
        code_bytes=code,
        budget_bytes=cfg.size_budget_bytes,
        sha256=file_sha256(path),
    )
    return path


# ==== SCORES ==========================================================================================================
def sliding_nats(model: GPT, tokens: np.ndarray, cfg: Config, judged: EvalConfig) -> float:
    """Mean cross-entropy of tokens[1:], each scored once, in the windows that eval_final.py slides."""
    length, total, tell = cfg.train_seq_len, 0.0, progress_lines("sliding windows")
    windows = plan(tokens, length, min(judged.eval_stride, length), judged.eval_documents)
    rows = max(1, cfg.val_batch_size // 8 // length)
    for i in range(0, len(windows.start), rows):
        start, first, end = (part[i : i + rows, None] for part in windows)
        places = start + np.arange(length + 1)
        data = tokens[np.minimum(places, len(tokens) - 1)]
        nats = np.asarray(model(ids(data[:, :-1]), ids(data[:, 1:])))
        total += nats[(places[:, :-1] >= first) & (places[:, :-1] < end)].sum(dtype=np.float64)
        tell(min(1.0, (i + rows) / len(windows.start)))
    return float(total) / (len(tokens) - 1)


def score_artifact(run: Run, path: Path, judged: EvalConfig) -> None:
    """The score of the run: of the bytes on disk, read back and rebuilt; windows side by side, then sliding."""
    artifact = read_artifact(path)
    model, val = build_model(artifact), run.data.val
    label = f"final_{path.suffixes[0][1:]}_{artifact.header['codec']}"
    ways = (
        (
            "roundtrip",
            "final",
            "",
            lambda: mean_nats(loss_of(model), val, run.cfg, run.rt, "scoring the artifact"),
        ),
        (
            "sliding_window",
            "sliding",
            f" stride:{judged.eval_stride}",
            lambda: sliding_nats(model, val, run.cfg, judged),
        ),
    )
    for way, event, extra, score in ways:
        began, nats = time.perf_counter(), score()
        name, bpb, seconds = (
            f"{label}_{way}",
            bits_per_byte(nats, run.data),
            time.perf_counter() - began,
        )
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
            tokens=len(val) - 1,
            bytes=run.data.val_bytes,
        )


# ==== MAIN ============================================================================================================
HELP = {  # what a setting does here, where that is not what it does in train_gpt
    "resume": "1 continues from OUT_DIR/checkpoint_mlx.pt",
    "compile": "mx.compile of loss and gradients",
    "device": "unset: the GPU of a Mac, else the CPU; mps: that GPU",
    "micro_batch_tokens": f"tokens a forward pass at most; 0 = what {ACTIVATION_BYTES >> 30} GiB of activations hold",
    "eval_stride": "tokens between the sliding windows of the final score",
    "eval_documents": "those windows start anew at each BOS",
}


def print_help() -> None:
    shown = lambda value: int(value) if type(value) is bool else value  # noqa: E731
    print(
        f"{__doc__}\nPRESET  one of {', '.join(PRESETS)} (unset: cpu); their values: train_gpt.py --help\n"
    )
    judging = [f for f in fields(EvalConfig) if f.name in ("eval_stride", "eval_documents")]
    for f in [*fields(Config), *judging]:
        print(
            f"{f.name.upper():27} {shown(f.default)!s:>9}  {HELP.get(f.name, f.metadata['help'])}"
        )


def read_judging(env: Mapping[str, str]) -> EvalConfig:
    """How the final score slides: as eval_final.py would by default."""
    judged = EvalConfig.from_env(env)
    for name, value in (("eval_mode", "sliding"), ("eval_seq_len", 0)):
        need(
            getattr(judged, name) == value,
            f"{name.upper()} is {getattr(judged, name)}, but this trainer scores its "
            "artifact in sliding windows of TRAIN_SEQ_LEN; unset it here, and give it to eval_final.py",
        )
    return judged


def main(env: Mapping[str, str] = os.environ) -> None:
    preset = env.get("PRESET") or "cpu"
    cfg, judged = Config.from_env(env, preset), read_judging(env)
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
    path = export(run)
    score_artifact(run, path, judged)
    log.close(path)


def run_main() -> int:
    if len(sys.argv) > 1:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
        print_help()
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    less = "; set MICRO_BATCH_TOKENS to half of what a pass takes"
    advice = {
        (RuntimeError, "allocate"): less,
        (RuntimeError, "Insufficient Memory"): less,
        (MemoryError, ""): less,
        (UserError, ""): "",
        (OSError, ""): "",
        (ModuleNotFoundError, ""): "; pip install -r requirements.txt",
    }
    try:
        main()
    except SystemExit as stop:
        return int(stop.code)
    except Exception as e:
        text = next(
            (
                text
                for (kind, part), text in advice.items()
                if isinstance(e, kind) and part in str(e)
            ),
            None,
        )
        if text is None:
            raise  # a bug of ours: show where
        print(
            f"train_gpt_mlx: error: {(str(e) or 'out of memory').splitlines()[0]}{text}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    code = run_main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)
