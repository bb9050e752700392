"""Test whether a new record is better than the old one by more than chance, in nats per token.

The rule asks for 0.005 nats per token better than the standing record at p < 0.01. Two tests are in
use, and both are printed. The one-sample test holds the new seeds against the old mean less the
bar, with n - 1 degrees of freedom. Welch's test holds the new seeds against the old ones, without a
bar. Both are one-sided, and a positive t is an improvement; #1019 printed Welch's with the other
sign.

A factor of the validation split turns bits per byte into nats per token: tokens, bytes, and so the
tokenizer. It comes from the logs, never from a table. Under another tokenizer, the old scores are
converted to tokens of the new one.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fairway.records.files import RecordError, read_json
from fairway.records.logs import LoggedScore, RunLog, read_log
from fairway.records.schema import read_submission

BAR = 0.005  # nats per token
LEVEL = 0.01
MOST_SEEDS = 1000  # seeds that an outlook tries at most
MOST_LOGS = 64  # logs of a folder that are read at most
NEAR = 6e-5  # BPB; a score cut to four digits is this near to its eight digits


# Number of seeds → (standard error of the gain, degrees of freedom).
Errors = Callable[[int], tuple[float, float]]


class SeedScores(NamedTuple):
    """The scores of a record by seed, and the size of the split they were measured on."""

    nats: list[float]  # per token, one for each seed
    bpb: list[float]
    tokens: int  # scored tokens of the split; 0 if no log states them
    bytes: int

    @property
    def factor(self) -> float:
        """Nats per token that equal one bit per byte."""
        return sum(self.nats) / sum(self.bpb)


class TTest(NamedTuple):
    """The result of one test; `missing` says what p < 0.01 still needs."""

    name: str
    t: float | None  # None if there are too few seeds for this test
    df: float | None
    p: float | None
    difference: tuple[float, float]  # old mean - new mean, in nats and BPB; positive is better
    missing: str  # what p < 0.01 still needs; "" if it is reached


# ==== The tests ===================================================================================
def one_sample(new: SeedScores, old_mean_nats: float, bar: float = BAR) -> TTest:
    """Test the new seeds against (old mean - bar)."""
    n, mean = len(new.nats), statistics.fmean(new.nats)
    better = old_mean_nats - mean
    difference = (better, better / new.factor)
    name = f"one sample, against {old_mean_nats:.6f} - {bar:g} nats"
    if n < 2:
        return TTest(
            name, None, None, None, difference, "one seed has no spread: 2 at least, 3 as a rule"
        )
    spread = statistics.stdev(new.nats)

    def at(seeds: int) -> tuple[float, float]:
        return spread / math.sqrt(seeds), seeds - 1

    return make_test(name, better - bar, n, at, difference)


def welch(new: SeedScores, old: SeedScores) -> TTest:
    """Test the new seeds against the old ones, which may differ in number and spread."""
    old_nats = in_tokens_of(new, old)
    n, m = len(new.nats), len(old_nats)
    better = statistics.fmean(old_nats) - statistics.fmean(new.nats)
    difference, name = (better, better / new.factor), "Welch, two samples"
    if min(n, m) < 2:
        which = "the new record has" if n < 2 else "the old record has"
        return TTest(name, None, None, None, difference, f"{which} one seed: 2 of each at least")
    a, b = statistics.variance(new.nats), statistics.variance(old_nats) / m

    def at(seeds: int) -> tuple[float, float]:
        mine = a / seeds
        below = mine**2 / (seeds - 1) + b**2 / (m - 1)
        return math.sqrt(mine + b), (mine + b) ** 2 / below if below > 0 else seeds + m - 2

    return make_test(name, better, n, at, difference)


def make_test(name: str, gain: float, n: int, at: Errors, difference: tuple[float, float]) -> TTest:
    """Return the test of a gain with the standard error and degrees of freedom of n seeds."""
    error, df = at(n)
    t = t_of(gain, error)
    p = upper_tail(t, df)
    return TTest(name, t, df, p, difference, "" if p < LEVEL else outlook(gain, n, at))


def t_of(gain: float, error: float) -> float:
    """Return gain / error; without spread, any gain is certain."""
    return gain / error if error > 0 else math.copysign(math.inf, gain) if gain else 0.0


def upper_tail(t: float, df: float) -> float:
    """Return the probability that Student's t with `df` degrees of freedom exceeds `t`."""
    from scipy.special import stdtr

    return float(stdtr(df, -t))


