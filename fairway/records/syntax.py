"""Python read as syntax, never run: trees, names and constants."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any


def constant_value(node: ast.AST | None) -> Any:
    """Return the value of a constant; None for any other node."""
    return node.value if isinstance(node, ast.Constant) else None


def dotted_name(node: ast.AST | None) -> str:
    """Return `a.b.c` for a name or an attribute of names; "" for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def names_in(node: ast.AST) -> set[str]:
    """Return every name and attribute in an expression."""
    return {
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute)
    }


def parse_python(text: str) -> tuple[ast.Module | None, str]:
    """Return the tree and "", or None and the reason.

    Python 3.11 cannot parse the nested f-strings that 3.12 allows, and minified records have them.
    Their expressions are then parsed as tuples.
    """
    try:
        return parse_quietly(text), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        why = (
            f"line {getattr(e, 'lineno', None) or '?'}: "
            f"{getattr(e, 'msg', None) or e or type(e).__name__}"
        )
        if not isinstance(e, SyntaxError):
            return None, why
    if re.search(r"[fF][rR]?[\"']", text):
        try:
            return parse_quietly(without_f_strings(text)), ""
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return None, why


def parse_quietly(text: str) -> ast.Module:
    """Parse without Python's warnings about other people's escape sequences."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(text)


QUOTE = re.compile(r"(?<!\w)([rRbBuUfF]{0,2})(\"\"\"|\'\'\'|\"|\')|#[^\n]*")


def without_f_strings(text: str) -> str:
    """Replace each f-string by a tuple: f"a{b}{c:d}" becomes ("",b,c). Names, calls and lines
    stay.
    """
    parts, at = [], 0
    while match := QUOTE.search(text, at):
        parts.append(text[at : match.start()])
        part, at = string_literal(text, match)
        parts.append(part)
    return "".join([*parts, text[at:]])


def string_literal(text: str, match: re.Match[str]) -> tuple[str, int]:
    """Return a comment, a string or a replaced f-string, and the place where it ends."""
    at, quote = match.end(), match[2]
    if quote and "f" in match[1].lower():
        inner, at = f_string(text, at, quote)
        return "(" + ",".join(['""', *inner]) + ",)", at
    while quote and at < len(text) and not text.startswith(quote, at):
        at += 2 if text[at] == "\\" else 1
    return text[match.start() : at] + (quote or ""), at + len(quote or "")


def f_string(text: str, at: int, quote: str) -> tuple[list[str], int]:
    """Return the expressions of an f-string whose content starts at `at`, and the place where it
    ends.
    """
    expressions: list[str] = []
    while at < len(text) and not text.startswith(quote, at):
        if text.startswith(("{{", "}}", "\\"), at):
            at += 2
        elif text[at] == "{":
            inner, at = replacement_field(text, at + 1)
            expressions += inner
        else:
            at += 1
    return expressions, at + len(quote)


def replacement_field(text: str, at: int) -> tuple[list[str], int]:
    """Return the expression between { and }, those of its format, and the place where it ends."""
    parts, depth = [], 0
    while at < len(text) and (
        depth or not (text[at] in "}:" or (text[at] == "!" and text[at + 1 : at + 2] != "="))
    ):
        part, end = (
            string_literal(text, quoted)
            if (quoted := QUOTE.match(text, at))
            else (text[at], at + 1)
        )
        depth += 0 if quoted else (part in "([{") - (part in ")]}")
        parts.append(part)
        at = end
    expressions = ["".join(parts).strip().removesuffix("=")]
    while at < len(text) and text[at] != "}":
        inner, at = replacement_field(text, at + 1) if text[at] == "{" else ([], at + 1)
        expressions += inner
    return expressions, at + 1
