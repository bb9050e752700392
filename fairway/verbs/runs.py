"""List the runs of this folder and of out/, newest last.

Each finished training or evaluation adds a line to OUT_DIR/runs.jsonl. A filter is key=value,
key!=value, key<value or key>value; the key is a column or a setting. Quote < and >.

Example:
    fairway runs preset=cpu 'final_bpb<2.5'
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filters", nargs="*", metavar="FILTER")
    parser.add_argument("--json", action="store_true", help="print the rows with all they hold")
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
        print(f"fairway runs: {history.damage_text(found)}", file=sys.stderr)
    rows = history.filter_rows(found.rows, options.filters)
    print(history.rows_json(rows) if options.json else history.listing(rows))
    return 0
