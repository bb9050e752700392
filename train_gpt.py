"""Train a language model that ends as an artifact of at most 16,000,000 bytes, code included.

    PRESET=cpu python train_gpt.py                           a laptop
    python train_gpt.py                                      one GPU: the consensus model
    torchrun --standalone --nproc_per_node=8 train_gpt.py    eight GPUs

Settings are environment variables; --help lists them. Sections follow the data, SETTINGS to MAIN.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import ctypes
import difflib
import functools
import glob
import hashlib
import io
import json
import lzma
import math
import os
import platform
import re
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from datetime import timedelta
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


class UserError(Exception):
    """An error that the user can repair: it is printed as one line, without a traceback."""


# ==== SETTINGS ====================================================================================
# The environment overrides the preset, which overrides these defaults (the challenge's).
# Roles: place (of files), runtime (may change on resume), model (what a reader needs), and others.
def knob(default: Any, help: str, low=None, high=None, choices="", *, role: str) -> Any:
    """Declare a setting: its default, what it does, the values that it may take, and its role."""
    limits = {"low": low, "high": high, "choices": tuple(choices.split(" ")) if choices else ()}
    return field(default=default, metadata={"help": help, "role": role, **limits})


def names_with_role(config_class: type, *roles: str) -> list[str]:
    """Return the names of the settings that have one of these roles, in order of declaration."""
    return [f.name for f in fields(config_class) if f.metadata["role"] in roles]


@dataclass(frozen=True)
class Config:
    data_path: str = knob("", "folder of shards; unset: FineWeb, else embedded", role="place")
    tokenizer_path: str = knob("", "SentencePiece model; unset: next to the shards", role="place")
    out_dir: str = knob(".", "folder for artifact, checkpoint and logs/", role="place")
    run_id: str = knob("", "name of the log files; unset: random", role="place")
    seed: int = knob(1337, "seed of the initial weights", 0, 2**63 - 1, role="seed")
    resume: bool = knob(False, "1 continues from OUT_DIR/checkpoint.pt", role="runtime")
    device: str = knob("", "unset: the best available", choices=" cpu cuda mps", role="runtime")
    compile: bool = knob(False, "torch.compile: pays on CUDA, takes a minute", role="runtime")
    iterations: int = knob(20_000, "most steps", 1, role="schedule")
    max_wallclock_seconds: float = knob(600.0, "training time; 0 = no limit", 0, role="schedule")
    warmup_steps: int = knob(20, "steps that compile and are then undone", 0, role="runtime")
    warmdown_frac: float = knob(0.09, "part of the run with a falling rate", 0, 1, role="schedule")
    min_lr: float = knob(0.0, "least rate, as part of the peak", 0, 1, role="schedule")
    train_batch_tokens: int = knob(524_288, "tokens a step, all devices", 8, role="schedule")
    micro_batch_tokens: int = knob(0, "tokens a pass; 0 = batch / 8", 0, role="runtime")
    exact_sums: bool = knob(False, "equal bits on 1 to 8 CPU ranks; slower", role="schedule")
    sampled_frac: float = knob(0.0, "part with a sampled loss; 0 = none", 0, 1, role="schedule")
    sampled_pieces: int = knob(256, "pieces drawn for a sampled loss", 1, 65_536, role="schedule")
    holdout_tokens: int = knob(262_144, "held out to judge averages", 1, role="schedule")
    qat_start_frac: float = knob(1.0, "part before QAT; 1 = no QAT", 0, 1, role="schedule")
    swa_start_frac: float = knob(1.0, "part before SWA; 1 = no SWA", 0, 1, role="schedule")
    swa_every: int = knob(50, "steps between weights that SWA averages", 1, role="schedule")
    ema_decay: float = knob(0.0, "decay in 7,000 steps; 0 = no EMA", 0, 1, role="schedule")
    val_batch_size: int = knob(524_288, "tokens of eight validation passes", 1, role="runtime")
    val_loss_every: int = knob(1000, "steps a validation; 0 = only at the end", 0, role="runtime")
    train_log_every: int = knob(200, "steps between log lines", 1, role="runtime")
    checkpoint_seconds: float = knob(300.0, "between saves; 0 = last only", 0, role="runtime")
    vocab_size: int = knob(1024, "pieces of the tokenizer", 4, 65_536, role="model")
    train_seq_len: int = knob(1024, "tokens of a sequence", 2, 65_536, role="model")
    num_layers: int = knob(9, "transformer blocks", 1, 256, role="model")
    model_dim: int = knob(512, "width", 8, 16_384, role="model")
    num_heads: int = knob(8, "query heads", 1, 256, role="model")
    num_kv_heads: int = knob(4, "key and value heads", 1, 256, role="model")
    mlp_mult: float = knob(2.0, "MLP width in model widths", 0.25, 16, role="model")
    leaky_slope: float = knob(0.0, "slope of squared LeakyReLU; 0 = ReLU", 0, 1, role="model")
    logit_softcap: float = knob(30.0, "bound of every logit", 1, 1e4, role="model")
    tied_embed_init_std: float = knob(0.005, "initial embedding spread", 0, 1e3, role="model")
    rope_base: float = knob(10_000.0, "wavelength ratio of RoPE", 1, 1e9, role="model")
    rope_dims: int = knob(0, "rotating channels of a head; 0 = all", 0, 16_384, role="model")
    qk_gain_init: float = knob(1.5, "initial gain of queries", 0, 1e3, role="model")
    ortho_init: bool = knob(False, "orthogonal initial matrices", role="model")
    smear_gate: bool = knob(False, "mix in the embedding before, except at BOS", role="model")
    bigram_vocab_size: int = knob(0, "bigram buckets; 0 = none", 0, 1 << 20, role="model")
    bigram_dim: int = knob(128, "width of the bigram table", 1, 16_384, role="model")
    xsa_last_n: int = knob(0, "last layers with exclusive attention", 0, 256, role="model")
    ln_scale: bool = knob(False, "scale the input of layer i by 1/sqrt(i+1)", role="model")
    attn_gate: bool = knob(False, "gate each head by the first 12 inputs", role="model")
    skip_gates: bool = knob(False, "mix skips in by sigmoids, not by adding", role="model")
    parallel_start_layer: int = knob(0, "first two-lane layer; 0 = none", 0, 255, role="model")
    loop_start: int = knob(0, "first layer of depth recurrence", 0, 255, role="model")
    loop_end: int = knob(0, "last layer of depth recurrence", 0, 255, role="model")
    num_loops: int = knob(0, "extra passes over them; 0 = none", 0, 16, role="model")
    loop_at_frac: float = knob(0.35, "part of the run before loops", 0, 1, role="model")
    attn_bits: int = knob(8, "bits of attention matrices; 2 is ternary", 2, 8, role="model")
    mlp_bits: int = knob(8, "bits of MLP matrices; 2 is ternary", 2, 8, role="model")
    embed_bits: int = knob(8, "bits of embeddings; 2 is ternary", 2, 8, role="model")
    matrix_lr: float = knob(0.04, "Muon's rate, for matrices", 0, role="optimiser")
    scalar_lr: float = knob(0.04, "AdamW's rate, for vectors and gates", 0, role="optimiser")
    tied_embed_lr: float = knob(0.05, "AdamW's rate, for embeddings", 0, role="optimiser")
    muon_momentum: float = knob(0.95, "Muon's momentum", 0, 1, role="optimiser")
    muon_momentum_warmup_start: float = knob(0.85, "first momentum", 0, 1, role="optimiser")
    muon_momentum_warmup_steps: int = knob(500, "steps to full momentum", 0, role="optimiser")
    muon_backend_steps: int = knob(5, "Newton-Schulz iterations", 1, 20, role="optimiser")
    muon_polar_express: bool = knob(False, "Polar Express polynomials", role="optimiser")
    muon_row_normalize: bool = knob(False, "equal rows before Newton-Schulz", role="optimiser")
    muon_wd: float = knob(0.0, "decoupled weight decay of matrices", 0, role="optimiser")
    adam_wd: float = knob(0.0, "weight decay of vectors and gates", 0, role="optimiser")
    embed_wd: float = knob(0.0, "weight decay of embeddings", 0, role="optimiser")
    beta1: float = knob(0.9, "AdamW's first decay", 0, 1, role="optimiser")
    beta2: float = knob(0.95, "AdamW's second decay", 0, 1, role="optimiser")
    adam_eps: float = knob(1e-8, "AdamW's epsilon", 0, role="optimiser")
    grad_clip_norm: float = knob(0.0, "largest gradient norm; 0 = none", 0, role="optimiser")
    codec: str = knob("auto", "coder", choices="auto zstd brotli ans", role="runtime")
    size_budget_bytes: int = knob(16_000_000, "artifact and packed code", 1, role="size")
    size_margin_bytes: int = knob(1000, "left free below the budget", 0, role="size")
    extra_code_files: str = knob("", "files counted too, with commas between", role="size")
    embed_tokenizer: bool = knob(False, "put the tokenizer into the artifact", role="size")
    gptq: bool = knob(False, "round with Hessians of training batches", role="rounding")
    lqer_rank: int = knob(4, "of the embedding's repair after GPTQ", 0, 64, role="rounding")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        D, H, G, R = self.model_dim, self.num_heads, self.num_kv_heads, self.rope_dims
        C, batch, eight = D // H, self.train_batch_tokens, 8 * self.train_seq_len
        first, layers = self.loop_start, self.num_layers
        looped = not self.num_loops or first <= self.loop_end < layers
        for name, valid, rule in (
            ("model_dim", D % H == 0, f"a multiple of NUM_HEADS={H}"),
            ("num_heads", H % G == 0, f"a multiple of NUM_KV_HEADS={G}"),
            ("rope_dims", (R or C) % 2 == 0 and R <= C, f"even, at most {C}"),
            ("train_batch_tokens", not batch % eight, f"a multiple of {eight} (8 x TRAIN_SEQ_LEN)"),
            ("bigram_vocab_size", self.bigram_vocab_size != 1, "0 or at least 2"),
            ("loop_end", looped, f"from LOOP_START={first} to below NUM_LAYERS={layers}"),
        ):
            if not valid:
                raise UserError(f"{name.upper()} is {getattr(self, name)}; it must be {rule}")

    @classmethod
    def from_env(cls, env: Mapping[str, str], default_preset: str) -> Config:
        """Read the preset that PRESET names, then the single settings, which override it."""
        refuse_near_misses(env)
        preset = env.get("PRESET") or default_preset
        if preset not in PRESETS:
            raise UserError(f"PRESET is {preset!r}; it must be one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **parse_settings(cls, env)})


def parse_settings(config_class: type, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of the settings that `texts` names in upper case; ignore other names."""
    declared = {f.name.upper(): f for f in fields(config_class)}
    return {f.name: parse_value(f, texts[name]) for name, f in declared.items() if name in texts}


def parse_value(f: Field, text: str) -> Any:
    """Return the text of one setting as a value of its type."""
    kind = type(f.default)
    try:
        return {"0": False, "1": True}[text] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = {bool: "0 or 1", int: "a whole number", float: "a number"}[kind]
        message = f"{f.name.upper()} is {text!r}; it must be {wanted} (default {f.default!r})"
        raise UserError(message) from None


def check_value(f: Field, value: Any) -> None:
    """Refuse a value of the wrong type or range, from the environment or from an artifact."""
    kind, name = type(f.default), f.name.upper()
    low, high, choices = (f.metadata[key] for key in ("low", "high", "choices"))
    if type(value) is not kind:
        raise UserError(f"{name} is {value!r:.60}, not {kind.__name__}")
    if choices and value not in choices:
        allowed = ", ".join(filter(None, choices))
        raise UserError(f"{name} is {value!r}; it must be one of {allowed}")
    # NaN, which compares false with everything, is refused too.
    if low is not None and not (low <= value < math.inf and value <= (high or math.inf)):
        raise UserError(f"{name} is {value}; it must be from {low} to {high or 'any finite value'}")


FOREIGN_TEXT = """
MUON_WEIGHT_DECAY=MUON_WD; WEIGHT_DECAY=MUON_WD, ADAM_WD or EMBED_WD; WD=MUON_WD;
ADAM_WEIGHT_DECAY=ADAM_WD; WARMDOWN_ITERS=WARMDOWN_FRAC; QAT_ENABLED=QAT_START_FRAC (1 is never);
LATE_QAT_THRESHOLD=QAT_START_FRAC; SWA_ENABLED=SWA_START_FRAC (1 is never); COMPRESSOR=CODEC;
EMA_ENABLED=EMA_DECAY; MATRIX_BITS=ATTN_BITS and MLP_BITS; GPTQ_ENABLED=GPTQ;
BIGRAM_BUCKETS=BIGRAM_VOCAB_SIZE; EMBED_LR=TIED_EMBED_LR; HEAD_LR=TIED_EMBED_LR;
TIE_EMBEDDINGS=nothing (they are always tied); BATCH_SIZE=TRAIN_BATCH_TOKENS; SEQ_LEN=TRAIN_SEQ_LEN;
MAX_STEPS=ITERATIONS; GPTQ_RESERVE_SECONDS=nothing (it is measured in warm-up)
"""
FOREIGN_NAMES = dict(pair.split("=", 1) for pair in " ".join(FOREIGN_TEXT.split()).split("; "))


