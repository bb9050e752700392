"""train_gpt.py run as its users run it: what it prints, writes, survives and refuses."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import own_signals
from models import STATEFUL

import train_gpt
from fairway.artifact_reader import read_artifact
from fairway.shards import write_shard
from train_gpt import Config, Runtime, UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "train_gpt.py")
CPU = Runtime(0, 1, torch.device("cpu"), "cpu")
QUICK = dict(
    ITERATIONS=3, CODEC="brotli", TRAIN_LOG_EVERY=1, MAX_WALLCLOCK_SECONDS=0, HOLDOUT_TOKENS=1024
)
LONG = QUICK | STATEFUL | dict(ITERATIONS=20, EXACT_SUMS=1, SAMPLED_FRAC=0.3, SAMPLED_PIECES=16)
LONG |= dict(MODEL_DIM=32, TRAIN_BATCH_TOKENS=1024, VAL_BATCH_SIZE=8192)
ALL_ON = dict(
    PRESET="frontier",
    COMPILE=0,
    NUM_LAYERS=5,
    MODEL_DIM=64,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_SEQ_LEN=64,
    TRAIN_BATCH_TOKENS=1024,
    ITERATIONS=6,
    WARMUP_STEPS=0,
    VAL_BATCH_SIZE=8192,
    HOLDOUT_TOKENS=1024,
    ROPE_DIMS=8,
    PARALLEL_START_LAYER=4,
    LOOP_START=1,
    LOOP_END=2,
    LOOP_AT_FRAC=0.3,
    MAX_WALLCLOCK_SECONDS=0,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=64,
    QAT_START_FRAC=0.5,
    SWA_START_FRAC=0.5,
    SWA_EVERY=1,
    CODEC="ans",
    MLP_BITS=5,
    VAL_LOSS_EVERY=3,
)


class Finished:
    """A run's folder once it has ended."""

    def __init__(self, folder: Path, text: str):
        self.folder, self.text = folder, text
        self.events = [
            json.loads(line) for line in (folder / "logs" / "test.jsonl").read_text().splitlines()
        ]

    def all(self, event: str) -> list[dict]:
        return [e for e in self.events if e["event"] == event]

    def one(self, event: str) -> dict:
        (found,) = self.all(event)
        return found

    @property
    def losses(self) -> list[float]:
        return [e["loss"] for e in self.all("train")]

    @property
    def artifact(self) -> Path:
        return self.folder / "final_model.int6.ptz"


@pytest.fixture(scope="module")
def train_here(trainer_env):
    """Return `train_here(folder, **settings)`, which trains in this process."""

    def run(folder: Path, **settings) -> Finished:
        screen = io.StringIO()
        with own_signals(90), contextlib.redirect_stdout(screen):
            train_gpt.main(trainer_env(folder, **settings))
        return Finished(folder, screen.getvalue())

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, run_trainer) -> Finished:
    """One run with everything of the smoke preset that can show in a log."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_trainer(
        folder,
        ITERATIONS=12,
        QAT_START_FRAC=0.5,
        SWA_START_FRAC=0.4,
        SWA_EVERY=2,
        EMA_DECAY=0.99,
        VAL_LOSS_EVERY=6,
        GPTQ=1,
        WARMUP_STEPS=2,
        MAX_WALLCLOCK_SECONDS=0,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return Finished(folder, done.stdout)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, train_here) -> Finished:
    return train_here(tmp_path_factory.mktemp("quick"), **QUICK)


LOGS = {"logs/test.txt", "logs/test.jsonl"}


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def one_line(stderr: str) -> str:
    assert "Traceback" not in stderr
    (line,) = stderr.splitlines()
    assert line.startswith("train_gpt: error: ")
    return line


# ---- What a run says and writes ------------------------------------------------------------------
def test_a_run_writes_its_artifact_its_model_and_two_logs(whole):
    assert files(whole.folder) == LOGS | {
        "checkpoint.pt",
        "final_model.int6.ptz",
        "final_model.pt",
        "runs.jsonl",
    }


def test_the_log_file_opens_with_the_source_and_has_what_the_screen_has(whole):
    log = (whole.folder / "logs" / "test.txt").read_text(encoding="utf-8")
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    assert log.startswith(source) and source.startswith('"""Train a language model')
    rest = log[len(source) :]
    assert (
        rest.startswith("\n" + "=" * 100 + "\nRunning Python 3.") and "\nRunning PyTorch 2." in rest
    )
    assert rest.split("\nsettings: ", 1)[1].split("\n", 1)[1] == whole.text


