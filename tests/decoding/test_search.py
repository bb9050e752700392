"""Reading an engine, plain decoding and beam search, against the same things done the long way."""

import itertools
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, trained

from fairway.decoding.search import Reader, beam, plain
from fairway.decoding.strategies import Strategy, log_softmax
from fairway.scoring.memory import Memory
from train_gpt import UserError


class Fixed:
    """An engine without a model: logits are looked up by the last two tokens. It takes pieces of `most` tokens."""

    def __init__(self, table: np.ndarray, most: int = 1000):
        self.table, self.most, self.streams = table.astype(np.float32), most, None  # [V, V, V]

    @property
    def read(self) -> int:
        return len(self.streams[0]) if self.streams else 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        assert tokens.dtype == torch.int64 and 1 <= tokens.size(1) <= self.most
        self.streams = self.streams or [[] for _ in tokens]
        out = []
        for stream, piece in zip(self.streams, tokens.tolist(), strict=True):
            before = [0, *stream][-1:] + piece
            stream += piece
            out.append(self.table[before[:-1], before[1:]])
        return torch.from_numpy(np.stack(out))

    def crop(self, length: int) -> None:
        if not 0 <= length <= self.read:
            raise ValueError(length)
        self.streams = [stream[:length] for stream in self.streams]

    def pick(self, rows: torch.Tensor) -> None:
        self.streams = [list(self.streams[row]) for row in rows.tolist()]


def table(V: int, seed: int = 0, spread: float = 1.5) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, spread, (V, V, V))


def begun(engine, prompt: list[int], most: int = 128) -> Reader:
    """A reader that has read the prompt but for its last token."""
    reader = Reader(engine, most=most)
    if len(prompt) > 1:
        reader.last(prompt[:-1])
    return reader


def logp_of(logits: np.ndarray, prompt: list[int], tokens: tuple[int, ...]) -> float:
    """Of tokens after a prompt, under a table."""
    text, total = [0, *prompt], 0.0
    for token in tokens:
        total += log_softmax(logits[text[-2], text[-1]])[token]
        text.append(token)
    return float(total)


# ---- Reading ---------------------------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 30))
def test_a_text_is_read_in_pieces_that_the_engine_takes(most, length):
    logits, tokens, heard = (
        table(5),
        np.random.default_rng(length).integers(0, 5, length).tolist(),
        [],
    )
    reader = Reader(Fixed(logits, most), most=most)
    last = reader.last(tokens, heard.append)
    assert (
        np.allclose(last, logits[([0] + tokens)[-2], tokens[-1]], atol=1e-6)
        and last.dtype == np.float64
    )
    assert sum(heard) == length == reader.length and max(heard) <= most


def test_cropping_ahead_does_nothing_and_behind_forgets():
    reader = Reader(Fixed(table(5)))
    reader.read([1, 2, 3])
    reader.crop(7)
    assert reader.length == 3
    reader.crop(1)
    assert reader.length == 1 and np.allclose(reader.read([4])[0], table(5)[1, 4], atol=1e-6)


# ---- Plain -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_plain_greedy_is_the_best_token_of_the_whole_text_again_and_again(name, penalty):
    model, prompt = trained(looping=True, **FEATURES[name]).eval(), [1, 5, 9]
    steps = list(
        islice(
            plain(
                begun(Memory(model), prompt),
                prompt,
                Strategy("greedy", repetition_penalty=penalty),
                np.random.default_rng(0),
            ),
            12,
        )
    )
    text = list(prompt)
    for step in steps:
        with torch.no_grad():
            logits = model.logits(torch.tensor([text]))[0, -1].double().numpy()
        scores = logits.copy()
        for token in set(text):
            scores[token] = (
                scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            )
        assert step.token == scores.argmax()
        assert step.logp == pytest.approx(
            log_softmax(logits)[step.token], abs=1e-4
        )  # of the model, not penalised
        text.append(step.token)


def test_sampled_texts_follow_their_seed():
    def text(seed: int) -> list[int]:
        steps = plain(
            begun(Fixed(table(8)), [1]),
            [1],
            Strategy("temperature", 1.0),
            np.random.default_rng(seed),
        )
        return [step.token for step in islice(steps, 30)]

    assert text(4) == text(4) and text(4) != text(5)


