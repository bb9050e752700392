"""Measure the experts and the mixture: speed, growth with the text, memory, exactness.

    python bench/experts.py [--full | --quick] [--tokens N ...]

The text is the embedded corpus in out/embedded1024, 4.0 million tokens, V = 1024. It is made longer
by copies whose tokens are renamed by seeded permutations (BOS stays), so that no copy repeats
another. The neural columns come from a static bigram model of its first million tokens, renamed
alike. They cost the mixture what a transformer's would. Settings are the defaults, and chunks are
as large as in scoring: fill the n-gram, fill the match, mix, digest all states, commit. The clock
stops while columns are made. Numbers are nanoseconds of one thread's own time; wall time stands
next to it. Every size runs in its own process.

`--full` adds the 62,021,846 tokens of the challenge's validation split, once on one thread and once
on two, where the n-gram works ahead of match and mixture as in scoring. On two threads the
measured time includes the columns. The plain-Python experts and mixture of the tests read the
first tokens too. They must agree to 1e-9; the ratio of times covers the three parts that they
have. The last line is JSON.
"""

import argparse
import gc
import hashlib
import importlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from short_run import ROOT

from fairway.scoring.commits import CHAIN_START, chained
from fairway.scoring.counting import CountedText, rows_ahead
from fairway.scoring.experts.match import Match, Matches, match_probabilities
from fairway.scoring.experts.mixing import Mixture, MixtureRows
from fairway.scoring.experts.ngram import ContextCounts, NGram, ngram_probabilities
from fairway.scoring.experts.temperature import TEMPERATURES, tempered
from fairway.scoring.mixed import COMMIT_ROWS, DEFAULT_EXPERTS, make_match, make_ngram
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, UserError, list_shards, read_shard

SINGLE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
V, BYTES = 1024, 3  # vocabulary; bytes that every token is taken for
FOLDER = "out/embedded1024"
PREPARE = f"python data/prepare.py --embedded --case-ops --tokenizer train:{V} --out {FOLDER}"
SIZES, QUICK, FULL = [1_000_000, 10_000_000], [100_000, 300_000], 62_021_846
REFERENCE, SAMPLES, RUNS = 200_000, 12, 3
PARTS = ("ngram", "match", "mixture", "commit")


