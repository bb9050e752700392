"""The rules of docs/ARCHITECTURE.md, "Who may import whom", read from every tracked file.

Each rule collects what breaks it in the whole tree and asserts that the list is empty.
"""

import ast
import functools
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

TRACKED = sorted(
    subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=True,
    ).stdout.split("\n")[:-1]
)
# The code of a record stays as it was run, so no rule looks at it.
PYTHON = [
    p
    for p in TRACKED
    if p.endswith(".py") and (ROOT / p).is_file() and not p.startswith("records/")
]
OURS = [p for p in PYTHON if not p.startswith("tests/")]
SOURCES = {p: (ROOT / p).read_text(encoding="utf-8") for p in PYTHON}
ROOT_SCRIPTS = {p.removesuffix(".py") for p in PYTHON if "/" not in p}
FOLDERS = {p.split("/")[0] for p in PYTHON if "/" in p}
# Rooms of fairway/ in the order of the pipeline: a room imports itself and earlier ones.
STAGES = (
    "scoring/experts",
    "scoring",
    "compression",
    "correction",
    "certificate",
    "decoding",
    "methods",
    "coreml",
)
READERS = (
    "records",
    "planning",
    "report",
)  # they read files only, and import none of the rooms above
# The experts read the same settings as the room that they are in.
SETTINGS = "fairway/scoring/settings.py"
FRONT = ("command_line.py", "cli.py", "__main__.py", "__init__.py")
# Every room may read artifacts through it.
ARTIFACT_READER = "fairway/artifact_reader.py"
BEFORE_ALL_ROOMS = {ARTIFACT_READER, "fairway/case_ops.py", "fairway/shards.py"}
OPTIONAL = {
    "mlx": "train_gpt_mlx.py",
    "coremltools": "fairway/coreml/",
    "onnx": "fairway/methods/",
    "onnxruntime": "fairway/methods/",
    "onnxscript": "fairway/methods/",
    "torchao": "fairway/methods/",
    "ray": "fairway/methods/",
}
# Modules that implement one interface share its names.
INTERFACES = {
    "fairway/verbs/": {"add_arguments", "run"},
    "fairway/correction/": {"encode", "decode", "prices", "floor_bits"},
    "fairway/records/files.py": {"replacing"},  # the trainer's, which records may not import
}


@functools.cache
def tree_of(path: str) -> ast.Module:
    """Return a file's syntax tree, parsed once; only a process that runs a rule parses any."""
    return ast.parse(SOURCES[path], path)


