"""The one rounding function keeps its promises on steps, codes, sizes and errors."""

import bisect
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import SMOKE

from train_gpt import (
    GPT,
    HEAD,
    K_GRID,
    LEAST_K,
    PLAIN_BITS,
    PRESETS,
    Config,
    Runtime,
    TokenStream,
    bisect_k,
    collect_factors,
    encode_artifact,
    entropy_bits,
    gptq_codes,
    gptq_factor,
    initialise,
    levels,
    predicted_bytes,
    quantise,
    quantised,
    row_steps,
    tensor_bits,
    to_codes,
)

BITS = [2, 3, 4, 5, 6, 7, 8]


def rounded(w: torch.Tensor, k: float, bits: int) -> torch.Tensor:
    """The weight as a reader of the artifact will see it."""
    return quantise(w, k, bits).weight()


def gptq(w: torch.Tensor, hessian: torch.Tensor, k: float, bits: int, **options) -> torch.Tensor:
    steps, (order, factor, _) = row_steps(w, k, bits), gptq_factor(hessian)
    return gptq_codes(bits, w[None], steps[None], order[None], factor[None], **options)[0]


def plain_gptq(w, hessian, step, bits: int) -> torch.Tensor:
    """GPTQ as its paper has it: one matrix, one column at a time, through the inverse Hessian."""
    order = torch.argsort(hessian.diagonal(), descending=True)
    h = hessian.double() + (0.01 * hessian.diagonal().mean() + 1e-8) * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(h[order][:, order]), upper=True)
    w, codes = w.double()[:, order].clone(), torch.empty_like(w)
    for i in range(w.size(1)):
        codes[:, order[i]] = to_codes(w[:, i], step[:, 0], bits)
        error = (w[:, i] - codes[:, order[i]] * step[:, 0]) / upper[i, i]
        w[:, i:] -= error[:, None] * upper[i, i:]
    return codes


