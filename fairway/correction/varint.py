"""Delta varint: rows skipped since the last entry as LEB128, then the token in two bytes.

The payload is the number of entries, then gap and token of each. Its floor is the sum of the lengths of these codes,
16 + 8 ceil(bits / 7) an entry: byte codes that no choice can shorten, so the codec meets it but for the count.
"""

import numpy as np
from numba import njit

from fairway.correction.entries import CorrectionError, Entries, View, checked, gaps_of
from train_gpt import need

MOST_NUMBER_BYTES = 9  # 63 bits
ERRORS = (
    "",
    "it is cut short",
    "a gap is written in more bytes than it needs",
    "a row lies beyond the split",
)


def put_number(value: int) -> bytes:
    """LEB128: seven bits a byte, the lowest first; the high bit says that more follow."""
    parts = []
    while value > 127:
        parts.append(128 | value & 127)
        value >>= 7
    return bytes([*parts, value])


def take_count(payload: bytes, view: View) -> tuple[int, int]:
    """The number of entries with which each payload begins, and where it ends."""
    value = 0
    for i, byte in enumerate(payload[:MOST_NUMBER_BYTES]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            need(
                value <= view.rows,
                f"the correction table lists {value} entries, but the split has {view.rows} rows; "
                "build the table again",
                CorrectionError,
            )
            return value, i + 1
    raise CorrectionError(
        "the correction table's number of entries is cut short; build the table again"
    )


def number_bytes(values: np.ndarray) -> np.ndarray:
    """int64[m]: bytes that each takes as LEB128."""
    return 1 + sum((values >> 7 * i > 0).astype(np.int64) for i in range(1, MOST_NUMBER_BYTES))


@njit(cache=True)
def write(gaps, tokens, out):
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
def read(data, at, rows, positions, tokens):
    """Where it ended, and which of ERRORS stopped it."""
    position = -1
    for i in range(len(positions)):
        gap, shift = 0, 0
        while True:
            if at >= len(data):
                return at, 1
            byte = np.int64(data[at])
            at += 1
            gap |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift >= 63:
                return at, 3
        if byte == 0 and shift > 7:
            return at, 2
        if at + 2 > len(data):
            return at, 1
        if gap >= rows - position - 1:
            return at, 3
        position += 1 + gap
        positions[i] = position
        tokens[i] = np.int64(data[at]) | np.int64(data[at + 1]) << 8
        at += 2
    return at, 0


def prices(entries: Entries, logp: np.ndarray, view: View) -> np.ndarray:
    """Bits of each entry: of its own codes, whatever the model thinks of it."""
    return 16.0 + 8 * number_bytes(gaps_of(checked(*entries, view).positions))


def floor_bits(entries: Entries, view: View) -> float:
    return float((16.0 + 8 * number_bytes(gaps_of(checked(*entries, view).positions))).sum())


def encode(entries: Entries, view: View) -> bytes:
    entries = checked(*entries, view)
    gaps = gaps_of(entries.positions)
    out = np.empty(int(number_bytes(gaps).sum()) + 2 * len(gaps), np.uint8)
    write(gaps, entries.tokens, out)
    return put_number(len(gaps)) + out.tobytes()


def decode(payload: bytes, view: View) -> Entries:
    count, at = take_count(payload, view)
    need(
        3 * count <= len(payload) - at,
        f"the correction table lists {count} entries, but {len(payload) - at} bytes "
        "are too few for them: cut short",
        CorrectionError,
    )
    positions, tokens = np.empty(count, np.int64), np.empty(count, np.int64)
    end, error = read(np.frombuffer(payload, np.uint8), at, view.rows, positions, tokens)
    need(
        not error,
        f"the correction table is damaged at byte {end}: {ERRORS[error]}",
        CorrectionError,
    )
    need(
        end == len(payload),
        f"the correction table ends at byte {end} of {len(payload)}: damaged",
        CorrectionError,
    )
    return checked(positions, tokens, view)
