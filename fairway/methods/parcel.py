"""The file of a compressed model: header, and all arrays through the trainer's codecs.

`pack` tries every codec, on codes as they are and on two codes a byte where they fit, and keeps the
smallest file. `unpack` checks the file and builds the model strictly.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import lzma
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import brotli
import numpy as np
import torch

from fairway.methods.layouts import LAYOUTS
from fairway.methods.stored import KINDS, Floats, Stored
from train_gpt import (
    CODECS,
    GPT,
    MODEL_FIELDS,
    CodecError,
    Config,
    UserError,
    decode_planes,
    encode_planes,
)

MAGIC = b"FWPARCEL"
PRELUDE = struct.Struct("<8sI32s")  # magic, bytes of the packed header, SHA-256 of all after it
MOST_HEADER_BYTES, MOST_ELEMENTS = 1 << 22, 1 << 28
ENTROPY_CODER_ONLY = 3_000_000  # bytes: above, the other codecs would take a minute to lose
TYPES = ("int8", "uint8", "uint16", "float16", "float32")


class ParcelError(UserError):
    """A file of a compressed model that is damaged, or written by other code."""


# ==== MODELS ======================================================================================
def with_stored(model: GPT, stored: Mapping[str, Stored]) -> GPT:
    """Return a copy of a model that computes with these tensors, and remembers them for `pack`.

    Parameters that `stored` does not name stay as they are, and ship as float32.
    """
    result = copy.deepcopy(model)
    kept = {n: Floats(p.detach().cpu().clone()) for n, p in result.named_parameters()}
    result.stored = kept | dict(stored)
    with torch.no_grad():
        for name, p in result.named_parameters():
            p.copy_(result.stored[name].weight().view_as(p))
    return result


def stored_of(model: GPT) -> dict[str, Stored]:
    """Return the tensors that a method left on its model."""
    if not hasattr(model, "stored"):
        raise UserError("this model was not made by a method: it has no stored tensors")
    return model.stored


# ==== ARRAYS AND PLANES ===========================================================================
def plane_shape(dtype: str, shape: list[int], nibbles: bool) -> tuple[int, int]:
    """Return the shape of the byte matrix that an array becomes."""
    size, count = np.dtype(dtype).itemsize, math.prod(shape)
    if nibbles:
        return 1, -(-count // 2)
    if size == 1:
        return (shape[0], count // max(shape[0], 1)) if shape else (1, 1)
    return size, count  # values of several bytes: one row for each byte of the value


def to_plane(array: np.ndarray, nibbles: bool) -> np.ndarray:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if nibbles:
        raw = np.pad(raw & 15, (0, len(raw) % 2))
        return (raw[0::2] | raw[1::2] << 4)[None]
    if array.itemsize == 1:
        return raw.reshape(plane_shape(str(array.dtype), [*array.shape], False))
    return np.ascontiguousarray(raw.reshape(-1, array.itemsize).T)


def from_plane(plane: np.ndarray, dtype: str, shape: list[int], nibbles: bool) -> np.ndarray:
    if nibbles:
        raw = np.stack([plane[0] & 15, plane[0] >> 4], axis=1).reshape(-1)[: math.prod(shape)]
        # Four bits of a signed code: its sign is the fourth.
        raw = (raw ^ 8) - np.uint8(8) if dtype == "int8" else raw
        return raw.astype(np.uint8).view(dtype).reshape(shape)
    raw = plane if plane.shape[0] == 1 or np.dtype(dtype).itemsize == 1 else plane.T
    return np.ascontiguousarray(raw).reshape(-1).view(dtype).reshape(shape)


def fits_nibble(array: np.ndarray) -> bool:
    """Return whether each value fits four bits."""
    if array.itemsize > 1 or not array.size:
        return False
    low, high = (-8, 7) if array.dtype == np.int8 else (0, 15)
    return low <= int(array.min()) and int(array.max()) <= high


# ==== FILES =======================================================================================
def pack(model: GPT, codecs: Iterable[str] = (*CODECS,), nibbles: Iterable[bool] = (False, True)):
    """Return the bytes of the smallest file, tried over codecs and ways to lay codes out."""
    layouts = {packed: laid_out(model, packed) for packed in nibbles}
    best, table = b"", layouts[True][0] if True in layouts else {}
    any_packed = any(row[3] for _, rows in table.values() for row in rows)
    # The entropy coder comes first: a large file is not tried with the others.
    options = sorted(itertools.product(codecs, layouts), key=lambda option: option[0] != "ans")
    for codec, packed in options:
        if packed and (codec == "ans" or not any_packed):
            continue  # the entropy coder takes fractions of a bit without packing
        if len(best) > ENTROPY_CODER_ONLY:
            continue
        blob = encode(model, codec, *layouts[packed])
        best = blob if not best or len(blob) < len(best) else best
    return best


def laid_out(model: GPT, nibbles: bool) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the table of all tensors, and their arrays as planes of bytes."""
    table: dict[str, Any] = {}
    planes = []
    for name, tensor in stored_of(model).items():
        rows = []
        for part, array in tensor.arrays().items():
            small = nibbles and fits_nibble(array)
            rows.append([part, str(array.dtype), [*array.shape], int(small)])
            planes.append(to_plane(array, small))
        table[name] = [tensor.kind, rows]
    return table, planes


