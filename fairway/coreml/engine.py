"""A folder of shards as a decoding engine: tokens in, logits out, keys and values in a cache.

On a Mac CoreML runs the shards; elsewhere the interpreter does. The code around them (embeddings,
RoPE tables, masks and slots) is the same.
"""

from __future__ import annotations

import copy
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fairway.compression.loading import Loaded
from fairway.coreml.graph import host_tables, model_dims
from fairway.coreml.host import Embedding, attention_mask, rotary_tables, state_inputs
from fairway.coreml.interpret import InterpretedFunction
from fairway.coreml.layout import SPARE
from fairway.coreml.manifest import ShardFolder, read_shard_folder
from fairway.scoring.memory import REWIND
from train_gpt import UserError, file_sha256


class ShardCall(Protocol):
    """A loaded function. A shard without states is called with its inputs alone."""

    def __call__(self, inputs: Mapping[str, np.ndarray], *state: Any) -> dict[str, np.ndarray]:
        """Return the outputs, and change the state."""

    def new_state(self) -> Any:
        """Return what a shard with states holds before the first call; it can be deep-copied."""


Runner = Callable[[ShardFolder, str, str], ShardCall]  # (folder, shard, function) -> its call


def interpreter_runner(precision: str = "declared") -> Runner:
    """Return the runner that interprets each function in numpy."""
    return lambda folder, shard, function: InterpretedFunction(
        folder.packages[shard], function, precision
    )


def default_runner() -> Runner:
    """Return the runner of this machine: CoreML on a Mac, the interpreter elsewhere."""
    if sys.platform != "darwin":
        return interpreter_runner()
    from fairway.coreml.mac import coreml_runner

    return coreml_runner()


@dataclass
class CallCounts:
    """Calls of the whole chain so far, the tokens in them, and their seconds."""

    calls: int = 0
    tokens: int = 0
    seconds: float = 0.0


class ShardChain:
    """The shards of a folder, run one after the other; each function is loaded at its first call.

    The cache of one text comes from `new_cache()`; one chain serves many caches.
    """

    def __init__(self, folder: ShardFolder | str | Path, runner: Runner | None = None):
        self.folder = folder if isinstance(folder, ShardFolder) else read_shard_folder(folder)
        self.manifest, self.runner = self.folder.manifest, runner or default_runner()
        self.interfaces, self.embed = self.manifest.interfaces(), Embedding(self.folder.tables)
        self.loaded: dict[tuple[str, str], ShardCall] = {}
        self.counts = CallCounts()

    @property
    def most(self) -> int:
        """The largest number of tokens in one call."""
        return self.manifest.sizes[-1]

    def function(self, shard: str, function: str) -> ShardCall:
        if (shard, function) not in self.loaded:
            self.loaded[shard, function] = self.runner(self.folder, shard, function)
        return self.loaded[shard, function]

    def __call__(self, cache: Cache, tokens: Sequence[int]) -> np.ndarray:
        """Return logits, float32[len(tokens), vocab]; the cache then holds these tokens."""
        m, began = self.manifest, time.perf_counter()
        if not 1 <= len(tokens) <= self.most:
            raise UserError(
                f"a call of {len(tokens)} tokens; these shards take 1 to {self.most} tokens"
            )
        if not all(0 <= token < m.dims.vocab for token in tokens):
            raise UserError(f"a token outside the vocabulary of {m.dims.vocab} of these shards")
        name, size = m.function_for(len(tokens))
        have = self.inputs(cache, tokens, size)
        for shard, interface in self.interfaces.items():
            call = self.function(shard, name)
            states = [cache.state_of(shard, call)] if interface.states else []
            have |= call({n: have[n] for n in interface.inputs}, *states)
        logits = np.concatenate([have[f"logits{n}"] for n in range(len(m.split) - 1)], axis=1)
        cache.hold(tokens, have)
        self.counts.calls += 1
        self.counts.tokens += len(tokens)
        self.counts.seconds += time.perf_counter() - began
        return logits[0, :, 0, : len(tokens)].T.astype(np.float32)

    def inputs(self, cache: Cache, tokens: Sequence[int], size: int) -> dict[str, np.ndarray]:
        """Return the inputs that no shard computes, for a call padded to `size` tokens."""
        m, padded = self.manifest, [*tokens, *[0] * (size - len(tokens))]
        cos, sin = rotary_tables(cache.read, size, m.dims.rotary, m.rope_base)
        flat = (("x0", self.embed(padded, cache.last)), ("cos", cos), ("sin", sin))
        inputs = {name: array[None, :, None].astype(m.dtype) for name, array in flat}
        return inputs | cache.inputs(len(tokens), size)

    def new_cache(self) -> Cache:
        return (StateCache if self.manifest.states else SlotCache)(self)


