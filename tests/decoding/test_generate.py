"""fairway generate writes the text to standard output, one line about it to standard error, and one
line for a mistake.
"""

import functools
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from fairway import cli
from fairway.decoding import writing


@pytest.fixture(scope="module")
def load():
    """The artifact loader with a cache: most tests run the same artifact."""
    return functools.lru_cache(writing.load)


@pytest.fixture
def run(artifacts, load, monkeypatch, capsys):
    """`run("--tokens 5", stdin=b"...")`: exit code, standard output, lines of standard error."""
    monkeypatch.chdir(artifacts)
    monkeypatch.setattr(writing, "load", load)
    pipes = signal.getsignal(signal.SIGPIPE)

    def call(options: str, *more: str, stdin: bytes = b"") -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        words = ["generate", "--artifact", "model.ptz", "--device", "cpu", *options.split(), *more]
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    yield call
    signal.signal(signal.SIGPIPE, pipes)  # the command lets a closed pipe end its process


# ---- Text ----------------------------------------------------------------------------------------
def test_a_prompt_comes_as_an_option_a_file_or_a_pipe(run):
    texts = [
        run("--seed 1 --tokens 9 --prompt", "The people"),
        run("--seed 1 --tokens 9 --prompt-file prompt.txt"),
        run("--seed 1 --tokens 9", stdin=b"The people\n"),
        run("--seed 1 --tokens 9 --prompt -", stdin=b"The people"),
    ]
    assert len({out for _, out, _ in texts}) == 1 and all(code == 0 for code, _, _ in texts)
    assert run("--seed 1 --tokens 9 --prompt", "The nation")[1] != texts[0][1]


def test_one_line_reports_tokens_speed_log_probability_and_seed(run):
    _, out, err = run("--tokens 7 --prompt the")
    assert (
        len(err) == 1
        and re.match("[1-7] tokens, ", err[0])
        and "tokens/s, mean log-probability -" in err[0]
    )
    seed = err[0].split("seed ")[1]
    assert run(f"--tokens 7 --prompt the --seed {seed}")[1] == out
    assert "seed" not in run("--tokens 7 --prompt the --strategy greedy")[2][0]


@pytest.mark.parametrize(
    "options, name",
    [
        ("--strategy greedy", "greedy"),
        ("--temperature 1.3", "top-p"),
        ("--top-k 3", "top-k"),
        ("--top-p 0.5", "top-p"),
        ("--min-p 0.2", "min-p"),
        ("--typical 0.5", "typical"),
        ("--beams 3", "beam"),
        ("--strategy temperature --repetition-penalty 1.5", "temperature"),
    ],
)
def test_every_strategy_is_chosen_by_its_option(run, options, name):
    code, out, _ = run(f"{options} --seed 3 --tokens 6 --prompt the --json out.json")
    results = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert code == 0 and out.endswith("\n") and results["texts"][0]["text"] + "\n" == out
    assert results["strategy"] == name
    assert len(results["texts"][0]["tokens"]) == len(results["texts"][0]["logps"]) <= 6


def test_every_draft_reports_acceptance_tokens_a_verification_and_wall_clock(run):
    expected = run("--strategy greedy --tokens 30 --prompt the")[1]
    for draft in ("ngram", "suffix", "layers", "layers:2", "small.ptz"):
        code, out, err = run(f"--strategy greedy --tokens 30 --prompt the --draft {draft}")
        assert (code, out) == (0, expected) and len(err) == 1
        assert (
            f"; {draft}: " in err[0]
            and "guesses accepted (" in err[0]
            and "tokens a verification" in err[0]
        )
        assert err[0].endswith("x as fast as plain decoding")
    assert "plain" not in run("--tokens 5 --prompt the --draft ngram --no-measure")[2][0]


def test_the_n_best_are_numbered(run):
    code, out, err = run("--beams 4 --n-best 3 --tokens 4 --prompt the")
    assert code == 0 and all(f"[{n}] " in out and f"[{n}] -" in err[0] for n in (1, 2, 3))


def test_a_stop_string_is_not_printed(run):
    _, whole, _ = run("--strategy greedy --tokens 20 --prompt the")
    stop = whole[5:8]
    assert (
        run("--strategy greedy --tokens 20 --prompt the --stop", stop)[1]
        == whole[: whole.index(stop)] + "\n"
    )


def test_a_prompt_longer_than_the_context_is_read_and_reported(run):
    code, out, err = run(
        "--strategy greedy --tokens 5 --draft suffix", stdin=b"the people of the nation " * 20
    )
    assert code == 0 and len(out) > 3 and len(err) == 2
    assert (
        err[0].startswith("prompt: ")
        and "the model sees 32 at a time" in err[0]
        and "slides" in err[0]
    )


