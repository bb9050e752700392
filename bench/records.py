"""Run all checks on record folders, and print results and processor seconds of each folder.

    python bench/records.py [FOLDER…]

Without arguments it uses the zoo of tests/zoo/records, good and bad. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from short_run import ROOT

from fairway.records.checks import check_record


def make_zoo(out: str) -> list[Path]:
    """Write the records of the zoo, and return their folders."""
    subprocess.run(
        [sys.executable, "-m", "tests.zoo.records", out],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return sorted(Path(out).glob("*/*"))


def check_folder(folder: Path) -> dict:
    """Run all checks on a folder; return their results and the processor seconds."""
    began = time.process_time()
    verdicts = check_record(folder)
    seconds = time.process_time() - began
    return dict(
        folder=f"{folder.parent.name}/{folder.name}",
        seconds=seconds,
        verdicts=Counter(v.verdict for v in verdicts),
        failed=[v for v in verdicts if v.verdict == "FAIL"],
    )


def main() -> None:
    """Check each folder, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    folders = parser.parse_args().folders
    with tempfile.TemporaryDirectory() as out:
        rows = [check_folder(folder) for folder in folders or make_zoo(out)]
    print(f"{'folder':95}   ok  FAIL  cannot tell  seconds")
    for row in rows:
        counts = [row["verdicts"][verdict] for verdict in ("ok", "FAIL", "cannot tell")]
        print(
            f"{row['folder']:95} {counts[0]:4} {counts[1]:5} {counts[2]:12} {row['seconds']:8.2f}"
        )
        for verdict in row["failed"]:
            print(f"    FAIL {verdict.check}: {verdict.text}")
    times = sorted(row["seconds"] for row in rows)
    print(
        json.dumps(
            dict(
                folders=len(rows),
                without_fail=sum(not row["failed"] for row in rows),
                fails=sum(len(row["failed"]) for row in rows),
                median_seconds=times[len(times) // 2],
                most_seconds=times[-1],
            )
        )
    )


if __name__ == "__main__":
    main()
