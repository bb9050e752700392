"""Run eval_final.py and build_correction_table.py as users do: output, files, kills, refusals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

import build_correction_table
import eval_final
from fairway.certificate import evaluation_verdicts
from fairway.scoring import ablation
from fairway.scoring.commits import Commit, verify_chain
from fairway.scoring.counting import rows_ahead, usable_threads
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import counted_code_bytes
from fairway.shards import write_shard
from train_gpt import Runtime, file_sha256, read_shard

ROOT = Path(__file__).resolve().parents[2]
SCORING = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fairway/scoring").rglob("*.py")}
# What the default settings import until the score is known. Certificate, correction table, other
# mixtures and test-time training are no part of it.
COUNTED = SCORING - {"fairway/scoring/adaptation.py", "fairway/scoring/ablation.py"} | {
    "train_gpt.py",
    "eval_final.py",
    "fairway/__init__.py",
    "fairway/artifact_reader.py",
    "fairway/command_line.py",
}
LADDER = ["neural, windows side by side", "neural, sliding", "+ experts, mixed: final"]


@pytest.fixture(scope="module")
def env(trained_artifact, corpus):
    """Return `env(out_dir, **settings)`, which builds a clean environment for the scripts."""

    def build(out_dir, **settings) -> dict[str, str]:
        base = dict(
            PATH=os.environ["PATH"],
            HOME=str(out_dir),
            OMP_NUM_THREADS="1",
            CHECKPOINT=trained_artifact,
            DATA_PATH=corpus.folder,
            OUT_DIR=out_dir,
            EVAL_STRIDE=32,
        )
        return {name: str(value) for name, value in (base | settings).items() if value is not None}

    return build


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(env: dict[str, str], *arguments: str, launcher: tuple = (sys.executable,)) -> Done:
    """Run eval_final.py in its own process."""
    done = subprocess.run(
        [*launcher, str(ROOT / "eval_final.py"), *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def here(capsys):
    """Return `here(main, ...)`: it calls a script's main in this process, which saves imports."""

    def call(main, *arguments) -> Done:
        code = main(*arguments)
        return Done(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def finished(tmp_path_factory, env):
    """Return a run with everything that can be asked for: its folder, output and score."""
    folder = tmp_path_factory.mktemp("scored")
    settings = env(folder, USE_CORRECTION=1, CERTIFY_SECONDS=2)
    done = run(settings, "--certify", "--compare")
    return folder, done, json.loads((folder / "eval/score.json").read_text())


def test_a_run_prints_the_ladder_and_leaves_scores_that_agree_with_it(
    finished, trained_artifact, corpus
):
    folder, done, score = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert [rung["name"] for rung in score["ladder"]] == LADDER
    assert (
        done.stdout.splitlines()[-1]
        == f"val_bpb:{score['val_bpb']:.8f} val_loss:{score['val_loss']:.8f}"
    )
    logp, tokens = (
        np.load(folder / "eval/final_logp.npy"),
        read_shard(corpus.folder / "tiny_val_000000.bin"),
    )
    assert len(logp) == len(tokens) - 1 == score["tokens"]
    assert score["val_bpb"] == pytest.approx(-logp.sum() / np.log(2) / score["bytes"], abs=1e-12)
    text = "".join(
        corpus.tokenizer.decode(part.tolist())
        for part in np.split(tokens, np.flatnonzero(tokens == 1))
    )
    assert score["bytes"] == len(text.encode())
    assert score["val_bpb"] < score["ladder"][1]["bpb"]  # this corpus repeats itself
    trace = np.array(score["weights"]["trace"])
    assert trace.shape[1] == len(score["weights"]["experts"]) and np.allclose(
        trace.sum(axis=1), 1, atol=1e-3
    )
    assert set(score["sizes"]["code"]) == COUNTED
    assert score["sizes"]["artifact"] == trained_artifact.stat().st_size
    assert score["code"].keys() == score["sizes"]["code"].keys()
    assert score["code"]["fairway/scoring/neural.py"] == file_sha256(
        ROOT / "fairway/scoring/neural.py"
    )


def test_a_run_adds_a_line_to_the_history(finished):
    folder, _, score = finished
    line = json.loads((folder / "runs.jsonl").read_text().splitlines()[0])
    assert line["final"]["bpb"] == score["val_bpb"] and line["final"]["certified"] is True
    assert (
        line["start"]["sha256"] == score["sha256"]
        and line["start"]["settings"] == score["settings"]
    )
    assert line["final"]["artifact_bytes"] == score["sizes"]["artifact"]
    assert line["final"]["code_bytes"] == counted_code_bytes(score["sizes"]["code"])


def test_the_plain_rung_is_what_training_printed(finished, trained_artifact):
    folder, _, score = finished
    events = [
        json.loads(line)
        for line in (trained_artifact.parent / "logs/test.jsonl").read_text().splitlines()
    ]
    assert score["ladder"][0]["bpb"] == pytest.approx(events[-1]["bpb"], abs=1e-6)


def test_the_certificate_is_green_and_written(finished):
    folder, done, score = finished
    certificate = json.loads((folder / "eval/certificate.json").read_text())
    assert certificate["passed"] and "FAIL" not in done.stdout
    assert {r["rule"] for r in certificate["rules"] if r["verdict"] == "ok"} >= {
        "causal",
        "normalised",
        "target-blind",
        "score first",
        "one pass",
        "coverage",
        "claim",
        "bytes",
        "canary",
        "sizes",
    }


def test_the_commit_log_covers_every_row_and_its_chain_holds(finished):
    folder, _, score = finished
    commits = [
        Commit(**json.loads(line))
        for line in (folder / "eval/commits.jsonl").read_text().splitlines()
    ]
    assert verify_chain(commits) is None and sum(c.count for c in commits) == score["tokens"]
    assert sum(c.bytes for c in commits) == score["bytes"]
    assert sum(c.nats for c in commits) == pytest.approx(score["val_loss"] * score["tokens"])


def test_the_correction_table_is_no_part_of_the_score(finished):
    folder, done, score = finished
    correction = score["correction"]
    assert correction["oracle_bpb"] < score["val_bpb"]
    assert correction["charged_bpb"] == pytest.approx(
        correction["oracle_bpb"] + 8 * correction["bytes"] / score["bytes"], abs=1e-12
    )
    assert "oracle_bpb:" in done.stdout and "no record may use the table" in done.stdout


def test_a_second_run_reads_its_columns_and_gives_the_same_score(finished, env, here):
    folder, done, _ = finished
    again = here(eval_final.main, env(folder), ["--compare"])
    assert again.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert "columns:blocks 100% read from disk" in again.stdout
    first, second = (
        float(re.search(r"sliding:([\d.]+)s", out)[1]) for out in (done.stdout, again.stdout)
    )
    score = json.loads((folder / "eval/score.json").read_text())
    assert score["eval_seconds"] > second - 0.05 and second >= first > 0  # of both runs, rounded
    other = here(eval_final.main, env(folder, EVAL_STRIDE=16), [])
    assert (
        "columns:sliding" not in other.stdout
        and other.stdout.splitlines()[-1] != done.stdout.splitlines()[-1]
    )


def test_a_proof_joins_the_certificate(finished, env, here):
    """Ask for a proof alone, without the certificate."""
    folder, done, score = finished
    proved = here(eval_final.main, env(folder), ["--prove", "100"])
    assert proved.returncode == 0 and proved.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]
    certificate = json.loads((folder / "eval/certificate.json").read_text())
    (rule,), d = certificate["rules"], certificate["rules"][0]["details"]
    assert certificate["passed"] and (rule["rule"], rule["verdict"], d["tokens"]) == (
        "decoded",
        "ok",
        100,
    )
    logp = np.load(folder / "eval/final_logp.npy")[:99]
    assert d["claimed_bits"] == pytest.approx(-logp.sum() / np.log(2), abs=1e-9)
    assert d["file_bits"] == 8 * (folder / "eval/proof.fwy").stat().st_size
    assert d["ratio"] == pytest.approx(d["file_bits"] / d["claimed_bits"])


