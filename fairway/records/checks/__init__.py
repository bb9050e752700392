"""Judge a record folder: one result for each check; FAIL only if the folder itself shows the fault.

`check_record(folder)` takes anyone's folder, in any of the log dialects. Nothing in it raises an
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fairway.records.checks import claims, course, size, source
from fairway.records.checks.base import CheckResult, CheckStopped
from fairway.records.files import RecordError
from fairway.records.folder import RecordFolder, read_record_folder

__all__ = ["CHECKS", "CheckResult", "check_record", "results_text", "run_check"]

VERDICT_COLOURS = {"ok": "\x1b[32m", "FAIL": "\x1b[31;1m", "cannot tell": "\x1b[33m"}
CHECKS: dict[str, Callable[[RecordFolder], str]] = (
    size.SIZE_CHECKS | claims.CLAIM_CHECKS | course.COURSE_CHECKS | source.SOURCE_CHECKS
)


def check_record(folder: str | Path, run: bool = False) -> list[CheckResult]:
    """Return the result of each check; with `run`, one more for the folder as it runs in a
    sandbox.
    """
    if not Path(folder).is_dir():
        raise RecordError(f"{folder} is no folder; name a record's folder")
    read = read_record_folder(folder)
    verdicts = [run_check(name, read) for name in CHECKS]
    if run:
        from fairway.records.sandbox import check_run

        verdicts.append(check_result("run", check_run, read))
    return verdicts


def run_check(name: str, folder: RecordFolder) -> CheckResult:
    """Run one check alone."""
    return check_result(name, CHECKS[name], folder)


def check_result(
    name: str, judging: Callable[[RecordFolder], str], folder: RecordFolder
) -> CheckResult:
    """Run a check and return its result, however it ends."""
    try:
        return CheckResult(name, "ok", printable_line(judging(folder)), [])
    except CheckStopped as e:
        return CheckResult(
            name, e.verdict, printable_line(e.text), [printable_line(w) for w in e.warnings]
        )
    except Exception as e:  # one folder must not stop the checks of the others
        return CheckResult(
            name,
            "cannot tell",
            printable_line(f"this check broke on the folder: {type(e).__name__}: {e}"),
            [],
        )


def results_text(results: Sequence[CheckResult], colours: bool = False) -> str:
    """Return a line for each result, its warnings below it, and the counts; `colours` are for a
    terminal.
    """
    lines = []
    for result in results:
        start, end = (VERDICT_COLOURS.get(result.verdict, ""), "\x1b[0m") if colours else ("", "")
        lines.append(f"{start}{result.verdict:11}{end}  {result.check:14}  {result.text}")
        lines += [f"{'':13}{warning}" for warning in result.warnings]
    counts = {kind: sum(result.verdict == kind for result in results) for kind in VERDICT_COLOURS}
    warnings = sum(len(result.warnings) for result in results)
    totals = [*(f"{count} {kind}" for kind, count in counts.items()), f"{warnings} warnings"]
    return "\n".join([*lines, ", ".join(totals)])


def printable_line(text: str) -> str:
    """Replace control characters of a hostile file, and cut at a screen or two."""
    return "".join(c if c.isprintable() else " " for c in text)[:400]
