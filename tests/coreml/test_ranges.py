"""Values that would not survive fp16 are found on real text, and scaled by a power of two or refused."""

import math

import numpy as np
import pytest
import torch
from models import FEATURES, trained

from fairway.coreml.graph import Norm, Precision, host_tables
from fairway.coreml.ranges import (
    EPS,
    LARGEST,
    Range,
    RangeError,
    half_precision,
    measure,
    peak_for,
    told,
)

TOKENS = np.random.default_rng(0).integers(2, 97, 300)


def measured(model):
    return measure(model.eval(), host_tables(model), TOKENS)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_every_norm_and_every_square_is_measured(name):
    model = trained(looping=True, **FEATURES[name])
    found, passes = measured(model), len(model.passes(True))
    kinds = ("act", "norm_attn", "norm_mlp", "attn.norm_q", "attn.norm_k")
    kinds += ("attn.norm_own",) * (name == "all")
    made = ("attn.q", "attn.k", "attn.v", "attn.proj", "proj") + ("attn.gate",) * (name == "all")
    assert found.keys() == {f"passes.{n}.{k}" for n in range(passes) for k in kinds} | {
        "head.norm",
        "stream",
    } | {f"passes.{n}.{k}.made" for n in range(passes) for k in made} | {"out.made"}
    assert all(0 < r.least_rms <= r.rms <= r.peak and math.isfinite(r.peak) for r in found.values())


def test_what_is_measured_is_what_the_layer_is_given():
    model, seen = trained(), []
    model.blocks[1].mlp.fc.register_forward_hook(
        lambda m, a, out: seen.append(out.abs().max().item())
    )
    found = measured(model)
    with torch.no_grad():
        for first in range(
            0, 300, 16
        ):  # windows of the model's own length see less, so that they differ a little
            model.logits(torch.from_numpy(TOKENS[first : first + 16])[None])
    assert found["passes.1.act"].peak == pytest.approx(max(seen), rel=0.3)


def test_a_tame_model_is_left_as_it_is():
    model = trained()
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.3
    found = measured(model)
    assert not any(name.endswith(".act") for name in half_precision(found).scales)
    assert "pre-activation" in told(found, half_precision(found))


@pytest.mark.parametrize("times", [60.0, 600.0])
def test_an_activation_that_would_overflow_is_scaled_below_it(times):
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= times
        model.blocks[1].mlp.proj.weight /= (
            times**2
        )  # the layer says the same, through larger numbers
    found = measured(model)
    assert found["passes.1.act"].peak ** 2 > LARGEST, "the fault was planted"
    scale = half_precision(found).scales["passes.1.act"]
    assert (
        math.log2(scale) == int(math.log2(scale))
        and (scale * found["passes.1.act"].peak) ** 2 <= LARGEST / 16
    )
    assert "passes.1.act by " in told(found, half_precision(found))


def test_what_no_scale_can_save_is_refused_by_name():
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= 1e7
        model.blocks[1].mlp.proj.weight /= 1e14
    with pytest.raises(
        RangeError, match=r"passes.1.act is given values of up to \d+, .* take --precision fp32"
    ):
        half_precision(measured(model))


def test_a_stream_beyond_fp16_is_refused():
    model = trained()
    with torch.no_grad():
        model.blocks[1].resid_mix[0] *= 1e6
    with pytest.raises(
        RangeError, match="stream between passes has values of up to .*take --precision fp32"
    ):
        half_precision(measured(model))


def test_what_a_matrix_makes_beyond_fp16_is_refused():
    model = trained()
    with torch.no_grad():
        model.blocks[1].mlp_scale *= 1e6
    with pytest.raises(
        RangeError, match=r"passes.1.proj has values of up to \d+; fp16 ends at 65504; take"
    ):
        half_precision(measured(model))


def test_values_of_their_own_that_are_left_out_are_measured_too():
    """XSA squares them: too large, too small, and as they are."""
    for times, scaled in ((600.0, True), (0.01, True), (1.0, False)):
        model = trained(**FEATURES["xsa"])
        with torch.no_grad():
            model.blocks[2].attn.v.weight *= times
            model.blocks[2].attn.proj.weight /= times
        assert ("passes.2.attn.norm_own" in half_precision(measured(model)).peaks) == scaled


def test_weights_that_give_no_numbers_are_told():
    model = trained()
    with torch.no_grad():
        model.blocks[0].mlp.fc.weight *= 1e30
    with pytest.raises(RangeError, match="no numbers"):
        measured(model)


@pytest.mark.parametrize(
    "rms, least, wanted", [(1.0, 0.5, None), (2.8, 0.3, None), (2.9, 0.5, 2.0), (1.0, 0.2, 2.0)]
)
def test_positions_are_scaled_where_their_sums_do_not_fit_or_vanish(rms, least, wanted):
    assert peak_for(Range(4 * rms, rms, least, 512)) == wanted
    assert wanted is None or 512 * wanted**2 <= LARGEST / 16


def test_a_norm_of_what_fp16_cannot_square_is_right_in_fp16():
    x = torch.randn(1, 512, 1, 3) * torch.tensor([3000.0, 1.0, 1e-3])
    exact = torch.nn.functional.rms_norm(x.transpose(1, 3), (512,), eps=0.0).transpose(1, 3)
    for peaks, right in (({"n": 2.0}, True), ({}, False)):
        found = Norm("n", Precision("fp16", {}, peaks, EPS))(x.half()).float()
        assert ((found - exact).abs().max() < 0.02) == right
