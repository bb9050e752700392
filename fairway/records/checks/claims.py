"""Hold what the record says of itself against its logs: numbers, seeds, headline, dates,
certificates.
"""

from __future__ import annotations

import datetime
import re
import statistics

from fairway.records.checks.base import (
    CheckFailed,
    CheckUndecided,
    artifact_bytes,
    by_run,
    claimed_runs,
    is_record_track,
    number_text,
    printed_code,
)
from fairway.records.folder import (
    MOST_SEEDS,
    Claim,
    RecordFolder,
    SeedRun,
    decimals_in,
    equals_rounded,
    final_score,
    named_seed,
    scoring_log,
    scoring_log_name,
    seed_in,
)
from fairway.records.schema import json_number
from fairway.records.trainer_source import EVAL_SETTINGS, FREE_ROLES, setting_roles

# Settings that may differ between seeds in code that declares no roles: places and names.
FREE_NAMES = re.compile(
    r"seed|run_id|.*(path|dir|file|files|folder|url)$|out_.*|logfile|datasets?|local_rank|rank|"
    r"device_name|"
    r"checkpoint|artifact.*|resume|train_shards|bytes|.*(time|name|date|hash|sha256|wandb|tag).*"
)


def check_stated_numbers(folder: RecordFolder) -> str:
    """README, submission.json and logs must state the same scores and sizes."""
    runs, claims = claimed_runs(folder), folder.claims
    compared = 0
    for run in runs:
        claim, score = claims.seeds.get(named_seed(run)), final_score(run)
        if claim is not None:
            compared += compare_seed(folder, run, claim)
        if score is not None and score.bpb is not None:
            compared += compare_row(folder, run, score.bpb)
    compared += compare_loss(folder, runs) + compare_code(folder) + compare_readme(folder)
    if not compared:
        raise CheckUndecided(
            "neither submission.json nor README.md names a number that the logs have"
        )
    return (
        f"{compared} numbers of {folder.submission_name or 'README.md'} and README.md are those of "
        "the logs"
    )


def compare_seed(folder: RecordFolder, run: SeedRun, claim: Claim) -> int:
    """Compare one seed of submission.json with its log; return how many numbers were compared."""
    score, compared = final_score(run), 0
    pairs = [
        ("val_bpb", claim.bpb, score and score.bpb),
        ("val_loss", claim.loss, score and score.loss),
    ]
    for name, stated, real in pairs:
        if stated is not None and real is not None:
            others = [
                getattr(s, name[4:])
                for s in scoring_log(run).scores
                if not s.diagnostic and getattr(s, name[4:])
            ]
            if not any(equals_rounded(stated, other) for other in others):
                raise CheckFailed(
                    f"seed {named_seed(run)}: {folder.submission_name} has {name} {stated:.10g}, "
                    f"{scoring_log_name(run)} has {real:.10g}"
                )
            compared += 1
    sizes = [
        size
        for size in (artifact_bytes(run), run.log.total_bytes, scoring_log(run).total_bytes)
        if size
    ]
    if claim.bytes is not None and sizes:
        if claim.bytes not in sizes:
            raise CheckFailed(
                f"seed {named_seed(run)}: {folder.submission_name} has {claim.bytes:,} bytes, "
                f"{scoring_log_name(run)} has "
                f"{' and '.join(f'{size:,}' for size in dict.fromkeys(sizes))}"
            )
        compared += 1
    return compared