def refuse_near_misses(env: Mapping[str, str], *others: type) -> None:
    """Refuse names that resemble a setting: MUON_WEIGHT_DECAY=1 is an error that names MUON_WD."""
    known = {f.name.upper() for kind in (Config, *others) for f in fields(kind)} | {"PRESET"}
    by_words = {tuple(sorted(name.split("_"))): name for name in known}
    for name in sorted(env.keys() - known):
        upper = name.upper()
        close = difflib.get_close_matches(upper, known, 1, 0.87) if len(name) > 4 else []
        right = FOREIGN_NAMES.get(upper) or by_words.get(tuple(sorted(upper.split("_"))))
        if right := right or "".join(close):
            raise UserError(f"{name}={env[name]} is no setting; did you mean {right}? See --help")


# consensus has the values of record #198; frontier those of #1855, for shards of 8,192 pieces.
PRESET_LINES = {
    "cpu": """
        PRESET=consensus NUM_LAYERS=4 BIGRAM_VOCAB_SIZE=0 MLP_MULT=2 EMBED_TOKENIZER=1 MODEL_DIM=128
        NUM_HEADS=4 NUM_KV_HEADS=2 TRAIN_SEQ_LEN=256 VOCAB_SIZE=8192 EMBED_BITS=6 TRAIN_LOG_EVERY=50
        QAT_START_FRAC=0.85 WARMUP_STEPS=0 SWA_START_FRAC=1 VAL_LOSS_EVERY=0 VAL_BATCH_SIZE=16384
        SAMPLED_FRAC=0.85 MAX_WALLCLOCK_SECONDS=150 TRAIN_BATCH_TOKENS=2048 CHECKPOINT_SECONDS=60
        HOLDOUT_TOKENS=32768 COMPILE=0 MUON_POLAR_EXPRESS=1 MUON_BACKEND_STEPS=4 MUON_MOMENTUM=0.95
        MUON_MOMENTUM_WARMUP_STEPS=50 MUON_ROW_NORMALIZE=1 MATRIX_LR=0.016 TIED_EMBED_LR=0.025
        ORTHO_INIT=0 SKIP_GATES=1 ATTN_GATE=1 XSA_LAST_N=4""",
    "baseline": "COMPILE=1",
    "consensus": """
        NUM_LAYERS=11 MLP_MULT=3 TRAIN_SEQ_LEN=2048 TRAIN_BATCH_TOKENS=786432 ITERATIONS=9000
        COMPILE=1 SMEAR_GATE=1 BIGRAM_VOCAB_SIZE=2048 ORTHO_INIT=1 QAT_START_FRAC=0.5 ATTN_BITS=6
        MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035 GRAD_CLIP_NORM=0.3 WARMDOWN_FRAC=0.4
        MUON_MOMENTUM=0.99 MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500
        MUON_WD=0.04 ADAM_WD=0.04 EMBED_WD=0.04 SWA_START_FRAC=0.8 SWA_EVERY=200 MLP_BITS=6""",
    "frontier": """
        PRESET=consensus VOCAB_SIZE=8192 MLP_MULT=4 BIGRAM_VOCAB_SIZE=0 EMBED_BITS=7 LEAKY_SLOPE=0.5
        XSA_LAST_N=11 LN_SCALE=1 ROPE_DIMS=16 QK_GAIN_INIT=5 ATTN_GATE=1 PARALLEL_START_LAYER=8
        LOOP_START=3 LOOP_END=5 NUM_LOOPS=2 GPTQ=1 QAT_START_FRAC=1 SWA_START_FRAC=1
        MUON_MOMENTUM=0.97 MUON_ROW_NORMALIZE=1 MUON_POLAR_EXPRESS=1 MUON_WD=0.095 EMBED_WD=0.085
        ADAM_WD=0.02 MATRIX_LR=0.026 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 BETA2=0.99 MIN_LR=0.1
        WARMDOWN_FRAC=0.85 EMA_DECAY=0.9975 SKIP_GATES=1""",
    "mixed": "PRESET=consensus NUM_LAYERS=12 MLP_BITS=5",
    "smoke": "PRESET=cpu NUM_LAYERS=2 MODEL_DIM=64 TRAIN_SEQ_LEN=64 ITERATIONS=20",
}


def read_preset(name: str) -> dict[str, Any]:
    """Return the values of a preset: those of the preset that it starts from, then its own."""
    words = dict(word.split("=", 1) for word in PRESET_LINES[name].split())
    start = read_preset(words["PRESET"]) if "PRESET" in words else {}
    return {**start, **parse_settings(Config, words)}


PRESETS = {name: read_preset(name) for name in PRESET_LINES}

# ==== DATA ========================================================================================
# A shard is the challenge's: 256 little-endian int32 (magic, version, count), then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1  # every document starts with it
CASE_MARKERS = "\ue001\ue002\ue003"  # pieces before capitals in tokenizers of lower-case text
TOKENIZER_PLACES = "tokenizer.model", "../../tokenizers/fineweb_{}_bpe.model"  # from the shards


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file next to `path`, then rename it, so that readers see the old file or the new."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file, so it cannot be replaced; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def list_shards(pattern: str | Path) -> list[Path]:
    """Return the shards that match, in order; the byte sidecars beside them are none."""
    paths = map(Path, sorted(glob.glob(str(pattern))))
    return [path for path in paths if not re.search(r"_bytes_\d+\.bin$", path.name)]


def read_shard(path: str | Path, vocab_size: int = 0) -> np.ndarray:
    """Map a shard's tokens, read only; check its header, length and, if given, vocabulary."""
    try:
        size, header = os.path.getsize(path), np.fromfile(path, dtype="<i4", count=256)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); prepare the data again") from None
    if len(header) != 256 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path}: not a token shard of version 1; write it with data/prepare.py")
    count, held = int(header[2]), (size - SHARD_HEADER_BYTES) / 2
    if count != held:
        raise UserError(f"{path}: header says {count} tokens, it holds {held:g}; make it again")
    if not count:
        return np.zeros(0, "<u2")
    tokens = np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,))
    if vocab_size and (largest := int(tokens.max())) >= vocab_size:
        raise UserError(f"{path}: token {largest} >= VOCAB_SIZE={vocab_size}; set it or DATA_PATH")
    return tokens


def document_bounds(tokens: np.ndarray) -> np.ndarray:
    """Return where documents start, and the end: `[0, ..., len]`, cut before each BOS."""
    return np.unique(np.concatenate([[0], np.flatnonzero(tokens == BOS_ID), [len(tokens)]]))


@dataclass(frozen=True)
class ByteTable:
    """The bytes that each token stands for: count([BOS, ▁the, ▁a]) is [3, 2]."""

    base: np.ndarray  # int16[V] bytes without the leading ▁
    space: np.ndarray  # bool[V] piece starts with ▁
    boundary: np.ndarray  # bool[V] control, unknown, unused: no bytes, and swallow the next ▁
    markers: str = ""  # CASE_MARKERS where the tokenizer has them as pieces: they have no bytes

    @classmethod
    def of(cls, tokenizer: Any, vocab_size: int) -> ByteTable:
        """Build the table from the pieces of a SentencePiece model."""
        base, boundary = np.zeros(vocab_size, np.int16), np.ones(vocab_size, bool)
        space, count = ~boundary, min(vocab_size, tokenizer.vocab_size())
        pieces = [tokenizer.id_to_piece(i) for i in range(count)]
        markers = CASE_MARKERS if {*CASE_MARKERS} <= {*pieces} else ""
        for i, piece in enumerate(pieces):
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                continue
            piece = piece.strip(markers)
            boundary[i], space[i] = False, piece.startswith("▁")
            base[i] = 1 if tokenizer.is_byte(i) else len(piece.removeprefix("▁").encode())
        # Most tokenizers swallow a document's leading blank; it counts in those that decode it.
        spaced = np.flatnonzero(space & (base > 0))
        if len(spaced) and tokenizer.decode([int(spaced[0])]).startswith(" "):
            boundary[:] = False
        return cls(base, space, boundary, markers)

    def count(self, tokens: np.ndarray) -> np.ndarray:
        """Return the bytes of each of tokens[1:], given the token before it."""
        return self.base[tokens[1:]] + (self.space[tokens[1:]] & ~self.boundary[tokens[:-1]])


def audit_bytes(tokenizer: Any, table: ByteTable, tokens: np.ndarray) -> int:
    """Decode every document, compare its UTF-8 length with the table, and return all bytes."""

    def excess(ids: np.ndarray) -> int:
        text = tokenizer.decode(ids[1:].tolist()).translate(silent)
        return len(text.encode()) - int(table.count(ids).sum())

    bounds, silent = document_bounds(tokens), dict.fromkeys(map(ord, table.markers))
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        ids = np.asarray(tokens[start:end])
        ids = ids if ids[0] == BOS_ID else np.concatenate([[BOS_ID], ids])
        if missed := excess(ids):  # find the first wrong token; no prefix cuts a character in two
            inner = ["<0x80>" <= tokenizer.id_to_piece(i) < "<0xC0>" for i in ids.tolist()]
            ends = (n for n in range(2, len(ids) + 1) if n == len(ids) or not inner[n])
            wrong = int(ids[next(n for n in ends if excess(ids[:n])) - 1])
            what = f"the document at token {start} decodes to {missed:+d} bytes against BPB's table"
            raise UserError(f"{what}, from token {wrong} ({tokenizer.id_to_piece(wrong)!r}) on")
    return int(table.count(tokens).sum())


def check_sidecar(path: Path, tokens: np.ndarray, table: ByteTable) -> None:
    """Compare the byte sidecar of a shard, if there is one, with the bytes of its tokens."""
    beside = path.with_name(re.sub(r"_(\d+\.bin)$", r"_bytes_\1", path.name))
    if beside != path and beside.exists():
        given, ours = read_shard(beside), table.count(np.concatenate([tokens[:1], tokens]))
        at = int(np.append(given[: len(ours)] != ours[: len(given)], True).argmax())
        if not at == len(given) == len(ours):
            what = f"token {at} has {given[at : at + 1]} bytes, its piece {ours[at : at + 1]}"
            raise UserError(f"{beside}: {what}; make both again, or set TOKENIZER_PATH")


