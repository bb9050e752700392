"""The runs of one record: what each measured, and whether they are one experiment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, sha256
from fairway.records.run import RunFiles, dict_at, read_run


class Result(NamedTuple):
    """The figures of one run: losses in nats per token, times in seconds."""

    run: RunFiles
    seed: int
    # These five are of the evaluation, or of the trainer's own scoring if there was none.
    loss: float
    bpb: float
    tokens: int
    bytes: int
    eval_seconds: float
    raw_bpb: float  # of the model before quantisation
    plain_bpb: float  # of the artifact in windows without overlap, at the end of training
    steps: int
    train_seconds: float
    artifact_bytes: int

    @property
    def step_avg_ms(self) -> float:
        return 1000 * self.train_seconds / max(self.steps, 1)


def is_figure(value: Any) -> bool:
    """Tell whether a value is a number that a run can have measured."""
    return type(value) in (int, float) and 0 <= value < 1e15


def event_number(run: RunFiles, event: str, key: str) -> float:
    """Return a number of a run's last event of that name; an error names what is missing."""
    value = run.event(event).get(key)
    if not is_figure(value):
        raise RecordError(
            f"{run.log.with_suffix('.jsonl')} has no {event} with a number as {key}; pack "
            "runs that ended by themselves"
        )
    return value


def read_result(path: Path) -> Result:
    """Return the figures of a run; an error names what is missing."""
    run = read_run(path)
    if not run.event("final"):
        raise RecordError(
            f"{run.log} has no final score; finish the run (RESUME=1), or leave it out"
        )
    if run.seed is None:
        raise RecordError(
            f"{run.log.with_suffix('.jsonl')} names no seed; pack runs of this train_gpt.py"
        )
    check_artifact(run)
    figures = {
        name: event_number(run, "final", name)
        for name in ("loss", "bpb", "tokens", "bytes", "eval_seconds")
    }
    plain_bpb = figures["bpb"]
    if run.score is not None:
        names = dict(
            loss="val_loss",
            bpb="val_bpb",
            tokens="tokens",
            bytes="bytes",
            eval_seconds="eval_seconds",
        )
        figures = {name: run.score.get(key) for name, key in names.items()}
        if figures["eval_seconds"] is None:
            raise RecordError(
                f"{run.folder}/eval/score.json knows no time of scoring (an interrupted run made "
                f"part of its columns); remove {run.folder}/eval and run eval_final.py again"
            )
        bad = next((name for name, value in figures.items() if not is_figure(value)), "")
        if bad:
            raise RecordError(
                f"{run.folder}/eval/score.json has no number for {bad}; run eval_final.py again"
            )
    return Result(
        run,
        run.seed,
        **figures,
        raw_bpb=event_number(run, "val", "bpb"),
        plain_bpb=plain_bpb,
        steps=int(event_number(run, "val", "step")),
        train_seconds=event_number(run, "val", "seconds"),
        artifact_bytes=int(event_number(run, "artifact", "bytes")),
    )


def check_artifact(run: RunFiles) -> None:
    """Refuse an OUT_DIR whose artifact or score is not the one that the log is about."""
    logged, artifacts = (
        run.event("artifact").get("sha256"),
        sorted(run.folder.glob("final_model.*.ptz")),
    )
    if not re.fullmatch("[0-9a-f]{64}", str(logged)):
        raise RecordError(
            f"{run.log.with_suffix('.jsonl')} names no artifact; finish the run, or leave it out"
        )
    if not run.artifact and artifacts:
        raise RecordError(
            f"{artifacts[0]} has sha256 {sha256(artifacts[0])[:12]}, the log {run.log} has "
            f"{logged[:12]}: another run wrote over it; train again in an OUT_DIR of its own"
        )
    scored = run.folder / "eval" / "score.json"
    if not run.score and scored.is_file():
        raise RecordError(
            f"{scored} is damaged, or of another artifact than {logged[:12]} of "
            f"{run.log}; run eval_final.py again, or remove it"
        )


def require_same(results: list[Result], field: str, of: Callable[[Result], Any]) -> None:
    """Refuse runs whose values differ; the error names the first two that do."""
    first = results[0]
    for other in results[1:]:
        a, b = of(first), of(other)
        if a != b:
            raise RecordError(
                f"{first.run.log} and {other.run.log} differ in {field}: {short_value(a)} and "
                f"{short_value(b)}; a record is one experiment, so that only the seed may differ"
            )


def short_value(value: Any) -> str:
    """Return a value for an error line: 12 digits of a hash, 60 characters of JSON."""
    return value[:12] if type(value) is str and len(value) == 64 else json.dumps(value)[:60]


def check_one_experiment(
    results: list[Result], free_in_training: set[str], free_in_evaluation: set[str]
) -> None:
    """Refuse runs that differ in more than the seed; settings in the two sets may differ."""
    seen: dict[int, Path] = {}
    for result in results:
        log = result.run.log
        other = seen.setdefault(result.seed, log)
        if other != log:
            raise RecordError(
                f"{other} and {log} both have seed {result.seed}; a record takes one run a seed"
            )
    for name in ("code", "tokenizer", "data"):
        require_same(
            results,
            f"the hash of their {name}",
            lambda r, n=name: dict_at(r.run.event("start"), "sha256").get(n),
        )
    for name in sorted({n for r in results for n in r.run.settings} - free_in_training):
        require_same(results, name.upper(), lambda r, n=name: r.run.settings.get(n))
    evaluated = [r for r in results if r.run.score]
    missing = next((r for r in results if not r.run.score), None)
    if evaluated and missing:
        raise RecordError(
            f"{evaluated[0].run.log} was evaluated, "
            f"{missing.run.log} was not; run eval_final.py on every run, or on none"
        )
    for name in ("tokens", "bytes"):
        require_same(results, f"the {name} they score", lambda r, n=name: getattr(r, n))
    if evaluated:
        require_same(
            results,
            "the hash of the split they score",
            lambda r: dict_at(r.run.score, "sha256").get("data"),
        )
        names = {n for r in results for n in dict_at(r.run.score, "settings")}
        for name in sorted(names - free_in_evaluation):
            require_same(
                results,
                f"{name.upper()} of the evaluation",
                lambda r, n=name: dict_at(r.run.score, "settings").get(n),
            )
