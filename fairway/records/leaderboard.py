"""records/README.md: all records in a table, best score first, written from their
submission.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fairway.records.files import RecordError, read_json, read_text, replace_text
from fairway.records.markdown import markdown_cell, markdown_table
from fairway.records.schema import read_submission

TITLES = {
    "track_10min_16mb": "10 minutes on 8×H100, 16 MB",
    "track_non_record_16mb": "16 MB, no record",
}
HEAD = ("rank", "BPB", "record", "date", "author", "hardware", "bytes")


class LeaderboardLine(NamedTuple):
    """One record. Lines sort by score, then date."""

    bpb: float
    date: str
    link: str  # relative to records/
    name: str
    author: str
    hardware: str
    bytes: int | None


def read_line(folder: Path, records: Path) -> LeaderboardLine:
    """Read one record; the error names the folder and its fault."""
    path = folder / "submission.json"
    if not path.is_file():
        raise RecordError(f"{folder} has no submission.json; pack it again, or remove it")
    data = read_submission(read_json(path))
    if data.val_bpb is None:
        raise RecordError(f"{path} has no val_bpb; repair it, or remove {folder}")
    return LeaderboardLine(
        data.val_bpb,
        data.date or "",
        quote(folder.relative_to(records).as_posix()),
        data.name or folder.name,
        data.author or "",
        data.hardware or "",
        data.bytes_total,
    )


def leaderboard_text(records: Path) -> str:
    """Return the text of records/README.md; the same folders give the same bytes."""
    parts = [
        "# Records",
        "Made by `fairway table` from each record's submission.json, not typed by hand. "
        "BPB: bits per byte, the mean over seeds; lower is better.",
    ]
    tracks = sorted(path for path in records.glob("track_*") if path.is_dir())
    for track in tracks:
        folders = sorted(
            path for path in track.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        lines = sorted(read_line(folder, records) for folder in folders)
        if lines:
            parts += [
                f"## {markdown_cell(TITLES.get(track.name, track.name))}",
                markdown_table(HEAD, [])
                + "".join(f"\n{leaderboard_row(rank, line)}" for rank, line in enumerate(lines, 1)),
            ]
    if len(parts) == 2:
        parts.append("There are no records yet. `fairway pack` makes the first.")
    return "\n\n".join(parts) + "\n"


def leaderboard_row(rank: int, line: LeaderboardLine) -> str:
    size = "" if line.bytes is None else f"{line.bytes:,}"
    cells = [
        str(rank),
        f"{line.bpb:.6f}",
        f"[{markdown_cell(line.name)}]({line.link})",
        markdown_cell(line.date),
        markdown_cell(line.author),
        markdown_cell(line.hardware),
        size,
    ]
    return f"| {' | '.join(cells)} |"


def is_stale(records: Path) -> bool:
    """Tell whether the file on disk differs from what the folders give."""
    path = records / "README.md"
    return not path.is_file() or read_text(path) != leaderboard_text(records)


def write_leaderboard(records: Path) -> Path:
    records.mkdir(parents=True, exist_ok=True)
    replace_text(records / "README.md", leaderboard_text(records))
    return records / "README.md"