def compare_row(folder: RecordFolder, run: SeedRun, bpb: float) -> int:
    """Compare a seed's row in a table of README.md with its log; return how many scores were
    compared.
    """
    for line in folder.readme.splitlines():
        cells = [cell.strip(" *`_") for cell in line[:2000].split("|")]
        if len(cells) < 4 or str(named_seed(run)) not in [
            re.sub(r"(?i)seed|[\s:=]", "", cell) for cell in cells[:3]
        ]:
            continue
        numbers = [
            text for cell in cells for text in re.findall(r"(?<![\d.,+-])\d\.\d{3,9}(?!\d)", cell)
        ]
        near = [text for text in numbers if abs(float(text) - bpb) < 0.2]
        compare_row_bytes(folder, run, line)
        if near:
            same = [other for other in folder.runs if named_seed(other) == named_seed(run)]
            known = [
                value
                for other in same
                for s in [*scoring_log(other).scores, *other.log.scores, *other.log.steps]
                for value in (s.bpb, s.loss)
                if value
            ]
            claimed = [
                s.bpb for other in same for s in [final_score(other)] if s is not None and s.bpb
            ] + [bpb]
            strange = [
                text
                for text in near
                if not any(equals_rounded(float(text), value, text) for value in known)
            ]
            if strange and not any(
                equals_rounded(float(text), value, text) for text in near for value in claimed
            ):
                raise CheckFailed(
                    f"seed {named_seed(run)}: README.md has {(strange or near)[-1]}, "
                    f"{scoring_log_name(run)} has {bpb:.8f}"
                )
            return 1
    return 0


# The size of an artifact in text: eight digits, grouped or not.
SIZE = re.compile(r"(?<![\d.,])1\d[, _]?\d{3}[, _]?\d{3}(?![\d,])")


def compare_row_bytes(folder: RecordFolder, run: SeedRun, row: str) -> None:
    """Compare the bytes in a seed's row with its artifact, with or without code."""
    artifact = artifact_bytes(run)
    known = {s.bytes for log in (run.log, scoring_log(run)) for s in log.sizes} | {
        (artifact or 0) + folder.code.bytes
    }
    for text in SIZE.findall(row[:2000]) if artifact else ():
        size = int(re.sub(r"\D", "", text))
        if size not in known and abs(size / artifact - 1) < 0.02:
            raise CheckFailed(
                f"seed {named_seed(run)}: README.md has "
                f"{size:,} bytes, {scoring_log_name(run)} has {artifact:,} without code"
                + (
                    f" and {scoring_log(run).total_bytes:,} with it"
                    if scoring_log(run).total_bytes
                    else ""
                )
            )


def compare_loss(folder: RecordFolder, runs: list[SeedRun]) -> int:
    """Compare the record's val_loss with the mean of its runs, or with one of them."""
    stated = folder.claims.record.loss
    losses = [
        s.loss for run in runs for s in [final_score(run)] if s is not None and s.loss is not None
    ]
    if stated is None or len(losses) < len(runs):
        return 0
    mean, bpbs = (
        statistics.fmean(losses),
        [s.bpb for run in runs for s in scoring_log(run).scores if s.bpb],
    )
    if any(equals_rounded(stated, b) for b in bpbs):
        return 0  # the check loss_field reports that
    others = [s.loss for run in runs for s in scoring_log(run).scores if s.loss]
    if not any(equals_rounded(stated, value) for value in [mean, *others]):
        raise CheckFailed(
            f"{folder.submission_name} has val_loss {stated:.10g}, the logs' mean is {mean:.8f}"
        )
    return 1


def compare_code(folder: RecordFolder) -> int:
    """Compare bytes_code with the code that ships or was logged."""
    stated = folder.claims.code
    logged = by_run(folder.record, lambda run: scoring_log(run).code_bytes)
    real = {sum(folder.code.shipped.values()), *logged.values(), *folder.code.shipped.values()}
    if stated is None or not folder.code.entries:
        return 0
    if stated not in real:
        raise CheckFailed(
            f"{folder.submission_name} has bytes_code {stated:,}; what ships has "
            f"{sum(folder.code.shipped.values()):,}"
            + "".join(f", {n} has {v:,}" for n, v in list(logged.items())[:1])
        )
    return 1


