"""The verb: cells in processes of their own, stopped, resumed, retried, and wrong words."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from fairway.cli import main
from fairway.methods import harness, measure, registry
from fairway.methods.cell import (
    Spec,
    cell_name,
    code_sha256,
    error_line,
    runs_of,
    shipped_folder,
    write_json,
)
from fairway.methods.cell import main as main_of_cell
from train_gpt import UserError


def words(subject_file, corpus, out, *more: str) -> list[str]:
    common = ["compare", "--model", str(subject_file), "--data", str(corpus.folder)]
    return [*common, "--out", str(out), "--val-tokens", "200", *more]


@pytest.fixture
def in_this_process(monkeypatch):
    """Run cells here, because a process takes seconds to import what they need."""

    def run(job: harness.Job, _on_start) -> dict:
        main_of_cell(json.dumps(job.settings))
        return harness.read_cell(job.result)

    monkeypatch.setattr(harness, "run_in_process", run)
    monkeypatch.setattr(measure, "SAMPLES", 3)
    monkeypatch.setattr(measure, "NEW_TOKENS", 4)


def test_cells_run_are_skipped_and_make_a_table(
    subject_file, corpus, tmp_path, capsys, in_this_process
):
    arguments = words(subject_file, corpus, tmp_path, "--methods", "fp32,int4-rms", "--table")
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    assert main([*arguments, "--into", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "[2/2]" in shown and "0 findings" in shown
    raw = next((tmp_path / "raw").iterdir())
    assert sorted(p.name for p in raw.iterdir()) == ["fp32.json", "int4-rms.json"]
    assert "### Weight-only" in page.read_text() and "| int4-rms |" in page.read_text()
    assert len(list(tmp_path.glob("*.png"))) == 2
    times = {p: p.stat().st_mtime_ns for p in raw.iterdir()}
    (raw / "int4-rms.json").write_text("{ cut")
    assert main(arguments) == 0
    assert "2 cells, 1 finished before" in capsys.readouterr().out
    changed = [p.name for p, at in times.items() if p.stat().st_mtime_ns != at]
    assert changed == ["int4-rms.json"]


@pytest.mark.slow
def test_a_killed_run_goes_on(subject_file, corpus, tmp_path):
    command = [sys.executable, "-m", "fairway", *words(subject_file, corpus, tmp_path)]
    command += ["--methods", "fp32,bf16", "--workers", "1"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob("raw/*/fp32.json")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    raw = next((tmp_path / "raw").iterdir())
    first = (raw / "fp32.json").stat().st_mtime_ns
    assert subprocess.run(command, env=env, stdout=subprocess.DEVNULL).returncode == 0
    assert (raw / "fp32.json").stat().st_mtime_ns == first
    assert json.loads((raw / "bf16.json").read_text())["status"] == "done"
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--methods", "int7-rms"], "is no method; did you mean int"),
        (["--methods", ","], "names no method"),
        (["--val-tokens", "-1"], "must be 0 or more"),
        (["--model", "nothing.ptz"], "nothing.ptz is no file"),
        (["--model", __file__], "neither an artifact nor a checkpoint"),
        (["--data", "/"], "no *_val_*.bin in /"),
        (["--workers", "many"], "invalid int value"),
        (["--metods", "quick"], "did you mean --methods?"),
    ],
)
def test_wrong_words_are_one_line(more, message, subject_file, corpus, tmp_path, capsys):
    assert main([*words(subject_file, corpus, tmp_path), *more]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_list_says_what_each_method_does(capsys):
    assert main(["compare", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(registry.METHODS)


# ---- The harness ---------------------------------------------------------------------------------
@pytest.fixture
def spec(tmp_path) -> Spec:
    return Spec("model", "int4", 0, "data", str(tmp_path))


def test_a_cell_is_open_until_it_is_done(spec):
    path, code = harness.result_path(spec), code_sha256()

    def result(status: str, sha: str = code, tokens: int = 0) -> dict:
        return {"status": status, "val_tokens": tokens, "environment": {"code_sha256": sha}}

    assert harness.is_open(spec, False)
    for status, sha, tokens, opened, retried in (
        ("done", code, 0, False, False),
        ("done", "old", 0, False, True),
        ("failed", code, 0, False, True),
        ("not run", code, 0, False, True),
        ("done", code, 9, True, True),
    ):
        write_json(path, result(status, sha, tokens))
        assert harness.is_open(spec, False) is opened and harness.is_open(spec, True) is retried
    path.write_text("[]")
    assert harness.is_open(spec, False)


def test_a_job_has_the_places_of_its_cell(tmp_path):
    spec = Spec("model", "int4", 0, "data", str(tmp_path / "raw" / "m"), threads=2)
    job = harness.job_of(spec)
    assert (job.result, job.files) == (harness.result_path(spec), shipped_folder(spec))
    moved = job.moved(tmp_path / "elsewhere")
    assert moved.result == tmp_path / "elsewhere/raw/m/int4.json"
    assert moved.files == tmp_path / "elsewhere/files/m/int4" and moved.threads == 2


def run_killed(job: harness.Job, _on_start) -> dict:
    return RUN_REALLY(job, on_start=lambda child: child.kill())


RUN_REALLY = harness.run_in_process


def test_a_process_that_dies_leaves_a_failed_cell(spec, monkeypatch):
    monkeypatch.setattr(harness, "run_in_process", run_killed)
    lines: list[str] = []
    harness.run_cells([harness.job_of(spec)], 1, harness.Reporter(lines.append))
    result = harness.read_cell(harness.result_path(spec))
    assert result["status"] == "failed" and "ended with code -9" in result["error"]
    assert len(lines) == 1 and result["error"] in lines[0]


def test_a_cell_that_ctrl_c_ends_stays_open(spec, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_in_process", run_killed)
    monkeypatch.setattr(harness, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        harness.run_cells([harness.job_of(spec)], 1, harness.Reporter(print))
    assert harness.is_open(spec, retry=False)


def test_a_method_with_a_seed_gets_three_cells(spec, monkeypatch):
    names = [cell_name(c.method, c.seed) for c in harness.cells_of(spec, ["int4"])]
    assert names == ["int4"]
    monkeypatch.setattr(type(registry.METHODS["int4"]), "seeded", True)
    names = [cell_name(c.method, c.seed) for c in harness.cells_of(spec, ["int4"])]
    assert names == ["int4.seed0", "int4.seed1", "int4.seed2"]


def test_equal_runs_of_tokens_have_equal_hashes():
    import numpy as np

    text = np.random.default_rng(0).integers(0, 1024, 400).astype("<u2")
    found = np.isin(runs_of(text[100:160]), runs_of(text))
    assert found.all() and len(found) == 60 - 23
    assert not np.isin(runs_of(text[100:160] ^ 1), runs_of(text)).any()
    assert len(runs_of(text[:23])) == 0


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(28, "No space left on device"), "files: No space left on device; free space, or"),
        (UserError("no shards; set --data"), "no shards; set --data"),
        (ValueError("two\nlines"), "ValueError: two"),
        (KeyError(), "KeyError: KeyError"),
    ],
)
def test_an_error_is_one_line_with_a_next_step(error, line):
    assert error_line(error).startswith(line) and "\n" not in error_line(error)
