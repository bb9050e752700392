"""Optimisers, schedules and averages in train_gpt.py, each against its formula written out here."""

import math

import numpy as np
import pytest
import torch

import train_gpt
from train_gpt import (
    GPT,
    NEWTON_SCHULZ,
    POLAR_EXPRESS,
    PRESETS,
    Averages,
    Buffer,
    Config,
    Muon,
    Runtime,
)

CPU = Runtime(0, 1, torch.device("cpu"), "cpu")
SMALL = dict(
    vocab_size=64,
    num_layers=2,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    train_seq_len=8,
    train_batch_tokens=64,
    smear_gate=True,
    bigram_vocab_size=16,
    bigram_dim=8,
)


def config(**changed) -> Config:
    return Config(**(SMALL | changed))


# ---- Muon ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "coefficients", [NEWTON_SCHULZ, POLAR_EXPRESS], ids=["newton_schulz", "polar_express"]
)
@pytest.mark.parametrize(
    "shape", [(1, 32, 32), (3, 24, 64), (3, 64, 24)], ids=["square", "wide", "tall"]
)
def test_orthogonalised_brings_singular_values_near_one(shape, coefficients):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out, (u, s, vh) = (
        train_gpt.orthogonalised(g, 5, coefficients),
        torch.linalg.svd(g, full_matrices=False),
    )
    assert out.shape == g.shape and s.max() / s.min() > 2
    got = torch.linalg.svdvals(out)
    assert 0.65 < got.min() and got.max() < 1.25
    # The directions stay: only the singular values change.
    along = u.mT @ out @ vh.mT
    assert (along - torch.diag_embed(along.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3
    for i in range(len(g)):  # a batch is its matrices one by one
        assert torch.allclose(
            train_gpt.orthogonalised(g[i : i + 1], 5, coefficients)[0], out[i], atol=1e-5
        )


def test_polar_express_comes_closer_to_one_than_the_fixed_polynomial():
    g = torch.randn((4, 48, 96), generator=torch.Generator().manual_seed(1))
    far = [
        (torch.linalg.svdvals(train_gpt.orthogonalised(g, 5, c)) - 1).abs()
        for c in (NEWTON_SCHULZ, POLAR_EXPRESS)
    ]
    assert far[1].max() < far[0].max() / 2 and far[1].mean() < far[0].mean() / 2
    assert far[1].max() < 0.2


def muon_reference(weight, grads, cfg):
    """Compute Muon by its definition: Nesterov momentum, five quintics, scale, decoupled decay."""
    weight, buffer = weight.clone(), torch.zeros_like(weight)
    for g in grads:
        buffer = cfg.muon_momentum * buffer + g
        x = g + cfg.muon_momentum * buffer
        if cfg.muon_row_normalize:
            x = torch.stack([row / (row.norm() + 1e-7) for row in x])
        x = x / (x.norm() * 1.01 + 1e-7)
        for i in range(cfg.muon_backend_steps):
            a, b, c = (POLAR_EXPRESS if cfg.muon_polar_express else NEWTON_SCHULZ * 5)[i]
            s = x @ x.T
            x = a * x + b * s @ x + c * s @ s @ x
        rows, cols = weight.shape
        weight = (
            weight * (1 - cfg.matrix_lr * cfg.muon_wd)
            - cfg.matrix_lr * max(1, rows / cols) ** 0.5 * x
        )
    return weight


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(muon_polar_express=True),
        dict(muon_row_normalize=True),
        dict(muon_wd=0.1, muon_momentum=0.8, matrix_lr=0.3),
    ],
    ids=str,
)
def test_muon_steps_as_its_definition_says(options):
    cfg, noise = config(**options), torch.Generator().manual_seed(0)
    shapes = [(1, 8, 8), (3, 8, 24), (2, 24, 8)]
    banks = [torch.randn(s, generator=noise) for s in shapes]
    starts, optimiser = [b.clone() for b in banks], Muon(banks, cfg, CPU)
    grads = [[torch.randn(s, generator=noise) for s in shapes] for _ in range(3)]
    for step in grads:
        for bank, g in zip(banks, step, strict=True):
            bank.grad = g.clone()
        optimiser.step()
    for i, bank in enumerate(banks):
        for j, matrix in enumerate(bank):
            wanted = muon_reference(starts[i][j], [step[i][j] for step in grads], cfg)
            assert torch.allclose(matrix, wanted, atol=2e-5), shapes[i]


