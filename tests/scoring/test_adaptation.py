"""Test-time training: what is learned, when it is learned, and when it is forgotten."""

import threading
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SMOKE

from fairway.scoring import adaptation as adapt
from fairway.scoring.adaptation import (
    Adapters,
    Bias,
    Chunks,
    Lora,
    Phases,
    clipped,
    fingerprints,
)
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.neural import KINDS, Neural, make_neural, plan, times_scored
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, Config, Runtime, UserError, initialise

V, LENGTH = 64, 32
ALONE = Runtime(0, 1, torch.device("cpu"), "test")
TTT = ("chunks", "lora", "phases", "bias")
BY_DOCUMENT = ("lora", "phases")  # these have lanes
FORMS_AND_LANES = [
    ("chunks", 1),
    ("lora", 1),
    ("lora", 3),
    ("phases", 1),
    ("phases", 3),
    ("bias", 1),
]
SMALL = dict(
    vocab_size=V,
    train_seq_len=LENGTH,
    train_batch_tokens=8 * LENGTH,
    model_dim=32,
    bigram_vocab_size=16,
    bigram_dim=8,
)


def small_model() -> GPT:
    """Return a model with noise in every tensor, so that each has a gradient."""
    cfg, noise = Config(**{**SMOKE, **SMALL}), torch.Generator().manual_seed(0)
    model = GPT(cfg)
    initialise(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=noise)
    return model


@pytest.fixture(scope="module")
def model() -> GPT:
    return small_model()


def text(seed: int = 0, size: int = 180) -> np.ndarray:
    """Return a text of few different tokens; one of its documents is shorter than a chunk."""
    tokens = np.random.default_rng(seed).choice([3, 5, 8, 13, 21, 34], size).astype(np.uint16)
    tokens[[0, 70, 75, 130]] = BOS_ID
    return tokens


def scorer(model: GPT, ttt: str, rt: Runtime = ALONE, **settings) -> Neural:
    usual = dict(
        eval_stride=8,
        ttt_chunk=8 if ttt in BY_DOCUMENT else 24,
        ttt_phase=24,
        eval_batch_tokens=128,
        ttt_rank=2,
        ttt_lr=5.0 if ttt == "bias" else 0.02,
    )
    return make_neural(model, EvalConfig(ttt=ttt, **{**usual, **settings}), rt)


def filled(scorer: Neural, tokens: np.ndarray) -> np.ndarray:
    columns = columns_in_memory(max(len(tokens) - 1, 0), {"logp": KINDS["logp"]})
    scorer.fill(tokens, columns)
    assert columns.complete()
    return columns["logp"]


def test_the_factory_gives_what_ttt_asks_for(model):
    kinds = {ttt: type(scorer(model, ttt)) for ttt in ("none", *TTT)}
    assert kinds == dict(none=Neural, chunks=Chunks, lora=Lora, phases=Phases, bias=Bias)
    assert [scorer(model, ttt, ttt_lr=0.0).rate for ttt in TTT] == [0.004, 0.002, 0.002, 15.0]
    assert [scorer(model, ttt, ttt_chunk=0).chunk for ttt in TTT] == [
        16 * LENGTH,
        LENGTH // 4,
        LENGTH // 4,
        LENGTH,
    ]
    phases = scorer(model, "phases", ttt_phase=0)
    assert (phases.phase, phases.whole.rate, phases.whole.chunk) == (512, 0.004, 512)
    assert not scorer(model, "chunks", eval_mode="cached").cached


