"""The experts in plain Python: dictionaries and loops, slow and obvious. Tests and the bench compare with them."""

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
        self.text = []
        self.followers = [
            {} for _ in range(self.orders)
        ]  # context -> [how many, {token: how often}]

    def update(self, token: int) -> None:
        if self.reset and token == BOS_ID:
            self.forget()
        self.text.append(token)
        i = len(self.text) - 1 - self.delay  # the follower that is old enough now
        for k in range(min(self.orders, i + 1)):
            entry = self.followers[k].setdefault(tuple(self.text[i - k : i]), [0, {}])
            entry[0] += 1
            entry[1][self.text[i]] = entry[1].get(self.text[i], 0) + 1

    def about(self, target: int) -> list[tuple[int, int, int]]:
        """(hits, seen, kinds) by context length."""
        rows, n = [], len(self.text)
        for k in range(self.orders):
            seen, counts = (
                self.followers[k].get(tuple(self.text[n - k :]), (0, {})) if k <= n else (0, {})
            )
            rows.append((counts.get(target, 0), seen, len(counts)))
        return rows

    def probability(self, target: int, orders: int = 0) -> float:
        p = 1 / self.vocab_size
        for k, (hits, seen, kinds) in enumerate(self.about(target)[: orders or self.orders]):
            d, c = DISCOUNTS[min(k, len(DISCOUNTS) - 1)], ESCAPES[min(k, len(ESCAPES) - 1)]
            if seen:
                p = (max(hits - d, 0) + (d + c) * kinds * p) / (seen + c * kinds)
        return p

    def distribution(self) -> np.ndarray:
        return np.array([self.probability(x) for x in range(self.vocab_size)])

    def fill(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """ContextCounts [m, orders, 3] and probability [m] of each token before it was seen."""
        rows, p = [], []
        for token in np.asarray(tokens).tolist():
            rows.append(self.about(token))
            p.append(self.probability(token))
            self.update(token)
        return np.array(rows, dtype=np.int64).reshape(-1, self.orders, 3), np.array(p)


def bucket(context: tuple[int, ...], buckets: int) -> int:
    """The bucket that the match expert keeps a context in, so that its collisions can be had here too."""
    rolled, factor, word = 0, 0x9E3779B97F4A7C15, (1 << 64) - 1
    for token in context:
        rolled = (rolled + token + 1) * factor & word
    return (((rolled ^ rolled >> 32) * factor & word) >> 32) * buckets >> 32


class ReferenceMatch:
    """Longest match among the last places that a context (or, given `buckets`, its bucket) was followed at."""

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
        self.text, self.places, self.going_on = [], {}, None
        self.counts = {}  # (goes on, group of length) -> [right, all]

    def key(self, i: int):
        context = tuple(self.text[i - self.least : i])
        return bucket(context, self.buckets) if self.buckets else context

    def find(self) -> tuple[int, int]:
        """Place after the longest match, and its length."""
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
        place, length = self.find()
        if place < 0:
            return -1, 0, 0.5
        group, right, hints = self.counted(length)
        prior = (GOING_ON if self.going_on else FRESH)[group]
        return self.text[place], length, (right + PRIOR * prior) / (hints + PRIOR)

    def counted(self, length: int) -> tuple[int, float, float]:
        group = bisect.bisect_right([*range(1, 18), 24, 32, 48, 64, 128, 256, 512], length)
        return group, *self.counts.get((bool(self.going_on), group), (0, 0))

    def update(self, token: int) -> None:
        place, length = self.find()
        if place >= 0:
            group, right, hints = self.counted(length)
            right, hints = right + (token == self.text[place]), hints + 1
            half = 0.5 if hints > RECENT else 1
            self.counts[bool(self.going_on), group] = right * half, hints * half
            self.going_on = (
                (place + 1, min(length + 1, LONGEST)) if token == self.text[place] else None
            )
        if self.reset and token == BOS_ID:
            self.forget()
        self.text.append(token)
        i = len(self.text) - 1 - self.delay  # the place that is old enough now
        if i >= self.least:
            kept = self.places.setdefault(self.key(i), [])
            kept.insert(0, i)
            del kept[self.candidates :]

    def probability(self, target: int) -> float:
        hint, _, rate = self.hint()
        if hint < 0:
            return 1 / self.vocab_size
        return rate if target == hint else (1 - rate) / (self.vocab_size - 1)

    def distribution(self) -> np.ndarray:
        return np.array([self.probability(x) for x in range(self.vocab_size)])

    def fill(self, tokens) -> tuple[list[tuple[int, int, float]], np.ndarray]:
        """(hint, length, rate) and probability [m] of each token before it was seen."""
        rows, p = [], []
        for token in np.asarray(tokens).tolist():
            rows.append(self.hint())
            p.append(self.probability(token))
            self.update(token)
        return rows, np.array(p)
