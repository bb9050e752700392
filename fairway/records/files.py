"""Files that may be anyone's: read within limits, written whole or not at all, errors of one line."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEXT_LIMIT = 64 << 20  # bytes: the longest log of a record has under 1 MB
JSON_LIMIT = 8 << 20


class RecordError(Exception):
    """What a user can mend, in one line: the file or option, both values, the next step."""


def need(holds: Any, message: str) -> None:
    if not holds:
        raise RecordError(message)


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file; pipes, devices and what is longer than the limit are refused unread."""
    try:
        with open(
            path,
            "rb",
            opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)),
        ) as f:
            found = os.fstat(f.fileno())
            need(stat.S_ISREG(found.st_mode), f"{path} is no regular file")
            need(
                found.st_size <= limit,
                f"{path} has {found.st_size} bytes; at most {limit} are read",
            )
            return f.read(limit)
    except (OSError, ValueError) as e:  # ValueError: a name with a zero byte
        raise RecordError(f"{path}: {getattr(e, 'strerror', None) or e}") from None


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """UTF-8; what is none becomes U+FFFD, so that a damaged log still says what it can."""
    return read_bytes(path, limit).decode("utf-8", "replace")


def parse_json(text: str, name: str | Path) -> Any:
    """JSON as its standard has it: no NaN or Infinity, and no nesting beyond what a reader can follow."""

    def refused(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    def finite(digits: str) -> float:
        value = float(digits)
        return refused(digits[:20]) if value in (float("inf"), float("-inf")) else value

    try:
        return json.loads(text, parse_constant=refused, parse_float=finite)
    except (ValueError, RecursionError) as e:  # ValueError: also integers of more than 4,300 digits
        raise RecordError(f"{name} is no JSON: {str(e).splitlines()[0]}") from None


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    return parse_json(read_text(path, limit), path)


def read_events(path: str | Path, limit: int = TEXT_LIMIT) -> tuple[list[dict[str, Any]], int]:
    """One JSON object a line, and how many lines are none: a run may have been killed while it wrote one."""
    events, bad = [], 0
    for line in read_text(path, limit).splitlines():
        try:
            event = parse_json(line, path)
        except RecordError:
            event = None
        if isinstance(event, dict):
            events.append(event)
        elif line.strip():
            bad += 1
    return events, bad


def sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file that takes its name once it is whole and on disk; until then, what bore that name stays."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(beside, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode())
