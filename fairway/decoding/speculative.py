"""Speculative decoding (arXiv 2211.17192, 2302.01318): a drafter guesses several tokens, the model
verifies all of them in one forward, and the text is what it would have been without the drafter.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fairway.decoding.drafters import Drafter, Guess
from fairway.decoding.reader import GeneratedToken, Reader
from fairway.decoding.strategies import Strategy, draw, log_softmax

# Logits. In fp32 a forward of several tokens differs from several forwards of one by 1e-6 to 1e-5.
CLOSE_CALL = 1e-4
REWIND = 64  # tokens that every engine can forget again


@dataclass
class SpeculationStats:
    """Counts of proposed and accepted guesses, and the seconds that they took."""

    tokens: int = 0
    verifications: int = 0  # forwards of the model, also those with no guess to verify
    drafted: int = 0
    accepted: int = 0
    read_again: int = 0  # tokens read a second time, one by one, to decide a close call
    seconds: float = 0.0
    draft_seconds: float = 0.0  # part of `seconds`

    @property
    def acceptance(self) -> float:
        """Share of the guesses that were accepted."""
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_verification(self) -> float:
        """Tokens written for each forward of the model; plain decoding writes 1."""
        return self.tokens / max(self.verifications, 1)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


def accept_or_redraw(p: np.ndarray, guess: Guess | None, rng: np.random.Generator) -> int:
    """Return a token with distribution p: the guess with probability min(1, p/q), else one drawn
    from the excess max(0, p - q).

    A certain guess has q = 1. If p allows one token only, as in greedy decoding, that token comes
    out whatever the guess was.
    """
    if guess is None:
        return draw(p, rng)
    q = guess.q if guess.q is not None else np.eye(1, len(p), guess.token)[0]
    if rng.random() * q[guess.token] < p[guess.token]:
        return guess.token
    excess = np.maximum(p - q, 0)
    return draw(excess if excess.any() else p, rng)


class Speculation:
    """Tokens after the prompt, without end, as `decode_plainly` yields them:
    `for token, logp in Speculation(...)`.

    The reader must have read the prompt except its last token, the drafter nothing.

    Greedy decoding gives the same tokens as `decode_plainly`. The difficulty is rounding: a forward
    of several tokens rounds differently from several forwards of one, so two logits within
    CLOSE_CALL of each other may change places. In such a case the tokens since the last exact one
    are read again one at a time, as plain decoding reads them, and each at most once. Two limits
    remain. Keys and values that are cached coarsely or computed in 16 bits round by more than
    CLOSE_CALL; and tokens that left the window more than REWIND tokens ago cannot be read again.
    There the two texts can differ where two tokens are equally good to within that rounding.
    """

    def __init__(
        self,
        reader: Reader,
        prompt: Sequence[int],
        strategy: Strategy,
        rng: np.random.Generator,
        drafter: Drafter,
        most: int,
    ):
        """Set `most`, the number of guesses verified at once; with the token before them they must
        fit the reader's largest call.
        """
        self.reader, self.text, self.strategy, self.rng = reader, list(prompt), strategy, rng
        self.drafter, self.most = drafter, min(most, reader.most - 1)
        self.stats = SpeculationStats()
        # Number of tokens whose keys and values are, bit for bit, those of plain decoding.
        self.exact = reader.length
        drafter.follow(self.text)

    def __iter__(self) -> Iterator[GeneratedToken]:
        while True:
            yield from self.round()

    def round(self) -> list[GeneratedToken]:
        """Verify one proposal; return the tokens that this settles, at least one."""
        began = time.perf_counter()
        guesses = self.drafter.propose(self.most)
        self.stats.draft_seconds += time.perf_counter() - began
        tokens = self.verify(guesses)
        right = sum(t.token == guess.token for t, guess in zip(tokens, guesses, strict=False))
        self.reader.crop(len(self.text) - 1)
        self.drafter.learn(right)
        self.drafter.follow(self.text)
        self.stats.tokens += len(tokens)
        self.stats.verifications += 1
        self.stats.drafted += len(guesses)
        self.stats.accepted += right
        self.stats.seconds += time.perf_counter() - began
        return tokens

    def verify(self, guesses: list[Guess]) -> list[GeneratedToken]:
        """Return the accepted guesses and one token more: the one that replaces the first rejected
        guess, or the one after the last guess.
        """
        reads_one_exactly = not guesses and self.exact == self.reader.length
        rows = self.reader.read([self.text[-1], *(guess.token for guess in guesses)])
        self.exact += reads_one_exactly
        settled = []
        for row, guess in zip(rows, [*guesses, None], strict=True):
            if len(self.text) > self.exact and self.is_close_call(row):
                row, guess = self.read_again(), None
            token = accept_or_redraw(self.strategy.distribution(row, self.text), guess, self.rng)
            self.text.append(token)
            settled.append(GeneratedToken(token, float(log_softmax(row)[token])))
            if guess is None or token != guess.token:
                break
        return settled

    def is_close_call(self, row: np.ndarray) -> bool:
        """Return True if rounding may have decided between the two best tokens."""
        if not self.strategy.greedy:
            return False
        second, best = np.partition(self.strategy.penalised(row, self.text), -2)[-2:]
        return best - second < CLOSE_CALL

    def read_again(self) -> np.ndarray:
        """Read the text again one token at a time, from the last exact token on; return the last
        logits.
        """
        try:
            self.reader.crop(self.exact)
        except ValueError:  # the window has slid: the engine rewinds by REWIND tokens at most
            self.reader.crop(max(self.exact, self.reader.length - REWIND))
        for token in self.text[self.reader.length :]:
            row = self.reader.read([token])[0]
            self.stats.read_again += 1
        self.exact = len(self.text)
        return row
