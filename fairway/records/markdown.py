"""Markdown that nobody's text can break."""

from __future__ import annotations

import html
from collections.abc import Sequence

SCORE_DECIMALS = 6  # decimals of every score; seeds differ by a thousand times the last one


def markdown_cell(text: object) -> str:
    """Return text for a page or a table: one line, its HTML, links and cell ends escaped."""
    plain = html.escape("".join(c if c.isprintable() else " " for c in str(text)), quote=False)
    return " ".join(plain.split()).translate({ord(c): f"&#{ord(c)};" for c in "|[]\\"})


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(markdown_cell(value) for value in line) + " |" for line in lines
    )


def score_text(value: float) -> str:
    """Return a score with the decimals of submission.json."""
    return f"{value:.{SCORE_DECIMALS}f}"


def markdown_section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, paragraphs)])


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_cell(line)}" for line in lines)
