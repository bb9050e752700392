"""Correction tables: the worst-predicted rows of a split with their right tokens, chosen, stored, applied and charged.

A table is made from the text that it then "predicts". It says what a model gets wrong and what telling it would cost;
it is never part of a score. The file is a header (`HEADER`, little-endian), a payload of one of `CODECS`, and the
SHA-256 of both; the header names the split and the artifact, and holds a checksum of the entries, since the modelled
codec decodes to something else where the model's numbers differ in the last bit.
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
from fairway.correction.entries import THRESHOLD, CorrectionError, Entries, View, checked
from train_gpt import need, replacing

MAGIC, VERSION = b"FWCORR\r\n", 1
HEADER = struct.Struct("<8sI8sQIdQQ32s32s32s")
CHECKSUM_BYTES = 32
EMPTY_BYTES = HEADER.size + 1 + CHECKSUM_BYTES  # a table without entries
MOST_FLAG_BYTES = (
    1 << 18
)  # that unlisted rows may take before the modelled codec has learned how rare entries are
BOOST = 20.0  # added to the logit of the listed token
NOTICE = (
    "The correction table is made from the text that it corrects: it holds the answers. oracle_bpb and "
    "charged_bpb are diagnoses; no record may use the table, since a score knows only what came before (#1017)."
)


class Codec(NamedTuple):
    """One way to write entries; `decode` gives back exactly what `encode` took, or raises CorrectionError."""

    name: str
    encode: Callable[[Entries, View], bytes]
    decode: Callable[[bytes, View], Entries]
    floor_bits: Callable[[Entries, View], float]  # what the scheme needs at least, in all
    prices: Callable[
        [Entries, np.ndarray, View], np.ndarray
    ]  # bits of each entry; the array is logp[rows]


CODECS = {
    name: Codec(name, module.encode, module.decode, module.floor_bits, module.prices)
    for name, module in (("varint", varint), ("rice", rice), ("modelled", modelled))
}


class Table(NamedTuple):
    """A table as it stands in its file; digests are the 32 bytes themselves."""

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
    """What a table does to a score, and what remains of it once its bits are paid."""

    oracle_bpb: float
    charged_bpb: float
    saved_bits: float
    paid_bits: float


# ---- What an entry does ----------------------------------------------------------------------------------------------
def boosted(logp: np.ndarray) -> np.ndarray:
    """Log-probabilities, in nats, of tokens whose logits are raised by BOOST; the other tokens give way."""
    return logp + BOOST - np.log1p(np.exp(logp) * math.expm1(BOOST))


def apply(logp: np.ndarray, entries: Entries, targets: np.ndarray) -> np.ndarray:
    """float64[rows]: the log-probability of each target once the table has spoken; rows that it leaves out stay."""
    right = len(logp) == len(targets) and np.array_equal(
        np.asarray(targets)[entries.positions], entries.tokens
    )
    need(
        right,
        f"the correction table's {len(entries.tokens)} tokens are not the targets of these {len(logp)} rows; "
        "build the table again",
        CorrectionError,
    )
    out = np.array(logp, np.float64)
    out[entries.positions] = boosted(out[entries.positions])
    return out


def applied(distribution: np.ndarray, token: int) -> np.ndarray:
    """float64[V]: one row's distribution with BOOST on the logit of `token`, normalised."""
    out = np.array(distribution, np.float64)
    out[token] *= math.exp(BOOST)
    return out / out.sum()


def saved_bits(logp: np.ndarray) -> np.ndarray:
    """Bits that an entry saves on a row whose target had this log-probability."""
    return (BOOST - np.log1p(np.exp(logp) * math.expm1(BOOST))) / math.log(2)


def charge(logp: np.ndarray, entries: Entries, table_bytes: int, text_bytes: int) -> Charge:
    """The two figures of a table of `table_bytes`, header included, over rows that stand for `text_bytes` of text."""
    need(
        text_bytes > 0,
        f"{text_bytes} bytes of text have no bits per byte; name shards that hold text",
    )
    saved, paid = float(saved_bits(logp[entries.positions]).sum()), 8.0 * table_bytes
    oracle = -float(np.sum(logp, dtype=np.float64)) / math.log(2) - saved
    return Charge(oracle / text_bytes, (oracle + paid) / text_bytes, saved, paid)


