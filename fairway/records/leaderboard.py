"""records/README.md: every record of a folder in a table, best score first, made of their submission.json files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from fairway.records.files import need, read_json, read_text, write_text
from fairway.records.readme import cell, table
from fairway.records.schema import normal

TITLES = {
    "track_10min_16mb": "10 minutes on 8×H100, 16 MB",
    "track_non_record_16mb": "16 MB, no record",
}
HEAD = ("rank", "BPB", "record", "date", "author", "hardware", "bytes")


class Line(NamedTuple):
    bpb: float
    date: str
    link: str  # relative to records/
    name: str
    author: str
    hardware: str
    bytes: int | None


def read_line(folder: Path, records: Path) -> Line:
    """One record, or which one cannot be read and why."""
    path = folder / "submission.json"
    need(path.is_file(), f"{folder} has no submission.json; pack it again, or remove it")
    data = normal(read_json(path))
    need(data.val_bpb is not None, f"{path} has no val_bpb; mend it, or remove {folder}")
    return Line(
        data.val_bpb,
        data.date or "",
        quote(folder.relative_to(records).as_posix()),
        data.name or folder.name,
        data.author or "",
        data.hardware or "",
        data.bytes_total,
    )


def page(records: Path) -> str:
    """The text of records/README.md: the same folders give the same bytes."""
    parts = [
        "# Records",
        "Made by `python submit.py table` from each record's submission.json, not typed by hand. "
        "BPB: bits a byte, the mean over seeds; lower is better.",
    ]
    tracks = sorted(path for path in records.glob("track_*") if path.is_dir())
    for track in tracks:
        folders = sorted(
            path for path in track.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        lines = sorted(read_line(folder, records) for folder in folders)
        if lines:
            parts += [
                f"## {cell(TITLES.get(track.name, track.name))}",
                table(HEAD, [])
                + "".join(f"\n{row(rank, line)}" for rank, line in enumerate(lines, 1)),
            ]
    if len(parts) == 2:
        parts.append("There are no records yet. `python submit.py pack` makes the first.")
    return "\n\n".join(parts) + "\n"


def row(rank: int, line: Line) -> str:
    size = "" if line.bytes is None else f"{line.bytes:,}"
    cells = [
        str(rank),
        f"{line.bpb:.6f}",
        f"[{cell(line.name)}]({line.link})",
        cell(line.date),
        cell(line.author),
        cell(line.hardware),
        size,
    ]
    return f"| {' | '.join(cells)} |"


def stale(records: Path) -> bool:
    """Whether the file on disk is another than the folders give."""
    path = records / "README.md"
    return not path.is_file() or read_text(path) != page(records)


def write_table(records: Path) -> Path:
    records.mkdir(parents=True, exist_ok=True)
    write_text(records / "README.md", page(records))
    return records / "README.md"
