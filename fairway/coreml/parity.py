"""Whether shards say what the model says: every shape, chunking and quantisation against PyTorch, on real text."""

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

from fairway.coreml.engine import Chain, Runner, Used
from fairway.coreml.export import QUANTISATIONS, Choice, Source, export, folder_bytes
from fairway.coreml.layout import SHAPES
from fairway.scoring.memory import Memory
from fairway.scoring.text import Text
from train_gpt import need

STREAM = 64  # tokens of a comparison
LONG = 2000  # tokens whose bits are counted; the slots come round several times
PIECE = 128  # tokens that PyTorch reads at once
MIXED = (3, 1, 4, 2)  # lengths of steps
WRONG = 3  # a token that no text holds, in place of drafts that are taken back
# What is asked of a variant: gaps of logits, as they would be at a deviation of 1; T=1 against slot 0; BPB; cosine.
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "slot": 1e-6, "int8": 0.01, "cosine": 0.5}
ASKED_BPB = ("int8", "artifact")


class Reference(NamedTuple):
    """What PyTorch says, in fp32."""

    logits: np.ndarray  # float32[n, V], after each token but the last
    bpb: float
    std: float  # of the logits of the first STREAM tokens

    @classmethod
    @torch.inference_mode()
    def of(cls, source: Source, text: Text, window: int) -> Reference:
        memory, tokens = (
            Memory(source.model, window),
            torch.from_numpy(text.tokens.astype(np.int64))[None, :-1],
        )
        logits = torch.cat(
            [memory.logits(piece)[0] for piece in tokens.split(PIECE, dim=1)]
        ).numpy()
        return cls(
            logits, text.bpb(log_probabilities(logits, text.tokens)), float(logits[:STREAM].std())
        )


