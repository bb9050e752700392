"""What the record says of itself, held against its logs: numbers, seeds, the headline, dates, certificates."""

from __future__ import annotations

import datetime
import re
import statistics

from fairway.records.checks.base import each, fail_if, is_record, need_runs, shown, unknown_if
from fairway.records.checks.size import artifact_of
from fairway.records.folder import (
    MOST_SEEDS,
    Claim,
    Folder,
    SeedRun,
    agree,
    decimals,
    final,
    log_name,
    scored,
    seed_called,
    seed_in,
)
from fairway.records.schema import number

# Where a run lies and what it is called: the settings that may differ between the seeds of one record.
FREE = re.compile(
    r"seed|run_id|.*(path|dir|file|files|folder|url)$|out_.*|logfile|datasets?|local_rank|rank|"
    r"device_name|"
    r"checkpoint|artifact.*|resume|train_shards|bytes|.*(time|name|date|hash|sha256|wandb|tag).*"
)


def check_numbers(folder: Folder) -> str:
    """README, submission.json and logs name the same scores and sizes."""
    runs, said = need_runs(folder), folder.claims
    compared = 0
    for run in runs:
        claim, score = said.seeds.get(seed_called(run)), final(run)
        if claim is not None:
            compared += compare_seed(folder, run, claim)
        if score is not None and score.bpb is not None:
            compared += compare_row(folder, run, score.bpb)
    compared += compare_loss(folder, runs) + compare_code(folder) + compare_readme(folder)
    unknown_if(
        not compared, "neither submission.json nor README.md names a number that the logs have"
    )
    return f"{compared} numbers of {folder.submission_name or 'README.md'} and README.md are those of the logs"


def compare_seed(folder: Folder, run: SeedRun, claim: Claim) -> int:
    """One seed of submission.json against its log."""
    score, compared = final(run), 0
    pairs = [
        ("val_bpb", claim.bpb, score and score.bpb),
        ("val_loss", claim.loss, score and score.loss),
    ]
    for name, told, real in pairs:
        if told is not None and real is not None:
            others = [
                getattr(s, name[4:])
                for s in scored(run).scores
                if not s.diagnostic and getattr(s, name[4:])
            ]
            fail_if(
                not any(agree(told, other) for other in others),
                f"seed {seed_called(run)}: "
                f"{folder.submission_name} has {name} {told:.10g}, {log_name(run)} has {real:.10g}",
            )
            compared += 1
    sizes = [
        size for size in (artifact_of(run), run.log.total_bytes, scored(run).total_bytes) if size
    ]
    if claim.bytes is not None and sizes:
        fail_if(
            claim.bytes not in sizes,
            f"seed {seed_called(run)}: {folder.submission_name} has {claim.bytes:,} "
            f"bytes, {log_name(run)} has {' and '.join(f'{size:,}' for size in dict.fromkeys(sizes))}",
        )
        compared += 1
    return compared


def compare_row(folder: Folder, run: SeedRun, bpb: float) -> int:
    """The row of README.md's table that starts with this seed: one of its scores is the log's."""
    for line in folder.readme.splitlines():
        cells = [cell.strip(" *`_") for cell in line[:2000].split("|")]
        if len(cells) < 4 or str(seed_called(run)) not in [
            re.sub(r"(?i)seed|[\s:=]", "", cell) for cell in cells[:3]
        ]:
            continue
        found = [
            text for cell in cells for text in re.findall(r"(?<![\d.,+-])\d\.\d{3,9}(?!\d)", cell)
        ]
        near = [text for text in found if abs(float(text) - bpb) < 0.2]
        compare_row_bytes(folder, run, line)
        if near:
            same = [other for other in folder.runs if seed_called(other) == seed_called(run)]
            known = [
                value
                for other in same
                for s in [*scored(other).scores, *other.log.scores, *other.log.steps]
                for value in (s.bpb, s.loss)
                if value
            ]
            claimed = [
                s.bpb for other in same for s in [final(other)] if s is not None and s.bpb
            ] + [bpb]
            strange = [
                text for text in near if not any(agree(float(text), value, text) for value in known)
            ]
            fail_if(
                strange
                and not any(agree(float(text), value, text) for text in near for value in claimed),
                f"seed {seed_called(run)}: README.md has {(strange or near)[-1]}, {log_name(run)} has {bpb:.8f}",
            )
            return 1
    return 0


