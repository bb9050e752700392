"""The coder against plain integers, with any predictor; the container against whoever damages or forges it."""

import contextlib
import dataclasses
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.compression.bitstream import (
    EXPERT_SETTINGS,
    MOST_NAME_BYTES,
    SETTINGS,
    WHOLE,
    BitstreamError,
    Header,
    MadeOn,
    check_name,
    decode_tokens,
    default_streams,
    described,
    encode_tokens,
    packed,
    read_bitstream,
    stream_sizes,
    unpacked,
    weights_of,
)
from fairway.scoring.settings import EvalConfig
from train_gpt import UserError


class Counting:
    """A real predictor: each stream counts its tokens; alpha is what a token has before it came."""

    def __init__(self, streams: int, vocab_size: int, alpha: float = 0.05):
        self.streams, self.seen, self.learnt = streams, np.full((streams, vocab_size), alpha), 0

    def probabilities(self) -> np.ndarray:
        return self.seen / self.seen.sum(axis=1, keepdims=True)

    def learn(self, tokens: np.ndarray) -> None:
        assert tokens.shape == (self.streams,) and tokens.dtype == np.int64
        self.seen[np.arange(self.streams), tokens] += 1
        self.learnt += 1


def some_tokens(n: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Some of them often, most of them hardly ever."""
    return np.minimum(np.random.default_rng(seed).geometric(0.2, n) - 1, vocab_size - 1).astype(
        np.uint16
    )


def plainly_decoded(predictor, payload: bytes, count: int) -> list[int]:
    """docs/BITSTREAM.md in Python's integers: frequencies, streams, range decoder."""
    words, top = list(struct.unpack(f"<{len(payload) // 4}I", payload)), 2**64
    take = lambda: words.pop(0) if words else 0  # noqa: E731
    low, span, point = 0, top - 1, take() << 32 | take()
    streams = [[] for _ in range(predictor.streams)]
    for n in range(count):
        b, step = n % predictor.streams, n // predictor.streams
        if b == 0:
            if step:
                predictor.learn(np.array([s[-1] for s in streams]))
            rows = predictor.probabilities().tolist()
        room = 2**24 - len(rows[b])
        frequencies = [int(p * room) for p in rows[b]]
        frequencies[rows[b].index(max(rows[b]))] += room - sum(frequencies)
        frequencies = [f + 1 for f in frequencies]
        scale = span >> 24
        at = ((point - low) % top) // scale
        token = before = 0
        while at >= before + frequencies[token]:
            before, token = before + frequencies[token], token + 1
        low, span = (low + scale * before) % top, scale * frequencies[token]
        if span < 2**32:
            low, span, point = (low << 32) % top, span << 32, (point << 32) % top | take()
        streams[b].append(token)
    assert not words
    return [token for stream in streams for token in stream]


# ---- Whole numbers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("V", [4, 300, 1024, 8192, 65536])
def test_frequencies_are_whole_and_sum_to_the_whole(V):
    rng = np.random.default_rng(V)
    for spread in (0.0, 1.0, 8.0, 60.0):
        p = np.exp(spread * rng.standard_normal((6, V)))
        p[0, : V // 2] = 0
        p /= p.sum(axis=1, keepdims=True) * (
            1 + rng.uniform(-9e-7, 9e-7, (6, 1))
        )  # as rough as may be
        weights = weights_of(p)
        assert (
            weights.dtype == np.float64
            and (weights == np.floor(weights)).all()
            and (weights >= 0).all()
        )
        assert (weights.sum(axis=1) == WHOLE - V).all()
        others = np.arange(V) != p.argmax(axis=1)[:, None]
        assert (weights == np.floor(p * (WHOLE - V)))[others].all()


def test_what_rounding_leaves_goes_to_the_first_of_the_most_probable():
    assert weights_of(np.full((1, 3), 1 / 3)).tolist() == [[5592405, 5592404, 5592404]]
    assert weights_of(np.array([[0, 1.0, 0], [0.2, 0.4, 0.4]])).tolist() == [
        [0, WHOLE - 3, 0],
        [3355442, 6710886, 6710885],
    ]


@pytest.mark.parametrize(
    "row", [[0.5, 0.5, np.nan], [0.5, 0.6, -0.1], [np.inf, 0, 0], [0.5, 0.49999, 0], [0, 0, 0]]
)
def test_what_are_no_probabilities(row):
    with pytest.raises(BitstreamError, match="gives no probabilities"):
        weights_of(np.array([[1.0, 0, 0], row]))


@pytest.mark.parametrize(
    ("V", "streams", "count"), [(4, 1, 90), (4, 7, 90), (300, 3, 61), (1024, 8, 40), (65536, 2, 12)]
)
def test_plain_integers_decode_the_payload(V, streams, count):
    """Of every vocabulary: nothing is rounded by the library, and each word is used."""
    for seed in range(3):
        tokens = some_tokens(count, V, seed)
        tokens[::9] = np.random.default_rng(seed).integers(0, V, len(tokens[::9]))
        payload = encode_tokens(Counting(streams, V), tokens)
        assert plainly_decoded(Counting(streams, V), payload, count) == tokens.tolist()


def test_golden_bytes():
    tokens = np.array([0, 1, 2, 3, 3, 3, 3, 0, 2], np.uint16)
    payload = encode_tokens(Counting(2, 4), tokens)
    assert payload.hex() == "78f4a33e3c9217dd"
    assert decode_tokens(Counting(2, 4), payload, 9).tolist() == tokens.tolist()


# ---- Lossless --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.sampled_from([4, 5, 300]), st.data())
def test_any_tokens_come_back(streams, V, data):
    tokens = np.array(data.draw(st.lists(st.integers(0, V - 1), max_size=60)), np.uint16)
    payload = encode_tokens(Counting(streams, V), tokens)
    back = decode_tokens(Counting(streams, V), payload, len(tokens))
    assert back.dtype == np.uint16 and np.array_equal(back, tokens)


def test_streams_follow_each_other_in_the_text():
    assert stream_sizes(10, 4).tolist() == [3, 3, 2, 2] and stream_sizes(2, 4).tolist() == [
        1,
        1,
        0,
        0,
    ]
    assert stream_sizes(0, 3).tolist() == [0, 0, 0] and stream_sizes(8, 4).tolist() == [2, 2, 2, 2]
    assert [default_streams(n) for n in (0, 1, 600, 5000, 10**9)] == [1, 1, 1, 9, 64]


@pytest.mark.parametrize(("count", "learnt"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_only_whole_steps_that_another_follows_are_learnt(count, learnt):
    tokens, told = some_tokens(count, 4), []
    encoder, decoder = Counting(4, 4), Counting(4, 4)
    payload = encode_tokens(encoder, tokens, told.append)
    assert encoder.learnt == learnt and sum(told) == count and max(told) <= 4
    assert np.array_equal(decode_tokens(decoder, payload, count, told.append), tokens)
    assert decoder.learnt == learnt and sum(told) == 2 * count


@pytest.mark.parametrize(("V", "most"), [(300, 1.0005), (1024, 1.001), (8192, 1.005)])
def test_whole_numbers_cost_next_to_nothing(V, most):
    tokens, counting, ideal = some_tokens(4000, V), Counting(8, V), 0.0
    for column in tokens.reshape(8, -1).T.astype(np.int64):
        ideal -= np.log2(counting.probabilities()[np.arange(8), column]).sum()
        counting.learn(column)
    assert ideal <= 8 * len(encode_tokens(Counting(8, V), tokens)) <= most * ideal + 64


# ---- Payloads that are not what they should be -----------------------------------------------------------------------
def test_damaged_payloads_end_in_an_error_or_in_other_tokens():
    """The container's checksum finds them; here they must only end, in as many tokens as were asked for."""
    payload, rng, refused = (
        encode_tokens(Counting(4, 300), some_tokens(400, 300)),
        np.random.default_rng(0),
        0,
    )
    for n in range(150):
        words = np.frombuffer(payload, "<u4").copy()
        words[rng.integers(len(words))] ^= np.uint32(1 << rng.integers(32))
        words = [words, words[: rng.integers(len(words))], np.append(words, words[:2])][n % 3]
        try:
            assert len(decode_tokens(Counting(4, 300), words.tobytes(), 400)) == 400
        except BitstreamError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 75


def test_a_payload_of_no_whole_words():
    with pytest.raises(BitstreamError, match="no whole number of words"):
        decode_tokens(Counting(1, 4), b"12345", 3)


def test_decoding_stops_when_the_bits_are_used_up():
    """However many tokens are promised: work and memory follow what the payload holds."""
    payload, counting = (
        encode_tokens(Counting(2, 300), some_tokens(300, 300)),
        Counting(2, 300, alpha=5),
    )
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="ends before its tokens do|does not decode"):
        decode_tokens(counting, payload, 1 << 27)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000 and counting.learnt < 10_000
    tracemalloc.stop()


# ---- Container -------------------------------------------------------------------------------------------------------
HEADER = Header(
    b"\xab" * 12,
    b"\xcd" * 12,
    MadeOn((2, 13, 0), 2, 200),
    2,
    9,
    1,
    (("a.txt", 5), ("日本.bin", 7)),
    {"ngram_orders": 4, "mix_mode": "log", "mix_rate": 0.25},
)
PROOF = HEADER._replace(streams=1, count=20_000, first=300, files=None, experts={})
PAYLOAD = b"8 bytes!"


def number(n: int, more: int = 0) -> bytes:
    """LEB128 as docs/BITSTREAM.md has it, with so many bytes more than it needs."""
    digits = [n >> 7 * i & 127 for i in range(max(1, -(-n.bit_length() // 7)) + more)]
    return bytes([128 | d for d in digits[:-1]] + digits[-1:])


def forged(**changed) -> bytes:
    """HEADER and PAYLOAD written from docs/BITSTREAM.md, with some parts replaced, and a checksum that is right."""
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
        unpacked(data, "f.fwy")
    assert (
        "\n" not in str(e.value) and str(e.value).startswith("f.fwy: ") and len(str(e.value)) < 400
    )
    return str(e.value)


def test_what_is_packed_comes_back(tmp_path):
    (tmp_path / "f.fwy").write_bytes(packed(HEADER, PAYLOAD))
    header, payload = read_bitstream(tmp_path / "f.fwy")
    assert (
        header == HEADER
        and payload == PAYLOAD
        and header.first_tokens().tolist() == [1, 1]
        and header.size == 12
    )
    assert header.settings() == EvalConfig(ngram_orders=4, mix_mode="log", mix_rate=0.25)
    assert forged() == packed(HEADER, PAYLOAD)
    for other in (
        PROOF,
        HEADER._replace(experts=None),
        PROOF._replace(experts={"expert_reset": True}),
    ):
        assert unpacked(packed(other, b""), "f") == (other, b"")
    assert (
        PROOF.first_tokens().tolist() == [300] and HEADER._replace(experts=None).settings() is None
    )
    assert (
        str(HEADER.made_on) == "torch 2.13.0, cpu, AVX512, 200 threads"
        and HEADER.made_on.kind == "cpu"
    )


def test_a_proofs_header_leaves_room_in_64_bytes():
    """For the coder's last words: what a file may exceed its claim by."""
    assert len(packed(PROOF, b"")) <= 48


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "eval_mode": st.just("cached"),
            "eval_seq_len": st.integers(64, 65_536),
            "eval_documents": st.just(True),
            "ntk_rope": st.just(False),
            "ngram_orders": st.integers(1, 5),
            "mix_weights": st.sampled_from(["em", "gate"]),
            "mix_lr": st.floats(0, 0.9),
            "mix_guard": st.floats(1, 10),
            "match_least": st.integers(9, 64),
        },
    )
)
def test_settings_are_those_that_differ(settings):
    cfg = EvalConfig(**settings, checkpoint="elsewhere", device="cpu")
    assert described(cfg, SETTINGS) == settings
    assert unpacked(packed(PROOF._replace(experts=settings), b""), "f")[0].experts == settings
    assert set(described(cfg, EXPERT_SETTINGS)) == {
        n for n in settings if not n.startswith(("eval", "ntk"))
    }
    assert described(None, SETTINGS) is None


def test_settings_and_their_defaults_are_those_of_version_1():
    """Files hold what differs from these, by its place: whoever changes one must raise the version of the format."""
    names = [f.name for f in dataclasses.fields(EvalConfig)]
    of_predictions = names[names.index("eval_mode") : names.index("ttt")]
    assert list(SETTINGS) == [
        name for name in of_predictions if name != "eval_batch_tokens"
    ]  # a matter of speed
    assert [getattr(EvalConfig(), name) for name in SETTINGS] == [
        "sliding",
        0,
        64,
        False,
        True,
        6,
        2304,
        8,
        False,
        "linear",
        "sets",
        1.0,
        0.01,
        0.1,
        0.05,
        0.5,
        0.0001,
    ]


@given(st.data())
def test_any_damage_is_seen(data):
    blob = packed(HEADER, PAYLOAD)
    at = data.draw(st.integers(0, len(blob) - 1))
    flipped = blob[:at] + bytes([blob[at] ^ data.draw(st.integers(1, 255))]) + blob[at + 1 :]
    more = blob[:at] + data.draw(st.binary(min_size=1, max_size=9)) + blob[at:]
    assert refusal(flipped) and refusal(blob[:at]) and (more == blob or refusal(more))


@given(st.binary(max_size=300))
def test_what_is_no_bitstream(data):
    sealed = b"FWY\x01" + zlib.crc32(data).to_bytes(4, "little") + data
    assert refusal(data) and refusal(b"FWY\x01" + data)
    with contextlib.suppress(
        BitstreamError
    ):  # a checksum that holds, over anything: a header, or refused
        header, payload = unpacked(sealed, "f")
        assert packed(header, payload) == sealed


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
    "a number without end": (dict(count=b"\x80" * 40), "without end"),
    "no files": (dict(files=number(0), name=b"", size=b"", name2=b"", size2=b""), "0 files"),
    "a million files": (dict(files=number(10**6)), "files"),
    "more files than there are": (dict(files=number(30)), ""),
    "a long name": (dict(name=number(250) + b"a" * 250), "file name"),
    "cut in a name": (dict(name=number(200)), ""),
    "the same name": (dict(name=number(10) + "日本.bin".encode()), "one name"),
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
def test_forged_headers(case):
    changed, says = FORGED[case]
    said = refusal(forged(**changed))
    assert says in said and "does not match its checksum" not in said


@pytest.mark.parametrize("name", EVIL, ids=map(ascii, range(len(EVIL))))
def test_evil_names(name):
    assert refusal(forged(name=number(len(name.encode())) + name.encode()))
    with pytest.raises(UserError, match="is no plain file name"):
        check_name(name)


def test_every_cut_of_a_header_is_seen_behind_a_checksum_that_holds():
    whole = forged(payload=b"")[8:]
    for at in range(len(whole)):
        assert "cut short" in refusal(
            b"FWY\x01" + zlib.crc32(whole[:at]).to_bytes(4, "little") + whole[:at]
        )


def test_another_version_and_a_file_larger_than_any_bitstream(tmp_path):
    assert "version 2; this reader knows 1" in refusal(b"FWY\x02" + forged()[4:])
    with open(tmp_path / "f.fwy", "wb") as f:
        f.truncate((1 << 31) + 1)
    with pytest.raises(BitstreamError, match="more than any bitstream has"):
        read_bitstream(tmp_path / "f.fwy")


def test_more_files_than_a_header_holds():
    files = tuple((f"{i}", 0) for i in range((1 << 16) + 1))
    with pytest.raises(BitstreamError, match="65537 files; a bitstream holds 1 to 65536"):
        packed(HEADER._replace(files=files, count=1 << 16), PAYLOAD)