def encode(model: GPT, codec: str, table: Mapping[str, Any], planes: list[np.ndarray]) -> bytes:
    """Return the file that one codec makes."""
    payload = encode_lzma(planes) if codec == "lzma" else encode_planes(codec, planes)
    config = {name: getattr(model.cfg, name) for name in MODEL_FIELDS}
    header = {"model": config, "looping": model.looping, "codec": codec, "tensors": table}
    packed = brotli.compress(json.dumps(header, separators=(",", ":")).encode(), quality=11)
    body = packed + payload
    return PRELUDE.pack(MAGIC, len(packed), hashlib.sha256(body).digest()) + body


def encode_lzma(planes: list[np.ndarray]) -> bytes:
    """Pack planes as the field's ternary record does; the trainer has no use for this codec."""
    data = b"".join(plane.tobytes() for plane in planes)
    return lzma.compress(data, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)


def decode_lzma(payload: bytes, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    sizes = [rows * columns for rows, columns in shapes]
    decoder = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=1 << 28)
    data = decoder.decompress(payload, max_length=sum(sizes) + 1)
    if not decoder.eof or decoder.unused_data or len(data) != sum(sizes):
        raise ParcelError(f"lzma: damaged, {len(data)} bytes for {sum(sizes)} symbols")
    parts = np.split(np.frombuffer(data, np.uint8), np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def unpack(blob: bytes) -> GPT:
    """Return the model of a file, or raise ParcelError."""
    try:
        magic, size, digest = PRELUDE.unpack_from(blob)
        body = blob[PRELUDE.size :]
        if magic != MAGIC or size > min(len(body), MOST_HEADER_BYTES):
            raise ParcelError("this is no file of a compressed model")
        if hashlib.sha256(body).digest() != digest:
            raise ParcelError("the file does not match its checksum: damaged")
        header = json.loads(brotli.decompress(body[:size]))
        stored = decode(header, body[size:])
        model = header["model"]
        cfg = Config(**model, train_batch_tokens=8 * model["train_seq_len"])
        return rebuilt(cfg, bool(header["looping"]), stored)
    except (
        struct.error,
        brotli.error,
        lzma.LZMAError,
        KeyError,
        TypeError,
        ValueError,
        CodecError,
    ) as e:
        raise ParcelError(f"the file of a compressed model is damaged ({e})") from None


def decode(header: Mapping[str, Any], payload: bytes) -> dict[str, Stored]:
    """Return the tensors of a payload."""
    rows = [row for _, parts in header["tensors"].values() for row in parts]
    for part, dtype, shape, _ in rows:
        if dtype not in TYPES or min(shape, default=0) < 0 or math.prod(shape) > MOST_ELEMENTS:
            raise ParcelError(f"array {part!r} of type {dtype!r:.20} and shape {shape!r:.60}")
    shapes = [plane_shape(dtype, shape, bool(n)) for _, dtype, shape, n in rows]
    if sum(a * b for a, b in shapes) > MOST_ELEMENTS:
        raise ParcelError("the arrays are larger than any model here")
    codec, stored = header["codec"], {}
    read = (
        decode_lzma(payload, shapes) if codec == "lzma" else decode_planes(codec, payload, shapes)
    )
    planes = iter(read)
    for name, (kind, parts) in header["tensors"].items():
        arrays = {
            p: from_plane(next(planes), dtype, shape, bool(n)) for p, dtype, shape, n in parts
        }
        stored[name] = (KINDS | LAYOUTS)[kind].from_arrays(arrays)
    return stored


def rebuilt(cfg: Config, looping: bool, stored: Mapping[str, Stored]) -> GPT:
    """Return the model of these tensors: strictly, every parameter named once."""
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in GPT(cfg).named_parameters()}
    weights = {name: tensor.weight() for name, tensor in stored.items()}
    for name in shapes.keys() ^ weights.keys():
        raise ParcelError(f"tensor {name!r} is missing, or no part of this model")
    for name, shape in shapes.items():
        if weights[name].numel() != math.prod(shape):
            raise ParcelError(f"tensor {name!r} has shape {[*weights[name].shape]}, not {[*shape]}")
    model = GPT(cfg)
    model.looping = looping
    return with_stored(model.placed("cpu"), stored)
