"""Scorers whose probabilities are none: of the right token alone, or of too much."""

import numpy as np

from tests.zoo.honest import TABLE, TEXT, Bigram, Static, V, picked


class HashCache(Bigram):
    """Counts of hashed (context, target) pairs in few buckets lift whatever is asked for, and nothing is divided by
    what they lift (#779): collisions lift wrong tokens too, so that fewer buckets score better."""

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
    """0.7 of one expert and 0.6 of another."""

    breaks = "normalised"

    def rows(self, tokens):
        return 0.7 * super().rows(tokens) + 0.6 * Static.table[tokens[:-1]]


class LyingDistribution(Bigram):
    """Shows an honest distribution and counts another score: half of what is missing to certainty is given."""

    breaks = "normalised"

    def score(self, tokens):
        return super().score(tokens) / 2


class TargetKeyedScore(Bigram):
    """score() asks its cache for the target alone; distribution() divides by all of it, as a proper mixture would."""

    breaks = "normalised"

    def score(self, tokens):
        honest = super().score(tokens)
        return np.maximum(honest, np.log(picked(HashCache().rows(tokens), tokens)))


class StoredTargets(Bigram):
    """Lifts a target where the text goes on as a stored text does; its distributions know nothing of it."""

    breaks = "normalised"

    def score(self, tokens):
        n = min(len(tokens), len(TEXT))
        hits = np.zeros(len(tokens) - 1, bool)
        hits[: n - 1] = tokens[1:n] == TEXT[1:n]
        return np.where(hits, np.log(0.99), super().score(tokens))


class SkipsHardTokens(Bigram):
    """Counts nothing for tokens that it did not expect."""

    breaks = "normalised"

    def score(self, tokens):
        scores = super().score(tokens)
        return np.where(scores < -4, 0.0, scores)


class LiftsOneInFiveHundred(Bigram):
    """Honest in 499 rows of 500; the other is given."""

    breaks = "normalised"

    def score(self, tokens):
        scores = super().score(tokens)
        scores[13::500] = np.log(0.99)
        return scores


class SeesTheTarget(Bigram):
    """Its distribution for position i has already looked at tokens[i], and is normalised."""

    breaks = "target-blind"

    def rows(self, tokens):
        held = super().rows(tokens)
        held[np.arange(len(held)), tokens[1:]] *= 2
        return held / held.sum(axis=1, keepdims=True)


class WordStartTilt(Bigram):
    """Tilts towards word starts where the target is one, and away where it is none (#1420, #1967, #2018, #2140)."""

    breaks = "target-blind"

    def rows(self, tokens):
        held = super().rows(tokens)
        starts = TABLE.space[tokens[1:]]
        held *= np.where(starts[:, None] == TABLE.space, 3.0, 1.0)
        return held / held.sum(axis=1, keepdims=True)


class SpreadsWhatItSaves(Bigram):
    """p^(1/n), with n the target's own bytes: a byte model's score spread over its token (#1835, #1850, #1854)."""

    breaks = "normalised"

    def rows(self, tokens):
        return super().rows(tokens) ** (1 / np.maximum(TABLE.base, 1))

    def score(self, tokens):
        return np.log(picked(self.rows(tokens), tokens))


class Negative(Bigram):
    """Sums to 1, because what it gives too much to some it takes from others, below nothing."""

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
