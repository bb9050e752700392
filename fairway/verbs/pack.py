"""Write a record's folder from finished runs, then judge it as `fairway check` does.

Code ships packed: an LZMA archive, two stubs that run it, and the readable source next to it.

Example:
    fairway pack . --track non_record_16mb --slug SmearGate --author "A. N." --github-id an
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="an OUT_DIR, or its logs/RUN_ID.txt")
    add("--track", required=True, choices=("10min_16mb", "non_record_16mb"))
    add("--slug", required=True, help="the folder's name after the date")
    add("--author", required=True)
    add("--github-id", required=True)
    add("--name", default="", help="title in tables; default: the slug's words")
    add("--blurb", default="", help="a sentence or two; default: written from the settings")
    add("--date", default="", metavar="YYYY-MM-DD", help="default: today")
    add(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="the record before: list what changed and run both significance tests",
    )
    add(
        "--pack-code",
        default="lzma",
        choices=("lzma", "none"),
        help="lzma (default): code ships in an archive; none: as plain files",
    )
    add(
        "--with-artifact",
        action="store_true",
        help="put the artifact of the first seed into the folder, for those who want to run it",
    )
    add("--out", type=Path, default=ROOT / "records", metavar="DIR")
    add("--replace", action="store_true", help="replace a folder of the same name")


def run(options: argparse.Namespace) -> int:
    from fairway.records.checks import check_record, results_text
    from fairway.records.packing import Entry, pack_record
    from fairway.report import draw_picture

    entry = Entry(
        options.track,
        options.slug,
        options.author,
        options.github_id,
        options.name,
        options.blurb,
        options.date,
        options.against,
        options.pack_code,
        options.with_artifact,
    )
    folder = pack_record(
        options.runs,
        entry,
        ROOT,
        options.out,
        draw_picture,
        replace=options.replace,
        on_progress=lambda line: print(line, flush=True),
    )
    print(folder)
    results = check_record(folder)
    print(results_text(results, sys.stdout.isatty()))
    failed = any(result.verdict == "FAIL" for result in results)
    if failed:
        print(
            "next: repair what FAILs, then pack again with --replace; "
            "`fairway check --run` also runs the folder"
        )
    return int(failed)
