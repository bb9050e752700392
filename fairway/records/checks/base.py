"""What the checks share: how a check ends, what a record claims, and which of its runs the claim is about."""

from __future__ import annotations

from typing import Any, NamedTuple

from fairway.records.folder import Folder, SeedRun

BUDGET = 16_000_000  # bytes, decimal
SECONDS = 600.0  # of training, and again of evaluation
RECORD_TRACK = "10min_16mb"
PLAUSIBLE = 0.9  # bits per byte of FineWeb: under it no model of 16 MB has honestly come (1.0565 is the best, #2135)


class Verdict(NamedTuple):
    check: str
    verdict: str  # "ok", "FAIL" or "cannot tell"
    text: str  # one line, with both values
    warnings: list[str]  # "train_gpt.py:812 a hash key is made of the target"


class Outcome(Exception):
    """How a check ends when it does not return its text."""

    verdict = ""

    def __init__(self, text: str, warnings: list[str] | None = None):
        super().__init__(text)
        self.text, self.warnings = text, warnings or []


class Failed(Outcome):
    verdict = "FAIL"


class CannotTell(Outcome):
    verdict = "cannot tell"


def fail_if(holds: Any, text: str, warnings: list[str] | None = None) -> None:
    if holds:
        raise Failed(text, warnings)


def unknown_if(holds: Any, text: str, warnings: list[str] | None = None) -> None:
    if holds:
        raise CannotTell(text, warnings)


# ---- Numbers and runs ------------------------------------------------------------------------------------------------
def shown(value: float | None) -> str:
    return (
        "nothing" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.8g}"
    )


def need_runs(folder: Folder) -> list[SeedRun]:
    unknown_if(not folder.record, "the folder holds no training log")
    return folder.record


def is_record(folder: Folder) -> bool:
    return folder.track == RECORD_TRACK


def each(runs: list[SeedRun], of: Any) -> dict[str, Any]:
    """What each run's log says, by its name, of those that say it."""
    found = {run.name: of(run) for run in runs}
    return {name: value for name, value in found.items() if value is not None}
