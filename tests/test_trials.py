"""Each trial does what its docstring says: the trainer with it beside the trainer without it."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import train_gpt
from train_gpt import BOS_ID, GPT, Averages, BigramHash, Config, Muon, SmearGate

with pytest.MonkeyPatch.context() as path:  # the modules of a bench import each other by name
    path.syspath_prepend(ROOT / "bench")
    import trials

SMALL = dict(vocab_size=64, train_seq_len=16, num_layers=4, model_dim=32, num_heads=4)
SMALL |= dict(num_kv_heads=2, train_batch_tokens=128)
PLAIN = dict(GPT(Config(**SMALL, parallel_start_layer=2)).named_parameters())


@pytest.fixture(autouse=True)
def equal_draws():
    torch.manual_seed(0)


@pytest.fixture
def apply(monkeypatch):
    """Return `trials.apply`, undone after the test."""

    def patch(name: str) -> None:
        for place, new in trials.TRIALS[name]().items():
            monkeypatch.setattr(f"train_gpt.{place}", new)

    return patch


def model_of(**settings) -> GPT:
    """Return a model in which every part that both versions share has the same weights."""
    model, values = GPT(Config(**SMALL | settings)), torch.Generator()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in PLAIN and p.ndim > 1:
                values.manual_seed(len(name) * 1000 + sum(map(ord, name)))
                p.copy_(torch.randn(p.shape, generator=values) * 0.2)
    return model


def tokens(seed: int = 0, bos: int = 0) -> torch.Tensor:
    ids = torch.randint(4, 64, (2, 16), generator=torch.Generator().manual_seed(seed))
    if bos:
        ids[:, bos] = BOS_ID
    return ids


# ==== OPTIMISER ===================================================================================
def muon(bank: torch.Tensor, **settings) -> Muon:
    rt = SimpleNamespace(rank=0, world=1)
    return Muon([bank], Config(**SMALL | dict(muon_momentum=0.0) | settings), rt)


def test_cautious_decays_only_what_the_step_shrinks(apply):
    bank = torch.randn(1, 8, 8)
    bank.grad = torch.randn(1, 8, 8)
    moved, old = bank.clone(), bank.clone()
    moved.grad = bank.grad
    muon(moved, muon_wd=0.0, matrix_lr=0.1).step()
    apply("cautious")
    muon(bank, muon_wd=0.5, matrix_lr=0.1).step()
    shrinks = (moved - old) * old < 0
    assert shrinks.any() and not shrinks.all()
    torch.testing.assert_close(bank, moved - 0.05 * old * shrinks)


def test_row_floor_lifts_short_rows_and_no_others(apply):
    g = torch.randn(1, 16, 4) * torch.logspace(-3, 0, 16)[None, :, None]
    plain = train_gpt.orthogonalised(g, 5, train_gpt.NEWTON_SCHULZ)
    apply("row_floor")
    lifted = train_gpt.orthogonalised(g, 5, train_gpt.NEWTON_SCHULZ)
    least = 0.5 * plain.norm(dim=2).mean()
    assert plain.norm(dim=2).min() < 0.9 * least
    torch.testing.assert_close(
        lifted.norm(dim=2), plain.norm(dim=2).clamp(min=least), atol=1e-4, rtol=1e-4
    )


def test_soap_divides_by_what_its_eigenbases_hold(apply):
    g, plain = torch.randn(1, 8, 8), Muon.share
    left, _, right = torch.linalg.svd(g)
    wanted = plain(muon(g), left @ right)[0]  # of one gradient, all directions get one size
    apply("soap")
    torch.testing.assert_close(muon(g).share(g)[0], wanted, atol=1e-2, rtol=1e-2)


def test_cosine_falls_as_a_cosine(apply):
    apply("cosine")
    cfg = Config(**SMALL, warmdown_frac=0.4)
    rates = [train_gpt.lr_scale(p, cfg) for p in (0.5, 0.6, 0.7, 0.8, 1.0)]
    assert rates == pytest.approx([1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0])


def test_tail_ema_keeps_nothing_of_early_weights(apply):
    apply("tail_ema")
    averages, cfg = Averages(), Config(**SMALL, ema_decay=0.99)
    for step, progress in enumerate((0.1, 0.7, 0.85, 0.9)):
        averages.update([torch.full((2,), float(step))], step, progress, cfg)
        assert bool(averages.ema) == (progress > 0.8)
    assert 2 < averages.ema[0][0] <= 3


# ==== MODEL =======================================================================================
def test_documents_do_not_read_each_other(apply):
    first, second = tokens(0, bos=6), tokens(1, bos=6)
    second[:, 6:] = first[:, 6:]
    assert not torch.equal(model_of().logits(first)[:, 6:], model_of().logits(second)[:, 6:])
    apply("documents")
    model = model_of()
    torch.testing.assert_close(model.logits(first)[:, 6:], model.logits(second)[:, 6:])
    assert not torch.equal(model.logits(first)[:, 5], model.logits(second)[:, 5])


def test_learned_xsa_reaches_from_none_to_xsa(apply):
    plain, exclusive = model_of().logits(tokens()), model_of(xsa_last_n=4).logits(tokens())
    apply("learned_xsa")
    model = model_of()
    torch.testing.assert_close(model.logits(tokens()), plain)
    for block in model.blocks:
        torch.nn.init.ones_(block.attn.own)
    torch.testing.assert_close(model.logits(tokens()), exclusive)


def test_half_gate_begins_half_open(apply):
    apply("half_gate")
    model, x = model_of(), torch.randn(2, 16, 32)
    rope = model.cos, model.sin
    attn, begun = model.blocks[0].attn, model.blocks[0].attn(x, rope, train_gpt.attend)
    torch.nn.init.constant_(attn.opening, 1e4)
    opened = x[..., :12].sum(-1) > 0
    after = attn(x, rope, train_gpt.attend)
    assert opened.any() and not opened.all()
    torch.testing.assert_close(after[opened], 2 * begun[opened], atol=1e-4, rtol=1e-4)
    assert not after[~opened].any()


def test_gated_smear_adds_the_embedding_before(apply):
    apply("gated_smear")
    assert train_gpt.SmearGate is not SmearGate
    smear, x = train_gpt.SmearGate(32), torch.randn(2, 16, 32)
    assert torch.equal(smear(x, tokens(0, bos=6)), x)
    torch.nn.init.ones_(smear.scale)
    y = smear(x, tokens(0, bos=6))
    assert torch.equal(y[:, 6], x[:, 6]) and torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y[:, 1:6], x[:, 1:6] + 0.5 * x[:, :5])


def test_signs_part_pairs_of_one_bucket(apply):
    cfg = Config(**SMALL, bigram_vocab_size=8, bigram_dim=4)
    torch.manual_seed(0)
    table = BigramHash(cfg)
    ids = torch.stack([torch.full((60,), 5), torch.arange(4, 64)], dim=1)
    rows = table(ids)[:, 1]
    apply("signs")
    signed, buckets = table(ids)[:, 1], table.buckets(ids)[:, 1]
    flipped = (signed + rows).abs().amax(1) < 1e-7
    assert torch.equal(signed[~flipped], rows[~flipped])
    both = [len({*flipped[buckets == b].tolist()}) == 2 for b in buckets.unique()]
    assert sum(both) >= 4


# ==== STREAM ======================================================================================
@pytest.mark.parametrize("name", ["dense", "two_caps", "two_ahead"])
@pytest.mark.parametrize("lanes", [0, 2])
def test_a_trial_begins_as_the_plain_model(apply, name, lanes):
    changed = dict(parallel_start_layer=lanes, skip_gates=bool(lanes))
    plain = model_of(**changed).logits(tokens())
    apply(name)
    torch.testing.assert_close(model_of(**changed).logits(tokens()), plain)


def test_dense_reads_every_output_before(apply):
    apply("dense")
    model = model_of()
    model.logits(tokens()).square().mean().backward()
    read = model.depth_weights.grad != 0
    assert torch.equal(read, torch.ones(4, 5).tril(1).bool())


def test_two_caps_bound_positive_and_negative_logits_apart(apply):
    apply("two_caps")
    model = model_of(logit_softcap=1.0)
    with torch.no_grad():
        model.caps.copy_(torch.tensor([0.0, math.log(2.0)]))
        model.tok_emb.weight.mul_(10)
        logits = model.logits(tokens())
    assert 0.9 < logits.max() <= 1 and -2 <= logits.min() < -1.8


@pytest.mark.parametrize("sampled", [False, True])
def test_two_ahead_trains_a_matrix_and_scores_as_before(apply, sampled):
    ids = tokens(3)
    x, y = ids[:, :-1], ids[:, 1:]
    pieces, places = torch.cat([y.flatten(), torch.arange(64)]).unique(return_inverse=True)
    sample = (pieces, places[: y.numel()], torch.zeros(len(pieces))) if sampled else None
    plain = model_of()(x, y, sample)
    apply("two_ahead")
    model = model_of()
    with torch.no_grad():
        torch.testing.assert_close(model(x, y, sample), plain)
    nats = model(x, y, sample)
    assert (nats > plain).float().mean() > 0.9 and torch.equal(nats[:, -1], plain[:, -1])
    nats.mean().backward()
    assert model.ahead.weight.grad.abs().sum() > 0


# ==== ROUNDING ====================================================================================
def test_clips_give_each_group_its_steps(apply):
    state, cfg = dict(model_of().named_parameters()), Config(**SMALL, attn_bits=6, mlp_bits=6)
    plain, predicted = train_gpt.quantised(state, 8.0, cfg, {}), train_gpt.predicted_bytes
    sizes = [predicted(state, k, cfg) for k in (8.0 * 0.9, 8.0 * 1.1)]
    apply("clips")
    own = train_gpt.quantised(state, 8.0, cfg, {})
    assert [*own] == [*state]
    for name, clip in (("blocks.0.attn.q", 13), ("blocks.1.mlp.fc", 11.5), ("tok_emb", 14)):
        ratio = own[f"{name}.weight"].steps / plain[f"{name}.weight"].steps
        torch.testing.assert_close(ratio, torch.full_like(ratio, clip / 12.85), atol=0.01, rtol=0)
    assert torch.equal(own["skip_weights"].values, plain["skip_weights"].values)
    assert sizes[1] < train_gpt.predicted_bytes(state, 8.0, cfg) < sizes[0]


# ==== BY NAME =====================================================================================
def test_a_trial_is_applied_by_name_and_the_empty_name_changes_nothing(monkeypatch):
    before = train_gpt.lr_scale
    monkeypatch.setattr("train_gpt.lr_scale", before)
    trials.apply("")
    assert train_gpt.lr_scale is before
    trials.apply("cosine")
    assert train_gpt.lr_scale is not before
