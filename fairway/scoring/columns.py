"""Columns on disk: one row for each target token, one file for each quantity.

Neural scoring fills them once, a mixture reads them as often as it likes. A folder belongs to one key (artifact, text
and settings, as hashes); a run that was killed goes on from the rows it had, and another key starts the folder anew.
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

from train_gpt import UserError, need, replacing

COVERED = "covered"  # how often each row was filled: must end as all ones


def header(rows: int, kind: str) -> bytes:
    """What a column's file begins with: that of a .npy file."""
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        f, dict(descr=np.dtype(kind).str, fortran_order=False, shape=(rows,))
    )
    return f.getvalue()


def allocate(path: Path, rows: int, kind: str) -> None:
    """A file of zeros with its space taken: a memory map of a sparse one would die by signal on a full disk."""
    with open(path, "wb") as f:
        f.write(header(rows, kind))
        f.flush()
        if size := rows * np.dtype(kind).itemsize:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), f.tell(), size)
            else:
                for start in range(0, size, 1 << 24):
                    f.write(bytes(min(1 << 24, size - start)))


class Columns:
    """`columns["logp"]` is an array over rows; `covered` counts how often each row was filled."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    @property
    def rows(self) -> int:
        return len(self.covered)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def names(self) -> list[str]:
        return [name for name in self.arrays if name != COVERED]

    @property
    def covered(self) -> np.ndarray:
        return self.arrays[COVERED]

    def put(self, rows: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        """Fill all columns of some rows; counted, so that no row is scored twice unseen."""
        for name in self.names:
            self.arrays[name][rows] = values[name]
        self.covered[rows] += 1

    def complete(self) -> bool:
        return bool((self.covered == 1).all())


def open_columns(
    folder: str | Path,
    rows: int,
    kinds: Mapping[str, str],
    key: Mapping[str, Any],
    make: bool = True,
) -> Columns:
    """The columns of this key: those that are there, or new ones. `make=False` (ranks but the first) only opens."""
    folder = Path(folder)
    manifest = folder / "columns.json"
    wanted = dict(rows=rows, columns=dict(kinds), key=dict(key))
    try:
        if make and not same(manifest, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            for name, kind in {**kinds, COVERED: "u1"}.items():
                allocate(folder / f"{name}.npy", rows, kind)
            with replacing(manifest) as f:  # last: a folder without it is no columns
                f.write(json.dumps(wanted).encode())
        need(
            same(manifest, wanted),
            f"{folder}: holds no columns of this artifact, text and settings; all ranks must "
            "have the same, and the same OUT_DIR",
        )
        return Columns(
            {
                name: mapped(folder, name, rows, kind)
                for name, kind in {**kinds, COVERED: "u1"}.items()
            }
        )
    except OSError as e:
        size = rows * (1 + sum(np.dtype(kind).itemsize for kind in kinds.values()))
        if make and not manifest.exists():
            shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder}: no columns of {rows} rows ({size} bytes): {e.strerror or e}; free space, or set "
            "OUT_DIR to another disk"
        ) from None


def columns_in_memory(rows: int, kinds: Mapping[str, str]) -> Columns:
    return Columns({name: np.zeros(rows, kind) for name, kind in {**kinds, COVERED: "u1"}.items()})


def mapped(folder: Path, name: str, rows: int, kind: str) -> np.ndarray:
    """The column of a file that is whole: np.load would lengthen one that was cut short, with rows of zeros."""
    path, start = folder / f"{name}.npy", header(rows, kind)
    size = len(start) + rows * np.dtype(kind).itemsize
    whole = False
    if path.is_file():
        with open(path, "rb") as f:
            whole = (f.read(len(start)), path.stat().st_size) == (start, size)
    need(whole, f"{path}: not {rows} rows of {kind} in {size} bytes: damaged; delete {folder}")
    return (
        np.memmap(path, kind, "r+", len(start), (rows,)) if rows else np.zeros(0, kind)
    )  # no map of nothing


def same(manifest: Path, wanted: Mapping[str, Any]) -> bool:
    try:
        return json.loads(manifest.read_text()) == json.loads(json.dumps(wanted))
    except (OSError, ValueError):
        return False