@pytest.mark.parametrize("matrices", [1, 5, 8, 22])
@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_matrices_and_together_have_them_all(matrices, world, monkeypatch):
    stack = torch.randn((matrices, 8, 12), generator=torch.Generator().manual_seed(0))
    whole, parts = Muon([stack], config(), CPU).share(stack)[0], []
    monkeypatch.setattr(
        train_gpt.dist, "all_gather_into_tensor", lambda _, part, async_op: parts.append(part)
    )
    for rank in range(world):
        Muon([stack], config(), CPU._replace(rank=rank, world=world)).share(stack)
    assert len({part.shape for part in parts}) == 1  # as the exchange demands
    assert torch.equal(torch.cat(parts)[:matrices], whole)


def test_weight_decay_is_decoupled_and_exact():
    """Without gradients only decay is left: every parameter shrinks by 1 - lr * wd."""
    cfg = config(
        muon_wd=0.1, adam_wd=0.2, embed_wd=0.3, matrix_lr=0.5, scalar_lr=0.25, tied_embed_lr=0.125
    )
    model = GPT(cfg)
    run = train_gpt.make_run(cfg, CPU, None, None, model, [np.zeros(1)])
    before = {n: p.detach().clone().fill_(2.0) for n, p in model.named_parameters()}
    run.weights.flat.fill_(2.0)
    for o in run.optimisers:
        o.step()
    for n, p in model.named_parameters():
        rate = (
            0.125 * 0.3
            if n in ("tok_emb.weight", "bigram.table.weight")
            else (0.5 * 0.1 if n.endswith(".weight") else 0.25 * 0.2)
        )
        assert torch.allclose(p, before[n] * (1 - rate), atol=1e-6), n


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_is_in_exactly_one_group_and_muon_has_the_matrices(preset):
    cfg = Config(**PRESETS[preset])
    with torch.device("meta"):
        model = GPT(cfg)
    flat = torch.zeros(Buffer(model).flat.shape)
    weights = Buffer(model, flat)
    muon, adam = train_gpt.make_optimisers(weights, Buffer(model, flat.clone()), cfg, CPU)
    spans = [
        (group, bank.storage_offset(), bank.storage_offset() + bank.numel())
        for group, g in enumerate(g for o in (muon, adam) for g in o.param_groups)
        for bank in g["params"]
    ]
    groups = [[], [], []]
    for (name, p), view in zip(model.named_parameters(), weights.params, strict=True):
        start, end = view.storage_offset(), view.storage_offset() + p.numel()
        (group,) = (g for g, first, last in spans if first <= start and end <= last)
        groups[group].append(name)
    # No two weights share a place.
    starts = sorted((v.storage_offset(), v.numel()) for v in weights.params)
    assert all(a + n <= b for (a, n), (b, _) in zip(starts, starts[1:], strict=False))
    assert all(n.endswith(".weight") for n in groups[0]) and not any(
        "tok_emb" in n or "table" in n for n in groups[0]
    )
    assert set(groups[1]) == {"tok_emb.weight"} | (
        {"bigram.table.weight"} if cfg.bigram_vocab_size else set()
    )
    assert not any(n.endswith(".weight") for n in groups[2])
    peaks = [g["peak_lr"] for o in (muon, adam) for g in o.param_groups]
    assert peaks == [cfg.matrix_lr, cfg.tied_embed_lr, cfg.scalar_lr]
    assert [g["betas"] for g in adam.param_groups] == [(cfg.beta1, cfg.beta2)] * 2


