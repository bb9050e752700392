"""Cached keys and values: pieces give what one pass gives, and the window is respected."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, some_tokens, trained

from fairway.scoring.memory import (
    REWIND,
    STORAGE,
    Memory,
    bytes_per_token,
    first_layers,
    model_rope,
)
from fairway.scoring.neural import PIECE, WARM, Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, PRESETS, Config, Runtime, UserError, rope_tables

# Every feature in four layers instead of seven, for properties that are tried on many examples.
SHORT = dict(num_layers=4, xsa_last_n=4, parallel_start_layer=3, loop_start=1, loop_end=2)
VARIANTS = FEATURES | {"all, short": FEATURES["all"] | SHORT | dict(num_loops=1)}
ALL = [name for name in FEATURES if name not in ("loops_off", "ln_scale", "leaky")]
MODELS: dict[str, GPT] = {}


def model_of(name: str) -> GPT:
    if name not in MODELS:
        MODELS[name] = trained(looping=True, **VARIANTS[name]).eval()
    return MODELS[name]


@torch.no_grad()
def fed(model: GPT, tokens: torch.Tensor, window: int, cuts: list[int]) -> torch.Tensor:
    memory = Memory(model, window)
    return torch.cat(
        [memory.logits(piece) for piece in tokens.tensor_split(cuts, dim=1) if piece.size(1)], dim=1
    )


@torch.no_grad()
def at_once(model: GPT, tokens: torch.Tensor, window: int) -> torch.Tensor:
    """Return logits of one pass in which each position attends to the `window` that ends in it."""

    def band(q, k, v):
        back = torch.arange(q.size(2))[:, None] - torch.arange(q.size(2))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=(back >= 0) & (back < window), enable_gqa=True
        )

    return model.from_embedded(model.embed(tokens), model_rope(model, tokens.size(1)), band)


cut_places = st.lists(st.integers(1, 15), max_size=6, unique=True).map(sorted)


@pytest.mark.parametrize("name", ALL)
def test_pieces_give_what_the_whole_gives(name):
    model, tokens = model_of(name), some_tokens()
    with torch.no_grad():
        whole = model.logits(tokens)
    for cuts in ([], [1, 2, 7], [8], range(1, 16)):
        assert torch.allclose(fed(model, tokens, 16, list(cuts)), whole, atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "all, short"])
@given(cut_places, st.integers(1, 20), st.integers(0, 3))
def test_pieces_give_the_same_with_a_window_shorter_than_the_text(name, cuts, window, seed):
    model, tokens = model_of(name), some_tokens(seed=seed)
    assert torch.allclose(
        fed(model, tokens, window, cuts), at_once(model, tokens, window), atol=1e-4
    )


@pytest.mark.parametrize("name, layers", [("plain", 1), ("plain", 2), ("loops", 7)])
def test_no_token_beyond_the_reach_of_the_windows_changes_a_row(name, layers):
    """One layer reaches the window; each further pass reaches one window further back."""
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


@pytest.mark.parametrize("storage", ["model", "bf16", "int8"])
@pytest.mark.parametrize("window", [1, 16])
@torch.no_grad()
def test_the_cache_grows_as_computed_and_then_no_more(window, storage):
    model, tokens = model_of("all, short"), some_tokens(length=400)
    memory, a_token = (
        Memory(model, window, storage=storage),
        2 * bytes_per_token(model, storage),
    )  # in two streams
    for piece in tokens.split(5, dim=1):
        memory.logits(piece)
        least, most = min(memory.read, window + 1 + REWIND), 3 * (window + REWIND + 5)
        assert least * a_token <= memory.stored_bytes <= min(memory.read, most) * a_token
        assert memory.read > 60 or memory.stored_bytes == memory.read * a_token
    assert memory.read == 400


@pytest.mark.parametrize("storage", ["model", "int8"])
@torch.no_grad()
def test_a_stream_of_known_length_is_allocated_once_and_gives_equal_bits(storage):
    model, tokens = model_of("all, short"), some_tokens(length=400)
    grows, fixed = (Memory(model, 8, storage=storage, longest=most) for most in (0, 400))
    tensors, capacities = {}, set()  # the dictionary keeps them, so that no id is used twice
    for piece in tokens.split(5, dim=1):
        assert torch.equal(fixed.logits(piece), grows.logits(piece))
        tensors |= {id(t): t for t in (fixed.tokens, fixed.data, fixed.steps) if t is not None}
        capacities.add(grows.data.size(4))
    assert len(tensors) == 2 + (storage == "int8") and fixed.data.size(4) == max(capacities)
    assert len(capacities) > 1


@torch.no_grad()
def test_cached_scoring_at_full_size_leaves_room_on_a_gpu():
    """The cache of `consensus` as a GPU fills it: 512 streams in bf16, allocated once."""
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["consensus"])).bfloat16()
    model.stream_dtype = torch.bfloat16
    on_gpu = Runtime(0, 1, torch.device("meta"), "test")
    neural = Neural(model, EvalConfig(eval_mode="cached"), on_gpu)
    streams, longest = neural.batch_size(0), neural.length * (WARM + 1)
    memory = Memory(model, neural.length, neural.rope, longest=longest)
    for _ in range(2):
        memory.logits(torch.zeros(streams, PIECE, dtype=torch.int64, device="meta"))
    room = 2 * (neural.length + 1 + REWIND + PIECE)
    assert streams == 512 and memory.data.size(4) == room < longest
    assert memory.data.nbytes == streams * room * bytes_per_token(model, "bf16") < 26e9


@torch.no_grad()
def test_streams_of_a_batch_do_not_affect_each_other():
    model, tokens = model_of("all"), some_tokens(rows=3)
    together = fed(model, tokens, 6, [5, 9])
    for row in range(3):
        assert torch.allclose(
            fed(model, tokens[row : row + 1], 6, [5, 9])[0], together[row], atol=1e-5
        )


# ---- Cropping and picking ------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name, storage, far",
    [  # coarse: a code or two may round the other way
        ("plain", "model", 1e-5),
        ("all, short", "fp32", 1e-5),
        ("plain", "bf16", 0.1),
        ("all, short", "int8", 0.1),
    ],
)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=1, max_size=8),
    st.integers(1, 20),
)
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(name, storage, far, steps, window):
    """Read pieces and crop parts of them; the same pieces without the detours give the same."""
    model, plain = model_of(name), []
    memory, other = Memory(model, window, storage=storage), some_tokens(length=400, seed=1)
    for nth, (read, back) in enumerate(steps):
        memory.logits(
            torch.cat([other[:, nth : nth + read], other[:, -back:]], dim=1)
            if back
            else other[:, nth : nth + read]
        )
        memory.crop(memory.read - back)
        plain.append(other[:, nth : nth + read])
    straight = Memory(model, window, storage=storage)
    for piece in plain:
        straight.logits(piece)
    assert memory.read == straight.read == sum(read for read, _ in steps)
    assert torch.allclose(memory.logits(other[:, :3]), straight.logits(other[:, :3]), atol=far)


@torch.no_grad()
def test_all_can_be_cropped_until_tokens_have_left_the_window():
    model, tokens = model_of("plain"), some_tokens(length=300)
    memory = Memory(model, 120)
    before = memory.logits(tokens[:, :100])
    memory.crop(0)
    assert torch.equal(memory.logits(tokens[:, :100]), before)
    for piece in tokens[:, 100:].split(1, dim=1):
        memory.logits(piece)
    with pytest.raises(ValueError, match="300 tokens were read, .* cannot be cropped to 10"):
        memory.crop(10)
    with pytest.raises(ValueError, match="cropped to 301"):
        memory.crop(301)
    memory.crop(300 - REWIND)
    assert memory.read == 300 - REWIND


@pytest.mark.parametrize("storage", STORAGE)
@torch.no_grad()
def test_picked_streams_continue_as_the_old_ones(storage):
    model, tokens = model_of("all"), some_tokens(rows=3)
    memory, rows = Memory(model, 8, storage=storage), torch.tensor([2, 0, 0, 1])
    memory.logits(tokens[:, :10])
    memory.pick(rows)
    apart = Memory(model, 8, storage=storage)
    apart.logits(tokens[rows, :10])
    assert torch.allclose(
        memory.logits(tokens[rows, 10:]), apart.logits(tokens[rows, 10:]), atol=1e-5
    )


# ---- How keys and values are kept ----------------------------------------------------------------
@pytest.mark.parametrize("storage, far", [("fp32", 1e-5), ("bf16", 0.15), ("int8", 0.3)])
@torch.no_grad()
def test_coarser_keys_and_values_move_logits_little_but_do_move_them(storage, far):
    model, tokens = model_of("plain"), some_tokens(length=16)
    memory = Memory(model, storage=storage)
    found = torch.cat([memory.logits(piece) for piece in tokens.split(1, dim=1)], dim=1)
    apart = (found - model.logits(tokens)).abs().max().item()
    assert apart < far and (storage == "fp32" or apart > 1e-4)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@torch.no_grad()
def test_a_coarse_memory_does_not_depend_on_the_pieces(storage):
    """A position reads itself and its own piece from the cache, rounded like older ones."""
    model, tokens = model_of("all"), some_tokens(length=16)
    whole = Memory(model, storage=storage).logits(tokens)
    memory = Memory(model, storage=storage)
    parts = torch.cat([memory.logits(piece) for piece in tokens.split([1, 5, 2, 8], dim=1)], dim=1)
    assert (whole - parts).abs().max() < 0.05  # a code or two may round the other way


def test_bytes_per_token_are_keys_and_values_of_each_pass_and_head():
    model = model_of("all")  # 7 layers, 3 of them twice more; 2 heads of 8
    assert [bytes_per_token(model, storage) for storage in ("fp32", "bf16", "int8")] == [
        13 * 2 * 2 * size for size in (8 * 4, 8 * 2, 8 + 2)
    ]


def test_an_unknown_storage_is_refused_by_name():
    with pytest.raises(UserError, match="'int3'; take one of model, fp32, bf16, int8"):
        Memory(model_of("plain"), storage="int3")


# ---- The first layers as a draft -----------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "all", "loops", "lanes"])
@torch.no_grad()
def test_the_first_layers_are_blocks_of_the_model_under_its_head(name):
    model, tokens = model_of(name), some_tokens()
    for count in range(1, model.cfg.num_layers):
        draft = first_layers(model, count)
        x = x0 = lane = model.embed(tokens)
        for block in model.blocks[:count]:
            x, lane = block(
                x,
                lane,
                x0,
                (model.cos, model.sin),
                lambda q, k, v: F.scaled_dot_product_attention(
                    q, k, v, is_causal=True, enable_gqa=True
                ),
            )
        x = F.linear(F.rms_norm((x + lane) / 2, (x.size(-1),)), model.tok_emb.weight)
        expected = model.cfg.logit_softcap * torch.tanh(x / model.cfg.logit_softcap)
        assert torch.allclose(draft.logits(tokens), expected, atol=1e-5)
        assert all(
            a.data_ptr() == b.data_ptr()
            for a, b in zip(
                draft.blocks.parameters(), model.blocks[:count].parameters(), strict=True
            )
        )


@pytest.mark.parametrize("count", [0, 3, -1])
def test_a_draft_of_no_layers_or_of_all_is_refused(count):
    with pytest.raises(UserError, match=f"first {count} layers: the model has 3; take 1 to 2"):
        first_layers(model_of("plain"), count)


# ---- RoPE -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["plain", "partial_rope"])
def test_without_a_stretch_rotations_are_the_models_own(name):
    model = model_of(name)
    for own, table in zip((model.cos, model.sin), model_rope(model, 40), strict=True):
        assert torch.equal(own, table[:16]) and len(table) == 40 and table.dtype == own.dtype
    assert all(
        torch.equal(a, b)
        for a, b in zip(model_rope(model, 9, 1.0), model_rope(model, 9), strict=True)
    )


@pytest.mark.parametrize("name, dims", [("plain", 8), ("partial_rope", 4)])
@pytest.mark.parametrize("stretch", [2.0, 5.5])
def test_a_stretch_slows_the_slowest_dimension_by_itself_and_the_fastest_not_at_all(
    name, dims, stretch
):
    cos, sin = model_rope(model_of(name), 30, stretch)
    angle = torch.atan2(sin[1], cos[1]).double()
    slowest = 10_000.0 ** -((dims - 2) / dims)
    assert angle[0].item() == pytest.approx(1, rel=1e-6)
    assert angle[-1].item() == pytest.approx(slowest / stretch, rel=1e-5)
    assert not torch.equal(cos, rope_tables(30, dims, 10_000.0)[0])


def test_two_dimensions_have_nothing_to_slow():
    model = trained(rope_dims=2)
    assert all(torch.isfinite(table).all() for table in model_rope(model, 20, 3.0))
