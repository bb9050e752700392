"""Score-first test-time training: a chunk is scored, committed, and only then learned from.

Three forms, by TTT: `chunks` trains the whole model on the stream, `lora` gives each document adapters of its own,
`bias` learns nothing but how often tokens come. In each the state before a chunk follows from the tokens before it
alone, to the bit: what is learned from is always a whole chunk, in shapes that nothing that comes later can change.
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
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.scoring.columns import Columns
from fairway.scoring.neural import Neural, OnRows, Windows, coverage, in_float64, plan
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime, all_reduce_flat, document_bounds, weights_replaced


def clipped(windows: Windows, cuts: np.ndarray) -> Windows:
    """The same rows with the same context, in windows that score nothing on both sides of a cut."""
    first = np.union1d(windows.first, cuts)
    at = np.searchsorted(windows.first, first, side="right") - 1
    return Windows(windows.start[at], first, np.append(first[1:], windows.end[-1:]))


def fingerprints(tensors: list[Tensor]) -> list[int]:
    """A 64-bit number for each entry of the tensors' first dimension, in which every bit counts. SHA-256 of all bytes
    would cost more than the training: this is one multiplication a weight, where the weights are, and exact."""
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


def hexed(*numbers: int) -> str:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()


class Adapting(Neural, ABC):
    """Rows in chunks. `digests` holds, once a text is filled, (first row of a chunk, digest of all that had been
    learned before the chunk was scored), in the order of the text."""

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(
            model, replace(cfg, eval_mode="sliding"), rt
        )  # cached keys would be those of older weights
        self.rate, self.chunk = cfg.ttt_lr or self.usual_rate(), cfg.ttt_chunk or self.usual_chunk()
        self.spent, self.digests = 0.0, []

    @abstractmethod
    def usual_rate(self) -> float:
        """What TTT_LR=0 stands for; as the others, chosen on text of the embedded corpus' training shard."""

    @abstractmethod
    def usual_chunk(self) -> int:
        """What TTT_CHUNK=0 stands for."""

    @abstractmethod
    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        """First rows of the chunks."""

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {**super().boundaries(tokens), "chunk": self.chunk_starts(tokens)}

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        """Nothing learned, no time spent; what the text teaches is gone at the end, however it ends."""
        self.spent = 0.0
        yield

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Work that this rank does by itself."""
        rt, self.rt = self.rt, self.rt._replace(rank=0, world=1)
        try:
            yield
        finally:
            self.rt = rt

    def timed(self, learn: Callable[[], None]) -> None:
        """Learn, unless the time for it is spent; all ranks go by the same clock."""
        if 0 < self.cfg.ttt_seconds <= self.spent:
            return
        began = time.perf_counter()
        learn()
        if self.cfg.ttt_seconds:
            if self.rt.device.type == "cuda":
                torch.cuda.synchronize(self.rt.device)
            took = torch.tensor([time.perf_counter() - began], device=self.rt.device)
            all_reduce_flat([took], self.rt)
            self.spent += float(took) / self.rt.world

    def losses(self, tokens: np.ndarray, windows: Windows, width: int) -> Tensor:
        """Nats of the windows' rows, [B, width], zero elsewhere, with what a gradient needs."""
        inputs = windows.start[:, None] + np.arange(width)
        wanted = (inputs >= windows.first[:, None]) & (inputs < windows.end[:, None])
        data = torch.from_numpy(
            tokens[np.minimum(inputs[..., None] + [0, 1], len(tokens) - 1)].astype(np.int64)
        )
        x, y = data.to(self.rt.device).unbind(-1)
        with self.rt.autocast():
            logits = self.model.from_embedded(
                self.model.embed(x), tuple(table[:width] for table in self.rope)
            )
            nats = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        return nats * torch.from_numpy(wanted).to(nats.device)


