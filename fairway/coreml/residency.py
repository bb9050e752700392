"""Guess, before anyone has a Mac, what of an export will not run on the Neural Engine.

CoreML says nothing when it moves a shard to the CPU. The rules below are what others saw or wrote,
each with its source; --audit on a Mac shows what yours does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fairway.coreml.manifest import Manifest
from fairway.coreml.mlpackage import Package, package_bytes, read_package, tensor_type

LEAST_BYTES = 14_000_000  # of a compiled shard; we count program and weights of the package
MOST_CHANNELS = 1 << 15  # of a convolution's output
MOST_STATES = 2
ANE_BOOK = "ane-book, experiment 27, M4 Max"
ANE_LAWS = "ane-book, law 3, M4 Max"
CATALOG = "CoreML-LLM, MIL_OP_CATALOG.md"
ORION = "Orion, arXiv 2603.06728"
ELSEWHERE = (  # operations that run on the CPU, all or mostly, by CATALOG
    "argsort cumsum gather gather_along_axis gather_nd non_zero one_hot reduce_argmax "
    "reduce_argmin scatter scatter_along_axis scatter_nd shape topk"
).split()


class Doubt(NamedTuple):
    """A reason why a shard may run elsewhere; `shard` is "" where it holds for all of them."""

    shard: str
    reason: str
    source: str

    def __str__(self) -> str:
        return f"{self.shard or 'all shards'}: {self.reason} ({self.source})"


def doubts_about(folder: Path, manifest: Manifest) -> list[Doubt]:
    """Return every reason to expect that something of an export leaves the Neural Engine."""
    found = [*doubts_about_options(manifest)]
    for shard in manifest.interfaces():
        path = folder / f"{shard}.mlpackage"
        package, size = read_package(path), package_bytes(path)
        found += doubts_about_package(shard, package, size, manifest.quantise)
    return found


def doubts_about_options(manifest: Manifest) -> Iterator[Doubt]:
    """Yield the doubts that precision and shapes give."""
    if manifest.precision != "fp16":
        reason = f"the Neural Engine computes in fp16 only, not {manifest.precision}"
        yield Doubt("", reason, "gigastt, pull request 94, M1 Pro")
    if manifest.shapes == "range" and len(manifest.sizes) > 1:
        reason = "of a range only the default shape, one token, runs there"
        yield Doubt("", reason, "an Apple engineer, developer forum, thread 724930")
    if manifest.shapes == "enumerated":
        yield Doubt("", "enumerated shapes ran there 2 % of the time", "coremltools issue 2370")


def doubts_about_package(shard: str, package: Package, size: int, quantise: str) -> Iterator[Doubt]:
    """Yield the doubts that size, operations, widths and states of a package give."""
    if size < LEAST_BYTES:
        reason = f"{size / 1e6:.1f} MB; shards below about 14 MB compiled fell to the CPU"
        yield Doubt(shard, reason, ANE_BOOK)
        if quantise == "int4":
            yield Doubt(shard, "int4 by blocks fell to the CPU in small shards", ANE_LAWS)
    operations = [op for f in package.functions.values() for op in f.body["operations"]]
    for kind in sorted({op["type"] for op in operations} & {*ELSEWHERE}):
        yield Doubt(shard, f"{kind} runs on the CPU", CATALOG)
    outputs = [op["outputs"][0] for op in operations if op["type"] == "conv"]
    widest = max((tensor_type(o["type"]).shape[1] or 0 for o in outputs), default=0)
    if widest > MOST_CHANNELS:
        yield Doubt(shard, f"a matrix of {widest:,} rows; above 32,768 it is refused", ORION)
    states = {
        binding["name"]
        for op in operations
        if op["type"] == "read_state"
        for binding in op["inputs"]["input"]["bindings"]
    }
    if len(states) > MOST_STATES:
        reason = f"{len(states)} states; one or two work on a phone, three fail"
        yield Doubt(shard, reason, "CoreML-LLM")
