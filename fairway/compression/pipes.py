"""Input, output and progress of the verbs: `-` is a pipe, and bars are for terminals."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from fairway.compression.bitstream import (
    MOST_FILE_BYTES,
    Header,
    parse_bitstream,
    read_bitstream,
)
from train_gpt import replacing


def read_input(name: str) -> bytes:
    """Return the bytes of a file, or of standard input for `-`."""
    return sys.stdin.buffer.read(MOST_FILE_BYTES) if name == "-" else Path(name).read_bytes()


def read_piped_bitstream(name: str) -> tuple[Header, bytes]:
    """Return header and payload of a bitstream from a file, or from standard input for `-`."""
    if name != "-":
        return read_bitstream(name)
    return parse_bitstream(sys.stdin.buffer.read(MOST_FILE_BYTES + 1), "standard input")


def write_output(name: str, data: bytes) -> None:
    """Write a file at once, whole or not at all; `-` is standard output."""
    if name == "-":
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return
    with replacing(name) as f:
        f.write(data)


def token_bar(label: str, total: int = 0) -> tqdm:
    """Return a progress bar that shows after 10 s, and only on a terminal."""
    return tqdm(
        total=total,
        desc=label,
        unit="tok",
        unit_scale=True,
        delay=10,
        leave=False,
        disable=None,  # None: disabled where stderr is no terminal
    )
