"""Strategies for texts of token ids, shared by the tests of the n-gram and the match expert."""

import numpy as np
from hypothesis import strategies as st

from train_gpt import BOS_ID

delays = st.sampled_from([0, 0, 1, 3, 17])


@st.composite
def texts(draw, longest: int = 150):
    """Draw a vocabulary's size and a text of few different tokens, often repeated, often with BOS.

    Bytes stand for the tokens, because drawing a list of them takes ten times as long.
    """
    vocab_size = draw(st.sampled_from([4, 5, 64, 1024, 65536]))
    alphabet = draw(
        st.sampled_from([[0, 2], [BOS_ID, 2, 3], [0, BOS_ID, 2, vocab_size - 1], [vocab_size - 1]])
    )
    text = [alphabet[byte % len(alphabet)] for byte in draw(st.binary(max_size=longest))]
    if draw(st.booleans()):
        text = (text * longest)[:longest]
        for at in draw(st.lists(st.integers(0, longest - 1), max_size=3)):
            text[at : at + 1] = [alphabet[0]]
    return vocab_size, np.array(text, np.uint16)


def pieces(data, tokens):
    """Cut the text anywhere, into empty pieces too."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5), label="cuts"))
    return np.split(tokens, cuts)
