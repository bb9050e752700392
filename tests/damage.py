"""Damaged files of state, shared by the tests of the experts and of the mixture."""

from pathlib import Path

import numpy as np
import pytest

from train_gpt import UserError


def read_damaged(path: Path, data: bytes, at: int, byte: int, cut: bool, read):
    """Return what `read(path)` makes of data that is cut at a place, or has another byte there.

    None stands for a refusal. It must be one line that names the file and says what to do.
    """
    path.write_bytes(data[:at] if cut else data[:at] + bytes([byte]) + data[at + 1 :])
    try:
        return read(path)
    except UserError as e:
        assert "score from the start" in str(e) and "\n" not in str(e) and str(path) in str(e)


def assert_refused_with(path: Path, data: bytes, name: str, value: float | None, read) -> None:
    """Check that `read(path)` refuses data whose array `name` is all `value`, or cut (None)."""
    path.write_bytes(data)
    arrays = dict(np.load(path))
    arrays[name] = arrays[name][:-1] if value is None else np.full_like(arrays[name], value)
    with path.open("wb") as f:
        np.savez(f, **arrays)
    with pytest.raises(UserError, match="not a whole file"):
        read(path)
