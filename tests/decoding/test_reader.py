"""Readers and plain decoding agree with slow versions of the same."""

from itertools import islice

import numpy as np
import pytest
import torch
from fixed_engine import Fixed, reader_after, table
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, trained

from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.strategies import Strategy, log_softmax
from fairway.scoring.memory import Memory


# ---- Reading -------------------------------------------------------------------------------------
@given(st.integers(1, 9), st.integers(1, 30))
def test_a_text_is_read_in_pieces_that_the_engine_accepts(most, length):
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


def test_cropping_to_a_longer_length_does_nothing_and_to_a_shorter_one_forgets():
    reader = Reader(Fixed(table(5)))
    reader.read([1, 2, 3])
    reader.crop(7)
    assert reader.length == 3
    reader.crop(1)
    assert reader.length == 1 and np.allclose(reader.read([4])[0], table(5)[1, 4], atol=1e-6)


# ---- Plain ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_plain_greedy_takes_the_best_token_after_the_text_so_far(name, penalty):
    model, prompt = trained(looping=True, **FEATURES[name]).eval(), [1, 5, 9]
    steps = list(
        islice(
            decode_plainly(
                reader_after(Memory(model), prompt),
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
        )  # by the model, without the penalty
        text.append(step.token)


def test_sampled_texts_depend_on_their_seed():
    def text(seed: int) -> list[int]:
        steps = decode_plainly(
            reader_after(Fixed(table(8)), [1]),
            [1],
            Strategy("temperature", 1.0),
            np.random.default_rng(seed),
        )
        return [step.token for step in islice(steps, 30)]

    assert text(4) == text(4) and text(4) != text(5)