def normal(*shape, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """Rows of normal weights, each of its own spread."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator)
        * (spread * torch.randn(shape[0], 1, generator=generator)).exp()
    )


@st.composite
def weights(draw):
    """Matrices of any scale, with zeros, outliers, one column, or one row."""
    rows, columns = draw(st.integers(1, 6)), draw(st.sampled_from([1, 2, 7, 64]))
    w = normal(rows, columns, seed=draw(st.integers(0, 2**20))) * 10.0 ** draw(st.integers(-12, 6))
    w[draw(st.integers(0, rows - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e-6]))
    w[:, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    return w


# ---- Steps and codes -----------------------------------------------------------------------------


def test_levels():
    assert [levels(bits) for bits in BITS] == [1, 3, 7, 15, 31, 63, 127]


@given(w=weights(), k=st.floats(1, 64), bits=st.sampled_from(BITS))
def test_steps_fit_bf16_and_codes_fit_their_bits(w, k, bits):
    step, codes = row_steps(w, k, bits), to_codes(w, row_steps(w, k, bits), bits)
    assert step.shape == (len(w), 1) and step.dtype == torch.float32 and bool((step > 0).all())
    assert torch.equal(step.bfloat16().float(), step)
    assert torch.equal(codes, codes.round()) and codes.abs().max() <= levels(bits)
    assert torch.equal(codes.to(torch.int8).float(), codes)


@given(w=weights(), k=st.floats(1, 64), bits=st.sampled_from(BITS))
def test_a_rounded_weight_is_its_code_times_its_step(w, k, bits):
    step = row_steps(w, k, bits)
    assert torch.equal(rounded(w, k, bits), to_codes(w, step, bits) * step)
    inside = w.abs() <= levels(bits) * step
    assert bool(((rounded(w, k, bits) - w).abs() <= 0.5001 * step)[inside].all())


def test_the_step_is_k_times_rms_over_levels():
    w = torch.tensor([[3.0, -3.0, 3.0, 3.0], [0.5, 0.5, -0.5, 0.5]])
    for k, bits in ((6.0, 5), (12.0, 8), (62.0, 6)):
        exact = k / levels(bits) * torch.tensor([[3.0], [0.5]])
        assert torch.allclose(row_steps(w, k, bits), exact, rtol=2**-8, atol=0)
        assert torch.equal(row_steps(w, k, bits), exact.bfloat16().float())


@pytest.mark.parametrize("bits", BITS)
def test_steps_scale_with_k_down_to_the_least(bits):
    w, least = normal(50, 64), LEAST_K[bits]
    assert torch.equal(row_steps(w, least / 2, bits), row_steps(w, least, bits))
    assert torch.allclose(row_steps(w, 2 * least, bits), 2 * row_steps(w, least, bits), rtol=2**-7)
    assert torch.equal(
        row_steps(4 * w, 9.0, bits), 4 * row_steps(w, 9.0, bits)
    )  # a power of two is exact in bf16


@pytest.mark.parametrize("bits", [*BITS, PLAIN_BITS])
def test_rows_of_zeros_stay_zeros(bits):
    w = normal(4, 8)
    w[[0, 2]] = 0
    w[3] = 1e-44  # so small that its step is no number in bf16
    read = rounded(w, 2.0, bits)
    assert not read[[0, 2, 3]].any() and read[1].any() and bool(read.isfinite().all())


@given(w=weights(), bits=st.sampled_from(BITS), k=st.floats(3, 64))
def test_rounding_on_one_grid_is_idempotent(w, bits, k):
    """A rounded weight rounds to itself at its own step; another rms would give another step."""
    step = row_steps(w, k, bits)
    codes = to_codes(w, step, bits)
    assert torch.equal(to_codes(codes * step, step, bits), codes)
    assert torch.equal(rounded(rounded(w, k, PLAIN_BITS), k, PLAIN_BITS), rounded(w, k, PLAIN_BITS))


@pytest.mark.parametrize("bits", BITS)
def test_the_least_k_clips_few_normal_weights(bits):
    w = normal(200, 512)
    clipped = (w.abs() > (levels(bits) + 0.5) * row_steps(w, 0.0, bits)).float().mean()
    # Few bits gain more from finer steps than they lose at the ends.
    assert clipped < {2: 0.08, 3: 0.025, 4: 0.015}.get(bits, 0.005)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_least_k_of_few_bits_errs_least_on_normal_weights(bits):
    w = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))

    def error(scale: float) -> float:
        steps = scale * LEAST_K[bits] / levels(bits) * torch.ones(200, 1)
        return (to_codes(w, steps, bits) * steps - w).square().mean().item()

    assert error(1.0) < min(error(0.8), error(1.25))


def test_more_bits_and_smaller_k_err_less():
    w = normal(64, 256)

    def errors(tried):
        return [float((rounded(w, k, bits) - w).norm()) for k, bits in tried]

    by_bits, by_k = (
        errors([(6.0, b) for b in BITS]),
        errors([(k, 6) for k in (5.0, 8.0, 16.0, 60.0)]),
    )
    assert by_bits == sorted(by_bits, reverse=True) and by_k == sorted(by_k)


def test_halves_are_never_infinite():
    w = torch.tensor([1e9, -1e9, 65504.0, 65520.0, 1e-9, 0.1])
    assert quantise(w, 1.0, PLAIN_BITS).weight().tolist() == [
        65504.0,
        -65504.0,
        65504.0,
        65504.0,
        0.0,
        0.0999755859375,
    ]


def test_bits_by_name():
    cfg = Config(**PRESETS["frontier"] | dict(attn_bits=4, mlp_bits=5, bigram_vocab_size=64))
    with torch.device("meta"):
        bits = {name: tensor_bits(name, cfg) for name, _ in GPT(cfg).named_parameters()}
    assert {n for n, b in bits.items() if b == 7} == {
        "tok_emb.weight",
        "bigram.table.weight",
        "bigram.proj.weight",
    }
    four = {n.split(".", 2)[2] for n, b in bits.items() if b == 4}
    assert four == {f"attn.{x}.weight" for x in ("q", "k", "v", "proj")}
    assert {n.split(".", 2)[2] for n, b in bits.items() if b == 5} == {
        "mlp.fc.weight",
        "mlp.proj.weight",
    }
    assert all(n.endswith(".weight") == (b != PLAIN_BITS) for n, b in bits.items())
    assert {"skip_weights", "smear.gate", "blocks.0.attn.q_gain"} <= bits.keys()


# ---- Sizes ---------------------------------------------------------------------------------------

CFG = Config(**SMOKE | dict(model_dim=128, num_layers=3, attn_bits=6, mlp_bits=5, embed_bits=8))


@pytest.fixture(scope="module")
def gaussian() -> dict[str, torch.Tensor]:
    """The parameters of a small model, all normal: some 570,000 weights."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(CFG).named_parameters()}
    return {
        name: normal(*shape, seed=i, spread=0.3) if len(shape) > 1 else torch.ones(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_entropy_of_known_codes():
    assert entropy_bits(torch.tensor([[5, 5], [5, 5]])) == 0
    assert entropy_bits(torch.tensor([-1, 1, -1, 1])) == pytest.approx(4)
    assert entropy_bits(torch.arange(-127, 128)) == pytest.approx(255 * np.log2(255))


def test_predicted_size_falls_with_k(gaussian):
    sizes = [predicted_bytes(gaussian, k, CFG) for k in (3.6, 5.0, 6.0, 9.0, 20.0, 64.0)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 6


@pytest.mark.parametrize("k", [4.4, 9.0, 20.0])
def test_predicted_size_is_that_of_the_artifact(gaussian, k):
    weights = sum(w.numel() for w in gaussian.values())
    assert 300_000 < weights < 900_000
    cfg = dataclasses.replace(CFG, embed_tokenizer=False)
    real = len(encode_artifact(quantised(gaussian, k, cfg, {}), k, cfg, False, "ans", b""))
    assert abs(predicted_bytes(gaussian, k, CFG) / real - 1) < 0.02


def test_bisection_meets_its_target_with_the_finest_steps_that_do(gaussian):
    most, least = (predicted_bytes(gaussian, k, CFG) for k in (K_GRID[0], K_GRID[-1]))
    for part in (0.05, 0.3, 0.62, 0.97):
        target = least + part * (most - least)
        k = bisect_k(gaussian, target, CFG)
        at = bisect.bisect_left(K_GRID, k)
        assert k == K_GRID[at] and predicted_bytes(gaussian, k, CFG) <= target
        assert predicted_bytes(gaussian, K_GRID[at - 1], CFG) > target
    assert bisect_k(gaussian, most, CFG) == K_GRID[0]
    assert bisect_k(gaussian, least, CFG) > 0.99 * K_GRID[-1]


def test_when_nothing_fits_it_is_the_largest(gaussian):
    for target in (0, -5.0, predicted_bytes(gaussian, K_GRID[-1], CFG) - 1):
        assert bisect_k(gaussian, target, CFG) == K_GRID[-1]


# ---- GPTQ ----------------------------------------------------------------------------------------


def correlated(inputs: int, samples: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) * torch.linspace(2, 0.05, inputs)
    return torch.randn(samples, inputs, generator=generator) @ mix


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize(
    ("rows", "columns"), [(48, 96), (32, 300)]
)  # 300: across blocks, the last one short
def test_gptq_moves_the_output_less_on_the_same_grid(bits, rows, columns):
    w, x, k = normal(rows, columns, seed=bits, spread=0.3), correlated(columns, 4 * columns, 7), 6.0
    step, codes = row_steps(w, k, bits), gptq(w, x.T @ x, k, bits)

    def moved(codes):
        return float((x @ (codes * step - w).T).square().sum())

    assert (
        codes.shape == w.shape
        and torch.equal(codes, codes.round())
        and codes.abs().max() <= levels(bits)
    )
    assert moved(codes) < 0.8 * moved(to_codes(w, step, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_gptq_is_nearest_when_inputs_do_not_correlate(bits, scale):
    w = normal(40, 200)
    assert torch.equal(
        gptq(w, scale * torch.eye(200), 6.0, bits), to_codes(w, row_steps(w, 6.0, bits), bits)
    )


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize(("rows", "columns"), [(64, 48), (24, 128), (16, 333)])
def test_stacked_gptq_is_gptq_of_each_matrix(bits, rows, columns):
    """Two derivations in two precisions: only a weight that lies between two codes may differ."""
    matrices = [normal(rows, columns, seed=i, spread=0.3) for i in range(3)]
    hessians = [(x := correlated(columns, 3 * columns, i)).T @ x for i in range(3)]
    steps = [row_steps(w, 6.0, bits) for w in matrices]
    orders, factors, _ = zip(*map(gptq_factor, hessians), strict=True)
    stacked = [torch.stack(part) for part in (matrices, steps, orders, factors)]
    before = [part.clone() for part in stacked]
    codes = gptq_codes(bits, *stacked)
    assert all(torch.equal(a, b) for a, b in zip(stacked, before, strict=True))
    for w, h, step, one in zip(matrices, hessians, steps, codes, strict=True):
        plain = plain_gptq(w, h, step, bits)
        assert (one == plain).float().mean() > 0.99 and (one - plain).abs().max() <= 1
        assert (plain == to_codes(w, step, bits)).float().mean() < 0.9  # GPTQ is not rounding
        error, wanted = (float(((c * step - w) @ h * (c * step - w)).sum()) for c in (one, plain))
        assert error == pytest.approx(wanted, rel=2e-3)
        assert torch.equal(one, gptq(w, h, 6.0, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [2.5, 6.0, 31.0])
def test_a_stack_rounds_like_its_matrices(bits, k):
    """Equal to the bit, since training may round stacks and the export rounds single matrices."""
    for n, rows, columns in ((5, 48, 128), (3, 7, 33), (2, 1, 1), (4, 256, 1536)):
        stack = normal(n * rows, columns, seed=bits).view(n, rows, columns)
        stack[0, 0] = 0
        rounded = quantise(stack, k, bits)
        for i, w in enumerate(stack):
            one = quantise(w.clone(), k, bits)
            assert torch.equal(one.values, rounded.values[i])
            assert torch.equal(one.steps, rounded.steps[i])
            assert torch.equal(one.weight(), rounded.weight()[i])


def test_gptq_permutes_back():
    """Columns are rounded by falling Hessian; a diagonal Hessian must change nothing."""
    w, diagonal = normal(16, 70), torch.rand(70, generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(gptq(w, torch.diag(diagonal), 8.0, 6), to_codes(w, row_steps(w, 8.0, 6), 6))


def test_gptq_does_not_depend_on_its_block():
    w, x = normal(24, 150), correlated(150, 600, 3)
    whole = gptq(w, x.T @ x, 6.0, 5, block=150)
    for block in (1, 16, 64):
        same = (gptq(w, x.T @ x, 6.0, 5, block=block) == whole).float().mean()
        assert same > 0.995  # fp32 sums in another order flip a tie now and then


@pytest.mark.parametrize("hessian", ["zero", "rank one", "dead columns"])
def test_gptq_survives_poor_hessians(hessian):
    w, x = normal(16, 64), correlated(64, 1 if hessian == "rank one" else 200, 2)
    x[:, :20] *= hessian != "dead columns"
    h = x.T @ x * (hessian != "zero")
    codes = gptq(w, h, 6.0, 6)
    assert bool(codes.isfinite().all()) and codes.abs().max() <= 31
    if hessian == "zero":
        assert torch.equal(codes, to_codes(w, row_steps(w, 6.0, 6), 6))


def test_gptq_leaves_its_arguments_alone():
    w, h = normal(8, 32), torch.eye(32) + 0.1
    before = w.clone(), h.clone()
    gptq(w, h, 6.0, 6)
    assert torch.equal(w, before[0]) and torch.equal(h, before[1])


def test_quantised_uses_a_hessian_where_there_is_one():
    cfg = dataclasses.replace(CFG, vocab_size=64, num_layers=2, model_dim=64)
    model = GPT(cfg)
    initialise(model, cfg)
    state, x = dict(model.named_parameters()), correlated(64, 300, 5)
    name = "blocks.0.attn.q.weight"
    factors = {name: gptq_factor(x.T @ x)}
    plain, better = quantised(state, 6.0, cfg, {}), quantised(state, 6.0, cfg, factors)
    assert {n for n in state if not torch.equal(plain[n].values, better[n].values)} == {name}
    for n, r in plain.items():
        assert torch.equal(r.weight(), rounded(state[n].detach(), 6.0, tensor_bits(n, cfg))), n
        assert (r.steps is None) == (r.values.dtype == torch.float16) == (r.bits == PLAIN_BITS)


def test_gptq_rounds_the_embedding_for_the_logits_that_it_makes():
    cfg = dataclasses.replace(CFG, vocab_size=64, num_layers=2, model_dim=64, embed_bits=3)
    model, tokens = GPT(cfg), np.random.default_rng(0).integers(0, 64, 4096).astype("<u2")
    initialise(model, cfg)
    with torch.no_grad():  # with a common part, as embeddings of trained models have
        model.tok_emb.weight.copy_(normal(64, 64) + 0.5)
    stream, rt = TokenStream([tokens]), Runtime(0, 1, torch.device("cpu"), "cpu")
    run = SimpleNamespace(cfg=cfg, rt=rt, model=model, stream=stream)
    factors, hessian = collect_factors(run), collect_factors(run, lambda h: h)[HEAD]
    weight, errors = model.tok_emb.weight.detach(), []
    for found in ({}, {HEAD: factors[HEAD]}):
        missed = quantised({HEAD: weight}, 3.0, cfg, found)[HEAD].weight() - weight
        errors.append(float(((missed @ hessian) * missed).sum()))
    assert errors[1] < 0.5 * errors[0]
