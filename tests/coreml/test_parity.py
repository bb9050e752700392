"""The report that compares shards with PyTorch: right shards pass, and each fault is reported."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from rich.console import Console

from fairway.coreml import export as export_module
from fairway.coreml import parity
from fairway.coreml.engine import ShardChain, interpreter_runner
from fairway.coreml.export import QUANTISATIONS, ExportOptions
from fairway.coreml.graph import host_tables
from fairway.coreml.parity import (
    TorchReference,
    check_variants,
    compare_chain,
    export_variants,
    parity_table,
    shorten_text,
    variant_failures,
    variant_name,
)
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import UserError

apple = pytest.mark.apple
GOOD = dict(gap=1e-6, cosine=1.0)
ROW = dict(ways={"T=1": GOOD, "T=4": GOOD, "mixed": GOOD}, long=GOOD, slot=0.0, bpb=1.5)


@pytest.fixture(scope="module")
def text(exported, corpus):
    text = load_text(EvalConfig(data_path=str(corpus.folder)), exported.source.artifact)
    return shorten_text(text, 150)


@pytest.fixture(scope="module")
def reference(exported, text) -> TorchReference:
    """Return the results of PyTorch for the exported model on `text`."""
    return TorchReference.compute(exported.source, text, 32)


def test_variants_cover_every_shape_chunking_and_quantisation():
    found = list(export_variants(ExportOptions(), 4))
    names = [variant_name(options) for options in found]
    assert len(set(names)) == len(found) == 2 * (4 + 4) + 5 + len(QUANTISATIONS) - 1
    for precision in ("fp32", "fp16"):
        for kind in (
            "fixed, 1 shard",
            "range, 1 shard",
            "enumerated, 1 shard",
            "multifunction, 1 shard",
            "fixed, 2 shards",
            "fixed, 3 shards",
            "fixed, 4 shards",
            "fixed, a layer a shard",
        ):
            assert f"{precision}, {kind}" in names
    assert all(f"fp16, fixed, 1 shard, {q}" in names for q in QUANTISATIONS if q != "none")
    for kind in ("1 shard, 1 state", "1 shard, 2 states", "2 shards, 1 state", "4 shards, 1 state"):
        assert f"fp16, fixed, {kind}" in names
    assert not any(options.chunks == 4 for options in export_variants(ExportOptions(), 3)), (
        "a model of three layers was cut into four shards"
    )


@pytest.mark.parametrize(
    "changed, options, std, message",
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
def test_limits_of_a_variant(changed, options, std, message):
    found = variant_failures(
        ROW | changed, ExportOptions(**options), TorchReference(np.zeros(1), 1.5, std)
    )
    assert found == [] if message is None else len(found) == 1 and found[0].startswith(message)


@apple
@pytest.mark.parametrize(
    "options",
    [
        dict(shapes="range", precision="fp32"),
        dict(shapes="fixed", precision="fp32"),
        dict(shapes="multifunction", precision="fp16"),
    ],
)
def test_exported_shards_pass(exported, text, reference, options):
    options = ExportOptions(**options)
    row = compare_chain(
        ShardChain(exported(**dataclasses.asdict(options)), interpreter_runner()),
        reference,
        text,
        lambda n: None,
    )
    assert variant_failures(row, options, reference) == [] and all(
        way["cosine"] > 0.9999 for way in row["ways"].values()
    )
    assert row["bpb"] == pytest.approx(
        reference.bpb, abs=1e-3 if options.precision == "fp16" else 1e-6
    )
    assert options.precision == "fp16" or row["slot"] == 0


@apple
def test_bits_equal_those_of_pytorch(exported, text, reference):
    from fairway.scoring.memory import Memory

    with torch.no_grad():
        tokens = torch.from_numpy(text.tokens.astype(np.int64))[None]
        logp = Memory(exported.source.model, 32).logits(tokens[:, :-1])[0].double().log_softmax(-1)
    nats = -logp.gather(1, tokens[0, 1:, None]).sum().item()
    assert reference.bpb == pytest.approx(nats / np.log(2) / text.sizes.sum(), rel=1e-6)


@apple
def test_a_slightly_different_model_fails(exported, text):
    source = exported.source
    model = type(source.model)(source.model.cfg).eval()
    model.load_state_dict(source.model.state_dict())
    with torch.no_grad():
        model.blocks[1].attn.q_gain[0] += 0.01
    other = dataclasses.replace(source, model=model, tables=host_tables(model))
    options = ExportOptions(shapes="fixed", precision="fp32")
    reference = TorchReference.compute(other, text, 32)
    row = compare_chain(
        ShardChain(exported(shapes="fixed", precision="fp32"), interpreter_runner()),
        reference,
        text,
        lambda n: None,
    )
    assert "largest difference" in variant_failures(row, options, reference)[0]


@apple
@pytest.mark.parametrize(
    "shapes, wrong", [("range", 2), ("range", 3), ("enumerated", 2), ("multifunction", 1)]
)
def test_every_call_size_is_checked(exported, text, reference, shapes, wrong):
    """A runner that returns zeros for calls of one length fails, whichever length it is."""
    options, runner = ExportOptions(shapes=shapes, precision="fp32"), interpreter_runner()

    def faulty(folder, shard, function):
        call = runner(folder, shard, function)

        def zeros_if_wrong(inputs):
            right = next(iter(inputs.values())).shape[-1] != wrong
            return {n: v * right for n, v in call(inputs).items()}

        return zeros_if_wrong

    row = compare_chain(
        ShardChain(exported(shapes=shapes, precision="fp32"), faulty),
        reference,
        text,
        lambda n: None,
    )
    assert variant_failures(row, options, reference)


@apple
def test_a_check_exports_compares_and_reports(exported, text, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export_module, "save_shard", exported.saving(shapes="fixed", precision="fp32")
    )
    progress = []
    found = check_variants(
        exported.source,
        [ExportOptions(shapes="fixed", precision="fp32")],
        text,
        exported.text,
        tmp_path / "s",
        on_progress=progress.append,
        runner=interpreter_runner(),
    )
    row = found["variants"][0]
    assert (
        found["passed"]
        and row["bytes"] > 10_000
        and row["operations"] > 50
        and row["call_bytes"] > 1000
        and row["milliseconds"] > 0
        and sum(progress) == found["tokens"] == 150
    )
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(parity_table(found))
    printed = console.export_text()
    assert "fp32, fixed, 1 shard" in printed and " ok" in printed


@apple
def test_a_text_that_is_too_short_is_refused(exported, text, tmp_path):
    with pytest.raises(UserError, match="holds 41 tokens; a comparison needs 65"):
        check_variants(
            exported.source,
            [ExportOptions()],
            shorten_text(text, 40),
            exported.text,
            tmp_path / "s",
        )
    assert parity.STREAM == 64
