"""A report on runs: one HTML page that opens from disk, a PNG for each figure, and a picture for a
README.

Everything is read from files; no model is loaded. If a run lacks something, only the figure that
needs it is missing, and the page says what it needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from fairway.records.files import RecordError, replace_text, replacing
from fairway.records.run import RunFiles, read_run
from fairway.report import data, page, split, style
from fairway.report.data import Missing
from fairway.report.figures import (
    FIGURES,
    Figure,
    colour,
    curve_marks,
    handle,
    ladder_dots,
    ladder_rows,
    loss_curves,
)
from fairway.report.split import ScoredSplit

MOST_RUNS = 8  # a figure has colours and marks for so many
PASSAGES = 10
PNG_PREFIX = "report_"


def write_report(runs: list[Path], out: Path) -> Path:
    """Write out/report.html and out/report_<figure>.png for these OUT_DIRs or logs; return the
    page's path.
    """
    run_files, out = read_all_runs(runs), Path(out)
    names = data.run_names(run_files)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (
            report_bar(len(run_files) + len(FIGURES)) as bar,
            style.drawing(),
        ):
            taken = []
            for run in run_files:
                taken.append(take_figures(run, max(1, PASSAGES // len(run_files))))
                bar.update()
            sections = []
            for figure in FIGURES:
                sections.append(draw_section(figure, names, [t[figure.key] for t in taken], out))
                bar.update()
        html = page.page_html(
            page_title(names),
            page_lead(run_files),
            sections,
            page_tables(run_files, names, [t["passages"] for t in taken]),
        )
        replace_text(out / "report.html", html)
    except OSError as e:
        raise RecordError(
            f"{e.filename or out}: {e.strerror or e}; name another folder with --out"
        ) from None
    return out / "report.html"


def report_bar(total: int) -> tqdm:
    """Return a bar that a terminal shows after two seconds, and a file never."""
    return tqdm(total=total, desc="report", delay=2, leave=False, disable=None)


def draw_picture(runs: list[Path], path: Path) -> None:
    """Draw one PNG: loss against tokens, and the ladder of the score."""
    run_files = read_all_runs(runs)
    names, sources = data.run_names(run_files), [ScoredSplit(run) for run in run_files]
    by_key = {figure.key: figure for figure in FIGURES}
    with style.drawing():
        figure, (left, right) = style.new_figure(style.WIDE, 6.5, 1, 2)
        for axes, key in ((left, "loss_tokens"), (right, "ladder")):
            taken = [take_or_missing(by_key[key], source) for source in sources]
            drawn = [
                (n, t, i)
                for i, (n, t) in enumerate(zip(names, taken, strict=True))
                if not isinstance(t, Missing)
            ]
            if not drawn and key == "loss_tokens":
                raise RecordError(f"{run_files[0].folder}: {taken[0]}")
            axes.set_title(by_key[key].title)
            draw_half(axes, key, drawn)
        style.settle(figure)
        try:
            with replacing(path) as f:
                f.write(style.png(figure))
        except OSError as e:
            raise RecordError(f"{path}: {e.strerror or e}; name another file") from None


def draw_half(axes: Any, key: str, drawn: list[tuple[str, Any, int]]) -> None:
    """Draw the loss curves or the ladder into one half of the picture."""
    runs, styles = [(name, taken) for name, taken, _ in drawn], [i for _, _, i in drawn]
    if not drawn:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center")
        axes.axis("off")
    elif key == "ladder":
        ladder_dots(
            axes, [row for row in ladder_rows(runs) if row[0] in ("score", "apart")], styles, False
        )
    else:
        loss_curves(axes, runs, styles, 0)
        entries = [
            (
                handle(color=colour(i), ls=style.LINES[i % 4], marker=style.MARKS[i % 8], ms=8),
                style.label(name),
            )
            for (name, _), i in zip(runs, styles, strict=True)
        ]
        axes.legend(
            *zip(*entries, *curve_marks([curve for _, curve in runs]), strict=True),
            loc="lower left",
        )


# ==== PARTS =======================================================================================
def read_all_runs(runs: list[Path]) -> list[RunFiles]:
    if not runs:
        raise RecordError("no run is named; name the OUT_DIR of one or more")
    if len(runs) > MOST_RUNS:
        raise RecordError(f"{len(runs)} runs are named; a figure tells at most {MOST_RUNS} apart")
    return [read_run(path) for path in runs]


def take_or_missing(figure: Figure, source: ScoredSplit) -> Any:
    """Return a figure's data of one run, or the Missing that says why it has none."""
    try:
        return figure.take(source)
    except Missing as lacking:
        return lacking


