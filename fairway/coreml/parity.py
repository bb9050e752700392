"""Compare shards with PyTorch on real text: every shape, chunking and quantisation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from fairway.coreml.engine import CallCounts, Runner, ShardChain
from fairway.coreml.export import (
    QUANTISATIONS,
    ExportOptions,
    ExportSource,
    export_shards,
    shards_bytes,
)
from fairway.coreml.interpret import InterpretedFunction
from fairway.coreml.layout import SHAPES, STATES, call_bytes
from fairway.scoring.memory import Memory
from fairway.scoring.text import Text
from train_gpt import UserError

STREAM = 64  # tokens of a comparison
LONG = 2000  # tokens whose bits are counted; the slots are overwritten several times
PIECE = 128  # tokens that PyTorch reads at once
MIXED = (3, 1, 4, 2)  # call lengths
WRONG = 3  # unk, which no text holds: it stands for a draft that is rejected
# Limits: a logit's error, as it would be if logits had a standard deviation of 1 (fp32, fp16); the
# difference between a token alone and first of a call (slot); BPB (int8); cosine.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "slot": 1e-6, "int8": 0.01, "cosine": 0.5}
BPB_LIMITED = ("int8", "artifact")


class TorchReference(NamedTuple):
    """The results of PyTorch in fp32."""

    logits: np.ndarray  # float32[n, V], after each token but the last
    bpb: float
    std: float  # of the logits of the first STREAM tokens

    @classmethod
    @torch.inference_mode()
    def compute(cls, source: ExportSource, text: Text, window: int) -> TorchReference:
        memory = Memory(source.model, window)
        tokens = torch.from_numpy(text.tokens.astype(np.int64))[None, :-1]
        pieces = [memory.logits(piece)[0] for piece in tokens.split(PIECE, dim=1)]
        logits = torch.cat(pieces).numpy()
        bpb = text.bpb(target_log_probabilities(logits, text.tokens))
        return cls(logits, bpb, float(logits[:STREAM].std()))


def target_log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probability of each of tokens[1:] in nats, float64[n - 1]."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z[np.arange(len(z)), tokens[1:].astype(np.int64)] - np.log(np.exp(z).sum(axis=1))


def shorten_text(text: Text, count: int) -> Text:
    """Return the text with its first `count` targets only."""
    return text._replace(tokens=text.tokens[: count + 1], sizes=text.sizes[:count])


# ==== ONE FOLDER ==================================================================================
def logits_in_steps(
    chain: ShardChain,
    tokens: Sequence[int],
    steps: Sequence[int],
    on_progress: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
    """Return logits of a text read in calls of these lengths, repeated to its end."""
    cache, rows, at = chain.new_cache(), [], 0
    lengths = cycle(steps)
    while at < len(tokens):
        step = next(lengths)
        rows.append(chain(cache, tokens[at : at + step]))
        at += len(rows[-1])
        on_progress(len(rows[-1]))
    return np.concatenate(rows)


def logits_with_rejections(chain: ShardChain, tokens: Sequence[int]) -> np.ndarray:
    """Return logits of a text read with wrong tokens after each call, which are then cropped."""
    cache, rows, at = chain.new_cache(), [], 0
    lengths = cycle(MIXED)
    while at < len(tokens):
        piece = list(tokens[at : at + min(next(lengths), chain.most)])
        padded = piece + [WRONG] * (chain.most - len(piece))
        rows.append(chain(cache, padded)[: len(piece)])
        at += len(piece)
        cache.crop(at)
    return np.concatenate(rows)


def slot_gap(chain: ShardChain, tokens: Sequence[int]) -> float:
    """Return the largest difference between a token's logits alone and first of a full call."""
    cache, largest = chain.new_cache(), 0.0
    for at in range(0, len(tokens) - chain.most, chain.most):
        alone, first = (
            chain(cache.copy(), list(tokens[at : at + count]))[0] for count in (1, chain.most)
        )
        largest = max(largest, float(np.abs(alone - first).max()))
        chain(cache, list(tokens[at : at + chain.most]))
    return largest


