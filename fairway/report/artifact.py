"""The content of an artifact, and where the bytes of a submission go. docs/ARTIFACT.md has the
format.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import Any, NamedTuple

from fairway.records.files import RecordError, parse_json
from fairway.records.run import RunFiles, dict_at
from fairway.report.data import (
    DEFAULT_BUDGET,
    Missing,
    clean_text,
    code_files,
    finite_number,
    no_export,
    packed_share,
    whole_number,
)

MAGIC, PREFIX_BYTES, MOST_HEADER, MOST_TOKENIZER = b"FAIRWAY\0", 48, 1 << 20, 1 << 23


class ArtifactFile(NamedTuple):
    """Sizes, tensor table and tokenizer of an artifact."""

    header_bytes: int
    payload_bytes: int
    tokenizer_bytes: int
    tensors: dict[str, Any]  # name → [bits, *shape]
    tokenizer_sha256: str
    tokenizer: bytes  # as stored: one Brotli stream, b"" if absent


def read_artifact_file(run: RunFiles) -> ArtifactFile:
    """Read the header and the tokenizer of a run's artifact, and check every size."""
    if run.artifact is None:
        raise Missing("the artifact of this run is gone")
    name = clean_text(run.artifact.name)
    try:
        size = os.path.getsize(run.artifact)
        with open(run.artifact, "rb") as f:
            start = f.read(PREFIX_BYTES)
            length = int.from_bytes(start[12:16], "little")
            text = f.read(length) if length <= MOST_HEADER else b""
            if start[:8] != MAGIC or hashlib.sha256(text).digest() != start[16:48]:
                raise Missing(f"{name} has no header of an artifact")
            header = parse_json(text.decode("utf-8", "replace"), name)
            payload, tokenizer = (
                whole_number(dict_at(header).get(k)) for k in ("payload_bytes", "tokenizer_bytes")
            )
            if (
                payload is None
                or tokenizer is None
                or PREFIX_BYTES + length + payload + tokenizer != size
            ):
                raise Missing(f"{name} is not as long as its header says")
            f.seek(PREFIX_BYTES + length + payload)
            stream = f.read(tokenizer) if tokenizer <= MOST_TOKENIZER else b""
    except (OSError, RecordError) as e:
        raise Missing(f"{name}: {clean_text(str(e), 120)}") from None
    return ArtifactFile(
        PREFIX_BYTES + length,
        payload,
        tokenizer,
        dict_at(header, "tensors"),
        clean_text(header.get("tokenizer_sha256")),
        stream,
    )


def brotli_content(stream: bytes) -> bytes:
    """Decompress a stream of at most MOST_TOKENIZER bytes; b"" if it is longer or damaged."""
    import brotli

    decoder = brotli.Decompressor()
    try:
        data = decoder.process(stream, output_buffer_limit=MOST_TOKENIZER + 1)
    except brotli.error:
        return b""
    return data if decoder.is_finished() and len(data) <= MOST_TOKENIZER else b""


# ==== WHERE THE BYTES GO ==========================================================================
class BytePart(NamedTuple):
    """One part of a submission."""

    name: str
    kind: str  # "weights", "file" or "code"
    bytes: float
    exact: bool


class ByteBreakdown(NamedTuple):
    """All parts of a submission, and its budget."""

    parts: list[BytePart]  # largest first
    budget: int

    @property
    def used(self) -> int:
        return round(sum(p.bytes for p in self.parts))


def tensor_class(name: str) -> str:
    """`tensor_class("blocks.0.mlp.fc.weight")` is "MLP"."""
    for pattern, kind in (
        (r"bigram", "bigram"),
        (r"emb|head\b", "embedding"),
        (r"\.attn\.", "attention"),
        (r"\.mlp\.", "MLP"),
    ):
        if re.search(pattern, name):
            return kind
    return "gates, scales"


def bits_by_class(run: RunFiles, tensors: dict[str, Any], skip: int) -> dict[str, float]:
    """Return the bits of each class of tensors, by the quantiser's estimate for each tensor.

    `skip` is the number of items before the shape in a row of the tensor table.
    """
    estimates, bits_of = dict_at(run.event("quantised"), "tensors"), {}
    for name, shape in list(tensors.items())[:4096]:
        if (
            not isinstance(shape, list)
            or not skip <= len(shape) <= 8
            or any(whole_number(n) is None for n in shape)
        ):
            continue
        estimate = estimates.get(name)
        bits = (
            finite_number(estimate[1])
            if isinstance(estimate, list) and len(estimate) > 1
            else finite_number(shape[0])
            if skip
            else 16.0
        )
        size = min(math.prod(shape[skip:]), 1 << 40)
        if 0 <= bits <= 32:
            kind = tensor_class(clean_text(name))
            bits_of[kind] = bits_of.get(kind, 0.0) + bits * size
    return {kind: bits for kind, bits in bits_of.items() if bits > 0}


def code_groups(run: RunFiles) -> dict[str, int]:
    """Return bytes of code: files at the root by name, others by folder, the smallest together."""
    groups: dict[str, int] = {}
    for name, size in code_files(run).items():
        folder, _, _ = name.rpartition("/")
        group = (folder if "/" in folder else f"{folder}/*.py") if folder else name
        groups[group] = groups.get(group, 0) + size
    ordered = sorted(groups.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(size for _, size in ordered[7:])
    return dict(ordered[:7]) | ({"other code": rest} if rest else {})


def byte_breakdown(run: RunFiles) -> ByteBreakdown:
    """Return where the bytes go. File sizes are exact; classes of tensors share the payload by
    estimate.
    """
    total = whole_number(run.event("artifact").get("bytes")) or whole_number(
        dict_at(run.score, "sizes").get("artifact")
    )
    if not total:
        raise no_export(run, "artifact")
    parts, tensors, skip = [], dict_at(run.event("model"), "tensors"), 0
    try:
        stored = read_artifact_file(run)
    except Missing:
        payload = total
    else:
        payload, tensors, skip = stored.payload_bytes, stored.tensors, 1
        parts = [
            BytePart("tokenizer", "file", stored.tokenizer_bytes, True),
            BytePart("header", "file", stored.header_bytes, True),
        ]
    bits = bits_by_class(run, tensors, skip) or {"weights": 1.0}
    parts += [
        BytePart(kind, "weights", payload * b / sum(bits.values()), len(bits) == 1)
        for kind, b in bits.items()
    ]
    share = packed_share(run)
    parts += [
        BytePart(name, "code", size * share, share == 1.0)
        for name, size in code_groups(run).items()
    ]
    parts = sorted((p for p in parts if p.bytes > 0), key=lambda p: (-p.bytes, p.name))
    budget = (
        whole_number(dict_at(run.score, "settings").get("size_budget_bytes"))
        or whole_number(run.settings.get("size_budget_bytes"))
        or DEFAULT_BUDGET
    )
    return ByteBreakdown(parts, budget)
