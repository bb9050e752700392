"""Scorers that read tokens before they have scored them."""

import numpy as np

from tests.zoo.honest import CHUNK, Bigram, ScoreFirst, Static, V, Windowed, digest, picked
from train_gpt import BOS_ID


class TwoPasses(Bigram):
    """Counts the whole text first, then scores it (#846)."""

    breaks = "causal"

    def rows(self, tokens):
        counts = np.full((V, V), 0.05)
        np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
        super().rows(tokens)
        return counts[tokens[:-1]] / counts[tokens[:-1]].sum(axis=1, keepdims=True)


class TrainThenScore(ScoreFirst):
    """Learns from a chunk, then scores it (#402, #677)."""

    breaks = "causal"

    def rows(self, tokens):
        counts, held, self.states = np.full((V, V), 0.05), np.empty((len(tokens) - 1, V)), []
        for first in range(0, len(held), CHUNK):
            contexts, targets = tokens[first:-1][:CHUNK], tokens[first + 1 :][:CHUNK]
            self.states.append(digest(counts))
            np.add.at(counts, (contexts, targets), 1)
            held[first : first + CHUNK] = counts[contexts]
        return held / held.sum(axis=1, keepdims=True)


class Slot(Static):
    """Fits a bias over the vocabulary to each 64 rows by gradient steps, then scores them (#1240,
    #1336).
    """

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens).copy()
        for first in range(0, len(held), CHUNK):
            part, bias = held[first : first + CHUNK], np.zeros(V)
            seen = np.bincount(tokens[first + 1 : first + 1 + CHUNK], minlength=V) / len(part)
            for _ in range(4):
                tilted = part * np.exp(bias)
                bias += 4.0 * (seen - (tilted / tilted.sum(axis=1, keepdims=True)).mean(axis=0))
            part *= np.exp(bias)
            part /= part.sum(axis=1, keepdims=True)
        return held


class InlineTable(Static):
    """Makes a correction table at evaluation: the right tokens of the worst-scored tenth, by
    position.
    """

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens).copy()
        worst = np.argsort(picked(held, tokens))[: len(held) // 10]
        held[worst, tokens[1:][worst]] *= np.exp(20)
        return held / held.sum(axis=1, keepdims=True)


class PeeksAtChunkEnds(ScoreFirst):
    """Honest except in the last row of each chunk, where it favours tokens that the next chunk's
    first token usually follows.
    """

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens)
        for last in range(CHUNK - 1, len(held) - 1, CHUNK):
            held[last] *= Static.table[:, tokens[last + 2]]
            held[last] /= held[last].sum()
        return held


class PeeksInSecret(PeeksAtChunkEnds):
    """The same scorer, which does not say where its chunks end."""

    boundaries = None

    def __init__(self):
        super().__init__()
        self.boundaries = lambda tokens: {}


class BatchNeighbour(Windowed):
    """Windows of a batch share a statistic: how often each token occurs in the whole batch."""

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens)
        for first in range(0, len(held), 128):
            batch = tokens[first + 1 : first + 129]
            held[first : first + 128] += 0.2 * np.bincount(batch, minlength=V) / len(batch)
        return held / held.sum(axis=1, keepdims=True)


class KnowsWhereDocumentsEnd(Bigram):
    """Makes BOS likelier where the next document is about to begin."""

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens)
        left = np.append(tokens[1:] == BOS_ID, True)
        for row in range(len(held)):
            held[row, BOS_ID] *= 8 if left[row : row + 3].any() else 0.5
        return held / held.sum(axis=1, keepdims=True)


class KnowsTheEnd(Bigram):
    """Scores the last eight rows in another way: it knows how long the text is."""

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens)
        held[-8:] = 0.5 * held[-8:] + 0.5 / V
        return held


class GenerousTolerance(TwoPasses):
    """Asks for a tolerance of ten nats a token."""

    breaks, tolerance = "causal", 10.0


class OneInFiveHundred(Bigram):
    """Honest in 499 rows of 500; in the other it is nearly sure of the target if the next token is
    odd.
    """

    breaks = "causal"

    def rows(self, tokens):
        held = super().rows(tokens)
        for row in range(12, len(held) - 1, 500):
            if tokens[row + 2] % 2:
                held[row] = 0.01 * held[row] + 0.99 * (np.arange(V) == tokens[row + 1])
        return held


CHEATS = [
    TwoPasses,
    TrainThenScore,
    Slot,
    InlineTable,
    PeeksAtChunkEnds,
    PeeksInSecret,
    BatchNeighbour,
    KnowsWhereDocumentsEnd,
    KnowsTheEnd,
    GenerousTolerance,
    OneInFiveHundred,
]
