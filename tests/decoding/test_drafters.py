"""Drafters agree with their definitions: lookups with counts made the slow way, a model with its
own logits.
"""

import numpy as np
import pytest
import torch
from fixed_engine import Fixed, table
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, trained

from fairway.decoding.drafters import (
    AcceptanceGate,
    Guess,
    ModelDrafter,
    NGramDrafter,
    SuffixDrafter,
)
from fairway.decoding.reader import Reader
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory

texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)
cuts = st.lists(st.integers(1, 9), max_size=20)


def following(drafter, text: list[int], lengths: list[int]):
    """Return the drafter after it followed a text in pieces of these lengths, then the rest."""
    growing = []
    for length in [*lengths, len(text)]:
        growing += text[len(growing) : len(growing) + length]
        drafter.follow(growing)
    return drafter


# ---- The gate ------------------------------------------------------------------------------------
def test_the_gate_multiplies_chances_and_learns_them():
    gate = AcceptanceGate(0.3)
    gate.begin()
    assert [gate.opens(("a",), 0.6) for _ in range(3)] == [True, True, False]  # 0.6, 0.36, 0.216
    for _ in range(30):
        gate.begin()
        asked = [gate.opens(("a",), 0.6) for _ in range(2)]
        gate.learn(2)
    assert all(asked) and gate.rate(("a",), 0.6) > 0.9
    for _ in range(60):
        gate.begin()
        gate.opens(("a",), 0.6)
        gate.learn(0)
    gate.begin()
    assert not gate.opens(("a",), 0.6)
    gate.begin()
    assert gate.opens(("b",), 0.6)


def test_guesses_after_a_wrong_one_are_not_counted():
    gate = AcceptanceGate(0.01)
    gate.begin()
    assert all(gate.opens((kind,), 0.9) for kind in "abc")
    gate.learn(1)
    assert gate.rate(("a",), 0.9) > 0.9 > gate.rate(("b",), 0.9) and gate.rate(
        ("c",), 0.9
    ) == pytest.approx(0.9)


def test_a_gate_that_closed_opens_again_in_time():
    gate = AcceptanceGate(0.5)
    while True:
        gate.begin()
        if not gate.opens((), 0.8):
            break
        gate.learn(0)
    closed = 0
    while not gate.opens((), 0.8):
        gate.begin()
        closed += 1
    assert 1 <= closed < 1000


# ---- N-grams -------------------------------------------------------------------------------------
def longest_run(text: list[int]) -> tuple[int, int]:
    for n in NGramDrafter.RUN_LENGTHS:
        for at in range(len(text) - 1, n - 1, -1):
            if text[at - n : at] == text[len(text) - n :]:
                return n, at
    return 0, 0


@given(texts, cuts)
def test_the_last_place_of_the_longest_run_is_found(text, lengths):
    assert following(NGramDrafter(), text, lengths).longest_run() == longest_run(text)


@given(texts, st.integers(1, 40))
def test_the_guesses_copy_what_followed_the_run_and_then_the_guesses_themselves(text, most):
    draft = following(NGramDrafter(), text, [])
    draft.gate.least = 0.0
    n, at = longest_run(text)
    expected = list(text)
    for _ in range(most if n else 0):
        expected.append(expected[at])
        at += 1
    assert draft.propose(most) == [Guess(token) for token in expected[len(text) :]]


def test_a_text_that_never_repeats_gets_no_guesses():
    for drafter in (NGramDrafter(), SuffixDrafter()):
        assert following(drafter, list(range(200)), [50]).propose(8) == []


# ---- Suffixes ------------------------------------------------------------------------------------
def counts_after(text: list[int], context: list[int]) -> dict[int, int]:
    n, out = len(context), {}
    for at in range(n, len(text)):
        if text[at - n : at] == context:
            out[text[at]] = out.get(text[at], 0) + 1
    return out


@given(texts, cuts)
def test_the_trie_counts_the_tokens_that_followed_each_context(text, lengths):
    draft = following(SuffixDrafter(), text, lengths)
    for depth, node in enumerate(draft.contexts):
        counts = counts_after(text, text[len(text) - depth :])
        assert draft.followed[node] == sum(counts.values())
        assert {
            t: draft.count[c] for t in range(4) if (c := draft.child.get(node << 16 | t))
        } == counts
        if counts:
            assert draft.count[draft.favourite[node]] == max(counts.values())
    beyond = len(draft.contexts)
    assert beyond == min(SuffixDrafter.DEPTH, len(text) + 1) or not counts_after(
        text, text[len(text) - beyond :]
    )


@given(texts)
def test_every_guess_is_the_commonest_token_after_some_context(text):
    draft = following(SuffixDrafter(), text, [])
    draft.gate.least = 0.0
    going_on = list(text)
    for guess in draft.propose(6):
        longest = min(SuffixDrafter.DEPTH, len(going_on) + 1)
        seen = [counts_after(text, going_on[len(going_on) - n :]) for n in range(1, longest)]
        assert any(
            guess.token in counts and counts[guess.token] == max(counts.values())
            for counts in seen
            if counts
        )
        going_on.append(guess.token)


