"""The trainer still computes what the golden file says, and the file holds what it promises."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch

import train_gpt
from fairway.artifact_reader import read_artifact
from train_gpt import BOS_ID, GPT


@pytest.fixture(scope="module")
def golden() -> oracle.Oracle:
    return oracle.read()


@pytest.fixture(scope="module")
def made() -> oracle.Oracle:
    return oracle.made_anew()


def test_pytorch_matches_the_file(golden):
    weights = {n: torch.from_numpy(w) for n, w in golden.weights.items()}
    off = oracle.differences(golden, oracle.make(golden.cfg, weights, golden.tokens))
    assert all(off[what] <= most for what, most in oracle.TOLERANCES.items()), off


def test_the_script_still_writes_the_file(golden, made, tmp_path):
    """Settings and tokens are equal; orthogonal weights may differ in their last bits."""
    oracle.write(made, tmp_path / "again.npz")
    again = oracle.read(tmp_path / "again.npz")
    assert again.cfg == golden.cfg and np.array_equal(again.tokens, golden.tokens)
    assert all(np.allclose(again.weights[n], w, atol=1e-6) for n, w in golden.weights.items())
    off = oracle.differences(golden, again)
    assert all(off[what] <= most for what, most in oracle.TOLERANCES.items()), off


def test_the_file_has_what_an_implementation_can_get_wrong(golden):
    cfg = golden.cfg
    assert (
        cfg.num_kv_heads < cfg.num_heads
        and cfg.smear_gate
        and cfg.bigram_vocab_size
        and cfg.muon_wd
    )
    inputs, targets = golden.batch(0)
    assert inputs.shape == targets.shape == (8, cfg.train_seq_len) and np.array_equal(
        inputs[:, 1:], targets[:, :-1]
    )
    assert (inputs[:, 1:] == BOS_ID).any()  # inside a sequence: nothing may be smeared across it
    assert sum(float(np.square(g).sum()) for g in golden.gradients.values()) > cfg.grad_clip_norm**2
    assert (
        set(golden.weights) == {n for n, _ in GPT(cfg).named_parameters()}
        and "skip_weights" in golden.weights
    )
    for named in (golden.gradients, *golden.steps):
        assert all(np.abs(v).max() > 0 and v.dtype == np.float32 for v in named.values())
    assert golden.losses.shape == (20,) and golden.losses[-4:].mean() < golden.losses[0] - 0.3
    assert oracle.PATH.stat().st_size < 400_000


@pytest.mark.parametrize("what", oracle.TOLERANCES)
def test_what_is_off_is_noticed(golden, what):
    shifted = {
        "logits": lambda v: v + 2e-5,
        "loss": lambda v: v + 2e-5,
        "losses": lambda v: v + 2e-4,
        "gradients": lambda v: v | {"smear.gate": v["smear.gate"] * 1.001},
        "steps": lambda v: [*v[:2], v[2] | {"tok_emb.weight": v[2]["tok_emb.weight"] * 1.001}],
    }[what]
    off = oracle.differences(golden, golden._replace(**{what: shifted(getattr(golden, what))}))
    assert [n for n, most in oracle.TOLERANCES.items() if off[n] > most] == [what]


@pytest.mark.apple
@pytest.mark.parametrize(
    "changed",
    [
        dict(smear_gate=False),
        dict(muon_wd=0.0),
        dict(grad_clip_norm=0.0),
        dict(qat_start_frac=1.0),
        dict(embed_wd=0.0),
    ],
    ids=str,
)
def test_a_part_that_is_missing_is_noticed(golden, changed):
    cfg = dataclasses.replace(golden.cfg, **changed)
    weights = {
        n: torch.from_numpy(w)
        for n, w in golden.weights.items()
        if n in dict(GPT(cfg).named_parameters())
    }
    made = oracle.make(cfg, weights, golden.tokens)
    assert max(abs(made.losses - golden.losses)) > oracle.TOLERANCES["losses"] or any(
        np.abs(step[n] - w).max() > oracle.TOLERANCES["steps"] * np.abs(w).max()
        for step, wanted in zip(made.steps, golden.steps, strict=True)
        for n, w in wanted.items()
        if n in step
    )


def test_an_artifact_of_the_golden_weights_reads_back(golden, tmp_path):
    """So that other implementations can be fed through the artifact as well."""
    rounded = train_gpt.quantised(
        {n: torch.from_numpy(w) for n, w in golden.weights.items()}, oracle.K, golden.cfg, {}
    )
    path = tmp_path / "a.ptz"
    path.write_bytes(train_gpt.encode_artifact(rounded, oracle.K, golden.cfg, False, "ans", b""))
    model = train_gpt.build_model(read_artifact(path))
    assert all(torch.equal(p, rounded[n].weight()) for n, p in model.named_parameters())
