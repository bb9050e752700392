"""Tokens a second of the experts and the mixture, how that changes with the size of the text, and what memory it takes.

    python bench/experts.py [--full | --quick] [--tokens N ...]

The text is the embedded corpus, 4.0 million tokens, V = 1024, made longer by copies whose tokens are renamed by seeded
permutations (BOS stays), so that no copy repeats another. The neural columns are of a static bigram model of its first
million tokens, renamed alike: they cost the mixture what a transformer's would. The settings are the default ones, and
chunks are as large as in scoring: fill the n-gram, fill the match, mix, digest all states, commit. The clock stands
still while columns are made. Numbers are nanoseconds of one thread's own time; wall time, on a machine that others use
too, stands beside it. Every size runs in a process of its own.

`--full` adds the 62,021,846 tokens of the challenge's validation split, once on one thread and once on two, where the
n-gram is a chunk ahead of match and mixture; on two threads columns are made in the time that is measured. The first
tokens are also given to the plain-Python experts and mixture of the tests, which must agree to 1e-9; the ratio is
of the three parts that they have. The last line is JSON.
"""

import argparse
import gc
import glob
import hashlib
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import reference_experts  # noqa: E402
import reference_mixing  # noqa: E402

from fairway.scoring.commits import CHAIN_START, chained  # noqa: E402
from fairway.scoring.experts import match, ngram  # noqa: E402
from fairway.scoring.experts.mixing import Inputs, Mixture  # noqa: E402
from fairway.scoring.experts.temperature import TEMPERATURES, tempered  # noqa: E402
from fairway.scoring.mixed import COMMIT_ROWS, DEFAULT_EXPERTS, make_match, make_ngram  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from train_gpt import BOS_ID, UserError, need, read_shard  # noqa: E402

SINGLE = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
V, BYTES = 1024, 3  # vocabulary; bytes that every token is taken for
SIZES, QUICK, FULL = [1_000_000, 10_000_000], [100_000, 300_000], 62_021_846
REFERENCE, SAMPLES, RUNS = 200_000, 12, 3
PARTS = ("ngram", "match", "mixture", "commit")


