"""The rules that a comparison must keep before its table is written.

Each rule reads the results of cells, and the shipped files where they still lie next to them. It
yields (cell, what is wrong). One finding refuses the whole table.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fairway.methods.comparison import BASELINE, Cells
from fairway.methods.measure import percentile

VALIDATION = "_val_"  # in the name of each validation shard
MOST_OVERLAP = 0.01  # of calibration runs that occur in the scored text by chance: quotations
SAME = 1e-9  # nats a token
Found = Iterator[tuple[dict[str, Any], str]]


class Finding(NamedTuple):
    """A rule that a cell breaks."""

    rule: str
    cell: str
    message: str


# ==== RULES =======================================================================================
def calibration_is_not_the_scored_text(cells: Cells, files: Path) -> Found:
    for cell in cells:
        calibration = cell["calibration"]
        for name in calibration["files_read"]:
            if VALIDATION in name:
                yield cell, f"the transform opened {name}"
        if calibration["overlap"] > MOST_OVERLAP:
            share = f"{100 * calibration['overlap']:.1f} %"
            yield cell, f"{share} of its calibration text is in the scored text"


def the_first_run_is_apart(cells: Cells, files: Path) -> Found:
    for cell in cells:
        times = cell["latency"]
        samples = times["samples_ms"]
        if times["first_ms"] in samples:
            yield cell, "its first pass is among the timed ones"
        right = {
            "mean_ms": statistics.mean(samples),
            "p50_ms": percentile(samples, 0.5),
            "p95_ms": percentile(samples, 0.95),
        }
        for name, value in right.items():
            if times[name] != value:
                yield cell, f"{name} is {times[name]:.3f}, but its passes give {value:.3f}"


def the_cache_has_its_computed_size(cells: Cells, files: Path) -> Found:
    for cell in cells:
        for point in cell.get("cache", []):
            if point["measured"] != point["analytic"]:
                sizes = f"{point['measured']} bytes measured, {point['analytic']} computed"
                yield cell, f"a cache of {point['tokens']} tokens has {sizes}"


def spared_parameters_are_unchanged(cells: Cells, files: Path) -> Found:
    for cell in cells:
        for name, (promised, found) in cell["parameters"].items():
            if promised != found:
                yield cell, f"it changed {name}, which it says it leaves alone"


def all_ran_alike(cells: Cells, files: Path) -> Found:
    """Code, data, hardware and versions; optional packages may be missing in a cell."""
    first = cells[0]
    for cell in cells[1:]:
        for kind in ("code_sha256", "hardware", "threads", "versions"):
            ours, theirs = cell["environment"][kind], first["environment"][kind]
            if ours != theirs:
                values = f"{str(ours):.40}, but {str(theirs):.40} in {first['method']}"
                yield cell, f"{kind} is {values}; --retry runs again what ran with other code"
        for kind, key in (("data", "sha256"), ("model", "sha256"), ("score", "bytes")):
            if cell[kind][key] != first[kind][key]:
                yield cell, f"its {kind} differs from that of {first['method']}"
        if cell["score"]["windows"] != first["score"]["windows"]:
            yield cell, f"windows: {cell['score']['windows']}, not {first['score']['windows']}"


def sizes_count_every_file(cells: Cells, files: Path) -> Found:
    for cell in cells:
        size = cell["size"]
        names = {f["name"]: f for f in size["files"]}
        if (total := sum(f["bytes"] for f in size["files"])) != size["bytes"]:
            yield cell, f"its files have {total} bytes, it counts {size['bytes']}"
        for name in set(size["read_on_reload"]) - names.keys():
            yield cell, f"{name} is read to load the model, but not counted"
        if size["method_bytes"] != size["bytes"]:
            yield cell, f"the method says {size['method_bytes']} bytes, its files {size['bytes']}"
        if not size["files"]:
            yield cell, "it ships no file"


def files_are_those_that_were_measured(cells: Cells, files: Path) -> Found:
    """Only where the shipped files were kept."""
    for cell in cells:
        folder = files / cell_of(cell)
        if not folder.is_dir():
            continue
        there = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
        listed = {f["name"]: f for f in cell["size"]["files"]}
        for name in there.keys() ^ listed.keys():
            yield cell, f"{name} is {'not listed' if name in there else 'missing'}"
        for name in there.keys() & listed.keys():
            data = there[name].read_bytes()
            if hashlib.sha256(data).hexdigest() != listed[name]["sha256"]:
                yield cell, f"{name} is not the file that was measured"


def every_number_is_one(cells: Cells, files: Path) -> Found:
    for cell in cells:
        for path, value in numbers(cell):
            if not math.isfinite(value):
                yield cell, f"{path} is {value}"


def something_was_applied(cells: Cells, files: Path) -> Found:
    """A score that equals the baseline's to the last digit, unless the method promises that."""
    by_name = {cell["method"]: cell for cell in cells}
    for cell in cells:
        equal_to = cell["same_score_as"]
        base = by_name.get(equal_to or BASELINE)
        if base is None or base is cell:
            continue
        same = abs(cell["score"]["nats"] - base["score"]["nats"]) <= SAME * base["score"]["tokens"]
        if equal_to and not same:
            scores = f"{cell['score']['bpb']:.9f}, not {base['score']['bpb']:.9f}"
            yield cell, f"it must score as {equal_to} does, but scores {scores}"
        if not equal_to and cell["score"]["nats"] == base["score"]["nats"]:
            yield cell, f"its score equals that of {base['method']} to the last digit"


