"""The verb export-coreml: one line for a mistake, and an exit code that a script can trust."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from fairway.cli import main
from fairway.coreml import export, parity
from fairway.coreml.export import QUANTISATIONS, ExportOptions
from fairway.coreml.layout import SHAPES
from fairway.coreml.manifest import DTYPES
from fairway.shards import write_shard
from fairway.verbs import export_coreml
from fairway.verbs.export_coreml import EXPORT_OPTIONS

apple = pytest.mark.apple


@pytest.fixture
def run(exported, corpus, tmp_path, monkeypatch, capsys):
    """Return `run(options)`: exit code, lines of standard output, lines of standard error."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported.source.path, "model.ptz")

    def call(options: str) -> tuple[int, list[str], list[str]]:
        code = main(
            ["export-coreml", "--artifact=model.ptz", f"--data={corpus.folder}", *options.split()]
        )
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return call


@apple
def test_an_export_prints_what_it_wrote_and_no_bar_in_a_file(run):
    code, out, err = run("--shapes fixed --chunks 2 --vocab-shards 2 --quantise int8")
    assert (code, err) == (0, []) and out[0].startswith("ranges: pre-activation ")
    assert out[1].startswith(
        "exported:coreml shards:4 (layers0, layers1, head0, head1) functions:main context:32 "
        "precision:fp16 quantise:int8 bytes:"
    )
    assert json.loads(Path("coreml/manifest.json").read_text())["quantise"] == "int8"


@apple
def test_a_check_of_one_variant_keeps_it_and_writes_json(run):
    code, out, err = run("--check --shapes range --precision fp32 --out kept --json report.json")
    assert (code, err) == (0, []) and out[-1] == "parity:passed variants:1"
    assert any("fp32, range, 1 shard" in line for line in out)
    report = json.loads(Path("report.json").read_text())
    assert report["passed"] and report["variants"][0]["ways"]["T=1"]["gap"] < 1e-4
    assert json.loads(Path("kept/manifest.json").read_text())["shapes"] == "range"


@apple
def test_a_variant_that_fails_is_reported_and_not_kept(run, exported, monkeypatch):
    shutil.copytree(exported(shapes="fixed"), "kept")
    before = Path("kept/manifest.json").read_bytes()
    monkeypatch.setitem(parity.LIMITS, "fp32", 1e-12)
    monkeypatch.setattr(export, "save_shard", exported.saving(shapes="fixed", precision="fp32"))
    code, out, _ = run("--check --shapes fixed --precision fp32 --out kept")
    assert code == 1 and out[-1] == "parity:FAILED variants:1"
    assert any(line.startswith("FAIL: fp32, fixed, 1 shard: largest difference ") for line in out)
    assert Path("kept/manifest.json").read_bytes() == before


@apple
@pytest.mark.parametrize(
    "options, code, message",
    [
        ("--shapes odd", 2, "--shapes is 'odd'; take one of fixed"),
        ("--tokens 9", 2, "--tokens is 9; it must be 1 to 4"),
        ("--tokens x", 2, "invalid int value: 'x'; see fairway export-coreml --help"),
        ("--chunk 2", 2, "unknown option --chunk; did you mean --chunks"),
        ("--what", 2, "unknown option --what"),
        ("--check --audit", 2, "--check and --audit are both given; leave one out"),
        ("--check --json .", 2, "--json . cannot be written there"),
        ("--check --out x", 2, "--out does nothing with a --check of all variants"),
        ("--json x", 2, "--json goes with --check, --audit or --bench"),
        ("--audit --tokens 2", 2, "--audit reads an earlier export"),
        ("--chunks 7", 1, "--chunks is 7, but the model has 2 layers"),
        ("--artifact nothing.ptz", 1, "nothing.ptz: cannot be read"),
        ("--data .", 1, "no training shards"),
        ("--out .", 1, "--out .* is where you are"),
        ("--out model.ptz", 1, "is no export of ours"),
    ],
)
def test_mistakes_are_one_line(run, options, code, message):
    found, out, err = run(options)
    assert (found, out, len(err)) == (code, [], 1)
    assert err[0].startswith("fairway export-coreml: error: ") and re.search(message, err[0])


@apple
def test_too_little_training_text_is_refused(run, tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", np.ones(255, "<u2"))
    err = run(f"--data {tmp_path}")[2]
    assert "holds 255 tokens; activations are measured on at least 256" in err[-1]


@apple
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs them")
def test_without_a_mac_an_audit_is_refused(run):
    code, out, err = run("--audit")
    assert (code, out, len(err)) == (1, [], 1) and err[0].startswith(
        "fairway export-coreml: error: --audit needs CoreML on a Mac, and this machine runs Linux"
    )


@apple
@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac runs CoreML")
def test_without_a_mac_the_interpreter_counts_calls_and_guesses(run, exported, monkeypatch):
    monkeypatch.setattr(export_coreml, "PROMPT_LENGTHS", (1, 40))
    monkeypatch.setattr(export_coreml, "ROUNDS", 1)
    code, out, err = run(f"--bench --out {exported()} --json report.json")
    report = json.loads(Path("report.json").read_text())
    assert (code, err) == (0, []) and report["runtime"] == "interpreter"
    assert out[0] == "runtime:interpreter tokens a call: 4" and len(out) == 1 + 4
    rows = {(row["prompt"], row["draft"]): row for row in report["rows"]}
    assert rows.keys() == {(1, "none"), (1, "ngram"), (40, "none"), (40, "ngram")}
    for (_, draft), row in rows.items():
        assert row["tokens_a_second"] > 0 and (row["acceptance"] is None) == (draft == "none")
        assert row["calls_a_token"] == 1 if draft == "none" else 0.25 <= row["calls_a_token"] <= 1


@apple
@pytest.mark.skipif(sys.platform != "darwin", reason="needs a Mac")
@pytest.mark.parametrize("option", ["--audit", "--bench"])
def test_a_mac_audits_and_times(run, option):
    assert run("--shapes multifunction")[0] == 0
    code, out, _ = run(f"{option} --json report.json")
    assert code == 0 and out


@apple
def test_an_interrupt_is_one_line(run, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "export_shards", interrupted)
    assert run("") == (130, [], ["fairway export-coreml: interrupted"])


@apple
def test_without_coremltools_one_line_names_the_requirements(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    code, _, err = run("")
    assert code == 1 and len(err) == 1
    assert err[0].startswith("fairway export-coreml: error: coremltools is not installed")
    assert "pip install -r requirements-apple.txt" in err[0]


def test_the_options_are_those_of_an_export():
    """The verb repeats names, types, defaults and choices, so that --help imports no torch."""
    fields = {f.name: f for f in dataclasses.fields(ExportOptions)}
    assert list(fields) == list(EXPORT_OPTIONS)
    for name, (kind, text) in EXPORT_OPTIONS.items():
        default = fields[name].default
        assert kind is type(default)
        assert f"(default: {default})" in text or not default
    for name, choices in (("precision", DTYPES), ("quantise", QUANTISATIONS), ("shapes", SHAPES)):
        assert all(re.search(rf"\b{choice}\b", EXPORT_OPTIONS[name][1]) for choice in choices)


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        main(["export-coreml", "--help"])
    out = capsys.readouterr().out
    names = [*EXPORT_OPTIONS, "artifact", "out", "data", "check", "audit", "bench", "json"]
    assert e.value.code == 0 and all(f"--{name.replace('_', '-')}" in out for name in names)
