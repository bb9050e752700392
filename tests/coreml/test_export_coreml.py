"""export_coreml.py as its users run it: one line for a mistake, and an exit status that a script can trust."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import export_coreml
from train_gpt import write_shard

pytestmark = pytest.mark.apple


@pytest.fixture
def run(exported, corpus, tmp_path, monkeypatch, capsys):
    """`run("--check")`: status, lines of standard output, lines of standard error."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported.source.path, "model.ptz")

    def call(options: str) -> tuple[int, list[str], list[str]]:
        status = export_coreml.main(
            ["--artifact", "model.ptz", "--data", str(corpus.folder), *options.split()]
        )
        out, told = capsys.readouterr()
        return status, out.splitlines(), told.replace("\r", "\n").splitlines()

    return call


def test_an_export_says_what_it_wrote(run):
    status, out, _ = run("--shapes fixed --chunks 2 --vocab-shards 2 --quantise int8")
    assert status == 0 and out[0].startswith("ranges: pre-activation ")
    assert out[1].startswith(
        "exported:coreml shards:4 (layers0, layers1, head0, head1) functions:main context:32 "
        "precision:fp16 quantise:int8 bytes:"
    )
    with open("coreml/manifest.json") as f:
        assert json.load(f)["quantise"] == "int8"


def test_a_check_of_one_variant_keeps_it_and_writes_json(run):
    status, out, _ = run("--check --shapes range --precision fp32 --out kept --json found.json")
    assert (
        status == 0
        and out[-1] == "parity:passed variants:1"
        and any("fp32, range, 1 shard" in line for line in out)
    )
    with open("found.json") as f:
        found = json.load(f)
    assert found["passed"] and found["variants"][0]["ways"]["T=1"]["gap"] < 1e-4
    with open("kept/manifest.json") as f:
        assert json.load(f)["shapes"] == "range"


def test_a_check_that_fails_says_so_and_ends_in_one(run, monkeypatch):
    monkeypatch.setitem(export_coreml.check.__globals__["LIMITS"], "fp32", 1e-12)
    status, out, _ = run("--check --shapes fixed --precision fp32")
    assert status == 1 and out[-1] == "parity:FAILED variants:1"
    assert any(line.startswith("FAIL: fp32, fixed, 1 shard: largest difference ") for line in out)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--shapes odd", "--shapes is 'odd'; take one of fixed"),
        ("--tokens 9", "--tokens is 9; it must be 1 to 4"),
        ("--tokens x", "invalid int value: 'x'; see --help"),
        ("--chunks 7", "--chunks is 7, but the model has 2 layers"),
        ("--chunk 2", "unrecognized arguments: --chunk 2; see --help"),
        ("--artifact nothing.ptz", "nothing.ptz: cannot be read"),
        ("--data .", "no training shards"),
        ("--check --audit", "--check and --audit are both given; leave one out"),
        ("--what", "unrecognized arguments: --what"),
        ("--check --json .", "--json . cannot be written there"),
        ("--out .", "--out .* is where you are"),
        ("--check --out x", "--out does nothing with a --check of all variants"),
        ("--json x", "--json goes with --check, --audit or --bench"),
        ("--out model.ptz", "is no export of ours"),
    ],
)
def test_mistakes_are_one_line(run, options, message):
    status, out, told = run(options)
    line = [line for line in told if line.startswith("export_coreml: error: ")]
    assert status == 1 and len(line) == 1 and re.search(message, line[0])


def test_a_variant_that_fails_is_not_kept(run, monkeypatch):
    assert run("--shapes fixed --out kept")[0] == 0
    with open("kept/manifest.json", "rb") as f:
        before = f.read()
    monkeypatch.setitem(export_coreml.check.__globals__["LIMITS"], "fp32", 1e-12)
    assert run("--check --shapes fixed --precision fp32 --out kept")[0] == 1
    with open("kept/manifest.json", "rb") as f:
        assert f.read() == before


def test_too_little_text_to_measure_is_told(run, tmp_path):
    write_shard(tmp_path / "x_train_000000.bin", np.ones(255, "<u2"))
    told = run(f"--data {tmp_path}")[2]
    assert "holds 255 tokens; values are measured on at least 256" in told[-1]


@pytest.mark.skipif(sys.platform == "darwin", reason="here it would run")
@pytest.mark.parametrize("option", ["--audit", "--bench"])
def test_what_only_a_mac_can_do_says_so_in_one_line(run, option):
    status, out, told = run(option)
    assert (status, out, len(told)) == (1, [], 1)
    assert told[0].startswith(
        f"export_coreml: error: {option} asks CoreML on a Mac, and this is Linux; run it there"
    )


@pytest.mark.skipif(sys.platform != "darwin", reason="needs a Mac")
@pytest.mark.parametrize("option", ["--audit", "--bench"])
def test_a_mac_audits_and_times(run, option):
    assert run("--shapes multifunction")[0] == 0
    status, out, _ = run(f"{option} --json found.json")
    assert status == 0 and out


def test_an_interrupt_leaves_what_was_there(run, monkeypatch):
    monkeypatch.setattr(
        export_coreml, "export", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert run("")[0::2] == (
        130,
        ["export_coreml: interrupted; what was there before is untouched"],
    )


def test_without_coremltools_one_line_names_the_requirements(tmp_path, exported, corpus):
    options = ["--artifact", str(exported.source.path), "--data", str(corpus.folder)]
    code = (
        "import sys; sys.modules['coremltools'] = None; import export_coreml; "
        f"sys.exit(export_coreml.main({options!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(PYTHONPATH=str(ROOT), PATH=""),
    )
    assert done.returncode == 1 and done.stderr.strip().startswith(
        "export_coreml: error: coremltools is not installed"
    )
    assert "pip install -r requirements-apple.txt" in done.stderr and "Traceback" not in done.stderr


def test_help_names_every_option():
    done = subprocess.run(
        [sys.executable, str(ROOT / "export_coreml.py"), "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and all(
        f"--{name}" in done.stdout
        for name in (
            "layers-per-shard",
            "chunks",
            "shapes",
            "quantise",
            "check",
            "audit",
            "bench",
            "vocab-shards",
            "context",
        )
    )
