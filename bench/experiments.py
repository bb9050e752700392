"""Write the table of docs/EXPERIMENTS.md from its entries.

    python bench/experiments.py

An entry is a heading of three hashes and the fields Status, Files, Measured and Decided by, then
its text. The table stands between two markers; tests/test_experiments.py holds it to the entries.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parents[1] / "docs" / "EXPERIMENTS.md"
START, END = "<!-- experiments -->\n", "<!-- end of experiments -->"
STATUSES = ("shipping", "prototype", "shelved", "rejected", "planned")
FIELDS = ("Status", "Files", "Measured", "Decided by")


class Experiment(NamedTuple):
    """One entry of the page; `files` are the paths that it names in backticks."""

    idea: str
    status: str
    files: list[str]
    measured: str
    decided_by: str
    text: str


def read_entry(block: str) -> Experiment:
    """Read an entry from its heading on; a field goes on until the next one or a blank line."""
    title, _, body = block.partition("\n")
    head, _, text = body.strip().partition("\n\n")
    parts = re.split(rf"^({'|'.join(FIELDS)}): ", head, flags=re.M)
    if parts[0].strip() or tuple(parts[1::2]) != FIELDS:
        raise SystemExit(f"{PAGE.name}: {title!r} must begin with the fields {', '.join(FIELDS)}")
    status, files, measured, decided_by = (" ".join(part.split()) for part in parts[2::2])
    return Experiment(
        title.strip(), status, re.findall(r"`([^`]+)`", files), measured, decided_by, text.strip()
    )


def read_experiments(page: str) -> list[Experiment]:
    """Return the entries of a page, in its order."""
    blocks = re.split(r"^### ", page, flags=re.M)[1:]
    return [read_entry(re.split(r"^## ", block, flags=re.M)[0]) for block in blocks]


def anchor(title: str) -> str:
    """Return the fragment that GitHub gives a heading: "A b, c" is a-b-c."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def table(experiments: list[Experiment]) -> str:
    """Return the number of entries of each status, and a row for each entry."""
    counts = Counter(e.status for e in experiments)
    summary = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    rows = [
        f"| {number} | [{e.idea}](#{anchor(e.idea)}) | {e.status} | {e.decided_by} |"
        for number, e in enumerate(experiments, 1)
    ]
    return "\n".join(
        [
            f"{len(experiments)} entries: {summary}.",
            "",
            "| | idea | status | decided by |",
            "|--:|---|---|---|",
            *rows,
            "",
        ]
    )


def with_table(page: str) -> str:
    """Return the page with the table of its entries between its two markers."""
    before, rest = page.split(START, 1)
    return before + START + table(read_experiments(page)) + END + rest.split(END, 1)[1]


def main() -> None:
    """Rewrite the page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.name}: {len(read_experiments(PAGE.read_text(encoding='utf-8')))} entries")


if __name__ == "__main__":
    main()
