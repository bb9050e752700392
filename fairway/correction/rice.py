"""Golomb-Rice: rows skipped since the last entry in unary and `shift` low bits, tokens in log2 V bits each.

The payload is the number of entries, the shift that makes the gaps shortest, the gaps as bits, and the tokens through a
range coder, so that a vocabulary that is no power of two wastes nothing. The floor is that of entries at random:
rows x h(entries / rows) bits for the positions (for each entry, the entropy of a geometric gap), and log2 V a token.
"""

import numpy as np
from numba import njit

from fairway.correction.entries import (
    CorrectionError,
    Entries,
    View,
    checked,
    gaps_of,
    scatter_bits,
)
from fairway.correction.range_coder import uniform_bytes, uniform_symbols
from fairway.correction.varint import put_number, take_count
from train_gpt import need

MOST_SHIFT = 40


def best_shift(gaps: np.ndarray) -> tuple[int, int]:
    """The shift that makes the gaps shortest, and their bits then."""
    bits = [int((gaps >> s).sum()) + len(gaps) * (s + 1) for s in range(MOST_SHIFT + 1)]
    return int(np.argmin(bits)), min(bits)


@njit(cache=True)
def write(gaps, shift, out):
    """Ones for the quotient, a zero, then the remainder, highest bit first; `out` starts as zeros."""
    at = 0
    for gap in gaps:
        for _ in range(gap >> shift):
            out[at >> 3] |= 128 >> (at & 7)
            at += 1
        at += 1
        for s in range(shift - 1, -1, -1):
            if (gap >> s) & 1:
                out[at >> 3] |= 128 >> (at & 7)
            at += 1


@njit(cache=True)
def read(data, shift, rows, positions):
    """Bits read, or -1: cut short, or beyond the split."""
    at, position, bits = 0, -1, 8 * len(data)
    for i in range(len(positions)):
        quotient, remainder = 0, 0
        while at < bits and data[at >> 3] & (128 >> (at & 7)):
            quotient += 1
            at += 1
        at += 1
        if at + shift > bits or quotient > rows >> shift:
            return -1
        for _ in range(shift):
            remainder = remainder << 1 | (data[at >> 3] >> (7 - (at & 7)) & 1)
            at += 1
        position += 1 + (quotient << shift | remainder)
        if position >= rows:
            return -1
        positions[i] = position
    return at


def prices(entries: Entries, logp: np.ndarray, view: View) -> np.ndarray:
    """Bits of each entry: of its own codes, whatever the model thinks of it."""
    gaps = gaps_of(checked(*entries, view).positions)
    shift, _ = best_shift(gaps)
    return (gaps >> shift) + shift + 1 + np.log2(view.vocab_size)


def floor_bits(entries: Entries, view: View) -> float:
    count = len(checked(*entries, view).positions)
    return scatter_bits(count, view.rows) + count * np.log2(view.vocab_size)


def encode(entries: Entries, view: View) -> bytes:
    entries = checked(*entries, view)
    if not len(entries.positions):
        return put_number(0)
    gaps = gaps_of(entries.positions)
    shift, bits = best_shift(gaps)
    out = np.zeros((bits + 7) // 8, np.uint8)
    write(gaps, shift, out)
    return (
        put_number(len(gaps))
        + bytes([shift])
        + out.tobytes()
        + uniform_bytes(entries.tokens, view.vocab_size)
    )


def decode(payload: bytes, view: View) -> Entries:
    count, at = take_count(payload, view)
    if not count:
        need(
            at == len(payload),
            f"an empty correction table has {len(payload)} bytes, not {at}: damaged",
            CorrectionError,
        )
        return checked(np.zeros(0), np.zeros(0), view)
    data = np.frombuffer(payload, np.uint8)[at:].copy()
    need(
        len(data) and count <= 8 * len(data) and data[0] <= MOST_SHIFT,
        f"the correction table's {count} entries do "
        f"not fit its {len(data)} bytes, or its shift is above {MOST_SHIFT}: damaged",
        CorrectionError,
    )
    positions = np.empty(count, np.int64)
    bits = read(data[1:], int(data[0]), view.rows, positions)
    need(
        bits >= 0,
        f"the correction table is cut short, or lists rows beyond the split's {view.rows}: damaged",
        CorrectionError,
    )
    return checked(
        positions, uniform_symbols(data[1 + (bits + 7) // 8 :], count, view.vocab_size), view
    )
