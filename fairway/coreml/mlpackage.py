"""Read an .mlpackage from disk: its program, its weights, and its declared inputs and outputs.

This reader trusts nothing: every size is checked before use, and nothing in a package is code.
"""

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
from train_gpt import UserError

LISTING = "Manifest.json"  # names the model that CoreML loads
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
MAX_BYTES = {LISTING: 1 << 16, MODEL: 1 << 24, WEIGHTS: 1 << 28}  # 4 bytes a weight of any artifact
MAX_ELEMENTS = 1 << 26  # in one tensor


class PackageError(UserError):
    """A package is damaged or hostile, or does not hold what it should."""


class NumberType(NamedTuple):
    """A type of numbers in a program."""

    name: str
    bits: int
    dtype: type  # the numpy type that holds one number here
    blob_code: int  # its code in weight.bin


NUMBER_TYPES = {
    1: NumberType("bool", 8, np.bool_, -1),
    10: NumberType("fp16", 16, np.float16, 1),
    11: NumberType("fp32", 32, np.float32, 2),
    21: NumberType("int8", 8, np.int8, 4),
    22: NumberType("int16", 16, np.int16, 6),
    23: NumberType("int32", 32, np.int32, 14),
    25: NumberType("int4", 4, np.int8, 8),
    31: NumberType("uint8", 8, np.uint8, 3),
    32: NumberType("uint16", 16, np.uint16, 7),
    33: NumberType("uint32", 32, np.uint32, 15),
    35: NumberType("uint4", 4, np.uint8, 11),
    36: NumberType("uint2", 2, np.uint8, 10),
    37: NumberType("uint1", 1, np.uint8, 9),
    38: NumberType("uint6", 6, np.uint8, 13),
    39: NumberType("uint3", 3, np.uint8, 12),
}
STRING = 2
FEATURE_TYPES = {65568: "fp32", 65552: "fp16", 131104: "int32"}
FEATURE_DTYPES = {
    name: next(number.dtype for number in NUMBER_TYPES.values() if number.name == name)
    for name in FEATURE_TYPES.values()
}
BLOB = struct.Struct("<IIQQQ")  # sentinel, type, bytes, their offset, unused bits of the last byte
BLOB_BYTES, SENTINEL = 64, 0xDEADBEEF


class TensorType(NamedTuple):
    """Number type and shape of a tensor; None is an axis whose length depends on the call."""

    number: NumberType
    shape: tuple[int | None, ...]

    def __str__(self) -> str:
        return f"{self.number.name}[{', '.join('?' if n is None else str(n) for n in self.shape)}]"


class InputFeature(NamedTuple):
    """A declared input: its number type and the shapes that it accepts.

    Each shape holds the lowest and the highest length of each axis.
    """

    number: str
    shapes: tuple[tuple[tuple[int, int], ...], ...]

    def accepts(self, shape: Sequence[int]) -> bool:
        """Tell whether a tensor of this shape may be passed in."""
        return any(
            len(shape) == len(one)
            and all(low <= n <= high for n, (low, high) in zip(shape, one, strict=True))
            for one in self.shapes
        )

    def __str__(self) -> str:
        texts = (
            ", ".join(f"{a}" if a == b else f"{a}..{b}" for a, b in one) for one in self.shapes
        )
        return f"{self.number} of {' or '.join(f'[{text}]' for text in texts)}"


class PackageFunction(NamedTuple):
    """One function of a program."""

    name: str
    inputs: dict[str, InputFeature]
    outputs: dict[str, TensorType]
    states: dict[str, TensorType]
    body: dict[str, Any]  # the block of the program, as wire.read_message returns it


class Package(NamedTuple):
    """A package that was read, its weights memory-mapped as uint8."""

    path: Path
    functions: dict[str, PackageFunction]
    default: str
    weights: np.ndarray


