"""The table of the ladder (bench/ladder.py): from the JSON files of runs to rows and Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from rungs import BASELINE, ENDS, SHAPES, TOP, Shape, cumulative, leave_one_out, one_more

from fairway.command_line import json_bytes
from fairway.methods.comparison import replace_section
from fairway.methods.harness import read_cell
from fairway.records.t_tests import SeedScores, p_value_text, welch
from train_gpt import replacing

SHOWN, NEAR = 0.05, (0.01, 0.2)  # p below which a step counts; p that more seeds may decide
LEAST_SEEDS = 3


# ==== STATISTICS ==================================================================================
class Difference(NamedTuple):
    """The mean of a variant less that of another, in BPB, and how sure its sign is."""

    bpb: float
    p: float | None  # Welch, two-sided; None with fewer than two seeds of either


class Row(NamedTuple):
    """One variant over its seeds."""

    name: str
    label: str
    below: str  # the variant that `differences` refers to
    seeds: list[int]
    errors: list[str]  # of the runs that failed
    scores: dict[str, list[float]]  # BPB of each seed, by judge
    differences: dict[str, Difference]  # by judge
    steps: float
    tokens_per_second: float
    artifact_bytes: float


Results = dict[str, list[dict[str, Any]]]  # by variant


def welch_two_sided(ours: list[float], theirs: list[float]) -> Difference:
    """Return the difference of two means, and the chance of one as large if both were equal."""
    test = welch(SeedScores(ours, ours, 0, 0), SeedScores(theirs, theirs, 0, 0))
    p = None if test.p is None else min(1.0, 2 * min(test.p, 1 - test.p))
    return Difference(statistics.fmean(ours) - statistics.fmean(theirs), p)


def scores_of(results: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the scores of runs, by the judges that all of them have."""
    done = [r["judged"] for r in results if r["status"] == "done"]
    names = [n for n in (done[0] if done else {}) if all(n in judged for judged in done)]
    return {name: [judged[name]["bpb"] for judged in done] for name in names}


def row_of(name: str, label: str, below: str, results: Results) -> Row:
    """Return the row of a variant, compared with `below` if that has runs."""
    own = results[name]
    scores, others = scores_of(own), scores_of(results.get(below, []))
    done = [r for r in own if r["status"] == "done"]

    def mean(key: str) -> float:
        return statistics.fmean(r[key] for r in done) if done else math.nan

    return Row(
        name,
        label,
        below,
        [r["seed"] for r in done],
        [r["error"] for r in own if r["status"] != "done"],
        scores,
        {n: welch_two_sided(bpb, others[n]) for n, bpb in scores.items() if n in others},
        mean("steps_taken"),
        mean("tokens_per_second"),
        mean("artifact_bytes"),
    )


def sections_of(results: Results, shape: Shape) -> dict[str, list[Row]]:
    """Return the rows of each part of the table that has any."""
    present = [v for v in cumulative(shape) if v.name in results]
    ends = [name for name in ENDS if name in results]
    pairs = [(name, name, below) for name, below in zip(ends, ["", *ends], strict=False)]
    if len(ends) == len(ENDS):
        pairs.append((TOP, f"{TOP} against {BASELINE}", BASELINE))
    steps = []
    for v, below in zip(present, ["", *(v.name for v in present)], strict=False):
        # A rung that was not run is passed over.
        label = v.label if below in ("", v.below) else f"{v.label} against {below}"
        steps.append((v.name, label, below))
    top, sections = [(TOP, TOP, "")] if TOP in results else [], {"Ends": pairs}
    if len(present) > len(ends):
        sections["Ladder"] = steps
    others = {"Leave one out": leave_one_out(shape), "One more": one_more(shape)}
    for name, variants in others.items():
        if rows := [(v.name, v.label, TOP) for v in variants if v.name in results]:
            sections[name] = [*top, *rows]
    return {
        name: [row_of(*row, results) for row in rows] for name, rows in sections.items() if rows
    }


# ==== TABLE =======================================================================================
def read_results(folder: Path) -> Results:
    """Return the results of a group, by variant and seed."""
    found = filter(None, (read_cell(path) for path in sorted(folder.glob("*.json"))))
    results: Results = {}
    for result in sorted(found, key=lambda r: r["seed"]):
        results.setdefault(result["variant"], []).append(result)
    return results


def spread_text(scores: list[float]) -> str:
    """Return mean and deviation."""
    deviation = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.4f}{deviation}"