def compare_readme(folder: RecordFolder) -> int:
    """README.md must state the score and the bytes of submission.json, in the decimals it uses."""
    claim, compared = folder.claims.record, 0
    scores = re.findall(r"(?<![\d.,+-])\d\.\d{3,9}(?!\d)", folder.readme)
    if claim.bpb is not None and scores:
        if not any(
            equals_rounded(float(t), claim.bpb, t) or equals_rounded(claim.bpb, float(t))
            for t in scores
            if len(t) > 4
        ):
            raise CheckFailed(
                f"{folder.submission_name} has val_bpb {claim.bpb:.10g}, README.md has "
                f"{min(scores, key=lambda t: abs(float(t) - claim.bpb))}"
            )
        compared += 1
    sizes = {int(re.sub(r"\D", "", text)) for text in SIZE.findall(folder.readme)}
    known = {s.bytes for run in folder.runs for s in [*run.log.sizes, *scoring_log(run).sizes]} | {
        16_000_000,
        16_777_216,
    }
    near = [
        size
        for size in sizes - known
        if claim.bytes and size != claim.bytes and abs(size / claim.bytes - 1) < 0.02
    ]
    if claim.bytes is not None and sizes:
        if near and claim.bytes not in sizes:
            raise CheckFailed(
                f"{folder.submission_name} has {claim.bytes:,} bytes, README.md has "
                f"{near[0]:,}, which no log has"
            )
        compared += claim.bytes in sizes
    return compared


def check_loss_field(folder: RecordFolder) -> str:
    """val_loss must be in nats per token; bits per byte belong under val_bpb (#180)."""
    claims = folder.claims
    claimed = [
        ("", claims.record),
        *((f" of seed {seed}", claim) for seed, claim in claims.seeds.items()),
    ]
    scores = [s for run in folder.record for s in scoring_log(run).scores if s.bpb and s.loss]
    for whose, claim in claimed:
        if claim.loss is not None and claim.loss == claim.bpb:
            raise CheckFailed(
                f"val_loss{whose} is {number_text(claim.loss)}, and so "
                "is val_bpb: one of them is in the other's unit"
            )
        if (
            claim.loss is not None
            and scores
            and not any(equals_rounded(claim.loss, s.loss) for s in scores)
        ):
            near = min(scores, key=lambda s: abs(s.bpb - claim.loss))
            if abs(near.bpb - claim.loss) < 0.002:
                raise CheckFailed(
                    f"val_loss{whose} is {claim.loss:.8g}, which is the logs' "
                    f"val_bpb ({near.bpb:.8g}); their val_loss is {near.loss:.8g}"
                )
    stated = [claim.loss for _, claim in claimed if claim.loss is not None]
    if not stated:
        raise CheckUndecided("no val_loss is stated")
    return f"val_loss is {number_text(stated[0])}, in nats"


# ==== Seeds =======================================================================================
def check_seeds(folder: RecordFolder) -> str:
    """A record needs three seeds or more, each with its log, and none that ran may be left out."""
    claims, logged = folder.claims, {run.seed for run in folder.runs if run.seed is not None}
    listed = claims.data.get("seeds")
    listed = [s for s in listed[:MOST_SEEDS] if type(s) is int] if isinstance(listed, list) else []
    twice = sorted({s for s in listed if listed.count(s) > 1})
    if twice:
        raise CheckFailed(
            f"{folder.submission_name} lists seed {twice[0]} "
            f"{listed.count(twice[0])} times: seeds are distinct"
        )
    for run in folder.runs:
        called = seed_in(run.name) if "seed" in run.name else None
        if called is not None and run.log.seed is not None and called != run.log.seed:
            raise CheckFailed(
                f"{run.name} is called seed {called}, its log says seed:{run.log.seed}"
            )
    claimed = set(claims.seeds)
    for seed, run in zip(claims.seeds, folder.record, strict=False):
        own = claims.seeds[seed].bpb is not None and len(folder.record) == len(claimed)
        if own and run.seed not in (None, seed):
            raise CheckFailed(
                f"{folder.submission_name} has {claims.seeds[seed].bpb} for seed "
                f"{seed}; the log with that score, {run.name}, has seed {run.seed}"
            )
    absent = sorted(claimed - logged)
    if absent and logged and is_record_track(folder):
        raise CheckFailed(
            f"{folder.submission_name} claims seeds {seeds_text(claimed)}, and "
            f"there is no log of {seeds_text(absent)}"
        )
    left_out = (
        sorted((same_experiment(folder) | seeds_of_readme(folder)) - claimed) if claimed else []
    )
    if left_out and len(claimed) > 1 and is_record_track(folder):
        raise CheckFailed(
            f"seed {left_out[0]} was run, and "
            f"{folder.submission_name} names only {seeds_text(claimed)}"
        )
    seeds = claimed or logged
    if is_record_track(folder) and len(seeds) < 3:
        raise CheckFailed(f"{len(seeds)} seeds ({seeds_text(seeds)}); a record has 3 or more")
    if not seeds:
        raise CheckUndecided("no log states its seed")
    return f"{len(seeds)} seeds: {seeds_text(seeds)}"