class Streaming(Adapting):
    """What learns from the stream, chunk after chunk, whatever documents it holds."""

    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        return np.arange(0, len(tokens) - 1, self.chunk)

    def plan(self, tokens: np.ndarray) -> Windows:
        return clipped(super().plan(tokens), self.chunk_starts(tokens))

    def reread(self, tokens: np.ndarray, windows: Windows) -> None:
        """Of a chunk whose rows are there already: what learning needs from its scoring."""

    @abstractmethod
    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        """From rows `first` to `end` and what lies before them."""

    @abstractmethod
    def digest(self) -> str:
        """Of all that has been learned."""

    def chunks(self, tokens: np.ndarray, last: int) -> Iterator[tuple[int, int, Windows]]:
        """(first row, one past the last, windows) of each chunk up to the one with row `last`, each learned from
        before the next is given out. The text's last chunk, which may be cut short, teaches nobody."""
        windows, starts = self.plan(tokens), self.chunk_starts(tokens)
        ends = np.minimum(starts + self.chunk, len(tokens) - 1)
        for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if first > last:
                return
            at = np.searchsorted(windows.first, [first, end])
            yield first, end, Windows(*(part[at[0] : at[1]] for part in windows))
            if end <= last:
                self.timed(lambda first=first, end=end: self.learn(tokens, first, end))

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """As Neural's. Chunks that an earlier run filled are learned from again, but not scored."""
        assert (coverage(self.plan(tokens), columns.rows) == 1).all(), (
            "the plan must score each row once"
        )
        done, self.digests = np.array(columns.covered) == 1, []
        self.wait()  # every rank has seen what is left before any begins
        with self.fresh():
            for first, end, windows in self.chunks(tokens, columns.rows - 1):
                self.digests.append((first, self.digest()))
                if done[first:end].all():
                    self.reread(tokens, windows)
                else:
                    self.score(tokens, windows, columns, hints, on_progress)
        self.wait()

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """As Neural's, by learning from the chunks before each row again; each rank for itself."""
        rows, back = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        found, last = np.empty((len(rows), self.model.cfg.vocab_size)), int(rows.max(initial=-1))
        tokens = tokens[: last + 2]
        with self.alone(), self.fresh():
            for first, end, windows in self.chunks(tokens, last):
                own = (rows >= first) & (rows < end)
                if own.any():
                    found[own] = super().distributions(tokens[: end + 1], rows[own])
                if end <= last:
                    self.reread(tokens, windows)
        return found[back]


class Adam:
    """Adam in place, over tensors [lanes, n] of which each lane has begun at a time of its own."""

    BETAS, EPS = (0.9, 0.999), 1e-8

    def __init__(self, values: list[Tensor]):
        self.values = values
        self.mean, self.square = ([torch.zeros_like(t) for t in values] for _ in range(2))
        self.steps = torch.zeros(len(values[0]), 1, device=values[0].device)

    def state(self) -> list[Tensor]:
        return [*self.values, *self.mean, *self.square, self.steps]

    def reset(self, lane: int) -> None:
        for t in (*self.mean, *self.square, self.steps):
            t[lane] = 0

    @torch.no_grad()
    def step(self, gradients: list[Tensor], rate: float) -> None:
        self.steps += 1
        a, b = self.BETAS
        torch._foreach_lerp_(self.mean, gradients, 1 - a)
        torch._foreach_mul_(self.square, b)
        torch._foreach_addcmul_(self.square, gradients, gradients, 1 - b)
        share, shared = (
            -torch.expm1(self.steps * math.log(beta)) for beta in self.BETAS
        )  # of gradients seen so far
        for value, mean, square in zip(self.values, self.mean, self.square, strict=True):
            value -= rate * (mean / share) / ((square / shared).sqrt() + self.EPS)


class Chunks(Streaming):
    """All weights take a step of Adam on each chunk. SGD with momentum and a clipped gradient, used in records (#549),
    gave an eighth of the gain on training text, whatever its rate."""

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        self.params = list(model.parameters())
        self.adam = Adam([p.detach().view(1, -1) for p in self.params])

    def usual_rate(self) -> float:
        return (
            0.128 / self.model.cfg.model_dim
        )  # measured at 128; Adam's rates fall as width grows (arXiv 2203.03466)

    def usual_chunk(self) -> int:
        return (
            self.length
        )  # shorter ones gain more, and cost more: each is read with the window before it

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        self.adam.reset(0)
        with super().fresh(), weights_replaced(self.params, self.params):
            yield

    def digest(self) -> str:
        return hexed(*fingerprints(self.adam.state()))

    @torch.enable_grad()
    def gradients(self, tokens: np.ndarray, first: int, end: int) -> list[Tensor]:
        """Of the rows' mean loss, in sequences as long as a window that ranks share; added up in float64, so that
        their number does not matter."""
        begin = np.arange(first, end, self.length)
        stop = np.minimum(begin + self.length, end)
        windows = Windows(np.maximum(stop - self.length, 0), begin, stop)
        size, width = self.batch_size(self.length), int((stop - windows.start).max())
        wide = torch.float32 if self.rt.device.type == "mps" else torch.float64
        sums = [torch.zeros_like(p, dtype=wide) for p in self.params]
        mine = np.arange(len(begin))[self.rt.mine]
        for at in range(0, len(mine), size):
            loss = self.losses(
                tokens, Windows(*(part[mine[at : at + size]] for part in windows)), width
            ).sum()
            torch._foreach_add_(
                sums, torch.autograd.grad(loss / (end - first), self.params, materialize_grads=True)
            )
        all_reduce_flat(sums, self.rt)
        return [total.to(p.dtype).view(1, -1) for total, p in zip(sums, self.params, strict=True)]

    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        for _ in range(self.cfg.ttt_epochs):
            self.adam.step(self.gradients(tokens, first, end), self.rate)


