"""The table of a comparison: from the JSON files of cells to rows, and from rows to Markdown.

The rank that counts is the score at equal bytes. Each row is compared with the curve of the
trainer's own quantiser, which meets a number of bytes by its choice of bits and of k: its rows,
k * rms at 8 to 2 bits and several k, without those that another of them beats in both bytes and
BPB, joined by straight lines over the logarithm of bytes.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fairway.methods.groups import GROUPS

BASELINE = "fp32"
CURVE = (
    *("int8-rms", "int6-rms", "int5-rms", "int4-rms", "int3-rms", "int2-rms"),
    *("int6-rms-k5", "int6-rms-k7", "int6-rms-k12", "int6-rms-k16", "int5-rms-k4"),
    *("int4-rms-k3", "int4-rms-k3.5", "int3-rms-k2.5"),
)
Cells = list[dict[str, Any]]
COLUMNS = ("bytes", "bpb", "at_equal_bytes", "p50_ms", "tokens_per_second", "peak_mb")
LESS_IS_BETTER = {"bytes", "bpb", "at_equal_bytes", "p50_ms", "peak_mb"}


class Row(NamedTuple):
    """One method, over its seeds."""

    method: str
    group: str
    status: str  # done, failed, not run
    error: str = ""
    seeds: int = 1
    bytes: float = math.nan
    bpb: float = math.nan
    deviation: float = 0.0
    over_baseline: float = math.nan
    at_equal_bytes: float = math.nan  # BPB over the curve at the same bytes; nan: none there
    p50_ms: float = math.nan
    tokens_per_second: float = math.nan
    peak_mb: float = math.nan
    transform_s: float = math.nan
    unreliable: str = ""  # why the memory means little


def read_cells(folder: Path) -> Cells:
    """Return all results of a model, in the order of their names."""
    cells = []
    for path in sorted(folder.glob("*.json")):
        try:
            cell = json.loads(path.read_bytes())
        except ValueError:
            continue  # the harness runs it again
        if isinstance(cell, dict) and "status" in cell:
            cells.append(cell)
    return cells


# ==== ROWS ========================================================================================
def bytes_as_shipped(cell: Mapping[str, Any]) -> int:
    """Return the bytes that a submission would pay: its files, and the code that reads them."""
    return cell["size"]["bytes"] + cell["size"]["code_bytes"]


def curve_points(cells: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (log2 of bytes, BPB) of the trainer's own quantiser at its best, by bytes."""
    points = sorted(
        (math.log2(bytes_as_shipped(cell)), cell["score"]["bpb"])
        for cell in cells
        if cell["status"] == "done" and cell["method"] in CURVE
    )
    return [p for i, p in enumerate(points) if all(p[1] < bpb for _, bpb in points[:i])]


def curve_at(points: list[tuple[float, float]], size: float) -> float:
    """Return the curve's BPB at this many bytes; nan beyond its ends."""
    at = math.log2(size)
    for (a, low), (b, high) in zip(points, points[1:], strict=False):
        if a <= at <= b:
            return low + (high - low) * ((at - a) / (b - a) if b > a else 0.0)
    return math.nan


def mean_of(cells: Cells, *keys: str) -> float:
    values = []
    for cell in cells:
        value: Any = cell
        for key in keys:
            value = value[key]
        values.append(value)
    return statistics.fmean(values)


def row_of(cells: Cells, baseline: float, points: list[tuple[float, float]]) -> Row:
    """Return the row of one method's cells."""
    first = cells[0]
    done = [cell for cell in cells if cell["status"] == "done"]
    if len(done) < len(cells):
        broken = next(cell for cell in cells if cell["status"] != "done")
        return Row(first["method"], first["group"], broken["status"], broken["error"])
    bpb = [cell["score"]["bpb"] for cell in done]
    size = statistics.fmean(map(bytes_as_shipped, done))
    return Row(
        first["method"],
        first["group"],
        "done",
        seeds=len(done),
        bytes=size,
        bpb=statistics.fmean(bpb),
        deviation=statistics.stdev(bpb) if len(bpb) > 1 else 0.0,
        over_baseline=statistics.fmean(bpb) - baseline,
        at_equal_bytes=math.nan
        if first["method"] in CURVE
        else statistics.fmean(bpb) - curve_at(points, size),
        p50_ms=mean_of(done, "latency", "p50_ms"),
        tokens_per_second=mean_of(done, "generation", "tokens_per_second"),
        peak_mb=mean_of(done, "memory", "peak") / 1e6,
        transform_s=mean_of(done, "seconds", "transform"),
        unreliable=first["memory"]["unreliable"],
    )


def make_rows(cells: Cells) -> list[Row]:
    """Return a row for each method, group by group."""
    by_method: dict[str, Cells] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], []).append(cell)
    done = [c for c in by_method.get(BASELINE, []) if c["status"] == "done"]
    baseline = done[0]["score"]["bpb"] if done else math.nan
    points = curve_points(cells)
    rows = [row_of(own, baseline, points) for own in by_method.values()]
    order = list(GROUPS)
    return sorted(
        rows, key=lambda r: (order.index(r.group), -r.bytes if r.status == "done" else 0, r.method)
    )


def pareto_front(rows: Iterable[Row]) -> list[Row]:
    """Return the rows that no other row beats in both bytes and BPB, by bytes."""
    front, best = [], math.inf
    for row in sorted((r for r in rows if r.status == "done"), key=lambda r: (r.bytes, r.bpb)):
        if row.bpb < best:
            front.append(row)
            best = row.bpb
    return front


