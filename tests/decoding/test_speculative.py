"""Speculation is lossless: the same tokens in greedy decoding and the same distribution in
sampling, whatever the drafter guesses.
"""

import itertools
from itertools import islice

import numpy as np
import pytest
import torch
from chi_square import chi_square_p
from conftest import english_like
from fixed_engine import Fixed, logp_of, reader_after, table
from models import FEATURES, initial, trained
from plain_adam import PlainAdam

import fairway.decoding.speculative as speculative
from fairway.decoding.drafters import Guess, ModelDrafter, NGramDrafter, SuffixDrafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.speculative import Speculation
from fairway.decoding.strategies import Strategy, draw
from fairway.scoring.memory import Memory, first_layers

KINDS = ("ngram", "suffix", "model", "layers")
GREEDY = Strategy("greedy")
LENGTHS = dict(learnt=10, random=5, features=10)  # tokens after each prompt
PROMPTS = 50
WINDOW = 80  # no token leaves it; sliding windows have their own test


def make_drafter(kind: str, small, strategy: Strategy, rng: np.random.Generator, most: int = 128):
    """Return a drafter of this kind; `small()` makes the engine of a ModelDrafter."""
    if kind in ("ngram", "suffix"):
        return NGramDrafter() if kind == "ngram" else SuffixDrafter()
    drafter = ModelDrafter(Reader(small(), most=most), strategy, rng, 0.2)
    drafter.gate.least = 0.05  # guess whether or not it pays
    return drafter


def tokens_of(steps, count: int) -> list[int]:
    return [step.token for step in islice(steps, count)]


# ---- Greedy decoding -----------------------------------------------------------------------------
def trained_on_letters(steps: int, **changed):
    """Return a model trained a little on the letters of an English-like text."""
    text = torch.tensor([ord(c) % 97 for c in " ".join(english_like(0, 60))])
    model = initial(**changed)
    optimiser, rng = PlainAdam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - 17, (16, 1), generator=rng)
        rows = text[starts + torch.arange(17)]
        loss = model(rows[:, :-1], rows[:, 1:]).mean()
        loss.backward()
        optimiser.step()
    assert loss < 3.2  # 4.6 at first
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    """By name: a model, and a smaller model that drafts for it."""
    return {
        "learnt": (
            trained_on_letters(120, num_layers=2),
            trained_on_letters(80, num_layers=1),
        ),
        "random": (trained(num_layers=2).eval(), trained(num_layers=1).eval()),
        "features": (trained(looping=True, **FEATURES["all"]).eval(), trained(num_layers=1).eval()),
    }


@pytest.fixture(scope="module")
def plain_texts(models):
    """`plain_texts(name)`: the tokens that plain greedy decoding writes after each prompt."""
    cache = {}

    def texts(which: str) -> list[list[int]]:
        if which not in cache:
            cache[which] = [
                tokens_of(
                    decode_plainly(
                        reader_after(Memory(models[which][0], WINDOW), prompt),
                        prompt,
                        GREEDY,
                        np.random.default_rng(0),
                    ),
                    LENGTHS[which],
                )
                for prompt in prompts(PROMPTS)
            ]
        return cache[which]

    return texts


def prompts(count: int) -> list[list[int]]:
    """Return prompts, half of them letters of a text and half noise; some exceed the window of 16,
    and every third repeats itself.
    """
    text, rng = [ord(c) % 97 for c in " ".join(english_like(3, 80))], np.random.default_rng(0)
    out = []
    for nth in range(count):
        length = int(rng.integers(1, 30))
        own = (
            text[41 * nth : 41 * nth + length] if nth % 2 else rng.integers(2, 97, length).tolist()
        )
        out.append([1, *own * (1 + (nth % 3 == 0))])
    return out