def compare_chain(
    chain: ShardChain, reference: TorchReference, text: Text, on_progress: Callable[[int], None]
) -> dict[str, Any]:
    """Return the measurements of one chain, a row of the report."""
    tokens = text.tokens[:STREAM].tolist()
    ways = {
        "T=1": logits_in_steps(chain, tokens, [1]),
        f"T={chain.most}": logits_in_steps(chain, tokens, [chain.most]),
        "mixed": logits_in_steps(chain, tokens, [step for step in MIXED if step <= chain.most]),
        "taken back": logits_with_rejections(chain, tokens),
    }
    errors = {
        way: logit_errors(logits, reference.logits[: len(tokens)]) for way, logits in ways.items()
    }
    slot, chain.counts = slot_gap(chain, tokens), CallCounts()
    long = logits_in_steps(chain, text.tokens[:-1].tolist(), [chain.most], on_progress)
    return dict(
        ways=errors,
        slot=slot,
        long=logit_errors(long, reference.logits),
        bpb=text.bpb(target_log_probabilities(long, text.tokens)),
        milliseconds=1000 * chain.counts.seconds / chain.counts.calls,
    )


def logit_errors(logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Return the cosine and the largest difference of two sets of logits."""
    a, b = logits.astype(np.float64), wanted.astype(np.float64)
    norms = math.sqrt((a * a).sum() * (b * b).sum())
    return dict(
        cosine=float((a * b).sum()) / norms if norms else math.nan,
        gap=float(np.abs(a - b).max()),
    )


# ==== ALL VARIANTS ================================================================================
def export_variants(base: ExportOptions, passes: int) -> Iterator[ExportOptions]:
    """Yield each shape and chunking in both precisions, each with state, each quantisation."""
    for precision in ("fp32", "fp16"):
        own = replace(base, precision=precision)
        yield from (replace(own, shapes=shapes) for shapes in SHAPES)
        yield from (
            replace(own, shapes="fixed", chunks=n, vocab_shards=2) for n in (2, 3, 4) if n <= passes
        )
        yield replace(own, shapes="fixed", layers_per_shard=1, vocab_shards=4)
    fixed = replace(base, precision="fp16", shapes="fixed")
    yield from (replace(fixed, states=n) for n in STATES[1:])
    yield from (replace(fixed, states=1, chunks=n) for n in (2, 3, 4) if n <= passes)
    yield from (
        replace(base, shapes="fixed", quantise=quantise)
        for quantise in QUANTISATIONS
        if quantise != "none"
    )


def variant_name(options: ExportOptions) -> str:
    """Return a short name; for example "fp16, fixed, 1 shard, int8"."""
    if options.layers_per_shard == 1:
        cut = "a layer a shard"
    elif options.layers_per_shard:
        cut = f"{options.layers_per_shard} layers a shard"
    else:
        cut = f"{options.chunks} shard" + "s"[: options.chunks > 1]
    more = [f"{options.states} state" + "s"[: options.states > 1]][: options.states]
    more += [options.quantise][: options.quantise != "none"]
    return ", ".join([options.precision, options.shapes, cut, *more])


def check_variants(
    source: ExportSource,
    variants: Sequence[ExportOptions],
    text: Text,
    training: np.ndarray,
    out: Path,
    log: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[int], None] = lambda tokens: None,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Export each variant to `out`, one after the other, compare it, and return the report.

    `training` holds the tokens on which fp16 ranges are measured. `on_progress` gets the number of
    tokens after each call on the long text.
    """
    text = shorten_text(text, min(LONG, len(text.sizes)))
    if len(text.tokens) <= STREAM:
        raise UserError(
            f"{text.name} holds {len(text.tokens)} tokens; a comparison needs {STREAM + 1}"
        )
    windows = [options.context or source.model.cfg.train_seq_len for options in variants]
    references = {w: TorchReference.compute(source, text, w) for w in set(windows)}
    rows = []
    for options, window in zip(variants, windows, strict=True):
        began = time.perf_counter()
        manifest = export_shards(
            source, options, out, training, log if not rows else lambda line: None
        )
        row = dict(
            name=variant_name(options),
            choice=asdict(options),
            export_seconds=time.perf_counter() - began,
            bytes=shards_bytes(out, manifest),
            operations=operations_of(ShardChain(out, runner)),
            call_bytes=call_bytes(manifest.interfaces(), 1, np.dtype(manifest.dtype).itemsize),
            **compare_chain(ShardChain(out, runner), references[window], text, on_progress),
            reference_bpb=references[window].bpb,
            std=references[window].std,
        )
        rows.append(row | dict(failures=variant_failures(row, options, references[window])))
    return dict(
        artifact=str(source.path),
        tokens=len(text.sizes),
        bytes=text.bytes,
        text=text.name,
        stream=STREAM,
        limits=LIMITS,
        variants=rows,
        passed=not any(row["failures"] for row in rows),
    )


def operations_of(chain: ShardChain) -> int:
    """Return the operations of one call of all shards, constants left out."""
    name, _ = chain.manifest.function_for(1)
    packages = chain.folder.packages.values()
    return sum(len(InterpretedFunction(package, name).instructions) for package in packages)


def variant_failures(
    row: dict[str, Any], options: ExportOptions, reference: TorchReference
) -> list[str]:
    """Return one line for each limit that a variant misses.

    An error grows with the logits. It is therefore divided by their standard deviation; in fp32
    the undivided error must keep the limit too.
    """
    failures, exact = [], options.precision == "fp32"
    errors = (*row["ways"].values(), row["long"])
    largest = float(np.max([error["gap"] for error in errors]))  # np.max keeps NaN; max() may not
    cosine = float(np.min([error["cosine"] for error in errors]))
    scaled = largest / reference.std
    scaled = max(largest, scaled) if exact else scaled
    limit, bpb_change = LIMITS[options.precision], row["bpb"] - reference.bpb
    if not cosine > LIMITS["cosine"] or not math.isfinite(row["bpb"]):
        failures.append(f"cosine {cosine:.3f}, not above {LIMITS['cosine']:g}")
    if options.quantise == "none" and not scaled < limit:
        failures.append(f"largest difference {scaled:.2e}, not below {limit:g}")
    if exact and not row["slot"] < LIMITS["slot"]:
        failures.append(f"T=1 and slot 0 differ by {row['slot']:.2e}, not below {LIMITS['slot']:g}")
    if options.quantise in BPB_LIMITED and not abs(bpb_change) < LIMITS["int8"]:
        failures.append(
            f"{options.quantise} changes BPB by {bpb_change:+.4f}, not below {LIMITS['int8']:g}"
        )
    return failures


def has_limit(quantise: str) -> bool:
    """Tell whether a quantisation must keep a limit; coarser ones are measured only."""
    return quantise in ("none", *BPB_LIMITED)


def parity_table(report: dict[str, Any]) -> Table:
    """Return the report of `check_variants` as a table, one row a variant."""
    first = report["variants"][0]
    table = Table(
        box=box.SIMPLE,
        title_justify="left",
        title="Shards against PyTorch: largest difference of a logit (standard deviation "
        f"{first['std']:.2f}) on {report['stream']} tokens; long and BPB on {report['tokens']:,}; "
        "kB that a call of one token takes and returns",
    )
    columns = (
        "MB",
        "ops",
        "kB a call",
        "1-cosine",
        *first["ways"],
        "slot 0",
        "long",
        "BPB",
        "Δ BPB",
        "ms",
    )
    table.add_column("variant")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in report["variants"]:
        ways, bpb_change = list(row["ways"].values()), row["bpb"] - row["reference_bpb"]
        verdict = "ok" if has_limit(row["choice"]["quantise"]) else "measured"
        table.add_row(
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            str(row["operations"]),
            f"{row['call_bytes'] / 1e3:.1f}",
            f"{1 - min(way['cosine'] for way in ways):.0e}",
            *(f"{way['gap']:.1e}" for way in ways),
            f"{row['slot']:.0e}",
            f"{row['long']['gap']:.1e}",
            f"{row['bpb']:.4f}",
            f"{bpb_change:+.4f}",
            f"{row['milliseconds']:.0f}",
            "FAIL" if row["failures"] else verdict,
        )
    return table
