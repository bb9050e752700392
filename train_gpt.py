"""Train a language model that ends as an artifact of at most 16,000,000 bytes, code included.

    PRESET=cpu python train_gpt.py                           a laptop; --help lists every setting
    python train_gpt.py                                      one GPU: the consensus model
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight

One file of at most 1,500 lines (hence 120 columns, guards on one line, small helpers without a blank line between), in
the order in which data flows, from settings to main. It imports nothing of this repository; importing it has no effect.
Shapes in names: B sequences, T positions, D model width, H query heads, G key/value heads, C head width.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import lzma
import math
import os
import platform
import shutil
import signal
import struct
import subprocess
import sys
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import brotli
import constriction
import numpy as np
import sentencepiece
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zstandard
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback."""


def need(holds: Any, message: str, kind: type[Exception] = UserError) -> None:
    if not holds:
        raise kind(message)


# ==== SETTINGS ========================================================================================================
# Upper-case names in the environment override the preset, which overrides these defaults (the challenge's). A name that
# only resembles a setting is an error: elsewhere it is ignored, and people train the wrong model for $20 an hour.
def knob(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    *,
    role: str = "",
) -> Any:
    """Declare a setting: its default, what it does, the values that it may take, and its role.

    Roles of `Config`: place (where files lie), runtime (free to change on resume), seed, schedule, model (what a
    reader needs to rebuild the model), optimiser, rounding, size.
    """
    return field(
        default=default,
        metadata={"help": help, "low": low, "high": high, "choices": choices, "role": role},
    )


def names_with_role(config_class: type, *roles: str) -> list[str]:
    """Return the names of the settings that have one of these roles, in the order of declaration."""
    return [f.name for f in fields(config_class) if f.metadata["role"] in roles]


@dataclass(frozen=True)
class Config:
    # Where
    data_path: str = knob(
        "",
        "folder of *_train_*.bin and *_val_*.bin; unset: FineWeb if there, else embedded corpus",
        role="place",
    )
    tokenizer_path: str = knob(
        "", "SentencePiece model; unset: the one beside the shards", role="place"
    )
    out_dir: str = knob(".", "where artifact, checkpoint and logs/ are written", role="place")
    run_id: str = knob("", "names the log; unset: random", role="place")
    seed: int = knob(1337, "seed of the initial weights", 0, 2**63 - 1, role="seed")
    resume: bool = knob(False, "1 continues from OUT_DIR/checkpoint.pt", role="runtime")
    device: str = knob(
        "", "unset: the best there is", choices=("", "cpu", "cuda", "mps"), role="runtime"
    )
    compile: bool = knob(False, "torch.compile: pays on CUDA, costs a minute", role="runtime")
    wandb_mode: str = knob(
        "",
        "Weights & Biases, when asked for",
        choices=("", "online", "offline", "disabled"),
        role="runtime",
    )
    # Length and schedule
    iterations: int = knob(20_000, "steps at most", 1, role="schedule")
    max_wallclock_seconds: float = knob(
        600.0, "training time at most, GPTQ included; 0 = no cap", 0, role="schedule"
    )
    warmup_steps: int = knob(20, "steps that compile and are then undone", 0, role="runtime")
    warmdown_frac: float = knob(
        0.09, "last part of the run, in which the learning rate falls", 0, 1, role="schedule"
    )
    min_lr: float = knob(
        0.0, "learning rate at the end, as a part of the peak", 0, 1, role="schedule"
    )
    train_batch_tokens: int = knob(
        524_288, "tokens a step, on any number of devices", 8, role="schedule"
    )
    micro_batch_tokens: int = knob(
        0, "tokens a forward pass at most; 0 = an eighth of the batch", 0, role="runtime"
    )
    train_seq_len: int = knob(1024, "tokens a sequence", 2, 65_536, role="model")
    byte_loss_alpha: float = knob(
        0.0, "training loss weighted by a token's bytes: 0 plain, 1 fully", 0, 1, role="schedule"
    )
    # Reporting
    val_batch_size: int = knob(524_288, "tokens of eight validation passes", 1, role="runtime")
    val_loss_every: int = knob(
        1000, "steps between validations; 0 = only at the end", 0, role="runtime"
    )
    train_log_every: int = knob(200, "steps between log lines", 1, role="runtime")
    checkpoint_seconds: float = knob(
        300.0,
        "seconds between checkpoints; 0 = only at the end, or when interrupted",
        0,
        role="runtime",
    )
    holdout_tokens: int = knob(
        262_144, "last training tokens, kept apart to judge averages and GPTQ", 1, role="schedule"
    )
    # Model
    vocab_size: int = knob(1024, "pieces of the tokenizer", 4, 65_536, role="model")
    num_layers: int = knob(9, "transformer blocks", 1, 256, role="model")
    model_dim: int = knob(512, "width", 8, 16_384, role="model")
    num_heads: int = knob(8, "query heads", 1, 256, role="model")
    num_kv_heads: int = knob(4, "key and value heads", 1, 256, role="model")
    mlp_mult: float = knob(2.0, "MLP width, in model widths", 0.25, 16, role="model")
    leaky_slope: float = knob(
        0.0, "squared LeakyReLU of this slope; 0 = squared ReLU", 0, 1, role="model"
    )
    logit_softcap: float = knob(
        30.0, "logits stay within plus and minus this", 1, 1e4, role="model"
    )
    tied_embed_init_std: float = knob(
        0.005, "initial spread of the tied embedding", 0, 1e3, role="model"
    )
    rope_base: float = knob(
        10_000.0, "RoPE: how much slower the slowest dimension turns", 1, 1e9, role="model"
    )
    rope_dims: int = knob(0, "dimensions of a head that rotate; 0 = all", 0, 16_384, role="model")
    qk_gain_init: float = knob(1.5, "initial gain of normalised queries", 0, 1e3, role="model")
    ortho_init: bool = knob(False, "orthogonal initial matrices", role="model")
    smear_gate: bool = knob(
        False, "mix each embedding with the one before it, never across BOS", role="model"
    )
    bigram_vocab_size: int = knob(
        0, "buckets of the hashed bigram embedding; 0 = none", 0, 1 << 20, role="model"
    )
    bigram_dim: int = knob(128, "its width", 1, 16_384, role="model")
    xsa_last_n: int = knob(
        0,
        "last layers whose attention output drops its own value's direction",
        0,
        256,
        role="model",
    )
    ln_scale: bool = knob(False, "scale layer i's input by 1/sqrt(i+1)", role="model")
    attn_gate: bool = knob(False, "gate each head's output by the first 12 inputs", role="model")
    parallel_start_layer: int = knob(
        0, "from this layer attention and MLP have a lane each; 0 = none", 0, 255, role="model"
    )
    loop_start: int = knob(0, "first layer of depth recurrence", 0, 255, role="model")
    loop_end: int = knob(0, "last layer of depth recurrence", 0, 255, role="model")
    num_loops: int = knob(0, "extra passes over those layers; 0 = none", 0, 16, role="model")
    loop_at_frac: float = knob(0.35, "part of the run after which they loop", 0, 1, role="model")
    loop_adaln: bool = knob(
        False, "scale, shift and gate of its own for each extra pass", role="model"
    )
    # Optimisers
    matrix_lr: float = knob(0.04, "Muon, for the matrices", 0, role="optimiser")
    scalar_lr: float = knob(0.04, "AdamW, for vectors and gates", 0, role="optimiser")
    tied_embed_lr: float = knob(0.05, "AdamW, for embeddings", 0, role="optimiser")
    muon_momentum: float = knob(0.95, "Muon's momentum", 0, 1, role="optimiser")
    muon_momentum_warmup_start: float = knob(0.85, "its first value", 0, 1, role="optimiser")
    muon_momentum_warmup_steps: int = knob(500, "steps until it is reached", 0, role="optimiser")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 20, role="optimiser")
    muon_polar_express: bool = knob(
        False, "Polar Express coefficients in place of a fixed polynomial", role="optimiser"
    )
    muon_row_normalize: bool = knob(
        False, "normalise rows before orthogonalising", role="optimiser"
    )
    muon_wd: float = knob(0.0, "decoupled weight decay of matrices", 0, role="optimiser")
    adam_wd: float = knob(0.0, "of vectors and gates", 0, role="optimiser")
    embed_wd: float = knob(0.0, "of embeddings", 0, role="optimiser")
    beta1: float = knob(0.9, "AdamW", 0, 1, role="optimiser")
    beta2: float = knob(0.95, "AdamW", 0, 1, role="optimiser")
    adam_eps: float = knob(1e-8, "AdamW", 0, role="optimiser")
    grad_clip_norm: float = knob(0.0, "largest gradient norm; 0 = none", 0, role="optimiser")
    # Rounding while training, and averaging
    qat_start_frac: float = knob(
        1.0,
        "part of the run after which passes see rounded weights; 1 = never",
        0,
        1,
        role="schedule",
    )
    swa_start_frac: float = knob(
        1.0, "part of the run after which weights are averaged; 1 = never", 0, 1, role="schedule"
    )
    swa_every: int = knob(50, "steps between the weights that are averaged", 1, role="schedule")
    ema_decay: float = knob(
        0.0, "moving average, as the decay of a 7,000-step run; 0 = none", 0, 1, role="schedule"
    )
    # Artifact
    attn_bits: int = knob(8, "bits of attention matrices", 4, 8, role="model")
    mlp_bits: int = knob(8, "bits of MLP matrices", 4, 8, role="model")
    embed_bits: int = knob(8, "bits of embeddings", 4, 8, role="model")
    codec: str = knob(
        "auto",
        "coder of the artifact; auto = the smallest",
        choices=("auto", "zstd", "brotli", "ans"),
        role="runtime",
    )
    size_budget_bytes: int = knob(16_000_000, "artifact and counted code together", 1, role="size")
    size_margin_bytes: int = knob(20_000, "left free below the budget", 0, role="size")
    extra_code_files: str = knob(
        "", "files counted beside this one, separated by commas", role="size"
    )
    embed_tokenizer: bool = knob(True, "carry the tokenizer inside the artifact", role="size")
    gptq: bool = knob(False, "round with Hessians of training batches", role="rounding")
    gptq_batches: int = knob(
        16, "batches of 8 sequences that make the Hessians", 1, role="rounding"
    )
    gptq_reserve_seconds: float = knob(
        10.0, "kept for GPTQ inside MAX_WALLCLOCK_SECONDS", 0, role="rounding"
    )

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        head, eight, cap = (
            self.model_dim // self.num_heads,
            8 * self.train_seq_len,
            self.max_wallclock_seconds,
        )
        for name, holds, wanted in (
            (
                "model_dim",
                self.model_dim % self.num_heads == 0,
                f"a multiple of NUM_HEADS={self.num_heads}",
            ),
            (
                "num_heads",
                self.num_heads % self.num_kv_heads == 0,
                f"a multiple of NUM_KV_HEADS={self.num_kv_heads}",
            ),
            (
                "rope_dims",
                (self.rope_dims or head) % 2 == 0 and self.rope_dims <= head,
                f"even, at most {head}",
            ),
            (
                "train_batch_tokens",
                self.train_batch_tokens % eight == 0,
                f"a multiple of {eight} (8 x TRAIN_SEQ_LEN)",
            ),
            ("bigram_vocab_size", self.bigram_vocab_size != 1, "0 or at least 2"),
            (
                "loop_end",
                self.num_loops == 0 or self.loop_start <= self.loop_end < self.num_layers,
                f"from LOOP_START={self.loop_start} to below NUM_LAYERS={self.num_layers}",
            ),
            (
                "gptq_reserve_seconds",
                not self.gptq or self.gptq_reserve_seconds < (cap or math.inf),
                f"below MAX_WALLCLOCK_SECONDS={cap}",
            ),
        ):
            need(holds, f"{name.upper()} is {getattr(self, name)}; it must be {wanted}")

    @classmethod
    def from_env(cls, env: Mapping[str, str], default_preset: str) -> Config:
        """PRESET names a set of values; single variables override it."""
        refuse_near_misses(env)
        preset = env.get("PRESET") or default_preset
        need(preset in PRESETS, f"PRESET is {preset!r}; it must be one of {', '.join(PRESETS)}")
        given = {
            f.name: parse_value(f, env[f.name.upper()])
            for f in fields(cls)
            if f.name.upper() in env
        }
        return cls(**{**PRESETS[preset], **given})