def test_the_challenges_parsers_find_their_lines(whole):
    """The lines of the challenge, in the order in which a run prints them."""
    number, four, eight = r"\d+", r"\d+\.\d{4}", r"\d+\.\d{8}"
    wanted = [
        r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S+",
        r"train_loader:dataset:\S+ train_shards:2\b",
        rf"val_loader:shards pattern=\S+ tokens:{number}",
        rf"model_params:{number}$",
        r"world_size:1 grad_accum_steps:1$",
        r"sdp_backends:FLASH_ATTENTION$",  # of PyTorch's kernels on a CPU, the one that it takes
        r"attention_mode:gqa num_heads:4 num_kv_heads:2$",
        r"tie_embeddings:True embed_lr:\S+ head_lr:0.0 matrix_lr:\S+ scalar_lr:\S+$",
        r"train_batch_tokens:2048 train_seq_len:64 iterations:12 warmup_steps:2 "
        r"max_wallclock_seconds:0.000$",
        r"seed:1337$",
        r"warmup_step:1/2$",
        r"warmup_step:2/2$",
        rf"step:0/12 val_loss:{four} val_bpb:{four} train_time:{number}ms step_avg:\d+\.\d\dms$",
        rf"step:1/12 train_loss:{four} train_time:{number}ms step_avg:\d+\.\d\dms",
        rf"step:6/12 val_loss:{four} val_bpb:{four} train_time:{number}ms step_avg:\d+\.\d\dms$",
        rf"step:12/12 train_loss:{four} train_time:{number}ms step_avg:\d+\.\d\dms",
        rf"step:12/12 val_loss:{four} val_bpb:{four}",
        rf"Serialized model: {number} bytes$",
        rf"Code size: {number} bytes packed$",
        rf"Serialized model int6\+\w+: {number} bytes \(.*ratio:\d+\.\d\dx.*\)$",
        rf"Total submission size int6\+\w+: {number} bytes",
        rf"final_int6_\w+_roundtrip val_loss:{four} val_bpb:{four} eval_time:{number}ms$",
        rf"final_int6_\w+_roundtrip_exact val_loss:{eight} val_bpb:{eight}$",
    ]
    at = 0
    for pattern in wanted:
        found = re.compile(rf"^{pattern}", re.M).search(whole.text, at)
        assert found, pattern
        at = found.end()


def test_sizes_in_the_log_are_those_of_the_files(whole):
    size, event = whole.artifact.stat().st_size, whole.one("artifact")
    said = {
        name: int(value)
        for name, value in re.findall(r"^([A-Z][\w +]+): (\d+) bytes", whole.text, re.M)
    }
    codec = event["codec"]
    raw = (whole.folder / "final_model.pt").stat().st_size
    assert said == {
        "Serialized model": raw,
        "Code size": event["code_bytes"],
        f"Serialized model int6+{codec}": size,
        f"Total submission size int6+{codec}": size + event["code_bytes"],
    }
    assert event["bytes"] == size and event["sha256"] == train_gpt.file_sha256(whole.artifact)
    assert min((e["bytes"], e["codec"]) for e in whole.all("codec")) == (size, codec)


def test_events_are_complete_and_equal_to_the_text(whole):
    assert {e["event"] for e in whole.events} == set(
        "start model size val train qat averages rounding codec quantised artifact final "
        "checkpoint".split()
    )
    assert all(type(e["time"]) is float for e in whole.events)
    lines = re.findall(r"^step:(\d+)/12 train_loss:(\S+)", whole.text, re.M)
    assert lines == [(str(e["step"]), f"{e['loss']:.4f}") for e in whole.all("train")]
    assert [int(step) for step, _ in lines] == [*range(1, 11), 12]
    lines = re.findall(r"^step:(\d+)/12 val_loss:(\S+) val_bpb:(\S+)", whole.text, re.M)
    assert lines == [
        (str(e["step"]), f"{e['loss']:.4f}", f"{e['bpb']:.4f}") for e in whole.all("val")
    ]
    assert [int(step) for step, *_ in lines] == [0, 6, 12]
    start, model = whole.one("start"), whole.one("model")
    assert set(start["sha256"]) == {"code", "data", "tokenizer", "settings"}
    assert all(f"{name}_sha256:{value}" in whole.text for name, value in start["sha256"].items())
    assert start["settings"]["iterations"] == 12 and start["preset"] == "smoke"
    assert model["parameters"] == sum(math.prod(shape) for shape in model["tensors"].values())
    train = whole.all("train")[-1]
    assert train["tokens"] == 12 * 2048 and 0 <= train["lr_scale"] < 0.5 and train["seconds"] > 0


