"""A record folder, judged: one verdict a check, FAIL only where the folder itself shows the fault.

`check(folder)` takes anyone's folder, in any of the log dialects, and raises for nothing that lies in it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fairway.records.checks import claims, course, size, source
from fairway.records.checks.base import Outcome, Verdict
from fairway.records.files import need
from fairway.records.folder import Folder, read_folder

__all__ = ["CHECKS", "Verdict", "check", "judge"]

CHECKS: dict[str, Callable[[Folder], str]] = (
    size.CHECKS | claims.CHECKS | course.CHECKS | source.CHECKS
)


def check(folder: str | Path, run: bool = False) -> list[Verdict]:
    """One verdict for each of CHECKS; with `run`, one more: `run`, of the folder as it runs in a sandbox."""
    need(Path(folder).is_dir(), f"{folder} is no folder; name a record's folder")
    read = read_folder(folder)
    verdicts = [judge(name, read) for name in CHECKS]
    if run:
        from fairway.records.sandbox import check_run

        verdicts.append(judged("run", check_run, read))
    return verdicts


def judge(name: str, folder: Folder) -> Verdict:
    """One check alone."""
    return judged(name, CHECKS[name], folder)


def judged(name: str, judging: Callable[[Folder], str], folder: Folder) -> Verdict:
    try:
        return Verdict(name, "ok", one_line(judging(folder)), [])
    except Outcome as e:
        return Verdict(name, e.verdict, one_line(e.text), [one_line(w) for w in e.warnings])
    except Exception as e:  # no folder may end the judgement of the others
        return Verdict(
            name,
            "cannot tell",
            one_line(f"this check broke on the folder: {type(e).__name__}: {e}"),
            [],
        )


def one_line(text: str) -> str:
    """Printable, without control characters of a hostile file, and no longer than a screen or two."""
    return "".join(c if c.isprintable() else " " for c in text)[:400]