def parse_value(f: dataclasses.Field, text: str) -> Any:
    kind = type(f.default)
    try:
        return {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = "0 or 1" if kind is bool else "a whole number" if kind is int else "a number"
        raise UserError(
            f"{f.name.upper()} is {text!r}; it must be {wanted} (default {f.default!r})"
        ) from None


def check_value(f: dataclasses.Field, value: Any) -> None:
    """Type, range and choice of one setting, wherever it came from: environment or artifact."""
    kind, name, (low, high, choices) = (
        type(f.default),
        f.name.upper(),
        map(f.metadata.get, ("low", "high", "choices")),
    )
    need(type(value) is kind, f"{name} is {value!r:.60}, not {kind.__name__}")
    need(
        not choices or value in choices,
        f"{name} is {value!r}; it must be one of {', '.join(filter(None, choices))}",
    )
    inside = (
        kind in (str, bool)
        or (low is None or value >= low)
        and value <= (math.inf if high is None else high)
    )
    need(
        inside and value != math.inf,
        f"{name} is {value}; it must be from {low} to {high or 'any finite value'}",
    )


# What other records call otherwise, and what it is called here.
FOREIGN_NAMES = dict(
    pair.split("=", 1)
    for pair in """
MUON_WEIGHT_DECAY=MUON_WD; WEIGHT_DECAY=MUON_WD, ADAM_WD or EMBED_WD; WD=MUON_WD; ADAM_WEIGHT_DECAY=ADAM_WD;
WARMDOWN_ITERS=WARMDOWN_FRAC; QAT_ENABLED=QAT_START_FRAC (1 is never); LATE_QAT_THRESHOLD=QAT_START_FRAC;
SWA_ENABLED=SWA_START_FRAC (1 is never); EMA_ENABLED=EMA_DECAY (0 is none); MATRIX_BITS=ATTN_BITS and MLP_BITS;
COMPRESSOR=CODEC; GPTQ_ENABLED=GPTQ; GPTQ_CALIBRATION_BATCHES=GPTQ_BATCHES; BIGRAM_BUCKETS=BIGRAM_VOCAB_SIZE;
EMBED_LR=TIED_EMBED_LR; HEAD_LR=TIED_EMBED_LR; TIE_EMBEDDINGS=nothing (it is always so); SEQ_LEN=TRAIN_SEQ_LEN;
CONTROL_TENSOR_NAME_PATTERNS=nothing (what is no matrix is fp16); BATCH_SIZE=TRAIN_BATCH_TOKENS; MAX_STEPS=ITERATIONS
""".replace("\n", " ")
    .strip()
    .split("; ")
)


def refuse_near_misses(env: Mapping[str, str], *others: type) -> None:
    """MUON_WEIGHT_DECAY=.04 is an error that names MUON_WD; PATH and NCCL_DEBUG are none of ours."""
    known = {f.name.upper() for kind in (Config, *others) for f in fields(kind)} | {"PRESET"}
    by_words = {tuple(sorted(name.split("_"))): name for name in known}
    for name in sorted(env.keys() - known):
        near = difflib.get_close_matches(name.upper(), known, 1, 0.87) if len(name) > 4 else []
        right = (
            FOREIGN_NAMES.get(name.upper())
            or by_words.get(tuple(sorted(name.upper().split("_"))))
            or "".join(near)
        )
        need(
            not right, f"{name}={env[name]} is no setting; did you mean {right}? (--help lists all)"
        )


# Values of the records; schedules are parts of a run, so that they keep their shape on a slower machine.
CONSENSUS: dict[str, Any] = dict(
    num_layers=11,
    mlp_mult=3.0,
    train_seq_len=2048,
    train_batch_tokens=786_432,
    iterations=9000,
    compile=True,
    smear_gate=True,
    bigram_vocab_size=2048,
    ortho_init=True,
    matrix_lr=0.025,
    scalar_lr=0.025,
    tied_embed_lr=0.035,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_wd=0.04,
    adam_wd=0.04,
    embed_wd=0.04,
    grad_clip_norm=0.3,
    warmdown_frac=0.4,
    swa_start_frac=0.8,
    swa_every=200,
    qat_start_frac=0.5,
    attn_bits=6,
    mlp_bits=6,
)
FRONTIER = CONSENSUS | dict(
    leaky_slope=0.5,
    xsa_last_n=11,
    ln_scale=True,
    rope_dims=16,
    qk_gain_init=5.0,
    attn_gate=True,
    gptq=True,
    loop_start=3,
    loop_end=5,
    num_loops=2,
    parallel_start_layer=8,
    muon_momentum=0.97,
    muon_row_normalize=True,
    min_lr=0.1,
    muon_polar_express=True,
    muon_wd=0.09,
    embed_wd=0.085,
    adam_wd=0.02,
    matrix_lr=0.026,
    scalar_lr=0.02,
    beta2=0.99,
    tied_embed_lr=0.03,
    warmdown_frac=0.75,
    swa_start_frac=1.0,
    ema_decay=0.9965,
    qat_start_frac=1.0,
)
CPU = CONSENSUS | dict(
    num_layers=4,
    model_dim=128,
    num_heads=4,
    num_kv_heads=2,
    train_seq_len=256,
    train_batch_tokens=2048,
    compile=False,
    val_batch_size=131_072,
    warmup_steps=0,
    holdout_tokens=32_768,
    checkpoint_seconds=60.0,
    val_loss_every=0,
    train_log_every=50,
    muon_momentum=0.95,
    muon_momentum_warmup_steps=50,
    swa_start_frac=0.9,
    swa_every=10,
    max_wallclock_seconds=150.0,
)
SMOKE = CPU | dict(
    num_layers=2,
    model_dim=64,
    train_seq_len=64,
    iterations=20,
    bigram_vocab_size=64,
    bigram_dim=32,
    holdout_tokens=4096,
    train_log_every=5,
)
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": CPU,
    "baseline": dict(compile=True),
    "consensus": CONSENSUS,
    "frontier": FRONTIER,
    "smoke": SMOKE,
    "mixed": CONSENSUS | dict(num_layers=12, mlp_bits=5),
}  # int5 MLP pays for a twelfth layer (#180)

# ==== DATA ============================================================================================================
# A shard is the challenge's: 256 little-endian int32 (magic, version, count), then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1  # every document starts with it


