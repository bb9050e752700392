"""Correction tables: choose, store, apply and charge the worst-predicted rows of a split.

A table is made from the text that it then "predicts". It shows what a model gets wrong and what it
would cost to tell the model; it is never part of a score. The file is a header (`HEADER`,
little-endian), the payload of one of `CODECS`, and the SHA-256 of both. The header names the split
and the artifact, and holds a checksum of the entries: if the model's numbers differ in the last
bit, the modelled codec decodes to other entries, and the checksum shows it.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fairway.correction import modelled, rice, varint
from fairway.correction.entries import (
    THRESHOLD,
    CorrectionError,
    Entries,
    ModelView,
    check_entries,
)
from train_gpt import UserError, replacing

MAGIC, VERSION = b"FWCORR\r\n", 1
HEADER = struct.Struct("<8sI8sQIdQQ32s32s32s")
CHECKSUM_BYTES = 32
EMPTY_BYTES = HEADER.size + 1 + CHECKSUM_BYTES  # a table without entries
# Bytes that clear flags may take before the modelled codec has learned how rare entries are.
MOST_FLAG_BYTES = 1 << 18
BOOST = 20.0  # added to the logit of the listed token
NOTICE = (
    "The correction table is made from the text that it corrects: it holds the answers. "
    "oracle_bpb and charged_bpb are diagnoses; no record may use the table, since a score knows "
    "only what came before (#1017)."
)


class Codec(NamedTuple):
    """One way to write entries. `decode` returns exactly what `encode` got, or CorrectionError."""

    name: str
    encode: Callable[[Entries, ModelView], bytes]
    decode: Callable[[bytes, ModelView], Entries]
    floor_bits: Callable[[Entries, ModelView], float]  # the least that the scheme needs, in all
    prices: Callable[[Entries, np.ndarray, ModelView], np.ndarray]  # entries, logp[rows] -> bits


CODECS = {
    name: Codec(name, module.encode, module.decode, module.floor_bits, module.prices)
    for name, module in (("varint", varint), ("rice", rice), ("modelled", modelled))
}


class Table(NamedTuple):
    """A table as its file holds it; each digest is 32 bytes."""

    codec: str
    rows: int
    vocab_size: int
    threshold: float
    count: int
    split_sha256: bytes
    artifact_sha256: bytes
    entries_sha256: bytes
    payload: bytes


class Charge(NamedTuple):
    """The score with a table, and what is left of it when the table's bits are paid."""

    oracle_bpb: float
    charged_bpb: float
    saved_bits: float
    paid_bits: float


# ==== WHAT AN ENTRY DOES ==========================================================================
def boosted(logp: np.ndarray) -> np.ndarray:
    """Return log-probabilities of tokens, in nats, after BOOST is added to their logits."""
    return logp + BOOST - np.log1p(np.exp(logp) * math.expm1(BOOST))


def corrected_logp(logp: np.ndarray, entries: Entries, targets: np.ndarray) -> np.ndarray:
    """Return float64[rows], the log-probability of each target with the table's help."""
    matches = len(logp) == len(targets) and np.array_equal(
        np.asarray(targets)[entries.positions], entries.tokens
    )
    if not matches:
        raise CorrectionError(
            f"the correction table's {len(entries.tokens)} tokens are not the targets of these "
            f"{len(logp)} rows; build the table again"
        )
    out = np.array(logp, np.float64)
    out[entries.positions] = boosted(out[entries.positions])
    return out


def corrected_distribution(distribution: np.ndarray, token: int) -> np.ndarray:
    """Return float64[V]: one row's distribution with BOOST on the logit of `token`."""
    out = np.array(distribution, np.float64)
    out[token] *= math.exp(BOOST)
    return out / out.sum()


def saved_bits(logp: np.ndarray) -> np.ndarray:
    """Return the bits that an entry saves on a row whose target has this log-probability."""
    return (BOOST - np.log1p(np.exp(logp) * math.expm1(BOOST))) / math.log(2)


def charge(logp: np.ndarray, entries: Entries, table_bytes: int, text_bytes: int) -> Charge:
    """Return both figures of a table of `table_bytes`, header included, on `text_bytes` of text."""
    if text_bytes <= 0:
        raise UserError(
            f"{text_bytes} bytes of text have no bits per byte; name shards that hold text"
        )
    saved, paid = float(saved_bits(logp[entries.positions]).sum()), 8.0 * table_bytes
    oracle = -float(np.sum(logp, dtype=np.float64)) / math.log(2) - saved
    return Charge(oracle / text_bytes, (oracle + paid) / text_bytes, saved, paid)