def test_the_final_score_is_that_of_the_artifact_on_disk(whole, corpus):
    """The score is that of single windows in float64, the bytes those of decoded text."""
    artifact = read_artifact(whole.artifact)
    model = train_gpt.build_model(artifact)
    val = np.concatenate(
        [train_gpt.read_shard(p) for p in sorted(corpus.folder.glob("*_val_*.bin"))]
    ).astype(np.int64)
    nats, scored = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(val) - 1, 64):
            window = torch.from_numpy(val[start : start + 65])
            log_p = model.logits(window[None, :-1])[0].double().log_softmax(-1)
            nats -= float(log_p.gather(1, window[1:, None]).sum())
            scored += len(window) - 1
    documents = "".join(map(chr, val)).split(chr(train_gpt.BOS_ID))[1:]
    text_bytes = sum(len(corpus.tokenizer.decode([ord(c) for c in d]).encode()) for d in documents)
    final = whole.one("final")
    assert (final["tokens"], final["bytes"]) == (scored, text_bytes) == (len(val) - 1, text_bytes)
    assert final["loss"] == pytest.approx(nats / scored, abs=1e-6)
    assert final["bpb"] == pytest.approx(nats / math.log(2) / text_bytes, abs=1e-6)
    printed = re.search(r"_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)$", whole.text, re.M)
    assert printed.groups() == (f"{final['loss']:.8f}", f"{final['bpb']:.8f}")


def test_the_artifact_carries_the_tokenizer(whole, corpus):
    assert (
        read_artifact(whole.artifact).tokenizer == (corpus.folder / "tokenizer.model").read_bytes()
    )


def test_rounding_turns_on_and_reaches_the_forward_pass(whole):
    qat = whole.one("qat")
    assert qat["step"] == 6
    difference = re.search(r"^qat:on step:6 k:\S+ max_loss_difference:(\S+)$", whole.text, re.M)
    assert 1e-4 < float(difference[1]) < 1


def test_averages_and_rounding_are_chosen_on_held_out_tokens(whole):
    averages, rounding = whole.one("averages"), whole.one("rounding")
    scores = {n: averages[n] for n in ("last", "swa", "ema")}
    assert averages["kept"] == min(scores, key=scores.get)
    shown = " ".join(f"{n}:{v:.4f}" for n, v in scores.items())
    assert f"averages:{shown} kept:{averages['kept']}\n" in whole.text
    assert "swa:averaged 4 checkpoints\n" in whole.text  # steps 6, 8, 10, 12
    assert (
        rounding["kept"] == min(("nearest", "gptq"), key=rounding.get)
        and rounding["nearest"] != rounding["gptq"]
    )
    assert re.search(r"^gptq:collected \d+ Hessians", whole.text, re.M)


GOLDEN = [5.9479, 4.9748, 4.2217]  # first losses of the smoke preset on the tests' corpus


def test_first_losses_are_golden(quick):
    assert quick.losses == pytest.approx(GOLDEN, abs=1e-3)


def test_the_loss_falls(whole):
    first, *_, last = whole.losses
    assert first == pytest.approx(math.log(384), abs=0.05) and last < first - 1.5
    assert whole.all("val")[-1]["loss"] < whole.all("val")[0]["loss"] - 1.5


# ---- Validation ----------------------------------------------------------------------------------
@pytest.mark.parametrize("tokens", [2, 3, 8, 9, 10, 16, 17, 18, 63, 64, 65, 66, 129, 200])
@pytest.mark.parametrize("batch", [1, 64, 8 * 8 * 3, 10_000])
def test_validation_counts_every_target_once(tokens, batch):
    """With a loss that is the target itself, the mean is that of all targets, the tail included."""
    cfg = Config(train_seq_len=8, train_batch_tokens=64, val_batch_size=batch)
    ids, seen, shapes = np.arange(1, tokens + 1).astype("<u2"), [], set()

    def loss(x, y):
        shapes.add(tuple(y.shape))
        seen.extend(y[y == x + 1].tolist())  # the rest is padding
        return torch.where(y == x + 1, y, 1_000_000).double() ** 2

    got = train_gpt.mean_nats(loss, ids, cfg, CPU)
    assert sorted(seen) == list(range(2, tokens + 1)) and len(shapes) == 1
    assert got == pytest.approx(np.mean(np.arange(2, tokens + 1, dtype=np.float64) ** 2))


