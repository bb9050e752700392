"""Codecs are lossless and bounded, refuse damage by `CodecError`, and decode by integers alone."""

import functools
import tracemalloc

import brotli
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from train_gpt import (
    CODECS,
    TABLE_SUM,
    WEIGHTS,
    CodecError,
    byte_planes,
    decode_planes,
    encode_planes,
    joined_values,
)

each = pytest.mark.parametrize("name", list(CODECS))


@st.composite
def plane_lists(draw):
    planes = []
    for _ in range(draw(st.integers(0, 5))):
        rows = draw(st.sampled_from([0, 1, 2, 3, 5, 33, 40]))
        columns = draw(st.sampled_from([0, 1, 2, 7, 31, 32, 33, 70]))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        kind = draw(st.sampled_from(["uniform", "constant", "rows", "columns"]))
        if kind == "constant":
            plane = np.full((rows, columns), draw(st.integers(0, 255)))
        elif kind == "uniform":
            plane = rng.integers(0, draw(st.integers(1, 256)), (rows, columns))
        else:
            spread = (rows, 1) if kind == "rows" else (1, columns)
            plane = np.round(
                rng.normal(0, 9, (rows, columns)) * np.exp(rng.normal(0, 1, spread))
            ).astype(np.int64)
        planes.append((plane & 255).astype(np.uint8))
    return planes


def small_model() -> list[np.ndarray]:
    """Codes of a matrix whose rows differ, its halves, and a plane of nothing."""
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (64, 96)) * np.exp(rng.normal(0, 0.7, (64, 1)))
    codes = np.clip(np.round(w * 5), -31, 31).astype(np.int8).view(np.uint8)
    halves = rng.normal(1, 0.1, 48).astype(np.float16).view(np.uint16)
    return [
        codes,
        np.stack([halves >> 8, halves & 255]).astype(np.uint8),
        np.zeros((0, 3), np.uint8),
    ]


SHAPES = [p.shape for p in small_model()]


@functools.cache
def small_payload(name: str) -> bytes:
    return encode_planes(name, small_model())


def survives(name: str, payload: bytes, shapes) -> bool:
    """Return True if it decodes, False on CodecError; any other error propagates."""
    try:
        planes = decode_planes(name, payload, shapes)
    except CodecError:
        return False
    assert [p.shape for p in planes] == list(shapes) and all(p.dtype == np.uint8 for p in planes)
    return True


# ---- Lossless ------------------------------------------------------------------------------------


def test_each_is_registered_under_its_own_name():
    assert set(CODECS) == {
        "zstd",
        "brotli",
        "ans",
    }


@each
@given(planes=plane_lists())
def test_decode_inverts_encode(name, planes):
    shapes = [p.shape for p in planes]
    kept, payload = [p.copy() for p in planes], encode_planes(name, planes)
    back = decode_planes(name, payload, shapes)
    assert len(back) == len(planes) and all(
        np.array_equal(a, b) for a, b in zip(planes, back, strict=True)
    )
    assert all(b.flags.writeable for b in back)
    assert encode_planes(name, planes) == payload  # deterministic, and it left its arguments alone
    assert all(np.array_equal(a, b) for a, b in zip(planes, kept, strict=True))
    assert not survives(name, payload + b"\1", shapes)


@each
def test_nothing_is_no_bytes(name):
    for shapes in ([], [(0, 5)], [(3, 0), (0, 0)]):
        assert encode_planes(name, [np.zeros(s, np.uint8) for s in shapes]) == b""
        assert [p.shape for p in decode_planes(name, b"", shapes)] == shapes
        with pytest.raises(CodecError, match="bytes for no symbols"):
            decode_planes(name, b"\0", shapes)


@each
@pytest.mark.parametrize("symbol", [0, 1, 255])
def test_one_symbol(name, symbol):
    for shape in ((1, 1), (1, 1000), (1000, 1), (300, 300)):
        plane = np.full(shape, symbol, np.uint8)
        payload = encode_planes(name, [plane])
        assert (
            np.array_equal(decode_planes(name, payload, [shape])[0], plane) and len(payload) < 200
        )


