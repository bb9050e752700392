"""From finished runs to a record folder: refused unless they are one experiment, and written whole or not at all."""

from __future__ import annotations

import datetime
import hashlib
import json
import lzma
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fairway.records.code import closure, imports, read_source
from fairway.records.files import RecordError, need, read_bytes, read_json, sha256
from fairway.records.folder import TRACKS, read_folder
from fairway.records.readme import (
    ARCHIVE,
    PLACES,
    READABLE,
    Entry,
    Record,
    Result,
    blurb,
    cell,
    certified,
    is_code,
    readme,
    table,
    technique,
)
from fairway.records.run import Run, dict_at, read_run
from fairway.records.schema import normal

# Where a run lies and what it is called, not what it does. Data and tokenizer are held to their hashes.
TRAIN_FREE = {"seed", "run_id", "out_dir", "data_path", "tokenizer_path"}
EVAL_FREE = {"checkpoint", "val_files", "out_dir", "data_path", "tokenizer_path"}


# ==== WHAT MAY BE PACKED ==============================================================================================
def is_figure(value: Any) -> bool:
    """A number that a run can have measured."""
    return type(value) in (int, float) and 0 <= value < 1e15


def number(run: Run, event: str, key: str) -> float:
    value = run.event(event).get(key)
    need(
        is_figure(value),
        f"{run.log.with_suffix('.jsonl')} has no {event} with a number as {key}; pack "
        "runs that ended by themselves",
    )
    return value


def measured(path: Path) -> Result:
    """A run's figures, or what it lacks."""
    run = read_run(path)
    need(
        run.event("final"),
        f"{run.log} has no final score; finish the run (RESUME=1), or leave it out",
    )
    need(
        run.seed is not None,
        f"{run.log.with_suffix('.jsonl')} names no seed; pack runs of this train_gpt.py",
    )
    check_artifact(run)
    figures = {
        name: number(run, "final", name)
        for name in ("loss", "bpb", "tokens", "bytes", "eval_seconds")
    }
    plain_bpb = figures["bpb"]
    if run.score is not None:
        names = dict(
            loss="val_loss",
            bpb="val_bpb",
            tokens="tokens",
            bytes="bytes",
            eval_seconds="eval_seconds",
        )
        figures = {name: run.score.get(key) for name, key in names.items()}
        need(
            figures["eval_seconds"] is not None,
            f"{run.folder}/eval/score.json knows no time of scoring (an "
            f"interrupted run made part of its columns); remove {run.folder}/eval and run eval_final.py again",
        )
        bad = next((name for name, value in figures.items() if not is_figure(value)), "")
        need(
            not bad,
            f"{run.folder}/eval/score.json has no number for {bad}; run eval_final.py again",
        )
    return Result(
        run,
        run.seed,
        **figures,
        raw_bpb=number(run, "val", "bpb"),
        plain_bpb=plain_bpb,
        steps=int(number(run, "val", "step")),
        train_seconds=number(run, "val", "seconds"),
        artifact_bytes=int(number(run, "artifact", "bytes")),
    )


def check_artifact(run: Run) -> None:
    """What lies in OUT_DIR must be what the log is about."""
    logged, there = (
        run.event("artifact").get("sha256"),
        sorted(run.folder.glob("final_model.*.ptz")),
    )
    need(
        re.fullmatch("[0-9a-f]{64}", str(logged)),
        f"{run.log.with_suffix('.jsonl')} names no artifact; finish the run, or leave it out",
    )
    need(
        run.artifact or not there,
        f"{there[0] if there else ''} has sha256 {sha256(there[0])[:12] if there else ''}, "
        f"the log {run.log} has {logged[:12]}: another run wrote over it; train again in an OUT_DIR of its own",
    )
    scored = run.folder / "eval" / "score.json"
    need(
        run.score or not scored.is_file(),
        f"{scored} is damaged, or of another artifact than {logged[:12]} of "
        f"{run.log}; run eval_final.py again, or remove it",
    )


def same(results: list[Result], field: str, of: Callable[[Result], Any]) -> None:
    """One value in all runs, or the two that differ."""
    first = results[0]
    for other in results[1:]:
        a, b = of(first), of(other)
        need(
            a == b,
            f"{first.run.log} and {other.run.log} differ in {field}: {shown(a)} and {shown(b)}; a record is "
            "one experiment, so that only the seed may differ",
        )


def shown(value: Any) -> str:
    return value[:12] if type(value) is str and len(value) == 64 else json.dumps(value)[:60]


