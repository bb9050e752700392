"""Read from its syntax what the shipped code would do: network, paths, validation text, patterns.

A tree shows what is written, not what happens. So a check fails only on what has one meaning. A
pattern that honest code may also show is a warning with its line, for a reader to look at.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator

from fairway.records.checks.base import CheckFailed, CheckUndecided
from fairway.records.folder import RecordFolder
from fairway.records.shipped_code import CodeFile
from fairway.records.syntax import constant_value, dotted_name, names_in

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def running_sources(folder: RecordFolder) -> list[CodeFile]:
    """Return all code that runs, also out of stubs and archives."""
    code = folder.code
    if not code.entries:
        raise CheckUndecided("there is no Python file")
    return [*code.running(), *(s for name, s in code.sources.items() if "!" in name)]


def unless_unread(folder: RecordFolder, text: str, warnings: list[str] | None = None) -> str:
    """Return `text`, unless some running code could not be parsed."""
    blind = next((s for s in running_sources(folder) if s.tree is None), None)
    if blind:
        raise CheckUndecided(
            f"{blind.name} could not be read: {blind.fault}",
            warnings,
        )
    return text


def full_names(source: CodeFile) -> dict[str, str]:
    """Map local names to full ones: `get` after `from requests import get` is requests.get."""
    names: dict[str, str] = {}
    for node in source.nodes:
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name
                if alias.asname
                else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }
    return names


def calls_in(source: CodeFile) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call under the full name of its function: np.load as numpy.load."""
    known = full_names(source)
    for node in source.nodes:
        if isinstance(node, ast.Call):
            start, dot, rest = dotted_name(node.func).partition(".")
            yield known.get(start, start) + dot + rest, node


def location(source: CodeFile, node: ast.AST) -> str:
    return f"{source.name}:{getattr(node, 'lineno', 0)}"


def keyword_value(call: ast.Call, name: str) -> ast.AST | None:
    """Return the value of a keyword argument; None if it is not given."""
    return next((k.value for k in call.keywords if k.arg == name), None)


# ==== Network =====================================================================================
NETWORK = re.compile(
    r"(socket\.(socket|create_connection|create_server|getaddrinfo)|urllib\.request\..+|"
    r"http\.client\..+|"
    r"(requests|httpx|aiohttp|ftplib|paramiko|boto3|gdown|urllib3|wget)\..+|huggingface_hub\..+|"
    r"datasets\.load_dataset|torch\.hub\..+|kernels\.get_kernel|.*\.urlopen|.*\.urlretrieve)$"
)
FETCHERS = re.compile(
    r"(^|[\s/;&|])(curl|wget|pip3?|git|aws|gsutil|apt|apt-get|scp|rsync|nc|ssh|huggingface-cli|"
    r"uv)(\s|$)"
)
RUNNERS = re.compile(
    r"(subprocess\.(run|Popen|call|check_call|check_output|getoutput|getstatusoutput)|"
    r"os\.(system|popen|exec\w*|spawn\w*))$"
)


def check_network(folder: RecordFolder) -> str:
    """Nothing that runs in training or evaluation may open a connection or download."""
    for source in running_sources(folder):
        for name, call in calls_in(source):
            if NETWORK.match(name):
                raise CheckFailed(
                    f"{location(source, call)} calls {name}: training and evaluation have no "
                    "network"
                )
            if RUNNERS.match(name) and call.args:
                text = " ".join(
                    str(constant_value(n))
                    for n in ast.walk(call.args[0])
                    if isinstance(constant_value(n), str)
                )
                match = FETCHERS.search(text)
                if match and fetches(match[2], text):
                    raise CheckFailed(
                        f"{location(source, call)} runs {text[:60]!r}: training and "
                        "evaluation have no network"
                    )
    return unless_unread(
        folder, f"{len(running_sources(folder))} sources open no connection and run no download"
    )


