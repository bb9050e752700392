"""Neural scoring: each row is scored once, in a window that depends on earlier tokens alone."""

import dataclasses
import functools
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from models import trained

from fairway.scoring import neural as scoring
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.experts.temperature import TEMPERATURES
from fairway.scoring.neural import (
    KINDS,
    Neural,
    Windows,
    make_neural,
    neural_columns,
    plan,
    times_scored,
)
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, Runtime, UserError, mean_nats

V, LENGTH = 97, 16  # of the models of tests/models.py
ALONE = Runtime(0, 1, torch.device("cpu"), "test")
MODES = [
    dict(eval_stride=4),
    dict(eval_stride=5, eval_documents=True),
    dict(eval_mode="cached"),
    dict(eval_mode="cached", eval_documents=True),
    dict(eval_seq_len=40, eval_stride=8),
]


@pytest.fixture(scope="module")
def model() -> GPT:
    return trained(smear_gate=True, bigram_vocab_size=32, bigram_dim=8, num_layers=2)


def text(size: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, V, size).astype(np.uint16)
    tokens[rng.random(size) < 0.02] = BOS_ID
    return tokens


def scorer(model: GPT, rt: Runtime = ALONE, **settings) -> Neural:
    return Neural(model, EvalConfig(**(dict(eval_stride=4) | settings)), rt)


def filled(neural: Neural, tokens: np.ndarray, kinds=KINDS) -> dict[str, np.ndarray]:
    columns = columns_in_memory(len(tokens) - 1, kinds)
    neural.fill(tokens, columns, np.arange(len(tokens) - 1) % V - 1)
    assert columns.complete()
    return {name: columns[name] for name in columns.names}


def logp_of(neural: Neural, tokens: np.ndarray) -> np.ndarray:
    return filled(neural, tokens, {"logp": "f8"})["logp"]


# ---- The plan ------------------------------------------------------------------------------------
texts = st.builds(
    lambda size, often, seed: np.where(np.random.default_rng(seed).random(size) < often, BOS_ID, 9),
    st.integers(0, 150),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.integers(0, 999),
)


@st.composite
def plans(draw):
    length = draw(st.integers(1, 60))
    return draw(texts), length, draw(st.integers(1, length)), draw(st.booleans())


@given(plans())
@example((np.full(0, 9), 8, 2, True))
@example((np.full(1, BOS_ID), 8, 2, True))
@example((np.full(2, BOS_ID), 8, 2, True))
def test_each_row_is_scored_once(planned):
    tokens, length, stride, documents = planned
    windows, rows = plan(*planned), max(len(tokens) - 1, 0)
    assert (times_scored(windows, rows) == 1).all() and (len(windows.first) > 0) == (rows > 0)
    assert (np.diff(windows.first) > 0).all() and (windows.first[:1] == 0).all()
    assert (windows.start <= windows.first).all() and (windows.first < windows.end).all()
    assert (windows.end - windows.start <= length).all() and (windows.end <= rows).all()
    assert (windows.end[:-1] == windows.first[1:]).all()


def starts_of_rows(planned) -> np.ndarray:
    windows, rows = plan(*planned), np.arange(max(len(planned[0]) - 1, 0))
    return (
        windows.start[np.searchsorted(windows.first, rows, side="right") - 1] if len(rows) else rows
    )


@given(plans(), st.data())
def test_the_context_of_a_row_depends_on_the_tokens_before_its_target(planned, data):
    tokens, *how = planned
    at = data.draw(st.integers(0, len(tokens)))
    known, other = tokens[:at], data.draw(texts)
    changed = np.concatenate([known, other])
    a, b = (
        starts_of_rows((x, *how))[: max(min(at, len(tokens) - 1, len(changed) - 1), 0)]
        for x in (tokens, changed)
    )
    assert (a == b).all()


