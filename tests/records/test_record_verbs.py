"""The verbs of runs and records: quick to start, one line for a mistake, useful exit codes."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from finished_runs import CODE, ENTRY, draw_nothing, made_run, write_files
from history_lines import A, B, evaluation_line, write_lines, write_log

import fairway.report
from fairway.cli import main
from fairway.records import checks
from fairway.verbs import code, pack

VERBS = ("pack", "check", "significance", "table", "pr", "report", "runs", "diff", "code")
PACK = ["--track", "10min_16mb", "--slug", "s", "--author", "a", "--github-id", "g"]


def test_help_of_a_verb_loads_nothing_heavy():
    program = (
        "import sys\nfrom fairway.cli import main\ntry: main(['runs', '--help'])\n"
        "except SystemExit: pass\nheavy = {'numpy', 'torch', 'scipy', 'matplotlib', 'train_gpt'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert re.search(rf"\nExample:\n    fairway {verb}\b", capsys.readouterr().out)


@pytest.mark.parametrize(
    "arguments",
    [
        ["runs", "--nope"],
        ["pack", "x"],
        ["diff", "1"],
        ["table", "--chec"],
        ["pack", "x", *PACK[2:], "--track", "fast"],
        ["pack", "x", *PACK, "--pack-code", "zip"],
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fairway {arguments[0]}: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere"], "nowhere is no folder"),
        (["pr", "nowhere"], "nowhere is no folder"),
        (["significance", "nowhere", "there"], "nowhere"),
        (["diff", "1", "2"], "1 is no number of the list"),
        (["runs", "--file", "nowhere"], "nowhere: No such file"),
        (["runs", "x=1"], "x is neither a column"),
        (["table", "--check", "--records", "r"], "README.md is stale: run `fairway table`"),
        (["pack", "no", *PACK], "no is no folder"),
        (["code", "no"], "no is no folder"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"fairway {arguments[0]}: error: ")
    assert error.count("\n") == 1 and says in error


@pytest.mark.parametrize(
    ("raised", "exit_code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x"), 1, "x: No space left"),
    ],
)
def test_an_interrupt_and_a_full_disk_are_one_line(raised, exit_code, says, monkeypatch, capsys):
    def fail(*_):
        raise raised

    monkeypatch.setattr("fairway.records.leaderboard.write_leaderboard", fail)
    assert main(["table"]) == exit_code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_runs_are_listed_filtered_and_compared(tmp_path, monkeypatch, capsys):
    write_lines(tmp_path / "out/x/runs.jsonl", A, "damaged", B, evaluation_line(A, 11, 1.5))
    for run_id in ("first", "second"):
        write_log(tmp_path / "out/x", run_id, "pass\n")
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "num_layers=6"]) == 0
    out, error = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["number", "2"]
    assert error.count("\n") == 1
    assert re.match(r"fairway runs: 1 damaged lines left out: .*runs.jsonl:2", error)
    assert main(["runs", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["run_id"] for row in rows] == ["first", "second"]
    assert main(["diff", "first", "2"]) == 0
    out = capsys.readouterr().out
    assert "num_layers  4 -> 6" in out and "no code line differs" in out


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    write_lines(tmp_path / "runs.jsonl", *[A] * 3000)
    command = f"{sys.executable} -m fairway runs | head -1"
    done = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("number") and done.stderr == ""


def test_code_lists_what_ships_next_to_the_trainer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(code, "ROOT", write_files(tmp_path / "root", CODE))
    assert main(["code"]) == 0
    assert capsys.readouterr().out == (
        "eval_final.py,fairway/__init__.py,fairway/scoring/evaluation.py\n"
    )
    run = made_run(tmp_path / "run", 1)
    score = json.loads((run / "eval/score.json").read_text())
    del score["code"]["fairway/scoring/evaluation.py"]
    (run / "eval/score.json").write_text(json.dumps(score))
    assert main(["code", str(run)]) == 0
    assert capsys.readouterr().out == "eval_final.py,fairway/__init__.py\n"


def test_the_table_is_written_and_then_up_to_date(tmp_path, capsys):
    assert main(["table", "--records", str(tmp_path)]) == 0
    assert main(["table", "--records", str(tmp_path), "--check"]) == 0
    assert "no records yet" in (tmp_path / "README.md").read_text()
    assert "up to date" in capsys.readouterr().out


def test_results_are_lines_with_counts_or_json(tmp_path, monkeypatch, capsys):
    results = [
        checks.CheckResult("bytes", "ok", "15,000,000 of 16,000,000", []),
        checks.CheckResult(
            "code", "cannot tell", "no source", ["train_gpt.py:8 target in a hash key"]
        ),
    ]
    monkeypatch.setattr(checks, "check_record", lambda folder, run=False: results)
    assert main(["check", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok           bytes           15,000,000 of 16,000,000",
        "cannot tell  code            no source",
        "             train_gpt.py:8 target in a hash key",
        "1 ok, 0 FAIL, 1 cannot tell, 1 warnings",
    ]
    results.append(checks.CheckResult("seeds", "FAIL", "2", []))
    assert main(["check", str(tmp_path), str(tmp_path)]) == 1
    assert capsys.readouterr().out.count(f"== {tmp_path}\n") == 2
    assert main(["check", str(tmp_path), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)[str(tmp_path)]
    assert [row["verdict"] for row in rows] == ["ok", "cannot tell", "FAIL"]


def test_pr_prints_branch_commit_and_body_of_a_folder_that_passes(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "track_10min_16mb/2026-05-01_Gates & co"
    write_lines(
        folder / "submission.json",
        dict(
            name="Gates",
            val_bpb=1.0625,
            blurb="One.",
            hardware="8x H100",
            bytes_total=15_900_000,
            seed_results={
                "42": dict(val_bpb=1.0625, val_loss=2.5, steps=5000, artifact_bytes=15_800_000)
            },
        ),
    )
    results = [checks.CheckResult("bytes", "FAIL", "too many", [])]
    monkeypatch.setattr(checks, "check_record", lambda folder: results)
    assert main(["pr", str(folder)]) == 1
    assert "Gates & co fails bytes; see" in capsys.readouterr().err
    results.clear()
    assert main(["pr", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "branch: record/2026-05-01_Gates-co",
        "commit: Record: Gates, val_bpb 1.062500",
    ]
    assert "| 42 | 1.0625 | 2.5 | 5000 | 15800000 |" in lines
    assert any("15,900,000" in line for line in lines)
    assert main(["pr", str(tmp_path)]) == 1
    assert "not called track_" in capsys.readouterr().err


def test_pack_judges_what_it_wrote(tmp_path, monkeypatch, capsys):
    """Two seeds are packed and judged: on this track they are too few."""
    monkeypatch.setattr(fairway.report, "draw_picture", draw_nothing)
    monkeypatch.setattr(pack, "ROOT", write_files(tmp_path / "root", CODE))
    runs = [str(made_run(tmp_path / f"s{seed}", seed)) for seed in (1, 2)]
    options = ["--date", "2026-05-01", "--out", str(tmp_path / "records")]
    assert main(["pack", *runs, *PACK[2:], "--track", ENTRY.track, *options]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "next: repair what FAILs" in out
    folder = tmp_path / "records/track_non_record_16mb/2026-05-01_s"
    assert (folder / "submission.json").is_file() and (folder / "code.xz").is_file()
