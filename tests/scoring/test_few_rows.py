"""Products of few rows: what F.linear gives, for any shape, and only where they are faster."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import some_tokens, trained
from torch import nn

from fairway.scoring.few_rows import (
    LEAST_WEIGHTS,
    MOST_ROWS,
    FewRowsLinear,
    for_few_rows,
    multiplied,
)
from fairway.scoring.memory import Memory

LARGE = torch.randn(1024, 256, generator=torch.Generator().manual_seed(0))
SMALL = LARGE[:64]


@given(
    st.lists(st.integers(1, 3), min_size=0, max_size=3), st.integers(0, 99), st.sampled_from("nt")
)
@torch.no_grad()
def test_shapes(leading, seed, order):
    assert LARGE.numel() >= LEAST_WEIGHTS > SMALL.numel()
    x = torch.randn(*leading, 256, generator=torch.Generator().manual_seed(seed))
    if order == "t" and len(leading) > 1:
        x = x.transpose(0, 1)
    wanted, own = F.linear(x, LARGE), multiplied(x, LARGE)
    assert own.shape == wanted.shape and own.is_contiguous()
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-4)


def test_all_else_is_linear_to_the_bit():
    rows = torch.randn(MOST_ROWS + 1, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(multiplied(rows, LARGE), F.linear(rows, LARGE))
        assert torch.equal(multiplied(rows[:1], SMALL), F.linear(rows[:1], SMALL))
    weight = LARGE.clone().requires_grad_()  # a gradient passes through F.linear
    assert torch.equal(multiplied(rows[:1], weight), F.linear(rows[:1], weight))


def large_model():
    return trained(vocab_size=8192, model_dim=128, num_heads=2, mlp_mult=16.0).eval()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="other libraries are left alone")
def test_a_cache_prepares_its_model_once_and_copies_stay_prepared():
    model = large_model()
    plain = copy.deepcopy(model)
    Memory(model)
    Memory(model)
    assert isinstance(model.blocks[0].mlp.fc, FewRowsLinear)
    other = copy.deepcopy(model)
    tokens = some_tokens()[:1, :3]
    with torch.no_grad():
        other.tok_emb.weight *= 2  # a copy reads its own weights, not those of the first
        assert not torch.allclose(other.logits(tokens), model.logits(tokens))
        torch.testing.assert_close(model.logits(tokens), plain.logits(tokens), rtol=0, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_layers_of_a_method_stay():
    class Own(nn.Linear):
        pass

    model = large_model()
    model.blocks[0].mlp.fc = Own(128, 16 * 128, bias=False)
    for_few_rows(model)
    assert type(model.blocks[0].mlp.fc) is Own