def take_figures(run: RunFiles, count: int) -> dict[str, Any]:
    """Return all data that the page shows of a run, so that its split need not stay in memory."""
    source = ScoredSplit(run)
    taken = {figure.key: take_or_missing(figure, source) for figure in FIGURES}
    try:
        taken["passages"] = (split.worst_passages(source, count), source.rows)
    except Missing as lacking:
        taken["passages"] = lacking
    return taken


def draw_section(figure: Figure, names: list[str], taken: list[Any], out: Path) -> page.Section:
    """Draw one figure in both shapes, and write its PNG."""
    runs = [(name, t) for name, t in zip(names, taken, strict=True) if not isinstance(t, Missing)]
    styles = [i for i, t in enumerate(taken) if not isinstance(t, Missing)]
    lacking = [
        (name, str(t)) for name, t in zip(names, taken, strict=True) if isinstance(t, Missing)
    ]
    png_path = out / f"{PNG_PREFIX}{figure.key}.png"
    if not runs:
        png_path.unlink(missing_ok=True)  # left by an older report
        return page.Section(figure.key, figure.title, [], "", "", "", lacking, "")
    wide, narrow = (figure.draw(runs, shape, styles) for shape in (style.WIDE, style.NARROW))
    for drawn in (wide, narrow):
        style.settle(drawn)
    with replacing(png_path) as f:
        f.write(style.png(wide))
    more = {
        "ladder": lambda: page.ladder_table(ladder_rows(runs), [name for name, _ in runs]),
        "bytes": lambda: page.bytes_table(runs),
        "errors": lambda: page.matrices_table(runs),
    }
    findings = [(name, figure.say(t)) for name, t in runs]
    return page.Section(
        figure.key,
        figure.title,
        findings,
        figure.caption,
        style.svg(wide, f"{figure.key}-w-"),
        style.svg(narrow, f"{figure.key}-n-"),
        lacking,
        more.get(figure.key, str)(),
    )


def page_tables(
    runs: list[RunFiles], names: list[str], taken: list[Any]
) -> list[tuple[str, str, str]]:
    """Return (key, title, HTML) of the three tables."""
    with_passages = [
        (name, *t) for name, t in zip(names, taken, strict=True) if not isinstance(t, Missing)
    ]
    lacking = [
        (name, str(t)) for name, t in zip(names, taken, strict=True) if isinstance(t, Missing)
    ]
    return [
        ("summary", "Summary", page.summary_html(runs, names)),
        ("passages", "The worst predicted passages", page.passages_html(with_passages, lacking)),
        ("certificate", "The certificate", page.certificates_html(runs, names)),
    ]


def page_title(names: list[str]) -> str:
    return f"Report on {', '.join(names[:3])}" + (
        f" and {len(names) - 3} more" if len(names) > 3 else ""
    )


def page_lead(runs: list[RunFiles]) -> str:
    scored = sum(run.score is not None for run in runs)
    return (
        f"{len(runs)} run{'s' * (len(runs) > 1)}, {scored} of them scored. Lower is better, for "
        "bits per byte and nats per token. Every number comes from the run's own logs and "
        "evaluation."
    )