@pytest.mark.parametrize("options", ["--prompt-file bytes.txt", "--prompt="])
def test_invalid_text_and_an_empty_prompt_are_prompts_too(run, options):
    code, out, err = run(f"{options} --tokens 5 --seed 0")
    assert code == 0 and out and len(err) == 1


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
def test_keys_and_values_can_be_cached_coarsely(run, kept):
    assert run(f"--cache {kept} --tokens 5 --prompt the --strategy greedy")[0] == 0


# ---- Through CoreML shards -----------------------------------------------------------------------
@pytest.fixture(scope="module")
def shards(artifacts):
    """The shards of model.ptz in fp32, in the folder coreml."""
    from fairway.coreml.export import ExportOptions, ExportSource, export_shards

    source, text = ExportSource.read(artifacts / "model.ptz"), np.zeros(0, int)
    export_shards(
        source, ExportOptions(precision="fp32", shapes="fixed"), artifacts / "coreml", text, print
    )


@pytest.mark.apple
@pytest.mark.parametrize("draft", ["none", "ngram", "suffix", "layers"])
def test_shards_write_what_torch_writes_and_count_calls(run, shards, draft):
    wanted = run("--strategy greedy --tokens 40 --prompt the")[1]
    options = "--strategy greedy --tokens 40 --prompt the --engine coreml --json out.json"
    options += f" --draft {draft}"
    code, out, err = run(options)
    assert (code, out) == (0, wanted) and "; coreml: " in err[0] and " tokens a call" in err[0]
    results = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert results["coreml"]["calls"] <= 41 and (
        draft == "none" or 0 <= results["draft"]["acceptance"] <= 1
    )
    assert draft != "ngram" or results["coreml"]["tokens_per_call"] > 1


@pytest.mark.apple
def test_shards_search_with_beams_and_read_long_prompts(run, shards):
    for options, stdin in (
        ("--beams 3 --tokens 5 --prompt the", b""),
        ("--strategy greedy --tokens 5", b"the people " * 30),
    ):
        assert run(f"{options} --engine coreml", stdin=stdin)[1] == run(options, stdin=stdin)[1]


@pytest.mark.apple
def test_a_draft_that_shards_of_one_token_cannot_verify_is_refused(run, artifacts, shards):
    from fairway.coreml.export import ExportOptions, ExportSource, export_shards

    source = ExportSource.read(artifacts / "model.ptz")
    export_shards(
        source,
        ExportOptions(precision="fp32", tokens=1),
        artifacts / "single",
        np.zeros(0, int),
        print,
    )
    options = "--tokens 5 --prompt the --strategy greedy --engine coreml --shards single"
    assert run(options)[0] == 0
    code, out, err = run(f"{options} --draft ngram")
    assert (code, out, len(err)) == (
        1,
        "",
        1,
    ) and "take one token a call, so that no guess can be" in err[0]


@pytest.mark.apple
def test_shards_of_another_artifact_are_refused(run, shards):
    code, out, err = run("--tokens 5 --prompt the --engine coreml --artifact small.ptz")
    assert (code, out, len(err)) == (1, "", 1) and "coreml was exported from artifact" in err[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (
            "--engine coreml --shards nowhere",
            "nowhere holds no manifest.json; make one with",
        ),
        (
            "--shards x",
            "--shards does nothing with --engine torch; leave it out, or take --engine coreml",
        ),
        ("--engine coreml --cache int8", "--cache does nothing with --engine coreml; leave it out"),
        ("--engine metal", "invalid choice: 'metal'"),
    ],
)
def test_an_engine_refuses_options_that_do_not_apply_to_it(run, options, message):
    code, out, err = run(f"{options} --tokens 5 --prompt the")
    assert (code, out, len(err)) == (1 if "nowhere" in options else 2, "", 1)
    assert message in err[0]


# ---- Side by side --------------------------------------------------------------------------------
def test_compare_prints_tables_and_writes_them_as_json(run):
    code, out, err = run(
        "--compare --samples 2 --tokens 6 --prompt the --prompt of --draft small.ptz --json x.json"
    )
    results = json.loads(Path("x.json").read_text(encoding="utf-8"))
    assert code == 0 and err == []
    assert all(
        words in out
        for words in ("After 'the'", "After 'of'", "All prompts", "Speculative decoding")
    )
    assert [row["draft"] for row in results["drafts"]][::2] == [
        "ngram",
        "suffix",
        "layers",
        "small.ptz",
    ]
    assert {row["strategy"] for row in results["texts"]} >= {"greedy", "top-k", "typical", "beam"}