@given(plans())
def test_rows_have_as_much_context_as_the_window_allows(planned):
    """A row sees its whole document or text, or at least `length - stride` earlier tokens."""
    tokens, length, stride, documents = planned
    for row, start in enumerate(starts_of_rows(planned)):
        begin = max((i for i in range(row + 1) if documents and tokens[i] == BOS_ID), default=0)
        assert (
            start == begin if row - begin < length else length - stride < row - start + 1 <= length
        )
        assert start >= begin and (start - begin) % stride == 0


def test_a_plan_by_hand():
    found = plan(np.full(12, 9), 8, 2)
    assert [(w.tolist()) for w in found] == [[0, 2, 4], [0, 8, 10], [8, 10, 11]]
    tokens = np.array([9, 9, BOS_ID, 9, BOS_ID])
    assert [w.tolist() for w in plan(tokens, 8, 2, True)] == [[0, 2], [0, 2], [2, 4]]


def test_coverage_counts():
    assert times_scored(
        Windows(np.array([0, 2]), np.array([0, 2]), np.array([3, 5])), 6
    ).tolist() == [
        1,
        1,
        2,
        1,
        1,
        0,
    ]


# ---- Rows ----------------------------------------------------------------------------------------
@torch.no_grad()
def log_softmax_at_the_end(model: GPT, tokens: np.ndarray, rope, attention=None) -> np.ndarray:
    x = torch.from_numpy(tokens.astype(np.int64))[None]
    rope = tuple(t[: len(tokens)] for t in rope)
    logits = model.from_embedded(model.embed(x), rope, *([attention] if attention else []))
    return logits[0, -1].double().log_softmax(0).numpy()


@pytest.mark.parametrize(
    "settings",
    [
        dict(eval_stride=3),
        dict(eval_stride=16),
        dict(eval_seq_len=24, eval_stride=7),
        dict(eval_stride=4, eval_documents=True),
    ],
    ids=str,
)
def test_sliding_windows_agree_with_one_window_at_a_time(model, settings):
    tokens, neural = text(90), scorer(model, **settings)
    how = (
        settings.get("eval_seq_len", LENGTH),
        settings["eval_stride"],
        settings.get("eval_documents", False),
    )
    found = logp_of(neural, tokens)
    for row, start in enumerate(starts_of_rows((tokens, *how))):
        alone = log_softmax_at_the_end(model, tokens[start : row + 1], neural.rope)
        assert found[row] == pytest.approx(alone[tokens[row + 1]], abs=2e-6)


def test_windows_side_by_side_are_what_training_reports(model):
    for size in (2, 16, 17, 18, 300):
        tokens = text(size)
        mean = mean_nats(
            model, tokens, dataclasses.replace(model.cfg, val_batch_size=8 * 64), ALONE
        )
        assert -logp_of(scorer(model, eval_stride=LENGTH), tokens).mean() == pytest.approx(
            mean, abs=1e-6
        )


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_neither_batches_nor_ranks_change_a_row(model, settings):
    tokens = text()
    whole = filled(scorer(model, **settings), tokens)
    for batch, world in ((1, 1), (100, 1), (100, 2), (8192, 3)):
        columns = columns_in_memory(len(tokens) - 1, KINDS)
        for rank in range(world):
            neural = scorer(
                model, ALONE._replace(rank=rank, world=world), eval_batch_tokens=batch, **settings
            )
            neural.score(
                tokens, neural.plan(tokens), columns, np.arange(len(tokens) - 1) % V - 1, None
            )
        assert columns.complete()
        for name in KINDS:
            np.testing.assert_allclose(columns[name], whole[name], rtol=0, atol=1e-7, err_msg=name)
        assert abs(columns["logp"].mean() - whole["logp"].mean()) / math.log(2) < 1e-9


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_later_tokens_change_no_row(model, settings):
    tokens, neural = text(), scorer(model, **settings)
    whole = logp_of(neural, tokens)
    for at in (1, 2, 17, 150, 399):
        changed = tokens.copy()
        changed[at:] = np.where(np.arange(400 - at) % 9 == 0, BOS_ID, 3)
        for other in (changed, tokens[: max(at, 2)]):
            rows = max(at - 1, 0)
            np.testing.assert_allclose(
                logp_of(neural, other)[:rows], whole[:rows], rtol=0, atol=2e-6
            )


