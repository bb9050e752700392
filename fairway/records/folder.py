"""A record folder as data, whoever wrote it: read within limits; a fault is noted, never raised."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, read_json, read_text
from fairway.records.logs import LoggedScore, RunLog, parse_log
from fairway.records.schema import json_count, read_submission
from fairway.records.shipped_code import READABLE, ShippedCode, read_code

MOST_FILES, DEEPEST, MOST_LOGS, MOST_SEEDS, LOG_LIMIT = 5000, 12, 40, 100, 32 << 20
TRACKS = ("10min_16mb", "non_record_16mb")


class SeedRun(NamedTuple):
    """One training run of the record and, if there is one, its evaluation."""

    seed: int | None  # from the log, else from its name
    name: str  # file name of the training log
    log: RunLog
    eval_log: RunLog | None
    score: dict[str, Any] | None
    certificate: dict[str, Any] | None


class Claim(NamedTuple):
    """One score with its size: of a seed, or of the record."""

    bpb: float | None
    loss: float | None
    bytes: int | None


class Claims(NamedTuple):
    """The claims of submission.json, whatever its keys are called."""

    record: Claim
    code: int | None
    seeds: dict[int, Claim]  # every seed that submission.json names
    data: dict[str, Any]


class RecordFolder(NamedTuple):
    """A record folder, read once for all checks."""

    path: Path
    track: str  # one of TRACKS
    files: dict[str, int]  # regular files: relative name → bytes
    submission: Any  # None if there is none
    readme: str
    runs: list[SeedRun]
    code: ShippedCode
    faults: dict[str, str]  # relative name → why it cannot be read, or must not be there
    submission_name: str
    texts: dict[str, str]  # logs: relative name → text
    claims: Claims
    record: list[SeedRun]  # the runs that the claim is about


def read_record_folder(path: str | Path) -> RecordFolder:
    """Read a folder; nothing in it raises an error."""
    path = Path(path)
    faults: dict[str, str] = {}
    files = dict(regular_files(path, faults))
    name = submission_name(files)
    submission = read_or_fault(read_json, path, name, faults) if name else None
    readme = next((n for n in files if n.lower() == "readme.md"), "")
    text = read_or_fault(read_text, path, readme, faults, 4 << 20) if readme else ""
    texts: dict[str, str] = {}
    runs = read_seed_runs(path, files, faults, texts)
    claims = read_claims(submission)
    return RecordFolder(
        path,
        track_of(path, submission),
        files,
        submission,
        text or "",
        runs,
        read_code(path, files),
        faults,
        name,
        texts,
        claims,
        runs_claimed(runs, claims),
    )


def read_or_fault(read: Any, root: Path, name: str, faults: dict[str, str], *limit: int) -> Any:
    """Return `read(root / name, *limit)`; on failure None, with the reason in `faults`."""
    try:
        return read(root / name, *limit)
    except RecordError as e:
        faults[name] = str(e).removeprefix(f"{root / name}").lstrip(": ") or str(e)
        return None


def regular_files(root: Path, faults: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Yield (name, bytes) of all regular files, sorted.

    Links are not followed; links, pipes and devices are noted in `faults`.
    """
    todo, count = [("", 0)], 0
    sizes: list[tuple[str, int]] = []
    while todo:
        folder, depth = todo.pop()
        try:
            entries = sorted(os.scandir(root / folder), key=lambda e: e.name)
        except OSError as e:
            faults[folder or "."] = e.strerror or str(e)
            continue
        for entry in entries:
            name, count = f"{folder}/{entry.name}".lstrip("/"), count + 1
            if entry.name in ("__pycache__", ".git") or count > MOST_FILES:
                continue
            mode = entry.stat(follow_symlinks=False).st_mode
            if stat.S_ISDIR(mode):
                todo += [(name, depth + 1)] * (depth < DEEPEST)
            elif stat.S_ISREG(mode):
                sizes.append((name, entry.stat(follow_symlinks=False).st_size))
            else:
                faults[name] = (
                    "a link; a record holds the file itself"
                    if stat.S_ISLNK(mode)
                    else "no regular file"
                )
    if count > MOST_FILES:
        faults["."] = f"{count} files, of which {MOST_FILES} were looked at"
    yield from sorted(sizes)


