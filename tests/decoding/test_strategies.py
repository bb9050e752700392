"""Strategies agree with their definitions, written out, and tokens are drawn as often as they
should be.
"""

import warnings

import numpy as np
import pytest
from chi_square import chi_square_p
from hypothesis import given
from hypothesis import strategies as st

from fairway.decoding.strategies import (
    Strategy,
    draw,
    greedy,
    log_softmax,
    min_p,
    repetition_penalty,
    softmax,
    temperature,
    top_k,
    top_p,
    typical,
)
from fairway.decoding.strategy_options import STRATEGY_NAMES, STRATEGY_OPTIONS
from train_gpt import UserError

logits_of = st.lists(st.floats(-20, 20).map(lambda x: round(x, 1)), min_size=4, max_size=40).map(
    np.array
)
mass_of = st.floats(0.01, 1.0)


def possible_tokens(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def best_first(logits: np.ndarray) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def test_log_softmax_sums_to_one_along_the_last_axis():
    logits = np.random.default_rng(0).normal(0, 30, (5, 7))
    assert np.allclose(np.exp(log_softmax(logits)).sum(axis=1), 1)
    assert np.allclose(np.exp(log_softmax(logits))[2], softmax(logits[2]))


# ---- Against the definitions ---------------------------------------------------------------------
@given(logits_of)
def test_greedy_keeps_the_best_token_and_the_first_of_equal_ones(logits):
    assert possible_tokens(greedy(logits)) == {best_first(logits)[0]}


@given(logits_of, st.integers(1, 50))
def test_top_k_keeps_the_k_best_tokens(logits, count):
    assert possible_tokens(top_k(logits, count)) == set(best_first(logits)[:count])


@given(logits_of, mass_of)
def test_top_p_keeps_the_fewest_tokens_that_have_the_mass(logits, mass):
    chosen, p = possible_tokens(top_p(logits, mass)), softmax(logits)
    order = best_first(p)
    assert chosen == set(order[: len(chosen)])
    assert p[order[: len(chosen)]].sum() >= mass - 1e-9
    assert len(chosen) == 1 or p[order[: len(chosen) - 1]].sum() < mass + 1e-9


@given(logits_of, st.floats(0, 0.99))
def test_min_p_keeps_tokens_near_the_best_probability(logits, least):
    p = softmax(logits)
    certain = {t for t in range(len(p)) if p[t] >= least * p.max() * (1 + 1e-9)}
    possible = {t for t in range(len(p)) if p[t] >= least * p.max() * (1 - 1e-9)}
    assert certain <= possible_tokens(min_p(logits, least)) <= possible
    assert best_first(p)[0] in possible_tokens(min_p(logits, least))


@given(logits_of, mass_of)
def test_typical_keeps_tokens_whose_surprise_is_near_the_entropy(logits, mass):
    p = softmax(logits)
    entropy = -(p * np.log(p)).sum()
    chosen = possible_tokens(typical(logits, mass))
    distance = np.abs(-np.log(p) - entropy)
    ordered, n = sorted(distance), len(chosen)
    assert p[list(chosen)].sum() >= mass - 1e-9
    others = [distance[t] for t in range(len(p)) if t not in chosen]
    assert max(distance[list(chosen)]) <= min(others, default=np.inf) + 1e-9
    last = max(chosen, key=lambda t: distance[t])
    tie = n > 1 and ordered[n - 1] - ordered[n - 2] < 1e-9
    assert n == 1 or p[list(chosen - {last})].sum() < mass + 1e-6 or tie


def test_typical_may_leave_out_the_likeliest_token():
    """With one token of 0.4 and 60 of 0.01 the entropy is nearer to the surprise of the 60."""
    logits = np.log(np.array([0.4] + [0.01] * 60))
    assert 0 not in possible_tokens(typical(logits, 0.5)) and possible_tokens(
        top_p(logits, 0.4)
    ) == {0}


@given(logits_of, st.floats(0.05, 20))
def test_temperature_keeps_the_order_and_scales_the_distances(logits, value):
    scaled = temperature(logits, value)
    assert np.allclose(scaled - scaled[0], (logits - logits[0]) / value)


@given(logits_of, st.lists(st.integers(0, 3), max_size=9), st.floats(1, 5))
def test_the_penalty_applies_once_to_tokens_of_the_text_and_to_no_others(logits, text, penalty):
    out = repetition_penalty(logits, text, penalty)
    for token, (before, after) in enumerate(zip(logits, out, strict=True)):
        expected = (
            before if token not in text else before / penalty if before > 0 else before * penalty
        )
        assert after == expected and after <= before


# ---- Behind one interface ------------------------------------------------------------------------
@pytest.mark.parametrize("name", STRATEGY_NAMES)
@given(logits_of, st.floats(0.1, 3), st.floats(1, 3))
def test_every_strategy_gives_a_distribution_and_does_not_change_the_logits(
    name, logits, heat, penalty
):
    before = logits.copy()
    p = Strategy(name, heat, repetition_penalty=penalty).distribution(logits, [0, 1])
    assert p.min() >= 0 and abs(p.sum() - 1) < 1e-12 and np.array_equal(before, logits)


def test_each_strategy_applies_penalty_then_temperature_then_its_filter():
    logits = np.random.default_rng(3).normal(0, 3, 50)
    for name, apply in dict(
        temperature=lambda x: x,
        **{
            "top-k": lambda x: top_k(x, 5),
            "top-p": lambda x: top_p(x, 0.7),
            "min-p": lambda x: min_p(x, 0.2),
            "typical": lambda x: typical(x, 0.6),
        },
    ).items():
        strategy = Strategy(name, 1.7, 5, 0.7, 0.2, 0.6, 1.4)
        expected = softmax(apply(temperature(repetition_penalty(logits, [4, 9], 1.4), 1.7)))
        assert np.array_equal(strategy.distribution(logits, [4, 9]), expected)


def test_greedy_uses_the_penalty_and_no_temperature():
    logits = np.array([2.0, 1.5, 0.0, -1.0])
    assert Strategy("greedy", 99.0).distribution(logits, [0]).tolist() == [1, 0, 0, 0]
    assert Strategy("greedy", repetition_penalty=2).distribution(logits, [0]).tolist() == [
        0,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_the_largest_vocabulary_and_a_tiny_temperature_work(name):
    logits = np.random.default_rng(0).normal(0, 5, 65_536)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = Strategy(name, 1e-310).distribution(logits, [])
    assert p[logits.argmax()] == 1


@pytest.mark.parametrize("name", STRATEGY_NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(name, bad):
    with pytest.raises(UserError, match=f"the model's best logit is {bad}"):
        Strategy(name).distribution(np.array([0.0, bad, 1.0, 2.0]), [])
    with pytest.raises(UserError, match="best logit is -inf"):
        Strategy(name).distribution(np.full(4, -np.inf), [])


@pytest.mark.parametrize(
    "name, values",
    [
        ("temperature", [0, -1, np.nan, np.inf]),
        ("top_k", [0, -3]),
        ("top_p", [0, 1.01, np.nan, -0.1]),
        ("min_p", [1, -0.1, np.nan]),
        ("typical", [0, 1.1]),
        ("repetition_penalty", [0.9, 0, np.nan, np.inf]),
    ],
)
def test_a_number_out_of_range_is_refused_in_one_line_that_names_the_option(name, values):
    for value in values:
        with pytest.raises(UserError) as refused:
            Strategy(**{name: value})
        assert str(refused.value).startswith(
            f"--{name.replace('_', '-')} is {value:g}; it must be "
        )
        assert "\n" not in str(refused.value)


def test_a_zero_temperature_points_to_greedy_and_an_unknown_name_to_all_names():
    with pytest.raises(UserError, match="--strategy greedy"):
        Strategy(temperature=0)
    with pytest.raises(
        UserError, match="'nucleus'; take one of greedy, temperature, top-k, top-p, min-p, typical"
    ):
        Strategy("nucleus")
    assert set(STRATEGY_OPTIONS) == {f for f in Strategy.__dataclass_fields__ if f != "name"}


# ---- Drawing -------------------------------------------------------------------------------------
def test_tokens_are_drawn_as_often_as_their_probability_says():
    rng, p = np.random.default_rng(0), np.array([0.5, 0.0, 0.3, 0.2, 0.0])
    counts = np.bincount(
        [draw(3 * p, rng) for _ in range(5000)], minlength=5
    )  # the sum does not matter
    assert counts[1] == counts[4] == 0
    assert chi_square_p(counts[p > 0], 5000 * p[p > 0]) > 1e-3


class HighestDraw:
    """A generator that always draws the largest number below 1."""

    def random(self) -> float:
        return np.nextafter(1.0, 0.0)


@given(st.lists(st.sampled_from([0.0, 0.1, 0.3, 1e-17, 0.7]), min_size=1, max_size=9).filter(any))
def test_a_token_of_probability_zero_is_never_drawn(p):
    assert p[draw(np.array(p), HighestDraw())] > 0
    assert all(p[draw(np.array(p), np.random.default_rng(seed))] > 0 for seed in range(5))


def test_the_same_seed_draws_the_same_tokens():
    p = np.full(100, 0.01)
    one, two, other = (np.random.default_rng(seed) for seed in (7, 7, 8))
    pairs = [(draw(p, one), draw(p, two), draw(p, other)) for _ in range(20)]
    assert all(a == b for a, b, _ in pairs) and any(a != c for a, _, c in pairs)
