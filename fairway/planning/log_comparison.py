"""The figures of a run's log next to those that the plan predicted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from fairway.command_line import UsageError
from fairway.planning.evaluation_time import sliding_seconds
from fairway.planning.machines import GPUS, WORLDS, GpuHost
from fairway.planning.plan_text import rounded
from fairway.planning.planned_run import RunPlan
from fairway.planning.trainer_settings import trainer_names
from fairway.records.files import read_text
from fairway.records.logs import RunLog, parse_log

PEAK_MEMORY = re.compile(r"^peak memory allocated: ([0-9]{1,9}) MiB", re.MULTILINE)


class MeasuredRun(NamedTuple):
    """A parsed log, and the peak of memory that it states."""

    path: Path
    log: RunLog
    peak_bytes: int | None


class ComparedFigure(NamedTuple):
    """One figure, predicted and measured; their ratio is measured / predicted."""

    name: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted


def read_measured(path: Path) -> MeasuredRun:
    """Read a training log of any trainer of the challenge."""
    text = read_text(path)
    log, peaks = parse_log(text), PEAK_MEMORY.findall(text)
    if not log.last_step or not log.train_seconds:
        raise UsageError(f"--log {path} has no line of a training step with its time")
    return MeasuredRun(path, log, int(peaks[-1]) << 20 if peaks else None)


def logged_machine(run: MeasuredRun) -> GpuHost | None:
    """Return the machine that a log names; None if it names none that we know."""
    hardware = (run.log.hardware or "").lower()
    known = [gpu for name, gpu in GPUS.items() if name in hardware]
    return GpuHost(known[0], run.log.world_size) if known and run.log.world_size in WORLDS else None


def logged_preset(run: MeasuredRun) -> str:
    """Return the preset that a log of our trainer names, or ""."""
    name = run.log.settings.get("preset", "")
    return name if run.log.dialect == "fairway" and name in trainer_names()["PRESETS"] else ""


def logged_words(run: MeasuredRun) -> list[str]:
    """Return NAME=value words of a log of our trainer; none for another trainer's."""
    if run.log.dialect != "fairway":
        return []
    declared = trainer_names()["Config"].__dataclass_fields__
    plain = {"True": "1", "False": "0"}
    return [
        f"{name.upper()}={plain.get(value, value)}"
        for name, value in run.log.settings.items()
        if name in declared and declared[name].metadata["role"] not in ("place", "runtime")
    ]


def measured_sliding(log: RunLog) -> float | None:
    """Return the seconds of the last score of sliding windows that a log states."""
    seconds = [s.seconds for s in log.scores if "sliding" in s.label and s.seconds]
    return seconds[-1] if seconds else None


def compare(plan: RunPlan, run: MeasuredRun, same_machine: bool) -> list[ComparedFigure]:
    """Return the figures that both sides have; times and memory only of the same machine."""
    log, size = run.log, plan.size
    figures = [("parameters", plan.parameters.total, log.parameters)]
    if same_machine:
        figures += [
            ("ms a step", 1000 * plan.step_seconds, 1000 * log.train_seconds / log.last_step),
            ("steps", plan.steps, log.last_step),
            ("seconds of training", plan.train_seconds, log.train_seconds),
        ]
        need = plan.memory_bytes[plan.machine.count] / 1e9
        figures.append(("GB at the peak", need, run.peak_bytes and run.peak_bytes / 1e9))
        seconds = sliding_seconds(plan.cfg, plan.machine, log.tokens or plan.val_tokens)
        figures.append(("s of sliding windows", seconds, measured_sliding(log)))
    figures += [
        ("bytes of the artifact", size.model_bytes + size.tokenizer_bytes, log.artifact_bytes),
        ("bytes with code", size.total_bytes, log.total_bytes),
    ]
    return [ComparedFigure(name, p, m) for name, p, m in figures if m]


def comparison_text(plan: RunPlan, run: MeasuredRun, rows: list[ComparedFigure]) -> str:
    """Return a table of predicted, measured, measured / predicted."""
    hardware = run.log.hardware or "a machine that it does not name"
    lines = [
        f"{plan.preset} on {plan.machine.name}; the log ran on {hardware}",
        "",
        f"{'':24}{'predicted':>14}{'measured':>14}{'measured / predicted':>24}",
    ]
    for row in rows:
        whole = row.name.startswith(("bytes", "parameters", "steps"))
        texts = [f"{v:,.0f}" if whole else rounded(v) for v in (row.predicted, row.measured)]
        lines.append(f"{row.name:24}{texts[0]:>14}{texts[1]:>14}{row.ratio:24.3f}")
    if abs(rows[0].ratio - 1) > 0.02 and rows[0].name == "parameters":
        lines += ["", "The parameters differ: name the log's own settings as SETTING=value."]
    if not any(row.name == "ms a step" for row in rows):
        lines += ["", "Times are left out: the log is of another machine; name it with --gpus."]
    return "\n".join(lines)