@pytest.mark.parametrize("documents", [False, True])
def test_cached_scoring_is_one_long_pass_with_banded_attention(model, documents):
    """A row of a stream sees `length` tokens in each layer: the reference is one pass over it."""

    def band(q, k, v):
        back = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=(back >= 0) & (back < LENGTH), enable_gqa=True
        )

    tokens, neural = text(500), scorer(model, eval_mode="cached", eval_documents=documents)
    found, reach = logp_of(neural, tokens), LENGTH * (scoring.WARM + 1)
    starts = starts_of_rows((tokens, reach, LENGTH * scoring.WARM, documents))
    assert len(set(starts.tolist())) > 2
    for row in [*range(40), *range(130, 500, 13)][:-1]:
        expected = log_softmax_at_the_end(model, tokens[starts[row] : row + 1], neural.rope, band)
        assert found[row] == pytest.approx(expected[tokens[row + 1]], abs=1e-4)


def test_the_size_of_pieces_changes_no_row(model, monkeypatch):
    tokens, found = text(500), []
    for piece in (1, 7, 128, 200):
        monkeypatch.setattr(scoring, "PIECE", piece)
        found.append(logp_of(scorer(model, eval_mode="cached"), tokens))
        np.testing.assert_allclose(found[-1], found[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["sliding", "cached"])
def test_separate_documents_do_not_affect_each_other(model, mode):
    tokens = text(200)
    tokens[90] = BOS_ID
    changed = np.concatenate([text(57, seed=1), tokens[90:]])
    for documents in (True, False):
        a, b = (
            logp_of(scorer(model, eval_mode=mode, eval_documents=documents), x)[-109:]
            for x in (tokens, changed)
        )
        assert (np.abs(a - b).max() < 2e-6) == documents


def test_longer_context_than_in_training_runs_and_ntk_matters(model):
    tokens = text(200)
    plain = logp_of(scorer(model), tokens)
    ntk, raw = (
        logp_of(scorer(model, eval_seq_len=64, ntk_rope=on), tokens) for on in (True, False)
    )
    np.testing.assert_allclose(
        raw[:LENGTH], plain[:LENGTH], rtol=0, atol=2e-6
    )  # the context is the same up to here
    for a, b in ((ntk, raw), (plain[LENGTH:], raw[LENGTH:])):
        assert np.abs(a - b).max() > 1e-3
    shorter = [logp_of(scorer(model, eval_seq_len=8, ntk_rope=on), tokens) for on in (True, False)]
    assert (shorter[0] == shorter[1]).all()


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_distributions_agree_with_the_columns(model, settings):
    tokens, neural = text(300), scorer(model, **settings)
    columns = filled(neural, tokens)
    rows = np.array([298, 0, 15, 16, 17, 150, 1, 3, 150, 290, 3])  # in any order, some twice
    held = neural.distributions(tokens, rows)
    assert held.shape == (11, V) and np.abs(held.sum(axis=1) - 1).max() < 1e-12
    np.testing.assert_allclose(
        np.log(held[np.arange(11), tokens[rows + 1]]), columns["logp"][rows], atol=2e-6
    )
    np.testing.assert_allclose(
        -(held * np.log(held)).sum(axis=1), columns["entropy"][rows], atol=2e-6
    )
    alone = np.concatenate([neural.distributions(tokens[: row + 2], [row]) for row in rows])
    np.testing.assert_allclose(alone, held, rtol=0, atol=2e-6)
    assert neural.distributions(tokens, np.zeros(0, int)).shape == (0, V)


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 2, 3, LENGTH, LENGTH + 1, LENGTH + 2])
def test_short_texts(model, settings, size):
    tokens, neural = text(size), scorer(model, **settings)
    columns = columns_in_memory(max(size - 1, 0), KINDS)
    neural.fill(tokens, columns, np.full(max(size - 1, 0), -1))
    assert columns.complete() and np.isfinite(columns["logp"]).all() and (columns["logp"] < 0).all()
    for where in neural.boundaries(tokens).values():
        assert ((0 <= where) & (where < max(size - 1, 1))).all()


