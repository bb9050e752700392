"""Averages of a real, short run, read from its checkpoint."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt
from fairway.methods.averaging import Averaged
from fairway.methods.integers import Integers
from fairway.methods.method import Calibration, NotHere
from tests.models import trained
from train_gpt import LEAST_K, Runtime

STEPS, LATE = 8, (6, 8)  # SWA averages the weights after these steps
EMA_DECAY = 0.999


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished run with its weights after every step; its checkpoint lies in `out_dir`."""
    out = tmp_path_factory.mktemp("averages")
    model = trained(bigram_vocab_size=32, bigram_dim=8)
    model.cfg = cfg = replace(
        model.cfg,
        out_dir=str(out),
        iterations=STEPS,
        swa_start_frac=0.7,
        swa_every=2,
        ema_decay=EMA_DECAY,
    )
    log = type("Silent", (), {"run_id": "averages", "__call__": lambda *_, **__: None})()
    data = SimpleNamespace(fingerprint="tokens")
    tokens = [np.arange(2000) % 90]
    run = train_gpt.make_run(
        cfg, Runtime(0, 1, torch.device("cpu"), "cpu"), data, log, model, tokens
    )
    run.history = [[p.detach().clone() for p in run.params]]
    for step in range(STEPS):
        train_gpt.take_step(run, step / STEPS)
        run.averages.update([run.weights.flat], run.step, run.step / STEPS, cfg)
        run.history.append([p.detach().clone() for p in run.params])
    train_gpt.save_checkpoint(run)
    return run


def calibration(run, name: str = "checkpoint.pt") -> Calibration:
    return Calibration(run.model, [], 0, train_gpt.Path(run.cfg.out_dir, name))


def plain_average(run, kind: str) -> list[torch.Tensor]:
    if kind == "swa":
        return [torch.stack(ws).mean(0) for ws in zip(*(run.history[i] for i in LATE), strict=True)]
    average = [w.double() for w in run.history[1]]  # the first update starts from the weights
    kept = np.exp(-(1 - EMA_DECAY) * 7000 / STEPS)
    for weights in run.history[2:]:
        average = [kept * a + (1 - kept) * w for a, w in zip(average, weights, strict=True)]
    return average


@pytest.mark.parametrize("kind", ["swa", "ema"])
def test_averages_are_those_of_the_weights_after_each_step(run, kind):
    averaged = Averaged(kind).apply(run.model, calibration(run))
    for p, wanted in zip(averaged.parameters(), plain_average(run, kind), strict=True):
        assert torch.allclose(p, wanted.float(), atol=1e-5)
    rounded = Averaged(kind, 6).apply(run.model, calibration(run))
    again = Integers(6, k=LEAST_K[6]).apply(averaged, None)
    assert all(
        torch.equal(a, b) for a, b in zip(rounded.parameters(), again.parameters(), strict=True)
    )


def test_weights_that_the_run_kept_are_no_row_of_their_own(run):
    with pytest.raises(NotHere, match="kept its last weights; see the row fp32"):
        Averaged("last").apply(run.model, calibration(run))
    averaged = Averaged("swa").apply(run.model, calibration(run))
    given = Calibration(averaged, [], 0, calibration(run).checkpoint)
    with pytest.raises(NotHere, match="kept its swa weights"):
        Averaged("swa").apply(averaged, given)
    last = Averaged("last").apply(averaged, given)
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), run.params, strict=True))


def test_a_run_without_averages_or_another_run_is_refused_in_one_line(run):
    path = calibration(run).checkpoint
    with pytest.raises(NotHere, match=r"no checkpoint\.pt lies next to the model"):
        Averaged("swa").apply(run.model, Calibration(run.model, []))
    with pytest.raises(NotHere, match="another run"):
        other = trained(bigram_vocab_size=32, bigram_dim=8, model_dim=64)
        Averaged("swa").apply(other, Calibration(other, [], 0, path))
    saved = torch.load(path, weights_only=True)
    saved["averages"] = vars(train_gpt.Averages())
    torch.save(saved, path.with_name("plain.pt"))
    for kind, setting in (("swa", "SWA_START_FRAC"), ("ema", "EMA_DECAY")):
        with pytest.raises(NotHere, match=f"kept no {kind.upper()}; train with {setting}"):
            Averaged(kind).apply(run.model, calibration(run, "plain.pt"))
