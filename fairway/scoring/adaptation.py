"""Score-first test-time training: a chunk is scored, committed, and only then learned from.

TTT selects one of four forms. `chunks` trains the whole model on the stream. `lora` gives each
document its own adapters. `phases` does both: the whole model learns between groups of documents.
`bias` learns only how often each token occurs. In each form the state before a chunk depends on the
tokens before the chunk alone, to the bit: the model always learns from a complete chunk, in tensor
shapes that later tokens cannot change.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.scoring.columns import Columns
from fairway.scoring.neural import Neural, OnRows, Windows, in_float64, plan
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime, document_bounds

PARTS = 8  # a chunk is cut into so many passes, whatever the number of ranks that share them


def clipped(windows: Windows, cuts: np.ndarray) -> Windows:
    """Split windows at the rows `cuts`: the same rows with the same context, none across a cut."""
    first = np.union1d(windows.first, cuts)
    at = np.searchsorted(windows.first, first, side="right") - 1
    return Windows(windows.start[at], first, np.append(first[1:], windows.end[-1:]))


def fingerprints(tensors: list[Tensor]) -> list[int]:
    """Return one 64-bit number for each index of the tensors' first dimension; every bit counts.

    SHA-256 of all bytes would take longer than the training. This is exact, and costs one
    multiplication per weight on the device where the weights are.
    """
    total: Tensor | int = 0
    for nth, t in enumerate(tensors):
        bits = t.detach().reshape(len(t), -1).contiguous()
        bits = bits.view(torch.int64 if bits.element_size() == 8 else torch.int32).long()
        place = (
            torch.arange(bits.size(1), device=t.device) * 0x1E3779B97F4A7C15
            + nth * 0x3F58476D1CE4E5B9 % 2**63
        )
        total = total + (bits * (place ^ (place >> 29) | 1)).sum(dim=1)
    return [] if isinstance(total, int) else total.tolist()


def hash_numbers(*numbers: int) -> str:
    """Return the SHA-256 (hex) of some numbers."""
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()


def sum_over_ranks(tensors: list[Tensor], rt: Runtime) -> None:
    """Sum over ranks, in place, in one message."""
    if rt.world == 1 or not tensors:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors, strict=True)])


def mean_over_ranks(number: float, rt: Runtime) -> float:
    """Return the mean of each rank's number, so that all ranks decide alike."""
    total = torch.tensor([number], device=rt.device)
    sum_over_ranks([total], rt)
    return float(total) / rt.world


@contextlib.contextmanager
def weights_restored(params: list[nn.Parameter]) -> Iterator[None]:
    """Let something change the weights, then put their own values back, to the bit."""
    own = [p.detach().clone() for p in params]
    try:
        yield
    finally:
        torch._foreach_copy_([p.data for p in params], own)


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Let a backward pass on CUDA give equal bits each time, as on a CPU.

    Attention's adds up the gradients of queries in the order of arrival otherwise.
    """
    how = torch.utils.deterministic
    strict, filled = torch.are_deterministic_algorithms_enabled(), how.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # with warn_only, attention would only warn
    how.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)
        how.fill_uninitialized_memory = filled


# ==== WHAT ALL FORMS SHARE ========================================================================
class Adapting(Neural, ABC):
    """A scorer that works in chunks and learns from each one after it is scored.

    After `fill`, `digests` holds for each chunk, in the order of the text, its first row and the
    digest of everything that was learned before the chunk was scored.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        # Cached keys and values would come from weights that have changed since.
        super().__init__(model, replace(cfg, eval_mode="sliding"), rt)
        self.rate = cfg.ttt_lr or self.default_rate()
        self.chunk = cfg.ttt_chunk or self.default_chunk()
        self.seconds_spent = 0.0

    @abstractmethod
    def default_rate(self) -> float:
        """Return the rate for TTT_LR=0. All defaults were chosen on embedded training text."""

    @abstractmethod
    def default_chunk(self) -> int:
        """Return the tokens of a chunk for TTT_CHUNK=0."""

    @abstractmethod
    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the first row of each chunk."""

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at which something begins, by kind; chunks are among them."""
        return {**super().boundaries(tokens), "chunk": self.chunk_starts(tokens)}

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Start with nothing learned, and undo at the end, in any case, what the text taught."""
        self.seconds_spent = 0.0
        yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Let this rank do all of the work in the body by itself."""
        rt, self.rt = self.rt, self.rt._replace(rank=0, world=1)
        try:
            yield
        finally:
            self.rt = rt

    def learn_in_time(self, learn: Callable[[], None]) -> None:
        """Call `learn` unless TTT_SECONDS are over. All ranks use the mean of their clocks."""
        if 0 < self.cfg.ttt_seconds <= self.seconds_spent:
            return
        began = time.perf_counter()
        with repeatable() if self.rt.device.type == "cuda" else contextlib.nullcontext():
            learn()
        if self.cfg.ttt_seconds:
            if self.rt.device.type == "cuda":
                torch.cuda.synchronize(self.rt.device)
            self.seconds_spent += mean_over_ranks(time.perf_counter() - began, self.rt)

    def losses(self, tokens: np.ndarray, windows: Windows, width: int) -> Tensor:
        """Return the nats of the windows' rows, zero elsewhere, with their graph."""
        inputs = windows.start[:, None] + np.arange(width)
        wanted = (inputs >= windows.first[:, None]) & (inputs < windows.end[:, None])
        pairs = np.minimum(inputs[..., None] + [0, 1], len(tokens) - 1)  # input and target
        data = torch.from_numpy(tokens[pairs].astype(np.int64))
        x, y = data.to(self.rt.device).unbind(-1)
        first = self.unread(wanted)
        y, wanted = y[:, first:], wanted[:, first:]
        with self.rt.autocast():
            logits = self.window_logits(x, first)
            nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        return nats * torch.from_numpy(wanted).to(nats.device)