def the_file_scores_the_same(cells: Cells, files: Path) -> Found:
    for cell in cells:
        check = cell["check"]
        apart = abs(check["in_memory_nats"] - check["reloaded_nats"]) / check["tokens"]
        if not apart <= SAME:
            yield cell, f"what was reloaded scores {apart:.2e} nats a token otherwise"


def the_whole_text_was_scored(cells: Cells, files: Path) -> Found:
    for cell in cells:
        nats, score = cell["score"]["nats"], cell["score"]
        if not math.isclose(score["bpb"], nats / math.log(2) / score["bytes"], rel_tol=1e-12):
            yield cell, f"its {score['bpb']:.6f} BPB does not follow from its nats and bytes"
        if score["nats"] <= 0 or score["tokens"] < 1:
            yield cell, f"it scored {score['tokens']} tokens at {score['nats']} nats"


RULES: tuple[Callable[[Cells, Path], Found], ...] = (
    calibration_is_not_the_scored_text,
    the_first_run_is_apart,
    the_cache_has_its_computed_size,
    spared_parameters_are_unchanged,
    all_ran_alike,
    sizes_count_every_file,
    files_are_those_that_were_measured,
    every_number_is_one,
    something_was_applied,
    the_file_scores_the_same,
    the_whole_text_was_scored,
)


# ==== THE AUDIT ===================================================================================
def numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a result with its place."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from numbers(inner, f"{path}[{i}]")
    elif isinstance(value, float):
        yield path, value


def cell_of(cell: dict[str, Any]) -> str:
    """Return the name of a cell's files."""
    return f"{cell['method']}.seed{cell['seed']}" if cell["seeded"] else cell["method"]


def audit(cells: Cells, files: Path) -> list[Finding]:
    """Return what is wrong with the finished cells of one model; `files` holds what they ship."""
    done = [cell for cell in cells if cell["status"] == "done"]
    if not done:
        return [Finding("there_are_results", "all cells", "none of them finished")]
    if BASELINE not in [cell["method"] for cell in done]:
        return [Finding("there_is_a_baseline", BASELINE, "it has not run; add it to --methods")]
    wrong = []
    for rule in RULES:
        try:
            wrong += [Finding(rule.__name__, cell_of(c), text) for c, text in rule(done, files)]
        except (KeyError, TypeError, ValueError, AttributeError, statistics.StatisticsError) as e:
            # A result that lacks what a rule reads proves nothing.
            wrong.append(Finding(rule.__name__, "a cell", f"a result is incomplete ({e!r:.80})"))
    return wrong
