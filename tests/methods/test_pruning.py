"""Pruning: which weights are dropped, which are spared, and what that saves."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.methods.parcel import pack
from fairway.methods.pruning import (
    EMBEDDINGS,
    ROUNDING,
    Pruned,
    TwoOfFour,
    largest_weights,
    two_of_four,
)
from tests.models import trained

MODEL = trained(bigram_vocab_size=32, bigram_dim=8, model_dim=64)


@given(seed=st.integers(0, 999), share=st.floats(0, 1))
def test_the_smallest_share_is_dropped_ties_included(seed, share):
    weight = torch.randint(-4, 5, (6, 10), generator=torch.Generator().manual_seed(seed)).float()
    kept = largest_weights(weight, share)
    assert (kept == 0).sum() == round(share * 60)
    dropped = weight.abs()[kept == 0].max() if (kept == 0).any() else 0
    assert dropped <= (weight.abs()[kept == 1].min() if kept.any() else 9)


@given(seed=st.integers(0, 999), columns=st.integers(1, 13))
def test_of_every_four_neighbours_the_two_largest_stay(seed, columns):
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    kept = two_of_four(weight)
    for row, marks in zip(weight.abs().tolist(), kept.tolist(), strict=True):
        for start in range(0, columns // 4 * 4, 4):
            four, own = row[start : start + 4], marks[start : start + 4]
            assert sorted(four)[2:] == sorted(v for v, m in zip(four, own, strict=True) if m)
        assert all(marks[columns // 4 * 4 :])


@pytest.mark.parametrize("method", [Pruned(0.5), TwoOfFour()], ids=["magnitude", "2:4"])
def test_only_matrices_are_pruned_and_what_is_spared_is_as_promised(method):
    pruned, rounded = method.apply(MODEL, None), ROUNDING.apply(MODEL, None)
    parameters, spared = dict(pruned.named_parameters()), method.spared(MODEL)
    assert {*spared} == {*EMBEDDINGS}
    for name, p in rounded.named_parameters():
        if name in spared:
            assert torch.equal(parameters[name], spared[name]), name
        if name in spared or p.ndim < 2 or not name.endswith(".weight"):
            assert torch.equal(parameters[name], p), name
        else:
            assert (parameters[name] == 0).float().mean() >= 0.5 > (p == 0).float().mean(), name
    assert method.spared(trained()).keys() == {"tok_emb.weight"}


def test_every_row_of_a_2_4_model_keeps_the_pattern_after_rounding():
    for name, stored in TwoOfFour().apply(MODEL, None).stored.items():
        if name.endswith(".weight") and name not in EMBEDDINGS:
            assert ((stored.codes.reshape(-1, 4) != 0).sum(dim=1) <= 2).all(), name


def test_more_zeros_take_fewer_bytes():
    sizes = [len(pack(Pruned(s).apply(MODEL, None), ["ans"])) for s in (0.1, 0.3, 0.5, 0.7)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < 0.85 * sizes[0]
