"""Hold the logs against the rules and against themselves: times, the split, figures that
cannot be.
"""

from __future__ import annotations

import hashlib
import math
import re

from fairway.records.checks.base import (
    LIMIT_SECONDS,
    PLAUSIBLE,
    CheckFailed,
    CheckUndecided,
    by_run,
    claimed_runs,
    is_record_track,
    named_vocabulary,
    printed_code,
)
from fairway.records.folder import RecordFolder, SeedRun, final_score, scoring_log, scoring_log_name
from fairway.records.logs import RunLog
from fairway.records.shipped_code import READABLE, CodeFile

# Scored targets of the challenge's split by tokenizer, with and without the tail, and its bytes,
# the same for all.
SPLIT_TOKENS = {
    62_021_632: "SP1024",
    40_540_160: "SP8192",
    47_851_520: "CaseOps SP8192",
    47_853_343: "CaseOps SP8192",
}
SPLIT_BYTES = 151_080_891
# SP1024 targets of the split before the data set was rebuilt (#837).
BEFORE_REBUILD = 63_779_840
# Tokens. A split is cut to a multiple of the sequence length; the longest so far is 32,768.
TAIL = 65_536
RATIO_SLACK = 3e-3  # of bytes per token; leaving out the split's tail changes less
PART_SLACK = 2e-2  # the same in training, where some validate on part of the split
NO_NUMBER = re.compile(r"(train_loss|val_loss|val_bpb): ?[+-]?(nan|inf)", re.I)
SELF_MADE = re.compile(
    r"(?i)(gptq|calib|hessian)[^\n]{0,120}(autoregressive|self.?gen|ar_self|random tokens)|"
    r"(autoregressive|self.?gen|ar_self)[^\n]{0,80}(gptq|calib|hessian)"
)
ON_CALIBRATION = re.compile(r"(?i)gptq|calib|hessian")
ON_VALIDATION = re.compile(
    r"(?im)^.*(calibrat|hessian)\w*[^\n]{0,80}\b(val|validation|fineweb_val)\b.*$"
)


def plain_text(folder: RecordFolder, run: SeedRun) -> str:
    """Return a log without the code that it may print."""
    text = folder.texts.get(run.name, "")
    return text.replace(run.log.source, "", 1) if run.log.source else text


# ==== Times =======================================================================================
def check_train_time(folder: RecordFolder) -> str:
    """Training must end at 600 s; the step under way may finish."""
    runs = claimed_runs(folder)
    times = by_run(runs, lambda run: run.log.train_seconds)
    if not times:
        raise CheckUndecided("no log states its training time")
    name, longest = max(times.items(), key=lambda item: item[1])
    if not is_record_track(folder):
        return f"{longest:,.1f} s at most, on a track without a limit"
    step = next((run.log.step_avg_ms or 0 for run in runs if run.name == name), 0) / 1000
    # April's steps are logged in tenths of a minute.
    slack = (
        max(2 * step, 0.5)
        if all(r.log.trained is not None or r.log.step_avg_ms for r in runs)
        else 6.0
    )
    if longest > LIMIT_SECONDS + slack:
        raise CheckFailed(f"{name} trained for {longest:,.1f} s; {LIMIT_SECONDS:.0f} are allowed")
    if len(times) < len(runs):
        raise CheckUndecided(
            f"{longest:.1f} s at most; {len(runs) - len(times)} of {len(runs)} logs state none"
        )
    return f"{longest:.1f} s at most of {LIMIT_SECONDS:.0f}"


def check_eval_time(folder: RecordFolder) -> str:
    """Evaluation must end within 600 s."""
    runs = claimed_runs(folder)
    times = by_run(runs, lambda run: scoring_log(run).eval_seconds or None)
    if not times:
        raise CheckUndecided("no log states how long evaluation took")
    name, longest = max(times.items(), key=lambda item: item[1])
    if is_record_track(folder) and longest > LIMIT_SECONDS:
        raise CheckFailed(
            f"{name} was evaluated for {longest:,.1f} s; {LIMIT_SECONDS:.0f} are allowed"
        )
    return f"{longest:,.1f} s at most" + (
        f" of {LIMIT_SECONDS:.0f}" if is_record_track(folder) else ", on a track without a limit"
    )


