"""The parser and the form of error that every command line shares.

An error is one line on stderr, `NAME: error: setting, both values, next step`. Exit codes:
0 success, 1 failure, 2 wrong usage, 130 interrupted. Nothing here imports torch, so `--help`
answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

# Errors that a user can repair, by the module that defines them. A module that was not imported
# raised none of them.
REPAIRABLE = (("train_gpt", "UserError"), ("fairway.records.files", "RecordError"))


class UsageError(Exception):
    """Wrong words on the command line."""


class Parser(argparse.ArgumentParser):
    """An argparse parser without abbreviated options that raises `UsageError` on wrong words."""

    def __init__(self, **settings: Any):
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """Parse `args`; name a misspelt option before argparse misses the one that was meant."""
        words = list(sys.argv[1:] if args is None else args)
        known = [option for action in self._actions for option in action.option_strings]
        for word in words[: words.index("--") if "--" in words else None]:
            option = word.split("=")[0]
            if option.startswith("--") and option not in known:
                self.error(f"unknown option {option}{did_you_mean(option, known)}")
        return super().parse_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def did_you_mean(word: str, candidates: list[str]) -> str:
    """`did_you_mean("--ou", ["--out"])` is "; did you mean --out?"; "" where nothing is close."""
    near = difflib.get_close_matches(word, candidates, 1, 0.6)
    return f"; did you mean {near[0]}?" if near else ""


def run_reporting(name: str, command: Callable[[], int], interrupted: str = "interrupted") -> int:
    """Run `command` and return its exit code; print an error that the user can repair."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends in silence
    try:
        return command()
    except UsageError as e:
        return print_error(name, str(e), code=2)
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return 130
    except OSError as e:
        missing = isinstance(e, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        step = "check its name" if missing else "free space, or name another place"
        return print_error(name, f"{e.filename or 'files'}: {e.strerror or e}; {step}")
    except Exception as e:
        if not isinstance(e, repairable_errors()):
            raise
        return print_error(name, str(e))


def repairable_errors() -> tuple[type[Exception], ...]:
    return tuple(getattr(sys.modules[m], kind) for m, kind in REPAIRABLE if m in sys.modules)


def print_error(name: str, message: str, code: int = 1) -> int:
    """Print `NAME: error: MESSAGE`, on one line, and return the exit code."""
    print(f"{name}: error: {(message.splitlines() or [''])[0]}", file=sys.stderr)
    return code


def check_writable(option: str, path: str | Path | None) -> None:
    """Raise `UsageError`, before the work is done, if no file can be written at `path`."""
    if not path:
        return
    folder = next(p for p in Path(path).absolute().parents if p.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise UsageError(f"{option} {path} cannot be written there; name another file")


def json_bytes(value: Any) -> bytes:
    """Indented JSON with a line end; text that is not valid Unicode is replaced."""
    return json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def progress_bar(total: int, label: str, unit: str) -> Any:
    """Return a bar on stderr that appears after three seconds, on a terminal and never in a file.

    Its estimate averages over the whole run (smoothing 0), because steps take unequal times.
    """
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit=unit, delay=3, leave=False, smoothing=0, disable=None)
