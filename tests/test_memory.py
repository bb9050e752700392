"""Cached keys and values: feeding in pieces is reading at once, and nothing is seen from beyond the window."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_model import FEATURES, some_tokens, trained

from fairway.memory import Memory, rotations
from train_gpt import GPT, rope_tables

ALL = [name for name in FEATURES if name not in ("loops_off", "ln_scale", "leaky")]
MODELS: dict[str, GPT] = {}


def model_of(name: str) -> GPT:
    if name not in MODELS:
        MODELS[name] = trained(looping=True, **FEATURES[name]).eval()
    return MODELS[name]


@torch.no_grad()
def fed(model: GPT, tokens: torch.Tensor, window: int, cuts: list[int]) -> torch.Tensor:
    memory = Memory(model, window, rotations(model, tokens.size(1)))
    return torch.cat([memory.logits(piece) for piece in tokens.tensor_split(cuts, dim=1) if piece.size(1)], dim=1)


@torch.no_grad()
def at_once(model: GPT, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """One pass in which each position attends to the `window` that end in it."""
    def band(q, k, v):
        back = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back < window), enable_gqa=True)
    return model.from_embedded(model.embed(tokens), rotations(model, tokens.size(1)), band)


somewhere = st.lists(st.integers(1, 15), max_size=6, unique=True).map(sorted)


@pytest.mark.parametrize("name", ALL)
def test_pieces_give_what_the_whole_gives(name):
    model, tokens = model_of(name), some_tokens()
    with torch.no_grad():
        whole = model.logits(tokens)
    for cuts in ([], [1, 2, 7], [8], range(1, 16)):
        assert torch.allclose(fed(model, tokens, 16, list(cuts)), whole, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "all"])
@given(somewhere, st.integers(1, 20), st.integers(0, 3))
def test_also_where_the_window_is_shorter_than_the_text(name, cuts, window, seed):
    model, tokens = model_of(name), some_tokens(seed=seed)
    assert torch.allclose(fed(model, tokens, window, cuts), at_once(model, tokens, window), atol=1e-4)


@pytest.mark.parametrize("name, layers", [("plain", 1), ("plain", 2), ("loops", 7)])
def test_nothing_further_back_than_the_windows_reach_changes_anything(name, layers):
    """One layer sees the window; each further pass sees as far beyond what the one below it saw."""
    model = trained(looping=True, **FEATURES[name] | dict(num_layers=layers)).eval()
    passes, window = len(model.passes(True)), 3
    tokens = some_tokens(length=40)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 31) % 97
    for at in ([7, 8, 20], list(range(1, 40))):
        a, b = (fed(model, x, window, at) for x in (tokens, changed))
        moved = (a - b).abs().amax(dim=(0, 2)) > 0
        last = 5 + passes * (window - 1)
        assert not moved[:5].any() and moved[5] and not moved[last + 1 :].any()
        assert layers > 2 or moved[5 : last + 1].all()


@pytest.mark.parametrize("window", [1, 3, 16])
def test_what_is_kept_does_not_grow(window):
    model, tokens = model_of("all"), some_tokens(length=64)
    memory = Memory(model, window, rotations(model, 64))
    for piece in tokens.split(5, dim=1):
        with torch.no_grad():
            memory.logits(piece)
        assert len(memory.keys) == len(memory.values) == len(model.passes(True))
        assert {kept.size(2) for kept in (*memory.keys, *memory.values)} == {min(window - 1, memory.read)}
    assert memory.read == 64


@torch.no_grad()
def test_streams_of_a_batch_know_nothing_of_each_other():
    model, tokens = model_of("all"), some_tokens(rows=3)
    together = fed(model, tokens, 6, [5, 9])
    for row in range(3):
        assert torch.allclose(fed(model, tokens[row : row + 1], 6, [5, 9])[0], together[row], atol=1e-5)


# ---- Rotations -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "partial_rope"])
def test_without_a_stretch_rotations_are_the_models_own(name):
    model = model_of(name)
    for own, table in zip((model.cos, model.sin), rotations(model, 40), strict=True):
        assert torch.equal(own, table[:16]) and len(table) == 40 and table.dtype == own.dtype
    assert all(torch.equal(a, b) for a, b in zip(rotations(model, 9, 1.0), rotations(model, 9), strict=True))


@pytest.mark.parametrize("name, dims", [("plain", 8), ("partial_rope", 4)])
@pytest.mark.parametrize("stretch", [2.0, 5.5])
def test_a_stretch_slows_the_slowest_dimension_by_itself_and_the_fastest_not_at_all(name, dims, stretch):
    cos, sin = rotations(model_of(name), 30, stretch)
    angle = torch.atan2(sin[1], cos[1]).double()
    slowest = 10_000.0 ** -((dims - 2) / dims)
    assert angle[0].item() == pytest.approx(1, rel=1e-6)
    assert angle[-1].item() == pytest.approx(slowest / stretch, rel=1e-5)
    assert not torch.equal(cos, rope_tables(30, dims, 10_000.0)[0])


def test_two_dimensions_have_nothing_to_slow():
    model = trained(rope_dims=2)
    assert all(torch.isfinite(table).all() for table in rotations(model, 20, 3.0))