SIZE = re.compile(
    r"(?<![\d.,])1\d[, _]?\d{3}[, _]?\d{3}(?![\d,])"
)  # of an artifact: eight digits, grouped or not


def compare_row_bytes(folder: Folder, run: SeedRun, row: str) -> None:
    """The bytes in a seed's row: its artifact, with code or without."""
    artifact = artifact_of(run)
    known = {s.bytes for log in (run.log, scored(run)) for s in log.sizes} | {
        (artifact or 0) + folder.code.bytes
    }
    for text in SIZE.findall(row[:2000]) if artifact else ():
        size = int(re.sub(r"\D", "", text))
        fail_if(
            size not in known and abs(size / artifact - 1) < 0.02,
            f"seed {seed_called(run)}: README.md has "
            f"{size:,} bytes, {log_name(run)} has {artifact:,} without code"
            + (f" and {scored(run).total_bytes:,} with it" if scored(run).total_bytes else ""),
        )


def compare_loss(folder: Folder, runs: list[SeedRun]) -> int:
    """The record's val_loss is the mean of its runs', or one of them."""
    told = folder.claims.record.loss
    losses = [s.loss for run in runs for s in [final(run)] if s is not None and s.loss is not None]
    if told is None or len(losses) < len(runs):
        return 0
    mean, bpbs = (
        statistics.fmean(losses),
        [s.bpb for run in runs for s in scored(run).scores if s.bpb],
    )
    if any(agree(told, b) for b in bpbs):
        return 0  # loss_field tells that
    others = [s.loss for run in runs for s in scored(run).scores if s.loss]
    fail_if(
        not any(agree(told, value) for value in [mean, *others]),
        f"{folder.submission_name} has val_loss {told:.10g}, the logs' mean is {mean:.8f}",
    )
    return 1


def compare_code(folder: Folder) -> int:
    told = folder.claims.code
    logged = each(folder.record, lambda run: scored(run).code_bytes)
    real = {sum(folder.code.shipped.values()), *logged.values(), *folder.code.shipped.values()}
    if told is None or not folder.code.entries:
        return 0
    fail_if(
        told not in real,
        f"{folder.submission_name} has bytes_code {told:,}; what ships has "
        f"{sum(folder.code.shipped.values()):,}"
        + "".join(f", {n} has {v:,}" for n, v in list(logged.items())[:1]),
    )
    return 1


def compare_readme(folder: Folder) -> int:
    """The score and the bytes of submission.json stand in README.md, in as many decimals as that gives."""
    said, compared = folder.claims.record, 0
    scores = [text for text in re.findall(r"(?<![\d.,+-])\d\.\d{3,9}(?!\d)", folder.readme)]
    if said.bpb is not None and scores:
        fail_if(
            not any(
                agree(float(t), said.bpb, t) or agree(said.bpb, float(t))
                for t in scores
                if len(t) > 4
            ),
            f"{folder.submission_name} has val_bpb {said.bpb:.10g}, README.md has "
            f"{min(scores, key=lambda t: abs(float(t) - said.bpb))}",
        )
        compared += 1
    sizes = {int(re.sub(r"\D", "", text)) for text in SIZE.findall(folder.readme)}
    known = {s.bytes for run in folder.runs for s in [*run.log.sizes, *scored(run).sizes]} | {
        16_000_000,
        16_777_216,
    }
    near = [
        size
        for size in sizes - known
        if said.bytes and size != said.bytes and abs(size / said.bytes - 1) < 0.02
    ]
    if said.bytes is not None and sizes:
        fail_if(
            near and said.bytes not in sizes,
            f"{folder.submission_name} has {said.bytes:,} bytes, README.md has "
            f"{near[0] if near else 0:,}, which no log has",
        )
        compared += said.bytes in sizes
    return compared


def check_loss_field(folder: Folder) -> str:
    """val_loss is in nats a token; bits a byte stand under val_bpb (#180)."""
    said = folder.claims
    claimed = [
        ("", said.record),
        *((f" of seed {seed}", claim) for seed, claim in said.seeds.items()),
    ]
    scores = [s for run in folder.record for s in scored(run).scores if s.bpb and s.loss]
    for whose, claim in claimed:
        fail_if(
            claim.loss is not None and claim.loss == claim.bpb,
            f"val_loss{whose} is {shown(claim.loss)}, and so "
            "is val_bpb: one of them is in the other's unit",
        )
        if claim.loss is not None and scores and not any(agree(claim.loss, s.loss) for s in scores):
            near = min(scores, key=lambda s: abs(s.bpb - claim.loss))
            fail_if(
                abs(near.bpb - claim.loss) < 0.002,
                f"val_loss{whose} is {claim.loss:.8g}, which is the logs' "
                f"val_bpb ({near.bpb:.8g}); their val_loss is {near.loss:.8g}",
            )
    stated = [claim.loss for _, claim in claimed if claim.loss is not None]
    unknown_if(not stated, "no val_loss is stated")
    return f"val_loss is {shown(stated[0])}, in nats"


