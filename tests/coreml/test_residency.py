"""Doubts about the Neural Engine: each rule fires where it should, and only there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fairway.coreml import residency
from fairway.coreml.manifest import Manifest, read_shard_folder
from fairway.coreml.mlpackage import Package, PackageFunction
from fairway.coreml.residency import doubts_about, doubts_about_options, doubts_about_package

LARGE = 15_000_000


def tensor(*shape: int) -> dict:
    dims = [{"constant": {"size": n}} for n in shape]
    return {"tensor": {"dtype": 10, "rank": len(shape), "dims": dims}}


def package(*operations: dict) -> Package:
    """Return a package whose one function has these operations."""
    function = PackageFunction("main", {}, {}, {}, {"operations": list(operations)})
    return Package(Path("p"), {"main": function}, "main", np.zeros(0, np.uint8))


def op(kind: str, *shape: int, state: str = "") -> dict:
    inputs = {"input": {"bindings": [{"name": state}]}} if state else {}
    return {"type": kind, "inputs": inputs, "outputs": [{"name": "o", "type": tensor(*shape)}]}


def reasons(*operations: dict, size: int = LARGE, quantise: str = "int8") -> list[str]:
    found = doubts_about_package("head0", package(*operations), size, quantise)
    assert all(doubt.shard == "head0" and doubt.source for doubt in found)
    return [d.reason for d in doubts_about_package("head0", package(*operations), size, quantise)]


def test_a_large_shard_of_known_operations_gives_no_doubt():
    assert reasons(op("conv", 1, 32_768, 1, 4), op("tanh", 1, 8, 1, 4), op("softmax", 1, 8)) == []
    assert reasons(op("conv", 1, 512, 1, 1), quantise="int4") == []


def test_small_shards_are_doubted_and_int4_in_them_twice():
    (one,) = reasons(size=13_999_999)
    assert one.startswith("14.0 MB; shards below about 14 MB")
    assert len(reasons(size=100_000, quantise="int4")) == 2


@pytest.mark.parametrize("kind", ["gather", "reduce_argmax", "topk", "scatter_nd"])
def test_operations_that_run_on_the_cpu_are_named_once(kind):
    assert reasons(op(kind, 1, 4), op(kind, 1, 4)) == [f"{kind} runs on the CPU"]


def test_wide_matrices_and_many_states_are_doubted():
    (wide,) = reasons(op("conv", 1, 32_769, 1, 1))
    assert "32,769 rows" in wide
    states = [op("read_state", 1, 4, state=name) for name in "kkvv"]
    assert reasons(*states) == []
    (many,) = reasons(*states, op("read_state", 1, 4, state="x"))
    assert many.startswith("3 states")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({}, None),
        (dict(precision="fp32"), "fp16 only"),
        (dict(shapes="range"), "default shape"),
        (dict(shapes="enumerated"), "enumerated"),
        (dict(shapes="range", sizes=(1,)), None),
    ],
)
def test_precision_and_shapes_are_doubted(changed, word):
    empty = dict.fromkeys(Manifest.__dataclass_fields__)
    manifest = Manifest(**empty | dict(precision="fp16", shapes="multifunction", sizes=(1, 4)))
    found = [*doubts_about_options(replace(manifest, **changed))]
    assert (word is None and not found) or (len(found) == 1 and word in str(found[0]))
    assert all(str(doubt).startswith("all shards: ") for doubt in found)


@pytest.mark.apple
def test_an_export_has_no_operation_that_runs_on_the_cpu(exported):
    folder = exported(shapes="fixed")
    found = doubts_about(folder, read_shard_folder(folder).manifest)
    assert {doubt.source for doubt in found} == {residency.ANE_BOOK}
    assert [doubt.shard for doubt in found] == ["layers0", "head0"]
