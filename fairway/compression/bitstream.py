"""Tokens, a predictor and a range coder: a text becomes a bitstream that only the same artifact turns back.

docs/BITSTREAM.md specifies all of it. Nothing in a file is believed before its checksum has been seen to hold, and
nothing that was decoded is handed out before the text's own checksum has.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple, Protocol

import constriction
import numpy as np

from fairway.correction.varint import put_number
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, UserError, need

WHOLE = 2**24  # what the frequencies of a step's tokens sum to
BLOCK = 1 << 16  # tokens that are decoded before more memory is taken
Told = Callable[[int], object]  # how many tokens more are done


class BitstreamError(UserError):
    """A bitstream that is damaged, hostile, or not for this artifact or machine."""


class Predictor(Protocol):
    """B streams that step together; all that a coder asks of a model."""

    streams: int

    def probabilities(self) -> np.ndarray:
        """float64[B, V]: of the next token of each stream; each row is finite, not negative, and sums to 1."""

    def learn(self, tokens: np.ndarray) -> None:
        """int64[B]: the tokens that came."""


# ==== CODER ===========================================================================================================
def weights_of(p_BV: np.ndarray) -> np.ndarray:
    """Probabilities as whole numbers, float64[B, V], one less than each token's frequency: what rounding down leaves
    goes to the most probable token. constriction scales a row by exactly 1.0 (its sum is WHOLE - V) and adds the 1."""
    room = WHOLE - p_BV.shape[1]
    whole = (
        np.isfinite(p_BV).all() and p_BV.min() >= 0 and np.abs(p_BV.sum(axis=1) - 1).max() <= 1e-6
    )
    need(
        whole,
        "the predictor gives no probabilities: they must not be negative, and must sum to 1",
        BitstreamError,
    )
    weights = np.floor(p_BV * room)
    weights[np.arange(len(weights)), p_BV.argmax(axis=1)] += room - weights.sum(axis=1)
    return weights


def stream_sizes(count: int, streams: int) -> np.ndarray:
    """int64[B]: tokens of each stream; they follow each other in the text, longer ones first."""
    return count // streams + (np.arange(streams) < count % streams)


def encode_tokens(predictor: Predictor, tokens: np.ndarray, told: Told | None = None) -> bytes:
    """The payload: the streams' first tokens, then their second ones, and so on."""
    encoder, family = (
        constriction.stream.queue.RangeEncoder(),
        constriction.stream.model.Categorical(perfect=False),
    )
    sizes = stream_sizes(len(tokens), predictor.streams)
    starts, steps = np.cumsum(sizes) - sizes, int(sizes[0])
    for step in range(steps):
        column = tokens[starts[sizes > step] + step].astype(np.int64)
        encoder.encode(
            column.astype(np.int32), family, weights_of(predictor.probabilities())[: len(column)]
        )
        if step + 1 < steps:
            predictor.learn(column)
        if told:
            told(len(column))
    return encoder.get_compressed().astype("<u4").tobytes()


