"""Values that would overflow fp16 are measured, and scaled by a power of two or refused."""

import math

import numpy as np
import pytest
import torch
from models import FEATURES, trained

from fairway.coreml.graph import Norm, Precision, host_tables
from fairway.coreml.ranges import (
    EPS,
    FP16_MAX,
    ActivationRange,
    RangeError,
    measure_ranges,
    norm_peak,
    plan_fp16,
    ranges_line,
)

TOKENS = np.random.default_rng(0).integers(2, 97, 300)


def measure(model):
    """Return the ranges of a model on 300 random tokens."""
    return measure_ranges(model.eval(), host_tables(model), TOKENS)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_every_norm_square_and_matrix_is_measured(name):
    model = trained(looping=True, **FEATURES[name])
    ranges, passes = measure(model), len(model.passes(True))
    kinds = ("act", "norm_attn", "norm_mlp", "attn.norm_q", "attn.norm_k")
    kinds += ("attn.norm_own",) * (name == "all")
    made = ("attn.q", "attn.k", "attn.v", "attn.proj", "proj") + ("attn.gate",) * (name == "all")
    assert ranges.keys() == {f"passes.{n}.{k}" for n in range(passes) for k in kinds} | {
        "head.norm",
        "stream",
    } | {f"passes.{n}.{k}.made" for n in range(passes) for k in made} | {"out.made"}
    assert all(
        0 < r.least_rms <= r.rms <= r.peak and math.isfinite(r.peak) for r in ranges.values()
    )


def test_measured_ranges_are_those_of_the_layers_inputs():
    model, seen = trained(), []
    model.blocks[1].mlp.fc.register_forward_hook(
        lambda m, a, out: seen.append(out.abs().max().item())
    )
    ranges = measure(model)
    with torch.no_grad():
        for first in range(
            0, 300, 16
        ):  # windows of the model's own length see less, so that they differ a little
            model.logits(torch.from_numpy(TOKENS[first : first + 16])[None])
    assert ranges["passes.1.act"].peak == pytest.approx(max(seen), rel=0.3)


def test_a_model_of_small_values_is_not_scaled():
    model = trained()
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.3
    ranges = measure(model)
    assert not any(name.endswith(".act") for name in plan_fp16(ranges).scales)
    assert "pre-activation" in ranges_line(ranges, plan_fp16(ranges))


@pytest.mark.parametrize("times", [60.0, 600.0])
def test_an_activation_that_would_overflow_is_scaled(times):
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= times
        model.blocks[1].mlp.proj.weight /= times**2  # the same output, through larger numbers
    ranges = measure(model)
    assert ranges["passes.1.act"].peak ** 2 > FP16_MAX, "the fault was planted"
    scale = plan_fp16(ranges).scales["passes.1.act"]
    assert (
        math.log2(scale) == int(math.log2(scale))
        and (scale * ranges["passes.1.act"].peak) ** 2 <= FP16_MAX / 16
    )
    assert "passes.1.act by " in ranges_line(ranges, plan_fp16(ranges))


def test_an_activation_that_no_scale_saves_is_refused_by_name():
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= 1e7
        model.blocks[1].mlp.proj.weight /= 1e14
    with pytest.raises(
        RangeError,
        match=r"the input of passes.1.act has values of up to \d+, .* take --precision fp32",
    ):
        plan_fp16(measure(model))


def test_a_stream_beyond_fp16_is_refused():
    model = trained()
    with torch.no_grad():
        model.blocks[1].resid_mix[0] *= 1e6
    with pytest.raises(
        RangeError, match="stream between passes has values of up to .*take --precision fp32"
    ):
        plan_fp16(measure(model))


def test_a_matrix_output_beyond_fp16_is_refused():
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp_scale *= 1e6
    with pytest.raises(
        RangeError,
        match=r"the output of passes.1.proj has values of up to \d+; fp16 ends at 65504; take",
    ):
        plan_fp16(measure(model))


def test_own_values_of_xsa_are_measured_too():
    """XSA squares own values; they may be too large, too small, or in range."""
    for times, scaled in ((600.0, True), (0.01, True), (1.0, False)):
        model = trained(**FEATURES["xsa"])
        with torch.no_grad():
            model.blocks[2].attn.v.weight *= times
            model.blocks[2].attn.proj.weight /= times
        assert ("passes.2.attn.norm_own" in plan_fp16(measure(model)).peaks) == scaled


def test_infinite_values_are_refused():
    model = trained()
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight *= 1e30
    with pytest.raises(RangeError, match="infinite or NaN"):
        measure(model)


@pytest.mark.parametrize(
    "rms, least, wanted", [(1.0, 0.5, None), (2.8, 0.3, None), (2.9, 0.5, 2.0), (1.0, 0.2, 2.0)]
)
def test_positions_are_scaled_if_their_squares_overflow_or_vanish(rms, least, wanted):
    assert norm_peak(ActivationRange(4 * rms, rms, least, 512)) == wanted
    assert wanted is None or 512 * wanted**2 <= FP16_MAX / 16


def test_a_norm_of_values_that_fp16_cannot_square_is_right():
    x = torch.randn(1, 512, 1, 3) * torch.tensor([3000.0, 1.0, 1e-3])
    exact = torch.nn.functional.rms_norm(x.transpose(1, 3), (512,), eps=0.0).transpose(1, 3)
    for peaks, right in (({"n": 2.0}, True), ({}, False)):
        ranges = Norm("n", Precision("fp16", {}, peaks, EPS))(x.half()).float()
        assert ((ranges - exact).abs().max() < 0.02) == right
