"""The match expert: its hints equal those of a plain search and are always verified."""

import numpy as np
import pytest
from damage import assert_refused_with, read_damaged
from hypothesis import given
from hypothesis import strategies as st
from reference_experts import ReferenceMatch
from token_texts import delays, pieces, texts

from fairway.scoring.experts.match import (
    BLOCK,
    FRESH,
    GOING_ON,
    LONGEST,
    Match,
    Matches,
    length_group,
    match_probabilities,
)
from train_gpt import BOS_ID, UserError

ROOM = 1 << 14  # bytes
leasts = st.sampled_from([1, 2, 3, 8])


def joined(parts) -> Matches:
    """Join the hints about the pieces of a text."""
    return Matches(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def assert_same(a: Matches, b: Matches) -> None:
    for name, x, y in zip(Matches._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, name)


def assert_equal_to(matches: Matches, rows: list[tuple[int, int, float]]) -> None:
    assert list(zip(matches.hint.tolist(), matches.length.tolist(), strict=True)) == [
        row[:2] for row in rows
    ]
    np.testing.assert_allclose(matches.rate, [row[2] for row in rows], rtol=0, atol=1e-12)
    assert ((matches.rate > 0) & (matches.rate < 1)).all()


def common_suffix(tokens: np.ndarray, i: int, t: int, start: int) -> int:
    """Return how many tokens before i, none before `start`, equal those before t."""
    same = 0
    while same < min(i - start, LONGEST) and tokens[i - 1 - same] == tokens[t - 1 - same]:
        same += 1
    return same


def test_hints_by_hand():
    """After a b c d a b, c followed once, after 2 tokens; then d, after 3."""
    matches = Match(16, least=2).fill(np.array([4, 5, 6, 7, 4, 5, 6, 9, 7]))
    assert matches.hint.tolist() == [-1, -1, -1, -1, -1, -1, 6, 7, -1]
    assert matches.length.tolist() == [0, 0, 0, 0, 0, 0, 2, 3, 0]
    assert matches.rate.tolist() == [0.5] * 6 + [FRESH[2], GOING_ON[3], 0.5]
    assert (matches.hint.dtype, matches.length.dtype, matches.rate.dtype) == (
        np.int32,
        np.uint16,
        np.float64,
    )


@given(
    texts(),
    leasts,
    delays,
    st.booleans(),
    st.integers(1, 5),
    st.sampled_from([1, 2, 7, 500]),
    st.data(),
)
def test_equals_plain_python_however_cut(text, least, delay, reset, candidates, buckets, data):
    """Some tables have so few buckets that most contexts collide."""
    vocab_size, tokens = text
    expert = Match(vocab_size, least, 4 * candidates * buckets, delay, reset, candidates)
    matches = joined([expert.fill(piece) for piece in pieces(data, tokens)])
    rows, p = ReferenceMatch(vocab_size, least, delay, reset, candidates, expert.buckets).fill(
        tokens
    )
    assert_equal_to(matches, rows)
    np.testing.assert_allclose(
        match_probabilities(matches, tokens, vocab_size), p, rtol=0, atol=1e-12
    )


@given(texts(60), leasts, delays, st.booleans(), st.sampled_from([(1, 1), (2, 3), (64, 1 << 14)]))
def test_every_hint_is_verified_and_none_is_longer(text, least, delay, reset, shape):
    """Compare with a search of the whole text.

    With room for all positions the longest match is found, with little room a real one or none. A
    position is known once its token lies at least `delay` tokens back.
    """
    vocab_size, tokens = text
    candidates, buckets = shape
    matches = Match(vocab_size, least, 4 * candidates * buckets, delay, reset, candidates).fill(
        tokens
    )
    start = 0
    for t in range(len(tokens)):
        known = {i: common_suffix(tokens, i, t, start) for i in range(start + least, t - delay)}
        lengths = {(tokens[i], same) for i, same in known.items() if same >= least}
        if matches.hint[t] >= 0:
            assert (matches.hint[t], matches.length[t]) in {(x, n) for x, n in lengths}
        if candidates == 64:
            assert matches.length[t] == max((n for _, n in lengths), default=0)
        start = t if reset and tokens[t] == BOS_ID else start


@given(texts(40), leasts, delays, st.booleans())
def test_a_distribution_is_one_and_is_what_is_scored(text, least, delay, reset):
    vocab_size, tokens = text
    expert = Match(vocab_size, least, ROOM, delay, reset)
    expert.fill(tokens[:-12])
    for token in tokens.tolist()[-12:]:
        distribution, hint, before = expert.distribution(), expert.hint(), expert.digest()
        assert abs(distribution.sum() - 1) < 1e-12 and distribution.min() > 0
        for target in {0, token, max(hint[0], 0), vocab_size - 1}:
            assert expert.probability(target) == distribution[target]
        assert expert.digest() == before and expert.hint() == hint
        scored = expert.fill(np.array([token]))
        assert (scored.hint[0], scored.length[0], scored.rate[0]) == hint
        assert match_probabilities(scored, [token], vocab_size)[0] == distribution[token]


@given(texts(), leasts, delays, st.booleans(), st.integers(0, 150), st.integers(0, 3))
def test_later_tokens_change_no_earlier_row(text, least, delay, reset, at, other):
    vocab_size, tokens = text
    at, changed = min(at, len(tokens)), tokens.copy()
    changed[at:] = other
    a, b = (Match(vocab_size, least, ROOM, delay, reset).fill(x) for x in (tokens, changed))
    assert_same(*(Matches(*(column[:at] for column in m)) for m in (a, b)))


@given(texts(), texts(), leasts, delays)
def test_a_reset_leaves_nothing(first, second, least, delay):
    vocab_size, document = second
    document = np.concatenate([[BOS_ID], document])
    a, b = (Match(vocab_size, least, 1 << 18, delay, reset=True) for _ in range(2))
    a.fill(np.minimum(first[1], vocab_size - 1))
    assert_same(
        *(Matches(*(column[1:] for column in m)) for m in (a.fill(document), b.fill(document)))
    )


@given(texts(), leasts, delays, st.booleans(), st.data())
def test_a_saved_expert_goes_on(tmp_path_factory, text, least, delay, reset, data):
    vocab_size, tokens = text
    path, at = tmp_path_factory.mktemp("state") / "match", data.draw(st.integers(0, len(tokens)))
    expert = Match(vocab_size, least, ROOM, delay, reset)
    expert.fill(tokens[:at])
    expert.save(path)
    again = Match.load(path)
    assert again.digest() == expert.digest() and again.hint() == expert.hint()
    assert_same(again.fill(tokens[at:]), expert.fill(tokens[at:]))
    assert again.digest() == expert.digest() and again.hint() == expert.hint()


@given(texts(), st.data())
def test_a_digest_depends_on_the_text_and_not_on_its_pieces(text, data):
    vocab_size, tokens = text
    at_once, parts = (Match(vocab_size, memory_bytes=ROOM) for _ in range(2))
    at_once.fill(tokens)
    for piece in pieces(data, tokens):
        parts.fill(piece)
    assert at_once.digest() == parts.digest()
    parts.update(0)
    assert at_once.digest() != parts.digest() != Match(vocab_size, memory_bytes=ROOM).digest()
    assert Match(vocab_size, 8, ROOM).digest() != Match(vocab_size, 9, ROOM).digest()


def test_blocks_make_no_difference():
    """The text is longer than a block; a repeated passage lies across its end."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 4, BLOCK + 1000).astype(np.uint16)
    tokens[BLOCK - 900 : BLOCK + 300] = tokens[300:1500]
    tokens[[900, BLOCK - 1000, BLOCK + 600]] = BOS_ID
    for delay, reset in ((0, False), (5, False), (3000, False), (0, True), (5, True)):
        expert = Match(4, 5, ROOM, delay, reset)
        rows, _ = ReferenceMatch(4, 5, delay, reset, buckets=expert.buckets).fill(tokens)
        assert_equal_to(expert.fill(tokens), rows)


def test_rates_are_learnt_and_periodic_text_becomes_certain():
    matches = Match(1024).fill(tokens := np.tile([5, 6, 7], 3000))
    assert (matches.hint[11:] == tokens[11:]).all() and matches.length[-1] == LONGEST
    assert match_probabilities(matches, tokens, 1024)[-1] > 0.9995
    rng = np.random.default_rng(5)
    context = np.arange(
        10, 18
    )  # followed by a token of 16 at random: such hints are right once in 16
    tokens = np.concatenate(
        [[*context, 100 + x, *rng.integers(200, 1000, 3)] for x in rng.integers(0, 16, 1500)]
    )
    matches = Match(1024, memory_bytes=1 << 18).fill(tokens)
    assert (matches.hint[8::12][-100:] >= 100).all() and 0.02 < np.median(
        matches.rate[8::12][-100:]
    ) < 0.2


def test_groups_of_length_have_their_rates():
    assert [length_group(n) for n in (1, 8, 16, 17, 23, 24, 47, 48, 64, 128, 511, 512)] == [
        1,
        8,
        16,
        17,
        17,
        18,
        19,
        20,
        21,
        22,
        23,
        24,
    ]
    assert (
        len(FRESH) == len(GOING_ON) == length_group(LONGEST) + 1
        and 0 < min(FRESH + GOING_ON) < max(FRESH + GOING_ON) < 1
    )


def test_random_text_is_never_predicted_and_repeated_text_is():
    tokens = np.random.default_rng(6).integers(0, 64, 20_000)
    nats = -np.log(match_probabilities(Match(64).fill(tokens), tokens, 64))
    assert nats.mean() > np.log(64) - 4 * nats.std() / np.sqrt(len(nats)) - 1e-12
    again = np.tile(tokens[:2000], 2)
    assert -np.log(match_probabilities(Match(64).fill(again), again, 64))[2050:].mean() < 0.1


def test_memory_is_bounded_by_the_setting():
    assert (1 << 20) - 100 < Match(1024, memory_bytes=1 << 20, candidates=7).table.nbytes <= 1 << 20


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(vocab_size=3), "VOCAB_SIZE is 3"),
        (dict(least=0), "least match of 0"),
        (dict(delay=-1), "delay of -1"),
        (dict(least=LONGEST + 1), "outside 1 to"),
        (dict(memory_bytes=15), "memory is 15 bytes"),
        (dict(candidates=0), "0 candidates"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Match(**{"vocab_size": 64, **settings})


def test_bad_tokens_are_refused_and_change_nothing():
    expert = Match(64, memory_bytes=ROOM)
    before = expert.digest()
    with pytest.raises(UserError, match="holds token 64, but VOCAB_SIZE is 64"):
        expert.fill(np.array([1, 64]))
    assert expert.digest() == before and expert.position == 0
    with pytest.raises(UserError):
        expert.probability(-1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    expert = Match(16, 2, 1000, delay=2)
    expert.fill(np.tile(np.random.default_rng(4).integers(0, 16, 30), 2))
    path = tmp_path_factory.mktemp("saved") / "match"
    expert.save(path)
    assert expert.hint()[0] >= 0
    return expert, path.read_bytes()


@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_a_damaged_state_is_refused_or_is_the_same(tmp_path_factory, saved, at, byte, cut):
    """Some bytes of a zip file mean nothing; whatever loads must be what was saved."""
    expert, data = saved
    loaded = read_damaged(
        tmp_path_factory.mktemp("state") / "match", data, at % len(data), byte, cut, Match.load
    )
    if loaded:
        assert loaded.digest() == expert.digest() and loaded.hint() == expert.hint()


@pytest.mark.parametrize(
    "name, value",
    [
        ("table", 60),
        ("table", -1),
        ("running", 60),
        ("rates", -1),
        ("rates", np.nan),
        ("history", 16),
        ("settings", -1),
        ("link", None),
        ("kind", 0),
    ],
)
def test_a_state_that_points_outside_its_text_is_refused(tmp_path, saved, name, value):
    assert_refused_with(tmp_path / "match", saved[1], name, value, Match.load)
