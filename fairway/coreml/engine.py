"""A folder of shards as an engine that decoding drives: tokens in, logits out, keys and values of what is accepted.

Off a Mac the shards are interpreted; on one, CoreML runs them. What is around them, embeddings, rotations, masks and
slots, is the same code."""

from __future__ import annotations

import copy
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fairway.compression.loading import Loaded
from fairway.coreml.graph import dims_of, host_tables
from fairway.coreml.host import Embedding, mask_of, rotations
from fairway.coreml.interpret import Program
from fairway.coreml.manifest import Folder, read_folder
from fairway.scoring.memory import REWIND
from train_gpt import file_sha256, need

Call = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
Runner = Callable[[Folder, str, str], Call]  # of a folder's shard and function


def interpreted(precision: str = "declared") -> Runner:
    return lambda folder, shard, function: Program(folder.packages[shard], function, precision)


def on_this_machine() -> Runner:
    """CoreML's own predict on a Mac, the interpreter elsewhere."""
    if sys.platform != "darwin":
        return interpreted()
    from fairway.coreml.mac import predicted

    return predicted()


@dataclass
class Used:
    """What was asked of the shards."""

    calls: int = 0  # of the whole chain
    tokens: int = 0  # in them
    seconds: float = 0.0


class Chain:
    """The shards of a folder, each function of them loaded when it is first called."""

    def __init__(self, folder: Folder | str | Path, runner: Runner | None = None):
        self.folder = folder if isinstance(folder, Folder) else read_folder(folder)
        self.manifest, self.runner = self.folder.manifest, runner or on_this_machine()
        self.interfaces, self.embed = self.manifest.interfaces(), Embedding(self.folder.tables)
        self.loaded: dict[tuple[str, str], Call] = {}
        self.used = Used()

    @property
    def most(self) -> int:
        return self.manifest.sizes[-1]

    def function(self, shard: str, function: str) -> Call:
        if (shard, function) not in self.loaded:
            self.loaded[shard, function] = self.runner(self.folder, shard, function)
        return self.loaded[shard, function]

    def __call__(self, stream: Stream, tokens: Sequence[int]) -> np.ndarray:
        """float32[len(tokens), V], and the stream holds their keys and values."""
        m, began = self.manifest, time.perf_counter()
        need(
            1 <= len(tokens) <= self.most,
            f"a call of {len(tokens)} tokens; these shards take 1 to {self.most}",
        )
        need(
            all(0 <= token < m.dims.vocab for token in tokens),
            f"a token outside the {m.dims.vocab} of these shards",
        )
        name, size = m.function_for(len(tokens))
        have = self.given(stream, tokens, size)
        for shard, interface in self.interfaces.items():
            have |= self.function(shard, name)({n: have[n] for n in interface.inputs})
        logits = np.concatenate([have[f"logits{n}"] for n in range(len(m.split) - 1)], axis=1)
        stream.hold(
            tokens, np.stack([have[f"{c}{n}_new"][0] for n in range(m.dims.passes) for c in "kv"])
        )
        self.used.calls, self.used.tokens = self.used.calls + 1, self.used.tokens + len(tokens)
        self.used.seconds += time.perf_counter() - began
        return logits[0, :, 0, : len(tokens)].T.astype(np.float32)

    def given(self, stream: Stream, tokens: Sequence[int], size: int) -> dict[str, np.ndarray]:
        """What goes into the first shard, and beside what is handed on into the others."""
        stream.commit()
        m, filled = self.manifest, [*tokens, *[0] * (size - len(tokens))]
        cos, sin = rotations(stream.read, size, m.dims.rotary, m.rope_base)
        mask = mask_of(stream.positions, stream.read, len(tokens), size)
        as_4d = {
            name: array[None, :, None]
            for name, array in (("x0", self.embed(filled, stream.last)), ("cos", cos), ("sin", sin))
        } | {"mask": mask[None, None]}
        kept = {
            f"{c}{n}": stream.data[2 * n + i][None]
            for n in range(m.dims.passes)
            for i, c in enumerate("kv")
        }
        return {name: array.astype(m.dtype) for name, array in as_4d.items()} | kept

    def stream(self) -> Stream:
        return Stream(self)


