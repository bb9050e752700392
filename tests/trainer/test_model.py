"""The model in train_gpt.py: causal whatever is switched on, and each part equal to its formula."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import ALL_ON, FEATURES, SMOKE, config, initial, some_tokens, trained

import train_gpt
from train_gpt import BOS_ID, GPT, PRESETS, Config, Runtime


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_logits_never_depend_on_later_tokens(name):
    model, tokens = trained(looping=name != "loops_off", **FEATURES[name]), some_tokens()
    before = model.logits(tokens)
    assert not torch.equal(before[:, :-1], before[:, 1:])
    for t in (1, 8, 15):
        changed = tokens.clone()
        changed[:, t:] = (changed[:, t:] + 31) % 97
        changed[0, t] = BOS_ID
        after = model.logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@pytest.mark.parametrize("name", [n for n in FEATURES if n not in ("plain", "loops_off")])
@torch.no_grad()
def test_each_feature_changes_the_logits(name):
    tokens, changed = some_tokens(), FEATURES[name]
    plain = {"num_layers": changed.get("num_layers", 3)}
    with_it, without = trained(looping=True, **changed), GPT(config(**plain))
    mine = dict(with_it.named_parameters())
    for n, p in without.named_parameters():
        p.copy_(mine[n][: len(p)] if n == "skip_weights" else mine[n])
    assert not torch.allclose(with_it.logits(tokens), without.logits(tokens), atol=1e-4)


def reference_attention(q, k, v):
    """softmax(q k^T / sqrt C) v over positions not later, in float64, head by head."""
    B, H, T, C = q.shape
    out, shared = torch.zeros(B, H, T, C, dtype=torch.float64), H // k.size(1)
    for h in range(H):
        scores = q[:, h].double() @ k[:, h // shared].double().mT / math.sqrt(C)
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        out[:, h] = scores.softmax(-1) @ v[:, h // shared].double()
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attend_is_the_plain_softmax_and_gqa_repeats_keys_and_values(groups):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, groups, 9, 8), torch.randn(2, groups, 9, 8)
    y = train_gpt.attend(q, k, v)
    assert torch.allclose(y.double(), reference_attention(q, k, v), atol=1e-5)
    repeated = train_gpt.attend(q, *(x.repeat_interleave(4 // groups, dim=1) for x in (k, v)))
    assert torch.allclose(y, repeated, atol=1e-6)


def test_rope_tables_are_fp32_and_tell_1024_positions_apart():
    cos, sin = train_gpt.rope_tables(1024, 64, 10_000.0)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1024, 32)
    assert len(torch.cat([cos, sin], 1).unique(dim=0)) == 1024
    angle = torch.arange(1024).double()[:, None] * 10_000.0 ** (
        -torch.arange(0, 64, 2).double() / 64
    )
    assert torch.allclose(cos.double(), angle.cos(), atol=2e-4) and torch.allclose(
        sin.double(), angle.sin(), atol=2e-4
    )
    slowest = torch.stack(
        [cos[:, -1], sin[:, -1]], 1
    )  # under bf16 tables half of these would collide
    assert len(slowest.unique(dim=0)) == 1024 and len(slowest.bfloat16().unique(dim=0)) < 512


@pytest.mark.parametrize("dims", [8, 4])
def test_rope_makes_scores_depend_on_distance_alone_and_leaves_the_rest(dims):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1, 1, 8).expand(1, 1, 12, 8) for _ in range(2))
    tables = train_gpt.rope_tables(12, dims, 100.0)
    turned_q, turned_k = train_gpt.rotate(q, *tables), train_gpt.rotate(k, *tables)
    scores = (turned_q @ turned_k.mT)[0, 0]
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    assert scores[0].std() > 0.01
    assert torch.equal(turned_q[..., dims:], q[..., dims:])
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), atol=1e-5)


def test_smear_gate_never_reads_across_bos():
    """At every BOS the output equals the input; elsewhere the gate mixes."""
    gate, x, tokens = train_gpt.SmearGate(6), torch.randn(2, 10, 6), torch.full((2, 10), 5)
    tokens[0, 4] = tokens[1, 0] = tokens[1, 9] = BOS_ID
    with torch.no_grad():
        gate.gate.copy_(torch.linspace(-2, 2, 6))
        out, share = gate(x, tokens), torch.sigmoid(gate.gate)
    at_bos = tokens == BOS_ID
    assert torch.equal(out[at_bos], x[at_bos])
    for b in range(2):
        for t in range(1, 10):
            if not at_bos[b, t]:
                assert torch.allclose(
                    out[b, t], (1 - share) * x[b, t] + share * x[b, t - 1], atol=1e-6
                )
    assert torch.equal(out[0, 0], x[0, 0])
    assert torch.equal(train_gpt.SmearGate(6).gate, torch.zeros(6))  # half of each, at the start


def test_bigram_buckets_equal_the_formula_by_hand():
    bigram = train_gpt.BigramHash(config(bigram_vocab_size=2048, bigram_dim=8))
    tokens = torch.tensor([[1, 700, 3, 96], [5, 5, 1023, 0]])
    buckets = bigram.buckets(tokens)
    assert buckets[:, 0].tolist() == [2047, 2047]
    assert buckets[0, 1:].tolist() == [
        ((36313 * c) ^ (27191 * p)) % 2047 for c, p in ((700, 1), (3, 700), (96, 3))
    ]
    assert buckets[1, 1:].tolist() == [
        ((36313 * c) ^ (27191 * p)) % 2047 for c, p in ((5, 5), (1023, 5), (0, 1023))
    ]
    assert buckets[0, 1].item() == (25419100 ^ 27191) % 2047
    assert bigram.scale.item() == pytest.approx(0.05)


def test_xsa_output_is_orthogonal_to_its_own_value_and_otherwise_unchanged():
    torch.manual_seed(0)
    y, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    out, own = train_gpt.without_own_value(y, v), v.repeat_interleave(2, dim=1)
    assert (out * own).sum(-1).abs().max() < 1e-5 < (y * own).sum(-1).abs().max()
    along = (y * own).sum(-1, keepdim=True) / own.square().sum(-1, keepdim=True) * own
    assert torch.allclose(out + along, y, atol=1e-5)


def test_xsa_and_lanes_sit_in_the_layers_that_were_asked_for():
    model = GPT(config(num_layers=5, xsa_last_n=2, parallel_start_layer=3, ln_scale=True))
    assert [b.attn.exclusive for b in model.blocks] == [False, False, False, True, True]
    assert [b.lane_mix is not None for b in model.blocks] == [False, False, False, True, True]
    assert [b.norm_scale for b in model.blocks] == pytest.approx(
        [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5]
    )


def test_loops_run_in_the_order_of_the_field():
    model = GPT(config(num_layers=11, loop_start=3, loop_end=5, num_loops=2))
    order = model.passes(True)
    assert order == [0, 1, 2, 3, 4, 5, 3, 4] + [
        5,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        10,
    ]  # as in #1855: encoder, decoder
    assert model.passes(False) == list(range(11))
    assert model.skip_weights.shape == (8, 32)
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_args, i=i: ran.append(i))
    model.logits(some_tokens())
    assert ran == list(range(11))
    model.looping = True
    ran.clear()
    model.logits(some_tokens())
    assert ran == order


@torch.no_grad()
def test_without_loops_the_switch_does_nothing():
    model, tokens = trained(**ALL_ON | dict(num_loops=0)), some_tokens()
    before = model.logits(tokens)
    model.looping = True
    assert torch.equal(model.logits(tokens), before)
    looped = trained(**ALL_ON)
    before = looped.logits(tokens)
    looped.looping = True
    assert not torch.allclose(looped.logits(tokens), before, atol=1e-4)


@torch.no_grad()
def test_a_lane_takes_both_outputs_at_first_and_only_its_own_if_told_so():
    torch.manual_seed(0)
    block = trained(parallel_start_layer=2).blocks[2]
    x, lane, x0 = (torch.randn(1, 16, 32) for _ in range(3))
    rope = train_gpt.rope_tables(16, 8, 10_000.0)
    keep, again = block.resid_mix
    mixed = keep * x + again * x0
    attended = block.attn_scale * block.attn(train_gpt.normalised(mixed), rope, train_gpt.attend)
    written = block.mlp_scale * block.mlp(train_gpt.normalised(lane))
    fresh = initial(parallel_start_layer=2).blocks[2]
    assert torch.equal(fresh.lane_mix, torch.ones(2, 2))
    block.lane_mix.fill_(1.0)
    for got, old in zip(block(x, lane, x0, rope, train_gpt.attend), (mixed, lane), strict=True):
        assert torch.allclose(got, old + attended + written, atol=1e-5)
    block.lane_mix.copy_(torch.eye(2))
    first, second = block(x, lane, x0, rope, train_gpt.attend)
    assert torch.allclose(first, mixed + attended, atol=1e-5) and torch.allclose(
        second, lane + written, atol=1e-5
    )


@pytest.mark.parametrize("lanes", [0, 3])
@torch.no_grad()
def test_an_open_skip_gate_keeps_the_stream_and_a_closed_one_the_skip(lanes):
    changed, tokens = dict(num_layers=5, parallel_start_layer=lanes), some_tokens()
    gated, plain = trained(skip_gates=True, **changed), initial(**changed)
    assert gated.skip_gates.shape == gated.skip_weights.shape == (2, 32)
    plain.load_state_dict({n: p for n, p in gated.state_dict().items() if n != "skip_gates"})
    plain.skip_weights.zero_()
    gated.skip_gates.fill_(40.0)
    torch.testing.assert_close(gated.logits(tokens), plain.logits(tokens))
    # Layer 3 reads the output of layer 0 beside that of layer 2; closed, nothing of layer 2.
    for gate, lost in ((0.0, False), (-200.0, True)):
        gated.skip_gates[1].fill_(gate)
        before = gated.logits(tokens)
        gated.blocks[2].mlp.fc.weight.mul_(1.5)
        assert torch.equal(gated.logits(tokens), before) == lost


@torch.no_grad()
def test_the_attention_gate_starts_as_the_identity():
    gated, plain, tokens = initial(attn_gate=True), initial(), some_tokens()
    for model in (gated, plain):
        for i, block in enumerate(model.blocks):  # let attention reach the logits
            block.attn.proj.weight.copy_(
                torch.randn(32, 32, generator=torch.Generator().manual_seed(i)) / 6
            )
    assert torch.equal(gated.logits(tokens), plain.logits(tokens))
    assert gated.blocks[0].attn.gate.shape == (4, 12)
    gated.blocks[0].attn.gate.fill_(0.5)
    assert not torch.allclose(gated.logits(tokens), plain.logits(tokens), atol=1e-4)


@torch.no_grad()
def test_leaky_slope_squares_both_sides():
    mlp = train_gpt.MLP(config(leaky_slope=0.5))
    mlp.proj.weight.normal_()
    x = torch.randn(3, 32)
    hidden = x @ mlp.fc.weight.T
    wanted = torch.where(hidden > 0, hidden, 0.5 * hidden).square() @ mlp.proj.weight.T
    assert torch.allclose(mlp(x), wanted, atol=1e-5)
    mlp.slope = 0.0
    assert torch.allclose(mlp(x), hidden.clamp(min=0).square() @ mlp.proj.weight.T, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "all"])
@torch.no_grad()
def test_the_first_forward_pass_passes_the_embedding_through_and_knows_nothing(name):
    model, tokens = initial(**FEATURES[name]), some_tokens()
    x0 = model.embed(tokens)
    rope, x = (model.cos, model.sin), torch.randn_like(x0)
    for block in model.blocks:
        for out in block(x, x, x0, rope, train_gpt.attend):
            assert torch.equal(out, x)
    wide = initial(**SMOKE | dict(vocab_size=1024))
    tokens = torch.randint(0, 1024, (4, 65), generator=torch.Generator().manual_seed(0))
    assert wide(tokens[:, :-1], tokens[:, 1:]).mean().item() == pytest.approx(
        math.log(1024), abs=0.05
    )


def test_orthogonal_initial_matrices():
    cfg = dataclasses.replace(Config(**SMOKE), model_dim=128, bigram_dim=96)
    model = GPT(cfg)
    train_gpt.initialise(model, cfg)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        w, zero = module.weight.detach(), name.endswith(("attn.proj", "mlp.proj"))
        assert (w.abs().max().item() == 0) == zero, name
        if not zero:
            gram, gain = (
                (w @ w.T if w.size(0) <= w.size(1) else w.T @ w),
                (2 * cfg.num_layers) ** -0.5,
            )
            scale = gain**2 if name == "bigram.proj" else 1.0
            assert torch.allclose(gram, scale * torch.eye(len(gram)), atol=1e-4), name
    assert model.bigram.table.weight.abs().max() == 0 < model.bigram.proj.weight.abs().max()
    assert model.tok_emb.weight.std().item() == pytest.approx(0.005, rel=0.05)


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed: int, before: int) -> list[torch.Tensor]:
        torch.manual_seed(before)
        cfg = config(**ALL_ON, seed=seed)
        model = GPT(cfg)
        train_gpt.initialise(model, cfg)
        return [p.detach() for p in model.parameters()]

    first, again, other = weights(7, 1), weights(7, 2), weights(8, 1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


def test_consensus_has_the_parameters_of_the_record_198():
    """Record #198 has 26,829,913 parameters, with five skips of 512. Ours has as many."""
    with torch.device("meta"):
        model = GPT(Config(**PRESETS["consensus"]))
    assert sum(p.numel() for p in model.parameters()) == 26_829_913
    assert model.skip_weights.shape == (5, 512)


