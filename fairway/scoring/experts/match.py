"""The match expert: the token that followed the longest earlier match of the last tokens, and how far to trust it.

A hash of the last `least` tokens names a bucket of places where such a hash was met, the most recent first. Each is
compared with the text itself, token by token backwards, so a collision costs time and never makes a hint. A match
whose hint came true goes on to the next token; only then is nothing looked up.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts.state import (
    Chain,
    check_settings,
    check_tokens,
    inside,
    prefetch,
    reading_state,
    same_shape,
    write_state,
)
from train_gpt import BOS_ID, need

KIND = "match"
LONGEST = 512  # tokens compared; longer matches count as this long
BLOCK = 4096  # tokens
AHEAD = 12  # tokens: how early old text is asked for; its bucket is twice as early
WORD = (1 << 32) - 1
FACTOR = -7046029254386353131  # of the rolling hash: 0x9E3779B97F4A7C15 in a signed word
LARGEST_TABLE = 1 << 31  # buckets
POINTER, LENGTH, START = range(3)  # places in `running`
RECENT = 256.0  # hints that a rate remembers, at most: then both its counts are halved
# Rates before anything is learnt, by `group` of length, for hints just looked up and for those that go on from a hint
# that came true; each is worth PRIOR hints that are never forgotten, so no rate comes near 0 or 1. Rounded from 10
# million tokens of web text and 4 million of speeches, training text only. A match that was just looked up is often
# one that broke a token before: longer ones are then no surer. On that text a hint costs .808 and .864 bits (right or
# wrong), .818 and .874 with rates by length alone, .815 and .866 when nothing is forgotten.
PRIOR = 16.0
FRESH = (
    0.1,
    0.1,
    0.35,
    0.45,
    0.5,
    0.5,
    0.5,
    0.5,
    0.5,
    0.35,
    0.35,
    0.37,
    0.4,
    0.42,
    0.45,
    0.5,
    0.5,
    0.5,
    0.5,
    0.5,
    0.5,
    0.7,
    0.7,
    0.7,
    0.7,
)
GOING_ON = (
    0.3,
    0.3,
    0.45,
    0.5,
    0.55,
    0.57,
    0.58,
    0.59,
    0.59,
    0.6,
    0.64,
    0.68,
    0.72,
    0.76,
    0.79,
    0.81,
    0.83,
    0.87,
    0.91,
    0.95,
    0.965,
    0.975,
    0.985,
    0.993,
    0.997,
)
PRIORS = np.array([FRESH, GOING_ON])


class Matches(NamedTuple):
    """About m targets, before each was seen."""

    hint: np.ndarray  # int32 [m]: the token that followed the longest match, or -1
    length: np.ndarray  # uint16 [m]: of that match, verified, at most LONGEST; 0 without
    rate: (
        np.ndarray
    )  # float64 [m]: how often hints at such lengths were right so far, inside (0, 1)


# ==== MATCHING ========================================================================================================
@njit(cache=True, nogil=True)
def name_buckets(history, first, least, buckets, out):
    """The bucket of the `least` tokens before each of len(out) places from `first` on; -1 where there are fewer."""
    rolled, drop, at = 0, 1, max(first, least)
    for _ in range(least):
        drop *= FACTOR
    out[: min(len(out), at - first)] = -1
    for i in range(at - least, min(at, first + len(out) - 1)):
        rolled = (rolled + history[i] + 1) * FACTOR
    for j in range(at - first, len(out)):
        if j > at - first:
            i = first + j - 1
            rolled = (rolled + history[i] + 1 - (history[i - least] + 1) * drop) * FACTOR
        mixed = rolled ^ ((rolled >> 32) & WORD)
        out[j] = (((mixed * FACTOR) >> 32) & WORD) * buckets >> 32


@njit(cache=True, nogil=True, forceinline=True)
def longest(history, at, bucket, start, least):
    """Place after the longest match of the tokens before `at`, the most recent of equals, and its length; or -1, 0."""
    pointer, length = -1, 0
    for i in bucket:
        if i - least < start or i == 0:
            break  # what follows is older still
        same, most = 0, min(LONGEST, i - start)
        while same < most and history[i - 1 - same] == history[at - 1 - same]:
            same += 1
        if same >= least and same > length:
            pointer, length = i, same
    return pointer, length


@njit(cache=True, nogil=True, forceinline=True)
def group(length):
    """Lengths that share a rate: each up to 16, then from 17, 24, 32, 48, 64, 128, 256 and 512 on."""
    if length <= 16:
        return length
    return (
        17
        + (length >= 24)
        + (length >= 32)
        + (length >= 48)
        + (length >= 64)
        + (length >= 128)
        + (length >= 256)
        + (length >= 512)
    )


@njit(cache=True, nogil=True, forceinline=True)
def rate_of(rates, goes_on, length):
    """How often such hints were right so far, the prior's included."""
    g = group(length)
    return (rates[goes_on, g, 0] + PRIOR * PRIORS[goes_on, g]) / (rates[goes_on, g, 1] + PRIOR)


