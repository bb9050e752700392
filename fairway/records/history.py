"""The history of runs: runs.jsonl, one line for each finished training or evaluation."""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, parse_json, read_text
from fairway.records.run import dict_at, read_run

HISTORY_FILE = "runs.jsonl"
SHOWN_LINES = 2000  # at most, of a diff of code


class RunRow(NamedTuple):
    """A training with one evaluation of its artifact or none, or an evaluation without its
    training.
    """

    columns: dict[str, Any]  # the keys of COLUMNS; None if unknown
    training: dict[str, Any]  # lines of runs.jsonl; {} if there is none
    evaluation: dict[str, Any]
    folder: Path  # OUT_DIR of the training, else of the evaluation

    def get(self, key: str) -> Any:
        """Return a column, a setting of the training, or one of the evaluation.

        `eval.device` is the evaluation's where both have that name.
        """
        for values in (self.columns, line_settings(self.training)):
            if key in values:
                return values[key]
        return line_settings(self.evaluation).get(key.removeprefix("eval."))


# Column: its heading, and how its value is shown.
COLUMNS = {
    "number": "{}",
    "time": "{}",
    "run_id": "{}",
    "preset": "{}",
    "device": "{}",
    "world_size": "{}",
    "seed": "{}",
    "steps": "{}",
    "seconds": "{:.0f}",
    "bpb": "{:.6f}",
    "final_bpb": "{:.6f}",
    "bytes": "{}",
    "certified": "{}",
}


class History(NamedTuple):
    """All rows, and the lines that are no run."""

    rows: list[RunRow]  # oldest first
    damaged: list[str]  # `file:line` of lines that are no run


# ==== READING =====================================================================================
def find_files(root: Path) -> list[Path]:
    """Return runs.jsonl in a folder and anywhere below its out/; links are not followed."""
    paths = [root / HISTORY_FILE] + [
        Path(folder) / HISTORY_FILE
        for folder, folders, names in os.walk(root / "out")
        if HISTORY_FILE in names and folders.sort() is None
    ]
    return [path for path in paths if path.is_file()]


def read_history(files: Sequence[Path]) -> History:
    """Read these files, each once."""
    trainings, evaluations, damaged = [], [], []
    for path in dict.fromkeys(path.resolve() for path in files):
        for number, text in enumerate(read_text(path).splitlines(), 1):
            try:
                line = limit_line(parse_json(text, path))
            except RecordError:
                line = None
            hashes = dict_at(line, "start", "sha256")
            if (
                type(dict_at(line).get("time")) not in (int, float)
                or not {"code", "artifact"} & hashes.keys()
            ):
                if text.strip():
                    damaged.append(f"{path}:{number}")
            else:
                (evaluations if "artifact" in hashes else trainings).append((line, path.parent))
    return History(join_rows(trainings, evaluations), damaged)


def damage_text(history: History) -> str:
    """`damage_text(history)` is "2 damaged lines left out: runs.jsonl:3, runs.jsonl:9"."""
    more = " …" if len(history.damaged) > 5 else ""
    return f"{len(history.damaged)} damaged lines left out: {', '.join(history.damaged[:5])}{more}"


def limit_line(data: Any, depth: int = 3) -> Any:
    """Return as much of a line as a run writes: {"start": {"settings": {name: value}}}.

    Deeper values are dropped, and numbers too large to compute with become None.
    """
    if isinstance(data, dict):
        return (
            {name: limit_line(value, depth - 1) for name, value in data.items()}
            if depth >= 0
            else None
        )
    if type(data) in (int, float):
        return data if abs(data) < 1e18 else None
    return data if type(data) in (str, bool) else None


