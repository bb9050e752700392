"""LEB128 numbers: seven bits a byte, lowest first; the high bit says that another byte follows."""

MOST_NUMBER_BYTES = 9  # 63 bits: every number fits an int64


def write_number(value: int) -> bytes:
    """Return a number of 0 or more in as few bytes as it needs.

    >>> write_number(300).hex()
    'ac02'
    """
    parts = []
    while value > 127:
        parts.append(128 | value & 127)
        value >>= 7
    return bytes([*parts, value])


def read_number(data: bytes, start: int) -> tuple[int, int]:
    """Return the number at byte `start`, and where it ends; ValueError says what is wrong."""
    value = 0
    for i, byte in enumerate(data[start : start + MOST_NUMBER_BYTES]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if i and not byte:
                raise ValueError("a number takes more bytes than it needs")
            return value, start + i + 1
    if len(data) - start < MOST_NUMBER_BYTES:
        raise ValueError("a number is cut short")
    raise ValueError(f"a number has no end within {MOST_NUMBER_BYTES} bytes")