def submission_name(files: dict[str, int]) -> str:
    """Return submission.json, else the only submission*.json, else ""."""
    names = [name for name in files if re.fullmatch(r"submission\w*\.json", name)]
    return "submission.json" if "submission.json" in names else names[0] if len(names) == 1 else ""


def track_of(path: Path, submission: Any) -> str:
    """Return the track by the folder above, else by submission.json, else the stricter record
    track.
    """
    above = path.resolve().parent.name
    stated = submission.get("track") if isinstance(submission, dict) else None
    name = above if above.startswith("track_") else stated if isinstance(stated, str) else ""
    return TRACKS[1] if "non" in name and "record" in name else TRACKS[0]


# ==== Logs ========================================================================================
def seed_in(name: str) -> int | None:
    """`seed_in("train_seed42.log")` is 42; None if the name holds no seed."""
    match = re.search(r"seed[_-]?(\d{1,18})(?!\d)", name) or re.search(r"_s?(\d{1,18})\.\w+$", name)
    return int(match[1]) if match else None


def read_seed_runs(
    root: Path, files: dict[str, int], faults: dict[str, str], texts: dict[str, str]
) -> list[SeedRun]:
    """Read every training log of the folder, with the evaluation files of the same seed."""
    names = [
        n
        for n in files
        if n.endswith((".log", ".txt"))
        and not re.search(
            rf"(^|/)(requirements[^/]*\.txt|eval_[^/]*\.log)$|^({READABLE}|tests?)/", n
        )
    ][:MOST_LOGS]
    runs = []
    for name in names:
        log = read_log_in(root, name, faults, texts)
        # A .log without steps and scores is damaged; such a .txt is some other text.
        if log is None or not (log.steps or log.scores or name.endswith(".log")):
            continue
        seed, called = log.seed, seed_in(name)
        key = called if called is not None else seed
        siblings = {
            kind: f"{kind}_seed{key}.{suffix}"
            for kind, suffix in (("eval", "log"), ("score", "json"), ("certificate", "json"))
        }
        score, certificate = (
            json_object(root, siblings[kind], files, faults) for kind in ("score", "certificate")
        )
        eval_log = (
            read_log_in(root, siblings["eval"], faults, texts)
            if siblings["eval"] in files
            else None
        )
        runs.append(
            SeedRun(seed if seed is not None else called, name, log, eval_log, score, certificate)
        )
    return runs


def read_log_in(
    root: Path, name: str, faults: dict[str, str], texts: dict[str, str]
) -> RunLog | None:
    """Read a log; None, with a fault noted, if it is no text."""
    left = LOG_LIMIT - sum(map(len, texts.values()))
    text = read_or_fault(read_text, root, name, faults, left)
    if text is None:
        return None
    texts[name] = text
    if text.count("\0") > len(text) // 100 or not text.strip():
        faults[name] = "no text" if text.strip() else "empty"
    return parse_log(text)


def json_object(
    root: Path, name: str, files: dict[str, int], faults: dict[str, str]
) -> dict[str, Any] | None:
    """Read a JSON object; None, with a fault noted, if it is none."""
    data = read_or_fault(read_json, root, name, faults) if name in files else None
    if data is not None and not isinstance(data, dict):
        faults[name] = f"a JSON {type(data).__name__}, no object"
    return data if isinstance(data, dict) else None


# ==== What is claimed, and of which runs ==========================================================
def decimals_in(text: str) -> int:
    """`decimals_in("1.14")` is 2."""
    return len(text.partition(".")[2]) if "e" not in text else 8