def test_boundaries_are_the_rows_where_something_begins(model):
    tokens = text(300)
    found = scorer(model, eval_stride=4, eval_batch_tokens=192).boundaries(tokens)
    assert set(found["document"].tolist()) == {0, *np.flatnonzero(tokens[:-1] == BOS_ID).tolist()}
    assert found["window"].tolist() == [0, *range(16, 299, 4)]
    assert found["batch"].tolist() == found["window"][::12].tolist()
    assert scorer(model, eval_mode="cached").boundaries(tokens)["chunk"].tolist() == [0, 128, 256]


@pytest.mark.parametrize("fixed", [False, True])
def test_logits_are_made_only_where_rows_are_read(model, monkeypatch, fixed):
    tokens, firsts, read = text(700), [], Neural.window_logits
    neural = scorer(model, eval_seq_len=160, eval_stride=16, eval_batch_tokens=640)
    neural.fixed_shape = fixed  # as on CUDA: then only two values are allowed
    monkeypatch.setattr(
        Neural,
        "window_logits",
        lambda self, x, first=0: (firsts.append(first), read(self, x, first))[1],
    )
    some = logp_of(neural, tokens)
    assert set(firsts) == {0, 128} and firsts.count(0) == 1
    monkeypatch.setattr(Neural, "unread", lambda *_: 0)
    np.testing.assert_allclose(some, logp_of(neural, tokens), rtol=0, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch):
    """Let `compile` stop before machine code; return a function that counts graphs made so far."""
    from torch._dynamo.utils import counters  # takes seconds to import

    torch._dynamo.reset()
    counters.clear()
    scoring.compiled_window_logits.cache_clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    scoring.compiled_window_logits.cache_clear()


@pytest.mark.parametrize("settings", MODES[1:2], ids=str)
def test_compiled_windows_score_as_plain_ones_and_are_compiled_once(model, graphs, settings):
    """Windows at the end, in short documents, of single rows: all have the one shape."""
    tokens, rows, plain = text(203), np.array([201, 0, 77]), scorer(model, **settings)
    compiled = scorer(model, eval_compile="on", eval_batch_tokens=160, **settings)
    scores = logp_of(compiled, tokens)
    np.testing.assert_allclose(scores, logp_of(plain, tokens), rtol=0, atol=1e-5)
    held, expected = (s.distributions(tokens, rows) for s in (compiled, plain))
    np.testing.assert_allclose(held, expected, rtol=0, atol=1e-5)
    again = scorer(model, eval_compile="on", eval_batch_tokens=160, **settings)  # the certificate's
    assert np.array_equal(logp_of(again, tokens), scores) and graphs() == 1