def p_text(difference: Difference | None) -> str:
    if difference is None or difference.p is None:
        return "–"
    shown = "" if difference.p < SHOWN else ", not shown"
    return p_value_text(difference.p) + shown


def markdown_row(row: Row, judges: list[str]) -> str:
    """Return a line of the table."""
    cells = [row.label, ", ".join(map(str, row.seeds)) or "–"]
    for judge_name in judges:
        scores, difference = row.scores.get(judge_name), row.differences.get(judge_name)
        cells += [spread_text(scores) if scores else "–"]
        cells += [f"{difference.bpb:+.4f}" if difference else "–", p_text(difference)]
    if not row.seeds:
        error = row.errors[0].replace("|", "/")
        return f"| {cells[0]} | failed: {error} |" + " |" * (3 * len(judges) + 3)
    cells += [f"{row.steps:,.0f}", f"{row.tokens_per_second:,.0f}", f"{row.artifact_bytes:,.0f}"]
    return "| " + " | ".join(cells) + " |"


def verdict(rows: list[Row], judges: list[str]) -> str:
    """Say for each judge which end beats which, at p < 0.01 over three seeds or more."""
    lines = []
    for judge_name in judges:
        for row in (r for r in rows if judge_name in r.differences):
            d = row.differences[judge_name]
            sure = d.p is not None and d.p < NEAR[0] and len(row.seeds) >= LEAST_SEEDS
            word = ("beats" if d.bpb < 0 else "loses to") if sure else "is not shown to beat"
            p = "no p" if d.p is None else f"p = {p_value_text(d.p)}"
            text = f"`{row.name}` {word} `{row.below}` on {judge_name}: {d.bpb:+.4f} BPB, {p}"
            lines.append(f"- {text} (seeds: {len(row.seeds)}).")
    return (
        f"At p < {NEAR[0]:g}, {LEAST_SEEDS} seeds or more:\n\n" + "\n".join(lines) if lines else ""
    )


def near_the_line(sections: dict[str, list[Row]]) -> str:
    """Name the variants whose sign more seeds may decide."""
    low, high = NEAR
    near = [
        row.name
        for rows in sections.values()
        for row in rows
        if any(d.p is not None and low <= d.p < high for d in row.differences.values())
    ]
    names = ",".join(dict.fromkeys(near))
    return f"Near the line (p from {low:g} to {high:g}), so worth more seeds: `{names}`." * bool(
        near
    )


def finished(results: Results) -> list[dict[str, Any]]:
    return [r for runs in results.values() for r in runs if r["status"] == "done"]


def unequal_bytes(results: Results) -> str:
    """Name the texts of which tokenizers keep different bytes, and by how much."""
    counts: dict[str, set[int]] = {}
    for r in finished(results):
        for name, judged in r["judged"].items():
            counts.setdefault(name, set()).add(judged["bytes"])
    apart = {name: max(found) / min(found) - 1 for name, found in counts.items()}
    unequal = [f"{name} by {100 * part:.2f} %" for name, part in apart.items() if part]
    if not unequal:
        return ""
    return (
        f"Texts differ in bytes between tokenizers: {', '.join(unequal)}. One that normalises text "
        "joins lines and blanks and replaces some characters. Each BPB is over the bytes that its "
        "own tokenizer keeps."
    )


def mixed(results: Results) -> str:
    """Name what differs between runs that a table needs to be equal."""
    done = finished(results)
    kinds: dict[str, Callable[[dict[str, Any]], Any]] = {
        "code": lambda r: r["environment"]["code_sha256"],
        "hardware": lambda r: r["environment"]["hardware"],
        "versions": lambda r: r["environment"]["versions"],
        "threads": lambda r: r["threads"],
        "stride": lambda r: r["stride"],
        "device": lambda r: r["device"],
    }
    names = [n for n, of in kinds.items() if len({json.dumps(of(r)) for r in done}) > 1]
    texts = {(r["data"], json.dumps(r["fingerprints"])) for r in done}
    names += ["texts"] * (len(texts) > len({data for data, _ in texts}))
    if not names:
        return ""
    return f"**These runs differ in {', '.join(names)}**: the rows cannot be compared; use --retry."


