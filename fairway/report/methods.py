"""Two pictures of a comparison of methods: score against bytes, and score against speed.

They are drawn from the table that `fairway compare --table` wrote, in a file of its own or in the
results/ folder of a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fairway.records.files import replacing
from fairway.records.run import RunFiles
from fairway.report import style
from fairway.report.data import Missing, clean_text, finite_number, objects_in

BYTES, SPEED = "bytes", "tokens_per_second"
AXES = {BYTES: "bytes as shipped (logarithmic)", SPEED: "tokens/s, greedy text (logarithmic)"}
MOST_METHODS = 256  # rows that are read
LABEL_SHIFT = 7  # points between a mark and its name
LETTER_WIDTH, LETTER_HEIGHT = 10.0, 20.0  # pixels of a name, about


def comparison(run: RunFiles) -> dict[str, Any]:
    """Return the newest table in a run's results/, or raise Missing."""
    paths = sorted(run.folder.glob("results/*.json"), key=lambda p: p.stat().st_mtime)
    if not paths:
        raise Missing(
            "no comparison of methods; `fairway compare --model ARTIFACT --table` makes one"
        )
    try:
        table = json.loads(paths[-1].read_bytes())
        rows = drawable(table)
    except (ValueError, OSError, TypeError, KeyError, AttributeError):
        raise Missing(f"{paths[-1].name} is no table of `fairway compare`; make it again") from None
    if not rows:
        raise Missing(f"{paths[-1].name} has no finished method")
    return table


def drawable(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with a score and a size, each name as one printable line."""
    rows = [row for row in objects_in(table["rows"], MOST_METHODS) if has(row, "bpb", BYTES)]
    names = [{n: clean_text(row.get(n)) for n in ("method", "group")} for row in rows]
    return [row | own for row, own in zip(rows, names, strict=True)]


def has(row: dict[str, Any], *columns: str) -> bool:
    """Return whether a row has a positive number in each of these columns."""
    return all(finite_number(row.get(column)) > 0 for column in columns)


def draw_panel(axes: Any, table: dict[str, Any], column: str) -> None:
    """Draw one mark a method; name those on the front, and join them."""
    from matplotlib.ticker import LogLocator

    rows = [row for row in drawable(table) if has(row, column)]
    groups = list(dict.fromkeys(row["group"] for row in rows))
    for i, group in enumerate(groups):
        own = [row for row in rows if row["group"] == group]
        axes.plot(
            [row[column] for row in own],
            [row["bpb"] for row in own],
            style.MARKS[i % 8],
            color=style.light(f"c{(i + 3 * (i // 8)) % 8}"),  # mark and colour: no pair twice
            ms=9,
            alpha=0.85,
            mec=style.light("surface"),
            label=style.label(group),
        )
    front = front_rows(rows, column)
    axes.plot(
        [row[column] for row in front],
        [row["bpb"] for row in front],
        color=style.light("soft"),
        lw=1.2,
        zorder=1,
    )
    axes.set_xscale("log")
    label_front(axes, [((row[column], row["bpb"]), row["method"]) for row in front])
    axes.set_xlabel(AXES[column])
    axes.set_ylabel("bits per byte")
    axes.grid(True)
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(style.short)
    axes.xaxis.set_minor_formatter(lambda *_: "")


def label_front(axes: Any, marks: list[tuple[tuple[float, float], str]]) -> None:
    """Name the marks of a front, each where no name stands yet; there may be room for some only."""
    taken: list[tuple[float, float, float, float]] = []
    for at, name in marks:
        x, y = axes.transData.transform(at)
        width, height = LETTER_WIDTH * len(name), LETTER_HEIGHT
        # The front falls: left below it there is most room, and then right above it.
        for side, align in ((-1, ("right", "top")), (1, ("left", "bottom"))):
            left, low = (x, y) if side > 0 else (x - width, y - height)
            box = (left, left + width, low, low + height)
            if left < axes.bbox.x0 or any(boxes_meet(box, other) for other in taken):
                continue
            taken.append(box)
            axes.annotate(
                style.label(name),
                at,
                (side * LABEL_SHIFT, side * LABEL_SHIFT),
                textcoords="offset points",
                fontsize=11,
                ha=align[0],
                va=align[1],
            )
            break


def boxes_meet(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Return whether two boxes (left, right, low, high) share a point."""
    return a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]


def front_rows(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    """Return the rows that no other beats in score and in this column, by column."""
    better = 1 if column == BYTES else -1
    front, best = [], float("inf")
    for row in sorted(rows, key=lambda r: (better * r[column], r["bpb"])):
        if row["bpb"] < best:
            front, best = [*front, row], row["bpb"]
    return front


def draw_comparison(
    runs: list[tuple[str, Any]], shape: style.FigureShape, _styles: list[int]
) -> Any:
    """Draw both panels for each run."""
    columns = 2 if shape.wide else 1
    rows = len(runs) * (2 // columns)
    figure, axes = style.new_figure(shape, 6.0 * rows, rows, columns)
    for i, (name, table) in enumerate(runs):
        for panel, column in zip(axes[2 * i : 2 * i + 2], (BYTES, SPEED), strict=True):
            draw_panel(panel, table, column)
            panel.set_title(style.label(name) if len(runs) > 1 else "")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if shape.wide else 2)
    return figure


def say_comparison(table: dict[str, Any]) -> str:
    """State the ends of the front."""
    front = front_rows(drawable(table), BYTES)
    least, best = front[0], front[-1]
    return (
        f"{len(drawable(table))} methods; {least['method']} is smallest, {least[BYTES]:,.0f} bytes "
        f"at {least['bpb']:.4f} BPB; {best['method']} scores lowest, {best['bpb']:.4f} at "
        f"{best[BYTES]:,.0f} bytes"
    )


def write_pictures(table: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw both pictures as PNG files, and return their paths."""
    paths = []
    with style.drawing():
        for column, word in ((BYTES, "bytes"), (SPEED, "speed")):
            figure, (axes,) = style.new_figure(style.FigureShape("page", 11.0), 6.5)
            draw_panel(axes, table, column)
            handles, labels = axes.get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
            style.settle(figure)
            paths.append(folder / f"{name}_{word}.png")
            with replacing(paths[-1]) as f:
                f.write(style.png(figure))
    return paths
