"""What command lines share: a mistake in one line, and what was found in a file."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, NoReturn

from train_gpt import UserError, need, replacing


class Parser(argparse.ArgumentParser):
    """Its mistakes are shown by whoever catches UserError, as all others are; a part of an option's name is one."""

    def __init__(self, **how: Any):
        super().__init__(allow_abbrev=False, **how)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def need_place(path: str | None) -> None:
    """Before the work is done, not after: whether a file can be written there."""
    if path:
        folder = next(p for p in Path(path).absolute().parents if p.exists())
        need(
            folder.is_dir() and os.access(folder, os.W_OK) and not Path(path).is_dir(),
            f"--json {path} cannot be written there; name another file",
        )


def save_json(path: str | None, found: dict[str, Any]) -> None:
    """Nothing where no file was named."""
    if path:
        with replacing(path) as f:
            f.write(
                json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            )