class Cache(ABC):
    """One text as shards have read it."""

    def __init__(self, chain: ShardChain):
        self.dtype, self.slots = chain.manifest.dtype, chain.manifest.dims.slots
        self.tokens: list[int] = []  # all that were read

    @property
    def read(self) -> int:
        """The number of tokens read."""
        return len(self.tokens)

    @property
    def last(self) -> list[int]:
        """The last two tokens, which the embedding of the next one depends on."""
        return self.tokens[-2:]

    @abstractmethod
    def inputs(self, count: int, size: int) -> dict[str, np.ndarray]:
        """Return the mask of a call of `count` tokens padded to `size`, and what goes with it."""

    @abstractmethod
    def hold(self, tokens: Sequence[int], have: Mapping[str, np.ndarray]) -> None:
        """Note the tokens of a call, and what the shards computed."""

    @abstractmethod
    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on; raise ValueError if that needs lost ones."""

    def copy(self) -> Cache:
        return copy.deepcopy(self)


class StateCache(Cache):
    """The state of shards that keep one. Token p goes to place p mod places when it is read.

    There are SPARE places more than a token sees, so that as many tokens can be cropped.
    """

    def __init__(self, chain: ShardChain):
        super().__init__(chain)
        self.states: dict[str, Any] = {}  # by shard
        self.positions = np.full(self.slots + SPARE, -1, np.int64)  # of the token at each place
        self.written = 0  # the end of all tokens ever read, cropped ones included

    def state_of(self, shard: str, call: ShardCall) -> Any:
        """Return the state of a shard; a new one if this is its first call."""
        if shard not in self.states:
            self.states[shard] = call.new_state()
        return self.states[shard]

    def inputs(self, count: int, size: int) -> dict[str, np.ndarray]:
        at = np.arange(self.read, self.read + count)
        self.positions[at % len(self.positions)] = at
        self.written = max(self.written, self.read + count)
        both = state_inputs(self.positions, self.read, count, size, self.slots)
        parts = zip(("mask", "write"), both, strict=True)
        return {name: part[None, None].astype(self.dtype) for name, part in parts}

    def hold(self, tokens: Sequence[int], have: Mapping[str, np.ndarray]) -> None:
        self.tokens += tokens

    def crop(self, length: int) -> None:
        lost = self.written > len(self.positions) and self.written - length > SPARE
        if not 0 <= length <= self.read or lost:
            raise ValueError(f"{self.read} tokens were read; they cannot be cropped to {length}")
        self.positions[self.positions >= length] = -1
        del self.tokens[length:]


class SlotCache(Cache):
    """Keys and values of one text. Token p is stored in slot p mod slots.

    The last call's keys and values stay outside the slots until the next call, since decoding may
    reject some of its tokens.
    """

    def __init__(self, chain: ShardChain):
        super().__init__(chain)
        d, dtype = chain.manifest.dims, self.dtype
        self.data = np.zeros((2 * d.passes, d.head, d.kv_heads, d.slots), dtype)
        self.positions = np.full(d.slots, -1, np.int64)  # of the token in each slot, or -1
        self.committed = 0  # how many tokens went into slots
        self.names = [f"{c}{n}" for n in range(d.passes) for c in "kv"]  # of the rows of `data`
        self.held = np.zeros((2 * d.passes, d.head, d.kv_heads, 0), dtype)
        self.overwritten: deque[np.ndarray] = deque(maxlen=REWIND)  # newest last

    def inputs(self, count: int, size: int) -> dict[str, np.ndarray]:
        self.commit()
        mask = attention_mask(self.positions, self.read, count, size)
        stored = dict(zip(self.names, self.data[:, None], strict=True))
        return {"mask": mask[None, None].astype(self.dtype)} | stored

    def hold(self, tokens: Sequence[int], have: Mapping[str, np.ndarray]) -> None:
        new = np.stack([have[f"{name}_new"][0] for name in self.names])
        self.held = new[..., : len(tokens)]
        self.tokens += tokens

    def commit(self) -> None:
        """Move the held keys and values into their slots."""
        for at in range(self.held.shape[-1]):
            slot = self.committed % len(self.positions)
            if self.positions[slot] >= 0:
                self.overwritten.append(self.data[..., slot].copy())
            self.data[..., slot], self.positions[slot] = self.held[..., at], self.committed
            self.committed += 1
        self.held = self.held[..., :0]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on: first the held ones, then those in slots.

        A slot gets its previous content back. That works for the last REWIND overwritten slots.
        """
        slots, back = len(self.positions), max(0, self.committed - length)
        lost = max(0, self.committed - slots) - max(0, length - slots) if back else 0
        if not 0 <= length <= self.read or lost > len(self.overwritten):
            raise ValueError(f"{self.read} tokens were read; they cannot be cropped to {length}")
        del self.tokens[length:]
        self.held = self.held[..., : max(0, length - self.committed)]
        for position in range(self.committed - 1, length - 1, -1):
            slot = position % slots
            self.positions[slot] = position - slots if position >= slots else -1
            if position >= slots:
                self.data[..., slot] = self.overwritten.pop()
        self.committed = min(self.committed, length)