@pytest.mark.parametrize(
    "which", ["learnt", "random", pytest.param("features", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_token_for_token(models, plain_texts, which, kind):
    model, small = models[which]
    accepted, rng, drafting = (
        0,
        np.random.default_rng(0),
        small if kind == "model" else first_layers(model, 1),
    )
    for prompt, expected in zip(prompts(PROMPTS), plain_texts(which), strict=True):
        drafter = make_drafter(kind, lambda: Memory(drafting), GREEDY, rng)
        speculation = Speculation(
            reader_after(Memory(model, WINDOW), prompt), prompt, GREEDY, rng, drafter, 5
        )
        assert tokens_of(speculation, len(expected)) == expected
        accepted += speculation.stats.accepted
    assert accepted > 30 or which != "learnt"


@pytest.fixture(scope="module")
def long_texts(models):
    """Prompt, penalty and the 60 tokens that plain greedy decoding writes, three times."""
    model, out = models["learnt"][0], []
    for prompt, penalty in zip(prompts(3), (1.0, 1.0, 1.4), strict=True):
        strategy, rng = Strategy("greedy", repetition_penalty=penalty), np.random.default_rng(0)
        plain = decode_plainly(reader_after(Memory(model), prompt), prompt, strategy, rng)
        out.append((prompt, penalty, tokens_of(plain, 60)))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_after_the_window_has_slid_and_under_a_penalty(
    models, long_texts, kind
):
    model, small = models["learnt"]
    for prompt, penalty, expected in long_texts:
        rng, strategy = np.random.default_rng(0), Strategy("greedy", repetition_penalty=penalty)
        drafter = make_drafter(kind, lambda: Memory(small), strategy, rng)
        speculation = Speculation(
            reader_after(Memory(model), prompt), prompt, strategy, rng, drafter, 4
        )
        assert tokens_of(speculation, 60) == expected


def test_an_engine_that_takes_at_most_four_tokens_works():
    prompt, rng, logits = [1, 2, 3, 1, 2, 3, 1], np.random.default_rng(0), table(6, 4)
    for kind in KINDS:
        expected = tokens_of(
            decode_plainly(reader_after(Fixed(logits), prompt), prompt, GREEDY, rng), 60
        )
        drafter = make_drafter(kind, lambda: Fixed(table(6, 4), 4), GREEDY, rng, most=4)
        speculation = Speculation(
            reader_after(Fixed(logits, 4), prompt, 4), prompt, GREEDY, rng, drafter, 32
        )
        assert tokens_of(speculation, 60) == expected and speculation.most == 3
        assert speculation.stats.tokens_per_verification > 1.5


# ---- Ties ----------------------------------------------------------------------------------------
class Rounding(Fixed):
    """An engine whose logits depend slightly on how many tokens each call read, as real rounding
    does.
    """

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        out = super().logits(tokens)
        self.marks = getattr(self, "marks", [])[: self.read - tokens.size(1)] + [
            tokens.size(1)
        ] * tokens.size(1)
        noise = np.random.default_rng([self.marks[-1], sum(self.marks)])
        return out + torch.from_numpy(noise.uniform(-2e-6, 2e-6, out.shape)).float()


@pytest.mark.parametrize("kind", KINDS)
def test_ties_are_decided_as_plain_decoding_decides_them(kind):
    """Half of all positions are ties except for rounding, which differs with the shape of the
    forward.
    """
    logits, rng = table(8, 7), np.random.default_rng(0)
    best = logits.argmax(axis=-1)
    for a, b in itertools.product(range(8), range(0, 8, 2)):
        logits[a, b, (best[a, b] + 1) % 8] = logits[a, b, best[a, b]]
    again = 0
    for first in range(8):
        prompt = [1, first, 3, 1, first]
        expected = tokens_of(
            decode_plainly(reader_after(Rounding(logits), prompt), prompt, GREEDY, rng), 60
        )
        drafter = make_drafter(kind, lambda: Rounding(logits), GREEDY, rng)
        speculation = Speculation(
            reader_after(Rounding(logits), prompt), prompt, GREEDY, rng, drafter, 4
        )
        assert tokens_of(speculation, 60) == expected
        again += speculation.stats.read_again
    assert 0 < again <= 8 * 66


def test_without_reading_again_ties_are_decided_differently(monkeypatch):
    """Shows that the test above can fail."""
    monkeypatch.setattr(speculative, "CLOSE_CALL", 0.0)
    with pytest.raises(AssertionError):
        for kind in KINDS:
            test_ties_are_decided_as_plain_decoding_decides_them(kind)


def test_logits_read_again_are_bit_for_bit_those_of_plain_decoding(models):
    """Every position is treated as a close call, so all deciding logits are those of single
    tokens.
    """
    model, prompt = models["learnt"][0], prompts(4)[3]
    reader, rows = reader_after(Memory(model, 200), prompt), []
    speculation = Speculation(reader, prompt, GREEDY, np.random.default_rng(0), SuffixDrafter(), 5)
    for _ in range(12):
        speculation.round()
        rows.append((len(speculation.text), speculation.read_again()))
        reader.crop(len(speculation.text) - 1)
        speculation.exact = min(speculation.exact, reader.length)
    single = reader_after(Memory(model, 200), prompt)
    alone = {
        length: single.read([token])[0]
        for length, token in enumerate(speculation.text[len(prompt) - 1 :], len(prompt))
    }
    assert all(np.array_equal(alone[length], row) for length, row in rows)


# ---- Sampling ------------------------------------------------------------------------------------
V, LENGTH, TIMES = 4, 3, 1500
PROMPT = [1, 2, 3, 1, 2, 3, 1, 2]  # it repeats, so lookups can guess
LOGITS, SMALL = table(V, 11, 1.0), table(V, 12, 1.0)


def joint(strategy: Strategy) -> dict[tuple[int, ...], float]:
    """Return the probability of each text of LENGTH tokens after the prompt, by enumeration."""
    out = {}
    for tokens in itertools.product(range(V), repeat=LENGTH):
        text, p = list(PROMPT), 1.0
        for token in tokens:
            p *= strategy.distribution(
                LOGITS[text[-2], text[-1]].astype(np.float32).astype(np.float64), text
            )[token]
            text.append(token)
        out[tokens] = p
    return out


def p_value(kind: str, strategy: Strategy, times: int = TIMES) -> float:
    """Return the p-value of a chi-square test of the written texts against `joint`."""
    rng, counts, accepted = np.random.default_rng(5), dict.fromkeys(joint(strategy), 0), 0
    for _ in range(times):
        drafter = make_drafter(kind, lambda: Fixed(SMALL), strategy, rng)
        if kind in ("ngram", "suffix"):
            drafter.gate.least = 0.0  # guess whether or not it pays
        speculation = Speculation(
            reader_after(Fixed(LOGITS), PROMPT), PROMPT, strategy, rng, drafter, 3
        )
        counts[tuple(tokens_of(speculation, LENGTH))] += 1
        accepted += speculation.stats.accepted
    expected = np.array(list(joint(strategy).values())) * times
    found = np.array(list(counts.values()))
    assert accepted > times / 10 and (found[expected == 0] == 0).all()
    order = [at for at in np.argsort(expected) if expected[at] > 0]
    rare = order[
        : max(1, int(np.searchsorted(np.cumsum(expected[order]), 10.0)) + 1)
    ]  # pooled: chi-square needs at least about ten
    pooled = [np.append(x[order[len(rare) :]], x[rare].sum()) for x in (found, expected)]
    return chi_square_p(*pooled)


SAMPLED = {
    "temperature": Strategy("temperature", 0.9),
    "top-p": Strategy("top-p", 1.0, top_p=0.8),
    "penalty": Strategy("temperature", 1.0, repetition_penalty=1.8),
}


@pytest.mark.parametrize(
    "kind, name", [("ngram", "temperature"), ("suffix", "top-p"), ("model", "penalty")]
)
def test_sampled_texts_have_the_distribution_of_plain_sampling(kind, name):
    assert p_value(kind, SAMPLED[name]) > 1e-3


@pytest.mark.parametrize("kind", ["ngram", "suffix", "model"])
def test_a_rule_that_accepts_every_guess_is_caught(kind, monkeypatch):
    monkeypatch.setattr(
        speculative,
        "accept_or_redraw",
        lambda p, guess, rng: guess.token if guess else draw(p, rng),
    )
    assert p_value(kind, SAMPLED["temperature"], 500) < 1e-6


def test_a_rule_that_redraws_from_p_after_a_rejection_is_caught(monkeypatch):
    """A classic mistake: the replacement must come from max(0, p - q)."""

    def wrong(p, guess, rng):
        q = guess and (guess.q if guess.q is not None else np.eye(1, len(p), guess.token)[0])
        return (
            guess.token
            if guess and rng.random() * q[guess.token] < p[guess.token]
            else draw(p, rng)
        )

    monkeypatch.setattr(speculative, "accept_or_redraw", wrong)
    assert p_value("ngram", SAMPLED["temperature"], 1000) < 1e-6


def test_a_models_own_first_layers_leave_its_distribution_unchanged():
    """With a real model and cropped caches, all pairs of two tokens come out as often as they
    should.
    """
    model = trained(vocab_size=V, model_dim=16, num_heads=2, num_kv_heads=1, num_layers=2).eval()
    strategy, rng, times = Strategy("temperature", 1.5), np.random.default_rng(1), 400
    reader, small = reader_after(Memory(model), PROMPT), Reader(Memory(first_layers(model, 1)))
    with torch.no_grad():
        rows = [model.logits(torch.tensor([[*PROMPT, t]]))[0].double().numpy() for t in range(V)]
    first = strategy.distribution(rows[0][-2], PROMPT)
    expected = np.concatenate(
        [first[t] * strategy.distribution(rows[t][-1], PROMPT) for t in range(V)]
    )
    counts, accepted = np.zeros(V * V), 0
    for _ in range(times):
        reader.crop(len(PROMPT) - 1)
        small.crop(len(PROMPT) - 1)
        drafter = ModelDrafter(small, strategy, rng, 0.0)
        speculation = Speculation(reader, PROMPT, strategy, rng, drafter, 2)
        a, b = tokens_of(speculation, 2)
        counts[a * V + b] += 1
        accepted += speculation.stats.accepted
        small.crop(min(small.length, len(PROMPT) - 1))
    assert accepted > times / 2 and chi_square_p(counts, expected * times) > 1e-3


# ---- Statistics ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_add_up_and_log_probabilities_are_the_models(kind):
    strategy, rng = Strategy("top-k", 1.4, 3, repetition_penalty=1.2), np.random.default_rng(2)
    speculation = Speculation(
        reader_after(Fixed(LOGITS), PROMPT),
        PROMPT,
        strategy,
        rng,
        make_drafter(kind, lambda: Fixed(SMALL), strategy, rng),
        4,
    )
    steps = [step for _ in range(60) for step in speculation.round()]
    stats = speculation.stats
    assert (
        stats.tokens == len(steps) == stats.verifications + stats.accepted
        and stats.verifications == 60
    )
    assert (
        0 < stats.accepted <= stats.drafted <= 240
        and stats.acceptance == stats.accepted / stats.drafted
    )
    assert (
        stats.tokens_per_verification == len(steps) / 60 and 0 < stats.draft_seconds < stats.seconds
    )
    assert sum(step.logp for step in steps) == pytest.approx(
        logp_of(LOGITS, PROMPT, tuple(step.token for step in steps)), abs=1e-3
    )


def test_a_certain_guess_is_accepted_as_often_as_it_is_likely():
    p, rng = np.array([0.2, 0.5, 0.3]), np.random.default_rng(0)
    out = np.bincount(
        [speculative.accept_or_redraw(p, Guess(1), rng) for _ in range(4000)], minlength=3
    )
    assert chi_square_p(out, 4000 * p) > 1e-3
    assert {
        speculative.accept_or_redraw(np.eye(3)[2], Guess(token), rng) for token in range(3)
    } == {2}