def imports(tree: ast.AST, path: str = "") -> set[str]:
    """Return the dotted names that a file imports, at any depth; relative ones become absolute."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.split("/")[: -node.level] if node.level else []
            base = ".".join([*package, *filter(None, [node.module])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def local_imports(path: str) -> set[str]:
    """Return what a file imports of this repository, by first name."""
    first = {name.split(".")[0] for name in imports(tree_of(path), path)}
    siblings = {Path(p).stem for p in PYTHON if Path(p).parent == Path(path).parent}
    return first & (ROOT_SCRIPTS | FOLDERS | siblings)


def imported_files(path: str) -> set[str]:
    """Return the files of this repository that a file imports."""
    names = {name.replace(".", "/") for name in imports(tree_of(path), path)}
    return {f"{n}.py" for n in names if f"{n}.py" in SOURCES} | {
        f"{n}/__init__.py" for n in names if f"{n}/__init__.py" in SOURCES
    }


def room_of(path: str) -> str:
    """Return the room of a file: `fairway/scoring/experts/ngram.py` is in scoring/experts."""
    parts = path.split("/")[1:-1]
    return "/".join(parts[:2]) if "/".join(parts[:2]) in STAGES else (parts or [""])[0]


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
    assert room_of("fairway/scoring/experts/ngram.py") == "scoring/experts"
    assert room_of("fairway/records/checks/size.py") == "records"
    for source, lines in (
        (
            "import os\nX = os.environ['A']\nif __name__ == '__main__':\n    print(1)",
            ["line 2: os.environ"],
        ),
        ("def f(a=open('x')):\n    print(1)", ["line 1: open"]),
        ("def f(env=os.environ):\n    print(1)\nT: dict = os.getenv('A')", ["line 3: os.getenv"]),
        ("class A:\n    print(2)\n    def f(self): open('x')", ["line 2: print"]),
    ):
        assert effects(ast.parse(source)) == lines


# ==== WHO IMPORTS WHOM ============================================================================
def test_four_scripts_stand_at_the_root():
    names = {"train_gpt", "train_gpt_mlx", "eval_final", "build_correction_table"}
    assert names == ROOT_SCRIPTS


def test_the_trainer_stands_alone_and_stays_short():
    assert local_imports("train_gpt.py") == set()
    assert len(SOURCES["train_gpt.py"].splitlines()) <= 2000
    assert len(SOURCES["train_gpt_mlx.py"].splitlines()) <= 1200


def test_folders_import_train_gpt_and_themselves():
    """bench/ may import anything: it measures whatever there is."""
    wrong = []
    for path in (p for p in OURS if "/" in p and not p.startswith("bench/")):
        folder = path.split("/")[0]
        siblings = {Path(p).stem for p in PYTHON if p.startswith(folder + "/")}
        allowed = {"train_gpt", folder} | (siblings if folder != "fairway" else set())
        extra = local_imports(path) - allowed
        if folder == "data" and extra == {"fairway"}:
            used = {f for f in imported_files(path) if f.startswith("fairway/")}
            extra = {f for f in used if f.count("/") > 1}  # in a room
        wrong += [f"{path} imports {name}" for name in sorted(extra)]
    assert wrong == []


def test_scripts_import_no_other_script():
    assert [p for p in OURS if "/" not in p and local_imports(p) - {"train_gpt", "fairway"}] == []


def test_a_room_imports_earlier_rooms_only():
    wrong = []
    for path in (p for p in OURS if p.startswith("fairway/") and room_of(p) != "verbs"):
        room = room_of(path)
        if path in BEFORE_ALL_ROOMS:
            allowed = set()
        elif path.removeprefix("fairway/") in FRONT:
            allowed = {"", "verbs"}
        elif room in READERS:
            allowed = {*READERS[: READERS.index(room) + 1], ""}
        else:
            allowed = {*STAGES[: STAGES.index(room) + 1], ""}
        for target in imported_files(path):
            if target == SETTINGS and room == "scoring/experts":
                continue
            if target.startswith("fairway/") and room_of(target) not in allowed:
                wrong.append(f"{path} imports {target}")
    assert wrong == []


def test_one_module_decodes_artifacts_and_checks_them_first():
    """The trainer's decoders trust what they read, so all others use the strict reader."""
    decoders = {"decode_artifact", "decode_tensors"}
    defined = {n.name for n in tree_of("train_gpt.py").body if isinstance(n, ast.FunctionDef)}
    assert decoders <= defined
    users = set()
    for path in set(OURS) - {"train_gpt.py"}:
        nodes = list(ast.walk(tree_of(path)))
        names = {n.split(".")[-1] for n in imports(tree_of(path), path)}
        names |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
        names |= {n.value for n in nodes if isinstance(n, ast.Constant) and type(n.value) is str}
        users |= {path} if names & decoders else set()
    assert users == {ARTIFACT_READER}


def test_a_verb_imports_no_other_verb():
    wrong = []
    for path in (p for p in OURS if p.startswith("fairway/verbs/")):
        for target in imported_files(path):
            if room_of(target) == "verbs" and target not in (path, "fairway/verbs/__init__.py"):
                wrong.append(f"{path} imports {target}")
    assert wrong == []


def test_record_checks_do_not_import_each_other():
    checks = "fairway/records/checks/"
    shared = {checks + "base.py", checks + "__init__.py"}
    wrong = [
        f"{path} imports {target}"
        for path in OURS
        if path.startswith(checks) and path not in shared
        for target in imported_files(path)
        if target.startswith(checks) and target not in shared
    ]
    assert wrong == []