def seeds_text(seeds: set[int] | list[int]) -> str:
    """`seeds_text({42, 7})` is "7, 42"; at most eight are listed."""
    shown_seeds = sorted(seeds)
    return ", ".join(map(str, shown_seeds[:8])) + (" …" if len(shown_seeds) > 8 else "") or "none"


def same_experiment(folder: RecordFolder) -> set[int]:
    """Return the seeds of logs next to those of the record that have the same kind of name."""
    homes = {(run.name.rpartition("/")[0], re.sub(r"\d+", "#", run.name)) for run in folder.record}
    return {
        run.seed
        for run in folder.runs
        if run.seed is not None
        and run.log.final is not None
        and (run.name.rpartition("/")[0], re.sub(r"\d+", "#", run.name)) in homes
    }


def seeds_of_readme(folder: RecordFolder) -> set[int]:
    """Return the seeds that have a row with scores in README.md's first table of seeds."""
    seeds: set[int] = set()
    inside = False
    for line in folder.readme.splitlines():
        cells = [cell.strip(" *`_") for cell in line.strip().strip("|").split("|")]
        if line.count("|") < 3:
            if inside:
                return seeds
        elif cells[0].lower() in ("seed", "seeds"):
            inside = True
        elif inside and re.fullmatch(r"\d{1,9}", cells[0]) and re.search(r"\d\.\d{3}", line):
            seeds.add(int(cells[0]))
    return seeds


def check_headline(folder: RecordFolder) -> str:
    """The score must be the mean over the seeds, not the best of them (#287)."""
    runs, stated = claimed_runs(folder), folder.claims.record.bpb
    if stated is None:
        raise CheckUndecided("no val_bpb is stated")
    scores = [
        s.bpb for run in runs for s in [final_score(run)] if s is not None and s.bpb is not None
    ]
    if not scores:
        raise CheckUndecided("no log has a final val_bpb")
    mean, best = statistics.fmean(scores), min(scores)
    for label, other in other_means(runs).items():
        if equals_rounded(stated, other) and not equals_rounded(stated, mean):
            return f"val_bpb {stated:.8g} is the mean of {len(runs)} runs' {label}, {other:.8f}"
    missing = len(folder.claims.seeds) > len(scores)
    seed_scores = [c.bpb for c in folder.claims.seeds.values() if c.bpb is not None]
    if missing and seed_scores and equals_rounded(stated, statistics.fmean(seed_scores)):
        raise CheckUndecided(
            f"val_bpb {stated:.8g} is the mean of "
            f"{len(seed_scores)} stated seeds, of which {len(scores)} have a score in their log"
        )
    if equals_rounded(stated, mean) or (len(scores) < 2 and equals_rounded(stated, best)):
        return f"val_bpb {stated:.8g} is the mean of {len(scores)} runs, {mean:.8f}"
    if len(scores) > 1 and equals_rounded(stated, best):
        raise CheckFailed(
            f"val_bpb {stated:.8g} is the best of {len(scores)} runs; their mean is {mean:.8f}"
        )
    if missing:
        raise CheckUndecided(
            f"val_bpb is {stated:.8g}; only {len(scores)} of its {len(folder.claims.seeds)} logs "
            "are there"
        )
    places = 1.5 * 10.0 ** -min(decimals_in(repr(stated)), 5)
    if abs(stated - mean) > places and not (
        seed_scores and equals_rounded(stated, statistics.fmean(seed_scores))
    ):
        raise CheckFailed(f"val_bpb is {stated:.8g}, the mean of the logs is {mean:.8f}")
    return f"val_bpb {stated:.8g} is the mean of {len(scores)} runs, {mean:.8f}"


