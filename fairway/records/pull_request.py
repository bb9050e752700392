"""The pull request that adds a record: refused unless the folder passes and is the only change."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from fairway.records import checks
from fairway.records.files import RecordError, read_json
from fairway.records.markdown import SCORE_DECIMALS, markdown_cell, markdown_table
from fairway.records.schema import read_submission


def pull_request_text(folder: Path) -> str:
    """Return branch, commit subject and body."""
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder; name a record's")
    folder = folder.resolve()
    dated = re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name)
    if not dated or not folder.parent.name.startswith("track_"):
        raise RecordError(
            f"{folder} is not called track_…/YYYY-MM-DD_…; name a folder that `fairway pack` wrote"
        )
    failed = [r.check for r in checks.check_record(folder) if r.verdict == "FAIL"]
    if failed:
        raise RecordError(f"{folder} fails {', '.join(failed)}; see `fairway check {folder}`")
    check_repository(folder)
    data = read_submission(read_json(folder / "submission.json"))
    where = f"records/{folder.parent.name}/{folder.name}"
    if data.val_bpb is None:
        raise RecordError(f"{folder}/submission.json has no val_bpb; pack it again")
    kind = "Non-record" if "non_record" in folder.parent.name else "Record"
    name, bpb = markdown_cell(data.name or folder.name), f"{data.val_bpb:.{SCORE_DECIMALS}f}"
    title = f"{kind}: {name}, val_bpb {bpb}"
    rows = [
        [seed, *("" if v is None else v for v in (r.val_bpb, r.val_loss, r.steps, r.bytes))]
        for seed, r in data.seed_results.items()
    ]
    size = ""
    if data.bytes_total is not None:
        size = f"Bytes, largest artifact and code: {data.bytes_total:,}. "
    branch = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-")
    return "\n\n".join(
        [
            f"branch: record/{branch}\ncommit: {title}",
            f"# {title}",
            markdown_cell(data.blurb or ""),
            markdown_table(("seed", "val_bpb", "val_loss", "steps", "artifact bytes"), rows),
            f"{size}Hardware: {markdown_cell(data.hardware or 'not stated')}.",
            f"This adds the folder `{where}` and changes nothing else. `{where}/README.md` says "
            "how it was made and how to repeat it.",
        ]
    )


def check_repository(folder: Path) -> None:
    """In a git repository, refuse any change outside this folder, and any file of it that git would
    leave out.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace"
        )

    if not shutil.which("git") or git("rev-parse", "--is-inside-work-tree").returncode:
        return
    top = Path(git("rev-parse", "--show-toplevel").stdout.strip())
    inside = folder.relative_to(top.resolve()).as_posix() + "/"
    states = git(
        *("status", "--porcelain", "-z", "--no-renames"),
        *("--untracked-files=all", "--ignored=matching"),
    )
    if states.returncode:
        raise RecordError(f"git status fails in {folder}: {states.stderr.strip()[:200]}")
    for entry in filter(None, states.stdout.split("\0")):
        state, path = entry[:2], entry[3:]
        ours = path.startswith(inside)
        if not ours and state != "!!":
            raise RecordError(
                f"{path} is changed or new as well; a pull request adds one folder: commit or "
                "stash it elsewhere first"
            )
        if ours and state == "!!" and "__pycache__" not in path:
            raise RecordError(f"{path} is ignored by git; take it out of .gitignore")
        if ours and state not in ("??", "A ", "!!"):
            raise RecordError(
                f"{path} was committed before and is changed now; a pull request adds a new "
                "folder: pack with another --slug"
            )
