"""Weight-only and error-correcting methods against plain references and what they must improve."""

import numpy as np
import pytest
import torch

from fairway.methods.awq import best_scaled
from fairway.methods.clipping import with_best_clip
from fairway.methods.error_correcting import as_trained, clamped
from fairway.methods.gptq import corrected
from fairway.methods.integers import is_matrix, nearest, offset_codes, rounded_matrix
from fairway.methods.layer_inputs import block_calls, hessians, output_errors
from fairway.methods.learned_rounding import learn
from fairway.methods.lqer import repaired
from fairway.methods.palettes import (
    NormalFloat,
    kmeans_centres,
    normal_float,
    palette,
    widths_in_budget,
)
from tests.models import ALL_ON, SMALL
from train_gpt import (
    GPT,
    HEAD,
    LOOKUP_SHARE,
    Config,
    initialise,
    levels,
    normalised,
    row_steps,
)

GENERATOR = torch.Generator()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR.manual_seed(seed))


def model_with(**changes) -> GPT:
    cfg = Config(**SMALL | changes)
    model = GPT(cfg)
    initialise(model, cfg)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.2 * normal(*p.shape, seed=i))
    return model.eval()


def relative(stored, weight: torch.Tensor) -> float:
    return float((stored.weight() - weight).norm() / weight.norm())


def uneven_hessian(columns: int) -> torch.Tensor:
    """Return x^T x of inputs that correlate, some channels of which are large."""
    x = normal(400, columns) @ normal(columns, columns, seed=1)
    x = x * torch.logspace(-1.5, 1.5, columns)
    return x.T @ x


# ---- Tables --------------------------------------------------------------------------------------
def test_nf4_has_the_values_of_its_paper():
    paper = [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004]
    paper += [0.0, 0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700]
    paper += [0.72295684, 1.0]
    assert torch.allclose(normal_float().double(), torch.tensor(paper).double(), atol=4e-4)


def test_nf4_takes_the_nearest_entry_and_beats_int4_on_normal_weights():
    weight = normal(24, 192)
    stored = NormalFloat(64).stored(weight)
    table = stored.tables[0].float()
    scaled = weight.view(24, 3, 64) / stored.scales[..., None]
    wanted = (scaled[..., None] - table).abs().amin(dim=-1)
    got = (table[stored.indices.long()].view_as(scaled) - scaled).abs()
    assert torch.allclose(got, wanted, atol=1e-6)
    assert relative(stored, weight) < relative(nearest(weight, 4, 64), weight)


def test_kmeans_is_lloyds_algorithm_of_each_row():
    values = normal(3, 200)
    centres = kmeans_centres(values, 4)
    for row, found in zip(values.double().numpy(), centres.numpy(), strict=True):
        own = np.sort(row)[(np.arange(4) + 0.5).__mul__(50).astype(int)]
        for _ in range(60):
            near = np.abs(row[:, None] - own).argmin(axis=1)
            own = np.array([row[near == i].mean() for i in range(4)])
        assert np.allclose(found, own, atol=1e-9)


