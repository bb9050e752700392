"""Markdown that no text of others can break."""

from __future__ import annotations

import html
from collections.abc import Sequence

PLACES = 6  # decimals of every score that is written: a thousandth of what seeds differ by


def markdown_cell(text: object) -> str:
    """Anyone's text as text of a markdown page or table: one line, without HTML, links or cell ends of its own."""
    plain = html.escape("".join(c if c.isprintable() else " " for c in str(text)), quote=False)
    return " ".join(plain.split()).translate({ord(c): f"&#{ord(c)};" for c in "|[]\\"})


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(markdown_cell(value) for value in line) + " |" for line in lines
    )


def score_text(value: float) -> str:
    """As submission.json has it."""
    return f"{value:.{PLACES}f}"


def markdown_section(title: str, *paragraphs: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, paragraphs)])


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {markdown_cell(line)}" for line in lines)