# ---- Seeds -----------------------------------------------------------------------------------------------------------
def check_seeds(folder: Folder) -> str:
    """A record has three seeds or more, each with its log; none that was run is left out."""
    said, logged = folder.claims, {run.seed for run in folder.runs if run.seed is not None}
    listed = said.data.get("seeds")
    listed = [s for s in listed[:MOST_SEEDS] if type(s) is int] if isinstance(listed, list) else []
    twice = sorted({s for s in listed if listed.count(s) > 1})
    fail_if(
        twice,
        f"{folder.submission_name} lists seed {twice[0] if twice else ''} "
        f"{listed.count(twice[0]) if twice else 0} times: seeds are distinct",
    )
    for run in folder.runs:
        called = seed_in(run.name) if "seed" in run.name else None
        fail_if(
            called is not None and run.log.seed is not None and called != run.log.seed,
            f"{run.name} is called seed {called}, its log says seed:{run.log.seed}",
        )
    claimed = set(said.seeds)
    for seed, run in zip(said.seeds, folder.record, strict=False):
        own = said.seeds[seed].bpb is not None and len(folder.record) == len(claimed)
        fail_if(
            own and run.seed not in (None, seed),
            f"{folder.submission_name} has {said.seeds[seed].bpb} for seed "
            f"{seed}; the log with that score, {run.name}, has seed {run.seed}",
        )
    absent = sorted(claimed - logged)
    fail_if(
        absent and logged and is_record(folder),
        f"{folder.submission_name} claims seeds {brief(claimed)}, and "
        f"there is no log of {brief(absent)}",
    )
    left_out = (
        sorted((same_experiment(folder) | seeds_of_readme(folder)) - claimed) if claimed else []
    )
    fail_if(
        left_out and len(claimed) > 1 and is_record(folder),
        f"seed {left_out[0] if left_out else ''} was run, and "
        f"{folder.submission_name} names only {brief(claimed)}",
    )
    seeds = claimed or logged
    if is_record(folder):
        fail_if(len(seeds) < 3, f"{len(seeds)} seeds ({brief(seeds)}); a record has 3 or more")
    unknown_if(not seeds, "no log states its seed")
    return f"{len(seeds)} seeds: {brief(seeds)}"


def brief(seeds: set[int] | list[int]) -> str:
    shown_seeds = sorted(seeds)
    return ", ".join(map(str, shown_seeds[:8])) + (" …" if len(shown_seeds) > 8 else "") or "none"


def same_experiment(folder: Folder) -> set[int]:
    """Seeds of the logs that lie beside those of the record, under the same kind of name."""
    homes = {(run.name.rpartition("/")[0], re.sub(r"\d+", "#", run.name)) for run in folder.record}
    return {
        run.seed
        for run in folder.runs
        if run.seed is not None
        and run.log.final is not None
        and (run.name.rpartition("/")[0], re.sub(r"\d+", "#", run.name)) in homes
    }


def seeds_of_readme(folder: Folder) -> set[int]:
    """Seeds with a row of their own in README.md's first table that has a column called seed, scores beside them."""
    found: set[int] = set()
    inside = False
    for line in folder.readme.splitlines():
        cells = [cell.strip(" *`_") for cell in line.strip().strip("|").split("|")]
        if line.count("|") < 3:
            if inside:
                return found
        elif cells[0].lower() in ("seed", "seeds"):
            inside = True
        elif inside and re.fullmatch(r"\d{1,9}", cells[0]) and re.search(r"\d\.\d{3}", line):
            found.add(int(cells[0]))
    return found


