"""A scorer on trial: every call checked, timed and answered for, on texts that are chosen to find it out."""

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
from train_gpt import BOS_ID, need

SHORTEST = 64  # a first call, and the least prefix; half of the least text
LEAST, LONGEST = 128, 4096  # of the excerpt that most rules rescore again and again
LEAST_LONG = 1024  # of what a few calls score, however slow the scorer: 128 tokens would not show what length hides


class Failed(Exception):
    """A rule is broken: one line, and numbers for the JSON."""

    def __init__(self, why: str, **details: Any):
        super().__init__(why)
        self.details = details


class CannotTell(Exception):
    """A rule cannot be judged with what was given."""


class TooSlow(BaseException):
    """Raised inside a scorer's call; not an Exception, or the scorer might swallow it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TooSlow after so long. Only POSIX, and only its main thread, can interrupt a call: elsewhere, no limit."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "setitimer"
    ):
        yield
        return

    def ring(signum: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gap(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """The largest difference and where it is; two NaN, or two equal infinities, do not differ."""
    if not len(a):
        return 0.0, 0
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    at = int(np.nan_to_num(apart, nan=np.inf).argmax())
    return float(np.nan_to_num(apart, nan=np.inf)[at]), at


class Trial:
    """A scorer, the text, and the time there is. Every call is checked for its shape, timed, and may fail the rule
    that made it. `x` is the excerpt that most rules rescore, `base` its first scores."""

    def __init__(
        self, scorer: Any, tokens: np.ndarray, claimed: np.ndarray | None, seconds: float, seed: int
    ):
        self.scorer, self.tokens, self.claimed, self.seconds = (
            scorer,
            np.asarray(tokens),
            claimed,
            seconds,
        )
        self.long: np.ndarray | None = (
            None  # scores of the longest prefix that there is time to score again
        )
        self.rng, self.dead, self.random_runs = np.random.default_rng(seed), "", []
        self.vocab_size, self.tolerance, self.per_token = 0, 0.0, 0.0
        self.x, self.base, self.kinds, self.reach = (
            self.tokens[:SHORTEST],
            np.zeros(SHORTEST - 1),
            {},
            SHORTEST,
        )
        try:
            self.meet()
        except Failed as e:
            self.dead = str(e)

    def meet(self) -> None:
        """Learn the vocabulary and the speed; choose the excerpt; score it for the first time."""
        try:
            self.vocab_size = int(getattr(self.scorer, "vocab_size", 0))
            self.tolerance = float(getattr(self.scorer, "tolerance", 0.0))
            need(math.isfinite(self.tolerance), "not finite", ValueError)
        except (TypeError, ValueError, OverflowError):
            self.tolerance = 0.0
            raise Failed("the scorer's vocab_size or tolerance is no number") from None
        if self.vocab_size < 1:
            held = self.call("distribution", np.array([BOS_ID, BOS_ID], self.tokens.dtype), 1)
            if np.ndim(held) != 1 or not np.issubdtype(np.asarray(held).dtype, np.number):
                raise Failed("distribution() at 1 returned no array of numbers")
            self.vocab_size = len(held)
        top = int(self.tokens.max())
        need(
            top < self.vocab_size,
            f"the text holds token {top}, but the scorer's vocabulary is {self.vocab_size}; "
            "give it shards that were written with its own tokenizer",
        )
        self.score(self.random_tokens(SHORTEST))  # compiles, warms caches
        length, took, rates = SHORTEST, 0.0, []
        while took < self.seconds / 100 and length < max(len(self.tokens), 4 * SHORTEST):
            length = 4 * length
            text, start = self.random_tokens(length), time.perf_counter()
            self.random_runs.append(self.score(text))
            took = time.perf_counter() - start
            rates.append(took / length)
        self.per_token = max(min(rates[-2:]), 1e-9)  # one of them may have met a busy machine
        half = len(self.tokens) // 2  # so that the whole is always longer, for the rule on claims
        size = int(
            np.clip(self.seconds / 150 / self.per_token, min(LEAST, half), min(LONGEST, half))
        )
        least = min(max(2 * size, LEAST_LONG), len(self.tokens))
        most = min(
            len(self.tokens), max(16 * length, LEAST_LONG)
        )  # not too far from what was timed
        self.reach = int(np.clip(self.seconds / 15 / self.per_token, least, most))
        self.x = np.array(self.tokens[:size])
        self.base = self.score(self.x)
        self.kinds = self.boundaries(self.tokens[: self.reach])

    def random_tokens(self, n: int) -> np.ndarray:
        return self.rng.integers(0, self.vocab_size, n).astype(self.tokens.dtype)

    def others(self, tokens: np.ndarray) -> np.ndarray:
        """As many random tokens, each another one than was there."""
        step = self.rng.integers(1, self.vocab_size, len(tokens))
        return ((tokens.astype(np.int64) + step) % self.vocab_size).astype(tokens.dtype)

    def call(self, name: str, tokens: np.ndarray, *more: int) -> Any:
        """One call of the scorer, on a copy of `tokens`: whatever goes wrong becomes one line."""
        if self.dead:
            raise Failed(self.dead)
        limit, what = max(self.seconds, 8.0), f"{name}() of {len(tokens):,} tokens"
        try:
            with time_limit(limit):
                return getattr(self.scorer, name)(np.array(tokens), *more)
        except TooSlow:
            self.dead = f"{what} gave no answer within {limit:g} s"
            raise Failed(self.dead) from None
        except (Exception, SystemExit) as e:
            line = (str(e).splitlines() or [""])[0][:80]
            raise Failed(f"{what} raised {type(e).__name__}: {line}") from None

    def numbers(self, values: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
        try:
            values = np.array(values, np.float64)
        except (TypeError, ValueError):
            raise Failed(f"{what} returned no array of numbers") from None
        if values.shape != shape:
            raise Failed(f"{what} returned shape {list(values.shape)}, not {list(shape)}")
        return values

    def score(self, tokens: np.ndarray) -> np.ndarray:
        return self.numbers(
            self.call("score", tokens), (len(tokens) - 1,), f"score() of {len(tokens):,} tokens"
        )

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        return self.numbers(
            self.call("distribution", tokens, i), (self.vocab_size,), f"distribution() at {i}"
        )

    def commits(self) -> list[Commit]:
        """The log of the last score()."""
        log = getattr(self.scorer, "commits", None)
        if log is None:
            raise CannotTell("the scorer keeps no commits")
        try:
            log = [
                Commit(int(c[0]), int(c[1]), float(c[2]), int(c[3]), str(c[4]), str(c[5]))
                for c in log
            ]
        except (TypeError, ValueError, LookupError, OverflowError):
            raise Failed("commits are not (first, count, nats, bytes, state, chain)") from None
        for k, c in enumerate(log):
            if not (0 <= c.first < 1 << 60 and 0 < c.count < 1 << 60):
                raise Failed(f"commit {k} is of {c.count} rows from {c.first} on", commit=k)
        return log

    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """float64[n, D]: the scorer's own."""
        try:
            read = np.array(self.call("embeddings", tokens), np.float64)
        except (TypeError, ValueError, RuntimeError):
            read = np.zeros(0)
        if read.ndim < 2 or len(read) != len(tokens):
            raise Failed(
                f"embeddings() of {len(tokens)} tokens returned no row of numbers for each"
            )
        return read.reshape(len(tokens), -1)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Rows at which something begins: each BOS, what the scorer names, and (it may keep silent) every 64th."""
        kinds = {
            "document": np.flatnonzero(tokens == BOS_ID) - 1,
            "multiple of 64": np.arange(64, len(tokens) - 1, 64),
        }
        if hasattr(self.scorer, "boundaries"):
            said = self.call("boundaries", tokens)
            try:
                kinds |= {
                    str(kind): np.asarray(rows, np.int64).ravel() for kind, rows in said.items()
                }
            except (AttributeError, TypeError, ValueError):
                raise Failed("boundaries() returned no dict of rows") from None
        return {kind: rows[(rows > 0) & (rows < len(tokens) - 2)] for kind, rows in kinds.items()}

    def long_scores(self) -> np.ndarray:
        """Of the longest prefix, rows [: reach - 1]: what was claimed for them, or else one score()."""
        if self.long is None:
            given = self.claimed is not None and len(self.claimed) == len(self.tokens) - 1
            self.long = (
                self.claimed[: self.reach - 1] if given else self.score(self.tokens[: self.reach])
            )
        return self.long

    def suspects(self) -> np.ndarray:
        """Rows of the excerpt, first those whose score most exceeds what the excerpt's own bigrams would give: whoever
        lifts few targets lifts those that are hard to know."""
        x = self.x.astype(np.int64)
        pairs, of, seen = np.unique(
            x[:-1] * self.vocab_size + x[1:], return_inverse=True, return_counts=True
        )
        contexts, targets = np.bincount(x[:-1])[x[:-1]], np.bincount(x[1:])[x[1:]] / (len(x) - 1)
        return np.argsort(
            -np.nan_to_num(self.base - np.log((targets + (seen[of] - 0.5) / contexts) / 2))
        )

    def rows(self, share: float, least: int, most: int) -> Iterator[int]:
        """Rows of the excerpt to test, by turns suspicious and random, no row twice: `least` of them, then more while
        they have taken less than this share of the time."""
        order = (
            np.stack([self.suspects(), self.rng.permutation(len(self.base))], axis=1)
            .ravel()
            .tolist()
        )
        yield from self.while_time(list(dict.fromkeys(order))[:most], share, least)

    def while_time(self, things: list, share: float, least: int) -> Iterator[Any]:
        start = time.perf_counter()
        for at, thing in enumerate(things):
            if at >= least and time.perf_counter() - start > share * self.seconds:
                return
            yield thing

    def need_same(
        self, got: np.ndarray, expected: np.ndarray, why: str, tolerance: float | None = None
    ) -> float:
        """The largest difference, where it is allowed."""
        apart, at = gap(got, expected)
        if apart > (self.tolerance if tolerance is None else tolerance):
            raise Failed(
                f"row {at} moved by {apart:.2g} nats {why}", row=at, apart=min(apart, 1e300)
            )
        return apart
