"""Drafters guess the next few tokens, cheaply enough that verifying the guesses in one forward
pays.

There is one interface and three kinds: two look the text itself up, one runs a smaller model. A
drafter never changes what is written, only how soon: fairway/decoding/speculative.py accepts a
guess or draws another token, so that the text has the same distribution as without it. Drafters
with heads of their own (Medusa, arXiv 2401.10774; EAGLE, arXiv 2401.15077) would fit the same three
methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from fairway.decoding.reader import Reader
from fairway.decoding.strategies import Strategy, draw, softmax
from train_gpt import GPT


class Guess(NamedTuple):
    """A guessed token, and the distribution it was drawn from (None: the guess was certain)."""

    token: int
    q: np.ndarray | None = None  # float64[V]


class Drafter(Protocol):
    """Called in a cycle: `follow`, `propose`, then the model verifies, then `learn`."""

    def follow(self, text: Sequence[int]) -> None:
        """Take note of the text so far. It begins with the text that was followed last."""

    def propose(self, most: int) -> list[Guess]:
        """Return at most `most` guesses for the tokens that come next.

        A drawn token is always proposed. Withholding unlikely ones would try them less often than
        q says, and the verified text would no longer have the right distribution.
        """

    def learn(self, accepted: int) -> None:
        """Learn that the first `accepted` guesses were right and that the next one was wrong."""


# ==== WHEN TO STOP GUESSING =======================================================================
class AcceptanceGate:
    """Estimate how often guesses of each kind prove right, and stop guessing when it does not
    pay.
    """

    PRIOR_WEIGHT = 4.0  # the first estimate counts as much as this many guesses
    FORGET_AFTER = 64  # guesses of a kind; then old ones count half, because a text changes
    FADE = 0.98  # of a kind that was refused: it returns to its first estimate and is tried again

    def __init__(self, least: float):
        """Set `least`, the chance of acceptance below which one more guess costs more than it
        brings.
        """
        self.least, self.right, self.tried = least, {}, {}
        self.chance, self.asked = 1.0, []  # of the proposal under way

    def rate(self, kind: tuple, first: float) -> float:
        """Return the chance that a guess of this kind is right; `first` is the estimate before any
        was tried.
        """
        tried = self.tried.get(kind, 0) + self.PRIOR_WEIGHT
        return (self.right.get(kind, 0) + self.PRIOR_WEIGHT * first) / tried

    def begin(self) -> None:
        """Start a new proposal."""
        self.chance, self.asked = 1.0, []

    def opens(self, kind: tuple, first: float) -> bool:
        """Return True if one more guess pays, given that all guesses before it must be right
        too.
        """
        self.chance *= self.rate(kind, first)
        if self.chance < self.least:
            self.fade(kind, self.FADE)
            return False
        self.asked.append(kind)
        return True

    def learn(self, accepted: int) -> None:
        """Count the `accepted` guesses as right and the next one as wrong. Guesses after a wrong
        one say nothing: they continued another text.
        """
        for nth, kind in enumerate(self.asked[: accepted + 1]):
            self.tried[kind] = self.tried.get(kind, 0) + 1
            self.right[kind] = self.right.get(kind, 0) + (nth < accepted)
            if self.tried[kind] > self.FORGET_AFTER:
                self.fade(kind, 0.5)

    def fade(self, kind: tuple, factor: float) -> None:
        """Multiply the counts of a kind by `factor`."""
        for counts in (self.tried, self.right):
            counts[kind] = factor * counts.get(kind, 0)


# ==== LOOKING THE TEXT UP =========================================================================
# One more position in a forward costs about a tenth of the forward (bench/decode.py).
LOOKUP_LEAST = 0.15


class NGramDrafter:
    """Find the last place where the text read as it does now, by the longest run of tokens, and
    guess that it goes on as it did there.
    """

    RUN_LENGTHS = (12, 8, 6, 4, 3, 2, 1)
    MOST_RUNS = 1 << 17  # some 30 MB; beyond that the older part of the text is forgotten

    def __init__(self):
        self.gate, self.text, self.known = AcceptanceGate(LOOKUP_LEAST), [], 0
        # For each run, the position in the text just after its last occurrence.
        self.after: dict[tuple[int, ...], int] = {}

    def follow(self, text: Sequence[int]) -> None:
        """Index every run of the new tokens."""
        self.text = text
        if len(self.after) > self.MOST_RUNS:
            self.after.clear()
            self.known -= self.MOST_RUNS // (4 * len(self.RUN_LENGTHS))
        for at in range(self.known, len(text)):
            for n in self.RUN_LENGTHS:
                if n <= at:
                    self.after[tuple(text[at - n : at])] = at
        self.known = len(text)

    def longest_run(self) -> tuple[int, int]:
        """Return the length of the longest run that ends the text and occurred before, and the
        position where it went on; (0, 0) if there is none.
        """
        end = len(self.text)
        runs = (
            (n, self.after.get(tuple(self.text[end - n :]), 0))
            for n in self.RUN_LENGTHS
            if n <= end
        )
        return next(((n, at) for n, at in runs if at), (0, 0))

    def propose(self, most: int) -> list[Guess]:
        """Copy what followed the run. A copy that reaches the end of the text goes on with the
        guesses themselves, so that a loop of any length is guessed.
        """
        self.gate.begin()
        guesses, (run, at), end = [], self.longest_run(), len(self.text)
        longest = self.RUN_LENGTHS[0]
        while (
            run and len(guesses) < most and self.gate.opens((min(run, longest),), run / (run + 2))
        ):
            guesses.append(Guess(self.text[at]) if at < end else guesses[at - end])
            run, at = run + 1, at + 1
        return guesses

    def learn(self, accepted: int) -> None:
        """Tell the gate."""
        self.gate.learn(accepted)


class SuffixDrafter:
    """Count, in a trie, what followed every run of up to DEPTH - 1 tokens; a new token costs DEPTH
    steps.

    The guess is the commonest token after the context whose guesses were right most often (after
    arXiv 2411.04975).
    """

    DEPTH = 12
    MOST_NODES = 1 << 17  # some 30 MB; beyond that the older part of the text is forgotten

    def __init__(self):
        self.gate, self.known = AcceptanceGate(LOOKUP_LEAST), 0
        self.plant()

    def plant(self) -> None:
        """Reset the trie to its root.

        Each node holds its token, how often it was seen, how often anything followed it, and the
        child that followed most often (the later one of equals).
        """
        self.child: dict[int, int] = {}  # parent node << 16 | token: child node
        self.token, self.count, self.followed, self.favourite = [0], [0], [0], [0]
        self.contexts = [0]  # the nodes of the last 0, 1, 2 ... tokens of the text

    def follow(self, text: Sequence[int]) -> None:
        """Add the new tokens to the trie."""
        if len(self.token) > self.MOST_NODES:
            self.plant()
            self.known -= min(self.known, self.MOST_NODES // (4 * self.DEPTH))
        for token in text[self.known :]:
            self.grow(token)
        self.known = len(text)

    def grow(self, token: int) -> None:
        """Count `token` after each context of the text."""
        for node in self.contexts:
            self.followed[node] += 1
            child = self.child.setdefault(node << 16 | token, len(self.token))
            if child == len(self.token):
                self.token.append(token)
                for counts in (self.count, self.followed, self.favourite):
                    counts.append(0)
            self.count[child] += 1
            if self.count[child] >= self.count[self.favourite[node]]:
                self.favourite[node] = child
        self.contexts = self.after(self.contexts, token)

    def after(self, contexts: list[int], token: int) -> list[int]:
        """Return the contexts once `token` has come: those seen before, which are all of them up to
        some length.
        """
        longer = (self.child.get(node << 16 | token) for node in contexts[: self.DEPTH - 1])
        return [0, *(node for node in longer if node is not None)]

    def propose(self, most: int) -> list[Guess]:
        """Guess token by token, each time from the context with the highest rate so far."""
        self.gate.begin()
        guesses, contexts = [], self.contexts
        while len(guesses) < most:
            candidates = [
                (*self.kind(node, depth), node)
                for depth, node in enumerate(contexts)
                if depth and self.followed[node]
            ]
            if not candidates:
                break
            kind, first, node = max(candidates, key=lambda c: self.gate.rate(*c[:2]))
            if not self.gate.opens(kind, first):
                break
            guesses.append(Guess(self.token[self.favourite[node]]))
            contexts = self.after(contexts, guesses[-1].token)
        return guesses

    def kind(self, node: int, depth: int) -> tuple[tuple, float]:
        """Return the kind under which guesses after this context are counted (its depth and how
        decided its counts are, both coarsely), and the first estimate for it.
        """
        share = self.count[self.favourite[node]] / (self.followed[node] + 1 / depth)
        return (depth.bit_length(), int(4 * share)), share

    def learn(self, accepted: int) -> None:
        """Tell the gate."""
        self.gate.learn(accepted)


# ==== A SMALLER MODEL =============================================================================
class ModelDrafter:
    """A smaller model, or the first layers of the same one, that writes ahead by the same
    strategy.
    """

    def __init__(self, reader: Reader, strategy: Strategy, rng: np.random.Generator, cost: float):
        """Set `cost`, the cost of one of its tokens as a fraction of the verifying model's
        forward.
        """
        self.reader, self.strategy, self.rng = reader, strategy, rng
        self.gate = AcceptanceGate(min(cost + LOOKUP_LEAST, 0.9))
        self.text, self.ahead = [], []  # ahead: tokens that it has read beyond the text
        # The first estimate lies above the gate's threshold, so that an expensive drafter is tried.
        self.first = max(0.7, min(1.0, 1.1 * self.gate.least))
        self.proposed, self.all_right = 0, True  # the last proposal: its size and its success

    def follow(self, text: Sequence[int]) -> None:
        """Forget the tokens read ahead that did not come true, and the last token of the text,
        which is read again to get the logits after it.
        """
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
        """Draw tokens one by one until the gate closes."""
        self.gate.begin()
        text, guesses, kind = list(self.text), [], (-1 - self.all_right,)
        while len(guesses) < most and self.gate.opens(kind, self.first):
            logits = self.reader.last(text[self.reader.length :])
            q = self.strategy.distribution(logits, text)
            guesses.append(Guess(draw(q, self.rng), q))
            text.append(guesses[-1].token)
            # The next guess is as good as this token was likely: rates are kept in eight classes.
            kind = (int(8 * softmax(logits)[text[-1]]),)
        self.ahead, self.proposed = [guess.token for guess in guesses[:-1]], len(guesses)
        return guesses

    def learn(self, accepted: int) -> None:
        """Tell the gate, and remember whether all guesses were right."""
        self.gate.learn(accepted)
        self.all_right = accepted == self.proposed


def model_drafter(
    draft: GPT, model: GPT, reader: Reader, strategy: Strategy, rng: np.random.Generator
) -> ModelDrafter:
    """Return a drafter that runs `draft` in this reader, at its cost next to that of `model`."""
    # Passes through a layer; the output head costs about as much as one more.
    draft_cost, model_cost = (1 + len(m.passes(m.looping)) for m in (draft, model))
    return ModelDrafter(reader, strategy, rng, draft_cost / model_cost)


LOOKUP_DRAFTERS = {"ngram": NGramDrafter, "suffix": SuffixDrafter}