@given(
    st.integers(0, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.booleans()
)
def test_cutting_windows_leaves_each_row_its_context(size, length, stride, chunk, documents):
    tokens = np.where(np.arange(size) % 17 == 0, BOS_ID, 9)
    whole = plan(tokens, length, min(stride, length), documents)
    cut = clipped(whole, np.arange(0, size - 1, chunk))
    rows = np.arange(max(size - 1, 0))
    assert (times_scored(cut, len(rows)) == 1).all()
    assert (cut.first // chunk == (cut.end - 1) // chunk).all()
    context = (
        [w.start[np.searchsorted(w.first, rows, side="right") - 1] for w in (whole, cut)]
        if len(rows)
        else [0, 0]
    )
    assert np.array_equal(*context)


# ---- What is learned -----------------------------------------------------------------------------
@pytest.mark.parametrize("ttt", TTT)
def test_at_rate_zero_scores_are_those_of_plain_windows(model, ttt):
    still = scorer(model, ttt)
    still.rate = 0.0
    if ttt == "phases":
        still.whole.rate = 0.0
    frozen = Neural(model, EvalConfig(eval_stride=8, eval_documents=ttt in BY_DOCUMENT), ALONE)
    assert np.abs(filled(still, text()) - filled(frozen, text())).max() < 1e-6


@pytest.mark.parametrize("ttt", TTT)
def test_learning_pays_on_text_that_repeats_itself(model, ttt):
    tokens, learns = text(size=400), scorer(model, ttt, eval_documents=True)
    gain = filled(learns, tokens) - filled(
        Neural(model, EvalConfig(eval_documents=True), ALONE), tokens
    )
    assert gain.mean() > 0.05


@pytest.mark.parametrize("ttt", TTT)
def test_epochs_are_passes_over_what_was_scored(model, ttt):
    once, twice = (filled(scorer(model, ttt, ttt_epochs=n), text()) for n in (1, 2))
    chunk = scorer(model, ttt).plan(text()).end[0] if ttt in BY_DOCUMENT else 24
    assert np.array_equal(once[:chunk], twice[:chunk]) and np.array_equal(once, twice) == (
        ttt == "bias"
    )


def test_adapters_start_as_an_exact_no_op_that_has_a_gradient(model):
    tokens = torch.from_numpy(text()[:LENGTH].astype(np.int64)).expand(3, -1)
    plain, adapters = model.logits(tokens), Adapters(model, 2, 3)
    with adapters.attached():
        logits = model.logits(tokens)
        assert torch.equal(logits, plain)
        loss = logits.square().sum()
        down, up = (
            torch.autograd.grad(loss, adapters.values[i::2], retain_graph=True) for i in (0, 1)
        )
        assert len(up) == 6 * len(model.blocks)
        assert all((g.abs().amax(dim=(1, 2)) > 0).all() for g in up) and not any(
            g.any() for g in down
        )
        adapters.step([g for pair in zip(down, up, strict=True) for g in pair], 0.01)
        moved = model.logits(tokens)
        assert not torch.equal(moved, plain)
        assert all(g.any() for g in torch.autograd.grad(moved.square().sum(), adapters.values))
        adapters.reset(1)
        assert torch.equal(model.logits(tokens)[1], plain[1]) and not torch.equal(
            model.logits(tokens)[2], plain[2]
        )
    assert torch.equal(model.logits(tokens), plain)


def test_adam_counts_the_steps_of_each_lane(model):
    """Lane 0 takes three steps, lane 1 takes one after a reset: each as torch's Adam does."""
    adapters, noise = Adapters(model, 2, 2), torch.Generator().manual_seed(1)
    ours = [t.clone() for t in adapters.values]
    steps = [[torch.randn(t.shape, generator=noise) for t in ours] for _ in range(3)]
    for nth, gradients in enumerate(steps):
        if nth == 2:
            adapters.reset(1)
        adapters.step(gradients, 0.01)
    for lane, taken in ((0, steps), (1, steps[2:])):
        params = [t[lane].detach().clone() for t in ours]
        adam = torch.optim.Adam(params, 0.01)
        for gradients in taken:
            for p, g in zip(params, gradients, strict=True):
                p.grad = g[lane]
            adam.step()
        assert all(
            torch.allclose(p, t[lane], atol=1e-7)
            for p, t in zip(params, adapters.values, strict=True)
        )


def test_the_bias_takes_the_exact_gradient(model):
    tokens, learns = text()[:50], scorer(model, "bias")
    columns, found = columns_in_memory(49, {"logp": "f8"}), []
    plain = logits_of(learns, tokens)[:24]
    learn = learns.learn
    learns.learn = lambda *chunk: (learn(*chunk), found.append(learns.bias.clone()))
    learns.fill(tokens, columns)
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    targets = torch.from_numpy(tokens[1:25].astype(np.int64))
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(plain).double() + bias, targets)
    (gradient,) = torch.autograd.grad(loss, bias)
    assert torch.allclose(found[0], -5.0 * gradient, rtol=1e-6, atol=1e-12) and len(found) == 2


def test_the_bias_never_overshoots_far(model):
    """Text of two random tokens, on which a step of 15, or of 1,000, would swing between them."""
    tokens = np.random.default_rng(0).choice([5, 9], 1200).astype(np.uint16)
    nats = -filled(scorer(model, "bias", ttt_lr=1000.0, ttt_chunk=50), tokens)
    assert nats[600:].mean() < 0.9 < -filled(Neural(model, EvalConfig(), ALONE), tokens).mean()


def logits_of(scorer: Neural, tokens: np.ndarray) -> np.ndarray:
    windows, found = scorer.plan(tokens), np.zeros((len(tokens) - 1, V), np.float32)
    for batch in scorer.batches(windows):
        for rows, logits in scorer.passes(tokens, windows, batch):
            found[rows] = logits.numpy()
    return found


# ---- When it is learned --------------------------------------------------------------------------
def changes(tokens: np.ndarray, row: int) -> list[np.ndarray]:
    """Return the text with other tokens after those that a row may know, without any, after a BOS.

    Forty later tokens are more than any chunk or document that could leak into the row.
    """
    known, after = tokens[: row + 2], tokens[row + 2 : row + 42]
    return [np.append(known, (after + 7) % V), known, np.concatenate([known, [BOS_ID], after[:-1]])]


@pytest.mark.parametrize("ttt, lanes", FORMS_AND_LANES)
def test_no_row_and_no_state_knows_what_comes_later(model, ttt, lanes):
    tokens, learns = text(), scorer(model, ttt)
    if lanes > 1:
        learns.adapters = Adapters(model, 2, lanes)
    base, digests = filled(learns, tokens), learns.digests
    kinds = learns.boundaries(tokens)
    assert kinds.keys() - {"phase"} == {"chunk", "document", "window", "batch"}
    edges = np.concatenate([kinds["chunk"], kinds["document"]])
    rng = np.random.default_rng(3)
    for row in rng.choice(
        np.unique(np.concatenate([edges - 1, edges, edges + 1, rng.integers(0, 170, 9)])[1:]), 5
    ):
        row = int(np.clip(row, 0, 176))
        for other in changes(tokens, row):
            assert (
                np.abs(filled(learns, other.astype(np.uint16))[: row + 1] - base[: row + 1]).max()
                < 1e-5
            )
            assert [s for s in learns.digests if s[0] <= row] == [s for s in digests if s[0] <= row]


@pytest.mark.parametrize("ttt", TTT)
def test_digests_change_with_what_was_learned_before_each_chunk(model, ttt):
    tokens, learns = text(), scorer(model, ttt)
    filled(learns, tokens)
    digests = learns.digests
    firsts, states = zip(*digests, strict=True)
    assert list(firsts) == learns.boundaries(tokens)["chunk"].tolist()
    assert len(set(states)) == len(states) and {len(s) for s in states} == {64}
    other = tokens.copy()
    other[[30, 31]] = [13, 60]  # the first chunk of bias and chunks ends at row 23, of others at 7
    filled(learns, other)
    assert [a == b for a, b in zip(digests, learns.digests, strict=True)] == [
        first <= 29 or ttt == "lora" and first >= 69 for first in firsts
    ]


def test_every_bit_counts_in_a_fingerprint():
    tensors = [torch.randn(3, 5, 4), torch.randn(3, 7, dtype=torch.float64)]
    base, seen = fingerprints(tensors), set()
    for t in tensors:
        for i in range(t[0].numel()):
            other = t.view(3, -1).clone()
            other[1, i] = torch.nextafter(other[1, i], torch.tensor(9.0, dtype=t.dtype))
            found = fingerprints([other.view_as(t) if u is t else u for u in tensors])
            assert [a == b for a, b in zip(found, base, strict=True)] == [True, False, True]
            seen.add(found[1])
    assert len(seen) == 27 and fingerprints([tensors[0][:, [1, 0, 2, 3, 4]]]) != fingerprints(
        tensors[:1]
    )


@pytest.mark.parametrize("ttt, lanes", FORMS_AND_LANES)
def test_distributions_are_those_that_scoring_used(model, ttt, lanes):
    tokens, learns = text(), scorer(model, ttt)
    if ttt in BY_DOCUMENT:
        learns.adapters = Adapters(model, 2, lanes)
    scores, rows = (
        filled(learns, tokens),
        np.array([178, 3, 23, 24, 24, 69, 70, 71, 74, 100, 129, 150]),
    )
    held = learns.distributions(tokens, rows)
    assert np.abs(held.sum(axis=1) - 1).max() < 1e-12
    assert np.abs(np.log(held[np.arange(len(rows)), tokens[rows + 1]]) - scores[rows]).max() < 1e-6
    for row, was in zip(rows[1:], held[1:], strict=True):
        for other in changes(tokens, int(row) - 1):
            if len(other) > row + 1:
                assert (
                    np.abs(learns.distributions(other.astype(np.uint16), [row])[0] - was).max()
                    < 1e-6
                )
    assert learns.distributions(tokens, np.array([], np.int64)).shape == (0, V)


def test_learning_is_repeatable_on_cuda_and_the_switch_is_put_back(model):
    learns, inside = scorer(model, "chunks"), []
    for device in ("cpu", "cuda"):
        learns.rt = ALONE._replace(device=torch.device(device))
        learns.learn_in_time(
            lambda: inside.append(
                (
                    torch.are_deterministic_algorithms_enabled(),
                    torch.is_deterministic_algorithms_warn_only_enabled(),
                )
            )
        )
    assert inside == [(False, False), (True, False)]
    with pytest.raises(ZeroDivisionError):
        learns.learn_in_time(lambda: 1 / 0)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


# ---- What stays ----------------------------------------------------------------------------------
@pytest.mark.parametrize("ttt", TTT)
def test_a_scorer_forgets_each_text_also_when_it_is_interrupted(model, ttt):
    tokens, learns = text(), scorer(model, ttt)
    weights = [p.detach().clone() for p in model.parameters()]
    first = filled(learns, tokens)
    learns.distributions(tokens, [150])

    class Stopped(Exception):
        pass

    def stop(rows: np.ndarray, nats: np.ndarray) -> None:
        if rows[0] > 60:
            raise Stopped

    with pytest.raises(Stopped):
        learns.fill(tokens, columns_in_memory(179, {"logp": "f8"}), None, stop)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert not any(m._forward_hooks for m in model.modules()) and learns.rt == ALONE
    filled(learns, text(1))
    assert np.array_equal(filled(learns, tokens), first)


@pytest.mark.parametrize("ttt", TTT)
def test_a_run_continues_from_the_rows_it_had_scored(model, ttt):
    tokens, learns, scored_rows = text(), scorer(model, ttt), []
    whole = filled(learns, tokens)
    digests, columns = learns.digests, columns_in_memory(179, {"logp": "f8"})
    columns.put(np.arange(60), {"logp": whole[:60]})
    learns.fill(tokens, columns, None, lambda rows, nats: scored_rows.extend(rows))
    assert (
        columns.complete() and np.array_equal(columns["logp"], whole) and learns.digests == digests
    )
    assert min(scored_rows) == (
        56 if ttt in BY_DOCUMENT else 48
    )  # where the chunk starts that was cut


@pytest.mark.parametrize("ttt", TTT)
def test_every_row_is_scored_after_the_time_is_over(model, ttt):
    tokens, learns = text(), scorer(model, ttt, ttt_seconds=1e-9)
    filled(learns, tokens)
    states = [state for _, state in learns.digests]
    assert len(states) > 5 and states[0] != states[1]
    same = states[1:9] if ttt in BY_DOCUMENT else states[1:]  # of the first document
    assert len(set(same)) == 1
    assert learns.seconds_spent > 0


@pytest.mark.parametrize(
    "tokens",
    [[], [BOS_ID], [7], [BOS_ID, 7], [7] * 60, [BOS_ID] * 40, [V - 1] * 24 + [BOS_ID]],
    ids=lambda tokens: f"{len(tokens)}",
)
@pytest.mark.parametrize("ttt", TTT)
def test_odd_texts(model, ttt, tokens):
    tokens, learns = np.array(tokens, np.uint16), scorer(model, ttt)
    scores = filled(learns, tokens)
    assert np.isfinite(scores).all() and len(learns.digests) == len(
        learns.boundaries(tokens)["chunk"]
    )
    if len(scores):
        row = len(scores) - 1
        assert abs(np.log(learns.distributions(tokens, [row])[0, tokens[-1]]) - scores[-1]) < 1e-6


def test_weights_that_give_no_number_are_an_error(model):
    broken = small_model()
    with torch.no_grad():
        broken.skip_weights.fill_(torch.nan)
    for ttt in TTT:
        with pytest.raises(UserError, match="the model gives no number for token"):
            filled(scorer(broken, ttt), text())


# ---- Ranks and lanes -----------------------------------------------------------------------------
class Ranks:
    """Ranks as threads: sums and barriers are Python's, everything else is what torchrun runs."""

    def __init__(self, world: int, monkeypatch):
        self.world, self.barrier, self.given = world, threading.Barrier(world), {}
        monkeypatch.setattr(adapt, "sum_over_ranks", self.reduce)
        monkeypatch.setattr(Neural, "wait", lambda neural: self.barrier.wait(60))

    def reduce(self, tensors: list[torch.Tensor], rt: Runtime) -> None:
        if rt.world > 1:
            self.given[rt.rank] = [t.clone() for t in tensors]
            self.barrier.wait(60)
            sums = [
                sum(ts)
                for ts in zip(*(self.given[rank] for rank in range(self.world)), strict=True)
            ]
            self.barrier.wait(60)
            torch._foreach_copy_(tensors, sums)

    def run(self, work: Callable[[Runtime], None]) -> None:
        failed = []

        def one(rank: int) -> None:
            try:
                work(ALONE._replace(rank=rank, world=self.world))
            except BaseException as e:
                failed.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, failed


@pytest.mark.parametrize("ttt", TTT)
def test_ranks_share_the_work_and_learn_the_same(model, ttt, monkeypatch):
    tokens, alone = text(), scorer(model, ttt, eval_batch_tokens=64)
    base, columns, digests, scored_rows = (
        filled(alone, tokens),
        columns_in_memory(179, {"logp": "f8"}),
        {},
        {},
    )

    models = [small_model(), small_model()]

    def work(rt: Runtime) -> None:
        learns, scored_rows[rt.rank] = (
            scorer(models[rt.rank], ttt, rt, eval_batch_tokens=64, ttt_seconds=1000.0),
            [],
        )
        learns.fill(tokens, columns, None, lambda rows, nats: scored_rows[rt.rank].extend(rows))
        digests[rt.rank] = learns.digests

    Ranks(2, monkeypatch).run(work)
    assert columns.complete() and np.abs(columns["logp"] - base).max() < 1e-5
    assert digests[0] == digests[1] and [d[0] for d in digests[0]] == [d[0] for d in alone.digests]
    assert (
        len(scored_rows[0])
        and len(scored_rows[1])
        and sorted(scored_rows[0] + scored_rows[1]) == list(range(179))
    )


def test_any_number_of_ranks_learns_the_same_bits(model, monkeypatch):
    """A chunk of 10 sequences is learned in five passes of two and scored in passes of five."""
    tokens, settings = text(size=1000), dict(ttt_chunk=320, eval_batch_tokens=1024)
    alone, passes = scorer(model, "chunks", **settings), []
    losses = Chunks.losses
    monkeypatch.setattr(
        Chunks, "losses", lambda *given: (passes.append(len(given[2].start)), losses(*given))[1]
    )
    base = filled(alone, tokens)
    assert passes == [2] * 15 and len(alone.digests) == 4
    for world in (2, 3):
        columns, digests = columns_in_memory(999, {"logp": "f8"}), {}
        models, scored = [small_model() for _ in range(world)], [[] for _ in range(world)]

        def work(rt: Runtime, columns=columns, digests=digests, models=models, scored=scored):
            learns = scorer(models[rt.rank], "chunks", rt, **settings)
            learns.fill(tokens, columns, None, lambda rows, _: scored[rt.rank].extend(rows))
            digests[rt.rank] = learns.digests

        Ranks(world, monkeypatch).run(work)
        assert np.array_equal(columns["logp"], base) and min(map(len, scored)) > 200
        assert all(digests[rank] == alone.digests for rank in range(world))


def test_serial_steps_of_the_challenge_are_1893(model):
    """One step follows each chunk but the last; chunks of one window would be 30,284."""
    long = replace(model.cfg, train_seq_len=2048, train_batch_tokens=8 * 2048)
    chunks = Chunks(GPT(long), EvalConfig(ttt="chunks"), ALONE)
    starts = chunks.chunk_starts(np.broadcast_to(np.uint16(7), 62_021_633))
    assert chunks.chunk == 32_768 and len(starts) == 1893
    # Eight ranks score 64 windows each, and learn two sequences of 2,048.
    assert chunks.chunk // chunks.stride // adapt.PARTS == 64 and chunks.batch_size(2048) == 4


def test_all_weights_learn_between_phases_what_the_phase_has_scored(model):
    """At rate 0 of the adapters, a document sees the weights that TTT=chunks had learned before."""
    tokens, learns = text(), scorer(model, "phases")
    learns.rate = 0.0
    assert learns.boundaries(tokens)["phase"].tolist() == [0, 70, 130]
    found = filled(learns, tokens)
    whole = Chunks(model, EvalConfig(ttt="chunks", eval_documents=True, eval_stride=8), ALONE)
    with whole.fresh():
        for first, end in ((0, 70), (70, 130), (130, 179)):
            now = filled(
                Neural(model, EvalConfig(eval_documents=True, eval_stride=8), ALONE), tokens
            )
            assert np.abs(now - found)[first:end].max() < 1e-6
            whole.learn(tokens, first, end)
    assert np.abs(now - found)[:70].max() > 0.01


@pytest.mark.parametrize("ttt", BY_DOCUMENT)
def test_documents_side_by_side_learn_as_they_do_alone(model, ttt):
    tokens = text()
    tokens[[20, 60, 61, 150]] = BOS_ID
    learns = scorer(model, ttt)
    base = filled(learns, tokens)
    for lanes in (2, 5, 12):
        learns.adapters = Adapters(model, 2, lanes)
        assert np.abs(filled(learns, tokens) - base).max() < 1e-4
