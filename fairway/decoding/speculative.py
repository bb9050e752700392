"""Several tokens a forward: a draft guesses, the model verifies all guesses at once, and the text is what it would have
been without (arXiv 2211.17192, 2302.01318)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fairway.decoding.drafts import Draft, Guess
from fairway.decoding.search import Reader, Step
from fairway.decoding.strategies import Strategy, draw, log_softmax

CLOSE = (
    1e-4  # logits: a forward of several tokens differs from several of one by 1e-6 to 1e-5, in fp32
)
REACH = 64  # tokens that every engine can take back


@dataclass
class Stats:
    tokens: int = 0
    verifications: int = 0  # forwards of the model that verified guesses, or had none to verify
    drafted: int = 0
    accepted: int = 0
    read_again: int = 0  # tokens, one by one, to decide what was too close to call
    seconds: float = 0.0
    draft_seconds: float = 0.0  # of those

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.drafted, 1)

    @property
    def tokens_per_verification(self) -> float:
        return self.tokens / max(self.verifications, 1)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(self.seconds, 1e-9)


def accept(p: np.ndarray, guess: Guess | None, rng: np.random.Generator) -> int:
    """A token of distribution p: the guess with probability min(1, p/q), or else one of what p has more than q.

    A certain guess is drawn from a q that has nothing else. Where p has one token only, as greedily, that one comes out
    whatever was guessed."""
    if guess is None:
        return draw(p, rng)
    q = guess.q if guess.q is not None else np.eye(1, len(p), guess.token)[0]
    if rng.random() * q[guess.token] < p[guess.token]:
        return guess.token
    more = np.maximum(p - q, 0)
    return draw(more if more.any() else p, rng)


class Speculation:
    """Tokens after the prompt, without end, as `plain` gives them: `for step in Speculation(...)`. The reader has read
    the prompt but for its last token, the draft nothing.

    Greedily the same tokens as `plain`, one by one. A forward of several tokens rounds otherwise than several forwards,
    so that two logits within CLOSE of each other may change places: then the tokens that were read since the last such
    place are read again, one at a time, as `plain` reads them. Each is read again once at most. Two limits: keys and
    values kept coarsely, or made in 16 bits, round by more than CLOSE; beyond REACH nothing that left the window is
    read again. There the text is that of `plain` but where two tokens are as good to within that rounding."""

    def __init__(
        self,
        reader: Reader,
        prompt: Sequence[int],
        strategy: Strategy,
        rng: np.random.Generator,
        draft: Draft,
        most: int,
    ):
        """`most`: guesses that are verified at once; with the token before them, no more than the reader takes."""
        self.reader, self.text, self.strategy, self.rng = reader, list(prompt), strategy, rng
        self.draft, self.most, self.stats = draft, min(most, reader.most - 1), Stats()
        self.alike = (
            reader.length
        )  # tokens whose keys and values are to the bit what `plain` would have
        draft.follow(self.text)

    def __iter__(self) -> Iterator[Step]:
        while True:
            yield from self.round()

    def round(self) -> list[Step]:
        """One verification, and the tokens that it settles: at least one."""
        began = time.perf_counter()
        guesses = self.draft.propose(self.most)
        self.stats.draft_seconds += time.perf_counter() - began
        steps = self.verified(guesses)
        right = sum(step.token == guess.token for step, guess in zip(steps, guesses, strict=False))
        self.reader.crop(len(self.text) - 1)
        self.draft.learn(right)
        self.draft.follow(self.text)
        self.stats.tokens += len(steps)
        self.stats.verifications += 1
        self.stats.drafted += len(guesses)
        self.stats.accepted += right
        self.stats.seconds += time.perf_counter() - began
        return steps

    def verified(self, guesses: list[Guess]) -> list[Step]:
        """The guesses that hold, and one token more: in place of the first that does not, or after the last."""
        exact = not guesses and self.alike == self.reader.length
        rows, steps = self.reader.read([self.text[-1], *(guess.token for guess in guesses)]), []
        self.alike += exact
        for row, guess in zip(rows, [*guesses, None], strict=True):
            doubtful = len(self.text) > self.alike and self.close(row)
            if doubtful:
                row, guess = self.read_again(), None
            token = accept(self.strategy.distribution(row, self.text), guess, self.rng)
            self.text.append(token)
            steps.append(Step(token, float(log_softmax(row)[token])))
            if guess is None or token != guess.token:
                break
        return steps

    def close(self, row: np.ndarray) -> bool:
        """Whether rounding may have chosen between the two best tokens."""
        if not self.strategy.greedy:
            return False
        second, best = np.partition(self.strategy.penalised(row, self.text), -2)[-2:]
        return best - second < CLOSE

    def read_again(self) -> np.ndarray:
        """The last row of the text, read one token at a time from where that was last done."""
        try:
            self.reader.crop(self.alike)
        except ValueError:  # once the window has slid, the engine goes back by REACH at most
            self.reader.crop(max(self.alike, self.reader.length - REACH))
        for token in self.text[self.reader.length :]:
            row = self.reader.read([token])[0]
            self.stats.read_again += 1
        self.alike = len(self.text)
        return row
