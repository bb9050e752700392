"""The n-gram expert: counts equal to dictionaries', however the text is cut, delayed, reset, full, saved or asked."""

import numpy as np
import pytest
from damage import refused_or_read, refused_with
from hypothesis import given
from hypothesis import strategies as st
from reference_experts import ReferenceNGram

from fairway.scoring.experts.ngram import ContextCounts, NGram, ngram_probabilities
from train_gpt import BOS_ID, UserError

ROOM = 1 << 16  # bytes: more than any text here fills at a small vocabulary
delays = st.sampled_from([0, 0, 1, 3, 17])


@st.composite
def texts(draw, longest: int = 150):
    """A vocabulary's size and a text that repeats itself, of a few tokens, BOS often among them."""
    vocab_size = draw(st.sampled_from([4, 5, 64, 1024, 65536]))
    alphabet = draw(
        st.sampled_from([[0, 2], [BOS_ID, 2, 3], [0, BOS_ID, 2, vocab_size - 1], [vocab_size - 1]])
    )
    piece = draw(st.lists(st.sampled_from(alphabet), max_size=longest))
    if draw(st.booleans()):
        piece = (piece * longest)[:longest]
        for at in draw(st.lists(st.integers(0, longest - 1), max_size=3)):
            piece[at : at + 1] = [alphabet[0]]
    return vocab_size, np.array(piece, np.uint16)


def pieces(draw_from, tokens):
    """The text cut anywhere, empty pieces too."""
    cuts = sorted(draw_from.draw(st.lists(st.integers(0, len(tokens)), max_size=5), label="cuts"))
    return np.split(tokens, cuts)