@pytest.mark.slow
def test_learning_has_one_more_graph(model, graphs):
    tokens, settings = text(203), dict(ttt="chunks", ttt_chunk=64, ttt_lr=0.01, eval_stride=4)
    plain, compiled = (
        make_neural(model, EvalConfig(eval_compile=how, **settings), ALONE) for how in ("off", "on")
    )
    found, expected = (logp_of(s, tokens) for s in (compiled, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert len(compiled.digests) == 4 and graphs() == 2


@pytest.mark.slow
def test_machine_code_of_windows_scores_as_plain_ones(model):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    tokens = text(203)
    found, plain = (logp_of(scorer(model, eval_compile=how), tokens) for how in ("on", "auto"))
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
    assert not np.array_equal(found, plain)  # it is other code


def test_batches_hold_no_filler_alone(model):
    """Five windows in batches of five are one batch, although shapes are multiples of four."""
    neural = scorer(model, eval_batch_tokens=5 * scoring.ROUND)
    batches = neural.batches(neural.plan(text(33)))
    assert [b.tolist() for b in batches] == [[0, 1, 2, 3, 4]]


# ---- Filling -------------------------------------------------------------------------------------
def test_a_killed_run_continues_and_scores_no_row_twice(model):
    tokens, calls = text(), []
    neural, hints = scorer(model), np.full(399, -1)
    whole = filled(neural, tokens, {"logp": "f8"})["logp"]
    columns = columns_in_memory(399, {"logp": "f8"})

    def kill(rows, logp):
        calls.append(rows)
        if sum(map(len, calls)) > 100:
            raise KeyboardInterrupt

    few = scorer(model, eval_batch_tokens=64)
    with pytest.raises(KeyboardInterrupt):
        few.fill(tokens, columns, hints, kill)
    done = columns.covered.astype(bool)
    assert 100 < done.sum() < 399
    columns.covered[np.flatnonzero(done)[-2:]] = (
        0  # a window cut in the middle: all of it is scored again
    )
    calls.clear()
    few.fill(tokens, columns, hints, lambda rows, logp: calls.append(rows))
    assert columns.complete() and len(np.concatenate(calls)) < 399 - done.sum() + 16
    np.testing.assert_allclose(columns["logp"], whole, rtol=0, atol=2e-6)
    calls.clear()
    few.fill(tokens, columns, hints, lambda rows, logp: calls.append(rows))
    assert calls == []


def test_progress_is_reported_once_for_every_row(model):
    tokens, calls = text(), []
    columns = columns_in_memory(399, {"logp": "f8"})
    scorer(model, eval_batch_tokens=64).fill(
        tokens, columns, None, lambda *filled_rows: calls.append(filled_rows)
    )
    rows, logp = map(np.concatenate, zip(*calls, strict=True))
    assert sorted(rows.tolist()) == list(range(399)) and (columns["logp"][rows] == logp).all()


@pytest.mark.parametrize("mode", ["sliding", "cached"])
def test_damaged_weights_are_one_line(mode):
    broken = trained()
    with torch.no_grad():
        broken.blocks[1].mlp.fc.weight[0, 0] = math.nan
    with pytest.raises(
        UserError, match="no number for token 1: its weights are damaged or too large"
    ) as caught:
        logp_of(scorer(broken, eval_mode=mode), text(60))
    assert "\n" not in str(caught.value)


# ---- Columns from logits -------------------------------------------------------------------------
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from([4, 33]),
    st.integers(1, 20),
)
def test_columns_are_plain_float64_arithmetic(seed, scale, size, rows):
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(rows, size)) * scale).clip(-30, 30).astype(np.float32)
    targets, hints = (
        rng.integers(0, size, rows).astype(np.uint16),
        rng.integers(-1, size, rows).astype(np.int32),
    )
    found = neural_columns(torch.from_numpy(z), targets, hints, list(KINDS))
    assert {name: c.dtype.str[1:] for name, c in found.items()} == KINDS
    for j in range(rows):
        logits = z[j].astype(np.float64)
        e = np.exp(logits - logits.max())
        p = e / e.sum()
        logp = np.log(p)
        wanted = dict(logp=logp[targets[j]], hint=logp[max(hints[j], 0)], entropy=-(p * logp).sum())
        for name, t in TEMPERATURES.items():
            wanted[name] = np.log(p[targets[j]] ** (1 / t) / (p ** (1 / t)).sum())
        for name, value in wanted.items():
            assert found[name][j] == pytest.approx(value, abs=1e-9), name


def test_only_the_named_columns_are_computed():
    assert list(neural_columns(torch.zeros(2, 5), np.zeros(2, np.uint16), None, ["logp"])) == [
        "logp"
    ]
    uniform = neural_columns(
        torch.zeros(2, 5), np.zeros(2, np.uint16), np.zeros(2, np.int32), list(KINDS)
    )
    for name, values in uniform.items():
        np.testing.assert_allclose(np.abs(values), math.log(5), rtol=1e-12, err_msg=name)
