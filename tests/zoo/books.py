"""Scorers whose accounts are wrong: rows, bytes, states and chains."""

import time

import numpy as np

from tests.zoo.honest import CHUNK, TABLE, TEXT, Bigram, ScoreFirst, digest, ledger
from train_gpt import ByteTable


class TailTwice(Bigram):
    """Its last window overlaps the one before by 64 rows, so the tail is counted twice (#174,
    #558).
    """

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        first = max(0, len(scores) - CHUNK - 10)
        self.commits += ledger(tokens[first:], scores[first:], [0], [self.states[-1]])
        self.commits[-1] = self.commits[-1]._replace(first=first)
        return scores


class TailTwiceInTheScores(Bigram):
    """The same fault in the scores themselves: more scores than targets."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        return np.concatenate([scores, scores[-10:]])


class DropsTheTail(Bigram):
    """Leaves out the last rows, which do not fill a chunk."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        return scores[: len(scores) // CHUNK * CHUNK]


class NotANumber(Bigram):
    """Computes 0 / 0 now and then; a mean that ignores NaN would hide it."""

    breaks = "coverage"

    def score(self, tokens):
        scores = super().score(tokens)
        scores[5::97] = np.nan
        return scores


class Positive(Bigram):
    """Adds a nat to every score, so that some are probabilities above 1."""

    breaks = "coverage"

    def score(self, tokens):
        return super().score(tokens) + 1.0


class BlankTwice(Bigram):
    """Counts every ▁ twice (#1719, #897): more bytes give a lower BPB."""

    breaks = "bytes"

    def score(self, tokens):
        scores = super().score(tokens)
        table = ByteTable(TABLE.base + TABLE.space, TABLE.space, TABLE.boundary)
        self.commits = ledger(
            tokens, scores, list(range(0, len(scores), CHUNK)), self.states, table
        )
        return scores


class ForgedChain(Bigram):
    """Lowers the nats of a commit afterwards."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        self.commits[0] = self.commits[0]._replace(nats=self.commits[0].nats / 2)
        return scores


class OtherNats(Bigram):
    """Keeps a valid chain of nats that are not those of its scores."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        self.commits = ledger(
            tokens, scores * 0.99, list(range(0, len(scores), CHUNK)), self.states
        )
        return scores


class StateKnowsItsChunk(ScoreFirst):
    """Logs each state after learning from the chunk, so the log does not show which state scored
    it.
    """

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        states = [digest(tokens[: first + CHUNK + 1]) for first in range(0, len(scores), CHUNK)]
        self.commits = ledger(tokens, scores, list(range(0, len(scores), CHUNK)), states)
        return scores


class StateIsACounter(Bigram):
    """Logs the number of the chunk in place of a digest."""

    breaks = "score first"

    def score(self, tokens):
        scores = super().score(tokens)
        firsts = list(range(0, len(scores), CHUNK))
        self.commits = ledger(tokens, scores, firsts, [f"{first:064x}" for first in firsts])
        return scores


class Remembers(Bigram):
    """Keeps its counts from call to call, so a second pass is better than the first (#846)."""

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
    """Recognises a test by its length: honest up to 900 tokens; longer texts score half the
    loss.
    """

    breaks = "claim"

    def score(self, tokens):
        return super().score(tokens) * (1.0 if len(tokens) <= 900 else 0.5)


class PaidPrefix(Bigram):
    """Stores the text in the artifact by position (#168, #262, #275). Its distributions sum to 1,
    and none looks ahead: the other tokens lose what the stored one wins.
    """

    breaks = "paid prefix"

    def rows(self, tokens):
        held = super().rows(tokens) * 0.1
        n = min(len(held), len(TEXT) - 1)
        held[np.arange(n), TEXT[1 : n + 1]] += 0.9
        return held / held.sum(axis=1, keepdims=True)


class AttachedTable(PaidPrefix):
    """Stores a correction table made from the split: one position of 25 with its right token."""

    breaks = "paid prefix"

    def rows(self, tokens):
        held = Bigram.rows(self, tokens)
        at = np.arange(3, min(len(held), len(TEXT) - 1), 25)
        held[at, TEXT[at + 1]] *= np.exp(20)
        return held / held.sum(axis=1, keepdims=True)


class PaidByContext(Bigram):
    """Stores the text in the artifact and finds it by the eight tokens before. No run can tell this
    from a table of training text: the size limit and data/overlap.py must.
    """

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
    """Its first layer adds half of the embedding before, even at a BOS (#1797, #1851)."""

    breaks, vectors = "smear", np.random.default_rng(1).normal(size=(48, 4))

    def embeddings(self, tokens):
        read = self.vectors[tokens]
        return read + 0.5 * np.concatenate([read[:1], read[:-1]])


class Raises(Bigram):
    """Raises an error on its first text."""

    breaks = "coverage"

    def score(self, tokens):
        raise KeyError("rotary cache\nwas made under inference_mode")


class NeverAnswers(Bigram):
    """Sleeps and never returns."""

    breaks, call_seconds = "coverage", 1.0

    def score(self, tokens):
        time.sleep(3600)


class ReturnsText(Bigram):
    """Returns scores that are no numbers."""

    breaks = "coverage"

    def score(self, tokens):
        return "0.97"


class TooLarge(Bigram):
    """Its artifact alone fills the budget, so nothing is left for the code."""

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
