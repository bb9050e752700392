"""The end of a bench that measures once and prints its table as often as one likes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairway.command_line import Parser, check_writable
from fairway.methods.comparison import replace_section
from train_gpt import UserError, replacing


def add_result_options(parser: Parser, out: Path) -> None:
    """Declare where results go, and what is made of them."""
    add = parser.add_argument
    add("--out", type=Path, default=out, metavar="JSON", help="default: %(default)s")
    add("--table", action="store_true", help="print the table of --out without measuring")
    add("--into", type=Path, metavar="PAGE", help="rewrite the part of a page, or append it")


def publish(options: Any, section: str, measure: Callable, table: Callable) -> dict[str, Any]:
    """Measure, or read what was measured; print its table, and write it beside the results and into
    a page. Return what was measured.
    """
    check_writable("--out", options.out)
    if options.table and not options.out.is_file():
        raise UserError(f"--table reads {options.out}, which is not there; measure first")
    if options.into and not options.into.is_file():
        raise UserError(f"--into {options.into} does not exist; check its name")
    if not options.table:
        with replacing(options.out) as f:
            f.write(json.dumps(measure(options), indent=1).encode() + b"\n")
    found = json.loads(options.out.read_text("utf-8"))
    text = table(found)
    print(text)
    with replacing(options.out.with_suffix(".md")) as f:
        f.write(text.encode())
    if options.into:
        page = replace_section(options.into.read_text("utf-8"), section, text)
        with replacing(options.into) as f:
            f.write(page.encode())
    return found
