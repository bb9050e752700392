"""Attention policies of bench/attention.py against whole-sequence attention and plain masks."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from models import some_tokens, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import attention
from attention import (
    ByHead,
    Everything,
    Pages,
    PolicyEngine,
    Rounded4,
    Rounded8,
    Row,
    Split,
    Window,
)

from fairway.scoring.memory import Memory, model_rope

LENGTH = 150
PIECES = {"tokens": [1] * LENGTH, "pieces": [7, 1, 40, 1, 1, 64, 36]}


def model_and_tokens():
    return trained(num_layers=2), some_tokens(1, LENGTH)


def read(model, tokens, policy, pieces, stretch=1.0):
    """Return the logits of a text that is read in pieces, and the engine."""
    engine = PolicyEngine(model, LENGTH, stretch)
    engine.policies = [policy(engine) for _ in range(engine.passes)]
    parts = tokens.split(pieces, dim=1)
    return torch.cat([engine.logits(part) for part in parts], dim=1)[0], engine


@torch.no_grad()
def whole(model, tokens, attend=None, stretch=1.0):
    part = dict(attention=attend) if attend else {}
    rope = model_rope(model, tokens.size(1), stretch)
    return model.from_embedded(model.embed(tokens), rope, **part)[0]


def masked(allowed):
    """Return attention that sees key j from query i where allowed(i, j), and j <= i."""
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    mask = allowed(i, j) & (j <= i)

    def attend(q, k, v):
        return attention.attend_where(q[0], k[0], v[0], mask)[None]

    return attend


# ==== EXACT POLICIES ==============================================================================
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("policy", [Everything, lambda: Split(16), lambda: Pages(10)])
def test_policies_that_read_everything_are_plain_attention(policy, pieces):
    model, tokens = model_and_tokens()
    got, _ = read(model, tokens, lambda _: policy(), PIECES[pieces])
    wanted = whole(model, tokens)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert torch.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.999999


@pytest.mark.parametrize("pieces", PIECES)
def test_a_window_sees_its_last_tokens_only(pieces):
    model, tokens = model_and_tokens()
    got, engine = read(model, tokens, lambda e: Window(24, 0, e.turn), PIECES[pieces])
    wanted = whole(model, tokens, masked(lambda i, j: j > i - 24))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    memory = Memory(model, window=24)
    with torch.inference_mode():
        same = torch.cat([memory.logits(part) for part in tokens.split(16, dim=1)], dim=1)[0]
    torch.testing.assert_close(got, same, atol=1e-4, rtol=0)
    assert engine.bytes == 24 * token_bytes(model)


def token_bytes(model):
    cfg = model.cfg
    return len(model.blocks) * 2 * cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads) * 4


def test_first_tokens_are_read_right_before_the_window():
    model, tokens = model_and_tokens()
    window, first = 24, 4
    got, engine = read(model, tokens, lambda e: Window(window, first, e.turn), PIECES["tokens"])

    def attend(q, k, v):
        out = torch.empty_like(q)
        for t in range(LENGTH):
            begin = max(0, t + 1 - window)
            n = min(first, begin)
            turned = attention.rotate(k[:, :, :n], *engine.turn(begin - n))
            keys = torch.cat([turned, k[:, :, begin : t + 1]], dim=2)
            values = torch.cat([v[:, :, :n], v[:, :, begin : t + 1]], dim=2)
            out[0, :, t : t + 1] = attention.attend_where(
                q[0, :, t : t + 1], keys[0], values[0], None
            )
        return out

    torch.testing.assert_close(got, whole(model, tokens, attend), atol=1e-4, rtol=0)
    assert engine.bytes == (window + first) * token_bytes(model)


# ==== PAGES =======================================================================================
def test_pages_read_the_same_token_by_token_and_in_pieces():
    model, tokens = model_and_tokens()
    one, engine = read(model, tokens, lambda _: Pages(2), PIECES["tokens"])
    many, _ = read(model, tokens, lambda _: Pages(2), PIECES["pieces"])
    torch.testing.assert_close(one, many, atol=1e-4, rtol=0)
    assert not torch.allclose(one, whole(model, tokens), atol=1e-3)
    bounds = 2 * (LENGTH // attention.PAGE)  # least and largest keys: half of keys and values
    assert engine.bytes == LENGTH * token_bytes(model) + bounds * token_bytes(model) // 2


def test_bounds_of_a_page_are_above_each_product_with_its_keys():
    torch.manual_seed(0)
    pages, k, q = Pages(2), torch.randn(2, 64, 8), torch.randn(4, 1, 8)
    pages.append(k, k)
    low, high = pages.bounds.held
    assert low.shape == (2, 4, 8)
    products = torch.einsum("ghc,gnc->ghn", q.view(2, 2, 8), k).unflatten(2, (4, 16)).amax(3)
    reach = q.view(2, 2, 8).clamp(max=0) @ low.mT + q.view(2, 2, 8).clamp(min=0) @ high.mT
    assert (reach >= products - 1e-5).all()
    chosen = pages.chosen(q, torch.tensor([63]))
    assert chosen.shape == (2, 1, 2) and (chosen[:, 0, 0] == 2).all()
    best = reach.amax(1)[:, :2].argmax(1)
    assert torch.equal(chosen[:, 0, 1], best)


# ==== HEADS =======================================================================================
@pytest.mark.parametrize("pieces", PIECES)
def test_heads_read_each_by_its_kind(pieces):
    model, tokens = model_and_tokens()

    def by(*kinds):
        return read(model, tokens, lambda e: ByHead(kinds, Window(24, 4, e.turn)), PIECES[pieces])

    window, streaming = read(model, tokens, lambda e: Window(24, 4, e.turn), PIECES[pieces])
    torch.testing.assert_close(by(True, True)[0], whole(model, tokens), atol=1e-4, rtol=0)
    torch.testing.assert_close(by(False, False)[0], window, atol=1e-4, rtol=0)
    mixed, engine = by(True, False)
    assert not torch.allclose(mixed, window, atol=1e-3)
    assert not torch.allclose(mixed, whole(model, tokens), atol=1e-3)
    assert engine.bytes == (LENGTH * token_bytes(model) + streaming.bytes) // 2


# ==== FEWER BITS ==================================================================================
@pytest.mark.parametrize(
    ("policy", "bits"),
    [(Rounded8, 8), (lambda: Rounded4(False), 4), (lambda: Rounded4(True), 4)],
)
@pytest.mark.parametrize("pieces", PIECES)
def test_coded_keys_are_within_half_a_step(policy, bits, pieces):
    torch.manual_seed(0)
    k, v, cache = torch.randn(2, LENGTH, 8), torch.randn(2, LENGTH, 8), policy()
    for part in zip(k.split(PIECES[pieces], 1), v.split(PIECES[pieces], 1), strict=True):
        cache.append(*part)
    assert cache.count == LENGTH
    for got, exact in zip(cache.kept(), (k, v), strict=True):
        assert got.shape == exact.shape
        span = exact.abs().amax() * 2
        assert (got - exact).abs().max() <= 0.51 * span / (2**bits - 2) + 2e-3 * span


def test_bytes_of_coded_tokens_are_what_their_shape_says():
    def bytes_after(policy, tokens):
        cache, x = policy(), torch.randn(2, tokens, 8)
        cache.append(x, x)
        return cache.bytes

    assert bytes_after(Rounded8, 10) == 10 * 2 * 2 * (8 + 2)
    assert bytes_after(lambda: Rounded4(False), 10) == 10 * 2 * 2 * (4 + 4)
    block = 2 * (32 * 4 + 8 * 4) + 2 * 32 * (4 + 4)  # codes and steps of keys, of values
    assert bytes_after(lambda: Rounded4(True), 70) == 2 * block + 6 * 2 * 2 * 8 * 4


# ==== ROOM ========================================================================================
def test_a_row_grows_and_forgets():
    row, parts = Row(), [torch.randn(2, n, 3) for n in (1, 5, 2, 9)]
    for part in parts:
        row.append(part)
    assert torch.equal(row.held, torch.cat(parts, dim=1))
    row.keep(4)
    row.append(parts[0])
    assert torch.equal(row.held, torch.cat([parts[3][:, -4:], parts[0]], dim=1))
    assert row.bytes == 2 * 5 * 3 * 4


def test_stretch_is_ntk_scaling():
    model, tokens = model_and_tokens()
    got, _ = read(model, tokens, lambda _: Everything(), PIECES["pieces"], stretch=8.0)
    torch.testing.assert_close(got, whole(model, tokens, stretch=8.0), atol=1e-4, rtol=0)
    assert not torch.allclose(got, whole(model, tokens), atol=1e-3)
    assert math.isfinite(got.abs().max())
