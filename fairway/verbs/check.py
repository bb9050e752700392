"""Judge record folders, ours or anyone's: one line for each check.

A check says ok, FAIL, or "cannot tell". The exit code is 1 if any check fails.

Example:
    fairway check records/track_non_record_16mb/* --json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--json", action="store_true", help="print {folder: [results]}")
    parser.add_argument(
        "--run", action="store_true", help="also run the folder's code, in a sandboxed copy"
    )


def run(options: argparse.Namespace) -> int:
    from fairway.records import checks

    results = {}
    for folder in options.folders:
        if options.run:
            print(f"running a copy of {folder}; this takes minutes", file=sys.stderr)
        results[str(folder)] = checks.check_record(folder, options.run)
        if not options.json:
            if len(options.folders) > 1:
                print(f"== {folder}")
            print(checks.results_text(results[str(folder)], sys.stdout.isatty()), flush=True)
    if options.json:
        rows = {name: [result._asdict() for result in own] for name, own in results.items()}
        print(json.dumps(rows, indent=1))
    return int(any(result.verdict == "FAIL" for own in results.values() for result in own))
