"""The model's log-probability of each target token: planning windows, batching, sharing by ranks.

A text of n tokens has rows 0 to n - 2: row j is about target token j + 1, predicted at input j. The
tokens before a row decide which of them the row sees. The text's length, the batch and the number
of ranks never do.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fairway.scoring.columns import Columns
from fairway.scoring.experts.temperature import TEMPERATURES, tempered_at
from fairway.scoring.memory import Memory, model_rope
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime, UserError, document_bounds

# The columns that a mixture reads, and their numpy types.
KINDS = {"logp": "f8", "sharp": "f8", "flat": "f8", "hint": "f8", "entropy": "f8"}
# Called with the rows that were just filled and their log-probabilities.
OnRows = Callable[[np.ndarray, np.ndarray], None]
ROUND = 64  # windows are padded to a multiple, so that those of short documents share shapes
PIECE = 128  # tokens that a cached stream reads at a time; it changes the speed only
WARM = 8  # a cached stream scores this many contexts of rows, after one context of warm-up
MAX_LOGITS = 1 << 26  # logits in memory at a time
LOGITS_IN_CACHE = 1 << 23  # on a CPU, passes with more take half as long again
PATIENCE = timedelta(hours=12)  # the ten minutes of NCCL would end a score that is late


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """Return a group of all ranks in which one may wait PATIENCE for another."""
    return dist.new_group(timeout=PATIENCE, backend="gloo")


class Windows(NamedTuple):
    """Stretches of input that the model reads from a clean start: int64[windows] each."""

    start: np.ndarray  # first input
    first: np.ndarray  # first row that the window scores
    end: np.ndarray  # one past its last input and its last row

    def pick(self, which: np.ndarray | list[int] | slice) -> Windows:
        """Return some of the windows; index -1 gives an empty one (a batch's filler)."""
        if isinstance(which, np.ndarray):
            return Windows(*(np.where(which < 0, 0, part[which]) for part in self))
        return Windows(*(part[which] for part in self))


def plan(tokens: np.ndarray, length: int, stride: int, documents: bool = False) -> Windows:
    """Cut a text, or each of its documents, into windows of `length` inputs every `stride`.

    The first window scores all its rows; each later one scores the rows that it reaches first:
    plan(12 tokens, 8, 2) gives windows that score the rows 0-7, 8-9 and 10.
    """
    rows = max(len(tokens) - 1, 0)
    cuts = document_bounds(tokens) if documents else np.array([0, len(tokens)])
    cuts = np.unique(np.minimum(cuts, rows))
    begin, stop = cuts[:-1], cuts[1:]
    count = 1 + np.maximum(0, -(-(stop - begin - length) // stride))
    # The number of each window in its stretch: 0, 1, 2, ...
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(begin, count) + nth * stride
    end = np.minimum(start + length, np.repeat(stop, count))
    first = np.where(nth == 0, start, start + length - stride)
    return Windows(start, first, end)


def times_scored(windows: Windows, rows: int) -> np.ndarray:
    """Return int64[rows]: how often each row is scored. In a correct plan all are ones."""
    steps = np.zeros(rows + 1, np.int64)
    np.add.at(steps, windows.first, 1)
    np.add.at(steps, windows.end, -1)
    return np.cumsum(steps[:-1])


def in_float64(logits: Tensor) -> Tensor:
    """Return logits as float64; on the CPU if they were on MPS, which has no float64."""
    return (logits.cpu() if logits.device.type == "mps" else logits).double()


def neural_columns(
    logits: Tensor, targets: np.ndarray, hints: np.ndarray | None, names: list[str]
) -> dict[str, np.ndarray]:
    """Compute the named columns of r rows from their logits [r, V].

    `hints` are tokens whose log-probability is wanted, or -1 where there is none.
    """
    z = in_float64(logits)
    total = z.logsumexp(dim=1)

    def pick(ids: np.ndarray) -> Tensor:
        return z.gather(1, torch.from_numpy(ids.astype(np.int64)).to(z.device)[:, None])[:, 0]

    columns: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: pick(targets) - total,
        "entropy": lambda: total - ((z - total[:, None]).exp() * z).sum(dim=1),
        "hint": lambda: pick(np.maximum(hints, 0)) - total,
        **{name: lambda t=t: tempered_at(z, pick(targets), t) for name, t in TEMPERATURES.items()},
    }
    return {name: columns[name]().cpu().numpy() for name in names}


def window_logits(
    model: GPT, tokens_BT: Tensor, cos_TR: Tensor, sin_TR: Tensor, first: int = 0
) -> Tensor:
    """Return logits [B, T - first, V] of windows that the model reads from a clean start."""
    return model.from_embedded(model.embed(tokens_BT), (cos_TR, sin_TR), first=first)


@functools.cache
def compiled_window_logits() -> Callable:
    """Return `window_logits`, compiled for each shape; all scorers of a process share the code."""
    return torch.compile(window_logits, fullgraph=True, dynamic=False)


class Neural:
    """The model of an artifact as a scorer of rows.

    "sliding": each row is scored in a window that the model reads from a clean start. "cached":
    rows are scored in streams, and each piece reads the keys and values of the pieces before it.
    A row sees as much context either way; cached costs a fraction of the work.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        self.model, self.cfg, self.rt = model.eval(), cfg, rt
        # (first row, digest of what was learned before it): test-time training fills it.
        self.digests: list[tuple[int, str]] = []
        self.length = cfg.eval_seq_len or model.cfg.train_seq_len
        self.cached, self.stride = cfg.eval_mode == "cached", min(cfg.eval_stride, self.length)
        on_cuda = rt.device.type == "cuda"
        self.compiled = cfg.eval_compile == "on" or cfg.eval_compile == "auto" and on_cuda
        # In bf16 on CUDA another shape changes scores visibly, and each shape would be compiled:
        # every batch has the same one.
        self.fixed_shape = on_cuda or self.compiled
        if on_cuda:  # cuBLAS reads this once, at the first product; a repeatable backward needs it
            os.putenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        span = self.length * (WARM + 1) + PIECE if self.cached else self.length + ROUND
        stretch = max(1.0, self.length / model.cfg.train_seq_len) if cfg.ntk_rope else 1.0
        self.rope = model_rope(model, span, stretch)

    # ==== PLANNING ================================================================================
    def plan(self, tokens: np.ndarray) -> Windows:
        """Return the windows of a text. Cached streams overlap by one context of warm-up."""
        length, stride = self.length, self.stride
        if self.cached:
            length, stride = self.length * (WARM + 1), self.length * WARM
        return plan(tokens, length, stride, self.cfg.eval_documents)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at which something begins, by kind: where a leak would show first."""
        windows, rows = self.plan(tokens), max(len(tokens) - 1, 0)
        longest = int((windows.end - windows.start).max(initial=1))
        starts = {"window": windows.first, "document": document_bounds(tokens)[:-1]}
        if self.cached:
            starts["chunk"] = np.arange(0, rows, PIECE)
        starts["batch"] = windows.first[:: self.batch_size(longest)]
        return {kind: first_rows[first_rows < rows] for kind, first_rows in starts.items()}

    def batch_size(self, length: int) -> int:
        """Return how many windows of `length` inputs fit into one forward pass."""
        width = PIECE if self.cached else max(length, 1)
        V, on_cpu = self.model.cfg.vocab_size, self.rt.device.type == "cpu"
        usual = min(8192, LOGITS_IN_CACHE // V) if on_cpu else 65_536
        tokens = self.cfg.eval_batch_tokens or usual
        return max(1, min(tokens, MAX_LOGITS // V) // width)

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Round lengths up to those that run: few different ones, as the shape decides rounding."""
        if self.cached:
            return -(-lengths // PIECE) * PIECE
        if self.fixed_shape:
            return np.full_like(lengths, self.length)
        return -(-lengths // ROUND) * ROUND

    def batches(self, windows: Windows) -> list[np.ndarray]:
        """Return indices of windows, batch by batch, grouped by padded length, in order.

        -1 fills a batch up, so that batches of one length have few shapes.
        """
        padded = self.padded(windows.end - windows.start)
        batches = []
        for length in np.unique(padded):
            own, size = np.flatnonzero(padded == length), self.batch_size(int(length))
            multiple = size if self.fixed_shape else min(size, 4)
            own = np.pad(own, (0, -len(own) % multiple), constant_values=-1)
            parts = np.split(own, range(size, len(own), size))
            batches += [part for part in parts if (part >= 0).any()]
        return batches

    # ==== SCORING =================================================================================
    @torch.no_grad()
    def passes(
        self, tokens: np.ndarray, windows: Windows, batch: np.ndarray
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield (rows, their logits [r, V]) of a batch, in pieces that fit into memory."""
        own = windows.pick(batch)
        lengths = np.where(batch < 0, 0, own.end - own.start)
        width = int(self.padded(lengths).max())
        inputs = own.start[:, None] + np.arange(width)
        x = torch.from_numpy(tokens[np.minimum(inputs, len(tokens) - 1)].astype(np.int64))
        x = x.to(self.rt.device)
        wanted = (inputs >= own.first[:, None]) & (np.arange(width) < lengths[:, None])
        memory = None
        if self.cached:
            memory = Memory(self.model, self.length, self.rope, longest=width)
        step = PIECE if self.cached else width
        first = 0 if self.cached else self.unread(wanted)
        for at in range(0, width, step):
            piece, scored = x[:, at : at + step], wanted[:, at + first : at + step]
            with self.rt.autocast():
                logits = memory.logits(piece) if memory else self.window_logits(piece, first)
            if scored.any():
                rows = inputs[:, at + first : at + step][scored]
                yield rows, logits[torch.from_numpy(scored).to(logits.device)]

    def unread(self, wanted: np.ndarray) -> int:
        """Return at how many first positions of some windows no row is wanted: few different ones.

        With many pieces, logits there would be a large part of a pass's work.
        """
        unread = int(wanted.any(axis=0).argmax()) // ROUND * ROUND
        usual = (self.length - self.stride) // ROUND * ROUND
        return unread if not self.fixed_shape else usual if unread >= usual else 0

    def window_logits(self, tokens_BT: Tensor, first: int = 0) -> Tensor:
        """Return logits [B, T - first, V] of windows, by compiled code if EVAL_COMPILE says so."""
        rope = (table[: tokens_BT.size(1)] for table in self.rope)
        read = compiled_window_logits() if self.compiled else window_logits
        return read(self.model, tokens_BT, *rope, first)

    def adjusted(self, logits: Tensor) -> Tensor:
        """Return the logits that count: test-time training of a bias adds to them."""
        return logits

    def score(
        self,
        tokens: np.ndarray,
        windows: Windows,
        columns: Columns,
        hints: np.ndarray | None,
        on_progress: OnRows | None,
    ) -> None:
        """Fill the rows of this rank's share of some windows."""
        for batch in self.batches(windows)[self.rt.mine]:
            for i in batch[batch >= 0]:
                # A run that was killed between two pieces of a window filled some of its rows.
                columns.covered[windows.first[i] : windows.end[i]] = 0
            for rows, logits in self.passes(tokens, windows, batch):
                row_hints = None if hints is None else hints[rows]
                values = neural_columns(
                    self.adjusted(logits), tokens[rows + 1], row_hints, columns.names
                )
                if not np.isfinite(values["logp"]).all():
                    raise UserError(
                        f"the model gives no number for token {rows[0] + 1}: its weights are "
                        "damaged or too large; train again"
                    )
                columns.put(rows, values)
                if on_progress:
                    on_progress(rows, values["logp"])

    def exact_plan(self, tokens: np.ndarray, rows: int) -> Windows:
        """Return the plan, once it is shown to score each of `rows` rows exactly once."""
        windows = self.plan(tokens)
        assert (times_scored(windows, rows) == 1).all(), "the plan must score each row once"
        return windows

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """Fill every row that is not filled yet. Ranks share the windows and wait for the last."""
        windows = self.exact_plan(tokens, columns.rows)
        spans = zip(windows.first, windows.end, strict=True)
        left = [i for i, (a, b) in enumerate(spans) if not columns.covered[a:b].all()]
        self.wait()  # no rank may fill rows before every rank has seen which are left
        self.score(tokens, windows.pick(left), columns, hints, on_progress)
        self.wait()

    def wait(self) -> None:
        """Wait until all ranks are here: ranks have unequal shares, so this may take long."""
        if self.rt.world > 1:
            dist.barrier(patient_group())

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64[len(rows), V]: the model's distributions for these rows.

        A row reads no token after its own input.
        """
        rows, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        windows = self.plan(tokens)
        at = np.searchsorted(windows.first, rows, side="right") - 1
        cut = Windows(windows.start[at], rows, rows + 1)
        out = np.empty((len(rows), self.model.cfg.vocab_size))
        for batch in self.batches(cut):
            for own, logits in self.passes(tokens, cut, batch):
                p = in_float64(self.adjusted(logits)).softmax(dim=1).cpu().numpy()
                out[np.searchsorted(rows, own)] = p
        return out[back]


def make_neural(model: GPT, cfg: EvalConfig, rt: Runtime) -> Neural:
    """Return the scorer that TTT asks for. Test-time training counts as code only if it is used."""
    if cfg.ttt == "none":
        return Neural(model, cfg, rt)
    from fairway.scoring.adaptation import FORMS

    return FORMS[cfg.ttt](model, cfg, rt)
