"""Python read as syntax, never run: trees, names and constants."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any


def constant_value(node: ast.AST | None) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def dotted_name(node: ast.AST | None) -> str:
    """`a.b.c` of a name or an attribute of names; "" of anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def names_in(node: ast.AST) -> set[str]:
    """Every name and attribute in an expression."""
    return {
        n.id if isinstance(n, ast.Name) else n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Name | ast.Attribute)
    }


def parse_python(text: str) -> tuple[ast.Module | None, str]:
    """The tree, or None and why. Python 3.11 cannot read f-strings within f-strings as 3.12 writes them, and minified
    records have them: then it reads their expressions as tuples."""
    try:
        return parse_quietly(text), ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        why = f"line {getattr(e, 'lineno', None) or '?'}: {getattr(e, 'msg', None) or e or type(e).__name__}"
        if not isinstance(e, SyntaxError):
            return None, why
    if re.search(r"[fF][rR]?[\"']", text):
        try:
            return parse_quietly(without_f_strings(text)), ""
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            pass
    return None, why


def parse_quietly(text: str) -> ast.Module:
    """Without Python's warnings about other people's escape sequences."""
    with warnings.catch_warnings(action="ignore"):
        return ast.parse(text)


QUOTE = re.compile(r"(?<!\w)([rRbBuUfF]{0,2})(\"\"\"|\'\'\'|\"|\')|#[^\n]*")


def without_f_strings(text: str) -> str:
    """f"a{b}{c:d}" → ("",b,c): the same names, calls and lines."""
    parts, at = [], 0
    while found := QUOTE.search(text, at):
        parts.append(text[at : found.start()])
        part, at = string_literal(text, found)
        parts.append(part)
    return "".join([*parts, text[at:]])


def string_literal(text: str, found: re.Match[str]) -> tuple[str, int]:
    """A comment, a string or an f-string as it is to be read, and where it ends."""
    at, quote = found.end(), found[2]
    if quote and "f" in found[1].lower():
        inner, at = f_string(text, at, quote)
        return "(" + ",".join(['""', *inner]) + ",)", at
    while quote and at < len(text) and not text.startswith(quote, at):
        at += 2 if text[at] == "\\" else 1
    return text[found.start() : at] + (quote or ""), at + len(quote or "")


def f_string(text: str, at: int, quote: str) -> tuple[list[str], int]:
    """The expressions of an f-string whose content starts at `at`, and where it ends."""
    found: list[str] = []
    while at < len(text) and not text.startswith(quote, at):
        if text.startswith(("{{", "}}", "\\"), at):
            at += 2
        elif text[at] == "{":
            inner, at = replacement_field(text, at + 1)
            found += inner
        else:
            at += 1
    return found, at + len(quote)


def replacement_field(text: str, at: int) -> tuple[list[str], int]:
    """What stands between { and }: an expression, and those of its format."""
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
    found = ["".join(parts).strip().removesuffix("=")]
    while at < len(text) and text[at] != "}":
        inner, at = replacement_field(text, at + 1) if text[at] == "{" else ([], at + 1)
        found += inner
    return found, at + 1
