"""Each target token's neural log-probability, once: window planner, batches, ranks.

A text of n tokens has rows 0 to n - 2; row j is target token j + 1, read off at input j. Which tokens a row looks back
on follows from the tokens before it alone: never from the text's length, the batch, or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fairway.scoring.columns import Columns
from fairway.scoring.experts.temperature import TEMPERATURES, tempered_at
from fairway.scoring.memory import Memory, rotations
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime, document_bounds, need

KINDS = {
    "logp": "f8",
    "sharp": "f8",
    "flat": "f8",
    "hint": "f8",
    "entropy": "f8",
}  # what a mixture reads
# Called with the rows that were just filled and their log-probabilities.
OnRows = Callable[[np.ndarray, np.ndarray], None]
ROUND = 64  # windows are padded to a multiple of it, so that those of short documents share shapes
PIECE = 128  # tokens that a cached stream reads at a time: a matter of speed alone
WARM = 8  # a cached stream scores this many contexts' worth of rows, after reading one to warm up
MOST_LOGITS = 1 << 26  # held at a time


class Windows(NamedTuple):
    """One row for each stretch of input that the model reads from a clean start."""

    start: np.ndarray  # its first input
    first: np.ndarray  # the first row that it scores
    end: np.ndarray  # one past its last input, and its last row


def plan(tokens: np.ndarray, length: int, stride: int, documents: bool = False) -> Windows:
    """Windows of `length` inputs that start every `stride`, over the text or over each document anew. The first scores
    all its rows, each later one those that it is the first to reach: plan(12 tokens, 8, 2) scores 0-7, 8-9, 10."""
    rows = max(len(tokens) - 1, 0)
    cuts = document_bounds(tokens) if documents else np.array([0, len(tokens)])
    cuts = np.unique(np.minimum(cuts, rows))
    begin, stop = cuts[:-1], cuts[1:]
    count = 1 + np.maximum(0, -(-(stop - begin - length) // stride))
    which = np.arange(count.sum()) - np.repeat(
        np.cumsum(count) - count, count
    )  # 0, 1, 2... within each stretch
    start = np.repeat(begin, count) + which * stride
    end = np.minimum(start + length, np.repeat(stop, count))
    first = np.where(which == 0, start, start + length - stride)
    return Windows(start, first, end)


def coverage(windows: Windows, rows: int) -> np.ndarray:
    """How often each row is scored; a plan is right when all are ones."""
    steps = np.zeros(rows + 1, np.int64)
    np.add.at(steps, windows.first, 1)
    np.add.at(steps, windows.end, -1)
    return np.cumsum(steps[:-1])


def in_float64(logits: Tensor) -> Tensor:
    return (logits.cpu() if logits.device.type == "mps" else logits).double()  # MPS has none


def measure(
    logits: Tensor, targets: np.ndarray, hints: np.ndarray | None, names: list[str]
) -> dict[str, np.ndarray]:
    """The named columns of some rows, from logits [r, V]; hints are tokens whose log-probability is wanted, or -1."""
    z = in_float64(logits)
    total = z.logsumexp(dim=1)

    def pick(z, ids):
        return z.gather(1, torch.from_numpy(ids.astype(np.int64)).to(z.device)[:, None])[:, 0]  # noqa: E731

    columns: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: pick(z, targets) - total,
        "entropy": lambda: total - ((z - total[:, None]).exp() * z).sum(dim=1),
        "hint": lambda: pick(z, np.maximum(hints, 0)) - total,
        **{
            name: lambda t=t: tempered_at(z, pick(z, targets), t)
            for name, t in TEMPERATURES.items()
        },
    }
    return {name: columns[name]().cpu().numpy() for name in names}


class Neural:
    """The model of an artifact as a scorer of rows. Rows come from windows ("sliding"), or from streams in which each
    piece reads the keys and values of the pieces before it ("cached": as far back, at a fraction of the work)."""

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        self.model, self.cfg, self.rt = model.eval(), cfg, rt
        self.digests: list[
            tuple[int, str]
        ] = []  # of what test-time training had learnt before a row; nothing here
        self.length = cfg.eval_seq_len or model.cfg.train_seq_len
        self.cached, self.stride = cfg.eval_mode == "cached", min(cfg.eval_stride, self.length)
        self.fixed = (
            rt.device.type == "cuda"
        )  # one shape for all: in bf16 another one would change scores visibly
        span = self.length * (WARM + 1) + PIECE if self.cached else self.length + ROUND
        stretch = max(1.0, self.length / model.cfg.train_seq_len) if cfg.ntk_rope else 1.0
        self.rope = rotations(model, span, stretch)

    def plan(self, tokens: np.ndarray) -> Windows:
        if (
            self.cached
        ):  # streams that overlap by one context: the same rows whatever runs beside them
            return plan(
                tokens, self.length * (WARM + 1), self.length * WARM, self.cfg.eval_documents
            )
        return plan(tokens, self.length, self.stride, self.cfg.eval_documents)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Rows at which something begins that a leak might hide behind."""
        windows, rows = self.plan(tokens), max(len(tokens) - 1, 0)
        found = {"window": windows.first, "document": document_bounds(tokens)[:-1]}
        if self.cached:
            found["chunk"] = np.arange(0, rows, PIECE)
        found["batch"] = windows.first[
            :: self.batch_size(int((windows.end - windows.start).max(initial=1)))
        ]
        return {kind: where[where < rows] for kind, where in found.items()}

    def batch_size(self, length: int) -> int:
        width = PIECE if self.cached else max(length, 1)
        tokens = self.cfg.eval_batch_tokens or (8192 if self.rt.device.type == "cpu" else 65_536)
        return max(1, min(tokens, MOST_LOGITS // self.model.cfg.vocab_size) // width)

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths as they run: of few values, since the shape decides the rounding."""
        if self.cached:
            return -(-lengths // PIECE) * PIECE
        return np.full_like(lengths, self.length) if self.fixed else -(-lengths // ROUND) * ROUND

    def batches(self, windows: Windows) -> list[np.ndarray]:
        """Windows of like length together, in order; -1 fills up, so that batches of a length have few shapes."""
        padded = self.padded(windows.end - windows.start)
        found = []
        for length in np.unique(padded):
            own, size = np.flatnonzero(padded == length), self.batch_size(int(length))
            own = np.pad(
                own, (0, -len(own) % (size if self.fixed else min(size, 4))), constant_values=-1
            )
            found += np.split(own, range(size, len(own), size))
        return found

    @torch.no_grad()
    def passes(
        self, tokens: np.ndarray, windows: Windows, batch: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """(rows, their logits [r, V]) of a batch, in pieces that fit."""
        mine = Windows(*(np.where(batch < 0, 0, part[batch]) for part in windows))
        lengths = np.where(batch < 0, 0, mine.end - mine.start)
        width = int(self.padded(lengths).max())
        inputs = mine.start[:, None] + np.arange(width)
        x = torch.from_numpy(tokens[np.minimum(inputs, len(tokens) - 1)].astype(np.int64)).to(
            self.rt.device
        )
        wanted = (inputs >= mine.first[:, None]) & (np.arange(width) < lengths[:, None])
        memory = Memory(self.model, self.length, self.rope) if self.cached else None
        for at in range(0, width, step := PIECE if self.cached else width):
            piece, some = x[:, at : at + step], wanted[:, at : at + step]
            with self.rt.autocast():
                logits = (
                    memory.logits(piece)
                    if memory
                    else self.model.from_embedded(
                        self.model.embed(piece), tuple(table[:width] for table in self.rope)
                    )
                )
            if some.any():
                yield (
                    inputs[:, at : at + step][some],
                    logits[torch.from_numpy(some).to(logits.device)],
                )

    def adjusted(self, logits: Tensor) -> Tensor:
        """What test-time training adds to logits; nothing here."""
        return logits

    def score(
        self,
        tokens: np.ndarray,
        windows: Windows,
        columns: Columns,
        hints: np.ndarray | None,
        on_progress: OnRows | None,
    ) -> None:
        """Fill the rows of some windows, this rank's share of them."""
        for batch in self.batches(windows)[self.rt.mine]:
            for i in batch[batch >= 0]:
                columns.covered[windows.first[i] : windows.end[i]] = (
                    0  # a run killed between its pieces left some
                )
            for rows, logits in self.passes(tokens, windows, batch):
                found = measure(
                    self.adjusted(logits),
                    tokens[rows + 1],
                    None if hints is None else hints[rows],
                    columns.names,
                )
                need(
                    np.isfinite(found["logp"]).all(),
                    f"the model gives no number for token {rows[0] + 1}: its "
                    "weights are damaged or too large; train again",
                )
                columns.put(rows, found)
                if on_progress:
                    on_progress(rows, found["logp"])

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """Fill every row that is not yet filled. Under torchrun each rank does its share, and all wait for the last."""
        windows = self.plan(tokens)
        assert (coverage(windows, columns.rows) == 1).all(), "the plan must score each row once"
        left = [
            i
            for i in range(len(windows.first))
            if not columns.covered[windows.first[i] : windows.end[i]].all()
        ]
        self.wait()  # every rank has seen what is left before any begins
        self.score(tokens, Windows(*(part[left] for part in windows)), columns, hints, on_progress)
        self.wait()

    def wait(self) -> None:
        if self.rt.world > 1:
            dist.barrier()

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """float64[len(rows), V]: what the model held for these rows; of tokens it sees those up to each row only."""
        windows, (rows, places) = (
            self.plan(tokens),
            np.unique(np.asarray(rows, np.int64), return_inverse=True),
        )
        at = np.searchsorted(windows.first, rows, side="right") - 1
        todo, found = (
            Windows(windows.start[at], rows, rows + 1),
            np.empty((len(rows), self.model.cfg.vocab_size)),
        )
        for batch in self.batches(todo):
            for got, logits in self.passes(tokens, todo, batch):
                z = in_float64(self.adjusted(logits)).softmax(dim=1).cpu().numpy()
                found[np.searchsorted(rows, got)] = z
        return found[places]


def make_neural(model: GPT, cfg: EvalConfig, rt: Runtime) -> Neural:
    """Return the scorer that TTT asks for. Test-time training counts as code only if it is used."""
    if cfg.ttt == "none":
        return Neural(model, cfg, rt)
    from fairway.scoring.adaptation import FORMS

    return FORMS[cfg.ttt](model, cfg, rt)