@pytest.mark.parametrize("rows, band_rows", [(97, 32), (5, 4), (3, 8)])
def test_a_palette_is_exact_for_few_values_and_any_number_of_rows(rows, band_rows):
    values = torch.tensor([-0.5, -0.125, 0.25, 1.0])
    weight = values[torch.arange(rows * 33).view(rows, 33) % 4]
    stored = palette(weight, 2, band_rows)
    assert torch.equal(stored.weight(), weight) and len(stored.tables) <= -(-rows // band_rows)
    constant = palette(torch.zeros(rows, 4), 3, band_rows)
    assert not constant.weight().any()


def test_a_palette_beats_steps_of_equal_bits():
    weight = normal(64, 64) ** 3
    for bits in (2, 3, 4):
        assert relative(palette(weight, bits, 32), weight) < relative(nearest(weight, bits), weight)


def test_widths_are_those_that_save_most_and_fit():
    losses = {"a": [3.0, 1.0, 0.9], "b": [1.0, 0.9, 0.2], "c": [1.0, 1.1, 1.2]}
    sizes = dict.fromkeys(losses, [10.0, 20.0, 30.0])
    assert widths_in_budget(losses, sizes, 30) == {"a": 0, "b": 0, "c": 0}
    assert widths_in_budget(losses, sizes, 40) == {"a": 1, "b": 0, "c": 0}
    assert widths_in_budget(losses, sizes, 60) == {"a": 1, "b": 2, "c": 0}
    assert widths_in_budget(losses, sizes, 999) == {"a": 2, "b": 2, "c": 0}


@pytest.mark.parametrize("columns", [96, 80, 7])
def test_offsets_give_two_bits_a_fourth_value(columns):
    weight = normal(16, columns)
    stored = offset_codes(weight, 2, 32)
    assert stored.codes.min() == 0 and stored.codes.max() == 3
    assert relative(stored, weight) < relative(rounded_matrix(weight, 2, 32, 0.0), weight)
    same = offset_codes(torch.full((2, columns), 0.5), 2, 32)
    assert torch.allclose(same.weight(), torch.full((2, columns), 0.5), atol=2e-3)


# ---- Inputs --------------------------------------------------------------------------------------
@pytest.mark.parametrize("changes", [{}, ALL_ON])
def test_hessians_are_those_of_the_inputs_that_hooks_see(changes):
    model, tokens = model_with(**changes), torch.randint(0, 97, (128, 16))
    model.looping = bool(changes)
    seen: dict[str, torch.Tensor] = {}

    def collect(name):
        def add(_module, inputs):
            x = inputs[0].double().flatten(0, -2)
            seen[name] = seen.get(name, 0) + x.T @ x

        return add

    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [m.register_forward_pre_hook(collect(f"{n}.weight")) for n, m in linear.items()]
    with torch.no_grad():
        model.logits(tokens)
    for hook in hooks:
        hook.remove()
    found = hessians(model, tokens)
    head = found.pop(HEAD)
    assert found.keys() == seen.keys()
    for name, h in found.items():
        assert torch.allclose(h.double(), seen[name], rtol=1e-3, atol=1e-2 * float(h.max())), name
    # The head reads vectors of rms 1: the trace is the number of values, and the share of lookups.
    assert float(head.trace()) == pytest.approx(128 * 16 * 32 * (1 + LOOKUP_SHARE), rel=1e-3)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_calls_of_a_block_are_what_the_model_computes_with():
    model, tokens = model_with(), torch.randint(0, 97, (2, 16))
    ((_, (x, lane)),) = block_calls(model, 2, tokens)
    logits = torch.nn.functional.linear(normalised((x + lane) / 2), model.tok_emb.weight)
    cap = model.cfg.logit_softcap
    assert torch.allclose(cap * torch.tanh(logits / cap), model.logits(tokens), atol=1e-5)


def test_a_model_keeps_to_the_range_of_its_quantiser_only_where_that_helps():
    model, tokens = model_with(attn_bits=6), torch.randint(0, 97, (8, 16))
    with torch.no_grad():
        model.blocks[1].mlp.proj.weight[3, 5] = 50.0  # an outlier that training would have clipped
    kept = as_trained(model, tokens)
    for name, p in clamped(model).named_parameters():
        if is_matrix(name, model):
            bits = 6 if ".attn." in name else 8
            bound = levels(bits) * row_steps(dict(model.named_parameters())[name], 0.0, bits)
            assert bool((p.abs() <= bound).all())
    losses = {m: m(tokens[:, :-1], tokens[:, 1:]).mean() for m in (model, clamped(model), kept)}
    assert losses[kept] == min(losses.values())
    assert model.blocks[1].mlp.proj.weight[3, 5] == 50.0


# ---- Correction ----------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("group", [0, 16])
def test_gptq_errs_less_in_the_outputs_than_rounding_to_nearest(bits, group):
    weight, h = normal(24, 48), uneven_hessian(48)
    start = nearest(weight, bits, group)
    better = corrected(weight, start, bits, h)
    errors = [output_errors(c.weight() - weight, h).sum() for c in (start, better)]
    assert errors[1] < 0.7 * errors[0] and torch.equal(better.steps, start.steps)
    assert better.codes.abs().max() <= levels(bits)
    # Inputs that do not correlate leave nothing to correct.
    assert torch.equal(corrected(weight, start, bits, torch.eye(48)).codes, start.codes)


def test_a_searched_clip_is_the_best_of_its_measure():
    weight, h = normal(24, 48), uneven_hessian(48)
    weight[:, 7] *= 6
    by_weights, by_outputs = with_best_clip(weight, 4, None), with_best_clip(weight, 4, h)
    wide = rounded_matrix(weight, 4, 0, 0.0)
    errors = [c.weight() - weight for c in (wide, by_weights, by_outputs)]
    squares = [float(e.square().sum()) for e in errors]
    outputs = [float(output_errors(e, h).sum()) for e in errors]
    assert squares[1] < squares[0] and squares[1] < squares[2]
    assert outputs[2] < outputs[0] and outputs[2] < outputs[1]


@pytest.mark.parametrize("group", [0, 16])
def test_column_scales_help_where_inputs_differ_and_do_nothing_where_they_do_not(group):
    weight, x = normal(24, 48), normal(400, 48, seed=1)
    x[:, ::16] *= 20
    plain, best = nearest(weight, 4, group), best_scaled(weight, 4, group, h := x.T @ x)
    errors = [output_errors(c.weight() - weight, h).sum() for c in (plain, best)]
    # One step for a whole row gains little: large columns make it coarser for all.
    assert errors[1] < (0.8 if group else 1) * errors[0] and float(best.scales[::16].max()) < 1
    same = best_scaled(weight, 4, group, torch.eye(48))
    assert torch.equal(same.weight(), plain.weight())


@pytest.mark.parametrize("offsets", [False, True])
def test_low_rank_repair_takes_the_largest_part_of_the_error(offsets):
    weight, h = normal(24, 48), uneven_hessian(48)
    base, inputs = nearest(weight, 3), h.diagonal().sqrt()
    error = (weight - base.weight()).norm()
    left = [torch.linalg.svdvals(weight - base.weight())[r:].norm() for r in (2, 6)]
    for rank, wanted in zip((2, 6), left, strict=True):
        found = repaired(weight, base, rank, torch.ones(48), offsets)
        assert wanted <= (weight - found.weight()).norm() < wanted + 0.05 * error
    plain, weighted = (repaired(weight, base, 4, i, offsets) for i in (torch.ones(48), inputs))
    errors = [(r.weight() - weight) * inputs for r in (plain, weighted)]
    assert errors[1].norm() < 0.8 * errors[0].norm()


def test_learned_rounding_brings_a_block_closer_to_its_float_outputs():
    model, tokens = model_with(), torch.randint(0, 97, (8, 16))
    block, examples = model.blocks[1], []
    for inputs, outputs in block_calls(model, 1, tokens):
        examples.append((inputs, outputs))

    def loss(matrices) -> float:
        values = {n: c.weight() for n, c in matrices.items()}
        with torch.no_grad():
            ((inputs, wanted),) = examples
            outputs = torch.func.functional_call(block, values, inputs)
        return float(sum((o - w).square().mean() for o, w in zip(outputs, wanted, strict=True)))

    weights = {n: p.detach() for n, p in block.named_parameters() if n.endswith(".weight")}
    start = {n: nearest(w, 3) for n, w in weights.items()}
    learned = learn(block, block, examples, 3, 30)
    assert loss(learned) < 0.8 * loss(start)
    for name, codes in learned.items():
        assert codes.codes.abs().max() <= 3
        assert torch.equal(codes.steps.bfloat16().float(), codes.steps)
        # A weight moves to a neighbouring code at most, and a row's step by half.
        assert ((codes.steps / start[name].steps - 1).abs() <= 0.51).all()
    unlearned = learn(block, block, examples, 3, 0)
    assert all(torch.equal(unlearned[n].codes, start[n].codes) for n in start)