@njit(cache=True, nogil=True, forceinline=True)
def learn(counts, right):
    """One more hint, right or wrong, in counts [2]."""
    counts[0] += right
    counts[1] += 1
    if counts[1] > RECENT:
        counts[0], counts[1] = counts[0] / 2, counts[1] / 2


@njit(cache=True, nogil=True, forceinline=True)
def ask_early(history, table, candidates, names, j):
    """Ask for the bucket of a target a little ahead, and for the old text that the bucket of a nearer one names."""
    if j + 2 * AHEAD < len(names) and names[j + 2 * AHEAD] >= 0:
        prefetch(table, names[j + 2 * AHEAD] * candidates)
    if j + AHEAD < len(names) and names[j + AHEAD] >= 0:
        first = names[j + AHEAD] * candidates
        for i in table[first : first + candidates]:
            prefetch(history, i - 4)


@njit(cache=True, nogil=True, forceinline=True)
def remember(table, candidates, name, place):
    """Put a place first in its bucket; the oldest one falls out."""
    first = name * candidates
    for c in range(first + candidates - 1, first, -1):
        table[c] = table[c - 1]
    table[first] = place


@njit(cache=True, nogil=True, forceinline=True)
def look_up(history, table, candidates, running, name, at, least):
    """Place of the hint, length of its match, and 1 if it goes on from a hint that came true (0: it was looked up)."""
    if running[POINTER] >= 0:
        return running[POINTER], running[LENGTH], 1
    if name < 0:
        return -1, 0, 0
    pointer, length = longest(
        history, at, table[name * candidates : (name + 1) * candidates], running[START], least
    )
    return pointer, length, 0


@njit(cache=True, nogil=True)
def match_block(history, table, settings, running, rates, names, behind, at, matches):
    """Hints for targets history[at:at + m], each learnt from after it: `names` are their buckets, `behind` those of
    the places `delay` tokens before them, which become known."""
    least, delay, reset, candidates = settings
    hint, length, rate = matches
    for j in range(len(names)):
        ask_early(history, table, candidates, names, j)
        if delay and j + AHEAD < len(behind):
            prefetch(table, max(behind[j + AHEAD], 0) * candidates)
        t = at + j
        pointer, same, goes_on = look_up(history, table, candidates, running, names[j], t, least)
        hint[j], length[j], rate[j] = -1, same, 0.5
        running[POINTER] = -1
        if pointer >= 0:
            hint[j] = history[pointer]
            right = history[t] == hint[j]
            rate[j] = rate_of(rates, goes_on, same)
            learn(rates[goes_on, group(same)], right)
            if right:
                running[POINTER], running[LENGTH] = pointer + 1, min(same + 1, LONGEST)
        if reset and history[t] == BOS_ID:
            running[POINTER], running[START] = -1, t
            rates[:] = 0
        elif t - delay >= running[START] + least:
            remember(table, candidates, behind[j], t - delay)


