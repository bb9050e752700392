"""A 64-bit range coder without carries (Subbotin's), as Numba kernels.

Frequencies may have any sum up to 2^32. The coder is an array of five words, so that a kernel can
return between batches and continue later. It knows no model: a writer calls `encode_symbol`, a
reader calls `decode_position`, finds the symbol there, and calls `consume_symbol`.
"""

import numpy as np
from numba import njit

LOW, RANGE, STEP, CODE, PLACE = range(5)  # PLACE: index of the next byte
ONE, EIGHT, TOP_SHIFT = np.uint64(1), np.uint64(8), np.uint64(56)
TOP, BOTTOM = np.uint64(1 << 56), np.uint64(1 << 48)
MOST_BYTES = 8  # that one symbol can emit
BATCH = 1 << 16  # symbols after which a writer flushes its buffer


def new_writer() -> np.ndarray:
    """Return uint64[5], a coder that has written nothing."""
    return np.array([0, 2**64 - 1, 0, 0, 0], np.uint64)


def new_reader(data: np.ndarray) -> np.ndarray:
    """Return uint64[5], a coder at the start of uint8[n]; zeros follow the end of the data."""
    coder = new_writer()
    coder[CODE] = int.from_bytes(data[:8].tobytes().ljust(8, b"\0"), "big")
    coder[PLACE] = 8
    return coder


@njit(cache=True)
def narrow(coder, first, size):
    """Narrow the range to a symbol of frequency `size`, before which frequencies sum to `first`.

    STEP is the part of the range that one unit of frequency takes.
    """
    coder[LOW] += coder[STEP] * np.uint64(first)
    coder[RANGE] = coder[STEP] * np.uint64(size)


@njit(cache=True)
def is_settled(coder):
    """Return whether no byte is ready to move out of the range.

    A range that lies across a byte's border and gets too small is cut at the border: this is what
    makes carries unnecessary.
    """
    # RANGE == TOP has a ready byte too, but would overflow when it is shifted.
    if coder[RANGE] >= TOP:
        return True
    if (coder[LOW] ^ (coder[LOW] + coder[RANGE] - ONE)) >= TOP:
        if coder[RANGE] >= BOTTOM:
            return True
        coder[RANGE] = (~coder[LOW] + ONE) & (BOTTOM - ONE)
    return False


@njit(cache=True)
def encode_symbol(coder, out, first, size, total):
    """Write a symbol of frequency `size` out of `total`; `first` is the sum of those before it."""
    coder[STEP] = coder[RANGE] // np.uint64(total)
    narrow(coder, first, size)
    while not is_settled(coder):
        out[coder[PLACE]] = coder[LOW] >> TOP_SHIFT
        coder[PLACE] += ONE
        coder[LOW] <<= EIGHT
        coder[RANGE] <<= EIGHT


@njit(cache=True)
def decode_position(coder, total):
    """Return where in 0 ... total - 1 the next symbol is; `consume_symbol` must follow."""
    coder[STEP] = coder[RANGE] // np.uint64(total)
    return min((coder[CODE] - coder[LOW]) // coder[STEP], np.uint64(total) - ONE)


@njit(cache=True)
def consume_symbol(coder, data, first, size):
    """Move past the symbol that `decode_position` pointed into."""
    narrow(coder, first, size)
    while not is_settled(coder):
        coder[CODE] <<= EIGHT
        if coder[PLACE] < np.uint64(len(data)):
            coder[CODE] |= np.uint64(data[coder[PLACE]])
        coder[PLACE] += ONE
        coder[LOW] <<= EIGHT
        coder[RANGE] <<= EIGHT


def flush(coder: np.ndarray, out: np.ndarray) -> bytes:
    """Return the bytes in a writer's buffer and empty it."""
    data = out[: int(coder[PLACE])].tobytes()
    coder[PLACE] = 0
    return data


def final_bytes(coder: np.ndarray) -> bytes:
    """Return two bytes that end the stream inside the last range; zeros at the end may be cut."""
    return (((int(coder[LOW]) + 2**48 - 1) >> 48) & 0xFFFF).to_bytes(2, "big")


@njit(cache=True)
def encode_uniform(coder, out, symbols, total):
    """Write symbols below `total`, all equally likely."""
    for symbol in symbols:
        encode_symbol(coder, out, symbol, 1, total)


@njit(cache=True)
def decode_uniform(coder, data, symbols, total):
    """Read as many symbols below `total` as `symbols` has room for."""
    for i in range(len(symbols)):
        symbols[i] = decode_position(coder, total)
        consume_symbol(coder, data, symbols[i], 1)


def uniform_bytes(symbols: np.ndarray, total: int) -> bytes:
    """Return symbols below `total` in log2(total) bits each, which need not be a whole number."""
    coder, out, parts = new_writer(), np.empty(MOST_BYTES * BATCH, np.uint8), []
    for i in range(0, len(symbols), BATCH):
        encode_uniform(coder, out, symbols[i : i + BATCH], total)
        parts.append(flush(coder, out))
    return (b"".join(parts) + final_bytes(coder)).rstrip(b"\0")


def uniform_symbols(data: np.ndarray, count: int, total: int) -> np.ndarray:
    """Return int64[count] from the bytes that `uniform_bytes` wrote, as uint8[n]."""
    symbols = np.empty(count, np.int64)
    decode_uniform(new_reader(data), data, symbols, total)
    return symbols