def check_headline(folder: Folder) -> str:
    """The score is the mean over the seeds, not the best of them (#287)."""
    runs, told = need_runs(folder), folder.claims.record.bpb
    unknown_if(told is None, "no val_bpb is stated")
    scores = [s.bpb for run in runs for s in [final(run)] if s is not None and s.bpb is not None]
    unknown_if(not scores, "no log has a final val_bpb")
    mean, best = statistics.fmean(scores), min(scores)
    for label, other in other_means(runs).items():
        if agree(told, other) and not agree(told, mean):
            return f"val_bpb {told:.8g} is the mean of {len(runs)} runs' {label}, {other:.8f}"
    missing = len(folder.claims.seeds) > len(scores)
    stated = [c.bpb for c in folder.claims.seeds.values() if c.bpb is not None]
    unknown_if(
        missing and stated and agree(told, statistics.fmean(stated)),
        f"val_bpb {told:.8g} is the mean of "
        f"{len(stated)} stated seeds, of which {len(scores)} have a score in their log",
    )
    if agree(told, mean) or (len(scores) < 2 and agree(told, best)):
        return f"val_bpb {told:.8g} is the mean of {len(scores)} runs, {mean:.8f}"
    fail_if(
        len(scores) > 1 and agree(told, best),
        f"val_bpb {told:.8g} is the best of {len(scores)} runs; their mean is {mean:.8f}",
    )
    unknown_if(
        missing,
        f"val_bpb is {told:.8g}; only {len(scores)} of its {len(folder.claims.seeds)} logs are there",
    )
    places = 1.5 * 10.0 ** -min(decimals(repr(told)), 5)
    fail_if(
        abs(told - mean) > places and not (stated and agree(told, statistics.fmean(stated))),
        f"val_bpb is {told:.8g}, the mean of the logs is {mean:.8f}",
    )
    return f"val_bpb {told:.8g} is the mean of {len(scores)} runs, {mean:.8f}"


def other_means(runs: list[SeedRun]) -> dict[str, float]:
    """Of scores that every run states under one label, the mean: a record may claim another than the last."""
    tables = [{s.label: s.bpb for s in scored(run).scores if s.bpb is not None} for run in runs]
    return {
        label: statistics.fmean(table[label] for table in tables)
        for label in tables[0]
        if all(label in table for table in tables)
    }


def check_same_code(folder: Folder) -> str:
    """All seeds ran the same code: by its hash, its text or its size as logged."""
    runs = need_runs(folder)
    for what, of in (
        ("the code's sha256", lambda r: r.log.hashes.get("code")),
        ("the code it prints", lambda r: printed_code(folder, r) or None),
        ("a code size of", lambda r: r.log.code_bytes),
    ):
        found = each(runs, of)
        if len(set(found.values())) > 1:
            (a, x), (b, y) = differing(found)
            lines = f"{len(x)} characters" if what == "the code it prints" else str(x)[:12]
            other = f"{len(y)} characters" if what == "the code it prints" else str(y)[:12]
            fail_if(True, f"{a} logs {what} {lines}, {b} {other}: one record, one code")
        if len(found) == len(runs):
            return f"{len(runs)} logs have one code, by {what.removesuffix(' of')}"
    unknown_if(True, "the logs state neither hash nor text nor size of the code")
    return ""


def printed_code(folder: Folder, run: SeedRun) -> str:
    """What the log prints as its code; where a file of the folder stands in that, the file's text, since launchers
    print lines of their own above it."""
    printed = run.log.source.strip()
    return next((text for text in texts_of(folder) if text in printed), printed)


def texts_of(folder: Folder) -> list[str]:
    """Of every source in the folder, as it ships and as it runs; the longest first."""
    texts = {
        text.strip()
        for s in folder.code.sources.values()
        for text in (s.text, s.shipped.decode("utf-8", "replace"))
    }
    return sorted((text for text in texts if len(text) > 200), key=lambda text: (-len(text), text))


def differing(found: dict[str, object]) -> tuple[tuple[str, object], tuple[str, object]]:
    items = list(found.items())
    return items[0], next(item for item in items if item[1] != items[0][1])


def check_same_settings(folder: Folder) -> str:
    """But for the seed and for names, the runs have the same settings (#2124), in training and in evaluation."""
    runs = need_runs(folder)
    unknown_if(len(runs) < 2, "one run has nothing to differ from")
    tables = {run.name: settings_of(run) for run in runs}
    (first, wanted), *others = tables.items()
    for name, found in others:
        for key in sorted(wanted.keys() & found.keys()):
            fail_if(
                wanted[key] != found[key],
                f"{key} is {wanted[key][:40]} in {first}, {found[key][:40]} in {name}",
            )
    shared = set.intersection(*map(set, tables.values()))
    unknown_if(not shared, "the logs state no settings")
    return f"{len(shared)} settings are the same in {len(runs)} logs"


