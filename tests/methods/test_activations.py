"""Products of int8 codes: exact, as a plain reference has them, and better with smoothing."""

import numpy as np
import pytest
import torch

from fairway.methods import activations
from fairway.methods.activations import Int8Activations, Int8Linear, largest_inputs, product
from fairway.methods.integers import rounded_matrix
from fairway.methods.method import Calibration
from fairway.methods.parcel import pack, unpack
from fairway.methods.stored import InputStep
from fairway.methods.torchao_int8 import TorchaoInt8
from tests.models import some_tokens, trained


def calibration(model, seed: int = 0) -> Calibration:
    rng = np.random.default_rng(seed)
    return Calibration(model, [rng.integers(0, 97, 5000).astype("<u2")])


def outlier_layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs with one large column, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 32, generator=generator)
    x[:, 3] *= 60
    return x, torch.randn(24, 32, generator=generator)


def layer_of(stored) -> Int8Linear:
    return Int8Linear(torch.nn.Parameter(stored.weight()), stored)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("columns", [7, 1041, 3000])
def test_products_of_codes_are_exact(exact, columns, monkeypatch):
    if exact and not activations.has_exact_products():
        pytest.skip("this processor sums products of int8 in 16 bits")
    monkeypatch.setattr(activations, "has_exact_products", lambda: exact)
    a, b = (torch.full((n, columns), 127, dtype=torch.int8) for n in (3, 5))
    a[1] = torch.arange(columns) % 255 - 127
    wanted = (a.long() @ b.long().T).float()
    assert torch.equal(product(a, b), wanted)


def test_a_layer_computes_what_a_plain_reference_does():
    x, weight = outlier_layer()
    stored = rounded_matrix(weight, 8, 0, 0.0)
    for step in (None, torch.tensor([0.05])):
        layer = layer_of(stored if step is None else InputStep(stored, step))
        own = x.double().abs().amax(dim=1, keepdim=True) / 127 if step is None else step.double()
        rounded = (x / own.float()).round().clamp(-127, 127).double() * own
        wanted = rounded @ stored.weight().double().T
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-4)
    assert layer_of(stored)(torch.zeros(2, 3, 32)).abs().max() == 0


def test_smoothing_helps_where_one_column_decides_the_step():
    x, weight = outlier_layer()
    errors = []
    for factor in (None, activations.smoothing(weight, x.abs().amax(dim=0))):
        inputs = x if factor is None else x * factor
        codes = rounded_matrix(weight if factor is None else weight / factor, 8, 0, 0.0)
        codes = codes if factor is None else activations.replace(codes, scales=factor)
        layer = layer_of(InputStep(codes, (inputs.abs().max() / 127).reshape(1)))
        errors.append((layer(x) - x @ weight.T).norm())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("smooth", [False, True])
def test_the_file_holds_the_steps_that_the_calibration_gave(smooth):
    model = trained(bigram_vocab_size=32, bigram_dim=8).eval()
    text = calibration(model)
    made = Int8Activations("training", smooth).apply(model, text)
    read = unpack(pack(made))
    assert [source for source, _ in text.given] == ["training"]
    largest = largest_inputs(model, torch.from_numpy(text.given[0][1].astype(np.int64)))
    steps = {n: s for n, s in read.stored.items() if isinstance(s, InputStep)}
    assert steps.keys() == largest.keys() and "bigram.proj.weight" in steps
    for name, stored in steps.items():
        wanted = (largest[name] * (stored.base.scales if smooth else 1.0)).max() / 127
        assert stored.step.item() == pytest.approx(wanted.item(), rel=1e-6)
    # A weight alone is not what such a file computes with.
    tokens = some_tokens()
    assert not torch.equal(read.logits(tokens), made.logits(tokens))
    assert torch.equal(activations.on_int8(read).logits(tokens), made.logits(tokens))


def test_a_step_for_each_token_errs_less_than_one_from_random_text():
    model, tokens = trained().eval(), some_tokens(8)
    wanted = model.logits(tokens)
    errors = [
        (Int8Activations(source).apply(model, calibration(model)).logits(tokens) - wanted).norm()
        for source in ("", "random")
    ]
    assert 0 < errors[0] < errors[1]


def test_torchao_computes_as_our_own_int8_does(tmp_path):
    pytest.importorskip("torchao", reason="pip install -r requirements-methods.txt")
    model, tokens = trained(num_layers=1).eval(), some_tokens()
    method = TorchaoInt8()
    made = method.apply(model, None)
    method.ship(made, tmp_path)
    own, wanted = Int8Activations().apply(model, None).logits(tokens), model.logits(tokens)
    assert torch.equal(method.load(tmp_path).logits(tokens), made.logits(tokens))
    # Both round, at slightly other steps: they are as near to each other as to the model.
    apart, rounding = (made.logits(tokens) - own).norm(), (own - wanted).norm()
    assert 0 < apart < 1.5 * rounding
