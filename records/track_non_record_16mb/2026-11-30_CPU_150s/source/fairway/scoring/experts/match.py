"""The match expert: the token that followed the longest earlier match, and how far to trust it.

A hash of the last `least` tokens names a bucket: positions in the text where a context of that hash
was met, the most recent first. Each position is compared with the text itself, token by token
backwards. So a hash collision costs time and never makes a hint. After a hint that came true the
match goes on to the next token; only otherwise is a bucket searched.

`table` (int32) holds `candidates` positions for each bucket; 0 is a free slot, because position 0
has no context. `history` (uint16) is the text itself.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts.prefetch import prefetch
from fairway.scoring.experts.state import (
    TokenDigest,
    all_within,
    check_settings,
    check_tokens,
    open_state,
    same_shape,
    write_state,
)
from train_gpt import BOS_ID, UserError

KIND = "match"
LONGEST = 512  # tokens compared; longer matches count as this long
BLOCK = 4096  # tokens whose buckets are hashed in one go
AHEAD = 12  # tokens: how early old text is prefetched; its bucket is prefetched twice as early
WORD = (1 << 32) - 1  # mask of the low half of a word
FACTOR = -7046029254386353131  # of the rolling hash: 0x9E3779B97F4A7C15 as a signed word
LARGEST_TABLE = 1 << 31  # buckets
POINTER, LENGTH, START = range(3)  # of `running`: where the match goes on, its length, text start
RECENT = 256.0  # most hints that a rate remembers: then both its counts are halved

# Rates before anything is learnt, by `length_group`: for hints that were just looked up, and for
# those that go on from a hint that came true. Each is worth PRIOR hints that are never forgotten,
# so no rate comes near 0 or 1. Rounded from 10 million tokens of web text and 4 million of
# speeches, training text only. A match that was just looked up is often one that broke a token
# before: a longer one is then no surer. On those texts a hint costs .808 and .864 bits (right or
# wrong), .818 and .874 with rates by length alone, .815 and .866 when nothing is forgotten.
PRIOR = 16.0
# fmt: off (in rows of groups 0-8, 9-16 and 17-24)
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
# fmt: on
PRIORS = np.array([FRESH, GOING_ON])


class Matches(NamedTuple):
    """The knowledge about m targets before each was read."""

    hint: np.ndarray  # int32 [m]: the token that followed the longest match; -1 without a match
    length: np.ndarray  # uint16 [m]: tokens of that match, at most LONGEST; 0 without a match
    rate: np.ndarray  # float64 [m]: share of such hints that were right so far, inside (0, 1)


# ==== ONE TARGET ==================================================================================
# Called at every token: inlined, because a call costs more than they do.
inlined = njit(cache=True, nogil=True, inline="always")


@njit(cache=True, nogil=True)
def name_buckets(history, first, least, buckets, out):
    """Fill out with the bucket of the `least` tokens before each position from `first` on.

    It is -1 where fewer tokens come before. The hash rolls: each step adds a token and drops one.
    """
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


@inlined
def longest_match(history, at, bucket, start, least):
    """Return the position after the longest match of the tokens before `at`, and its length.

    The most recent of equally long ones wins; -1 and 0 without a match.
    """
    pointer, length = -1, 0
    for i in bucket:
        if i - least < start or i == 0:
            break  # all that follow are older still
        same, most = 0, min(LONGEST, i - start)
        while same < most and history[i - 1 - same] == history[at - 1 - same]:
            same += 1
        if same >= least and same > length:
            pointer, length = i, same
    return pointer, length


@inlined
def length_group(length):
    """Return the group of lengths that share a rate: each up to 16, then from 17, 24, 32 on ..."""
    group = length
    if length > 16:
        group = 17 + (length >= 24) + (length >= 32) + (length >= 48) + (length >= 64)
        group += (length >= 128) + (length >= 256) + (length >= 512)
    return group


@inlined
def hint_rate(rates, goes_on, group):
    """Return the share of such hints that were right so far, the prior included."""
    right, hints = rates[goes_on, group, 0], rates[goes_on, group, 1]
    return (right + PRIOR * PRIORS[goes_on, group]) / (hints + PRIOR)


@inlined
def learn_rate(counts, right):
    """Add one hint, right or wrong, to counts [2]."""
    counts[0] += right
    counts[1] += 1
    if counts[1] > RECENT:
        counts[0], counts[1] = counts[0] / 2, counts[1] / 2


@inlined
def prefetch_candidates(history, table, candidates, names, j):
    """Prefetch the bucket of a target 2 * AHEAD on, and the text that the bucket AHEAD on names."""
    if j + 2 * AHEAD < len(names) and names[j + 2 * AHEAD] >= 0:
        prefetch(table, names[j + 2 * AHEAD] * candidates)
    if j + AHEAD < len(names) and names[j + AHEAD] >= 0:
        first = names[j + AHEAD] * candidates
        for i in table[first : first + candidates]:
            prefetch(history, i - 4)


@inlined
def add_position(table, candidates, bucket, position):
    """Put a position first in its bucket; the oldest one falls out."""
    first = bucket * candidates
    for c in range(first + candidates - 1, first, -1):
        table[c] = table[c - 1]
    table[first] = position


@inlined
def look_up_match(history, table, candidates, running, bucket, at, least):
    """Return the position of the hint (-1: none), the length of its match, and whether it goes on.

    It goes on (1) after a hint that came true; otherwise (0) it is looked up.
    """
    pointer, length, goes_on = -1, 0, 0
    if running[POINTER] >= 0:
        pointer, length, goes_on = running[POINTER], running[LENGTH], 1
    elif bucket >= 0:
        positions = table[bucket * candidates : (bucket + 1) * candidates]
        pointer, length = longest_match(history, at, positions, running[START], least)
    return pointer, length, goes_on


# ==== A TEXT ======================================================================================
@njit(cache=True, nogil=True)
def match_block(history, table, settings, running, rates, names, old_names, at, matches):
    """Fill in hints for targets history[at:at + m], and learn from each target after its hint.

    `names` are the buckets of the targets, `old_names` those of the positions `delay` tokens before
    them, which may be found from now on.
    """
    least, delay, reset, candidates = settings
    hint, length, rate = matches
    for j in range(len(names)):
        prefetch_candidates(history, table, candidates, names, j)
        if delay and j + AHEAD < len(old_names):
            prefetch(table, max(old_names[j + AHEAD], 0) * candidates)
        t = at + j
        pointer, same, goes_on = look_up_match(
            history, table, candidates, running, names[j], t, least
        )
        hint[j], length[j], rate[j] = -1, same, 0.5
        running[POINTER] = -1
        if pointer >= 0:
            hint[j] = history[pointer]
            right, group = history[t] == hint[j], length_group(same)
            rate[j] = hint_rate(rates, goes_on, group)
            learn_rate(rates[goes_on, group], right)
            if right:
                running[POINTER], running[LENGTH] = pointer + 1, min(same + 1, LONGEST)
        if reset and history[t] == BOS_ID:
            running[POINTER], running[START] = -1, t
            rates[:] = 0
        elif t - delay >= running[START] + least:
            add_position(table, candidates, old_names[j], t - delay)


@njit(cache=True, nogil=True)
def match_text(history, table, buckets, settings, running, rates, at, matches):
    """Fill in hints for history[at:], a block at a time."""
    least, delay, reset, candidates = settings
    hint, length, rate = matches
    names = np.empty(min(BLOCK, len(hint)), np.int64)
    old_names = np.empty_like(names)
    for row in range(0, len(hint), BLOCK):
        m = min(BLOCK, len(hint) - row)
        name_buckets(history, at + row, least, buckets, names[:m])
        old = names
        if delay:
            old = old_names
            name_buckets(history, at + row - delay, least, buckets, old[:m])
        rows = hint[row : row + m], length[row : row + m], rate[row : row + m]
        match_block(history, table, settings, running, rates, names[:m], old[:m], at + row, rows)


@njit(cache=True, nogil=True)
def match_next(history, table, buckets, settings, running, rates, at):
    """Return hint, length and rate for position `at`, where the text ends; nothing is learnt."""
    least, delay, reset, candidates = settings
    name = np.empty(1, np.int64)
    name_buckets(history, at, least, buckets, name)
    pointer, same, goes_on = look_up_match(history, table, candidates, running, name[0], at, least)
    hint, rate = -1, 0.5
    if pointer >= 0:
        hint, rate = int(history[pointer]), hint_rate(rates, goes_on, length_group(same))
    return hint, same, rate


# ==== PROBABILITIES ===============================================================================
@njit(cache=True, nogil=True)
def spread_rates(matches, tokens, vocab_size, out):
    """Fill out [m]: the rate for the hint, an equal part of the rest for any other token."""
    hint, length, rate = matches
    for j in range(len(out)):
        if hint[j] < 0:
            out[j] = 1.0 / vocab_size
        else:
            out[j] = rate[j] if tokens[j] == hint[j] else (1.0 - rate[j]) / (vocab_size - 1)


def match_probabilities(matches: Matches, tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Return the match expert's probability of m tokens, float64 [m]; 1/V without a hint."""
    out = np.empty(len(matches.hint))
    spread_rates(tuple(matches), np.ascontiguousarray(tokens, dtype=np.uint16), vocab_size, out)
    return out