def other_means(runs: list[SeedRun]) -> dict[str, float]:
    """Return the mean of every score that all runs state under one label; a record may claim any of
    them.
    """
    tables = [
        {s.label: s.bpb for s in scoring_log(run).scores if s.bpb is not None} for run in runs
    ]
    return {
        label: statistics.fmean(table[label] for table in tables)
        for label in tables[0]
        if all(label in table for table in tables)
    }


def check_same_code(folder: RecordFolder) -> str:
    """All seeds must have run the same code, by its hash, its text or its size as logged."""
    runs = claimed_runs(folder)
    for what, of in (
        ("the code's sha256", lambda r: r.log.hashes.get("code")),
        ("the code it prints", lambda r: printed_code(folder, r) or None),
        ("a code size of", lambda r: r.log.code_bytes),
    ):
        values = by_run(runs, of)
        if len(set(values.values())) > 1:
            (a, x), (b, y) = differing(values)
            lines = f"{len(x)} characters" if what == "the code it prints" else str(x)[:12]
            other = f"{len(y)} characters" if what == "the code it prints" else str(y)[:12]
            raise CheckFailed(f"{a} logs {what} {lines}, {b} {other}: one record, one code")
        if len(values) == len(runs):
            return f"{len(runs)} logs have one code, by {what.removesuffix(' of')}"
    raise CheckUndecided("the logs state neither hash nor text nor size of the code")
    return ""


def differing(values: dict[str, object]) -> tuple[tuple[str, object], tuple[str, object]]:
    """Return the first value, and the first one that differs from it."""
    items = list(values.items())
    return items[0], next(item for item in items if item[1] != items[0][1])


def check_same_settings(folder: RecordFolder) -> str:
    """Apart from seed and names, training and evaluation must have the same settings (#2124)."""
    runs = claimed_runs(folder)
    if len(runs) < 2:
        raise CheckUndecided("one run has nothing to differ from")
    roles = shipped_roles(folder)
    tables = {run.name: logged_settings(run, roles) for run in runs}
    (first, wanted), *others = tables.items()
    for name, settings in others:
        for key in sorted(wanted.keys() & settings.keys()):
            if wanted[key] != settings[key]:
                raise CheckFailed(
                    f"{key} is {wanted[key][:40]} in {first}, {settings[key][:40]} in {name}"
                )
    shared = set.intersection(*map(set, tables.values()))
    if not shared:
        raise CheckUndecided("the logs state no settings")
    return f"{len(shared)} settings are the same in {len(runs)} logs"


def logged_settings(run: SeedRun, roles: dict[str, str]) -> dict[str, str]:
    """Return the settings of a log and of its score_seed<N>.json that must be the same in all runs.

    In a log without steps, any line looks like a setting, so it has none.
    """
    settings = {
        name: value for name, value in run.log.settings.items() if len(name) > 2 and run.log.steps
    }
    scoring = run.score.get("settings") if run.score else None
    settings |= (
        {f"evaluation's {name}": str(value) for name, value in scoring.items()}
        if isinstance(scoring, dict)
        else {}
    )
    return {name: value for name, value in settings.items() if not is_free(name, roles)}


def is_free(name: str, roles: dict[str, str]) -> bool:
    """Tell whether a setting may differ between seeds: by its role, else by its name."""
    last = name.split()[-1].split(".")[-1]
    if last != "resume" and roles.get(last):  # a run that was resumed is still the same experiment
        return roles[last] in FREE_ROLES
    return bool(FREE_NAMES.fullmatch(last))


def shipped_roles(folder: RecordFolder) -> dict[str, str]:
    """Return the role of each setting that our sources in the folder declare."""
    roles: dict[str, str] = {}
    for name, source in folder.code.sources.items():
        own = name.split("!")[-1]
        for class_name in {"train_gpt.py": ["Config"], EVAL_SETTINGS: ["EvalConfig"]}.get(own, ()):
            roles |= setting_roles(source.text, class_name)
    return roles