class Streaming(Adapting):
    """Learns from the stream, chunk after chunk, across the documents that it holds."""

    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the first row of each chunk."""
        return np.arange(0, len(tokens) - 1, self.chunk)

    def plan(self, tokens: np.ndarray) -> Windows:
        """Return the windows of a text; none scores rows of two chunks."""
        return clipped(super().plan(tokens), self.chunk_starts(tokens))

    def batch_size(self, length: int) -> int:
        """Return how many windows one pass scores: at most an eighth of a chunk's."""
        return min(super().batch_size(length), -(-self.chunk // (self.stride * PARTS)))

    def reread(self, tokens: np.ndarray, windows: Windows) -> None:
        """Compute again what learning needs from a chunk's scoring, if its rows are on disk."""

    @abstractmethod
    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        """Learn the rows from `first` to `end`; the tokens before them are context."""

    @abstractmethod
    def digest(self) -> str:
        """Return a digest of everything that was learned."""

    def chunks(self, tokens: np.ndarray, last: int) -> Iterator[tuple[int, int, Windows]]:
        """Yield (first row, end row, windows) of each chunk up to the one that has row `last`.

        Each chunk is learned before the next one is yielded. The last one, which the end of the
        text may cut short, is not learned.
        """
        windows, starts = self.plan(tokens), self.chunk_starts(tokens)
        ends = np.minimum(starts + self.chunk, len(tokens) - 1)
        for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if first > last:
                return
            a, b = np.searchsorted(windows.first, [first, end])
            yield first, end, windows.pick(slice(a, b))
            if end <= last:
                self.learn_in_time(lambda first=first, end=end: self.learn(tokens, first, end))

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """Fill the rows that are not filled. Chunks that an earlier run filled are only learned."""
        windows = self.exact_plan(tokens, columns.rows)
        filled, self.digests = np.array(columns.covered) == 1, []
        self.wait()  # no rank may fill rows before every rank has seen which are left
        with self.fresh():
            for first, end, windows in self.chunks(tokens, columns.rows - 1):
                self.digests.append((first, self.digest()))
                if filled[first:end].all():
                    self.reread(tokens, windows)
                else:
                    self.score(tokens, windows, columns, hints, on_progress)
        self.wait()

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64[len(rows), V], after learning the chunks before each row again."""
        rows, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        last = int(rows.max(initial=-1))
        out = np.empty((len(rows), self.model.cfg.vocab_size))
        tokens = tokens[: last + 2]
        with self.alone(), self.fresh():
            for first, end, windows in self.chunks(tokens, last):
                own = (rows >= first) & (rows < end)
                if own.any():
                    out[own] = super().distributions(tokens[: end + 1], rows[own])
                if end <= last:
                    self.reread(tokens, windows)
        return out[back]


# ==== TTT=chunks ==================================================================================
class LaneAdam:
    """Adam in place over tensors [lanes, n]; each lane counts its own steps."""

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, values: list[Tensor]):
        self.values = values
        self.mean, self.square = ([torch.zeros_like(t) for t in values] for _ in range(2))
        self.steps = torch.zeros(len(values[0]), 1, device=values[0].device)

    def state(self) -> list[Tensor]:
        """Return all tensors that a step reads or writes."""
        return [*self.values, *self.mean, *self.square, self.steps]

    def reset(self, lane: int) -> None:
        """Forget the gradients of a lane."""
        for t in (*self.mean, *self.square, self.steps):
            t[lane] = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float) -> None:
        """Take one step in every lane."""
        self.steps += 1
        a, b = self.BETAS
        torch._foreach_lerp_(self.mean, gradients, 1 - a)
        torch._foreach_mul_(self.square, b)
        torch._foreach_addcmul_(self.square, gradients, gradients, 1 - b)
        # Both averages start at zero; dividing by the weight of the real gradients corrects that.
        mean_weight, square_weight = (
            -torch.expm1(self.steps * math.log(beta)) for beta in self.BETAS
        )
        for value, mean, square in zip(self.values, self.mean, self.square, strict=True):
            value -= rate * (mean / mean_weight) / ((square / square_weight).sqrt() + self.EPS)


class Chunks(Streaming):
    """All weights take a step of Adam on each chunk.

    SGD with momentum and clipped gradients, which records use (#549), gained an eighth as much on
    training text, at any rate.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        self.params = list(model.parameters())
        self.adam = LaneAdam([p.detach().view(1, -1) for p in self.params])

    def default_rate(self) -> float:
        """Return a rate measured at width 128: Adam's fall as width grows (arXiv 2203.03466)."""
        return 0.128 / self.model.cfg.model_dim

    def default_chunk(self) -> int:
        """Return 16 windows, two for each of eight ranks: 32,768 tokens at the usual length (#549).

        Shorter chunks gain more, but chunks follow one another, and each costs a step.
        """
        return 16 * self.length

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Start with the artifact's weights, and restore them at the end."""
        self.adam.reset(0)
        with super().fresh(), weights_restored(self.params):
            yield

    def digest(self) -> str:
        """Return a digest of weights and optimiser state."""
        return hash_numbers(*fingerprints(self.adam.state()))

    @torch.enable_grad()
    def gradients(self, tokens: np.ndarray, first: int, end: int) -> list[Tensor]:
        """Return the gradients of the rows' mean loss, [1, n] for each parameter.

        The rows are cut into sequences as long as a window, and these into passes that the ranks
        share. Their number decides neither the passes nor, as sums are in float64, their sum.
        """
        begin = np.arange(first, end, self.length)
        stop = np.minimum(begin + self.length, end)
        windows = Windows(np.maximum(stop - self.length, 0), begin, stop)
        size = min(self.batch_size(self.length), -(-len(begin) // PARTS))
        batches = np.pad(np.arange(len(begin)), (0, -len(begin) % size), constant_values=-1)
        width = self.length if self.fixed_shape else int((stop - windows.start).max())
        wide = torch.float32 if self.rt.device.type == "mps" else torch.float64
        sums = [torch.zeros_like(p, dtype=wide) for p in self.params]
        for batch in batches.reshape(-1, size)[self.rt.mine]:
            loss = self.losses(tokens, windows.pick(batch), width).sum()
            parts = torch.autograd.grad(loss / (end - first), self.params, materialize_grads=True)
            torch._foreach_add_(sums, parts)
        sum_over_ranks(sums, self.rt)
        return [total.to(p.dtype).view(1, -1) for total, p in zip(sums, self.params, strict=True)]

    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        """Take TTT_EPOCHS steps on a chunk."""
        for _ in range(self.cfg.ttt_epochs):
            self.adam.step(self.gradients(tokens, first, end), self.rate)


# ==== TTT=bias ====================================================================================
class Bias(Streaming):
    """A number for each token is added to its logit, and learned by online gradient descent.

    The gradient of the mean loss is the expected count of each token minus the actual one, so
    there is no backward pass, and the forward pass is the scoring's own. The step size is constant:
    AdaGrad and falling step sizes gained half as much on training text.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        wide = torch.float32 if rt.device.type == "mps" else torch.float64
        self.bias, self.expected = torch.zeros(
            2, model.cfg.vocab_size, dtype=wide, device=rt.device
        )

    def default_rate(self) -> float:
        """Return the step size."""
        return 15.0

    def default_chunk(self) -> int:
        """Return a window, which ranks share: shorter chunks gain more, but leave a GPU idle."""
        return self.length

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Start without a bias, and remove it at the end."""
        with super().fresh():
            try:
                yield
            finally:
                self.bias.zero_()

    def digest(self) -> str:
        """Return a digest of the bias."""
        return hash_numbers(*fingerprints([self.bias[None]]))

    def adjusted(self, logits: Tensor) -> Tensor:
        """Add the bias, and add up the expected counts for `learn`."""
        z = in_float64(logits) + self.bias.to(logits.device)
        self.expected += z.softmax(dim=1).sum(dim=0).to(self.expected)
        return z

    def score(
        self,
        tokens: np.ndarray,
        windows: Windows,
        columns: Columns,
        hints: np.ndarray | None,
        on_progress: OnRows | None,
    ) -> None:
        """Fill the rows of a chunk; `adjusted` counts from zero."""
        self.expected.zero_()
        super().score(tokens, windows, columns, hints, on_progress)

    def reread(self, tokens: np.ndarray, windows: Windows) -> None:
        """Compute the expected counts of a chunk whose rows are on disk."""
        self.expected.zero_()
        for batch in self.batches(windows)[self.rt.mine]:
            for _, logits in self.passes(tokens, windows, batch):
                self.adjusted(logits)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        """Take one step against the gradient of the chunk's mean loss."""
        sum_over_ranks([self.expected], self.rt)
        actual = np.bincount(tokens[first + 1 : end + 1], minlength=self.model.cfg.vocab_size)
        share = self.expected / (end - first)
        # The curvature of the loss is at most share.max(): no step goes beyond the minimum.
        step = (1 / share.max()).clamp(max=self.rate)
        self.bias -= step * (share - torch.from_numpy(actual / (end - first)).to(share))


# ==== TTT=lora ====================================================================================
class Adapters:
    """Low-rank additions to every linear layer of attention and MLP, one set for each lane.

    The first factor is random and the second one zero: at the start the product adds exactly
    nothing, yet the second factor has a gradient.
    """

    def __init__(self, model: GPT, rank: int, lanes: int):
        noise, device = torch.Generator().manual_seed(0), model.tok_emb.weight.device
        self.layers = [m for m in model.blocks.modules() if isinstance(m, nn.Linear)]
        down = [
            torch.randn(rank, m.in_features, generator=noise) / m.in_features**0.5
            for m in self.layers
        ]
        up = [torch.zeros(m.out_features, rank) for m in self.layers]
        self.start = [t.to(device) for pair in zip(down, up, strict=True) for t in pair]
        self.values = [t.expand(lanes, *t.shape).clone().requires_grad_() for t in self.start]
        self.adam = LaneAdam([t.detach().view(lanes, -1) for t in self.values])

    @property
    def lanes(self) -> int:
        """Number of documents that can learn at the same time."""
        return len(self.adam.steps)

    def reset(self, lane: int) -> None:
        """Give a lane new adapters."""
        for start, value in zip(self.start, self.adam.values, strict=True):
            value[lane] = start.flatten()
        self.adam.reset(lane)

    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """Take a step of Adam in every lane."""
        self.adam.step([g.flatten(1) for g in gradients], rate)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the adapters to the model: lane i serves sequence i of a batch."""

        def hook(down: Tensor, up: Tensor) -> Callable:
            return lambda _, inputs, output: output + (inputs[0] @ down.mT) @ up.mT

        pairs = zip(self.values[::2], self.values[1::2], strict=True)
        handles = [
            layer.register_forward_hook(hook(*pair))
            for layer, pair in zip(self.layers, pairs, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Lora(Adapting):
    """Each document has its own adapters.

    The context of a chunk is the window of its document that ends where the chunk ends, so that a
    chunk is at most a window long. Documents run side by side, one in each lane; the next document
    takes the lane that is free first. The lane, and all shapes that are learned in, depend on
    earlier documents alone. Sorting documents by length would break that.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        self.chunk = min(self.chunk, self.length)
        self.compiled = False  # the adapters' hooks are no part of compiled code
        # On a CPU lanes are no faster, and idle ones would have to be computed all the same.
        lanes = 1 if rt.device.type == "cpu" else self.batch_size(self.length)
        self.adapters = Adapters(model, cfg.ttt_rank, lanes)
        self.batch = np.zeros(0, np.int64)  # the window in each lane; -1: the lane is idle
        self.learned: list[int] = []  # fingerprints of what is learned beside the adapters

    def default_rate(self) -> float:
        """Return Adam's rate."""
        return 0.002

    def default_chunk(self) -> int:
        """Return a quarter of a window, at most 256 tokens (#77)."""
        return max(1, min(256, self.length // 4))

    def plan(self, tokens: np.ndarray) -> Windows:
        """Return one window for each chunk; none crosses a document's start."""
        rows = max(len(tokens) - 1, 0)
        begin = np.unique(np.minimum(document_bounds(tokens), rows))
        chunks = plan(tokens, self.chunk, self.chunk, documents=True)
        document = begin[np.searchsorted(begin, chunks.first, side="right") - 1]
        start = np.maximum(document, chunks.first + self.chunk - self.length)
        return Windows(start, chunks.first, chunks.end)

    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the first row of each chunk."""
        return self.plan(tokens).first

    def batches(self, windows: Windows) -> list[np.ndarray]:
        """Return the one batch of windows that the lanes hold now."""
        return [self.batch]

    def sweep(
        self,
        tokens: np.ndarray,
        windows: Windows,
        documents: list[np.ndarray],
        visit: Callable[[], None],
    ) -> None:
        """Call `visit` for every window of the documents, and learn each one after its visit.

        A document is the array of its windows.
        """
        with self.alone(), self.fresh():
            self.lead(tokens, windows, documents, visit)

    def lead(
        self,
        tokens: np.ndarray,
        windows: Windows,
        documents: list[np.ndarray],
        visit: Callable[[], None],
    ) -> None:
        """Lead documents through the lanes: visit the current windows, then learn them."""
        queue, lanes = iter(documents), [np.zeros(0, np.int64)] * self.adapters.lanes
        with self.adapters.attached():
            while True:
                for lane in range(self.adapters.lanes):
                    if not len(lanes[lane]):
                        lanes[lane] = next(queue, lanes[lane])
                        self.adapters.reset(lane)
                if not any(map(len, lanes)):
                    return
                self.batch = np.array([left[0] if len(left) else -1 for left in lanes])
                visit()
                lanes = [left[1:] for left in lanes]
                # The last chunk of a document teaches nobody.
                self.batch = np.where([len(left) > 0 for left in lanes], self.batch, -1)
                if (self.batch >= 0).any():
                    self.learn_in_time(lambda: self.learn_side_by_side(tokens, windows))

    @torch.enable_grad()
    def learn_side_by_side(self, tokens: np.ndarray, windows: Windows) -> None:
        """Take TTT_EPOCHS steps in each lane on its current chunk.

        The sequences of a single lane grow with its document. With several lanes they are always
        as long as a window: a shape that depends on the neighbours would change the rounding.
        """
        own = windows.pick(self.batch)
        width = int((own.end - own.start).max()) if self.adapters.lanes == 1 else self.length
        busy = torch.from_numpy(self.batch >= 0)
        for _ in range(self.cfg.ttt_epochs):
            loss = self.losses(tokens, own, width).sum(dim=1)[busy].sum() / self.chunk
            self.adapters.step(torch.autograd.grad(loss, self.adapters.values), self.rate)

    def documents(self, tokens: np.ndarray, windows: Windows) -> list[np.ndarray]:
        """Return the indices of the windows of each document."""
        cuts = np.searchsorted(windows.first, document_bounds(tokens))
        return [np.arange(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b]

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """Fill the rows that are not filled. Under torchrun each rank has its own documents."""
        windows = self.exact_plan(tokens, columns.rows)
        filled = np.array(columns.covered) == 1
        spans = zip(windows.first, windows.end, strict=True)
        left = np.array([not filled[a:b].all() for a, b in spans], bool)
        documents = self.documents(tokens, windows)
        # The first row of the document of each window: part of the digest, as adapters are its own.
        document_rows = {int(i): int(windows.first[d[0]]) for d in documents for i in d}
        states = np.zeros((len(left), 32), np.uint8)

        def visit() -> None:
            batch = self.batch
            prints = fingerprints(self.adapters.adam.state())
            for i, state in zip(batch.tolist(), prints, strict=True):
                if i >= 0:
                    digest = bytes.fromhex(hash_numbers(document_rows[i], state, *self.learned))
                    states[i] = np.frombuffer(digest, np.uint8)
            self.batch = np.where((batch >= 0) & left[batch], batch, -1)
            if (self.batch >= 0).any():
                self.score(tokens, windows, columns, hints, on_progress)
            self.batch = batch

        self.wait()
        self.sweep(tokens, windows, documents[self.rt.mine], visit)
        self.wait()
        # Each window is zero on all ranks but one, so that the sum is every rank's states.
        all_states = torch.from_numpy(states).to(self.rt.device)
        sum_over_ranks([all_states], self.rt)
        pairs = zip(windows.first.tolist(), all_states.cpu().numpy(), strict=True)
        self.digests = [(first, bytes(state).hex()) for first, state in pairs]
        self.wait()

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64[len(rows), V], after leading the documents of these rows through again."""
        rows = np.asarray(rows, np.int64)
        tokens = tokens[: rows.max(initial=-1) + 2]
        windows = self.plan(tokens)
        out = np.empty((len(rows), self.model.cfg.vocab_size))
        at = np.searchsorted(windows.first, rows, side="right") - 1
        wanted = [
            d[d <= at[own].max()]
            for d in self.documents(tokens, windows)
            if (own := (at >= d[0]) & (at <= d[-1])).any()
        ]

        def visit() -> None:
            if np.isin(self.batch, at).any():
                for own, logits in self.passes(tokens, windows, self.batch):
                    p = in_float64(logits).softmax(dim=1).cpu().numpy()
                    for row, p_row in zip(own, p, strict=True):
                        out[rows == row] = p_row

        self.sweep(tokens, windows, wanted, visit)
        return out


# ==== TTT=phases ==================================================================================
class Phases(Lora):
    """Each document has its own adapters, on weights that learn between phases.

    A phase ends with the document that brings it to TTT_PHASE tokens. All weights then take the
    steps of TTT=chunks on its text, and the documents of the next phase start from them. TTT_LR is
    the rate of the adapters.
    """

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        self.whole = Chunks(model, replace(cfg, ttt_lr=0.0, ttt_chunk=0), rt)
        # Lanes are idle where a phase ends, and weights older the longer it is.
        self.phase = cfg.ttt_phase or 16 * self.length * self.adapters.lanes

    def phase_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the first row of each phase."""
        starts = [0]
        for row in document_bounds(tokens)[1:-1].tolist():
            if row - starts[-1] >= self.phase and row < len(tokens) - 1:
                starts.append(row)
        return np.array(starts)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at which something begins, by kind."""
        return {**super().boundaries(tokens), "phase": self.phase_starts(tokens)}

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Start with the artifact's weights, and restore them at the end."""
        self.learned = []
        with super().fresh(), self.whole.fresh():
            yield

    def sweep(
        self,
        tokens: np.ndarray,
        windows: Windows,
        documents: list[np.ndarray],
        visit: Callable[[], None],
    ) -> None:
        """Call `visit` for every window of the documents, phase by phase, and learn what it saw."""
        starts = self.phase_starts(tokens).tolist()
        with self.fresh():
            for first, end in zip(starts, [*starts[1:], len(tokens) - 1], strict=True):
                own = [d for d in documents if first <= windows.first[d[0]] < end]
                with self.alone():
                    self.lead(tokens, windows, own, visit)
                if end < len(tokens) - 1:  # the last phase teaches nobody
                    if self.cfg.ttt_seconds:  # each rank led documents of its own
                        self.seconds_spent = mean_over_ranks(self.seconds_spent, self.rt)
                    self.learn_in_time(
                        lambda first=first, end=end: self.learn_phase(tokens, first, end)
                    )

    def learn_phase(self, tokens: np.ndarray, first: int, end: int) -> None:
        """Let all weights learn the rows of a phase, chunk after chunk."""
        self.whole.rt, step = self.rt, self.whole.chunk
        for at in range(first, end, step):
            self.whole.learn(tokens, at, min(at + step, end))
        self.learned = fingerprints(self.whole.adam.state())

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float64[len(rows), V], after all phases before these rows."""
        with self.alone():
            return super().distributions(tokens, rows)


FORMS = {"chunks": Chunks, "lora": Lora, "phases": Phases, "bias": Bias}  # by TTT
