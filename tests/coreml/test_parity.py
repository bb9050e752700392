"""The report that compares shards with PyTorch: right ones pass, and each way of being wrong is told."""

import dataclasses

import numpy as np
import pytest
import torch
from rich.console import Console

from fairway.coreml import parity
from fairway.coreml.engine import Chain, interpreted
from fairway.coreml.export import QUANTISATIONS, Choice
from fairway.coreml.graph import host_tables
from fairway.coreml.parity import (
    Reference,
    check,
    compare,
    failures,
    named,
    shortened,
    table_of,
    variants,
)
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import UserError

apple = pytest.mark.apple
GOOD = dict(gap=1e-6, cosine=1.0)
ROW = dict(ways={"T=1": GOOD, "T=4": GOOD, "mixed": GOOD}, long=GOOD, slot=0.0, bpb=1.5)


@pytest.fixture
def text(exported, corpus):
    whole = load_text(EvalConfig(data_path=str(corpus.folder)), exported.source.artifact)
    return shortened(whole, 150)


def test_every_shape_chunking_and_quantisation_is_a_variant():
    found = list(variants(Choice(), 4))
    names = [named(choice) for choice in found]
    assert len(set(names)) == len(found) == 2 * (4 + 3) + len(QUANTISATIONS) - 1
    for precision in ("fp32", "fp16"):
        for kind in (
            "fixed, 1 shard",
            "range, 1 shard",
            "enumerated, 1 shard",
            "multifunction, 1 shard",
            "fixed, 2 shards",
            "fixed, 4 shards",
            "fixed, a layer a shard",
        ):
            assert f"{precision}, {kind}" in names
    assert all(f"fp16, fixed, 1 shard, {q}" in names for q in QUANTISATIONS if q != "none")
    assert not any(choice.chunks == 4 for choice in variants(Choice(), 3)), (
        "a model of three layers has no four shards"
    )


@pytest.mark.parametrize(
    "changed, choice, std, message",
    [
        (dict(), dict(precision="fp32"), 1, None),
        (
            dict(long=dict(gap=2e-4, cosine=1)),
            dict(precision="fp32"),
            1,
            "largest difference 2.00e-04, not below 0.0001",
        ),
        (dict(slot=1e-5), dict(precision="fp32"), 1, "T=1 and slot 0 differ by 1.00e-05"),
        (dict(slot=1e-5), dict(precision="fp16"), 1, None),
        (
            dict(long=dict(gap=0.03, cosine=1)),
            dict(precision="fp16"),
            1,
            "largest difference 3.00e-02, not below 0.02",
        ),
        (dict(long=dict(gap=0.03, cosine=1)), dict(precision="fp16"), 5, None),
        (
            dict(long=dict(gap=0.001, cosine=1)),
            dict(precision="fp16"),
            0.01,
            "largest difference 1.00e-01",
        ),
        (
            dict(long=dict(gap=1e-5, cosine=1)),
            dict(precision="fp32"),
            0.01,
            "largest difference 1.00e-03",
        ),
        (
            dict(long=dict(gap=float("nan"), cosine=1)),
            dict(precision="fp16"),
            1,
            "largest difference nan",
        ),
        (dict(long=dict(gap=9.0, cosine=0.9)), dict(quantise="palette2"), 1, None),
        (
            dict(long=dict(gap=9.0, cosine=float("nan"))),
            dict(quantise="palette2"),
            1,
            "cosine nan, not above 0.5",
        ),
        (
            dict(long=dict(gap=9.0, cosine=0.2)),
            dict(quantise="int4"),
            1,
            "cosine 0.200, not above 0.5",
        ),
        (dict(bpb=1.52), dict(quantise="int8"), 1, "int8 changes BPB by +0.0200, not below 0.01"),
        (dict(bpb=1.48), dict(quantise="artifact"), 1, "artifact changes BPB by -0.0200"),
    ],
)
def test_what_is_asked_of_a_variant(changed, choice, std, message):
    found = failures(ROW | changed, Choice(**choice), Reference(np.zeros(1), 1.5, std))
    assert found == [] if message is None else len(found) == 1 and found[0].startswith(message)


