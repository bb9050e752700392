"""Measure what each technique of `frontier` gains: a ladder from `baseline`, one technique a rung.

    python bench/ladder.py --list
    python bench/ladder.py --seconds 300 --variants ends
    python bench/ladder.py --tokens 1024000 --variants ladder,leave-one-out --seeds 1337,42,2025
    python bench/ladder.py --table --into docs/RESULTS.md

A run is a shape, a variant, a budget and a seed. It trains in a process of its own, for --seconds
on the trainer's clock or for --steps (--tokens), and its artifact, read back from disk, is scored
on each text of --judges in sliding windows, without experts. With --bytes, the rounding is as
coarse as the artifact needs to fit. A run leaves one JSON file, OUT/raw/GROUP/VARIANT.seedN.json,
and its artifact and logs in OUT/files/GROUP/VARIANT.seedN/, where GROUP is shape, budget and data.
Finished runs are skipped, interrupted ones resume. Each seed runs all variants before the next seed
starts. OUT/GROUP.md and OUT/GROUP.json are the table; --table writes them, for all groups of OUT,
without running anything.

The rung `case` and those above it train on --case-data, which is the text of --data in tokens with
case markers (data/prepare.py --case-ops), and are judged on --case-judges: the same documents.

Variants: `ends` (baseline, consensus, frontier), `ladder` (each rung with all below it),
`leave-one-out` (frontier without one rung), `one-more` (frontier with a rung that it lacks, or with
a patch of bench/trials.py), or names, with commas between. A seed changes the initial weights, not
the order of the text.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import trials
from ladder_table import write_tables
from rungs import BASELINE, SHAPES, Settings, chosen_variants, print_variants

import train_gpt
from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, run_reporting
from fairway.methods import harness, measure
from fairway.methods.cell import error_line, versions, write_json
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import Config, UserError, list_shards

ROOT = Path(train_gpt.__file__).resolve().parent
SCHEMA = 1
LIMIT_SECONDS = 48 * 3600.0  # a run that takes longer is broken
JUDGE_LOG = "judge.txt"
UNREACHED = 10**9  # steps, where the clock ends a run


# ==== A RUN =======================================================================================
@dataclass(frozen=True)
class LadderRun:
    """All that one run is told."""

    shape: str
    variant: str
    settings: Settings  # of shape, variant and budget, for the trainer
    seconds: float  # of training; 0 where steps end it
    steps: int  # 0 where the clock ends it
    seed: int
    data: str  # folder of shards
    tokenizer: str
    judges: dict[str, str]  # name → pattern of shards
    fingerprints: dict[str, str]  # of data and judges: what paths held, where paths may differ
    judge_documents: int  # scored of each judge; 0 = all
    stride: int
    threads: int
    out: str  # OUT/raw/GROUP

    @property
    def name(self) -> str:
        return f"{self.variant}.seed{self.seed}"

    def request(self) -> dict[str, Any]:
        """Return what decides the result; no path is in it."""
        places = ("data", "tokenizer", "judges", "out")
        return {n: v for n, v in asdict(self).items() if n not in places}

    def job(self) -> harness.Job:
        program = (str(Path(__file__).resolve()),)
        return harness.Job(
            self.name, program, asdict(self), header(self), self.threads, LIMIT_SECONDS
        )


def group_name(shape: str, seconds: float, steps: int, data: Path) -> str:
    """Return the name of all runs that one table compares: `cpu-300s-embedded`."""
    budget = f"{seconds:g}s" if seconds else f"{steps}steps"
    return f"{shape}-{budget}-{data.name}"


@functools.cache
def scoring_sha256() -> str:
    """Return a hash of the code that trains and scores."""
    scoring = sorted((ROOT / "fairway" / "scoring").rglob("*.py"))
    digest = hashlib.sha256()
    patches = Path(trials.__file__).resolve()
    for path in [ROOT / "train_gpt.py", ROOT / "fairway" / "artifact_reader.py", patches, *scoring]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def header(run: LadderRun) -> dict[str, Any]:
    """Return what each result begins with, whether the run succeeded or not."""
    environment = {
        "code_sha256": scoring_sha256(),
        "hardware": measure.hardware(),
        "versions": versions(),
    }
    return {"schema": SCHEMA, "data": Path(run.data).name, **run.request()} | {
        "environment": environment,
        "time": round(time.time(), 3),
    }


def is_open(run: LadderRun, retry: bool) -> bool:
    """Return whether a run is left to do: it never was, or others were its settings or texts.

    `retry` runs those again that failed or ran with other code.
    """
    result = harness.read_cell(run.job().result)
    if result is None or any(result.get(n) != v for n, v in run.request().items()):
        return True
    code = result.get("environment", {}).get("code_sha256")
    return retry and (result["status"] != "done" or code != scoring_sha256())


def trainer_environment(run: LadderRun, folder: Path) -> dict[str, str]:
    """Return the trainer's whole environment: nothing that a shell exports changes a run."""
    places = dict(OUT_DIR=str(folder), RUN_ID="train", DATA_PATH=run.data)
    places |= dict(TOKENIZER_PATH=run.tokenizer)
    return {**run.settings, **places, "PRESET": BASELINE, "SEED": str(run.seed)}


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Return the events that the trainer has logged, a line that was cut left out."""
    events, log = [], folder / "logs" / "train.jsonl"
    for line in log.read_text("utf-8").splitlines() if log.exists() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def same_run(run: LadderRun, folder: Path, events: list[dict[str, Any]]) -> bool:
    """Return whether the trainer's log is of this run: equal settings, data and code."""
    start = next((e for e in events if e["event"] == "start"), None)
    if start is None:
        return False
    wanted = asdict(Config.from_env(trainer_environment(run, folder), BASELINE))
    for name in train_gpt.names_with_role(Config, "place", "runtime"):
        wanted.pop(name)
    code = hashlib.sha256((ROOT / "train_gpt.py").read_bytes()).hexdigest()
    settings = {n: v for n, v in start["settings"].items() if n in wanted}
    return (settings, start["sha256"]["code"]) == (wanted, code)


