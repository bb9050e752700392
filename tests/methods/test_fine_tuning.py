"""Fine-tuning at few bits, pruned, or with a teacher, against the same rows without training."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fairway.methods.integers import Integers
from fairway.methods.method import Calibration
from fairway.methods.pruning import ROUNDING, Pruned, PrunedTuned
from fairway.methods.training import (
    TEMPERATURE,
    Ternary,
    Tuned,
    fine_tuned,
    taught_by,
    ternary_matrix,
)
from tests.models import some_tokens, trained
from train_gpt import GPT, LEAST_K, PLAIN_BITS, Buffer, tensor_bits

# Each token but the last follows the one before it, so that a few steps learn something.
TEXT = np.tile(np.arange(2, 90, dtype=np.uint16), 60)


def calibration(model: GPT) -> Calibration:
    return Calibration(model, [TEXT], seed=1)


@torch.no_grad()
def loss(model: GPT) -> float:
    tokens = torch.from_numpy(TEXT[: 16 * 17 + 1].astype(np.int64))
    return model(tokens[:-1].view(17, 16), tokens[1:].view(17, 16)).mean().item()


@pytest.mark.parametrize(
    "method, untrained",
    [
        (Tuned(3, steps=20), Integers(3, k=LEAST_K[3])),
        (Tuned(2, steps=20), Integers(2, k=LEAST_K[2])),
        (PrunedTuned(0.5, False, steps=20), Pruned(0.5)),
        (Ternary(8, steps=20), Integers(2, k=LEAST_K[2])),
    ],
    ids=["qat3", "qat2", "pruned", "ternary"],
)
def test_training_beats_the_same_rounding_without_it(method, untrained):
    model = trained(smear_gate=True)
    given = calibration(model)
    assert loss(method.apply(model, given)) < loss(untrained.apply(model, given)) - 0.1
    assert {source for source, _ in given.given} == {"training"}


def test_more_steps_read_more_text_and_each_seed_its_own():
    model = trained()
    one, two = calibration(model), Calibration(model, [TEXT], seed=2)
    tuned = fine_tuned(model, one, 4, 3)
    fine_tuned(model, two, 4, 3)
    assert [len(rows) for _, rows in one.given] == [3 * model.cfg.train_batch_tokens // 16 + 1]
    assert not np.array_equal(one.given[0][1], two.given[0][1])
    assert tuned.cfg == model.cfg


def plain_ternary(weight: np.ndarray, columns: int) -> np.ndarray:
    out = np.zeros_like(weight)
    for r, row in enumerate(weight):
        width = math.ceil(len(row) / math.ceil(len(row) / columns))
        for start in range(0, len(row), width):
            part = row[start : start + width]
            step = torch.tensor(np.abs(part).mean(dtype=np.float64)).bfloat16().double().item()
            for i, value in enumerate(part):
                out[r, start + i] = step * ((value > step / 2) - float(value < -step / 2))
    return out


@given(seed=st.integers(0, 999), columns=st.sampled_from([3, 8, 64]))
def test_ternary_weights_are_those_of_a_plain_loop(seed, columns):
    weight = torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    stored = ternary_matrix(weight, columns)
    assert set(stored.codes.unique().tolist()) <= {-1, 0, 1}
    np.testing.assert_allclose(stored.weight(), plain_ternary(weight.numpy(), columns), rtol=5e-3)


def test_a_pass_sees_the_ternary_weights_that_are_shipped():
    model, method = trained(bigram_vocab_size=32, bigram_dim=8), Ternary(8)
    weights, seen = Buffer(model), Buffer(model)
    torch._foreach_copy_(weights.params, [p.data for p in model.parameters()])
    bits = [bits for _, bits, _ in weights.keys]
    torch._foreach_copy_(seen.banks, method.rounded(weights.banks, [None] * len(bits), bits))
    for (name, p), value in zip(model.named_parameters(), seen.params, strict=True):
        if tensor_bits(name, model.cfg) == PLAIN_BITS:
            assert torch.equal(value, p.half().float()), name
        else:
            assert torch.equal(value, ternary_matrix(p.detach(), 8).weight()), name


def test_dropped_weights_stay_zero_while_the_others_move():
    model = trained()
    tuned = PrunedTuned(0.6, True, steps=4).apply(model, calibration(model))
    kept, untuned = Pruned(0.6).kept(model), Pruned(0.6).apply(model, calibration(model))
    assert len(kept) == 18
    for name, mask in kept.items():
        codes = tuned.stored[name].codes
        assert (codes[mask == 0] == 0).all() and (codes[mask == 1] != 0).float().mean() > 0.8
        assert not torch.equal(tuned.stored[name].weight(), untuned.stored[name].weight())


# ---- Distillation --------------------------------------------------------------------------------
def test_the_loss_of_a_student_is_the_divergence_at_the_temperature():
    teacher, student, tokens = trained(), ROUNDING.apply(trained(), None), some_tokens()
    with torch.no_grad():
        found = taught_by(teacher)(student)(tokens, tokens)
        p, q = (F.softmax(m.logits(tokens).double() / TEMPERATURE, -1) for m in (teacher, student))
        itself = taught_by(teacher)(teacher)(tokens, tokens)
    assert torch.allclose(found.double(), 4 * (p * (p / q).log()).sum(-1), atol=1e-5)
    assert found.shape == tokens.shape and itself.abs().max() < 1e-5 < found.mean()


def test_distillation_brings_a_student_closer_to_its_teacher():
    model = trained()
    pruned = Pruned(0.5).apply(model, calibration(model))
    student = PrunedTuned(0.5, True, steps=20).apply(model, calibration(model))
    tokens = torch.from_numpy(TEXT[: 16 * 16].astype(np.int64)).view(16, 16)
    with torch.no_grad():
        before, after = (taught_by(model)(m)(tokens, tokens).mean() for m in (pruned, student))
    assert after < 0.8 * before