@each
def test_planes_that_are_not_contiguous(name):
    plane = np.arange(8000).astype(np.uint8).reshape(80, 100)
    for view in (plane.T, plane[::-1], plane[:, ::3]):
        back = decode_planes(name, encode_planes(name, [view]), [view.shape])
        assert np.array_equal(back[0], view)


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
def test_values_of_16_bits_go_through_byte_planes(values):
    planes = byte_planes(np.array(values, "<u2"))
    assert planes.shape == (2, len(values)) and planes.dtype == np.uint8
    assert planes[:, 0].tolist() == [values[0] >> 8, values[0] & 255]
    assert joined_values(planes).tolist() == values


def test_brotli_ends_cleanly_at_any_size():
    rng = np.random.default_rng(0)
    for n in [*range(1, 40), 32751, 32752, 32753, 65535, 65536, 65537, 98256]:
        for plane in (np.zeros((1, n), np.uint8), rng.integers(0, 256, (1, n)).astype(np.uint8)):
            payload = encode_planes("brotli", [plane])
            assert np.array_equal(decode_planes("brotli", payload, [(1, n)])[0], plane)
            assert not survives("brotli", payload + b"x" * 9, [(1, n)])
            assert not survives("brotli", payload, [(1, n + 1)])
            assert n == 1 or not survives("brotli", payload, [(1, n - 1)])


def order_0_bytes(plane: np.ndarray) -> float:
    counts = np.bincount(plane.ravel())
    return float(-(counts * np.log2(np.maximum(counts, 1) / plane.size)).sum() / 8)


def test_layout_and_classes_pay():
    """Rows of different spread cost less than their order-0 entropy, transposed or not."""
    rng = np.random.default_rng(3)
    w = rng.normal(0, 6, (256, 256)) * np.exp(rng.normal(0, 0.8, (256, 1)))
    codes = np.clip(np.round(w), -31, 31).astype(np.int8).view(np.uint8)
    sizes = {name: len(encode_planes(name, [codes])) for name in CODECS}
    assert sizes["ans"] < min(0.97 * order_0_bytes(codes), sizes["zstd"], sizes["brotli"])
    assert abs(len(encode_planes("ans", [codes.T.copy()])) - sizes["ans"]) < 0.001 * sizes["ans"]


def test_equal_rows_cost_their_entropy():
    codes = (
        np.clip(np.round(np.random.default_rng(4).normal(0, 7, (512, 512))), -31, 31)
        .astype(np.int8)
        .view(np.uint8)
    )
    assert len(encode_planes("ans", [codes])) < 1.001 * order_0_bytes(codes) + 64


# ---- Damage --------------------------------------------------------------------------------------


@each
def test_truncation_at_every_length_is_refused(name):
    payload = small_payload(name)
    for n in range(len(payload)):
        assert not survives(name, payload[:n], SHAPES), n
    for extra in (b"\0", b"\0\0\0\0", b"\1\0\0\0", b"1234", payload):
        assert not survives(name, payload + extra, SHAPES)


@each
def test_other_shapes_are_refused(name):
    payload = small_payload(name)
    assert survives(name, payload, SHAPES)
    for shapes in (
        [],
        SHAPES[:1],
        [*SHAPES, (1, 1)],
        [(64, 95), *SHAPES[1:]],
        [(65, 96), *SHAPES[1:]],
        [(0, 0)] * 3,
    ):
        assert not survives(name, payload, shapes), shapes


@each
def test_changed_bytes(name):
    """Damaged bytes may decode or be refused, but never crash: a checksum guards the artifact."""
    good, rng = small_payload(name), np.random.default_rng(9)
    for i in range(min(len(good), 120)):
        for flip in (1, 128, 255):
            survives(name, good[:i] + bytes([good[i] ^ flip]) + good[i + 1 :], SHAPES)
    decoded = 0
    for _ in range(200):
        data = np.frombuffer(good, np.uint8).copy()
        at = rng.integers(0, len(data), rng.integers(1, 5))
        data[at] = rng.integers(0, 256, len(at))
        decoded += survives(name, data.tobytes(), SHAPES)
    assert decoded < 200


