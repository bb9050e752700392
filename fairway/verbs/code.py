"""List the files that a record ships next to train_gpt.py, separated by commas.

Training reserves their bytes: EXTRA_CODE_FILES=$(fairway code) python train_gpt.py. Without a run,
these are the files that eval_final.py imports when it starts; with one, the files that its score
used.

Example:
    fairway code
"""

from __future__ import annotations

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", nargs="?", type=Path, metavar="RUN", help="an OUT_DIR that eval_final.py scored"
    )


def run(options: argparse.Namespace) -> int:
    from fairway.records.packing import shipped_files
    from fairway.records.run import read_run

    names = shipped_files(ROOT, [read_run(options.run)] if options.run else [])
    print(",".join(name for name in names if name != "train_gpt.py"))
    return 0
