"""Settings as a shipped trainer declares them, read from its syntax tree; nothing is run.

A declaration is `name: type = knob(default, help, …, role="place")` in a class of settings. Presets
are dicts or texts of NAME=value words.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

from fairway.records.syntax import constant_value, parse_python

EVAL_SETTINGS = "fairway/scoring/settings.py"  # the file of EvalConfig
FREE_ROLES = ("place", "seed")  # where files lie, what the run is called, and its seed
# The same settings in trainers from before roles (November 2026).
FREE_BEFORE_ROLES = {
    "seed",
    "run_id",
    "out_dir",
    "data_path",
    "tokenizer_path",
    "checkpoint",
    "val_files",
}


@functools.lru_cache(maxsize=8)  # one trainer is asked for presets, defaults and roles
def parse_tree(source: str) -> ast.Module:
    return parse_python(source)[0] or ast.Module([], [])


def knobs(source: str, class_name: str) -> dict[str, ast.Call]:
    """Map each setting of a class to the call that declares it."""
    classes = (
        node
        for node in parse_tree(source).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    return {
        ast.unparse(node.target): node.value
        for owner in classes
        for node in owner.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.args
    }


def setting_defaults(source: str, class_name: str) -> dict[str, Any]:
    """`{"num_layers": 9, …}` for the class `Config` of a trainer."""
    return {
        name: literal_value(call.args[0], {}) for name, call in knobs(source, class_name).items()
    }


def setting_roles(source: str, class_name: str) -> dict[str, str]:
    """`{"num_layers": "model", …}`; "" for a setting without a role."""
    return {
        name: str(next((constant_value(k.value) for k in call.keywords if k.arg == "role"), ""))
        for name, call in knobs(source, class_name).items()
    }


def free_settings(source: str, class_name: str) -> set[str]:
    """Return the names of settings that may differ between the runs of one record."""
    roles = setting_roles(source, class_name)
    if not any(roles.values()):
        return FREE_BEFORE_ROLES
    return {name for name, role in roles.items() if role in FREE_ROLES}


def trainer_presets(source: str) -> dict[str, dict[str, Any]]:
    """Return the presets of a trainer: PRESET_LINES, texts of NAME=value words, or PRESETS, dicts.

    Values of a text get the types of the defaults in `Config`: `NUM_LAYERS=4` is {"num_layers": 4}.
    A preset that is computed in another way is left out.
    """
    names: dict[str, Any] = {}
    for node in parse_tree(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        assigns = isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if isinstance(target, ast.Name) and assigns:
            names[target.id] = literal_value(node.value, names)
    lines, dicts = names.get("PRESET_LINES"), names.get("PRESETS")
    if isinstance(lines, dict):
        defaults = setting_defaults(source, "Config")
        return {name: preset_of_text(name, lines, defaults) for name in lines}
    return {name: p for name, p in (dicts or {}).items() if isinstance(p, dict)}


def preset_of_text(name: str, lines: dict[str, str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`preset_of_text("x", {"x": "GPTQ=1"}, defaults)` is {"gptq": True}; PRESET=y starts from
    y.
    """
    words = dict(word.split("=", 1) for word in lines[name].split())
    start = words.pop("PRESET", None)
    preset = preset_of_text(start, lines, defaults) if start else {}
    for setting, value in words.items():
        kind = type(defaults.get(setting.lower(), ""))
        preset[setting.lower()] = value == "1" if kind is bool else kind(value)
    return preset


def literal_value(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of constants, known names, dict(…), {…} and `a | b`; None for others."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "dict" and not node.args:
        return {k.arg: literal_value(k.value, names) for k in node.keywords}
    if isinstance(node, ast.Dict):
        return {
            ast.literal_eval(key): literal_value(value, names)
            for key, value in zip(node.keys, node.values, strict=True)
            if isinstance(key, ast.Constant)
        }
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = literal_value(node.left, names), literal_value(node.right, names)
        return left | right if isinstance(left, dict) and isinstance(right, dict) else None
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
