"""Files and bytes: everything must be there, be counted, and fit."""

from __future__ import annotations

import ast
import re

from fairway.records.checks.base import (
    BUDGET,
    CheckFailed,
    CheckUndecided,
    artifact_bytes,
    by_run,
    code_bytes_in_use,
)
from fairway.records.files import is_weights, read_text, sha256
from fairway.records.folder import RecordFolder, read_or_fault, scoring_log
from fairway.records.run import dict_at
from fairway.records.shipped_code import CHALLENGE, PACKAGES, READABLE, CodeFile, distribution_of
from fairway.records.syntax import dotted_name, names_in

MIB = 1 << 20
BUDGET_NAME = re.compile(
    r"(?i)budget|artifact|submission|size_(limit|cap|target)|"
    r"(max|limit|target|cap)_?(bytes|size|mb)"
)
MIB_LIMIT = re.compile(
    r"(?i)(under|below|limit|cap|within|budget|fits?|<|≤)[^.|\n]{0,30}\b(16(\.0+)? ?MiB|"
    r"16,?777,?216)\b"
)


def check_folder_files(folder: RecordFolder) -> str:
    """README, submission.json, code and a log must be there and readable, as regular files."""
    lacking = [
        what
        for what, present in (
            ("README.md", folder.readme.strip()),
            ("submission.json", folder.submission_name),
            ("a Python file", folder.code.entries),
            ("a training log", folder.runs),
        )
        if not present
    ]
    asked = {
        "README.md",
        folder.submission_name,
        *folder.code.entries,
        *(run.name for run in folder.runs),
    }
    faults = [f"{name}: {why}" for name, why in folder.faults.items()]
    if lacking:
        raise CheckFailed(
            f"the folder lacks {', '.join(lacking)}" + (f" ({faults[0]})" if faults else "")
        )
    if faults:
        raise CheckFailed("; ".join(faults[:3]))
    empty = sorted(name for name in asked if folder.files.get(name) == 0)
    if empty:
        raise CheckFailed(f"{empty[0]} is empty: 0 bytes")
    return f"{len(folder.files)} files, {len(folder.runs)} training logs"


def check_schema(folder: RecordFolder) -> str:
    """submission.json must have the keys and types that records share."""
    from fairway.records.schema import problems

    if folder.submission_name in folder.faults:
        raise CheckFailed(f"{folder.submission_name}: {folder.faults.get(folder.submission_name)}")
    if not folder.submission_name:
        raise CheckFailed("there is no submission.json")
    faults = problems(folder.submission)
    more = f"; {len(faults) - 3} more" * (len(faults) > 3)
    if faults:
        raise CheckFailed(f"{folder.submission_name}: {'; '.join(faults[:3])}{more}")
    return f"{folder.submission_name} has the keys and types that records share"


# ==== Bytes =======================================================================================


def check_total_bytes(folder: RecordFolder) -> str:
    """The largest artifact and the code as it ships must fit, whatever the log counted."""
    artifacts, code, claims = (
        by_run(folder.record, artifact_bytes),
        code_bytes_in_use(folder),
        folder.claims,
    )
    totals = by_run(folder.record, lambda run: scoring_log(run).total_bytes)
    for what, total in [(f"{name} states", t) for name, t in totals.items()] + [
        (f"{folder.submission_name} states", c.bytes)
        for c in (claims.record, *claims.seeds.values())
        if c.bytes
    ]:
        if total > BUDGET:
            raise CheckFailed(f"{what} {total:,} bytes; {BUDGET:,} are allowed")
    if not artifacts:
        raise CheckUndecided(
            "no log states the artifact's bytes"
            + (
                f"; {folder.submission_name} claims {claims.record.bytes:,}"
                if claims.record.bytes
                else ""
            )
        )
    name, largest = max(artifacts.items(), key=lambda item: item[1])
    if not folder.code.entries:
        raise CheckUndecided(
            f"the artifact of {name} has {largest:,} bytes, and there is no code to count"
        )
    logged = next((run.log.code_bytes for run in folder.record if run.name == name), None)
    if largest + code > BUDGET:
        raise CheckFailed(
            f"{name}: artifact {largest:,} + code as it ships {code:,} = {largest + code:,}; "
            f"{BUDGET:,} are allowed"
            + (f" (the log counts {logged:,} of code)" if logged not in (None, code) else "")
        )
    biggest, whose = max(
        ((total, log) for log, total in totals.items()), default=(largest + code, name)
    )
    low = claims.record.bytes
    if low is not None and low < min(biggest, largest + code):
        raise CheckFailed(
            f"{folder.submission_name} states {low:,} "
            f"bytes, {whose} has {biggest:,}: the largest seed counts, with its code"
        )
    return (
        f"largest artifact {largest:,} + code {code:,} in {len(folder.code.shipped)} files = "
        f"{largest + code:,} of {BUDGET:,}"
    )