class Stream:
    """What one text has left in the slots. Token p lies in slot p mod slots; the keys and values of the last call are
    held apart until it is known how many of its tokens are accepted."""

    def __init__(self, chain: Chain):
        d, dtype = chain.manifest.dims, chain.manifest.dtype
        self.data = np.zeros((2 * d.passes, d.head, d.kv_heads, d.slots), dtype)
        self.positions = np.full(d.slots, -1, np.int64)
        self.kept, self.tokens = 0, []  # tokens in the slots, ever; and all that were read
        self.held = np.zeros((2 * d.passes, d.head, d.kv_heads, 0), dtype)
        self.gone: deque[np.ndarray] = deque(
            maxlen=REWIND
        )  # what was overwritten, the last one last

    @property
    def read(self) -> int:
        return len(self.tokens)

    @property
    def last(self) -> list[int]:
        """The last two tokens: an embedding looks back that far."""
        return self.tokens[-2:]

    def hold(self, tokens: Sequence[int], new: np.ndarray) -> None:
        """[2 passes, C, G, size] of a call, of which the first len(tokens) are real."""
        self.held = new[..., : len(tokens)]
        self.tokens += tokens

    def commit(self) -> None:
        """Keep what is held, each token in its slot."""
        for at in range(self.held.shape[-1]):
            slot = self.kept % len(self.positions)
            if self.positions[slot] >= 0:
                self.gone.append(self.data[..., slot].copy())
            self.data[..., slot], self.positions[slot] = self.held[..., at], self.kept
            self.kept += 1
        self.held = self.held[..., :0]

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on: those held first, then those in slots, which get back what they had."""
        slots, back = len(self.positions), max(0, self.kept - length)
        lost = max(0, self.kept - slots) - max(0, length - slots) if back else 0
        if not 0 <= length <= self.read or lost > len(self.gone):
            raise ValueError(f"{self.read} tokens were read; they cannot be cropped to {length}")
        del self.tokens[length:]
        self.held = self.held[..., : max(0, length - self.kept)]
        for position in range(self.kept - 1, length - 1, -1):
            slot = position % slots
            self.positions[slot] = position - slots if position >= slots else -1
            if position >= slots:
                self.data[..., slot] = self.gone.pop()
        self.kept = min(self.kept, length)

    def copy(self) -> Stream:
        return copy.deepcopy(self)


class Shards:
    """What fairway.decoding asks of an engine, for any number of texts side by side."""

    def __init__(self, chain: Chain):
        self.chain, self.streams = chain, [chain.stream()]

    @property
    def read(self) -> int:
        return self.streams[0].read

    def logits(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """[B, T, V]: what each position says of the token after it."""
        rows = []
        for stream, tokens in zip(self.streams, tokens_BT.tolist(), strict=True):
            pieces = [
                tokens[at : at + self.chain.most] for at in range(0, len(tokens), self.chain.most)
            ]
            rows.append(np.concatenate([self.chain(stream, piece) for piece in pieces]))
        return torch.from_numpy(np.stack(rows))

    def crop(self, length: int) -> None:
        for stream in self.streams:
            stream.crop(length)

    def pick(self, rows: torch.Tensor) -> None:
        self.streams = [self.streams[row].copy() for row in rows.tolist()]


def load_chain(
    folder: str | Path, path: str | Path, loaded: Loaded, runner: Runner | None = None
) -> Chain:
    """The shards in a folder, once it is sure that they are those of the artifact at `path`: by its hash, and by all
    that can be compared with the model without running it."""
    chain, ours = Chain(folder, runner), file_sha256(path)
    m, cfg = chain.manifest, loaded.model.cfg
    need(
        m.artifact_sha256 == ours,
        f"{folder} was exported from artifact {m.artifact_sha256[:12]!r}, not from "
        f"{ours[:12]}; export it again with export_coreml.py",
    )
    same = (
        m.dims == dims_of(loaded.model, m.dims.slots)
        and m.rope_base == cfg.rope_base
        and m.tokenizer_sha256 == loaded.artifact.header["tokenizer_sha256"]
    )
    tables = {name: table.astype(m.dtype) for name, table in host_tables(loaded.model).items()}
    same = (
        same
        and tables.keys() == chain.folder.tables.keys()
        and all(
            np.array_equal(table.astype(np.float32), chain.folder.tables[name])
            for name, table in tables.items()
        )
    )
    need(
        same,
        f"{folder} says that it was exported from this artifact, but its numbers are of another one; export it "
        "again with export_coreml.py",
    )
    return chain
