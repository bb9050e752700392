"""Show how two runs differ in settings, data and code, and what that changed in score, bytes and
time.

A run is named by its number in `fairway runs`, its run id, its OUT_DIR, or its log.

Example:
    fairway diff 1 logs/cpu.txt
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fairway.records import history

    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    history.add_file_option(parser)


def run(options: argparse.Namespace) -> int:
    from fairway.records import history

    found = history.read_here(options.file, "fairway diff")
    a, b = (history.find_row(name, found) for name in (options.a, options.b))
    print(history.compare_runs(a, b))
    return 0
