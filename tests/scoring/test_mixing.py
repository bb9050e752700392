"""The mixture: equal to plain Python, a distribution everywhere, causal and insured."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reference_mixing import ReferenceMixture, rows_of

from fairway.scoring.experts.match import Match, Matches
from fairway.scoring.experts.mixing import (
    EXPERTS,
    MOST_TRUSTED,
    WEIGHTS,
    Mixture,
    MixtureRows,
    expert_columns,
)
from fairway.scoring.experts.ngram import ContextCounts, NGram
from fairway.scoring.experts.temperature import TEMPERATURES
from fairway.scoring.settings import EvalConfig
from train_gpt import UserError

LN2 = math.log(2.0)
seeds = st.integers(0, 2**32 - 1)
kinds = st.sampled_from(WEIGHTS)
modes = st.sampled_from(["linear", "log"])
subsets = st.sets(st.sampled_from(EXPERTS[1:])).map(
    lambda chosen: tuple(e for e in EXPERTS if e in chosen | {"neural"})
)
# Log-probabilities, down to those whose exponential is zero.
CERTAIN = np.array([-1e3, -745.0, -30.0, -1.0, -1e-12, 0.0])


def settings_of(**changed) -> EvalConfig:
    """Return settings with three orders, to keep the reference fast."""
    return EvalConfig(**(dict(ngram_orders=3) | changed))


def random_rows(
    seed: int, rows: int, vocab_size: int = 50, orders: int = 3, extreme: bool = False
) -> MixtureRows:
    """Return any values that could be columns: possible counts, probabilities of at most one."""
    rng = np.random.default_rng(seed)

    def some_logp() -> np.ndarray:
        return rng.choice(CERTAIN, rows) if extreme else -rng.exponential(3.0, rows).clip(0, 30)

    logp, targets = some_logp(), rng.integers(0, vocab_size, rows)
    hint = np.where(
        rng.random(rows) < 0.6,
        np.where(rng.random(rows) < 0.5, targets, rng.integers(0, vocab_size, rows)),
        -1,
    )
    # The target leaves this much for a hint.
    rest = np.log(np.maximum(-np.expm1(np.minimum(logp, -1e-15)), 1e-300))
    hint_logp = np.where(hint == targets, logp, np.minimum(some_logp(), rest))
    seen = rng.choice([0, 1, 2, 4, 9, 70, 2**31 - 1], (rows, orders))
    kinds = np.minimum(seen, rng.integers(1, vocab_size, (rows, orders)))
    hits = np.where(
        rng.random((rows, orders)) < 0.5, 0, np.maximum(seen - kinds + 1, 0) * (seen > 0)
    )
    rate = (
        rng.choice([1e-15, 0.1, 0.5, 0.9, 1 - 1e-15], rows)
        if extreme
        else rng.uniform(0.01, 0.99, rows)
    )
    return MixtureRows(
        logp,
        some_logp(),
        some_logp(),
        hint_logp,
        rng.choice([0.0, 0.5, 1.0, 2.99, 3.0, 8.0], rows),
        ContextCounts(*(part.astype(np.uint32) for part in (hits, seen, kinds))),
        Matches(
            hint.astype(np.int32),
            np.where(hint < 0, 0, rng.choice([8, 12, 20, 512], rows)).astype(np.uint16),
            np.where(hint < 0, 0.5, rate),
        ),
        targets,
        rng.integers(0, 9, rows),
    )


def sliced(inputs: MixtureRows, at: slice) -> MixtureRows:
    """Return some of the rows."""
    return MixtureRows(
        *(type(p)(*(c[at] for c in p)) if isinstance(p, tuple) else p[at] for p in inputs)
    )


def joined(before: MixtureRows, after: MixtureRows) -> MixtureRows:
    """Return the rows of both."""
    return MixtureRows(
        *(
            type(a)(*map(np.concatenate, zip(a, b, strict=True)))
            if isinstance(a, tuple)
            else np.concatenate([a, b])
            for a, b in zip(before, after, strict=True)
        )
    )


def assert_weights_are_distributions(mixture: Mixture) -> None:
    weights = mixture.state.weights
    assert np.isfinite(weights).all() and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-9)
    assert all(np.isfinite(learnt).all() for learnt in mixture.state)


# ---- Values --------------------------------------------------------------------------------------
@given(
    seeds,
    kinds,
    modes,
    subsets,
    st.integers(0, 60),
    st.sampled_from([0.0, 1e-4, 0.3]),
    st.sampled_from([0.1, 1, 3]),
)
def test_equals_plain_python(seed, kind, mode, experts, rows, guard, lr):
    cfg = settings_of(mix_weights=kind, mix_mode=mode, mix_guard=guard, mix_lr=float(lr))
    inputs = random_rows(seed, rows)
    expected = ReferenceMixture(50, cfg, experts).fill(rows_of(inputs))
    np.testing.assert_allclose(Mixture(50, cfg, experts).fill(inputs), expected, rtol=0, atol=1e-9)


@given(seeds, kinds, modes, st.integers(1, 60))
def test_equals_plain_python_at_the_ends_of_what_floats_hold(seed, kind, mode, rows):
    cfg, inputs = (
        settings_of(mix_weights=kind, mix_mode=mode, mix_guard=0.0),
        random_rows(seed, rows, extreme=True),
    )
    expected = ReferenceMixture(50, cfg).fill(rows_of(inputs))
    np.testing.assert_allclose(Mixture(50, cfg).fill(inputs), expected, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_equals_plain_python_over_a_longer_text(kind):
    """One situation is so frequent that its trust fades."""
    cfg, inputs = settings_of(mix_weights=kind, mix_floor=0.0), random_rows(1, 2400)
    inputs.counts.seen[:, 0], inputs.counts.kinds[:, 0] = 3, 1
    inputs.entropy[np.arange(2400) % 10 != 0] = 2.0
    inputs.counts.hits[:, 0] = 3 * (inputs.targets < 40)
    expected = ReferenceMixture(50, cfg).fill(rows_of(inputs))
    mixture = Mixture(50, cfg)
    np.testing.assert_allclose(mixture.fill(inputs), expected, rtol=0, atol=1e-9)
    uses = mixture.state.trust[0, ..., 1]
    assert MOST_TRUSTED / 2 < uses.max() < MOST_TRUSTED < np.count_nonzero(inputs.entropy == 2.0)


def test_exponential_weights_by_hand():
    """Weights become w p^lr, at least .01, normalised; the match expert is wrong at the end."""
    cfg = settings_of(
        mix_weights="exponential", mix_lr=2.0, mix_floor=0.01, mix_guard=0.0, ngram_orders=1
    )
    # The match gives .6, .6, and .4 / 4: V = 5, so four tokens share the rest.
    neural = [0.5, 0.25, 0.9]
    none = np.zeros((3, 1), np.uint32)
    inputs = MixtureRows(
        np.log(neural),
        *np.zeros((4, 3)),
        ContextCounts(none, none, none),
        Matches(np.array([2, 2, 3], np.int32), np.full(3, 8, np.uint16), np.full(3, 0.6)),
        np.array([2, 2, 1]),
        np.ones(3, int),
    )
    first = 0.5 * 0.5 + 0.5 * 0.6
    w_neural = 0.5 * 0.5**2 / (0.5 * 0.5**2 + 0.5 * 0.6**2)  # 25 / 61
    second = w_neural * 0.25 + (1 - w_neural) * 0.6
    a, b = w_neural * 0.25**2, (1 - w_neural) * 0.6**2
    third = a / (a + b) * 0.9 + b / (a + b) * 0.1
    a, b = a / (a + b) * 0.9**2, max(b / (a + b) * 0.1**2, 0.01)
    assert b == 0.01  # the floor
    mixture = Mixture(5, cfg, ("neural", "match"))
    np.testing.assert_allclose(np.exp(mixture.fill(inputs)), [first, second, third], rtol=1e-12)
    weights = mixture.state.weights[0]
    np.testing.assert_allclose(
        weights[[0, EXPERTS.index("match")]], [a / (a + b), b / (a + b)], rtol=1e-12
    )
    assert np.count_nonzero(weights) == 2


def test_columns_that_nothing_reads_are_not_computed():
    """The neural column stands in for them, and the tilt learns only where it is chosen."""
    inputs = random_rows(3, 200)
    for experts, pooled, computed in (
        (("neural", "ngram"), False, (False, False, False)),
        (("neural", "bigram"), False, (True, False, False)),
        (("neural", "tilt"), False, (False, True, False)),
        (("neural", "ngram"), True, (False, True, True)),
    ):
        neural, *_, bigram, _, hint_p, log_odds = expert_columns(inputs, experts, pooled, 50)
        assert tuple(c is not neural for c in (bigram, hint_p, log_odds)) == computed
    for experts in (EXPERTS, EXPERTS[:-1]):
        mixture = Mixture(50, settings_of(), experts)
        mixture.fill(inputs)
        assert mixture.state.lift[1:, 0].any() == ("tilt" in experts)


@given(st.sampled_from([0.01, 0.5, 0.99]), subsets)
def test_initial_weights_are_as_set(neural, experts):
    weights = Mixture(50, settings_of(mix_neural=neural), experts).state.weights[0]
    others = [weights[EXPERTS.index(e)] for e in experts[1:]]
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert np.count_nonzero(weights) == len(experts)
    if others:
        assert weights[0] == pytest.approx(neural) and max(others) == pytest.approx(min(others))


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("mix_weights", WEIGHTS),
        ("mix_mode", ("linear", "log")),
        ("mix_guard", (0.0, 1e-4)),
        ("mix_neural", (0.2, 0.5)),
    ],
)
def test_each_setting_changes_scores(setting, values):
    inputs = random_rows(3, 200)
    sums = {Mixture(50, settings_of(**{setting: value})).fill(inputs).sum() for value in values}
    assert len(sums) == len(values)


@pytest.mark.parametrize(
    ("kind", "setting", "values"),
    [
        ("exponential", "mix_lr", (0.5, 1.0)),
        ("exponential", "mix_floor", (0.0, 0.05)),
        ("em", "mix_rate", (0.01, 0.1)),
        ("sets", "mix_rate", (0.01, 0.1)),
    ],
)
def test_each_setting_of_the_weights_changes_scores(kind, setting, values):
    inputs = random_rows(3, 200)
    first, second = (
        Mixture(50, settings_of(mix_weights=kind, **{setting: value})).fill(inputs).sum()
        for value in values
    )
    assert first != second


# ---- Distributions -------------------------------------------------------------------------------
def one_row(p: np.ndarray, grams: NGram, hint: tuple[int, int, float], target: int) -> MixtureRows:
    """Return what `fill` reads about one target, from the neural distribution of its position."""
    logp = np.log(p)
    again = [logp[target] / t - np.log(np.exp(logp / t).sum()) for t in TEMPERATURES.values()]
    token, length, rate = hint
    return MixtureRows(
        logp[[target]],
        np.array(again[:1]),
        np.array(again[1:]),
        logp[[max(token, 0)]],
        np.array([-(p * logp).sum()]),
        ContextCounts(*(part[[target]] for part in grams.candidate_counts())),
        Matches(np.array([token], np.int32), np.array([length], np.uint16), np.array([rate])),
        np.array([target]),
        np.array([target % 3]),
    )


@pytest.mark.parametrize("mode, kind", [("log", "sets"), *(("linear", kind) for kind in WEIGHTS)])
@pytest.mark.parametrize("guard", [0.0, 0.01])
def test_a_distribution_sums_to_one_and_holds_the_score_of_each_target(mode, kind, guard):
    size, rng = 6, np.random.default_rng(0)
    text = np.concatenate(
        [np.tile([2, 3, 4, 5, 3], 8), rng.integers(0, size, 30), np.tile([2, 3, 4, 5, 3], 4)]
    )
    grams, match = NGram(size, 3), Match(size, 2)
    mixture = Mixture(size, settings_of(mix_mode=mode, mix_weights=kind, mix_guard=guard))
    for at, token in enumerate(text.tolist()):
        p = np.exp(rng.normal(size=size) * rng.choice([0.1, 1, 8]))
        p /= p.sum()
        hint, before = match.hint(), mixture.digest()
        distribution = mixture.distribution(p, grams.candidate_counts(), hint)
        assert mixture.digest() == before
        assert (
            abs(distribution.sum() - 1) < 1e-12
            and (distribution > 0).all()
            and distribution.shape == (size,)
        )
        for target in range(size) if at % 7 == 0 else ():
            scored = copy.deepcopy(mixture).fill(one_row(p, grams, hint, target))
            assert scored[0] == pytest.approx(math.log(distribution[target]), abs=1e-12)
        assert mixture.fill(one_row(p, grams, hint, token))[0] == pytest.approx(
            math.log(distribution[token]), abs=1e-12
        )
        grams.update(token)
        match.update(token)


# ---- Order ---------------------------------------------------------------------------------------
@given(seeds, seeds, kinds, modes, st.integers(1, 80), st.data())
def test_later_rows_change_no_earlier_row(seed, other, kind, mode, rows, data):
    cfg, at = settings_of(mix_weights=kind, mix_mode=mode), data.draw(st.integers(0, rows - 1))
    inputs = random_rows(seed, rows)
    changed = joined(
        sliced(inputs, slice(0, at)), sliced(random_rows(other, rows), slice(at, rows))
    )
    a, b = (Mixture(50, cfg).fill(x) for x in (inputs, changed))
    assert (a[:at] == b[:at]).all()


@given(seeds, kinds, modes, st.integers(1, 80), st.data())
def test_the_size_of_a_target_moves_later_rows_only(seed, kind, mode, rows, data):
    cfg, at = (
        settings_of(mix_weights=kind, mix_mode=mode, mix_guard=0.5),
        data.draw(st.integers(0, rows - 1)),
    )
    inputs = random_rows(seed, rows)
    longer = inputs._replace(sizes=inputs.sizes + 7 * (np.arange(rows) >= at))
    a, b = (Mixture(50, cfg).fill(x) for x in (inputs, longer))
    assert (a[: at + 1] == b[: at + 1]).all()


@given(seeds, kinds, modes, st.integers(0, 80), st.data())
def test_pieces_make_no_difference(seed, kind, mode, rows, data):
    cfg, inputs = settings_of(mix_weights=kind, mix_mode=mode), random_rows(seed, rows)
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, rows), max_size=4))), rows]
    at_once, cut = Mixture(50, cfg), Mixture(50, cfg)
    pieces = [
        cut.fill(sliced(inputs, slice(a, b))) for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    assert (at_once.fill(inputs) == np.concatenate(pieces)).all()
    assert at_once.digest() == cut.digest()


@given(seeds, kinds, st.integers(1, 80))
def test_the_digest_changes_with_the_state(seed, kind, rows):
    cfg, inputs = settings_of(mix_weights=kind), random_rows(seed, rows)
    a, b = Mixture(50, cfg), Mixture(50, cfg)
    seen = {a.digest()}
    assert seen == {b.digest()}
    for j in range(min(rows, 5)):
        a.fill(sliced(inputs, slice(j, j + 1)))
        b.fill(sliced(inputs, slice(j, j + 1)))
        assert a.digest() == b.digest() and a.digest() not in seen
        seen.add(a.digest())


def test_the_trace_holds_the_mean_weights_of_each_call():
    mixture = Mixture(50, settings_of())
    for rows in (30, 0, 50):
        mixture.fill(random_rows(0, rows))
    assert len(mixture.trace) == 2
    for weights in mixture.trace:
        assert (
            weights.shape == (len(EXPERTS),)
            and weights.sum() == pytest.approx(1)
            and (weights > 0).all()
        )


# ---- The insurance -------------------------------------------------------------------------------
def hostile(seed: int, rows: int, phase: int, bad_first: bool) -> MixtureRows:
    """Return phases in turn: experts right where the neural model is wrong, then the reverse.

    Wrong experts are certain. Hints follow the phase, or are always wrong. Every third token stands
    for no bytes.
    """
    rng = np.random.default_rng(seed)
    good = (np.arange(rows) // phase % 2 == 0) ^ bad_first
    targets, none = rng.integers(0, 50, rows), rng.random() < 0.3
    logp = np.where(
        good, rng.choice([-1e3, -50.0, -3.0, -0.1], rows), rng.choice([0.0, -1e-9, -0.7], rows)
    )
    right = good & (rng.random() < 0.5)
    hint = np.where(right, targets, (targets + 1) % 50)
    hint_logp = np.where(
        right, logp, np.log(np.maximum(-np.expm1(np.minimum(logp, -1e-15)), 1e-300))
    )
    seen = np.full((rows, 3), 2**31 - 1)
    return MixtureRows(
        logp,
        np.where(good, logp, -200.0),
        np.where(good, logp, -1e3),
        hint_logp,
        np.full(rows, rng.choice([0.0, 2.0])),
        ContextCounts(
            *(
                x.astype(np.uint32)
                for x in (np.where(good[:, None], seen, 0), seen * (not none), np.ones_like(seen))
            )
        ),
        Matches(
            hint.astype(np.int32),
            np.full(rows, 40, np.uint16),
            np.full(rows, rng.choice([0.5, 0.999, 1 - 1e-15])),
        ),
        targets,
        np.where(np.arange(rows) % 3 == 0, 0, rng.integers(1, 5, rows)),
    )


def assert_insured(mixture: Mixture, inputs: MixtureRows, guard: float) -> None:
    out = mixture.fill(inputs)
    assert np.isfinite(out).all()
    cost = np.cumsum(inputs.logp - out) / LN2
    # The sums themselves are rounded.
    room = 1e-9 + 1e-14 * np.cumsum(np.abs(inputs.logp) + np.abs(out))
    assert (cost <= guard * np.cumsum(inputs.sizes) + room).all()
    assert_weights_are_distributions(mixture)


lrs = st.sampled_from([0.0, 1.0, 100.0])
guards = st.sampled_from([1e-6, 1e-4, 0.1, 10.0])


@given(
    seeds,
    st.integers(1, 2000),
    st.sampled_from([1, 2, 7, 40, 300]),
    st.booleans(),
    kinds,
    modes,
    guards,
    lrs,
    st.sampled_from([1e-4, 0.05, 1.0]),
)
@example(0, 1, 1, True, "sets", "linear", 1e-4, 1.0, 0.05)
@example(0, 2000, 2000, True, "sets", "log", 1e-4, 1.0, 0.05)
def test_the_guard_bounds_the_cost_on_hostile_text(
    seed, rows, phase, bad_first, kind, mode, guard, lr, rate
):
    cfg = settings_of(
        mix_weights=kind, mix_mode=mode, mix_guard=guard, mix_lr=lr, mix_floor=0.0, mix_rate=rate
    )
    assert_insured(Mixture(50, cfg), hostile(seed, rows, phase, bad_first), guard)


@given(seeds, st.integers(1, 2000), st.booleans(), kinds, modes, guards, subsets)
def test_the_guard_bounds_the_cost_on_any_text(seed, rows, extreme, kind, mode, guard, experts):
    cfg = settings_of(mix_weights=kind, mix_mode=mode, mix_guard=guard)
    assert_insured(Mixture(50, cfg, experts), random_rows(seed, rows, extreme=extreme), guard)


def test_a_full_account_is_all_that_can_be_lost():
    """The weights have nearly forgotten the neural model, then a token comes of which it is sure.

    The gain is lost, and no more: 40 tokens of 3 bits each do not pay for one of 150.
    """
    cfg = settings_of(mix_weights="exponential", mix_lr=100.0, mix_floor=0.0, ngram_orders=6)
    inputs = random_rows(0, 41, orders=6)
    inputs.logp[:40], inputs.logp[40] = math.log(0.125), 0.0
    for column, gained, lost in zip(inputs.counts, (10**9, 10**9, 1), (0, 10**9, 1), strict=True):
        column[:40], column[40] = gained, lost
    mixture = Mixture(50, cfg, ("neural", "ngram"))
    out = mixture.fill(inputs)
    gained = (out - inputs.logp)[:40].sum() / LN2
    assert 100 < gained < 121 and -out[40] / LN2 == pytest.approx(gained, rel=1e-3)
    uninsured = Mixture(50, replace(cfg, mix_guard=0.0), ("neural", "ngram"))
    assert -uninsured.fill(inputs)[40] / LN2 > 145


def test_the_first_target_has_the_neural_score():
    """No gain can pay for anything else yet."""
    inputs = random_rows(5, 1)
    assert Mixture(50, settings_of()).fill(inputs)[0] == inputs.logp[0]


@pytest.mark.parametrize("mode", ["linear", "log"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_stay_distributions_over_20_000_certainties(kind, mode):
    inputs, rng = random_rows(2, 20_000, extreme=True), np.random.default_rng(0)
    certain = rng.choice([math.log(1e-300), 0.0], (3, 20_000))
    inputs = inputs._replace(
        logp=certain[0],
        sharp=certain[1],
        flat=certain[2],
        hint_logp=np.where(
            inputs.matches.hint == inputs.targets,
            certain[0],
            np.where(certain[0] == 0, math.log(1e-300), -1e-12),
        ),
    )
    mixture = Mixture(50, settings_of(mix_weights=kind, mix_mode=mode, mix_floor=0.0, mix_lr=3.0))
    assert np.isfinite(mixture.fill(inputs)).all()
    assert_weights_are_distributions(mixture)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_stay_distributions_where_every_expert_gives_zero(kind):
    """All experts are neural ones, at a probability too small for a float."""
    inputs = random_rows(0, 3000)
    for column in (inputs.logp, inputs.sharp, inputs.flat):
        column[:] = -1e3
    mixture = Mixture(50, settings_of(mix_weights=kind), ("neural", "sharp", "flat"))
    assert np.isfinite(mixture.fill(inputs)).all()
    assert_weights_are_distributions(mixture)


# ---- State on disk -------------------------------------------------------------------------------
@given(seeds, kinds, modes, st.integers(1, 60), st.data())
def test_a_saved_mixture_goes_on(tmp_path_factory, seed, kind, mode, rows, data):
    cfg, at = settings_of(mix_weights=kind, mix_mode=mode), data.draw(st.integers(0, rows))
    inputs, path = random_rows(seed, rows), tmp_path_factory.mktemp("state") / "mixture"
    mixture, again = Mixture(50, cfg), Mixture(50, cfg)
    mixture.fill(sliced(inputs, slice(0, at)))
    mixture.save(path)
    again.restore(path)
    assert again.digest() == mixture.digest()
    rest = sliced(inputs, slice(at, rows))
    assert (again.fill(rest) == mixture.fill(rest)).all() and again.digest() == mixture.digest()


@pytest.fixture(scope="module")
def state_file(tmp_path_factory):
    mixture, path = Mixture(50, settings_of()), tmp_path_factory.mktemp("mixture") / "state"
    mixture.fill(random_rows(0, 50))
    mixture.save(path)

    class Quiet(bytes):
        __repr__ = object.__repr__  # hypothesis prints it when a test fails

    return Quiet(path.read_bytes())


@given(st.integers(0, 2**32 - 1), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_refused_or_is_the_same(tmp_path_factory, state_file, seed, flip, cut):
    at = int(np.random.default_rng(seed).integers(len(state_file)))
    changed = bytearray(state_file)
    changed[at] ^= flip
    path, mixture = tmp_path_factory.mktemp("damaged") / "state", Mixture(50, settings_of())
    path.write_bytes(state_file)
    mixture.restore(path)
    undamaged = mixture.digest()
    path.write_bytes(state_file[:at] if cut else changed)
    try:
        mixture.restore(path)
    except UserError as e:
        assert "\n" not in str(e) and "score from the start" in str(e) and str(path) in str(e)
    else:
        assert not cut
    assert mixture.digest() == undamaged


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "state"
    NGram(50, memory_bytes=1 << 14).save(path)
    with pytest.raises(UserError, match="not a whole file of mixture state"):
        Mixture(50, settings_of()).restore(path)
    Mixture(50, settings_of(ngram_orders=4)).save(path)
    with pytest.raises(UserError, match="not a whole file of mixture state"):
        Mixture(50, settings_of()).restore(path)
    with pytest.raises(UserError, match="cannot be read"):
        Mixture(50, settings_of()).restore(tmp_path / "none")
