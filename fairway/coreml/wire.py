"""Read protocol buffers: only the messages and fields that an ML program needs.

The schema names the fields that are read; all others are skipped. A message becomes a dictionary:
an absent field is an absent key, a repeated field is a list, a map is a dictionary. Field numbers
are those of Apple's public .proto files (coremltools, mlmodel/format).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count
from typing import Any

MAX_DEPTH = 64
MAX_MESSAGES = 1 << 20


class WireError(ValueError):
    """The bytes are not a message of this kind."""


# message -> field number -> (name, type); "[]" marks a repeated field, "{}" a map from strings.
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
    "FeatureType": {5: ("array", "ArrayFeature"), 8: ("state", "StateFeature")},
    "StateFeature": {1: ("array", "ArrayFeature")},
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
    "ValueType": {
        1: ("tensor", "TensorType"),
        2: ("list", "ListType"),
        5: ("state", "StateType"),
    },
    "StateType": {1: ("type", "ValueType")},
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


def read_message(data: bytes, message: str = "Model") -> dict[str, Any]:
    """Parse `data` as a message of SCHEMA and return it as a dictionary."""
    return parse_message(data, message, 0, count())


def parse_message(data: bytes, message: str, depth: int, counter: Iterator[int]) -> dict[str, Any]:
    """Parse one message; `depth` and `counter` bound the work that a hostile file can cause."""
    if depth > MAX_DEPTH or next(counter) >= MAX_MESSAGES:
        raise WireError("messages are nested too deep, or there are too many")
    parsed: dict[str, Any] = {}
    for number, wire, value in message_fields(data):
        if number not in SCHEMA[message]:
            continue
        name, kind = SCHEMA[message][number]
        if kind.endswith("{}"):
            key, inner = map_entry(value, wire)
            parsed.setdefault(name, {})[key] = parse_message(inner, kind[:-2], depth + 1, counter)
        elif kind.endswith("[]"):
            parsed.setdefault(name, []).extend(field_values(kind[:-2], wire, value, depth, counter))
        elif values := field_values(kind, wire, value, depth, counter):
            parsed[name] = values[-1]  # of a single field that occurs twice, the last one counts
        else:
            parsed[name] = None
    return parsed


def map_entry(value: Any, wire: int) -> tuple[str, bytes]:
    """Return the key of a map entry and the bytes of its value."""
    parts: dict[int, Any] = {1: b"", 2: b""}
    for number, inner_wire, inner in message_fields(field_bytes(value, wire)):
        if number in parts:
            parts[number] = field_bytes(inner, inner_wire)
    return utf8_text(parts[1]), parts[2]


def field_values(kind: str, wire: int, value: Any, depth: int, counter: Iterator[int]) -> list[Any]:
    """Return the values of one field: one value, or many if numbers are packed."""
    if kind == "int":
        values = [value] if wire == 0 else parse_varints(field_bytes(value, wire))
        return [to_signed(v) for v in values]
    if kind == "float":
        data = value if wire == 5 else field_bytes(value, wire)
        if len(data) % 4:
            raise WireError("floats are cut short")
        return list(struct.unpack(f"<{len(data) // 4}f", data))
    data = field_bytes(value, wire)
    if kind in ("string", "bytes"):
        return [utf8_text(data) if kind == "string" else data]
    return [parse_message(data, kind, depth + 1, counter)]


def message_fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    """Yield (field number, wire type, value): an integer for wire type 0, bytes for 1, 2 and 5."""
    at, end = 0, len(data)
    while at < end:
        tag, at = parse_varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = parse_varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(wire, -1)
            if wire == 2:
                size, at = parse_varint(data, at)
            if not 0 <= size <= end - at:
                raise WireError(f"a field of wire type {wire} runs past the end")
            value, at = data[at : at + size], at + size
        yield number, wire, value


def parse_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the unsigned 64-bit integer at offset `at`, and the offset after it."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value & (1 << 64) - 1, at
    raise WireError("a number is cut short, or too long")


def parse_varints(data: bytes) -> Iterator[int]:
    """Yield the packed integers of `data`."""
    at = 0
    while at < len(data):
        value, at = parse_varint(data, at)
        yield value


def to_signed(value: int) -> int:
    """Read an unsigned 64-bit integer as two's complement."""
    return value - (1 << 64) if value >> 63 else value


def field_bytes(value: Any, wire: int) -> bytes:
    """Return the bytes of a length-delimited field; raise WireError for any other wire type."""
    if wire != 2:
        raise WireError(f"a field has wire type {wire} where bytes should be")
    return value


def utf8_text(data: bytes) -> str:
    """Decode UTF-8, or raise WireError."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise WireError("a text is not UTF-8") from None