class Bias(Streaming):
    """A number for each token, added to its logit, learned by online gradient descent: the gradient of the mean loss is
    what was expected less what came, so there is no backward pass, and the forward pass is scoring's own. Steps stay as
    long as they were: AdaGrad, and steps that shrink, gained half as much on training text."""

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        wide = torch.float32 if rt.device.type == "mps" else torch.float64
        self.bias, self.expected = torch.zeros(
            2, model.cfg.vocab_size, dtype=wide, device=rt.device
        )

    def usual_rate(self) -> float:
        return 15.0

    def usual_chunk(self) -> int:
        return 256  # shorter ones gain more, and leave a GPU idle

    @contextlib.contextmanager
    def fresh(self) -> Iterator[None]:
        with super().fresh():
            try:
                yield
            finally:
                self.bias.zero_()

    def digest(self) -> str:
        return hexed(*fingerprints([self.bias[None]]))

    def adjusted(self, logits: Tensor) -> Tensor:
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
        self.expected.zero_()
        super().score(tokens, windows, columns, hints, on_progress)

    def reread(self, tokens: np.ndarray, windows: Windows) -> None:
        self.expected.zero_()
        for batch in self.batches(windows)[self.rt.mine]:
            for _, logits in self.passes(tokens, windows, batch):
                self.adjusted(logits)

    @torch.no_grad()
    def learn(self, tokens: np.ndarray, first: int, end: int) -> None:
        all_reduce_flat([self.expected], self.rt)
        came = np.bincount(tokens[first + 1 : end + 1], minlength=self.model.cfg.vocab_size)
        share = self.expected / (end - first)
        step = (1 / share.max()).clamp(
            max=self.rate
        )  # the loss curves by share.max() at most: no step overshoots
        self.bias -= step * (share - torch.from_numpy(came / (end - first)).to(share))


