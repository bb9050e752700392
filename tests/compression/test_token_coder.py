"""The token coder matches plain integers, loses nothing, and survives damage."""

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.compression.token_coder import (
    FREQUENCY_SUM,
    BitstreamError,
    decode_tokens,
    default_streams,
    encode_tokens,
    frequency_weights,
    stream_sizes,
)


class Counting:
    """A predictor that counts each stream's tokens; each token starts with a count of alpha."""

    def __init__(self, streams: int, vocab_size: int, alpha: float = 0.05):
        self.streams, self.counts, self.learned = streams, np.full((streams, vocab_size), alpha), 0

    def probabilities(self) -> np.ndarray:
        return self.counts / self.counts.sum(axis=1, keepdims=True)

    def learn(self, tokens: np.ndarray) -> None:
        assert tokens.shape == (self.streams,) and tokens.dtype == np.int64
        self.counts[np.arange(self.streams), tokens] += 1
        self.learned += 1


def some_tokens(n: int, vocab_size: int, seed: int = 0) -> np.ndarray:
    """Return uint16[n]: a few tokens come often, most of them rarely."""
    return np.minimum(np.random.default_rng(seed).geometric(0.2, n) - 1, vocab_size - 1).astype(
        np.uint16
    )


def decode_plainly(predictor, payload: bytes, count: int) -> list[int]:
    """Decode as docs/BITSTREAM.md says, in Python's integers."""
    words, top = list(struct.unpack(f"<{len(payload) // 4}I", payload)), 2**64

    def take() -> int:
        return words.pop(0) if words else 0

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


# ==== FREQUENCIES =================================================================================
@pytest.mark.parametrize("V", [4, 300, 1024, 8192, 65536])
def test_frequencies_are_whole_numbers_with_a_fixed_sum(V):
    rng = np.random.default_rng(V)
    for spread in (0.0, 1.0, 8.0, 60.0):
        p = np.exp(spread * rng.standard_normal((6, V)))
        p[0, : V // 2] = 0
        p /= p.sum(axis=1, keepdims=True) * (
            1 + rng.uniform(-9e-7, 9e-7, (6, 1))
        )  # the most that is accepted
        weights = frequency_weights(p)
        assert (
            weights.dtype == np.float64
            and (weights == np.floor(weights)).all()
            and (weights >= 0).all()
        )
        assert (weights.sum(axis=1) == FREQUENCY_SUM - V).all()
        others = np.arange(V) != p.argmax(axis=1)[:, None]
        assert (weights == np.floor(p * (FREQUENCY_SUM - V)))[others].all()


def test_the_first_of_the_most_probable_tokens_gets_what_rounding_leaves():
    assert frequency_weights(np.full((1, 3), 1 / 3)).tolist() == [[5592405, 5592404, 5592404]]
    assert frequency_weights(np.array([[0, 1.0, 0], [0.2, 0.4, 0.4]])).tolist() == [
        [0, FREQUENCY_SUM - 3, 0],
        [3355442, 6710886, 6710885],
    ]


@pytest.mark.parametrize(
    "row", [[0.5, 0.5, np.nan], [0.5, 0.6, -0.1], [np.inf, 0, 0], [0.5, 0.49999, 0], [0, 0, 0]]
)
def test_rows_that_are_no_probabilities_are_refused(row):
    with pytest.raises(BitstreamError, match="gives no probabilities"):
        frequency_weights(np.array([[1.0, 0, 0], row]))


@pytest.mark.parametrize(
    ("V", "streams", "count"), [(4, 1, 90), (4, 7, 90), (300, 3, 61), (1024, 8, 40), (65536, 2, 12)]
)
def test_plain_integers_decode_the_payload(V, streams, count):
    """The library rounds nothing, and every word is used, for any size of vocabulary."""
    for seed in range(3):
        tokens = some_tokens(count, V, seed)
        tokens[::9] = np.random.default_rng(seed).integers(0, V, len(tokens[::9]))
        payload = encode_tokens(Counting(streams, V), tokens)
        assert decode_plainly(Counting(streams, V), payload, count) == tokens.tolist()


def test_golden_bytes():
    tokens = np.array([0, 1, 2, 3, 3, 3, 3, 0, 2], np.uint16)
    payload = encode_tokens(Counting(2, 4), tokens)
    assert payload.hex() == "78f4a33e3c9217dd"
    assert decode_tokens(Counting(2, 4), payload, 9).tolist() == tokens.tolist()


# ==== ROUND TRIP ==================================================================================
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


@pytest.mark.parametrize(("count", "learned"), [(1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_the_last_step_is_not_learned(count, learned):
    tokens, steps = some_tokens(count, 4), []
    encoder, decoder = Counting(4, 4), Counting(4, 4)
    payload = encode_tokens(encoder, tokens, steps.append)
    assert encoder.learned == learned and sum(steps) == count and max(steps) <= 4
    assert np.array_equal(decode_tokens(decoder, payload, count, steps.append), tokens)
    assert decoder.learned == learned and sum(steps) == 2 * count


@pytest.mark.parametrize(("V", "most"), [(300, 1.0005), (1024, 1.001), (8192, 1.005)])
def test_rounding_to_frequencies_costs_almost_nothing(V, most):
    tokens, counting, ideal = some_tokens(4000, V), Counting(8, V), 0.0
    for column in tokens.reshape(8, -1).T.astype(np.int64):
        ideal -= np.log2(counting.probabilities()[np.arange(8), column]).sum()
        counting.learn(column)
    assert ideal <= 8 * len(encode_tokens(Counting(8, V), tokens)) <= most * ideal + 64


# ==== DAMAGED PAYLOADS ============================================================================
def test_damaged_payloads_end_in_an_error_or_in_other_tokens():
    """The file's checksum finds damage; decoding must only end, in the right number of tokens."""
    payload = encode_tokens(Counting(4, 300), some_tokens(400, 300))
    rng, refused = np.random.default_rng(0), 0
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


def test_a_payload_must_have_whole_words():
    with pytest.raises(BitstreamError, match="no multiple of 4 bytes"):
        decode_tokens(Counting(1, 4), b"12345", 3)


def test_decoding_stops_when_the_bits_are_used_up():
    """Work and memory follow the payload, whatever count a header promises."""
    payload, counting = (
        encode_tokens(Counting(2, 300), some_tokens(300, 300)),
        Counting(2, 300, alpha=5),
    )
    tracemalloc.start()
    with pytest.raises(BitstreamError, match="ends before its tokens do|does not decode"):
        decode_tokens(counting, payload, 1 << 27)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000 and counting.learned < 10_000
    tracemalloc.stop()
