"""Hold the docstrings of all Python files to plain sentences (CONTRIBUTING.md, "Plain words")."""

import ast
import re

import pytest
from test_house import PYTHON, tree_of

# A docstring that starts with one of these is a fragment, not a sentence.
FRAGMENTS = {"Of", "To", "Where", "How", "What", "Which", "Whether", "That"}
LEAST_WORDS = 3  # "Nothing here." says nothing


def docstrings(tree: ast.Module) -> list[tuple[str, str]]:
    """Return (place, docstring) of the module and of each class and function that has one."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            place = f"line {node.body[0].lineno}" if node.body else "line 1"
            if text is not None:
                found.append((place, text))
    return found


def problem_of(docstring: str) -> str:
    """Return what is wrong with a docstring, or ""."""
    words = docstring.split()
    if len(words) < LEAST_WORDS:
        return f"has fewer than {LEAST_WORDS} words"
    first_word = re.sub(r"\W", "", words[0])
    if first_word in FRAGMENTS:
        return f"starts with {first_word}; start with a verb, or name the thing"
    if not re.search(r"\.[)\"'`]?$", docstring.split("\n\n")[0].rstrip()):
        return "does not end its first paragraph with a period"
    return ""


@pytest.mark.parametrize(
    ("docstring", "problem"),
    [
        ("Return the sum of two numbers.", ""),
        ("Return the sum.\n\n    >>> add(1, 2)\n    3", ""),
        ("The sum of two\nnumbers (as a float).", ""),
        ("Of two numbers, the sum.", "starts with Of"),
        ("How far it is.", "starts with How"),
        ("Nothing here.", "has fewer than 3 words"),
        ("", "has fewer than 3 words"),
        ("Return the sum of two numbers", "does not end"),
        ("Return the sum of two numbers\n\nand no more.", "does not end"),
    ],
)
def test_the_rules_catch_fragments(docstring, problem):
    assert problem_of(docstring).startswith(problem) and bool(problem_of(docstring)) == bool(
        problem
    )


def test_docstrings_are_plain_sentences():
    problems = []
    for path in PYTHON:
        named = [(place, problem_of(text)) for place, text in docstrings(tree_of(path))]
        problems += [f"{path} {place}: {problem}" for place, problem in named if problem]
    assert problems == []
