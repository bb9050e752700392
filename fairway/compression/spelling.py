"""Any bytes as tokens, and back exactly: what a lossless compressor needs of a tokenizer that may be anything but."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from train_gpt import BOS_ID, ByteTable, need

# Fields of a SentencePiece model (a protobuf) that, behind it, override its own: no table of normal forms, no blank
# put in front, blanks kept. Its segmentation stays, and text goes through it as it is.
AS_IT_IS = b"\x1a\x06\x12\x00\x18\x00\x20\x00"
BLANK = "▁"  # stands for a blank inside pieces; SentencePiece cannot tell a literal one from it
RUNS = re.compile(
    f"[{BLANK}\udc80-\udcff]+|[^{BLANK}\udc80-\udcff]+"
)  # bytes that are no UTF-8 are \udc80 to \udcff
RAW = re.compile(f"[{BLANK}\udc80-\udcff]")
NEXT = "use an artifact whose tokenizer has byte pieces (data/prepare.py trains such)"


class Speller:
    """Tokens of any bytes. Text gets the segmentation that the tokenizer gives it, and a token spells what
    `train_gpt.ByteTable` counts for it: behind BOS (and whatever else has no bytes) a leading blank is swallowed if
    the tokenizer swallows a document's first one.

    >>> speller.data(speller.tokens(b"naive\\xff text")) == b"naive\\xff text"
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int):
        count = tokenizer.vocab_size()
        need(
            count <= vocab_size,
            f"the tokenizer has {count} pieces, but the model knows {vocab_size}; use the "
            "tokenizer that it was trained with",
        )
        self.table = ByteTable.of(tokenizer, vocab_size)
        names = tokenizer.id_to_piece(list(range(count))) + [""] * (vocab_size - count)
        byte = [i for i in range(count) if tokenizer.is_byte(i)]
        self.bytes = {int(names[i][3:5], 16): i for i in byte}  # <0x0A>: the token of byte 10
        silent = self.table.base + self.table.space == 0  # control, unknown, unused
        self.pieces = [
            b"" if mute else name.replace(BLANK, " ").encode()
            for name, mute in zip(names, silent, strict=True)
        ]  # what each token spells behind another
        for value, i in self.bytes.items():
            self.pieces[i] = bytes([value])
        self.tokenizer = sentencepiece.SentencePieceProcessor(
            model_proto=tokenizer.serialized_model_proto() + AS_IT_IS
        )
        self.swallows = bool(self.table.boundary[BOS_ID] and self.table.space.any())
        probe = tokenizer.encode("a")
        self.leads = self.swallows and probe == self.tokenizer.encode(
            " a"
        ) != self.tokenizer.encode("a")
        self.known = {
            self.pieces[i]: i for i in [*byte, *sorted(set(range(count)) - set(byte), reverse=True)]
        }
        self.known.pop(b"", None)
        self.lengths = sorted({len(piece) for piece in self.known})

    def tokens(self, data: bytes) -> list[int]:
        """Token ids of a document, without BOS."""
        if not data:
            return []
        # A blank in front, which a reader drops: many tokenizers are trained so, and a text's own first blank needs it.
        # Where it is spelt as a byte, which nobody drops, it is left out again.
        led = self.leads or self.swallows and data.startswith(b" ")
        ids = [i for run in self._runs(b" " * led + data) for i in run]
        ids = ids[1:] if led and not self.table.space[ids[0]] else ids
        need(self.data(ids) == data, f"this tokenizer cannot spell the text's beginning; {NEXT}")
        return ids

    def data(self, ids: Sequence[int] | np.ndarray, start_of_document: bool = True) -> bytes:
        """The bytes that tokens spell, at the start of a document or behind an ordinary token."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(ids):
            return b""
        parts = [self.pieces[i] for i in ids.tolist()]
        before = np.concatenate(
            [[self.table.boundary[BOS_ID] and start_of_document], self.table.boundary[ids[:-1]]]
        )
        for at in np.flatnonzero(before & self.table.space[ids]).tolist():
            parts[at] = parts[at][1:]
        return b"".join(parts)

    def _runs(self, data: bytes) -> Iterator[list[int]]:
        """Tokens of each run of text, and of each run of what is none, in order."""
        runs = RUNS.findall(data.decode("utf-8", "surrogateescape"))
        texts = [run for run in runs if not RAW.match(run)]
        encoded = iter(self.tokenizer.encode(texts, num_threads=1))
        for run in runs:
            raw = run.encode("utf-8", "surrogateescape")
            yield (
                self._byte_by_byte(raw) if RAW.match(run) else self._exact(run, raw, next(encoded))
            )

    def _byte_by_byte(self, data: bytes) -> list[int]:
        absent = next((byte for byte in data if byte not in self.bytes), None)
        need(
            absent is None, f"this tokenizer has no piece for the byte 0x{absent or 0:02X}; {NEXT}"
        )
        return [self.bytes[byte] for byte in data]

    def _exact(self, text: str, data: bytes, ids: list[int]) -> list[int]:
        """The tokenizer's own ids if they spell `data`, else those of its lines, else what spells it in the fewest."""
        if b"".join([self.pieces[i] for i in ids]) == data:
            return ids
        lines = text.splitlines(keepends=True)
        if len(lines) == 1:
            return self._fewest(data)
        encoded = self.tokenizer.encode(lines, num_threads=1)
        return [
            i
            for line, own in zip(lines, encoded, strict=True)
            for i in self._exact(line, line.encode(), own)
        ]

    def _fewest(self, data: bytes) -> list[int]:
        """The fewest pieces that spell `data`, from its end to its start: time grows with its length alone."""
        beyond = len(data) + 1
        cost, choice = [beyond] * len(data) + [0], [0] * len(data)
        for at in range(len(data) - 1, -1, -1):
            for end in [at + n for n in self.lengths if at + n <= len(data)]:
                if cost[end] + 1 < cost[at] and data[at:end] in self.known:
                    cost[at], choice[at] = cost[end] + 1, end - at
        need(cost[0] < beyond, f"this tokenizer has no pieces that spell {data[:40]!r}; {NEXT}")
        ids, at = [], 0
        while at < len(data):
            ids.append(self.known[data[at : at + choice[at]]])
            at += choice[at]
        return ids
