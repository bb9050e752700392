"""fairway/command_line.py and cli.py: one parser, one form of error, verbs that start at once."""

import importlib
import json
import runpy
import subprocess
import sys
import time

import pytest
from conftest import ROOT, own_signals

from fairway import cli
from fairway.command_line import (
    Parser,
    UsageError,
    check_writable,
    did_you_mean,
    json_bytes,
    run_reporting,
)
from train_gpt import UserError

SCRIPTS = ("train_gpt", "train_gpt_mlx", "eval_final", "build_correction_table")


def parser() -> Parser:
    options = Parser(prog="fairway try")
    options.add_argument("--out", required=True)
    options.add_argument("--count", type=int, default=1)
    return options


def raising(error: BaseException):
    def command() -> int:
        raise error

    return command


# ==== ONE PARSER ==================================================================================
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ouut", "x"], "unknown option --ouut; did you mean --out?; see fairway try --help"),
        (["--ouut=x"], "unknown option --ouut; did you mean --out?; see fairway try --help"),
        (["--out", "x", "--zzz"], "unknown option --zzz; see fairway try --help"),
        (["--ou", "x"], "unknown option --ou; did you mean --out?; see fairway try --help"),
        ([], "the following arguments are required: --out; see fairway try --help"),
        (["--out", "x", "--count", "y"], "argument --count: invalid int value: 'y'; see"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_the_right_one(words, message):
    with pytest.raises(UsageError) as caught:
        parser().parse_args(words)
    assert str(caught.value).startswith(message)


def test_words_after_a_double_dash_are_no_options():
    options = Parser(prog="fairway try")
    options.add_argument("files", nargs="*")
    assert options.parse_args(["a", "--", "--b"]).files == ["a", "--b"]


def test_a_suggestion_is_made_only_where_something_is_close():
    assert did_you_mean("--ou", ["--out", "--tokens"]) == "; did you mean --out?"
    assert did_you_mean("--ou", ["--tokens"]) == ""


# ==== ONE FORM OF ERROR ===========================================================================
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no verb; see --help"), 2, "try: error: no verb; see --help"),
        (UserError("X is 1; set X to 2\nand more"), 1, "try: error: X is 1; set X to 2"),
        (
            OSError(28, "No space left on device", "out.bin"),
            1,
            "try: error: out.bin: No space left on device; free space, or name another place",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a.txt"),
            1,
            "try: error: a.txt: No such file or directory; check its name",
        ),
        (KeyboardInterrupt(), 130, "try: interrupted"),
    ],
)
def test_each_error_is_one_line_and_an_exit_code(error, code, line, capsys):
    assert run_reporting("try", raising(error)) == code
    assert capsys.readouterr().err == line + "\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_reporting("try", raising(ZeroDivisionError()))


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    check_writable("--json", None)
    check_writable("--json", tmp_path / "new" / "file.json")
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "below.json"):
        with pytest.raises(UsageError, match=f"--json {place} cannot be written there"):
            check_writable("--json", place)


def test_json_keeps_words_and_replaces_broken_ones():
    assert json.loads(json_bytes({"é": "\ud800"})) == {"é": "?"}


# ==== THE VERBS ===================================================================================
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "fairway: error: a verb is missing; see fairway --help"),
        (["compres"], "fairway: error: 'compres' is no verb; did you mean compress?; see"),
        (
            ["check", "--jsn", "x"],
            "fairway check: error: unknown option --jsn; did you mean --json",
        ),
    ],
)
def test_a_misspelt_verb_or_option_names_the_right_one(words, message, capsys):
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_help_lists_every_verb_on_one_line(capsys):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for verb, does in cli.VERBS.items():
        assert f"  {verb:15}{does}" in lines and len(f"  {verb:15}{does}") <= 100


def test_every_verb_has_a_module_and_every_module_a_verb():
    modules = {p.stem.replace("_", "-") for p in (ROOT / "fairway/verbs").glob("[!_]*.py")}
    assert modules == set(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_has_an_example(verb, capsys):
    module = importlib.import_module(f"fairway.verbs.{verb.replace('-', '_')}")
    assert "Example" in module.__doc__ and f"fairway {verb}" in module.__doc__
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and module.__doc__.strip().splitlines()[0] in shown


def test_help_of_every_verb_imports_no_torch_and_starts_at_once():
    code = f"""
import contextlib, io, sys
from fairway import cli
for verb in {[*cli.VERBS]!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        cli.main([verb, "--help"])
heavy = {{"torch", "numpy", "numba", "train_gpt", "matplotlib"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    helping, importing = [], []
    for _ in range(3):
        for seconds, words in (
            (helping, ["-m", "fairway", "--help"]),
            (importing, ["-c", "import numpy"]),
        ):
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
            seconds.append(time.perf_counter() - began)
    assert min(helping) < min(importing)


# ==== THE SCRIPTS =================================================================================
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_answers_a_wrong_option_as_the_verbs_do(script, monkeypatch, capsys):
    """Run the file as `__main__` in this process, which has imported torch already."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--wrong"])
    with own_signals(60), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith(f"{script}: error: ") and err.count("\n") == 1
    assert "--wrong" in err and "see " in err and "--help" in err