# ==== THE TEXT ========================================================================================================
class Text:
    """`n` tokens, and what the bigram model, renamed as each copy is, holds for them."""

    def __init__(self, n: int):
        paths = sorted(glob.glob(str(ROOT / "data" / "embedded" / "*_train_*.bin")))
        need(paths, "no embedded corpus in data/embedded; run `make data`")
        base, rng = (
            np.concatenate([read_shard(p, V) for p in paths]).astype(np.uint16),
            np.random.default_rng(0),
        )
        self.base, others, self.names = (
            base.astype(np.int64),
            np.delete(np.arange(V), BOS_ID),
            [np.arange(V)],
        )
        for _ in range(n // len(base)):
            self.names.append(np.arange(V))
            self.names[-1][others] = rng.permutation(others)
        self.plain = [np.argsort(names) for names in self.names]
        self.tokens = np.concatenate([names.astype(np.uint16)[base] for names in self.names])[:n]
        self.model()

    def model(self) -> None:
        """Bigram counts, smoothed by the unigram's; columns of every row of one copy."""
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

    def inputs(self, first: int, grams: ngram.ContextCounts, matches: match.Matches) -> Inputs:
        rows = np.arange(first, first + len(matches.hint))
        at, copy = rows % len(self.base), (rows + 1) // len(self.base)
        hints = np.empty(len(rows), np.int64)
        for c in range(copy[0], copy[-1] + 1):
            hints[copy == c] = self.plain[c][np.maximum(matches.hint[copy == c], 0)]
        logp, sharp, flat, entropy = (
            self.columns[name][at] for name in ("logp", "sharp", "flat", "entropy")
        )
        return Inputs(
            logp,
            sharp,
            flat,
            self.logp[self.base[at], hints],
            entropy,
            grams,
            matches,
            self.tokens[first + 1 : first + 1 + len(rows)].astype(np.int64),
            np.full(len(rows), BYTES),
        )

    def distribution(self, row: int) -> np.ndarray:
        """float64[V] for the target of a row."""
        return self.p[self.base[row % len(self.base)]][self.plain[(row + 1) // len(self.base)]]


# ==== THE PASS ========================================================================================================
class Clock:
    """Seconds of each part: the thread's own, and by the wall."""

    def __init__(self):
        self.cpu, self.wall = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        cpu, wall = time.thread_time(), time.perf_counter()
        yield
        self.cpu[name] += time.thread_time() - cpu
        self.wall[name] += time.perf_counter() - wall


def ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same items, each made by another thread while the one before it is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item


def counted(
    tokens: np.ndarray, grams: ngram.NGram, clock: Clock
) -> Iterator[tuple[int, str, ngram.ContextCounts]]:
    """Chunk by chunk: first row, the expert's digest before it, evidence."""
    for first in range(0, len(tokens) - 1, COMMIT_ROWS):
        with clock.part("ngram"):
            evidence = grams.fill(tokens[first + 1 : first + 1 + COMMIT_ROWS])
        with clock.part("commit"):
            state = grams.digest()
        yield first, state, evidence


def sums(text: Text, row: int, grams: ngram.NGram, matches: match.Match, mixture: Mixture) -> float:
    """Worst |sum - 1| of the three distributions for the target of a row."""
    distributions = (
        grams.distribution(),
        matches.distribution(),
        mixture.distribution(text.distribution(row), grams.candidate_counts(), matches.hint()),
    )
    return max(abs(math.fsum(p) - 1) for p in distributions)


def whole_pass(text: Text, threads: int, samples: int = 0) -> dict[str, Any]:
    """All of it over the text, as scoring does it. With `samples`, distributions are looked at about so many places,
    which needs one thread."""
    tokens, cfg, clock, chain, told = (
        text.tokens,
        EvalConfig(),
        Clock(),
        CHAIN_START,
        time.perf_counter(),
    )
    grams, matches, mixture = (
        make_ngram(V, cfg, tokens),
        make_match(V, cfg),
        Mixture(V, cfg, DEFAULT_EXPERTS),
    )
    matches.fill(tokens[:1])
    out, worst, rows = np.empty(len(tokens) - 1), 0.0, len(tokens) - 1
    every, began = max(rows // max(samples, 1) // COMMIT_ROWS, 1) * COMMIT_ROWS, time.perf_counter()
    source = counted(tokens, grams, clock)
    for first, state, evidence in ahead(source) if threads == 2 else source:
        with clock.part("match"):
            found = matches.fill(tokens[first + 1 : first + 1 + COMMIT_ROWS])
        inputs = text.inputs(first, evidence, found)
        with clock.part("commit"):
            before = hashlib.sha256(
                (state + matches.digest() + mixture.digest()).encode()
            ).hexdigest()
        with clock.part("mixture"):
            logp = mixture.fill(inputs)
        with clock.part("commit"):
            out[first : first + len(logp)] = logp
            chain = chained(
                chain, first, len(logp), -float(logp.sum()), int(inputs.sizes.sum()), before
            ).chain
        if samples and (first + COMMIT_ROWS) % every == 0 and first + COMMIT_ROWS < rows:
            worst = max(worst, sums(text, first + COMMIT_ROWS, grams, matches, mixture))
        if time.perf_counter() - told > 5:
            told, part = time.perf_counter(), (first + len(logp)) / rows
            print(
                f"{rows + 1} tokens, threads:{threads} {100 * part:.0f} % eta:{(told - began) * (1 / part - 1):.0f}s",
                file=sys.stderr,
                flush=True,
            )
    return dict(
        cpu=clock.cpu,
        wall=clock.wall,
        seconds=time.perf_counter() - began,
        off_by=worst,
        chain=chain,
        nats=-float(out.mean()),
        table_bytes=grams.table.nbytes,
        filled=int(grams.counters[0]) / grams.capacity,
    )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << 20 if sys.platform == "darwin" else 1 << 10
    )


def measure(n: int, threads: int, runs: int) -> dict[str, Any]:
    """This process's size: passes over n tokens, after one over few that compiles."""
    whole_pass(Text(2 * COMMIT_ROWS), threads, 1)
    idle, text, found = peak_mib(), Text(n), []
    for _ in range(runs):
        gc.collect()
        found.append(whole_pass(text, threads))
    off_by = whole_pass(text, 1, SAMPLES)["off_by"] if runs > 1 else None
    return dict(
        tokens=n, threads=threads, runs=found, off_by=off_by, idle_mib=idle, peak_mib=peak_mib()
    )


def in_own_process(what: str, *arguments: int) -> dict[str, Any]:
    """`--measure` or `--plain`, on one core."""
    done = subprocess.run(
        [sys.executable, __file__, what, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | dict.fromkeys(SINGLE, "1"),
    )
    need(
        done.returncode == 0, f"{what} {arguments} stopped with status {done.returncode}; see above"
    )
    return json.loads(done.stdout)


# ==== PLAIN PYTHON ====================================================================================================
def plain_python(n: int) -> dict[str, Any]:
    """The first n tokens by the reference and by us: seconds of each part, and how far they are apart."""
    text, cfg = Text(n), EvalConfig()
    grams, matches = (
        reference_experts.ReferenceNGram(V, cfg.ngram_orders),
        reference_experts.ReferenceMatch(V, cfg.match_least),
    )
    mixture, slow, worst = reference_mixing.ReferenceMixture(V, cfg, DEFAULT_EXPERTS), {}, 0.0
    ours = [make_ngram(V, cfg, text.tokens), make_match(V, cfg)]
    ours[1].fill(text.tokens[:1])
    grams.update(int(text.tokens[0])), matches.update(int(text.tokens[0]))
    targets, evidence, found = (
        text.tokens[1:],
        ours[0].fill(text.tokens[1:]),
        ours[1].fill(text.tokens[1:]),
    )
    inputs = text.inputs(0, evidence, found)
    rows = reference_mixing.rows_of(inputs)
    for name, fill, mine in (
        ("ngram", lambda: grams.fill(targets)[1], ngram.ngram_probabilities(evidence, V)),
        ("match", lambda: matches.fill(targets)[1], match.match_probabilities(found, targets, V)),
        (
            "mixture",
            lambda: np.array(mixture.fill(rows)),
            Mixture(V, cfg, DEFAULT_EXPERTS).fill(inputs),
        ),
    ):
        print(f"plain Python: {name} over {n} tokens", file=sys.stderr, flush=True)
        began = time.thread_time()
        theirs = fill()
        slow[name], worst = (
            time.thread_time() - began,
            max(worst, float(np.abs(theirs - mine).max())),
        )
    passes = [whole_pass(text, 1)["cpu"] for _ in range(RUNS + 1)][1:]  # the first one compiles
    fast = [sum(cpu[name] for name in slow) for cpu in passes]
    return dict(
        tokens=n, seconds=slow, apart=worst, ratio=sum(slow.values()) / statistics.median(fast)
    )


# ==== WHAT IS PRINTED =================================================================================================
def per_token(
    found: dict[str, Any], kind: str, parts: tuple[str, ...]
) -> tuple[float, float, float]:
    """Nanoseconds: median, least, most of the runs."""
    each = [1e9 * sum(run[kind][p] for p in parts) / found["tokens"] for run in found["runs"]]
    return statistics.median(each), min(each), max(each)


def show(found: dict[str, Any]) -> None:
    for name, parts in (*((p, (p,)) for p in PARTS), ("all together", PARTS)):
        ns, low, high = per_token(found, "cpu", parts)
        wall = per_token(found, "wall", parts)[0]
        print(
            f"{found['tokens']:>10}  {found['threads']:>7}  {name:13}{1e3 / ns:9.2f}{ns:10.1f}  {low:7.1f} to "
            f"{high:6.1f}{wall:10.1f}",
            flush=True,
        )
    run = found["runs"][0]
    seconds = statistics.median(r["seconds"] for r in found["runs"])
    print(
        f"{found['tokens']:>10}  {found['threads']:>7}  by the wall, columns included, {seconds:.2f} s; peak memory "
        f"{found['peak_mib']:.0f} MiB ({found['idle_mib']:.0f} before); table {run['table_bytes'] / 2**20:.0f} MiB, "
        f"{100 * run['filled']:.0f} % full; {run['nats']:.4f} nats a token",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="sizes, instead of 1 and 10 million")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes: seconds instead of minutes"
    )
    parser.add_argument(
        "--full", action="store_true", help="62 million tokens too, on one thread and on two"
    )
    parser.add_argument("--measure", type=int, nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure or args.plain:
        print(json.dumps(measure(*args.measure) if args.measure else plain_python(args.plain)))
        return
    need(
        min(args.tokens or SIZES) > 1,
        f"--tokens {min(args.tokens or SIZES)}: at least 2 are needed to predict one",
    )
    sizes = args.tokens or (QUICK if args.quick else SIZES)
    print(
        f"{'tokens':>10}  {'threads':>7}  {'part':13}{'M/s':>9}{'cpu ns':>10}  {'least to most':>17}"
        f"{'wall ns':>10}",
        flush=True,
    )
    found = []
    for job in [(n, 1, RUNS) for n in sizes] + ([(FULL, 1, 1), (FULL, 2, 1)] if args.full else []):
        found.append(in_own_process("--measure", *job))
        show(found[-1])
    growth = (
        per_token(found[len(sizes) - 1], "cpu", PARTS)[0] / per_token(found[0], "cpu", PARTS)[0]
    )
    worst = max(one["off_by"] for one in found if one["off_by"] is not None)
    reference = in_own_process("--plain", REFERENCE // 20 if args.quick else REFERENCE)
    print(
        f"a token costs {growth:.2f} times as much at {sizes[-1]} tokens as at {sizes[0]} (target 1.5)"
    )
    print(
        f"distributions sum to 1 within {worst:.1e} (target 1e-12) at {SAMPLES - 1} places or more of each text"
    )
    print(
        f"plain Python over the first {reference['tokens']} tokens: {sum(reference['seconds'].values()):.2f} s, "
        f"{reference['ratio']:.0f} times ours (target 100); apart by {reference['apart']:.1e} at most (target 1e-9)"
    )
    print(
        json.dumps(
            {
                "bench": "experts",
                "growth": growth,
                "off_by": worst,
                "reference": reference,
                "rows": found,
            }
        )
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"experts: error: {e}")