def join_rows(
    trainings: list[tuple[dict, Path]], evaluations: list[tuple[dict, Path]]
) -> list[RunRow]:
    """Pair evaluations with the training whose artifact they scored.

    Of evaluations with equal settings the last counts.
    """
    last: dict[tuple[str, str], tuple[dict, Path]] = {}
    for line, folder in sorted(evaluations, key=lambda e: e[0]["time"]):
        last[
            str(line["start"]["sha256"]["artifact"]),
            json.dumps(line_settings(line), sort_keys=True),
        ] = line, folder
    rows, known = [], set()
    for line, folder in trainings:
        artifact = str(dict_at(line, "artifact").get("sha256"))
        known.add(artifact)
        own = [evaluation for (scored, _), (evaluation, _) in last.items() if scored == artifact]
        rows += [(line, evaluation, folder) for evaluation in own or [{}]]
    rows += [
        ({}, line, folder) for (scored, _), (line, folder) in last.items() if scored not in known
    ]
    rows.sort(key=lambda r: max(r[0].get("time", 0), r[1].get("time", 0)))
    return [make_row(number, *row) for number, row in enumerate(rows, 1)]


def make_row(
    number: int | None, training: dict[str, Any], evaluation: dict[str, Any], folder: Path
) -> RunRow:
    """Return the row of a training, an evaluation, or both."""
    start, final = dict_at(training or evaluation, "start"), dict_at(evaluation, "final")
    artifact, val = dict_at(training, "artifact"), dict_at(training, "val")
    when = max(training.get("time", 0), evaluation.get("time", 0))
    code = final.get("code_bytes", artifact.get("code_bytes"))
    size = artifact.get("bytes", final.get("artifact_bytes"))
    columns = dict(
        number=number,
        time=local_time(when),
        run_id=start.get("run_id"),
        preset=start.get("preset"),
        device=start.get("device"),
        world_size=start.get("world_size"),
        seed=line_settings(training).get("seed"),
        steps=val.get("step"),
        seconds=val.get("seconds"),
        bpb=dict_at(training, "final").get("bpb"),
        final_bpb=final.get("bpb"),
        bytes=size + code if type(size) is type(code) is int else None,
        certified=final.get("certified"),
    )
    return RunRow(
        {name: None if isinstance(value, dict) else value for name, value in columns.items()},
        training,
        evaluation,
        folder,
    )


def local_time(seconds: float) -> str:
    """Return local time as text that sorts; an absurd time is shown as the number it is."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def line_settings(line: dict[str, Any]) -> dict[str, Any]:
    return dict_at(line, "start", "settings")


# ==== FILTERS =====================================================================================
class Filter(NamedTuple):
    """One condition of `fairway runs`: key, sign, value."""

    key: str
    sign: str
    value: str


def parse_filter(text: str, rows: Sequence[RunRow]) -> Filter:
    """`parse_filter("num_layers=6", rows)` is Filter("num_layers", "=", "6")."""
    match = re.fullmatch(r"([A-Za-z_][\w.]*)(!=|=|<|>)(.*)", text, re.DOTALL)
    if not match:
        raise RecordError(
            f"{text!r} is no filter; write key=value, key!=value, key<value or key>value, in quotes"
        )
    key = match[1].lower()
    known = set(COLUMNS)
    for row in rows:
        mine, others = line_settings(row.training), line_settings(row.evaluation)
        known |= {*mine, *others, *(f"eval.{name}" for name in others)}
    near = difflib.get_close_matches(key, sorted(known), 3, 0.5)
    if key not in known:
        raise RecordError(
            f"{match[1]} is neither a column nor a setting of these runs"
            + (
                f"; did you mean {' or '.join(near)}?"
                if near
                else f"; columns are {', '.join(COLUMNS)}"
            )
        )
    return Filter(key, match[2], match[3])


def passes(row: RunRow, wanted: Filter) -> bool:
    """Tell whether a row meets a condition.

    Numbers compare as numbers, everything else as text; a missing value differs from every value.
    """
    actual, value = row.get(wanted.key), wanted.value
    if actual is None:
        return wanted.sign == "!="
    if type(actual) is bool:
        actual, value = int(actual), {"true": "1", "false": "0"}.get(value.lower(), value)
    try:
        pair: tuple[Any, Any] = float(actual), float(value)
    except (ValueError, OverflowError):
        pair = str(actual), value
    return {
        "=": pair[0] == pair[1],
        "!=": pair[0] != pair[1],
        "<": pair[0] < pair[1],
        ">": pair[0] > pair[1],
    }[wanted.sign]


def filter_rows(rows: list[RunRow], filters: Sequence[str]) -> list[RunRow]:
    """Return the rows that meet all conditions."""
    parsed = [parse_filter(text, rows) for text in filters]
    return [row for row in rows if all(passes(row, wanted) for wanted in parsed)]


def listing(rows: Sequence[RunRow]) -> str:
    """Return a table for a terminal, newest last."""
    if not rows:
        return (
            "no such run: each that ends adds a line to OUT_DIR/runs.jsonl, looked for here and "
            "below out/"
        )
    lines = [
        list(COLUMNS),
        *([cell_text(form, row.columns[name]) for name, form in COLUMNS.items()] for row in rows),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def cell_text(form: str, value: Any) -> str:
    """Return a value as a cell of the table; "-" for None."""
    if value is None:
        return "-"
    if type(value) in (str, bool):
        return printable(str(value))[:40]
    return form.format(value)


def printable(text: str) -> str:
    """Replace characters that could move the cursor of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def rows_json(rows: Sequence[RunRow]) -> str:
    return json.dumps(
        [
            {
                **row.columns,
                "folder": str(row.folder),
                "training": row.training,
                "evaluation": row.evaluation,
            }
            for row in rows
        ],
        indent=1,
    )