def test_a_killed_run_continues_from_its_columns(finished, env, tmp_path, here):
    _, done, _ = finished
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "eval_final.py")],
        env=env(tmp_path, EVAL_BATCH_TOKENS=64),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    covered, deadline = tmp_path / "eval/columns/sliding/covered.npy", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (
            covered.exists()
            and (tmp_path / "eval/columns/sliding/columns.json").exists()
            and np.load(covered).any()
        ):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    process.wait()
    assert np.load(covered).any() and not (tmp_path / "eval/score.json").exists()
    again = here(eval_final.main, env(tmp_path), [])
    assert again.returncode == 0 and "read from disk" in again.stdout
    first, second = (
        float(d.stdout.splitlines()[-1].split()[0].split(":")[1]) for d in (done, again)
    )
    assert second == pytest.approx(first, abs=1e-9)
    assert "total_eval_time:unknown" in again.stdout  # what the killed run took is lost


SLOW_FIRST_RANK = """
import datetime, os, sys, time
sys.path.insert(0, {root!r})
import torch.distributed as dist
import eval_final
from fairway.scoring import ablation
from fairway.scoring.mixed import MixedScorer

init, mixed, compared = dist.init_process_group, MixedScorer.mixed, ablation.ablation
dist.init_process_group = lambda kind: init(kind, timeout=datetime.timedelta(seconds=10))

def late(work):
    def wait_and_work(*arguments):
        time.sleep(12)
        return work(*arguments)
    return wait_and_work

MixedScorer.mixed, ablation.ablation = late(mixed), late(compared)
code = eval_final.main()
print(f"rank {{os.environ['RANK']}} leaves after {{time.monotonic() - {began}:.0f}} s", flush=True)
os._exit(code)
"""