# ==== WHICH ENTRIES ===============================================================================
def threshold_for(logp: np.ndarray, budget_bytes: int | None = None) -> float:
    """Return the probability below which tokens are in the tail.

    It is 2^-10, or less if a budget can list fewer rows, at two bytes an entry.
    """
    low = np.asarray(logp)[np.asarray(logp) < math.log(THRESHOLD)]
    count = len(low) if budget_bytes is None else max(1, budget_bytes // 2)
    return THRESHOLD if count >= len(low) else math.exp(np.partition(low, count)[count])


def choose_entries(
    logp: np.ndarray,
    targets: np.ndarray,
    view: ModelView,
    codec: str,
    budget_bytes: int | None = None,
) -> Entries:
    """Return entries among the rows whose target is in the tail, by bits saved minus bits paid.

    Without a budget, entries that cost more than they save are dropped until none is left that
    does. On real text this mostly leaves none, and an empty table is the honest answer. With a
    budget, the best entries fill it, whether or not they pay: `charge` says what that cost.
    """
    if not len(logp) == len(targets) == view.rows:
        raise CorrectionError(
            f"{len(logp)} log-probabilities and {len(targets)} targets, but the view has "
            f"{view.rows} rows"
        )
    rows = np.flatnonzero(np.asarray(logp) < math.log(view.threshold))
    entries = Entries(rows, np.asarray(targets)[rows].astype(np.int64))
    if budget_bytes is not None:
        return fill_budget(entries, logp, view, codec, budget_bytes)
    while len(entries.positions):
        keep = saved_bits(logp[entries.positions]) > CODECS[codec].prices(entries, logp, view)
        if keep.all():
            break
        entries = Entries(entries.positions[keep], entries.tokens[keep])
    pays = 8 * file_size(entries, view, codec) < saved_bits(logp[entries.positions]).sum()
    return entries if pays else Entries(rows[:0], rows[:0])


def file_size(entries: Entries, view: ModelView, codec: str) -> int:
    """Return the bytes of the file that these entries make."""
    return HEADER.size + len(CODECS[codec].encode(entries, view)) + CHECKSUM_BYTES


def fill_budget(
    entries: Entries, logp: np.ndarray, view: ModelView, codec: str, budget_bytes: int
) -> Entries:
    """Return as many entries as the budget holds; at most 0.5 % of it stays empty.

    Entries that save most for their price come first. Only encoding shows whether a number of them
    fits: the first try comes from the prices, each later one from the size of the last.
    """
    if budget_bytes < EMPTY_BYTES:
        raise UserError(
            f"a budget of {budget_bytes} bytes holds no correction table: an empty one has "
            f"{EMPTY_BYTES}; raise --budget"
        )
    prices, view = CODECS[codec].prices(entries, logp, view), view.cached_for(entries.positions)
    order = np.argsort(prices - saved_bits(logp[entries.positions]), kind="stable")
    room, best = budget_bytes - EMPTY_BYTES, entries
    fits, too_many = 0, len(order) + 1
    count = int(np.searchsorted(np.cumsum(prices[order]), 8 * room))
    while too_many - fits > 1:
        count = min(max(count, fits + 1), too_many - 1)
        chosen = np.sort(order[:count])
        candidate = Entries(entries.positions[chosen], entries.tokens[chosen])
        used = file_size(candidate, view, codec) - EMPTY_BYTES
        if used <= room:
            best, fits = candidate, count
            if room - used <= budget_bytes // 200:
                break
        else:
            too_many = count
        count = int(count * room / max(1, used))
    return best if fits else Entries(entries.positions[:0], entries.tokens[:0])


# ==== THE FILE ====================================================================================
def split_sha256(tokens: np.ndarray) -> bytes:
    """Return the SHA-256 of a split's tokens as shards store them."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2")).digest()


def entries_sha256(entries: Entries) -> bytes:
    """Return the SHA-256 of all positions and then all tokens, as 8-byte integers."""
    columns = [np.ascontiguousarray(column, "<i8").tobytes() for column in entries]
    return hashlib.sha256(b"".join(columns)).digest()


def make_table(
    entries: Entries, view: ModelView, codec: str, split: bytes, artifact: bytes
) -> Table:
    """Return the table of these entries.

    `split` and `artifact` are SHA-256 digests: of the tokens (`split_sha256`), and of the
    artifact's file.
    """
    entries = check_entries(*entries, view)
    return Table(
        codec=codec,
        rows=view.rows,
        vocab_size=view.vocab_size,
        threshold=view.threshold,
        count=len(entries.positions),
        split_sha256=split,
        artifact_sha256=artifact,
        entries_sha256=entries_sha256(entries),
        payload=CODECS[codec].encode(entries, view),
    )


def table_bytes(table: Table) -> bytes:
    """Return the whole file of a table."""
    *numbers, payload = table._replace(codec=table.codec.encode())
    codec, rows, vocab_size, threshold, count, *digests = numbers
    head = HEADER.pack(
        MAGIC, VERSION, codec, rows, vocab_size, threshold, count, len(payload), *digests
    )
    return head + payload + hashlib.sha256(head + payload).digest()


def write_table(path: str | Path, table: Table) -> int:
    """Write or replace the file of a table, and return its bytes."""
    data = table_bytes(table)
    with replacing(path) as f:
        f.write(data)
    return len(data)


def read_table(
    path: str | Path, rows: int, vocab_size: int, split: bytes, artifact: bytes
) -> Table:
    """Return the table of a file, which must be of this split and this artifact.

    No more is read than a table of so many rows can hold.
    """
    try:
        with Path(path).open("rb") as f:
            head, size = f.read(HEADER.size), os.fstat(f.fileno()).st_size
            table, length = parse_table_header(head, size)
            check_origin(table, rows, vocab_size, split, artifact)
            if table.count > rows or length > 16 * table.count + MOST_FLAG_BYTES:
                raise CorrectionError(
                    f"{table.count} entries in {length} bytes cannot be of {rows} rows: damaged"
                )
            payload, checksum = f.read(length), f.read(CHECKSUM_BYTES)
        if hashlib.sha256(head + payload).digest() != checksum:
            raise CorrectionError("its checksum does not match: damaged; build the table again")
        return table._replace(payload=payload)
    except OSError as e:
        raise CorrectionError(
            f"{path}: cannot be read ({e.strerror}); run build_correction_table.py"
        ) from None
    except CorrectionError as e:
        raise CorrectionError(f"{path}: {e}") from None


def parse_table_header(head: bytes, size: int) -> tuple[Table, int]:
    """Return a table without its payload, and the payload's length, for a file of `size` bytes."""
    if len(head) != HEADER.size or not head.startswith(MAGIC):
        raise CorrectionError("not a correction table")
    _, version, codec, rows, vocab_size, threshold, count, length, *digests = HEADER.unpack(head)
    if version != VERSION:
        raise CorrectionError(f"version {version}; this reader knows {VERSION}")
    name = next((name for name in CODECS if name.encode().ljust(8, b"\0") == codec), None)
    if name is None:
        raise CorrectionError(f"codec {codec!r} is not one of {', '.join(CODECS)}")
    expected = HEADER.size + length + CHECKSUM_BYTES
    if size != expected:
        raise CorrectionError(
            f"{size} bytes, but its header calls for {expected}: cut short or damaged"
        )
    if not 0 < threshold <= 1:
        raise CorrectionError(f"a threshold of {threshold} is no probability: damaged")
    return Table(name, rows, vocab_size, threshold, count, *digests, b""), length


def check_origin(table: Table, rows: int, vocab_size: int, split: bytes, artifact: bytes) -> None:
    """Refuse a table of another split or artifact."""
    for label, wanted, actual in (
        ("rows", rows, table.rows),
        ("a vocabulary of", vocab_size, table.vocab_size),
        ("the split", split.hex()[:16], table.split_sha256.hex()[:16]),
        ("the artifact", artifact.hex()[:16], table.artifact_sha256.hex()[:16]),
    ):
        if actual != wanted:
            raise CorrectionError(
                f"made for {label} {actual}, but this is {wanted}; build the table again"
            )


def table_entries(table: Table, view: ModelView) -> Entries:
    """Return the entries of a table; its checksum shows that they are those that were written."""
    theirs = (table.rows, table.vocab_size, table.threshold)
    ours = (view.rows, view.vocab_size, view.threshold)
    if theirs != ours:
        raise CorrectionError(
            "the correction table is of {} rows, {} tokens and threshold {}, but the view is of "
            "{}, {} and {}".format(*theirs, *ours)
        )
    entries = CODECS[table.codec].decode(table.payload, view)
    if len(entries.positions) != table.count or entries_sha256(entries) != table.entries_sha256:
        raise CorrectionError(
            f"the correction table decodes to other entries than the {table.count} that were "
            "written: the model's numbers differ here (other batch, device or machine); build the "
            "table again"
        )
    return entries


# ==== NEXT TO AN ARTIFACT =========================================================================
def table_path(artifact: str | Path) -> Path:
    """Return the path of an artifact's correction table: its own file, next to the artifact."""
    return Path(f"{artifact}.corrections")


def attach(
    artifact: str | Path, table: Table, code_bytes: int, budget_bytes: int = 16_000_000
) -> Path:
    """Write a table next to its artifact, if both and the code fit the budget; return its path."""
    size = Path(artifact).stat().st_size
    total = size + code_bytes + len(table_bytes(table))
    if total > budget_bytes:
        raise UserError(
            f"artifact {size}, code {code_bytes} and correction table {len(table_bytes(table))} "
            f"bytes are {total}, more than {budget_bytes}; lower --budget to "
            f"{max(0, budget_bytes - size - code_bytes)}"
        )
    path = table_path(artifact)
    write_table(path, table)
    return path