def about(results: Results) -> str:
    """Return a paragraph on budget, texts and machine."""
    done = finished(results)
    run, pieces = done[0], {r["data"]: int(r["settings"]["VOCAB_SIZE"]) for r in done}
    data = " and ".join(f"`{name}` ({count:,} pieces)" for name, count in pieces.items())
    budget = f"{run['seconds']:g} s of training" if run["seconds"] else f"{run['steps']} steps"
    shape, machine = words_of_shape(run), run["environment"]["hardware"]
    most = {
        n: max(r["judged"][n]["bytes"] for r in done if n in r["judged"]) for n in run["judged"]
    }
    texts = "; ".join(f"{n}: {count:,} bytes" for n, count in most.items())
    code = ", ".join(f"{n} {v}" for n, v in run["environment"]["versions"].items())
    return (
        f"Shape `{run['shape']}` ({shape}), {budget} a run on {data}, {run['threads']} thread(s) "
        f"each. {machine['processor']}, {machine['cores']} cores; {code}. Texts: "
        f"{texts}. BPB is of the artifact read back from disk, in sliding windows of stride "
        f"{run['stride']}, without experts. ± is the deviation over seeds; a seed changes the "
        "initial weights, not the order of the text. p is Welch's, two-sided; from "
        f"{SHOWN:g} on, a difference is not shown. Negative differences are better."
    )


def words_of_shape(run: dict[str, Any]) -> str:
    s = run["settings"]
    return (
        f"{s['NUM_LAYERS']} layers of width {s['MODEL_DIM']}, {s['TRAIN_BATCH_TOKENS']} tokens a "
        f"step in sequences of {s['TRAIN_SEQ_LEN']}"
    )


COMPARED = {
    "Ends": "difference",
    "Ladder": "to the rung below",
    "Leave one out": "to the top",
    "One more": "to the top",
}


def section_text(name: str, rows: list[Row], judges: list[str]) -> str:
    """Return one part of the table, with its heading."""
    heads = [head for j in judges for head in (f"{j}, BPB", COMPARED[name], "p")]
    heads = ["variant", "seeds", *heads, "steps", "tokens/s", "bytes"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "--:|" * (len(heads) - 2)]
    lines += [markdown_row(row, judges) for row in rows]
    text = f"### {name}\n\n" + "\n".join(lines)
    return f"{text}\n\n{verdict(rows, judges)}".rstrip() if name == "Ends" else text


def failures(results: Results) -> str:
    """Name each run that failed, with its error."""
    lines = [
        f"- `{r['variant']}.seed{r['seed']}`: {r['error']}"
        for runs in results.values()
        for r in runs
        if r["status"] != "done"
    ]
    return "\n".join(["Failed; `--retry` runs them again:", "", *lines]) if lines else ""


def judges_of(sections: dict[str, list[Row]]) -> list[str]:
    return list(dict.fromkeys(n for rows in sections.values() for row in rows for n in row.scores))


def markdown(results: Results) -> str:
    """Return the whole table of a group."""
    sections = sections_of(results, SHAPES[next(iter(results.values()))[0]["shape"]])
    judges = judges_of(sections)
    parts = [section_text(name, rows, judges) for name, rows in sections.items() if judges]
    opening = (
        [about(results), unequal_bytes(results), mixed(results)]
        if judges
        else ["No run is done yet."]
    )
    parts = [*opening, *parts, near_the_line(sections), failures(results)]
    return "\n\n".join(filter(None, parts)) + "\n"


def table_json(group: str, results: Results) -> dict[str, Any]:
    """Return the rows for other programs; a number that does not exist is null."""
    shape = SHAPES[next(iter(results.values()))[0]["shape"]]
    rows = {
        name: [clean(row._asdict()) | {"mean": means(row)} for row in rows]
        for name, rows in sections_of(results, shape).items()
    }
    return {"group": group, "sections": rows}


def means(row: Row) -> dict[str, dict[str, float | None]]:
    """Return mean and deviation by judge."""
    return {
        name: {
            "bpb": statistics.fmean(scores),
            "deviation": statistics.stdev(scores) if len(scores) > 1 else None,
        }
        for name, scores in row.scores.items()
    }


def clean(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as JSON holds it."""
    differences = {name: d._asdict() for name, d in row["differences"].items()}
    finite = {
        n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()
    }
    return finite | {"differences": differences}


def write_tables(out: Path, groups: Iterable[str], page: Path | None) -> None:
    """Write the tables of groups as Markdown and JSON, perhaps also into a page."""
    for group in groups:
        if not (results := read_results(out / "raw" / group)):
            continue
        text = markdown(results)
        files = {
            out / f"{group}.md": text.encode(),
            out / f"{group}.json": json_bytes(table_json(group, results)),
        }
        if page:
            files[page] = replace_section(page.read_text("utf-8"), group, text).encode()
        for path, content in files.items():
            with replacing(path) as f:
                f.write(content)
        print("\n".join(map(str, files)))
