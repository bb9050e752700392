"""The code that a score counts: the files that this process imported, their sizes and hashes."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import train_gpt
from train_gpt import UserError, file_sha256, packed_code_bytes

ROOT = Path(train_gpt.__file__).resolve().parent


def imported_code() -> dict[str, int]:
    """Return the imported modules of this repository: path from its root → bytes.

    Tests and benchmarks are left out, and so are environments that lie inside the repository.
    """
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    names = {name for name in map(counted_name, files) if name}
    return {name: (ROOT / name).stat().st_size for name in names}


@functools.cache  # a process has some 1,200 modules; resolving their links took 0.25 s
def counted_name(file: str) -> str:
    """Return a module's path from the root of this repository; "" if it does not count."""
    path = Path(file or os.devnull).resolve()
    parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else (".",)
    ours = parts[0] not in ("tests", "bench") and not any(
        p[0] == "." or p == "site-packages" for p in parts
    )
    return "/".join(parts) if ours and path.is_file() else ""  # torch names files that do not exist


def extra_code(names: str) -> dict[str, int]:
    """Return the files of EXTRA_CODE_FILES, separated by commas: path → bytes."""
    paths = [Path(name.strip()) for name in names.split(",") if name.strip()]
    for path in paths:
        if not path.is_file():
            raise UserError(f"EXTRA_CODE_FILES names {path}, which is no file")
    return {str(path): path.stat().st_size for path in paths}


def code_sizes(extra: str) -> dict[str, int]:
    """Return all code that counts now: what is imported, and the files of EXTRA_CODE_FILES."""
    return imported_code() | extra_code(extra)


def code_hashes(names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of each counted file: a record must ship these files and no others."""
    return {name: file_sha256(located(name)) for name in names}


def counted_code_bytes(code: Mapping[str, int]) -> int:
    """Return what code counts in a record, which ships it packed.

    A file that this machine does not have counts with the size that `code` gives.
    """
    paths = {name: located(name) for name in sorted(code)}
    elsewhere = sum(size for name, size in code.items() if not paths[name].is_file())
    return packed_code_bytes([p for p in paths.values() if p.is_file()]) + elsewhere


def located(name: str) -> Path:
    """Return the path of a counted file: names are relative to the repository, or as given."""
    return ROOT / name if (ROOT / name).is_file() else Path(name)