def fetches(program: str, text: str) -> bool:
    """Tell whether a shell text downloads: any of these programs does, but git only with a verb
    that does.
    """
    return program != "git" or bool(re.search(r"\b(clone|pull|fetch)\b", text))


# ==== Paths =======================================================================================
OUTSIDE = re.compile(
    r"(/(?!(dev|proc|sys|tmp|usr|bin|etc|opt/rocm)/)[A-Za-z0-9_.-]+(/[\w.*-]+)+/?|"
    r"(\.\./)+[\w.*/-]*|~/[\w./*-]*)$"
)


def check_paths(folder: RecordFolder) -> str:
    """No absolute path, and none above the folder, may be a default or be opened."""
    for source in running_sources(folder):
        used = {
            id(n): node
            for node in source.nodes
            if isinstance(node, ast.Call | ast.Assign | ast.AnnAssign | ast.keyword)
            for n in ast.iter_child_nodes(node)
        }
        shown_text = {
            id(part)
            for name, call in calls_in(source)
            if name.split(".")[-1]
            in (
                "print",
                "log",
                "info",
                "warning",
                "replace",
                "startswith",
                "endswith",
                "split",
                "compile",
                "add_argument_group",
            )
            for part in ast.walk(call)
        }
        for node in source.nodes:
            text = constant_value(node)
            if (
                isinstance(text, str)
                and len(text) < 300
                and OUTSIDE.match(text)
                and id(node) in used
                and id(node) not in shown_text
            ):
                raise CheckFailed(
                    f"{location(source, node)} names {text[:80]!r}, outside the folder"
                )
    return unless_unread(folder, "no path leads out of the folder")


# ==== Validation text =============================================================================
VAL_FILE = re.compile(
    r"(?i)(fineweb|[*_/])_?val(idation)?[_*]\S*(bin|\*)|^val_(files|pattern|path)$"
)
TRAIN_NAME = re.compile(r"(?i)(^|_)(train|calib\w*)(_|$)(?!.*(val|eval|test))")
TRAIN_LOADER = re.compile(
    r"(?i)((distributed|shuffled|coprime|document\w*|train\w*)_?(token|sequence|packing)\w*_?"
    r"(loader|stream)|tokenloader|tokenstream|train\w*(loader|batches|stream))$"
)


def names_validation(node: ast.AST) -> bool:
    """Tell whether an expression names the validation files: their pattern, or a setting that holds
    it.
    """
    for part in ast.walk(node):
        text = (
            constant_value(part)
            if isinstance(part, ast.Constant)
            else getattr(part, "attr", getattr(part, "id", None))
        )
        if isinstance(text, str) and len(text) < 200 and VAL_FILE.search(text):
            return True
    return False


def check_validation(folder: RecordFolder) -> str:
    """Training must not read a validation file: as training files, in its loader, or to calibrate
    on.
    """
    for source in running_sources(folder):
        for node in source.nodes:
            if (
                isinstance(node, ast.Assign | ast.AnnAssign | ast.keyword)
                and node.value is not None
            ):
                target = (
                    node.arg or ""
                    if isinstance(node, ast.keyword)
                    else dotted_name(
                        node.targets[0] if isinstance(node, ast.Assign) else node.target
                    ).split(".")[-1]
                )
                if (
                    TRAIN_NAME.search(target)
                    and names_validation(node.value)
                    and not isinstance(node.value, ast.Lambda | ast.IfExp | ast.Dict)
                ):
                    raise CheckFailed(
                        f"{location(source, node)} gives {target} the validation files"
                    )
            elif isinstance(node, ast.Call) and TRAIN_LOADER.search(dotted_name(node.func)):
                if any(names_validation(arg) for arg in node.args[:2]):
                    raise CheckFailed(
                        f"{location(source, node)} feeds "
                        f"{dotted_name(node.func)}, which feeds training, with the validation files"
                    )
    return unless_unread(folder, "no training or calibration reads the validation files")


