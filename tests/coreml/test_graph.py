"""The graph in (1, C, 1, T) equals the model, for every feature, cut and call length."""

import numpy as np
import pytest
import torch
from models import FEATURES, some_tokens, trained

from fairway.coreml import graph, layout
from fairway.coreml.graph import EXACT, Precision, host_tables
from fairway.coreml.host import Embedding, attention_mask, rotary_tables


@torch.no_grad()
def logits_in_steps(
    model, tokens: list[int], parts: int, precision: Precision = EXACT, steps=(4, 1, 2, 4, 3, 2)
):
    """Return float32[n, V] by calls padded to four tokens, with a cache written after each call."""
    d = graph.model_dims(model, 16)
    chain = graph.build_shards(
        model, d, layout.even_cuts(d.passes, parts), layout.even_cuts(d.vocab, 3), precision
    )
    interfaces = {name: shard.interface for name, shard in chain.items()}
    kept = {
        f"{c}{n}": torch.zeros(1, d.head, d.kv_heads, d.slots)
        for n in range(d.passes)
        for c in "kv"
    }
    positions, embed, out, at = np.full(16, -1), Embedding(host_tables(model)), [], 0
    for n in steps:
        piece = tokens[at : at + n]
        cos, sin = rotary_tables(at, 4, d.rotary, model.cfg.rope_base)
        have = {
            name: torch.from_numpy(array)[None, :, None]
            for name, array in (
                ("x0", embed(piece + [0] * (4 - n), tokens[max(0, at - 2) : at])),
                ("cos", cos),
                ("sin", sin),
            )
        }
        have["mask"] = torch.from_numpy(attention_mask(positions, at, n, 4))[None, None]
        graph.run_shards(chain, interfaces, have := have | kept)
        out.append(torch.cat([have[f"logits{j}"] for j in range(3)], dim=1)[0, :, 0, :n].T)
        for name, cache in kept.items():
            cache[..., at : at + n] = have[f"{name}_new"][..., :n]
        positions[at : at + n] = np.arange(at, at + n)
        at += n
    return torch.cat(out)


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_the_graph_equals_the_model(name):
    model, tokens = (
        trained(looping=name != "loops_off", **FEATURES[name]).eval(),
        some_tokens(rows=1),
    )
    wanted, passes = model.logits(tokens)[0], len(model.passes(model.looping))
    for parts in {1, 2, passes}:
        found = logits_in_steps(model, tokens[0].tolist(), parts)
        assert (found - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["plain", "all"])
@torch.no_grad()
def test_scales_change_the_ranges_and_not_the_logits(name):
    model, tokens = trained(looping=True, **FEATURES[name]).eval(), some_tokens(rows=1)
    kinds = ("norm_attn", "norm_mlp", "attn.norm_q", "attn.norm_k")
    scales = {f"passes.{n}.act": 2.0 ** (n % 3 - 2) for n in range(13)}
    peaks = {
        f"passes.{n}.{kind}": 2.0 ** (i - 1) for n in range(13) for i, kind in enumerate(kinds)
    }
    found = logits_in_steps(
        model, tokens[0].tolist(), 1, Precision("fp32", scales, peaks | {"head.norm": 3.0}, 0.0)
    )
    assert (found - model.logits(tokens)[0]).abs().max() < 3e-5


def test_a_scale_reaches_the_activation():
    """Otherwise the test above could not fail."""
    model = trained()
    d = graph.model_dims(model, 4)
    plain, scaled = (
        graph.LayersShard(model, d, 0, 3, Precision("fp32", scales, {}, 0.0))
        for scales in ({}, {"passes.1.act": 0.25})
    )
    assert torch.equal(scaled.passes["1"].fc.weight, plain.passes["1"].fc.weight / 4)
    assert torch.equal(scaled.passes["1"].proj.weight, plain.passes["1"].proj.weight * 16)
    assert torch.equal(scaled.passes["0"].fc.weight, plain.passes["0"].fc.weight)


def test_passes_with_two_lanes():
    assert graph.model_dims(trained(**FEATURES["lanes"]), 4).parted == (False, True, True)
    # Loops return to a layer before the lanes part.
    plain = dict(FEATURES["all"], parallel_start_layer=4)
    assert graph.model_dims(trained(looping=True, **plain), 4).parted == (
        False,
        False,
        False,
        False,
        True,
        False,
        False,
        True,
        False,
        False,
        True,
        True,
        True,
    )


@torch.no_grad()
def test_lanes_that_part_twice():
    changed = dict(FEATURES["all"], parallel_start_layer=4)
    model, tokens = trained(looping=True, **changed).eval(), some_tokens(rows=1)
    wanted = model.logits(tokens)[0]
    for parts in (1, 5, 13):
        found = logits_in_steps(model, tokens[0].tolist(), parts)
        assert (found - wanted).abs().max() < 1e-5