def test_records_and_reports_never_load_a_model():
    """Nor do they import a module that does."""
    wrong = []
    for path in (p for p in OURS if room_of(p) in READERS and p.startswith("fairway/")):
        seen, todo = set(), [path]
        while todo:
            at = todo.pop()
            seen.add(at)
            todo += imported_files(at) - seen
        loaded = {name.split(".")[0] for at in seen for name in imports(tree_of(at), at)}
        bad = loaded & {"torch", "train_gpt", "mlx", "coremltools", "onnxruntime"}
        wrong += [f"{path} imports {name}" for name in bad]
    assert wrong == []


# ==== ONE NAME, ONE MEANING =======================================================================
def test_no_two_modules_share_a_name():
    places = defaultdict(list)
    for path in (p for p in OURS if p.startswith("fairway/") and "/verbs/" not in p):
        if Path(path).stem not in ("__init__", "__main__"):
            places[Path(path).stem].append(path)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_two_public_names_mean_different_things():
    """Read classes and functions at the top of modules of fairway/, and the trainer's."""
    places = defaultdict(list)
    for path in (p for p in OURS if p.startswith("fairway/") or p == "train_gpt.py"):
        shared = {
            n for folder, names in INTERFACES.items() if path.startswith(folder) for n in names
        }
        for node in tree_of(path).body:
            defines = isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_"
            if defines and node.name not in shared and node.name != "main":
                places[node.name].append(path)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


# ==== OPTIONAL PACKAGES ===========================================================================
def test_optional_packages_are_imported_in_their_own_modules_only():
    wrong = [
        f"{path} imports {name}"
        for path in OURS
        for name in {n.split(".")[0] for n in imports(tree_of(path), path)} & OPTIONAL.keys()
        if not path.startswith(OPTIONAL[name])
    ]
    assert wrong == []


def test_optional_packages_are_imported_only_when_needed():
    """One exception: the MLX trainer may import MLX early, in a guard that says what to install."""
    wrong = []
    for path in OURS:
        statements = list(at_import(tree_of(path).body))
        guarded = {
            n.split(".")[0]
            for s in statements
            if isinstance(s, ast.Try) and "requirements-apple.txt" in ast.unparse(s)
            for n in imports(s, path)
        }
        early = {
            n.split(".")[0]
            for s in statements
            if isinstance(s, ast.Import | ast.ImportFrom)
            for n in imports(s, path)
        }
        allowed = guarded & {"mlx"} if path == OPTIONAL["mlx"] else set()
        wrong += [f"{path} imports {n}" for n in early & OPTIONAL.keys() - allowed]
    assert wrong == []


# ==== IMPORTING HAS NO EFFECT =====================================================================
def at_import(body: list[ast.stmt]):
    """Yield the statements that run on import: all but function bodies and the main guard."""
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
    """Yield the nodes that one statement evaluates: defaults and decorators, no function body."""
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
    """Return what a module reads, writes or prints when it is imported."""
    lines = []
    for statement in at_import(tree.body):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        for node in expressions(statement):
            if isinstance(node, ast.Attribute | ast.Call):
                name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
                if (match := EFFECTS.match(name)) or name.split(".")[-1] in FILES:
                    lines.append(f"line {node.lineno}: {match[0] if match else name}")
    return sorted(set(lines))


def test_nothing_is_read_written_or_printed_when_a_module_is_imported():
    assert {p: effects(tree_of(p)) for p in OURS if effects(tree_of(p))} == {}


def test_importing_every_module_leaves_no_trace(tmp_path):
    """A process in an empty folder reports files that are written and variables that are read."""
    modules = [
        p.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for p in OURS
        if not p.startswith("tests/") and not p.endswith("_mlx.py")
    ]
    code = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "bench")!r}]  # benches import short_run
