"""Protocol buffers as bytes: just enough to read an ML program, and nothing that is not asked for.

A schema names the fields of each message that are read; all others are passed over. What comes out is dictionaries:
absent fields are absent, repeated ones are lists, maps are dictionaries. The field numbers are those of Apple's public
.proto files (coremltools, mlmodel/format)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count
from typing import Any

MOST_DEPTH = 64
MOST_MESSAGES = 1 << 20


class WireError(ValueError):
    """These bytes are no such message."""


# message: number: (name, what it is); "[]" repeats, "{}" is a map from strings.
SCHEMA: dict[str, dict[int, tuple[str, str]]] = {
    "Model": {
        1: ("version", "int"),
        2: ("description", "Description"),
        502: ("program", "Program"),
    },
    "Description": {
        1: ("inputs", "Feature[]"),
        10: ("outputs", "Feature[]"),
        13: ("states", "Feature[]"),
        20: ("functions", "FunctionDescription[]"),
        21: ("default", "string"),
    },
    "FunctionDescription": {
        1: ("name", "string"),
        2: ("inputs", "Feature[]"),
        3: ("outputs", "Feature[]"),
        6: ("states", "Feature[]"),
    },
    "Feature": {1: ("name", "string"), 3: ("type", "FeatureType")},
    "FeatureType": {5: ("array", "ArrayFeature")},
    "ArrayFeature": {
        1: ("shape", "int[]"),
        2: ("dtype", "int"),
        21: ("enumerated", "FeatureShapes"),
        31: ("ranges", "FeatureRanges"),
    },
    "FeatureShapes": {1: ("shapes", "FeatureShape[]")},
    "FeatureShape": {1: ("shape", "int[]")},
    "FeatureRanges": {1: ("ranges", "SizeRange[]")},
    "SizeRange": {1: ("low", "int"), 2: ("high", "int")},
    "Program": {1: ("version", "int"), 2: ("functions", "Function{}")},
    "Function": {1: ("inputs", "Named[]"), 2: ("opset", "string"), 3: ("blocks", "Block{}")},
    "Named": {1: ("name", "string"), 2: ("type", "ValueType")},
    "ValueType": {1: ("tensor", "TensorType"), 2: ("list", "ListType")},
    "TensorType": {1: ("dtype", "int"), 2: ("rank", "int"), 3: ("dims", "Dimension[]")},
    "ListType": {1: ("type", "ValueType")},
    "Dimension": {1: ("constant", "Constant"), 2: ("unknown", "Unknown")},
    "Constant": {1: ("size", "int")},
    "Unknown": {},
    "Block": {
        1: ("inputs", "Named[]"),
        2: ("outputs", "string[]"),
        3: ("operations", "Operation[]"),
    },
    "Operation": {
        1: ("type", "string"),
        2: ("inputs", "Argument{}"),
        3: ("outputs", "Named[]"),
        4: ("blocks", "Block[]"),
        5: ("attributes", "Value{}"),
    },
    "Argument": {1: ("bindings", "Binding[]")},
    "Binding": {1: ("name", "string"), 2: ("value", "Value")},
    "Value": {2: ("type", "ValueType"), 3: ("immediate", "Immediate"), 5: ("blob", "Blob")},
    "Immediate": {1: ("tensor", "TensorValue"), 3: ("list", "ListValue")},
    "ListValue": {1: ("values", "Value[]")},
    "TensorValue": {
        1: ("floats", "Floats"),
        2: ("ints", "Ints"),
        3: ("bools", "Ints"),
        4: ("strings", "Strings"),
        5: ("longs", "Ints"),
        7: ("bytes", "Bytes"),
    },
    "Floats": {1: ("values", "float[]")},
    "Ints": {1: ("values", "int[]")},
    "Strings": {1: ("values", "string[]")},
    "Bytes": {1: ("values", "bytes")},
    "Blob": {1: ("file", "string"), 2: ("offset", "int")},
}


def read(data: bytes, message: str = "Model") -> dict[str, Any]:
    """The message as a dictionary."""
    return message_of(data, message, 0, count())


def message_of(data: bytes, message: str, depth: int, counted: Iterator[int]) -> dict[str, Any]:
    if depth > MOST_DEPTH or next(counted) >= MOST_MESSAGES:
        raise WireError("messages lie too deep in one another, or are too many")
    found: dict[str, Any] = {}
    for number, wire, value in fields(data):
        if number not in SCHEMA[message]:
            continue
        name, kind = SCHEMA[message][number]
        if kind.endswith("{}"):
            key, inner = entry(value, wire)
            found.setdefault(name, {})[key] = message_of(inner, kind[:-2], depth + 1, counted)
        elif kind.endswith("[]"):
            found.setdefault(name, []).extend(values_of(kind[:-2], wire, value, depth, counted))
        else:
            *_, found[name] = [
                None,
                *values_of(kind, wire, value, depth, counted),
            ]  # the last one counts
    return found


def entry(value: Any, wire: int) -> tuple[str, bytes]:
    """Key and value of one of a map."""
    parts: dict[int, Any] = {1: b"", 2: b""}
    for number, inner_wire, inner in fields(bytes_of(value, wire)):
        if number in parts:
            parts[number] = bytes_of(inner, inner_wire)
    return text(parts[1]), parts[2]


def values_of(kind: str, wire: int, value: Any, depth: int, counted: Iterator[int]) -> list[Any]:
    """One value, or many packed numbers."""
    if kind == "int":
        return [signed(value)] if wire == 0 else [signed(v) for v in varints(bytes_of(value, wire))]
    if kind == "float":
        data = value if wire == 5 else bytes_of(value, wire)
        if len(data) % 4:
            raise WireError("floats are cut short")
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    data = bytes_of(value, wire)
    if kind in ("string", "bytes"):
        return [text(data) if kind == "string" else data]
    return [message_of(data, kind, depth + 1, counted)]


def fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value): an integer of type 0, bytes of 1, 2 and 5."""
    at, end = 0, len(data)
    while at < end:
        tag, at = varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = varint(data, at)
        else:
            size, at = (
                (8, at)
                if wire == 1
                else (4, at)
                if wire == 5
                else varint(data, at)
                if wire == 2
                else (-1, at)
            )
            if not 0 <= size <= end - at:
                raise WireError(f"a field of wire type {wire} has no room")
            value, at = data[at : at + size], at + size
        yield number, wire, value


def varint(data: bytes, at: int) -> tuple[int, int]:
    found = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        found |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return found & (1 << 64) - 1, at
    raise WireError("a number is cut short, or too long")


def varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = varint(data, at)
        yield value


def signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def bytes_of(value: Any, wire: int) -> bytes:
    if wire != 2:
        raise WireError(f"a field has wire type {wire} where bytes should be")
    return value


def text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise WireError("a text is not UTF-8") from None