def test_a_new_parameter_is_found_without_being_named():
    """#212: SmearGate and BigramHash once were in no optimiser."""
    model = GPT(config())
    model.vector, model.matrix = (
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Linear(16, 16, bias=False),
    )
    run = train_gpt.make_run(model.cfg, CPU, None, None, model, [np.zeros(1)])
    run.gradients.flat.fill_(1.0)
    before = [model.vector.clone(), model.matrix.weight.clone()]
    for o in run.optimisers:
        o.step()
    moved = [model.vector - before[0], model.matrix.weight - before[1]]
    # AdamW's first step is its rate, in each number; Muon's update of ones has rank one.
    assert moved[0].tolist() == pytest.approx([-model.cfg.scalar_lr] * 2, rel=1e-3)
    assert torch.linalg.matrix_rank(moved[1], rtol=1e-3) == 1


# ---- Schedules -----------------------------------------------------------------------------------
def test_progress_is_the_further_of_steps_and_clock():
    cfg = config(iterations=200, max_wallclock_seconds=50.0)
    assert train_gpt.progress_of(0, 0.0, cfg) == 0
    assert train_gpt.progress_of(100, 5.0, cfg) == 0.5
    assert train_gpt.progress_of(20, 40.0, cfg) == 0.8
    assert train_gpt.progress_of(200, 1.0, cfg) == 1 and train_gpt.progress_of(3, 50.0, cfg) == 1


def test_the_choices_at_the_end_have_their_seconds_within_the_cap_and_zero_is_no_cap():
    cfg = config(iterations=1000, max_wallclock_seconds=50.0)
    assert train_gpt.progress_of(0, 40.0, cfg, 10.0) == 1
    assert train_gpt.progress_of(0, 10.0, cfg, 10.0) == 0.25
    free = config(iterations=1000, max_wallclock_seconds=0.0)
    assert train_gpt.progress_of(10, 1e9, free) == 0.01


def test_learning_rate_falls_linearly_over_the_last_part():
    cfg = config(warmdown_frac=0.4, min_lr=0.1)
    wanted = {0.0: 1, 0.3: 1, 0.6: 1, 0.7: 0.75, 0.8: 0.5, 0.9: 0.25, 0.98: 0.1, 1.0: 0.1, 1.2: 0.1}
    assert {at: train_gpt.lr_scale(at, cfg) for at in wanted} == pytest.approx(wanted)
    assert train_gpt.lr_scale(1.0, config(warmdown_frac=0.0)) == 1
    assert train_gpt.lr_scale(0.5, config(warmdown_frac=1.0)) == pytest.approx(0.5)


def test_momentum_warms_up_linearly():
    cfg = config(
        muon_momentum=0.99, muon_momentum_warmup_start=0.92, muon_momentum_warmup_steps=1500
    )
    assert [train_gpt.momentum_at(s, cfg) for s in (0, 750, 1500, 9000)] == pytest.approx(
        [0.92, 0.955, 0.99, 0.99]
    )
    assert train_gpt.momentum_at(0, config(muon_momentum=0.9, muon_momentum_warmup_steps=0)) == 0.9


# ---- Averages ------------------------------------------------------------------------------------
def followed(averages: Averages, cfg: Config, steps: int, weight=lambda part: part) -> None:
    """A run of `steps` in which every weight is a function of progress."""
    param = torch.nn.Parameter(torch.zeros(3))
    for step in range(1, steps + 1):
        with torch.no_grad():
            param.fill_(weight(step / steps))
        averages.update([param], step, step / steps, cfg)


