"""Python code as a record ships it: what its scripts reach, what that weighs, what a packed stub
runs.

Nothing here runs or imports the code it reads. The code that ships is what train_gpt.py and
eval_final.py import, at any depth, run, or read as code. The model runs without a readable copy
next to a stub, without tests, and without scripts that only prepared data; these are not counted.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, read_bytes
from fairway.records.syntax import constant_value, dotted_name, parse_python
from fairway.records.unpack import LIMIT, MOST, archive_members, unpack_stub

ENTRIES = ("train_gpt.py", "eval_final.py")
CODE_SUFFIXES = (
    ".py",
    ".pyc",
    ".so",
    ".cpp",
    ".cc",
    ".c",
    ".h",
    ".cu",
    ".cuh",
    ".zip",
    ".xz",
    ".lzma",
    ".br",
    ".b85",
)
DEEPEST = 8  # stubs within stubs
MOST_CODE = 2 << 20  # characters of code that are parsed; the largest record has 350,000
READABLE = "source"  # the folder of readable code next to packed code
# What the challenge's machine has, by the names under which it is imported (its requirements.txt).
CHALLENGE = {
    "numpy",
    "tqdm",
    "torch",
    "triton",
    "huggingface_hub",
    "kernels",
    "setuptools",
    "typing_extensions",
    "datasets",
    "tiktoken",
    "sentencepiece",
}
# Packages that many records import: not the folder's own modules, even where no file names them.
PACKAGES = {
    "flash_attn",
    "flash_attn_interface",
    "brotli",
    "zstandard",
    "einops",
    "mamba_ssm",
    "causal_conv1d",
    "fla",
    "scipy",
    "numba",
    "wandb",
    "constriction",
    "yaml",
    "psutil",
    "transformers",
    "tokenizers",
    "safetensors",
    "matplotlib",
    "pandas",
    "requests",
    "rich",
    "cupy",
    "transformer_engine",
    "liger_kernel",
    "xformers",
}
NAMED_OTHERWISE = {
    "yaml": "pyyaml",
    "PIL": "pillow",
    "cv2": "opencv",
    "sklearn": "scikit-learn",
    "fla": "flash-linear-attention",
    "flash_attn_interface": "flash",
    "flash_attn": "flash",
}


class CodeFile(NamedTuple):
    """One Python file. `text`, `tree` and `nodes` are of the code that runs: a stub's are
    unpacked.
    """

    name: str
    shipped: bytes
    text: str  # the code that runs
    # How a stub is packed, from outside to inside: ("b85", "lzma"); () for plain code.
    layers: tuple[str, ...]
    tree: ast.Module | None  # None if it does not parse
    nodes: tuple[ast.AST, ...]
    fault: str  # why it does not parse, or why the packing could not be undone

    @property
    def packed(self) -> bool:
        return bool(self.layers)


class Absent(NamedTuple):
    """An import that neither the folder nor the standard library answers."""

    module: str
    file: str
    line: int
    optional: bool  # the record works without it


class ShippedCode(NamedTuple):
    """The code of a record folder."""

    sources: dict[str, CodeFile]  # every Python file of the folder, readable copies included
    entries: tuple[str, ...]
    shipped: dict[str, int]  # what the entries reach: relative name → bytes
    absent: tuple[Absent, ...]  # among the imports of what ships

    @property
    def bytes(self) -> int:
        return sum(self.shipped.values())

    def running(self) -> list[CodeFile]:
        """Return the sources that ship, sorted by name."""
        return [self.sources[name] for name in sorted(self.shipped) if name in self.sources]


def read_code_file(name: str, shipped: bytes) -> CodeFile:
    """Parse a file, and unpack it first if it is a stub."""
    text = shipped.decode("utf-8", "replace").removeprefix("\ufeff")
    tree, fault = parse_python(text)
    layers: list[str] = []
    for _ in range(DEEPEST):
        inner = unpack_stub(tree, layers) if tree is not None else None
        if inner is None:
            break
        text = inner
        tree, fault = parse_python(text)
    return CodeFile(
        name, shipped, text, tuple(layers), tree, tuple(ast.walk(tree)) if tree else (), fault
    )


# ==== What is reached =============================================================================
class Import(NamedTuple):
    """One import statement, or a module that is run by name."""

    module: str  # absolute, dotted
    names: tuple[str, ...]  # of `from module import names`
    line: int
    optional: bool  # inside a `try` with an `except`
    lazy: bool  # inside a function: it loads nothing until that is called


def imports_in(source: CodeFile) -> Iterator[Import]:
    """Yield the imports of a file at any depth, also by importlib and `python -m` with a constant
    name.
    """
    if source.tree is None:  # it does not parse: guess from lines
        for number, line in enumerate(source.text.splitlines(), 1):
            if match := re.match(r"\s*(?:import|from)\s+([A-Za-z_][\w.]*)", line):
                yield Import(match[1], (), number, True, False)
    package = Path(source.name).parent.parts
    guarded = body_lines(n for n in source.nodes if isinstance(n, ast.Try) and n.handlers)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    delayed = body_lines(n for n in source.nodes if isinstance(n, functions) or is_type_checking(n))
    for node in source.nodes:
        line = getattr(node, "lineno", 0)
        optional, lazy = line in guarded, line in delayed
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, optional, lazy)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            names = tuple(alias.name for alias in node.names)
            yield Import(module, names, node.lineno, optional, lazy)
        elif isinstance(node, ast.Call) and dotted_name(node.func) in (
            "importlib.import_module",
            "import_module",
            "__import__",
        ):
            if (
                node.args
                and isinstance(node.args[0], ast.Constant)
                and type(node.args[0].value) is str
            ):
                yield Import(node.args[0].value, (), node.lineno, optional, lazy)
        elif isinstance(node, ast.List | ast.Tuple):
            for flag, module in zip(node.elts, node.elts[1:], strict=False):
                if constant_value(flag) == "-m" and re.fullmatch(
                    r"[A-Za-z_][\w.]*", str(constant_value(module) or "")
                ):
                    yield Import(str(constant_value(module)), (), node.lineno, True, lazy)


def body_lines(nodes: Iterable[ast.AST]) -> set[int]:
    """Return the numbers of the lines in the bodies of these statements."""
    return {
        line
        for node in nodes
        for line in range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1)
    }


def is_type_checking(node: ast.AST) -> bool:
    """Tell `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and dotted_name(node.test).endswith("TYPE_CHECKING")


def files_for_import(
    wanted: Import, script_folder: str, have: Sequence[str] | set[str]
) -> list[str]:
    """Return the files that an import loads: packages on the way, modules, names that are
    modules.
    """
    reached = []
    for home in dict.fromkeys((script_folder, "")):
        parts = [*filter(None, [home]), *filter(None, wanted.module.split("."))]
        start = len(Path(home).parts) if home else 0
        for upto in range(start + 1, len(parts) + 1):
            stem = "/".join(parts[:upto])
            reached += [name for name in (f"{stem}.py", f"{stem}/__init__.py") if name in have]
        stem = "/".join(parts)
        reached += [
            name
            for inner in wanted.names
            for name in (f"{stem}/{inner}.py", f"{stem}/{inner}/__init__.py")
            if name in have
        ]
        if reached:
            return reached
    return reached


def named_files(source: CodeFile, have: Iterable[str]) -> list[str]:
    """Return the files of code that a constant names: run by exec(open(…)), compiled, or
    unpacked.
    """
    code = {
        name
        for name in have
        if name.endswith(CODE_SUFFIXES) and not name.startswith(f"{READABLE}/")
    }
    if not code:
        return []
    by_name: dict[str, list[str]] = {}
    for name in code:
        by_name.setdefault(name.split("/")[-1], []).append(name)
    names = (
        []
        if source.tree
        else [
            name
            for word in set(re.findall(r"[\w-]+\.\w+", source.text))
            for name in by_name.get(word, [])
        ]
    )
    docstrings = {id(node.value) for node in source.nodes if isinstance(node, ast.Expr)}
    for node in source.nodes:
        if (
            isinstance(node, ast.Constant)
            and type(node.value) is str
            and len(node.value) < 200
            and id(node) not in docstrings
        ):
            names += by_name.get(node.value.split("/")[-1], [])
    return names


def import_closure(
    root: str | Path, entries: Sequence[str] = ENTRIES, *, lazy: bool = True
) -> list[str]:
    """Return the relative names of the Python files that these scripts import, themselves included,
    sorted.

    With lazy=False, only what they import when they start: imports inside functions are left out.
    """
    root = Path(root)
    have = Present(root)
    return sorted(
        reached_files(
            [e for e in entries if e in have],
            have,
            lambda name: read_code_file(name, read_bytes(root / name, LIMIT)),
            lazy,
        )
    )


class Present:
    """The files of a folder: `name in present`. Asked one by one, so a large folder is not
    listed.
    """

    def __init__(self, root: Path):
        self.root, self.known = root, {}

    def __contains__(self, name: str) -> bool:
        if name not in self.known:
            self.known[name] = (self.root / name).is_file()
        return self.known[name]


def reached_files(
    entries: Iterable[str],
    have: Any,
    source_of: Callable[[str], CodeFile | None],
    lazy: bool = True,
) -> dict[str, CodeFile]:
    """Return the files among `have` that these scripts import, at any depth."""
    todo, reached = list(entries), {}
    while todo:
        name = todo.pop()
        source = source_of(name) if name not in reached else None
        if source is not None:
            reached[name] = source
            for wanted in imports_in(source):
                if lazy or not wanted.lazy:
                    todo += files_for_import(wanted, script_folder(name), have)
    return reached


def script_folder(name: str) -> str:
    """Return the folder part of a relative name: "a/b" for "a/b/c.py"."""
    return "/".join(name.split("/")[:-1])


# ==== The code of a record folder =================================================================
def read_code(root: Path, files: dict[str, int]) -> ShippedCode:
    """Read the code of a folder; `files` maps each regular file to its bytes."""
    sources: dict[str, CodeFile] = {}
    for name in sorted((n for n in files if n.endswith(".py")), key=lambda n: (n.count("/"), n))[
        :MOST
    ]:
        left = MOST_CODE - sum(len(s.text) for s in sources.values())
        try:
            sources[name] = read_code_file(name, read_bytes(root / name, max(left, 0)))
        except RecordError as e:
            sources[name] = CodeFile(
                name, b"", "", (), None, (), str(e).removeprefix(f"{root / name} ")
            )
    entries = entry_scripts(files)
    have = {
        name
        for name in files
        if script_folder(name) != READABLE and not name.startswith(f"{READABLE}/")
    }
    todo, reached = list(entries), {}
    while todo:
        reached |= reached_files(todo, have, sources.get)
        todo = [
            name
            for source in list(reached.values())
            for name in named_files(source, have)
            if name not in reached and name in sources
        ]
    archives = {n for s in reached.values() for n in named_files(s, have) if n not in sources}
    for name in sorted(archives):
        try:
            inner = archive_members(name, read_bytes(root / name, LIMIT))
        except RecordError:
            inner = {}
        for key, content in inner.items() if sum(map(len, inner.values())) <= MOST_CODE else ():
            sources[key] = read_code_file(key, content)
    shipped = {name: files[name] for name in sorted({*reached, *archives})}
    running = [*reached.values(), *(s for key, s in sources.items() if "!" in key)]
    return ShippedCode(sources, entries, shipped, absent_from(running, have))


def entry_scripts(files: Iterable[str]) -> tuple[str, ...]:
    """Return train_gpt.py and eval_final.py; without the former, every train*.py at the top."""
    names = {name for name in files if "/" not in name and name.endswith(".py")}
    if "train_gpt.py" in names:
        return tuple(name for name in ENTRIES if name in names)
    return tuple(
        sorted(name for name in names if name.startswith("train") or name == "eval_final.py")
    )


def absent_from(sources: Iterable[CodeFile], have: set[str]) -> tuple[Absent, ...]:
    """Return the imports that nothing answers.

    A part of the folder's own package that only a function imports is optional: the record ships
    what its run used.
    """
    sources = list(sources)
    inner = {source.name.split("!")[1] for source in sources if "!" in source.name}
    packages = {name.split("/")[0] for name in have | inner if "/" in name}
    absent = []
    for source in sources:
        home = script_folder(source.name.split("!")[-1])
        for wanted in imports_in(source):
            first = wanted.module.split(".")[0]
            if (
                first
                and first not in sys.stdlib_module_names
                and not folder_holds(wanted.module, home, have | inner)
            ):
                optional = wanted.optional or (wanted.lazy and first in packages)
                absent.append(Absent(wanted.module, source.name, wanted.line, optional))
    return tuple(absent)


def folder_holds(module: str, home: str, have: set[str]) -> bool:
    """Tell whether the folder holds all of module `a.b.c` as a file, a package or a folder of
    files.
    """
    stems = ["/".join([*filter(None, [at]), *module.split(".")]) for at in {home, ""}]
    return any(
        f"{stem}.py" in have or any(name.startswith(f"{stem}/") for name in have) for stem in stems
    )


def distribution_of(module: str) -> str:
    """Return the package name under which requirements.txt would list an import."""
    first = module.split(".")[0]
    return NAMED_OTHERWISE.get(first, first)