# ==== Loading =====================================================================================
def check_loading(folder: RecordFolder) -> str:
    """No file may run code when it is read: no pickle, no eval of a file, no unsafe torch.load."""
    bare: list[str] = []
    for source in running_sources(folder):
        for name, call in calls_in(source):
            if name in (
                "pickle.load",
                "pickle.loads",
                "marshal.loads",
                "marshal.load",
                "dill.load",
                "dill.loads",
                "joblib.load",
                "cloudpickle.load",
                "cloudpickle.loads",
                "shelve.open",
                "pickle.Unpickler",
            ):
                raise CheckFailed(
                    f"{location(source, call)} calls {name}: a file of it can run any code"
                )
            if name == "numpy.load":
                if constant_value(keyword_value(call, "allow_pickle")) is True:
                    raise CheckFailed(f"{location(source, call)} loads with allow_pickle=True")
            elif name == "torch.load":
                safe = constant_value(keyword_value(call, "weights_only"))
                if safe is False:
                    raise CheckFailed(
                        f"{location(source, call)} loads with weights_only=False: a file of it can "
                        "run any code"
                    )
                bare += [f"{location(source, call)} torch.load without weights_only"] * (
                    safe is not True
                )
            elif name in ("exec", "eval", "builtins.exec", "builtins.eval") and call.args:
                if runs_a_file(call.args[0], folder):
                    raise CheckFailed(f"{location(source, call)} runs what a file holds")
    if bare:
        raise CheckUndecided(
            f"{len(bare)} torch.load without weights_only: safe from PyTorch 2.6 on, before it "
            "runs code",
            bare,
        )
    return unless_unread(folder, "what is loaded cannot run code")


def runs_a_file(node: ast.AST, folder: RecordFolder) -> bool:
    """Tell exec(open(…)) of a file that is none of the folder's own sources, which are judged
    themselves.
    """
    read = any(
        dotted_name(n.func) in ("open", "io.open")
        or (
            isinstance(n.func, ast.Attribute) and n.func.attr in ("read", "read_text", "read_bytes")
        )
        for n in ast.walk(node)
        if isinstance(n, ast.Call)
    )
    own = any(
        str(constant_value(n)) in folder.code.shipped
        for n in ast.walk(node)
        if isinstance(n, ast.Constant)
    )
    return read and not own


# ==== Patterns ====================================================================================
TARGET = re.compile(
    r"(?i)^(tgt|target|targets|tgts|label|labels|next_tok\w*|y|y_np|tgt_np|targ\w*|true_tok\w*|gold)"
    r"(_\w+)?$"
)
HASHED = re.compile(r"(?i)(hash|bucket|slot_?id|(^|_)f?key|full_?idx)")
SCORING = re.compile(r"(?i)(eval|score|ttt|test_time|adapt|validat|slot)")
MIX_NAME = re.compile(r"(?i)(mix|blend|interp|combined|p_final|final_p|p_hat)")
LOSS_SUM = re.compile(
    r"(?i)(loss|nll|nats|bits|score|bpb)_?(sum|total|acc\w*)?$|(total|sum|acc)_?(loss|nll|nats|bits)"
)


def functions_in(source: CodeFile) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in source.nodes if isinstance(node, FUNCTIONS))


def target_in_hash_key(source: CodeFile) -> Iterator[str]:
    """Find table keys that mix the context with the token to be predicted (#779)."""
    for node in source.nodes:
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            mixes = any(
                isinstance(n, ast.BinOp)
                and isinstance(n.op, ast.BitXor | ast.Mod | ast.BitAnd | ast.LShift)
                for n in ast.walk(node.value)
            ) or isinstance(node, ast.AugAssign)
            if (
                HASHED.search(dotted_name(target))
                and mixes
                and any(TARGET.match(w) for w in names_in(node.value))
            ):
                yield f"{location(source, node)} a hash key is made of the target"
        elif (
            isinstance(node, ast.Call)
            and dotted_name(node.func).split(".")[-1].lower().startswith("hash")
            and any(TARGET.match(w) for a in node.args for w in names_in(a))
        ):
            yield f"{location(source, node)} a hash key is made of the target"


