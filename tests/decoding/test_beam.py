"""Beam search agrees with a search of everything, and stops when it may."""

import itertools
from itertools import islice

import numpy as np
import pytest
import torch
from fixed_engine import Fixed, logp_of, reader_after, table
from models import FEATURES, trained

from fairway.decoding.beam import beam_search
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory
from train_gpt import UserError


# ---- Beam search ---------------------------------------------------------------------------------
@pytest.mark.parametrize("V, length", [(4, 4), (5, 3)])
def test_a_beam_as_wide_as_all_texts_finds_the_best_texts(V, length):
    logits = table(V, seed=V)
    everything = sorted(
        itertools.product(range(V), repeat=length), key=lambda x: -logp_of(logits, [1, 2], x)
    )
    found = beam_search(reader_after(Fixed(logits), [1, 2]), [1, 2], V**length, length, best=5)
    assert [one.tokens for one in found] == everything[:5]
    assert found[0].logp == pytest.approx(logp_of(logits, [1, 2], everything[0]), abs=1e-5)


def test_a_beam_of_width_one_is_greedy():
    steps = decode_plainly(
        reader_after(Fixed(table(9)), [3]), [3], Strategy("greedy"), np.random.default_rng(0)
    )
    assert beam_search(reader_after(Fixed(table(9)), [3]), [3], 1, 12)[0].tokens == tuple(
        step.token for step in islice(steps, 12)
    )


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_texts_of_different_lengths_compete_by_the_length_penalty(penalty):
    """A text ends at its first 2 or at four tokens; the beam is wide enough for every text."""
    logits = table(4, seed=2)
    texts = {
        text[: text.index(2) + 1] if 2 in text else text
        for text in itertools.product(range(4), repeat=4)
    }
    ranked = sorted(texts, key=lambda text: -logp_of(logits, [1], text) / len(text) ** penalty)
    found = beam_search(
        reader_after(Fixed(logits), [1]), [1], 256, 4, penalty, 3, lambda tokens: tokens[-1] == 2
    )
    assert [one.tokens for one in found] == ranked[:3]
    assert [one.ended for one in found] == [text[-1] == 2 for text in ranked[:3]]


def test_wider_beams_find_likelier_texts_and_the_n_best_differ():
    totals = []
    for width in (1, 4, 64):
        found = [
            beam_search(
                reader_after(Fixed(table(12, seed)), [1]), [1], width, 10, best=min(width, 4)
            )
            for seed in range(8)
        ]
        totals.append(sum(best[0].logp for best in found))
        for best in found:
            scores = [one.score(1.0) for one in best]
            assert scores == sorted(scores, reverse=True) and len(
                {one.tokens for one in best}
            ) == len(best)
    assert totals[0] < totals[1] < totals[2]


def test_a_search_with_a_model_agrees_with_the_models_own_probabilities():
    """The search copies and drops streams, and the caches must follow."""
    model, prompt, heard = trained(**FEATURES["all"]).eval(), [1, 7, 20], []
    for found in beam_search(
        reader_after(Memory(model), prompt), prompt, 5, 8, best=5, on_progress=heard.append
    ):
        with torch.no_grad():
            logp = torch.log_softmax(
                model.logits(torch.tensor([[*prompt, *found.tokens]]))[0].double(), -1
            )
        expected = [logp[2 + nth, token].item() for nth, token in enumerate(found.tokens)]
        assert np.allclose(found.logps, expected, atol=1e-4)
    assert len(heard) == 8


def test_the_search_stops_once_no_text_can_become_better():
    logits = np.zeros((4, 4, 4))
    logits[..., 2] = 9.0
    heard = []
    found = beam_search(
        reader_after(Fixed(logits), [1]),
        [1],
        2,
        50,
        0.0,
        is_complete=lambda tokens: tokens[-1] == 2,
        on_progress=heard.append,
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
def test_options_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        beam_search(Reader(Fixed(table(4))), [1], **dict(width=4, tokens=3) | settings)


def test_a_model_that_gives_only_nan_is_an_error():
    with pytest.raises(UserError, match="no token a probability"):
        beam_search(reader_after(Fixed(np.full((4, 4, 4), np.nan)), [1]), [1], 2, 3)
