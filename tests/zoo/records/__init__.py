"""Record folders with one fault each, and good ones: `python -m tests.zoo.records OUT` writes
them.
"""

from pathlib import Path

from tests.zoo.records.bad import BAD, Fault
from tests.zoo.records.good import GOOD, Files, make

__all__ = ["BAD", "GOOD", "Fault", "folder_name", "good_files", "table", "write"]


def folder_name(name: str) -> str:
    """`folder_name("no_code")` is "2026-05-01_no_code": a record's folder starts with its date."""
    return name if name == "undated" else f"2026-05-01_{name}"


def good_files(name: str) -> Files:
    return make(GOOD[name])


def write(files: Files, folder: Path) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def table() -> str:
    """Return the table of bad folders in docs/LEGALITY.md."""
    rows = [
        f"| `{name}` | {fault.fault} | `{fault.check}` | {fault.where} |"
        for name, fault in BAD.items()
    ]
    return "\n".join(["| folder | fault | check | where |", "|---|---|---|---|", *rows])
