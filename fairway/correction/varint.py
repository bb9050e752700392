"""The varint codec: the rows skipped since the last entry as LEB128, then the token in two bytes.

The payload is the number of entries, then gap and token of each. Its floor is the sum of the
lengths of these codes, 16 + 8 ceil(bits / 7) an entry. They are byte codes without a choice, so the
payload exceeds the floor only by its first number.
"""

import numpy as np
from numba import njit

from fairway.compression.leb128 import MOST_NUMBER_BYTES, write_number
from fairway.correction.entries import (
    CorrectionError,
    Entries,
    ModelView,
    check_entries,
    read_count,
    skipped_rows,
)

ERRORS = (
    "",
    "it is cut short",
    "a gap is written in more bytes than it needs",
    "a row is beyond the end of the split",
)
CUT, OVERLONG, BEYOND = 1, 2, 3  # places in ERRORS


def number_bytes(values: np.ndarray) -> np.ndarray:
    """Return int64[m], the bytes that each value takes as LEB128."""
    return 1 + sum((values >> 7 * i > 0).astype(np.int64) for i in range(1, MOST_NUMBER_BYTES))


@njit(cache=True)
def write_pairs(gaps, tokens, out):
    """Write gap and token of each entry. A kernel of its own, for tables of a million entries."""
    at = 0
    for i in range(len(gaps)):
        gap = gaps[i]
        while gap > 127:
            out[at] = 128 | (gap & 127)
            gap >>= 7
            at += 1
        out[at] = gap
        out[at + 1] = tokens[i] & 255
        out[at + 2] = tokens[i] >> 8
        at += 3


@njit(cache=True)
def read_pairs(data, at, rows, positions, tokens):
    """Fill positions and tokens; return where reading ended, and the place in ERRORS or 0."""
    position = -1
    for i in range(len(positions)):
        gap, shift = 0, 0
        while True:
            if at >= len(data):
                return at, CUT
            byte = np.int64(data[at])
            at += 1
            gap |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift >= 63:
                return at, BEYOND
        if byte == 0 and shift > 7:
            return at, OVERLONG
        if at + 2 > len(data):
            return at, CUT
        if gap >= rows - position - 1:
            return at, BEYOND
        position += 1 + gap
        positions[i] = position
        tokens[i] = np.int64(data[at]) | np.int64(data[at + 1]) << 8
        at += 2
    return at, 0


def prices(entries: Entries, logp: np.ndarray, view: ModelView) -> np.ndarray:
    """Return the bits of each entry, float64[m]: of its own codes, whatever the model says."""
    return 16.0 + 8 * number_bytes(skipped_rows(check_entries(*entries, view).positions))


def floor_bits(entries: Entries, view: ModelView) -> float:
    """Return the sum of the lengths of all codes, in bits."""
    return float(
        (16.0 + 8 * number_bytes(skipped_rows(check_entries(*entries, view).positions))).sum()
    )


def encode(entries: Entries, view: ModelView) -> bytes:
    """Return the payload of the entries."""
    entries = check_entries(*entries, view)
    gaps = skipped_rows(entries.positions)
    out = np.empty(int(number_bytes(gaps).sum()) + 2 * len(gaps), np.uint8)
    write_pairs(gaps, entries.tokens, out)
    return write_number(len(gaps)) + out.tobytes()


def decode(payload: bytes, view: ModelView) -> Entries:
    """Return the entries of a payload, or raise CorrectionError."""
    count, at = read_count(payload, view)
    if 3 * count > len(payload) - at:  # three bytes is the shortest entry
        raise CorrectionError(
            f"the correction table lists {count} entries, but {len(payload) - at} bytes are too "
            "few for them: cut short"
        )
    positions, tokens = np.empty(count, np.int64), np.empty(count, np.int64)
    end, error = read_pairs(np.frombuffer(payload, np.uint8), at, view.rows, positions, tokens)
    if error:
        raise CorrectionError(f"the correction table is damaged at byte {end}: {ERRORS[error]}")
    if end < len(payload):
        raise CorrectionError(f"the correction table ends at byte {end} of {len(payload)}: damaged")
    return check_entries(positions, tokens, view)