# ---- Mistakes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, message",
    [
        (
            "--strategy nucleus",
            "'nucleus'; take one of greedy, temperature, top-k, top-p, min-p, typical, beam",
        ),
        (
            "--temperature 0",
            "--temperature is 0; it must be more than 0 (to take the best token always: --strategy "
            "greedy)",
        ),
        ("--temperature -1", "--temperature is -1"),
        ("--temperature nan", "--temperature is nan"),
        (
            "--temperature warm",
            "argument --temperature: invalid float value: 'warm'; see fairway generate --help",
        ),
        ("--top-k 0", "--top-k is 0"),
        ("--top-p 1.5", "--top-p is 1.5"),
        ("--min-p 1", "--min-p is 1"),
        ("--repetition-penalty 0.5", "--repetition-penalty is 0.5"),
        ("--tokens 0", "--tokens is 0"),
        ("--seed -1", "--seed is -1"),
        ("--beams 0", "--beams is 0; it must be 1 to 256"),
        ("--n-best 9", "--n-best is 9"),
        ("--stop=", "--stop is empty"),
        ("--strategy greedy --temperature 2", "--temperature does nothing with --strategy greedy"),
        ("--top-k 3 --top-p 0.5", "--top-p does nothing with --strategy top-k"),
        ("--beams 3 --draft ngram", "--draft does nothing with --strategy beam"),
        ("--strategy top-p --beams 3", "--beams does nothing with --strategy top-p"),
        ("--beams 3 --top-k 3", "--top-k does nothing with --strategy beam"),
        ("--samples 3", "--samples does nothing with --strategy top-p"),
        ("--compare --samples 0", "--samples is 0"),
        ("--compare --stop x", "--stop does nothing with --compare"),
        ("--prompt of", "2 prompts are set; several go with --compare"),
        ("--prompt-file prompt.txt", "--prompt and --prompt-file are both set"),
        ("--cache int3", "argument --cache: invalid choice: 'int3'"),
        ("--drafts 0", "--drafts is 0"),
        ("--bogus", "unknown option --bogus; see fairway generate --help"),
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(run, options, message):
    code, out, err = run(f"--prompt the --tokens 4 {options}")
    assert (code, out) == (2, "") and len(err) == 1
    assert err[0].startswith("fairway generate: error: ") and message in err[0]


@pytest.mark.parametrize(
    "options, message",
    [
        ("--artifact missing.ptz", "missing.ptz: cannot be read (No such file or directory)"),
        ("--artifact damaged.ptz", "damaged.ptz: the payload does not match its checksum: damaged"),
        ("--artifact bare.ptz", "set --tokenizer to the one that"),
        ("--draft stranger.ptz", "--draft stranger.ptz was trained with tokenizer"),
        ("--draft missing.ptz", "--draft is 'missing.ptz', which is no file"),
    ],
)
def test_an_unusable_file_or_draft_is_one_line_that_names_the_option(run, options, message):
    code, out, err = run(f"--prompt the --tokens 4 {options}")
    assert (code, out) == (1, "") and len(err) == 1
    assert err[0].startswith("fairway generate: error: ") and message in err[0]


def test_a_missing_prompt_file_is_named(run):
    code, out, err = run("--prompt-file nowhere.txt")
    assert (code, out) == (2, "") and len(err) == 1
    assert "--prompt-file nowhere.txt: No such file or directory" in err[0]


# ---- Ended from outside --------------------------------------------------------------------------
class InterruptingOutput(io.StringIO):
    """Standard output that sends Ctrl-C to this process after 20 characters."""

    def write(self, text: str) -> int:
        before = self.tell()
        written = super().write(text)
        if before < 20 <= self.tell():
            signal.raise_signal(signal.SIGINT)
        return written


def test_ctrl_c_ends_the_text_cleanly(run, monkeypatch):
    out = InterruptingOutput()
    monkeypatch.setattr(sys, "stdout", out)
    code, _, err = run("--prompt the --tokens 1000000 --strategy greedy")
    text = out.getvalue()
    assert code == 130 and text.endswith("\n") and 20 < len(text) < 1000
    assert len(err) == 1 and err[0].endswith(", interrupted") and "tokens/s" in err[0]


@pytest.fixture
def process(artifacts):
    """The command in a process of its own, writing without end."""
    options = "--artifact model.ptz --device cpu --prompt the --tokens 1000000 --strategy greedy"
    return subprocess.Popen(
        [sys.executable, "-m", "fairway", "generate", *options.split()],
        cwd=artifacts,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_ctrl_c_ends_a_process_cleanly(process):
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and (begun + rest).endswith(b"\n") and len(begun) == 20
    assert err.count(b"\n") == 1 and err.endswith(b", interrupted\n") and b"tokens/s" in err


@pytest.mark.slow
def test_a_closed_pipe_ends_the_process_silently(process):
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGPIPE and process.stderr.read() == b""
    process.stderr.close()