class TokenStream:
    """Training tokens in order, again and again, from any number of shards; `at` is its state."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards, self.at, self.ends = shards, 0, np.cumsum([len(s) for s in shards])

    @functools.cached_property
    def shares(self) -> np.ndarray:  # of each token, among the first four million
        return np.bincount(seen := self.shards[0][: 1 << 22], minlength=1 << 16) / len(seen)

    def peek(self, count: int, ahead: int = 0) -> np.ndarray:
        """Return `count` tokens, int64, from `ahead` tokens further on, without moving on."""
        parts, at = [], self.at + ahead
        while count:
            at %= int(self.ends[-1])
            i = int(np.searchsorted(self.ends, at, side="right"))
            start = at - (int(self.ends[i]) - len(self.shards[i]))
            parts.append(self.shards[i][start : start + count])
            count, at = count - len(parts[-1]), at + len(parts[-1])
        return np.concatenate(parts).astype(np.int64)

    def sequences(self, count: int, length: int, ahead: int = 0) -> np.ndarray:
        """Return [count, length + 1] tokens: of 65,536 sequences, each once in a shuffled order."""
        # A golden section from one to the next: a batch of neighbours would be of one document.
        n = max(1, min(int(self.ends[-1]) // length, 1 << 16))
        stride = next(s for s in range(1 + int(0.618 * n), 2 * n + 2) if math.gcd(s, n) == 1)
        numbers = (self.at + ahead) // length + np.arange(count)
        numbers += numbers * stride % n - numbers % n
        return np.stack([self.peek(length + 1, int(i) * length - self.at) for i in numbers])


class Data(NamedTuple):
    folder: Path
    train: list[np.ndarray]  # without the held-out tail
    holdout: np.ndarray
    val: np.ndarray
    val_bytes: int
    table: ByteTable
    tokenizer_path: Path
    fingerprint: str


def load_data(cfg: Config) -> Data:
    """Find, map and check all data before a second of training is spent."""
    here, V, named = Path(__file__).resolve().parent / "data", cfg.vocab_size, cfg.tokenizer_path
    fineweb = here / "datasets" / f"fineweb10B_sp{V}"
    folder = Path(cfg.data_path or (fineweb if fineweb.is_dir() else here / "embedded"))
    shards = {}
    for split in ("train", "val"):
        if not (paths := list_shards(folder / f"*_{split}_*.bin")):
            raise UserError(f"no *_{split}_*.bin in {folder}; run `make data`, or set DATA_PATH")
        shards[split] = [s for s in (read_shard(p, cfg.vocab_size) for p in paths) if len(s)]
    train, val = shards["train"], np.concatenate(shards["val"] or [np.zeros(0, "<u2")])
    if (total := sum(map(len, train))) < 100 or len(val) < 2:
        raise UserError(f"{folder}: {total} training, {len(val)} validation tokens are too few")
    # Both ends of each training shard: a second, where hashing all of 16 GB takes a minute.
    digest = hashlib.sha256(val)
    for s in train:
        digest.update(b"%d " % len(s) + s[: 1 << 19].tobytes() + s[-1 << 19 :].tobytes())
    count = min(cfg.holdout_tokens, len(train[-1]) // 10)
    holdout, train[-1] = np.array(train[-1][-count - 1 :]), train[-1][: -count - 1]
    places = [Path(named)] if named else [folder / p.format(V) for p in TOKENIZER_PLACES]
    if not (path := next((p for p in places if p.is_file()), None)):
        raise UserError(f"no tokenizer at {' or '.join(map(str, places))}; set TOKENIZER_PATH")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{path} is no SentencePiece model; set TOKENIZER_PATH to one") from None
    if (pieces := tokenizer.vocab_size()) != cfg.vocab_size:
        raise UserError(f"VOCAB_SIZE is {V}, {path} has {pieces} pieces; set it or TOKENIZER_PATH")
    table = proven_table(tokenizer, path, val)
    for shard in list_shards(folder / "*_val_*.bin"):
        check_sidecar(shard, read_shard(shard), table)
    val_bytes = int(table.count(val).sum())
    return Data(folder, train, holdout, val, val_bytes, table, path, digest.hexdigest())


def proven_table(tokenizer: Any, path: Path | str, val: np.ndarray) -> ByteTable:
    """Return the byte table of a tokenizer, once it is shown to have written the tokens `val`."""
    table, bounds = ByteTable.of(tokenizer, tokenizer.vocab_size()), document_bounds(val)
    pairs = zip(bounds[:20], bounds[1:21], strict=False)
    ids = [val[a:b][val[a:b] != BOS_ID].tolist() for a, b in pairs]
    odd = sum(tokenizer.encode(tokenizer.decode(i)) != i for i in ids)
    if 2 * odd > len(ids):
        message = f"{path} did not write these shards: {odd} of {len(ids)} documents encode"
        raise UserError(f"{message} otherwise; set TOKENIZER_PATH to the model that did")
    audit_bytes(tokenizer, table, val)
    return table


# ==== QUANTISER ===================================================================================
# One function rounds a weight, in training and in the export. A row's step is k * rms / levels: k
# sets the error (k/107 at 6 bits) and the size (7.05 - log2 k bits a weight), and is bisected.
Tensors = Mapping[str, Tensor]  # by the names of a model's parameters
Factors = Mapping[str, tuple[Tensor, Tensor, Tensor]]  # what rounding knows of a matrix's inputs
PLAIN_BITS = 16  # vectors, gates and scalars: fp16
# The k of least loss on a trained cpu model; below it, clipping costs more than finer steps gain.
LEAST_K = {2: 1.2, 3: 2.0, 4: 2.5, 5: 2.9, 6: 3.6, 7: 4.0, 8: 4.4}
GPTQ_BATCHES = 16  # of eight sequences each, for the Hessians
HEAD, LEFT, RIGHT = "tok_emb.weight", "tok_emb.left", "tok_emb.right"  # embedding, its repair
LOOKUP_SHARE = 0.1  # what an error of the embedding costs where it is looked up, against there
K_GRID = np.geomspace(1.2, 64.0, 36_800).tolist()  # 500 bytes from one to the next at 27 M weights


def levels(bits: int) -> int:
    return 2 ** (bits - 1) - 1  # the largest code: 31 at 6 bits, where codes run from -31 to 31


def row_steps(weight: Tensor, k: float, bits: int) -> Tensor:
    """Return the step of each row, [..., rows, 1], exact in bf16 since that is what is stored."""
    rms = weight.float().square().mean(dim=-1, keepdim=True).sqrt()
    step = (rms * (max(k, LEAST_K[bits]) / levels(bits))).bfloat16().float()
    return step.masked_fill(step == 0, 1.0)


def to_codes(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    return torch.round(weight.float() / step).clamp_(-levels(bits), levels(bits))


class Rounded(NamedTuple):
    """A tensor as the artifact holds it: codes and row steps, or fp16 values and no steps."""

    bits: int
    values: Tensor
    steps: Tensor | None

    def weight(self) -> Tensor:
        return self.values.float() if self.steps is None else self.values * self.steps


def quantise(weight: Tensor, k: float, bits: int) -> Rounded:
    """Round a matrix, or a stack of them, to nearest; vectors become fp16, never infinite."""
    if bits == PLAIN_BITS:
        return Rounded(bits, weight.float().clamp(-65504, 65504).half(), None)
    steps = row_steps(weight, k, bits)
    return Rounded(bits, to_codes(weight, steps, bits), steps)


def quantised(state: Tensors, k: float, cfg: Config, factors: Factors) -> dict[str, Rounded]:
    """Round every tensor of a model; by GPTQ, equal shapes at once, those that have a factor."""
    rounded = {n: quantise(w.detach(), k, tensor_bits(n, cfg)) for n, w in state.items()}
    kinds = {n: (rounded[n].bits, state[n].shape) for n in factors}
    for kind in set(kinds.values()):
        names = [n for n in kinds if kinds[n] == kind]
        parts = ((state[n].detach(), rounded[n].steps, *factors[n][:2]) for n in names)
        codes = gptq_codes(kind[0], *map(torch.stack, zip(*parts, strict=True)))
        rounded |= {n: rounded[n]._replace(values=c) for n, c in zip(names, codes, strict=True)}
    if cfg.lqer_rank and HEAD in factors:  # LQER (#1797): the error's largest parts in the logits
        error = (state[HEAD].detach() - rounded[HEAD].weight()) * (size := factors[HEAD][2])
        right = torch.linalg.eigh((error.mT @ error).cpu())[1][:, -cfg.lqer_rank :].to(error)
        for name, part in ((LEFT, error @ right), (RIGHT, right / size[:, None])):
            rounded[name] = quantise(part.mT, 0, 6)
    return rounded


def weights_of(rounded: Mapping[str, Rounded]) -> dict[str, Tensor]:
    """Return the weights of a model's tensors, the embedding's with its repair."""
    weights = {name: r.weight() for name, r in rounded.items()}
    if LEFT in weights:
        weights[HEAD] += weights.pop(LEFT).mT @ weights.pop(RIGHT)
    return weights


def tensor_bits(name: str, cfg: Config) -> int:
    """Return the bits of a parameter; only the names of matrices end in .weight."""
    if not name.endswith(".weight"):
        return PLAIN_BITS
    other = cfg.mlp_bits if ".mlp." in name else cfg.embed_bits
    return cfg.attn_bits if ".attn." in name else other


def entropy_bits(codes: Tensor) -> float:
    """Return the order-0 entropy of all codes of a tensor, in bits."""
    counts = torch.bincount(codes.flatten().int() + 128, minlength=256)
    seen = counts[counts > 0].cpu().double()
    return float(-(seen * (seen / seen.sum()).log2()).sum())


def predicted_bytes(state: Tensors, k: float, cfg: Config) -> int:
    """Predict the artifact's size at this k from the entropy of its codes, within about 1 %."""
    # 1,000 bytes of header and 80 a tensor; fp16 codes to 14 bits, a row's step to 10.
    repair = 6 * cfg.gptq * cfg.lqer_rank * (cfg.vocab_size + cfg.model_dim)
    bits = 8000.0 + 640 * len(state) + repair
    for name, weight in state.items():
        part = weight[::n] if (n := weight.numel() >> 16) else weight  # 65,536 weights or so
        _, v, steps = quantise(part, k, tensor_bits(name, cfg))
        coded = 14 if steps is None else 10 / weight.size(1) + entropy_bits(v) / v.numel()
        bits += coded * weight.numel()
    return int(bits / 8)


def bisect_k(state: Tensors, target: float, cfg: Config) -> float:
    """Return the least k (the finest steps) predicted to fit `target` bytes, or the largest k."""
    at = bisect.bisect_left(K_GRID, True, key=lambda k: predicted_bytes(state, k, cfg) <= target)
    return K_GRID[min(at, len(K_GRID) - 1)]


def gptq_factor(hessian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GPTQ's order of columns, how an error moves those after it, and inputs' sizes."""
    # With H = U D U^T, U's rows say it, without an inverse (arXiv 2307.13304). Cholesky's L is such
    # a U, counted from the last column; that of the largest diagonal comes first.
    order = hessian.diagonal().argsort()
    h = hessian[order][:, order]
    h.diagonal().add_(0.01 * h.diagonal().mean() + 1e-8)
    lower = torch.linalg.cholesky(h)
    return order.flip(0), (lower / lower.diagonal()).flip(0, 1), hessian.diagonal().sqrt()


def gptq_codes(bits: int, weight, steps, order, factor, block=128) -> Tensor:
    """Return codes [n, rows, cols]: a column's error moves on to those after it (2210.17323)."""
    order, parts = order[:, None].expand_as(weight), (weight.float(), steps.expand_as(weight))
    w, steps = (part.gather(2, order).mT.contiguous() for part in parts)  # a column lies together
    codes, errors = torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.size(1), block):
        end = start + block
        moved = w[:, start:end] + factor[:, :start, start:end].mT @ errors[:, :start]
        for i, column in enumerate(moved.unbind(1), start):
            codes[:, i] = to_codes(column, steps[:, i], bits)
            errors[:, i] = w[:, i] - codes[:, i] * steps[:, i]
            weights = factor[:, i, i + 1 : end, None]
            moved[:, i - start + 1 :].addcmul_(weights, errors[:, i : i + 1])
    return torch.empty_like(weight).scatter_(2, order, codes.mT)


