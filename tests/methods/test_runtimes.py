"""Other runtimes give the model's own logits, for sequences of any number and length."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import zstandard

from fairway.methods import measure
from fairway.methods.parcel import ParcelError
from fairway.methods.registry import METHODS
from fairway.methods.runtimes import ONNX_FILE
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from tests.models import trained
from train_gpt import Runtime

SHAPES = ((1, 11), (3, 16), (1, 9))
FEATURES = dict(bigram_vocab_size=32, bigram_dim=8, smear_gate=True, num_layers=1)


def logp(model, tokens: np.ndarray) -> np.ndarray:
    """Score as a cell does: in sliding windows, the last ones padded."""
    columns = columns_in_memory(len(tokens) - 1, {"logp": "f8"})
    Neural(model, EvalConfig(), Runtime(0, 1, torch.device("cpu"), "cpu")).fill(tokens, columns)
    return columns["logp"]


def tokens_of(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def test_compiled_windows_have_the_models_logits(tmp_path):
    """The compiler's front half, which decides about shapes; its back half takes two minutes."""
    method, model = replace(METHODS["compile"], backend="eager"), trained(**FEATURES).eval()
    with method.running():
        method.ship(method.apply(model, None), tmp_path)
        read = method.load(tmp_path)
        torch._dynamo.utils.counters.clear()
        for shape in SHAPES:
            tokens = tokens_of(shape)
            torch.testing.assert_close(read.logits(tokens), model.logits(tokens))
        text = tokens_of((40,)).numpy()
        np.testing.assert_allclose(logp(read, text), logp(model, text), atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["onnx", "onnx-int8"])
def test_onnx_files_run_at_every_shape(name, tmp_path):
    for package in METHODS[name].needs:
        pytest.importorskip(package, reason="pip install -r requirements-methods.txt")
    model, method = trained(**FEATURES).eval(), METHODS[name]
    made = method.apply(model, None)
    method.ship(made, tmp_path)
    read, path = method.load(tmp_path), tmp_path / ONNX_FILE
    assert method.bytes(made) == path.stat().st_size
    assert b".py" not in zstandard.ZstdDecompressor().decompress(made.packed[32:])
    assert read.cfg.train_seq_len == 16 and read.cfg.vocab_size == 97
    for shape in SHAPES:
        tokens = tokens_of(shape)
        apart = (read.logits(tokens) - model.logits(tokens)).abs().max().item()
        assert apart < 1e-4 if name == "onnx" else 1e-4 < apart < 10
        assert torch.equal(read.logits(tokens), made.logits(tokens))
    text = tokens_of((40,)).numpy()
    if name == "onnx":
        np.testing.assert_allclose(logp(read, text), logp(model, text), atol=1e-4)
    assert measure.generation(read, [[1, 5]])["engine"] == "recomputed"
    damaged = bytearray(path.read_bytes())
    damaged[99] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ParcelError, match="damaged"):
        method.load(tmp_path)
