"""Write a record folder from finished runs: refused unless they are one experiment, complete or not
at all.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairway.records.atomic_folder import AtomicFolder, restore_replaced
from fairway.records.experiment import Result, check_one_experiment, read_result, short_value
from fairway.records.files import RecordError, compact_json, read_bytes, sha256
from fairway.records.folder import TRACKS, read_record_folder
from fairway.records.markdown import SCORE_DECIMALS, markdown_cell, markdown_table
from fairway.records.packed_code import (
    counted_bytes,
    pack_sources,
    requirements_text,
    shipped_files,
)
from fairway.records.readme import Entry, Record, certified, readme_text
from fairway.records.run import dict_at
from fairway.records.t_tests import read_seeds, significance_text
from fairway.records.techniques import default_blurb, technique_line
from fairway.records.trainer_source import EVAL_SETTINGS, free_settings

Draw = Callable[[list[Path], Path], None]  # (logs of the runs, path of the picture)


def pack_record(
    runs: Sequence[Path],
    entry: Entry,
    root: Path,
    out: Path,
    draw: Draw,
    *,
    replace: bool = False,
    on_progress: Callable[[str], object] = print,
) -> Path:
    """Write `out`/track_<track>/<date>_<slug>/ from finished runs and the code in `root`; return
    that folder.
    """
    entry = entry._replace(
        date=entry.date or datetime.date.today().isoformat(),
        name=entry.name or re.sub(r"[-_]+", " ", entry.slug).strip(),
    )
    check_entry(entry)
    target = out / entry.folder
    restore_replaced(target)
    if target.is_symlink():
        raise RecordError(f"{target} is a link; remove it, or choose another --slug")
    if target.exists() and not replace:
        raise RecordError(f"{target} is there already; choose another --slug, or give --replace")
    on_progress(f"reading {len(runs)} runs")
    results = read_results(runs)
    check_one_experiment(
        results,
        free_settings(text_of(root, "train_gpt.py"), "Config"),
        free_settings(text_of(root, EVAL_SETTINGS), "EvalConfig"),
    )
    results = sorted(results, key=lambda result: result.seed)
    names = shipped_files(root, [result.run for result in results])
    check_code(root, names, results)
    sources = {name: read_bytes(root / name) for name in names}
    with AtomicFolder(target) as folder:
        try:
            files = record_files(entry, results, root, sources, on_progress)
            write_record(folder, entry, results, files, sources, draw, on_progress)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise RecordError(
                f"{results[0].run.folder}: its log's events or eval/score.json hold what neither "
                f"script writes ({type(e).__name__}: {' '.join(str(e).split())[:100]}); run them "
                "again"
            ) from e
    return target


def text_of(root: Path, name: str) -> str:
    path = root / name
    return read_bytes(path).decode("utf-8", "replace") if path.is_file() else ""


# ==== WHAT MAY BE PACKED ==========================================================================
def read_results(runs: Sequence[Path]) -> list[Result]:
    """Return the figures of every run; each is to be named once."""
    results = [read_result(path) for path in runs]
    if not results:
        raise RecordError("no run was given; name each run's OUT_DIR, or its logs/RUN_ID.txt")
    logs = {result.run.log.resolve() for result in results}
    if len(logs) != len(runs):
        raise RecordError(
            f"{len(runs)} runs were given, but they are {len(logs)}: two name one log; name each "
            "once"
        )
    return results


def check_entry(entry: Entry) -> None:
    """Refuse an option that cannot stand in a record."""
    if entry.track not in TRACKS:
        raise RecordError(f"--track is {entry.track}; it is one of {', '.join(TRACKS)}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", entry.slug):
        raise RecordError(
            f"--slug is {entry.slug!r}; it takes letters, digits, and . _ - after the "
            "first (80 at most)"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}", entry.github_id):
        raise RecordError(f"--github-id is {entry.github_id!r}, which is no GitHub name")
    for option in ("author", "name", "blurb"):
        text = getattr(entry, option)
        if not text.isprintable() or (option == "author" and not text.strip()):
            raise RecordError(f"--{option} is {text!r}; it takes one line")
    try:
        dated = datetime.date.fromisoformat(entry.date).isoformat() == entry.date
    except ValueError:
        dated = False
    if not dated:
        raise RecordError(f"--date is {entry.date!r}; it takes YYYY-MM-DD")
    if entry.against is not None and not entry.against.is_dir():
        raise RecordError(f"--against is {entry.against}, which is no folder; name a record's")
    if entry.pack_code not in ("lzma", "none"):
        raise RecordError(f"--pack-code is {entry.pack_code!r}; it is lzma or none")


def check_code(root: Path, names: list[str], results: list[Result]) -> None:
    """Refuse code in `root` that is not, by its hashes, the code that trained and scored the
    runs.
    """
    run = results[0].run
    logged = dict_at(run.event("start"), "sha256").get("code")
    here = hashlib.sha256(read_bytes(root / "train_gpt.py")).hexdigest()
    if here != logged:
        raise RecordError(
            f"train_gpt.py has sha256 {here[:12]}, {run.log} was trained by {short_value(logged)}; "
            "pack from the checkout that trained it"
        )
    for result in results:
        ran = dict_at(result.run.score, "code")
        score = f"{result.run.folder}/eval/score.json"
        if result.run.score and not ran:
            raise RecordError(f"{score} names no code; run eval_final.py again")
        for name in names:
            if not (root / name).is_file():
                raise RecordError(
                    f"{score} was made with {name}, which is not in {root}; pack from the "
                    "checkout that scored the run"
                )
            if name in ran and (here := sha256(root / name)) != ran[name]:
                raise RecordError(
                    f"{name} has sha256 {here[:12]}, {score} was made with "
                    f"{short_value(ran[name])}; run eval_final.py again, or pack from the "
                    "checkout that did"
                )


# ==== THE RECORD ==================================================================================
def record_files(
    entry: Entry,
    results: list[Result],
    root: Path,
    sources: dict[str, bytes],
    on_progress: Callable[[str], object],
) -> dict[str, bytes]:
    """Return code, logs, requirements and submission.json: name → content."""
    packed = entry.pack_code == "lzma"
    files = pack_sources(sources) if packed else dict(sources)
    on_progress(
        f"code: {sum(map(len, sources.values()))} bytes in {len(sources)} files"
        + (f", packed {counted_bytes(files)}" if packed else "")
    )
    for result in results:
        files |= run_files(result)
    if entry.with_artifact:
        files |= carried_artifact(results[0])
    files["requirements.txt"] = requirements_text(root, list(sources)).encode()
    entry = entry._replace(blurb=entry.blurb or default_blurb(results))
    data = json.dumps(submission_json(entry, results, files), indent=2, ensure_ascii=False)
    files["submission.json"] = f"{data}\n".encode("utf-8", "replace")
    return files


def write_record(
    folder: Path,
    entry: Entry,
    results: list[Result],
    files: dict[str, bytes],
    sources: dict[str, bytes],
    draw: Draw,
    on_progress: Callable[[str], object],
) -> None:
    """Write the files, then the picture, then the README: significance tests read the folder as
    anyone would.
    """
    for name, content in files.items():
        write_file(folder / name, content)
    on_progress("drawing picture.png")
    draw([result.run.log for result in results], folder / "picture.png")
    files = {**files, "picture.png": read_bytes(folder / "picture.png")}
    plain = sum(map(len, sources.values()))
    trainer = sources["train_gpt.py"].decode("utf-8", "replace")
    changes = changes_since(folder, entry.against, results[0], trainer) if entry.against else ""
    data = json.loads(files["submission.json"])
    text = readme_text(Record(entry, results, data, files, plain, changes))
    write_file(folder / "README.md", text.encode("utf-8", "replace"))


def write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def run_files(result: Result) -> dict[str, bytes]:
    """Return a run's logs byte for byte, and the values of its score and certificate, a line for
    each key.
    """
    run, seed = result.run, result.seed
    files = {f"train_seed{seed}.log": read_bytes(run.log)}
    if run.eval_log:
        files[f"eval_seed{seed}.log"] = read_bytes(run.eval_log)
    for kind, data in (("score", run.score), ("certificate", run.certificate)):
        if data:  # indented, one score with its trace would take 2,362 lines
            files[f"{kind}_seed{seed}.json"] = compact_json(data).encode()
    return files


def carried_artifact(result: Result) -> dict[str, bytes]:
    """Return the artifact of a run, under a name that has its seed."""
    if (path := result.run.artifact) is None:
        raise RecordError(
            f"--with-artifact: {result.run.folder} has no artifact with the hash of its log; train "
            "it again, or leave the option out"
        )
    name = path.name.replace("final_model", f"final_model_seed{result.seed}", 1)
    return {name: read_bytes(path)}


def hardware_of(results: list[Result]) -> str:
    """`8x NVIDIA H100 80GB HBM3`, as the runs saw it."""
    starts = [r.run.event("start") for r in results]
    return "; ".join(
        dict.fromkeys(f"{s.get('world_size', 1)}x {s.get('device', 'unknown')}" for s in starts)
    )


def submission_json(entry: Entry, results: list[Result], files: dict[str, bytes]) -> dict[str, Any]:
    """Return submission.json: each figure is the mean over seeds, or the largest."""

    def mean(values: list[float]) -> float:
        return round(statistics.fmean(values), SCORE_DECIMALS)

    def spread(values: list[float]) -> float:
        return round(statistics.stdev(values), SCORE_DECIMALS) if len(values) > 1 else 0.0

    loss, bpb = [r.loss for r in results], [r.bpb for r in results]
    code = counted_bytes(files)
    seeds = {
        str(r.seed): dict(
            val_loss=round(r.loss, SCORE_DECIMALS),
            val_bpb=round(r.bpb, SCORE_DECIMALS),
            pre_quant_val_bpb=round(r.raw_bpb, SCORE_DECIMALS),
            artifact_bytes=r.artifact_bytes,
            steps=r.steps,
            step_avg_ms=round(r.step_avg_ms, 2),
            train_time_s=round(r.train_seconds, 1),
            eval_time_s=round(r.eval_seconds, 1),
        )
        for r in results
    }
    largest = max(r.artifact_bytes for r in results)
    return dict(
        author=entry.author,
        github_id=entry.github_id,
        name=entry.name,
        blurb=entry.blurb,
        date=entry.date,
        track=entry.track,
        val_loss=mean(loss),
        val_bpb=mean(bpb),
        val_loss_std=spread(loss),
        val_bpb_std=spread(bpb),
        seeds=[r.seed for r in results],
        seed_results=seeds,
        bytes_total=largest + code,
        bytes_code=code,
        hardware=hardware_of(results),
        pytorch_version=str(results[0].run.event("start").get("torch", "")),
        technique_summary=technique_line(results[0]),
        compliance=dict(
            artifact_bytes_max=largest,
            train_time_max_s=max(s["train_time_s"] for s in seeds.values()),
            eval_time_max_s=max(s["eval_time_s"] for s in seeds.values()),
            val_tokens=results[0].tokens,
            val_bytes=results[0].bytes,
            certified=certified(results),
        ),
    )


def changes_since(folder: Path, against: Path, result: Result, trainer: str) -> str:
    """List the settings that differ from the record before, and run both significance tests."""
    before = read_record_folder(against)
    if not before.runs:
        raise RecordError(f"--against {against} holds no log of a run")
    old, free = before.runs[0].log.settings, free_settings(trainer, "Config")
    rows = [
        [name.upper(), old[name], value]
        for name, value in sorted(result.run.settings.items())
        if name in old
        and name not in free
        and comparable(value) != (was := comparable(old[name]))
        and type(was) is type(comparable(value))
    ]
    settings_text = (
        markdown_table(("setting", "before", "now"), rows)
        if rows
        else "No setting that both log differs."
    )
    tests = significance_text(read_seeds(folder), read_seeds(against)).rstrip()
    title = f"Against `{markdown_cell(against.resolve().name)}`:"
    return f"{title}\n\n{settings_text}\n\n```\n{tests}\n```"


def comparable(value: Any) -> Any:
    """Return a setting in a form that all dialects of logs share: 1, 1.0 and True are equal."""
    text = {"true": "1", "false": "0"}.get(str(value).lower(), str(value))
    try:
        return float(text)
    except ValueError:
        return text