@pytest.mark.slow
def test_a_first_rank_that_needs_longer_than_the_timeout_gives_the_score_of_one(
    finished, env, tmp_path
):
    """The first rank sleeps for longer than the process group waits, twice; no rank waits then."""
    _, _, one = finished
    script = tmp_path / "late.py"
    script.write_text(SLOW_FIRST_RANK.format(root=str(ROOT), began=time.monotonic()))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, script, "--compare"],
        env=env(tmp_path, DEVICE="cpu"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "eval/score.json").read_text())
    assert two["world_size"] == 2 and abs(one["val_bpb"] - two["val_bpb"]) < 1e-9
    assert [row["name"] for row in two["ablation"]] == [row["name"] for row in one["ablation"]]
    left = {rank: int(s) for rank, s in re.findall(r"rank (\d) leaves after (\d+) s", done.stdout)}
    assert left["0"] - left["1"] >= 24


@pytest.mark.slow
def test_two_ranks_that_learn_give_the_scores_of_one(env, tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    scores = []
    for name, launcher in (("one", (sys.executable,)), ("two", torchrun)):
        settings = env(tmp_path / name, TTT="chunks", TTT_CHUNK=512, DEVICE="cpu")
        done = run(settings, launcher=launcher)
        assert done.returncode == 0, done.stderr[-2000:]
        scores.append(np.load(tmp_path / name / "eval/final_logp.npy"))
    assert len(scores[0]) > 1024 and np.abs(scores[0] - scores[1]).max() < 1e-5


def test_the_score_alone_needs_one_neural_pass_and_no_other_mixture(finished, env, here, tmp_path):
    _, _, compared = finished
    done = here(eval_final.main, env(tmp_path), [])
    score = json.loads((tmp_path / "eval/score.json").read_text())
    assert [rung["name"] for rung in score["ladder"]] == LADDER[1:]
    assert score["val_bpb"] == compared["val_bpb"] and "ablation" not in score
    assert not (tmp_path / "eval/columns/blocks").exists() and "ablation:" not in done.stdout
    assert compared["ablation"][-1]["name"] == "all, delayed"


def test_the_score_is_on_disk_before_other_mixtures_are_made(env, tmp_path, here, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "ablation", interrupt)
    assert here(eval_final.main, env(tmp_path), ["--compare"]).returncode == 130
    score = json.loads((tmp_path / "eval/score.json").read_text())
    assert len(score["ladder"]) == 3 and "ablation" not in score


def test_ranks_share_the_cores_whatever_torchrun_tells_openmp(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16), raising=False)
    assert usable_threads(1) == torch.get_num_threads()
    assert [usable_threads(world) for world in (2, 8, 32)] == [8, 2, 1]
    assert [rows_ahead(EvalConfig(ngram_memory_mb=72), n) for n in (1, 2)] == [0, 1 << 20]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(CHECKPOINT="nowhere.ptz"), "nowhere.ptz: cannot be read (No such file or directory)"),
        (
            dict(VAL_FILES="nothing_*.bin"),
            "no shards match nothing_*.bin; run `make data`, or set VAL_FILES or DATA_PATH",
        ),
        (dict(EVAL_STRIDES=3), "EVAL_STRIDES=3 is no setting; did you mean EVAL_STRIDE?"),
        (dict(EVAL_MODE="slide"), "EVAL_MODE is 'slide'; it must be one of sliding, cached"),
        (
            dict(OUT_DIR="/proc/none"),
            "/proc/none: No such file or directory; free space, or set OUT_DIR to another folder",
        ),
    ],
)
def test_mistakes_end_in_one_line(env, tmp_path, here, settings, expected):
    done = here(eval_final.main, env(tmp_path, **settings), [])
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("eval_final: error: ") and expected in done.stderr