class ShardError(UserError):
    """A token file that is not what its header, or the run, says it is."""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file beside `path`, then rename it: readers see the old file or the new, never half of one."""
    path = Path(path)
    need(
        path.is_file() or not path.exists(),
        f"{path} is no regular file, so that it cannot be replaced; name another",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    try:
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with replacing(path) as f:
        f.write(header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def read_shard(path: str | Path, vocab_size: int = 0) -> np.ndarray:
    """Map a shard's tokens, read only, after checking header, length and, if given, vocabulary."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=256)
    except OSError as e:
        raise ShardError(f"{path}: cannot be read ({e.strerror}); prepare the data again") from None
    ours = len(header) == 256 and tuple(header[:2]) == (SHARD_MAGIC, SHARD_VERSION)
    need(
        ours,
        f"{path}: not a token shard of version {SHARD_VERSION}; write shards with data/prepare.py",
        ShardError,
    )
    count, there = int(header[2]), (size - SHARD_HEADER_BYTES) / 2
    need(
        count == there,
        f"{path}: its header says {count} tokens, it holds {there:g}; make it again",
        ShardError,
    )
    tokens = (
        np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,)) if count else np.zeros(0, "<u2")
    )
    pieces = (
        np.array_split(tokens, 1 + count // (1 << 22)) if vocab_size and count else ()
    )  # never in memory whole
    top = max((int(piece.max()) for piece in pieces), default=-1)
    need(
        top < vocab_size or not vocab_size,
        f"{path}: holds token {top}, but VOCAB_SIZE is {vocab_size}; set "
        "VOCAB_SIZE, or DATA_PATH, so that the two agree",
        ShardError,
    )
    return tokens


def document_bounds(tokens: np.ndarray) -> np.ndarray:
    """Where documents start, and the end: `[0, ..., len]`, cut before each BOS."""
    return np.unique(np.concatenate([[0], np.flatnonzero(tokens == BOS_ID), [len(tokens)]]))


@dataclass(frozen=True)
class ByteTable:
    """How many bytes of text each token stands for; a leading ▁ counts after ordinary tokens only, so that
    table.count([BOS, ▁the, ▁a]) is [3, 2] where the tokenizer swallows a document's leading blank."""

    base: np.ndarray  # int16[V] bytes without the leading ▁
    space: np.ndarray  # bool[V] piece starts with ▁
    boundary: np.ndarray  # bool[V] control, unknown, unused: no bytes, and swallow the next ▁

    @classmethod
    def of(cls, tokenizer, vocab_size: int) -> ByteTable:
        base, space, boundary = (
            np.zeros(vocab_size, np.int16),
            np.zeros(vocab_size, bool),
            np.ones(vocab_size, bool),
        )
        for i in range(min(vocab_size, tokenizer.vocab_size())):
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                continue
            piece = tokenizer.id_to_piece(i)
            boundary[i], space[i] = False, piece.startswith("▁")
            base[i] = 1 if tokenizer.is_byte(i) else len(piece.removeprefix("▁").encode())
        # A tokenizer that keeps a document's leading blank decodes it, so it counts there too.
        spaced = np.flatnonzero(space & (base > 0))
        if len(spaced) and tokenizer.decode([int(spaced[0])]).startswith(" "):
            boundary[:] = False
        return cls(base, space, boundary)

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of tokens[1:], each given the token before it."""
        return self.base[tokens[1:]] + (self.space[tokens[1:]] & ~self.boundary[tokens[:-1]])


def audit_bytes(tokenizer, table: ByteTable, tokens: np.ndarray) -> int:
    """Decode every document, compare its UTF-8 length with the table; return the bytes in all."""

    def gap(ids: np.ndarray) -> int:
        return len(tokenizer.decode(ids[1:].tolist()).encode()) - int(table.count(ids).sum())

    bounds = document_bounds(tokens)
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        ids = np.asarray(tokens[start:end])
        ids = ids if ids[0] == BOS_ID else np.concatenate([[BOS_ID], ids])
        if missed := gap(ids):
            inner = [
                tokenizer.is_byte(i) and "<0x80>" <= tokenizer.id_to_piece(i) < "<0xC0>"
                for i in ids.tolist()
            ]
            ends = [
                n for n in range(2, len(ids) + 1) if n == len(ids) or not inner[n]
            ]  # where no character is cut
            at = (
                ends[bisect.bisect_left(ends[:-1], True, key=lambda n, ids=ids: gap(ids[:n]) != 0)]
                - 1
            )
            raise ShardError(
                f"the document at token {start} decodes to {missed:+d} bytes beside the byte table from "
                f"token {ids[at]} ({tokenizer.id_to_piece(int(ids[at]))!r}) on: no BPB without its bytes"
            )
    return int(table.count(tokens).sum())


class TokenStream:
    """Training tokens in order, round and round, from any number of shards; `at` is all its state."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.at, self.ends = shards, 0, np.cumsum([len(s) for s in shards])

    def peek(self, count: int) -> np.ndarray:
        parts, at = [], self.at
        while count:
            at %= int(self.ends[-1])
            i = int(np.searchsorted(self.ends, at, side="right"))
            start = at - (int(self.ends[i]) - len(self.shards[i]))
            parts.append(self.shards[i][start : start + count])
            count, at = count - len(parts[-1]), at + len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def take(
        self, count: int
    ) -> np.ndarray:  # and one more: inputs and, one further, their targets
        tokens, self.at = self.peek(count + 1), (self.at + count) % int(self.ends[-1])
        return tokens


class Data(NamedTuple):
    folder: Path
    train: list[np.ndarray]  # less the held-out tail
    holdout: np.ndarray
    val: np.ndarray
    val_bytes: int
    table: ByteTable
    tokenizer_path: Path
    fingerprint: str


def load_data(cfg: Config) -> Data:
    """Find, map and check everything before a second of training is spent."""
    here = Path(__file__).resolve().parent / "data"
    fineweb = here / "datasets" / f"fineweb10B_sp{cfg.vocab_size}"
    folder = (
        Path(cfg.data_path) if cfg.data_path else fineweb if fineweb.is_dir() else here / "embedded"
    )
    shards = {}
    for split in ("train", "val"):
        paths = sorted(folder.glob(f"*_{split}_*.bin"))
        need(
            paths,
            f"no {split} shards (*_{split}_*.bin) in {folder}; run `make data`, or set DATA_PATH",
        )
        shards[split] = [s for s in (read_shard(p, cfg.vocab_size) for p in paths) if len(s)]
    train, val = shards["train"], np.concatenate(shards["val"] or [np.zeros(0, "<u2")])
    digest = hashlib.sha256(
        val
    )  # and both ends of every training shard: a second, where all of 16 GB takes a minute
    for s in train:
        digest.update(b"%d " % len(s) + s[: 1 << 19].tobytes() + s[-1 << 19 :].tobytes())
    need(
        (total := sum(map(len, train))) > 99 and len(val) > 1,
        f"{folder}: {total} training and {len(val)} validation tokens are too few",
    )
    kept = min(cfg.holdout_tokens, len(train[-1]) // 10)
    holdout, train[-1] = np.array(train[-1][-kept - 1 :]), train[-1][: -kept - 1]
    places = (
        [Path(cfg.tokenizer_path)]
        if cfg.tokenizer_path
        else [
            folder / "tokenizer.model",
            folder.parent.parent / "tokenizers" / f"fineweb_{cfg.vocab_size}_bpe.model",
        ]
    )
    path = next((p for p in places if p.is_file()), None)
    need(
        path,
        f"no tokenizer at {' or '.join(map(str, places))}; set TOKENIZER_PATH to what wrote the shards",
    )
    table = check_tokenizer(cfg, path, val)
    return Data(
        folder, train, holdout, val, int(table.count(val).sum()), table, path, digest.hexdigest()
    )


def check_tokenizer(cfg: Config, path: Path, val: np.ndarray) -> ByteTable:
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is no SentencePiece model; set TOKENIZER_PATH to one") from None
    need(
        tokenizer.vocab_size() == cfg.vocab_size,
        f"VOCAB_SIZE is {cfg.vocab_size}, but {path} has "
        f"{tokenizer.vocab_size()} pieces; set VOCAB_SIZE or TOKENIZER_PATH so that the two agree",
    )
    return proven_table(tokenizer, path, val)


def proven_table(tokenizer, path: Path | str, val: np.ndarray) -> ByteTable:
    """The byte table of a tokenizer that is shown to have written these tokens."""
    table, bounds = ByteTable.of(tokenizer, tokenizer.vocab_size()), document_bounds(val)
    ids = [
        val[a:b][val[a:b] != BOS_ID].tolist()
        for a, b in zip(bounds[:20], bounds[1:21], strict=False)
    ]
    odd = sum(tokenizer.encode(tokenizer.decode(i)) != i for i in ids)
    need(
        2 * odd <= len(ids),
        f"{path} did not write these shards: {odd} of {len(ids)} documents encode otherwise; "
        "set TOKENIZER_PATH to the model that did",
    )
    audit_bytes(tokenizer, table, val)
    return table


# ==== QUANTISER =======================================================================================================
# One function rounds a weight, in training (straight-through) and in the export. A row's step is k * rms / levels: k
# sets both the error (about k/107 at 6 bits) and, through the entropy coder, the size (about 7.05 - log2 k bits a
# weight), so one number is bisected to meet the byte target. A floor on the step, as in records, wrecks small runs.
PLAIN_BITS = 16  # vectors, gates and scalars: fp16
LEAST_K = {
    4: 2.5,
    5: 2.9,
    6: 3.6,
    7: 4.0,
    8: 4.4,
}  # of least loss, on a trained cpu model: below, clipping costs
K_GRID = [float(k) for k in np.geomspace(2.5, 64.0, 3000)]


def levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1  # codes run from -31 to 31 at 6 bits


def row_steps(weight: Tensor, k: float, bits: int) -> Tensor:
    """The step of each row, [rows, 1], exactly representable in bf16 since that is what is stored."""
    rms = weight.float().square().mean(dim=1, keepdim=True).sqrt()
    step = (rms * (max(k, LEAST_K[bits]) / levels(bits))).bfloat16().float()
    return torch.where(step > 0, step, 1.0)


def to_codes(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    return torch.round(weight.float() / step).clamp_(-levels(bits), levels(bits))


class Rounded(NamedTuple):
    """A tensor as the artifact keeps it: codes and their rows' steps, or fp16 values and no steps."""

    bits: int
    values: Tensor
    steps: Tensor | None

    def weight(self) -> Tensor:
        return self.values.float() if self.steps is None else self.values * self.steps


def quantise(weight: Tensor, k: float, bits: int, hessian: Tensor | None = None) -> Rounded:
    """Rounded to nearest or, given a Hessian, by GPTQ; what is no matrix becomes fp16, never infinite."""
    if bits == PLAIN_BITS:
        return Rounded(bits, weight.float().clamp(-65504, 65504).half(), None)
    steps = row_steps(weight, k, bits)
    codes = (
        to_codes(weight, steps, bits)
        if hessian is None
        else gptq_codes(weight, hessian, steps, bits)
    )
    return Rounded(bits, codes, steps)


def quantised(
    state: Mapping[str, Tensor], k: float, cfg: Config, hessians: Mapping[str, Tensor]
) -> dict[str, Rounded]:
    return {
        n: quantise(w.detach(), k, tensor_bits(n, cfg), hessians.get(n)) for n, w in state.items()
    }


def tensor_bits(name: str, cfg: Config) -> int:
    """Bits of one parameter, by its name: matrices end in `.weight`, all else is a vector or a gate."""
    if not name.endswith(".weight"):
        return PLAIN_BITS
    return (
        cfg.attn_bits if ".attn." in name else cfg.mlp_bits if ".mlp." in name else cfg.embed_bits
    )


def entropy_bits(codes: Tensor) -> float:
    """Order-0 entropy of a tensor of codes, in bits, all told."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256)
    seen = counts[counts > 0].cpu().double()
    return float(-(seen * (seen / seen.sum()).log2()).sum())


def predicted_bytes(state: Mapping[str, Tensor], k: float, cfg: Config) -> int:
    """Size of the artifact at this k, by the order-0 entropy of its codes: right within about 1 %."""
    bits = 8000.0
    for name, weight in state.items():
        width = tensor_bits(name, cfg)
        bits += 640 + (
            14 * weight.numel()
            if width == PLAIN_BITS
            else 10 * len(weight)
            + entropy_bits(to_codes(weight, row_steps(weight, k, width), width))
        )
    return int(bits / 8)


def bisect_k(state: Mapping[str, Tensor], target: float, cfg: Config) -> float:
    """The least k (the finest steps) whose predicted size is at most `target` bytes, or the largest there is."""
    at = bisect.bisect_left(K_GRID, True, key=lambda k: predicted_bytes(state, k, cfg) <= target)
    return K_GRID[min(at, len(K_GRID) - 1)]


def gptq_codes(
    weight: Tensor, hessian: Tensor, step: Tensor, bits: int, block: int = 128
) -> Tensor:
    """Codes on the same grid, each column's rounding error pushed onto the columns after it so that the layer's output
    moves least (GPTQ, arXiv 2210.17323). hessian: sum of x x^T over the layer's inputs."""
    damping = torch.full(
        (len(hessian),), float(0.01 * hessian.diagonal().mean() + 1e-8), device=hessian.device
    )
    order, h = torch.argsort(hessian.diagonal(), descending=True), hessian.float() + damping.diag()
    w, h = weight.float()[:, order].clone(), h[order][:, order]
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    codes = torch.empty_like(w)
    for start in range(0, w.size(1), block):
        end = min(start + block, w.size(1))
        errors = torch.zeros_like(w[:, start:end])
        for i in range(start, end):
            codes[:, i : i + 1] = to_codes(w[:, i : i + 1], step, bits)
            errors[:, i - start] = ((w[:, i : i + 1] - codes[:, i : i + 1] * step) / inverse[i, i])[
                :, 0
            ]
            w[:, i:end] -= errors[:, i - start, None] * inverse[i, i:end]
        w[:, end:] -= errors @ inverse[start:end, end:]
    return codes[:, torch.argsort(order)]


# ==== CODECS ==========================================================================================================
# Each maps a list of byte matrices ("planes") to bytes and back, and trusts nothing that it reads. The entropy coder's
# tables are integers, so that any language can decode it: docs/ARTIFACT.md says how.
Planes = list[np.ndarray]
compress_brotli = functools.partial(brotli.compress, quality=11, lgwin=24)
# Entries of a frequency table are bytes read as small floats: exact to 31, then 4 mantissa bits.
CODED = np.arange(256)
WEIGHTS = np.where(CODED < 16, CODED, (16 + CODED % 16) << np.maximum(CODED // 16 - 1, 0)).astype(
    np.int64
)
TABLE_SUM = (
    2**24 - 256
)  # constriction adds 1 to each of the 256 counts that it is given; the whole is 2^24
BOTTOM = np.array(
    [0x59415746], np.uint32
)  # of the coder's stack: found again, nothing was lost above it


class CodecError(ValueError):
    """The payload cannot have come from the encoder."""


class Codec(NamedTuple):
    """A lossless pair over non-empty planes; `unpack` fills those that it is given."""

    name: str
    pack: Callable[[Planes], bytes]
    unpack: Callable[[bytes, Planes], None]

    def encode(self, planes: Planes) -> bytes:
        full = [p for p in planes if p.size]
        return self.pack(full) if full else b""

    def decode(self, payload: bytes, shapes: list[tuple[int, int]]) -> Planes:
        planes = [np.empty(shape, np.uint8) for shape in shapes]
        full = [p for p in planes if p.size]
        need(full or not payload, "bytes for no symbols", CodecError)
        try:
            if full:
                self.unpack(payload, full)
        except (zstandard.ZstdError, brotli.error) as e:
            raise CodecError(f"{self.name}: {e}") from None
        return planes


def joined(planes: Planes) -> bytes:
    return b"".join(p.tobytes() for p in planes)


def fill(planes: Planes, data: bytes) -> None:
    need(len(data) == sum(p.size for p in planes), "wrong number of symbols", CodecError)
    parts = np.split(np.frombuffer(data, np.uint8), np.cumsum([p.size for p in planes])[:-1])
    for p, part in zip(planes, parts, strict=True):
        p.flat = part


def pack_zstd(planes: Planes) -> bytes:
    # The window (at most 32 MiB) is what a decoder must allocate; matches under 7 bytes only cost here.
    window = min(max(sum(p.size for p in planes).bit_length(), 10), 25)
    settings = zstandard.ZstdCompressionParameters.from_level(22, window_log=window, min_match=7)
    return zstandard.ZstdCompressor(compression_params=settings).compress(joined(planes))


def unpack_zstd(payload: bytes, planes: Planes) -> None:
    # Decoding allocates what the frame declares, so look at that first.
    declared = zstandard.get_frame_parameters(payload).content_size
    need(declared == sum(p.size for p in planes), "zstd: wrong size", CodecError)
    fill(
        planes,
        zstandard.ZstdDecompressor(max_window_size=2**25).decompress(
            payload, allow_extra_data=False
        ),
    )


def decompress_brotli(payload: bytes, limit: int) -> bytes:
    """One whole brotli stream; gives up soon after `limit` bytes."""
    decoder = brotli.Decompressor()
    data = decoder.process(payload, output_buffer_limit=limit + 1)
    need(decoder.is_finished() and len(data) <= limit, "brotli: truncated or too long", CodecError)
    return data


def units_of(plane: np.ndarray, layout: int) -> np.ndarray:
    """The runs that share a frequency table: 0 the whole plane, 1 its rows, 2 its columns."""
    return (plane.reshape(1, -1), plane, plane.T)[layout]


def best_layout(plane: np.ndarray) -> int:
    """The axis along which code lengths vary more than chance would have it, or 0."""
    counts = np.bincount(plane.ravel(), minlength=256)
    bits = -np.log2(np.maximum(counts, 1) / plane.size).astype(np.float32)[plane]
    gains = [
        bits.mean(axis=a).var() - bits.var() / plane.shape[a] if plane.shape[a] >= 32 else 0.0
        for a in (1, 0)
    ]
    return int(np.argmax([0.0, *gains]))


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Bits of every symbol under each class; an unseen one costs the coder's 24."""
    p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -np.log2(np.maximum(p, 2.0**-24)).astype(np.float32)


def cluster(counts: np.ndarray, classes: int) -> np.ndarray:
    """Entropy-constrained k-means: a class for each unit, so that symbols and class ids cost the fewest bits."""
    mean = counts @ code_lengths(counts.sum(axis=0, keepdims=True))[0] / counts.sum(axis=1)
    ids = np.empty(len(counts), np.int64)
    ids[np.argsort(mean, kind="stable")] = np.arange(len(counts)) * classes // len(counts)
    for _ in range(12 if classes > 1 else 0):
        sums = np.stack([counts[ids == c].sum(axis=0, dtype=np.float64) for c in range(classes)])
        share = np.maximum(np.bincount(ids, minlength=classes), 0.01) / len(ids)
        ids = (counts @ code_lengths(sums).T - np.log2(share).astype(np.float32)).argmin(axis=1)
    return np.unique(ids, return_inverse=True)[1]


def coder_models(tables: np.ndarray) -> list:
    """Models of byte tables, by integers alone; what flooring loses goes to the mode."""
    weights = WEIGHTS[tables]
    need(weights.any(axis=1).all(), "ans: empty table", CodecError)
    counts = weights * TABLE_SUM // weights.sum(axis=1, keepdims=True)
    counts[np.arange(len(counts)), tables.argmax(axis=1)] += TABLE_SUM - counts.sum(axis=1)
    # constriction scales these by exactly 1.0 (their partial sums are integers below 2^24): nothing is rounded.
    return [
        constriction.stream.model.Categorical(row, perfect=False, lazy=False)
        for row in counts.astype(np.float64)
    ]


def coding_order(units: Planes, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Plane by plane and class by class: (class, units of the plane, which of them)."""
    for u, own in zip(units, np.split(ids, np.cumsum([len(u) for u in units])[:-1]), strict=True):
        yield from ((int(c), u, np.flatnonzero(own == c)) for c in np.unique(own))


def pack_ans(planes: Planes) -> bytes:
    layouts = [best_layout(p) for p in planes]
    units = [units_of(p, layout) for p, layout in zip(planes, layouts, strict=True)]
    counts = np.concatenate(
        [
            np.bincount((np.arange(len(u))[:, None] * 256 + u).ravel(), minlength=256 * len(u))
            .astype(np.int32)
            .reshape(-1, 256)
            for u in units
        ]
    )
    used, trials = counts[:, counts.any(axis=0)].astype(np.float32), []
    for classes in (1, 4, 16, 64):  # keep as many as pay, with tables and ids counted
        ids = cluster(used, classes)
        sums = np.stack([counts[ids == c].sum(axis=0) for c in range(ids.max() + 1)])
        scaled = sums * np.minimum(1, WEIGHTS[-1] / sums.max(axis=1, keepdims=True))
        tables = np.searchsorted((WEIGHTS[1:] + WEIGHTS[:-1]) / 2, scaled).astype(np.uint8)
        side = compress_brotli(
            bytes([len(tables), *layouts, *np.diff(tables.ravel(), prepend=np.uint8(0)), *ids])
        )
        trials.append((8 * len(side) + (sums * code_lengths(sums)).sum(), side, ids, tables))
    _, side, ids, tables = min(trials, key=lambda trial: trial[0])
    coder, models = constriction.stream.stack.AnsCoder(BOTTOM), coder_models(tables)
    for c, u, rows in reversed(list(coding_order(units, ids))):  # a stack: last in, first out
        coder.encode_reverse(u[rows].ravel().astype(np.int32), models[c])
    return len(side).to_bytes(4, "little") + side + coder.get_compressed().astype("<u4").tobytes()


def unpack_ans(payload: bytes, planes: Planes) -> None:
    end = 4 + int.from_bytes(payload[:4], "little")
    need(end <= len(payload) and (len(payload) - end) % 4 == 0, "ans: truncated", CodecError)
    limit = (
        1 + len(planes) + 255 * 256 + sum(max(p.shape) for p in planes)
    )  # classes, layouts, tables, ids
    side = np.frombuffer(decompress_brotli(payload[4:end], limit), np.uint8)
    layouts = side[1 : 1 + len(planes)]
    need(len(layouts) == len(planes) and layouts.max() <= 2, "ans: bad layout", CodecError)
    units = [units_of(p, layout) for p, layout in zip(planes, layouts, strict=True)]
    deltas, ids = np.split(side[1 + len(planes) :], [256 * int(side[0])])
    need(
        len(ids) == sum(len(u) for u in units) and ids.max() < side[0],
        "ans: bad classes",
        CodecError,
    )
    words = np.frombuffer(payload, "<u4", offset=end).astype(np.uint32)
    need(
        len(words) and words[-1], "ans: no state", CodecError
    )  # constriction allows no zero on top
    models = coder_models(np.cumsum(deltas, dtype=np.uint8).reshape(-1, 256))
    coder = constriction.stream.stack.AnsCoder(words)
    for c, u, rows in coding_order(units, ids):
        u[rows] = coder.decode(models[c], rows.size * u.shape[1]).reshape(rows.size, -1)
    need(np.array_equal(coder.get_compressed(), BOTTOM), "ans: damaged symbols", CodecError)


CODECS = {
    codec.name: codec
    for codec in (
        Codec("zstd", pack_zstd, unpack_zstd),
        Codec("ans", pack_ans, unpack_ans),
        Codec(
            "brotli",
            lambda planes: compress_brotli(joined(planes)),
            lambda payload, planes: fill(
                planes, decompress_brotli(payload, sum(p.size for p in planes))
            ),
        ),
    )
}

# ==== ARTIFACT ========================================================================================================
# Prelude, JSON header, payload, tokenizer: docs/ARTIFACT.md. Nothing is unpickled, no size is believed unchecked.
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"FAIRWAY\x00", 1
PRELUDE = struct.Struct("<8sII32s")  # magic, version, bytes of the header, SHA-256 of the header
MOST_FILE_BYTES, MOST_HEADER_BYTES, MOST_WEIGHTS, MOST_TOKENIZER_BYTES = (
    1 << 27,
    1 << 20,
    48_000_000,
    1 << 23,
)
MODEL_FIELDS = names_with_role(Config, "model")
HEADER_KINDS = {
    "model": dict,
    "looping": bool,
    "k": float,
    "codec": str,
    "tensors": dict,
    "payload_bytes": int,
    "payload_sha256": str,
    "tokenizer_bytes": int,
    "tokenizer_sha256": str,
}


class ArtifactError(UserError):
    """An artifact that is damaged, hostile, or not what it should be."""


class Artifact(NamedTuple):
    """What an artifact holds; `weights` are as the quantiser left them, `tokenizer` a SentencePiece model or empty."""

    config: Config
    weights: dict[str, Tensor]
    tokenizer: bytes
    header: dict[str, Any]


def byte_planes(values: np.ndarray) -> np.ndarray:
    """16-bit values as two rows, high bytes and low bytes: they compress 8 % better apart."""
    raw = np.ascontiguousarray(values).view("<u2").ravel()
    return np.stack([raw >> 8, raw & 255]).astype(np.uint8)


def planes_of(rounded: Mapping[str, Rounded]) -> Planes:
    """The payload before coding: a plane of codes and one of bf16 steps for a matrix, one of fp16 for the rest."""
    planes = []
    for _, values, steps in rounded.values():
        if steps is None:
            planes.append(byte_planes(values.cpu().numpy()))
        else:
            planes += [
                values.to("cpu", torch.int8).numpy().view(np.uint8),
                byte_planes((steps.cpu().numpy().view("<u4") >> 16).astype("<u2")),
            ]
    return planes


def encode_artifact(
    rounded: Mapping[str, Rounded],
    k: float,
    cfg: Config,
    looping: bool,
    codec: str,
    tokenizer: bytes,
) -> bytes:
    payload = CODECS[codec].encode(planes_of(rounded))
    inside = compress_brotli(tokenizer) if cfg.embed_tokenizer else b""
    header = dict(
        model={name: getattr(cfg, name) for name in MODEL_FIELDS},
        looping=looping,
        k=k,
        codec=codec,
        tensors={n: [r.bits, *r.values.shape] for n, r in rounded.items()},
        payload_bytes=len(payload),
        payload_sha256=hashlib.sha256(payload + inside).hexdigest(),
        tokenizer_bytes=len(inside),
        tokenizer_sha256=hashlib.sha256(tokenizer).hexdigest(),
    )
    text = json.dumps(header, separators=(",", ":")).encode()
    prelude = PRELUDE.pack(
        ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), hashlib.sha256(text).digest()
    )
    return prelude + text + payload + inside


def read_artifact(path: str | Path) -> Artifact:
    """Check everything, then decode: ends in an Artifact or in ArtifactError."""
    try:
        with open(path, "rb") as f:
            header = read_header(f, os.path.getsize(path))
            payload, inside = f.read(header["payload_bytes"]), f.read(header["tokenizer_bytes"])
        checksum = hashlib.sha256(payload + inside).hexdigest()
        need(
            checksum == header["payload_sha256"],
            "the payload does not match its checksum: damaged",
            ArtifactError,
        )
        cfg, shapes = header_config(header), []
        for bits, *shape in header["tensors"].values():
            shapes += (
                [(2, math.prod(shape))] if bits == PLAIN_BITS else [tuple(shape), (2, shape[0])]
            )
        weights = dict(
            read_weights(header["tensors"], iter(CODECS[header["codec"]].decode(payload, shapes)))
        )
        tokenizer = decompress_brotli(inside, MOST_TOKENIZER_BYTES) if inside else b""
        same = not inside or hashlib.sha256(tokenizer).hexdigest() == header["tokenizer_sha256"]
        need(same, "the tokenizer inside is not the one that the header names", ArtifactError)
        return Artifact(cfg, weights, tokenizer, header)
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror})") from None
    except (UserError, CodecError, brotli.error) as e:
        raise ArtifactError(f"{path}: {e}") from None


def read_header(f: BinaryIO, size: int) -> dict[str, Any]:
    """Prelude and JSON header, checked in form, size and checksum."""
    start = f.read(PRELUDE.size)
    need(
        len(start) == PRELUDE.size and start.startswith(ARTIFACT_MAGIC),
        "not a Fairway artifact",
        ArtifactError,
    )
    _, version, length, checksum = PRELUDE.unpack(start)
    need(size <= MOST_FILE_BYTES, f"{size} bytes, more than any artifact has", ArtifactError)
    need(
        version == ARTIFACT_VERSION,
        f"version {version}; this reader knows {ARTIFACT_VERSION}",
        ArtifactError,
    )
    left = size - PRELUDE.size - length
    need(
        length <= MOST_HEADER_BYTES and left >= 0,
        f"no room for a header of {length} bytes: damaged",
        ArtifactError,
    )
    text = f.read(length)
    need(
        hashlib.sha256(text).digest() == checksum,
        "the header does not match its checksum: damaged",
        ArtifactError,
    )
    try:
        header = json.loads(
            text, object_pairs_hook=lambda p: dict(p) if len(dict(p)) == len(p) else p
        )  # no key twice
        json.dumps(header, allow_nan=False)  # nor NaN, nor infinity
    except (ValueError, RecursionError):
        raise ArtifactError("the header is not JSON") from None
    right = type(header) is dict and {n: type(v) for n, v in header.items()} == HEADER_KINDS
    need(right, f"the header must hold exactly {', '.join(HEADER_KINDS)}", ArtifactError)
    need(
        header["codec"] in CODECS,
        f"codec {header['codec']!r:.20} is not one of {', '.join(CODECS)}",
        ArtifactError,
    )
    parts = header["payload_bytes"], header["tokenizer_bytes"]
    need(
        min(parts) >= 0 and sum(parts) == left,
        f"{left} bytes follow, not {sum(parts)}: cut short",
        ArtifactError,
    )
    return header


def header_config(header: Mapping[str, Any]) -> Config:
    """The model's settings, and proof that they call for exactly the tensors that are there."""
    model, tensors = header["model"], header["tensors"]
    need(
        set(model) == set(MODEL_FIELDS),
        f"the model must state exactly {', '.join(MODEL_FIELDS)}",
        ArtifactError,
    )
    cfg = Config(
        **model,
        train_batch_tokens=8 * model["train_seq_len"] if type(model["train_seq_len"]) is int else 8,
    )
    need(
        cfg.num_layers <= len(tensors),
        f"{cfg.num_layers} layers, but {len(tensors)} tensors",
        ArtifactError,
    )
    need(
        cfg.train_seq_len * cfg.model_dim <= MOST_WEIGHTS,
        "TRAIN_SEQ_LEN x MODEL_DIM is out of range",
        ArtifactError,
    )
    with torch.device("meta"):
        expected = {n: [tensor_bits(n, cfg), *p.shape] for n, p in GPT(cfg).named_parameters()}
    odd = next(
        (n for n in [*expected, *tensors] if repr(expected.get(n)) != repr(tensors.get(n))), None
    )
    need(
        odd is None,
        f"tensor {odd!r:.60} is {tensors.get(odd)!s:.60}, not {expected.get(odd)}",
        ArtifactError,
    )
    weights = sum(math.prod(shape) for _, *shape in expected.values())
    need(
        weights <= MOST_WEIGHTS,
        f"{weights} weights; at most {MOST_WEIGHTS} are read",
        ArtifactError,
    )
    return cfg


def read_weights(
    tensors: Mapping[str, list[int]], planes: Iterator[np.ndarray]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors again; values that the quantiser cannot have written are damage."""
    for name, (bits, *shape) in tensors.items():
        first = next(planes)
        if bits == PLAIN_BITS:
            weight = torch.from_numpy(joined_values(first).view("<f2").astype(np.float32)).reshape(
                shape
            )
        else:
            codes, steps = (
                torch.from_numpy(first.view(np.int8)),
                joined_values(next(planes)).astype("<u4") << 16,
            )
            need(
                int(codes.min()) >= -levels(bits) and int(codes.max()) <= levels(bits),
                f"tensor {name!r} has codes outside {bits} bits",
                ArtifactError,
            )
            weight = codes * torch.from_numpy(steps.view("<f4"))[:, None]
        need(bool(torch.isfinite(weight).all()), f"tensor {name!r} is not finite", ArtifactError)
        yield name, weight


def joined_values(planes: np.ndarray) -> np.ndarray:
    return (planes[0].astype("<u2") << 8) | planes[1]


def build_model(artifact: Artifact, device: torch.device | str = "cpu") -> GPT:
    """The model that an artifact describes: strict, every tensor named once."""
    model = GPT(artifact.config)
    model.load_state_dict(artifact.weights, strict=True)
    model.looping = artifact.header["looping"]
    return model.placed(device)


# ==== MODEL ===========================================================================================================
# Leaf to root. Parameters stay fp32; autocast chooses what a device multiplies in.
def normalised(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def rope_tables(length: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, dims/2], of float64 angles: bf16 frequencies collapse half of 1,024 positions."""
    frequency = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHTC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """RoPE on the first 2R channels of each head; the others pass."""
    half = cos_TR.size(-1)
    a, b, rest = x_BHTC.split([half, half, x_BHTC.size(-1) - 2 * half], dim=-1)
    turned = torch.cat([a * cos_TR + b * sin_TR, b * cos_TR - a * sin_TR], dim=-1).type_as(x_BHTC)
    return torch.cat([turned, rest], dim=-1)


def attend(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """Causal attention, the one place that does it; PyTorch picks the best kernel that it has."""
    grouped = q_BHTC.size(1) != k_BGTC.size(1)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=grouped
    )


def without_own_value(y_BHTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """XSA (#265): take out of each head's output its part along the position's own value."""
    B, H, T, C = y_BHTC.shape
    y, own = y_BHTC.reshape(B, v_BGTC.size(1), -1, T, C), F.normalize(v_BGTC, dim=-1).unsqueeze(2)
    return (y - (y * own).sum(-1, keepdim=True) * own).view(B, H, T, C)


class Attention(nn.Module):
    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        D, H, G, C = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.width, self.exclusive = C, layer >= cfg.num_layers - cfg.xsa_last_n
        self.q, self.k, self.v, self.proj = (
            linear(D, H * C),
            linear(D, G * C),
            linear(D, G * C),
            linear(D, D),
        )
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.gate = (
            nn.Parameter(torch.zeros(H, min(12, D))) if cfg.attn_gate else None
        )  # 12 inputs do (#1787)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attention: Callable) -> Tensor:
        B, T, D = x_BTD.shape
        q, k, v = (
            part(x_BTD).view(B, T, -1, self.width).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = rotate(normalised(q), *rope), rotate(normalised(k), *rope)
        y = attention(q * self.q_gain.type_as(q)[:, None, None], k, v)
        y = (without_own_value(y, v) if self.exclusive else y).transpose(1, 2)
        if self.gate is not None:  # twice a sigmoid: one at the start
            y = (
                y
                * (2 * torch.sigmoid(F.linear(x_BTD[..., : self.gate.size(1)], self.gate))).type_as(
                    y
                )[..., None]
            )
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden, self.slope = int(cfg.mlp_mult * cfg.model_dim), cfg.leaky_slope
        self.fc, self.proj = linear(cfg.model_dim, hidden), linear(hidden, cfg.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x_BTD), self.slope).square())


class Block(nn.Module):
    """Attention, then MLP, on a mix of the stream with the embedding x0; or each in a lane of its own."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp, ones = Attention(cfg, layer), MLP(cfg), torch.ones(cfg.model_dim)
        self.attn_scale, self.mlp_scale = nn.Parameter(ones.clone()), nn.Parameter(ones.clone())
        self.resid_mix = nn.Parameter(torch.stack([ones, 0 * ones]))
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        parallel = 0 < cfg.parallel_start_layer <= layer
        self.lane_mix = (
            nn.Parameter(torch.ones(2, 2)) if parallel else None
        )  # what lane i takes of output j

    def read(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """A sub-layer's input; on an extra pass, scaled and shifted for that pass (AdaLN)."""
        x = normalised(x) * self.norm_scale
        return (
            x if condition is None else x * (1 + condition[0]).type_as(x) + condition[1].type_as(x)
        )

    def forward(
        self, x: Tensor, lane: Tensor, x0: Tensor, rope, attention, condition
    ) -> tuple[Tensor, Tensor]:
        """Both lanes after this block; where they have not parted, one tensor stands for both."""
        keep, again = self.resid_mix.type_as(x)
        mixed = keep * x + again * x0
        attended = self.attn_scale.type_as(x) * self.attn(
            self.read(mixed, condition), rope, attention
        )
        if self.lane_mix is None:
            mixed = mixed + attended
            mixed = mixed + self.mlp_scale.type_as(x) * self.mlp(self.read(mixed, condition))
            new = (mixed, mixed)
        else:
            written, to = (
                self.mlp_scale.type_as(x) * self.mlp(self.read(lane, condition)),
                self.lane_mix.type_as(x),
            )
            new = tuple(
                old + to[i, 0] * attended + to[i, 1] * written
                for i, old in enumerate((mixed, lane))
            )
        if condition is None:
            return new
        more = condition[2].type_as(x)  # than a plain pass: written so that zero is exactly none
        return new[0] + more * (new[0] - x), new[1] + more * (new[1] - lane)


class BigramHash(nn.Module):
    """An embedding of the last two tokens, hashed into a small table."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj, self.scale = (
            linear(cfg.bigram_dim, cfg.model_dim),
            nn.Parameter(torch.tensor(0.05)),
        )

    def buckets(self, tokens_BT: Tensor) -> Tensor:
        """(36313 cur xor 27191 prev) mod (buckets - 1); the first position has the last bucket."""
        last = self.table.num_embeddings - 1
        return F.pad(
            torch.bitwise_xor(36313 * tokens_BT[:, 1:], 27191 * tokens_BT[:, :-1]) % last,
            (1, 0),
            value=last,
        )

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.proj(self.table(self.buckets(tokens_BT))) * self.scale


class SmearGate(nn.Module):
    """Each channel takes a learned part of the embedding before it; nothing crosses a BOS."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        before = torch.cat([x_BTD[:, :1], x_BTD[:, :-1]], dim=1)
        before = torch.where((tokens_BT == BOS_ID)[..., None], x_BTD, before)
        return x_BTD + torch.sigmoid(self.gate).type_as(x_BTD) * (before - x_BTD)


class GPT(nn.Module):
    """U-Net of blocks over tied embeddings: the first half of the passes feeds the second by skips."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.looping = (
            cfg,
            False,
        )  # looping: set once the run is far enough for depth recurrence
        self.stream_dtype = torch.float32  # of activations between blocks
        self.tok_emb = nn.Embedding(cfg.vocab_size, cfg.model_dim)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = SmearGate(cfg.model_dim) if cfg.smear_gate else None
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        self.skip_weights = nn.Parameter(
            torch.ones(max(len(self.passes(on)) // 2 for on in (0, 1)), cfg.model_dim)
        )
        conditions = (
            cfg.num_loops,
            cfg.loop_end - cfg.loop_start + 1,
            3,
            cfg.model_dim,
        )  # zero: as a plain pass
        self.loop_conditions = (
            nn.Parameter(torch.zeros(conditions)) if cfg.num_loops and cfg.loop_adaln else None
        )
        cos, sin = rope_tables(
            cfg.train_seq_len, cfg.rope_dims or cfg.model_dim // cfg.num_heads, cfg.rope_base
        )
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def passes(self, looping: bool) -> list[tuple[int, int]]:
        """(layer, extra pass) in the order in which they run: 0 1 2 3 4 5 3 4 5 3 4 5 6 ..."""
        cfg, once = self.cfg, [(layer, 0) for layer in range(self.cfg.num_layers)]
        again = [
            (layer, extra)
            for extra in range(1, (cfg.num_loops if looping else 0) + 1)
            for layer in range(cfg.loop_start, cfg.loop_end + 1)
        ]
        return once[: cfg.loop_end + 1] + again + once[cfg.loop_end + 1 :]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x = self.tok_emb(tokens_BT)
        x = normalised(x if self.bigram is None else x + self.bigram(tokens_BT)).to(
            self.stream_dtype
        )
        return x if self.smear is None else self.smear(x, tokens_BT)

    def placed(self, device: torch.device | str) -> GPT:
        self.stream_dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return self.to(device)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V] in fp32: what each position says of the token after it."""
        T = tokens_BT.size(1)
        need(
            T <= len(self.cos),
            f"{T} tokens in a sequence, but the model's TRAIN_SEQ_LEN is {len(self.cos)}",
        )
        return self.from_embedded(self.embed(tokens_BT), (self.cos[:T], self.sin[:T]))

    def from_embedded(
        self, x0: Tensor, rope: tuple[Tensor, Tensor], attention: Callable = attend
    ) -> Tensor:
        """`logits` of embeddings: with other rotations, or with an attention that also sees what was cached."""
        x, lane, order, skips = x0, x0, self.passes(self.looping), []
        for i, (layer, extra) in enumerate(order):
            if i >= len(order) // 2 and skips:
                skip = self.skip_weights[i - len(order) // 2].type_as(x) * skips.pop()
                x, lane = x + skip, lane + skip
            condition = (
                None
                if self.loop_conditions is None or not extra
                else (self.loop_conditions[extra - 1, layer - self.cfg.loop_start])
            )
            x, lane = self.blocks[layer](x, lane, x0, rope, attention, condition)
            if i < len(order) // 2:
                skips.append(x)
        x = F.linear(normalised((x + lane) / 2), self.tok_emb.weight)
        return self.cfg.logit_softcap * torch.tanh(x.float() / self.cfg.logit_softcap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy of every target, [B, T], in nats."""
        logits_VN = self.logits(tokens_BT).flatten(0, 1)
        return F.cross_entropy(logits_VN, targets_BT.flatten(), reduction="none").view_as(
            targets_BT
        )


@torch.no_grad()
def initialise(model: GPT, cfg: Config) -> None:
    """Weights from the seed alone, drawn on the CPU: the same on every device and rank."""
    torch.manual_seed(cfg.seed)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = torch.zeros(module.weight.shape)
        if name.endswith((".attn.proj", ".mlp.proj")):
            pass  # nothing: each block begins as the identity
        elif cfg.ortho_init and min(weight.shape) >= 64:
            nn.init.orthogonal_(
                weight, gain=(2 * cfg.num_layers) ** -0.5 if name.endswith("proj") else 1.0
            )
        else:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        module.weight.copy_(weight)
    model.tok_emb.weight.copy_(torch.randn(model.tok_emb.weight.shape) * cfg.tied_embed_init_std)
    if model.bigram is not None:
        model.bigram.table.weight.zero_()  # not the projection too: that would never learn


# ==== OPTIMISERS ======================================================================================================
# Muon for matrices, AdamW for embeddings and for everything else; each parameter in exactly one of them.
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)]  # one quintic, again and again (Keller Jordan)
POLAR_EXPRESS = [  # the best polynomial for each step (arXiv 2505.16932)
    (8.156554524902, -22.483292925578, 15.878769915207),
    (4.042929935167, -2.808917465909, 0.500017845105),
    (3.891667802293, -2.772484153218, 0.506064817850),
    (3.285753657756, -2.368129493343, 0.464490242330),
    (2.346541325860, -1.709782838269, 0.423235511693),
]


def orthogonalised(g: Tensor, steps: int, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Matrices [n, rows, cols] with their singular values pushed to about one."""
    x = g.bfloat16() if g.is_cuda else g.float()
    x = x.mT if (tall := x.size(-2) > x.size(-1)) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay. Each rank does part of the matrices of a shape,
    and one all-reduce joins them; every rank keeps every momentum, so that checkpoints are whole."""

    def __init__(self, params: list[nn.Parameter], cfg: Config, rt: Runtime):
        super().__init__(params, dict(lr=cfg.matrix_lr, momentum=cfg.muon_momentum, wd=cfg.muon_wd))
        self.rt, self.steps, self.row_normalize = rt, cfg.muon_backend_steps, cfg.muon_row_normalize
        self.coefficients = POLAR_EXPRESS if cfg.muon_polar_express else NEWTON_SCHULZ

    @torch.no_grad()
    def step(self) -> None:
        group, by_shape = self.param_groups[0], {}
        for p in group["params"]:
            if p.grad is not None:
                by_shape.setdefault(p.shape, []).append(p)
        moved = (
            [self.direction(p, group["momentum"]) for p in params] for params in by_shape.values()
        )
        stacks = [self.share(torch.stack(directions)) for directions in moved]
        all_reduce_flat(stacks, self.rt)
        for (shape, params), stack in zip(by_shape.items(), stacks, strict=True):
            torch._foreach_mul_(params, 1 - group["lr"] * group["wd"])
            torch._foreach_add_(
                params, list(stack.float()), alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
            )

    def direction(self, p: nn.Parameter, momentum: float) -> Tensor:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        moved = p.grad + momentum * buffer.mul_(momentum).add_(p.grad)
        return moved / (moved.norm(dim=1, keepdim=True) + 1e-7) if self.row_normalize else moved

    def share(self, stack: Tensor) -> Tensor:
        """This rank's matrices orthogonalised, zeros for the others'."""
        whole = torch.zeros_like(stack, dtype=torch.bfloat16 if stack.is_cuda else torch.float32)
        mine = whole[self.rt.mine]
        if len(mine):
            mine.copy_(orthogonalised(stack[self.rt.mine], self.steps, self.coefficients))
        return whole


def make_optimisers(model: GPT, cfg: Config, rt: Runtime) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW]; fails if a parameter is in no group, or in two."""
    named = dict(model.named_parameters())
    embeddings = [n for n in named if n in ("tok_emb.weight", "bigram.table.weight")]
    matrices = [n for n in named if n.endswith(".weight") and n not in embeddings]
    scalars = [n for n in named if not n.endswith(".weight")]
    kinds = ((embeddings, cfg.tied_embed_lr, cfg.embed_wd), (scalars, cfg.scalar_lr, cfg.adam_wd))
    adam = torch.optim.AdamW(
        [dict(params=[named[n] for n in ns], lr=lr, weight_decay=wd) for ns, lr, wd in kinds],
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.adam_eps,
        fused=rt.device.type == "cuda",
    )
    optimisers = [Muon([named[n] for n in matrices], cfg, rt), adam]
    groups = [group for o in optimisers for group in o.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, named.values())), (
        "each exactly once"
    )
    for group in groups:
        group["peak_lr"] = group["lr"]
    return optimisers


# ==== SCHEDULES AND AVERAGES ==========================================================================================
# All depend on progress, 0 to 1: the part of the steps or of the wall clock that is used, whichever is further.
def progress_of(step: int, elapsed_s: float, cfg: Config) -> float:
    cap = cfg.max_wallclock_seconds - (cfg.gptq_reserve_seconds if cfg.gptq else 0)
    return max(step / cfg.iterations, elapsed_s / cap if cfg.max_wallclock_seconds else 0.0)


def lr_scale(progress: float, cfg: Config) -> float:
    """1, then linearly down to MIN_LR over the last WARMDOWN_FRAC of the run."""
    if progress <= 1 - cfg.warmdown_frac:
        return 1.0
    return cfg.min_lr + (1 - cfg.min_lr) * max(0.0, 1 - progress) / cfg.warmdown_frac


def momentum_at(step: int, cfg: Config) -> float:
    part = (
        min(1.0, step / cfg.muon_momentum_warmup_steps) if cfg.muon_momentum_warmup_steps else 1.0
    )
    return cfg.muon_momentum_warmup_start * (1 - part) + cfg.muon_momentum * part


class Averages:
    """SWA (mean of some late weights) and EMA, in fp32: sums in bf16 once cost a record 1.4 nats (#212)."""

    EMA_REFERENCE_STEPS = 7000  # EMA_DECAY means what it does in a run of that length

    def __init__(self):
        self.swa, self.ema, self.swa_count, self.seen = [], [], 0, 0.0

    @torch.no_grad()
    def update(self, params: list[nn.Parameter], step: int, progress: float, cfg: Config) -> None:
        if cfg.swa_start_frac < 1 and progress >= cfg.swa_start_frac and step % cfg.swa_every == 0:
            self.swa, self.swa_count = (
                self.swa or [torch.zeros_like(p) for p in params],
                self.swa_count + 1,
            )
            torch._foreach_add_(self.swa, params)
        if cfg.ema_decay:
            horizons = (
                (1 - cfg.ema_decay) * self.EMA_REFERENCE_STEPS * max(0.0, progress - self.seen)
            )
            self.ema, self.seen = self.ema or [p.detach().clone() for p in params], progress
            torch._foreach_lerp_(self.ema, params, 1 - math.exp(-horizons))

    def candidates(self) -> dict[str, list[Tensor]]:
        return {
            n: v
            for n, v in (("swa", [s / self.swa_count for s in self.swa]), ("ema", self.ema))
            if v
        }


@contextlib.contextmanager
def weights_replaced(params: list[nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Run something with other weights in the model, then put its own back, to the bit."""
    own = [p.detach().clone() for p in params]
    with torch.no_grad():
        torch._foreach_copy_(params, values)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, own)


def rounded_parameters(
    model: GPT,
    k: float,
    values: list[Tensor] | None = None,
    hessians: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:
    """What the artifact would hold at this k for each parameter, in order."""
    names, own = zip(*model.named_parameters(), strict=True)
    rounded = quantised(dict(zip(names, values or own, strict=True)), k, model.cfg, hessians or {})
    return [r.weight() for r in rounded.values()]


# ==== RUNTIME: devices, ranks, log ====================================================================================
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}  # dense bf16


class Runtime(NamedTuple):
    rank: int
    world: int
    device: torch.device
    name: str

    @property
    def mine(self) -> slice:
        return slice(self.rank, None, self.world)  # of any work that ranks share

    def autocast(self):
        return (
            torch.autocast("cuda", torch.bfloat16)
            if self.device.type == "cuda"
            else contextlib.nullcontext()
        )


def best_device() -> str:
    return (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )


def set_up_runtime(cfg: Config, env: Mapping[str, str]) -> Runtime:
    rank, world, local = (
        int(env.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    need(
        8 % world == 0,
        f"WORLD_SIZE is {world}; it must divide 8, so that a step is the same on any number of them",
    )
    kind = cfg.device or best_device()
    need(
        kind in ("cpu", best_device()),
        f"DEVICE is {kind}, but PyTorch sees only {best_device()}; unset it",
    )
    if kind == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    name = torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind} {platform.machine()}"
    return Runtime(rank, world, device, name)


def all_reduce_flat(tensors: list[Tensor], rt: Runtime) -> None:
    """Sum over ranks, in place, in one message. Not DDP: unused parameters and swapped weights need no special case."""
    if rt.world == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


class Log:
    """The challenge's `key:value` lines on the screen and in logs/RUN_ID.txt; the same events as JSON lines in
    logs/RUN_ID.jsonl and, when asked for, in Weights & Biases; their sum in runs.jsonl. Rank 0 alone writes."""

    def __init__(self, cfg: Config, rt: Runtime, run_id: str):
        self.run_id, self.on, self.wandb, self.out, self.summary = (
            run_id,
            rt.rank == 0,
            None,
            Path(cfg.out_dir),
            {},
        )
        if not self.on:
            return
        (self.out / "logs").mkdir(parents=True, exist_ok=True)
        self.text, self.events = (
            open(
                self.out / "logs" / (run_id + suffix),
                "a" if cfg.resume else "w",
                encoding="utf-8",
                buffering=1,
            )
            for suffix in (".txt", ".jsonl")
        )
        if cfg.wandb_mode in ("online", "offline"):
            import wandb

            self.wandb = wandb.init(
                project="fairway", name=run_id, mode=cfg.wandb_mode, dir=self.out / "logs"
            )

    def __call__(self, line: str, event: str = "", screen: bool = True, **data: Any) -> None:
        if not self.on:
            return
        if event in ("start", "val", "artifact", "final"):
            self.summary[event] = data
        with contextlib.suppress(
            OSError
        ):  # a full disk or a closed pipe costs lines of the log, never the run
            self.text.write(line + "\n")
            if event:
                self.events.write(
                    json.dumps({"event": event, "time": round(time.time(), 3), **data}) + "\n"
                )
        if screen:
            with contextlib.suppress(OSError):
                print(line, flush=True)
        numbers = {f"{event}/{n}": v for n, v in data.items() if type(v) in (int, float)}
        if self.wandb and numbers:
            self.wandb.log(numbers)
        if self.wandb and event == "start":
            self.wandb.config.update(data["settings"])

    def close(self, artifact: Path | None = None) -> None:
        """One line more in the history: settings, hashes, scores, bytes, hardware and time of a run that has ended."""
        if not self.on:
            return
        line = (
            json.dumps({"time": round(time.time(), 3), "run_id": self.run_id, **self.summary})
            + "\n"
        )
        with (
            contextlib.suppress(OSError),
            open(self.out / "runs.jsonl", "a", encoding="utf-8") as f,
        ):
            f.write(line)
        if not self.wandb:
            return
        self.wandb.summary.update(self.summary)
        if artifact:
            self.wandb.log_artifact(str(artifact), name=f"model-{self.run_id}", type="model")
        self.wandb.finish()


def log_header(log: Log, cfg: Config, rt: Runtime, data: Data, preset: str) -> None:
    """Source, versions and hardware into the file; hashes of all that decides the run, everywhere."""
    source, settings = Path(__file__).read_text(encoding="utf-8"), dataclasses.asdict(cfg)
    smi = (
        subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
        if shutil.which("nvidia-smi")
        else ""
    )
    log(
        f"{source}\n{'=' * 100}\nRunning Python {sys.version}\nRunning PyTorch {torch.__version__}\n"
        f"{platform.platform()}\n{smi}\n{'=' * 100}\nsettings: {json.dumps(settings)}",
        screen=False,
    )
    texts = {
        "code": source.encode(),
        "settings": json.dumps(settings, sort_keys=True).encode(),
        "tokenizer": data.tokenizer_path.read_bytes(),
    }
    hashes = {name: hashlib.sha256(text).hexdigest() for name, text in texts.items()} | {
        "data": data.fingerprint
    }
    start = dict(run_id=log.run_id, preset=preset, device=rt.name, torch=str(torch.__version__))
    lines = (start, {f"{name}_sha256": value for name, value in hashes.items()})
    log(
        "\n".join(" ".join(f"{name}:{value}" for name, value in line.items()) for line in lines),
        "start",
        settings=settings,
        sha256=hashes,
        world_size=rt.world,
        python=sys.version,
        **start,
    )


def attention_backend(cfg: Config, rt: Runtime) -> str:
    dtype, width = (
        torch.bfloat16 if rt.device.type == "cuda" else torch.float32,
        cfg.model_dim // cfg.num_heads,
    )
    q, k = (
        torch.zeros(1, h, 64, width, device=rt.device, dtype=dtype)
        for h in (cfg.num_heads, cfg.num_kv_heads)
    )
    for backend in (
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.suppress(RuntimeError),
            sdpa_kernel([backend]),
        ):
            attend(q, k, k)
            return backend.name.lower()
    return "math"


# ==== EVALUATION ======================================================================================================
@torch.no_grad()
def mean_nats(
    loss_fn: Callable, tokens: np.ndarray, cfg: Config, rt: Runtime, label: str = ""
) -> float:
    """Mean cross-entropy of tokens[1:], each scored once, tail included, in windows side by side that ranks share."""
    length, rows, said = cfg.train_seq_len, max(1, cfg.val_batch_size // 8 // cfg.train_seq_len), 0
    starts, total = (
        np.arange(0, len(tokens) - 1, length)[rt.mine],
        torch.zeros((), dtype=torch.float64),
    )
    starts, began = (
        np.pad(starts, (0, -len(starts) % rows), constant_values=len(tokens)),
        time.perf_counter(),
    )
    for i in range(
        0, len(starts), rows
    ):  # all passes have one shape, so that compiled code serves every one
        places = starts[i : i + rows, None] + np.arange(length + 1)
        data = torch.from_numpy(tokens[np.minimum(places, len(tokens) - 1)].astype(np.int64)).to(
            rt.device
        )
        with rt.autocast():
            nats = loss_fn(data[:, :-1], data[:, 1:])
        total += nats.cpu().double()[torch.from_numpy(places[:, 1:] < len(tokens))].sum()
        part, seconds = (i + rows) / len(starts), time.perf_counter() - began
        if label and rt.rank == 0 and seconds > 5 * (said + 1):
            said = seconds // 5
            print(
                f"{label} {100 * part:.0f}% eta:{seconds / part - seconds:.0f}s",
                file=sys.stderr,
                flush=True,
            )
    all_reduce_flat(
        [total := total.to(rt.device) if rt.world > 1 else total], rt
    )  # MPS has no float64, nor company
    return float(total) / (len(tokens) - 1)


def bits_per_byte(nats_per_token: float, data: Data) -> float:
    return nats_per_token * (len(data.val) - 1) / math.log(2) / data.val_bytes


# ==== TRAINING ========================================================================================================
@dataclass
class Run:
    """What a run holds; a checkpoint keeps what is needed to go on from it."""

    cfg: Config
    rt: Runtime
    log: Log
    data: Data
    model: GPT
    loss_fn: Callable[[Tensor, Tensor], Tensor]  # the model, or its compiled form
    params: list[nn.Parameter]
    optimisers: list[torch.optim.Optimizer]
    stream: TokenStream
    averages: Averages
    step: int = 0
    train_s: float = 0.0  # until the clock was last started
    k: float = 0.0  # of the quantiser: predicted, then measured on the way
    qat: bool = False
    measured: bool = False  # the size, at mid-run
    clock: float | None = None
    loss: Tensor | None = None  # of the last step; read one step late, so that CUDA never waits
    signum: int = 0
    saved_at: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        return self.train_s + (time.perf_counter() - self.clock if self.clock is not None else 0.0)

    def set_clock(self, running: bool) -> None:
        if self.rt.device.type != "cpu":
            torch.accelerator.synchronize()
        self.train_s, self.clock = self.elapsed(), time.perf_counter() if running else None


def set_up(cfg: Config, rt: Runtime, data: Data, log: Log) -> Run:
    model = GPT(cfg).placed(rt.device)
    initialise(model, cfg)
    run = Run(
        cfg,
        rt,
        log,
        data,
        model,
        torch.compile(model) if cfg.compile else model,
        list(model.parameters()),
        make_optimisers(model, cfg, rt),
        TokenStream(data.train),
        Averages(),
    )
    count = sum(p.numel() for p in run.params)
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data.tokenizer_path}")
    log(
        f"train_loader:dataset:{data.folder.name} train_shards:{len(data.train)} tokens:{sum(map(len, data.train))}"
    )
    log(
        f"val_loader:shards pattern={data.folder}/*_val_*.bin tokens:{len(data.val) - 1} bytes:{data.val_bytes}"
    )
    shapes = {n: [*p.shape] for n, p in model.named_parameters()}
    log(f"model_params:{count}", "model", parameters=count, tensors=shapes)
    log(
        f"world_size:{rt.world} grad_accum_steps:{8 // rt.world}\nsdp_backends:{attention_backend(cfg, rt)}\n"
        f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}\ntie_embeddings:True "
        f"embed_lr:{cfg.tied_embed_lr} head_lr:0.0 matrix_lr:{cfg.matrix_lr} scalar_lr:{cfg.scalar_lr}\n"
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\nseed:{cfg.seed}"
    )
    noise = torch.Generator().manual_seed(
        0
    )  # rows as they will be once trained: codes depend on shape, not on scale
    predict_size(
        run,
        "before training",
        {n: torch.randn(shape, generator=noise) for n, shape in shapes.items()},
    )
    if cfg.compile:
        log("compile:torch.compile runs with the first step and takes about a minute")
    return run


CODE_STUB_BYTES = 4096  # two loader stubs of 1,450 bytes, and about 20 bytes a file for its name


def packed_code_bytes(files: Iterable[str | Path]) -> int:
    """Return the bytes that these source files count in a record, which ships them packed with LZMA."""
    sources = b"".join(Path(f).read_bytes() for f in files)
    return len(lzma.compress(sources, preset=9 | lzma.PRESET_EXTREME)) + CODE_STUB_BYTES


@functools.cache  # packing takes up to half a second, which the training clock must not pay
def code_bytes(cfg: Config) -> int:
    """Return the bytes of code that count against SIZE_BUDGET_BYTES: this file and EXTRA_CODE_FILES, packed."""
    named = [name.strip() for name in cfg.extra_code_files.split(",") if name.strip()]
    for name in named:
        need(Path(name).is_file(), f"EXTRA_CODE_FILES names {name}, which is no file")
    return packed_code_bytes([__file__, *named])


def size_target(cfg: Config) -> int:
    """Bytes that the artifact may have: the budget less margin and counted code."""
    return cfg.size_budget_bytes - cfg.size_margin_bytes - code_bytes(cfg)


def need_room(size: int, cfg: Config) -> None:
    over = size - size_target(cfg)
    need(
        over <= 0,
        f"the artifact has {size} bytes at the coarsest step, {over} more than SIZE_BUDGET_BYTES="
        f"{cfg.size_budget_bytes} leaves beside code and margin; lower NUM_LAYERS, MODEL_DIM or MLP_MULT",
    )


def predict_size(run: Run, when: str, state: Mapping[str, Tensor]) -> None:
    """Find the k that meets the budget; a model that never can is told so before it costs anything."""
    cfg, target = run.cfg, size_target(run.cfg)
    inside = (
        len(compress_brotli(run.data.tokenizer_path.read_bytes())) if cfg.embed_tokenizer else 0
    )
    run.k = bisect_k(state, target - inside, cfg)
    size = predicted_bytes(state, run.k, cfg) + inside
    run.log(
        f"size:predicted {when} k:{run.k:.3f} artifact:{size} bytes target:{target}",
        "size",
        when=when,
        k=run.k,
        predicted_bytes=size,
        target_bytes=target,
    )
    need_room(size, cfg)


def take_step(run: Run, progress: float) -> None:
    """One optimiser step: the same tokens and the same update whatever the number of ranks."""
    # Straight-through: gradients at the rounded weights, the update to those behind them. The switch is in the weights
    # themselves, so that compilation cannot freeze it, and rounding is the export's, not a copy of it.
    rounded = rounded_parameters(run.model, run.k) if run.qat else run.params
    with weights_replaced(run.params, rounded) if run.qat else contextlib.nullcontext():
        run.loss = accumulate_gradients(run)
    if run.cfg.grad_clip_norm:
        nn.utils.clip_grad_norm_(run.params, run.cfg.grad_clip_norm)
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(progress, run.cfg)
            if "momentum" in group:
                group["momentum"] = momentum_at(run.step, run.cfg)
        optimiser.step()
    run.step += 1


def accumulate_gradients(run: Run) -> Tensor:
    """Gradients of the whole batch's mean loss, summed over micro-batches and ranks; returns the plain loss."""
    cfg, rt, length, eighth = (
        run.cfg,
        run.rt,
        run.cfg.train_seq_len,
        run.cfg.train_batch_tokens // 8,
    )
    tokens, weights = run.stream.take(cfg.train_batch_tokens), None
    if cfg.byte_loss_alpha:  # a target's bytes over the batch's mean, blended with one
        count = run.data.table.count(tokens).astype(np.float32)
        weights = 1 - cfg.byte_loss_alpha + cfg.byte_loss_alpha * count / max(count.mean(), 1e-6)
    size = (
        min(eighth, max(1, cfg.micro_batch_tokens // length) * length)
        if cfg.micro_batch_tokens
        else eighth
    )
    # In float64 no order of adding changes the sum: one rank or eight take the same step, on a CPU to the bit.
    wide = torch.float64 if rt.device.type == "cpu" else torch.float32
    *sums, plain = (
        torch.zeros_like(t, dtype=wide) for t in [*run.params, torch.zeros((), device=rt.device)]
    )
    for start in (
        i for part in range(8)[rt.mine] for i in range(part * eighth, (part + 1) * eighth, size)
    ):
        end = min(start + size, (start // eighth + 1) * eighth)
        x, y, w = (
            torch.from_numpy(a[start:end].reshape(-1, length)).to(rt.device, non_blocking=True)
            if a is not None
            else 1.0
            for a in (tokens, tokens[1:], weights)
        )
        with rt.autocast():
            nats = run.loss_fn(x, y)
        plain += nats.detach().to(wide).sum()
        gradients = torch.autograd.grad(
            (nats * w).sum() / cfg.train_batch_tokens, run.params, materialize_grads=True
        )
        torch._foreach_add_(sums, gradients)
    all_reduce_flat([*sums, plain], rt)
    for p, total in zip(run.params, sums, strict=True):
        p.grad = total.to(p.dtype)
    return plain / cfg.train_batch_tokens


def warm_up(run: Run) -> None:
    """Steps that compile kernels and fill caches outside the clock, then are undone to the bit."""
    cfg, kept = run.cfg, [p.detach().clone() for p in run.params]
    for i in range(cfg.warmup_steps):
        run.model.looping = bool(cfg.num_loops) and 2 * i >= cfg.warmup_steps
        take_step(run, 0.0)
        if i == 0 or (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
            run.log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    with torch.no_grad():
        torch._foreach_copy_(run.params, kept)
    run.model.looping, run.step, run.loss = False, 0, None
    run.optimisers, run.stream = (
        make_optimisers(run.model, cfg, run.rt),
        TokenStream(run.data.train),
    )


def train(run: Run) -> None:
    cfg, last, saved = run.cfg, (run.step, run.elapsed()), checkpoint_path(run.cfg)
    run.set_clock(True)
    while True:
        elapsed, signum = agree(run)
        progress = progress_of(run.step, elapsed, cfg)
        need(
            run.loss is None or math.isfinite(run.loss.item()),
            f"the loss of step {run.step} is not finite; the "
            f"last checkpoint: {saved if saved.exists() else None}; lower MATRIX_LR or set GRAD_CLIP_NORM",
        )
        if run.step > last[0] and (
            run.step % cfg.train_log_every == 0 or run.step <= 10 or progress >= 1
        ):
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
        take_step(run, progress)
        run.averages.update(run.params, run.step, progress_of(run.step, elapsed, cfg), cfg)
    if run.step < cfg.iterations:
        run.log(
            f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{run.step}/{cfg.iterations}"
        )
    save_checkpoint(run)  # whatever happens to the export, the weights are safe
    run.set_clock(False)


def agree(run: Run) -> tuple[float, int]:
    """Elapsed seconds and any signal: one answer for all ranks, whatever their clocks say."""
    if run.rt.world == 1:
        return run.elapsed(), run.signum
    shared = torch.tensor([run.elapsed(), run.signum], device=run.rt.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return float(shared[0]), int(shared[1])


def log_step(
    run: Run, elapsed: float, progress: float, last: tuple[int, float]
) -> tuple[int, float]:
    cfg, loss = run.cfg, run.loss.item()
    speed = (run.step - last[0]) * cfg.train_batch_tokens / max(elapsed - last[1], 1e-9)
    flops = (
        6 * sum(p.numel() for p in run.params)
        + 6 * cfg.num_layers * cfg.model_dim * cfg.train_seq_len
    )  # a token
    mfu = next(
        (
            flops * speed / peak / run.rt.world
            for name, peak in PEAK_FLOPS.items()
            if name in run.rt.name
        ),
        None,
    )
    run.log(
        f"step:{run.step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * elapsed:.0f}ms "
        f"step_avg:{1000 * elapsed / run.step:.2f}ms tok/s:{speed:.0f} {f'mfu:{mfu:.3f} ' if mfu else ''}"
        f"eta:{max(0.0, elapsed / progress - elapsed):.0f}s",
        "train",
        step=run.step,
        loss=loss,
        seconds=elapsed,
        tokens=run.step * cfg.train_batch_tokens,
        speed=speed,
        mfu=mfu,
        lr_scale=lr_scale(progress, cfg),
    )
    return run.step, elapsed


def validate(run: Run) -> None:
    run.set_clock(False)
    nats = mean_nats(run.loss_fn, run.data.val, run.cfg, run.rt, "validation")
    bpb, ms = bits_per_byte(nats, run.data), 1000 * run.train_s
    run.log(
        f"step:{run.step}/{run.cfg.iterations} val_loss:{nats:.4f} val_bpb:{bpb:.4f} train_time:{ms:.0f}ms "
        f"step_avg:{ms / max(run.step, 1):.2f}ms",
        "val",
        step=run.step,
        loss=nats,
        bpb=bpb,
        seconds=run.train_s,
    )
    run.set_clock(True)


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
        predict_size(run, "on the way", dict(run.model.named_parameters()))
    if rounds:
        run.qat = True
        log_rounding(run)


@torch.no_grad()
def log_rounding(run: Run) -> None:
    """Proof that rounding reaches the forward pass: the difference that it makes there."""
    tokens = torch.from_numpy(run.stream.peek(run.cfg.train_seq_len + 1))[None].to(run.rt.device)
    with run.rt.autocast():
        plain = run.loss_fn(tokens[:, :-1], tokens[:, 1:])
        with weights_replaced(run.params, rounded_parameters(run.model, run.k)):
            worst = (plain - run.loss_fn(tokens[:, :-1], tokens[:, 1:])).abs().max().item()
    run.log(
        f"qat:on step:{run.step} k:{run.k:.3f} max_loss_difference:{worst:.6f}",
        "qat",
        step=run.step,
        k=run.k,
        max_loss_difference=worst,
    )


# ==== CHECKPOINTS =====================================================================================================
# Settings that a resumed run may change: they touch neither weights nor the order of the data.
FREE_ON_RESUME = set(names_with_role(Config, "place", "runtime"))


def checkpoint_path(cfg: Config) -> Path:
    return Path(cfg.out_dir) / "checkpoint.pt"


def save(path: Path, state: Any) -> int:
    buffer = (
        io.BytesIO()
    )  # torch turns what happens to a file into a RuntimeError, without its cause
    torch.save(state, buffer)
    with replacing(path) as f:
        return f.write(buffer.getbuffer())


def save_checkpoint(run: Run) -> None:
    """All state, replaced in one move. A full disk costs the checkpoint, never the run."""
    run.set_clock(False)
    if run.rt.rank == 0 and all(bool(p.isfinite().all()) for p in run.params):
        state = dict(
            settings=dataclasses.asdict(run.cfg),
            run_id=run.log.run_id,
            data=run.data.fingerprint,
            scalars={
                name: getattr(run, name) for name in ("step", "train_s", "k", "qat", "measured")
            },
            loss=run.loss,
            looping=run.model.looping,
            stream=run.stream.at,
            model=run.model.state_dict(),
            averages=vars(run.averages),
            optimisers=[o.state_dict() for o in run.optimisers],
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


def read_checkpoint(cfg: Config, path: Path | None = None) -> dict[str, Any]:
    path = path or checkpoint_path(cfg)
    need(
        path.is_file(),
        f"RESUME is 1, but there is no {path}; set OUT_DIR to the run's folder, or unset RESUME",
    )
    try:
        need(zipfile.ZipFile(path).testzip() is None, "a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then, now = saved["settings"], dataclasses.asdict(cfg)
    except Exception as e:  # a damaged zip raises almost anything
        raise UserError(
            f"{path} is damaged ({type(e).__name__}); start again without RESUME"
        ) from None
    for name in sorted((then.keys() | now.keys()) - FREE_ON_RESUME):
        need(
            then.get(name) == now.get(name),
            f"{name.upper()} is {now.get(name)}, but the checkpoint was made with "
            f"{then.get(name)}; set it to that, or start again without RESUME",
        )
    return saved


def restore(run: Run, saved: dict[str, Any]) -> None:
    need(
        saved["data"] == run.data.fingerprint,
        f"{run.data.folder} has other shards than the checkpoint's run; set "
        "DATA_PATH, or start again without RESUME",
    )
    run.model.load_state_dict(saved["model"], strict=True)
    for optimiser, state in zip(run.optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    vars(run).update(
        saved["scalars"], loss=None if saved["loss"] is None else saved["loss"].to(run.rt.device)
    )
    vars(run.averages).update(
        {
            name: [t.to(run.rt.device) for t in value] if type(value) is list else value
            for name, value in saved["averages"].items()
        }
    )
    run.model.looping, run.stream.at = saved["looping"], saved["stream"]
    run.log(
        f"resumed step:{run.step} train_time:{1000 * run.train_s:.0f}ms", "resume", step=run.step
    )


# ==== EXPORT ==========================================================================================================
def best_on_holdout(run: Run, tried: dict[str, list[Tensor]], what: str) -> str:
    score = {}
    for name, values in tried.items():
        with weights_replaced(run.params, values):
            score[name] = mean_nats(run.loss_fn, run.data.holdout, run.cfg, run.rt)
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
    tried = {"last": [p.detach().clone() for p in run.params], **run.averages.candidates()}
    if len(tried) == 1:
        return
    if run.averages.swa_count:
        run.log(f"swa:averaged {run.averages.swa_count} checkpoints")
    rounded = {name: rounded_parameters(run.model, run.k, values) for name, values in tried.items()}
    kept = best_on_holdout(run, rounded, "averages")
    with torch.no_grad():
        torch._foreach_copy_(run.params, tried[kept])


def collect_hessians(run: Run) -> dict[str, Tensor]:
    """sum of x x^T over training tokens, for every matrix that multiplies activations."""
    names = {m: f"{n}.weight" for n, m in run.model.named_modules() if isinstance(m, nn.Linear)}
    hessians = {
        n: torch.zeros(m.in_features, m.in_features, device=run.rt.device) for m, n in names.items()
    }

    def collect(module: nn.Module, inputs: tuple[Tensor], _output: Tensor) -> None:
        x = inputs[0].flatten(0, -2).float()
        hessians[names[module]].addmm_(x.T, x)

    hooks = [m.register_forward_hook(collect) for m in names]
    batches = [
        run.stream.take(8 * run.cfg.train_seq_len)[:-1].reshape(8, -1)
        for _ in range(run.cfg.gptq_batches)
    ]
    with torch.no_grad(), run.rt.autocast():
        for batch in batches[run.rt.mine]:
            run.model.logits(torch.from_numpy(batch).to(run.rt.device))
    for hook in hooks:
        hook.remove()
    all_reduce_flat(list(hessians.values()), run.rt)
    return hessians


def choose_rounding(run: Run) -> dict[str, Tensor]:
    """Hessians, made inside the training clock, if GPTQ pays on held-out training tokens; else none."""
    if not run.cfg.gptq:
        return {}
    run.set_clock(True)
    hessians, cap = collect_hessians(run), run.cfg.max_wallclock_seconds
    gptq = rounded_parameters(run.model, run.k, hessians=hessians)
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
        run, {"nearest": rounded_parameters(run.model, run.k), "gptq": gptq}, "rounding"
    )
    return hessians if kept == "gptq" else {}


def fit_artifact(run: Run, hessians: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Rounded], str]:
    """The finest steps whose file, all told, meets the target: predict, write, correct by what the prediction missed,
    until it fits. What does not fit at the coarsest step is an error, and nothing is written."""
    cfg, target, state = run.cfg, size_target(run.cfg), dict(run.model.named_parameters())
    tokenizer, codec = (
        run.data.tokenizer_path.read_bytes(),
        "ans" if run.cfg.codec == "auto" else run.cfg.codec,
    )
    missed = len(compress_brotli(tokenizer)) if cfg.embed_tokenizer else 0

    def encoded(codec):
        return encode_artifact(rounded, run.k, cfg, run.model.looping, codec, tokenizer)  # noqa: E731

    best = (b"", {}, 0.0)
    for _ in range(8):
        run.k = bisect_k(state, target - missed, cfg)
        rounded = quantised(state, run.k, cfg, hessians)
        blob = encoded(codec)
        if len(best[0]) < len(blob) <= target:
            best = blob, rounded, run.k
        if (
            0.998 * target <= len(blob) <= target
            or run.k == K_GRID[0 if len(blob) <= target else -1]
        ):
            break
        missed = (
            len(blob)
            - predicted_bytes(state, run.k, cfg)
            + (0.001 * target if len(blob) > target else 0)
        )
    blob, rounded, run.k = best if best[0] else (blob, rounded, run.k)
    for other in CODECS if cfg.codec == "auto" else ():
        tried = encoded(other)
        run.log(f"codec:{other} bytes:{len(tried)}", "codec", codec=other, bytes=len(tried))
        if len(tried) < len(blob):
            blob, codec = tried, other
    need_room(len(blob), cfg)
    return blob, rounded, codec


def export(run: Run) -> Path:
    """Choose the weights and their rounding, write the artifact; rank 0 writes, all ranks wait for it."""
    cfg, log, bits, code = (
        run.cfg,
        run.log,
        max(run.cfg.attn_bits, run.cfg.mlp_bits),
        code_bytes(run.cfg),
    )
    settle_weights(run)
    hessians, path = choose_rounding(run), Path(cfg.out_dir) / f"final_model.int{bits}.ptz"
    if run.rt.rank == 0:
        raw = save(Path(cfg.out_dir) / "final_model.pt", run.model.state_dict())
        log(f"Serialized model: {raw} bytes\nCode size: {code} bytes packed")
        blob, rounded, codec = fit_artifact(run, hessians)
        with replacing(path) as f:
            f.write(blob)
        log_errors(run, rounded)
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
    if run.rt.world > 1:
        dist.barrier()
    return path


def log_errors(run: Run, rounded: Mapping[str, Rounded]) -> None:
    """How far rounding moved each matrix (relative), and the bits that a code of it needs."""
    state = {n: w.detach() for n, w in run.model.named_parameters()}
    table = {
        n: (
            ((r.weight() - state[n]).norm() / state[n].norm().clamp(min=1e-12)).item(),
            entropy_bits(r.values) / r.values.numel(),
        )
        for n, r in rounded.items()
        if r.steps is not None
    }
    errors, bits = zip(*table.values(), strict=True)
    run.log(
        f"quantised:{len(table)} matrices mean_error:{np.mean(errors):.4f} worst_error:{max(errors):.4f} "
        f"mean_bits:{np.mean(bits):.2f}",
        "quantised",
        tensors=table,
    )


def score_artifact(run: Run, path: Path) -> None:
    """The score of the run: of the bytes on disk, read back and rebuilt strictly."""
    began, artifact = time.perf_counter(), read_artifact(path)
    nats = mean_nats(
        build_model(artifact, run.rt.device), run.data.val, run.cfg, run.rt, "scoring the artifact"
    )
    bpb, seconds = bits_per_byte(nats, run.data), time.perf_counter() - began
    label = f"final_{path.suffixes[0][1:]}_{artifact.header['codec']}_roundtrip"
    run.log(f"{label} val_loss:{nats:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms")
    run.log(
        f"{label}_exact val_loss:{nats:.8f} val_bpb:{bpb:.8f}",
        "final",
        label=label,
        loss=nats,
        bpb=bpb,
        eval_seconds=seconds,
        tokens=len(run.data.val) - 1,
        bytes=run.data.val_bytes,
    )


# ==== MAIN ============================================================================================================
def print_help() -> None:
    shown = lambda value: int(value) if type(value) is bool else value  # noqa: E731
    print(f"{__doc__}\nPRESET  one of {', '.join(PRESETS)} (unset: consensus on CUDA, else cpu)\n")
    for f in fields(Config):
        print(f"{f.name.upper():27} {shown(f.default)!s:>9}  {f.metadata['help']}")
    for name, values in PRESETS.items():
        print(f"\nPRESET={name}: " + " ".join(f"{n.upper()}={shown(v)}" for n, v in values.items()))


def main(env: Mapping[str, str] = os.environ) -> None:
    preset = env.get("PRESET") or ("consensus" if best_device() == "cuda" else "cpu")
    cfg = Config.from_env(env, preset)
    saved = read_checkpoint(cfg) if cfg.resume else None
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
    score_artifact(run, path)
    log.close(path)


def run_main() -> int:
    if len(sys.argv) > 1:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
        print_help()
        return 0 if sys.argv[1] in ("-h", "--help") else 2
    less, ranks = (
        "; set MICRO_BATCH_TOKENS to half of what a pass takes",
        "; RESUME=1 continues from the checkpoint",
    )
    advice = {
        (torch.OutOfMemoryError, ""): less,
        (RuntimeError, "allocate memory"): less,
        (MemoryError, ""): less,
        (dist.DistError, ""): ranks,
        (RuntimeError, "gloo"): ranks,
        (UserError, ""): "",
        (OSError, ""): "",
        (ModuleNotFoundError, ""): "; pip install -r requirements.txt",
    }
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
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
            f"train_gpt: error: {(str(e) or 'out of memory').splitlines()[0]}{text}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    code = run_main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Ranks leave at once: gloo's threads, waiting for ranks that are gone, abort an orderly exit now and then.
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)
