"""Ask whether cheap runs predict expensive ones: gains published at 8xH100 beside ours.

    python bench/predict.py out/ladder --into docs/RESULTS.md --picture docs/prediction.svg

FOLDER holds results of bench/ladder.py, at any depth. bench/published_gains.json has the published
gains and the settings that make each technique. Ours is the difference of two variants of one
budget that differ in exactly these settings: added to what is below it on the ladder, or left out
of the top. A budget is part of the longest one of its shape, texts and kind (seconds or steps). A
run of a part is a whole run: its schedule ends with it.

For each shape, budget and way it prints how many signs agree, Spearman's rho with a bootstrap
interval of 95 % over techniques and seeds, and the techniques whose sign is wrong at p < 0.05. The
last line is JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pictures import label, svg

from fairway.command_line import Parser, check_writable, run_reporting
from fairway.methods.comparison import replace_section
from fairway.records.t_tests import SeedScores, welch
from train_gpt import Config, UserError, replacing

PUBLISHED = Path(__file__).with_name("published_gains.json")
LEFT_OUT = "without-"  # how names of variants that lack one technique begin
FEWEST = 4  # techniques; of fewer, rho says nothing
LEVEL = 0.05  # p below which a sign counts
DRAWS, SEED = 10_000, 1337  # of the bootstrap
WAYS = ("added", "left out")
FIELDS = {"shape", "variant", "settings", "seconds", "steps", "seed", "judged"}  # of a run
STARTER = {name.upper(): value for name, value in asdict(Config()).items()}


class Published(NamedTuple):
    """A technique, its published gain in BPB, and the settings that make it."""

    technique: str
    gain: float
    pull_request: int
    without: dict[str, float | None]  # setting → value where the technique is off; None is any
    also: frozenset[str]  # settings that may change with it


class Variant(NamedTuple):
    """One variant of a ladder at one budget: its settings and the BPB of each of its seeds."""

    name: str
    settings: dict[str, str]
    scores: list[float]


class Gain(NamedTuple):
    """A technique's published gain and the scores that make ours, one for each seed."""

    published: Published
    with_it: list[float]
    without_it: list[float]

    @property
    def bpb(self) -> float:
        """Our gain; positive is better, as in what is published."""
        return statistics.fmean(self.without_it) - statistics.fmean(self.with_it)

    @property
    def error(self) -> float | None:
        """Standard error of our gain, or None where a side has one seed."""
        sides = self.with_it, self.without_it
        if min(map(len, sides)) < 2:
            return None
        return math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))

    @property
    def p(self) -> float | None:
        """Chance of a gain this far from 0 if there were none: Welch's test, two-sided."""
        new, old = (SeedScores(side, side, 0, 0) for side in (self.with_it, self.without_it))
        p = welch(new, old).p
        return None if p is None else min(1.0, 2 * min(p, 1 - p))

    @property
    def agrees(self) -> bool:
        return self.bpb * self.published.gain > 0

    @property
    def is_sure(self) -> bool:
        return self.p is not None and self.p < LEVEL


class Panel(NamedTuple):
    """All techniques of one shape and budget, measured in one way."""

    shape: str
    data: str
    kind: str  # "seconds" or "steps"
    budget: float
    texts: tuple[str, ...]  # scored; a score is the mean over them
    fraction: float  # of the longest budget
    way: str  # one of WAYS
    gains: list[Gain]

    @property
    def title(self) -> str:
        texts = " and ".join(self.texts)
        return f"{self.shape}, {self.way}, equal {self.kind}, {self.data}, scored on {texts}"

    @property
    def run(self) -> str:
        """The budget and its part of the longest one: "30 s (10 %)"."""
        unit = "s" if self.kind == "seconds" else "steps"
        return f"{self.budget:g} {unit} ({100 * self.fraction:.0f} %)"


