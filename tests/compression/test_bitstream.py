"""The bitstream's container: what is written comes back, and damage or forgery ends in one line."""

import contextlib
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.compression.bitstream import (
    CHOICES,
    EXPERT_SETTINGS,
    FIELDS,
    MOST_NAME_BYTES,
    PLACES,
    SETTINGS,
    Header,
    Machine,
    bitstream_bytes,
    changed_settings,
    check_file_name,
    parse_bitstream,
    read_bitstream,
)
from fairway.compression.leb128 import read_number, write_number
from fairway.compression.token_coder import BitstreamError
from fairway.scoring.settings import EvalConfig
from train_gpt import UserError

# ==== THE FILE ====================================================================================
HEADER = Header(
    b"\xab" * 12,
    b"\xcd" * 12,
    Machine((2, 13, 0), 2, 200),
    2,
    9,
    1,
    (("a.txt", 5), ("日本.bin", 7)),
    {"ngram_orders": 4, "mix_mode": "log", "mix_rate": 0.25},
)
PROOF = HEADER._replace(streams=1, count=20_000, first=300, files=None, experts={})
PAYLOAD = b"8 bytes!"


def number(n: int, more: int = 0) -> bytes:
    """Write LEB128 as docs/BITSTREAM.md says, with `more` bytes than it needs."""
    digits = [n >> 7 * i & 127 for i in range(max(1, -(-n.bit_length() // 7)) + more)]
    return bytes([128 | d for d in digits[:-1]] + digits[-1:])


def forged(**changed) -> bytes:
    """Write HEADER and PAYLOAD as docs/BITSTREAM.md says, with some parts replaced."""
    parts = dict(
        flags=b"\x02",
        artifact=b"\xab" * 12,
        digest=b"\xcd" * 12,
        torch=bytes([2, 13, 0]),
        device=b"\x02",
        threads=number(200),
        streams=number(2),
        count=number(9),
        files=number(2),
        name=number(5) + b"a.txt",
        size=number(5),
        name2=number(10) + "日本.bin".encode(),
        size2=number(7),
        settings=number(3),
        orders=b"\x05" + number(4),
        mode=b"\x09" + number(1),
        rate=b"\x0e" + struct.pack("<d", 0.25),
        payload=PAYLOAD,
    )
    rest = b"".join((parts | changed).values())
    return b"FWY\x01" + zlib.crc32(rest).to_bytes(4, "little") + rest


def refusal(data: bytes) -> str:
    with pytest.raises(BitstreamError) as e:
        parse_bitstream(data, "f.fwy")
    assert (
        "\n" not in str(e.value) and str(e.value).startswith("f.fwy: ") and len(str(e.value)) < 400
    )
    return str(e.value)


def test_a_file_comes_back(tmp_path):
    (tmp_path / "f.fwy").write_bytes(bitstream_bytes(HEADER, PAYLOAD))
    header, payload = read_bitstream(tmp_path / "f.fwy")
    assert (
        header == HEADER
        and payload == PAYLOAD
        and header.first_tokens().tolist() == [1, 1]
        and header.size == 12
    )
    assert header.settings() == EvalConfig(ngram_orders=4, mix_mode="log", mix_rate=0.25)
    assert forged() == bitstream_bytes(HEADER, PAYLOAD)
    for other in (
        PROOF,
        HEADER._replace(experts=None),
        PROOF._replace(experts={"expert_reset": True}),
    ):
        assert parse_bitstream(bitstream_bytes(other, b""), "f") == (other, b"")
    assert (
        PROOF.first_tokens().tolist() == [300] and HEADER._replace(experts=None).settings() is None
    )
    assert (
        str(HEADER.made_on) == "torch 2.13.0, cpu, AVX512, 200 threads"
        and HEADER.made_on.kind == "cpu"
    )


def test_a_proofs_header_leaves_room_in_64_bytes():
    """A file may exceed its claim by 64 bytes: for the header and the coder's last words."""
    assert len(bitstream_bytes(PROOF, b"")) <= 48


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "eval_mode": st.just("cached"),
            "eval_seq_len": st.integers(64, 65_536),
            "eval_documents": st.just(True),
            "ntk_rope": st.just(False),
            "ngram_orders": st.integers(1, 5),
            "mix_weights": st.sampled_from(["em", "exponential"]),
            "mix_lr": st.floats(0, 0.9),
            "mix_guard": st.floats(1, 10),
            "match_least": st.integers(9, 64),
        },
    )
)
def test_a_header_holds_the_settings_that_differ(settings):
    cfg = EvalConfig(**settings, checkpoint="elsewhere", device="cpu")
    assert changed_settings(cfg, SETTINGS) == settings
    assert (
        parse_bitstream(bitstream_bytes(PROOF._replace(experts=settings), b""), "f")[0].experts
        == settings
    )
    assert set(changed_settings(cfg, EXPERT_SETTINGS)) == {
        n for n in settings if not n.startswith(("eval", "ntk"))
    }
    assert changed_settings(None, SETTINGS) is None


# Place, setting, default and choices, as docs/BITSTREAM.md lists them for version 1.
VERSION_1 = [
    ("eval_mode", "sliding", ("sliding", "cached")),
    ("eval_seq_len", 0, ()),
    ("eval_stride", 64, ()),
    ("eval_documents", False, ()),
    ("ntk_rope", True, ()),
    ("ngram_orders", 6, ()),
    ("ngram_memory_mb", 2304, ()),
    ("match_least", 8, ()),
    ("expert_reset", False, ()),
    ("mix_mode", "linear", ("linear", "log")),
    ("mix_weights", "sets", ("exponential", "share", "em", "sets", "gate")),
    ("mix_lr", 1.0, ()),
    ("mix_floor", 0.01, ()),
    None,  # was MIX_SHARE
    ("mix_rate", 0.05, ()),
    ("mix_neural", 0.5, ()),
    ("mix_guard", 0.0001, ()),
]


def test_places_defaults_and_choices_are_those_of_version_1():
    """Files hold settings by place and value: a change must raise the format's version."""
    assert VERSION_1 == [name and (name, FIELDS[name].default, CHOICES[name]) for name in PLACES]
    assert list(EXPERT_SETTINGS) == [place[0] for place in VERSION_1[5:] if place]
    assert list(SETTINGS) == [place[0] for place in VERSION_1 if place]
    assert all(set(f.metadata["choices"]) <= set(CHOICES[name]) for name, f in FIELDS.items())


# Files written before settings had roles: a text with experts, a proof, and a text without.
ARTIFACT, EMPTY_DIGEST = bytes(range(12)), bytes.fromhex("e3b0c44298fc1c149afbf4c8")
MACHINE = Machine((2, 13, 0), 2, 1)
GOLDEN = [
    (
        "465759010c9610c402000102030405060708090a0be3b0c44298fc1c149afbf4c8020d0002010101020965"
        "6d7074792e7478740006e697a5e69cac000409010a020e000000000000d03f0801",
        Header(
            *(ARTIFACT, EMPTY_DIGEST, MACHINE, 1, 1, 1, (("empty.txt", 0), ("日本", 0))),
            {"mix_mode": "log", "mix_weights": "em", "mix_rate": 0.25, "expert_reset": True},
        ),
        b"",
    ),
    (
        "465759017d969f3e03000102030405060708090a0b0c0d0e0f1011121314151617020d00020101a09c01ac"
        "0204000104000208070c3820627974657321",
        Header(
            *(ARTIFACT, bytes(range(12, 24)), MACHINE, 1, 20_000, 300, None),
            {"eval_mode": "cached", "ntk_rope": False, "eval_stride": 8, "match_least": 12},
        ),
        b"8 bytes!",
    ),
    (
        "465759013e407a4f00000102030405060708090a0be3b0c44298fc1c149afbf4c8020d0002010100010565"
        "6d70747900",
        Header(ARTIFACT, EMPTY_DIGEST, MACHINE, 1, 0, 1, (("empty", 0),), None),
        b"",
    ),
]


@pytest.mark.parametrize(("data", "header", "payload"), GOLDEN, ids=["experts", "proof", "text"])
def test_older_files_are_read_and_written_byte_for_byte(data, header, payload):
    assert parse_bitstream(bytes.fromhex(data), "f") == (header, payload)
    assert bitstream_bytes(header, payload).hex() == data


# Files of older code: a weight gate, and MIX_SHARE=0.25.
RETIRED = {
    "MIX_WEIGHTS is 'gate'": (
        "46575901ec332d2b02000102030405060708090a0be3b0c44298fc1c149afbf4c8020d"
        "00020101010209656d7074792e7478740006e697a5e69cac000409010a040e000000000000d03f0801"
    ),
    "setting 13 is unknown": (
        "46575901f8a3b20f02000102030405060708090a0be3b0c44298fc1c149afbf4c8020d"
        "00020101010209656d7074792e7478740006e697a5e69cac00010d000000000000d03f"
    ),
}


@pytest.mark.parametrize("message", RETIRED)
def test_settings_that_were_dropped_are_refused(message):
    with pytest.raises(BitstreamError, match=message):
        parse_bitstream(bytes.fromhex(RETIRED[message]), "f")


@given(st.data())
def test_any_damage_is_found(data):
    blob = bitstream_bytes(HEADER, PAYLOAD)
    at = data.draw(st.integers(0, len(blob) - 1))
    flipped = blob[:at] + bytes([blob[at] ^ data.draw(st.integers(1, 255))]) + blob[at + 1 :]
    more = blob[:at] + data.draw(st.binary(min_size=1, max_size=9)) + blob[at:]
    assert refusal(flipped) and refusal(blob[:at]) and (more == blob or refusal(more))


@given(st.binary(max_size=300))
def test_other_files_are_refused(data):
    sealed = b"FWY\x01" + zlib.crc32(data).to_bytes(4, "little") + data
    assert refusal(data) and refusal(b"FWY\x01" + data)
    with contextlib.suppress(
        BitstreamError
    ):  # under a right checksum, anything is a header or is refused
        header, payload = parse_bitstream(sealed, "f")
        assert bitstream_bytes(header, payload) == sealed


FORGED = {
    "unknown flags": (dict(flags=b"\x04"), "flags are 4"),
    "machine": (dict(device=b"\x09"), "no machine"),
    "no threads": (dict(threads=number(0)), "threads: 0"),
    "a million threads": (dict(threads=number(10**6)), "threads"),
    "no streams": (dict(streams=number(0)), "streams: 0"),
    "streams": (dict(streams=number(10**6)), "streams"),
    "huge count": (dict(count=number(1 << 62)), "tokens"),
    "count beyond the bytes": (dict(count=number(17)), "cannot be"),
    "fewer tokens than files": (dict(count=number(0)), "cannot be"),
    "a number of many bytes": (dict(count=number(9, 2)), "more bytes than it needs"),
    "a number without end": (dict(count=b"\x80" * 40), "no end"),
    "no files": (dict(files=number(0), name=b"", size=b"", name2=b"", size2=b""), "0 files"),
    "a million files": (dict(files=number(10**6)), "files"),
    "more files than there are": (dict(files=number(30)), ""),
    "a long name": (dict(name=number(250) + b"a" * 250), "file name"),
    "cut in a name": (dict(name=number(200)), ""),
    "the same name": (dict(name=number(10) + "日本.bin".encode()), "the same name"),
    "huge size": (dict(size=number(1 << 40)), "bytes of a file"),
    "half a character": (dict(name=number(2) + b"\xe6\x97"), "no file name"),
    "many settings": (dict(settings=number(99)), "settings"),
    "unknown setting": (dict(orders=b"\x63" + number(4)), "unknown"),
    "the same setting": (dict(mode=b"\x05" + number(3)), "twice"),
    "setting's range": (dict(orders=b"\x05" + number(17)), "NGRAM_ORDERS is 17"),
    "memory": (dict(orders=b"\x06" + number(1 << 19)), "at most"),
    "choice": (dict(mode=b"\x09" + number(7)), "MIX_MODE"),
    "no number": (dict(rate=b"\x0e" + struct.pack("<d", float("nan"))), "MIX_RATE"),
    "boolean": (dict(mode=b"\x08" + number(2)), "EXPERT_RESET"),
    "a default in full": (dict(orders=b"\x05" + number(6)), "default"),
}
EVIL = [
    "",
    ".",
    "..",
    "/etc/passwd",
    "../up",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b[2J",
    "\u202etxt",
    "a" * (MOST_NAME_BYTES + 1),
]


@pytest.mark.parametrize("case", FORGED)
def test_forged_headers_are_refused(case):
    changed, reason = FORGED[case]
    message = refusal(forged(**changed))
    assert reason in message and "does not match its checksum" not in message


@pytest.mark.parametrize("name", EVIL, ids=map(ascii, range(len(EVIL))))
def test_names_that_could_leave_the_folder_are_refused(name):
    assert refusal(forged(name=number(len(name.encode())) + name.encode()))
    with pytest.raises(UserError, match="is no plain file name"):
        check_file_name(name)


def test_every_cut_of_a_header_is_found_under_a_right_checksum():
    complete = forged(payload=b"")[8:]
    for at in range(len(complete)):
        assert "cut short" in refusal(
            b"FWY\x01" + zlib.crc32(complete[:at]).to_bytes(4, "little") + complete[:at]
        )


def test_another_version_and_a_file_that_is_too_large(tmp_path):
    assert "version 2; this reader knows 1" in refusal(b"FWY\x02" + forged()[4:])
    with open(tmp_path / "f.fwy", "wb") as f:
        f.truncate((1 << 31) + 1)
    with pytest.raises(BitstreamError, match="more than any bitstream has"):
        read_bitstream(tmp_path / "f.fwy")


def test_too_many_files_are_refused():
    files = tuple((f"{i}", 0) for i in range((1 << 16) + 1))
    with pytest.raises(BitstreamError, match="65537 files; a bitstream holds 1 to 65536"):
        bitstream_bytes(HEADER._replace(files=files, count=1 << 16), PAYLOAD)


# ==== LEB128 ======================================================================================
@given(st.integers(0, 2**63 - 1))
def test_numbers_come_back_in_as_few_bytes_as_they_need(value):
    data = write_number(value)
    assert data == number(value) and len(data) == max(1, -(-value.bit_length() // 7))
    assert read_number(b"x" + data + b"y", 1) == (value, 1 + len(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short"),
        (b"\x80" * 8, "cut short"),
        (b"\x80" * 9, "no end within 9 bytes"),
        (b"\x85\x00", "more bytes than it needs"),
    ],
)
def test_other_numbers_are_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_number(data, 0)
