"""A small model with its shards, and cells that are run in this process."""

from dataclasses import replace
from pathlib import Path

import artifacts
import numpy as np
import pytest
import torch

from fairway.artifact_reader import read_artifact
from fairway.methods import cell, registry
from fairway.methods.cell import Spec
from fairway.methods.method import Calibration
from train_gpt import build_model, read_shard

VAL_TOKENS = 300


@pytest.fixture(scope="session")
def subject_file(tmp_path_factory, corpus) -> Path:
    """Return an artifact of a small random model, with its float weights next to it."""
    folder = tmp_path_factory.mktemp("subject")
    path = artifacts.make_artifact(folder, corpus, bigram_vocab_size=16, bigram_dim=8)
    model = build_model(read_artifact(path))
    noise = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-3 * torch.randn(p.shape, generator=noise))
    torch.save(model.state_dict(), folder / "final_model.pt")
    return path


@pytest.fixture(scope="session")
def float_model(subject_file):
    from fairway.methods.subject import load_subject

    return load_subject(subject_file).model


@pytest.fixture
def calibration(float_model, corpus) -> Calibration:
    shards = [read_shard(p) for p in sorted(corpus.folder.glob("*_train_*.bin"))]
    return Calibration(float_model, [np.asarray(s) for s in shards])


@pytest.fixture(scope="module")
def run_here(subject_file, corpus, tmp_path_factory):
    """Return `run(name, method)`: the result of a cell of this method, run in this process.

    The files that it ships lie in `run.files`.
    """
    out = tmp_path_factory.mktemp("cells")
    spec = Spec(str(subject_file), "", 0, str(corpus.folder), str(out / "raw/m"), VAL_TOKENS)

    def run(name: str, method=None, seed: int = 0) -> dict:
        folder = run.files / name
        folder.mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cell.measure, "SAMPLES", 3)
            patch.setattr(cell.measure, "NEW_TOKENS", 4)
            patch.setitem(registry.METHODS, name, method or registry.METHODS.get(name))
            return cell.attempt(replace(spec, method=name, seed=seed), folder)

    run.files = out / "files" / "m"
    return run
