"""The Golomb-Rice codec: skipped rows in unary and `shift` low bits, tokens in log2 V bits each.

The payload is the number of entries, the shift that makes the gaps shortest, the gaps as bits, and
the tokens through a range coder, so that a vocabulary that is no power of two wastes nothing. Its
floor is that of entries at random rows: rows x h(entries / rows) bits for the positions, where h is
the entropy of a yes or no, and log2 V bits for each token.
"""

import numpy as np
from numba import njit

from fairway.compression.leb128 import write_number
from fairway.correction.entries import (
    CorrectionError,
    Entries,
    ModelView,
    check_entries,
    position_entropy,
    read_count,
    skipped_rows,
)
from fairway.correction.range_coder import uniform_bytes, uniform_symbols

MOST_SHIFT = 40  # gaps of a terabyte; a larger shift is damage


def best_shift(gaps: np.ndarray) -> tuple[int, int]:
    """Return the shift that makes the gaps shortest, and their bits with it."""
    bits = [int((gaps >> s).sum()) + len(gaps) * (s + 1) for s in range(MOST_SHIFT + 1)]
    return int(np.argmin(bits)), min(bits)


@njit(cache=True)
def write_gaps(gaps, shift, out):
    """Write ones for the quotient, a zero, and the remainder, highest bit first, into zeros."""
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
def read_gaps(data, shift, rows, positions):
    """Fill `positions`; return the bits that were read, or -1 for data that no writer makes."""
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


def prices(entries: Entries, logp: np.ndarray, view: ModelView) -> np.ndarray:
    """Return the bits of each entry, float64[m]: of its own codes, whatever the model says."""
    gaps = skipped_rows(check_entries(*entries, view).positions)
    shift, _ = best_shift(gaps)
    return (gaps >> shift) + shift + 1 + np.log2(view.vocab_size)


def floor_bits(entries: Entries, view: ModelView) -> float:
    """Return the bits of as many entries at random rows with random tokens."""
    count = len(check_entries(*entries, view).positions)
    return position_entropy(count, view.rows) + count * np.log2(view.vocab_size)


def encode(entries: Entries, view: ModelView) -> bytes:
    """Return the payload of the entries."""
    entries = check_entries(*entries, view)
    if not len(entries.positions):
        return write_number(0)
    gaps = skipped_rows(entries.positions)
    shift, bits = best_shift(gaps)
    out = np.zeros((bits + 7) // 8, np.uint8)
    write_gaps(gaps, shift, out)
    tokens = uniform_bytes(entries.tokens, view.vocab_size)
    return write_number(len(gaps)) + bytes([shift]) + out.tobytes() + tokens


def decode(payload: bytes, view: ModelView) -> Entries:
    """Return the entries of a payload, or raise CorrectionError."""
    count, at = read_count(payload, view)
    if not count:
        if at < len(payload):
            raise CorrectionError(
                f"an empty correction table has {len(payload)} bytes, not {at}: damaged"
            )
        return check_entries(np.zeros(0), np.zeros(0), view)
    data = np.frombuffer(payload, np.uint8)[at:].copy()
    if not len(data) or count > 8 * len(data) or data[0] > MOST_SHIFT:
        raise CorrectionError(
            f"the correction table's {count} entries do not fit its {len(data)} bytes, or its "
            f"shift is above {MOST_SHIFT}: damaged"
        )
    positions = np.empty(count, np.int64)
    bits = read_gaps(data[1:], int(data[0]), view.rows, positions)
    if bits < 0:
        raise CorrectionError(
            "the correction table is cut short, or lists rows beyond the split's "
            f"{view.rows}: damaged"
        )
    tokens = uniform_symbols(data[1 + (bits + 7) // 8 :], count, view.vocab_size)
    return check_entries(positions, tokens, view)