def test_validation_does_not_depend_on_its_batch_size(whole, corpus):
    artifact = read_artifact(whole.artifact)
    model = train_gpt.build_model(artifact)
    val = train_gpt.read_shard(next(corpus.folder.glob("*_val_*.bin")))[:2000]
    scores = [
        train_gpt.mean_nats(model, val, dataclasses.replace(artifact.config, val_batch_size=b), CPU)
        for b in (1, 8 * 64 * 3, 8 * 64 * 40)
    ]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-6)


# ---- Equal steps ---------------------------------------------------------------------------------
def test_warm_up_is_undone_to_the_bit(quick, train_here, tmp_path):
    warmed = train_here(tmp_path, **QUICK, WARMUP_STEPS=3)
    assert warmed.losses == quick.losses
    assert warmed.one("final")["loss"] == quick.one("final")["loss"]


def test_micro_batches_change_nothing(quick, train_here, tmp_path):
    for i, tokens in enumerate((64, 192)):
        micro = train_here(tmp_path / str(i), **QUICK, MICRO_BATCH_TOKENS=tokens)
        assert micro.losses == pytest.approx(quick.losses, abs=1e-5)


def test_the_clock_ends_a_run(train_here, tmp_path):
    run = train_here(
        tmp_path,
        **QUICK
        | dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=4, TRAIN_LOG_EVERY=1000)
        | dict(HOLDOUT_TOKENS=512),
        SWA_START_FRAC=0.1,
        SWA_EVERY=1,
    )
    stop = re.search(
        r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$", run.text, re.M
    )
    assert int(stop[2]) == run.all("train")[-1]["step"] > 1
    assert run.all("train")[-1]["lr_scale"] < 0.6  # it falls to 0 within the next step
    # The averages were compared after the last step, and within the clock.
    chosen = re.search(r"^chosen:train_time:(\d+)ms reserve:(\d+\.\d+)s( over.*)?$", run.text, re.M)
    reserve = 1000 * float(chosen[2])
    assert int(stop[1]) < int(chosen[1]) and int(stop[1]) <= 4000 - reserve + 300
    assert (int(chosen[1]) > 4000) == bool(chosen[3])
    assert run.text.index("averages:last:") < chosen.start()


def test_a_clock_too_short_for_the_choices_is_refused(train_here, tmp_path):
    with pytest.raises(
        UserError, match="MAX_WALLCLOCK_SECONDS is 0.3; .* s, more than half; raise"
    ):
        train_here(tmp_path, **QUICK | dict(MAX_WALLCLOCK_SECONDS=0.3))


# ---- Several processes ---------------------------------------------------------------------------
def launch(
    ranks: int, env: dict[str, str], out_dir: Path, script: str | Path = SCRIPT, **kwargs
) -> subprocess.Popen:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*torchrun, f"--nproc_per_node={ranks}", script],
        env=env,
        cwd=out_dir,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def run_ranks(
    ranks: int, env: dict[str, str], folder: Path, script: str | Path = SCRIPT
) -> Finished:
    """Train with this number of processes, and return the run."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    launched = launch(ranks, env, folder, script, **pipes)
    try:
        out, err = launched.communicate(timeout=600)
    finally:
        end_group(launched)
    assert launched.returncode == 0, err
    return Finished(folder, out)


@pytest.mark.parametrize(
    ("ranks", "exact"),
    [
        (2, 1),
        pytest.param(4, 1, marks=pytest.mark.slow),
        pytest.param(8, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(8, 0, marks=pytest.mark.slow),
    ],
)
def test_several_processes_take_the_steps_of_one(ranks, exact, trainer_env, train_here, tmp_path):
    settings = LONG | dict(GPTQ=0, ITERATIONS=10, EXACT_SUMS=exact)
    if not exact:  # a weight that rounds the other way moves a loss by 1e-4; passes are other ones
        settings |= dict(QAT_START_FRAC=1, SAMPLED_FRAC=0)
    one, folder = train_here(tmp_path / "one", **settings), tmp_path / "several"
    folder.mkdir()
    several = run_ranks(ranks, trainer_env(folder, **settings), folder)
    assert several.one("start")["world_size"] == ranks and len(several.losses) == 10
    if exact:
        assert several.losses == one.losses and f"grad_accum_steps:{8 // ranks}\n" in several.text
    assert several.losses == pytest.approx(one.losses, abs=1e-5)
    assert several.one("final")["tokens"] == one.one("final")["tokens"]
    # A weight between two steps may round the other way.
    assert several.one("final")["loss"] == pytest.approx(one.one("final")["loss"], abs=1e-3)


# train_gpt.py on a disk that takes two seconds more for a checkpoint.
SLOW_DISK = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
save = train_gpt.save
train_gpt.save = lambda path, state: time.sleep(2) or save(path, state)
code = train_gpt.run_main()
sys.stdout.flush()
os._exit(code)
"""


