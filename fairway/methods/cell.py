"""Measure one method on one model, in a process of its own, and write one JSON file.

    python -m fairway.methods.cell '{"model": …, "method": …, "seed": 0, …}'

The order is fixed: load, transform, ship, reload, latency, text, score. Everything after `reload`
is measured on what was read back from the shipped files. The validation split is opened only after
the transform, and each file that is opened before is noted.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.methods import measure
from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.registry import METHODS
from fairway.methods.subject import Subject, load_subject
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text, load_text, load_tokenizer
from train_gpt import (
    GPT,
    Runtime,
    UserError,
    file_sha256,
    list_shards,
    packed_code_bytes,
    read_shard,
    replacing,
)

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = 1
CHECKED_TOKENS = 4096  # scored before shipping and after reloading, to the last digit
OVERLAP = 24  # tokens in a row that calibration and scored text may not share
PACKAGES = ("torch", "numpy", "onnxruntime", "torchao")
# Modules of this room that start cells or judge their results, and measure nothing.
PRESENTING = ("harness.py", "cluster.py", "audit.py", "comparison.py", "groups.py")


@dataclass(frozen=True)
class Spec:
    """All that a cell is told."""

    model: str
    method: str
    seed: int
    data: str  # folder of shards
    out: str  # folder of results
    val_tokens: int = 0  # at most so many are scored; 0 = all
    tokenizer: str = ""
    threads: int = 1


def cell_name(method: str, seed: int) -> str:
    """Return the name of a cell's files: `qat3.seed42`, or `int4` where no seed matters."""
    return f"{method}.seed{seed}" if METHODS[method].seeded else method


# ==== WHAT WAS OPENED =============================================================================
class OpenedFiles:
    """The names of all files that Python opened, while `noting` was on."""

    def __init__(self):
        self.names: set[str] = set()
        self.on = False
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple) -> None:
        if self.on and event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self.names.add(os.path.realpath(os.fsdecode(arguments[0])))

    @contextmanager
    def noting(self) -> Iterator[set[str]]:
        self.names, self.on = set(), True
        try:
            yield self.names
        finally:
            self.on = False