def joined(parts) -> ContextCounts:
    return ContextCounts(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def room(vocab_size: int) -> int:
    return ROOM + 20 * vocab_size


def assert_same(a: ContextCounts, b: ContextCounts) -> None:
    for name, x, y in zip(ContextCounts._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, name)


def bits_at_the_end(tokens, vocab_size: int) -> float:
    return float(
        -np.log2(ngram_probabilities(NGram(vocab_size).fill(tokens), vocab_size))[-20:].mean()
    )


def test_counts_by_hand():
    """a b a b a: before the last token, `b` was followed once, by `a`; so was `a b`."""
    evidence = NGram(8, orders=3).fill(np.array([5, 6, 5, 6, 5]))
    assert [list(map(int, column[4])) for column in evidence] == [[2, 1, 1], [4, 1, 1], [2, 1, 1]]
    assert [list(map(int, column[0])) for column in evidence] == [[0] * 3] * 3
    assert all(column.dtype == np.uint32 and column.shape == (5, 3) for column in evidence)


@given(texts(), st.integers(1, 7), delays, st.booleans(), st.data())
def test_equals_dictionaries_however_cut(text, orders, delay, reset, data):
    vocab_size, tokens = text
    expert = NGram(vocab_size, orders, room(vocab_size), delay, reset)
    evidence = joined([expert.fill(piece) for piece in pieces(data, tokens)])
    rows, p = ReferenceNGram(vocab_size, orders, delay, reset).fill(tokens)
    assert_same(evidence, ContextCounts(rows[..., 0], rows[..., 1], rows[..., 2]))
    np.testing.assert_allclose(ngram_probabilities(evidence, vocab_size), p, rtol=0, atol=1e-12)


@given(texts(40), st.integers(1, 6), delays, st.booleans(), st.sampled_from([0, 100]))
def test_a_distribution_is_one_and_is_what_is_scored(text, orders, delay, reset, spare):
    """Also when the table is so small (`spare` bytes) that most grams find no room."""
    vocab_size, tokens = text
    expert = NGram(vocab_size, orders, 20 * (vocab_size + 3) + (spare or ROOM), delay, reset)
    for token in [*tokens.tolist()[-12:], 2]:
        distribution = expert.distribution()
        assert abs(distribution.sum() - 1) < 1e-12 and distribution.min() > 0
        everything = expert.candidate_counts()
        assert (everything.seen == everything.seen[0]).all() and (
            everything.kinds == everything.kinds[0]
        ).all()
        np.testing.assert_array_equal(everything.hits.sum(axis=0), everything.seen[0])
        np.testing.assert_array_equal((everything.hits > 0).sum(axis=0), everything.kinds[0])
        before = expert.digest()
        for target in {0, token, vocab_size - 1}:
            assert expert.probability(target) == distribution[target]
        assert expert.digest() == before
        scored = expert.fill(np.array([token]))
        assert ngram_probabilities(scored, vocab_size)[0] == distribution[token]
        assert_same(scored, ContextCounts(*(column[token : token + 1] for column in everything)))


@given(st.integers(0, 2**32 - 1), delays, st.booleans(), st.integers(0, 2000), st.data())
def test_a_full_table_goes_on_counting_and_depends_on_no_cut(seed, delay, reset, spare, data):
    vocab_size, rng = 16, np.random.default_rng(seed)
    tokens = np.tile(rng.integers(0, vocab_size, 80), 3).astype(np.uint16)
    settings = dict(orders=5, memory_bytes=20 * (vocab_size + 3) + spare, delay=delay, reset=reset)
    whole, parts, single = (NGram(vocab_size, **settings) for _ in range(3))
    evidence = whole.fill(tokens)
    assert_same(evidence, joined([parts.fill(piece) for piece in pieces(data, tokens)]))
    assert_same(evidence, joined([single.fill(tokens[i : i + 1]) for i in range(len(tokens))]))
    rows, _ = ReferenceNGram(vocab_size, 5, delay, reset).fill(tokens)
    assert (evidence.seen <= rows[..., 1]).all() and (evidence.hits <= rows[..., 0]).all()
    assert_same(
        ContextCounts(*(c[:, :1] for c in evidence)),
        ContextCounts(*(rows[:, :1, i] for i in range(3))),
    )  # always exact
    everything = whole.candidate_counts()
    np.testing.assert_array_equal(everything.hits.sum(axis=0), everything.seen[0])
    np.testing.assert_array_equal((everything.hits > 0).sum(axis=0), everything.kinds[0])
    assert whole.counters[0] <= whole.limit < whole.capacity


@given(texts(), delays, st.booleans(), st.integers(0, 150), st.integers(0, 3))
def test_what_follows_changes_nothing_before(text, delay, reset, at, other):
    vocab_size, tokens = text
    at, changed = min(at, len(tokens)), tokens.copy()
    changed[at:] = other
    a, b = (NGram(vocab_size, 6, room(vocab_size), delay, reset).fill(x) for x in (tokens, changed))
    assert_same(*(ContextCounts(*(column[:at] for column in e)) for e in (a, b)))


@given(texts(), texts(), delays)
def test_after_a_reset_nothing_is_left(first, second, delay):
    vocab_size, document = second
    document = np.concatenate([[BOS_ID], document])
    before = np.minimum(first[1], vocab_size - 1)
    settings = dict(orders=4, memory_bytes=room(vocab_size), delay=delay, reset=True)
    a, b = NGram(vocab_size, **settings), NGram(vocab_size, **settings)
    a.fill(before)
    a, b = a.fill(document), b.fill(document)
    assert_same(
        *(ContextCounts(*(column[1:] for column in e)) for e in (a, b))
    )  # BOS itself is the old document's to tell


@given(texts(), st.integers(2, 6), delays, st.booleans(), st.data())
def test_saved_in_the_middle_it_goes_on(tmp_path_factory, text, orders, delay, reset, data):
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
def test_a_digest_tells_histories_apart_and_not_cuts(text, data):
    vocab_size, tokens = text
    whole, parts = NGram(vocab_size, 3, room(vocab_size)), NGram(vocab_size, 3, room(vocab_size))
    whole.fill(tokens)
    for piece in pieces(data, tokens):
        parts.fill(piece)
    assert whole.digest() == parts.digest()
    parts.update(0)
    assert whole.digest() != parts.digest() != NGram(vocab_size, 3, room(vocab_size)).digest()
    assert (
        NGram(vocab_size, 3, room(vocab_size)).digest()
        != NGram(vocab_size, 4, room(vocab_size)).digest()
    )


def test_a_digest_is_the_same_across_its_blocks():
    tokens = np.random.default_rng(0).integers(0, 256, 9000)
    whole, parts = NGram(256, 2, ROOM), NGram(256, 2, ROOM)
    whole.fill(tokens)
    for piece in np.split(tokens, [1, 4095, 4096, 4097, 8191]):
        parts.fill(piece)
    assert whole.digest() == parts.digest()


def test_blocks_are_no_boundary():
    """Longer than any block inside, and unlike any two parts of it."""
    tokens = np.random.default_rng(1).integers(0, 7, 9000).astype(np.uint16)
    tokens[::1000] = BOS_ID
    for delay, reset in ((0, False), (5, False), (3000, False), (0, True), (5, True)):
        evidence = NGram(8, 4, 1 << 20, delay, reset).fill(tokens)
        rows, _ = ReferenceNGram(8, 4, delay, reset).fill(tokens)
        assert_same(evidence, ContextCounts(rows[..., 0], rows[..., 1], rows[..., 2]))


def test_periodic_text_becomes_certain():
    """An expert fed one token late would stay at log2(3) bits here, or worse."""
    assert bits_at_the_end(np.tile([5, 6, 7], 400), 1024) < 0.02
    assert bits_at_the_end(np.full(1200, 9), 65536) < 0.02


def test_a_bigram_knows_one_token():
    tokens = np.random.default_rng(2).integers(0, 4, 300)
    p = ngram_probabilities(NGram(16).fill(tokens), 16, 2)
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
    "settings, said",
    [
        (dict(vocab_size=3), "VOCAB_SIZE is 3"),
        (dict(vocab_size=65537), "VOCAB_SIZE is 65537"),
        (dict(orders=0), "orders are 0"),
        (dict(delay=-1), "delay of -1"),
        (dict(memory_bytes=99), "memory is 99 bytes"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        NGram(**{"vocab_size": 64, **settings})


@pytest.mark.parametrize("tokens", [[1, 64], [-1], [[1, 2]], [0.5]])
def test_tokens_that_cannot_be_are_refused_and_leave_no_trace(tokens):
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
    """Some bytes of the container mean nothing; whatever loads must be what was saved."""
    expert, data = saved
    loaded = refused_or_read(
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
    refused_with(tmp_path / "ngram", saved[1], name, value, NGram.load)
