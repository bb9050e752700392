"""Published training runs, and how far the plan is from them.

published.csv has one row for a record's log: numbers of the log and the settings of the run, as
this trainer names them. docs/PLANNING.md says which records it leaves out and why. The rule for
the held-out half was set before anything was fitted: of the rows on 8xH100, ordered by pull
request, every second one is held out. Runs on other machines are never fitted either.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

from fairway.planning.machines import GpuHost, parse_machine
from fairway.planning.trainer_settings import read_settings

TABLE = "published.csv"
FITTED_MACHINE = "8xh100"


class PublishedRun(NamedTuple):
    """One row: a log of a record of the challenge."""

    pull_request: int  # 0: the baseline that the challenge started with
    folder: str
    log: str
    machine: GpuHost
    attention: str
    cfg: Any
    step_ms: float  # training time over steps
    parameters: int
    peak_mib: int | None
    val_tokens: int
    sliding_seconds: float | None  # of sliding windows with stride 64
    held_out: bool


def published_runs() -> list[PublishedRun]:
    """Read the table that lies next to this module."""
    with open(Path(__file__).with_name(TABLE), encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    runs, ordinal = [], 0
    for row in rows:
        fitted = row["gpus"] == FITTED_MACHINE
        runs.append(
            PublishedRun(
                int(row["pr"]),
                row["folder"],
                row["log"],
                parse_machine(row["gpus"]),
                row["attention"],
                read_settings("baseline", row["settings"].split()),
                1000 * float(row["train_s"]) / int(row["steps"]),
                int(row["parameters"]),
                int(row["peak_mib"]) if row["peak_mib"] else None,
                int(row["val_tokens"]),
                float(row["sliding_s"]) if row["sliding_s"] else None,
                ordinal % 2 == 1 or not fitted,
            )
        )
        ordinal += fitted
    return runs
