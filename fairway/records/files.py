"""Files that may come from anyone: read within limits, written complete or not at all, errors of
one line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

TEXT_LIMIT = 64 << 20  # bytes; the longest log of a record has under 1 MB
JSON_LIMIT = 8 << 20


class RecordError(Exception):
    """An error that the user can repair, in one line: the file or option, both values, the next
    step.
    """


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Pipes and devices are refused unread: opening a pipe without O_NONBLOCK would wait for ever.
    """
    flags = getattr(os, "O_NONBLOCK", 0)
    try:
        with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as f:
            status = os.fstat(f.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RecordError(f"{path} is no regular file")
            if status.st_size > limit:
                raise RecordError(f"{path} has {status.st_size} bytes; at most {limit} are read")
            return f.read(limit)
    except (OSError, ValueError) as e:  # ValueError: the name holds a zero byte
        raise RecordError(f"{path}: {getattr(e, 'strerror', None) or e}") from None


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """Return a file as UTF-8 text; damaged bytes become U+FFFD, so that the rest can still be
    read.
    """
    return read_bytes(path, limit).decode("utf-8", "replace")


def parse_json(text: str, name: str | Path) -> Any:
    """Return the value of JSON text; `name` is for the error line.

    NaN, Infinity and numbers that overflow a float are refused: the standard has none of them.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON number")

    def parse_float(digits: str) -> float:
        value = float(digits)
        return refuse(digits[:20]) if value in (float("inf"), float("-inf")) else value

    try:
        return json.loads(text, parse_constant=refuse, parse_float=parse_float)
    except (ValueError, RecursionError) as e:  # ValueError: also integers of over 4,300 digits
        raise RecordError(f"{name} is no JSON: {str(e).splitlines()[0]}") from None


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
    return parse_json(read_text(path, limit), path)


def compact_json(data: dict[str, Any]) -> str:
    """Return JSON text with one line for each key, however long its value."""
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    return "{" + ",\n".join(lines) + "}\n"


def read_events(path: str | Path, limit: int = TEXT_LIMIT) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of a file, one a line, and the number of damaged lines.

    A run that was killed while it wrote leaves half a line.
    """
    events, damaged = [], 0
    for line in read_text(path, limit).splitlines():
        try:
            event = parse_json(line, path)
        except RecordError:
            event = None
        if isinstance(event, dict):
            events.append(event)
        elif line.strip():
            damaged += 1
    return events, damaged


def is_weights(name: str) -> bool:
    """Return whether a record's file is an artifact of ours, by its name."""
    return name.endswith(".ptz")


def sha256(path: str | Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """Write a file next to `path`, then rename it, so that readers see the old file or the new."""
    path = Path(path)
    if path.exists() and not path.is_file():
        raise RecordError(f"{path} is no regular file, so it cannot be replaced; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    with replacing(path) as f:
        f.write(text.encode())
