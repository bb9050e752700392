"""Write and read the file format of a bitstream: a header and a payload (docs/BITSTREAM.md).

A reader believes nothing before the file's checksum holds, and no size before it is checked.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.compression.leb128 import read_number, write_number
from fairway.compression.token_coder import BitstreamError
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, UserError, names_with_role

MAGIC, VERSION = b"FWY", 1
HASH_BYTES = 12  # a header holds the first 96 bits of each SHA-256: a proof's file is weighed
MOST_FILE_BYTES = 1 << 31
MOST_STREAMS = 256
MOST_TOKENS = 1 << 27
MOST_THREADS = 256
MOST_FILES = 1 << 16
MOST_NAME_BYTES = 200
MOST_SETTING = 1 << 20
DEVICES = ("cpu", "cpu, AVX2", "cpu, AVX512", "cuda", "mps")  # the first: a CPU with neither
# Settings that decide a prediction.
SETTINGS = tuple(names_with_role(EvalConfig, "neural", "experts", "mixture"))
# Settings of a text: its streams are read without the windows of a score.
EXPERT_SETTINGS = tuple(names_with_role(EvalConfig, "experts", "mixture"))
FIELDS = {f.name: f for f in fields(EvalConfig)}
# A header names each setting by its place here, and a choice by its place in CHOICES. Both orders
# and the defaults are part of the format; a test holds them to the table in docs/BITSTREAM.md. What
# was dropped keeps its number: MIX_SHARE was 13 (None here), and EvalConfig refuses two choices of
# MIX_WEIGHTS.
PLACES = (*SETTINGS[:13], None, *SETTINGS[13:])
CHOICES = {name: f.metadata["choices"] for name, f in FIELDS.items()}
CHOICES["mix_weights"] = ("exponential", "share", "em", "sets", "gate")
DOUBLE = struct.Struct("<d")


# ==== HEADER ======================================================================================
class Machine(NamedTuple):
    """Software and hardware that decide the last bits of a model's probabilities."""

    torch: tuple[int, ...]  # version: 2, 13, 0
    device: int  # index in DEVICES
    threads: int

    @property
    def kind(self) -> str:
        """Name of the device for PyTorch."""
        return DEVICES[self.device].split(",")[0]

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"torch {'.'.join(map(str, self.torch))}, {DEVICES[self.device]}, {threads}"


class Header(NamedTuple):
    """The header of a bitstream: of a text (some files), or of the tokens of a proof."""

    artifact: bytes  # first HASH_BYTES of the artifact's SHA-256
    digest: bytes  # first HASH_BYTES of the SHA-256 of the text, or of the tokens
    made_on: Machine
    streams: int
    count: int  # tokens that are coded
    first: int  # the token before them, which is not coded
    files: tuple[tuple[str, int], ...] | None  # names and bytes; None: a proof
    experts: dict | None  # settings that differ from the defaults; None: the model alone

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files or ())

    def settings(self) -> EvalConfig | None:
        """Return the settings of the experts, or None for the model alone."""
        return None if self.experts is None else EvalConfig(**self.experts)

    def first_tokens(self) -> np.ndarray:
        """Return int64[B], the token that each stream has before its own."""
        return np.array([self.first] + [BOS_ID] * (self.streams - 1))


def short_digest(data: bytes) -> bytes:
    """Return the first HASH_BYTES of a SHA-256."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


def changed_settings(settings: EvalConfig | None, names: tuple[str, ...]) -> dict | None:
    """Return those of the named settings that differ from their defaults: what a header stores."""
    if settings is None:
        return None
    values = {name: getattr(settings, name) for name in names}
    return {name: value for name, value in values.items() if value != FIELDS[name].default}


# ==== WRITE =======================================================================================
def bitstream_bytes(header: Header, payload: bytes) -> bytes:
    """Return a whole file. The header must pass the checks that a reader makes."""
    h, is_proof = header, header.files is None
    check_header(h)
    parts = [
        bytes([is_proof | 2 * (h.experts is not None)]),
        h.artifact,
        h.digest,
        bytes([*h.made_on.torch, h.made_on.device]),
        write_number(h.made_on.threads),
        write_number(h.streams),
        write_number(h.count),
        write_number(h.first if is_proof else len(h.files)),
        *(file_entry(name.encode(), size) for name, size in h.files or ()),
        b"" if h.experts is None else settings_bytes(h.experts),
        payload,
    ]
    rest = b"".join(parts)
    return MAGIC + bytes([VERSION]) + zlib.crc32(rest).to_bytes(4, "little") + rest


def file_entry(name: bytes, size: int) -> bytes:
    """Return a file's entry in the header: bytes of its name, name, bytes of the file."""
    return write_number(len(name)) + name + write_number(size)