@pytest.mark.slow
def test_no_rank_counts_the_time_of_a_checkpoint_as_training(trainer_env, tmp_path):
    script, settings = tmp_path / "slow_disk.py", QUICK | dict(CHECKPOINT_SECONDS=0.001)
    script.write_text(SLOW_DISK)
    run = run_ranks(2, trainer_env(tmp_path, **settings), tmp_path, script)
    saved, trained = run.all("checkpoint"), run.all("train")
    assert [e["step"] for e in saved] == [1, 2, 3, 3] and [e["step"] for e in trained] == [1, 2, 3]
    # Before the line of the third step two checkpoints were written.
    assert saved[1]["time"] - saved[0]["time"] > 2 and trained[-1]["seconds"] < 2


def end_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_within_a_minute(trainer_env, tmp_path):
    env = trainer_env(tmp_path, **QUICK | dict(ITERATIONS=1_000_000))
    with open(tmp_path / "out", "w") as out:
        launched = launch(2, env, tmp_path, stdout=out, stderr=out)
    try:
        wait_for(lambda: "step:3/" in (tmp_path / "out").read_text(), launched)
        environments = {
            p: Path(f"/proc/{p}/environ").read_text().split("\0") for p in children(launched.pid)
        }
        (victim,) = (p for p, env in environments.items() if "RANK=1" in env)
        (other,) = (p for p, env in environments.items() if "RANK=0" in env)
        os.kill(victim, signal.SIGKILL)
        assert launched.wait(timeout=60) != 0
        assert not Path(f"/proc/{other}").exists()
        assert not (tmp_path / "final_model.int6.ptz").exists()
    finally:
        end_group(launched)


