"""The n-gram expert: its counts equal those of dictionaries, delayed, reset, full or saved."""

import numpy as np
import pytest
from damage import assert_refused_with, read_damaged
from hypothesis import given
from hypothesis import strategies as st
from reference_experts import ReferenceNGram
from token_texts import delays, pieces, texts

from fairway.scoring.experts.ngram import BLOCK, ContextCounts, NGram, ngram_probabilities
from train_gpt import BOS_ID, UserError

ROOM = 1 << 16  # bytes: more than any text here fills at a small vocabulary


def joined(parts) -> ContextCounts:
    """Join the counts about the pieces of a text."""
    return ContextCounts(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def room(vocab_size: int) -> int:
    """Return bytes of memory: ROOM besides the single tokens."""
    return ROOM + 20 * vocab_size


def assert_same(a: ContextCounts, b: ContextCounts) -> None:
    for name, x, y in zip(ContextCounts._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, name)


def bits_at_the_end(tokens, vocab_size: int) -> float:
    """Return the mean bits of the last 20 tokens."""
    return float(
        -np.log2(
            ngram_probabilities(
                NGram(vocab_size, memory_bytes=room(vocab_size) * 2).fill(tokens), vocab_size
            )
        )[-20:].mean()
    )


def test_counts_by_hand():
    """In a b a b a, before the last token: `b` was followed once, by `a`; so was `a b`."""
    counts = NGram(8, orders=3).fill(np.array([5, 6, 5, 6, 5]))
    assert [list(map(int, column[4])) for column in counts] == [[2, 1, 1], [4, 1, 1], [2, 1, 1]]
    assert [list(map(int, column[0])) for column in counts] == [[0] * 3] * 3
    assert all(column.dtype == np.uint32 and column.shape == (5, 3) for column in counts)


@given(texts(), st.integers(1, 7), delays, st.booleans(), st.data())
def test_equals_dictionaries_however_cut(text, orders, delay, reset, data):
    vocab_size, tokens = text
    expert = NGram(vocab_size, orders, room(vocab_size), delay, reset)
    counts = joined([expert.fill(piece) for piece in pieces(data, tokens)])
    rows, p = ReferenceNGram(vocab_size, orders, delay, reset).fill(tokens)
    assert_same(counts, ContextCounts(rows[..., 0], rows[..., 1], rows[..., 2]))
    np.testing.assert_allclose(ngram_probabilities(counts, vocab_size), p, rtol=0, atol=1e-12)


@given(texts(40), st.integers(1, 6), delays, st.booleans(), st.sampled_from([0, 100]))
def test_a_distribution_is_one_and_is_what_is_scored(text, orders, delay, reset, spare):
    """`spare` makes some tables so small that most grams find no room."""
    vocab_size, tokens = text
    expert = NGram(vocab_size, orders, 20 * (vocab_size + 3) + (spare or ROOM), delay, reset)
    for token in [*tokens.tolist()[-12:], 2]:
        distribution = expert.distribution()
        assert abs(distribution.sum() - 1) < 1e-12 and distribution.min() > 0
        candidates = expert.candidate_counts()
        assert (candidates.seen == candidates.seen[0]).all() and (
            candidates.kinds == candidates.kinds[0]
        ).all()
        np.testing.assert_array_equal(candidates.hits.sum(axis=0), candidates.seen[0])
        np.testing.assert_array_equal((candidates.hits > 0).sum(axis=0), candidates.kinds[0])
        before = expert.digest()
        for target in {0, token, vocab_size - 1}:
            assert expert.probability(target) == distribution[target]
        assert expert.digest() == before
        scored = expert.fill(np.array([token]))
        assert ngram_probabilities(scored, vocab_size)[0] == distribution[token]
        assert_same(scored, ContextCounts(*(column[token : token + 1] for column in candidates)))


@given(st.integers(0, 2**32 - 1), delays, st.booleans(), st.integers(0, 2000), st.data())
def test_a_full_table_still_counts_and_pieces_make_no_difference(seed, delay, reset, spare, data):
    vocab_size, rng = 16, np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, vocab_size, 80), 3).astype(np.uint16)
    settings = dict(orders=5, memory_bytes=20 * (vocab_size + 3) + spare, delay=delay, reset=reset)
    at_once, parts, single = (NGram(vocab_size, **settings) for _ in range(3))
    counts = at_once.fill(tokens)
    assert_same(counts, joined([parts.fill(piece) for piece in pieces(data, tokens)]))
    assert_same(counts, joined([single.fill(tokens[i : i + 1]) for i in range(len(tokens))]))
    rows, _ = ReferenceNGram(vocab_size, 5, delay, reset).fill(tokens)
    assert (counts.seen <= rows[..., 1]).all() and (counts.hits <= rows[..., 0]).all()
    assert_same(
        ContextCounts(*(c[:, :1] for c in counts)),
        ContextCounts(*(rows[:, :1, i] for i in range(3))),
    )  # always exact
    candidates = at_once.candidate_counts()
    np.testing.assert_array_equal(candidates.hits.sum(axis=0), candidates.seen[0])
    np.testing.assert_array_equal((candidates.hits > 0).sum(axis=0), candidates.kinds[0])
    assert at_once.counters[0] <= at_once.limit < at_once.capacity


