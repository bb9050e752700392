"""The figures. Each takes the data of one run from its files, draws several runs, and says what
they show.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fairway.report import artifact, data, methods, split
from fairway.report.split import ScoredSplit
from fairway.report.style import (
    LINES,
    MARKS,
    FigureShape,
    label,
    light,
    new_figure,
    short,
    text_width,
    wrapped,
)

Named = list[tuple[str, Any]]  # one (name, data) for each run


class Figure(NamedTuple):
    """One figure of the page."""

    key: str  # names its anchor and its PNG
    title: str
    take: Callable[[ScoredSplit], Any]  # raises Missing
    draw: Callable[[Named, FigureShape, list[int]], Any]  # list: the style of each run
    say: Callable[[Any], str]  # states in numbers what the data of one run show
    caption: str


def colour(style: int) -> str:
    return light(f"c{style % 8}")


def legend(
    figure: Any, shape: FigureShape, entries: list[tuple[Any, str]], columns: int = 0
) -> None:
    if entries:
        handles, labels = zip(*entries, strict=True)
        room = (shape.width * 72 - 10) // (max(map(text_width, labels)) + 75)
        figure.legend(
            handles,
            [label(text) for text in labels],
            loc="outside lower center",
            ncols=columns or max(1, min(len(labels), int(room))),
            handlelength=2.6,
        )


def handle(**options: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **options)


def grid(axes: Any, axis: str = "both") -> None:
    axes.grid(True, axis=axis)
    axes.tick_params(length=0)


# ==== 1, 2: TRAINING ==============================================================================
def draw_curves(x: int) -> Callable[[Named, FigureShape, list[int]], Any]:
    """Return a function that draws loss against field `x` of a Curve: 0 tokens, 1 seconds."""

    def draw(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
        figure, (axes,) = new_figure(shape, 6.2 if shape.wide else 6.0)
        loss_curves(axes, runs, styles, x)
        entries = [
            (handle(color=colour(s), ls=LINES[s % 4]), name)
            for (name, _), s in zip(runs, styles, strict=True)
        ]
        entries += curve_marks([curve for _, curve in runs])
        legend(figure, shape, entries)
        return figure

    return draw


def loss_curves(axes: Any, runs: Named, styles: list[int], x: int) -> None:
    tops, lows = [], []
    for (_, curve), style in zip(runs, styles, strict=True):
        own, positive = colour(style), curve[x] > 0
        along, loss = data.smooth_curve(curve.tokens, curve.loss)
        along = np.interp(along, curve.tokens, curve[x])
        step = max(1, int(positive.sum()) // 400)
        axes.plot(
            curve[x][positive][::step],
            curve.loss[positive][::step],
            "o",
            ms=4.5,
            color=own,
            alpha=0.5,
            mew=0,
        )
        axes.plot(along, loss, color=own, ls=LINES[style % 4])
        if len(curve.val):
            some = curve.val[:: max(1, len(curve.val) // 60)]
            axes.plot(some[:, x], some[:, 2], "o", ms=8, mfc=light("surface"), mec=own, mew=2)
        if math.isfinite(curve.final):
            axes.plot(
                curve[x][-1], curve.final, "*", ms=14, color=own, mec=light("surface"), mew=0.8
            )
        if curve.qat:
            axes.plot(
                curve.qat[x],
                np.interp(curve.qat[x], along, loss),
                "v",
                ms=11,
                color=own,
                mec=light("surface"),
                mew=0.8,
            )
        late = curve[x] >= 0.03 * curve[x][-1]
        tops.append(curve.loss[late].max())
        lows.append(np.nanmin([curve.loss.min(), curve.final, *curve.val[:, 2]]))
    if x == 0:
        axes.set_xscale("log")
        axes.set_xlabel("training tokens (logarithmic)")
        spread_ticks(axes)
    else:  # the first steps fall so far that they would flatten the rest of the curve
        axes.set_xlabel("training time (seconds)")
        margin = 0.06 * max(max(tops) - min(lows), 0.01)
        axes.set_ylim(min(lows) - margin, max(tops) + margin)
    axes.set_ylabel("loss (nats per token)")
    grid(axes)


def spread_ticks(axes: Any) -> None:
    """Put ticks at powers of ten, or at 1-2-5 if the axis spans few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_xlim()
    subs = (
        (1.0,)
        if high / low > 3e2
        else (1.0, 2.0, 5.0)
        if high / low > 8
        else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    )
    axes.xaxis.set_major_locator(LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()


def curve_marks(curves: list[Any]) -> list[tuple[Any, str]]:
    """Return legend entries for the marks that these curves have."""
    ink, surface = light("soft"), light("surface")
    entries = [
        (handle(ls="", marker="o", ms=4.5, color=ink, alpha=0.7), "training, each logged step")
    ]
    if any(len(c.val) for c in curves):
        entries.append((handle(ls="", marker="o", ms=8, mfc=surface, mec=ink, mew=2), "validation"))
    if any(c.qat for c in curves):
        entries.append((handle(ls="", marker="v", ms=11, color=ink), "QAT switched on"))
    if any(math.isfinite(c.final) for c in curves):
        entries.append((handle(ls="", marker="*", ms=14, color=ink), "artifact, read back"))
    return entries


def say_curves(x: int) -> Callable[[Any], str]:
    def say(curve: data.Curve) -> str:
        place = [lambda v: f"{short(v)} tokens", lambda v: f"{v:.0f} s"][x]
        end = data.smooth_curve(curve.tokens, curve.loss)[1][-1]
        text = (
            f"training loss goes from {curve.loss[0]:.2f} to {end:.3f} nats per token in "
            f"{place(curve[x][-1])}"
        )
        if curve.qat:
            text += f", with QAT from {place(curve.qat[x])} on"
        if len(curve.val):
            text += f"; validation ends at {curve.val[-1, 2]:.4f}"
        if math.isfinite(curve.final):
            text += f"; the artifact as read back has {curve.final:.4f}"
        return text

    return say


# ==== 3: THE LADDER ===============================================================================
def ladder_rows(runs: Named) -> list[tuple[str, str, list[float]]]:
    """Return (group, name, bits per byte of each run or NaN), one row for each name, in order."""
    values_of: dict[tuple[str, str], list[float]] = {}
    above: dict[tuple[str, str], int] = {}  # number of rungs of the score from this one on
    for at, (_, rungs) in enumerate(runs):
        for i, rung in enumerate(rungs):
            row, left = rung[:2], sum(r.group == "score" for r in rungs[i:])
            values_of.setdefault(row, [math.nan] * len(runs))[at] = rung.bpb
            above[row] = max(above.get(row, 0), left)
    order = sorted(values_of, key=lambda row: (list(data.GROUPS).index(row[0]), -above[row]))
    return [(*row, values_of[row]) for row in order]


def draw_ladder(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
    rows = ladder_rows(runs)
    lines = len(rows) + len({group for group, _, _ in rows})
    figure, (axes,) = new_figure(shape, 1.5 + lines * (0.36 if shape.wide else 0.52))
    ladder_dots(axes, rows, styles, shape.wide)
    if len(runs) > 1:
        legend(
            figure,
            shape,
            [
                (handle(ls="", marker=MARKS[s % 8], ms=9, color=colour(s)), name)
                for (name, _), s in zip(runs, styles, strict=True)
            ],
        )
    return figure


def ladder_dots(
    axes: Any, rows: list[tuple[str, str, list[float]]], styles: list[int], wide: bool
) -> None:
    """Draw one row of dots for each name. Names stand left of the axis if `wide`, else above their
    rows.
    """
    low, high = (
        f(v for _, _, values in rows for v in values if math.isfinite(v)) for f in (min, max)
    )
    room = max(high - low, 1e-3)
    axes.set_xlim(
        low - 0.06 * room,
        high + (0.12 if wide else 0.3) * (1.0 if len(styles) == 1 else 1.6) * room,
    )
    left = axes.get_yaxis_transform()
    y, last, ticks = 0.0, "", []
    for group, name, values in rows:
        if group != last:
            y -= 1.0 if not last else 1.15
            axes.text(
                0.004 if wide else 0.0,
                y,
                data.GROUPS[group],
                transform=left,
                weight="bold",
                va="center",
                color=light("warn" if group == "apart" else "ink"),
                zorder=5,
            )
            last = group
        y -= 1.0
        if group == "apart":
            axes.axhspan(
                y - 0.5,
                y + 0.5,
                fc=light("apart"),
                ec=light("warn"),
                hatch="//",
                lw=0,
                alpha=0.55,
                zorder=0,
            )
        best = group == "score" and name == [n for g, n, _ in rows if g == "score"][-1]
        words = dict(
            va="center",
            zorder=5,
            weight="bold" if best else "normal",
            bbox=dict(fc=light("apart"), ec="none", pad=1.5) if group == "apart" else None,
        )
        ladder_row(axes, y if wide else y - 0.24, values, styles, words)
        if not wide:
            axes.text(0.0, y + 0.2, name, transform=left, **words)
        ticks.append((y, name))
    axes.set_ylim(y - 0.7, -0.4)
    axes.set_yticks(
        [at for at, _ in ticks], [label(name) for _, name in ticks] if wide else [""] * len(ticks)
    )
    axes.set_xlabel("bits per byte (lower is better)")
    grid(axes, "x")
    axes.spines["left"].set_visible(False)


def ladder_row(
    axes: Any, y: float, values: list[float], styles: list[int], words: dict[str, Any]
) -> None:
    """Draw the dots of a row and, next to the last, their mean."""
    points = [(v, s) for v, s in zip(values, styles, strict=True) if math.isfinite(v)]
    for value, style in points:
        axes.plot(
            value,
            y,
            MARKS[style % 8],
            ms=12 if words["weight"] == "bold" else 8,
            color=colour(style),
            mec=light("surface"),
            mew=0.8,
            zorder=4,
        )
    mean, last = sum(v for v, _ in points) / len(points), max(v for v, _ in points)
    axes.annotate(
        f"{mean:.4f}" if len(points) == 1 else f"mean {mean:.4f}",
        (last, y),
        (12, 0),
        textcoords="offset points",
        **words,
    )


def say_ladder(rungs: list[data.Rung]) -> str:
    text = "bits per byte: " + ", ".join(
        f"{r.name} {r.bpb:.4f}" for r in rungs if r.group == "score"
    )
    if alone := min((r for r in rungs if r.group == "alone"), key=lambda r: r.bpb, default=None):
        text += f"; the best single expert is {alone.name.lstrip('+ ')} with {alone.bpb:.4f}"
    return text + "".join(f"; no score: {r.name} {r.bpb:.4f}" for r in rungs if r.group == "apart")


# ==== 4: BYTES ====================================================================================
def squarified(
    sizes: list[float], x: float, y: float, w: float, h: float
) -> list[tuple[float, float, float, float]]:
    """Return rectangles (x, y, w, h) of these areas, as near to squares as possible (Bruls 2000).

    `sizes` is sorted, largest first.
    """
    boxes: list[tuple[float, float, float, float]] = []
    scale = w * h / sum(sizes)
    left = [size * scale for size in sizes]
    while left:
        side, take = min(w, h), 1

        def worst(count: int, side: float = side, left: list[float] = left) -> float:
            depth = sum(left[:count]) / side
            return max(max(depth / (a / depth), (a / depth) / depth) for a in left[:count])

        while take < len(left) and worst(take + 1) <= worst(take):
            take += 1
        depth, at = sum(left[:take]) / side, 0.0
        for area in left[:take]:
            long = area / depth
            boxes.append((x, y + at, depth, long) if w >= h else (x + at, y, long, depth))
            at += long
        x, y, w, h = (x + depth, y, w - depth, h) if w >= h else (x, y + depth, w, h - depth)
        left = left[take:]
    return boxes


PART_KINDS = {
    "weights": ("f0", "c0", "weights (classes by estimate)"),
    "file": ("f4", "c4", "tokenizer, header"),
    "code": ("f2", "c2", "code"),
}


def draw_bytes(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
    from matplotlib.patches import Patch

    figure, axes = new_figure(
        shape,
        0.4 + len(runs) * (5.5 if shape.wide else 6.4),
        2 * len(runs),
        1,
        height_ratios=[0.6, 4 if shape.wide else 5] * len(runs),
    )
    figure.get_layout_engine().set(h_pad=0.08)
    for (name, weighed), bar, tree in zip(runs, axes[::2], axes[1::2], strict=True):
        budget_bar(bar, name, weighed, shape)
        wide, high = shape.width * 72, 290 if shape.wide else 330
        boxes = squarified([p.bytes for p in weighed.parts], 0, 0, wide, high)
        for part, (x, y, w, h) in zip(weighed.parts, boxes, strict=True):
            tree.add_patch(
                rectangle(x, y, w, h, fc=light(PART_KINDS[part.kind][0]), ec=light("surface"), lw=2)
            )
            text = f"{part.name}\n{'' if part.exact else '≈ '}{part.bytes:,.0f}"
            if w < text_width(part.name) + 6:
                text = text.replace("/", "/\n")
            lines = text.split("\n")
            if w > max(map(text_width, lines)) + 2 and h > 18 * len(lines) + 2:
                tree.text(x + w / 2, y + h / 2, text, ha="center", va="center", linespacing=1.25)
        tree.set_xlim(0, wide)
        tree.set_ylim(high, 0)
        tree.axis("off")
    kinds = {p.kind for _, weighed in runs for p in weighed.parts}
    legend(
        figure,
        shape,
        [
            (Patch(fc=light(fill), ec=light(edge)), text)
            for kind, (fill, edge, text) in PART_KINDS.items()
            if kind in kinds
        ],
    )
    return figure


def rectangle(x: float, y: float, w: float, h: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), w, h, **options)


def budget_bar(axes: Any, name: str, weighed: Any, shape: FigureShape) -> None:
    """Draw the whole budget to scale: the part used, and the part left."""
    used, budget = weighed.used, weighed.budget
    end, part = max(used, budget), used / budget
    axes.add_patch(rectangle(0, 0, end, 1, fc="none", ec=light("soft"), lw=1.2))
    axes.add_patch(rectangle(0, 0, used, 1, fc=light("c0" if used <= budget else "warn"), lw=0))
    if used > budget:
        axes.axvline(budget, color=light("ink"), lw=2)
    over = f"{budget - used:,} left" if used <= budget else f"{used - budget:,} TOO MANY"
    text = f"{label(name)}: {used:,} of {budget:,} bytes ({100 * part:.1f}\u00a0%), {over}"
    axes.set_title(
        wrapped(text, shape.width * 72 - 10), weight="bold" if used > budget else "normal"
    )
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1)
    axes.axis("off")


def say_bytes(weighed: artifact.ByteBreakdown) -> str:
    largest = ", ".join(
        f"{p.name} {'' if p.exact else 'about '}{p.bytes:,.0f}" for p in weighed.parts[:4]
    )
    return (
        f"{weighed.used:,} of {weighed.budget:,} bytes used, {weighed.budget - weighed.used:,} "
        f"left; the largest parts are {largest}"
    )


# ==== 5: QUANTISER ================================================================================
def draw_errors(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
    kinds = list(dict.fromkeys(m.kind for _, errors in runs for m in errors if m.layer >= 0))[:12]
    single = list(dict.fromkeys(m.kind for _, errors in runs for m in errors if m.layer < 0))[:8]
    panels, columns = len(kinds) + bool(single), 3 if shape.wide else 2
    rows = -(-panels // columns)
    figure, axes = new_figure(shape, 0.9 + 2.7 * rows, rows, columns, sharey=True)
    figure.get_layout_engine().set(h_pad=0.09)
    top = 115 * max((m.error for _, errors in runs for m in errors), default=0.01)
    for kind, panel in zip(kinds, axes, strict=False):
        for (_, errors), style in zip(runs, styles, strict=True):
            own = sorted((m.layer, m.error) for m in errors if m.kind == kind and m.layer >= 0)
            panel.plot(
                [a for a, _ in own],
                [100 * e for _, e in own],
                color=colour(style),
                ls=LINES[style % 4],
                marker=MARKS[style % 8],
                ms=6,
            )
        error_panel(
            panel, kind, np.mean([m.bits for _, errors in runs for m in errors if m.kind == kind])
        )
        panel.set_xlabel("layer")
    if single:
        error_of_singles(axes[len(kinds)], single, runs, styles)
    for panel in axes[:panels:columns]:
        panel.set_ylabel("error (%)")
    for panel in axes[panels:]:
        panel.axis("off")
    axes[0].set_ylim(0, top)
    if len(runs) > 1:
        legend(
            figure,
            shape,
            [
                (handle(color=colour(s), ls=LINES[s % 4], marker=MARKS[s % 8], ms=6), name)
                for (name, _), s in zip(runs, styles, strict=True)
            ],
        )
    return figure


def error_panel(panel: Any, kind: str, bits: float) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_title(f"{label(kind)}, {bits:.2f} bits" if math.isfinite(bits) else label(kind))
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.margins(x=0.08)
    grid(panel)


def error_of_singles(panel: Any, single: list[str], runs: Named, styles: list[int]) -> None:
    """Draw the errors of matrices outside the layers; the table below the figure names them."""
    for (_, errors), style in zip(runs, styles, strict=True):
        own = [
            (single.index(m.kind), 100 * m.error)
            for m in errors
            if m.layer < 0 and m.kind in single
        ]
        panel.plot(
            [a for a, _ in own],
            [e for _, e in own],
            ls="",
            color=colour(style),
            marker=MARKS[style % 8],
            ms=7,
        )
    error_panel(panel, "outside layers", math.nan)
    panel.set_xticks(
        range(len(single)), [s.split(".")[-1].replace("tok_emb", "emb")[:8] for s in single]
    )
    panel.set_xlim(-0.6, len(single) - 0.4)


def say_errors(errors: list[data.MatrixError]) -> str:
    worst, middle = max(errors, key=lambda m: m.error), np.median([m.error for m in errors])
    bits = np.mean([m.bits for m in errors])
    where = f"{worst.kind} of layer {worst.layer}" if worst.layer >= 0 else worst.kind
    return (
        f"the relative error of {len(errors)} matrices has median {100 * middle:.1f}\u00a0% and is "
        f"at most {100 * worst.error:.1f}\u00a0% ({where}); the mean over matrices is {bits:.2f} "
        "bits per weight"
    )


# ==== 6: MIXTURE ==================================================================================
def draw_weights(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
    from matplotlib.patches import Patch

    columns = min(len(runs), 3) if shape.wide else 1
    rows = -(-len(runs) // columns)
    figure, axes = new_figure(
        shape, 1.4 + rows * (4.2 if shape.wide else 3.6), rows, columns, sharey=True
    )
    experts = list(dict.fromkeys(e for _, trace in runs for e in trace.experts))
    heaviest = runs[0][1].experts[int(np.argmax(runs[0][1].weights.sum(axis=0)))]
    fills = {e: light("f5") if e == heaviest else colour(i) for i, e in enumerate(experts)}
    for (name, trace), panel in zip(runs, axes, strict=False):
        x = 100 * (np.arange(len(trace.weights)) + 0.5) / len(trace.weights)
        panel.stackplot(
            x, 100 * trace.weights.T, colors=[fills[e] for e in trace.experts], linewidth=0
        )
        panel.set_xlim(x[0], x[-1])
        panel.set_ylim(0, 100)
        panel.set_xlabel("place in the split (%)")
        if len(runs) > 1:
            panel.set_title(label(name))
        panel.tick_params(length=0)
    for panel in axes[::columns]:
        panel.set_ylabel("weight (%)")
    for panel in axes[len(runs) :]:
        panel.axis("off")
    legend(figure, shape, [(Patch(fc=fill, ec=light("soft")), e) for e, fill in fills.items()])
    return figure


def say_weights(trace: data.Trace) -> str:
    tenth = max(1, len(trace.weights) // 10)
    first, last = trace.weights[:tenth].mean(axis=0), trace.weights[-tenth:].mean(axis=0)
    return "from the first tenth of the split to the last, " + ", ".join(
        f"{trace.experts[i]} goes from {100 * first[i]:.0f} to {100 * last[i]:.0f}\u00a0%"
        for i in np.argsort(-last, kind="stable")[:3]
    )


# ==== 7, 8: WHERE THE LOSS LIES ===================================================================
def draw_means(label_x: str, log: bool) -> Callable[[Named, FigureShape, list[int]], Any]:
    def draw(runs: Named, shape: FigureShape, styles: list[int]) -> Any:
        figure, (axes,) = new_figure(shape, 5.8 if shape.wide else 5.6)
        for (_, kinds), style in zip(runs, styles, strict=True):
            for kind, means in kinds.items():
                mixture, own = kind == "mixture", colour(style)
                if mixture or len(runs) == 1:
                    axes.fill_between(
                        means.x,
                        means.mean - 2 * means.error,
                        means.mean + 2 * means.error,
                        color=own,
                        alpha=0.2,
                        lw=0,
                    )
                axes.plot(
                    means.x,
                    means.mean,
                    color=own,
                    ls="-" if mixture else LINES[2],
                    lw=2.2 if mixture or len(runs) == 1 else 1.6,
                    marker=MARKS[style % 8] if mixture else "",
                    ms=4.5 if len(means.x) > 30 else 6,
                )
        if log:
            axes.set_xscale("log")
            spread_ticks(axes)
        axes.set_xlabel(wrapped(label_x, shape.width * 72 - 60))
        axes.set_ylabel("loss (nats per token)")
        grid(axes)
        entries = (
            [
                (handle(color=colour(s), marker=MARKS[s % 8], ms=6), name)
                for (name, _), s in zip(runs, styles, strict=True)
            ]
            if len(runs) > 1
            else []
        )
        drawn_kinds = {kind for _, kinds in runs for kind in kinds}
        own = light("soft") if entries else colour(styles[0])
        entries += [
            (handle(color=own, ls="-", marker="" if entries else "o"), "mixture"),
            *[(handle(color=own, ls=LINES[2]), "neural alone")] * ("neural" in drawn_kinds),
        ]
        legend(figure, shape, entries)
        return figure

    return draw


def say_means(first: str, last: str) -> Callable[[dict[str, split.BinnedMeans]], str]:
    """Return a function that states the first and the last bin of each column.

    `first` and `last` say where these bins are; the place of the last one is inserted.
    """

    def say(kinds: dict[str, split.BinnedMeans]) -> str:
        return "; ".join(
            f"{kind} {m.mean[0]:.2f} nats {first}, {m.mean[-1]:.2f} {last.format(short(m.x[-1]))}"
            for kind, m in kinds.items()
        )

    return say


def say_ranks(kinds: dict[str, split.BinnedMeans]) -> str:
    m = kinds["mixture"]
    rare, loss = m.x >= 256, m.share * m.mean
    text = (
        f"mixture {m.mean[0]:.2f} nats on the most frequent token, {m.mean[-1]:.2f} on the rarest"
    )
    if rare.any():
        text += (
            f"; tokens beyond rank 256 are {100 * m.share[rare].sum():.0f}\u00a0% of the split and "
            f"{100 * loss[rare].sum() / max(loss.sum(), 1e-12):.0f}\u00a0% of its loss"
        )
    if "neural" in kinds:
        gain = kinds["neural"].mean - m.mean
        at = int(np.argmax(gain))
        text += f"; the experts gain most, {gain[at]:.2f} nats, around rank {short(m.x[at])}"
    return text


# ==== ALL OF THEM, in the order of the page =======================================================
BAND = "The band is two standard errors to each side, as if tokens were independent."
FIGURES = (
    Figure(
        "loss_tokens",
        "Loss against tokens",
        lambda s: data.training_curve(s.run),
        draw_curves(0),
        say_curves(0),
        "Each light point is a logged step; the line is a mean over neighbouring steps.",
    ),
    Figure(
        "loss_time",
        "Loss against time",
        lambda s: data.training_curve(s.run),
        draw_curves(1),
        say_curves(1),
        "Training time as the trainer counts it, without validation. The first 3 % of the time "
        "lie above the picture.",
    ),
    Figure(
        "ladder",
        "The ladder of the score",
        lambda s: data.ladder_rungs(s.run),
        draw_ladder,
        say_ladder,
        "The last row of the first group is the score. The groups below show the neural model with "
        "one expert, and other mixtures. A hatched row knows the answers of the split, so it is "
        "never a score.",
    ),
    Figure(
        "bytes",
        "Where the bytes go",
        lambda s: artifact.byte_breakdown(s.run),
        draw_bytes,
        say_bytes,
        "The bar is the whole budget; the map below it shows the used part. Sizes of files are "
        "exact. Packed code is shared out by the sizes of its files, and the coded weights by the "
        "tensors' sizes and estimated bits per weight (≈). The table lists what is too small for a "
        "label.",
    ),
    Figure(
        "errors",
        "Quantisation error by layer",
        lambda s: data.matrix_errors(s.run),
        draw_errors,
        say_errors,
        "The relative error of a matrix is the norm of the change divided by the norm of the "
        "weights. The bits are the mean per weight that its codes need.",
    ),
    Figure(
        "weights",
        "Mixture weights along the split",
        lambda s: data.weight_trace(s.run),
        draw_weights,
        say_weights,
        "The mean weight of each expert in equal parts of the split, from start to end.",
    ),
    Figure(
        "by_document",
        "Loss by position in the document",
        split.by_document,
        draw_means("earlier tokens of the document (logarithmic)", True),
        say_means("at a document's start", "after about {} tokens"),
        f"Means of bins. {BAND} The token that opens a document counts as the end of the document "
        "before it.",
    ),
    Figure(
        "by_split",
        "Loss by position in the split",
        split.by_split,
        draw_means("place in the split (%)", False),
        say_means("at the start of the split", "at its end"),
        f"Means of equal parts. {BAND}",
    ),
    Figure(
        "by_rank",
        "Loss by token frequency",
        split.by_rank,
        draw_means("rank of the token in the split (logarithmic, 1 = most frequent)", True),
        say_ranks,
        f"Means of bins that double in width. {BAND}",
    ),
    Figure(
        "methods",
        "Compression methods on this model",
        lambda s: methods.comparison(s.run),
        methods.draw_comparison,
        methods.say_comparison,
        "Each mark is a method of `fairway compare`. The line joins those that no other beats in "
        "both directions.",
    ),
)