def train(run: LadderRun, folder: Path) -> dict[str, dict[str, Any]]:
    """Train, or resume, or do nothing if that is done; return the last event of each kind."""
    events = read_events(folder)
    (folder / "logs" / JUDGE_LOG).unlink(missing_ok=True)
    resume = same_run(run, folder, events)
    if not (resume and events[-1]["event"] == "final"):
        if not (resume and (folder / "checkpoint.pt").exists()):
            resume = False
            shutil.rmtree(folder, ignore_errors=True)
        train_gpt.main({**trainer_environment(run, folder), "RESUME": str(int(resume))})
    return {event["event"]: event for event in read_events(folder)}


class JudgeLog:
    """A line on how far a text is scored, in a file of its own, every few seconds."""

    def __init__(self, path: Path, name: str, tokens: int):
        self.path, self.name, self.tokens = path, name, tokens
        self.done, self.began, self.next_line = 0, time.perf_counter(), 10.0

    def __call__(self, rows: np.ndarray, _logp: np.ndarray) -> None:
        self.done += len(rows)
        seconds = time.perf_counter() - self.began
        if seconds > self.next_line:
            self.next_line, part = seconds + 10, self.done / self.tokens
            line = f"scoring {self.name} {100 * part:.0f}% eta:{seconds / part - seconds:.0f}s"
            self.path.write_text(line + "\n", "utf-8")


def clock_seconds(folder: Path) -> float:
    """Return the clock of a run at its end, after the choice of weights and rounding."""
    log = (folder / "logs" / "train.txt").read_text("utf-8")
    return int(re.findall(r"^chosen:train_time:(\d+)ms", log, re.MULTILINE)[-1]) / 1000


def tokens_of(tokens: np.ndarray, documents: int) -> int:
    """Return the tokens of the first so many documents, or of all for 0."""
    ends = train_gpt.document_bounds(tokens)[1:]
    return int(ends[: documents or None][-1])


def judge(run: LadderRun, artifact: Path) -> dict[str, dict[str, Any]]:
    """Return the score of an artifact on each text: BPB, tokens, bytes, and the text's hash."""
    shipped, scores = read_artifact(artifact), {}
    runtime = train_gpt.set_up_runtime(Config(), {})
    model = train_gpt.build_model(shipped, runtime.device)
    for name, pattern in run.judges.items():
        cfg = EvalConfig(val_files=pattern, eval_stride=run.stride)
        text = load_text(cfg, shipped)
        count = tokens_of(text.tokens, run.judge_documents) - 1
        text = text._replace(tokens=text.tokens[: count + 1], sizes=text.sizes[:count])
        columns = columns_in_memory(len(text.sizes), {"logp": "f8"})
        log = JudgeLog(artifact.parent / "logs" / JUDGE_LOG, name, len(text.sizes))
        Neural(model, cfg, runtime).fill(text.tokens, columns, on_progress=log)
        counts = {"tokens": len(text.sizes), "bytes": text.bytes, "sha256": text.sha256}
        scores[name] = {"bpb": text.bpb(columns["logp"]), **counts}
    return scores


