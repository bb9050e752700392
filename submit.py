"""From runs to a record: pack it, judge it, compare it, list it.

    python submit.py pack out/seed42 out/seed314 out/seed999 --track 10min_16mb --slug Gates --author "A. N." \\
      --github-id an
    python submit.py COMMAND --help

Reads what runs left on disk, and never loads a model.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fairway.records.files import RecordError

ROOT = Path(__file__).resolve().parent
COLOURS = {"ok": "\x1b[32m", "FAIL": "\x1b[31;1m", "cannot tell": "\x1b[33m"}


class Parser(argparse.ArgumentParser):
    """One line for a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"submit: error: {' '.join(message.split())}; see {self.prog} --help\n")


# ==== COMMANDS ========================================================================================================
def pack(args: argparse.Namespace) -> int:
    from fairway.records.packing import Entry, pack

    entry = Entry(
        args.track,
        args.slug,
        args.author,
        args.github_id,
        args.name,
        args.blurb,
        args.date,
        args.against,
        args.pack_code,
    )
    folder = pack(
        args.runs, entry, ROOT, args.out, args.replace, told=lambda text: print(text, flush=True)
    )
    print(folder)
    failed = judge([folder], as_json=False, run=False)
    if failed:
        print(
            "next: mend what FAILs, then pack again with --replace; `python submit.py check --run` also runs it"
        )
    return failed


def check(args: argparse.Namespace) -> int:
    return judge(args.folders, args.json, args.run)


def judge(folders: Sequence[Path], as_json: bool, run: bool) -> int:
    """1 where any check FAILs."""
    from fairway.records.checks import check

    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise RecordError(f"{folder} is no folder; name a record's")
        if run:
            print(
                f"running {folder} from inside a copy of itself; this takes minutes",
                file=sys.stderr,
            )
        found[str(folder)] = check(folder, run)
        if not as_json:
            print_verdicts(folder if len(folders) > 1 else None, found[str(folder)])
    if as_json:
        print(
            json.dumps(
                {name: [v._asdict() for v in verdicts] for name, verdicts in found.items()},
                indent=1,
            )
        )
    return int(any(v.verdict == "FAIL" for verdicts in found.values() for v in verdicts))


def print_verdicts(folder: Path | None, verdicts: Sequence) -> None:
    if folder is not None:
        print(f"== {folder}")
    for v in verdicts:
        colour, plain = (COLOURS.get(v.verdict, ""), "\x1b[0m") if sys.stdout.isatty() else ("", "")
        print(f"{colour}{v.verdict:11}{plain}  {v.check:14}  {v.text}")
        for warning in v.warnings:
            print(f"{'':13}{warning}")
    counts = {kind: sum(v.verdict == kind for v in verdicts) for kind in COLOURS}
    print(
        ", ".join(f"{count} {kind}" for kind, count in counts.items())
        + f", {sum(len(v.warnings) for v in verdicts)} warnings",
        flush=True,
    )


def significance(args: argparse.Namespace) -> int:
    from fairway.records.significance import report, seeds_of

    print(report(seeds_of(args.new), seeds_of(args.old)))
    return 0


def table(args: argparse.Namespace) -> int:
    from fairway.records.leaderboard import stale, write_table

    if args.check:
        if stale(args.records):
            raise RecordError(
                f"{args.records / 'README.md'} is stale: run `python submit.py table`"
            )
        print(f"{args.records / 'README.md'} is up to date")
    else:
        print(write_table(args.records))
    return 0


def pr(args: argparse.Namespace) -> int:
    from fairway.records.packing import pull_request

    print(pull_request(args.folder))
    return 0


def report(args: argparse.Namespace) -> int:
    from fairway.report import write_report

    print(write_report(args.runs, args.out))
    return 0


def runs(args: argparse.Namespace) -> int:
    """`runs diff A B` is `diff A B`."""
    from fairway.records.history import as_json, chosen, listing

    if args.filters[:1] == ["diff"] and len(args.filters) == 3:
        args.a, args.b = args.filters[1:]
        return diff(args)
    rows = chosen(history_of(args).rows, args.filters)
    print(as_json(rows) if args.json else listing(rows))
    return 0


def diff(args: argparse.Namespace) -> int:
    from fairway.records.history import compare, find_row

    history = history_of(args)
    print(compare(find_row(args.a, history), find_row(args.b, history)))
    return 0


def history_of(args: argparse.Namespace):
    from fairway.records.history import find_files, read_history

    history = read_history(args.file or find_files(Path.cwd()))
    if history.damaged:
        print(
            f"submit: {len(history.damaged)} damaged lines left out: {', '.join(history.damaged[:5])}"
            + (" …" if len(history.damaged) > 5 else ""),
            file=sys.stderr,
        )
    return history


