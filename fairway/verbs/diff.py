"""Show how two runs differ in settings, data and code, and what that changed in score, bytes and
time.

A run is named by its number in `fairway runs`, its run id, its OUT_DIR, or its log.

Example:
    fairway diff 1 logs/cpu.txt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        metavar="runs.jsonl",
        help="read this file instead of those found here; may be repeated",
    )


def run(options: argparse.Namespace) -> int:
    from fairway.records import history

    found = history.read_history(options.file or history.find_files(Path.cwd()))
    if found.damaged:
        print(f"fairway diff: {history.damage_text(found)}", file=sys.stderr)
    a, b = (history.find_row(name, found) for name in (options.a, options.b))
    print(history.compare_runs(a, b))
    return 0