def check_alike(results: list[Result]) -> None:
    seen: dict[int, Path] = {}
    for result in results:
        log = result.run.log
        other = seen.setdefault(result.seed, log)
        need(
            other == log,
            f"{other} and {log} both have seed {result.seed}; a record takes one run a seed",
        )
    for name in ("code", "tokenizer", "data"):
        same(
            results,
            f"the hash of their {name}",
            lambda r, n=name: dict_at(r.run.event("start"), "sha256").get(n),
        )
    for name in sorted({n for r in results for n in r.run.settings} - TRAIN_FREE):
        same(results, name.upper(), lambda r, n=name: r.run.settings.get(n))
    evaluated = [r for r in results if r.run.score]
    missing = next((r for r in results if not r.run.score), None)
    need(
        not evaluated or not missing,
        f"{evaluated[0].run.log if evaluated else ''} was evaluated, "
        f"{missing.run.log if missing else ''} was not; run eval_final.py on every run, or on none",
    )
    for name in ("tokens", "bytes"):
        same(results, f"the {name} they score", lambda r, n=name: getattr(r, n))
    if evaluated:
        same(
            results,
            "the hash of the split they score",
            lambda r: dict_at(r.run.score, "sha256").get("data"),
        )
        given = [dict_at(r.run.score, "settings") for r in results]
        for name in sorted({n for settings in given for n in settings} - EVAL_FREE):
            same(
                results,
                f"{name.upper()} of the evaluation",
                lambda r, n=name: dict_at(r.run.score, "settings").get(n),
            )


def check_entry(entry: Entry) -> None:
    simple = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"
    need(entry.track in TRACKS, f"--track is {entry.track}; it is one of {', '.join(TRACKS)}")
    need(
        re.fullmatch(simple, entry.slug),
        f"--slug is {entry.slug!r}; it takes letters, digits, and . _ - after the "
        "first (80 at most)",
    )
    need(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]{0,38}", entry.github_id),
        f"--github-id is {entry.github_id!r}, which is no GitHub name",
    )
    for option in ("author", "name", "blurb"):
        text = getattr(entry, option)
        need(
            text.isprintable() and (text.strip() or option != "author"),
            f"--{option} is {text!r}; it takes one line",
        )
    try:
        dated = datetime.date.fromisoformat(entry.date).isoformat() == entry.date
    except ValueError:
        dated = False
    need(dated, f"--date is {entry.date!r}; it takes YYYY-MM-DD")
    need(
        entry.against is None or entry.against.is_dir(),
        f"--against is {entry.against}, which is no folder; name a record's",
    )
    need(
        entry.pack_code in ("", "lzma"),
        f"--pack-code is {entry.pack_code!r}; it is lzma, or left out",
    )


def check_code(root: Path, names: list[str], results: list[Result]) -> None:
    """The code that ships is the code that ran, by its hashes."""
    run = results[0].run
    logged = dict_at(run.event("start"), "sha256").get("code")
    here = hashlib.sha256(read_bytes(root / "train_gpt.py")).hexdigest()
    need(
        here == logged,
        f"train_gpt.py has sha256 {here[:12]}, {run.log} was trained by {shown(logged)}; pack from "
        "the checkout that trained it",
    )
    for result in results:
        ran = dict_at(result.run.score, "code")
        need(
            ran or not result.run.score,
            f"{result.run.folder}/eval/score.json names no code; run eval_final.py again",
        )
        for name in sorted(set(names) & set(ran)):
            there = sha256(root / name)
            need(
                there == ran[name],
                f"{name} has sha256 {there[:12]}, {result.run.folder}/eval/score.json was made "
                f"with {shown(ran[name])}; run eval_final.py again, or pack from the checkout that did",
            )


# ==== CODE ============================================================================================================
def evaluation_files(root: Path) -> list[Path]:
    """Every Python file that training and evaluation reach, relative to `root`, sorted."""
    names = [Path(name) for name in closure(root)]
    need(
        Path("train_gpt.py") in names and Path("eval_final.py") in names,
        f"{root} lacks train_gpt.py or eval_final.py; run this from the repository",
    )
    return names


def requirements(root: Path, names: Sequence[Path]) -> str:
    """Of the repository's pinned requirements those that these files import. What comes with one of them, and has no
    line there (llvmlite with numba), is named without a version."""
    own = (
        {name.parts[0].removesuffix(".py") for name in names} | set(sys.stdlib_module_names) | {""}
    )
    wanted = {
        found.module.split(".")[0]
        for name in names
        for found in imports(read_source(name.as_posix(), read_bytes(root / name)))
    } - own
    lines = read_bytes(root / "requirements.txt").decode("utf-8", "replace").splitlines()
    pinned = {
        re.split(r"[^\w-]", line)[0].lower().replace("-", "_"): line.strip() for line in lines
    }
    return "".join(f"{pinned.get(name.lower(), name)}\n" for name in sorted(wanted, key=str.lower))


