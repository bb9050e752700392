"""Read an artifact that may come from a stranger: damaged, hostile, or written by other code.

Nothing is unpickled, and no size is believed before it is checked. docs/ARTIFACT.md specifies the
file. All tools read artifacts through this module; the trainer's own decoder trusts what it reads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import brotli
import torch

from train_gpt import (
    ARTIFACT_MAGIC,
    ARTIFACT_VERSION,
    CODECS,
    GPT,
    HEAD,
    LEFT,
    MODEL_FIELDS,
    PRELUDE,
    RIGHT,
    Artifact,
    Config,
    Rounded,
    UserError,
    decode_tensors,
    decompress_brotli,
    levels,
    tensor_bits,
    weights_of,
)

MOST_FILE_BYTES, MOST_HEADER_BYTES, MOST_TOKENIZER_BYTES = 1 << 27, 1 << 20, 1 << 23
MOST_WEIGHTS, MOST_RANK, REPAIR_BITS = 48_000_000, 64, 6
# Settings that old headers name and the trainer no longer has, with the one value that it keeps to.
RETIRED_FIELDS = {"loop_adaln": False}
ADVICE = "use the train_gpt.py that wrote the file"
HEADER_KINDS = {
    "model": dict,
    "looping": bool,
    "k": float,
    "codec": str,
    "tensors": dict,
    "payload_bytes": int,
    "payload_sha256": str,
    "tokenizer_bytes": int,
    "tokenizer_sha256": str,
}


class ArtifactError(UserError):
    """An artifact that is damaged, hostile, or written by other code."""


def read_artifact(path: str | Path) -> Artifact:
    """Check everything, then decode: return an Artifact or raise ArtifactError."""
    try:
        with open(path, "rb") as f:
            header = read_header(f, os.path.getsize(path))
            payload, inside = f.read(header["payload_bytes"]), f.read(header["tokenizer_bytes"])
        if hashlib.sha256(payload + inside).hexdigest() != header["payload_sha256"]:
            raise ArtifactError("the payload does not match its checksum: damaged")
        cfg = header_config(header)
        rounded = decode_tensors(header, payload)
        for name, tensor in rounded.items():
            check_tensor(name, tensor)
        weights = weights_of(rounded)
        if not torch.isfinite(weights[HEAD]).all():  # finite factors may have an infinite product
            raise ArtifactError(f"tensor {HEAD!r} is not finite once it is repaired")
        tokenizer = decompress_brotli(inside, MOST_TOKENIZER_BYTES) if inside else b""
        if inside and hashlib.sha256(tokenizer).hexdigest() != header["tokenizer_sha256"]:
            raise ArtifactError("the tokenizer inside is not the one that the header names")
        return Artifact(cfg, weights, tokenizer, header)
    except OSError as e:
        raise ArtifactError(f"{path}: cannot be read ({e.strerror}); check its name") from None
    except (UserError, brotli.error) as e:
        raise ArtifactError(f"{path}: {e}") from None


def read_header(f: BinaryIO, size: int) -> dict[str, Any]:
    """Return the JSON header of a file of `size` bytes, checked in form, size and checksum."""
    start = f.read(PRELUDE.size)
    if len(start) < PRELUDE.size or not start.startswith(ARTIFACT_MAGIC):
        raise ArtifactError("not a Fairway artifact")
    _, version, length, checksum = PRELUDE.unpack(start)
    if size > MOST_FILE_BYTES:
        raise ArtifactError(f"{size} bytes, more than any artifact has")
    if version != ARTIFACT_VERSION:
        raise ArtifactError(f"version {version}; this reader knows {ARTIFACT_VERSION}")
    left = size - PRELUDE.size - length
    if length > MOST_HEADER_BYTES or left < 0:
        raise ArtifactError(f"no room for a header of {length} bytes: damaged")
    text = f.read(length)
    if hashlib.sha256(text).digest() != checksum:
        raise ArtifactError("the header does not match its checksum: damaged")
    try:
        # A key that stands twice leaves a list, which no check accepts.
        hook = lambda pairs: pairs if len(dict(pairs)) < len(pairs) else dict(pairs)  # noqa: E731
        header = json.loads(text, object_pairs_hook=hook)
        json.dumps(header, allow_nan=False)  # JSON has neither NaN nor infinity
    except (ValueError, RecursionError):
        raise ArtifactError("the header is not JSON") from None
    kinds = {n: type(v) for n, v in header.items()} if type(header) is dict else {}
    if kinds != HEADER_KINDS:
        raise ArtifactError(f"the header must hold exactly {', '.join(HEADER_KINDS)}")
    if (codec := header["codec"]) not in CODECS:
        raise ArtifactError(f"codec {codec!r:.20} is not one of {', '.join(CODECS)}")
    parts = header["payload_bytes"], header["tokenizer_bytes"]
    if min(parts) < 0 or sum(parts) != left:
        raise ArtifactError(f"{left} bytes follow, not {sum(parts)}: cut short")
    return header


def header_config(header: Mapping[str, Any]) -> Config:
    """Return the model's settings, defaults where it lacks one; refuse tensors that do not fit."""
    model, tensors = dict(header["model"]), header["tensors"]
    for name, value in RETIRED_FIELDS.items():
        if repr(stated := model.pop(name, value)) != repr(value):
            raise ArtifactError(f"{name.upper()} is {stated!r:.60}, not {value!r}; {ADVICE}")
    if unknown := sorted(model.keys() - set(MODEL_FIELDS)):
        raise ArtifactError(f"there is no model setting {unknown[0].upper()!r:.60}; {ADVICE}")
    length = model.get("train_seq_len", Config.train_seq_len)
    cfg = Config(**model, train_batch_tokens=8 * length if type(length) is int else 8)
    if cfg.num_layers > len(tensors):  # checked before a model of so many layers is described
        raise ArtifactError(f"{cfg.num_layers} layers, but {len(tensors)} tensors")
    if cfg.train_seq_len * cfg.model_dim > MOST_WEIGHTS:
        raise ArtifactError("TRAIN_SEQ_LEN x MODEL_DIM is out of range")
    with torch.device("meta"):
        expected = {n: [tensor_bits(n, cfg), *p.shape] for n, p in GPT(cfg).named_parameters()}
    if LEFT in tensors or RIGHT in tensors:
        expected |= repair_tensors(cfg, tensors.get(LEFT))
    for name in [*expected, *tensors]:
        stated, wanted = tensors.get(name), expected.get(name)
        if repr(stated) != repr(wanted):  # True is no 1
            raise ArtifactError(f"tensor {name!r:.60} is {stated!s:.60}, not {wanted}")
    if (weights := sum(math.prod(shape) for _, *shape in expected.values())) > MOST_WEIGHTS:
        raise ArtifactError(f"{weights} weights; at most {MOST_WEIGHTS} are read")
    return cfg


def repair_tensors(cfg: Config, stated: Any) -> dict[str, list[int]]:
    """Return bits and shapes of the two factors that repair the embedding, of the stated rank."""
    rank = stated[1] if type(stated) is list and len(stated) == 3 else 0
    if type(rank) is not int or not 1 <= rank <= MOST_RANK:
        raise ArtifactError(f"tensor {LEFT!r} is {stated!s:.60}, of no rank from 1 to {MOST_RANK}")
    return {LEFT: [REPAIR_BITS, rank, cfg.vocab_size], RIGHT: [REPAIR_BITS, rank, cfg.model_dim]}


def check_tensor(name: str, rounded: Rounded) -> None:
    """Refuse values that the quantiser cannot have written."""
    bits, values, steps = rounded
    if steps is not None:
        if int(values.min()) < -levels(bits) or int(values.max()) > levels(bits):
            raise ArtifactError(f"tensor {name!r} has codes outside {bits} bits")
    if not torch.isfinite(rounded.weight()).all():
        raise ArtifactError(f"tensor {name!r} is not finite")
