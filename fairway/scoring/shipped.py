"""The code that a score counts: what this process imported, its size and its hashes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

import train_gpt
from train_gpt import need

ROOT = Path(train_gpt.__file__).resolve().parent


def imported_code() -> dict[str, int]:
    """This repository's modules that are imported now: path from its root → bytes. Tests and benchmarks are not."""
    found = {}
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or os.devnull).resolve()
        parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else (".",)
        ours = parts[0] not in ("tests", "bench") and not any(
            p[0] == "." or p == "site-packages" for p in parts
        )
        if ours and path.is_file():  # torch names files that there are not
            found["/".join(parts)] = path.stat().st_size
    return found


def code_sizes(extra: str) -> dict[str, int]:
    """Bytes of every file of this repository that is imported by now, and of those named besides."""
    named = [Path(name.strip()) for name in extra.split(",") if name.strip()]
    for path in named:
        need(path.is_file(), f"EXTRA_CODE_FILES names {path}, which is no file")
    return imported_code() | {str(path): path.stat().st_size for path in named}


def code_hashes(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file that `code_sizes` names: a record must ship these and no others."""
    return {
        name: train_gpt.file_sha256(ROOT / name if (ROOT / name).is_file() else name)
        for name in names
    }
