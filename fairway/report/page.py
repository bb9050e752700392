"""One page of HTML without scripts or outside resources. CSS alone makes it light, dark or
printable.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

from fairway.records.run import RunFiles
from fairway.report import artifact, data
from fairway.report.split import PASSAGE, Passage
from fairway.report.style import variables

SHADES = (1.0, 3.0, 6.0, 9.0, 13.0)  # bits at which the shade of a token becomes darker

STYLE = """
:root{color-scheme:light dark;LIGHT}
@media (prefers-color-scheme:dark){:root{DARK}}
@media print{:root{color-scheme:light;LIGHT}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--surface);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;line-height:1.25;margin:2.5rem 0 .5rem;padding-top:.5rem;
border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:1.25rem 0 .25rem}
p{margin:.5rem 0}
figcaption ul{margin:.5rem 0;padding:0;list-style:none}
figcaption strong{color:var(--ink)}
a{color:var(--c0)}
nav ol{columns:14rem 3;padding-left:1.75rem;margin:.5rem 0}
figure{margin:0}
figcaption,.soft,caption{color:var(--soft);font-size:.9rem;text-align:left}
figure svg{display:block;width:100%;height:auto;margin:.5rem auto}
svg text{fill:var(--ink)}
.wide{display:none!important}
.narrow{max-width:34rem}
@media (min-width:60rem),print{.wide{display:block!important}.narrow{display:none!important}}
.scroll{overflow-x:auto}
table{border-collapse:separate;border-spacing:0;font-size:.9rem;line-height:22px;font-variant-numeric:tabular-nums;overflow-wrap:normal}
caption{padding:.25rem 0}
th,td{padding:5px 12px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}
thead th{border-bottom:2px solid var(--soft)}
tbody th{font-weight:normal;color:var(--soft);min-width:7.5rem;position:sticky;left:0;
background:var(--surface)}
.number{text-align:right;white-space:nowrap}
.headline td,.headline th{font-weight:bold;color:var(--ink);font-size:1.05rem}
.bad{color:var(--warn);font-weight:bold}
.missing{border-left:4px solid var(--warn);padding:.25rem .75rem;font-size:.9rem}
code,pre,td.code{font-family:ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;
font-size:.875rem}
details{margin:.5rem 0}
summary{cursor:pointer}
.passage{white-space:pre-wrap;line-height:1.9;padding:.5rem .75rem;
border:1px solid var(--grid);border-radius:.25rem;
font-size:.95rem;margin:.25rem 0 1rem}
.passage span,.key span{border-radius:.15rem;print-color-adjust:exact;
-webkit-print-color-adjust:exact}
.key span{padding:0 .4rem;margin-right:.25rem;white-space:nowrap}
SHADED
.verdicts td{min-width:11rem}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}
table{line-height:1.3}th,td{padding:2px 12px 2px 0}
h2{break-before:page;border:0}main>section:first-child h2{break-before:auto;margin-top:.5rem}
h2,h3{break-after:avoid}figure,.passage,tr{break-inside:avoid}details:not([open])>*{display:none}.scroll{overflow:visible}
svg{max-height:22cm}}
"""


class Section(NamedTuple):
    """One figure on the page."""

    key: str
    title: str
    findings: Sequence[tuple[str, str]]  # (run, what its data show, in numbers)
    caption: str
    wide: str  # SVG without its opening tag, from the viewBox on; "" if no run has the data
    narrow: str
    missing: Sequence[tuple[str, str]]  # (run, what it lacks)
    more: str  # HTML below the figure


def style_sheet() -> str:
    shaded = "".join(
        f".b{i}{{background:color-mix(in srgb,var(--c1) {share}%,transparent)}}"
        for i, share in enumerate((0, 9, 19, 30, 42, 55))
    )
    text = (
        STYLE.replace("LIGHT", variables(False))
        .replace("DARK", variables(True))
        .replace("SHADED", shaded)
    )
    return re.sub(r"\n", "", text)


def page_html(
    title: str, lead: str, sections: list[Section], tables: list[tuple[str, str, str]]
) -> str:
    """Return the page. `tables` are (key, title, HTML); the first stands before the figures."""
    first, *rest = [
        f'<section id="{key}"><h2>{escape(heading)}</h2>{body}</section>'
        for key, heading, body in tables
    ]
    entries = [tables[0][:2], *((s.key, s.title) for s in sections), *(t[:2] for t in tables[1:])]
    contents = "".join(
        f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading in entries
    )
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head><body>",
        f"<header><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>",
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav><main>',
        first,
        *map(figure_html, sections),
        *rest,
        "</main></body></html>\n",
    ]
    return "\n".join(parts)


def figure_html(section: Section) -> str:
    body = "".join(missing_html(name, text) for name, text in section.missing)
    if section.wide:
        alt = escape(
            f"{section.title}. " + " ".join(f"{name}: {text}." for name, text in section.findings)
        )
        drawn = "".join(
            f'<svg class="{shape}" role="img" aria-label="{alt}" {inside}</svg>'
            for shape, inside in (("wide", section.wide), ("narrow", section.narrow))
        )
        said = "".join(
            f"<li><strong>{escape(name)}</strong>: {escape(text)}.</li>"
            for name, text in section.findings
        )
        body = (
            f"<figure>{drawn}<figcaption><ul>{said}</ul><p>{escape(section.caption)}</p></figcaption></figure>"
            f"{body}{section.more}"
        )
    return f'<section id="{section.key}"><h2>{escape(section.title)}</h2>{body}</section>'


def missing_html(name: str, text: str) -> str:
    return f'<p class="missing">{escape(name)}: {escape(text)}.</p>'


# ==== TABLES ======================================================================================
def table_html(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    numbers: bool = True,
    headline: str = "",
) -> str:
    """Return a table. The first cell of each row is its heading; `headline` names the row in
    bold.
    """
    kind = ' class="number"' if numbers else ""
    top = "".join(
        f'<th scope="col"{kind if i else ""}>{escape(cell)}</th>' for i, cell in enumerate(head)
    )
    body = "".join(
        f"<tr{' class=headline' if row[0] == headline else ''}>"
        f'<th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(caption)}" tabindex="0">'
        "<table><caption>"
        f"{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_html(runs: list[RunFiles], names: list[str]) -> str:
    """Return all runs side by side: scores, sizes, times, hashes. Rows that no run fills are left
    out.
    """
    columns = [data.summary_values(run) for run in runs]
    rows = [
        [key, *(column[key] or "–" for column in columns)]
        for key in columns[0]
        if any(column[key] for column in columns)
    ]
    scores = [data.finite_number(run.score.get("val_bpb")) for run in runs if run.score]
    scores, mean = [s for s in scores if s == s], ""
    if len(scores) > 1:
        mean = (
            f"<p>Mean of {len(scores)} scored runs: <strong>{statistics.mean(scores):.6f}</strong> "
            f"bits per byte, standard deviation {statistics.stdev(scores):.6f}.</p>"
        )
    return mean + table_html(
        "Runs side by side", ["", *names], rows, len(runs) > 1, "val_bpb (bits per byte)"
    )


def ladder_table(rows: list[tuple[str, str, list[float]]], names: list[str]) -> str:
    cells = [
        [
            f"{name} (no score)" if group == "apart" else name,
            *(data.decimal_text(v, 6) or "–" for v in values),
        ]
        for group, name, values in rows
    ]
    return details_html("The same in numbers", table_html("Bits per byte", ["", *names], cells))


def bytes_table(weighed: list[tuple[str, artifact.ByteBreakdown]]) -> str:
    parts = list(dict.fromkeys(p.name for _, own in weighed for p in own.parts))
    cells = [
        {p.name: f"{'' if p.exact else '≈ '}{p.bytes:,.0f}" for p in own.parts}
        for _, own in weighed
    ]
    rows = [[name, *(own.get(name, "–") for own in cells)] for name in parts]
    rows += [
        ["all", *(f"{own.used:,}" for _, own in weighed)],
        ["left of the budget", *(f"{own.budget - own.used:,}" for _, own in weighed)],
    ]
    return table_html(
        "Bytes (≈: by estimate)", ["", *(name for name, _ in weighed)], rows, True, "all"
    )


def matrices_table(runs: list[tuple[str, list[data.MatrixError]]]) -> str:
    """Return error and bits of each matrix."""
    cells_of: dict[tuple[int, str], list[str]] = {}
    for at, (_, own) in enumerate(runs):
        for m in own[:512]:
            cells_of.setdefault((m.layer, m.kind), ["–"] * len(runs))[at] = (
                f"{100 * m.error:.2f} %, {m.bits:.2f}"
            )
    rows = [
        [f"layer {layer} {kind}" if layer >= 0 else kind, *cells]
        for (layer, kind), cells in cells_of.items()
    ]
    return details_html(
        "Error and bits of each matrix",
        table_html("Relative error, bits per weight", ["", *(n for n, _ in runs)], rows),
    )


def details_html(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


# ==== PASSAGES AND VERDICTS =======================================================================
def passages_html(
    with_passages: list[tuple[str, list[Passage], int]], lacking: list[tuple[str, str]]
) -> str:
    """Return the worst passages; each item is (run, passages, rows of its split)."""
    between = [f"{a:.0f}–{b:.0f}" for a, b in pairwise(SHADES)]
    key = "".join(
        f'<span class="b{i}">{text}</span>'
        for i, text in enumerate([f"under {SHADES[0]:.0f}", *between, f"over {SHADES[-1]:.0f}"])
    )
    parts = (
        [
            f"<p>The {PASSAGE}-token windows that cost the final mixture most. Shade of a token: "
            f'<span class="key">{key}</span> bits.</p>'
        ]
        if with_passages
        else []
    )
    for name, own, rows in with_passages:
        parts.append(f"<h3>{escape(name)}</h3>" if len(with_passages) > 1 else "")
        parts += [passage_html(p, rows) for p in own]
    return "".join(parts) + "".join(missing_html(name, text) for name, text in lacking)


def passage_html(passage: Passage, rows: int) -> str:
    last = min(passage.first + PASSAGE, rows)
    where = (
        f"{passage.mean:.2f} bits per token; targets {passage.first + 1:,} to {last:,} of {rows:,} "
        f"({100 * passage.first / rows:.1f} % of the split), document {passage.document:,}"
    )
    spans = "".join(
        f'<span class="b{sum(bits >= s for s in SHADES)}" title="{bits:.1f} bits">'
        f"{visible_html(text)}</span>"
        for text, bits in passage.pieces
    )
    return f'<p class="soft">{where}</p><p class="passage">{spans}</p>'


def visible_html(text: str) -> str:
    """Escape text; control characters become U+FFFD, and a line end gets a visible sign."""
    signs = "".join(
        "↵\n" if c == "\n" else c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
    return escape(signs)


def certificates_html(runs: list[RunFiles], names: list[str]) -> str:
    """Return a table with one row for each rule and one column for each run."""
    by_run = [
        (name, {r[0]: r[1:] for r in data.rule_verdicts(run)})
        for name, run in zip(names, runs, strict=True)
    ]
    lacking = "".join(
        missing_html(name, str(data.no_certificate(run)))
        for (name, rules), run in zip(by_run, runs, strict=True)
        if not rules
    )
    by_run = [(name, rules) for name, rules in by_run if rules]
    if not by_run:
        return lacking
    rules = list(dict.fromkeys(rule for _, own in by_run for rule in own))
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name, _ in by_run)
    body = "".join(
        f'<tr><th scope="row">{escape(rule)}</th>'
        + "".join(verdict_html(*own.get(rule, ("–", ""))) for _, own in by_run)
        + "</tr>"
        for rule in rules
    )
    caption = "Verdict on each rule, and what was measured; docs/LEGALITY.md explains the rules"
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0">'
        '<table class="verdicts">'
        f'<caption>{caption}</caption><thead><tr><th scope="col">rule</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{lacking}"
    )


def verdict_html(word: str, about: str) -> str:
    bad = ' class="bad"' if word not in ("ok", "–") else ""
    return (
        f'<td><strong{bad}>{escape(word)}</strong> <span class="soft">{escape(about)}</span></td>'
    )
