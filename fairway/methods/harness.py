"""Run cells in processes of their own, several at a time, and show what runs and what is left.

A finished cell is skipped, a broken one is kept with its error until it is retried. The harness may
be killed at any moment: each result is one file, written in one move. Its second half runs jobs and
knows nothing of methods, so that a bench can run cells of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fairway.command_line import progress_bar
from fairway.methods.cell import ROOT, Spec, cell_name, code_sha256, header, write_json
from fairway.methods.registry import METHODS, QUICK
from train_gpt import UserError

SEEDS = (0, 1, 2)  # of methods whose result depends on one
CELL_SECONDS = 3600  # a cell that takes longer is broken
SAVING_SECONDS = 20.0  # that a cell has, once it is told to end, to save what it can resume from
WATCH_SECONDS = 60.0  # between two lines on the cells that run
Figures = Callable[[dict[str, Any]], str]  # the figures of a result that is done, on one line


# ==== WHICH CELLS =================================================================================
def named_methods(words: str) -> list[str]:
    """Return the methods that `--methods` names: a list, quick, or all."""
    if words in ("quick", "all"):
        return list(QUICK if words == "quick" else METHODS)
    names = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [name for name in names if name not in METHODS]:
        from fairway.command_line import did_you_mean

        hint = did_you_mean(unknown[0], list(METHODS))
        raise UserError(f"--methods names {unknown[0]!r}, which is no method{hint}; see --list")
    if not names:
        raise UserError("--methods names no method; take quick, all, or names that --list shows")
    return names


def cells_of(spec: Spec, names: Iterable[str]) -> list[Spec]:
    """Return a cell for each method, and one a seed where seeds matter."""
    return [
        replace(spec, method=name, seed=seed)
        for name in names
        for seed in (SEEDS if METHODS[name].seeded else SEEDS[:1])
    ]


def result_path(spec: Spec) -> Path:
    return Path(spec.out, f"{cell_name(spec.method, spec.seed)}.json")


def read_cell(path: Path) -> dict[str, Any] | None:
    """Return a cell's result, or None if there is none that can be read."""
    try:
        result = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "status" in result else None


def is_open(spec: Spec, retry: bool) -> bool:
    """Return whether a cell is to be run: it never was, or it is to be retried.

    `retry` runs those again that failed, could not run, or ran with other code.
    """
    result = read_cell(result_path(spec))
    if result is None or result.get("val_tokens") != spec.val_tokens:
        return True
    code = result.get("environment", {}).get("code_sha256")
    return retry and (result["status"] != "done" or code != code_sha256())


def job_of(spec: Spec) -> Job:
    """Return the job that measures a method."""
    name, program = cell_name(spec.method, spec.seed), ("-m", "fairway.methods.cell")
    return Job(name, program, asdict(spec), header(spec), spec.threads)


def score_line(result: dict[str, Any]) -> str:
    """Return score, bytes and seconds of a method's cell."""
    bpb, size, seconds = result["score"]["bpb"], result["size"], sum(result["seconds"].values())
    return f"{bpb:.4f} BPB, {size['bytes']} bytes, {seconds:.0f} s"


# ==== ONE JOB =====================================================================================
@dataclass(frozen=True)
class Job:
    """A cell as it is run: a process that reads its settings as JSON and writes one JSON file.

    It ends when its standard input is closed. It may also leave files, in a folder of its own.
    """

    name: str  # of its files
    program: tuple[str, ...]  # the words after `python`
    settings: dict[str, Any]  # `out` is the folder of results, OUT/raw/NAME
    header: dict[str, Any]  # of its result, if the process dies
    threads: int = 1
    limit_s: float = CELL_SECONDS

    @property
    def result(self) -> Path:
        return Path(self.settings["out"], f"{self.name}.json")

    @property
    def files(self) -> Path:
        """The folder of what it leaves: OUT/files/NAME/CELL."""
        out = Path(self.settings["out"])
        return out.parents[1] / "files" / out.name / self.name

    def moved(self, folder: Path) -> Job:
        """Return the job with its results and files under another OUT."""
        out = folder / "raw" / Path(self.settings["out"]).name
        return replace(self, settings=self.settings | {"out": str(out)})

    def failed(self, error: str) -> dict[str, Any]:
        return {**self.header, "time": round(time.time(), 3), "status": "failed", "error": error}


def run_in_process(job: Job, on_start: Callable[[subprocess.Popen], None] = lambda _: None):
    """Run a job in a process; return its result, a failed one if the process died."""
    threads = str(job.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, *job.program, json.dumps(job.settings), "child"]
    job.result.unlink(missing_ok=True)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
    ) as child:
        on_start(child)
        try:
            errors = read_to_end(child, job.limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
            errors = f"no result after {job.limit_s} s".encode()
    result = read_cell(job.result)
    if result is None:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        result = job.failed(f"the process ended with code {child.returncode}: {last:.200}")
    return result


def read_to_end(child: subprocess.Popen, limit_s: float) -> bytes:
    """Return what a process wrote to standard error, without closing its standard input."""
    kept: list[bytes] = []
    reader = threading.Thread(target=lambda: kept.append(child.stderr.read()), daemon=True)
    reader.start()
    child.wait(limit_s)
    reader.join(10)
    return b"".join(kept)


# ==== ALL JOBS ====================================================================================
@dataclass(frozen=True)
class Reporter:
    """The printed lines: one for each result, and each minute one for each job that runs."""

    write: Callable[[str], None]
    figures: Figures = score_line
    watch: Callable[[Job], str] = lambda _: ""  # a line on a job that runs, "" if it has none

    def result_line(self, job: Job, result: dict[str, Any]) -> str:
        if result["status"] != "done":
            return f"{job.name}: {result['status']}: {result['error']}"
        return f"{job.name}: {self.figures(result)}"

    def watch_lines(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            if line := self.watch(job):
                self.write(f"{job.name}: {line}")


def run_cells(jobs: list[Job], workers: int, reporter: Reporter) -> None:
    """Run jobs on this machine, `workers` at a time; Ctrl-C ends those that run."""
    children: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(workers) as pool:

        def submit(job: Job) -> Future:
            return pool.submit(run_in_process, job, children.add)

        try:
            follow(jobs, submit, workers, reporter)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_children(children)
            raise


def end_children(children: Iterable[subprocess.Popen]) -> None:
    """Ask processes to end, so that they can save what they resume from; kill those that stay."""
    children = list(children)
    for child in children:
        child.terminate()
    until = time.monotonic() + SAVING_SECONDS
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()


def follow(
    jobs: list[Job], submit: Callable[[Job], Future], workers: int, reporter: Reporter
) -> None:
    """Keep `workers` jobs running until none is left, with a bar and a line for each result."""
    waiting, running, began = iter(jobs), {}, time.perf_counter()
    watched = began
    with progress_bar(len(jobs), "cells", "cell") as bar:
        done = 0
        while True:
            for job in itertools.islice(waiting, workers - len(running)):
                running[submit(job)] = job
            if not running:
                return
            bar.set_postfix_str(", ".join(job.name for job in running.values()))
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            bar.refresh()
            for future in finished:
                job, result, done = running.pop(future), future.result(), done + 1
                if not job.result.exists():  # its process died; after Ctrl-C it stays open
                    write_json(job.result, result)
                bar.update()
                left = (time.perf_counter() - began) / done * (len(jobs) - done)
                line = reporter.result_line(job, result)
                reporter.write(f"[{done}/{len(jobs)}] {line}  eta:{left:.0f}s")
            if time.perf_counter() - watched > WATCH_SECONDS:
                watched = time.perf_counter()
                reporter.watch_lines(running.values())