@pytest.mark.parametrize(
    "settings, options, expected",
    [
        (
            dict(TTT="bias"),
            ["--prove", "100"],
            "TTT is bias, but --prove decodes with a fixed model",
        ),
        (dict(), ["--prove", "1"], "--prove is 1; it takes 2 tokens or more"),
        (dict(), ["--prove", "-5"], "--prove is -5"),
    ],
)
def test_what_cannot_be_proved_is_refused_before_it_is_scored(
    env, tmp_path, here, settings, options, expected
):
    done = here(eval_final.main, env(tmp_path, **settings), options)
    assert done.returncode == 1 and expected in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, options, part",
    [
        (dict(TTT="bias"), [], "TTT=bias needs fairway.scoring.adaptation"),
        (dict(), ["--compare"], "--compare needs fairway.scoring.ablation"),
        (dict(USE_CORRECTION=1), [], "USE_CORRECTION=1 needs fairway.correction"),
        (dict(), ["--prove", "9"], "--prove needs fairway.compression"),
        (dict(), ["--certify"], "--certify needs fairway.certificate"),
    ],
)
def test_a_part_that_a_record_does_not_ship_is_named_before_it_is_scored(
    env, tmp_path, here, monkeypatch, settings, options, part
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = here(eval_final.main, env(tmp_path, **settings), options)
    assert done.returncode == 1 and done.stderr.startswith(
        f"eval_final: error: {part}, which a record lacks"
    )
    assert done.stderr.endswith("run it from a checkout\n") and list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_one_line(here):
    done = here(eval_final.main, {}, ["--certifi"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "eval_final: error: unknown option --certifi; did you mean --certify?; "
        "see eval_final.py --help\n"
    )


def test_texts_too_short_for_a_window_or_a_certificate(env, tmp_path, corpus, here):
    tokens = read_shard(corpus.folder / "tiny_val_000000.bin")
    write_shard(tmp_path / "short_val_0.bin", tokens[:20])
    settings = env(tmp_path, VAL_FILES=tmp_path / "short_val_0.bin")
    assert here(eval_final.main, settings, []).returncode == 0
    refused = here(eval_final.main, settings, ["--certify"])
    assert refused.returncode == 1 and "holds 20 tokens; --certify needs 128" in refused.stderr


def test_the_score_is_on_disk_before_it_is_judged(env, tmp_path, corpus, here, monkeypatch):
    """An interrupted certificate costs no score."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation_verdicts, "judge_evaluation", interrupt)
    tokens = read_shard(corpus.folder / "tiny_val_000000.bin")
    write_shard(tmp_path / "short_val_0.bin", tokens[:200])
    settings = env(tmp_path, VAL_FILES=tmp_path / "short_val_0.bin")
    assert here(eval_final.main, settings, ["--certify"]).returncode == 130
    score = json.loads((tmp_path / "eval/score.json").read_text())
    assert score["tokens"] == 199 and score["val_bpb"] > 0 and score["certificate"] is None
    assert not (tmp_path / "eval/certificate.json").exists()


def test_no_bar_is_drawn_into_a_file():
    """Tests capture stderr in a file."""
    ranks = [Runtime(rank, 2, torch.device("cpu"), "cpu") for rank in (0, 1)]
    assert all(Evaluation.bar(SimpleNamespace(rt=rt), "rows", 9).disable for rt in ranks)


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        eval_final.main({}, ["--help"])
    out = capsys.readouterr().out
    assert done.value.code == 0 and all(f.name.upper() in out for f in fields(EvalConfig))


def test_a_table_is_attached_and_read_back(env, trained_artifact, corpus, tmp_path, here):
    copy = tmp_path / "final_model.int6.ptz"
    copy.write_bytes(trained_artifact.read_bytes())
    built = here(
        build_correction_table.main,
        ["--artifact", str(copy), "--val", str(corpus.folder / "*_val_*.bin"), "--attach"],
    )
    assert built.returncode == 0, built.stderr
    found = json.loads(built.stdout.splitlines()[-1])
    assert found["entries"] > 0 and found["oracle_bpb"] < found["neural_bpb"] < found["charged_bpb"]
    read = here(eval_final.main, env(tmp_path, CHECKPOINT=copy, USE_CORRECTION=1), [])
    correction = json.loads((tmp_path / "eval/score.json").read_text())["correction"]
    assert (
        read.returncode == 0 and correction["stored"] and correction["entries"] == found["entries"]
    )
    sidecar = tmp_path / "final_model.int6.ptz.corrections"
    sidecar.write_bytes(sidecar.read_bytes()[:-3])
    assert (
        "cut short"
        in here(eval_final.main, env(tmp_path, CHECKPOINT=copy, USE_CORRECTION=1), []).stderr
    )


def test_a_budget_that_holds_nothing_is_refused_in_one_line(trained_artifact, corpus, here):
    done = here(
        build_correction_table.main,
        [
            "--artifact",
            str(trained_artifact),
            "--val",
            str(corpus.folder / "*_val_*.bin"),
            "--budget",
            "10",
        ],
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "raise --budget" in done.stderr