def settings_bytes(settings: dict[str, Any]) -> bytes:
    """Return the number of settings, then the place and the value of each."""
    parts = [write_number(len(settings))]
    for name, value in settings.items():
        number = CHOICES[name].index(value) if CHOICES[name] else value
        parts.append(bytes([PLACES.index(name)]))
        parts.append(DOUBLE.pack(value) if type(value) is float else write_number(int(number)))
    return b"".join(parts)


# ==== READ ========================================================================================
def read_bitstream(path: str | Path) -> tuple[Header, bytes]:
    """Return header and payload of a file, checked as far as possible without the artifact."""
    size = Path(path).stat().st_size
    if size > MOST_FILE_BYTES:
        raise BitstreamError(f"{path}: {size} bytes, more than any bitstream has")
    return parse_bitstream(Path(path).read_bytes(), str(path))


def parse_bitstream(data: bytes, name: str) -> tuple[Header, bytes]:
    """Return the header and the payload of a file's bytes; errors start with its name."""
    try:
        if not data.startswith(MAGIC) or len(data) < 8:
            raise BitstreamError("not a Fairway bitstream")
        if data[3] != VERSION:
            raise BitstreamError(f"version {data[3]}; this reader knows {VERSION}")
        if zlib.crc32(data[8:]).to_bytes(4, "little") != data[4:8]:
            raise BitstreamError("does not match its checksum: damaged or cut short; copy it again")
        reader = HeaderReader(data, 8)
        header = reader.header()
        check_header(header)
        return header, data[reader.position :]
    except UserError as e:
        raise BitstreamError(f"{name}: {e}") from None