# ==== CODECS ======================================================================================
# Each maps byte matrices ("planes") to bytes and back. Tables are integers, for any language.
Planes = list[np.ndarray]
compress_brotli = functools.partial(brotli.compress, quality=11, lgwin=24)
# Entries of a frequency table are bytes read as small floats: exact to 31, then 4 mantissa bits.
WEIGHTS = np.array([q if q < 16 else (16 + q % 16) << (q // 16 - 1) for q in range(256)])
TABLE_SUM = 2**24 - 256  # constriction adds 1 to each of the 256 counts, which then sum to 2^24
# The bottom of the coder's stack: the decoder finds it again only if every symbol was right.
BOTTOM = np.array([0x59415746], np.uint32)


class CodecError(UserError):
    """A payload that the encoder cannot have written."""


def require(valid: Any, problem: str) -> None:
    if not valid:
        raise CodecError(problem)


def compress_zstd(data: bytes) -> bytes:
    # The window, at most 32 MiB, is what a decoder allocates; matches under 7 bytes only cost here.
    log = min(max(len(data).bit_length(), 10), 25)
    settings = zstandard.ZstdCompressionParameters.from_level(22, window_log=log, min_match=7)
    return zstandard.ZstdCompressor(compression_params=settings).compress(data)


def decompress_zstd(payload: bytes, size: int) -> bytes:
    declared = zstandard.get_frame_parameters(payload).content_size  # what decoding allocates
    require(declared == size, "zstd: wrong size")
    decoder = zstandard.ZstdDecompressor(max_window_size=2**25)
    return decoder.decompress(payload, allow_extra_data=False)


def decompress_brotli(payload: bytes, limit: int) -> bytes:
    """Decompress one whole brotli stream; give up soon after `limit` bytes."""
    decoder = brotli.Decompressor()
    data = decoder.process(payload, output_buffer_limit=limit + 1)
    require(decoder.is_finished() and len(data) <= limit, "brotli: truncated or too long")
    return data


def units_of(plane: np.ndarray, layout: int) -> np.ndarray:
    """Return the runs that share a table: the plane (layout 0), its rows (1) or its columns (2)."""
    return (plane.reshape(1, -1), plane, plane.T)[layout]


def best_layout(plane: np.ndarray) -> int:
    """Return the axis along which code lengths vary more than by chance, or 0."""
    counts = np.bincount(plane.ravel(), minlength=256)
    bits = -np.log2(np.maximum(counts, 1) / plane.size).astype(np.float32)[plane]
    gains = [bits.mean(axis=axis).var() - bits.var() / plane.shape[axis] for axis in (1, 0)]
    long_enough = plane.shape[1] >= 32, plane.shape[0] >= 32
    return int(np.argmax([0.0, *np.where(long_enough, gains, 0.0)]))


def code_lengths(counts: np.ndarray) -> np.ndarray:
    """Return the bits of every symbol in each class; an unseen symbol costs the coder's 24."""
    p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return -np.log2(np.maximum(p, 2.0**-24)).astype(np.float32)


def cluster(counts: np.ndarray, classes: int) -> np.ndarray:
    """Return a class for each unit, so that symbols and ids cost little (k-means by entropy)."""
    mean = counts @ code_lengths(counts.sum(axis=0, keepdims=True))[0] / counts.sum(axis=1)
    ids = np.argsort(np.argsort(mean, kind="stable")) * classes // len(counts)
    whole = counts.astype(np.float64)  # so that sums are exact
    for _ in range(12 if classes > 1 else 0):
        sums = (ids == np.arange(classes)[:, None]) @ whole
        share = np.maximum(np.bincount(ids, minlength=classes), 0.01) / len(ids)
        ids = (counts @ code_lengths(sums).T - np.log2(share).astype(np.float32)).argmin(axis=1)
    return np.unique(ids, return_inverse=True)[1]


def coder_models(tables: np.ndarray) -> list:
    """Build the coder's models from byte tables, by integers alone."""
    weights = WEIGHTS[tables]
    require(weights.any(axis=1).all(), "ans: empty table")
    counts = weights * TABLE_SUM // weights.sum(axis=1, keepdims=True)
    # The most frequent symbol gets what the division lost.
    counts[np.arange(len(counts)), tables.argmax(axis=1)] += TABLE_SUM - counts.sum(axis=1)
    # constriction multiplies by exactly 1.0 (partial sums are integers below 2^24): no rounding.
    categorical = constriction.stream.model.Categorical
    return [categorical(row, perfect=False, lazy=False) for row in counts.astype(np.float64)]


def coding_order(units: Planes, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (class, units of a plane, indices of its units in that class), plane by plane."""
    for u, own in zip(units, np.split(ids, np.cumsum([len(u) for u in units])[:-1]), strict=True):
        yield from ((int(c), u, np.flatnonzero(own == c)) for c in np.unique(own))


def pack_ans(planes: Planes) -> bytes:
    layouts = [best_layout(p) for p in planes]
    units = [units_of(p, layout) for p, layout in zip(planes, layouts, strict=True)]
    counts = np.stack([np.bincount(u, minlength=256) for plane in units for u in plane])
    used, trials = counts[:, counts.any(axis=0)].astype(np.float32), []
    for classes in (1, 4, 16, 64):  # take as many as pay, with tables and ids counted
        ids = cluster(used, classes)
        sums = np.stack([counts[ids == c].sum(axis=0) for c in range(ids.max() + 1)])
        scaled = sums * np.minimum(1, WEIGHTS[-1] / sums.max(axis=1, keepdims=True))
        tables = np.searchsorted((WEIGHTS[1:] + WEIGHTS[:-1]) / 2, scaled).astype(np.uint8)
        deltas = np.diff(tables.ravel(), prepend=np.uint8(0))
        side = compress_brotli(bytes([len(tables), *layouts, *deltas, *ids]))
        trials.append((8 * len(side) + (sums * code_lengths(sums)).sum(), side, ids, tables))
    _, side, ids, tables = min(trials, key=lambda trial: trial[0])
    coder, models = constriction.stream.stack.AnsCoder(BOTTOM), coder_models(tables)
    for c, u, rows in reversed(list(coding_order(units, ids))):  # a stack: last in, first out
        coder.encode_reverse(u[rows].ravel().astype(np.int32), models[c])
    return len(side).to_bytes(4, "little") + side + coder.get_compressed().astype("<u4").tobytes()


def unpack_ans(payload: bytes, planes: Planes) -> None:
    end = 4 + int.from_bytes(payload[:4], "little")
    require(end <= len(payload) and (len(payload) - end) % 4 == 0, "ans: truncated")
    limit = 1 + len(planes) + 255 * 256 + sum(max(p.shape) for p in planes)  # tables and ids
    side = np.frombuffer(decompress_brotli(payload[4:end], limit), np.uint8)
    layouts = side[1 : 1 + len(planes)]
    require(len(layouts) == len(planes) and layouts.max() <= 2, "ans: bad layout")
    units = [units_of(p, layout) for p, layout in zip(planes, layouts, strict=True)]
    deltas, ids = np.split(side[1 + len(planes) :], [256 * int(side[0])])
    require(len(ids) == sum(map(len, units)) and ids.max() < side[0], "ans: bad classes")
    words = np.frombuffer(payload, "<u4", offset=end).astype(np.uint32)
    require(len(words) and words[-1], "ans: no state")  # constriction allows no zero on top
    models = coder_models(np.cumsum(deltas, dtype=np.uint8).reshape(-1, 256))
    coder = constriction.stream.stack.AnsCoder(words)
    for c, u, rows in coding_order(units, ids):
        u[rows] = coder.decode(models[c], rows.size * u.shape[1]).reshape(rows.size, -1)
    require(np.array_equal(coder.get_compressed(), BOTTOM), "ans: damaged symbols")


CODECS = {"zstd": (compress_zstd, decompress_zstd), "brotli": (compress_brotli, decompress_brotli)}
CODECS["ans"] = pack_ans, unpack_ans  # the others take and return all planes as bytes


def encode_planes(codec: str, planes: Planes) -> bytes:
    """Return planes as a codec packs them; those without elements are left out."""
    full = [p for p in planes if p.size]
    data = full if codec == "ans" else b"".join(p.tobytes() for p in full)
    return CODECS[codec][0](data) if data else b""


def decode_planes(codec: str, payload: bytes, shapes: list[tuple[int, int]]) -> Planes:
    """Return the planes of these shapes, or raise CodecError."""
    planes = [np.empty(shape, np.uint8) for shape in shapes]
    full = [p for p in planes if p.size]
    require(full or not payload, "bytes for no symbols")
    try:
        if full and codec == "ans":
            unpack_ans(payload, full)
        elif full:
            data = io.BytesIO(CODECS[codec][1](payload, sum(p.size for p in full)))
            require(all(data.readinto(p) == p.size for p in full), "wrong number of symbols")
    except (zstandard.ZstdError, brotli.error) as e:
        raise CodecError(f"{codec}: {e}") from None
    return planes


# ==== ARTIFACT ====================================================================================
ARTIFACT_MAGIC, ARTIFACT_VERSION = b"FAIRWAY\x00", 1
PRELUDE = struct.Struct("<8sII32s")  # magic, version, bytes of the header, SHA-256 of the header
MODEL_FIELDS = names_with_role(Config, "model")


class Artifact(NamedTuple):
    """The contents of an artifact, as docs/ARTIFACT.md specifies it."""

    config: Config
    weights: dict[str, Tensor]  # as the quantiser left them
    tokenizer: bytes  # a SentencePiece model, or empty
    header: dict[str, Any]


def byte_planes(values: np.ndarray) -> np.ndarray:
    """Split 16-bit values into rows of high and of low bytes: coded apart, they shrink by 8 %."""
    return np.ascontiguousarray(np.ascontiguousarray(values).view(np.uint8).reshape(-1, 2).T[::-1])


def joined_values(planes: np.ndarray) -> np.ndarray:
    """Join the two rows that `byte_planes` made into 16-bit values."""
    return (planes[0].astype("<u2") << 8) | planes[1]


def planes_of(rounded: Mapping[str, Rounded]) -> Planes:
    """Return codes and bf16 steps of each matrix, and the fp16 values of each other tensor."""
    planes = []
    for _, values, steps in rounded.values():
        if steps is None:
            planes.append(byte_planes(values.cpu().numpy()))
        else:
            planes.append(values.to("cpu", torch.int8).numpy().view(np.uint8))
            planes.append(byte_planes((steps.cpu().numpy().view("<u4") >> 16).astype("<u2")))
    return planes


def encode_artifact(rounded: Mapping, k: float, cfg, looping, codec, tokenizer) -> bytes:
    """Return the whole file."""
    payload = encode_planes(codec, planes_of(rounded))
    inside = compress_brotli(tokenizer) if cfg.embed_tokenizer else b""
    model = {name: getattr(cfg, name) for name in MODEL_FIELDS}
    header = {"model": model, "looping": looping, "k": k, "codec": codec}
    header["tensors"] = {n: [r.bits, *r.values.shape] for n, r in rounded.items()}
    digests = [hashlib.sha256(data).hexdigest() for data in (payload + inside, tokenizer)]
    header |= {"payload_bytes": len(payload), "payload_sha256": digests[0]}
    header |= {"tokenizer_bytes": len(inside), "tokenizer_sha256": digests[1]}
    text = json.dumps(header, separators=(",", ":")).encode()
    start = PRELUDE.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), hashlib.sha256(text).digest())
    return start + text + payload + inside


def decode_tensors(header: Mapping[str, Any], payload: bytes) -> dict[str, Rounded]:
    """Return the tensors of a payload, codes as int8, by a header that is known to be right."""
    shapes: list[tuple] = []
    for bits, *shape in header["tensors"].values():
        shapes += [(2, math.prod(shape))] if bits == PLAIN_BITS else [tuple(shape), (2, shape[0])]
    planes, rounded = iter(decode_planes(header["codec"], payload, shapes)), {}
    for name, (bits, *shape) in header["tensors"].items():
        if bits == PLAIN_BITS:
            values = torch.from_numpy(joined_values(next(planes)).view("<f2")).reshape(shape)
            rounded[name] = Rounded(bits, values, None)
        else:
            codes = torch.from_numpy(next(planes).view(np.int8))
            steps = (joined_values(next(planes)).astype("<u4") << 16).view("<f4")
            rounded[name] = Rounded(bits, codes, torch.from_numpy(steps)[:, None])
    return rounded


def decode_artifact(data: bytes) -> Artifact:
    """Return what `encode_artifact` was given, as the file on disk holds it."""
    start = PRELUDE.size + PRELUDE.unpack_from(data)[2]
    header, parts = json.loads(data[PRELUDE.size : start]), data[start:]
    if hashlib.sha256(parts).hexdigest() != header["payload_sha256"]:
        raise UserError("the artifact on disk differs from what was written; RESUME=1 rewrites it")
    payload, inside = parts[: header["payload_bytes"]], parts[header["payload_bytes"] :]
    cfg = Config(**header["model"], train_batch_tokens=8 * header["model"]["train_seq_len"])
    weights = weights_of(decode_tensors(header, payload))
    return Artifact(cfg, weights, brotli.decompress(inside) if inside else b"", header)


def build_model(artifact: Artifact, device: torch.device | str = "cpu") -> GPT:
    """Build the model of an artifact: strictly, every tensor named once."""
    model = GPT(artifact.config)
    model.load_state_dict(artifact.weights, strict=True)
    model.looping = artifact.header["looping"]
    return model.placed(device)


# ==== MODEL =======================================================================================
# Parameters stay fp32; autocast chooses the type of products. x_BTD is [B, T, D]: B sequences,
# T positions, D width, H query heads, G key heads, C width of a head, V pieces, N all positions.
linear = functools.partial(nn.Linear, bias=False)


def normalised(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),)).type_as(x)  # under autocast, torch 2.12 returns fp32


def rope_tables(length: int, dims: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [length, dims/2], of float64 angles: in bf16, half of them coincide."""
    frequency = base ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x_BHTC: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Apply RoPE to the first 2R channels of each head; leave the others as they are."""
    half = cos_TR.size(-1)
    a, b, rest = x_BHTC.split([half, half, x_BHTC.size(-1) - 2 * half], dim=-1)
    turned = torch.cat([a * cos_TR + b * sin_TR, b * cos_TR - a * sin_TR], dim=-1).type_as(x_BHTC)
    return torch.cat([turned, rest], dim=-1)


def attend(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """Attend causally, by the best kernel that PyTorch has; all attention goes through here."""
    gqa = q_BHTC.size(1) != k_BGTC.size(1)
    return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, is_causal=True, enable_gqa=gqa)


def without_own_value(y_BHTC: Tensor, v_BGTC: Tensor) -> Tensor:
    """Remove from each head's output its part along the position's own value (XSA, #265)."""
    B, H, T, C = y_BHTC.shape
    y, own = y_BHTC.reshape(B, v_BGTC.size(1), -1, T, C), F.normalize(v_BGTC, dim=-1).unsqueeze(2)
    return (y - (y * own).sum(-1, keepdim=True) * own).view(B, H, T, C)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys and a gain for each head."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        D, H, G, C = cfg.model_dim, cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
        self.width, self.exclusive = C, layer >= cfg.num_layers - cfg.xsa_last_n
        self.q, self.k = linear(D, H * C), linear(D, G * C)
        self.v, self.proj = linear(D, G * C), linear(D, D)
        self.q_gain = nn.Parameter(torch.full((H,), cfg.qk_gain_init))
        self.gate = nn.Parameter(torch.zeros(H, min(12, D))) if cfg.attn_gate else None  # #1787

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], attention: Callable) -> Tensor:
        B, T, D = x_BTD.shape
        flat = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        q, k, v = (part.view(B, T, -1, self.width).transpose(1, 2) for part in flat)
        q, k = rotate(normalised(q), *rope), rotate(normalised(k), *rope)
        y = attention(q * self.q_gain.type_as(q)[:, None, None], k, v)
        y = (without_own_value(y, v) if self.exclusive else y).transpose(1, 2)
        if self.gate is not None:  # twice a sigmoid, so that zero weights open it to 1
            gate = 2 * torch.sigmoid(F.linear(x_BTD[..., : self.gate.size(1)], self.gate))
            y = y * gate.type_as(y)[..., None]
        return self.proj(y.reshape(B, T, D))


class MLP(nn.Module):
    """A squared ReLU, or LeakyReLU (0.5 gains 0.002 to 0.003 BPB, #549), between two matrices."""

    def __init__(self, cfg: Config):
        super().__init__()
        hidden, self.slope = int(cfg.mlp_mult * cfg.model_dim), cfg.leaky_slope
        self.fc, self.proj = linear(cfg.model_dim, hidden), linear(hidden, cfg.model_dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.proj(F.leaky_relu(self.fc(x_BTD), self.slope).square())


class Block(nn.Module):
    """Attention, then MLP; from PARALLEL_START_LAYER on, each reads a lane of its own (#1204)."""

    def __init__(self, cfg: Config, layer: int):
        super().__init__()
        self.attn, self.mlp, ones = Attention(cfg, layer), MLP(cfg), torch.ones(cfg.model_dim)
        self.attn_scale, self.mlp_scale = nn.Parameter(ones.clone()), nn.Parameter(ones.clone())
        self.resid_mix = nn.Parameter(torch.stack([ones, 0 * ones]))
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        parallel = 0 < cfg.parallel_start_layer <= layer
        self.lane_mix = nn.Parameter(torch.ones(2, 2)) if parallel else None  # [lane, sub-layer]

    def forward(self, x: Tensor, lane: Tensor, x0: Tensor, rope, attention) -> list[Tensor]:
        """Return both lanes after this block; one tensor stands for both before they part."""
        old_scale, x0_scale = self.resid_mix.type_as(x)
        attn_scale, mlp_scale = self.attn_scale.type_as(x), self.mlp_scale.type_as(x)
        mixed = old_scale * x + x0_scale * x0
        attended = attn_scale * self.attn(normalised(mixed) * self.norm_scale, rope, attention)
        read = mixed + attended if self.lane_mix is None else lane
        written = mlp_scale * self.mlp(normalised(read) * self.norm_scale)
        if self.lane_mix is None:
            return [read + written] * 2
        mix, lanes = self.lane_mix.type_as(x), (mixed, lane)
        return [old + mix[i, 0] * attended + mix[i, 1] * written for i, old in enumerate(lanes)]


class BigramHash(nn.Module):
    """An embedding of the last two tokens, hashed into a small table (#162)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.table = nn.Embedding(cfg.bigram_vocab_size, cfg.bigram_dim)
        self.proj = linear(cfg.bigram_dim, cfg.model_dim)
        self.scale = nn.Parameter(torch.tensor(0.05))

    def buckets(self, tokens_BT: Tensor) -> Tensor:
        """Return (36313 cur xor 27191 prev) mod (buckets - 1); the first position has the last."""
        last = self.table.num_embeddings - 1
        mixed = torch.bitwise_xor(36313 * tokens_BT[:, 1:], 27191 * tokens_BT[:, :-1])
        return F.pad(mixed % last, (1, 0), value=last)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        return self.proj(self.table(self.buckets(tokens_BT))) * self.scale


class SmearGate(nn.Module):
    """Each channel takes a learned part of the embedding before it (#162)."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        before = torch.cat([x_BTD[:, :1], x_BTD[:, :-1]], dim=1)
        # Nothing crosses a BOS: reading the document before is a leak worth 0.00255 BPB (#1851).
        before = torch.where((tokens_BT == BOS_ID)[..., None], x_BTD, before)
        return x_BTD + torch.sigmoid(self.gate).type_as(x_BTD) * (before - x_BTD)


class GPT(nn.Module):
    """A U-Net of blocks over tied embeddings: skips lead from the first half to the second."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.looping = False  # set after LOOP_AT_FRAC of the run: depth recurrence (#1204)
        self.stream_dtype = torch.float32  # of activations between blocks
        D, width = cfg.model_dim, cfg.rope_dims or cfg.model_dim // cfg.num_heads
        self.tok_emb = nn.Embedding(cfg.vocab_size, D)
        self.bigram = BigramHash(cfg) if cfg.bigram_vocab_size else None
        self.smear = SmearGate(D) if cfg.smear_gate else None
        self.blocks = nn.ModuleList(Block(cfg, i) for i in range(cfg.num_layers))
        skips = max(len(self.passes(looping)) // 2 for looping in (False, True))
        self.skip_weights = nn.Parameter(torch.ones(skips, D))
        self.skip_gates = nn.Parameter(torch.zeros(skips, D)) if cfg.skip_gates else None  # #1855
        cos, sin = rope_tables(cfg.train_seq_len, width, cfg.rope_base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def passes(self, looping: bool) -> list[int]:
        """Return the layers in running order: 0 1 2 3, or 0 1 2 1 2 3 with a loop over 1 and 2."""
        layers, end = list(range(self.cfg.num_layers)), self.cfg.loop_end + 1
        again = layers[self.cfg.loop_start : end] * (self.cfg.num_loops * looping)
        return layers[:end] + again + layers[end:]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        x = self.tok_emb(tokens_BT)
        x = x if self.bigram is None else x + self.bigram(tokens_BT)
        x = normalised(x).to(self.stream_dtype)
        return x if self.smear is None else self.smear(x, tokens_BT)

    def placed(self, device: torch.device | str) -> GPT:
        """Move to a device, and choose the type of its activations."""
        self.stream_dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        return self.to(device)

    def logits(self, tokens_BT: Tensor, pieces: Tensor | None = None) -> Tensor:
        """Return [B, T, V] in fp32, or of a part of V: what each position predicts to come next."""
        if (T := tokens_BT.size(1)) > (most := len(self.cos)):
            raise UserError(f"{T} tokens in a sequence, but the model's TRAIN_SEQ_LEN is {most}")
        rope = self.cos[:T], self.sin[:T]
        return self.from_embedded(self.embed(tokens_BT), rope, pieces=pieces)

    def from_embedded(self, x0: Tensor, rope, attention=attend, pieces=None, first=0) -> Tensor:
        """Return logits from position `first` on; rotations and attention may be a cache's."""
        x, lane, order, skips = x0, x0, self.passes(self.looping), []
        half = len(order) // 2
        for i, layer in enumerate(order):
            if i >= half and skips:
                skip = self.skip_weights[i - half].type_as(x) * skips.pop()
                if self.skip_gates is not None:
                    gate = torch.sigmoid(self.skip_gates[i - half]).type_as(x)
                    x, lane, skip = gate * x, gate * lane, (1 - gate) * skip
                x, lane = x + skip, lane + skip
            x, lane = self.blocks[layer](x, lane, x0, rope, attention)
            if i < half:
                skips.append(x)
        return self.head(normalised((x + lane)[:, first:] / 2), pieces)

    def head(self, x: Tensor, pieces: Tensor | None = None) -> Tensor:  # logits of hidden states
        weight = self.tok_emb.weight if pieces is None else self.tok_emb.weight[pieces]
        x = F.linear(x, weight).float()
        return self.cfg.logit_softcap * torch.tanh(x / self.cfg.logit_softcap)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, sample=None) -> Tensor:
        """Return the cross-entropy of every target, [B, T], in nats, perhaps over a sample of V."""
        pieces, places, chances = sample or (None, targets_BT.flatten(), None)
        logits_NV = self.logits(tokens_BT, pieces).flatten(0, 1)
        logits_NV = logits_NV if sample is None else logits_NV - chances
        return F.cross_entropy(logits_NV, places, reduction="none").view_as(targets_BT)


@torch.no_grad()
def initialise(model: GPT, cfg: Config) -> None:
    """Set the weights from the seed alone, drawn on the CPU: equal on every device and rank."""
    torch.manual_seed(cfg.seed)
    matrices = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, module in matrices:
        weight = torch.zeros(module.weight.shape)
        if not name.endswith((".attn.proj", ".mlp.proj")):  # zeros: each block begins as identity
            if cfg.ortho_init and min(weight.shape) >= 64:
                nn.init.orthogonal_(weight, (2 * cfg.num_layers) ** -0.5 if "proj" in name else 1.0)
            else:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        module.weight.copy_(weight)
    model.tok_emb.weight.copy_(torch.randn(model.tok_emb.weight.shape) * cfg.tied_embed_init_std)
    if model.bigram is not None:
        model.bigram.table.weight.zero_()  # not the projection too: both at zero never learn


# ==== WEIGHTS =====================================================================================
# Weights of equal shape lie side by side: a step launches hundreds of kernels, not thousands.
class Buffer:
    """All weights in one tensor, seen as `params` or as `banks` of equal matrices; last, a loss."""

    def __init__(self, model: GPT, flat: Tensor | None = None, dtype=torch.float32):
        parameters, groups, views, end = dict(model.named_parameters()), {}, {}, 0
        for name, p in parameters.items():
            kind = "matrix" if name.endswith(".weight") else "vector"
            kind = "embedding" if name in ("tok_emb.weight", "bigram.table.weight") else kind
            key = kind, tensor_bits(name, model.cfg), () if kind == "vector" else (*p.shape,)
            groups.setdefault(key, []).append(name)
        total = 1 + sum(p.numel() + 31 for p in parameters.values())
        self.flat = torch.zeros(total, dtype=dtype, device=p.device) if flat is None else flat
        self.keys, self.banks = list(groups), []
        for (kind, _, shape), names in groups.items():
            start = end
            for name in names:  # vectors are padded with zeros: compiled code copies unaligned ones
                size = parameters[name].numel()
                views[name] = self.flat[end : end + size].view(parameters[name].shape)
                end += size + (-size % 32 if kind == "vector" else 0)
            self.banks.append(self.flat[start:end].view(-1, *shape))
            end += -end % 32
        self.params = [views[name] for name in parameters]


def use_weights(params: list[nn.Parameter], values: list[Tensor]) -> None:
    """Let a model compute with these values; nothing is copied."""
    for p, value in zip(params, values, strict=True):
        p.data = value.detach()


def rounded_parameters(model: GPT, k: float, values=None, factors=None) -> list[Tensor]:
    """Return what the artifact would hold at this k for each parameter, or for `values`."""
    names, own = zip(*model.named_parameters(), strict=True)
    rounded = quantised(dict(zip(names, values or own, strict=True)), k, model.cfg, factors or {})
    return [*weights_of(rounded).values()]


def rounded_banks(banks: list[Tensor], steps: list[Tensor], bits: list[int]) -> list[Tensor]:
    """Return banks as the export rounds them; compiled, they are read and written once."""
    trios = zip(banks, steps, bits, strict=True)
    return [quantise(w, 0, b).weight() if s is None else to_codes(w, s, b) * s for w, s, b in trios]


# ==== OPTIMISERS ==================================================================================
NEWTON_SCHULZ = [(3.4445, -4.7750, 2.0315)]  # one quintic for all steps (Keller Jordan)
POLAR_EXPRESS = [  # the best polynomial for each step (arXiv 2505.16932, #1787)
    (8.156554524902, -22.483292925578, 15.878769915207),
    (4.042929935167, -2.808917465909, 0.500017845105),
    (3.891667802293, -2.772484153218, 0.506064817850),
    (3.285753657756, -2.368129493343, 0.464490242330),
    (2.346541325860, -1.709782838269, 0.423235511693),
]


def orthogonalised(g: Tensor, steps: int, coefficients: list[tuple[float, float, float]]) -> Tensor:
    """Return matrices [n, rows, cols] with their singular values pushed to about one."""
    x = g.bfloat16() if g.is_cuda else g.float()
    x = x.mT if (tall := x.size(-2) > x.size(-1)) else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    for i in range(steps):
        a, b, c = coefficients[min(i, len(coefficients) - 1)]
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, and weight decay; ranks share the work, bank by bank."""

    def __init__(self, banks: list[Tensor], cfg: Config, rt: Runtime):
        lr, wd, momentum = cfg.matrix_lr, cfg.muon_wd, cfg.muon_momentum
        super().__init__(banks, dict(lr=lr, peak_lr=lr, momentum=momentum, wd=wd))
        self.rt, self.steps, self.row_normalize = rt, cfg.muon_backend_steps, cfg.muon_row_normalize
        self.coefficients = POLAR_EXPRESS if cfg.muon_polar_express else NEWTON_SCHULZ

    @torch.no_grad()
    def step(self) -> None:
        group, moves = self.param_groups[0], []
        for bank in (banks := group["params"]):
            # Every rank holds every momentum, so that a checkpoint of one rank is complete.
            if not (state := self.state[bank]):
                state["momentum"] = torch.zeros_like(bank)
            average = state["momentum"].mul_(group["momentum"]).add_(bank.grad)
            moves.append(self.share(bank.grad.add(average, alpha=group["momentum"])))
        for bank, (move, exchange) in zip(banks, moves, strict=True):
            if exchange:
                exchange.wait()
            rate = group["lr"] * max(1, bank.size(1) / bank.size(2)) ** 0.5
            bank.mul_(1 - group["lr"] * group["wd"]).add_(move[: len(bank)], alpha=-rate)

    def share(self, bank: Tensor) -> tuple[Tensor, Any]:
        """Orthogonalise this rank's matrices; return the place of all, and what fills the rest."""
        rank, world, each = self.rt.rank, self.rt.world, -(-len(bank) // self.rt.world)
        own = bank[rank * each :][:each]
        if self.row_normalize:  # rows of equal length first: MuonEq-R, 0.001 BPB (#1285)
            own = own / (own.norm(dim=2, keepdim=True) + 1e-7)
        own = orthogonalised(own, self.steps, self.coefficients)
        if world == 1:
            return own, None
        part = F.pad(own, (0, 0, 0, 0, 0, each - len(own)))
        joint = part.new_empty(each * world, *bank.shape[1:])
        return joint, dist.all_gather_into_tensor(joint, part, async_op=True)


def make_optimisers(weights: Buffer, gradients: Buffer, cfg: Config, rt: Runtime) -> list:
    """Return [Muon, AdamW] over the banks; every weight is in one bank."""
    groups = {"matrix": [], "embedding": [], "vector": []}
    for (kind, *_), w, g in zip(weights.keys, weights.banks, gradients.banks, strict=True):
        w.grad = g
        groups[kind].append(w)
    kinds = (("embedding", cfg.tied_embed_lr, cfg.embed_wd), ("vector", cfg.scalar_lr, cfg.adam_wd))
    kinds = [dict(params=groups[k], lr=lr, peak_lr=lr, weight_decay=wd) for k, lr, wd in kinds]
    fused, betas = rt.device.type in ("cpu", "cuda"), (cfg.beta1, cfg.beta2)
    adam = torch.optim.AdamW(kinds, betas=betas, eps=cfg.adam_eps, fused=fused)
    return [Muon(groups["matrix"], cfg, rt), adam]


# ==== SCHEDULES ===================================================================================
def progress_of(step: int, elapsed_s: float, cfg: Config, reserve_s: float = 0.0) -> float:
    """Return the used part of the steps or of the clock less its reserve, whichever is larger."""
    cap = cfg.max_wallclock_seconds
    return max(step / cfg.iterations, elapsed_s / max(cap - reserve_s, 1e-9) if cap else 0.0)


def lr_scale(progress: float, cfg: Config) -> float:
    """Return 1, then a line to 0 over the last WARMDOWN_FRAC of the run, never less than MIN_LR."""
    return max(cfg.min_lr, min(1.0, (1 - progress) / cfg.warmdown_frac if cfg.warmdown_frac else 1))


def momentum_at(step: int, cfg: Config) -> float:
    part = min(1.0, step / n) if (n := cfg.muon_momentum_warmup_steps) else 1.0
    return cfg.muon_momentum_warmup_start * (1 - part) + cfg.muon_momentum * part


class Averages:
    """SWA, the mean of some late weights, and EMA, both in fp32: bf16 sums cost 1.4 nats (#212)."""

    def __init__(self):
        self.swa, self.ema, self.swa_count, self.seen = [], [], 0, 0.0

    @torch.no_grad()
    def update(self, params: list[nn.Parameter], step: int, progress: float, cfg: Config) -> None:
        if cfg.swa_start_frac < 1 and progress >= cfg.swa_start_frac and step % cfg.swa_every == 0:
            self.swa = self.swa or [torch.zeros_like(p) for p in params]
            self.swa_count += 1
            torch._foreach_add_(self.swa, params)
        if cfg.ema_decay:
            # Of a run of 7,000 steps: unscaled, a short run loses 0.077 BPB (#1125).
            horizons = (1 - cfg.ema_decay) * 7000 * max(0.0, progress - self.seen)
            self.ema, self.seen = self.ema or [p.detach().clone() for p in params], progress
            torch._foreach_lerp_(self.ema, params, 1 - math.exp(-horizons))

    def candidates(self) -> dict[str, list[Tensor]]:
        averages = {"swa": [s / self.swa_count for s in self.swa], "ema": self.ema}
        return {name: values for name, values in averages.items() if values}


# ==== RUNTIME =====================================================================================
# Peak bf16 FLOP/s without sparsity, by a part of the device's name, for the MFU in the log.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "5090": 209e12}


class Runtime(NamedTuple):
    """The place of a process: its rank, the number of ranks, its device, that device's name."""

    rank: int
    world: int
    device: torch.device
    name: str

    @property
    def mine(self) -> slice:
        return slice(self.rank, None, self.world)  # of any list that ranks share

    def autocast(self):
        on_cuda = self.device.type == "cuda"
        return torch.autocast("cuda", torch.bfloat16) if on_cuda else contextlib.nullcontext()


def best_device() -> str:
    mps = torch.backends.mps.is_available()
    return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"


def set_up_runtime(cfg: Config, env: Mapping[str, str]) -> Runtime:
    """Read torchrun's variables, choose the device, and join the other ranks."""
    defaults = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    rank, world, local = (int(env.get(name, default)) for name, default in defaults)
    if 8 % world:
        raise UserError(f"WORLD_SIZE is {world}; it must divide 8, the parts of a batch")
    kind, best = cfg.device or best_device(), best_device()
    if kind not in ("cpu", best):
        raise UserError(f"DEVICE is {kind}, but PyTorch sees only {best}; unset it")
    device, name = torch.device(kind), f"{kind} {platform.machine()}"
    if kind == "cpu" and sys.platform == "linux":  # page faults would take 10 to 40 % of a step
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 1 << 30)  # M_MMAP_MAX, M_TRIM_THRESHOLD
    if kind == "cuda":
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")  # what autocast leaves in fp32 may use TF32
        device, name = torch.device(kind, local), torch.cuda.get_device_name(local)
    if world > 1:  # an export of the first rank may take longer than NCCL's ten minutes
        backend, ids = ("nccl", device) if kind == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=ids)
    return Runtime(rank, world, device, name)


def largest(rt: Runtime, *numbers: float) -> list[float]:
    """Return the largest of each number over the ranks, so that all ranks decide alike."""
    if rt.world == 1:
        return [*numbers]
    shared = torch.tensor(numbers, device=rt.device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


class Log:
    """The challenge's `key:value` lines and the same events as JSON; only rank 0 writes."""

    def __init__(self, cfg: Config, rt: Runtime, run_id: str):
        self.run_id, self.on = run_id, rt.rank == 0
        self.out, self.summary = Path(cfg.out_dir), {}
        if not self.on:
            return
        folder, mode = self.out / "logs", "a" if cfg.resume else "w"
        folder.mkdir(parents=True, exist_ok=True)
        paths = folder / f"{run_id}.txt", folder / f"{run_id}.jsonl"
        self.text, self.events = (open(p, mode, encoding="utf-8", buffering=1) for p in paths)  # noqa: SIM115

    def __call__(self, line: str, event: str = "", screen: bool = True, **data: Any) -> None:
        if not self.on:
            return
        if event in ("start", "val", "artifact", "final"):
            self.summary[event] = data
        # A full disk or a closed pipe costs lines of the log, never the run.
        with contextlib.suppress(OSError):
            self.text.write(line + "\n")
            if event:
                record = {"event": event, "time": round(time.time(), 3), **data}
                self.events.write(f"{json.dumps(record)}\n")
        with contextlib.suppress(OSError):
            if screen:
                print(line, flush=True)

    def close(self) -> None:
        """Add a line to runs.jsonl, once a run has ended: its settings, hashes, scores, bytes."""
        if not self.on:
            return
        record = {"time": round(time.time(), 3), "run_id": self.run_id, **self.summary}
        with contextlib.suppress(OSError), open(self.out / "runs.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def log_header(log: Log, cfg: Config, rt: Runtime, data: Data, preset: str) -> None:
    """Log source, versions and hardware to the file, and hashes of all that decides the run."""
    source, settings = Path(__file__).read_text(encoding="utf-8"), asdict(cfg)
    smi, rule, py, pytorch = "", "=" * 100, sys.version, str(torch.__version__)
    with contextlib.suppress(OSError):  # no such program
        smi = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    versions = f"Running Python {py}\nRunning PyTorch {pytorch}\n{platform.platform()}\n{smi}"
    log(f"{source}\n{rule}\n{versions}\n{rule}\nsettings: {json.dumps(settings)}", screen=False)
    contents = {"code": source, "settings": json.dumps(settings, sort_keys=True)}
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    hashes |= {"tokenizer": file_sha256(data.tokenizer_path), "data": data.fingerprint}
    start = dict(run_id=log.run_id, preset=preset, device=rt.name, torch=pytorch)
    words = [f"{name}:{value}" for name, value in start.items()]
    text = f"{' '.join(words)}\n{' '.join(f'{n}_sha256:{value}' for n, value in hashes.items())}"
    log(text, "start", settings=settings, sha256=hashes, world_size=rt.world, python=py, **start)


# ==== TRAINING ====================================================================================
# A step makes the same update on 1, 2, 4 or 8 devices. Ranks agree on all that the clock decides.
CODE_STUB_BYTES = 4096  # two loader stubs of 1,450 bytes, and about 20 bytes a file for its name
READ_EVERY = 8  # steps between two looks at the device, for which a GPU must wait
Report = collections.namedtuple("Report", "step loss elapsed signum")


@dataclass
class Run:
    """The state of a run; a checkpoint holds what is needed to go on from it."""

    cfg: Config
    rt: Runtime
    log: Log
    data: Data
    model: GPT
    params: list[nn.Parameter]
    stream: TokenStream
    loss_fn: Callable[[Tensor, Tensor], Tensor]  # the model, or its compiled form
    round_fn: Callable  # `rounded_banks`, or its compiled form
    weights: Buffer  # the parameters are views of it
    sums: Buffer  # of gradients and loss, over passes and ranks
    gradients: Buffer  # `sums`, or its copy in fp32
    rounded: Buffer  # what passes see once `qat` is on
    optimisers: list[torch.optim.Optimizer]
    averages: Averages
    step: int = 0
    train_s: float = 0.0  # until the clock was last started
    k: float = 0.0  # of the quantiser
    qat: bool = False  # passes see rounded weights
    clock: float | None = None
    reserve_s: float = 0.0  # kept of the clock for the choices at the end
    signum: int = 0
    saved_s: float = 0.0  # the clock at the last checkpoint
    news: Report = Report(0, 0.0, 0.0, 0)  # of the last look: the ranks' clock, a signal or 0
    logged: tuple[int, float] = (0, 0.0)  # step and clock of the last line

    def elapsed(self) -> float:
        return self.train_s + (time.perf_counter() - self.clock if self.clock is not None else 0.0)

    def set_clock(self, running: bool) -> None:
        if self.rt.device.type != "cpu":
            torch.accelerator.synchronize()
        self.train_s, self.clock = self.elapsed(), time.perf_counter() if running else None


def agree(run: Run) -> None:
    """Read the loss of the last step, and agree with the other ranks on clock and signal."""
    loss = run.sums.flat[-1].item() if run.step > run.news.step else run.news.loss
    run.news = Report(run.step, loss, *largest(run.rt, run.elapsed(), run.signum))
    if not math.isfinite(loss):
        last = path if (path := Path(run.cfg.out_dir, "checkpoint.pt")).exists() else None
        message = f"the loss of step {run.step} is not finite; the last checkpoint: {last}"
        raise UserError(f"{message}; lower MATRIX_LR or set GRAD_CLIP_NORM")


def make_run(cfg: Config, rt: Runtime, data: Data, log: Log, model: GPT, tokens: list) -> Run:
    """Return the state of a run at its start, with the model's parameters in one buffer."""
    weights, params = Buffer(model), list(model.parameters())
    torch._foreach_copy_(weights.params, [p.data for p in params])
    use_weights(params, weights.params)
    sums = Buffer(model, dtype=torch.float64 if cfg.exact_sums else torch.float32)
    gradients = Buffer(model) if cfg.exact_sums else sums
    rounded = Buffer(model) if cfg.qat_start_frac < 1 else weights
    optimisers, functions = make_optimisers(weights, gradients, cfg, rt), (model, rounded_banks)
    if cfg.compile:  # one shape, one graph: were shapes dynamic, all would be slower
        functions = [torch.compile(f, fullgraph=True, dynamic=False) for f in functions]
    rest = *functions, weights, sums, gradients, rounded, optimisers, Averages()
    return Run(cfg, rt, log, data, model, params, TokenStream(tokens), *rest)


def set_up(cfg: Config, rt: Runtime, data: Data, log: Log) -> Run:
    """Build the model and its optimisers, log them, and predict the size of the artifact."""
    model = GPT(cfg).placed(rt.device)
    initialise(model, cfg)
    run = make_run(cfg, rt, data, log, model, data.train)
    count, tokens = sum(p.numel() for p in run.params), sum(map(len, data.train))
    shapes = {n: [*p.shape] for n, p in model.named_parameters()}
    val_counts = f"tokens:{len(data.val) - 1} bytes:{data.val_bytes}"
    H, G, C = cfg.num_heads, cfg.num_kv_heads, cfg.model_dim // cfg.num_heads
    like = dict(device=rt.device, dtype=model.stream_dtype, requires_grad=True)
    q, k = (torch.empty(1, n, cfg.train_seq_len, C, **like) for n in (H, G))
    kernels = torch._fused_sdp_choice if rt.device.type != "mps" else lambda *_, **__: 0  # math
    kernel = nn.attention.SDPBackend(kernels(q, k, k, is_causal=True, enable_gqa=H != G)).name
    log(f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={data.tokenizer_path}")
    log(f"train_loader:dataset:{data.folder.name} train_shards:{len(data.train)} tokens:{tokens}")
    log(f"val_loader:shards pattern={data.folder}/*_val_*.bin {val_counts}")
    log(f"model_params:{count}", "model", parameters=count, tensors=shapes)
    log(
        f"world_size:{rt.world} grad_accum_steps:{len([*batch_passes(run)])}\n"
        f"sdp_backends:{kernel}\nattention_mode:gqa num_heads:{H} num_kv_heads:{G}\n"
        f"tie_embeddings:True embed_lr:{cfg.tied_embed_lr} head_lr:0.0 matrix_lr:{cfg.matrix_lr} "
        f"scalar_lr:{cfg.scalar_lr}\ntrain_batch_tokens:{cfg.train_batch_tokens} "
        f"train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}\n"
        f"seed:{cfg.seed}"
    )
    # Normal rows stand in for trained ones: the size of codes depends on shape, not on scale.
    noise = torch.Generator().manual_seed(0)
    state = {n: torch.randn(shape, generator=noise) for n, shape in shapes.items()}
    predict_size(run, "before training", state)
    if cfg.compile:
        log("compile:torch.compile runs with the first step and takes about a minute")
    return run


def packed_code_bytes(files: Iterable[str | Path]) -> int:
    """Return the bytes that these source files count in a record, which ships them packed."""
    sources = b"".join(Path(f).read_bytes() for f in files)
    return len(lzma.compress(sources, preset=9 | lzma.PRESET_EXTREME)) + CODE_STUB_BYTES


@functools.cache  # packing takes up to half a second, which the training clock must not pay
def code_bytes(cfg: Config) -> int:
    """Return the bytes of counted code: this file and EXTRA_CODE_FILES, packed."""
    names = [name.strip() for name in cfg.extra_code_files.split(",") if name.strip()]
    if missing := [name for name in names if not Path(name).is_file()]:
        raise UserError(f"EXTRA_CODE_FILES names {missing[0]}, which is no file")
    return packed_code_bytes([__file__, *names])


def size_target(cfg: Config) -> int:
    """Return the bytes that the artifact may have: the budget less margin and counted code."""
    return cfg.size_budget_bytes - cfg.size_margin_bytes - code_bytes(cfg)


def check_room(size: int, cfg: Config) -> None:
    if (over := size - size_target(cfg)) > 0:
        what = f"{size} bytes, {over} more than SIZE_BUDGET_BYTES={cfg.size_budget_bytes} leaves it"
        raise UserError(f"the artifact has {what}; lower NUM_LAYERS, MODEL_DIM or MLP_MULT")


def predict_size(run: Run, when: str, state: Tensors) -> None:
    """Find the k that meets the budget; refuse a model that never can before it costs anything."""
    cfg, target, tokenizer = run.cfg, size_target(run.cfg), run.data.tokenizer_path.read_bytes()
    inside = len(compress_brotli(tokenizer)) if cfg.embed_tokenizer else 0
    run.k = bisect_k(state, target - inside, cfg)
    size = predicted_bytes(state, run.k, cfg) + inside
    line = f"size:predicted {when} k:{run.k:.3f} artifact:{size} bytes target:{target}"
    run.log(line, "size", when=when, k=run.k, predicted_bytes=size, target_bytes=target)
    check_room(size, cfg)


def take_step(run: Run, progress: float) -> None:
    """Take a step; with QAT, along gradients at rounded weights (straight-through estimator)."""
    use_weights(run.params, (round_weights(run) if run.qat else run.weights).params)
    accumulate_gradients(run, progress < run.cfg.sampled_frac)
    use_weights(run.params, run.weights.params)
    if limit := run.cfg.grad_clip_norm:
        gradients = run.gradients.flat[:-1]
        gradients.mul_((limit / (gradients.norm() + 1e-6)).clamp(max=1.0))
    for optimiser in run.optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak_lr"] * lr_scale(progress, run.cfg)
            if "momentum" in group:
                group["momentum"] = momentum_at(run.step, run.cfg)
        optimiser.step()
    run.step += 1


@torch.no_grad()
def round_weights(run: Run) -> Buffer:
    """Round the weights as the export would, and return the buffer that holds them."""
    banks, bits = run.weights.banks, [bits for _, bits, _ in run.weights.keys]
    pairs = zip(banks, bits, strict=True)
    steps = [None if b == PLAIN_BITS else row_steps(w, run.k, b) for w, b in pairs]
    torch._foreach_copy_(run.rounded.banks, run.round_fn(banks, steps, bits))
    return run.rounded


def batch_passes(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets of this rank's passes over a batch, all of one shape."""
    cfg, rt, length = run.cfg, run.rt, run.cfg.train_seq_len
    share, eighth = cfg.train_batch_tokens // rt.world, cfg.train_batch_tokens // 8
    # Small batches go in passes of 4,096 tokens: an eighth would be too little work for a core.
    part, most = (eighth, eighth) if cfg.exact_sums else (share, max(eighth, 4096))
    rows, most = part // length, (cfg.micro_batch_tokens or most) // length
    rows = max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, most))
    for start in range(rt.rank * share, (rt.rank + 1) * share, rows * length):
        tokens = torch.from_numpy(run.stream.sequences(rows, length, start))
        if rt.device.type == "cuda":  # from pinned memory, a copy does not hold up the host
            tokens = tokens.pin_memory().to(rt.device, non_blocking=True)
        tokens = tokens.to(rt.device)
        yield tokens[:, :-1], tokens[:, 1:]


def sample(run: Run, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets' pieces and drawn ones, the targets' places, and log chances to be in."""
    V, n, N = run.cfg.vocab_size, run.cfg.sampled_pieces, targets.numel()
    others = torch.randint(V, (n,), generator=torch.Generator().manual_seed(run.stream.at))
    pieces, places = torch.cat([targets.flatten().cpu(), others]).unique(return_inverse=True)
    missed = (1 - run.stream.shares[:V]) ** N * (1 - 1 / V) ** n
    chances = torch.from_numpy(np.log1p(-missed)).float()[pieces]  # off logits: right on average
    return tuple(part.to(targets.device) for part in (pieces, places[:N], chances))


def accumulate_gradients(run: Run, sampled: bool = False) -> None:
    """Set the gradients of the batch's mean loss, over passes and ranks, and that loss."""
    cfg, rt, sums, params = run.cfg, run.rt, run.sums, run.params
    sums.flat.zero_()
    for x, y in batch_passes(run):
        with rt.autocast():
            nats = run.model(x, y, sample(run, y)) if sampled else run.loss_fn(x, y)
            mean = nats.sum() / cfg.train_batch_tokens
        torch._foreach_add_(sums.params, torch.autograd.grad(mean, params, materialize_grads=True))
        sums.flat[-1] += mean.detach()
    run.stream.at += cfg.train_batch_tokens
    if rt.world > 1:
        dist.all_reduce(sums.flat)
    if run.gradients is not sums:  # in float64 no order of adding changes the sum
        run.gradients.flat.copy_(sums.flat)


def warm_up(run: Run) -> None:
    """Take steps that compile kernels and fill caches outside the clock; undo them to the bit."""
    cfg, weights, k = run.cfg, run.weights.flat.clone(), run.k
    for i in range(cfg.warmup_steps):
        run.model.looping = bool(cfg.num_loops) and 2 * i >= cfg.warmup_steps
        run.qat = cfg.qat_start_frac < 1 and i % 2 == 1
        take_step(run, 1.0)  # as at the end, where the loss is over all pieces
        if i == 0 or (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
            run.log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    if cfg.max_wallclock_seconds:
        rehearse(run)
    run.weights.flat.copy_(weights)
    run.model.looping, run.qat, run.step, run.averages = False, False, 0, Averages()
    run.optimisers = make_optimisers(run.weights, run.gradients, cfg, run.rt)
    run.stream.at, run.k = 0, k


def rehearse(run: Run) -> None:
    """Make the choices that end a run, for the time that they take: the clock keeps it free."""
    log, cfg, run.log = run.log, run.cfg, lambda *_, **__: None
    run.averages.update([run.weights.flat], 0, 1.0, cfg)
    run.model.looping = bool(cfg.num_loops)
    for _ in range(1 + cfg.compile):  # the first compiles
        began = time.perf_counter()
        choose(run)
    (taken,) = largest(run.rt, time.perf_counter() - began)
    run.log, run.reserve_s = log, 1.5 * taken + 0.2
    if (need := run.reserve_s) > (cap := cfg.max_wallclock_seconds) / 2:
        message = f"MAX_WALLCLOCK_SECONDS is {cap}; the choices at its end need {need:.1f} s"
        raise UserError(f"{message}, more than half; raise it, or lower HOLDOUT_TOKENS")


def train(run: Run) -> None:
    """Take steps until the iterations or the wall clock end, or a signal comes."""
    cfg, on_cpu = run.cfg, run.rt.device.type == "cpu"
    run.news, run.logged = Report(run.step, 0.0, run.train_s, 0), (run.step, run.train_s)
    run.saved_s = run.train_s
    run.set_clock(True)
    while True:
        log_now = run.step <= 10 or run.step % cfg.train_log_every == 0
        if log_now or on_cpu or run.step % READ_EVERY == 0:
            agree(run)
        pace = run.news.elapsed / max(run.news.step, 1)
        elapsed = run.news.elapsed + pace * (run.step - run.news.step)
        progress = progress_of(run.step, elapsed, cfg, run.reserve_s)
        over = progress_of(run.step, elapsed + pace, cfg, run.reserve_s) >= 1  # no step fits now
        if over:
            agree(run)
        if run.step > run.logged[0] and (log_now or over):
            log_step(run)
        signum, due = int(run.news.signum), 0 < cfg.checkpoint_seconds <= elapsed - run.saved_s
        if signum or due:
            save_checkpoint(run)
        if signum:
            run.log(f"stopped by {signal.Signals(signum).name}: RESUME=1 continues")
            sys.exit(128 + signum)
        if over or cfg.val_loss_every and run.step % cfg.val_loss_every == 0:
            validate(run)
        if over:
            break
        switch(run, progress)
        take_step(run, progress)
        at = progress_of(run.step, elapsed, cfg, run.reserve_s)
        run.averages.update([run.weights.flat], run.step, at, cfg)
    if run.step < cfg.iterations:
        at = f"train_time:{1000 * run.elapsed():.0f}ms step:{run.step}/{cfg.iterations}"
        run.log(f"stopping_early: wallclock_cap {at}")
    save_checkpoint(run)  # whatever happens to the export, the weights are safe


def log_step(run: Run) -> None:
    """Log the step last read, its speed since the last line, and how long the run will take."""
    cfg, tokens, (step, loss, elapsed, _) = run.cfg, run.cfg.train_batch_tokens, run.news
    progress = max(progress_of(step, elapsed, cfg, run.reserve_s), 1e-9)
    speed = (step - run.logged[0]) * tokens / max(elapsed - run.logged[1], 1e-9)
    weights, attention = sum(p.numel() for p in run.params), cfg.num_layers * cfg.model_dim
    flops = 6 * (weights + attention * cfg.train_seq_len)  # a token
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in run.rt.name]
    mfu = flops * speed / peaks[0] / run.rt.world if peaks else None
    data = dict(step=step, loss=loss, seconds=elapsed, tokens=step * tokens, speed=speed)
    ms, eta, scale = 1000 * elapsed, max(0.0, elapsed / progress - elapsed), lr_scale(progress, cfg)
    line = f"step:{step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{ms:.0f}ms"
    pace = f"step_avg:{ms / step:.2f}ms tok/s:{speed:.0f} {f'mfu:{mfu:.3f} ' if mfu else ''}"
    run.log(f"{line} {pace}eta:{eta:.0f}s", "train", **data, mfu=mfu, lr_scale=scale)
    run.logged = step, elapsed


def validate(run: Run) -> None:
    run.set_clock(False)
    nats = mean_nats(run.loss_fn, run.data.val, run.cfg, run.rt, "validation")
    bpb, ms = bits_per_byte(nats, run.data), 1000 * run.train_s
    line = f"step:{run.step}/{run.cfg.iterations} val_loss:{nats:.4f} val_bpb:{bpb:.4f}"
    pace = f"train_time:{ms:.0f}ms step_avg:{ms / max(run.step, 1):.2f}ms"
    run.log(f"{line} {pace}", "val", step=run.step, loss=nats, bpb=bpb, seconds=run.train_s)
    run.set_clock(True)


@torch.no_grad()
def mean_nats(loss_fn: Callable, tokens: np.ndarray, cfg: Config, rt: Runtime, label="") -> float:
    """Return the mean cross-entropy of tokens[1:], each scored once, in windows shared by ranks."""
    starts = np.arange(0, len(tokens) - 1, length := cfg.train_seq_len)[rt.mine]
    rows = max(1, min(cfg.val_batch_size // 8 // length, len(starts)))
    starts = np.pad(starts, (0, -len(starts) % rows), constant_values=len(tokens))  # one shape
    total, began, next_line = torch.zeros((), dtype=torch.float64), time.perf_counter(), 10.0
    for i in range(0, len(starts), rows):
        places = starts[i : i + rows, None] + np.arange(length + 1)
        ids = torch.from_numpy(tokens.take(places, mode="clip").astype(np.int64)).to(rt.device)
        with rt.autocast():
            nats = loss_fn(ids[:, :-1], ids[:, 1:])
        total += nats.cpu().double()[torch.from_numpy(places[:, 1:] < len(tokens))].sum()
        part, seconds = (i + rows) / len(starts), time.perf_counter() - began
        if label and rt.rank == 0 and seconds > next_line and sys.stderr.isatty():
            next_line, left = seconds + 10, seconds / part - seconds
            print(f"{label} {100 * part:.0f}% eta:{left:.0f}s", file=sys.stderr, flush=True)
    if rt.world > 1:  # MPS has no float64, but no other ranks either
        dist.all_reduce(total := total.to(rt.device))
    return float(total) / (len(tokens) - 1)


def bits_per_byte(nats_per_token: float, data: Data) -> float:
    return nats_per_token * (len(data.val) - 1) / math.log(2) / data.val_bytes


def switch(run: Run, progress: float) -> None:
    """Start, when their time has come, depth recurrence and rounding."""
    cfg, step = run.cfg, run.step
    if cfg.num_loops and not run.model.looping and progress >= cfg.loop_at_frac:
        run.model.looping = True
        passes = len(run.model.passes(True))
        run.log(f"layer_loop:enabled step:{step} passes:{passes}", "loop", step=step)
    if not run.qat and cfg.qat_start_frac < 1 and progress >= cfg.qat_start_frac:
        run.qat = True
        if step:
            predict_size(run, "on the way", dict(run.model.named_parameters()))
        # The difference that rounding makes to a pass of training proves that it gets there.
        x, y = next(batch_passes(run))
        with run.rt.autocast():
            plain = run.loss_fn(x, y).detach()
            use_weights(run.params, round_weights(run).params)
            worst = (plain - run.loss_fn(x, y).detach()).abs().max().item()
        use_weights(run.params, run.weights.params)
        line = f"qat:on step:{step} k:{run.k:.3f} max_loss_difference:{worst:.6f}"
        run.log(line, "qat", step=step, k=run.k, max_loss_difference=worst)


# ==== CHECKPOINTS =================================================================================
# On a CPU, a run that was stopped or killed and resumed ends with the bits of one that was not.
def save(path: Path, state: Any) -> int:
    """Write what `torch.save` makes of `state`; return its bytes."""
    buffer = io.BytesIO()  # torch turns an error of a file into a RuntimeError without its cause
    torch.save(state, buffer)
    with replacing(path) as f:
        return f.write(buffer.getbuffer())


def save_checkpoint(run: Run) -> None:
    """Save all state, replaced in one move. A full disk costs the checkpoint, never the run."""
    run.set_clock(False)
    if run.rt.rank == 0 and bool(run.weights.flat.isfinite().all()):
        path, step = Path(run.cfg.out_dir, "checkpoint.pt"), run.step
        scalars = {n: getattr(run, n) for n in ("step", "train_s", "k", "qat")}
        optimisers = [optimiser.state_dict() for optimiser in run.optimisers]
        state = dict(settings=asdict(run.cfg), run_id=run.log.run_id, data=run.data.fingerprint)
        state |= dict(scalars=scalars, averages=vars(run.averages), optimisers=optimisers)
        state |= dict(model=run.model.state_dict(), looping=run.model.looping, stream=run.stream.at)
        try:
            save(path, state)
            run.log(f"checkpoint:{path} step:{step}", "checkpoint", step=step)
        except OSError as e:
            run.log(f"warning: no checkpoint written, the last one stays ({e})")
    run.saved_s = run.news.elapsed
    if run.rt.world > 1:  # or the clocks of the others would count the time of the first
        dist.barrier()
    run.set_clock(True)


def read_checkpoint(cfg: Config, path: Path | None = None) -> dict[str, Any]:
    """Return a checkpoint's state; refuse one whose settings the run does not have."""
    path = path or Path(cfg.out_dir, "checkpoint.pt")
    if not path.is_file():
        raise UserError(f"RESUME is 1, but there is no {path}; set OUT_DIR, or unset RESUME")
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise UserError("a checksum is wrong")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        then, now = saved["settings"], asdict(cfg)
    except Exception as e:  # a damaged zip raises almost anything
        raise UserError(f"{path} is damaged ({type(e).__name__}); unset RESUME") from None
    # Places and runtime may differ: they change neither the weights nor the order of the data.
    for name in sorted({*then, *now} - {*names_with_role(Config, "place", "runtime")}):
        if (old := then.get(name)) != (new := now.get(name)):
            message = f"{name.upper()} is {new}, but the checkpoint was made with {old}"
            raise UserError(f"{message}; set it to that, or start again without RESUME")
    return saved


def restore(run: Run, saved: dict[str, Any]) -> None:
    if saved["data"] != run.data.fingerprint:
        raise UserError(f"{run.data.folder} has other shards than the checkpoint; set DATA_PATH")
    run.model.load_state_dict(saved["model"], strict=True)
    for optimiser, state in zip(run.optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    vars(run).update(saved["scalars"])
    for name, value in saved["averages"].items():
        tensors = [t.to(run.rt.device) for t in value] if type(value) is list else value
        setattr(run.averages, name, tensors)
    run.model.looping, run.stream.at = saved["looping"], saved["stream"]
    step, ms = run.step, 1000 * run.train_s
    run.log(f"resumed step:{step} train_time:{ms:.0f}ms", "resume", step=step)


# ==== EXPORT ======================================================================================
def best_on_holdout(run: Run, candidates: dict[str, list[Tensor]], what: str) -> str:
    """Return the name of the weights best on held-out training tokens, never on validation's."""
    scores = {}
    for name, values in candidates.items():
        use_weights(run.params, values)
        scores[name] = mean_nats(run.loss_fn, run.data.holdout, run.cfg, run.rt)
    use_weights(run.params, run.weights.params)
    best = min(scores, key=scores.get)
    line = " ".join(f"{name}:{nats:.4f}" for name, nats in scores.items())
    run.log(f"{what}:{line} kept:{best}", what, kept=best, **scores)
    return best


def settle_weights(run: Run) -> None:
    """Choose the last weights, SWA or EMA: the best of them, rounded as they would ship."""
    averages = run.averages.candidates()
    candidates = {"last": run.weights.flat, **{name: flat for name, (flat,) in averages.items()}}
    if len(candidates) == 1:
        return
    if run.averages.swa_count:
        run.log(f"swa:averaged {run.averages.swa_count} checkpoints")
    values = {name: Buffer(run.model, flat).params for name, flat in candidates.items()}
    rounded = {name: rounded_parameters(run.model, run.k, v) for name, v in values.items()}
    run.weights.flat.copy_(candidates[best_on_holdout(run, rounded, "averages")])


def collect_factors(run: Run, factor: Callable[[Tensor], Any] = gptq_factor) -> dict[str, Any]:
    """Return the factor of each matrix's Hessian, which is the sum of x x^T over its inputs x."""
    tokens, model, sums, last = 8 * run.cfg.train_seq_len, run.model, {}, {}
    matrices = [(f"{n}.weight", m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    def add(name: str, _module: nn.Module | None, inputs: tuple[Tensor], _output: Any) -> None:
        x = inputs[0].flatten(0, -2).float()
        sums[name] = sums[name].addmm_(x.T, x) if name in sums else x.T @ x

    hooks = [m.register_forward_hook(functools.partial(add, name)) for name, m in matrices]
    hooks.append(model.blocks[-1].register_forward_hook(lambda *call: last.update(lanes=call[2])))
    with torch.no_grad(), run.rt.autocast():
        for i in range(GPTQ_BATCHES)[run.rt.mine]:
            batch = run.stream.peek(tokens, tokens * i).reshape(8, -1)
            model.logits(torch.from_numpy(batch).to(run.rt.device))
            add(HEAD, None, (normalised(sum(last["lanes"]) / 2),), None)
    for hook in hooks:
        hook.remove()
    for total in sums.values() if run.rt.world > 1 else ():
        dist.all_reduce(total)
    sums[HEAD].diagonal().add_(LOOKUP_SHARE * sums[HEAD].diagonal().mean())
    return {name: factor(hessian) for name, hessian in sums.items()}


def choose(run: Run) -> Factors:
    """Choose weights and rounding, inside the clock (#535); return GPTQ's factors, or none."""
    predict_size(run, "at the end", dict(run.model.named_parameters()))
    settle_weights(run)
    factors, cap = collect_factors(run) if run.cfg.gptq else {}, run.cfg.max_wallclock_seconds
    if factors:
        run.log(f"gptq:collected {len(factors)} Hessians train_time:{1000 * run.elapsed():.0f}ms")
        ways = {"nearest": None, "gptq": factors}
        candidates = {n: rounded_parameters(run.model, run.k, factors=f) for n, f in ways.items()}
        factors = factors if best_on_holdout(run, candidates, "rounding") == "gptq" else {}
    run.set_clock(False)
    over = f" over the cap of {cap} s" if 0 < cap < run.train_s else ""
    run.log(f"chosen:train_time:{1000 * run.train_s:.0f}ms reserve:{run.reserve_s:.2f}s{over}")
    return factors


def fit_artifact(run: Run, factors: Factors) -> tuple[bytes, Mapping[str, Rounded], str]:
    """Return the file with the finest steps that meets the target, its tensors and its codec."""
    # Predict, encode, correct by what the prediction missed, until it fits and wastes little.
    cfg, target, state = run.cfg, size_target(run.cfg), dict(run.model.named_parameters())
    codec, waste = "ans" if cfg.codec == "auto" else cfg.codec, min(1000, target / 500)
    tokenizer, looping = run.data.tokenizer_path.read_bytes(), run.model.looping
    missed, tries = len(compress_brotli(tokenizer)) if cfg.embed_tokenizer else 0, {}
    while len(tries) < 8:
        k = bisect_k(state, target - waste / 2 - missed, cfg)
        if k in tries:
            break
        rounded = quantised(state, k, cfg, factors)
        tries[k] = rounded, encode_artifact(rounded, k, cfg, looping, codec, tokenizer)
        if 0 <= target - (size := len(tries[k][1])) <= waste:
            break
        missed = size - predicted_bytes(state, k, cfg)
    run.k = min((k for k in tries if len(tries[k][1]) <= target), default=max(tries))
    rounded, blob = tries[run.k]
    # On a large file the entropy coder wins, and brotli would take a minute to lose.
    for other in CODECS if cfg.codec == "auto" and len(blob) < 3_000_000 else ():
        trial = encode_artifact(rounded, run.k, cfg, looping, other, tokenizer)
        run.log(f"codec:{other} bytes:{len(trial)}", "codec", codec=other, bytes=len(trial))
        if len(trial) < len(blob):
            blob, codec = trial, other
    check_room(len(blob), cfg)
    return blob, rounded, codec


def export(run: Run, factors: Factors) -> Path:
    """Write the artifact on rank 0, and return its path."""
    cfg, log, bits = run.cfg, run.log, max(run.cfg.attn_bits, run.cfg.mlp_bits)
    path = Path(cfg.out_dir) / f"final_model.int{bits}.ptz"
    if run.rt.rank == 0:
        code, raw = code_bytes(cfg), save(path.with_name("final_model.pt"), run.model.state_dict())
        log(f"Serialized model: {raw} bytes\nCode size: {code} bytes packed")
        blob, rounded, codec = fit_artifact(run, factors)
        with replacing(path) as f:
            f.write(blob)
        log_errors(run, rounded)
        size, budget, label = len(blob), cfg.size_budget_bytes, f"int{bits}+{codec}"
        ratio, left = f"k:{run.k:.3f} ratio:{raw / size:.2f}x", budget - size - code
        log(f"Serialized model {label}: {size} bytes ({ratio})")
        line = f"Total submission size {label}: {size + code} bytes (budget:{budget} left:{left})"
        data = dict(path=str(path), codec=codec, k=run.k, bytes=size, code_bytes=code)
        log(line, "artifact", **data, budget_bytes=budget, sha256=file_sha256(path))
    if run.rt.world > 1:
        dist.barrier()
    return path


def log_errors(run: Run, rounded: Mapping[str, Rounded]) -> None:
    """Log each matrix's relative rounding error, and the entropy of its codes in bits."""
    table = {}
    for name, weight in run.model.named_parameters():
        if (r := rounded[name]).steps is not None:
            error = ((r.weight() - weight).norm() / weight.norm().clamp(min=1e-12)).item()
            table[name] = error, entropy_bits(r.values) / r.values.numel()
    errors, bits = zip(*table.values(), strict=True)
    line = f"quantised:{len(table)} matrices mean_error:{np.mean(errors):.4f} worst_error:"
    run.log(f"{line}{max(errors):.4f} mean_bits:{np.mean(bits):.2f}", "quantised", tensors=table)


def score_artifact(run: Run, path: Path) -> None:
    """Log the score of the run: of the bytes on disk, read back and rebuilt strictly."""
    began, artifact = time.perf_counter(), decode_artifact(path.read_bytes())
    nats = mean_nats(build_model(artifact, run.rt.device), run.data.val, run.cfg, run.rt, "scoring")
    bpb, seconds = bits_per_byte(nats, run.data), time.perf_counter() - began
    label = f"final_{path.suffixes[0][1:]}_{artifact.header['codec']}_roundtrip"
    run.log(f"{label} val_loss:{nats:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms")
    data = dict(label=label, loss=nats, bpb=bpb, eval_seconds=seconds)
    data |= dict(tokens=len(run.data.val) - 1, bytes=run.data.val_bytes)
    run.log(f"{label}_exact val_loss:{nats:.8f} val_bpb:{bpb:.8f}", "final", **data)


# ==== MAIN ========================================================================================
def print_help() -> None:
    print(f"{__doc__}\nPRESET  one of {', '.join(PRESETS)} (unset: consensus on CUDA, else cpu)\n")
    for f in fields(Config):
        default = int(f.default) if type(f.default) is bool else f.default
        print(f"{f.name.upper():27} {default!s:>9}  {f.metadata['help']}")
    for name, lines in PRESET_LINES.items():
        print(f"\nPRESET={name}: {' '.join(lines.split())}")


def main(env: Mapping[str, str] = os.environ) -> None:
    preset = env.get("PRESET") or ("consensus" if best_device() == "cuda" else "cpu")
    cfg = Config.from_env(env, preset)
    saved = read_checkpoint(cfg) if cfg.resume else None
    data, rt = load_data(cfg), set_up_runtime(cfg, env)
    log = Log(cfg, rt, saved["run_id"] if saved else cfg.run_id or os.urandom(6).hex())
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
    score_artifact(run, export(run, choose(run)))
    log.close()


def advice_on(error: Exception) -> str | None:
    """Return the next step that an error line ends with, or None for a bug of ours."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
        return "; set MICRO_BATCH_TOKENS to half of what a pass takes"
    if isinstance(error, dist.DistError) or "gloo" in str(error):
        return "; RESUME=1 continues from the checkpoint"
    return "" if isinstance(error, UserError | OSError) else None


def run_main() -> int:
    """Run, or print help; return the exit code."""
    word = "".join(sys.argv[1:2])
    if word in ("-h", "--help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
        print_help()
        return 0
    if word:
        print(f"train_gpt: error: unknown option {word}; see --help", file=sys.stderr)
        return 2
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except SystemExit as stop:
        return int(stop.code)
    except Exception as e:
        if (advice := advice_on(e)) is None:
            raise  # with its traceback
        line = (str(e) or "out of memory").splitlines()[0]
        print(f"train_gpt: error: {line}{advice}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = run_main()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # Ranks leave at once: gloo's threads, waiting for lost ranks, sometimes abort an orderly exit.
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)
