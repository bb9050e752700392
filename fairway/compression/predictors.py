"""Predict streams of tokens step by step: with the model, and with experts on top.

Two predictors that read the same tokens in the same steps on the same machine give the same numbers
to the last bit. A bitstream can be decoded only because of that.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import TINY, Mixture, MixtureRows
from fairway.scoring.experts.ngram import ContextCounts
from fairway.scoring.experts.temperature import TEMPERATURES, tempered
from fairway.scoring.memory import Memory
from fairway.scoring.mixed import DEFAULT_EXPERTS, empty_ngram, make_match
from fairway.scoring.neural import Neural, in_float64
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, ByteTable, UserError


class RollingPredictor:
    """B streams in one batch. Each has a context that moves with it: no token is read twice."""

    def __init__(self, model: GPT, first: np.ndarray):
        self.memory, self.streams = Memory(model.eval()), len(first)
        self.learn(first)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray) -> None:
        """Read int64[B], the next token of each stream."""
        column = torch.from_numpy(tokens)[:, None].to(self.memory.rt.device)
        self.logits = self.memory.logits(column)[:, -1]

    def probabilities(self) -> np.ndarray:
        """Return float64[B, V], the distribution of the next token of each stream."""
        return softmax_rows(self.logits)


class WindowedPredictor:
    """One stream, read in the windows of a score: each token sees the context that scored it."""

    streams = 1

    def __init__(self, neural: Neural, first: np.ndarray):
        if type(neural) is not Neural:
            raise UserError("a model that trains while it reads cannot be decoded; unset TTT")
        self.neural, self.start = neural, -1
        self.recent: list[int] = []  # tokens that the next window may start with
        self.tokens_read = 0
        self.document = 0  # where the current document starts, if windows restart with documents
        self.learn(first)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray) -> None:
        """Read int64[1], the next token; a new window reads its whole context again."""
        neural = self.neural
        if tokens[0] == BOS_ID and neural.cfg.eval_documents:
            self.document = self.tokens_read
        self.recent.append(int(tokens[0]))
        self.tokens_read += 1
        # The tokens before a row decide its window. One token more, so that the last has a row too.
        document = np.broadcast_to(np.int64(0), self.tokens_read - self.document + 1)
        start = self.document + int(neural.plan(document).start[-1])
        if start == self.start:
            piece = self.recent[-1:]
        else:
            self.start, self.memory = start, Memory(neural.model, neural.length, neural.rope)
            piece = self.recent = self.recent[start - self.tokens_read :]
        self.logits = self.memory.logits(torch.tensor([piece], device=neural.rt.device))[:, -1]

    def probabilities(self) -> np.ndarray:
        """Return float64[1, V], the distribution of the next token."""
        return softmax_rows(self.logits)


def softmax_rows(logits: Tensor) -> np.ndarray:
    """Return float64[B, V], the softmax of each row, in one precision on all devices."""
    p = in_float64(logits).softmax(dim=1)
    if not torch.isfinite(p).all():
        raise UserError("a logit of the model is not finite: its weights are damaged or too large")
    return p.cpu().numpy()


class MixedPredictor:
    """A neural predictor mixed with experts that all its streams share.

    Each stream has its own expert contexts, but what one stream learns, all know at the next step.
    `first` is the token before each stream, `count` the number of tokens that follow in all.
    """

    def __init__(
        self,
        neural: RollingPredictor | WindowedPredictor,
        table: ByteTable,
        cfg: EvalConfig,
        first: np.ndarray,
        count: int,
    ):
        self.neural, self.table, self.streams, self.last = neural, table, neural.streams, first
        if self.streams > 1 and cfg.expert_reset:
            raise UserError(
                "streams cannot share experts that forget at each BOS; set EXPERT_RESET=0"
            )
        vocab_size, self.longest = len(table.base), 2 + count // self.streams
        self.grams = empty_ngram(vocab_size, cfg, count + self.streams).side_by_side(self.streams)
        self.matches = make_match(vocab_size, cfg).side_by_side(self.streams, self.longest)
        self.mixture = Mixture(vocab_size, cfg, DEFAULT_EXPERTS)
        self.read(first)
        self.neural_p_BV = neural.probabilities()

    def read(self, tokens: np.ndarray) -> tuple[ContextCounts, Matches]:
        """Let the experts read int64[B]; return what they knew about these tokens before."""
        counts, hints = [], []
        for grams, match, token in zip(self.grams, self.matches, tokens[:, None], strict=True):
            counts.append(grams.fill(token))
            hints.append(match.fill(token))
        for match in self.matches:
            match.end_at_unread(self.longest)
        return (
            ContextCounts(*map(np.concatenate, zip(*counts, strict=True))),
            Matches(*map(np.concatenate, zip(*hints, strict=True))),
        )

    def probabilities(self) -> np.ndarray:
        """Return float64[B, V], the mixed distribution of the next token of each stream."""
        rows = zip(self.neural_p_BV, self.grams, self.matches, strict=True)
        return np.stack(
            [
                self.mixture.distribution(p, grams.candidate_counts(), match.hint())
                for p, grams, match in rows
            ]
        )

    def learn(self, tokens: np.ndarray) -> None:
        """Read int64[B], the next token of each stream."""
        self.mixture.fill(self.inputs(tokens, *self.read(tokens)))
        self.last = tokens
        self.neural.learn(tokens)
        self.neural_p_BV = self.neural.probabilities()

    def inputs(self, tokens: np.ndarray, grams: ContextCounts, matches: Matches) -> MixtureRows:
        """Return what the mixture learns from int64[B], the next token of each stream."""
        p_BV, rows = self.neural_p_BV, np.arange(self.streams)
        logp_BV = np.log(np.maximum(p_BV, TINY))
        at_temperature = {name: tempered(logp_BV, t) for name, t in TEMPERATURES.items()}
        boundary = self.table.boundary[self.last]
        sizes = self.table.base[tokens] + (self.table.space[tokens] & ~boundary)
        return MixtureRows(
            logp_BV[rows, tokens],
            at_temperature["sharp"][rows, tokens],
            at_temperature["flat"][rows, tokens],
            logp_BV[rows, np.maximum(matches.hint, 0)],
            -(p_BV * logp_BV).sum(axis=1),
            grams,
            matches,
            tokens,
            sizes.astype(np.int64),
        )
