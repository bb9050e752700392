"""The rules of the house (ARCHITECTURE.md, "Who may lean on whom"), read from the source of every tracked file."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRACKED = sorted(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split("\n")[:-1]
)
PYTHON = [
    p
    for p in TRACKED
    if p.endswith(".py") and (ROOT / p).is_file() and not p.startswith("records/")
]  # the code of a record stays as it was run
OURS = [p for p in PYTHON if not p.startswith("tests/")]
TREES = {p: ast.parse((ROOT / p).read_text(encoding="utf-8"), p) for p in PYTHON}
ROOT_SCRIPTS = {p.removesuffix(".py") for p in PYTHON if "/" not in p}
ROOMS = {p.split("/")[0] for p in PYTHON if "/" in p}
OPTIONAL = {
    "mlx": "train_gpt_mlx.py",
    "coremltools": "fairway/coreml/",
    "onnxruntime": "fairway/coreml/",
}


def imports(tree: ast.AST, path: str = "") -> set[str]:
    """Dotted names of all that a file imports, at any depth; relative ones made absolute, names included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def within(path: str) -> set[str]:
    """What a file imports of this repository, by its first name."""
    first = {name.split(".")[0] for name in imports(TREES[path], path)}
    siblings = {
        p.split("/")[-1].removesuffix(".py") for p in PYTHON if Path(p).parent == Path(path).parent
    }
    return first & (ROOT_SCRIPTS | ROOMS | siblings)


def test_the_readers_of_these_rules_see_what_they_should():
    tree = ast.parse("import a.b\nfrom ..x import y\ndef f():\n    from . import z\n    import q")
    assert imports(tree, "fairway/coreml/m.py") == {
        "a.b",
        "fairway.x",
        "fairway.x.y",
        "fairway.coreml",
        "fairway.coreml.z",
        "q",
    }
    for source, found in (
        (
            "import os\nX = os.environ['A']\nif __name__ == '__main__':\n    print(1)",
            ["line 2: os.environ"],
        ),
        ("def f(a=open('x')):\n    print(1)", ["line 1: open"]),
        ("def f(env=os.environ):\n    print(1)\nT: dict = os.getenv('A')", ["line 3: os.getenv"]),
        ("class A:\n    print(2)\n    def f(self): open('x')", ["line 2: print"]),
    ):
        assert effects(ast.parse(source)) == found


# ---- 1 to 4: who imports whom ----------------------------------------------------------------------------------------
def test_train_gpt_stands_alone_and_stays_short():
    assert within("train_gpt.py") == set()
    assert len((ROOT / "train_gpt.py").read_text(encoding="utf-8").splitlines()) <= 2007