class Adapters:
    """Low-rank additions to every linear layer of attention and MLP, a set of them for each of some lanes. The first
    factor is random, the second zero: at the start they add exactly nothing, yet the second has a gradient."""

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
        self.adam = Adam([t.detach().view(lanes, -1) for t in self.values])

    @property
    def lanes(self) -> int:
        return len(self.adam.steps)

    def reset(self, lane: int) -> None:
        for start, value in zip(self.start, self.adam.values, strict=True):
            value[lane] = start.flatten()
        self.adam.reset(lane)

    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        self.adam.step([g.flatten(1) for g in gradients], rate)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """To the model: lane i serves sequence i of a batch."""

        def hook(down: Tensor, up: Tensor) -> Callable:
            return lambda _, inputs, output: output + (inputs[0] @ down.mT) @ up.mT

        handles = [
            layer.register_forward_hook(hook(*pair))
            for layer, pair in zip(
                self.layers, zip(self.values[::2], self.values[1::2], strict=True), strict=True
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class Lora(Adapting):
    """Adapters of its own for each document. A chunk's context is the window of the document that ends where it does,
    so that a chunk is a window at most; a quarter of one, and at most 256 tokens, unless TTT_CHUNK says otherwise.

    Documents run side by side, one a lane; the next takes the lane that is free first. Which lane that is depends on
    the documents before it alone, and so do all shapes that are learned in: sorting documents by length would not."""

    def __init__(self, model: GPT, cfg: EvalConfig, rt: Runtime):
        super().__init__(model, cfg, rt)
        self.chunk = min(self.chunk, self.length)  # a window's context and rows are one
        # On a CPU side by side is no faster, and lanes that are done have to be fed all the same.
        self.adapters = Adapters(
            model, cfg.ttt_rank, 1 if rt.device.type == "cpu" else self.batch_size(self.length)
        )
        self.batch = np.zeros(0, np.int64)  # the windows that lanes are at, -1 where they are idle

    def usual_rate(self) -> float:
        return 0.002

    def usual_chunk(self) -> int:
        return max(1, min(256, self.length // 4))  # (#77)

    def plan(self, tokens: np.ndarray) -> Windows:
        rows = max(len(tokens) - 1, 0)
        begin = np.unique(np.minimum(document_bounds(tokens), rows))
        chunks = plan(tokens, self.chunk, self.chunk, documents=True)
        of = begin[np.searchsorted(begin, chunks.first, side="right") - 1]
        return Windows(
            np.maximum(of, chunks.first + self.chunk - self.length), chunks.first, chunks.end
        )

    def chunk_starts(self, tokens: np.ndarray) -> np.ndarray:
        return self.plan(tokens).first

    def batches(self, windows: Windows) -> list[np.ndarray]:
        return [self.batch]

    def sweep(
        self,
        tokens: np.ndarray,
        windows: Windows,
        documents: list[np.ndarray],
        see: Callable[[], None],
    ) -> None:
        """Lead documents, each a range of windows, through the lanes; `see` what lanes are at, then they learn."""
        queue, lanes = iter(documents), [np.zeros(0, np.int64)] * self.adapters.lanes
        with self.alone(), self.fresh(), self.adapters.attached():
            while True:
                for lane in range(self.adapters.lanes):
                    if not len(lanes[lane]):
                        lanes[lane] = next(queue, lanes[lane])
                        self.adapters.reset(lane)
                if not any(map(len, lanes)):
                    return
                self.batch = np.array([left[0] if len(left) else -1 for left in lanes])
                see()
                lanes = [left[1:] for left in lanes]
                self.batch = np.where([len(left) > 0 for left in lanes], self.batch, -1)
                if (self.batch >= 0).any():
                    self.timed(lambda: self.learn_side_by_side(tokens, windows))

    @torch.enable_grad()
    def learn_side_by_side(self, tokens: np.ndarray, windows: Windows) -> None:
        """A step for each lane on the chunk that it is at. One lane's sequences grow with its document; several are
        always as long as a window, since a shape that follows the neighbours changes how sums are rounded."""
        own = Windows(*(np.where(self.batch < 0, 0, part[self.batch]) for part in windows))
        width = int((own.end - own.start).max()) if self.adapters.lanes == 1 else self.length
        for _ in range(self.cfg.ttt_epochs):
            loss = (
                self.losses(tokens, own, width).sum(dim=1)[torch.from_numpy(self.batch >= 0)].sum()
                / self.chunk
            )
            self.adapters.step(torch.autograd.grad(loss, self.adapters.values), self.rate)

    def documents(self, tokens: np.ndarray, windows: Windows) -> list[np.ndarray]:
        cuts = np.searchsorted(windows.first, document_bounds(tokens))
        return [np.arange(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True) if a < b]

    def fill(
        self,
        tokens: np.ndarray,
        columns: Columns,
        hints: np.ndarray | None = None,
        on_progress: OnRows | None = None,
    ) -> None:
        """As Neural's. Under torchrun each rank has documents of its own."""
        windows = self.plan(tokens)
        assert (coverage(windows, columns.rows) == 1).all(), "the plan must score each row once"
        done = np.array(columns.covered) == 1
        left = np.array(
            [not done[a:b].all() for a, b in zip(windows.first, windows.end, strict=True)], bool
        )
        documents = self.documents(tokens, windows)
        begins = {int(i): int(windows.first[d[0]]) for d in documents for i in d}
        states = np.zeros((len(left), 32), np.uint8)

        def see() -> None:
            now = self.batch
            for i, state in zip(
                now.tolist(), fingerprints(self.adapters.adam.state()), strict=True
            ):
                if i >= 0:
                    states[i] = np.frombuffer(bytes.fromhex(hexed(begins[i], state)), np.uint8)
            self.batch = np.where((now >= 0) & left[now], now, -1)
            if (self.batch >= 0).any():
                self.score(tokens, windows, columns, hints, on_progress)
            self.batch = now

        self.wait()
        self.sweep(tokens, windows, documents[self.rt.mine], see)
        all_states = torch.from_numpy(states).to(self.rt.device)
        all_reduce_flat([all_states], self.rt)
        self.digests = [
            (int(first), bytes(state).hex())
            for first, state in zip(windows.first, all_states.cpu().numpy(), strict=True)
        ]
        self.wait()

    def distributions(self, tokens: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """As Neural's, by leading the documents of these rows through the lanes again."""
        rows = np.asarray(rows, np.int64)
        tokens = tokens[: rows.max(initial=-1) + 2]
        windows = self.plan(tokens)
        found = np.empty((len(rows), self.model.cfg.vocab_size))
        at = np.searchsorted(windows.first, rows, side="right") - 1
        wanted = [
            d[d <= at[own].max()]
            for d in self.documents(tokens, windows)
            if (own := (at >= d[0]) & (at <= d[-1])).any()
        ]

        def see() -> None:
            if np.isin(self.batch, at).any():
                for got, logits in self.passes(tokens, windows, self.batch):
                    z = in_float64(logits).softmax(dim=1).cpu().numpy()
                    for row, p in zip(got, z, strict=True):
                        found[rows == row] = p

        self.sweep(tokens, windows, wanted, see)
        return found


FORMS = {"chunks": Chunks, "lora": Lora, "bias": Bias}  # by TTT
