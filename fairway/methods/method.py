"""The interface of a compression method, and the text that it may look at."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fairway.methods import parcel
from fairway.scoring.memory import Memory
from fairway.scoring.text import Text
from train_gpt import BOS_ID, GPT, TokenStream, UserError

PARCEL = "model.fwm"


@dataclass(frozen=True)
class Method(ABC):
    """One change to a model. A subclass is a dataclass: its fields are the method's settings.

    `apply` returns the changed model and leaves its input alone. `ship` writes all files that a
    user of the model needs, `load` reads them back, and `bytes` is their size. The docstring of
    the subclass is the method's documentation.
    """

    group: ClassVar[str] = ""  # heading of the table
    seeded: ClassVar[bool] = False  # the result depends on a seed: three are run
    needs: ClassVar[tuple[str, ...]] = ()  # optional packages
    requirements: ClassVar[str] = ""  # the file that installs them
    memory_unreliable: ClassVar[str] = ""  # why its peak memory means little
    same_score_as: ClassVar[str] = ""  # a method that computes the same, if one does
    error_bound: ClassVar[float] = 0.0  # largest change of a weight over its row's largest; 0: none
    code: ClassVar[tuple[str, ...]] = ()  # modules that read its files, besides parcel.py
    storage: ClassVar[str] = "fp32"  # of cached keys and values: a name of scoring.memory.STORAGE
    cache_lengths: ClassVar[tuple[int, ...]] = (128, 256)  # tokens at which the cache is measured
    draft: ClassVar[str] = ""  # who guesses tokens ahead: ngram, suffix or layers

    @abstractmethod
    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        """Return the changed model."""

    def ship(self, model: GPT, folder: Path) -> None:
        """Write the files of a model that `apply` returned."""
        (folder / PARCEL).write_bytes(self.packed(model))

    def bytes(self, model: GPT) -> int:
        """Return the size of all that `ship` writes."""
        return len(self.packed(model))

    def packed(self, model: GPT) -> bytes:
        """Return the parcel of a model, made once: its codecs take seconds."""
        if not hasattr(model, "parcel"):
            model.parcel = self.pack(model)
        return model.parcel

    def pack(self, model: GPT) -> bytes:
        return parcel.pack(model)

    def load(self, folder: Path) -> GPT:
        """Return the model of the files that `ship` wrote, and of nothing else."""
        return parcel.unpack((folder / PARCEL).read_bytes())

    def retokenised(self, text: Text, model: GPT) -> Text:
        """Return the scored text in the tokens of a loaded model: the same bytes."""
        return text

    def spared(self, model: GPT) -> dict[str, Tensor]:
        """Return the parameters that the method promises not to change, with their values."""
        return {}

    def running(self) -> contextlib.AbstractContextManager:
        """Return the context in which everything is measured: an attention kernel, for example."""
        return contextlib.nullcontext()

    def figures(self, model: GPT) -> dict[str, Any]:
        """Return figures of the method's own about a model that `apply` returned."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, as JSON takes them."""
        return {n: str(v) if isinstance(v, Method) else v for n, v in asdict(self).items()}


class NotHere(UserError):
    """A method that this model or machine has no use for; the message says why."""


class Calibration:
    """Text for methods that need some: never the text that is scored.

    It keeps account of what it gave, so that an audit can compare that with the scored text.
    """

    def __init__(
        self,
        model: GPT,
        shards: list[np.ndarray],
        seed: int = 0,
        checkpoint: Path | None = None,
        tokenizer: Any = None,
    ):
        self.model, self.shards, self.seed = model, shards, seed
        self.checkpoint, self.tokenizer = checkpoint, tokenizer
        self.given: list[tuple[str, np.ndarray]] = []

    def give(self, source: str, tokens: np.ndarray) -> Tensor:
        """Note tokens [rows, T] and return them."""
        self.given.append((source, tokens))
        return torch.from_numpy(tokens.astype(np.int64))

    @property
    def length(self) -> int:
        return self.model.cfg.train_seq_len

    def training(self, rows: int, skip: int = 0) -> Tensor:
        """Return rows of training text, [rows, T], from `skip` rows after the seed's place."""
        if not self.shards:
            raise UserError("no *_train_*.bin to calibrate with; set --data to a folder of shards")
        stream, total = TokenStream(self.shards), sum(map(len, self.shards))
        # 7919 sequences apart, so that the texts of two seeds do not overlap.
        first = (self.seed * 7919 + skip) * self.length % total
        tokens = stream.peek(rows * self.length, first).reshape(rows, -1)
        return self.give("training", tokens)

    @torch.no_grad()
    def sampled(self, rows: int) -> Tensor:
        """Return rows that the model wrote itself, at temperature 1, each after a BOS."""
        generator = torch.Generator().manual_seed(self.seed)
        memory, tokens = Memory(self.model), torch.full((rows, 1), BOS_ID)
        for _ in range(self.length - 1):
            p = memory.logits(tokens[:, -1:])[:, -1].float().softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
        return self.give("own samples", tokens.numpy())

    def random(self, rows: int) -> Tensor:
        """Return rows of uniform random tokens."""
        rng = np.random.default_rng(self.seed)
        return self.give("random", rng.integers(0, self.model.cfg.vocab_size, (rows, self.length)))

    def rows(self, source: str, count: int) -> Tensor:
        """Return `count` rows from a source by its name: training, sampled or random."""
        return {"training": self.training, "sampled": self.sampled, "random": self.random}[source](
            count
        )

    def account(self) -> list[dict[str, Any]]:
        """Return what was given: source, tokens, SHA-256."""
        return [
            {
                "source": source,
                "tokens": tokens.size,
                "sha256": hashlib.sha256(tokens.astype("<u2")).hexdigest(),
            }
            for source, tokens in self.given
        ]