# ==== Names and certificates ======================================================================
def check_date(folder: RecordFolder) -> str:
    """The folder must be called <date>_<name>, with the date of submission.json."""
    name, stated_text = folder.path.resolve().name, folder.claims.data.get("date")
    match = re.match(r"(\d{4}-\d\d-\d\d)_\S", name)
    dated = parse_date(match[1]) if match else None
    if dated is None:
        raise CheckFailed(f"the folder is called {name!r}; it takes YYYY-MM-DD_Name")
    if stated_text is None:
        raise CheckUndecided(f"no date is stated; the folder's is {dated}")
    stated = parse_date(stated_text[:10]) if isinstance(stated_text, str) else None
    if stated is None:
        raise CheckFailed(f"date is {str(stated_text)[:40]!r}; it takes YYYY-MM-DD")
    if stated != dated:
        raise CheckUndecided(f"the folder's date is {dated}, {folder.submission_name} has {stated}")
    return f"{dated}, in the folder's name and in {folder.submission_name}"


def parse_date(text: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return None


def check_certificate(folder: RecordFolder) -> str:
    """A certificate must have passed, for this artifact and this score."""
    runs = [run for run in folder.record if run.certificate is not None or run.score is not None]
    if not runs:
        raise CheckUndecided("no certificate lies next to the logs")
    for run in runs:
        judge_certificate(run)
    bare = [run.name for run in folder.record if run.certificate is None]
    if bare:
        raise CheckUndecided(f"{', '.join(bare[:3])} has no certificate")
    rules = runs[0].certificate.get("rules") if runs[0].certificate else None
    return (
        f"{len(runs)} certificates passed, of {len(rules) if isinstance(rules, list) else 0} rules "
        "each"
    )


def judge_certificate(run: SeedRun) -> None:
    """Fail if a rule failed, or if score, certificate and logs are of different artifacts."""
    data, score, logged = run.certificate or {}, run.score or {}, final_score(run)
    rules = data.get("rules")
    broken = (
        [r for r in rules if isinstance(r, dict) and r.get("verdict") == "FAIL"]
        if isinstance(rules, list)
        else []
    )
    if broken:
        raise CheckFailed(
            f"certificate_seed{run.seed}.json: rule {broken[0].get('rule')} FAIL: "
            f"{str(broken[0].get('figure'))[:160]}"
        )
    if run.certificate is not None and data.get("passed") is not True:
        raise CheckFailed(f"certificate_seed{run.seed}.json has passed: {data.get('passed')!r}")
    bpb = json_number(score.get("val_bpb"))
    if bpb is not None and logged is not None and logged.bpb is not None:
        if not equals_rounded(logged.bpb, bpb, "0.1234567"):
            raise CheckFailed(
                f"score_seed{run.seed}.json has val_bpb {bpb:.8f}, "
                f"{scoring_log_name(run)} has {logged.bpb:.8f}"
            )
    hashes = score.get("sha256")
    scored_hash = hashes.get("artifact") if isinstance(hashes, dict) else None
    logged_hash = scoring_log(run).hashes.get("artifact")
    if scored_hash is not None and logged_hash is not None and scored_hash != logged_hash:
        raise CheckFailed(
            f"score_seed{run.seed}.json is of artifact {str(scored_hash)[:12]}, "
            f"{scoring_log_name(run)} of {str(logged_hash)[:12]}"
        )
    trained = run.log.hashes.get("artifact")
    if None not in (trained, logged_hash) and trained != logged_hash:
        raise CheckFailed(
            f"{scoring_log_name(run)} scores artifact "
            f"{str(logged_hash)[:12]}, {run.name} made {str(trained)[:12]}"
        )


CLAIM_CHECKS = {
    "numbers": check_stated_numbers,
    "loss_field": check_loss_field,
    "seeds": check_seeds,
    "headline": check_headline,
    "same_code": check_same_code,
    "same_settings": check_same_settings,
    "date": check_date,
    "certificate": check_certificate,
}
