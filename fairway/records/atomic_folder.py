"""A folder that appears under its name when it is complete, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any


def replaced_path(target: Path) -> Path:
    """Return the hidden place of the old folder between two renames."""
    return target.with_name(f".{target.name}.old")


def restore_replaced(target: Path) -> None:
    """Finish or undo a replacement that was killed between two renames."""
    old = replaced_path(target)
    if old.exists():
        shutil.rmtree(old) if target.exists() else os.rename(old, target)


class AtomicFolder:
    """A context manager for a new folder, which takes its name once all of it is on disk.

    The folder that it replaces stays until then.
    """

    def __init__(self, target: Path):
        self.target, self.part, self.old = (
            target,
            target.with_name(f".{target.name}.part"),
            replaced_path(target),
        )

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir()
        return self.part

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.part, ignore_errors=True)
            return
        if self.target.exists():
            os.rename(self.target, self.old)
        try:
            os.rename(self.part, self.target)
        except BaseException:
            if self.old.exists() and not self.target.exists():
                os.rename(self.old, self.target)
            raise
        shutil.rmtree(self.old, ignore_errors=True)