def extremes(rows: list[Row]) -> dict[tuple[str, str], str]:
    """Return which rows are best and worst, by (method, column)."""
    marks = {}
    for column in COLUMNS:
        values = [
            (getattr(r, column), r.method)
            for r in rows
            if r.status == "done"
            and math.isfinite(getattr(r, column))
            and not (column == "peak_mb" and r.unreliable)
        ]
        if len({v for v, _ in values}) < 2:
            continue
        low, high = min(values), max(values)
        best, worst = (low, high) if column in LESS_IS_BETTER else (high, low)
        marks |= {(best[1], column): "best", (worst[1], column): "worst"}
    return marks


# ==== MARKDOWN ====================================================================================
HEAD = (
    "| method | bytes | BPB | against fp32 | at equal bytes | ms a pass | tokens/s | peak MB | "
    "transform s |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)
LEGEND = (
    "**Bold** is the best of its column, *italic* the worst. *At equal bytes* is the BPB over that "
    "of the trainer's own quantiser at the same bytes (the best of the rows `intN-rms`, joined by "
    "lines). Negative is better; a dash stands on the curve and beyond its ends. A peak with ? is "
    "unreliable. ± is the deviation over seeds."
)


def number(row: Row, column: str, text: str, marks: Mapping[tuple[str, str], str]) -> str:
    if not math.isfinite(getattr(row, column)):
        return "–"
    wrap = {"best": "**", "worst": "*"}.get(marks.get((row.method, column), ""), "")
    return f"{wrap}{text}{wrap}"


def markdown_row(row: Row, marks: Mapping[tuple[str, str], str]) -> str:
    """Return a line of the table."""
    if row.status != "done":
        return f"| {row.method} | {row.status}: {row.error.replace('|', '/')} | | | | | | | |"
    spread = f" ± {row.deviation:.4f}" if row.seeds > 1 else ""
    cells = [
        row.method,
        number(row, "bytes", f"{row.bytes:,.0f}", marks),
        number(row, "bpb", f"{row.bpb:.4f}", marks) + spread,
        f"{row.over_baseline:+.4f}" if math.isfinite(row.over_baseline) else "–",
        number(row, "at_equal_bytes", f"{row.at_equal_bytes:+.4f}", marks),
        number(row, "p50_ms", f"{row.p50_ms:.2f}", marks),
        number(row, "tokens_per_second", f"{row.tokens_per_second:.0f}", marks),
        number(row, "peak_mb", f"{row.peak_mb:.0f}", marks) + ("?" if row.unreliable else ""),
        f"{row.transform_s:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def findings(rows: list[Row]) -> str:
    """Return a sentence on the rows of one group: the best and the worst at equal bytes."""
    done = [r for r in rows if r.status == "done"]
    ranked = sorted(
        (r for r in done if math.isfinite(r.at_equal_bytes)), key=lambda r: r.at_equal_bytes
    )
    if not done:
        return "None of these could be run here."
    if len(ranked) < 2:
        best = min(done, key=lambda r: r.bpb)
        return (
            f"`{best.method}` has the lowest score, {best.bpb:.4f} BPB at {best.bytes:,.0f} bytes."
        )
    best, worst = ranked[0], ranked[-1]
    return (
        f"At equal bytes, `{best.method}` is best ({best.at_equal_bytes:+.4f} BPB against the "
        f"trainer's quantiser) and `{worst.method}` worst ({worst.at_equal_bytes:+.4f})."
    )


def about(cells: Cells) -> str:
    """Return a paragraph on the model, the text and the machine."""
    cell = next(c for c in cells if c["status"] == "done")
    machine, score = cell["environment"]["hardware"], cell["score"]
    versions = ", ".join(f"{n} {v}" for n, v in cell["environment"]["versions"].items())
    return (
        f"Model `{cell['model']['name']}`: {cell['model']['parameters']:,} weights, from "
        f"{cell['model']['weights_from']}. Scored: {score['tokens']:,} tokens, {score['bytes']:,} "
        f"bytes, {score['windows']}. Machine: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['capability']}, {cell['environment']['threads']} thread a cell; {versions}. "
        "Bytes are those of the shipped files and of the code that reads them, packed: "
        f"{cell['size']['code_bytes']:,} bytes for `{cell['method']}`."
    )


def markdown(cells: Cells) -> str:
    """Return the whole table, group by group."""
    rows = make_rows(cells)
    marks, parts = extremes(rows), [about(cells), LEGEND]
    for group, limits in GROUPS.items():
        own = [row for row in rows if row.group == group]
        if own:
            lines = [HEAD, *(markdown_row(row, marks) for row in own)]
            parts += [f"### {group.capitalize()}", "\n".join(lines), f"{findings(own)} {limits}"]
    front = ", ".join(f"`{row.method}`" for row in pareto_front(rows))
    parts.append(f"No row has both fewer bytes and a lower score than these: {front}.")
    return "\n\n".join(parts) + "\n"


def table_json(cells: Cells) -> dict[str, Any]:
    """Return the rows for whoever draws them; numbers that do not exist are null."""
    rows = make_rows(cells)
    front = [row.method for row in pareto_front(rows)]
    clean = [
        {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
        for row in (r._asdict() for r in rows)
    ]
    model = next(c["model"]["name"] for c in cells if c["status"] == "done")
    return {"model": model, "baseline": BASELINE, "front": front, "rows": clean}


def replace_section(text: str, name: str, section: str) -> str:
    """Return a page with the section between its two markers replaced."""
    start, end = f"<!-- compare: {name} -->\n", f"<!-- end of compare: {name} -->"
    if start not in text or end not in text:
        return f"{text.rstrip()}\n\n{start}{section}{end}\n"
    before, rest = text.split(start, 1)
    return before + start + section + end + rest.split(end, 1)[1]
