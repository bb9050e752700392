"""Rewrite records/README.md, the table of all records, from their submission.json files.

Example:
    fairway table --check
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the file is stale"
    )
    parser.add_argument("--records", type=Path, default=ROOT / "records", metavar="DIR")


def run(options: argparse.Namespace) -> int:
    from fairway.records.files import RecordError
    from fairway.records.leaderboard import is_stale, write_leaderboard

    if not options.check:
        print(write_leaderboard(options.records))
        return 0
    path = options.records / "README.md"
    if is_stale(options.records):
        raise RecordError(f"{path} is stale: run `fairway table`")
    print(f"{path} is up to date")
    return 0
