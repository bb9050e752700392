"""The host's embeddings, RoPE tables and masks equal those of the model."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, some_tokens, trained

from fairway.coreml.graph import host_tables
from fairway.coreml.host import Embedding, attention_mask, rotary_tables
from fairway.coreml.layout import MASKED
from train_gpt import rope_tables


@cache
@torch.no_grad()
def embedded(name: str):
    """Return 16 token ids, their embeddings by the model, and the host's Embedding."""
    model, tokens = trained(**FEATURES[name]), some_tokens(rows=1)
    return tokens[0].tolist(), model.embed(tokens)[0].numpy(), Embedding(host_tables(model))


@pytest.mark.parametrize("name", ["plain", "smear", "bigram", "all"])
@given(st.lists(st.integers(1, 5), min_size=1, max_size=16))
def test_embedding_in_pieces_equals_embedding_at_once(name, pieces):
    (ids, wanted, embed), at = embedded(name), 0
    for length in [*pieces, 16]:
        piece = ids[at : at + length]
        if not piece:
            break
        found = embed(piece, ids[max(0, at - 2) : at])
        np.testing.assert_allclose(found, wanted[at : at + len(piece)].T, atol=2e-6)
        at += length


@pytest.mark.parametrize(
    "first, count, rotary, base", [(0, 9, 4, 1e4), (700, 3, 8, 1e4), (5, 2, 1, 500.0)]
)
def test_rope_tables_equal_the_trainers(first, count, rotary, base):
    for mine, table in zip(
        rotary_tables(first, count, rotary, base),
        rope_tables(first + count, 2 * rotary, base),
        strict=True,
    ):
        np.testing.assert_array_equal(mine, table[first:].T.numpy())


@given(
    st.integers(1, 9), st.integers(0, 40), st.integers(1, 4), st.integers(0, 3), st.integers(0, 9)
)
def test_a_token_sees_exactly_its_window(slots, read, count, filler, window):
    positions = np.full(slots, -1)
    for p in range(read):
        positions[p % slots] = p
    mask = attention_mask(positions, read, count, count + filler, window)
    assert mask.shape == (count + filler, slots + count + filler) and set(np.unique(mask)) <= {
        0,
        np.float32(MASKED),
    }
    back = window or slots
    for t in range(count):
        at = read + t
        seen = {int(positions[s]) for s in range(slots) if mask[t, s] == 0} | {
            read + u for u in range(count + filler) if mask[t, slots + u] == 0
        }
        kept = {int(p) for p in positions if p >= 0} | set(range(read, read + count))
        assert seen == {p for p in kept if at - back < p <= at}
    assert (mask == 0).any(axis=1).all(), "a row is all masked: its softmax is NaN"
