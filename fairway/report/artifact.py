"""What is in an artifact and where the bytes of a submission go; docs/ARTIFACT.md has the format."""

from __future__ import annotations

import hashlib
import math
import os
import re
from typing import Any, NamedTuple

from fairway.records.files import RecordError, parse_json
from fairway.records.run import Run, dict_at
from fairway.report.data import BUDGET, Missing, code_files, no_export, number, whole, words

MAGIC, PREFIX_BYTES, MOST_HEADER, MOST_TOKENIZER = b"FAIRWAY\0", 48, 1 << 20, 1 << 23


class Artifact(NamedTuple):
    header_bytes: int
    payload_bytes: int
    tokenizer_bytes: int
    tensors: dict[str, Any]  # name → [bits, *shape]
    tokenizer_sha256: str
    tokenizer: bytes  # as stored: one Brotli stream, b"" if absent


def read_artifact(run: Run) -> Artifact:
    """The header of an artifact and its tokenizer, every size checked; docs/ARTIFACT.md."""
    if run.artifact is None:
        raise Missing("the artifact of this run is gone")
    name = words(run.artifact.name)
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
                whole(dict_at(header).get(k)) for k in ("payload_bytes", "tokenizer_bytes")
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
        raise Missing(f"{name}: {words(str(e), 120)}") from None
    return Artifact(
        PREFIX_BYTES + length,
        payload,
        tokenizer,
        dict_at(header, "tensors"),
        words(header.get("tokenizer_sha256")),
        stream,
    )


def unpacked(stream: bytes) -> bytes:
    """A Brotli stream of at most MOST_TOKENIZER bytes; b"" where it is longer or damaged."""
    import brotli

    decoder = brotli.Decompressor()
    try:
        data = decoder.process(stream, output_buffer_limit=MOST_TOKENIZER + 1)
    except brotli.error:
        return b""
    return data if decoder.is_finished() and len(data) <= MOST_TOKENIZER else b""


# ==== WHERE THE BYTES GO ==============================================================================================
class Part(NamedTuple):
    name: str
    kind: str  # "weights", "file" or "code"
    bytes: float
    exact: bool


class Weighed(NamedTuple):
    parts: list[Part]  # largest first
    budget: int

    @property
    def used(self) -> int:
        return round(sum(p.bytes for p in self.parts))


def tensor_class(name: str) -> str:
    for pattern, kind in (
        (r"bigram", "bigram"),
        (r"emb|head\b", "embedding"),
        (r"\.attn\.", "attention"),
        (r"\.mlp\.", "MLP"),
    ):
        if re.search(pattern, name):
            return kind
    return "gates, scales"


def shares(run: Run, tensors: dict[str, Any], skip: int) -> dict[str, float]:
    """class → bits that its tensors take, by what the quantiser said of each. `skip`: where shapes begin."""
    said, found = dict_at(run.event("quantised"), "tensors"), {}
    for name, shape in list(tensors.items())[:4096]:
        if (
            not isinstance(shape, list)
            or not skip <= len(shape) <= 8
            or any(whole(n) is None for n in shape)
        ):
            continue
        told = said.get(name)
        bits = (
            number(told[1])
            if isinstance(told, list) and len(told) > 1
            else number(shape[0])
            if skip
            else 16.0
        )
        size = min(math.prod(shape[skip:]), 1 << 40)
        if 0 <= bits <= 32:
            kind = tensor_class(words(name))
            found[kind] = found.get(kind, 0.0) + bits * size
    return {kind: bits for kind, bits in found.items() if bits > 0}


def code_groups(run: Run) -> dict[str, int]:
    """Files at the root by name, others by folder; the smallest together."""
    groups: dict[str, int] = {}
    for name, size in code_files(run).items():
        folder, _, _ = name.rpartition("/")
        group = (folder if "/" in folder else f"{folder}/*.py") if folder else name
        groups[group] = groups.get(group, 0) + size
    ordered = sorted(groups.items(), key=lambda pair: (-pair[1], pair[0]))
    rest = sum(size for _, size in ordered[7:])
    return dict(ordered[:7]) | ({"other code": rest} if rest else {})


def weigh(run: Run) -> Weighed:
    """Where the bytes go: sizes of files are exact, the classes of tensors share the payload by estimate."""
    total = whole(run.event("artifact").get("bytes")) or whole(
        dict_at(run.score, "sizes").get("artifact")
    )
    if not total:
        raise no_export(run, "artifact")
    parts, tensors, skip = [], dict_at(run.event("model"), "tensors"), 0
    try:
        made = read_artifact(run)
    except Missing:
        payload = total
    else:
        payload, tensors, skip = made.payload_bytes, made.tensors, 1
        parts = [
            Part("tokenizer", "file", made.tokenizer_bytes, True),
            Part("header", "file", made.header_bytes, True),
        ]
    bits = shares(run, tensors, skip) or {"weights": 1.0}
    parts += [
        Part(kind, "weights", payload * b / sum(bits.values()), len(bits) == 1)
        for kind, b in bits.items()
    ]
    parts += [Part(name, "code", size, True) for name, size in code_groups(run).items()]
    parts = sorted((p for p in parts if p.bytes > 0), key=lambda p: (-p.bytes, p.name))
    budget = (
        whole(dict_at(run.score, "settings").get("size_budget_bytes"))
        or whole(run.settings.get("size_budget_bytes"))
        or BUDGET
    )
    return Weighed(parts, budget)
