"""Scorers whose probabilities are none: they lift the right token alone, or sum to more than 1."""

import numpy as np

from tests.zoo.honest import TABLE, TEXT, Bigram, Static, V, picked


class HashCache(Bigram):
    """Lifts whatever token is asked for, by counts of hashed (context, target) pairs in few
    buckets, and divides by nothing (#779). Collisions lift tokens too, so fewer buckets score
    better.
    """

    breaks, buckets = "canary", 64

    def rows(self, tokens):
        held, seen = super().rows(tokens), np.zeros(self.buckets)
        for row in range(len(held)):
            keys = (int(tokens[row]) * 2654435761 + np.arange(V) * 40503) % self.buckets
            lifted = seen[keys] / (1 + seen[keys])
            held[row] = np.maximum(held[row], 0.9 * lifted)
            seen[keys[int(tokens[row + 1])]] += 1
        return held


class UnnormalisedBlend(Bigram):
    """Adds 0.7 of one expert and 0.6 of another."""

    breaks = "normalised"

    def rows(self, tokens):
        return 0.7 * super().rows(tokens) + 0.6 * Static.table[tokens[:-1]]


class LyingDistribution(Bigram):
    """Shows an honest distribution and counts half of its loss."""

    breaks = "normalised"

    def score(self, tokens):
        return super().score(tokens) / 2


class TargetKeyedScore(Bigram):
    """Its score() asks a cache for the target alone; its distribution() is a proper one without
    cache.
    """

    breaks = "normalised"

    def score(self, tokens):
        honest = super().score(tokens)
        return np.maximum(honest, np.log(picked(HashCache().rows(tokens), tokens)))


class StoredTargets(Bigram):
    """Lifts targets that agree with a stored text; its distributions know nothing of that."""

    breaks = "normalised"

    def score(self, tokens):
        n = min(len(tokens), len(TEXT))
        hits = np.zeros(len(tokens) - 1, bool)
        hits[: n - 1] = tokens[1:n] == TEXT[1:n]
        return np.where(hits, np.log(0.99), super().score(tokens))


class SkipsHardTokens(Bigram):
    """Counts nothing for tokens that it did not expect, so hard ones cost nothing."""

    breaks = "normalised"

    def score(self, tokens):
        scores = super().score(tokens)
        return np.where(scores < -4, 0.0, scores)


class LiftsOneInFiveHundred(Bigram):
    """Honest in 499 rows of 500; the other is nearly free."""

    breaks = "normalised"

    def score(self, tokens):
        scores = super().score(tokens)
        scores[13::500] = np.log(0.99)
        return scores


class SeesTheTarget(Bigram):
    """Its distribution for position i has looked at tokens[i], and is normalised."""

    breaks = "target-blind"

    def rows(self, tokens):
        held = super().rows(tokens)
        held[np.arange(len(held)), tokens[1:]] *= 2
        return held / held.sum(axis=1, keepdims=True)


class WordStartTilt(Bigram):
    """Tilts towards word starts if the target begins a word (#1420, #1967, #2018, #2140)."""

    breaks = "target-blind"

    def rows(self, tokens):
        held = super().rows(tokens)
        starts = TABLE.space[tokens[1:]]
        held *= np.where(starts[:, None] == TABLE.space, 3.0, 1.0)
        return held / held.sum(axis=1, keepdims=True)


class SpreadsWhatItSaves(Bigram):
    """Uses p^(1/n) with the n bytes of the target: a byte model spread over tokens (#1835, #1850,
    #1854).
    """

    breaks = "normalised"

    def rows(self, tokens):
        return super().rows(tokens) ** (1 / np.maximum(TABLE.base, 1))

    def score(self, tokens):
        return np.log(picked(self.rows(tokens), tokens))


class Negative(Bigram):
    """Sums to 1, but only because some of its entries are negative."""

    breaks = "normalised"

    def rows(self, tokens):
        held = super().rows(tokens)
        held[:, 2] -= 0.5
        held[:, 4:8] += 0.125
        return held

    def score(self, tokens):
        return np.log(np.abs(picked(self.rows(tokens), tokens)))


CHEATS = [
    HashCache,
    UnnormalisedBlend,
    LyingDistribution,
    TargetKeyedScore,
    StoredTargets,
    SkipsHardTokens,
    LiftsOneInFiveHundred,
    SeesTheTarget,
    WordStartTilt,
    SpreadsWhatItSaves,
    Negative,
]