def outlook(gain: float, n: int, at: Errors) -> str:
    """Say how many seeds of this mean and spread reach p < 0.01, or how many nats more these seeds
    need.
    """
    from scipy.special import stdtrit

    error, df = at(n)
    lacking = float(stdtrit(df, 1 - LEVEL)) * error - gain
    these = "this seed" if n == 1 else f"these {n} seeds"
    more = f"{lacking:.6f} nats more with {these}"
    if gain <= 0:
        return f"no number of seeds, since the mean is {-gain:.6f} nats on the wrong side; {more}"
    wanted = next(
        (
            k
            for k in range(n + 1, MOST_SEEDS + 1)
            if upper_tail(t_of(gain, at(k)[0]), at(k)[1]) < LEVEL
        ),
        None,
    )
    if wanted is None:
        return f"more than {MOST_SEEDS} seeds of this mean and spread, or {more}"
    return f"{wanted} seeds of this mean and spread, or {more}"


def in_tokens_of(new: SeedScores, old: SeedScores) -> list[float]:
    """Return the old scores in nats per token of the new tokenizer, converted through BPB."""
    if abs(old.factor / new.factor - 1) < 0.001:  # four-digit scores differ by as much
        return old.nats
    return [bpb * new.factor for bpb in old.bpb]


# ==== Seeds of a record folder ====================================================================
def read_seeds(folder: Path) -> SeedScores:
    """Return the scores by seed of a record folder, in nats and BPB.

    They are the seeds of submission.json, with all digits of a log that shows the same score. If it
    lists no seeds: the logged scores of one label that include the headline, else the headline as
    one seed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RecordError(f"{folder} is no folder; name one with a submission.json and logs in it")
    file = next(iter(sorted(folder.glob("submission*.json"))), None)
    submission, logs = read_submission(read_json(file) if file else None), logs_by_seed(folder)
    if submission.seed_results:
        scores = {
            s: claimed_score(r.val_loss, r.val_bpb, logs.get(s, []))
            for s, r in submission.seed_results.items()
        }
    else:
        scores = logged_scores(logs, submission.val_bpb) or {
            -1: claimed_score(submission.val_loss, submission.val_bpb, [])
        }
    if not any(s.bpb is not None or s.loss is not None for s in scores.values()):
        raise RecordError(
            f"{folder} names no score: neither its submission.json nor a log in it has val_bpb"
        )
    tokens, size = split_size([log for seed in logs.values() for log in seed])
    factor = nats_per_bit(list(scores.values()), tokens, size)
    pairs = [nats_and_bpb(folder, seed, score, factor) for seed, score in scores.items()]
    return SeedScores([nats for nats, _ in pairs], [bpb for _, bpb in pairs], tokens, size)


def logs_by_seed(folder: Path) -> dict[int, list[RunLog]]:
    """Return the logs by seed, evaluations first; -1 is for logs without a seed."""
    by_seed: dict[int, list[RunLog]] = {}
    paths = sorted(
        p
        for pattern in ("*.log", "*.txt", "logs/*.log", "logs/*.txt")
        for p in folder.glob(pattern)
        if p.name != "requirements.txt" and p.is_file() and not p.is_symlink()
    )
    for path in sorted(
        paths[:MOST_LOGS], key=lambda p: (not p.name.startswith("eval"), "seed" not in p.name)
    ):
        log = read_log(path)
        named = re.search(r"seed[_-]?([0-9]{1,15})", path.name)
        seed = int(named[1]) if named else log.seed
        if log.final is not None:
            by_seed.setdefault(-1 if seed is None else seed, []).append(log)
    return by_seed


def claimed_score(loss: float | None, bpb: float | None, logs: list[RunLog]) -> LoggedScore:
    """Return the claimed score, with all digits if one of the logs has it."""
    near = [
        s
        for log in logs
        for s in reversed(log.scores)
        if s.exact and None not in (bpb, s.loss, s.bpb) and abs(s.bpb - bpb) < NEAR
    ]
    return near[0] if near else LoggedScore("", loss, bpb, False, None, 0)


def logged_scores(logs: dict[int, list[RunLog]], headline: float | None) -> dict[int, LoggedScore]:
    """Return the scores by seed under the last label that includes the headline; {} if none
    does.
    """
    labels = dict.fromkeys(
        s.label
        for log in [log for group in logs.values() for log in group]
        for s in (log.final, *reversed(log.scores))
        if s is not None
    )
    for label in labels:
        by_seed = {}
        for seed, group in logs.items():
            scores = [
                s
                for log in group
                for s in reversed(log.scores)
                if s.label == label and s.loss and s.bpb
            ]
            if scores:
                by_seed[seed] = (
                    min(scores, key=lambda s: abs(s.bpb - headline)) if headline else scores[0]
                )
        bpbs = [s.bpb for s in by_seed.values()]
        if bpbs and (headline is None or min(bpbs) - NEAR < headline < max(bpbs) + NEAR):
            return by_seed
    return {}


def split_size(logs: list[RunLog]) -> tuple[int, int]:
    """Return tokens and bytes of the validation split; 0 if no log states them."""
    tokens = next((log.tokens for log in logs if log.tokens), 0)
    return tokens, next(
        (log.val_bytes for log in logs if log.val_bytes and log.tokens == tokens), 0
    )


def nats_per_bit(scores: list[LoggedScore], tokens: int, size: int) -> float | None:
    """Return nats per token for one bit per byte, from the split's size, else from scores with
    both.
    """
    if tokens and size:
        return math.log(2) * size / tokens
    pairs = [s.loss / s.bpb for s in scores if s.loss and s.bpb]
    return statistics.median(pairs) if pairs else None


def nats_and_bpb(
    folder: Path, seed: int, score: LoggedScore, factor: float | None
) -> tuple[float, float]:
    """Return (nats, BPB) of a score; the one that is missing is computed by the factor."""
    whose = f"{folder.name}: seed {seed}" if seed >= 0 else f"{folder.name}: its one run"
    if not score.loss and (not score.bpb):
        raise RecordError(
            f"{whose} has neither val_loss nor val_bpb; add its log, or both to submission.json"
        )
    if score.loss and score.bpb:
        return score.loss, score.bpb
    have, lack = ("val_bpb", "val_loss") if score.bpb else ("val_loss", "val_bpb")
    if factor is None:
        raise RecordError(
            f"{whose} has {have} but no {lack}, and no log says how many tokens and bytes of "
            f"validation text it scored; add its log, or {lack} to submission.json"
        )
    return (score.bpb * factor, score.bpb) if score.bpb else (score.loss, score.loss / factor)


# ==== The table ===================================================================================
def significance_text(new: SeedScores, old: SeedScores) -> str:
    """Return both records and both tests as text, for a terminal or a README."""
    converted = in_tokens_of(new, old)
    lines = ["         seeds  nats      std       BPB       std       each (BPB)"]
    for name, nats, bpb in (("new", new.nats, new.bpb), ("old", converted, old.bpb)):
        spread = [f"{statistics.stdev(v):.6f}" if len(v) > 1 else "-       " for v in (nats, bpb)]
        lines.append(
            f"{name:8} {len(nats):5}  {statistics.fmean(nats):.6f}  {spread[0]}  "
            f"{statistics.fmean(bpb):.6f}  {spread[1]}  {' '.join(f'{v:.6f}' for v in bpb)}"
        )
    if converted is not old.nats:
        lines.append(
            f"another tokenizer or split: {statistics.fmean(old.nats):.6f} nats of the old are "
            f"{statistics.fmean(converted):.6f} for each token of the new"
        )
    for test in (one_sample(new, statistics.fmean(converted)), welch(new, old)):
        nats, bpb = test.difference
        statistic = (
            "no test"
            if test.t is None
            else f"t = {test.t:.2f}, df = {test.df:.2f}, p = {p_value_text(test.p)}"
        )
        verdict = "" if test.t is None else ", p < 0.01" if not test.missing else ", not p < 0.01"
        lines.append(
            f"{test.name}: {statistic}{verdict}; better by {nats:+.6f} nats, {bpb:+.6f} BPB"
        )
        lines += [f"    missing: {test.missing}"] if test.missing else []
    return "\n".join(lines)


def p_value_text(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1e}"
