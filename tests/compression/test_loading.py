"""Loading an artifact: one thread for a small model, and errors in one line."""

from pathlib import Path

import pytest
import torch
from artifacts import TINY, encoded, trained, write

from fairway.compression import loading
from fairway.compression.loading import load
from train_gpt import Config, UserError, best_device


@pytest.fixture(scope="module")
def path(corpus, tmp_path_factory) -> Path:
    model = trained(Config(**TINY | dict(vocab_size=corpus.vocab_size)))
    return write(
        tmp_path_factory.mktemp("loaded") / "a.ptz",
        encoded(model, tokenizer=(corpus.folder / "tokenizer.model").read_bytes()),
    )


@pytest.mark.parametrize("limit, threads", [(1 << 22, 1), (100, 3)])
def test_a_small_model_runs_on_one_thread(path, monkeypatch, limit, threads):
    monkeypatch.setattr(loading, "SMALL_MODEL", limit)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        artifact, model, speller, runtime = load(path, device="cpu")
        assert (
            torch.get_num_threads() == threads
            and runtime.device.type == "cpu"
            and not model.training
        )
        assert (
            model.cfg == artifact.config
            and speller.data(speller.tokens(b"of the people")) == b"of the people"
        )
    finally:
        torch.set_num_threads(before)


def test_a_device_that_does_not_exist_is_refused(path):
    other = "mps" if best_device() != "mps" else "cuda"
    with pytest.raises(
        UserError,
        match=f"--device is {other}, but PyTorch sees only {best_device()} here; leave it",
    ):
        load(path, device=other)


def test_other_files_are_no_artifacts(tmp_path):
    with pytest.raises(UserError, match="none.ptz: cannot be read"):
        load(tmp_path / "none.ptz")
    with pytest.raises(UserError, match="not a Fairway artifact"):
        load(write(tmp_path / "text.ptz", b"text"))