def check_artifacts(folder: RecordFolder) -> str:
    """An artifact that the folder carries must be one that a score of the record is of."""
    carried = [name for name in folder.files if is_weights(name)]
    if not carried:
        return "the folder carries no artifact"
    runs = [run for run in folder.record if run.score is not None]
    scored = {str(dict_at(run.score, "sha256").get("artifact")): run for run in runs}
    if not scored:
        raise CheckUndecided(f"no score in the folder says which artifact it is of: {carried[0]}")
    for name in carried:
        if (found := sha256(folder.path / name)) not in scored:
            raise CheckFailed(f"{name} has sha256 {found[:12]}, and no score is of it")
        stated, size = artifact_bytes(scored[found]), folder.files[name]
        if stated not in (None, size):
            raise CheckFailed(f"{name} has {size:,} bytes; the log of its run states {stated:,}")
    return f"{', '.join(carried)}: as scored"


def check_helpers(folder: RecordFolder) -> str:
    """Every import must be answered, and everything that is imported must be counted."""
    if not folder.code.entries:
        raise CheckUndecided("there is no Python file")
    missing = [
        a for a in folder.code.absent if not a.optional and a.module.split(".")[0] not in CHALLENGE
    ]
    common = [a for a in missing if a.module.split(".")[0] in PACKAGES]
    listed = "\n".join([folder.readme, *requirement_texts(folder)]).lower().replace("_", "-")
    lost = [a for a in missing if distribution_of(a.module).lower().replace("_", "-") not in listed]
    unnamed = (
        []
        if unreadable_source(folder)
        else [f"{a.file}:{a.line} imports {a.module}" for a in lost if a not in common]
    )
    if unnamed:
        raise CheckFailed(
            f"{'; '.join(unnamed)}: not in the folder, and neither README.md nor requirements.txt "
            "names it"
        )
    helpers = {
        name: size for name, size in folder.code.shipped.items() if name not in folder.code.entries
    }
    counted, where = counted_code(folder)
    in_use = code_bytes_in_use(folder)
    if helpers and counted is not None:
        least, size = min(helpers.items(), key=lambda item: item[1])
        if (
            counted < in_use
            and counted <= in_use - size
            and counted >= sum(folder.code.shipped[e] for e in folder.code.entries[:1]) - 100
        ):
            raise CheckFailed(
                f"{where} counts {counted:,} bytes of code; with {', '.join(sorted(helpers)[:3])}"
                f"{' …' * (len(helpers) > 3)} what ships has {in_use:,}"
            )
    if lost:
        raise CheckUndecided(
            f"{lost[0].file}:{lost[0].line} imports "
            f"{lost[0].module}, a package that neither README.md nor requirements.txt names",
            [f"{a.file}:{a.line} {a.module} is named nowhere" for a in lost],
        )
    if unreadable_source(folder):
        raise CheckUndecided(f"{unreadable_source(folder)}: what it imports could not be read")
    return f"{len(folder.code.shipped)} files of code ship with {in_use:,} bytes" + (
        "" if counted is None else f"; {where} counts {counted:,}"
    )


def requirement_texts(folder: RecordFolder) -> list[str]:
    names = [n for n in folder.files if re.fullmatch(r"(requirements\w*\.txt|setup\w*\.sh)", n)]
    return [
        text
        for n in names
        for text in [read_or_fault(read_text, folder.path, n, {}, 1 << 20)]
        if text is not None
    ]


def unreadable_source(folder: RecordFolder) -> str:
    """Return the first running source that does not parse, and the reason; "" if all do."""
    return next((f"{s.name} {s.fault}" for s in folder.code.running() if s.tree is None), "")


def counted_code(folder: RecordFolder) -> tuple[int | None, str]:
    """Return the code bytes that the record states, and where: submission.json, else a log."""
    claims = folder.claims
    if claims.code is not None:
        return claims.code, folder.submission_name
    for run in folder.record:
        if scoring_log(run).code_bytes is not None:
            return scoring_log(run).code_bytes, run.name
    return None, ""