CPU = Runtime(0, 1, torch.device("cpu"), "cpu")


@pytest.mark.parametrize("name", FEATURES)
def test_every_parameter_learns_after_two_steps(name):
    model, tokens = initial(looping=True, **FEATURES[name]), some_tokens(4, 17)
    run = train_gpt.make_run(model.cfg, CPU, None, None, model, [np.zeros(1)])
    for _ in range(3):
        loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
        gradients = torch.autograd.grad(loss, run.params, materialize_grads=True)
        names = [n for n, _ in model.named_parameters()]
        without = [n for n, g in zip(names, gradients, strict=True) if not g.abs().max() > 0]
        torch._foreach_copy_(run.gradients.params, gradients)
        for o in run.optimisers:
            o.step()
    assert without == []


def test_a_model_that_has_been_evaluated_can_be_trained():
    """#296 and five more: RoPE tables cached under inference mode cannot be saved for backward."""
    model, tokens = initial(**ALL_ON, looping=True), some_tokens()
    with torch.inference_mode():
        first = model(tokens[:, :-1], tokens[:, 1:]).mean().item()
    loss = model(tokens[:, :-1], tokens[:, 1:]).mean()
    loss.backward()
    assert loss.item() == pytest.approx(first, abs=1e-6)
    assert model.tok_emb.weight.grad.abs().max() > 0