# ==== THE EXPERT ==================================================================================
class Match:
    """Longest match of at least `least` tokens.

    `fill` scores and learns a text; `hint`, `probability`, `distribution` and `update` take one
    token at a time. `memory_bytes` bounds the table; the history takes 2 bytes a token more. With
    `delay` D, a hint for position t is a token of tokens[:t - D]; only how often hints were right
    is learnt at once. `reset` forgets everything at each BOS, rates included; the BOS is then the
    first token of its document.
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
        if not 1 <= least <= LONGEST:
            raise UserError(f"a least match of {least} tokens is outside 1 to {LONGEST}; change it")
        if not 1 <= candidates <= 64:
            raise UserError(f"{candidates} candidates a bucket are outside 1 to 64; change it")
        if memory_bytes < 4 * candidates:
            raise UserError(
                f"the match table's memory is {memory_bytes} bytes, but one bucket takes "
                f"{4 * candidates}; raise it"
            )
        self.vocab_size, self.least, self.candidates = vocab_size, least, candidates
        self.delay, self.reset = delay, bool(reset)
        self.buckets = min(memory_bytes // (4 * candidates), LARGEST_TABLE)
        self.table = np.zeros(self.buckets * candidates, np.int32)
        self.running = np.array([-1, 0, 0], np.int64)
        # By `goes_on` and group of lengths: hints that were right, all hints.
        self.rates = np.zeros((2, len(FRESH), 2))
        self.history, self.position = np.zeros(0, np.uint16), 0
        self.text_digest = TokenDigest(f"{KIND} {self._settings().tolist()}")

    def _settings(self) -> np.ndarray:
        return np.array(
            [self.vocab_size, self.least, self.delay, self.reset, self.candidates, self.buckets],
            np.int64,
        )

    def _compiled_settings(self) -> tuple[int, int, bool, int]:
        return self.least, self.delay, self.reset, self.candidates

    def fill(self, tokens: np.ndarray) -> Matches:
        """Return the hints for each token before it was read, then learn it.

        The pieces in which a text arrives make no difference.
        """
        tokens = check_tokens(tokens, self.vocab_size, self.position)
        m, at = len(tokens), self.position
        if at + m > len(self.history):
            longer = np.zeros(at + m + (at + m) // 4, np.uint16)
            longer[:at] = self.history[:at]
            self.history = longer
        self.history[at : at + m] = tokens
        matches = Matches(np.empty(m, np.int32), np.empty(m, np.uint16), np.empty(m))
        match_text(
            self.history,
            self.table,
            self.buckets,
            self._compiled_settings(),
            self.running,
            self.rates,
            at,
            tuple(matches),
        )
        self.position += m
        self.text_digest.feed(tokens)
        return matches

    def update(self, token: int) -> None:
        """Learn one token."""
        self.fill(np.array([token]))

    def side_by_side(self, streams: int, longest: int) -> list["Match"]:
        """Return an expert for each stream; a stream has at most `longest` tokens.

        Each has its own part of one history, and all look for matches in the whole of it. Streams
        are read in step; between two steps `end_at_unread` must be called.
        """
        history = np.zeros(streams * longest, np.uint16)
        experts = [copy.copy(self) for _ in range(streams)]
        for stream, expert in enumerate(experts):
            expert.history, expert.running = history, self.running.copy()
            expert.position = stream * longest
        return experts

    def end_at_unread(self, longest: int) -> None:
        """End a match in another stream's text where that stream has not been read yet."""
        if self.running[POINTER] % longest >= self.position % longest:
            self.running[POINTER] = -1

    def hint(self) -> tuple[int, int, float]:
        """Return what is known about the next token: hint or -1, length of the match, rate."""
        return match_next(
            self.history,
            self.table,
            self.buckets,
            self._compiled_settings(),
            self.running,
            self.rates,
            self.position,
        )

    def _matches(self, m: int) -> Matches:
        hint, length, rate = self.hint()
        return Matches(np.full(m, hint, np.int32), np.full(m, length, np.uint16), np.full(m, rate))

    def probability(self, target: int) -> float:
        """Return the probability that the next token is `target`."""
        target = check_tokens(np.array([target]), self.vocab_size, 0)
        return float(match_probabilities(self._matches(1), target, self.vocab_size)[0])

    def distribution(self) -> np.ndarray:
        """Return the distribution of the next token, float64 [V]."""
        return match_probabilities(
            self._matches(self.vocab_size), np.arange(self.vocab_size), self.vocab_size
        )

    def digest(self) -> str:
        """Return the SHA-256 of the settings and all tokens read, which determine the state."""
        return self.text_digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the state to a file."""
        arrays = {name: getattr(self, name) for name in ("table", "running", "rates")}
        arrays |= {"settings": self._settings(), "history": self.history[: self.position]}
        write_state(path, KIND, arrays | self.text_digest.arrays())

    @classmethod
    def load(cls, path: str | Path) -> "Match":
        """Return the expert that was saved; it goes on as if it had never stopped."""
        with open_state(path, KIND) as saved:
            vocab_size, least, delay, reset, candidates, buckets = saved["settings"].tolist()
            memory_bytes = buckets * candidates * 4
            expert = cls(vocab_size, least, memory_bytes, delay, bool(reset), candidates)
            for name in ("table", "running", "rates"):
                setattr(expert, name, same_shape(saved[name], getattr(expert, name)))
            expert.history = check_tokens(saved["history"], vocab_size, 0)
            expert.position = end = len(expert.history)
            expert.text_digest.restore(saved)
            pointer, length, start = expert.running.tolist()
            right, hints = expert.rates[..., 0], expert.rates[..., 1]
            if not (
                all_within(expert.table, 0, max(end, 1))
                and -1 <= pointer < end
                and 0 <= length <= LONGEST
                and 0 <= start <= end
                and ((right >= 0) & (right <= hints) & (hints <= RECENT)).all()
            ):
                raise ValueError("out of bounds")
        return expert