def package_hashes(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a package; check each size before reading the file."""
    hashes = {}
    for name, limit in MAX_BYTES.items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise PackageError(f"{path} has no {name}; export it again")
        if (size := file.stat().st_size) > limit:
            raise PackageError(f"{file} has {size} bytes, more than any export")
        with file.open("rb") as f:
            hashes[name] = hashlib.file_digest(f, "sha256").hexdigest()
    return hashes


def package_bytes(path: Path) -> int:
    """Return the bytes of program and weights."""
    return sum((path / name).stat().st_size for name in (MODEL, WEIGHTS))


def read_package(path: str | Path) -> Package:
    """Read a package, or raise PackageError in one line."""
    path = Path(path)
    try:
        for name, limit in MAX_BYTES.items():
            if (size := (path / name).stat().st_size) > limit:
                raise PackageError(f"{name} has {size} bytes, more than any export")
        check_listing(json.loads((path / LISTING).read_bytes()))
        model = wire.read_message((path / MODEL).read_bytes())
        weights = np.memmap(path / WEIGHTS, np.uint8, "r")
        default = model["description"].get("default") or "main"
        return Package(path, package_functions(model), default, weights)
    except OSError as e:
        name = Path(e.filename or "").name
        raise PackageError(f"{path}: {name}: {e.strerror}; export it again") from None
    except UserError as e:
        raise PackageError(f"{path}: {e}") from None
    except (LookupError, AttributeError, TypeError, ValueError, RecursionError, OverflowError) as e:
        raise PackageError(
            f"{path}: not an ML program that can be read ({e}); export it again"
        ) from None


def check_listing(listing: dict[str, Any]) -> None:
    """Require that the listing, which CoreML follows, names the model that we read."""
    items = listing["itemInfoEntries"]
    named = f"Data/{items[listing['rootModelIdentifier']]['path']}"
    if named != MODEL:
        raise PackageError(f"its {LISTING} names {named!r:.60} as the model, not {MODEL}")


def package_functions(model: dict[str, Any]) -> dict[str, PackageFunction]:
    """Return the functions of a model; require that description and program agree."""
    description = model["description"]
    described = {one["name"]: one for one in description.get("functions", [])}
    described = described or {"main": description}
    program = model["program"]["functions"]
    if described.keys() != program.keys():
        raise PackageError(
            f"it describes functions {', '.join(described)}, but holds {', '.join(program)}"
        )
    return {name: package_function(name, one, program[name]) for name, one in described.items()}


def package_function(
    name: str, description: dict[str, Any], function: dict[str, Any]
) -> PackageFunction:
    """Return one function; its described inputs and outputs must be those that it declares."""
    block = function["blocks"].get(function.get("opset", ""))
    if not block:
        raise PackageError(f"function {name} has no body for {function.get('opset')}")
    inputs = {f["name"]: input_feature(f) for f in description.get("inputs", [])}
    types = {f["name"]: f["type"] for f in function.get("inputs", [])}
    states = {n: tensor_type(t["state"]["type"]) for n, t in types.items() if "state" in t}
    check_states(name, states, description.get("states", []))
    declared = {n: tensor_type(t) for n, t in types.items() if n not in states}
    if declared.keys() != inputs.keys():
        raise PackageError(f"function {name} describes other inputs than it has")
    for input_name, feature in inputs.items():
        own = declared[input_name]
        if feature.number != own.number.name or not all(
            len(shape) == len(own.shape)
            and all(
                n is None or n == low == high
                for n, (low, high) in zip(own.shape, shape, strict=True)
            )
            for shape in feature.shapes
        ):
            raise PackageError(f"input {input_name} is described as {feature}, but declared {own}")
    types |= {
        o["name"]: o["type"] for op in block.get("operations", []) for o in op.get("outputs", [])
    }
    outputs = {n: tensor_type(types[n]) for n in block.get("outputs", [])}
    wanted = {f["name"]: feature_number(f) for f in description.get("outputs", [])}
    if {n: t.number.name for n, t in outputs.items()} != wanted:
        raise PackageError(f"function {name} describes other outputs than it has")
    return PackageFunction(name, inputs, outputs, states, block)


def check_states(name: str, states: dict[str, TensorType], described: list[dict[str, Any]]) -> None:
    """Require that the states of a function have fixed shapes, and are those described."""
    own = {n: (t.number.name, t.shape) for n, t in states.items()}
    arrays = {f["name"]: f["type"]["state"]["array"] for f in described}
    wanted = {
        n: (FEATURE_TYPES.get(a.get("dtype", 0)), tuple(a.get("shape", [])))
        for n, a in arrays.items()
    }
    if own != wanted or any(None in t.shape for t in states.values()):
        raise PackageError(f"function {name} describes other states than it has")


def feature_number(feature: dict[str, Any]) -> str:
    """Return the name of the number type of a described input or output."""
    code = feature["type"]["array"].get("dtype", 0)
    if code not in FEATURE_TYPES:
        raise PackageError(f"{feature['name']} has numbers of an unknown type {code}")
    return FEATURE_TYPES[code]


def input_feature(feature: dict[str, Any]) -> InputFeature:
    """Return a described input with the shapes that it accepts."""
    array = feature["type"]["array"]
    if "enumerated" in array:
        shapes = [[(n, n) for n in one["shape"]] for one in array["enumerated"]["shapes"]]
    elif "ranges" in array:
        shapes = [[(one.get("low", 0), one.get("high", 0)) for one in array["ranges"]["ranges"]]]
    else:
        shapes = [[(n, n) for n in array.get("shape", [])]]
    return InputFeature(feature_number(feature), tuple(map(tuple, shapes)))


def tensor_type(value_type: dict[str, Any]) -> TensorType:
    """Return the type of a tensor; require a known number type and a shape of a sane size."""
    tensor = value_type["tensor"]
    if tensor.get("dtype") not in NUMBER_TYPES:
        raise PackageError(f"numbers of an unknown type {tensor.get('dtype')}")
    shape = tuple(
        None if "unknown" in d else d["constant"].get("size", 0) for d in tensor.get("dims", [])
    )
    if len(shape) != tensor.get("rank", 0) or any(n is not None and n < 0 for n in shape):
        raise PackageError("a tensor whose rank or lengths make no sense")
    if math.prod(n or 1 for n in shape) > MAX_ELEMENTS:
        raise PackageError(f"a tensor of shape {shape}")
    return TensorType(NUMBER_TYPES[tensor["dtype"]], shape)


class ConvWeights(NamedTuple):
    """The weights of one convolution."""

    name: str
    elements: int
    plain: bool  # stored as the numbers that are multiplied, not compressed


def conv_weights(package: Package) -> dict[str, ConvWeights]:
    """Return the weights of each convolution of the default function, by the conv's output name."""
    operations = package.functions[package.default].body["operations"]
    sources = {
        output["name"]: (op, output) for op in operations for output in op.get("outputs", [])
    }
    weights = {}
    for op in operations:
        if op["type"] == "conv":
            name = op["inputs"]["weight"]["bindings"][0]["name"]
            source, output = sources[name]
            elements = math.prod(tensor_type(output["type"]).shape)
            weights[op["outputs"][0]["name"]] = ConvWeights(
                name, elements, source["type"] == "const"
            )
    return weights


# ==== CONSTANTS ===================================================================================
def program_constant(value: dict[str, Any], weights: np.ndarray) -> Any:
    """Return a constant, a tensor or a string, from the program itself or from weight.bin."""
    if "list" in value["type"]:
        items = value["immediate"].get("list", {}).get("values", [])
        return [program_constant(one, weights) for one in items]
    if value["type"]["tensor"].get("dtype") == STRING:
        return value["immediate"]["tensor"]["strings"]["values"][0]
    number, shape = tensor_type(value["type"])
    if None in shape:
        raise PackageError("a constant without a fixed shape")
    if "blob" in value:
        return weights_from_blob(value["blob"], number, shape, weights)
    content = value["immediate"]["tensor"]
    if "bytes" in content:
        data = np.frombuffer(content["bytes"].get("values", b""), np.uint8)
        return unpack_numbers(data, number, shape)
    numbers = next((part.get("values", []) for part in content.values()), [])
    if len(numbers) != math.prod(shape):
        raise PackageError(f"{len(numbers)} numbers for a tensor of shape {shape}")
    exact = np.float64 if number.name.startswith("fp") else np.int64
    return np.array(numbers, exact).astype(number.dtype).reshape(shape)


def weights_from_blob(
    blob: dict[str, Any], number: NumberType, shape: tuple[int, ...], weights: np.ndarray
) -> np.ndarray:
    """Return the tensor that an entry of weight.bin holds; check every field of the entry."""
    if blob.get("file") != "@model_path/weights/weight.bin":
        raise PackageError(f"weights in {blob.get('file')!r:.60}")
    at = blob.get("offset", 0)
    if not 0 <= at <= len(weights) - BLOB_BYTES:
        raise PackageError(
            f"weight.bin has {len(weights)} bytes and no entry at {at}: it was cut short"
        )
    entry = weights[at : at + BLOB.size].tobytes()
    sentinel, code, size, offset, unused_bits = BLOB.unpack(entry)
    if sentinel != SENTINEL or code != number.blob_code:
        raise PackageError(f"the entry at {at} of weight.bin is no {number.name}: damaged")
    wanted = -(-math.prod(shape) * number.bits // 8)
    if size != wanted or offset > len(weights) - size or unused_bits >= 8:
        raise PackageError(
            f"the entry at {at} of weight.bin has {size} bytes, not {wanted}: damaged"
        )
    return unpack_numbers(weights[offset : offset + size], number, shape)


def unpack_numbers(data: np.ndarray, number: NumberType, shape: tuple[int, ...]) -> np.ndarray:
    """Return numbers from bytes; numbers narrower than a byte are packed from its lowest bit up."""
    count = math.prod(shape)
    if len(data) != -(-count * number.bits // 8):
        raise PackageError(f"{len(data)} bytes for {number.name} of shape {shape}")
    if number.bits >= 8:
        return data.view(np.uint8).copy().view(number.dtype).reshape(shape)
    bits = np.unpackbits(data, bitorder="little")[: count * number.bits]
    codes = bits.reshape(count, number.bits) @ (1 << np.arange(number.bits, dtype=np.uint8))
    if number.name == "int4":
        codes = codes.astype(np.int8) - 16 * (codes >= 8).astype(np.int8)
    return codes.astype(number.dtype).reshape(shape)
