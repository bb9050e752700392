"""Entries coded with what the model itself says: a flag a row, then the token of each flagged row.

**Flags.** The chance that a row is listed is the model's tail mass there times a ratio that is learned on the way:
listed rows over expected ones, by how recent the last entries are (errors come in bursts), then by that and the size of
the tail; each ratio starts at that of the wider class. Only + - x / are used: equal views give equal codes anywhere.
**Tokens.** The model's distribution cut to its tail, each token's part times its own ratio of listed over expected, and
made whole numbers by `frequencies`. An entry outside the tail can be coded too, at about 26 bits.

Both sides count as they go, so no table of statistics is stored. The floor is the sum of -log2 of these chances before
they become whole numbers. All flags come before the first token, so that a reader asks the model for flagged rows only,
once and in batches; the reader needs the very view that the writer had.
"""

import numpy as np
from numba import njit

from fairway.correction import range_coder as rc
from fairway.correction.entries import CorrectionError, Entries, View, checked
from fairway.correction.range_coder import put, take, target
from fairway.correction.varint import put_number, take_count
from train_gpt import need

PRICE, WRITE, READ = range(3)
FLAG_TOTAL, TOKEN_TOTAL = 1 << 28, 1 << 26
LEAST_CHANCE = 2.0**-26  # of a flag, and as much of none: both can always be coded
LEAST_MASS = (
    2.0**-14
)  # of a tail, so that what a model holds impossible is soon learned to be otherwise
OCTAVE = np.array(
    [max(i, 1).bit_length() - 1 for i in range((1 << 16) + 1)], np.uint8
)  # floor(log2 i)
AGES = 14  # octaves of rows since the fourth last entry; eight of rows since the last
RECENT, TAILS = 8 * AGES, 17
DOUBT = 4.0  # entries that a class must have had before its own ratio counts as much as the wider class's
TOKEN_DOUBT = 1.0
BATCH_VALUES = 1 << 22  # probabilities asked for at a time: 32 MiB


@njit(cache=True)
def ratio(listed, expected, wider):
    """Listed over expected, drawn to the wider class's ratio, and less so where the model is found to be too sure."""
    doubt = DOUBT * min(1.0, (expected + 1) / (listed + 1))
    return (listed + doubt * wider) / (expected + doubt)


@njit(cache=True)
def flag_rows(mode, coder, buffer, tail, flags, bits, last, counts, room):
    """Code rows from `last[4]` on: price into `bits`, write `flags`, or read at most `room` of them.

    `last` holds the rows of the last four entries, newest first, and the row to go on from; `counts` listed and
    expected rows of each class. Returns the flags seen, after the last of which reading stops.
    """
    seen, row = 0, last[4]
    for i in range(len(tail)):
        if mode == READ and seen == room:
            break
        mass = min(max(tail[i], LEAST_MASS), 1.0)
        recent = min(OCTAVE[min(row - last[0], 65536)], 7) * AGES + min(
            OCTAVE[min(row - last[3], 65536)], AGES - 1
        )
        both = RECENT + recent * TAILS + OCTAVE[int(mass * 65536)]
        wider = ratio(counts[0, recent], counts[1, recent], 1.0)
        chance = mass * ratio(counts[0, both], counts[1, both], wider)
        chance = min(max(chance, LEAST_CHANCE), 1 - LEAST_CHANCE)
        if mode == PRICE:
            bits[i] = -np.log2(chance if flags[i] else 1 - chance)
        else:
            size = np.int64(chance * FLAG_TOTAL)  # listed rows come first
            if mode == READ:
                flags[i] = target(coder, FLAG_TOTAL) < np.uint64(size)
            first, width = (0, size) if flags[i] else (size, FLAG_TOTAL - size)
            if mode == READ:
                take(coder, buffer, first, width)
            else:
                put(coder, buffer, first, width, FLAG_TOTAL)
        counts[1, recent] += mass
        counts[1, both] += mass
        if flags[i]:
            counts[0, recent] += 1
            counts[0, both] += 1
            last[3], last[2], last[1], last[0] = last[2], last[1], last[0], row
            seen += 1
        row += 1
    last[4] = row
    return seen


@njit(cache=True)
def frequencies(weights, counts, out):
    """Whole numbers for weights[V] times each token's ratio, at least 1; their sum. `counts`: listed, expected."""
    total, whole = 0.0, 0
    for v in range(len(weights)):
        total += weights[v] * ((counts[0, v] + TOKEN_DOUBT) / (counts[1, v] + TOKEN_DOUBT))
    scale = TOKEN_TOTAL / total if total > 0 else 0.0
    for v in range(len(weights)):
        part = weights[v] * ((counts[0, v] + TOKEN_DOUBT) / (counts[1, v] + TOKEN_DOUBT))
        out[v] = 1 + np.int64(part * scale)
        whole += out[v]
    return total, whole


@njit(cache=True)
def token_rows(mode, coder, buffer, threshold, rows, tokens, bits, counts):
    """Code `tokens`, one for each of the distributions in `rows`, which are cut to their tails in place."""
    sizes = np.empty(rows.shape[1], np.int64)
    for i in range(len(tokens)):
        weights, mass = rows[i], 0.0
        for v in range(len(weights)):
            weights[v] = weights[v] if 0 < weights[v] < threshold else 0.0
            mass += weights[v]
        total, whole = frequencies(weights, counts, sizes)
        token, first = tokens[i], 0
        if mode == READ:
            place, token = np.int64(target(coder, whole)), 0
            while first + sizes[token] <= place:
                first += sizes[token]
                token += 1
            tokens[i] = token
            take(coder, buffer, first, sizes[token])
        elif mode == WRITE:
            first = sizes[:token].sum()
            put(coder, buffer, first, sizes[token], whole)
        else:
            part = weights[token] * (
                (counts[0, token] + TOKEN_DOUBT) / (counts[1, token] + TOKEN_DOUBT)
            )
            bits[i] = np.log2(total / part) if part > 0 else np.log2(whole / sizes[token])
        counts[0, token] += 1
        for v in range(len(weights)):
            counts[1, v] += weights[v] / mass if mass > 0 else 0.0