# ==== WHAT IS READ ================================================================================
def read_published(path: Path = PUBLISHED) -> list[Published]:
    """Return the published gains; every setting in the file is one of the trainer's."""
    published = []
    for row in json.loads(path.read_text("utf-8"))["gains"]:
        also = frozenset(row.get("also", ()))
        if unknown := (row["without"].keys() | also) - STARTER.keys():
            names = ", ".join(sorted(unknown))
            raise UserError(f"{path.name}: {names} is no setting of train_gpt.py; correct the file")
        published.append(
            Published(row["technique"], row["gain"], row["pull_request"], row["without"], also)
        )
    return published


def read_runs(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the finished runs of bench/ladder.py in folders, at any depth."""
    runs = []
    for path in sorted(p for folder in folders for p in folder.rglob("*.seed*.json")):
        try:
            run = json.loads(path.read_bytes())
            # Variants with case markers have other shards of the text that names the group.
            run["data"] = path.parent.name.split("-", 2)[-1]
            whole = run["status"] != "done" or run.keys() >= FIELDS
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            raise UserError(f"{path} is no result of bench/ladder.py; move it away")
        runs += [run] if run["status"] == "done" else []
    return runs


def score_of(run: dict[str, Any], judge: str) -> float | None:
    """Return the BPB on one text, or the mean over all texts; None where a run lacks the text."""
    scores = {name: text["bpb"] for name, text in run["judged"].items()}
    return scores.get(judge) if judge else statistics.fmean(scores.values()) if scores else None


def grouped(runs: list[dict[str, Any]], judge: str = "") -> dict[tuple, list[Variant]]:
    """Return the variants of each (shape, data, kind of budget, budget, texts)."""
    scores: dict[tuple, dict[str, dict[int, float]]] = {}
    settings = {}
    for run in runs:
        kind = "seconds" if run["seconds"] else "steps"
        texts = (judge,) if judge else tuple(sorted(run["judged"]))
        key = (run["shape"], run["data"], kind, run[kind], texts)
        if (score := score_of(run, judge)) is not None:
            scores.setdefault(key, {}).setdefault(run["variant"], {})[run["seed"]] = score
            settings[key, run["variant"]] = run["settings"]
    return {
        key: [Variant(n, settings[key, n], [*by_seed.values()]) for n, by_seed in names.items()]
        for key, names in scores.items()
    }


# ==== PAIRS =======================================================================================
def value_of(variant: Variant, name: str) -> float | str:
    """Return what a variant gives a setting, as a number if it is one; the starter's by default."""
    text = variant.settings.get(name, STARTER.get(name, ""))
    try:
        return float(text)
    except ValueError:
        return text


def is_off(variant: Variant, published: Published) -> bool:
    """Return whether a variant has a technique's settings at the values where it is off."""
    wanted = published.without.items()
    return all(value is None or value_of(variant, name) == value for name, value in wanted)


def makes(published: Published, on: Variant, off: Variant) -> bool:
    """Return whether two variants differ in one technique, which the first of them has."""
    names = on.settings.keys() | off.settings.keys()
    differing = {n for n in names if value_of(on, n) != value_of(off, n)}
    wanted = published.without.keys()
    fits = wanted <= differing <= wanted | published.also
    return fits and is_off(off, published) and not is_off(on, published)


def gain_of(published: Published, variants: list[Variant], way: str) -> Gain | None:
    """Return our gain of a technique, from the smallest pair of variants that differ in it."""
    off = [v for v in variants if v.name.startswith(LEFT_OUT) == (way == "left out")]
    on = [v for v in variants if not v.name.startswith(LEFT_OUT)]
    pairs = [(b, a) for b in on for a in off if b is not a and makes(published, b, a)]
    if not pairs:
        return None
    # Variants further up the ladder differ in as much; the lowest is where the rung stands.
    b, a = min(pairs, key=lambda pair: len(pair[0].settings))
    return Gain(published, b.scores, a.scores)


def panels_of(runs: list[dict[str, Any]], published: list[Published], judge: str) -> list[Panel]:
    """Return all panels that have a technique, shortest budget first within each series."""
    groups = grouped(runs, judge)
    longest: dict[tuple, float] = {}
    for shape, data, kind, budget, texts in groups:
        series = (shape, data, kind, texts)
        longest[series] = max(longest.get(series, 0.0), budget)
    panels = []
    for key in sorted(groups):
        shape, data, kind, budget, texts = key
        fraction = budget / longest[shape, data, kind, texts]
        for way in WAYS:
            gains = [gain_of(p, groups[key], way) for p in published]
            if found := [g for g in gains if g]:
                panels.append(Panel(*key, fraction, way, found))
    return sorted(panels, key=lambda p: (p.title, p.budget))


# ==== STATISTICS ==================================================================================
def ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks along the last axis, from 0; equal values share the mean of theirs."""
    one, other = values[..., :, None], values[..., None, :]
    return (one > other).sum(-1) + ((one == other).sum(-1) - 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Spearman's rho along the last axis; NaN where one side has equal values only."""
    x, y = (r - r.mean(-1, keepdims=True) for r in (ranks(a), ranks(b)))
    size = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return np.divide((x * y).sum(-1), size, out=np.full(size.shape, np.nan), where=size > 0)


def rho_with_interval(gains: list[Gain], draws: int = DRAWS) -> tuple[float, float, float] | None:
    """Return rho and its bootstrap interval of 95 %, or None where techniques are too few.

    A draw takes techniques with replacement, and for each of them seeds with replacement.
    """
    published = np.array([g.published.gain for g in gains])
    ours = np.array([g.bpb for g in gains])
    if len(gains) < FEWEST or not math.isfinite(rho := float(spearman(published, ours))):
        return None
    rng = np.random.default_rng(SEED)

    def means(scores: list[float]) -> np.ndarray:
        return rng.choice(np.array(scores), (draws, len(scores))).mean(1)

    noisy = np.stack([means(g.without_it) - means(g.with_it) for g in gains], axis=1)
    taken = rng.integers(len(gains), size=(draws, len(gains)))
    rhos = spearman(published[taken], np.take_along_axis(noisy, taken, axis=1))
    low, high = np.nanquantile(rhos, [0.025, 0.975])
    return rho, float(low), float(high)


# ==== TABLES ======================================================================================
def series_of(panels: list[Panel]) -> dict[str, list[Panel]]:
    """Return the panels that differ in their budget only, by their title."""
    series: dict[str, list[Panel]] = {}
    for panel in panels:
        series.setdefault(panel.title, []).append(panel)
    return series


def rho_text(panel: Panel) -> str:
    """Return rho with its interval, or why there is none."""
    if len(panel.gains) < FEWEST:
        return f"too few techniques ({len(panel.gains)} of {FEWEST} at least)"
    found = rho_with_interval(panel.gains)
    return "all gains are equal" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def misleading(panel: Panel) -> list[Gain]:
    """Return the techniques whose sign is not the published one, by more than chance."""
    return [g for g in panel.gains if g.is_sure and not g.agrees]


def names_of(gains: list[Gain]) -> str:
    return ", ".join(f"{g.published.technique} ({g.bpb:+.4f})" for g in gains) or "none"


def seeds_text(panel: Panel) -> str:
    """Return the number of seeds of a side, from the fewest to the most: "3" or "1 to 3"."""
    counts = [len(side) for g in panel.gains for side in (g.with_it, g.without_it)]
    few, many = min(counts), max(counts)
    return f"{few} to {many}" if few < many else str(many)


def summary_table(panels: list[Panel]) -> str:
    """Return one row for each panel."""
    rows = [
        f"| {p.title} | {p.run} | {seeds_text(p)} | {sum(g.agrees for g in p.gains)} of "
        f"{len(p.gains)} | {rho_text(p)} | {sum(g.is_sure for g in p.gains)} | "
        f"{names_of(misleading(p))} |"
        for p in panels
    ]
    head = "| shape, way, texts | a run | seeds | same sign | rho (95 %) | shown | mislead |"
    return "\n".join([head, "|---|---|---|---|---|--:|---|", *rows])


def gain_text(gain: Gain | None) -> str:
    """Return a gain with its standard error; bold where its sign is shown to be wrong."""
    if gain is None:
        return "–"
    text = f"{gain.bpb:+.4f}" + (f" ± {gain.error:.4f}" if gain.error is not None else "")
    return f"**{text}**" if gain.is_sure and not gain.agrees else text


def techniques_of(panels: list[Panel]) -> list[Published]:
    """Return the techniques that any panel has, the largest published gain first."""
    found = {g.published.technique: g.published for p in panels for g in p.gains}
    return sorted(found.values(), key=lambda p: -p.gain)


def gains_table(panels: list[Panel]) -> str:
    """Return the gains of one series: a row for each technique, a column for each budget."""
    columns = [{g.published.technique: g for g in p.gains} for p in panels]
    heads = ["technique", "published", "pull request", *(p.run for p in panels)]
    lines = [f"| {' | '.join(heads)} |", "|---|--:|---|" + "--:|" * len(panels)]
    for p in techniques_of(panels):
        cells = [p.technique, f"{p.gain:+.4f}", f"#{p.pull_request}"]
        cells += [gain_text(column.get(p.technique)) for column in columns]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def section(panels: list[Panel], published: list[Published]) -> str:
    """Return the part of a page: what is compared, the summary, and the gains of each series."""
    measured = {p.technique for p in techniques_of(panels)}
    absent = [p.technique for p in published if p.technique not in measured]
    about = (
        f"Published gains of {len(measured)} techniques at 8×H100, ten minutes a run, beside ours, "
        "in BPB; positive is better. Rho is Spearman's, between published gains and ours, with a "
        f"bootstrap interval over techniques and seeds. *Shown* counts gains whose sign is sure at "
        f"p < {LEVEL} (Welch, two-sided); *mislead* names those of them with the wrong sign, bold "
        "below. ± is the standard error. One in forty techniques without any effect would be "
        "named by chance. Published gains come from different bases and are often within the noise "
        "of their seeds."
    )
    parts = [about, summary_table(panels)]
    for title, series in series_of(panels).items():
        parts += [f"#### {title}", gains_table(series)]
    if absent:
        parts.append(f"Published, but in no pair of these runs: {'; '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


# ==== PICTURE =====================================================================================
NAMES, WIDTH, GAP, ROW, HEAD, LEAST_WIDTH = 280, 160, 14, 18, 92, 760
TICKS = (0.001, 0.003, 0.01, 0.03, 0.1)


def place_of(gain: float, most: float, middle: float) -> float:
    """Return the x of a gain: the root of its size, so that thousandths and tenths both show."""
    return middle + math.copysign(math.sqrt(abs(gain) / most), gain) * (WIDTH / 2 - 8)


def axis(left: float, top: float, bottom: float, most: float) -> list[str]:
    """Draw the lines of one panel, with numbers at zero and at both ends."""
    sizes = [t for t in TICKS if t <= most]
    ticks = [*(-t for t in reversed(sizes)), 0.0, *sizes]
    parts = []
    for i, tick in enumerate(ticks):
        x, kind = place_of(tick, most, left + WIDTH / 2), "grid" if tick else "line"
        ends = f'x1="{x:.1f}" y1="{top - 10:g}" x2="{x:.1f}" y2="{bottom + 10:g}"'
        parts.append(f'<line {ends} class="{kind}"/>')
        if i in (0, len(sizes), len(ticks) - 1):
            parts.append(label(x, bottom + 24, f"{tick:g}", 10, "soft"))
    return parts


def marks(gain: Gain, left: float, y: float, most: float) -> list[str]:
    """Draw one technique: a ring at its published gain, a dot with its error at ours."""
    error, middle = gain.error or 0.0, left + WIDTH / 2
    there, here, low, high = (
        place_of(x, most, middle)
        for x in (gain.published.gain, gain.bpb, gain.bpb - error, gain.bpb + error)
    )
    kind = "tip" if not gain.is_sure else "ours" if gain.agrees else "other"
    return [
        f'<line x1="{low:.1f}" y1="{y:g}" x2="{high:.1f}" y2="{y:g}" class="line"/>',
        f'<circle cx="{there:.1f}" cy="{y:g}" r="5" class="line"/>',
        f'<circle cx="{here:.1f}" cy="{y:g}" r="3.5" class="{kind}"/>',
    ]


def picture(panels: list[Panel]) -> str:
    """Return an SVG: a block for each series, a row for each technique, a panel for each budget."""
    sizes = [abs(x) for p in panels for g in p.gains for x in (g.published.gain, g.bpb)]
    errors = [abs(g.bpb) + (g.error or 0.0) for p in panels for g in p.gains]
    most = max([*sizes, *errors, TICKS[0]])
    head = "Gains in bits per byte: published at 8×H100 (rings) and ours (dots)"
    key = "blue: sure and of the same sign; brown: sure and of the other; grey: not sure"
    parts = [label(16, 26, head, 14, "", "start"), label(16, 46, key, 11, "soft", "start")]
    top, width = float(HEAD), LEAST_WIDTH
    for title, series in series_of(panels).items():
        names = [p.technique for p in techniques_of(series)]
        rows = {name: top + 34 + ROW * i for i, name in enumerate(names)}
        bottom = top + 34 + ROW * (len(names) - 1)
        parts.append(label(16, top - 8, title, 13, "", "start"))
        parts += [label(NAMES - 10, y + 4, name, 11, "", "end") for name, y in rows.items()]
        for i, panel in enumerate(series):
            left = NAMES + i * (WIDTH + GAP)
            parts.append(label(left + WIDTH / 2, top + 14, panel.run, 11, "soft"))
            parts += axis(left, top + 34, bottom, most)
            for gain in panel.gains:
                parts += marks(gain, left, rows[gain.published.technique], most)
        top = bottom + 72
        width = max(width, NAMES + len(series) * (WIDTH + GAP))
    return svg(width, round(top - 30), head, parts)


# ==== COMMAND =====================================================================================
def as_json(panel: Panel) -> dict[str, Any]:
    """Return a panel with everything that the tables show."""
    found = rho_with_interval(panel.gains)
    return {
        **{
            name: getattr(panel, name)
            for name in ("shape", "data", "kind", "budget", "texts", "way")
        },
        "fraction": panel.fraction,
        "agree": sum(g.agrees for g in panel.gains),
        "rho": found and found[0],
        "interval": found and found[1:],
        "misleading": [g.published.technique for g in misleading(panel)],
        "gains": [
            {
                "technique": g.published.technique,
                "pull_request": g.published.pull_request,
                "published": g.published.gain,
                "ours": g.bpb,
                "error": g.error,
                "p": g.p,
                "seeds": [len(g.with_it), len(g.without_it)],
            }
            for g in panel.gains
        ],
    }


def options_parser() -> Parser:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="results of bench/ladder.py")
    add("--judge", default="", metavar="NAME", help="one text (default: the mean over all)")
    add("--into", type=Path, metavar="PAGE", help="rewrite the part of a page, or append it")
    add("--picture", type=Path, metavar="FILE", help="draw an SVG")
    return parser


def main() -> int:
    """Print the tables and one line of JSON; write what was asked for."""
    options = options_parser().parse_args()
    check_writable("--picture", options.picture)
    for path in [*options.folders, *filter(None, [options.into])]:
        if not path.exists():
            raise UserError(f"{path} does not exist; check its name")
    published, runs = read_published(), read_runs(options.folders)
    panels = panels_of(runs, published, options.judge)
    if not panels:
        raise UserError(
            f"{len(runs)} finished runs, and none of the published techniques is what two of them "
            "differ in; run bench/ladder.py with --variants ladder,leave-one-out"
        )
    text = section(panels, published)
    print(text)
    if options.into:
        page = replace_section(options.into.read_text("utf-8"), "predict", text)
        with replacing(options.into) as f:
            f.write(page.encode())
    if options.picture:
        with replacing(options.picture) as f:
            f.write(picture(panels).encode())
    print(json.dumps({"bench": "predict", "panels": [as_json(p) for p in panels]}))
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/predict", main))