def test_counts_outvote_the_last_occurrence():
    """The token 7 was followed by 1, 1, 1 and, last, 2: the trie guesses 1, the copy guesses 2."""
    text = [7, 1, 7, 1, 7, 1, 7, 2, 9, 7]
    assert following(SuffixDrafter(), text, []).propose(1) == [Guess(1)]
    assert following(NGramDrafter(), text, []).propose(1) == [Guess(2)]


# ---- Both ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [NGramDrafter, SuffixDrafter])
def test_right_guesses_make_proposals_longer_and_wrong_ones_make_them_shorter(kind):
    draft, text = kind(), [5, 6, 7, 8, 9] * 4
    for _ in range(40):
        draft.follow(text)
        guesses = [guess.token for guess in draft.propose(8)]
        assert guesses == (text[-5:] * 2)[: len(guesses)]
        text += guesses + (text[-5:] * 2)[len(guesses) : len(guesses) + 1]
        draft.learn(len(guesses))
    assert len(guesses) == 8
    for _ in range(99):
        draft.follow(text)
        guesses = draft.propose(8)
        draft.learn(0)
    assert len(guesses) <= 1


@pytest.mark.parametrize("kind", [NGramDrafter, SuffixDrafter])
def test_memory_is_bounded_and_a_drafter_that_forgot_still_guesses(kind, monkeypatch):
    monkeypatch.setattr(kind, "MOST_RUNS" if kind is NGramDrafter else "MOST_NODES", 3000)
    draft, text, rng, most = kind(), [], np.random.default_rng(0), 0
    for _ in range(100):
        text += rng.integers(0, 60_000, 40).tolist()
        draft.follow(text)
        most = max(most, len(draft.after) if kind is NGramDrafter else len(draft.token))
    assert most < 3000 + 41 * 12
    text += text[-40:]  # a passage that it still knows
    draft.follow(text)
    draft.gate.least = 0.0
    assert [guess.token for guess in draft.propose(5)] == text[-40:-35]


# ---- A model -------------------------------------------------------------------------------------
def test_a_model_drafter_reports_the_distribution_that_it_drew_from():
    logits, rng = table(5), np.random.default_rng(0)
    draft = ModelDrafter(
        Reader(Fixed(logits)), Strategy("top-k", 1.3, 3, repetition_penalty=1.5), rng, 0.1
    )
    text = [1, 2]
    draft.follow(text)
    guesses = draft.propose(4)
    for guess in guesses:
        row = logits[text[-2], text[-1]].astype(np.float32).astype(np.float64)
        expected = Strategy("top-k", 1.3, 3, repetition_penalty=1.5).distribution(row, text)
        assert np.allclose(guess.q, expected, atol=1e-12) and guess.q[guess.token] > 0
        text.append(guess.token)
    assert len(guesses) >= 2


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.integers(0, 99))
def test_a_model_drafter_forgets_guesses_that_were_wrong(accepted, seed):
    """Whatever is accepted, it has read exactly the text so far when it guesses again."""
    logits, rng = table(6, 1), np.random.default_rng(seed)
    draft, text = (
        ModelDrafter(Reader(Fixed(logits)), Strategy("temperature", 1.0), rng, 0.1),
        [3, 1],
    )
    draft.gate.least = 0.0
    draft.follow(text)
    for most in accepted:
        guesses = draft.propose(5)
        engine = draft.reader.engine
        assert engine.streams[0] == [*text, *(guess.token for guess in guesses[:-1])]
        right = min(most, len(guesses))  # the token in place of the next guess may be equal to it
        text += [*(guess.token for guess in guesses[:right]), int(rng.integers(6))]
        draft.learn(right)
        draft.follow(text)


@torch.no_grad()
def test_a_drafter_that_paused_reads_the_tokens_it_missed():
    model, prompt = trained(**FEATURES["plain"]).eval(), [1, 5, 9]
    draft = ModelDrafter(
        Reader(Memory(model), most=4), Strategy("greedy"), np.random.default_rng(0), 0.1
    )
    draft.follow(prompt)
    for token in (8, 4, 4, 2, 11, 30, 7):
        prompt.append(token)
        draft.follow(prompt)
        assert draft.propose(0) == []
    assert draft.propose(1)[0].token == model.logits(torch.tensor([prompt]))[0, -1].argmax()


@pytest.mark.parametrize("cost, least", [(0.0, 0.15), (0.25, 0.4), (5.0, 0.9)])
def test_a_more_expensive_drafter_must_be_right_more_often(cost, least):
    assert (
        ModelDrafter(Reader(Fixed(table(4))), Strategy(), np.random.default_rng(0), cost).gate.least
        == least
    )