# ==== THE TEXT ====================================================================================
class RenamedText:
    """`n` tokens, and what the bigram model, renamed as each copy is, says about them."""

    def __init__(self, n: int):
        paths = list_shards(ROOT / FOLDER / "*_train_*.bin")
        if not paths:
            raise UserError(f"no shards in {FOLDER}; run {PREPARE}")
        base = np.concatenate([read_shard(p, V) for p in paths]).astype(np.uint16)
        rng, others = np.random.default_rng(0), np.delete(np.arange(V), BOS_ID)
        self.base, self.names = base.astype(np.int64), [np.arange(V)]
        for _ in range(n // len(base)):
            self.names.append(np.arange(V))
            self.names[-1][others] = rng.permutation(others)
        self.original = [np.argsort(names) for names in self.names]
        self.tokens = np.concatenate([names.astype(np.uint16)[base] for names in self.names])[:n]
        self.count_bigrams()

    def count_bigrams(self) -> None:
        """Set the smoothed bigram model, and the columns of every row of one copy."""
        counts, known = np.zeros((V, V)), self.base[:1_000_000]
        np.add.at(counts, (known[:-1], known[1:]), 1.0)
        single = (counts.sum(0) + 1) / (counts + 1 / V).sum()
        self.p = (counts + 50 * single) / (counts.sum(1, keepdims=True) + 50)
        self.p /= self.p.sum(1, keepdims=True)
        tables, follower = {"logp": np.log(self.p)}, np.roll(self.base, -1)
        for name, t in TEMPERATURES.items():
            tables[name] = tempered(tables["logp"], t)
        self.logp = tables["logp"]
        self.columns = {name: table[self.base, follower] for name, table in tables.items()}
        self.columns["entropy"] = -(self.p * self.logp).sum(1)[self.base]

    def rows(self, first: int, counts: ContextCounts, matches: Matches) -> MixtureRows:
        """Return what the mixture reads about the rows from `first` on."""
        rows = np.arange(first, first + len(matches.hint))
        at, copy = rows % len(self.base), (rows + 1) // len(self.base)
        hints = np.empty(len(rows), np.int64)
        for c in range(copy[0], copy[-1] + 1):
            hints[copy == c] = self.original[c][np.maximum(matches.hint[copy == c], 0)]
        return MixtureRows(
            **{name: self.columns[name][at] for name in ("logp", "sharp", "flat", "entropy")},
            hint_logp=self.logp[self.base[at], hints],
            counts=counts,
            matches=matches,
            targets=self.tokens[first + 1 : first + 1 + len(rows)].astype(np.int64),
            sizes=np.full(len(rows), BYTES),
        )

    def distribution(self, row: int) -> np.ndarray:
        """Return float64 [V] for the target of a row."""
        return self.p[self.base[row % len(self.base)]][self.original[(row + 1) // len(self.base)]]


# ==== THE PASS ====================================================================================
class Clock:
    """Seconds of each part: the thread's own, and by the wall."""

    def __init__(self):
        self.cpu, self.wall = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time of the block to a part."""
        cpu, wall = time.thread_time(), time.perf_counter()
        yield
        self.cpu[name] += time.thread_time() - cpu
        self.wall[name] += time.perf_counter() - wall


def timed_ngram(ngram: NGram, clock: Clock) -> NGram:
    """Let the clock count what the expert takes, in whichever thread it works."""
    fill = ngram.fill

    def timed_fill(targets: np.ndarray) -> ContextCounts:
        with clock.part("ngram"):
            return fill(targets)

    ngram.fill = timed_fill
    return ngram


def worst_sum(text: RenamedText, row: int, ngram: NGram, match: Match, mixture: Mixture) -> float:
    """Return the worst |sum - 1| of the three distributions for the target of a row."""
    p = text.distribution(row)
    mixed = mixture.distribution(p, ngram.candidate_counts(), match.hint())
    return max(abs(math.fsum(q) - 1) for q in (ngram.distribution(), match.distribution(), mixed))


class Progress:
    """A line on stderr every five seconds."""

    def __init__(self, label: str, rows: int):
        self.label, self.rows, self.began = label, rows, time.perf_counter()
        self.last = self.began

    def update(self, done: int) -> None:
        """Report the rows that are done, if five seconds have passed."""
        now = time.perf_counter()
        if now - self.last > 5:
            self.last, share = now, done / self.rows
            eta = (now - self.began) * (1 / share - 1)
            print(f"{self.label} {share:.0%} eta:{eta:.0f}s", file=sys.stderr, flush=True)


def score_text(text: RenamedText, threads: int, samples: int = 0) -> dict[str, Any]:
    """Score a text as fairway does; return the times and the sizes.

    With `samples`, distributions are checked at about so many places, which needs one thread.
    """
    tokens, cfg, clock, chain = text.tokens, EvalConfig(), Clock(), CHAIN_START
    ngram, match = timed_ngram(make_ngram(V, cfg, tokens), clock), make_match(V, cfg)
    mixture = Mixture(V, cfg, DEFAULT_EXPERTS)
    match.fill(tokens[:1])
    counted = CountedText(ngram, tokens[1:], rows_ahead(cfg, threads))
    out, worst, rows = np.empty(len(tokens) - 1), 0.0, len(tokens) - 1
    every = max(rows // max(samples, 1) // COMMIT_ROWS, 1) * COMMIT_ROWS
    progress = Progress(f"{rows + 1} tokens, threads:{threads}", rows)
    for first in range(0, rows, COMMIT_ROWS):
        counts = counted.take(COMMIT_ROWS)
        with clock.part("commit"):
            state = counted.digest()
        with clock.part("match"):
            matches = match.fill(tokens[first + 1 : first + 1 + COMMIT_ROWS])
        chunk = text.rows(first, counts, matches)
        with clock.part("commit"):
            digests = state + match.digest() + mixture.digest()
            before = hashlib.sha256(digests.encode()).hexdigest()
        with clock.part("mixture"):
            logp = mixture.fill(chunk)
        with clock.part("commit"):
            end = first + len(logp)
            out[first:end] = logp
            nats, size = -float(logp.sum()), int(chunk.sizes.sum())
            chain = chained(chain, first, len(logp), nats, size, before).chain
        if samples and (first + COMMIT_ROWS) % every == 0 and first + COMMIT_ROWS < rows:
            worst = max(worst, worst_sum(text, first + COMMIT_ROWS, ngram, match, mixture))
        progress.update(end)
    counted.close()
    return dict(
        cpu=clock.cpu,
        wall=clock.wall,
        seconds=time.perf_counter() - progress.began,
        off_by=worst,
        chain=chain,
        nats=-float(out.mean()),
        table_bytes=ngram.table.nbytes,
        filled=int(ngram.counters[0]) / ngram.capacity,
    )


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure_size(n: int, threads: int, runs: int) -> dict[str, Any]:
    """Measure passes over n tokens, after a short pass that compiles."""
    score_text(RenamedText(2 * COMMIT_ROWS), threads, 1)
    idle, text, results = peak_mib(), RenamedText(n), []
    for _ in range(runs):
        gc.collect()
        results.append(score_text(text, threads))
    off_by = score_text(text, 1, SAMPLES)["off_by"] if runs > 1 else None
    return dict(
        tokens=n, threads=threads, runs=results, off_by=off_by, idle_mib=idle, peak_mib=peak_mib()
    )


def in_own_process(option: str, *arguments: int) -> dict[str, Any]:
    """Run `--measure` or `--plain` in a process of its own, on one core; return its JSON."""
    done = subprocess.run(
        [sys.executable, __file__, option, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(SINGLE, "1"),
    )
    if done.returncode:
        raise UserError(f"{option} {arguments} ended with exit code {done.returncode}; see above")
    return json.loads(done.stdout)


# ==== PLAIN PYTHON ================================================================================
def plain_python(n: int) -> dict[str, Any]:
    """Compare the first n tokens with the tests' references: times, and the worst difference."""
    sys.path.insert(0, str(ROOT / "tests"))
    experts, mixing = map(importlib.import_module, ("reference_experts", "reference_mixing"))
    text, cfg, slow, worst = RenamedText(n), EvalConfig(), {}, 0.0
    ngram, match = make_ngram(V, cfg, text.tokens), make_match(V, cfg)
    slow_ngram = experts.ReferenceNGram(V, cfg.ngram_orders)
    slow_match = experts.ReferenceMatch(V, cfg.match_least)
    slow_mixture = mixing.ReferenceMixture(V, cfg, DEFAULT_EXPERTS)
    match.fill(text.tokens[:1])
    slow_ngram.update(int(text.tokens[0]))
    slow_match.update(int(text.tokens[0]))
    targets = text.tokens[1:]
    counts, matches = ngram.fill(targets), match.fill(targets)
    rows = text.rows(0, counts, matches)
    slow_rows = mixing.rows_of(rows)
    mixed = Mixture(V, cfg, DEFAULT_EXPERTS).fill(rows)
    for name, fill, ours in (
        ("ngram", lambda: slow_ngram.fill(targets)[1], ngram_probabilities(counts, V)),
        ("match", lambda: slow_match.fill(targets)[1], match_probabilities(matches, targets, V)),
        ("mixture", lambda: np.array(slow_mixture.fill(slow_rows)), mixed),
    ):
        print(f"plain Python: {name} over {n} tokens", file=sys.stderr, flush=True)
        began = time.thread_time()
        reference = fill()
        slow[name] = time.thread_time() - began
        worst = max(worst, float(np.abs(reference - ours).max()))
    passes = [score_text(text, 1)["cpu"] for _ in range(RUNS + 1)][1:]  # the first one compiles
    fast = [sum(cpu[name] for name in slow) for cpu in passes]
    ratio = sum(slow.values()) / statistics.median(fast)
    return dict(tokens=n, seconds=slow, apart=worst, ratio=ratio)


# ==== REPORT ======================================================================================
def per_token(
    result: dict[str, Any], kind: str, parts: tuple[str, ...]
) -> tuple[float, float, float]:
    """Return nanoseconds a token: median, least and most of the runs."""
    each = [1e9 * sum(run[kind][p] for p in parts) / result["tokens"] for run in result["runs"]]
    return statistics.median(each), min(each), max(each)


def print_result(result: dict[str, Any]) -> None:
    """Print the rows of one size."""
    head = f"{result['tokens']:>10}  {result['threads']:>7}  "
    for name, parts in (*((p, (p,)) for p in PARTS), ("all together", PARTS)):
        ns, low, high = per_token(result, "cpu", parts)
        wall = per_token(result, "wall", parts)[0]
        print(
            f"{head}{name:13}{1e3 / ns:9.2f}{ns:10.1f}  {low:7.1f} to {high:6.1f}{wall:10.1f}",
            flush=True,
        )
    run = result["runs"][0]
    seconds = statistics.median(r["seconds"] for r in result["runs"])
    print(
        f"{head}by the wall, columns included, {seconds:.2f} s; peak memory "
        f"{result['peak_mib']:.0f} MiB ({result['idle_mib']:.0f} before); table "
        f"{run['table_bytes'] / 2**20:.0f} MiB, {100 * run['filled']:.0f} % full; "
        f"{run['nats']:.4f} nats a token",
        flush=True,
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="sizes, instead of 1 and 10 million")
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, not minutes")
    parser.add_argument(
        "--full", action="store_true", help="62 million tokens too, on one thread and on two"
    )
    parser.add_argument("--measure", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every size in its own process, then print the figures and one line of JSON."""
    options = parse_options()
    if options.measure or options.plain:
        part = measure_size(*options.measure) if options.measure else plain_python(options.plain)
        print(json.dumps(part))
        return
    sizes = options.tokens or (QUICK if options.quick else SIZES)
    if min(sizes) < 2:
        raise UserError(f"--tokens {min(sizes)}: at least 2 are needed to predict one")
    print(
        f"{'tokens':>10}  {'threads':>7}  {'part':13}{'M/s':>9}{'cpu ns':>10}  "
        f"{'least to most':>17}{'wall ns':>10}",
        flush=True,
    )
    results = []
    full = [(FULL, 1, 1), (FULL, 2, 1)] if options.full else []
    for job in [(n, 1, RUNS) for n in sizes] + full:
        results.append(in_own_process("--measure", *job))
        print_result(results[-1])
    largest, smallest = (per_token(results[i], "cpu", PARTS)[0] for i in (len(sizes) - 1, 0))
    worst = max(result["off_by"] for result in results if result["off_by"] is not None)
    reference = in_own_process("--plain", REFERENCE // 20 if options.quick else REFERENCE)
    print(
        f"a token costs {largest / smallest:.2f} times as much at {sizes[-1]} tokens as at "
        f"{sizes[0]} (target 1.5)\n"
        f"distributions sum to 1 within {worst:.1e} (target 1e-12) at {SAMPLES - 1} places or more "
        "of each text\n"
        f"plain Python over the first {reference['tokens']} tokens: "
        f"{sum(reference['seconds'].values()):.2f} s, {reference['ratio']:.0f} times ours (target "
        f"100); apart by {reference['apart']:.1e} at most (target 1e-9)"
    )
    summary = {"growth": largest / smallest, "off_by": worst, "reference": reference}
    print(json.dumps({"bench": "experts", **summary, "rows": results}))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"experts: error: {e}")
