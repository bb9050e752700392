"""Draw one run or several as one HTML page, with its pictures as PNG files next to it.

Example:
    fairway report . --out report
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="an OUT_DIR, or its logs/RUN_ID.txt"
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")


def run(options: argparse.Namespace) -> int:
    from fairway.report import write_report

    print(write_report(options.runs, options.out))
    return 0