def check_calibration(folder: RecordFolder) -> str:
    """Calibration on training text is training time; none may use the validation split (#535,
    #728).
    """
    worst = None
    for run in claimed_runs(folder):
        lines = plain_text(folder, run).split("\n")
        text = "\n".join(line for line in lines if ON_CALIBRATION.search(line))
        bad = ON_VALIDATION.search(text)
        if bad and not SELF_MADE.search(text):
            raise CheckFailed(
                f"{run.name} calibrates on the validation split: {bad[0].strip()[:120]}"
            )
        took, trained = run.log.calibration_seconds, run.log.train_seconds
        if took is None or trained is None or SELF_MADE.search(text):
            continue
        # If the training time was printed after calibration, it includes it.
        called = max(
            (run.log.lines.get(name, 0) for name, s in run.log.times.items() if s == took),
            default=0,
        )
        total = trained if run.log.lines.get("train_time", 0) > called else trained + took
        worst = max(worst or (0.0, "", 0.0, 0.0), (total, run.name, trained, took))
    if worst is None:
        return "no calibration on training text after training"
    total, name, trained, took = worst
    if is_record_track(folder) and total > LIMIT_SECONDS + 0.5:
        raise CheckFailed(
            f"{name}: {trained:.1f} s of training + {took:.1f} s of "
            f"calibration = {total:.1f} s; both must fit {LIMIT_SECONDS:.0f}"
        )
    return f"training and calibration take {total:.1f} s at most"


def check_step_time(folder: RecordFolder) -> str:
    """Steps × milliseconds per step must be the time, to the log's precision; both must only
    grow.
    """
    compared = 0
    for run in claimed_runs(folder):
        before, clock = -1, -1.0
        for step in run.log.steps:
            if step.step < before:
                raise CheckFailed(
                    f"{run.name}:{step.line} step {step.step} comes after step {before}"
                )
            before = step.step
            if step.seconds is None:
                continue
            if step.seconds < clock - 0.001:
                raise CheckFailed(
                    f"{run.name}:{step.line} train_time {step.seconds:.1f} s comes after "
                    f"{clock:.1f} s"
                )
            clock = step.seconds
            if step.average_ms is not None and step.step >= 5:
                product = step.step * step.average_ms / 1000
                slack = (
                    0.01 * step.seconds
                    + 0.5
                    + step.step * 0.5 * 10.0 ** -decimal_places(step.average_ms) / 1000
                )
                if abs(product - step.seconds) > slack:
                    raise CheckFailed(
                        f"{run.name}:{step.line} {step.step} steps × {step.average_ms} ms = "
                        f"{product:,.1f} s, train_time is {step.seconds:,.1f} s"
                    )
                compared += 1
    if not compared:
        raise CheckUndecided("no log states both steps and milliseconds a step")
    return f"{compared} lines: steps × step_avg = train_time"


def decimal_places(value: float) -> int:
    return min(len(repr(value).partition(".")[2]), 2)


# ==== The split ===================================================================================
def implied_bytes(log: RunLog) -> float | None:
    """Return the bytes of the split behind a score: tokens × bits per token / bits per byte."""
    score = log.final
    if log.val_bytes is not None:
        return float(log.val_bytes)
    if score is None or not score.loss or not score.bpb or log.tokens is None:
        return None
    return log.tokens * score.loss / math.log(2) / score.bpb


def check_split(folder: RecordFolder) -> str:
    """The whole split must be scored, at its number of bytes (#1923, #2138).

    On the other track, all seeds must score one split.
    """
    runs = claimed_runs(folder)
    tokens = by_run(runs, lambda run: scoring_log(run).tokens or run.log.tokens)
    if len(set(tokens.values())) > 1:
        (a, x), (b, y) = (
            next((n, t) for n, t in tokens.items() if t == value)
            for value in sorted(set(tokens.values()))[:2]
        )
        raise CheckFailed(f"{a} scores {x:,} tokens, {b} {y:,}: one split for all seeds")
    if not tokens:
        raise CheckUndecided("no log states the validation tokens")
    number = next(iter(tokens.values()))
    split_bytes = by_run(
        runs, lambda run: implied_bytes(scoring_log(run)) or implied_bytes(run.log)
    )
    if not is_record_track(folder):
        low, high = min(split_bytes.values(), default=0), max(split_bytes.values(), default=0)
        if high - low > RATIO_SLACK * high + 1:
            raise CheckFailed(
                f"one log counts {low:,.0f} bytes, another {high:,.0f}: one split for all"
            )
        return f"{number:,} tokens, {high:,.0f} bytes, in all {len(tokens)} logs that state them"
    return challenge_split(number, next(iter(tokens)), split_bytes)