def code(_: argparse.Namespace) -> int:
    from fairway.records.packing import evaluation_files

    print(
        ",".join(
            name for path in evaluation_files(ROOT) if (name := path.as_posix()) != "train_gpt.py"
        )
    )
    return 0


# ==== ARGUMENTS =======================================================================================================
def parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="submit.py", description=__doc__, formatter_class=plain, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(does, what: str, example: str) -> argparse.ArgumentParser:
        name = does.__name__
        made = commands.add_parser(
            name,
            help=what,
            formatter_class=plain,
            allow_abbrev=False,
            description=f"{what}\n\n    python submit.py {name} {example}",
        )
        made.set_defaults(does=does)
        return made

    add_pack(
        command(
            pack,
            "Write a record's folder from finished runs.",
            "out/seed42 out/seed314 out/seed999 --track "
            '10min_16mb --slug SmearGate --author "A. N." --github-id an',
        )
    )
    one = command(
        check,
        "Judge record folders, ours or anyone's: a line a check.",
        "records/track_10min_16mb/* --json",
    )
    one.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    one.add_argument("--json", action="store_true", help="{folder: [verdicts]}")
    one.add_argument(
        "--run",
        action="store_true",
        help="also run the folder from inside itself, in a sandboxed copy",
    )
    one = command(
        significance,
        "Both tests of one record against another, in nats.",
        "records/track_10min_16mb/NEW records/track_10min_16mb/OLD",
    )
    one.add_argument("new", type=Path, metavar="NEW")
    one.add_argument("old", type=Path, metavar="OLD")
    one = command(table, "Rewrite records/README.md from the records.", "--check")
    one.add_argument("--check", action="store_true", help="write nothing; exit 1 where it is stale")
    one.add_argument("--records", type=Path, default=ROOT / "records", metavar="DIR")
    one = command(
        pr,
        "Print branch, commit and body of the pull request that adds a record.",
        "records/track_10min_16mb/2026-05-01_SmearGate",
    )
    one.add_argument("folder", type=Path, metavar="FOLDER")
    one = command(
        report, "One HTML page and its pictures, of one run or several.", "out/seed42 --out report"
    )
    one.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    one.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    one = command(
        runs,
        "List what was run, newest last; filters: key=value key!=value 'key<value' 'key>value'.",
        "num_layers=11 'final_bpb<1.12'",
    )
    one.add_argument("filters", nargs="*", metavar="FILTER")
    one.add_argument("--json", action="store_true")
    two = command(
        diff,
        "What differs between two runs (number of the list, run id, OUT_DIR or log), and what it did.",
        "3 out/seed42",
    )
    two.add_argument("a", metavar="A")
    two.add_argument("b", metavar="B")
    for which in (one, two):
        which.add_argument(
            "--file",
            type=Path,
            action="append",
            metavar="runs.jsonl",
            help="instead of those in this folder and below out/; may be given again",
        )
    command(
        code,
        "Files that a record ships beside train_gpt.py: EXTRA_CODE_FILES=$(python submit.py code)",
        "",
    )
    return top


def add_pack(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="an OUT_DIR, or its logs/RUN_ID.txt"
    )
    one.add_argument("--track", required=True, choices=("10min_16mb", "non_record_16mb"))
    one.add_argument("--slug", required=True, help="the folder's name after the date")
    one.add_argument("--author", required=True)
    one.add_argument("--github-id", required=True)
    one.add_argument("--name", default="", help="in tables; unset: the slug's words")
    one.add_argument("--blurb", default="", help="a sentence or two; unset: made of the settings")
    one.add_argument("--date", default="", metavar="YYYY-MM-DD", help="unset: today")
    one.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="the record before: what changed, and both tests",
    )
    one.add_argument(
        "--pack-code",
        default="",
        choices=("lzma",),
        help="two stubs, an archive, and source/ to be read",
    )
    one.add_argument("--out", type=Path, default=ROOT / "records", metavar="DIR")
    one.add_argument(
        "--replace", action="store_true", help="the folder of that name, if there is one"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `submit.py runs | head` ends in silence
    args = parser().parse_args(arguments)
    try:
        return args.does(args)
    except RecordError as e:
        message = str(e)
    except OSError as e:
        message = f"{e.filename or 'files'}: {e.strerror or e}; free space, or name another place"
    except KeyboardInterrupt:
        print("submit: interrupted; nothing is half-written", file=sys.stderr)
        return 130
    with contextlib.suppress(IndexError):
        print(f"submit: error: {message.splitlines()[0]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
