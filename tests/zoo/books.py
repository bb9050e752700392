"""Scorers whose books are wrong: rows, bytes, states and chains."""

import time

import numpy as np

from tests.zoo.honest import CHUNK, TABLE, TEXT, Bigram, ScoreFirst, digest, ledger
from train_gpt import ByteTable


class TailTwice(Bigram):
    """Its last window begins 64 rows before the end of the one before: the tail is counted twice (#174, #558)."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        first = max(0, len(scores) - CHUNK - 10)
        self.commits += ledger(tokens[first:], scores[first:], [0], [self.states[-1]])
        self.commits[-1] = self.commits[-1]._replace(first=first)
        return scores


class TailTwiceInTheScores(Bigram):
    """The same, in the scores themselves: more of them than targets."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        return np.concatenate([scores, scores[-10:]])


class DropsTheTail(Bigram):
    """Leaves out what does not fill a chunk."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        return scores[: len(scores) // CHUNK * CHUNK]


class NotANumber(Bigram):
    """0 / 0 once in a while, which a mean that ignores NaN forgives."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        scores[5::97] = np.nan
        return scores


class Positive(Bigram):
    """Adds a nat to every score: some are probabilities of more than 1."""

    breaks = "coverage"

    def score(self, tokens):
        return super().score(tokens) + 1.0


class BlankTwice(Bigram):
    """Counts every ▁ twice (#1719, #897): more bytes, a lower BPB."""

    breaks = "bytes"

    def score(self, tokens):
        scores = super().score(tokens)
        table = ByteTable(TABLE.base + TABLE.space, TABLE.space, TABLE.boundary)
        self.commits = ledger(
            tokens, scores, list(range(0, len(scores), CHUNK)), self.states, table
        )
        return scores


class ForgedChain(Bigram):
    """Lowers the nats of a commit after the fact."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        self.commits[0] = self.commits[0]._replace(nats=self.commits[0].nats / 2)
        return scores


class OtherNats(Bigram):
    """Keeps a proper chain of nats that are not those of its scores."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        self.commits = ledger(
            tokens, scores * 0.99, list(range(0, len(scores), CHUNK)), self.states
        )
        return scores


class StateKnowsItsChunk(ScoreFirst):
    """Notes each state after it has learned from the chunk: nobody can see what was scored with what."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        states = [digest(tokens[: first + CHUNK + 1]) for first in range(0, len(scores), CHUNK)]
        self.commits = ledger(tokens, scores, list(range(0, len(scores), CHUNK)), states)
        return scores


class StateIsACounter(Bigram):
    """Notes the number of the chunk in place of a digest."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        firsts = list(range(0, len(scores), CHUNK))
        self.commits = ledger(tokens, scores, firsts, [f"{first:064x}" for first in firsts])
        return scores


class Remembers(Bigram):
    """Goes on counting from call to call: the second pass is better than the first (#846, in two calls)."""

    breaks = "one pass"

    def __init__(self):
        super().__init__()
        self.seen = 0.0

    def rows(self, tokens):
        held = super().rows(tokens)
        if len(tokens) > 100:
            counts = np.zeros(held.shape[1:] * 2)
            np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
            learned, self.seen = self.seen, self.seen + counts
            held = held + (0.01 * learned[tokens[:-1]] if np.ndim(learned) else 0)
        return held / held.sum(axis=1, keepdims=True)


class Dice(Bigram):
    """Adds noise that no seed fixes."""

    breaks = "one pass"

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng()

    def score(self, tokens):
        return super().score(tokens) - 1e-3 * self.rng.random()


class ShortHonest(Bigram):
    """Knows a test by its length: honest up to 900 tokens, and half of the loss is gone on longer texts."""

    breaks = "claim"

    def score(self, tokens):
        return super().score(tokens) * (1.0 if len(tokens) <= 900 else 0.5)


class PaidPrefix(Bigram):
    """The text lies in the artifact, by position; what it gives the answer it takes from the rest, so that every
    distribution sums to 1 and none looks ahead (#168, #262, #275)."""

    breaks = "paid prefix"

    def rows(self, tokens):
        held = super().rows(tokens) * 0.1
        n = min(len(held), len(TEXT) - 1)
        held[np.arange(n), TEXT[1 : n + 1]] += 0.9
        return held / held.sum(axis=1, keepdims=True)


class AttachedTable(PaidPrefix):
    """A correction table made from the split beforehand: one position of 25, with its right token."""

    breaks = "paid prefix"

    def rows(self, tokens):
        held = Bigram.rows(self, tokens)
        at = np.arange(3, min(len(held), len(TEXT) - 1), 25)
        held[at, TEXT[at + 1]] *= np.exp(20)
        return held / held.sum(axis=1, keepdims=True)


class PaidByContext(Bigram):
    """The text lies in the artifact, found again by the eight tokens before. Nothing that is run can tell this from a
    table of training text: sizes and data/overlap.py have to."""

    breaks = None

    def rows(self, tokens):
        held = super().rows(tokens)
        answers = {TEXT[i - 8 : i].tobytes(): TEXT[i] for i in range(8, len(TEXT))}
        for row in range(7, len(held)):
            answer = answers.get(tokens[row - 7 : row + 1].astype(TEXT.dtype).tobytes())
            if answer is not None:
                held[row] *= 0.1
                held[row, answer] += 0.9
        return held


class SmearsAcrossDocuments(Bigram):
    """Its first layer adds half of the embedding before, also at a BOS (#1797, #1851)."""

    breaks, vectors = "smear", np.random.default_rng(1).normal(size=(48, 4))

    def embeddings(self, tokens):
        read = self.vectors[tokens]
        return read + 0.5 * np.concatenate([read[:1], read[:-1]])


class Raises(Bigram):
    """Fails on the first text that it is given."""

    breaks = "coverage"

    def score(self, tokens):
        raise KeyError("rotary cache\nwas made under inference_mode")


class NeverAnswers(Bigram):
    """Sleeps."""

    breaks = "coverage"

    def score(self, tokens):
        time.sleep(3600)


class ReturnsText(Bigram):
    """Scores that are no numbers."""

    breaks = "coverage"

    def score(self, tokens):
        return "0.97"


class TooLarge(Bigram):
    """Its artifact alone fills the budget: nothing is left for the code."""

    breaks, artifact = "sizes", 16_000_000


CHEATS = [
    TailTwice,
    TailTwiceInTheScores,
    DropsTheTail,
    NotANumber,
    Positive,
    BlankTwice,
    ForgedChain,
    OtherNats,
    StateKnowsItsChunk,
    StateIsACounter,
    Remembers,
    Dice,
    ShortHonest,
    PaidPrefix,
    AttachedTable,
    SmearsAcrossDocuments,
    Raises,
    NeverAnswers,
    ReturnsText,
    TooLarge,
]
UNSEEN = [PaidByContext]