@given(texts(), delays, st.booleans(), st.integers(0, 150), st.integers(0, 3))
def test_later_tokens_change_no_earlier_row(text, delay, reset, at, other):
    vocab_size, tokens = text
    at, changed = min(at, len(tokens)), tokens.copy()
    changed[at:] = other
    a, b = (NGram(vocab_size, 6, room(vocab_size), delay, reset).fill(x) for x in (tokens, changed))
    assert_same(*(ContextCounts(*(column[:at] for column in e)) for e in (a, b)))


@given(texts(), texts(), delays)
def test_a_reset_leaves_nothing(first, second, delay):
    vocab_size, document = second
    document = np.concatenate([[BOS_ID], document])
    before = np.minimum(first[1], vocab_size - 1)
    settings = dict(orders=4, memory_bytes=room(vocab_size), delay=delay, reset=True)
    a, b = NGram(vocab_size, **settings), NGram(vocab_size, **settings)
    a.fill(before)
    a, b = a.fill(document), b.fill(document)
    assert_same(
        *(ContextCounts(*(column[1:] for column in e)) for e in (a, b))
    )  # BOS itself is predicted from the old document


@given(texts(), st.integers(2, 6), delays, st.booleans(), st.data())
def test_a_saved_expert_goes_on(tmp_path_factory, text, orders, delay, reset, data):
    vocab_size, tokens = text
    path, at = tmp_path_factory.mktemp("state") / "ngram", data.draw(st.integers(0, len(tokens)))
    expert = NGram(vocab_size, orders, room(vocab_size), delay, reset)
    expert.fill(tokens[:at])
    expert.save(path)
    again = NGram.load(path)
    assert again.digest() == expert.digest() and again.position == expert.position
    assert_same(again.candidate_counts(), expert.candidate_counts())
    assert_same(again.fill(tokens[at:]), expert.fill(tokens[at:]))
    assert again.digest() == expert.digest()


@given(texts(), st.data())
def test_a_digest_depends_on_the_text_and_not_on_its_pieces(text, data):
    vocab_size, tokens = text
    at_once, parts = (NGram(vocab_size, 3, room(vocab_size)) for _ in range(2))
    at_once.fill(tokens)
    for piece in pieces(data, tokens):
        parts.fill(piece)
    assert at_once.digest() == parts.digest()
    parts.update(0)
    assert at_once.digest() != parts.digest() != NGram(vocab_size, 3, room(vocab_size)).digest()
    assert (
        NGram(vocab_size, 3, room(vocab_size)).digest()
        != NGram(vocab_size, 4, room(vocab_size)).digest()
    )


def test_a_digest_is_the_same_across_its_blocks():
    tokens = np.random.default_rng(0).integers(0, 256, 9000)
    at_once, parts = NGram(256, 2, ROOM), NGram(256, 2, ROOM)
    at_once.fill(tokens)
    for piece in np.split(tokens, [1, 4095, 4096, 4097, 8191]):
        parts.fill(piece)
    assert at_once.digest() == parts.digest()