class HeaderReader:
    """Read the fields of a header one after the other, none beyond the end of the data."""

    def __init__(self, data: bytes, position: int):
        self.data, self.position = data, position

    def read_bytes(self, size: int) -> bytes:
        """Return the next `size` bytes."""
        if size > len(self.data) - self.position:
            raise BitstreamError("the header is cut short")
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, most: int, label: str) -> int:
        """Return the next LEB128 number, at most `most`; errors name it `label`."""
        try:
            value, self.position = read_number(self.data, self.position)
        except ValueError as e:
            raise BitstreamError(f"{label}: {e}") from None
        if value > most:
            raise BitstreamError(f"{label}: {value}; it must be at most {most}")
        return value

    def header(self) -> Header:
        """Return the header; its values are checked by `check_header`."""
        flags = self.read_bytes(1)[0]
        artifact, digest = self.read_bytes(HASH_BYTES), self.read_bytes(HASH_BYTES)
        if flags > 3:
            raise BitstreamError(f"flags are {flags}; this reader knows 0 to 3")
        *version, device = self.read_bytes(4)
        made_on = Machine(tuple(version), device, self.number(MOST_THREADS, "threads"))
        streams = self.number(MOST_STREAMS, "streams")
        count = self.number(MOST_TOKENS, "tokens")
        if flags & 1:
            first, files = self.number(65_535, "first token"), None
        else:
            first, files = BOS_ID, self.files()
        experts = self.settings() if flags & 2 else None
        return Header(artifact, digest, made_on, streams, count, first, files, experts)

    def files(self) -> tuple[tuple[str, int], ...]:
        """Return the name and the size of each file."""
        entries = []
        for _ in range(self.number(MOST_FILES, "files")):
            name = self.read_bytes(self.number(MOST_NAME_BYTES, "bytes of a file name"))
            try:
                entries.append((name.decode(), self.number(MOST_FILE_BYTES, "bytes of a file")))
            except UnicodeDecodeError:
                raise BitstreamError(f"{name!r:.60} is no file name") from None
        return tuple(entries)

    def settings(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by name."""
        settings = {}
        for _ in range(self.number(len(SETTINGS), "settings")):
            place = self.read_bytes(1)[0]
            name = PLACES[place] if place < len(PLACES) else None
            if name is None or name in settings:
                raise BitstreamError(f"setting {place} is unknown or comes twice")
            settings[name] = self.setting(name)
        return settings

    def setting(self, name: str) -> Any:
        """Return the value of one setting: a choice, a number, or yes or no."""
        kind, choices = type(FIELDS[name].default), CHOICES[name]
        if kind is float:
            return DOUBLE.unpack(self.read_bytes(DOUBLE.size))[0]
        if choices:
            return choices[self.number(len(choices) - 1, name.upper())]
        return kind(self.number(1 if kind is bool else MOST_SETTING, name.upper()))


# ==== CHECKS ======================================================================================
def check_header(h: Header) -> None:
    """Refuse values out of range, and values that contradict each other."""
    machine = h.made_on
    known = (
        len(h.artifact) == len(h.digest) == HASH_BYTES
        and len(machine.torch) == 3
        and all(0 <= part < 256 for part in machine.torch)
        and machine.device < len(DEVICES)
    )
    if not known:
        raise BitstreamError("no machine that this reader knows wrote it")
    for value, low, high, label in (
        (machine.threads, 1, MOST_THREADS, "threads"),
        (h.streams, 1, MOST_STREAMS, "streams"),
        (h.count, 0, MOST_TOKENS, "tokens"),
        (h.first, 0, 65_535, "first token"),
    ):
        if not low <= value <= high:
            raise BitstreamError(f"{label}: {value}; it must be {low} to {high}")
    if h.files is not None:
        check_file_list(h)
    check_expert_settings(h.experts or {})


def check_file_list(h: Header) -> None:
    """Refuse files that have bad names or sizes, or that the number of tokens cannot spell."""
    if not 0 < len(h.files) <= MOST_FILES:
        raise BitstreamError(f"{len(h.files)} files; a bitstream holds 1 to {MOST_FILES}")
    names = [name for name, _ in h.files]
    for name in names:
        check_file_name(name)
    if len(set(names)) < len(names):
        raise BitstreamError("two files have the same name")
    if h.size >= MOST_FILE_BYTES:
        raise BitstreamError(f"{h.size} bytes of text; at most {MOST_FILE_BYTES - 1} fit")
    # A token spells a byte or more. Each document has BOS as well, and one more token where its
    # first blank is dropped.
    if not len(h.files) - 1 <= h.count <= h.size + 2 * len(h.files):
        raise BitstreamError(f"{h.count} tokens cannot be {len(h.files)} files of {h.size} bytes")


def check_file_name(name: str) -> None:
    """Refuse a name that could leave the folder it is written to, or hide what it is."""
    plain = name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")
    if not plain or len(name.encode()) > MOST_NAME_BYTES:
        raise BitstreamError(
            f"{name!r:.60} is no plain file name of at most {MOST_NAME_BYTES} bytes; "
            "rename the file"
        )


def check_expert_settings(experts: dict[str, Any]) -> None:
    """Refuse values out of range, default values, and more memory than the default."""
    default = next((name for name, value in experts.items() if value == FIELDS[name].default), None)
    if default is not None:
        raise BitstreamError(f"{default} is listed with its default value")
    cfg, most = EvalConfig(**experts), FIELDS["ngram_memory_mb"].default
    if cfg.ngram_memory_mb > most:
        raise BitstreamError(
            f"NGRAM_MEMORY_MB is {cfg.ngram_memory_mb}; a bitstream may ask for {most} at most"
        )