def test_ans_notices_damaged_symbols():
    """The coder's bottom word is found again only if every symbol before it was right."""
    good, rng = small_payload("ans"), np.random.default_rng(10)
    end = 4 + int.from_bytes(good[:4], "little")
    for _ in range(300):
        at, bit = rng.integers(end, len(good)), 1 << rng.integers(8)
        assert not survives("ans", good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :], SHAPES)


@each
@given(
    payload=st.binary(max_size=200),
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=4),
)
def test_any_bytes(name, payload, shapes):
    survives(name, payload, shapes)


@given(side=st.binary(max_size=40), repeat=st.integers(0, 700), words=st.binary(max_size=40))
def test_any_side_information(side, repeat, words):
    """Past brotli: any classes, layouts, tables and ids reach the ANS decoder."""
    packed = brotli.compress(side + bytes([7]) * repeat, quality=1)
    for shapes in ([(3, 40)], [(1, 1), (40, 33)]):
        survives("ans", len(packed).to_bytes(4, "little") + packed + words, shapes)


@given(
    count=st.integers(1, 3),
    beyond=st.integers(0, 1),
    seed=st.integers(0, 2**20),
    words=st.integers(0, 60),
)
def test_plausible_side_information(count, beyond, seed, words):
    rng = np.random.default_rng(seed)
    tables = rng.integers(0, 256, (count, 256)) * (rng.random((count, 256)) < rng.random())
    ids = rng.integers(0, count + beyond, 40)
    side = brotli.compress(
        bytes([count, 1, *tables.astype(np.uint8).ravel(), *ids.tolist()]), quality=1
    )
    survives("ans", len(side).to_bytes(4, "little") + side + rng.bytes(4 * words), [(40, 33)])


@pytest.mark.parametrize(
    ("name", "payload", "says"),
    [
        ("zstd", b"", "zstd: "),
        ("zstd", zstandard.compress(b"abcdefg"), "zstd: wrong size"),
        ("brotli", brotli.compress(b"abcdefg")[:-1], "brotli: truncated or too long"),
        ("brotli", brotli.compress(b"abcdefghi"), "brotli: truncated or too long"),
        ("brotli", brotli.compress(b"abcdefg"), "wrong number of symbols"),
        ("brotli", b"\xff" * 9, "brotli: "),
        ("ans", b"", "ans: truncated"),
        ("ans", b"\xff\xff\xff\xff", "ans: truncated"),
    ],
)
def test_a_refusal_says_why(name, payload, says):
    with pytest.raises(CodecError, match=f"^{says}"):
        decode_planes(name, payload, [(2, 4)])


def test_bombs_stay_bounded():
    """256 MiB of zeros take a few hundred bytes, which declare less, nothing, or the truth."""
    huge = bytes(2**28)
    liar = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(2**22)))
    assert liar[4] == 0x80  # window byte, then four bytes of content size: declare 64 instead
    liar[6:10] = (64).to_bytes(4, "little")
    zstd = zstandard.ZstdCompressor(level=1).compress(huge)
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(huge)
    packed = brotli.compress(huge, quality=1)
    del huge
    for name, payload in (
        ("zstd", zstd),
        ("zstd", unsized),
        ("zstd", bytes(liar)),
        ("brotli", packed),
        ("ans", len(packed).to_bytes(4, "little") + packed),
    ):
        tracemalloc.start()
        with pytest.raises(CodecError):
            decode_planes(name, payload, [(8, 8)])
        assert tracemalloc.get_traced_memory()[1] < 2**23, name
        tracemalloc.stop()


# ---- The format ----------------------------------------------------------------------------------


