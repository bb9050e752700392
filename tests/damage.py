"""Files of state, damaged: what tests of the experts and of the mixture share."""

from pathlib import Path

import numpy as np
import pytest

from train_gpt import UserError


def refused_or_read(path: Path, data: bytes, at: int, byte: int, cut: bool, read):
    """What `read(path)` makes of `data` cut at a place, or with another byte there; None where it is refused, which
    must happen in one line that says what to do."""
    path.write_bytes(data[:at] if cut else data[:at] + bytes([byte]) + data[at + 1 :])
    try:
        return read(path)
    except UserError as e:
        assert "score from the start" in str(e) and "\n" not in str(e) and str(path) in str(e)


def refused_with(path: Path, data: bytes, name: str, value: float | None, read) -> None:
    """`read(path)` refuses `data` whose array `name` is all `value`, or (None) one element short."""
    path.write_bytes(data)
    arrays = dict(np.load(path))
    arrays[name] = arrays[name][:-1] if value is None else np.full_like(arrays[name], value)
    with open(path, "wb") as f:
        np.savez(f, **arrays)
    with pytest.raises(UserError, match="not a whole file"):
        read(path)