@njit(cache=True, nogil=True)
def match_all(history, table, buckets, settings, running, rates, at, matches):
    """`match_block` over history[at:], a block at a time."""
    least, delay, reset, candidates = settings
    hint, length, rate = matches
    names, behind = np.empty((2, min(BLOCK, len(hint))), np.int64)
    for row in range(0, len(hint), BLOCK):
        m = min(BLOCK, len(hint) - row)
        name_buckets(history, at + row, least, buckets, names[:m])
        if delay:
            name_buckets(history, at + row - delay, least, buckets, behind[:m])
        rows = hint[row : row + m], length[row : row + m], rate[row : row + m]
        match_block(
            history,
            table,
            settings,
            running,
            rates,
            names[:m],
            behind[:m] if delay else names[:m],
            at + row,
            rows,
        )


@njit(cache=True, nogil=True)
def match_next(history, table, buckets, settings, running, rates, at):
    """Hint, length and rate for place `at`, where the text ends; changes nothing."""
    least, delay, reset, candidates = settings
    name = np.empty(1, np.int64)
    name_buckets(history, at, least, buckets, name)
    pointer, same, goes_on = look_up(history, table, candidates, running, name[0], at, least)
    if pointer < 0:
        return -1, 0, 0.5
    return int(history[pointer]), same, rate_of(rates, goes_on, same)


# ==== PROBABILITIES ===================================================================================================
@njit(cache=True, nogil=True)
def spread(matches, tokens, vocab_size, out):
    hint, length, rate = matches
    for j in range(len(out)):
        if hint[j] < 0:
            out[j] = 1.0 / vocab_size
        else:
            out[j] = rate[j] if tokens[j] == hint[j] else (1.0 - rate[j]) / (vocab_size - 1)


