"""Settings as a shipped trainer declares them, read from its syntax tree; nothing is run.

A declaration is `name: type = knob(default, help, …, role="place")` in a class of settings. Presets
are dicts or texts of NAME=value words.
"""

from __future__ import annotations

import ast
import functools
import shlex
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
    """Return PRESETS of a trainer; a preset that is computed in another way is left out.

    Values of a text are typed like the defaults of `Config`: `NUM_LAYERS=4` is {"num_layers": 4}.
    """
    names: dict[str, Any] = {}
    for node in parse_tree(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if (
            isinstance(target, ast.Name)
            and isinstance(node, ast.Assign | ast.AnnAssign)
            and node.value
        ):
            names[target.id] = literal_value(node.value, names)
    presets = names.get("PRESETS")
    if not isinstance(presets, dict):
        return {}
    defaults = setting_defaults(source, "Config")
    texts = {
        name: p if isinstance(p, dict) else preset_of_text(p, defaults)
        for name, p in presets.items()
    }
    return {name: preset for name, preset in texts.items() if preset is not None}


def preset_of_text(text: Any, defaults: dict[str, Any]) -> dict[str, Any] | None:
    """`preset_of_text("GPTQ=1 CODEC=lzma", defaults)` is {"gptq": True, "codec": "lzma"}."""
    if not isinstance(text, str):
        return None
    preset = {}
    for word in shlex.split(text):
        name, _, value = word.partition("=")
        kind = type(defaults.get(name.lower(), ""))
        preset[name.lower()] = value == "1" if kind is bool else kind(value)
    return preset


def literal_value(node: ast.expr, names: dict[str, Any]) -> Any:
    """Return the value of constants, known names, dict(…), {…}, `a | b`, and texts joined by + or
    f"…"; else None.
    """
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
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr | ast.Add):
        left, right = literal_value(node.left, names), literal_value(node.right, names)
        if isinstance(node.op, ast.Add):
            return left + right if isinstance(left, str) and isinstance(right, str) else None
        return left | right if isinstance(left, dict) and isinstance(right, dict) else None
    if isinstance(node, ast.JoinedStr):
        parts = [
            literal_value(part.value if isinstance(part, ast.FormattedValue) else part, names)
            for part in node.values
        ]
        return "".join(parts) if all(isinstance(part, str) for part in parts) else None
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