def wait_for(holds, process: subprocess.Popen, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, "the run has ended"
        assert time.monotonic() < until, "nothing happened"
        time.sleep(0.01)


# ---- Stopped and resumed -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, train_here) -> Finished:
    return train_here(tmp_path_factory.mktemp("uninterrupted"), **LONG)


def interrupted(
    folder: Path, env: dict, line: str, after_s: float, signum: int
) -> subprocess.CompletedProcess:
    """Start a run, and send it a signal some time after a line of its output."""
    with open(folder / "out", "w") as out:
        started = subprocess.Popen(
            [sys.executable, SCRIPT],
            env=env,
            cwd=folder,
            text=True,
            stdout=out,
            stderr=subprocess.PIPE,
        )
    try:
        wait_for(lambda: line in (folder / "out").read_text(), started)
        time.sleep(after_s)
        started.send_signal(signum)
        _, err = started.communicate(timeout=60)
    finally:
        started.kill()
    return subprocess.CompletedProcess([], started.returncode, (folder / "out").read_text(), err)


def assert_same_end(one: Finished, other: Finished) -> None:
    first, second = (
        torch.load(f.folder / "final_model.pt", weights_only=True) for f in (one, other)
    )
    assert (
        list(first) == list(second)
        and [n for n in first if not torch.equal(first[n], second[n])] == []
    )
    assert one.artifact.read_bytes() == other.artifact.read_bytes()
    assert one.one("final")["loss"] == other.one("final")["loss"]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, trainer_env) -> tuple[subprocess.CompletedProcess, Path]:
    """A run that was stopped before its switches, and its folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    return interrupted(folder, trainer_env(folder, **LONG), "step:4/", 0, signal.SIGTERM), folder


def assert_goes_on(
    signum: int,
    done: subprocess.CompletedProcess,
    folder: Path,
    uninterrupted: Finished,
    train_here,
) -> None:
    assert done.returncode == 128 + signum and "Traceback" not in done.stderr
    assert re.search(
        rf"^stopped by {signal.Signals(signum).name}\b.*RESUME=1 continues",
        done.stdout + done.stderr,
        re.M,
    )
    assert files(folder) == LOGS | {"checkpoint.pt", "out"}
    resumed = train_here(folder, **LONG, RESUME=1)
    assert (
        4 <= resumed.one("resume")["step"] < 20 and len(resumed.all("start")) == 2
    )  # one log, both parts
    by_step = {e["step"]: e["loss"] for e in resumed.all("train")}
    assert by_step == {e["step"]: e["loss"] for e in uninterrupted.all("train")}
    assert_same_end(uninterrupted, resumed)


def test_a_stopped_run_goes_on_to_the_same_bits(stopped, uninterrupted, train_here, tmp_path):
    done, folder = stopped
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert_goes_on(signal.SIGTERM, done, copy, uninterrupted, train_here)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_other_ranks(
    stopped, uninterrupted, trainer_env, train_here, tmp_path
):
    folder = shutil.copytree(stopped[1], tmp_path / "copy")
    resumed = run_ranks(2, trainer_env(folder, **LONG, RESUME=1), folder)
    by_step = {e["step"]: e["loss"] for e in resumed.all("train")}
    assert by_step == {e["step"]: e["loss"] for e in uninterrupted.all("train")}


@pytest.mark.slow
def test_a_run_interrupted_after_its_switches_goes_on_to_the_same_bits(
    uninterrupted, trainer_env, train_here, tmp_path
):
    env = trainer_env(tmp_path, **LONG)
    done = interrupted(tmp_path, env, "layer_loop:enabled", 0, signal.SIGINT)
    assert_goes_on(signal.SIGINT, done, tmp_path, uninterrupted, train_here)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(
    uninterrupted, trainer_env, train_here, tmp_path
):
    settings = LONG | dict(CHECKPOINT_SECONDS=0.01)
    pause = np.random.default_rng().random() * 0.3
    done = interrupted(
        tmp_path, trainer_env(tmp_path, **settings), "step:3/", pause, signal.SIGKILL
    )
    assert done.returncode == -signal.SIGKILL
    resumed = train_here(tmp_path, **LONG, RESUME=1)
    assert 1 <= resumed.one("resume")["step"] < 20, pause
    assert_same_end(uninterrupted, resumed)


def refused(trainer_env, folder: Path, **settings) -> str:
    """The message of a run that is refused; it must leave the folder as it was."""
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with (
        own_signals(60),
        pytest.raises(UserError) as caught,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        train_gpt.main(trainer_env(folder, **LONG | dict(RESUME=1) | settings))
    assert "\n" not in str(caught.value)
    after = {
        name: (folder / name).read_bytes() for name in files(folder) if not name.startswith("logs")
    }
    assert after == {
        name: content for name, content in before.items() if not name.startswith("logs")
    }
    return str(caught.value)


def test_resuming_with_another_setting_is_refused(stopped, trainer_env):
    _, folder = stopped
    assert refused(trainer_env, folder, MATRIX_LR=0.5) == (
        "MATRIX_LR is 0.5, but the checkpoint was made with 0.025; set it to that, or start again "
        "without RESUME"
    )
    assert "NUM_LAYERS is 3, but the checkpoint was made with 2" in refused(
        trainer_env, folder, NUM_LAYERS=3
    )


def test_resuming_on_other_data_is_refused(stopped, trainer_env, corpus, tmp_path):
    other = shutil.copytree(corpus.folder, tmp_path / "other")
    tokens = np.array(train_gpt.read_shard(other / "tiny_train_000000.bin"))
    write_shard(other / "tiny_train_000000.bin", tokens[::-1])
    message = refused(trainer_env, stopped[1], DATA_PATH=other)
    assert "has other shards than the checkpoint" in message


def test_a_damaged_or_missing_checkpoint_is_refused(stopped, trainer_env, tmp_path):
    whole = (stopped[1] / "checkpoint.pt").read_bytes()
    size = len(whole)
    flipped = bytearray(whole)
    flipped[size // 2] ^= 64
    for i, content in enumerate(
        (b"", b"PK", whole[:1000], whole[: size // 2], whole[:-1], bytes(flipped))
    ):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "checkpoint.pt").write_bytes(content)
        message = refused(trainer_env, folder)
        assert re.search(r"checkpoint\.pt is damaged \(.*\); unset RESUME", message), i
    assert re.match(
        r"RESUME is 1, but there is no .*checkpoint\.pt; set OUT_DIR, or unset RESUME",
        refused(trainer_env, tmp_path / "nowhere"),
    )


# ---- What goes wrong -----------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_with_its_step(trainer_here, tmp_path):
    done = trainer_here(tmp_path, ITERATIONS=20, MATRIX_LR=1e30, CHECKPOINT_SECONDS=0.001)
    assert done.returncode == 1
    line = one_line(done.stderr)
    step = re.search(
        r"the loss of step (\d+) is not finite; the last checkpoint: (\S+); lower MATRIX_LR", line
    )
    assert step and 2 <= int(step[1]) <= 5, line
    assert not (tmp_path / "final_model.int6.ptz").exists()
    if (tmp_path / "checkpoint.pt").exists():
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert all(t.isfinite().all() for t in saved["model"].values()) and saved["scalars"][
            "step"
        ] < int(step[1])
        assert step[2].endswith("checkpoint.pt")
    else:
        assert step[2] == "None"


def test_an_out_dir_that_cannot_be_written_is_one_line(trainer_here, corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = trainer_here(tmp_path / "cwd", OUT_DIR=tmp_path / "file" / "out")
    assert done.returncode == 1
    assert str(tmp_path / "file") in one_line(done.stderr)
    assert files(tmp_path) == {"file"} and (tmp_path / "file").read_text() == "in the way"


@contextlib.contextmanager
def small_disk(limit: int):
    """Let this process write no file of more than `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(trainer_here, tmp_path):
    with small_disk(250_000):
        done = trainer_here(tmp_path, **QUICK, CHECKPOINT_SECONDS=0.001)
    assert done.returncode == 1
    assert "step:3/3 train_loss" in done.stdout, (
        "a checkpoint that cannot be written must not end the run"
    )
    assert "warning: no checkpoint written, the last one stays" in done.stdout
    one_line(done.stderr)
    assert files(tmp_path) == LOGS


def test_a_budget_that_cannot_be_met_ends_the_run_before_it_costs_anything(trainer_here, tmp_path):
    code = train_gpt.packed_code_bytes([ROOT / "train_gpt.py"])
    done = trainer_here(tmp_path, SIZE_BUDGET_BYTES=code + 1000 + 5000)
    assert done.returncode == 1 and "train_loss" not in done.stdout
    said = re.search(
        r"the artifact has (\d+) bytes, (\d+) more than "
        rf"SIZE_BUDGET_BYTES={code + 6000} leaves it; lower NUM_LAYERS",
        one_line(done.stderr),
    )
    assert int(said[1]) - 5000 == int(said[2]) > 0
    assert files(tmp_path) == LOGS


@pytest.mark.parametrize("codec", ["zstd", "brotli", "ans"])
def test_a_tight_budget_is_met_by_every_codec(codec, quick, train_here, tmp_path):
    code, loose = quick.one("artifact")["code_bytes"], quick.artifact.stat().st_size
    budget = code + 3000 + int(0.7 * loose)
    run = train_here(
        tmp_path, **QUICK | dict(CODEC=codec, SIZE_BUDGET_BYTES=budget, SIZE_MARGIN_BYTES=3000)
    )
    size, event = run.artifact.stat().st_size, run.one("artifact")
    assert size + event["code_bytes"] <= budget - 3000
    assert size > 0.9 * (budget - 3000 - event["code_bytes"])  # and not wasted
    assert event["codec"] == codec == read_artifact(run.artifact).header["codec"]
    assert f"final_int6_{codec}_roundtrip_exact " in run.text
    assert event["k"] > quick.one("artifact")["k"]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(MUON_WEIGHT_DECAY=0.04),
            "MUON_WEIGHT_DECAY=0.04 is no setting; did you mean MUON_WD? See --help",
        ),
        (dict(NUM_LAYERS=0), "NUM_LAYERS is 0; it must be from 1 to 256"),
        (
            dict(DATA_PATH="not/here"),
            "no *_train_*.bin in not/here; run `make data`, or set DATA_PATH",
        ),
    ],
    ids=["misspelt", "out of range", "no shards"],
)
def test_bad_input_is_one_line_and_leaves_no_files(settings, message, trainer_here, tmp_path):
    done = trainer_here(tmp_path, **settings)
    assert (done.returncode, done.stdout) == (1, "")
    assert one_line(done.stderr) == f"train_gpt: error: {message}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_help_lists_every_setting_and_other_arguments_are_refused(tmp_path):
    helped, odd = (
        subprocess.run(
            [sys.executable, SCRIPT, word],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=dict(PATH=os.environ["PATH"]),
        )
        for word in ("--help", "--iterations=3")
    )
    assert (helped.returncode, helped.stderr, odd.returncode) == (0, "", 2)
    listed = re.findall(r"^([A-Z][A-Z0-9_]+) ", helped.stdout, re.M)
    assert {f.name.upper() for f in dataclasses.fields(Config)} | {"PRESET"} <= set(listed)
    assert all(f"PRESET={name}: " in helped.stdout for name in train_gpt.PRESETS)
    assert all(f.metadata["help"] in helped.stdout for f in dataclasses.fields(Config))
    assert list(tmp_path.iterdir()) == []


# ---- Everything at once --------------------------------------------------------------------------
def test_all_features_at_once_train_export_and_score(train_here, tmp_path):
    run = train_here(tmp_path, **ALL_ON)
    assert run.losses[-1] < run.losses[0] - 1
    assert (
        "layer_loop:enabled step:2 passes:9\n" in run.text
        and run.one("qat")["max_loss_difference"] > 1e-4
    )
    artifact = read_artifact(run.artifact)
    assert artifact.header["looping"] is True
    assert {
        name: bits
        for name, (bits, *_) in artifact.header["tensors"].items()
        if name.startswith("blocks.0.")
    } == {
        "blocks.0.attn_scale": 16,
        "blocks.0.mlp_scale": 16,
        "blocks.0.resid_mix": 16,
        "blocks.0.attn.q_gain": 16,
        "blocks.0.attn.gate": 16,
        **{f"blocks.0.attn.{n}.weight": 6 for n in ("q", "k", "v", "proj")},
        **{f"blocks.0.mlp.{n}.weight": 5 for n in ("fc", "proj")},
    }
    kept = run.one("averages")
    last_val = run.all("val")[-1]["loss"]
    assert abs(run.one("final")["loss"] - last_val) < 0.5 and kept["kept"] in ("last", "swa", "ema")


@pytest.mark.slow
def test_compiled_and_plain_runs_agree_and_rounding_is_not_frozen(
    run_trainer, train_here, tmp_path
):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    settings = QUICK | dict(
        ITERATIONS=6, QAT_START_FRAC=0.5, LOOP_END=1, NUM_LOOPS=1, LOOP_AT_FRAC=0.3, NUM_LAYERS=3
    )
    plain = train_here(tmp_path / "plain", **settings)
    done = run_trainer(tmp_path / "compiled", timeout=600, **settings, COMPILE=1)
    assert done.returncode == 0, done.stderr
    compiled = Finished(tmp_path / "compiled", done.stdout)
    assert "compile:torch.compile runs with the first step" in done.stdout
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-4)
    difference = compiled.one("qat")["max_loss_difference"]
    assert difference > 1e-4 and difference == pytest.approx(
        plain.one("qat")["max_loss_difference"], rel=0.05
    )


@pytest.mark.slow
def test_a_reader_that_leaves_costs_nothing(trainer_env, tmp_path):
    """`| head -1`: --help ends in silence, and a run goes on to its artifact."""
    for command, made in (("--help", False), ("", True)):
        done = subprocess.run(
            f"{sys.executable} {train_gpt.__file__} {command} | head -1",
            shell=True,
            text=True,
            capture_output=True,
            timeout=120,
            env=trainer_env(tmp_path, **QUICK | dict(ITERATIONS=2)),
        )
        assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr
        assert (tmp_path / "final_model.int6.ptz").exists() == made


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone has the option")
def test_freed_memory_is_used_again():
    """Else the kernel clears each page of a large tensor every time that it is allocated."""
    train_gpt.set_up_runtime(Config(device="cpu"), {})

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(10_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert min(faults() for _ in range(3)) < 1000  # of the 9,766 pages