def mixed_at_target(source: CodeFile) -> Iterator[str]:
    """Find probabilities mixed for the target alone: (1 - a)·p + a·q of gathered entries."""
    for function in functions_in(source):
        inner = list(ast.walk(function))
        gathers = any(
            isinstance(n, ast.Call)
            and isinstance(n.func, ast.Attribute)
            and n.func.attr in ("gather", "take_along_axis", "take_along_dim")
            and any(
                TARGET.match(w)
                for a in [*n.args, *(k.value for k in n.keywords)]
                for w in names_in(a)
            )
            for n in inner
        ) or any(
            isinstance(n, ast.Subscript) and any(TARGET.match(w) for w in names_in(n.slice))
            for n in inner
        )
        for node in inner if gathers else ():
            if (
                isinstance(node, ast.Assign)
                and is_blend(node.value)
                and MIX_NAME.search(dotted_name(node.targets[0]).split(".")[-1])
            ):
                yield f"{location(source, node)} probabilities are mixed at the target alone"


def is_blend(node: ast.AST) -> bool:
    """Tell an expression of the form (1 - a) * p + a * q."""
    sums = [n for n in ast.walk(node) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add)]
    return any(
        any(
            isinstance(n, ast.BinOp)
            and isinstance(n.op, ast.Sub)
            and constant_value(n.left) in (1, 1.0)
            for n in ast.walk(s)
        )
        for s in sums
    )


def trains_before_scoring(source: CodeFile) -> Iterator[str]:
    """Find loops of an evaluation that step the optimiser before they add to the score (#402,
    #677).
    """
    for function in functions_in(source):
        if not SCORING.search(function.name):
            continue
        for loop in (n for n in ast.walk(function) if isinstance(n, ast.For | ast.While)):
            steps = [n.lineno for s in loop.body for n in ast.walk(s) if is_step(n)]
            adds = [
                n.lineno
                for s in loop.body
                for n in ast.walk(s)
                if isinstance(n, ast.AugAssign)
                and isinstance(n.op, ast.Add)
                and LOSS_SUM.search(dotted_name(n.target).split(".")[-1])
            ]
            if steps and adds and min(steps) < min(adds):
                yield (
                    f"{source.name}:{min(steps)} training comes before scoring (line {min(adds)}) "
                    "in the same loop"
                )