import torch, numpy, sentencepiece, zstandard, brotli, constriction, tqdm, rich  # not ours
import numba, numba.extending
ours = {str(ROOT)!r} + os.sep
def audit(event, args):
    texts = event == "open" and type(args[0]) is type(args[1]) is str
    if texts and set(args[1]) & set("wax+"):
        if "__pycache__" not in args[0]: sys.stderr.write(f"{{args[0]}} opened for writing\\n")
    elif event == "os.mkdir" and "__pycache__" in str(args[0]): pass  # numba's cache
    elif event in ("subprocess.Popen", "socket.connect", "os.putenv", "os.mkdir", "os.remove"):
        sys.stderr.write(f"{{event}} {{args}}\\n")
sys.addaudithook(audit)
def report(key, frame):
    if frame.f_code.co_filename.startswith(ours): sys.stderr.write(f"{{key}} read\\n")
class Watched(type(os.environ)):
    def __getitem__(self, key):
        report(key, sys._getframe(1))
        return super().__getitem__(key)
    def get(self, key, default=None):
        report(key, sys._getframe(1))
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


# ==== NOTHING OF ONE MACHINE OR ONE NETWORK =======================================================
# Logs in records/ are kept as they were written.
TEXTS = [
    p
    for p in TRACKED
    if Path(p).suffix in (".py", ".md", ".sh", ".toml", ".txt", ".yml", ".yaml", ".cfg", "")
    and (ROOT / p).is_file()
    and not p.startswith("records/")
]
MACHINE = re.compile(
    r"(?<![\w.~/<{}-])/(?:work|home|root|Users|mnt|opt|srv|private|workspace|data)/\w"
)
REGISTRY = re.compile(r"index-url|https?://\d+\.\d+\.\d+|\.internal\b|artifactory", re.I)
HOSTS = {"huggingface.co": ("data/download_fineweb.py",)}


def test_no_file_names_this_machine_or_a_registry():
    wrong = []
    for path in TEXTS:
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if path == "tests/test_house.py" and ("re.compile(" in line or "example" in line):
                continue
            line = re.sub(
                r"https?://127\.0\.0\.1\S*", "", line
            )  # the loopback address is no machine
            if MACHINE.search(line) or REGISTRY.search(line):
                wrong.append(f"{path}:{number}: {line.strip()}")
    assert wrong == []


def test_only_the_download_names_a_host():
    wrong = []
    for path in OURS:
        strings = [
            n.value
            for n in ast.walk(tree_of(path))
            if isinstance(n, ast.Constant) and type(n.value) is str
        ]
        hosts = {h for s in strings for h in re.findall(r"\b(?:https?|ftp)://([\w.-]+)", s)}
        hosts -= {
            "127.0.0.1",
            "localhost",
            "www.w3.org",
        }  # the last one names SVG, and is not called
        wrong += [f"{path} names {h}" for h in hosts if path not in HOSTS.get(h, ())]
    assert wrong == []


@pytest.mark.parametrize(
    ("pattern", "example", "matches"),
    [
        (MACHINE, "see /home/me", True),  # example
        (MACHINE, 'open("/home/x")', True),  # example
        (MACHINE, "cd /Users/me", True),  # example
        (MACHINE, "tokens/home/", False),
        (MACHINE, "https://x.org/data/set", False),
        (MACHINE, "./data/x", False),
        (REGISTRY, "--index-url http://x", True),  # example
        (REGISTRY, "http://10.0.0.1/", True),  # example
        (REGISTRY, "x.internal", True),  # example
        (REGISTRY, "v1.0.0.1", False),
        (REGISTRY, "http.server", False),
        (REGISTRY, "an internal index", False),
    ],
)
def test_the_patterns_catch_what_they_should(pattern, example, matches):
    assert bool(pattern.search(example)) == matches


# ==== STYLE THAT A MACHINE CAN HOLD ===============================================================
def test_functions_fit_sixty_lines():
    long = [
        f"{path}: {f.name} has {f.end_lineno - f.lineno + 1} lines"
        for path in PYTHON
        for f in ast.walk(tree_of(path))
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) and f.end_lineno - f.lineno >= 60
    ]
    assert long == []


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []
