"""Predicting token by token: one stream costs what a score counts, many share what they should."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import trained

from fairway.compression.predictors import MixedPredictor, RollingPredictor, WindowedPredictor
from fairway.scoring.experts.match import POINTER, Match
from fairway.scoring.experts.ngram import NGram
from fairway.scoring.memory import Memory
from fairway.scoring.mixed import MixedScorer
from fairway.scoring.neural import Neural, make_neural
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, ByteTable, Runtime, UserError

V = 97
ALONE = Runtime(0, 1, torch.device("cpu"), "test")
TABLE = ByteTable(np.arange(V, dtype=np.int16) % 5, np.arange(V) % 3 == 0, np.arange(V) < 4)
FEATURES = dict(smear_gate=True, bigram_vocab_size=32, bigram_dim=8)
SCORES = [
    dict(),
    dict(eval_mode="cached"),
    dict(eval_documents=True, expert_reset=True, eval_stride=5),
    dict(eval_mode="cached", eval_documents=True, eval_seq_len=24, mix_mode="log"),
    dict(
        eval_seq_len=7,
        eval_stride=7,
        mix_weights="exponential",
        match_least=3,
        ngram_orders=3,
        mix_guard=0.0,
    ),
]


@pytest.fixture(scope="module")
def model():
    return trained(**FEATURES)


def some_text(n: int, seed: int = 0) -> np.ndarray:
    """Return tokens int64[n] that repeat in runs, with a BOS now and then."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(2, V, 40) for _ in range(4)]
    text = np.concatenate(
        [
            part[(start := rng.integers(20)) : start + rng.integers(5, 20)]
            for part in (parts[i] for i in rng.integers(0, 4, n))
        ]
    )[:n]
    text[rng.random(n) < 0.02] = BOS_ID
    return text


def costs(predictor, streams: list[np.ndarray]) -> np.ndarray:
    """Return float64[steps, B], the log-probability in nats of each token before it is read."""
    logp = []
    for tokens in np.stack(streams, axis=1):
        p = predictor.probabilities()
        assert (
            p.shape == (len(streams), V)
            and (p >= 0).all()
            and np.allclose(p.sum(axis=1), 1, atol=1e-9)
        )
        logp.append(np.log(p[np.arange(len(tokens)), tokens]))
        predictor.learn(tokens)
    return np.array(logp)


def mixed(model, streams: int, cfg: EvalConfig, count: int) -> MixedPredictor:
    first = np.full(streams, BOS_ID)
    return MixedPredictor(RollingPredictor(model, first), TABLE, cfg, first, count)


# ==== ONE STREAM: WHAT A SCORE COUNTED ============================================================
@pytest.mark.parametrize(
    "settings", SCORES, ids=lambda s: "-".join(map(str, s.values())) or "default"
)
def test_one_stream_costs_what_the_score_says(model, settings):
    cfg = EvalConfig(**(dict(eval_stride=4) | settings))
    text, neural = some_text(300), Neural(model, cfg, ALONE)
    scored = MixedScorer(neural, cfg, TABLE).score(text.astype(np.uint16))
    predictor = MixedPredictor(WindowedPredictor(neural, text[:1]), TABLE, cfg, text[:1], len(text))
    assert np.abs(costs(predictor, [text[1:]])[:, 0] - scored).max() < 2e-5


def test_a_model_that_trains_as_it_reads_is_refused(model):
    cfg = EvalConfig(ttt="bias")
    with pytest.raises(UserError, match="cannot be decoded; unset TTT"):
        WindowedPredictor(make_neural(model, cfg, ALONE), np.array([BOS_ID]))


# ==== MANY STREAMS ================================================================================
@torch.no_grad()
def test_without_experts_streams_are_independent(model):
    texts = [some_text(50, seed) for seed in range(3)]
    together = costs(RollingPredictor(model, np.full(3, BOS_ID)), texts)
    for nth, text in enumerate(texts):
        logits = Memory(model).logits(torch.from_numpy(np.append(BOS_ID, text))[None])[0]
        alone = logits.double().log_softmax(dim=1).numpy()[np.arange(50), text]
        assert np.abs(together[:, nth] - alone).max() < 1e-5


def test_with_experts_a_stream_learns_from_the_others(model):
    """The second stream reads what the first read a little earlier; the third reads new text."""
    cfg, text = EvalConfig(), np.random.default_rng(0).integers(2, V, 240)
    texts = [text[40:140], text[20:120], text[140:240]]
    costs_alone = [costs(mixed(model, 1, cfg, 100), [t]).mean() for t in texts]
    together = costs(mixed(model, 3, cfg, 300), texts).mean(axis=0)
    assert together[1] > costs_alone[1] + 1 and abs(together[2] - costs_alone[2]) < 0.5


def test_the_same_steps_give_the_same_bits(model):
    texts = [some_text(60, seed) for seed in range(4)]
    runs = [costs(mixed(model, 4, EvalConfig(), 240), texts) for _ in range(2)]
    assert np.array_equal(*runs)


@given(st.integers(1, 5), st.integers(3, 40), st.integers(2, 4), st.integers(0, 99))
def test_a_match_never_points_where_its_stream_has_not_been(streams, steps, kinds, seed):
    text, longest = np.random.default_rng(seed).integers(2, 2 + kinds, (steps, streams)), steps
    experts = Match(V, least=2).side_by_side(streams, longest)
    for t, tokens in enumerate(text):
        for expert, token in zip(experts, tokens[:, None], strict=True):
            expert.fill(token)
        for expert in experts:
            expert.end_at_unread(longest)
            pointer, (hint, length, _) = expert.running[POINTER], expert.hint()
            assert pointer < 0 or pointer % longest <= t
            assert (hint < 0) == (length == 0) and hint in (-1, *text[: t + 1].ravel())


@given(st.lists(st.integers(2, 6), min_size=1, max_size=60))
def test_one_stream_side_by_side_is_an_expert_alone(tokens):
    tokens = np.array(tokens)
    for alone, beside in (
        (Match(V, least=2), Match(V, least=2).side_by_side(1, len(tokens))[0]),
        (NGram(V), NGram(V).side_by_side(1)[0]),
    ):
        for token in tokens[:, None]:
            for a, b in zip(alone.fill(token), beside.fill(token), strict=True):
                assert np.array_equal(a, b)
            if isinstance(beside, Match):
                beside.end_at_unread(len(tokens) + 1)
            assert np.array_equal(alone.distribution(), beside.distribution())


def test_counts_are_shared_and_contexts_are_not():
    first, second = NGram(V).side_by_side(2)
    for token in (5, 6, 5, 6, 5):
        first.update(token)
    second.update(5)
    assert first.probability(6) > 0.5 and second.probability(6) > 0.5
    second.update(7)
    assert first.probability(6) > 0.2 > second.probability(6)


def test_experts_that_forget_cannot_be_shared(model):
    cfg = EvalConfig(expert_reset=True)
    with pytest.raises(UserError, match="set EXPERT_RESET=0"):
        mixed(model, 2, cfg, 10)
    assert isinstance(mixed(model, 1, cfg, 10), MixedPredictor)


def test_a_model_that_gives_no_number_is_one_line_of_error():
    model = trained()
    with torch.no_grad():
        model.tok_emb.weight[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        RollingPredictor(model, np.array([3])).probabilities()