def challenge_split(number: int, name: str, split_bytes: dict[str, float]) -> str:
    """Fail if the bytes are not those of the challenge's split; return the line that names it."""
    known = next((kind for n, kind in SPLIT_TOKENS.items() if 0 <= n - number < TAIL), None)
    if number == BEFORE_REBUILD:
        return f"{number:,} tokens: the SP1024 split before it was rebuilt (#837)"
    for log, size in split_bytes.items():
        off = abs(size / SPLIT_BYTES - 1)
        if off > RATIO_SLACK + TAIL / number:
            raise CheckFailed(
                f"{log} counts {size:,.0f} bytes for {number:,} tokens; the split "
                f"has {SPLIT_BYTES:,}" + (f" ({known})" if known else ", whatever the tokenizer")
            )
    if not known and not split_bytes:
        raise CheckUndecided(
            f"{name} scores {number:,} tokens, no total known here, and states no bytes"
        )
    return f"{number:,} tokens ({known or 'a tokenizer of its own'})" + (
        f", {next(iter(split_bytes.values())):,.0f} bytes of {SPLIT_BYTES:,}" if split_bytes else ""
    )


def check_train_shards(folder: RecordFolder) -> str:
    """1,499 shards hold 40,000 of the 50,000 validation documents, by a faulty preparation
    (#2127).
    """
    shards = by_run(claimed_runs(folder), lambda run: run.log.train_shards)
    for name, number in shards.items():
        if number == 1499:
            raise CheckFailed(
                f"{name} has train_shards 1499: shards with validation documents among them (#2127)"
            )
    if not shards:
        raise CheckUndecided("no log states train_shards")
    if len(set(shards.values())) > 1 and is_record_track(folder):
        raise CheckFailed(
            f"the seeds trained on different data: train_shards "
            f"{', '.join(f'{n:,} in {name}' for name, n in list(shards.items())[:4])}"
        )
    return f"train_shards {next(iter(shards.values()))}"


# ==== Figures that cannot be ======================================================================
def loss_pairs(log: RunLog) -> list[tuple[int, float, float, float]]:
    """Return (line, nats per token, bits per byte, allowed deviation of their ratio) of lines with
    both.
    """
    rows = [(s.line, s.loss, s.bpb, 5.1e-5, PART_SLACK) for s in log.steps] + [
        (s.line, s.loss, s.bpb, 1e-8 if s.exact else 5.1e-5, RATIO_SLACK) for s in log.scores
    ]
    return [
        (line, loss, bpb, rounding / bpb + rounding / loss + slack)
        for line, loss, bpb, rounding, slack in rows
        if loss and bpb and loss > 0 and bpb > 0
    ]


