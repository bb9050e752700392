"""Columns on disk: one row for each target token, one file for each quantity.

Neural scoring fills them once; a mixture reads them as often as it likes. A folder belongs to one
key (hashes of artifact and text, and the settings). A killed run continues from the rows that it
had filled; another key empties the folder.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train_gpt import UserError, replacing

COVERED = "covered"  # how often each row was filled; all ones when the scoring is complete


class Columns:
    """Arrays over rows, such as `columns["logp"]`; `covered` counts how often a row was filled."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.covered)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def names(self) -> list[str]:
        """Names of the columns, without `covered`."""
        return [name for name in self.arrays if name != COVERED]

    @property
    def covered(self) -> np.ndarray:
        """Return uint8[rows]: how often each row was filled."""
        return self.arrays[COVERED]

    def put(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Fill all columns of some rows, and count it: no row may be scored twice unnoticed."""
        for name in self.names:
            self.arrays[name][rows] = values[name]
        self.covered[rows] += 1

    def complete(self) -> bool:
        """Return whether each row was filled exactly once."""
        return bool((self.covered == 1).all())


def columns_in_memory(rows: int, kinds: Mapping[str, str]) -> Columns:
    """Return empty columns of these names and numpy types, without files."""
    return Columns({name: np.zeros(rows, kind) for name, kind in {**kinds, COVERED: "u1"}.items()})


def open_columns(
    folder: str | Path,
    rows: int,
    kinds: Mapping[str, str],
    key: Mapping[str, Any],
    create: bool = True,
) -> Columns:
    """Open the columns of this key; unless `create` is False (all ranks but one), create them."""
    folder = Path(folder)
    manifest = folder / "columns.json"
    expected = dict(rows=rows, columns=dict(kinds), key=dict(key))
    files = {**kinds, COVERED: "u1"}
    try:
        if create and not manifest_matches(manifest, expected):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name, kind in files.items():
                allocate(folder / f"{name}.npy", rows, kind)
            with replacing(manifest) as f:  # last: a folder without it counts as empty
                f.write(json.dumps(expected).encode())
        if not manifest_matches(manifest, expected):
            raise UserError(
                f"{folder}: holds no columns of this artifact, text and settings; all ranks must "
                "have the same, and the same OUT_DIR"
            )
        return Columns(
            {name: mapped_column(folder, name, rows, kind) for name, kind in files.items()}
        )
    except OSError as e:
        size = rows * sum(np.dtype(kind).itemsize for kind in files.values())
        if create and not manifest.exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder}: no columns of {rows} rows ({size} bytes): {e.strerror or e}; free space, "
            "or set OUT_DIR to another disk"
        ) from None


def manifest_matches(manifest: Path, expected: Mapping[str, Any]) -> bool:
    """Return whether a columns.json says what is expected; False if it cannot be read."""
    try:
        return json.loads(manifest.read_text()) == json.loads(json.dumps(expected))
    except (OSError, ValueError):
        return False


def npy_header(rows: int, kind: str) -> bytes:
    """Return the first bytes of a .npy file of `rows` values."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        f, dict(descr=np.dtype(kind).str, fortran_order=False, shape=(rows,))
    )
    return f.getvalue()


def allocate(path: Path, rows: int, kind: str) -> None:
    """Write a file of zeros and reserve its space.

    On a full disk a write to the memory map of a sparse file kills the process by a signal.
    """
    with path.open("wb") as f:
        f.write(npy_header(rows, kind))
        f.flush()
        if size := rows * np.dtype(kind).itemsize:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), f.tell(), size)
            else:
                for start in range(0, size, 1 << 24):
                    f.write(bytes(min(1 << 24, size - start)))


def mapped_column(folder: Path, name: str, rows: int, kind: str) -> np.ndarray:
    """Map a column's file into memory, after checking that it is complete.

    np.load would lengthen a file that was cut short, and fill it with rows of zeros.
    """
    path, start = folder / f"{name}.npy", npy_header(rows, kind)
    size = len(start) + rows * np.dtype(kind).itemsize
    complete = False
    if path.is_file():
        with path.open("rb") as f:
            complete = (f.read(len(start)), path.stat().st_size) == (start, size)
    if not complete:
        raise UserError(
            f"{path}: not {rows} rows of {kind} in {size} bytes: damaged; delete {folder}"
        )
    if not rows:
        return np.zeros(0, kind)  # an empty file cannot be mapped
    return np.memmap(path, kind, "r+", len(start), (rows,))
