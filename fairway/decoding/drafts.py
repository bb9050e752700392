"""Guesses at the next few tokens, cheap enough that verifying them in one forward pays: one interface, three kinds.

A draft never changes what is written, only how soon: fairway/decoding/speculative.py accepts a guess or draws another
so that the text is distributed as without it. Drafters with heads of their own (Medusa, arXiv 2401.10774; EAGLE, arXiv
2401.15077) fit behind the same three methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fairway.decoding.search import Reader
from fairway.decoding.strategies import Strategy, draw, softmax


class Guess(NamedTuple):
    token: int
    q: np.ndarray | None = None  # float64[V]: what it was drawn from; None: it was certain


class Draft(Protocol):
    """`follow`, `propose`, verification, `learn`, and again."""

    def follow(self, text: Sequence[int]) -> None:
        """The text is now this: what it was when last followed, and more."""

    def propose(self, most: int) -> list[Guess]:
        """At most so many tokens that may come next. What was drawn is proposed: to withhold it for being unlikely
        would be to try it less often than q says."""

    def learn(self, accepted: int) -> None:
        """Of those proposed last, the first so many were right, and the next, if there was one, was wrong."""


# ==== HOW FAR TO TRUST A DRAFT ========================================================================================
class Gate:
    """How often guesses of each kind proved right so far, and so when to stop guessing."""

    TRUST = 4.0  # guesses that the first estimate counts for

    def __init__(self, least: float):
        """`least`: the chance of acceptance below which one more guess costs more than it brings."""
        self.least, self.right, self.tried = least, {}, {}
        self.chance, self.asked = 1.0, []  # of the proposal that is being made

    def rate(self, kind: tuple, first: float) -> float:
        """The chance of a guess of this kind; `first`: what it is thought to be before any was tried."""
        tried = self.tried.get(kind, 0) + self.TRUST
        return (self.right.get(kind, 0) + self.TRUST * first) / tried

    def begin(self) -> None:
        self.chance, self.asked = 1.0, []

    def opens(self, kind: tuple, first: float) -> bool:
        """Whether to guess once more, given that all guesses before it must be right too."""
        self.chance *= self.rate(kind, first)
        if self.chance < self.least:
            self.fade(
                kind, 0.98
            )  # what is never tried again is in time believed as it was at first
            return False
        self.asked.append(kind)
        return True

    def learn(self, accepted: int) -> None:
        for nth, kind in enumerate(self.asked[: accepted + 1]):
            self.tried[kind] = self.tried.get(kind, 0) + 1
            self.right[kind] = self.right.get(kind, 0) + (nth < accepted)
            if self.tried[kind] > 64:  # a text changes
                self.fade(kind, 0.5)

    def fade(self, kind: tuple, part: float) -> None:
        for counts in (self.tried, self.right):
            counts[kind] = part * counts.get(kind, 0)


# ==== FROM THE TEXT ITSELF ============================================================================================
LOOKUP_LEAST = 0.15  # one more position in a forward costs about a tenth of the forward


class NGram:
    """What followed the last time that the text read as it does now, by the longest run of tokens that is found."""

    LENGTHS = (12, 8, 6, 4, 3, 2, 1)  # of the runs that are looked for
    MOST = (
        1 << 17
    )  # runs that are remembered, some 30 MB; then the older part of the text is forgotten

    def __init__(self):
        self.gate, self.text, self.known = Gate(LOOKUP_LEAST), [], 0
        self.after: dict[
            tuple[int, ...], int
        ] = {}  # a run: where in the text the token after its last occurrence is

    def follow(self, text: Sequence[int]) -> None:
        self.text = text
        if len(self.after) > self.MOST:
            self.after.clear()
            self.known -= self.MOST // (4 * len(self.LENGTHS))
        for at in range(self.known, len(text)):
            for n in self.LENGTHS:
                if n <= at:
                    self.after[tuple(text[at - n : at])] = at
        self.known = len(text)

    def found(self) -> tuple[int, int]:
        """Length of the longest run that ends the text and came before, and where it went on; (0, 0) if none."""
        end = len(self.text)
        runs = (
            (n, self.after.get(tuple(self.text[end - n :]), 0)) for n in self.LENGTHS if n <= end
        )
        return next(((n, at) for n, at in runs if at), (0, 0))

    def propose(self, most: int) -> list[Guess]:
        """A copy of what followed; where that runs into the end of the text, of itself."""
        self.gate.begin()
        guesses, (run, at), end = [], self.found(), len(self.text)
        while (
            run
            and len(guesses) < most
            and self.gate.opens((min(run, self.LENGTHS[0]),), run / (run + 2))
        ):
            guesses.append(Guess(self.text[at]) if at < end else guesses[at - end])
            run, at = run + 1, at + 1
        return guesses

    def learn(self, accepted: int) -> None:
        self.gate.learn(accepted)


class Suffix:
    """A trie of all that followed every run of up to DEPTH - 1 tokens, with counts; a token costs DEPTH steps. The
    guess is the commonest token after that context whose guesses were right most often (after arXiv 2411.04975)."""

    DEPTH = 12
    MOST = 1 << 17  # nodes, some 30 MB; then the older part of the text is forgotten

    def __init__(self):
        self.gate, self.known = Gate(LOOKUP_LEAST), 0
        self.plant()

    def plant(self) -> None:
        """The root alone. Of each node: its token, how often it was seen, how often something followed, and the child
        that followed most often, the later of equals."""
        self.child: dict[int, int] = {}  # node and token as one number: node
        self.token, self.count, self.followed, self.favourite = [0], [0], [0], [0]
        self.contexts = [0]  # nodes of the last 0, 1, 2 ... tokens

    def follow(self, text: Sequence[int]) -> None:
        if len(self.token) > self.MOST:
            self.plant()
            self.known -= min(self.known, self.MOST // (4 * self.DEPTH))
        for token in text[self.known :]:
            self.grow(token)
        self.known = len(text)

    def grow(self, token: int) -> None:
        for node in self.contexts:
            self.followed[node] += 1
            if (child := self.child.setdefault(node << 16 | token, len(self.token))) == len(
                self.token
            ):
                self.token.append(token)
                for of in (self.count, self.followed, self.favourite):
                    of.append(0)
            self.count[child] += 1
            if self.count[child] >= self.count[self.favourite[node]]:
                self.favourite[node] = child
        self.contexts = self.after(self.contexts, token)

    def after(self, contexts: list[int], token: int) -> list[int]:
        """The contexts once `token` has come: those that were seen, which are all up to some length."""
        longer = (self.child.get(node << 16 | token) for node in contexts[: self.DEPTH - 1])
        return [0, *(node for node in longer if node is not None)]

    def propose(self, most: int) -> list[Guess]:
        self.gate.begin()
        guesses, contexts = [], self.contexts
        while len(guesses) < most:
            kinds = [
                (*self.kind(node, depth), node)
                for depth, node in enumerate(contexts)
                if depth and self.followed[node]
            ]
            if not kinds:
                break
            kind, first, node = max(kinds, key=lambda found: self.gate.rate(*found[:2]))
            if not self.gate.opens(kind, first):
                break
            guesses.append(Guess(self.token[self.favourite[node]]))
            contexts = self.after(contexts, guesses[-1].token)
        return guesses

    def kind(self, node: int, depth: int) -> tuple[tuple, float]:
        """What guesses after this context are counted as, and what they are thought to be worth at first."""
        share = self.count[self.favourite[node]] / (self.followed[node] + 1 / depth)
        return (depth.bit_length(), int(4 * share)), share

    def learn(self, accepted: int) -> None:
        self.gate.learn(accepted)


# ==== FROM A MODEL ====================================================================================================
class Model:
    """A smaller model, or the first layers of the same one, that writes ahead by the same strategy."""

    def __init__(self, reader: Reader, strategy: Strategy, rng: np.random.Generator, cost: float):
        """`cost`: of one of its tokens, as a part of a forward of the model that verifies."""
        self.reader, self.strategy, self.rng, self.gate = (
            reader,
            strategy,
            rng,
            Gate(min(cost + 0.15, 0.9)),
        )
        self.text, self.ahead = [], []  # ahead: tokens that it has read beyond the text
        self.first = max(0.7, min(1.0, 1.1 * self.gate.least))  # even a dear draft is tried
        self.proposed, self.lucky = (
            0,
            True,
        )  # how many tokens last time, and whether all of them were right

    def follow(self, text: Sequence[int]) -> None:
        """Forget what was read and did not come true, and the last token, which is read again for what follows."""
        agreed = self.reader.length - len(self.ahead)
        for token in self.ahead:
            if agreed == len(text) - 1 or text[agreed] != token:
                break
            agreed += 1
        self.reader.crop(agreed)
        self.text, self.ahead = text, []
        if not agreed and len(text) > 1:
            self.reader.last(text[:-1])

    def propose(self, most: int) -> list[Guess]:
        self.gate.begin()
        text, guesses, kind = list(self.text), [], (-1 - self.lucky,)
        while len(guesses) < most and self.gate.opens(kind, self.first):
            logits = self.reader.last(text[self.reader.length :])
            q = self.strategy.distribution(logits, text)
            guesses.append(Guess(draw(q, self.rng), q))
            text.append(guesses[-1].token)
            kind = (int(8 * softmax(logits)[text[-1]]),)  # the next one stands on this one
        self.ahead, self.proposed = [guess.token for guess in guesses[:-1]], len(guesses)
        return guesses

    def learn(self, accepted: int) -> None:
        self.gate.learn(accepted)
        self.lucky = accepted == self.proposed