def needed(view: View) -> None:
    need(
        view.tail is not None and view.distributions is not None,
        "the modelled codec needs the model's tail mass and "
        "distributions; choose varint or rice, which need neither",
        CorrectionError,
    )
    need(
        len(view.tail) == view.rows,
        f"the view has tail masses of {len(view.tail)} rows, but the split has {view.rows} rows",
        CorrectionError,
    )


def code_flags(
    mode: int, coder: np.ndarray, data: np.ndarray, view: View, positions: np.ndarray
) -> list:
    """Every row up to the last entry. Written: bytes; read: into `positions`; priced: bits of all and of each entry."""
    last, counts, parts, seen = (
        np.array([-65537] * 4 + [0]),
        np.zeros((2, RECENT * (1 + TAILS))),
        [],
        0,
    )
    end = (
        int(positions[-1]) + 1
        if mode != READ and len(positions)
        else view.rows
        if mode == READ
        else 0
    )
    for start in range(0, end, rc.BATCH):
        if seen == len(positions):
            break
        tail = np.array(view.tail[start : min(start + rc.BATCH, end)], np.float64)
        need(
            np.isfinite(tail).all(),
            f"the model's tail mass is not finite between rows {start} and "
            f"{start + len(tail)}; are there NaN in its weights?",
            CorrectionError,
        )
        flags, bits = np.zeros(len(tail), np.bool_), np.empty(len(tail))
        inside = (
            slice(*np.searchsorted(positions, [start, start + len(tail)]))
            if mode != READ
            else slice(0)
        )
        flags[positions[inside] - start] = True
        found = flag_rows(mode, coder, data, tail, flags, bits, last, counts, len(positions) - seen)
        if mode == READ:
            positions[seen : seen + found] = start + np.flatnonzero(flags)
        else:
            parts.append((bits.sum(), bits[flags]) if mode == PRICE else rc.drained(coder, data))
        seen += found
    need(
        seen == len(positions),
        f"the correction table holds {seen} entries, not the {len(positions)} that it states: "
        "damaged, or of another model",
        CorrectionError,
    )
    return parts


def code_tokens(
    mode: int, coder: np.ndarray, data: np.ndarray, view: View, entries: Entries
) -> list:
    """The token of each entry. Priced: bits of each; written: the bytes; read: into `entries.tokens`."""
    counts, parts, step = (
        np.zeros((2, view.vocab_size)),
        [],
        max(1, BATCH_VALUES // view.vocab_size),
    )
    for i in range(0, len(entries.positions), step):
        positions, tokens = (column[i : i + step] for column in entries)
        rows = np.array(view.distributions(positions), np.float64, order="C")
        need(
            rows.shape == (len(positions), view.vocab_size),
            f"the model gives distributions of shape {rows.shape}, "
            f"not {len(positions)} of {view.vocab_size} tokens",
            CorrectionError,
        )
        bits = np.empty(len(tokens))
        token_rows(mode, coder, data, view.threshold, rows, tokens, bits, counts)
        parts.append(bits if mode == PRICE else rc.drained(coder, data) if mode == WRITE else b"")
    return parts


def prices(entries: Entries, logp: np.ndarray, view: View) -> np.ndarray:
    """Bits of each entry: its flag, an equal part of what the unlisted rows pay, its token under the plain tail."""
    needed(view)
    entries = checked(*entries, view)
    parts = code_flags(PRICE, rc.start(), np.zeros(0, np.uint8), view, entries.positions)
    flags, total = (
        np.concatenate([np.zeros(0), *(bits for _, bits in parts)]),
        sum(bits for bits, _ in parts),
    )
    tail = np.log2(np.maximum(view.tail[entries.positions], LEAST_CHANCE)) - logp[
        entries.positions
    ] / np.log(2)
    return (
        flags + (total - flags.sum()) / max(1, len(flags)) + np.clip(tail, 0, np.log2(TOKEN_TOTAL))
    )


def floor_bits(entries: Entries, view: View) -> float:
    needed(view)
    entries, nothing = checked(*entries, view), np.zeros(0, np.uint8)
    flags = sum(bits for bits, _ in code_flags(PRICE, rc.start(), nothing, view, entries.positions))
    return float(
        flags + sum(bits.sum() for bits in code_tokens(PRICE, rc.start(), nothing, view, entries))
    )


def encode(entries: Entries, view: View) -> bytes:
    needed(view)
    entries, coder, buffer = (
        checked(*entries, view),
        rc.start(),
        np.empty(rc.MOST_BYTES * rc.BATCH, np.uint8),
    )
    parts = code_flags(WRITE, coder, buffer, view, entries.positions)
    parts += code_tokens(WRITE, coder, buffer, view, entries)
    return put_number(len(entries.positions)) + (b"".join(parts) + rc.ending(coder)).rstrip(b"\0")


def decode(payload: bytes, view: View) -> Entries:
    needed(view)
    count, at = take_count(payload, view)
    data = np.frombuffer(payload, np.uint8)[at:].copy()
    coder, entries = (
        rc.start_reading(data),
        Entries(np.zeros(count, np.int64), np.zeros(count, np.int64)),
    )
    code_flags(READ, coder, data, view, entries.positions)
    code_tokens(READ, coder, data, view, entries)
    return checked(*entries, view)
