"""The common part of all checks: how a check ends, the challenge's limits, and readings of a
folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fairway.records.folder import RecordFolder, SeedRun, scoring_log
from fairway.records.logs import RunLog

BUDGET = 16_000_000  # bytes of artifact and code together; the challenge's MB is decimal
LIMIT_SECONDS = 600.0  # for training, and again for evaluation
RECORD_TRACK = "10min_16mb"
# Bits per byte of FineWeb. No honest model of 16 MB has come below this; the best has 1.0565
# (#2135).
PLAUSIBLE = 0.9


class CheckResult(NamedTuple):
    """One line of the judgement of a folder."""

    check: str
    verdict: str  # "ok", "FAIL" or "cannot tell"
    text: str  # one line, with both values
    warnings: list[str]  # "train_gpt.py:812 a hash key is made of the target"


class CheckStopped(Exception):
    """End a check with a verdict other than "ok"; `warnings` are lines for a reader to look at."""

    verdict = ""

    def __init__(self, text: str, warnings: list[str] | None = None):
        super().__init__(text)
        self.text, self.warnings = text, warnings or []


class CheckFailed(CheckStopped):
    """The folder itself shows the fault."""

    verdict = "FAIL"


class CheckUndecided(CheckStopped):
    """The folder does not hold what the check needs."""

    verdict = "cannot tell"


# ==== READINGS OF RUNS ============================================================================
def number_text(value: float | None) -> str:
    """`number_text(16000000)` is "16,000,000"; None is "nothing"."""
    if value is None:
        return "nothing"
    return f"{value:,}" if isinstance(value, int) else f"{value:.8g}"


def claimed_runs(folder: RecordFolder) -> list[SeedRun]:
    """Return the runs that the claim is about; without a training log no check can tell
    anything.
    """
    if not folder.record:
        raise CheckUndecided("the folder holds no training log")
    return folder.record


def is_record_track(folder: RecordFolder) -> bool:
    return folder.track == RECORD_TRACK


def by_run(runs: list[SeedRun], read: Callable[[SeedRun], Any]) -> dict[str, Any]:
    """Map the name of each run to `read(run)`, leaving out the runs for which that is None."""
    values = {run.name: read(run) for run in runs}
    return {name: value for name, value in values.items() if value is not None}


def artifact_bytes(run: SeedRun) -> int | None:
    """Return the size of the artifact as the evaluation states it, else as training does."""
    for log in (scoring_log(run), run.log):
        if log.artifact_bytes is not None:
            return log.artifact_bytes
        if log.total_bytes is not None and log.code_bytes is not None:
            return log.total_bytes - log.code_bytes
    return None


def named_vocabulary(log: RunLog) -> int | None:
    """Return the vocabulary size in the name of the tokenizer or data set, such as
    `fineweb10B_sp1024`.
    """
    names = (
        log.settings.get("tokenizer_path", "").split("/")[-1],
        log.settings.get("dataset", ""),
    )
    matches = (re.search(r"_(?:sp)?(\d{3,6})(?:[_.]|$)", name) for name in names)
    return next((int(match[1]) for match in matches if match), None)


# ==== READINGS OF CODE ============================================================================
def code_bytes_in_use(folder: RecordFolder) -> int:
    """Return the bytes of the code that ships.

    A folder with several trainers and no train_gpt.py holds alternatives: only the smallest counts.
    """
    trainers = [name for name in folder.code.entries if name != "eval_final.py"]
    total = folder.code.bytes
    if len(trainers) < 2:
        return total
    return total - sum(sorted(folder.code.shipped[name] for name in trainers)[1:])


def printed_code(folder: RecordFolder, run: SeedRun) -> str:
    """Return the code that the log prints at its top.

    Launchers print lines of their own above it. Where the text holds a whole file of the folder,
    that file is it.
    """
    printed = run.log.source.strip()
    return next((text for text in source_texts(folder) if text in printed), printed)


def source_texts(folder: RecordFolder) -> list[str]:
    """Return the text of every source of the folder, as it ships and as it runs, longest first."""
    texts = {
        text.strip()
        for source in folder.code.sources.values()
        for text in (source.text, source.shipped.decode("utf-8", "replace"))
    }
    return sorted((text for text in texts if len(text) > 200), key=lambda text: (-len(text), text))