def log_probabilities(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """float64: of tokens[1:]."""
    z = logits.astype(np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return z[np.arange(len(z)), tokens[1:].astype(np.int64)] - np.log(np.exp(z).sum(axis=1))


def shortened(text: Text, count: int) -> Text:
    """Its first `count` targets."""
    return text._replace(tokens=text.tokens[: count + 1], sizes=text.sizes[:count])


# ==== ONE FOLDER ======================================================================================================
def in_steps(
    chain: Chain,
    tokens: Sequence[int],
    steps: Sequence[int],
    told: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Logits of a stream read in steps of these lengths, again and again."""
    stream, out, at = chain.stream(), [], 0
    for step in cycle(steps):
        if at >= len(tokens):
            return np.concatenate(out)
        out.append(chain(stream, tokens[at : at + step]))
        at += len(out[-1])
        told(len(out[-1]))


def with_rejections(chain: Chain, tokens: Sequence[int]) -> np.ndarray:
    """The same, each step filled up with wrong tokens that are then taken back."""
    stream, out, at = chain.stream(), [], 0
    for step in cycle(MIXED):
        piece = list(tokens[at : at + min(step, chain.most)])
        if not piece:
            return np.concatenate(out)
        out.append(chain(stream, piece + [WRONG] * (chain.most - len(piece)))[: len(piece)])
        at += len(piece)
        stream.crop(at)


def slot_gap(chain: Chain, tokens: Sequence[int]) -> float:
    """The largest difference that it makes to a token's logits whether it comes alone or before others."""
    stream, most = chain.stream(), 0.0
    for at in range(0, len(tokens) - chain.most, chain.most):
        alone, first = (
            chain(stream.copy(), list(tokens[at : at + many]))[0] for many in (1, chain.most)
        )
        most = max(most, float(np.abs(alone - first).max()))
        chain(stream, list(tokens[at : at + chain.most]))
    return most


def compare(
    chain: Chain, reference: Reference, text: Text, told: Callable[[int], None]
) -> dict[str, Any]:
    """All that a row of the report says of a folder."""
    tokens = text.tokens[:STREAM].tolist()
    ways = {
        "T=1": in_steps(chain, tokens, [1]),
        f"T={chain.most}": in_steps(chain, tokens, [chain.most]),
        "mixed": in_steps(chain, tokens, [step for step in MIXED if step <= chain.most]),
        "taken back": with_rejections(chain, tokens),
    }
    found = {way: against(logits, reference.logits[: len(tokens)]) for way, logits in ways.items()}
    slot, chain.used = slot_gap(chain, tokens), Used()
    long = in_steps(chain, text.tokens[:-1].tolist(), [chain.most], told)
    return dict(
        ways=found,
        slot=slot,
        long=against(long, reference.logits),
        bpb=text.bpb(log_probabilities(long, text.tokens)),
        milliseconds=1000 * chain.used.seconds / chain.used.calls,
    )


def against(logits: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    a, b = logits.astype(np.float64), wanted.astype(np.float64)
    lengths = math.sqrt((a * a).sum() * (b * b).sum())
    return dict(
        cosine=float((a * b).sum()) / lengths if lengths else math.nan,
        gap=float(np.abs(a - b).max()),
    )


# ==== ALL VARIANTS ====================================================================================================
def variants(base: Choice, passes: int) -> Iterator[Choice]:
    """Each shape and chunking in both precisions, then each quantisation."""
    for precision in ("fp32", "fp16"):
        own = replace(base, precision=precision)
        yield from (replace(own, shapes=shapes) for shapes in SHAPES)
        yield from (
            replace(own, shapes="fixed", chunks=n, vocab_shards=2) for n in (2, 4) if n <= passes
        )
        yield replace(own, shapes="fixed", layers_per_shard=1, vocab_shards=4)
    yield from (
        replace(base, shapes="fixed", quantise=quantise)
        for quantise in QUANTISATIONS
        if quantise != "none"
    )


def named(choice: Choice) -> str:
    cut = (
        "a layer a shard"
        if choice.layers_per_shard == 1
        else f"{choice.layers_per_shard} layers a shard"
    )
    cut = cut if choice.layers_per_shard else f"{choice.chunks} shard" + "s"[: choice.chunks > 1]
    return ", ".join(
        [choice.precision, choice.shapes, cut, *[choice.quantise][: choice.quantise != "none"]]
    )


def check(
    source: Source,
    choices: Sequence[Choice],
    text: Text,
    measured: np.ndarray,
    out: Path,
    say: Callable[[str], None] = lambda line: None,
    told: Callable[[int], None] = lambda n: None,
    runner: Runner | None = None,
) -> dict[str, Any]:
    """Export each variant to `out`, one after the other, and compare it; `told` hears of the tokens of each long
    text."""
    text = shortened(text, min(LONG, len(text.sizes)))
    need(
        len(text.tokens) > STREAM,
        f"{text.name} holds {len(text.tokens)} tokens; a comparison takes {STREAM + 1}",
    )
    windows = {choice.context or source.model.cfg.train_seq_len for choice in choices}
    references = {window: Reference.of(source, text, window) for window in windows}
    rows = []
    for nth, choice in enumerate(choices):
        began = time.perf_counter()
        reference = references[choice.context or source.model.cfg.train_seq_len]
        manifest = export(source, choice, out, measured, say if nth == 0 else lambda line: None)
        seconds = time.perf_counter() - began
        row = dict(
            name=named(choice),
            choice=asdict(choice),
            export_seconds=seconds,
            bytes=folder_bytes(out, manifest),
            **compare(Chain(out, runner), reference, text, told),
        )
        row |= dict(
            reference_bpb=reference.bpb,
            std=reference.std,
            failures=failures(row, choice, reference),
        )
        rows.append(row)
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


def failures(row: dict[str, Any], choice: Choice, reference: Reference) -> list[str]:
    """What a variant misses. A gap grows with the logits: it is held to the limit at a deviation of 1, and in fp32 also
    as it is."""
    found, exact, all_of = [], choice.precision == "fp32", (*row["ways"].values(), row["long"])
    worst = float(np.max([of["gap"] for of in all_of]))  # no number stays none
    scaled = max(worst, worst / reference.std) if exact else worst / reference.std
    limit = LIMITS[choice.precision]
    cosine = float(np.min([of["cosine"] for of in all_of]))
    if not cosine > LIMITS["cosine"] or not math.isfinite(row["bpb"]):
        found.append(f"cosine {cosine:.3f}, not above {LIMITS['cosine']:g}")
    if choice.quantise == "none" and not scaled < limit:
        found.append(f"largest difference {scaled:.2e}, not below {limit:g}")
    if exact and not row["slot"] < LIMITS["slot"]:
        found.append(f"T=1 and slot 0 differ by {row['slot']:.2e}, not below {LIMITS['slot']:g}")
    more = row["bpb"] - reference.bpb
    if choice.quantise in ASKED_BPB and not abs(more) < LIMITS["int8"]:
        found.append(f"{choice.quantise} changes BPB by {more:+.4f}, not below {LIMITS['int8']:g}")
    return found


def asked(quantise: str) -> bool:
    """Whether a limit is set for it; what is coarser is measured."""
    return quantise in ("none", *ASKED_BPB)


def table_of(found: dict[str, Any]) -> Table:
    first = found["variants"][0]
    table = Table(
        box=box.SIMPLE,
        title_justify="left",
        title=f"Shards against PyTorch: largest difference of a "
        f"logit (they deviate by {first['std']:.2f}) on {found['stream']} tokens; long and BPB on "
        f"{found['tokens']:,}",
    )
    for name in (
        "variant",
        "MB",
        "1-cosine",
        *first["ways"],
        "slot 0",
        "long",
        "BPB",
        "Δ BPB",
        "ms",
        "",
    ):
        table.add_column(
            name, justify="left" if name in ("variant", "") else "right", no_wrap=name != "variant"
        )
    for row in found["variants"]:
        ways, extra = list(row["ways"].values()), row["bpb"] - row["reference_bpb"]
        table.add_row(
            row["name"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{1 - min(w['cosine'] for w in ways):.0e}",
            *(f"{w['gap']:.1e}" for w in ways),
            f"{row['slot']:.0e}",
            f"{row['long']['gap']:.1e}",
            f"{row['bpb']:.4f}",
            f"{extra:+.4f}",
            f"{row['milliseconds']:.0f}",
            "FAIL" if row["failures"] else "ok" if asked(row["choice"]["quantise"]) else "measured",
        )
    return table