def check_arithmetic(folder: RecordFolder) -> str:
    """Every line's val_loss and val_bpb must imply the same bytes per token."""
    compared, last = 0, 0.0
    for run in claimed_runs(folder):
        for log, name in dict.fromkeys(
            [(id(run.log), run.name), (id(scoring_log(run)), scoring_log_name(run))]
        ):
            log = run.log if log == id(run.log) else scoring_log(run)
            rows = loss_pairs(log)
            if not rows:
                continue
            stated = log.val_bytes / log.tokens if log.val_bytes and log.tokens else None
            exact = [pair for pair in rows if pair[3] < PART_SLACK] or rows
            middle = sorted(loss / math.log(2) / bpb for _, loss, bpb, _ in exact)[len(exact) // 2]
            for line, loss, bpb, slack in rows:
                ratio = loss / math.log(2) / bpb
                if abs(ratio / middle - 1) > slack:
                    raise CheckFailed(
                        f"{name}:{line} val_loss {loss} and val_bpb {bpb} "
                        f"imply {ratio:.4f} bytes per token, the other lines {middle:.4f}"
                    )
                if stated and abs(ratio / stated - 1) > slack:
                    raise CheckFailed(
                        f"{name}:{line} val_loss {loss} and val_bpb {bpb} imply {ratio:.4f} bytes "
                        f"per token, its split has {stated:.4f}"
                    )
                compared += 1
            last = middle
    if not compared:
        raise CheckUndecided("no log line has val_loss and val_bpb")
    return f"{compared} lines imply {last:.4f} bytes per token"


def check_loss_range(folder: RecordFolder) -> str:
    """No loss may be negative, NaN, above ln V after training began, or below any known model's."""
    lowest = math.inf
    for run in claimed_runs(folder):
        text = plain_text(folder, run)
        bad = NO_NUMBER.search(text)
        if bad:
            raise CheckFailed(
                f"{run.name} has {bad[0]} after {text[: bad.start()].count(chr(10))} lines"
            )
        vocabulary = run.log.vocab_size or named_vocabulary(run.log)
        limit = math.log(vocabulary) + 0.05 if vocabulary else math.inf
        for step in run.log.steps:
            if step.loss <= 0 or (step.bpb or 1) <= 0:
                raise CheckFailed(f"{run.name}:{step.line} {step.kind}_loss is {step.loss}")
            late = step.step >= max(100, (run.log.last_step or 0) // 4)
            if late and step.loss > limit:
                raise CheckFailed(
                    f"{run.name}:{step.line} {step.kind}_loss {step.loss} is above ln "
                    f"{vocabulary} = {limit - 0.05:.4f} at step {step.step}"
                )
        for score in scoring_log(run).scores:
            for what, value in (("val_loss", score.loss), ("val_bpb", score.bpb)):
                if value is not None and value <= 0:
                    raise CheckFailed(f"{scoring_log_name(run)}:{score.line} {what} is {value}")
        last = final_score(run)
        if last is not None and last.bpb is not None:
            lowest = min(lowest, last.bpb)
            if last.loss is not None and last.loss > limit:
                raise CheckFailed(
                    f"{scoring_log_name(run)}:{last.line} val_loss {last.loss} is "
                    f"above ln {vocabulary} = {limit - 0.05:.4f}"
                )
    if lowest == math.inf:
        raise CheckUndecided("no log has a final val_bpb")
    if is_record_track(folder) and lowest < PLAUSIBLE:
        raise CheckUndecided(
            f"val_bpb {lowest:.6f}: no model of 16 MB is known to reach {PLAUSIBLE} on this split",
            [f"{scoring_log_name(claimed_runs(folder)[0])} val_bpb {lowest:.6f}"],
        )
    return f"final val_bpb {lowest:.6f} and better than chance from the start on"


def check_log_whole(folder: RecordFolder) -> str:
    """Each log, of training and of evaluation, must reach its final score."""
    logs = [
        (name, log)
        for run in claimed_runs(folder)
        for name, log in ((run.name, run.log), (scoring_log_name(run), run.eval_log))
        if log is not None
    ]
    for name, log in logs:
        last = (
            f"last step {log.last_step} of {log.planned_steps}"
            if log.last_step is not None
            else "no step"
        )
        if log.final is None:
            raise CheckFailed(
                f"{name} ends without a final score after {log.text_lines:,} lines ({last})"
            )
        if log.cut:
            raise CheckFailed(f"{name} ends in the middle of a line")
        if log.runs > 1 and is_record_track(folder) and not log.steps:
            raise CheckFailed(f"{name} holds {log.runs} runs, the last of them without steps")
    return f"{len(logs)} logs end with a whole score"


# ==== Code and machine ============================================================================
def check_shipped_code(folder: RecordFolder) -> str:
    """The code that the logs show must be the code that ships (#1594, #1835)."""
    runs = claimed_runs(folder)
    if not folder.code.entries:
        raise CheckUndecided("no code ships")
    # A packed script's inner code and readable copy count too: a hash shows which of them ran.
    kin = [
        s
        for s in folder.code.sources.values()
        if s.name.split("!")[-1] in folder.code.entries
        or s.name in folder.code.shipped
        or s.name.startswith(f"{READABLE}/")
    ]
    ways = [
        stated
        for run in runs
        for stated in [compare_trainer(folder, run, kin), compare_scorer(folder, run)]
        if stated
    ]
    if not ways:
        raise CheckUndecided("the logs state neither text nor hash nor size of the code")
    return (
        f"the code of {len(runs)} logs is the code that ships, by its "
        f"{', '.join(dict.fromkeys(ways))}"
    )


def compare_trainer(folder: RecordFolder, run: SeedRun, kin: list[CodeFile]) -> str:
    """Return how the trainer was compared (sha256, text or size); "" if the log shows none of
    them.
    """
    entry, logged = folder.code.entries[0], run.log.hashes.get("code")
    if logged:
        hashes = {
            hashlib.sha256(data).hexdigest() for s in kin for data in (s.text.encode(), s.shipped)
        }
        own = hashlib.sha256(folder.code.sources[entry].text.encode()).hexdigest()
        if logged not in hashes:
            raise CheckFailed(
                f"{run.name} ran code {logged[:12]}; {entry} as it ships is {own[:12]}"
            )
        return "sha256"
    if source := printed_code(folder, run):
        texts = {
            text.strip() for s in kin for text in (s.text, s.shipped.decode("utf-8", "replace"))
        }
        other = next((s.name for s in folder.code.sources.values() if s.text.strip() == source), "")
        if other and source not in texts:
            raise CheckUndecided(f"{run.name} prints the code of {other}, not of {entry}")
        if source not in texts:
            raise CheckFailed(
                f"{run.name} prints code of {len(source):,} characters; {entry} as it ships "
                f"({len(folder.code.sources[entry].text):,}) differs "
                f"{first_difference(source, kin)}"
            )
        return "text"
    # Some logs also state the size that packing would give.
    stated = {s.bytes for s in run.log.sizes if s.kind == "code"}
    sizes = {size for s in kin for size in (len(s.shipped), len(s.text.encode()), len(s.text))} | {
        folder.code.bytes
    }
    if stated and not stated & sizes:
        raise CheckFailed(
            f"{run.name} states a code size of {max(stated, default=0):,}; {entry} has "
            f"{folder.code.shipped.get(entry, 0):,} bytes as it ships"
        )
    return "size" if stated else ""


def compare_scorer(folder: RecordFolder, run: SeedRun) -> str:
    """Compare the hashes in score_seed<N>.json with the files that ship; "" if it has none."""
    named = run.score.get("code") if run.score else None
    # The files inside an archive run, not the stubs.
    inner = [s for name, s in folder.code.sources.items() if "!" in name]
    ships = {
        s.name.split("!")[-1]: hashlib.sha256(s.shipped).hexdigest()
        for s in [*folder.code.running(), *inner]
    }
    compared = (
        [(name, ran, ships[name]) for name, ran in named.items() if name in ships]
        if isinstance(named, dict)
        else []
    )
    for name, ran, here in compared:
        if ran != here:
            raise CheckFailed(
                f"score_seed{run.seed}.json was made by a {name} of sha256 {str(ran)[:12]}; it "
                f"ships as {here[:12]}"
            )
    return "sha256 file by file" if compared else ""


def first_difference(text: str, kin: list[CodeFile]) -> str:
    """Return "from line N on", for the shipped source that is most alike."""
    lines = text.splitlines()
    same = max(
        (
            next(
                (
                    i
                    for i, (a, b) in enumerate(
                        zip(lines, s.text.strip().splitlines(), strict=False)
                    )
                    if a.rstrip() != b.rstrip()
                ),
                min(len(lines), len(s.text.splitlines())),
            )
            for s in kin
        ),
        default=0,
    )
    return f"from line {same + 1} on"


def check_hardware(folder: RecordFolder) -> str:
    """A record must be trained on eight H100."""
    runs = claimed_runs(folder)
    worlds, machines = (
        by_run(runs, lambda r: r.log.world_size),
        by_run(runs, lambda r: r.log.hardware),
    )
    ranks = ", ".join(sorted({str(world) for world in worlds.values()})) or "no"
    summary = f"{ranks} ranks, {next(iter(machines.values()), 'unnamed')}"
    if not is_record_track(folder):
        return f"{summary}, on a track for any machine"
    for name, world in worlds.items():
        if world != 8:
            raise CheckFailed(f"{name} has world_size {world}; a record is trained on 8")
    for name, machine in machines.items():
        if "H100" not in machine:
            raise CheckFailed(f"{name} ran on {machine[:60]}; a record is trained on 8xH100")
    claimed = folder.submission.get("hardware") if isinstance(folder.submission, dict) else None
    if isinstance(claimed, str) and "H100" not in claimed:
        raise CheckFailed(
            f"{folder.submission_name} has hardware {str(claimed)[:60]}; a record is trained on "
            "8xH100"
        )
    if not machines:
        raise CheckUndecided(f"{summary}: the logs name no machine")
    return summary


COURSE_CHECKS = {
    "train_time": check_train_time,
    "eval_time": check_eval_time,
    "calibration": check_calibration,
    "split": check_split,
    "train_shards": check_train_shards,
    "arithmetic": check_arithmetic,
    "loss_range": check_loss_range,
    "step_time": check_step_time,
    "log_whole": check_log_whole,
    "shipped_code": check_shipped_code,
    "hardware": check_hardware,
}
