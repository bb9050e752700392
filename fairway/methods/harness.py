"""Run cells in processes of their own, several at a time, and show what runs and what is left.

A finished cell is skipped, a broken one is kept with its error until it is retried. The harness may
be killed at any moment: each result is one file, written in one move.
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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fairway.command_line import progress_bar
from fairway.methods.cell import ROOT, Spec, cell_name, code_sha256, header, write_json
from fairway.methods.registry import METHODS, QUICK
from train_gpt import UserError

SEEDS = (0, 1, 2)  # of methods whose result depends on one
CELL_SECONDS = 3600  # a cell that takes longer is broken
RunCell = Callable[[Spec], dict[str, Any]]


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


# ==== ONE CELL ====================================================================================
def run_in_process(spec: Spec, on_start: Callable[[subprocess.Popen], None] = lambda _: None):
    """Run a cell in a process; return its result, a failed one if the process died."""
    threads = str(spec.threads)
    env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "fairway.methods.cell", json.dumps(asdict(spec)), "child"]
    result_path(spec).unlink(missing_ok=True)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env
    ) as child:
        on_start(child)
        try:
            errors = read_to_end(child, CELL_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            errors = f"no result after {CELL_SECONDS} s".encode()
    result = read_cell(result_path(spec))
    if result is None:
        last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        ended = f"the process ended with code {child.returncode}: {last:.200}"
        result = {**header(spec), "status": "failed", "error": ended}
    return result


def read_to_end(child: subprocess.Popen, limit_s: float) -> bytes:
    """Return what a process wrote to standard error, without closing its standard input."""
    kept: list[bytes] = []
    reader = threading.Thread(target=lambda: kept.append(child.stderr.read()), daemon=True)
    reader.start()
    child.wait(limit_s)
    reader.join(10)
    return b"".join(kept)


# ==== ALL CELLS ===================================================================================
def run_cells(specs: list[Spec], workers: int, report: Callable[[str], None]) -> None:
    """Run cells on this machine, `workers` at a time; Ctrl-C ends those that run."""
    children: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(workers) as pool:

        def submit(spec: Spec) -> Future:
            return pool.submit(run_in_process, spec, children.add)

        try:
            follow(specs, submit, workers, report)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in children:
                child.kill()
            raise


def follow(
    specs: list[Spec],
    submit: Callable[[Spec], Future],
    workers: int,
    report: Callable[[str], None],
) -> None:
    """Keep `workers` cells running until none is left, with a bar and a line for each result."""
    waiting, running, began = iter(specs), {}, time.perf_counter()
    with progress_bar(len(specs), "cells", "cell") as bar:
        done = 0
        while True:
            for spec in itertools.islice(waiting, workers - len(running)):
                running[submit(spec)] = spec
            if not running:
                return
            bar.set_postfix_str(", ".join(cell_name(s.method, s.seed) for s in running.values()))
            finished, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
            bar.refresh()
            for future in finished:
                spec, result, done = running.pop(future), future.result(), done + 1
                if not result_path(spec).exists():  # its process died; after Ctrl-C it stays open
                    write_json(result_path(spec), result)
                bar.update()
                left = (time.perf_counter() - began) / done * (len(specs) - done)
                report(f"[{done}/{len(specs)}] {summary(spec, result)}  eta:{left:.0f}s")


def summary(spec: Spec, result: dict[str, Any]) -> str:
    """Return a line about one result."""
    name = cell_name(spec.method, spec.seed)
    if result["status"] != "done":
        return f"{name}: {result['status']}: {result['error']}"
    bpb, size, seconds = result["score"]["bpb"], result["size"], sum(result["seconds"].values())
    return f"{name}: {bpb:.4f} BPB, {size['bytes']} bytes, {seconds:.0f} s"
