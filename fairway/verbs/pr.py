"""Print branch, commit subject and body of the pull request that adds a record.

The folder must pass `fairway check`, and git must show no other change.

Example:
    fairway pr records/track_non_record_16mb/*_SmearGate
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER")


def run(options: argparse.Namespace) -> int:
    from fairway.records.pull_request import pull_request_text

    print(pull_request_text(options.folder))
    return 0