@torch.no_grad()
def test_logits_stay_within_the_softcap():
    model = trained(logit_softcap=5.0)
    soft = model.logits(some_tokens())
    model.tok_emb.weight.mul_(1e4)
    hard = model.logits(some_tokens())
    assert soft.abs().max() < 5.0 and hard.abs().max() <= 5.0 and hard.abs().max() > 4.99
    assert hard.dtype == torch.float32


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_every_target():
    model, tokens = trained(**ALL_ON, looping=True), some_tokens(3, 17)
    nats = model(tokens[:, :-1], tokens[:, 1:])
    log_p = F.log_softmax(model.logits(tokens[:, :-1]).double(), -1)
    assert nats.shape == (3, 16)
    assert torch.allclose(nats.double(), -log_p.gather(2, tokens[:, 1:, None])[..., 0], atol=1e-5)


def run_of(model: GPT, tokens: np.ndarray, **changes) -> train_gpt.Run:
    """Return a run that trains `model` on `tokens`."""
    return train_gpt.make_run(
        dataclasses.replace(model.cfg, **changes), CPU, None, None, model, [tokens]
    )


def test_each_piece_counts_as_often_in_samples_as_its_chance_says():
    """If targets occur as often as was counted, each piece weighs 1 on average, absent ones too."""
    shares = np.arange(1, 98) ** -1.0
    rng, total, draws = np.random.default_rng(0), torch.zeros(97, dtype=torch.float64), 4000
    text = rng.choice(97, 200_000, p=shares / shares.sum())
    run = run_of(trained(), text, sampled_pieces=20)
    for _ in range(draws):
        run.stream.at += 64
        targets = torch.from_numpy(rng.choice(text, (4, 16)))
        pieces, places, chances = train_gpt.sample(run, targets)
        assert torch.equal(pieces[places].view(4, 16), targets)
        assert len(set(pieces.tolist())) == len(pieces) == len(chances)
        total[pieces] += (-chances).double().exp()
    assert (total / draws - 1).abs().max() < 0.1