@apple
@pytest.mark.parametrize(
    "choice",
    [
        dict(shapes="range", precision="fp32"),
        dict(shapes="fixed", precision="fp32"),
        dict(shapes="multifunction", precision="fp16"),
    ],
)
def test_shards_of_the_model_pass(exported, text, choice):
    reference, choice = Reference.of(exported.source, text, 32), Choice(**choice)
    row = compare(
        Chain(exported(**dataclasses.asdict(choice)), interpreted()),
        reference,
        text,
        lambda n: None,
    )
    assert failures(row, choice, reference) == [] and all(
        way["cosine"] > 0.9999 for way in row["ways"].values()
    )
    assert row["bpb"] == pytest.approx(
        reference.bpb, abs=1e-3 if choice.precision == "fp16" else 1e-6
    )
    assert choice.precision == "fp16" or row["slot"] == 0


@apple
def test_bits_are_those_of_pytorch_on_the_whole_text(exported, text):
    from fairway.scoring.memory import Memory

    with torch.no_grad():
        tokens = torch.from_numpy(text.tokens.astype(np.int64))[None]
        logp = Memory(exported.source.model, 32).logits(tokens[:, :-1])[0].double().log_softmax(-1)
    nats = -logp.gather(1, tokens[0, 1:, None]).sum().item()
    assert Reference.of(exported.source, text, 32).bpb == pytest.approx(
        nats / np.log(2) / text.sizes.sum(), rel=1e-6
    )


@apple
def test_a_model_that_differs_a_little_is_caught(exported, text):
    source = exported.source
    model = type(source.model)(source.model.cfg).eval()
    model.load_state_dict(source.model.state_dict())
    with torch.no_grad():
        model.blocks[1].attn.q_gain[0] += 0.01
    other = dataclasses.replace(source, model=model, tables=host_tables(model))
    choice = Choice(shapes="fixed", precision="fp32")
    reference = Reference.of(other, text, 32)
    row = compare(
        Chain(exported(shapes="fixed", precision="fp32"), interpreted()),
        reference,
        text,
        lambda n: None,
    )
    assert "largest difference" in failures(row, choice, reference)[0]


@apple
@pytest.mark.parametrize(
    "shapes, wrong", [("range", 2), ("range", 3), ("enumerated", 2), ("multifunction", 1)]
)
def test_every_size_that_shards_take_is_called(exported, text, shapes, wrong):
    """A runner that gives zeros for calls of one length is caught, whichever length it is."""
    choice, runner = Choice(shapes=shapes, precision="fp32"), interpreted()

    def faulty(folder, shard, function):
        call = runner(folder, shard, function)

        def zeros_then(given):
            right = next(iter(given.values())).shape[-1] != wrong
            return {n: v * right for n, v in call(given).items()}

        return zeros_then

    reference = Reference.of(exported.source, text, 32)
    row = compare(
        Chain(exported(shapes=shapes, precision="fp32"), faulty), reference, text, lambda n: None
    )
    assert failures(row, choice, reference)


@apple
def test_a_check_exports_compares_and_tells(exported, text, tmp_path):
    told = []
    found = check(
        exported.source,
        [Choice(shapes="fixed", precision="fp32")],
        text,
        exported.text,
        tmp_path / "s",
        told=told.append,
        runner=interpreted(),
    )
    row = found["variants"][0]
    assert (
        found["passed"]
        and row["bytes"] > 10_000
        and row["milliseconds"] > 0
        and sum(told) == found["tokens"] == 150
    )
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table_of(found))
    shown = console.export_text()
    assert "fp32, fixed, 1 shard" in shown and " ok" in shown


@apple
def test_a_text_that_is_too_short_is_told(exported, text, tmp_path):
    with pytest.raises(UserError, match="holds 41 tokens; a comparison takes 65"):
        check(exported.source, [Choice()], shortened(text, 40), exported.text, tmp_path / "s")
    assert parity.STREAM == 64