STUB = '''"""Runs {script}, which lies packed in {archive} beside this file. To be read: {readable}/{script}."""

import atexit
import hashlib
import json
import lzma
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

SHA256 = "{sha256}"


def run(archive: str, script: str) -> None:
    beside = Path(__file__).resolve().parent / archive
    packed = beside.read_bytes() if beside.is_file() else b""
    if hashlib.sha256(packed).hexdigest() != SHA256:
        sys.exit(f"{{script}}: error: {{beside}} is missing, or its sha256 is not {{SHA256[:12]}}; get it anew")
    folder, owner, leave = Path(tempfile.mkdtemp(prefix="code-")), os.getpid(), os._exit

    def clean() -> None:
        if os.getpid() == owner:  # a forked worker leaves the files to the others
            shutil.rmtree(folder, ignore_errors=True)

    def clean_and_leave(code: int) -> None:
        clean()
        leave(code)

    atexit.register(clean)
    os._exit = clean_and_leave  # the way in which a rank under torchrun ends
    for name, text in json.loads(lzma.decompress(packed)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / script), run_name="__main__")


if __name__ == "__main__":
    run("{archive}", "{script}")
'''


def packed(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Two stubs, the archive that both read, and the readable code in a folder that no script reads. The same sources
    give the same bytes."""
    texts = {name: code.decode() for name, code in sorted(sources.items())}
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    ]  # text
    archive = lzma.compress(
        json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode(),
        lzma.FORMAT_XZ,
        lzma.CHECK_CRC32,
        filters=filters,
    )
    digest = hashlib.sha256(archive).hexdigest()
    stubs = {
        script: STUB.format(
            script=script, archive=ARCHIVE, readable=READABLE, sha256=digest
        ).encode()
        for script in ("train_gpt.py", "eval_final.py")
    }
    return {
        **stubs,
        ARCHIVE: archive,
        **{f"{READABLE}/{name}": code for name, code in sources.items()},
    }


# ==== THE RECORD ======================================================================================================
def pack(
    runs: Sequence[Path],
    entry: Entry,
    root: Path,
    out: Path,
    replace: bool = False,
    told: Callable[[str], object] = print,
) -> Path:
    """Write OUT/track_<track>/<date>_<slug>/ from finished runs and the code in `root`; `told` hears how it goes."""
    entry = entry._replace(
        date=entry.date or datetime.date.today().isoformat(),
        name=entry.name or re.sub(r"[-_]+", " ", entry.slug).strip(),
    )
    check_entry(entry)
    target = out / entry.folder
    put_back(target)
    need(not target.is_symlink(), f"{target} is a link; remove it, or choose another --slug")
    need(
        replace or not target.exists(),
        f"{target} is there already; choose another --slug, or give --replace",
    )
    told(f"reading {len(runs)} runs")
    results = [measured(path) for path in runs]
    need(results, "no run was given; name each run's OUT_DIR, or its logs/RUN_ID.txt")
    logs = {r.run.log.resolve() for r in results}
    need(
        len(logs) == len(runs),
        f"{len(runs)} runs were given, but they are {len(logs)}: two name one log; name each once",
    )
    check_alike(results)
    code = evaluation_files(root)
    check_code(root, [name.as_posix() for name in code], results)
    with whole_folder(target) as folder:
        try:
            write_record(folder, entry, sorted(results, key=lambda r: r.seed), root, code, told)
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as e:
            raise RecordError(
                f"{results[0].run.folder}: its log's events or eval/score.json hold what neither script "
                f"writes ({type(e).__name__}: {' '.join(str(e).split())[:100]}); run them again"
            ) from e
    return target


def write_record(
    folder: Path,
    entry: Entry,
    results: list[Result],
    root: Path,
    code: list[Path],
    told: Callable[[str], object],
) -> None:
    """Everything but the README first: the significance tests read the folder as anyone would."""
    from fairway.report import picture

    sources = {name.as_posix(): read_bytes(root / name) for name in code}
    files, plain = (
        packed(sources) if entry.pack_code else dict(sources),
        sum(map(len, sources.values())),
    )
    told(
        f"code: {plain} bytes in {len(sources)} files"
        + (f", packed {code_bytes(files)}" if entry.pack_code else "")
    )
    for result in results:
        files |= run_files(result)
    files["requirements.txt"] = requirements(root, code).encode()
    data = submission(entry._replace(blurb=entry.blurb or blurb(results)), results, files)
    files["submission.json"] = (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(
        "utf-8", "replace"
    )
    for name, content in files.items():
        write(folder / name, content)
    told("drawing picture.png")
    picture([r.run.log for r in results], folder / "picture.png")
    files["picture.png"] = read_bytes(folder / "picture.png")
    parent = changes(folder, entry.against, results[0]) if entry.against else ""
    text = readme(Record(entry, results, data, files, plain, parent))
    write(folder / "README.md", text.encode("utf-8", "replace"))


def code_bytes(files: dict[str, bytes]) -> int:
    return sum(len(content) for name, content in files.items() if is_code(name))


def run_files(result: Result) -> dict[str, bytes]:
    """A run's logs and verdicts, byte for byte."""
    run, seed = result.run, result.seed
    given = {
        f"train_seed{seed}.log": run.log,
        f"eval_seed{seed}.log": run.eval_log,
        f"score_seed{seed}.json": run.folder / "eval" / "score.json" if run.score else None,
        f"certificate_seed{seed}.json": run.folder / "eval" / "certificate.json"
        if run.certificate
        else None,
    }
    return {name: read_bytes(path) for name, path in given.items() if path}


def hardware(results: list[Result]) -> str:
    """`8x NVIDIA H100 80GB HBM3`, as the runs saw it."""
    starts = [r.run.event("start") for r in results]
    return "; ".join(
        dict.fromkeys(f"{s.get('world_size', 1)}x {s.get('device', 'unknown')}" for s in starts)
    )


def submission(entry: Entry, results: list[Result], files: dict[str, bytes]) -> dict[str, Any]:
    """submission.json: the keys that records have in common, every figure the mean, or the largest, over seeds."""

    def mean(values: list[float]) -> float:
        return round(statistics.fmean(values), PLACES)

    def spread(values: list[float]) -> float:
        return round(statistics.stdev(values), PLACES) if len(values) > 1 else 0.0

    loss, bpb = [r.loss for r in results], [r.bpb for r in results]
    code = code_bytes(files)
    seeds = {
        str(r.seed): dict(
            val_loss=round(r.loss, PLACES),
            val_bpb=round(r.bpb, PLACES),
            pre_quant_val_bpb=round(r.raw_bpb, PLACES),
            artifact_bytes=r.artifact_bytes,
            steps=r.steps,
            step_avg_ms=round(r.step_avg_ms, 2),
            train_time_s=round(r.train_seconds, 1),
            eval_time_s=round(r.eval_seconds, 1),
        )
        for r in results
    }
    largest = max(r.artifact_bytes for r in results)
    return dict(
        author=entry.author,
        github_id=entry.github_id,
        name=entry.name,
        blurb=entry.blurb,
        date=entry.date,
        track=entry.track,
        val_loss=mean(loss),
        val_bpb=mean(bpb),
        val_loss_std=spread(loss),
        val_bpb_std=spread(bpb),
        seeds=[r.seed for r in results],
        seed_results=seeds,
        bytes_total=largest + code,
        bytes_code=code,
        hardware=hardware(results),
        pytorch_version=str(results[0].run.event("start").get("torch", "")),
        technique_summary=technique(results[0]),
        compliance=dict(
            artifact_bytes_max=largest,
            train_time_max_s=max(s["train_time_s"] for s in seeds.values()),
            eval_time_max_s=max(s["eval_time_s"] for s in seeds.values()),
            val_tokens=results[0].tokens,
            val_bytes=results[0].bytes,
            certified=certified(results),
        ),
    )


def changes(folder: Path, against: Path, result: Result) -> str:
    """Which settings differ from the record before, and both significance tests."""
    from fairway.records.significance import report, seeds_of

    before = read_folder(against)
    need(before.runs, f"--against {against} holds no log of a run")
    old = before.runs[0].log.settings
    rows = [
        [name.upper(), old[name], value]
        for name, value in sorted(result.run.settings.items())
        if name in old
        and name not in TRAIN_FREE
        and alike(value) != (was := alike(old[name]))
        and type(was) is type(alike(value))
    ]
    said = (
        table(("setting", "before", "now"), rows) if rows else "No setting that both log differs."
    )
    tests = report(seeds_of(folder), seeds_of(against)).rstrip()
    return f"Against `{cell(against.resolve().name)}`:\n\n{said}\n\n```\n{tests}\n```"


def alike(value: Any) -> Any:
    """A setting in the way that logs of any dialect share: 1, 1.0 and True are one."""
    text = {"true": "1", "false": "0"}.get(str(value).lower(), str(value))
    try:
        return float(text)
    except ValueError:
        return text


# ==== WHOLE OR NOT AT ALL =============================================================================================
def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def replaced(target: Path) -> Path:
    """Where a folder lies between two renames."""
    return target.with_name(f".{target.name}.old")


def put_back(target: Path) -> None:
    """What a kill between two renames left."""
    old = replaced(target)
    if old.exists():
        shutil.rmtree(old) if target.exists() else os.rename(old, target)


class whole_folder:
    """A folder that takes its name once all of it is on disk. The one that it replaces lies beside, hidden, until
    then."""

    def __init__(self, target: Path):
        self.target, self.part, self.old = (
            target,
            target.with_name(f".{target.name}.part"),
            replaced(target),
        )

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir()
        return self.part

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:
            shutil.rmtree(self.part, ignore_errors=True)
            return
        if self.target.exists():
            os.rename(self.target, self.old)
        try:
            os.rename(self.part, self.target)
        except BaseException:
            if self.old.exists() and not self.target.exists():
                os.rename(self.old, self.target)
            raise
        shutil.rmtree(self.old, ignore_errors=True)


# ==== THE PULL REQUEST ================================================================================================
def pull_request(folder: Path) -> str:
    """Branch, commit and body; refused unless the folder holds no FAIL and is all that its repository would add."""
    from fairway.records.checks import check

    need(folder.is_dir(), f"{folder} is no folder; name a record's")
    folder = folder.resolve()
    need(
        re.fullmatch(r"\d{4}-\d\d-\d\d_.+", folder.name)
        and folder.parent.name.startswith("track_"),
        f"{folder} is "
        "not called track_…/YYYY-MM-DD_…; name a folder as `python submit.py pack` writes it",
    )
    failed = [verdict.check for verdict in check(folder) if verdict.verdict == "FAIL"]
    need(not failed, f"{folder} fails {', '.join(failed)}; see `python submit.py check {folder}`")
    check_repository(folder)
    data, where = (
        normal(read_json(folder / "submission.json")),
        f"records/{folder.parent.name}/{folder.name}",
    )
    need(data.val_bpb is not None, f"{folder}/submission.json has no val_bpb; pack it again")
    kind = "Non-record" if "non_record" in folder.parent.name else "Record"
    title = f"{kind}: {cell(data.name or folder.name)}, val_bpb {data.val_bpb:.{PLACES}f}"
    rows = [
        [
            seed,
            *(
                "" if value is None else value
                for value in (r.val_bpb, r.val_loss, r.steps, r.bytes)
            ),
        ]
        for seed, r in data.seed_results.items()
    ]
    size = (
        ""
        if data.bytes_total is None
        else f"Bytes, largest artifact and code: {data.bytes_total:,}. "
    )
    branch = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name).strip("-")
    return "\n\n".join(
        [
            f"branch: record/{branch}\ncommit: {title}",
            f"# {title}",
            cell(data.blurb or ""),
            table(("seed", "val_bpb", "val_loss", "steps", "artifact bytes"), rows),
            f"{size}Hardware: {cell(data.hardware or 'not stated')}.",
            f"This adds the folder `{where}` and changes nothing else. `{where}/README.md` says how it was "
            "made and how to repeat it.",
        ]
    )


def check_repository(folder: Path) -> None:
    """In a git repository: nothing but this folder is new or changed, and all of it would be added."""

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, errors="replace"
        )

    if not shutil.which("git") or git("rev-parse", "--is-inside-work-tree").returncode:
        return
    top = Path(git("rev-parse", "--show-toplevel").stdout.strip())
    inside = folder.relative_to(top.resolve()).as_posix() + "/"
    states = git(
        "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", "--ignored=matching"
    )
    need(states.returncode == 0, f"git status fails in {folder}: {states.stderr.strip()[:200]}")
    for entry in filter(None, states.stdout.split("\0")):
        state, path = entry[:2], entry[3:]
        ours = path.startswith(inside)
        need(
            ours or state == "!!",
            f"{path} is changed or new as well; a pull request adds one folder: commit or "
            "stash it elsewhere first",
        )
        need(
            not ours or state != "!!" or "__pycache__" in path,
            f"{path} is ignored by git; take it out of .gitignore",
        )
        need(
            not ours or state in ("??", "A ", "!!"),
            f"{path} was committed before and is changed now; a pull request "
            "adds a new folder: pack with another --slug",
        )