def decode_tokens(
    predictor: Predictor, payload: bytes, count: int, told: Told | None = None
) -> np.ndarray:
    """uint16[count], or BitstreamError. It stops as soon as the tokens have cost more bits than there are."""
    need(len(payload) % 4 == 0, "the payload is no whole number of words", BitstreamError)
    decoder = constriction.stream.queue.RangeDecoder(
        np.frombuffer(payload, "<u4").astype(np.uint32)
    )
    family, left = constriction.stream.model.Categorical(perfect=False), 8 * len(payload) + 64.0
    steps, columns, blocks = -(-count // predictor.streams), [], []
    for step in range(steps):
        weights = weights_of(predictor.probabilities())[: count - step * predictor.streams]
        try:
            column = decoder.decode(family, weights)
        except (AssertionError, ValueError, RuntimeError):
            raise BitstreamError("the payload does not decode") from None
        left -= 24 * len(column) - np.log2(weights[np.arange(len(column)), column] + 1).sum()
        need(left >= 0, "the payload ends before its tokens do", BitstreamError)
        columns.append(column.astype(np.uint16))
        if step + 1 < steps:
            predictor.learn(column.astype(np.int64))
        if len(columns) * predictor.streams >= BLOCK:
            blocks, columns = [*blocks, np.concatenate(columns)], []
        if told:
            told(len(column))
    need(decoder.maybe_exhausted(), "the payload goes on after its last token", BitstreamError)
    return joined_streams(
        np.concatenate([np.zeros(0, np.uint16), *blocks, *columns]), predictor.streams
    )


def joined_streams(stepwise: np.ndarray, streams: int) -> np.ndarray:
    """Tokens in the order of the text, from the order in which they were coded."""
    sizes, out = stream_sizes(len(stepwise), streams), np.empty_like(stepwise)
    for nth, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        out[start : start + size] = stepwise[nth::streams]
    return out


def default_streams(count: int) -> int:
    """More streams step faster, but each begins with nothing to look back on."""
    return max(1, min(64, count // 512))


# ==== CONTAINER =======================================================================================================
MAGIC, VERSION, HASH_BYTES = b"FWY", 1, 12
MOST_FILE_BYTES, MOST_STREAMS, MOST_TOKENS, MOST_THREADS, MOST_FILES = (
    1 << 31,
    256,
    1 << 27,
    256,
    1 << 16,
)
MOST_NAME_BYTES = 200
DEVICES = ("cpu", "cpu, AVX2", "cpu, AVX512", "cuda", "mps")  # the first: whatever else a CPU has
# Settings by which experts, and the windows of a proof, predict; a file names them by their places here.
SETTINGS = (
    "eval_mode",
    "eval_seq_len",
    "eval_stride",
    "eval_documents",
    "ntk_rope",
    "ngram_orders",
    "ngram_memory_mb",
    "match_least",
    "expert_reset",
    "mix_mode",
    "mix_weights",
    "mix_lr",
    "mix_floor",
    "mix_share",
    "mix_rate",
    "mix_neural",
    "mix_guard",
)
EXPERT_SETTINGS = SETTINGS[
    SETTINGS.index("ngram_orders") :
]  # those of a text, which is read in no windows
FIELDS = {f.name: f for f in fields(EvalConfig)}
DOUBLE = struct.Struct("<d")


class MadeOn(NamedTuple):
    """What a predictor's last bits hang on, as far as it has names."""

    torch: tuple[int, ...]  # 2, 13, 0
    device: int  # one of DEVICES
    threads: int

    @property
    def kind(self) -> str:
        return DEVICES[self.device].split(",")[0]

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"torch {'.'.join(map(str, self.torch))}, {DEVICES[self.device]}, {threads}"


class Header(NamedTuple):
    """What a bitstream says of itself; docs/BITSTREAM.md has the meaning of each."""

    artifact: bytes  # of its SHA-256 the first HASH_BYTES
    digest: bytes  # of the text, or of the tokens: the same
    made_on: MadeOn
    streams: int
    count: int  # tokens that are coded
    first: int  # the token before them
    files: tuple[tuple[str, int], ...] | None  # names and bytes; None: tokens of a proof
    experts: dict | None  # settings that differ from the defaults; None: the model alone

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size in self.files or ())

    def settings(self) -> EvalConfig | None:
        return None if self.experts is None else EvalConfig(**self.experts)

    def first_tokens(self) -> np.ndarray:
        """int64[B]: what each stream begins after."""
        return np.array([self.first] + [BOS_ID] * (self.streams - 1))


def put_text(data: bytes) -> bytes:
    return put_number(len(data)) + data


def put_settings(settings: dict) -> bytes:
    """Their number; then of each its place in SETTINGS and its value: a choice's place, a number, or a double."""
    parts = [put_number(len(settings))]
    for name, value in settings.items():
        choices = FIELDS[name].metadata["choices"]
        number = choices.index(value) if choices else value
        parts.append(bytes([SETTINGS.index(name)]))
        parts.append(DOUBLE.pack(value) if type(value) is float else put_number(int(number)))
    return b"".join(parts)


def packed(header: Header, payload: bytes) -> bytes:
    """The file, after the checks that a reader makes."""
    h, tokens_only = header, header.files is None
    check_header(h)
    parts = [
        bytes([tokens_only | 2 * (h.experts is not None)]),
        h.artifact,
        h.digest,
        bytes([*h.made_on.torch, h.made_on.device]),
        put_number(h.made_on.threads),
        put_number(h.streams),
        put_number(h.count),
        put_number(h.first if tokens_only else len(h.files)),
        *(put_text(name.encode()) + put_number(size) for name, size in h.files or ()),
        b"" if h.experts is None else put_settings(h.experts),
        payload,
    ]
    rest = b"".join(parts)
    return MAGIC + bytes([VERSION]) + zlib.crc32(rest).to_bytes(4, "little") + rest


def read_bitstream(path: str | Path) -> tuple[Header, bytes]:
    """A file's header and payload, all checked that can be without the artifact."""
    size = os.path.getsize(path)
    need(
        size <= MOST_FILE_BYTES,
        f"{path}: {size} bytes, more than any bitstream has",
        BitstreamError,
    )
    return unpacked(Path(path).read_bytes(), str(path))


def unpacked(data: bytes, name: str) -> tuple[Header, bytes]:
    try:
        need(data.startswith(MAGIC) and len(data) >= 8, "not a Fairway bitstream", BitstreamError)
        need(data[3] == VERSION, f"version {data[3]}; this reader knows {VERSION}", BitstreamError)
        need(
            zlib.crc32(data[8:]).to_bytes(4, "little") == data[4:8],
            "it does not match its checksum: damaged, or cut short; fetch it again",
            BitstreamError,
        )
        fields = Fields(data, 8)
        header = fields.header()
        check_header(header)
        return header, data[fields.at :]
    except UserError as e:
        raise BitstreamError(f"{name}: {e}") from None


class Fields:
    """A header's fields, one after the other, none longer than the file."""

    def __init__(self, data: bytes, at: int):
        self.data, self.at = data, at

    def take(self, size: int) -> bytes:
        need(size <= len(self.data) - self.at, "the header is cut short", BitstreamError)
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, most: int, what: str) -> int:
        """LEB128, in as few bytes as it needs."""
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            need(value <= most, f"{what}: {value} or more; it has at most {most}", BitstreamError)
            if byte < 128:
                break
            shift += 7
            need(shift <= 63, f"{what}: a number without end", BitstreamError)
        need(byte or not shift, f"{what}: a number of more bytes than it needs", BitstreamError)
        return value

    def header(self) -> Header:
        flags, artifact, digest = self.take(1)[0], self.take(HASH_BYTES), self.take(HASH_BYTES)
        need(flags < 4, f"flags are {flags}; this reader knows 0 to 3", BitstreamError)
        *torch_version, device = self.take(4)
        made_on = MadeOn(tuple(torch_version), device, self.number(MOST_THREADS, "threads"))
        streams, count = self.number(MOST_STREAMS, "streams"), self.number(MOST_TOKENS, "tokens")
        first, files = (
            (self.number(65_535, "first token"), None) if flags & 1 else (BOS_ID, self.files())
        )
        return Header(
            artifact,
            digest,
            made_on,
            streams,
            count,
            first,
            files,
            self.settings() if flags & 2 else None,
        )

    def files(self) -> tuple[tuple[str, int], ...]:
        found = []
        for _ in range(self.number(MOST_FILES, "files")):
            name = self.take(self.number(MOST_NAME_BYTES, "bytes of a file name"))
            try:
                found.append((name.decode(), self.number(MOST_FILE_BYTES, "bytes of a file")))
            except UnicodeDecodeError:
                raise BitstreamError(f"{name!r:.60} is no file name") from None
        return tuple(found)

    def settings(self) -> dict:
        found = {}
        for _ in range(self.number(len(SETTINGS), "settings")):
            place = self.take(1)[0]
            need(
                place < len(SETTINGS) and SETTINGS[place] not in found,
                f"setting {place} is unknown, or there twice",
                BitstreamError,
            )
            name = SETTINGS[place]
            kind, choices = type(FIELDS[name].default), FIELDS[name].metadata["choices"]
            if kind is float:
                value = DOUBLE.unpack(self.take(DOUBLE.size))[0]
            else:
                value = self.number(
                    len(choices) - 1 if choices else 1 if kind is bool else 1 << 20, name.upper()
                )
            found[name] = choices[value] if choices else kind(value)
        return found


def check_header(h: Header) -> None:
    """That fields are in range, and agree with each other."""
    right = len(h.artifact) == len(h.digest) == HASH_BYTES
    need(
        right
        and len(h.made_on.torch) == 3
        and 0 <= min(h.made_on.torch)
        and max(h.made_on.torch) < 256
        and h.made_on.device < len(DEVICES),
        "no machine that this reader knows wrote it",
        BitstreamError,
    )
    for value, low, high, what in (
        (h.made_on.threads, 1, MOST_THREADS, "threads"),
        (h.streams, 1, MOST_STREAMS, "streams"),
        (h.count, 0, MOST_TOKENS, "tokens"),
        (h.first, 0, 65_535, "first token"),
    ):
        need(low <= value <= high, f"{what}: {value}; it must be {low} to {high}", BitstreamError)
    if h.files is not None:
        check_files(h)
    check_experts(h.experts or {})


def check_files(h: Header) -> None:
    need(
        0 < len(h.files) <= MOST_FILES,
        f"{len(h.files)} files; a bitstream holds 1 to {MOST_FILES}",
        BitstreamError,
    )
    for name, _ in h.files:
        check_name(name)
    names, size = [name for name, _ in h.files], h.size
    need(len(set(names)) == len(names), "two files have one name", BitstreamError)
    need(
        size < MOST_FILE_BYTES,
        f"{size} bytes of text; at most {MOST_FILE_BYTES - 1} fit",
        BitstreamError,
    )
    # A document costs a token beside those of its bytes: BOS, and one more where its first blank is swallowed.
    need(
        len(h.files) - 1 <= h.count <= size + 2 * len(h.files),
        f"{h.count} tokens cannot be {len(h.files)} files of {size} bytes",
        BitstreamError,
    )


def check_name(name: str) -> None:
    plain = name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\")
    need(
        plain and len(name.encode()) <= MOST_NAME_BYTES,
        f"{name!r:.60} is no plain file name of at most {MOST_NAME_BYTES} bytes; rename the file",
        BitstreamError,
    )


def check_experts(experts: dict) -> None:
    usual = next((name for name, value in experts.items() if value == FIELDS[name].default), None)
    need(usual is None, f"{usual} is there with its default value", BitstreamError)
    cfg, most = (
        EvalConfig(**experts),
        FIELDS["ngram_memory_mb"].default,
    )  # refuses what is out of range
    need(
        cfg.ngram_memory_mb <= most,
        f"NGRAM_MEMORY_MB is {cfg.ngram_memory_mb}; a bitstream may ask for {most} at most",
        BitstreamError,
    )


def described(settings: EvalConfig | None, names: tuple[str, ...]) -> dict | None:
    """Settings as a header holds them: what differs from the defaults of this version of the format."""
    return (
        None
        if settings is None
        else {
            name: value
            for name in names
            if (value := getattr(settings, name)) != FIELDS[name].default
        }
    )


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH_BYTES]