def test_blocks_make_no_difference():
    """The text is longer than two blocks."""
    tokens = np.random.default_rng(1).integers(0, 7, 2 * BLOCK + 404).astype(np.uint16)
    tokens[::1000] = BOS_ID
    for delay, reset in ((0, False), (5, False), (3000, False), (0, True), (5, True)):
        counts = NGram(8, 4, 1 << 20, delay, reset).fill(tokens)
        rows, _ = ReferenceNGram(8, 4, delay, reset).fill(tokens)
        assert_same(counts, ContextCounts(rows[..., 0], rows[..., 1], rows[..., 2]))


def test_periodic_text_becomes_certain():
    """An expert that learns one token late would stay at log2(3) bits here, or worse."""
    assert bits_at_the_end(np.tile([5, 6, 7], 400), 1024) < 0.02
    assert bits_at_the_end(np.full(1200, 9), 65536) < 0.02


def test_two_orders_are_a_bigram():
    tokens = np.random.default_rng(2).integers(0, 4, 300)
    p = ngram_probabilities(NGram(16, memory_bytes=ROOM).fill(tokens), 16, 2)
    reference, expected = ReferenceNGram(16), []
    for token in tokens.tolist():
        expected.append(reference.probability(token, orders=2))
        reference.update(token)
    np.testing.assert_allclose(p, expected, rtol=0, atol=1e-12)
    assert len(ngram_probabilities(NGram(16, orders=1).fill(tokens), 16, 2)) == 300


def test_memory_is_bounded_by_the_setting_and_by_the_text():
    assert NGram(1024, memory_bytes=1 << 20).table.nbytes <= 1 << 20
    both = NGram(1024, memory_bytes=1 << 20, reset=True)
    assert (1 << 20) * 0.95 < both.table.nbytes + both.log.nbytes <= 1 << 20
    tokens = np.random.default_rng(3).integers(0, 1024, 2000)
    fitted, roomy = (
        NGram(1024, memory_bytes=1 << 26, expected_tokens=2000),
        NGram(1024, memory_bytes=1 << 26),
    )
    assert fitted.table.nbytes < 1 << 18
    assert_same(fitted.fill(tokens), roomy.fill(tokens))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(vocab_size=3), "VOCAB_SIZE is 3"),
        (dict(vocab_size=65537), "VOCAB_SIZE is 65537"),
        (dict(orders=0), "orders are 0"),
        (dict(delay=-1), "delay of -1"),
        (dict(memory_bytes=99), "memory is 99 bytes"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        NGram(**{"vocab_size": 64, **settings})


@pytest.mark.parametrize("tokens", [[1, 64], [-1], [[1, 2]], [0.5]])
def test_bad_tokens_are_refused_and_change_nothing(tokens):
    expert = NGram(64, 3, ROOM)
    before = expert.digest()
    with pytest.raises(UserError):
        expert.fill(np.array(tokens))
    assert expert.digest() == before and expert.candidate_counts().hits.sum() == 0
    with pytest.raises(UserError):
        expert.probability(64)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    expert = NGram(16, 3, 2000, delay=2, reset=True)
    expert.fill(np.random.default_rng(4).integers(0, 16, 50))
    path = tmp_path_factory.mktemp("saved") / "ngram"
    expert.save(path)
    return expert, path.read_bytes()


@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_state_is_refused_or_is_the_same(tmp_path_factory, saved, at, byte, cut):
    """Some bytes of a zip file mean nothing; whatever loads must be what was saved."""
    expert, data = saved
    loaded = read_damaged(
        tmp_path_factory.mktemp("state") / "ngram", data, at % len(data), byte, cut, NGram.load
    )
    if loaded:
        assert loaded.digest() == expert.digest()
        assert_same(loaded.candidate_counts(), expert.candidate_counts())


def test_foreign_and_missing_states_are_refused(tmp_path, saved):
    np.savez(tmp_path / "foreign.npz", a=np.zeros(3))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("foreign.npz", "one.npy", "empty", "missing", "."):
        with pytest.raises(UserError, match="score from the start"):
            NGram.load(tmp_path / name)


@pytest.mark.parametrize(
    "name, value",
    [
        ("contexts", 10**6),
        ("log", 10**6),
        ("counters", 10**6),
        ("settings", -1),
        ("pending", 999),
        ("table", None),
    ],
)
def test_a_state_that_points_outside_its_table_is_refused(tmp_path, saved, name, value):
    assert_refused_with(tmp_path / "ngram", saved[1], name, value, NGram.load)