def finish(run: LadderRun, folder: Path) -> dict[str, Any]:
    """Train and score; return the figures."""
    began = time.perf_counter()
    last = train(run, folder)
    trained, artifact, steps = time.perf_counter(), last["artifact"], last["train"]
    scores = judge(run, folder / Path(artifact["path"]).name)
    kept = {n: last[n]["kept"] for n in ("averages", "rounding") if n in last}
    return {
        "device": last["start"]["device"],
        "steps_taken": steps["step"],
        "tokens": steps["tokens"],
        "training_seconds": steps["seconds"],
        "clock_seconds": clock_seconds(folder),
        "tokens_per_second": steps["tokens"] / steps["seconds"],
        "parameters": last["model"]["parameters"],
        "artifact_bytes": artifact["bytes"],
        "total_bytes": artifact["bytes"] + artifact["code_bytes"],
        "codec": artifact["codec"],
        "kept": kept,
        "roundtrip_bpb": last["final"]["bpb"],
        "judged": scores,
        "process_seconds": {
            "train": trained - began,
            "judge": time.perf_counter() - trained,
        },
    }


def save_and_end_with_parent() -> None:
    """End when standard input is closed, as after a signal: the trainer saves a checkpoint."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(harness.SAVING_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_here(run: LadderRun) -> None:
    """Do a run in this process and write its JSON file; keep its artifact and its logs."""
    job = run.job()
    try:
        trials.apply(run.settings.get("TRIAL", ""))
        result = {**header(run), "status": "done", **finish(run, job.files)}
    except Exception as e:  # also of a bug: the line is kept, and other runs go on
        result = job.failed(error_line(e))
    write_json(job.result, result)
    if result["status"] == "done":
        for name in ("checkpoint.pt", "final_model.pt", f"logs/{JUDGE_LOG}"):
            (job.files / name).unlink(missing_ok=True)


# ==== OPTIONS =====================================================================================
def options_parser() -> Parser:
    parser = Parser(prog="bench/ladder.py", description=__doc__)
    add = parser.add_argument
    add("--shape", default="cpu", choices=SHAPES, help="size of the models (default: %(default)s)")
    add("--variants", default="ends", metavar="NAMES", help="default: %(default)s")
    add("--list", action="store_true", help="print the variants with their settings, and exit")
    add("--seconds", type=float, default=0.0, metavar="S", help="equal time: of training, a run")
    add("--steps", type=int, default=0, metavar="N", help="equal tokens: steps a run")
    add("--tokens", type=int, default=0, metavar="N", help="the same, as tokens")
    add("--seeds", default="1337,42,2025", metavar="N,N", help="default: %(default)s")
    add("--data", type=Path, metavar="DIR", help="shards (default: data/embedded)")
    add("--tokenizer", type=Path, metavar="FILE", help="default: tokenizer.model of --data")
    add("--judges", nargs="+", default=[], metavar="NAME=PATTERN", help="default: its val shards")
    add("--case-data", type=Path, metavar="DIR", help="the same text with case markers")
    add("--case-judges", nargs="+", default=[], metavar="NAME=PATTERN")
    add("--judge-documents", type=int, default=0, metavar="N", help="score N of each; 0 = all")
    add("--bytes", type=int, default=0, metavar="N", help="most of an artifact and its code")
    add("--stride", type=int, default=64, metavar="N", help="of scored windows (default: 64)")
    add("--threads", type=int, default=1, metavar="N", help="of a run (default: 1)")
    add("--workers", type=int, default=0, metavar="N", help="runs at a time (default: all cores)")
    add("--cluster", metavar="ADDRESS", help="send the runs to the Ray cluster at this address")
    add("--retry", action="store_true", help="run again what failed or ran with other code")
    add("--table", action="store_true", help="only write the tables")
    add("--into", type=Path, metavar="PAGE", help="also write the table into its part of a page")
    add("--out", type=Path, default=ROOT / "out" / "ladder", metavar="DIR")
    return parser


def budget_of(options: argparse.Namespace) -> tuple[float, int]:
    """Return seconds and steps of a run, one of which is 0."""
    given = [n for n in ("seconds", "steps", "tokens") if getattr(options, n)]
    if len(given) != 1:
        named = " and ".join(f"--{n}" for n in given) or "none is given"
        raise UserError(f"a run needs one of --seconds, --steps and --tokens; {named}: give one")
    if (value := getattr(options, given[0])) < 0:
        raise UserError(f"--{given[0]} is {value}; it must be above 0")
    batch = int(SHAPES[options.shape].settings()["TRAIN_BATCH_TOKENS"])
    if 0 < options.tokens < batch:
        raise UserError(f"--tokens is {options.tokens}, less than a step of {batch}; raise it")
    return options.seconds, options.steps or options.tokens // batch


def seeds_of(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise UserError(f"--seeds is {text!r}; it must be whole numbers with commas") from None


class Texts(NamedTuple):
    """The shards that variants of one vocabulary are trained and judged on."""

    data: Path
    tokenizer: Path
    vocab_size: int
    judges: dict[str, str]  # name → absolute pattern of shards
    fingerprints: dict[str, str]


def texts_of(option: str, data: Path, judges: list[str], tokenizer: Path | None = None) -> Texts:
    """Return the texts that `option` and the option of its judges name."""
    data, judging = data.absolute(), option.replace("data", "judges")
    path = (tokenizer or data / "tokenizer.model").absolute()
    if not list_shards(data / "*_train_*.bin"):
        raise UserError(f"{option}: no *_train_*.bin in {data}; run `make data`, or name another")
    if not path.is_file():
        raise UserError(f"{option}: no tokenizer {path}; write it with data/prepare.py, or name it")
    patterns = {}
    for text in judges or [f"val={data / '*_val_*.bin'}"]:
        name, _, pattern = text.partition("=")
        if not name or not pattern or name in patterns:
            raise UserError(f"{judging} has {text!r}; it must be NAME=PATTERN, each name once")
        patterns[name] = str(Path(pattern).absolute())
        if not list_shards(patterns[name]):
            raise UserError(
                f"{judging} {name}: no shards match {pattern}; write some with data/prepare.py"
            )
    fingerprints = {"training": fingerprint(str(data / "*_train_*.bin"))}
    fingerprints |= {n: fingerprint(p) for n, p in patterns.items()}
    try:
        processor = train_gpt.sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise UserError(f"{option}: {path} is no SentencePiece model; name another") from None
    return Texts(data, path, processor.vocab_size(), patterns, fingerprints)


def fingerprint(pattern: str) -> str:
    """Return a hash of the shards that match: their sizes and both of their ends."""
    digest = hashlib.sha256()
    for path in list_shards(pattern):
        shard = train_gpt.read_shard(path)
        digest.update(
            b"%d " % len(shard) + shard[: 1 << 19].tobytes() + shard[-1 << 19 :].tobytes()
        )
    return digest.hexdigest()[:16]


def check_texts(run: LadderRun) -> None:
    """Prove, before anything is trained, that one tokenizer wrote all texts."""
    data = train_gpt.load_data(Config.from_env(trainer_environment(run, Path(run.out)), BASELINE))
    processor = train_gpt.sentencepiece.SentencePieceProcessor(model_file=str(data.tokenizer_path))
    for name, pattern in run.judges.items():
        paths = list_shards(pattern)
        shards = [train_gpt.read_shard(path, processor.vocab_size()) for path in paths]
        tokens = np.concatenate(shards)
        tokens = tokens[: tokens_of(tokens, run.judge_documents)]
        if len(tokens) < 2:
            raise UserError(f"--judges {name} has {len(tokens)} tokens; at least 2 are needed")
        train_gpt.proven_table(processor, data.tokenizer_path, tokens)


def runs_of(options: argparse.Namespace) -> list[LadderRun]:
    """Return all runs, seed by seed, once their texts are known to be there."""
    seconds, steps = budget_of(options)
    shape, seeds = SHAPES[options.shape], seeds_of(options.seeds)
    variants = chosen_variants(options.variants, shape)
    for name in ("judge_documents", "bytes", "workers", "stride", "threads"):
        least, value = int(name in ("stride", "threads")), getattr(options, name)
        if value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
    data = options.data or ROOT / "data" / "embedded"
    texts = texts_of("--data", data, options.judges, options.tokenizer)
    by_case = {False: texts}
    if cased := [v.name for v in variants if v.case]:
        if not options.case_data:
            raise UserError(f"{cased[0]} has the rung `case`; give --case-data and --case-judges")
        by_case[True] = texts_of("--case-data", options.case_data, options.case_judges)
    group = group_name(options.shape, seconds, steps, texts.data)
    common = dict(ITERATIONS=str(steps or UNREACHED), MAX_WALLCLOCK_SECONDS=f"{seconds:g}")
    common |= dict(SIZE_BUDGET_BYTES=str(options.bytes)) if options.bytes else {}
    runs = [
        LadderRun(
            shape=options.shape,
            variant=variant.name,
            settings={
                **shape.settings(),
                **variant.settings,
                **common,
                "VOCAB_SIZE": str(by_case[variant.case].vocab_size),
            },
            seconds=seconds,
            steps=steps,
            seed=seed,
            data=str(by_case[variant.case].data),
            tokenizer=str(by_case[variant.case].tokenizer),
            judges=by_case[variant.case].judges,
            fingerprints=by_case[variant.case].fingerprints,
            judge_documents=options.judge_documents,
            stride=options.stride,
            threads=options.threads,
            out=str(options.out.absolute() / "raw" / group),
        )
        for seed in seeds
        for variant in variants
    ]
    for folder in dict.fromkeys(run.data for run in runs):
        check_texts(next(run for run in runs if run.data == folder))
    return runs


def workers_of(options: argparse.Namespace) -> int:
    """Return the runs at a time; at equal time, each has cores of its own."""
    cores = os.cpu_count() or 1
    workers = options.workers or max(1, cores // options.threads)
    if options.seconds and workers * options.threads > cores:
        message = f"--workers {workers} with --threads {options.threads} need more than {cores}"
        raise UserError(f"{message} cores, so that time is not equal; lower one, or use --steps")
    return workers


# ==== MAIN ========================================================================================
def figures(result: dict[str, Any]) -> str:
    """Return what is printed about a run that is done."""
    scores = ", ".join(f"{name} {j['bpb']:.4f}" for name, j in result["judged"].items())
    return f"{scores} BPB, {result['steps_taken']} steps, {result['artifact_bytes']} bytes"


def last_log_line(job: harness.Job) -> str:
    """Return the last line that a run on this machine has logged, or its beginning."""
    lines = []
    for name in (JUDGE_LOG, "train.txt"):
        path = job.files / "logs" / name
        lines = lines or (path.read_text("utf-8").splitlines() if path.exists() else [])
    return "".join(lines[-1:])[:120]


def run_all(runs: list[LadderRun], options: argparse.Namespace) -> int:
    """Run what is open; return how many failed."""
    workers = 0 if options.cluster else workers_of(options)
    left = [run for run in runs if is_open(run, options.retry)]
    least = ""
    if options.seconds and left and workers:
        minutes = math.ceil(len(left) / workers) * options.seconds / 60
        least = f"; training alone takes {minutes:.1f} minutes"
    print(f"runs: {len(runs)}, {len(left)} of them left{least}; results: {runs[0].out}", flush=True)
    reporter = harness.Reporter(functools.partial(print, flush=True), figures, last_log_line)
    jobs = [run.job() for run in left]
    for job in jobs if options.retry else ():
        if harness.read_cell(job.result):  # what failed, or other code: not to be resumed
            shutil.rmtree(job.files, ignore_errors=True)
    if options.cluster:
        from fairway.methods.cluster import run_on_cluster

        run_on_cluster(jobs, options.cluster, options.workers, reporter)
    else:
        harness.run_cells(jobs, workers, reporter)
    results = [harness.read_cell(run.job().result) for run in runs]
    return sum(result is None or result["status"] != "done" for result in results)


def main() -> int:
    options = options_parser().parse_args()
    if options.list:
        print_variants(options.shape)
        return 0
    if options.into and not options.into.is_file():
        raise UserError(f"--into {options.into} is no file; name a page that exists")
    raw = options.out / "raw"
    if options.table:
        groups = sorted(path.name for path in raw.glob("*") if path.is_dir())
        if not groups:
            raise UserError(f"--table: no results in {raw}; run some first, or set --out")
        write_tables(options.out, groups, options.into)
        return 0
    runs = runs_of(options)
    failed = run_all(runs, options)
    write_tables(options.out, [Path(runs[0].out).name], options.into)
    if failed:
        print(f"runs that failed: {failed}; --retry runs them again")
    return int(bool(failed))


if __name__ == "__main__":
    if sys.argv[2:] == ["child"]:
        save_and_end_with_parent()
        run_here(LadderRun(**json.loads(sys.argv[1])))
        sys.exit(0)
    ended = "interrupted; the same command goes on"
    sys.exit(run_reporting("bench/ladder", main, ended))
