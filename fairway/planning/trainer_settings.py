"""The trainer's settings with all its checks, without importing torch.

`import train_gpt` takes seconds, because it imports torch. The definitions of `Config` and
`PRESETS` need the standard library only, so they are cut out of the source and run alone.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairway.command_line import UsageError
from fairway.records.files import read_text

WANTED = ("Config", "PRESETS", "refuse_near_misses", "UserError")
WANTED += ("LEAST_K", "levels", "CODE_STUB_BYTES")  # of its quantiser and its size
DEFAULT_PRESET = "consensus"  # what a record starts from


def bound_names(node: ast.stmt) -> set[str]:
    """Return the names that a statement at the top of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return {n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}


def definitions(source: str, wanted: Iterable[str]) -> ast.Module:
    """Return the statements that define `wanted`, and those that these need, in their order."""
    tree = ast.parse(source)
    places = {name: node for node in tree.body for name in bound_names(node)}
    chosen: set[ast.stmt] = {
        n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"
    }
    todo = list(wanted)
    while todo:
        node = places.get(todo.pop())
        if node is not None and node not in chosen:
            chosen.add(node)
            todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return ast.Module([node for node in tree.body if node in chosen], [])


@functools.cache
def trainer_source_path() -> Path:
    """Return where train_gpt.py lies, without importing it."""
    found = importlib.util.find_spec("train_gpt")
    if found is None or not found.origin:
        raise UsageError("train_gpt.py is not importable; run this from a checkout of Fairway")
    return Path(found.origin)


@functools.cache
def trainer_names() -> Mapping[str, Any]:
    """Return `Config`, `PRESETS` and the other names of WANTED, as the trainer defines them."""
    path = trainer_source_path()
    code = compile(definitions(read_text(path), WANTED), str(path), "exec")
    names: dict[str, Any] = {"__name__": __name__}  # dataclasses look their module up
    exec(code, names)
    return names


def read_settings(preset: str, words: Iterable[str]) -> Any:
    """Return the trainer's Config for a preset and words like `NUM_LAYERS=12`, checked as it does.

    read_settings("consensus", ["MLP_MULT=4"]).mlp_mult is 4.0; MLP_MUL=4 is an error. The word
    PRESET=name does what the environment variable does.
    """
    names, env = trainer_names(), {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} is no setting; write NAME=value, as in NUM_LAYERS=12")
        env[name] = value
    preset = env.pop("PRESET", preset)
    declared = {name.upper() for name in names["Config"].__dataclass_fields__}
    try:
        names["refuse_near_misses"](env)
        if unknown := sorted(env.keys() - declared):
            raise UsageError(f"{unknown[0]} is no setting; see python train_gpt.py --help")
        return names["Config"].from_env(env | {"PRESET": preset}, DEFAULT_PRESET)
    except names["UserError"] as e:
        raise UsageError(str(e)) from None
