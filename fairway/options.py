"""What command lines share: a mistake in one line, and what was found in a file."""

from __future__ import annotations

import argparse
import json
from typing import Any, NoReturn

from train_gpt import UserError, replacing


class Parser(argparse.ArgumentParser):
    """Its mistakes are shown by whoever catches UserError, as all others are."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def save_json(path: str | None, found: dict[str, Any]) -> None:
    """Nothing where no file was named."""
    if path:
        with replacing(path) as f:
            f.write(json.dumps(found, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