def settings_of(run: SeedRun) -> dict[str, str]:
    """What the log states, and score_seed<N>.json of the evaluation. Of a log without steps any line looks like a
    setting, so that has none."""
    found = {
        name: value for name, value in run.log.settings.items() if len(name) > 2 and run.log.steps
    }
    scoring = run.score.get("settings") if run.score else None
    found |= (
        {f"evaluation's {name}": str(value) for name, value in scoring.items()}
        if isinstance(scoring, dict)
        else {}
    )
    return {
        name: value
        for name, value in found.items()
        if not FREE.fullmatch(name.split()[-1].split(".")[-1])
    }


# ---- Names and certificates ------------------------------------------------------------------------------------------
def check_date(folder: Folder) -> str:
    """The folder is called <date>_<what>, and submission.json has that date."""
    name, told = folder.path.resolve().name, folder.claims.data.get("date")
    found = re.match(r"(\d{4}-\d\d-\d\d)_\S", name)
    dated = day(found[1]) if found else None
    fail_if(dated is None, f"the folder is called {name!r}; it takes YYYY-MM-DD_Name")
    unknown_if(told is None, f"no date is stated; the folder's is {dated}")
    stated = day(told[:10]) if isinstance(told, str) else None
    fail_if(stated is None, f"date is {str(told)[:40]!r}; it takes YYYY-MM-DD")
    unknown_if(
        stated != dated, f"the folder's date is {dated}, {folder.submission_name} has {stated}"
    )
    return f"{dated}, in the folder's name and in {folder.submission_name}"


def day(text: str) -> datetime.date | None:
    try:
        return datetime.date.fromisoformat(text)
    except ValueError:
        return None


def check_certificate(folder: Folder) -> str:
    """Where there is a certificate: it passed, for this artifact and this score."""
    runs = [run for run in folder.record if run.certificate is not None or run.score is not None]
    unknown_if(not runs, "no certificate lies beside the logs")
    for run in runs:
        judge_certificate(run)
    bare = [run.name for run in folder.record if run.certificate is None]
    unknown_if(bare, f"{', '.join(bare[:3])} has no certificate")
    rules = runs[0].certificate.get("rules") if runs[0].certificate else None
    return f"{len(runs)} certificates passed, of {len(rules) if isinstance(rules, list) else 0} rules each"


def judge_certificate(run: SeedRun) -> None:
    data, score, logged = run.certificate or {}, run.score or {}, final(run)
    rules = data.get("rules")
    broken = (
        [r for r in rules if isinstance(r, dict) and r.get("verdict") == "FAIL"]
        if isinstance(rules, list)
        else []
    )
    fail_if(
        broken,
        f"certificate_seed{run.seed}.json: rule {broken[0].get('rule') if broken else ''} FAIL: "
        f"{str(broken[0].get('figure') if broken else '')[:160]}",
    )
    fail_if(
        run.certificate is not None and data.get("passed") is not True,
        f"certificate_seed{run.seed}.json has passed: {data.get('passed')!r}",
    )
    bpb = number(score.get("val_bpb"))
    if bpb is not None and logged is not None and logged.bpb is not None:
        fail_if(
            not agree(logged.bpb, bpb, "0.1234567"),
            f"score_seed{run.seed}.json has val_bpb {bpb:.8f}, "
            f"{log_name(run)} has {logged.bpb:.8f}",
        )
    hashes = score.get("sha256")
    scored_hash = hashes.get("artifact") if isinstance(hashes, dict) else None
    logged_hash = scored(run).hashes.get("artifact")
    fail_if(
        scored_hash is not None and logged_hash is not None and scored_hash != logged_hash,
        f"score_seed{run.seed}.json is of artifact {str(scored_hash)[:12]}, {log_name(run)} of "
        f"{str(logged_hash)[:12]}",
    )
    trained = run.log.hashes.get("artifact")
    fail_if(
        None not in (trained, logged_hash) and trained != logged_hash,
        f"{log_name(run)} scores artifact "
        f"{str(logged_hash)[:12]}, {run.name} made {str(trained)[:12]}",
    )


CHECKS = {
    "numbers": check_numbers,
    "loss_field": check_loss_field,
    "seeds": check_seeds,
    "headline": check_headline,
    "same_code": check_same_code,
    "same_settings": check_same_settings,
    "date": check_date,
    "certificate": check_certificate,
}