def test_swa_is_the_plain_mean_of_what_it_says():
    averages = Averages()
    followed(averages, config(swa_start_frac=0.5, swa_every=3), 20)
    taken = [12, 15, 18]  # multiples of 3 from step 10 on
    assert averages.swa_count == 3
    swa = averages.candidates()["swa"][0]
    assert swa.dtype == torch.float32 and torch.allclose(
        swa, torch.full((3,), sum(taken) / 20 / 3), atol=1e-6
    )
    assert Averages().candidates() == {}


def test_swa_sums_in_fp32_whatever_the_number():
    averages, param = Averages(), torch.nn.Parameter(torch.full((2,), 1.001))
    for step in range(1, 2001):
        averages.update([param], step, 0.9, config(swa_start_frac=0.5, swa_every=1))
    assert torch.allclose(
        averages.candidates()["swa"][0], param.detach(), rtol=1e-4
    )  # bf16 would stop at 256


def test_ema_of_constant_steps_has_its_closed_form():
    """Decay d of a 7,000-step run: over progress p the old weights keep exp(-(1 - d) 7000 p)."""
    averages, cfg = Averages(), config(ema_decay=0.9965)
    param = torch.nn.Parameter(torch.ones(3))
    averages.update([param], 1, 0.1, cfg)  # the first look is the start
    assert torch.equal(averages.candidates()["ema"][0], torch.ones(3))
    with torch.no_grad():
        param.fill_(5.0)
    for step in range(2, 11):
        averages.update([param], step, 0.1 + 0.2 * (step - 1) / 9, cfg)
    kept = math.exp(-0.0035 * 7000 * (0.3 - 0.1))
    ema = averages.candidates()["ema"][0]
    assert torch.allclose(ema, torch.full((3,), 5 + (1 - 5) * kept), atol=1e-5)
    assert not torch.equal(ema, param)


def test_ema_at_the_reference_length_decays_by_its_name():
    averages, cfg, param = Averages(), config(ema_decay=0.9965), torch.nn.Parameter(torch.zeros(1))
    averages.update([param], 1, 1 / 7000, cfg)
    with torch.no_grad():
        param.fill_(1.0)
    averages.update([param], 2, 2 / 7000, cfg)
    assert averages.ema[0].item() == pytest.approx(1 - 0.9965, rel=5e-3)


def test_ema_does_not_depend_on_the_length_of_the_run_in_steps():
    ends = []
    for steps in (100, 1000, 10_000):
        averages = Averages()
        followed(averages, config(ema_decay=0.999), steps, weight=lambda part: part**2)
        ends.append(averages.candidates()["ema"][0][0].item())
    assert ends[0] == pytest.approx(ends[2], abs=0.02) and ends[1] == pytest.approx(
        ends[2], abs=0.002
    )
    # It trails: d/dp of the mean is 7 (w - mean), so at the end it is 1 - 2/7 + 2/49 (1 - e^-7).
    assert ends[2] == pytest.approx(1 - 2 / 7 + 2 / 49 * (1 - math.exp(-7)), abs=1e-3)


def test_averages_do_not_share_memory_with_the_weights():
    averages, param = Averages(), torch.nn.Parameter(torch.zeros(2))
    averages.update([param], 1, 0.9, config(swa_start_frac=0.5, swa_every=1, ema_decay=0.9))
    with torch.no_grad():
        param.fill_(9.0)
    assert [value[0].sum().item() for value in averages.candidates().values()] == [0, 0]


def test_other_weights_are_used_and_given_back_without_a_copy():
    model = GPT(config())
    run = train_gpt.make_run(model.cfg, CPU, None, None, model, [np.zeros(1)])
    before, places = run.weights.flat.clone(), [p.data_ptr() for p in run.params]
    values = [torch.full_like(p, math.pi) for p in run.params]
    train_gpt.use_weights(run.params, values)
    assert [p.data_ptr() for p in run.params] == [v.data_ptr() for v in values]
    train_gpt.use_weights(run.params, run.weights.params)
    assert [p.data_ptr() for p in run.params] == places and torch.equal(run.weights.flat, before)
