"""Streams that are predicted side by side, token by token: the model, and the experts on top when they are asked for.

Whoever has read the same tokens in the same steps holds the same numbers, to the bit, on the same machine: that is what
lets a bitstream be decoded.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import TINY, Inputs, Mixture
from fairway.scoring.experts.ngram import ContextCounts
from fairway.scoring.experts.temperature import TEMPERATURES, tempered
from fairway.scoring.memory import Memory
from fairway.scoring.mixed import DEFAULT_EXPERTS, empty_ngram, make_match
from fairway.scoring.neural import Neural, in_float64
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, ByteTable, need


class Rolling:
    """B streams in one batch. Each has its own context, which rolls on: nothing is ever read twice."""

    def __init__(self, model: GPT, first: np.ndarray):
        self.memory, self.streams = Memory(model.eval()), len(first)
        self.learn(first)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray) -> None:
        """int64[B]: what came in each stream."""
        self.logits = self.memory.logits(
            torch.from_numpy(tokens)[:, None].to(self.memory.rt.device)
        )[:, -1]

    def probabilities(self) -> np.ndarray:
        """float64[B, V]: of the next token of each stream."""
        return checked(in_float64(self.logits).softmax(dim=1))


class Windowed:
    """One stream, read in the windows of a score: each row looks back on the tokens that it was scored with."""

    streams = 1

    def __init__(self, neural: Neural, first: np.ndarray):
        need(type(neural) is Neural, "a model that trains as it reads is not decoded; unset TTT")
        self.neural, self.start = neural, -1
        self.recent: list[int] = []  # tokens that the next window may begin with
        self.read, self.document = (
            0,
            0,
        )  # tokens; where the document began, for windows that start anew there
        self.learn(first)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray) -> None:
        neural = self.neural
        if tokens[0] == BOS_ID and neural.cfg.eval_documents:
            self.document = self.read
        self.recent.append(int(tokens[0]))
        self.read += 1
        # One more token, so that the last one has a row. Where a row looks back to hangs on how many came before.
        many = np.broadcast_to(np.int64(0), self.read - self.document + 1)
        start = self.document + int(neural.plan(many).start[-1])
        if start == self.start:
            piece = self.recent[-1:]
        else:
            self.start, self.memory = start, Memory(neural.model, neural.length, neural.rope)
            piece = self.recent = self.recent[start - self.read :]
        self.logits = self.memory.logits(torch.tensor([piece], device=neural.rt.device))[:, -1]

    def probabilities(self) -> np.ndarray:
        return checked(in_float64(self.logits).softmax(dim=1))


def checked(p: Tensor) -> np.ndarray:
    need(
        bool(torch.isfinite(p).all()),
        "the model gives no number for a token: its weights are damaged or too large",
    )
    return p.cpu().numpy()


class Mixed:
    """A neural predictor, mixed with experts that all streams share: each has contexts and a history of its own, but
    what one learns, all know at the next step. `count` tokens will come, after those of `first`, one a stream."""

    def __init__(
        self,
        neural: Rolling | Windowed,
        table: ByteTable,
        cfg: EvalConfig,
        first: np.ndarray,
        count: int,
    ):
        self.neural, self.table, self.streams, self.last = neural, table, neural.streams, first
        need(
            self.streams == 1 or not cfg.expert_reset,
            "experts that forget at each BOS cannot be shared by streams; set EXPERT_RESET=0",
        )
        vocab_size, self.longest = len(table.base), 2 + count // self.streams
        self.grams = empty_ngram(vocab_size, cfg, count + self.streams).side_by_side(self.streams)
        self.matches = make_match(vocab_size, cfg).side_by_side(self.streams, self.longest)
        self.mixture = Mixture(vocab_size, cfg, DEFAULT_EXPERTS)
        self.read(first)
        self.held = neural.probabilities()

    def read(self, tokens: np.ndarray) -> tuple[ContextCounts, Matches]:
        """What the experts knew about the tokens that came, one in each stream; they know them now."""
        known = [], []
        for grams, match, token in zip(self.grams, self.matches, tokens[:, None], strict=True):
            known[0].append(grams.fill(token)), known[1].append(match.fill(token))
        for match in self.matches:
            match.end_at_unread(self.longest)
        return tuple(
            kind(*map(np.concatenate, zip(*parts, strict=True)))
            for kind, parts in zip((ContextCounts, Matches), known, strict=True)
        )

    def probabilities(self) -> np.ndarray:
        return np.stack(
            [
                self.mixture.distribution(
                    self.held[b], self.grams[b].candidate_counts(), self.matches[b].hint()
                )
                for b in range(self.streams)
            ]
        )

    def learn(self, tokens: np.ndarray) -> None:
        self.mixture.fill(self.inputs(tokens, *self.read(tokens)))
        self.last = tokens
        self.neural.learn(tokens)
        self.held = self.neural.probabilities()

    def inputs(self, tokens: np.ndarray, grams: ContextCounts, matches: Matches) -> Inputs:
        """What a mixture reads about the tokens that came, one in each stream."""
        logp, rows = np.log(np.maximum(self.held, TINY)), np.arange(self.streams)
        again = {name: tempered(logp, t) for name, t in TEMPERATURES.items()}
        sizes = self.table.base[tokens] + (
            self.table.space[tokens] & ~self.table.boundary[self.last]
        )
        return Inputs(
            logp[rows, tokens],
            again["sharp"][rows, tokens],
            again["flat"][rows, tokens],
            logp[rows, np.maximum(matches.hint, 0)],
            -(self.held * logp).sum(axis=1),
            grams,
            matches,
            tokens,
            sizes.astype(np.int64),
        )
