"""An .mlpackage as it lies on disk: its program, its weights, and what it says that goes in and comes out.

Read by code of our own, which trusts nothing: no size is believed unchecked, and nothing in a package is code."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.coreml import wire
from train_gpt import UserError, need

LISTING = "Manifest.json"  # names the model that CoreML loads
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
MOST_BYTES = {
    LISTING: 1 << 16,
    MODEL: 1 << 24,
    WEIGHTS: 1 << 28,
}  # four bytes for each weight of any artifact
MOST_ELEMENTS = 1 << 26  # of a tensor


class PackageError(UserError):
    """A package that is damaged, hostile, or not what it should be."""


class Kind(NamedTuple):
    """A type of numbers in a program: how wide, what holds it here, and what weight.bin calls it."""

    name: str
    bits: int
    holder: type
    blob: int


KINDS = {
    1: Kind("bool", 8, np.bool_, -1),
    10: Kind("fp16", 16, np.float16, 1),
    11: Kind("fp32", 32, np.float32, 2),
    21: Kind("int8", 8, np.int8, 4),
    22: Kind("int16", 16, np.int16, 6),
    23: Kind("int32", 32, np.int32, 14),
    25: Kind("int4", 4, np.int8, 8),
    31: Kind("uint8", 8, np.uint8, 3),
    32: Kind("uint16", 16, np.uint16, 7),
    33: Kind("uint32", 32, np.uint32, 15),
    35: Kind("uint4", 4, np.uint8, 11),
    36: Kind("uint2", 2, np.uint8, 10),
    37: Kind("uint1", 1, np.uint8, 9),
    38: Kind("uint6", 6, np.uint8, 13),
    39: Kind("uint3", 3, np.uint8, 12),
}
STRING = 2
FEATURE_KINDS = {65568: "fp32", 65552: "fp16", 131104: "int32"}
BLOB = struct.Struct(
    "<IIQQQ"
)  # sentinel, type, bytes, where they are, bits that fill up the last byte
BLOB_BYTES, SENTINEL = 64, 0xDEADBEEF
LIKE = {
    name: next(k.holder for k in KINDS.values() if k.name == name)
    for name in FEATURE_KINDS.values()
}


class Type(NamedTuple):
    """Of a tensor; None stands for an axis that depends on the call."""

    kind: Kind
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.kind.name}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class Feature(NamedTuple):
    """What goes in or comes out by a name; `shapes`: of a call, each axis from low to high, any one of them."""

    kind: str
    shapes: tuple[tuple[tuple[int, int], ...], ...]

    def takes(self, shape: Sequence[int]) -> bool:
        return any(
            len(shape) == len(one)
            and all(low <= n <= high for n, (low, high) in zip(shape, one, strict=True))
            for one in self.shapes
        )

    def __str__(self) -> str:
        shown = (
            ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in one) for one in self.shapes
        )
        return f"{self.kind} of {' or '.join(f'[{one}]' for one in shown)}"


class Function(NamedTuple):
    name: str
    inputs: dict[str, Feature]
    outputs: dict[str, Type]
    body: dict[str, Any]  # of the program, as wire.read gives it


class Package(NamedTuple):
    path: Path
    functions: dict[str, Function]
    default: str
    weights: np.ndarray  # uint8, mapped


def files_of(path: Path) -> dict[str, str]:
    """SHA-256 of the files that a package is made of; none is read before its size is known."""
    found = {}
    for name, most in MOST_BYTES.items():
        file = path / name
        need(
            file.is_file() and not file.is_symlink(),
            f"{path} has no {name}; export it again",
            PackageError,
        )
        need(
            file.stat().st_size <= most,
            f"{file} has {file.stat().st_size} bytes, more than any export",
            PackageError,
        )
        with open(file, "rb") as f:
            found[name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found


def size_of(path: Path) -> int:
    return sum((path / name).stat().st_size for name in (MODEL, WEIGHTS))


def read_package(path: str | Path) -> Package:
    """Ends in a Package or in PackageError."""
    path = Path(path)
    try:
        for name, most in MOST_BYTES.items():
            size = (path / name).stat().st_size
            need(size <= most, f"{name} has {size} bytes, more than any export", PackageError)
        check_listing(json.loads((path / LISTING).read_bytes()))
        model = wire.read((path / MODEL).read_bytes())
        weights = np.memmap(path / WEIGHTS, np.uint8, "r")
        return Package(
            path, functions_of(model), model["description"].get("default") or "main", weights
        )
    except OSError as e:
        raise PackageError(
            f"{path}: {Path(e.filename or '').name}: {e.strerror}; export it again"
        ) from None
    except (
        wire.WireError,
        LookupError,
        AttributeError,
        TypeError,
        ValueError,
        RecursionError,
        OverflowError,
    ) as e:
        raise PackageError(
            f"{path}: not an ML program that can be read ({e}); export it again"
        ) from None
    except UserError as e:
        raise PackageError(f"{path}: {e}") from None


def check_listing(listing: dict[str, Any]) -> None:
    """CoreML loads what the listing names, which must be what is read here."""
    items = listing["itemInfoEntries"]
    named = f"Data/{items[listing['rootModelIdentifier']]['path']}"
    need(
        named == MODEL, f"its {LISTING} names {named!r:.60} as the model, not {MODEL}", PackageError
    )


def functions_of(model: dict[str, Any]) -> dict[str, Function]:
    described = model["description"]
    need(
        not described.get("states"),
        "it keeps state; only stateless programs are read",
        PackageError,
    )
    told = {one["name"]: one for one in described.get("functions", [])} or {"main": described}
    program = model["program"]["functions"]
    need(
        told.keys() == program.keys(),
        f"it describes functions {', '.join(told)}, but holds {', '.join(program)}",
        PackageError,
    )
    found = {}
    for name, one in told.items():
        function = program[name]
        block = function["blocks"].get(function.get("opset", ""))
        need(block, f"function {name} has no body for {function.get('opset')}", PackageError)
        inputs = {f["name"]: feature_of(f) for f in one.get("inputs", [])}
        outputs = {f["name"]: feature_kind(f) for f in one.get("outputs", [])}
        typed = {f["name"]: type_of(f["type"]) for f in function.get("inputs", [])}
        need(
            typed.keys() == inputs.keys(),
            f"function {name} describes other inputs than it has",
            PackageError,
        )
        for n, feature in inputs.items():
            fits = feature.kind == typed[n].kind.name and all(
                len(one) == len(typed[n].shape)
                and all(
                    own is None or own == low == high
                    for own, (low, high) in zip(typed[n].shape, one, strict=True)
                )
                for one in feature.shapes
            )
            need(
                fits, f"input {n} is described as {feature}, but declared {typed[n]}", PackageError
            )
        made = {
            o["name"]: o["type"]
            for op in block.get("operations", [])
            for o in op.get("outputs", [])
        } | {f["name"]: f["type"] for f in function.get("inputs", [])}
        typed = {n: type_of(made[n]) for n in block.get("outputs", [])}
        need(
            {n: t.kind.name for n, t in typed.items()} == outputs,
            f"function {name} describes other outputs than it has",
            PackageError,
        )
        found[name] = Function(name, inputs, typed, block)
    return found


def feature_kind(feature: dict[str, Any]) -> str:
    code = feature["type"]["array"].get("dtype", 0)
    need(
        code in FEATURE_KINDS,
        f"{feature['name']} has numbers of an unknown type {code}",
        PackageError,
    )
    return FEATURE_KINDS[code]


def feature_of(feature: dict[str, Any]) -> Feature:
    array = feature["type"]["array"]
    if "enumerated" in array:
        shapes = [[(n, n) for n in one["shape"]] for one in array["enumerated"]["shapes"]]
    elif "ranges" in array:
        shapes = [[(one.get("low", 0), one.get("high", 0)) for one in array["ranges"]["ranges"]]]
    else:
        shapes = [[(n, n) for n in array.get("shape", [])]]
    return Feature(feature_kind(feature), tuple(map(tuple, shapes)))


def type_of(value_type: dict[str, Any]) -> Type:
    tensor = value_type["tensor"]
    need(
        tensor.get("dtype") in KINDS,
        f"numbers of an unknown type {tensor.get('dtype')}",
        PackageError,
    )
    shape = tuple(
        None if "unknown" in d else d["constant"].get("size", 0) for d in tensor.get("dims", [])
    )
    need(
        len(shape) == tensor.get("rank", 0) and all(n is None or n >= 0 for n in shape),
        "an odd shape",
        PackageError,
    )
    need(
        math.prod(n or 1 for n in shape) <= MOST_ELEMENTS,
        f"a tensor of shape {shape}",
        PackageError,
    )
    return Type(KINDS[tensor["dtype"]], shape)


class Matrix(NamedTuple):
    """The weights of a convolution."""

    name: str
    elements: int
    plain: bool  # kept as they are multiplied


def matrices(package: Package) -> dict[str, Matrix]:
    """Of the default function, by the name of what each convolution makes."""
    operations = package.functions[package.default].body["operations"]
    made = {output["name"]: (op, output) for op in operations for output in op["outputs"]}
    found = {}
    for op in operations:
        if op["type"] == "conv":
            name = op["inputs"]["weight"]["bindings"][0]["name"]
            source, output = made[name]
            shape = type_of(output["type"]).shape
            found[op["outputs"][0]["name"]] = Matrix(
                name, math.prod(shape), source["type"] == "const"
            )
    return found


# ==== CONSTANTS =======================================================================================================
def constant(value: dict[str, Any], weights: np.ndarray) -> Any:
    """A tensor, or the text of one: from the program itself or from weight.bin."""
    if "list" in value["type"]:
        return [
            constant(one, weights) for one in value["immediate"].get("list", {}).get("values", [])
        ]
    if value["type"]["tensor"].get("dtype") == STRING:
        return value["immediate"]["tensor"]["strings"]["values"][0]
    kind, shape = type_of(value["type"])
    need(None not in shape, "a constant of no fixed shape", PackageError)
    if "blob" in value:
        return from_blob(value["blob"], kind, shape, weights)
    held = value["immediate"]["tensor"]
    if "bytes" in held:
        data = np.frombuffer(held["bytes"].get("values", b""), np.uint8)
        return unpacked(data, kind, shape)
    numbers = next((part.get("values", []) for part in held.values()), [])
    need(
        len(numbers) == math.prod(shape),
        f"{len(numbers)} numbers for a tensor of shape {shape}",
        PackageError,
    )
    return (
        np.array(numbers, np.float64 if kind.name.startswith("fp") else np.int64)
        .astype(kind.holder)
        .reshape(shape)
    )


def from_blob(
    blob: dict[str, Any], kind: Kind, shape: tuple[int, ...], weights: np.ndarray
) -> np.ndarray:
    need(
        blob.get("file") == "@model_path/weights/weight.bin",
        f"weights in {blob.get('file')!r:.60}",
        PackageError,
    )
    at = blob.get("offset", 0)
    need(
        0 <= at <= len(weights) - BLOB_BYTES,
        f"weight.bin has {len(weights)} bytes and no entry at {at}: cut short",
        PackageError,
    )
    sentinel, code, size, where, fill = BLOB.unpack(weights[at : at + BLOB.size].tobytes())
    need(
        sentinel == SENTINEL and code == kind.blob,
        f"the entry at {at} of weight.bin is no {kind.name}: damaged",
        PackageError,
    )
    wanted = -(-math.prod(shape) * kind.bits // 8)
    need(
        size == wanted and where <= len(weights) - size and fill < 8,
        f"the entry at {at} of weight.bin has {size} bytes, not {wanted}: damaged",
        PackageError,
    )
    return unpacked(weights[where : where + size], kind, shape)


def unpacked(data: np.ndarray, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers from bytes; those narrower than a byte follow one another from its lowest bit on."""
    count = math.prod(shape)
    need(
        len(data) == -(-count * kind.bits // 8),
        f"{len(data)} bytes for {kind.name} of shape {shape}",
        PackageError,
    )
    if kind.bits >= 8:
        return data.view(np.uint8).copy().view(kind.holder).reshape(shape)
    bits = np.unpackbits(data, bitorder="little")[: count * kind.bits].reshape(count, kind.bits)
    codes = bits @ (1 << np.arange(kind.bits, dtype=np.uint8))
    if kind.name == "int4":
        codes = codes.astype(np.int8) - 16 * (codes >= 8).astype(np.int8)
    return codes.astype(kind.holder).reshape(shape)
