"""A scorer on trial: each call is checked, timed and limited, on texts chosen to expose it."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from fairway.scoring.commits import Commit
from train_gpt import BOS_ID, UserError

SHORTEST = 64  # tokens of a first call and of the shortest prefix; half of the shortest text
LEAST, LONGEST = 128, 4096  # tokens of the excerpt that most rules score again and again
# Tokens that a few calls score, however slow the scorer is: 128 would not show a scorer that cheats
# on long texts only (the zoo's ShortHonest).
LEAST_LONG = 1024
# Seconds that one call may take. A first call may compile: with an empty Numba cache the first call
# of our own scorer took 24 s of processor time, and 112 s on two cores with seven busy processes
# each.
CALL_SECONDS = 180.0


class RuleBroken(Exception):
    """A rule is broken: one line for the table, and numbers for the JSON."""

    def __init__(self, why: str, **details: Any):
        super().__init__(why)
        self.details = details


class CannotTell(Exception):
    """A rule cannot be judged with what the scorer and the caller offer."""


class TooSlow(BaseException):
    """Raised inside a scorer's call. It is no Exception, because a scorer might catch those."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow in the body after `seconds`.

    Only the main thread of a POSIX process can interrupt a call; elsewhere there is no limit.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TooSlow

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def largest_difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Return the largest absolute difference and its index; two NaN, or two equal infinities, do
    not differ, and NaN differs infinitely from a number.
    """
    if not len(a):
        return 0.0, 0
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    difference = np.nan_to_num(difference, nan=np.inf)
    at = int(difference.argmax())
    return float(difference[at]), at


class Trial:
    """A scorer, the text and the time there is.

    `x` is the excerpt that most rules score again, `base` its first scores, `reach` the number of
    tokens of the longest prefix that there is time for, and `dead` why no call can be made any more
    ("" while calls work). Each call may break the rule that made it.
    """

    def __init__(
        self,
        scorer: Any,
        tokens: np.ndarray,
        claimed: np.ndarray | None,
        seconds: float,
        seed: int,
        call_seconds: float = CALL_SECONDS,
    ):
        self.scorer, self.tokens, self.claimed = scorer, np.asarray(tokens), claimed
        self.seconds, self.call_seconds = seconds, max(seconds, call_seconds)
        self.long: np.ndarray | None = None  # scores of the longest prefix, once they are needed
        self.rng, self.dead, self.random_runs = np.random.default_rng(seed), "", []
        self.vocab_size, self.tolerance, self.per_token = 0, 0.0, 0.0
        self.x, self.base = self.tokens[:SHORTEST], np.zeros(SHORTEST - 1)
        self.kinds, self.reach = {}, SHORTEST
        try:
            self.read_attributes()
            self.measure_speed()
            self.choose_excerpt()
        except RuleBroken as e:
            self.dead = str(e)

    # ==== THE START ===============================================================================
    def read_attributes(self) -> None:
        """Learn the vocabulary and the tolerance."""
        try:
            self.vocab_size = int(getattr(self.scorer, "vocab_size", 0))
            self.tolerance = float(getattr(self.scorer, "tolerance", 0.0))
            if not math.isfinite(self.tolerance):
                raise ValueError("not finite")
        except (TypeError, ValueError, OverflowError):
            self.tolerance = 0.0
            raise RuleBroken("the scorer's vocab_size or tolerance is no number") from None
        if self.vocab_size < 1:
            held = self.call("distribution", np.array([BOS_ID, BOS_ID], self.tokens.dtype), 1)
            if np.ndim(held) != 1 or not np.issubdtype(np.asarray(held).dtype, np.number):
                raise RuleBroken("distribution() at 1 returned no array of numbers")
            self.vocab_size = len(held)
        top = int(self.tokens.max())
        if top >= self.vocab_size:
            raise UserError(
                f"the text holds token {top}, but the scorer's vocabulary is {self.vocab_size}; "
                "give it shards that were written with its own tokenizer"
            )

    def measure_speed(self) -> None:
        """Score random tokens of growing length until a call takes a hundredth of the time; the
        canary reads the scores later.
        """
        self.score(self.random_tokens(SHORTEST))  # warm-up: compiles, fills caches
        length, took, rates = SHORTEST, 0.0, []
        while took < self.seconds / 100 and length < max(len(self.tokens), 4 * SHORTEST):
            length = 4 * length
            text, start = self.random_tokens(length), time.perf_counter()
            self.random_runs.append(self.score(text))
            took = time.perf_counter() - start
            rates.append(took / length)
        self.timed_length = length
        # The better of the last two, since a busy machine may have slowed one of them.
        self.per_token = max(min(rates[-2:]), 1e-9)

    def choose_excerpt(self) -> None:
        """Choose the excerpt and the longest prefix by the measured speed; score the excerpt."""
        half = len(self.tokens) // 2  # so that the full text is longer, for the rule on claims
        size = int(
            np.clip(self.seconds / 150 / self.per_token, min(LEAST, half), min(LONGEST, half))
        )
        least = min(max(2 * size, LEAST_LONG), len(self.tokens))
        # Not far beyond the length that was timed, because cost may grow faster than length.
        most = min(len(self.tokens), max(16 * self.timed_length, LEAST_LONG))
        self.reach = int(np.clip(self.seconds / 15 / self.per_token, least, most))
        self.x = np.array(self.tokens[:size])
        self.base = self.score(self.x)
        self.kinds = self.boundaries(self.tokens[: self.reach])

    # ==== TEXTS ===================================================================================
    def random_tokens(self, n: int) -> np.ndarray:
        """Return n uniform random tokens."""
        return self.rng.integers(0, self.vocab_size, n).astype(self.tokens.dtype)

    def replaced(self, tokens: np.ndarray) -> np.ndarray:
        """Return random tokens, each different from the one in `tokens`."""
        step = self.rng.integers(1, self.vocab_size, len(tokens))
        return ((tokens.astype(np.int64) + step) % self.vocab_size).astype(tokens.dtype)

    def text_of_two_chunks(self) -> np.ndarray:
        """Return the excerpt, or a longer prefix if the scorer's second chunk begins behind it."""
        second = int(self.kinds.get("chunk", np.zeros(0, np.int64)).min(initial=len(self.tokens)))
        if len(self.x) - 1 > second or second == len(self.tokens):
            return self.x
        return np.array(self.tokens[: second + SHORTEST])

    # ==== CALLS ===================================================================================
    def call(self, name: str, tokens: np.ndarray, *more: int) -> Any:
        """Call a method of the scorer on a copy of `tokens`; whatever goes wrong becomes one line.

        A call that exceeds the limit ends the trial: a scorer that hangs costs one limit in all.
        """
        if self.dead:
            raise RuleBroken(self.dead)
        what = f"{name}() of {len(tokens):,} tokens"
        try:
            with time_limit(self.call_seconds):
                return getattr(self.scorer, name)(np.array(tokens), *more)
        except TooSlow:
            self.dead = f"{what} gave no answer within {self.call_seconds:g} s"
            raise RuleBroken(self.dead) from None
        except (Exception, SystemExit) as e:
            line = (str(e).splitlines() or [""])[0][:80]
            raise RuleBroken(f"{what} raised {type(e).__name__}: {line}") from None

    def numbers(self, values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
        """Return an answer as float64 of this shape, or break the rule."""
        try:
            values = np.array(values, np.float64)
        except (TypeError, ValueError):
            raise RuleBroken(f"{what} returned no array of numbers") from None
        if values.shape != shape:
            raise RuleBroken(f"{what} returned shape {list(values.shape)}, not {list(shape)}")
        return values

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Return the scorer's log-probabilities, float64[n-1]."""
        return self.numbers(
            self.call("score", tokens), (len(tokens) - 1,), f"score() of {len(tokens):,} tokens"
        )

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        """Return the probabilities held for position i, float64[V]."""
        return self.numbers(
            self.call("distribution", tokens, i), (self.vocab_size,), f"distribution() at {i}"
        )

    def commits(self) -> list[Commit]:
        """Return the commit log of the last score()."""
        log = getattr(self.scorer, "commits", None)
        if log is None:
            raise CannotTell("the scorer keeps no commits")
        try:
            log = [
                Commit(int(c[0]), int(c[1]), float(c[2]), int(c[3]), str(c[4]), str(c[5]))
                for c in log
            ]
        except (TypeError, ValueError, LookupError, OverflowError):
            raise RuleBroken("commits are not (first, count, nats, bytes, state, chain)") from None
        for k, c in enumerate(log):
            if not (0 <= c.first < 1 << 60 and 0 < c.count < 1 << 60):
                raise RuleBroken(f"commit {k} has {c.count} rows from row {c.first} on", commit=k)
        return log

    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """Return the scorer's smeared embeddings, float64[n, D]."""
        try:
            read = np.array(self.call("embeddings", tokens), np.float64)
        except (TypeError, ValueError, RuntimeError):
            read = np.zeros(0)
        if read.ndim < 2 or len(read) != len(tokens):
            raise RuleBroken(
                f"embeddings() of {len(tokens)} tokens returned no row of numbers for each"
            )
        return read.reshape(len(tokens), -1)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return rows at which something begins, by kind: each BOS, each 64th row (in case the
        scorer names no boundaries), and what it names.
        """
        kinds = {
            "document": np.flatnonzero(tokens == BOS_ID) - 1,
            "multiple of 64": np.arange(64, len(tokens) - 1, 64),
        }
        if hasattr(self.scorer, "boundaries"):
            named = self.call("boundaries", tokens)
            try:
                kinds |= {
                    str(kind): np.asarray(rows, np.int64).ravel() for kind, rows in named.items()
                }
            except (AttributeError, TypeError, ValueError):
                raise RuleBroken("boundaries() returned no dict of rows") from None
        return {kind: rows[(rows > 0) & (rows < len(tokens) - 2)] for kind, rows in kinds.items()}

    def long_scores(self) -> np.ndarray:
        """Return the scores of the longest prefix, float64[reach - 1]: the claimed ones, or those
        of one call.
        """
        if self.long is None:
            if self.claimed is not None and len(self.claimed) == len(self.tokens) - 1:
                self.long = self.claimed[: self.reach - 1]
            else:
                self.long = self.score(self.tokens[: self.reach])
        return self.long

    # ==== SAMPLES =================================================================================
    def suspects(self) -> np.ndarray:
        """Return the rows of the excerpt, first those whose score exceeds the most what the
        excerpt's own bigram counts would give. A scorer that lifts few targets lifts hard ones.
        """
        x = self.x.astype(np.int64)
        _, pair, pair_counts = np.unique(
            x[:-1] * self.vocab_size + x[1:], return_inverse=True, return_counts=True
        )
        contexts, targets = np.bincount(x[:-1])[x[:-1]], np.bincount(x[1:])[x[1:]] / (len(x) - 1)
        expected = np.log((targets + (pair_counts[pair] - 0.5) / contexts) / 2)
        return np.argsort(-np.nan_to_num(self.base - expected))

    def rows(self, share: float, least: int, most: int) -> Iterator[int]:
        """Yield rows of the excerpt to test, suspicious and random ones in turn, none twice:
        `least` rows, then more, up to `most`, while they have taken less than `share` of the time.
        """
        order = np.stack([self.suspects(), self.rng.permutation(len(self.base))], axis=1).ravel()
        yield from self.while_time(list(dict.fromkeys(order.tolist()))[:most], share, least)

    def while_time(self, items: list, share: float, least: int) -> Iterator[Any]:
        """Yield `least` items, then more while they have taken less than `share` of the time."""
        start = time.perf_counter()
        for at, item in enumerate(items):
            if at >= least and time.perf_counter() - start > share * self.seconds:
                return
            yield item

    def check_same(self, scores: np.ndarray, expected: np.ndarray, why: str) -> float:
        """Return the largest difference if the tolerance allows it, else break the rule."""
        difference, at = largest_difference(scores, expected)
        if difference > self.tolerance:
            raise RuleBroken(
                f"row {at} moved by {difference:.2g} nats {why}",
                row=at,
                apart=min(difference, 1e300),  # JSON has no infinity
            )
        return difference