# ==== TWO RUNS ====================================================================================
def find_row(name: str, history: History) -> RunRow:
    """Return the row of a number in the list, an OUT_DIR, a log, or a run id; of several the
    newest.
    """
    path = Path(name)
    if re.fullmatch(r"[0-9]{1,9}", name) and 1 <= int(name) <= len(history.rows):
        return history.rows[int(name) - 1]
    if path.exists():
        return row_at(path, history)
    matching = [row for row in history.rows if row.columns["run_id"] == name]
    near = difflib.get_close_matches(
        name, sorted({str(row.columns["run_id"]) for row in history.rows}), 3, 0.5
    )
    if not matching:
        raise RecordError(
            f"{name} is no number of the list, no run id in it, and no folder or log"
            + (f"; did you mean {' or '.join(near)}?" if near else "; `fairway runs` lists them")
        )
    return matching[-1]


def row_at(path: Path, history: History) -> RunRow:
    """Return the newest row of a folder, or the row of a log.

    A run from before runs.jsonl existed is read from its own log.
    """
    run = read_run(path)
    files = [run.folder / HISTORY_FILE] if (run.folder / HISTORY_FILE).is_file() else []
    known = history.rows + read_history(files).rows
    matching = [
        row
        for row in known
        if row.folder == run.folder.resolve() and row.columns["run_id"] == run.run_id
    ]
    if matching:
        return max(matching, key=lambda row: (row.columns["time"], bool(row.evaluation)))
    names = ("start", "val", "artifact", "final")
    line = limit_line({name: run.event(name) for name in names})
    if not line_settings(line):
        raise RecordError(
            f"{run.log.with_suffix('.jsonl')} names no settings; name a run's OUT_DIR or log"
        )
    when = dict_at(line, "final").get("time")
    return make_row(
        None, line | {"time": when if type(when) in (int, float) else 0}, {}, run.folder.resolve()
    )


def compare_runs(a: RunRow, b: RunRow) -> str:
    """Return how two runs differ, and how their scores, bytes and times do."""
    parts = [
        f"A  {row_title(a)}",
        f"B  {row_title(b)}",
        "",
        *settings_between(a, b),
        *hashes_between(a, b),
        "",
        *outcome(a, b),
        "",
        *code_between(a, b),
    ]
    return "\n".join(parts)


def row_title(row: RunRow) -> str:
    """Return the line that names a run in a comparison."""
    return (
        f"{cell_text('{}', row.columns['run_id'])}  {row.columns['time']}  "
        f"{printable(str(row.folder))}"
    )


def settings_between(a: RunRow, b: RunRow) -> list[str]:
    """Return one line for each setting that differs; of the evaluation too if both have one."""
    lines = []
    for label, one, other in (("", a.training, b.training), ("eval.", a.evaluation, b.evaluation)):
        first, second = line_settings(one), line_settings(other)
        if first and second:
            lines += [
                (f"{label}{name}", first.get(name), second.get(name))
                for name in sorted(first | second)
                if first.get(name) != second.get(name)
            ]
    width = max((len(name) for name, *_ in lines), default=0)
    return [f"{printable(name):{width}}  {value(x)} -> {value(y)}" for name, x, y in lines] or [
        "no setting differs"
    ]