# ==== IDENTITY ====================================================================================
def code_sha256() -> str:
    """Return a hash of the code that decides what a cell measures."""
    rooms = [ROOT / "fairway" / room for room in ("methods", "scoring", "decoding")]
    files = [path for room in rooms for path in room.rglob("*.py") if path.name not in PRESENTING]
    digest = hashlib.sha256()
    for path in sorted([ROOT / "train_gpt.py", ROOT / "fairway" / "artifact_reader.py", *files]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parameter_hashes(named: dict[str, torch.Tensor]) -> dict[str, str]:
    return {
        name: hashlib.sha256(p.detach().float().cpu().numpy()).hexdigest()
        for name, p in named.items()
    }


# ==== CALIBRATION =================================================================================
def runs_of(tokens: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each run of OVERLAP tokens."""
    tokens = tokens.astype(np.uint64)
    if len(tokens) < OVERLAP:
        return np.zeros(0, np.uint64)
    hashes = np.zeros(len(tokens) - OVERLAP + 1, np.uint64)
    for i in range(OVERLAP):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + tokens[i : len(hashes) + i] + np.uint64(1)
    return hashes


def shared_text(calibration: Calibration, scored: np.ndarray) -> float:
    """Return the share of calibration runs that occur in the scored text as well."""
    rows = [row for _, tokens in calibration.given for row in np.atleast_2d(tokens)]
    runs = [runs_of(row) for row in rows]
    runs = np.concatenate(runs) if runs else np.zeros(0, np.uint64)
    return float(np.isin(runs, runs_of(scored)).mean()) if len(runs) else 0.0


# ==== THE CELL ====================================================================================
def run_cell(spec: Spec, folder: Path) -> dict[str, Any]:
    """Measure everything; the shipped files go into `folder`."""
    torch.set_num_threads(spec.threads)
    method, opened, seconds = METHODS[spec.method], OpenedFiles(), {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - began

    with timed("load"):
        subject = load_subject(Path(spec.model), spec.tokenizer, Path(spec.data))
        paths = list_shards(Path(spec.data) / "*_train_*.bin")
        shards = [read_shard(p, subject.model.cfg.vocab_size) for p in paths]
        tokenizer, _ = load_tokenizer("", subject.artifact, Path(spec.data))
    calibration = Calibration(subject.model, shards, spec.seed, subject.checkpoint, tokenizer)
    spared = {n: p.clone() for n, p in method.spared(subject.model).items()}
    memory = measure.MemorySampler()
    with memory.sampling():
        with timed("transform"), opened.noting() as before:
            model = method.apply(subject.model, calibration)
        read_before = sorted({Path(name).name for name in before})
        with timed("ship"):
            method.ship(model, folder)
            size = sizes(method, model, folder)
        with timed("reload"), opened.noting() as after:
            reloaded = method.load(folder)
        size["read_on_reload"] = sorted(
            str(Path(n).relative_to(folder.resolve()))
            for n in after
            if Path(n).is_relative_to(folder.resolve())
        )
        text = scored_text(spec, subject)
        with method.running():
            retold = method.retokenised(text, reloaded)
            result = measured(method, reloaded, model, retold, timed)
    return {
        **result,
        "settings": method.settings,
        "figures": method.figures(model),
        "seconds": seconds,
        "size": size,
        "memory": {
            "before": memory.before,
            "peak": memory.peak,
            "unreliable": method.memory_unreliable,
        },
        "parameters": spared_hashes(model, spared),
        "calibration": {
            "given": calibration.account(),
            "files_read": read_before,
            "overlap": shared_text(calibration, text.tokens),
        },
        "model": describe_subject(subject, spec),
        "data": describe_data(text, spec, shards),
    }


def spared_hashes(model: Any, spared: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return hashes of the parameters that a method spares: as promised, and as they are."""
    named = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else {}
    now, then = parameter_hashes({n: named[n] for n in spared}), parameter_hashes(spared)
    return {n: [then[n], now[n]] for n in spared}


def describe_subject(subject: Subject, spec: Spec) -> dict[str, Any]:
    return {
        "name": subject.name,
        "sha256": file_sha256(spec.model),
        "weights_from": subject.weights_from,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "config": asdict(subject.model.cfg),
    }


def describe_data(text: Text, spec: Spec, shards: list[np.ndarray]) -> dict[str, Any]:
    tokens = sum(map(len, shards))
    return {"sha256": text.sha256, "name": Path(spec.data).name, "train_tokens": tokens}


def scored_text(spec: Spec, subject: Subject) -> Text:
    """Return the tokens that are scored: those of the validation split, or its first ones."""
    pattern = str(Path(spec.data) / "*_val_*.bin")
    text = load_text(EvalConfig(val_files=pattern), subject.artifact)
    count = spec.val_tokens or len(text.sizes)
    return text._replace(tokens=text.tokens[: count + 1], sizes=text.sizes[:count])


def sizes(method: Method, model: Any, folder: Path) -> dict[str, Any]:
    """Return what ships: every file with its bytes, and the code that reads them, packed."""
    files = [
        {"name": str(p.relative_to(folder)), "bytes": p.stat().st_size, "sha256": file_sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    ]
    total = sum(f["bytes"] for f in files)
    return {
        "files": files,
        "bytes": total,
        "method_bytes": method.bytes(model),
        "code_bytes": reading_code_bytes(method),
    }


@functools.cache
def reading_code_bytes(method: Method) -> int:
    """Return the bytes, packed as in a record, of the code that reads a shipped model."""
    names = "parcel.py", "stored.py", "layouts.py", *method.code
    return packed_code_bytes([ROOT / "train_gpt.py", *(Path(__file__).parent / n for n in names)])


def measured(
    method: Method, reloaded: Any, model: Any, text: Text, timed: Callable
) -> dict[str, Any]:
    """Measure speed and score of what was reloaded; score some tokens with both models."""
    cfg, tokens = reloaded.cfg, text.tokens
    rt, eval_cfg = Runtime(0, 1, torch.device("cpu"), "cpu"), EvalConfig()
    one = torch.from_numpy(tokens[: cfg.train_seq_len].astype(np.int64))[None]
    with timed("latency"):
        result: dict[str, Any] = {"latency": measure.latency(reloaded.logits, one)}
    with timed("generation"):
        texts = measure.prompts(text.tokenizer.encode, cfg.train_seq_len)
        result["generation"] = measure.generation(reloaded, texts, method.storage, method.draft)
        if method.draft:
            result["speculation"] = measure.speculation(reloaded, texts, method.draft)
    if isinstance(reloaded, GPT):
        result["cache"] = measure.cache_growth(reloaded, method.storage, method.cache_lengths)
    with timed("check"):
        part = tokens[: CHECKED_TOKENS + 1]
        nats = [-measure.score(m, text, part, eval_cfg, rt).sum() for m in (model, reloaded)]
        result["check"] = {
            "tokens": len(part) - 1,
            "in_memory_nats": float(nats[0]),
            "reloaded_nats": float(nats[1]),
        }
    with timed("score"):
        logp = measure.score(reloaded, text, tokens, eval_cfg, rt)
    scored_bytes, nats = text.bytes, float(-logp.sum())
    result["score"] = {
        "bpb": nats / np.log(2) / scored_bytes,
        "nats": nats,
        "tokens": len(logp),
        "bytes": scored_bytes,
        "windows": f"sliding, stride {eval_cfg.eval_stride}, context {cfg.train_seq_len}",
    }
    return result


# ==== FILES =======================================================================================
def write_json(path: Path, value: Any) -> None:
    with replacing(path) as f:
        f.write(json.dumps(value, indent=1).encode() + b"\n")


def header(spec: Spec) -> dict[str, Any]:
    """Return what each result begins with, whether the cell succeeded or not."""
    return {
        "schema": SCHEMA,
        "method": spec.method,
        "group": METHODS[spec.method].group,
        "seed": spec.seed,
        "seeded": METHODS[spec.method].seeded,
        "same_score_as": METHODS[spec.method].same_score_as,
        "val_tokens": spec.val_tokens,
        "environment": {
            "code_sha256": code_sha256(),
            "hardware": measure.hardware(),
            "versions": versions(),
            "threads": spec.threads,
        },
        "time": round(time.time(), 3),
    }


def missing_packages(method: Method) -> list[str]:
    return [n for n in method.needs if importlib.util.find_spec(n) is None]


def attempt(spec: Spec, folder: Path) -> dict[str, Any]:
    """Return the cell's result: done, failed, or not run because a package is absent."""
    method = METHODS[spec.method]
    if missing := missing_packages(method):
        why = f"{missing[0]} is not installed; pip install -r {method.requirements}"
        return {**header(spec), "status": "not run", "error": why}
    try:
        return {**header(spec), "status": "done", **run_cell(spec, folder)}
    except NotHere as e:
        return {**header(spec), "status": "not run", "error": str(e)}
    except Exception as e:
        trace = traceback.format_exc()
        return {**header(spec), "status": "failed", "error": error_line(e), "trace": trace}


def error_line(error: Exception) -> str:
    """Return one line about an error; only bugs are named by their type."""
    if isinstance(error, OSError):
        return f"{error.filename or 'files'}: {error.strerror}; free space, or set --out"
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if isinstance(error, UserError) else f"{type(error).__name__}: {line}"


def exit_with_parent() -> None:
    """End when standard input is closed: a cell must not outlive a killed harness."""

    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def shipped_folder(spec: Spec) -> Path:
    """Return where the files that a cell ships are kept: OUT/files/MODEL/CELL."""
    out = Path(spec.out)
    return out.parents[1] / "files" / out.name / cell_name(spec.method, spec.seed)


def main(argument: str) -> int:
    """Run a cell and write its files; the shipped ones are kept next to the JSON."""
    spec = Spec(**json.loads(argument))
    files = shipped_folder(spec)
    working = files.with_name(f".{files.name}.part")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    result = attempt(spec, working)
    shutil.rmtree(files, ignore_errors=True)
    if result["status"] == "done":
        os.replace(working, files)
    else:
        shutil.rmtree(working)
    write_json(Path(spec.out, f"{files.name}.json"), result)
    return 0


if __name__ == "__main__":
    if sys.argv[2:] == ["child"]:
        exit_with_parent()
    sys.exit(main(sys.argv[1]))
