"""submit.py as its users run it: quick to start, one line for a mistake, exit codes that scripts can use."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_history import A, B, scored, write_lines, write_log
from test_packing import CODE, ENTRY, drawn, made_run, write_files

import fairway.report
import submit
from fairway.records import checks

COMMANDS = ("pack", "check", "significance", "table", "pr", "report", "runs", "diff", "code")


def shell(*arguments, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "submit.py"), *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        **options,
    )


def test_starting_loads_nothing_heavy():
    code = (
        "import sys; sys.argv = ['submit.py', 'runs', '--help']; import submit\ntry: submit.main()\n"
        "except SystemExit: pass\nheavy = {'numpy', 'torch', 'scipy', 'matplotlib', 'train_gpt'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]" and done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        submit.main([command, "--help"])
    assert (
        caught.value.code == 0
        and f"\n    python submit.py {command}" in capsys.readouterr().out + "\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nope"],
        ["runs", "--nope"],
        ["pack", "x"],
        ["diff", "1"],
        ["table", "--chec"],
        ["pack", "x", "--track", "fast", "--slug", "s", "--author", "a", "--github-id", "g"],
    ],
)
def test_what_is_no_command_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        submit.main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("submit: error: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere"], "nowhere is no folder"),
        (["pr", "nowhere"], "nowhere is no folder"),
        (["significance", "nowhere", "there"], "nowhere"),
        (["diff", "1", "2"], "1 is no number of the list"),
        (["runs", "--file", "nowhere"], "nowhere: No such file"),
        (["runs", "x=1"], "x is neither a column"),
        (
            ["table", "--check", "--records", "r"],
            "README.md is stale: run `python submit.py table`",
        ),
        (
            [
                "pack",
                "no",
                "--track",
                "10min_16mb",
                "--slug",
                "s",
                "--author",
                "a",
                "--github-id",
                "g",
            ],
            "no is no folder",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert submit.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("submit: error: ") and error.count("\n") == 1 and says in error


@pytest.mark.parametrize(
    ("raised", "code", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device", "x"), 1, "x: No space left"),
    ],
)
def test_an_interrupt_and_a_full_disk_are_one_line(raised, code, says, monkeypatch, capsys):
    def fails(*_):
        raise raised

    monkeypatch.setattr("fairway.records.leaderboard.write_table", fails)
    assert submit.main(["table"]) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_runs_are_listed_filtered_and_compared(tmp_path):
    write_lines(tmp_path / "out/x/runs.jsonl", A, "damaged", B, scored(A, 11, 1.5))
    for run_id in ("first", "second"):
        write_log(tmp_path / "out/x", run_id, "pass\n")
    done = shell("runs", "num_layers=6", cwd=tmp_path)
    assert done.returncode == 0 and [line.split()[0] for line in done.stdout.splitlines()] == [
        "number",
        "2",
    ]
    assert done.stderr.count("\n") == 1 and re.match(
        r"submit: 1 damaged lines left out: .*runs.jsonl:2", done.stderr
    )
    assert [row["run_id"] for row in json.loads(shell("runs", "--json", cwd=tmp_path).stdout)] == [
        "first",
        "second",
    ]
    diff = shell("diff", "first", "2", cwd=tmp_path).stdout
    assert "num_layers  4 -> 6" in diff and "no code line differs" in diff
    assert shell("runs", "diff", "first", "2", cwd=tmp_path).stdout == diff


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    write_lines(tmp_path / "runs.jsonl", *[A] * 3000)
    command = f"{sys.executable} {ROOT / 'submit.py'} runs | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("number") and done.stderr == ""


def test_code_lists_what_ships_beside_the_trainer():
    names = shell("code").stdout.strip().split(",")
    assert (
        "eval_final.py" in names
        and "train_gpt.py" not in names
        and all((ROOT / name).is_file() for name in names)
    )


def test_the_table_is_written_and_then_up_to_date(tmp_path, capsys):
    assert submit.main(["table", "--records", str(tmp_path)]) == 0
    assert submit.main(["table", "--records", str(tmp_path), "--check"]) == 0
    assert (
        "no records yet" in (tmp_path / "README.md").read_text()
        and "up to date" in capsys.readouterr().out
    )


def test_verdicts_are_lines_with_a_count_or_json(tmp_path, monkeypatch, capsys):
    verdicts = [
        checks.Verdict("bytes", "ok", "15,000,000 of 16,000,000", []),
        checks.Verdict("code", "cannot tell", "no source", ["train_gpt.py:8 target in a hash key"]),
    ]
    monkeypatch.setattr(checks, "check", lambda folder, run=False: verdicts)
    assert submit.main(["check", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "ok           bytes           15,000,000 of 16,000,000",
        "cannot tell  code            no source",
        "             train_gpt.py:8 target in a hash key",
        "1 ok, 0 FAIL, 1 cannot tell, 1 warnings",
    ]
    verdicts.append(checks.Verdict("seeds", "FAIL", "2", []))
    assert submit.main(["check", str(tmp_path), str(tmp_path)]) == 1
    assert capsys.readouterr().out.count(f"== {tmp_path}\n") == 2
    assert submit.main(["check", str(tmp_path), "--json"]) == 1
    assert [v["verdict"] for v in json.loads(capsys.readouterr().out)[str(tmp_path)]] == [
        "ok",
        "cannot tell",
        "FAIL",
    ]


def test_pr_prints_branch_commit_and_body_of_what_holds(tmp_path, monkeypatch, capsys):
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
    verdicts = [checks.Verdict("bytes", "FAIL", "too many", [])]
    monkeypatch.setattr(checks, "check", lambda folder: verdicts)
    assert (
        submit.main(["pr", str(folder)]) == 1
        and "Gates & co fails bytes; see" in capsys.readouterr().err
    )
    verdicts.clear()
    assert submit.main(["pr", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "branch: record/2026-05-01_Gates-co",
        "commit: Record: Gates, val_bpb 1.062500",
    ]
    assert "| 42 | 1.0625 | 2.5 | 5000 | 15800000 |" in lines and any(
        "15,900,000" in line for line in lines
    )
    assert (
        submit.main(["pr", str(tmp_path)]) == 1 and "not called track_" in capsys.readouterr().err
    )


def test_pack_judges_what_it_wrote(tmp_path, monkeypatch, capsys):
    """A run of two seeds is packed, and told that it will not do."""
    monkeypatch.setattr(fairway.report, "picture", drawn)
    monkeypatch.setattr(submit, "ROOT", write_files(tmp_path / "root", CODE))
    runs = [str(made_run(tmp_path / f"s{seed}", seed)) for seed in (1, 2)]
    code = submit.main(
        [
            "pack",
            *runs,
            "--track",
            ENTRY.track,
            "--slug",
            "x",
            "--author",
            "a",
            "--github-id",
            "g",
            "--date",
            "2026-05-01",
            "--out",
            str(tmp_path / "records"),
        ]
    )
    out = capsys.readouterr().out
    assert code == 1 and "FAIL" in out and "next: mend what FAILs" in out
    assert (tmp_path / "records/track_non_record_16mb/2026-05-01_x/submission.json").is_file()