def value(of: Any) -> str:
    return "(none)" if of is None else json.dumps(of)[:80]


def hashes_between(a: RunRow, b: RunRow) -> list[str]:
    """Return one line for each hash that differs."""
    first, second = (
        dict_at(row.training, "start", "sha256")
        | {
            "validation" if name == "data" and row.training else name: digest
            for name, digest in dict_at(row.evaluation, "start", "sha256").items()
        }
        for row in (a, b)
    )
    return [
        f"{printable(name)} differs: {str(first[name])[:12]} -> {str(second[name])[:12]}"
        for name in sorted(first.keys() & second.keys())
        if first[name] != second[name] and name != "settings"
    ]


def outcome(a: RunRow, b: RunRow) -> list[str]:
    """Return scores, bytes and times of both, each with the signed difference."""
    lines, pair = [], (a, b)
    rows = [
        (label, a.columns[name], b.columns[name], form)
        for label, name, form in (
            ("bpb of the artifact", "bpb", ".6f"),
            ("final bpb", "final_bpb", ".6f"),
            ("steps", "steps", ",.0f"),
            ("training seconds", "seconds", ".1f"),
        )
    ]
    rows.append(
        (
            "evaluation seconds",
            *(dict_at(row.evaluation, "final").get("seconds") for row in pair),
            ".1f",
        )
    )
    rows.append(
        (
            "artifact bytes",
            *(dict_at(row.training, "artifact").get("bytes") for row in pair),
            ",.0f",
        )
    )
    # Training counts only its own code; an evaluation counts all that it imports.
    if bool(a.evaluation) == bool(b.evaluation):
        rows.append(("bytes with code", a.columns["bytes"], b.columns["bytes"], ",.0f"))
    for label, x, y, form in rows:
        if all(type(v) in (int, float) for v in (x, y)):
            lines.append(f"{label:20} {x:{form}} -> {y:{form}}  ({y - x:+{form}})")
    return lines or ["neither score, bytes nor time is known of both"]


def code_between(a: RunRow, b: RunRow) -> list[str]:
    """Return a unified diff of the code that the logs print, or the reason why there is none."""
    hashes = [dict_at(row.training, "start", "sha256").get("code") for row in (a, b)]
    if None in hashes:
        return ["no code to compare: one of them is an evaluation without its training"]
    if hashes[0] == hashes[1]:
        return ["no code line differs"]
    sources = []
    for row, wanted in zip((a, b), hashes, strict=True):
        source = source_of(row)
        if hashlib.sha256(source.encode()).hexdigest() != wanted:
            return [
                f"the code of {cell_text('{}', row.columns['run_id'])} ({str(wanted)[:12]}) is "
                f"gone: {log_of(row)} is missing, or another run's by now"
            ]
        sources.append(source.splitlines())
    lines = list(difflib.unified_diff(*sources, "A/train_gpt.py", "B/train_gpt.py", lineterm=""))
    more = [f"… and {len(lines) - SHOWN_LINES} lines more"] if len(lines) > SHOWN_LINES else []
    return [printable(line.replace("\t", "    ")) for line in lines[:SHOWN_LINES]] + more


def log_of(row: RunRow) -> Path:
    return row.folder / "logs" / f"{row.columns['run_id']}.txt"


def source_of(row: RunRow) -> str:
    from fairway.records.logs import read_log

    try:
        return read_log(log_of(row)).source
    except RecordError:
        return ""


# ==== WHAT THE VERBS SHARE ========================================================================
def add_file_option(parser: argparse.ArgumentParser) -> None:
    """Declare --file, which names histories in place of those below this folder."""
    parser.add_argument(
        "--file",
        type=Path,
        action="append",
        metavar="runs.jsonl",
        help="read this file instead of those found here; may be repeated",
    )


def read_here(files: Sequence[Path] | None, name: str) -> History:
    """Return the history of these files, or of this folder; warn of damaged lines as `name`."""
    found = read_history(files or find_files(Path.cwd()))
    if found.damaged:
        print(f"{name}: {damage_text(found)}", file=sys.stderr)
    return found