def equals_rounded(stated: float, real: float, stated_text: str = "") -> bool:
    """Tell whether `said` is `real`, rounded or cut to the decimals that it is written with."""
    return abs(stated - real) <= 1.01 * 10.0 ** -min(
        max(decimals_in(stated_text or repr(stated)), 2), 8
    )


def read_claims(submission: Any) -> Claims:
    """Return the claims of a submission.json."""
    data = submission if isinstance(submission, dict) else {}
    submission_values = read_submission(data)
    alone = (
        [json_count(data.get("seed"))]
        if json_count(data.get("seed")) is not None and not submission_values.seeds
        else []
    )
    record = Claim(
        submission_values.val_bpb, submission_values.val_loss, submission_values.bytes_total
    )
    seeds = {
        seed: record if alone else Claim(None, None, None)
        for seed in [*(submission_values.seeds or []), *alone]
    }
    seeds |= {
        seed: Claim(r.val_bpb, r.val_loss, r.bytes)
        for seed, r in submission_values.seed_results.items()
    }
    return Claims(
        record, submission_values.bytes_code, dict(list(seeds.items())[:MOST_SEEDS]), data
    )


def scoring_log(run: SeedRun) -> RunLog:
    """Return the log that holds the run's score: the evaluation's if it has one, else
    training's.
    """
    return run.eval_log if run.eval_log is not None and run.eval_log.final is not None else run.log


def final_score(run: SeedRun) -> LoggedScore | None:
    return scoring_log(run).final


def scoring_log_name(run: SeedRun) -> str:
    """Return the file name of `scoring_log(run)`."""
    return (
        run.name
        if scoring_log(run) is run.log
        else f"{'/'.join([*run.name.split('/')[:-1], ''])}eval_seed{run.seed}.log"
    )


def runs_claimed(runs: list[SeedRun], claims: Claims) -> list[SeedRun]:
    """Return the runs that the claim is about, one for each claimed seed.

    Without claimed seeds it is one for each seed logged. Other logs are of experiments. If the run
    of a claimed seed has another score, the run with the claimed score counts, under whatever seed.
    """
    left = list(runs)
    if not claims.seeds:
        return [
            nearest_run(left, seed, claims.record.bpb)
            for seed in dict.fromkeys(map(named_seed, left))
        ]
    chosen = []
    for seed, claim in claims.seeds.items():
        claimed = claims.record.bpb if claim.bpb is None else claim.bpb
        same = [run for run in left if named_seed(run) == seed]
        run = nearest_run(same, seed, claimed) if same else None
        if claim.bpb is not None and (run is None or not has_score(run, claim.bpb)):
            run = next((other for other in left if has_score(other, claim.bpb)), run)
        if run is not None:
            chosen.append(run)
            left.remove(run)
    return chosen or [
        nearest_run(left, seed, claims.record.bpb) for seed in dict.fromkeys(map(named_seed, left))
    ]


def named_seed(run: SeedRun) -> int | None:
    """Return the seed in the name of the log, else the one logged; if they differ, `seeds`
    fails.
    """
    called = seed_in(run.name) if "seed" in run.name else None
    return run.seed if called is None else called


def has_score(run: SeedRun, bpb: float) -> bool:
    """Tell whether the run's final score is `bpb`."""
    score = final_score(run)
    return score is not None and score.bpb is not None and equals_rounded(bpb, score.bpb)


def nearest_run(runs: list[SeedRun], seed: int | None, bpb: float | None) -> SeedRun:
    """Return the run of this seed whose score is nearest to `bpb`."""
    return min((run for run in runs if named_seed(run) == seed), key=lambda run: distance(run, bpb))


def distance(run: SeedRun, bpb: float | None) -> tuple[bool, float, bool, str]:
    """Return a sort key: runs with a score first, then by distance to `bpb`, then by name."""
    score = final_score(run)
    known = score is not None and score.bpb is not None
    far = round(abs(score.bpb - bpb), 6) if known and bpb is not None else 0.0
    return not known, far, "seed" not in run.name, run.name
