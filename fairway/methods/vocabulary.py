"""Fewer pieces: tokens that training text hardly has lose their row, and are spelled by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.compression.spelling import BLANK, Speller
from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.pruning import ROUNDING
from fairway.scoring.text import Text
from train_gpt import GPT, BigramHash, ByteTable, UserError, document_bounds

PIECES = "pieces.bits"  # next to the model: one bit for each piece of the tokenizer


class SmallVocabulary:
    """A tokenizer of which some pieces are left, numbered anew in their old order.

    It spells a text as the whole tokenizer does; then each token that was dropped becomes the
    longest pieces that are left, from its start on. Byte pieces are all left, so that there is
    always one.
    """

    def __init__(self, tokenizer: Any, kept: Sequence[int] | np.ndarray):
        self.tokenizer, self.kept = tokenizer, np.asarray(kept)
        speller = Speller(tokenizer, max(tokenizer.vocab_size(), int(self.kept[-1]) + 1))
        self.pieces = [speller.pieces[i] for i in self.kept]
        # Where two pieces spell the same bytes, an ordinary one stands for them, not a byte piece.
        bytes_last = sorted(range(len(self.kept)), key=lambda new: not self.is_byte(new))
        self.ids = {self.pieces[new]: new for new in bytes_last}
        renumbered = {int(old): new for new, old in enumerate(self.kept)}
        self.spelled = [
            [renumbered[old]] if old in renumbered else self.spell(piece)
            for old, piece in enumerate(speller.pieces)
        ]

    def is_byte(self, new: int) -> bool:
        return self.tokenizer.is_byte(int(self.kept[new]))

    def spell(self, data: bytes) -> list[int]:
        """Return the longest pieces that are left, one after another."""
        tokens = []
        while data:
            size = next(n for n in range(len(data), 0, -1) if data[:n] in self.ids)
            tokens.append(self.ids[data[:size]])
            data = data[size:]
        return tokens

    def respelled(self, tokens: np.ndarray) -> np.ndarray:
        """Return tokens of the whole tokenizer in those that are left."""
        return np.array([new for old in tokens.tolist() for new in self.spelled[old]], np.uint16)

    def encode(self, text: str) -> list[int]:
        return self.respelled(np.array(self.tokenizer.encode(text), np.int64)).tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(self.kept[np.asarray(ids, np.int64)].tolist())

    def table(self, whole: ByteTable) -> ByteTable:
        """Return the bytes of each piece that is left."""
        arrays = (whole.base, whole.space, whole.boundary)
        return ByteTable(*(array[self.kept] for array in arrays), whole.markers)


class RenumberedBigram(BigramHash):
    """A bigram table that hashes a token's old number: its rows were learned by those."""

    def __init__(self, bigram: BigramHash, kept: Tensor):
        torch.nn.Module.__init__(self)
        self.table, self.proj, self.scale = bigram.table, bigram.proj, bigram.scale
        self.register_buffer("kept", kept, persistent=False)

    def buckets(self, tokens_BT: Tensor) -> Tensor:
        return super().buckets(self.kept[tokens_BT])


def renumbered(model: GPT, kept: np.ndarray) -> GPT:
    """Let a model with one embedding for each piece that is left compute with their new numbers."""
    if model.bigram is not None:
        model.bigram = RenumberedBigram(model.bigram, torch.from_numpy(kept))
    model.kept_pieces = kept
    return model


def with_rows(model: GPT, kept: np.ndarray) -> GPT:
    """Return a copy that has the embeddings of these tokens only."""
    small = GPT(replace(model.cfg, vocab_size=len(kept)))
    state = {name: w.clone() for name, w in model.state_dict().items()}
    state["tok_emb.weight"] = state["tok_emb.weight"][torch.from_numpy(kept)]
    small.load_state_dict(state, strict=True)
    small.looping = model.looping
    return renumbered(small.placed("cpu").train(model.training), kept)


@dataclass(frozen=True)
class SmallerVocabulary(Method):
    """Vocabulary pruning: pieces of the tokenizer that a sample of training text has fewer than
    `least` times lose their embedding, which is their row of the head as well. A text still has a
    spelling, because each dropped piece is spelled by the longest ones left, at last by byte
    pieces, which all stay; so the same bytes are scored, in a few more tokens. The rest is rounded
    to 6 bits, and a bit for each piece of the tokenizer ships with the model.
    """

    rows: int  # of training text to count in
    least: int
    group = "fewer weights"
    code = ("vocabulary.py", "../compression/spelling.py")

    def kept(self, calibration: Calibration) -> np.ndarray:
        """Return the numbers of the pieces that stay, in order."""
        tokenizer, vocab_size = calibration.tokenizer, calibration.model.cfg.vocab_size
        if tokenizer is None:
            raise NotHere("there is no tokenizer to take pieces from; set --tokenizer")
        if sum(tokenizer.is_byte(i) for i in range(tokenizer.vocab_size())) < 256:
            raise NotHere("the tokenizer has no byte pieces; data/prepare.py trains one that has")
        sample = calibration.training(self.rows)
        often = torch.bincount(sample.flatten(), minlength=vocab_size).numpy() >= self.least
        table = ByteTable.of(tokenizer, vocab_size)
        often |= table.base + table.space == 0  # control pieces
        for i in range(tokenizer.vocab_size()):
            often[i] |= tokenizer.is_byte(i) or tokenizer.id_to_piece(i) == BLANK
        return np.flatnonzero(often)

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return ROUNDING.apply(with_rows(model, self.kept(calibration)), calibration)

    def ship(self, model: GPT, folder: Path) -> None:
        super().ship(model, folder)
        (folder / PIECES).write_bytes(bits_of(model.kept_pieces))

    def bytes(self, model: GPT) -> int:
        return super().bytes(model) + len(bits_of(model.kept_pieces))

    def load(self, folder: Path) -> GPT:
        model = super().load(folder)
        bits = np.frombuffer((folder / PIECES).read_bytes(), np.uint8)
        kept = np.flatnonzero(np.unpackbits(bits))
        if len(kept) != model.cfg.vocab_size:
            message = f"{PIECES} keeps {len(kept)} pieces, the model has {model.cfg.vocab_size}"
            raise UserError(f"{message}; copy both files of one model")
        return renumbered(model, kept)

    def retokenised(self, text: Text, model: GPT) -> Text:
        """Return the same text in the pieces that are left; refuse one that decodes otherwise."""
        small = SmallVocabulary(text.tokenizer, model.kept_pieces)
        tokens, table = small.respelled(text.tokens), small.table(text.table)
        for old, new in zip(documents(text.tokens), documents(tokens), strict=True):
            if text.tokenizer.decode(old) != small.decode(new):
                raise UserError("a document decodes to other text in the pieces that are left")
        return text._replace(tokens=tokens, sizes=table.count(tokens), table=table, tokenizer=small)


def bits_of(kept: np.ndarray) -> bytes:
    return np.packbits(np.bincount(kept).astype(bool)).tobytes()


def documents(tokens: np.ndarray) -> list[list[int]]:
    bounds = document_bounds(tokens)
    return [tokens[a:b].tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