class ShardEngine:
    """A chain behind the interface of `fairway.decoding.search.Reader`, for a batch of texts."""

    def __init__(self, chain: ShardChain):
        self.chain, self.caches = chain, [chain.new_cache()]

    @property
    def read(self) -> int:
        """The number of tokens read of each text."""
        return self.caches[0].read

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return [B, T, V]: the prediction of the token after each position."""
        rows, most = [], self.chain.most
        for cache, tokens in zip(self.caches, tokens_BT.tolist(), strict=True):
            pieces = [tokens[at : at + most] for at in range(0, len(tokens), most)]
            rows.append(np.concatenate([self.chain(cache, piece) for piece in pieces]))
        return torch.from_numpy(np.stack(rows))

    def crop(self, length: int) -> None:
        for cache in self.caches:
            cache.crop(length)

    def pick(self, rows: torch.Tensor) -> None:
        """Make text i a copy of text rows[i]."""
        self.caches = [self.caches[row].copy() for row in rows.tolist()]


def load_chain(
    folder: str | Path, path: str | Path, loaded: Loaded, runner: Runner | None = None
) -> ShardChain:
    """Load the shards in `folder`; require that they were exported from the artifact at `path`.

    The artifact's hash must match, and so must everything that can be compared with the model
    without running it: dimensions, RoPE base, tokenizer and embeddings.
    """
    chain, ours = ShardChain(folder, runner), file_sha256(path)
    m, cfg = chain.manifest, loaded.model.cfg
    if m.artifact_sha256 != ours:
        raise UserError(
            f"{folder} was exported from artifact {m.artifact_sha256[:12]!r}, not from "
            f"{ours[:12]}; export it again with fairway export-coreml"
        )
    wanted = {name: table.astype(m.dtype) for name, table in host_tables(loaded.model).items()}
    if not (
        m.dims == model_dims(loaded.model, m.dims.slots)
        and m.rope_base == cfg.rope_base
        and m.tokenizer_sha256 == loaded.artifact.header["tokenizer_sha256"]
        and wanted.keys() == chain.folder.tables.keys()
        and all(
            np.array_equal(table.astype(np.float32), chain.folder.tables[name])
            for name, table in wanted.items()
        )
    ):
        raise UserError(
            f"{folder} says that it was exported from this artifact, but its numbers are from "
            "another one; export it again with fairway export-coreml"
        )
    return chain


class ShardEngineSource:
    """Engines that share one chain of shards (an EngineSource of fairway.decoding.reader)."""

    def __init__(self, chain: ShardChain):
        self.chain = chain

    @property
    def context(self) -> int:
        """The number of tokens that the shards see at a time."""
        return self.chain.manifest.dims.slots

    @property
    def most(self) -> int:
        """The largest number of tokens in one call."""
        return self.chain.most

    @property
    def calls(self) -> int:
        """The number of calls so far."""
        return self.chain.counts.calls

    def new_engine(self) -> ShardEngine:
        """Return an engine for a new text."""
        return ShardEngine(self.chain)


def connect_shards(folder: str, artifact: str) -> Callable[[Loaded], ShardEngineSource]:
    """Return what `Writer(artifact, connect=...)` needs to run the shards in `folder`.

    Connecting checks that the shards were exported from this artifact.
    """
    return lambda loaded: ShardEngineSource(load_chain(folder, artifact, loaded))