# ==== MB and MiB ==================================================================================
def check_units(folder: RecordFolder) -> str:
    """No size in MiB (2^20 bytes) may be called MB, and 16 MiB is not the limit."""
    wrong = [line for source in folder.code.running() for line in mib_budgets(source)]
    if wrong:
        raise CheckFailed(
            f"{wrong[0]}: takes 16 MiB (16,777,216 bytes) for the limit; it is {BUDGET:,}"
        )
    sizes = sorted(
        {s.bytes for run in folder.runs for s in scoring_log(run).sizes}
        | {size for run in folder.record for size in [artifact_bytes(run)] if size}
    )
    compared = 0
    for text, unit in re.findall(r"(?<![\w.,])(\d{2}\.\d{1,4})\s?(MB|MiB)\b", folder.readme)[:200]:
        as_mb, as_mib = (nearest_size(float(text) * scale, sizes) for scale in (1_000_000, MIB))
        slack = 0.51 * 10.0 ** -(len(text) - 3)
        is_mb, is_mib = (
            as_mb is not None and as_mb[0] <= slack * 1e6,
            as_mib is not None and as_mib[0] <= slack * MIB,
        )
        compared += is_mb or is_mib
        if unit == "MB" and is_mib and not is_mb and len(text) > 4:
            raise CheckFailed(
                f"README.md says {text} MB; "
                f"{as_mib[1]:,} bytes are {text} MiB and {as_mib[1] / 1e6:.2f} MB"
            )
        if unit == "MiB" and is_mb and not is_mib and len(text) > 4:
            raise CheckFailed(
                f"README.md says {text} MiB; "
                f"{as_mb[1]:,} bytes are {text} MB and {as_mb[1] / MIB:.2f} MiB"
            )
    limit = next((m for m in MIB_LIMIT.finditer(folder.readme) if " not " not in m[0]), None)
    if limit:
        raise CheckFailed(
            f"README.md takes 16 MiB for the limit ({limit[0]!r}); it is {BUDGET:,} bytes"
        )
    return (
        f"{compared} sizes of README.md are in the unit that they name; none is called by another"
    )


def nearest_size(value: float, sizes: list[int]) -> tuple[float, int] | None:
    return min(((abs(size - value), size) for size in sizes), default=None)


def mib_budgets(source: CodeFile) -> list[str]:
    """Return the lines that compare or assign 16 MiB as a size limit."""
    places = []
    for node in source.nodes:
        if isinstance(node, ast.Compare):
            parts, names = [node.left, *node.comparators], names_in(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.keyword):
            parts, names = [node.value], {target_name(node)}
        else:
            continue
        if any(constant_arithmetic(part) == 16 * MIB for part in parts) and any(
            map(BUDGET_NAME.search, names)
        ):
            places.append(f"{source.name}:{getattr(node, 'lineno', 0)}")
    return places


def target_name(node: ast.Assign | ast.AnnAssign | ast.keyword) -> str:
    if isinstance(node, ast.keyword):
        return node.arg or ""
    return dotted_name(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def constant_arithmetic(node: ast.AST | None, depth: int = 0) -> float | None:
    """Return the value of *, << and ** over constants; None for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.BinOp) and depth < 8:
        left, right = (
            constant_arithmetic(node.left, depth + 1),
            constant_arithmetic(node.right, depth + 1),
        )
        if left is None or right is None or abs(left) > 1e9 or abs(right) > 1e9:
            return None
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.LShift | ast.Pow) and right <= 40:
            return left * 2**right if isinstance(node.op, ast.LShift) else float(left) ** right
    return None


# ==== Stubs =======================================================================================
def check_stub(folder: RecordFolder) -> str:
    """Packed code must have a readable copy next to it (#1412) that is the code which runs."""
    packed = {
        s.name: s
        for s in folder.code.sources.values()
        if (s.packed and s.name in folder.code.shipped) or "!" in s.name
    }
    if not packed:
        return "the code ships as it reads"
    readable = [
        s
        for s in folder.code.sources.values()
        if s.name not in folder.code.shipped and "!" not in s.name
    ]
    bare, other = [], []
    for name, source in packed.items():
        copies = [r for r in readable if r.name == f"{READABLE}/{name.split('!')[-1]}"] or readable
        if not copies:
            bare.append(
                f"{name}:1 packed ({', '.join(source.layers) or name.split('!')[0]}), and no "
                "readable source lies next to it"
            )
        elif not any(same_code(source, r) for r in copies):
            other.append(
                f"{name} runs {len(source.text):,} characters, and {copies[0].name} is other code "
                f"({len(copies[0].text):,})"
            )
    if other and any("!" in name for name in packed):
        raise CheckFailed(other[0])
    if bare or other:
        raise CheckUndecided((bare or other)[0], bare + other)
    return f"{len(packed)} packed sources are the readable ones in the folder"


def same_code(a: CodeFile, b: CodeFile) -> bool:
    """Tell whether two files are the same code, whatever their layout."""
    if a.text.strip() == b.text.strip():
        return True
    try:
        return a.tree is not None and b.tree is not None and ast.dump(a.tree) == ast.dump(b.tree)
    except RecursionError:
        return False


SIZE_CHECKS = {
    "files": check_folder_files,
    "schema": check_schema,
    "bytes": check_total_bytes,
    "artifacts": check_artifacts,
    "helpers": check_helpers,
    "units": check_units,
    "stub": check_stub,
}
