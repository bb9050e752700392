"""Promises of every registered method; a new one inherits these tests by its registry line."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

from fairway.methods.groups import GROUPS
from fairway.methods.harness import SEEDS
from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.registry import METHODS as REGISTERED
from fairway.methods.registry import QUICK
from fairway.methods.subject import load_subject
from train_gpt import GPT, read_shard

BASELINE = "fp32"
# The back half of torch.compile takes a minute or two, and decides nothing here.
METHODS = REGISTERED | {"compile": replace(REGISTERED["compile"], backend="eager")}


def one_of_each_kind(names) -> list:
    """Return names for parametrize: the first row of each class of methods, the others slow."""
    names, kinds = list(names), {}
    for name in names:
        kinds.setdefault(type(METHODS[name]), name)
    fast = set(kinds.values())
    return [pytest.param(n, marks=() if n in fast else pytest.mark.slow) for n in names]


def shortened(method: Method) -> Method:
    """Return a method that trains for 5 steps only: what is tested here holds for any number."""
    return replace(method, steps=5) if "steps" in method.settings else method


@pytest.fixture(scope="module")
def made(float_model, subject_file, corpus):
    """Return `made(name)`: the calibration and the model that a method makes, made once."""
    shards = [np.asarray(read_shard(p)) for p in sorted(corpus.folder.glob("*_train_*.bin"))]
    done: dict = {}

    def make(name: str, again: bool = False):
        method = shortened(METHODS[name])
        if missing := [n for n in method.needs if importlib.util.find_spec(n) is None]:
            pytest.skip(f"{missing[0]} is not installed")
        if again or name not in done:
            subject = load_subject(subject_file)
            calibration = Calibration(
                subject.model, shards, 1, subject.checkpoint, corpus.tokenizer
            )
            try:
                done[name] = calibration, method.apply(subject.model, calibration), subject.model
            except NotHere as e:
                pytest.skip(str(e))
        return done[name]

    return make


def state_of(model) -> dict[str, torch.Tensor]:
    # A library's own type of weight becomes plain numbers.
    return {name: p.detach().dequantize().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_documented_and_has_a_heading(name):
    method = METHODS[name]
    assert name == name.lower() and " " not in name and method.group in GROUPS
    sentences = " ".join((type(method).__doc__ or "").split())
    assert len(sentences) > 100 and sentences.endswith(".") and "(" != sentences[-1]
    assert bool(method.needs) == bool(method.requirements)
    assert method.same_score_as in ("", *METHODS)


@pytest.mark.parametrize("name", one_of_each_kind(METHODS))
def test_it_leaves_its_input_alone_and_does_the_same_twice(name, made, float_model):
    _, first, given = made(name)
    before, after = state_of(float_model), state_of(given)
    assert all(torch.equal(before[n], after[n]) for n in before)
    _, second, _ = made(name, again=True)
    if isinstance(first, GPT):
        one, two = state_of(first), state_of(second)
        assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("name", one_of_each_kind(METHODS))
def test_what_it_ships_loads_and_computes_the_same(name, made, tmp_path):
    _, model, _ = made(name)
    METHODS[name].ship(model, tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) == METHODS[name].bytes(model) > 0
    loaded = METHODS[name].load(tmp_path)
    tokens = torch.randint(0, loaded.cfg.vocab_size, (2, 16), generator=torch.manual_seed(0))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), loaded.logits(tokens)
    assert ours.shape == (2, 16, loaded.cfg.vocab_size) and bool(theirs.isfinite().all())
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", one_of_each_kind(n for n in METHODS if METHODS[n].error_bound))
def test_no_weight_errs_by_more_than_its_bound(name, made, float_model):
    _, model, _ = made(name)
    for given, found in zip(float_model.parameters(), model.parameters(), strict=True):
        bound = METHODS[name].error_bound * given.abs().amax(dim=-1, keepdim=True)
        assert bool(((found - given).abs() <= bound + 1e-9).all())


@pytest.mark.parametrize("name", one_of_each_kind(METHODS))
def test_it_does_something(name, made, float_model, tmp_path):
    """It changes a weight or a logit, or it promises another method's score or runs otherwise."""
    _, model, _ = made(name)
    runs_otherwise = type(METHODS[name]).running is not Method.running
    if name == BASELINE or METHODS[name].same_score_as or runs_otherwise:
        return
    if isinstance(model, GPT) and model.cfg == float_model.cfg:
        before, after = state_of(float_model), state_of(model)
        tokens = torch.arange(16)[None]
        assert any(not torch.equal(before[n], after[n]) for n in before) or not torch.equal(
            float_model.logits(tokens), model.logits(tokens)
        )


def test_calibration_text_is_noted_and_never_that_of_another_seed(float_model, corpus):
    shards = [np.asarray(read_shard(p)) for p in sorted(corpus.folder.glob("*_train_*.bin"))]
    texts = {}
    for seed in SEEDS:
        calibration = Calibration(float_model, shards, seed)
        texts[seed] = calibration.training(2)
        assert texts[seed].shape == (2, float_model.cfg.train_seq_len)
        samples = calibration.rows("sampled", 2)
        assert bool((samples[:, 0] == 1).all()) and calibration.rows("random", 3).shape[0] == 3
        sources = [row["source"] for row in calibration.account()]
        assert sources == ["training", "own samples", "random"]
    assert not torch.equal(texts[0], texts[1])


def test_without_training_shards_a_calibration_says_what_to_set(float_model):
    with pytest.raises(Exception, match="--data"):
        Calibration(float_model, []).training(1)


def test_quick_is_a_part_of_all_with_the_baseline():
    assert {BASELINE, *QUICK} <= set(METHODS)
