"""Protocol buffers are read back; cut, too deep or wrongly typed messages are refused."""

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.coreml import wire
from fairway.coreml.wire import WireError


# ---- A small encoder -----------------------------------------------------------------------------
def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def number(at: int, value: int) -> bytes:
    return varint(at << 3) + varint(value)


# ---- Reading -------------------------------------------------------------------------------------
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9))
def test_integers_are_read_packed_or_one_by_one(values):
    packed, single = field(1, b"".join(map(varint, values))), b"".join(number(1, v) for v in values)
    assert wire.read_message(packed, "Ints").get("values", []) == values
    assert wire.read_message(single, "Ints").get("values", []) == values


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_floats_are_read_packed_or_one_by_one(values):
    data = struct.pack(f"<{len(values)}f", *values)
    assert wire.read_message(field(1, data), "Floats").get("values", []) == values
    assert (
        wire.read_message(
            b"".join(varint(1 << 3 | 5) + struct.pack("<f", v) for v in values), "Floats"
        ).get("values", [])
        == values
    )


short_bytes = st.binary(max_size=9)


@given(
    st.dictionaries(st.text(max_size=5), short_bytes, max_size=4),
    st.integers(300, 500),
    short_bytes,
)
def test_maps_are_read_and_unknown_fields_skipped(attributes, unknown, junk):
    values = {
        name: field(3, field(1, field(7, field(1, data)))) for name, data in attributes.items()
    }
    data = field(1, b"const") + b"".join(
        field(5, field(1, name.encode()) + field(2, v)) for name, v in values.items()
    )
    data += field(unknown, junk) + number(unknown, 7) + varint(unknown << 3 | 1) + bytes(8)
    found = wire.read_message(data, "Operation")
    assert found["type"] == "const"
    held = {n: v["immediate"]["tensor"]["bytes"] for n, v in found.get("attributes", {}).items()}
    assert {n: of.get("values", b"") for n, of in held.items()} == attributes


def test_the_last_occurrence_of_a_single_field_counts():
    assert wire.read_message(number(1, 3) + number(1, 4), "Program") == {"version": 4}


MODEL = field(
    502,
    number(1, 1)
    + field(
        2,
        field(1, b"main")
        + field(
            2,
            field(2, b"CoreML8")
            + field(
                3, field(1, b"CoreML8") + field(2, field(2, b"x") + field(3, field(1, b"relu")))
            ),
        ),
    ),
)


@given(st.integers(1, len(MODEL) - 1))
def test_a_truncated_message_is_refused_or_incomplete(cut):
    try:
        found = wire.read_message(MODEL[:cut])
    except WireError:
        return
    assert found != wire.read_message(MODEL)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_dictionary_or_a_wire_error(data):
    with contextlib.suppress(WireError):
        assert type(wire.read_message(data)) is dict


def test_depth_and_lengths_are_bounded(monkeypatch):
    deep = b""
    for _ in range(300):
        deep = field(4, field(3, deep))  # a block in an operation in a block
    with pytest.raises(WireError, match="nested too deep"):
        wire.read_message(deep, "Operation")
    monkeypatch.setattr(wire, "MAX_MESSAGES", 1000)
    assert len(wire.read_message(field(3, b"") * 999, "Block")["operations"]) == 999
    with pytest.raises(WireError, match="too many"):
        wire.read_message(field(3, b"") * 1000, "Block")
    with pytest.raises(WireError, match="runs past the end"):
        wire.read_message(varint(502 << 3 | 2) + varint(1 << 40) + b"x")
    with pytest.raises(WireError, match="cut short, or too long"):
        wire.read_message(b"\xff" * 11)
    with pytest.raises(WireError, match="not UTF-8"):
        wire.read_message(field(2, b"\xff"), "Function")
    with pytest.raises(WireError, match="bytes should be"):
        wire.read_message(number(2, 5), "Function")