# ---- Which entries ---------------------------------------------------------------------------------------------------
def threshold_for(logp: np.ndarray, budget_bytes: int | None = None) -> float:
    """The tail to take a view of: 2^-10 and less, or what a budget can list whole at two bytes an entry."""
    low = np.asarray(logp)[np.asarray(logp) < math.log(THRESHOLD)]
    count = len(low) if budget_bytes is None else max(1, budget_bytes // 2)
    return THRESHOLD if count >= len(low) else math.exp(np.partition(low, count)[count])


def choose(
    logp: np.ndarray, targets: np.ndarray, view: View, codec: str, budget_bytes: int | None = None
) -> Entries:
    """Entries among the rows whose target lies in the tail, by bits saved minus bits paid under `codec`.

    Without a budget, those that pay for themselves: entries that cost more than they save are dropped until none is
    left that does. On real text this mostly leaves none, and an empty table is the honest answer. With a budget, the
    file is filled with the best of them, whether or not they pay: `charge` says what that cost.
    """
    need(
        len(logp) == len(targets) == view.rows,
        f"{len(logp)} log-probabilities and {len(targets)} targets, but the "
        f"view has {view.rows} rows",
        CorrectionError,
    )
    rows = np.flatnonzero(np.asarray(logp) < math.log(view.threshold))
    entries = Entries(rows, np.asarray(targets)[rows].astype(np.int64))
    if budget_bytes is not None:
        return fill(entries, logp, view, codec, budget_bytes)
    while len(entries.positions):
        keep = saved_bits(logp[entries.positions]) > CODECS[codec].prices(entries, logp, view)
        if keep.all():
            break
        entries = Entries(entries.positions[keep], entries.tokens[keep])
    pays = 8 * size(entries, view, codec) < saved_bits(logp[entries.positions]).sum()
    return entries if pays else Entries(rows[:0], rows[:0])


def size(entries: Entries, view: View, codec: str) -> int:
    """Bytes of the whole file."""
    return HEADER.size + len(CODECS[codec].encode(entries, view)) + CHECKSUM_BYTES


def fill(entries: Entries, logp: np.ndarray, view: View, codec: str, budget_bytes: int) -> Entries:
    """As many entries as the budget holds, most saved minus paid bits first; at most 0.5 % of it is left empty."""
    need(
        budget_bytes >= EMPTY_BYTES,
        f"a budget of {budget_bytes} bytes holds no correction table: an empty one has "
        f"{EMPTY_BYTES}; raise --budget",
    )
    prices, view = CODECS[codec].prices(entries, logp, view), view.holding(entries.positions)
    order = np.argsort(prices - saved_bits(logp[entries.positions]), kind="stable")
    room, best, least, most = (
        budget_bytes - EMPTY_BYTES,
        entries,
        0,
        len(order) + 1,
    )  # `least` fit, `most` do not
    count = int(np.searchsorted(np.cumsum(prices[order]), 8 * room))
    while (
        most - least > 1
    ):  # a guess from prices, then in proportion: encoding alone says what fits
        count = min(max(count, least + 1), most - 1)
        kept = np.sort(order[:count])
        tried = Entries(entries.positions[kept], entries.tokens[kept])
        used = size(tried, view, codec) - EMPTY_BYTES
        if used <= room:
            best, least = tried, count
            if room - used <= budget_bytes // 200:
                break
        else:
            most = count
        count = int(count * room / max(1, used))
    return best if least else Entries(entries.positions[:0], entries.tokens[:0])


# ---- The file --------------------------------------------------------------------------------------------------------
def split_sha256(tokens: np.ndarray) -> bytes:
    """Of a split's tokens, as shards store them."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype="<u2")).digest()


def entries_sha256(entries: Entries) -> bytes:
    return hashlib.sha256(
        b"".join(np.ascontiguousarray(column, "<i8").tobytes() for column in entries)
    ).digest()


def make_table(entries: Entries, view: View, codec: str, split: bytes, artifact: bytes) -> Table:
    """`split` and `artifact` are SHA-256 digests: of the tokens (`split_sha256`), and of the artifact's file."""
    entries = checked(*entries, view)
    return Table(
        codec,
        view.rows,
        view.vocab_size,
        view.threshold,
        len(entries.positions),
        split,
        artifact,
        entries_sha256(entries),
        CODECS[codec].encode(entries, view),
    )


def table_bytes(table: Table) -> bytes:
    """The file, byte for byte."""
    *numbers, payload = table._replace(codec=table.codec.encode())
    codec, rows, vocab_size, threshold, count, *digests = numbers
    head = HEADER.pack(
        MAGIC, VERSION, codec, rows, vocab_size, threshold, count, len(payload), *digests
    )
    return head + payload + hashlib.sha256(head + payload).digest()


def write_table(path: str | Path, table: Table) -> int:
    """Replaces the file; the bytes that it has."""
    data = table_bytes(table)
    with replacing(path) as f:
        f.write(data)
    return len(data)


def read_table(
    path: str | Path, rows: int, vocab_size: int, split: bytes, artifact: bytes
) -> Table:
    """Check that a file is a whole table of this split and this artifact; reads no more than these can call for."""
    try:
        with open(path, "rb") as f:
            head, there = f.read(HEADER.size), os.fstat(f.fileno()).st_size
            table, length = parsed(head, there)
            for name, wanted, held in (
                ("rows", rows, table.rows),
                ("a vocabulary of", vocab_size, table.vocab_size),
                ("the split", split, table.split_sha256),
                ("the artifact", artifact, table.artifact_sha256),
            ):
                held, wanted = ((v.hex()[:16] if type(v) is bytes else v) for v in (held, wanted))
                need(
                    held == wanted,
                    f"made for {name} {held}, but this is {wanted}; build the table again",
                    CorrectionError,
                )
            need(
                table.count <= rows and length <= 16 * table.count + MOST_FLAG_BYTES,
                f"{table.count} entries in {length} bytes cannot be of {rows} rows: damaged",
                CorrectionError,
            )
            payload, checksum = f.read(length), f.read(CHECKSUM_BYTES)
        need(
            hashlib.sha256(head + payload).digest() == checksum,
            "its checksum does not match: damaged; build the table again",
            CorrectionError,
        )
        return table._replace(payload=payload)
    except OSError as e:
        raise CorrectionError(
            f"{path}: cannot be read ({e.strerror}); run build_correction_table.py"
        ) from None
    except CorrectionError as e:
        raise CorrectionError(f"{path}: {e}") from None


def parsed(head: bytes, there: int) -> tuple[Table, int]:
    """A header in form, as a table without its payload, and the payload's length; the file has `there` bytes."""
    need(
        len(head) == HEADER.size and head.startswith(MAGIC),
        "not a correction table",
        CorrectionError,
    )
    _, version, codec, rows, vocab_size, threshold, count, length, *digests = HEADER.unpack(head)
    need(version == VERSION, f"version {version}; this reader knows {VERSION}", CorrectionError)
    named = next((name for name in CODECS if name.encode().ljust(8, b"\0") == codec), None)
    need(named, f"codec {codec!r} is not one of {', '.join(CODECS)}", CorrectionError)
    need(
        there == HEADER.size + length + CHECKSUM_BYTES,
        f"{there} bytes, but its header calls for "
        f"{HEADER.size + length + CHECKSUM_BYTES}: cut short or damaged",
        CorrectionError,
    )
    need(
        0 < threshold <= 1,
        f"a threshold of {threshold} is no probability: damaged",
        CorrectionError,
    )
    return Table(named, rows, vocab_size, threshold, count, *digests, b""), length


def entries_of(table: Table, view: View) -> Entries:
    """The entries again, shown to be those that were written."""
    need(
        (table.rows, table.vocab_size, table.threshold)
        == (view.rows, view.vocab_size, view.threshold),
        f"the correction table is of {table.rows} rows, {table.vocab_size} tokens and threshold {table.threshold}, "
        f"but the view is of {view.rows}, {view.vocab_size} and {view.threshold}",
        CorrectionError,
    )
    entries = CODECS[table.codec].decode(table.payload, view)
    need(
        len(entries.positions) == table.count and entries_sha256(entries) == table.entries_sha256,
        f"the correction table decodes to other entries than the {table.count} that were written: the model's numbers "
        "differ here (other batch, device or machine); build the table again",
        CorrectionError,
    )
    return entries


# ---- Beside an artifact ----------------------------------------------------------------------------------------------
def sidecar(artifact: str | Path) -> Path:
    """Where an artifact's correction table lies: beside it, since an artifact's reader refuses bytes that follow."""
    return Path(f"{artifact}.corrections")


def attach(
    artifact: str | Path, table: Table, code_bytes: int, budget_bytes: int = 16_000_000
) -> Path:
    """Put a table beside its artifact, if the two and the code fit the budget."""
    parts, path = (
        (Path(artifact).stat().st_size, code_bytes, len(table_bytes(table))),
        sidecar(artifact),
    )
    need(
        sum(parts) <= budget_bytes,
        f"artifact {parts[0]}, code {parts[1]} and correction table {parts[2]} bytes are "
        f"{sum(parts)}, more than {budget_bytes}; lower --budget to {max(0, budget_bytes - parts[0] - parts[1])}",
    )
    write_table(path, table)
    return path
