"""A range coder on 64 bits without carries (Subbotin), for kernels in Numba: any frequencies that sum to at most 2^32.

The coder is an array of five words, so that a kernel can be left and entered again between batches. Nothing here knows
a model: kernels call `narrow` and then `emit` when writing, `target`, `narrow` and `absorb` when reading.
"""

import numpy as np
from numba import njit

LOW, RANGE, STEP, CODE, AT = range(5)
ONE, EIGHT, TOP_SHIFT = np.uint64(1), np.uint64(8), np.uint64(56)
TOP, BOTTOM = np.uint64(1 << 56), np.uint64(1 << 48)
MOST_BYTES = 8  # that one symbol can emit
BATCH = 1 << 16  # symbols between two emptyings of the buffer


def start() -> np.ndarray:
    return np.array([0, 2**64 - 1, 0, 0, 0], np.uint64)


def start_reading(data: np.ndarray) -> np.ndarray:
    """Of uint8[n]; beyond its end, zeros are read."""
    coder = start()
    coder[CODE] = int.from_bytes(data[:8].tobytes().ljust(8, b"\0"), "big")
    coder[AT] = 8
    return coder


@njit(cache=True)
def narrow(coder, first, size):
    """To the symbol that has `size` of the total from `first` on; STEP is what one unit of frequency spans."""
    coder[LOW] += coder[STEP] * np.uint64(first)
    coder[RANGE] = coder[STEP] * np.uint64(size)


@njit(cache=True)
def settled(coder):
    """Whether no byte is due. A range that grows too small across a byte's border is cut at the border."""
    if (
        coder[RANGE] >= TOP
    ):  # a whole byte exactly has its top byte settled, but would overflow when shifted
        return True
    if (coder[LOW] ^ (coder[LOW] + coder[RANGE] - ONE)) >= TOP:
        if coder[RANGE] >= BOTTOM:
            return True
        coder[RANGE] = (~coder[LOW] + ONE) & (BOTTOM - ONE)
    return False


@njit(cache=True)
def put(coder, out, first, size, total):
    coder[STEP] = coder[RANGE] // np.uint64(total)
    narrow(coder, first, size)
    while not settled(coder):
        out[coder[AT]] = coder[LOW] >> TOP_SHIFT
        coder[AT] += ONE
        coder[LOW] <<= EIGHT
        coder[RANGE] <<= EIGHT


@njit(cache=True)
def target(coder, total):
    """Where in 0 ... total - 1 the next symbol lies; `take` must follow."""
    coder[STEP] = coder[RANGE] // np.uint64(total)
    return min((coder[CODE] - coder[LOW]) // coder[STEP], np.uint64(total) - ONE)


@njit(cache=True)
def take(coder, data, first, size):
    narrow(coder, first, size)
    while not settled(coder):
        coder[CODE] <<= EIGHT
        if coder[AT] < np.uint64(len(data)):
            coder[CODE] |= np.uint64(data[coder[AT]])
        coder[AT] += ONE
        coder[LOW] <<= EIGHT
        coder[RANGE] <<= EIGHT


def drained(coder: np.ndarray, out: np.ndarray) -> bytes:
    """What the buffer holds; it is empty then."""
    data = out[: int(coder[AT])].tobytes()
    coder[AT] = 0
    return data


def ending(coder: np.ndarray) -> bytes:
    """Two bytes that end the stream inside the last range; zeros at the end need not be kept."""
    return (((int(coder[LOW]) + 2**48 - 1) >> 48) & 0xFFFF).to_bytes(2, "big")


@njit(cache=True)
def put_uniform(coder, out, symbols, total):
    for symbol in symbols:
        put(coder, out, symbol, 1, total)


@njit(cache=True)
def take_uniform(coder, data, symbols, total):
    for i in range(len(symbols)):
        symbols[i] = target(coder, total)
        take(coder, data, symbols[i], 1)


def uniform_bytes(symbols: np.ndarray, total: int) -> bytes:
    """Symbols below `total`, log2(total) bits each, whether or not that is a whole number."""
    coder, out, parts = start(), np.empty(MOST_BYTES * BATCH, np.uint8), []
    for i in range(0, len(symbols), BATCH):
        put_uniform(coder, out, symbols[i : i + BATCH], total)
        parts.append(drained(coder, out))
    return (b"".join(parts) + ending(coder)).rstrip(b"\0")


def uniform_symbols(data: np.ndarray, count: int, total: int) -> np.ndarray:
    """int64[count] back from uint8[n]."""
    symbols = np.empty(count, np.int64)
    take_uniform(start_reading(data), data, symbols, total)
    return symbols