def test_a_sample_of_all_pieces_is_the_whole_loss():
    model, tokens = trained(**ALL_ON, looping=True), some_tokens(8, 17)
    run, params = (
        run_of(model, tokens.flatten().numpy(), sampled_pieces=4000),
        [*model.parameters()],
    )
    x, y = tokens[:, :-1], tokens[:, 1:]
    pieces, *rest = train_gpt.sample(run, y)
    assert torch.equal(pieces, torch.arange(97))
    few, whole = model(x, y, (pieces, *rest)), model(x, y)
    assert few.shape == y.shape and torch.allclose(few, whole, atol=1e-5)
    grads = [torch.autograd.grad(n.mean(), params, materialize_grads=True) for n in (few, whole)]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_a_step_in_the_first_part_of_a_run_takes_a_sample(monkeypatch):
    model, drawn = trained(), []
    run = run_of(model, some_tokens(8, 17).flatten().numpy(), sampled_frac=0.5)
    whole = train_gpt.sample
    monkeypatch.setattr(train_gpt, "sample", lambda *of: drawn.append(run.step) or whole(*of))
    for progress in (0.0, 0.49, 0.5, 0.9):
        train_gpt.take_step(run, progress)
    assert set(drawn) == {0, 1}


def test_parameters_are_fp32_and_alone_in_the_state():
    model = GPT(config(**ALL_ON))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    assert {b.dtype for b in model.buffers()} == {torch.float32}


def test_a_sequence_longer_than_the_tables_is_refused():
    with pytest.raises(
        train_gpt.UserError, match="17 tokens in a sequence, but the model's TRAIN_SEQ_LEN is 16"
    ):
        initial().logits(some_tokens(1, 17))