def test_train_gpt_mlx_leans_on_train_gpt_and_stays_short():
    lines = (ROOT / "train_gpt_mlx.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1200 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("path", [p for p in OURS if "/" in p])
def test_rooms_lean_only_on_train_gpt_and_themselves(path):
    room, allowed = path.split("/")[0], {"train_gpt"}
    siblings = {p.split("/")[-1].removesuffix(".py") for p in PYTHON if p.startswith(room + "/")}
    if room == "fairway":  # a package: its modules are fairway.x
        allowed |= {"fairway"}
    elif room == "bench":  # one script for each figure: measures whatever there is
        allowed |= ROOT_SCRIPTS | {"fairway", "data", "bench"} | siblings
    else:
        allowed |= {room} | siblings
    assert within(path) <= allowed


@pytest.mark.parametrize("path", [p for p in OURS if "/" not in p])
def test_scripts_at_the_root_import_none_of_each_other(path):
    assert within(path) <= {"train_gpt", "fairway"}


@pytest.mark.parametrize("path", [p for p in OURS if re.match(r"fairway/(records/|report)", p)])
def test_records_and_reports_read_files_and_never_a_model(path):
    """Nor through a module of fairway/ that does."""
    seen, todo = set(), [path]
    while todo:
        at = todo.pop()
        seen.add(at)
        for name in imports(TREES[at], at):
            todo += {
                f"{name.replace('.', '/')}.py",
                f"{name.replace('.', '/')}/__init__.py",
            } & TREES.keys() - seen
    loaded = {name.split(".")[0] for at in seen for name in imports(TREES[at], at)}
    assert not loaded & {"torch", "train_gpt", "mlx", "coremltools", "onnxruntime"}


# ---- 5: optional platforms -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", OURS)
def test_optional_platforms_are_imported_in_their_own_modules_only(path):
    for name in {n.split(".")[0] for n in imports(TREES[path], path)} & OPTIONAL.keys():
        assert path.startswith(tuple(OPTIONAL[name].split())), name


@pytest.mark.parametrize("path", OURS)
def test_what_may_be_absent_is_imported_only_when_needed(path):
    """But for MLX in the trainer that is written in it, where a guard says what to install."""
    allowed = {"mlx"} if path == OPTIONAL["mlx"] else set()
    guarded = {
        n.split(".")[0]
        for statement in at_import(TREES[path].body)
        if isinstance(statement, ast.Try) and "requirements-apple.txt" in ast.unparse(statement)
        for n in imports(statement, path)
    }
    early = {
        n.split(".")[0]
        for statement in at_import(TREES[path].body)
        if isinstance(statement, ast.Import | ast.ImportFrom)
        for n in imports(statement, path)
    }
    assert early & (OPTIONAL.keys() | {"wandb"}) <= allowed & guarded


# ---- 6: importing has no effect --------------------------------------------------------------------------------------
def at_import(body: list[ast.stmt]):
    """The statements that run when a module is imported: all but functions' bodies and the main guard."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "__name__ == '__main__'",
            "TYPE_CHECKING",
        ):
            continue
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from at_import(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from at_import(handler.body)


def expressions(node: ast.AST):
    """What one statement computes itself: a function's defaults and decorators, not its body, nor a lambda's."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        # `env=os.environ` names the environment without reading it.
        parts = [
            *node.decorator_list,
            *(
                d
                for d in [*node.args.defaults, *node.args.kw_defaults]
                if d and not isinstance(d, ast.Attribute)
            ),
        ]
    else:
        parts = [
            child
            for child in ast.iter_child_nodes(node)
            if not isinstance(child, ast.stmt | ast.ExceptHandler)
        ]
    for part in parts:
        todo = [part]
        while todo:
            at = todo.pop()
            yield at
            if not isinstance(at, ast.Lambda):
                todo += ast.iter_child_nodes(at)


EFFECTS = re.compile(
    r"(os\.(environ|getenv|putenv|mkdir|makedirs|remove|chdir)|open|print|input|exec|eval|"
    r"torch\.(cuda|mps|accelerator|manual_seed|set_\w+)|subprocess|socket|signal\.signal|urlopen|"
    r"random\.seed|np\.random\.seed|sys\.stdout|sys\.stderr|mx)\b"
)
FILES = (
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "mkdir",
    "unlink",
    "touch",
    "urlopen",
)


def effects(tree: ast.Module) -> list[str]:
    found = []
    for statement in at_import(tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        for node in expressions(statement):
            if isinstance(node, ast.Attribute | ast.Call):
                name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
                if (match := EFFECTS.match(name)) or name.split(".")[-1] in FILES:
                    found.append(f"line {node.lineno}: {match[0] if match else name}")
    return sorted(set(found))


@pytest.mark.parametrize("path", OURS)
def test_nothing_is_read_written_or_printed_when_a_module_is_imported(path):
    assert effects(TREES[path]) == []


def test_importing_every_module_leaves_no_trace(tmp_path):
    """One process, in an empty folder; any file opened for writing, and any read of the environment by us, is told."""
    modules = [
        p.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for p in OURS
        if not p.startswith("tests/") and not p.endswith("_mlx.py")
    ]
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]  # benches import short_run
import torch, numpy, sentencepiece, zstandard, brotli, constriction, tqdm, rich, numba, numba.extending  # not ours
ours = {str(ROOT)!r} + os.sep
def told(event, args):
    if event == "open" and type(args[0]) is str and type(args[1]) is str and set(args[1]) & set("wax+"):
        if "__pycache__" not in args[0]: sys.stderr.write(f"{{args[0]}} opened for writing\\n")
    elif event == "os.mkdir" and "__pycache__" in str(args[0]): pass  # where numba keeps what it compiles
    elif event in ("subprocess.Popen", "socket.connect", "os.putenv", "os.mkdir", "os.remove"):
        sys.stderr.write(f"{{event}} {{args}}\\n")
sys.addaudithook(told)
class Watched(type(os.environ)):
    def __getitem__(self, key):
        if sys._getframe(1).f_code.co_filename.startswith(ours): sys.stderr.write(f"{{key}} read\\n")
        return super().__getitem__(key)
    def get(self, key, default=None):
        if sys._getframe(1).f_code.co_filename.startswith(ours): sys.stderr.write(f"{{key}} read\\n")
        return super().get(key, default)
os.environ.__class__ = Watched
import importlib
for name in {modules!r}:
    importlib.import_module(name)
assert not torch.cuda.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ---- Nothing of one machine or one network ---------------------------------------------------------------------------
TEXTS = [
    p
    for p in TRACKED
    if Path(p).suffix in (".py", ".md", ".sh", ".toml", ".txt", ".yml", ".yaml", ".cfg", "")
    and (ROOT / p).is_file()
    and not p.startswith("records/")
]  # logs of runs are kept untouched
MACHINE = re.compile(
    r"(?<![\w.~/<{}-])/(?:work|home|root|Users|mnt|opt|srv|private|workspace|data)/\w"
)
REGISTRY = re.compile(r"index-url|https?://\d+\.\d+\.\d+|\.internal\b|artifactory", re.I)
HOSTS = {"huggingface.co": ("data/download_fineweb.py",)}


@pytest.mark.parametrize("path", TEXTS)
def test_no_file_names_this_machine_or_a_registry(path):
    for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
        if path == "tests/test_house.py" and ("re.compile(" in line or "example" in line):
            continue
        line = re.sub(r"https?://127\.0\.0\.1\S*", "", line)  # this machine, whichever it is
        assert not MACHINE.search(line) and not REGISTRY.search(line), (
            f"{path}:{number}: {line.strip()}"
        )


@pytest.mark.parametrize("path", OURS)
def test_only_the_download_names_a_host(path):
    strings = [
        n.value
        for n in ast.walk(TREES[path])
        if isinstance(n, ast.Constant) and type(n.value) is str
    ]
    hosts = {h for s in strings for h in re.findall(r"\b(?:https?|ftp)://([\w.-]+)", s)} - {
        "127.0.0.1",
        "localhost",
    }
    assert all(path in HOSTS.get(host, ()) for host in hosts), hosts


def test_the_patterns_catch_what_they_should():
    assert all(
        MACHINE.search(example) for example in ("see /home/me", 'open("/home/x")', "cd /Users/me")
    )
    assert not any(
        MACHINE.search(example)
        for example in ("tokens/home/", "https://x.org/data/set", "./data/x")
    )
    assert all(
        REGISTRY.search(example)
        for example in ("--index-url http://x", "http://10.0.0.1/", "x.internal")
    )
    assert not any(
        REGISTRY.search(example) for example in ("v1.0.0.1", "http.server", "an internal index")
    )


# ---- Style that a machine can hold -----------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PYTHON)
def test_functions_fit_sixty_lines(path):
    functions = [
        n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [
        f"{f.name}: {f.end_lineno - f.lineno + 1} lines"
        for f in functions
        if f.end_lineno - f.lineno >= 120
    ] == []
