"""Compare the scores of one record with those of another by both tests in use, in nats.

Example:
    fairway significance records/*/*_CPU_150s records/*/*_CPU_150s
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("new", type=Path, metavar="NEW")
    parser.add_argument("old", type=Path, metavar="OLD")


def run(options: argparse.Namespace) -> int:
    from fairway.records.t_tests import read_seeds, significance_text

    print(significance_text(read_seeds(options.new), read_seeds(options.old)))
    return 0