# ---- Beam search -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("V, length", [(4, 4), (5, 3)])
def test_a_beam_as_wide_as_all_texts_finds_the_best_of_them(V, length):
    logits = table(V, seed=V)
    everything = sorted(
        itertools.product(range(V), repeat=length), key=lambda x: -logp_of(logits, [1, 2], x)
    )
    found = beam(begun(Fixed(logits), [1, 2]), [1, 2], V**length, length, best=5)
    assert [one.tokens for one in found] == everything[:5]
    assert found[0].logp == pytest.approx(logp_of(logits, [1, 2], everything[0]), abs=1e-5)


def test_a_beam_of_one_is_greedy():
    steps = plain(begun(Fixed(table(9)), [3]), [3], Strategy("greedy"), np.random.default_rng(0))
    assert beam(begun(Fixed(table(9)), [3]), [3], 1, 12)[0].tokens == tuple(
        step.token for step in islice(steps, 12)
    )


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_texts_of_different_lengths_compete_by_the_length_penalty(penalty):
    """All texts over four tokens that end at the first 2, or at four tokens; the search sees every one."""
    logits = table(4, seed=2)
    texts = {
        text[: text.index(2) + 1] if 2 in text else text
        for text in itertools.product(range(4), repeat=4)
    }
    ranked = sorted(texts, key=lambda text: -logp_of(logits, [1], text) / len(text) ** penalty)
    found = beam(begun(Fixed(logits), [1]), [1], 256, 4, penalty, 3, lambda tokens: tokens[-1] == 2)
    assert [one.tokens for one in found] == ranked[:3]
    assert [one.ended for one in found] == [text[-1] == 2 for text in ranked[:3]]


def test_wider_beams_find_likelier_texts_and_n_best_are_different_ones():
    totals = []
    for width in (1, 4, 64):
        found = [
            beam(begun(Fixed(table(12, seed)), [1]), [1], width, 10, best=min(width, 4))
            for seed in range(8)
        ]
        totals.append(sum(best[0].logp for best in found))
        for best in found:
            scores = [one.score(1.0) for one in best]
            assert scores == sorted(scores, reverse=True) and len(
                {one.tokens for one in best}
            ) == len(best)
    assert totals[0] < totals[1] < totals[2]


def test_the_search_with_a_model_agrees_with_the_models_own_probabilities():
    """Streams are picked and go on: the caches must follow."""
    model, prompt, heard = trained(**FEATURES["all"]).eval(), [1, 7, 20], []
    for found in beam(begun(Memory(model), prompt), prompt, 5, 8, best=5, told=heard.append):
        with torch.no_grad():
            logp = torch.log_softmax(
                model.logits(torch.tensor([[*prompt, *found.tokens]]))[0].double(), -1
            )
        expected = [logp[2 + nth, token].item() for nth, token in enumerate(found.tokens)]
        assert np.allclose(found.logps, expected, atol=1e-4)
    assert len(heard) == 8


def test_the_search_stops_once_nothing_can_become_better():
    logits = np.zeros((4, 4, 4))
    logits[..., 2] = 9.0
    heard = []
    found = beam(
        begun(Fixed(logits), [1]),
        [1],
        2,
        50,
        0.0,
        ended=lambda tokens: tokens[-1] == 2,
        told=heard.append,
    )
    assert found[0].tokens == (2,) and len(heard) == 1


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(width=0), "--beams is 0; it must be 1 to 256"),
        (dict(best=5), "--n-best is 5, but --beams is 4"),
        (dict(best=0), "--n-best is 0"),
        (dict(length_penalty=-1.0), "--length-penalty is -1"),
        (dict(length_penalty=np.nan), "--length-penalty is nan"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        beam(Reader(Fixed(table(4))), [1], **dict(width=4, tokens=3) | settings)


def test_a_model_of_nothing_but_nan_is_an_error():
    with pytest.raises(UserError, match="no token a probability"):
        beam(begun(Fixed(np.full((4, 4, 4), np.nan)), [1]), [1], 2, 3)
