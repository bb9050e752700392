"""List the runs of this folder and of out/, newest last.

Each finished training or evaluation adds a line to OUT_DIR/runs.jsonl. A filter is key=value,
key!=value, key<value or key>value; the key is a column or a setting. Quote < and >.

Example:
    fairway runs preset=cpu 'final_bpb<2.5'
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fairway.records import history

    parser.add_argument("filters", nargs="*", metavar="FILTER")
    parser.add_argument("--json", action="store_true", help="print the rows with all they hold")
    history.add_file_option(parser)


def run(options: argparse.Namespace) -> int:
    from fairway.records import history

    found = history.read_here(options.file, "fairway runs")
    rows = history.filter_rows(found.rows, options.filters)
    print(history.rows_json(rows) if options.json else history.listing(rows))
    return 0