def probabilities(matches: Matches, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Of each of m targets: the rate for the hint, the rest evenly for all others; 1/V without a hint. float64 [m]."""
    out = np.empty(len(matches.hint))
    spread(tuple(matches), np.ascontiguousarray(tokens, dtype=np.uint16), vocab_size, out)
    return out


# ==== THE EXPERT ======================================================================================================
class Match:
    """Longest match of `least` tokens or more; `fill` scores and learns a text, the rest is one token at a time.

    `memory_bytes` bounds the table of places; the history itself takes 2 bytes a token more. With `delay` D a hint for
    position t is a token of tokens[:t - D], found by places in it; only how often hints were right is learnt at once.
    `reset` forgets everything, rates included, at each BOS, which then is the first token of its document.
    """

    def __init__(
        self,
        vocab_size: int,
        least: int = 8,
        memory_bytes: int = 1 << 26,
        delay: int = 0,
        reset: bool = False,
        candidates: int = 4,
    ):
        check_settings(vocab_size, delay)
        need(
            1 <= least <= LONGEST,
            f"a least match of {least} tokens is outside 1 to {LONGEST}; change it",
        )
        need(
            1 <= candidates <= 64,
            f"{candidates} candidates a bucket are outside 1 to 64; change it",
        )
        need(
            memory_bytes >= 4 * candidates,
            f"the match table's memory is {memory_bytes} bytes, but one bucket takes {4 * candidates}; raise it",
        )
        self.vocab_size, self.least, self.delay, self.reset, self.candidates = (
            vocab_size,
            least,
            delay,
            bool(reset),
            candidates,
        )
        self.buckets = min(memory_bytes // (4 * candidates), LARGEST_TABLE)
        self.table = np.zeros(
            self.buckets * candidates, np.int32
        )  # places after a context; 0 is none
        self.running = np.array([-1, 0, 0], np.int64)
        self.rates = np.zeros(
            (2, len(FRESH), 2)
        )  # by goes_on and group: hints that were right, all hints
        self.history, self.position = np.zeros(0, np.uint16), 0
        self.chain = Chain(f"{KIND} {self._settings().tolist()}")

    def _settings(self) -> np.ndarray:
        return np.array(
            [self.vocab_size, self.least, self.delay, self.reset, self.candidates, self.buckets],
            np.int64,
        )

    def _how(self) -> tuple[int, int, bool, int]:
        return self.least, self.delay, self.reset, self.candidates

    def fill(self, tokens: np.ndarray) -> Matches:
        """Hints for each token before it was seen, then learn it. How the text is cut into calls is no matter."""
        tokens = check_tokens(tokens, self.vocab_size, self.position)
        m, at = len(tokens), self.position
        if at + m > len(self.history):
            grown = np.zeros(at + m + (at + m) // 4, np.uint16)
            grown[:at] = self.history[:at]
            self.history = grown
        self.history[at : at + m] = tokens
        matches = Matches(np.empty(m, np.int32), np.empty(m, np.uint16), np.empty(m))
        match_all(
            self.history,
            self.table,
            self.buckets,
            self._how(),
            self.running,
            self.rates,
            at,
            tuple(matches),
        )
        self.position += m
        self.chain.feed(tokens)
        return matches

    def update(self, token: int) -> None:
        self.fill(np.array([token]))

    def side_by_side(self, streams: int, longest: int) -> list["Match"]:
        """Experts for streams of at most `longest` tokens that are read in step: each has its part of one history, in
        which all look for matches. Between two steps `end_at_unread` must be called."""
        history, found = (
            np.zeros(streams * longest, np.uint16),
            [copy.copy(self) for _ in range(streams)],
        )
        for nth, expert in enumerate(found):
            expert.history, expert.position, expert.running = (
                history,
                nth * longest,
                self.running.copy(),
            )
        return found

    def end_at_unread(self, longest: int) -> None:
        """A match in another stream's text may have come to where that stream has not been yet: there it ends."""
        if self.running[POINTER] % longest >= self.position % longest:
            self.running[POINTER] = -1

    def hint(self) -> tuple[int, int, float]:
        """Of the next token: hint or -1, length of the match, rate."""
        return match_next(
            self.history,
            self.table,
            self.buckets,
            self._how(),
            self.running,
            self.rates,
            self.position,
        )

    def _matches(self, m: int) -> Matches:
        hint, length, rate = self.hint()
        return Matches(np.full(m, hint, np.int32), np.full(m, length, np.uint16), np.full(m, rate))

    def probability(self, target: int) -> float:
        """Of the next token."""
        target = check_tokens(np.array([target]), self.vocab_size, 0)
        return float(probabilities(self._matches(1), target, self.vocab_size)[0])

    def distribution(self) -> np.ndarray:
        """Of the next token; float64 [V]."""
        return probabilities(
            self._matches(self.vocab_size), np.arange(self.vocab_size), self.vocab_size
        )

    def digest(self) -> str:
        """SHA-256 of the settings and all tokens learnt, which together determine the state."""
        return self.chain.hexdigest()

    def save(self, path: str | Path) -> None:
        write_state(
            path,
            KIND,
            dict(
                settings=self._settings(),
                table=self.table,
                running=self.running,
                rates=self.rates,
                history=self.history[: self.position],
                **self.chain.arrays(),
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Match":
        """The expert as it was saved: it goes on as if never stopped."""
        with reading_state(path, KIND) as saved:
            vocab_size, least, delay, reset, candidates, buckets = saved["settings"].tolist()
            expert = cls(
                vocab_size, least, buckets * candidates * 4, delay, bool(reset), candidates
            )
            for name in ("table", "running", "rates"):
                setattr(expert, name, same_shape(saved[name], getattr(expert, name)))
            expert.history = check_tokens(saved["history"], vocab_size, 0)
            expert.position = end = len(expert.history)
            expert.chain.restore(saved)
            pointer, length, start = expert.running.tolist()
            right, hints = expert.rates[..., 0], expert.rates[..., 1]
            if not (
                inside(expert.table, 0, max(end, 1))
                and -1 <= pointer < end
                and 0 <= length <= LONGEST
                and 0 <= start <= end
                and ((0 <= right) & (right <= hints) & (hints <= RECENT)).all()
            ):
                raise ValueError("out of bounds")
        return expert