def is_step(node: ast.AST) -> bool:
    """Tell a call of an optimiser's step()."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "step"
        and bool(re.search(r"(?i)opt", dotted_name(node.func.value)))
    )


def two_passes(source: CodeFile) -> Iterator[str]:
    """Find a second pass over text that was scored (#846)."""
    seen = set()
    for node in source.nodes:
        name = (
            node.name
            if isinstance(node, FUNCTIONS)
            else node.id
            if isinstance(node, ast.Name)
            else ""
        )
        if (
            re.search(r"(?i)(two|2|second)_?pass|rescor|pass_?(2|two)($|_)", name)
            and name not in seen
        ):
            seen.add(name)
            yield f"{location(source, node)} {name}: text is scored twice"


def slot_like(source: CodeFile) -> Iterator[str]:
    """Find a delta that an evaluation optimises on the positions which it then scores (#1240)."""
    for function in functions_in(source):
        inner = list(ast.walk(function)) if SCORING.search(function.name) else []
        deltas = [
            n
            for n in inner
            if isinstance(n, ast.Assign)
            and re.search(r"(?i)(^|_)(delta|slot|bias)(_|$)", dotted_name(n.targets[0]))
            and (
                constant_value(keyword_value(n.value, "requires_grad")) is True
                if isinstance(n.value, ast.Call)
                else False or "requires_grad_" in names_in(n.value)
            )
        ]
        if deltas and any(
            is_step(n) or (isinstance(n, ast.Attribute) and n.attr == "grad") for n in inner
        ):
            yield (
                f"{location(source, deltas[0])} {dotted_name(deltas[0].targets[0])} is optimised "
                "where it scores"
            )


def last_epoch_counts(source: CodeFile) -> Iterator[str]:
    """Find loops over epochs that reset the score, so that only the last epoch's loss counts
    (#568).
    """
    for function in functions_in(source):
        loops = (
            [
                n
                for n in ast.walk(function)
                if isinstance(n, ast.For)
                and "epoch" in " ".join([*names_in(n.target), *names_in(n.iter)]).lower()
            ]
            if SCORING.search(function.name)
            else []
        )
        for loop in loops:
            resets = [
                s
                for s in loop.body
                if isinstance(s, ast.Assign)
                and constant_value(s.value) in (0, 0.0)
                and LOSS_SUM.search(dotted_name(s.targets[0]).split(".")[-1])
            ]
            if resets and any(is_step(n) for s in loop.body for n in ast.walk(s)):
                yield (
                    f"{location(source, resets[0])} each epoch resets the score: the last "
                    "epoch's is reported"
                )


def stored_tokens(source: CodeFile) -> Iterator[str]:
    """Find validation tokens that go into a saved file (#168, #275)."""
    for node in source.nodes:
        name = (
            constant_value(node)
            if isinstance(node, ast.Constant)
            else node.id
            if isinstance(node, ast.Name)
            else ""
        )
        if isinstance(name, str) and re.fullmatch(
            r"(?i)(paid_?prefix|val_prefix|prefix_tokens|stored_val\w*)\w*", name
        ):
            where = location(source, node)
            yield f"{where} {name}: validation tokens may be stored in the artifact"
        if isinstance(node, ast.Call) and dotted_name(node.func) in (
            "torch.save",
            "np.savez",
            "numpy.savez",
            "np.save",
            "pickle.dump",
            "pickle.dumps",
        ):
            saved = {word for argument in node.args for word in names_in(argument)}
            for word in sorted(saved):
                if re.fullmatch(r"val_(tokens|data|ids)", word):
                    yield f"{location(source, node)} {word} goes into a file that is saved"


def spread_over_bytes(source: CodeFile) -> Iterator[str]:
    """Find a token's probability spread over its bytes by a root (#1835)."""
    for node in source.nodes:
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Pow)
            and isinstance(node.right, ast.BinOp)
            and isinstance(node.right.op, ast.Div)
            and constant_value(node.right.left) in (1, 1.0)
            and any(re.search(r"(?i)byte|n_b$", w) for w in names_in(node.right.right))
        ):
            yield (
                f"{location(source, node)} a token's probability is spread over its bytes by a "
                "power"
            )


PATTERNS: tuple[Callable[[CodeFile], Iterator[str]], ...] = (
    target_in_hash_key,
    mixed_at_target,
    trains_before_scoring,
    two_passes,
    slot_like,
    last_epoch_counts,
    stored_tokens,
    spread_over_bytes,
)


def check_patterns(folder: RecordFolder) -> str:
    """Warn where code looks like a known cheat. Honest code may look like it too: a reader
    decides.
    """
    warnings = list(
        dict.fromkeys(
            w for source in running_sources(folder) for pattern in PATTERNS for w in pattern(source)
        )
    )
    if warnings:
        raise CheckUndecided(
            f"{len(warnings)} places look like a known cheat; read them: {'; '.join(warnings[:2])}",
            warnings,
        )
    return unless_unread(folder, "nothing looks like a known cheat")


SOURCE_CHECKS = {
    "network": check_network,
    "paths": check_paths,
    "validation": check_validation,
    "loading": check_loading,
    "patterns": check_patterns,
}
