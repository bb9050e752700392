"""The experts in plain Python: dictionaries and loops, slow and obvious; an oracle for tests."""

import bisect

import numpy as np

from fairway.scoring.experts.match import FRESH, GOING_ON, LONGEST, PRIOR, RECENT
from fairway.scoring.experts.ngram import DISCOUNTS, ESCAPES
from train_gpt import BOS_ID


class ReferenceNGram:
    """Counts of what followed each context of 0..orders-1 tokens, with no bound on memory."""

    def __init__(self, vocab_size: int, orders: int = 6, delay: int = 0, reset: bool = False):
        self.vocab_size, self.orders, self.delay, self.reset = vocab_size, orders, delay, reset
        self.forget()

    def forget(self) -> None:
        """Forget the text and all counts."""
        self.text = []
        # By context length: context -> [followers, {token: how often it followed}].
        self.followers = [{} for _ in range(self.orders)]

    def update(self, token: int) -> None:
        """Learn one token."""
        if self.reset and token == BOS_ID:
            self.forget()
        self.text.append(token)
        i = len(self.text) - 1 - self.delay  # the follower that is old enough now
        for k in range(min(self.orders, i + 1)):
            entry = self.followers[k].setdefault(tuple(self.text[i - k : i]), [0, {}])
            entry[0] += 1
            entry[1][self.text[i]] = entry[1].get(self.text[i], 0) + 1

    def counts(self, target: int) -> list[tuple[int, int, int]]:
        """Return (hits, seen, kinds) by context length."""
        rows, n = [], len(self.text)
        for k in range(self.orders):
            seen, counts = (
                self.followers[k].get(tuple(self.text[n - k :]), (0, {})) if k <= n else (0, {})
            )
            rows.append((counts.get(target, 0), seen, len(counts)))
        return rows

    def probability(self, target: int, orders: int = 0) -> float:
        """Return the probability of the next token, by `orders` context lengths (0: all)."""
        p = 1 / self.vocab_size
        for k, (hits, seen, kinds) in enumerate(self.counts(target)[: orders or self.orders]):
            d, c = DISCOUNTS[min(k, len(DISCOUNTS) - 1)], ESCAPES[min(k, len(ESCAPES) - 1)]
            if seen:
                p = (max(hits - d, 0) + (d + c) * kinds * p) / (seen + c * kinds)
        return p

    def distribution(self) -> np.ndarray:
        """Return the probabilities of all next tokens, [V]."""
        return np.array([self.probability(x) for x in range(self.vocab_size)])

    def fill(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """Return counts [m, orders, 3] and probability [m] of each token before it was read."""
        rows, p = [], []
        for token in np.asarray(tokens).tolist():
            rows.append(self.counts(token))
            p.append(self.probability(token))
            self.update(token)
        return np.array(rows, dtype=np.int64).reshape(-1, self.orders, 3), np.array(p)


def bucket(context: tuple[int, ...], buckets: int) -> int:
    """Return the bucket of the match expert for a context, so that the reference collides alike."""
    rolled, factor, word = 0, 0x9E3779B97F4A7C15, (1 << 64) - 1
    for token in context:
        rolled = (rolled + token + 1) * factor & word
    return (((rolled ^ rolled >> 32) * factor & word) >> 32) * buckets >> 32


class ReferenceMatch:
    """Longest match among the last positions of a context, or of its bucket if `buckets` is set."""

    def __init__(
        self,
        vocab_size: int,
        least: int = 8,
        delay: int = 0,
        reset: bool = False,
        candidates: int = 4,
        buckets: int = 0,
    ):
        self.vocab_size, self.least, self.delay, self.reset = vocab_size, least, delay, reset
        self.candidates, self.buckets = candidates, buckets
        self.forget()

    def forget(self) -> None:
        """Forget the text and all rates."""
        self.text, self.places, self.going_on = [], {}, None
        self.counts = {}  # (goes on, group of length) -> [right, all]

    def key(self, i: int):
        """Return the context before position i, or its bucket."""
        context = tuple(self.text[i - self.least : i])
        return bucket(context, self.buckets) if self.buckets else context

    def find(self) -> tuple[int, int]:
        """Return the position after the longest match, and its length; -1 and 0 without one."""
        if self.going_on:
            return self.going_on
        n, place, longest = len(self.text), -1, 0
        for i in self.places.get(self.key(n), ()) if n >= self.least else ():
            same = 0
            while same < min(i, LONGEST) and self.text[i - 1 - same] == self.text[n - 1 - same]:
                same += 1
            if same >= self.least and same > longest:
                place, longest = i, same
        return place, longest

    def hint(self) -> tuple[int, int, float]:
        """Return hint, length and rate for the next token."""
        place, length = self.find()
        if place < 0:
            return -1, 0, 0.5
        group, right, hints = self.rate_counts(length)
        prior = (GOING_ON if self.going_on else FRESH)[group]
        return self.text[place], length, (right + PRIOR * prior) / (hints + PRIOR)

    def rate_counts(self, length: int) -> tuple[int, float, float]:
        """Return the group of a length, and its hints so far: right ones, all."""
        group = bisect.bisect_right([*range(1, 18), 24, 32, 48, 64, 128, 256, 512], length)
        return group, *self.counts.get((bool(self.going_on), group), (0, 0))

    def update(self, token: int) -> None:
        """Learn one token."""
        place, length = self.find()
        if place >= 0:
            group, right, hints = self.rate_counts(length)
            right, hints = right + (token == self.text[place]), hints + 1
            half = 0.5 if hints > RECENT else 1
            self.counts[bool(self.going_on), group] = right * half, hints * half
            self.going_on = (
                (place + 1, min(length + 1, LONGEST)) if token == self.text[place] else None
            )
        if self.reset and token == BOS_ID:
            self.forget()
        self.text.append(token)
        i = len(self.text) - 1 - self.delay  # the position that is old enough now
        if i >= self.least:
            positions = self.places.setdefault(self.key(i), [])
            positions.insert(0, i)
            del positions[self.candidates :]

    def probability(self, target: int) -> float:
        """Return the probability of the next token."""
        hint, _, rate = self.hint()
        if hint < 0:
            return 1 / self.vocab_size
        return rate if target == hint else (1 - rate) / (self.vocab_size - 1)

    def distribution(self) -> np.ndarray:
        """Return the probabilities of all next tokens, [V]."""
        return np.array([self.probability(x) for x in range(self.vocab_size)])

    def fill(self, tokens) -> tuple[list[tuple[int, int, float]], np.ndarray]:
        """Return (hint, length, rate) and probability [m] of each token before it was read."""
        rows, p = [], []
        for token in np.asarray(tokens).tolist():
            rows.append(self.hint())
            p.append(self.probability(token))
            self.update(token)
        return rows, np.array(p)