def reference_decode(payload: bytes, shapes) -> list[np.ndarray]:
    """The entropy coder's format in plain integers: what another language would do."""
    size = int.from_bytes(payload[:4], "little")
    side, raw = brotli.decompress(payload[4 : 4 + size]), payload[4 + size :]
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    full = [k for k, (rows, columns) in enumerate(shapes) if rows * columns]
    count, layouts = side[0], side[1 : 1 + len(full)]
    at, tables, last = 1 + len(full), [], 0
    for _ in range(count):
        weights = []
        for _ in range(256):
            last = (last + side[at]) & 255
            weights.append(last if last < 16 else (16 + last % 16) << (last // 16 - 1))
            at += 1
        frequencies = [1 + w * (2**24 - 256) // sum(weights) for w in weights]
        frequencies[weights.index(max(weights))] += 2**24 - sum(frequencies)
        tables.append(frequencies)
    state = 0
    for _ in range(min(2, len(words))):
        state = state << 32 | words.pop()
    planes = [np.zeros(shape, np.uint8) for shape in shapes]
    for k, layout in zip(full, layouts, strict=True):
        units = (planes[k].reshape(1, -1), planes[k], planes[k].T)[layout]
        ids, at = side[at : at + len(units)], at + len(units)
        for c in sorted(set(ids)):
            for i in (i for i, own in enumerate(ids) if own == c):
                for j in range(units.shape[1]):
                    slot, symbol, low = state % 2**24, 0, 0
                    while slot >= low + tables[c][symbol]:
                        low += tables[c][symbol]
                        symbol += 1
                    state = (state >> 24) * tables[c][symbol] + slot - low
                    if state < 2**32 and words:
                        state = state << 32 | words.pop()
                    units[i, j] = symbol
    assert state == 0x59415746 and not words and at == len(side)
    return planes


@given(planes=plane_lists())
def test_ans_matches_the_integer_reference(planes):
    if payload := encode_planes("ans", planes):
        back = reference_decode(payload, [p.shape for p in planes])
        assert all(np.array_equal(a, b) for a, b in zip(planes, back, strict=True))


def test_ans_matches_the_integer_reference_on_a_model():
    back = reference_decode(small_payload("ans"), SHAPES)
    assert all(np.array_equal(a, b) for a, b in zip(small_model(), back, strict=True))


def test_table_entries_are_small_floats():
    assert (
        WEIGHTS[:33].tolist() == [*range(32), 32] and WEIGHTS[33] == 34 and WEIGHTS[-1] == 31 << 14
    )
    assert (np.diff(WEIGHTS) > 0).all() and TABLE_SUM + 256 == 2**24


GOLDEN_PLANES = [
    np.array([[1, 2, 3, 3], [3, 2, 3, 3]], np.uint8),
    np.zeros((2, 0), np.uint8),
    np.full((1, 1), 200, np.uint8),
]
GOLDEN = {
    "zstd": "28b52ffd20094900000102030303020303c8",
    "brotli": "0f04800102030303020303c803",
    "ans": "190000001f0401f88f94abe5ce5c0204fcd7c07e7da15b20301f4aa20108bf0f58422a0000",
}


@each
def test_golden_bytes_decode(name):
    """Old artifacts stay readable. Zstd and Brotli may change, so only decoding is golden."""
    back = decode_planes(name, bytes.fromhex(GOLDEN[name]), [p.shape for p in GOLDEN_PLANES])
    assert all(np.array_equal(a, b) for a, b in zip(GOLDEN_PLANES, back, strict=True))


def test_golden_bytes_of_the_entropy_coder():
    """Both ways, but for how brotli packs the side information."""
    golden, now = bytes.fromhex(GOLDEN["ans"]), encode_planes("ans", GOLDEN_PLANES)
    parts = [(brotli.decompress(p[4 : 4 + p[0]]), p[4 + p[0] :]) for p in (golden, now)]
    assert parts[0] == parts[1] and parts[0][0][:3] == bytes(
        [1, 0, 0]
    )  # one class, both planes whole
