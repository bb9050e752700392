"""Turn any bytes into tokens and back exactly, with a tokenizer that alone would lose some."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import sentencepiece

from fairway.case_ops import fold, unfold
from train_gpt import BOS_ID, ByteTable, UserError

# Fields of a SentencePiece model, a protobuf. Appended to a model, they replace its own: no
# normalisation, no added first blank, blanks kept. The segmentation stays as it was trained.
KEEP_ALL = b"\x1a\x06\x12\x00\x18\x00\x20\x00"
BLANK = "▁"  # a blank inside pieces; SentencePiece cannot tell a literal one from it
RUNS = re.compile(
    f"[{BLANK}\udc80-\udcff]+|[^{BLANK}\udc80-\udcff]+"
)  # \udc80 to \udcff: bytes that are no UTF-8, as "surrogateescape" decodes them
RAW = re.compile(f"[{BLANK}\udc80-\udcff]")
NEXT_STEP = "use an artifact whose tokenizer has byte pieces (data/prepare.py trains such)"


def folded(data: bytes) -> bytes:
    """Fold the case of the text in any bytes; other bytes stay."""
    return fold(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def unfolded(data: bytes) -> bytes:
    """Return the bytes that `folded` was given."""
    return unfold(data.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


class Speller:
    """Tokens of any bytes, and bytes of any tokens.

    Text gets the tokenizer's own segmentation, byte pieces spell the rest. A token spells the bytes
    that `train_gpt.ByteTable` counts for it: if the tokenizer drops a document's first blank, a
    leading blank is dropped after BOS and after any other token without bytes. A tokenizer with
    case markers spells the folded text.

    >>> speller.data(speller.tokens(b"any bytes")) == b"any bytes"
    True
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor, vocab_size: int):
        count = tokenizer.vocab_size()
        if count > vocab_size:
            raise UserError(
                f"the tokenizer has {count} pieces, but the model knows {vocab_size}; use the "
                "tokenizer that it was trained with"
            )
        self.table = ByteTable.of(tokenizer, vocab_size)
        names = tokenizer.id_to_piece(list(range(count))) + [""] * (vocab_size - count)
        byte_ids = [i for i in range(count) if tokenizer.is_byte(i)]
        self.bytes = {int(names[i][3:5], 16): i for i in byte_ids}  # <0x0A>: the token of byte 10
        silent = self.table.base + self.table.space == 0  # control, unknown, unused, case markers
        markers = set(self.table.markers)
        self.pieces = [
            b"" if is_silent and name not in markers else name.replace(BLANK, " ").encode()
            for name, is_silent in zip(names, silent, strict=True)
        ]  # what each token spells after an ordinary token
        for value, i in self.bytes.items():
            self.pieces[i] = bytes([value])
        self.tokenizer = sentencepiece.SentencePieceProcessor(
            model_proto=tokenizer.serialized_model_proto() + KEEP_ALL
        )
        self.drops_blank = bool(self.table.boundary[BOS_ID] and self.table.space.any())
        # A tokenizer that was trained to add a blank in front of a text gets one here too.
        probe, plain = tokenizer.encode("a"), self.tokenizer.encode("a")
        self.adds_blank = self.drops_blank and probe == self.tokenizer.encode(" a") != plain
        # Where pieces spell the same bytes, ordinary ones win over byte pieces, and low ids over
        # high ones: those are what the model saw most.
        others = sorted(set(range(count)) - set(byte_ids), reverse=True)
        self.ids = {self.pieces[i]: i for i in [*byte_ids, *others]}
        self.ids.pop(b"", None)
        self.lengths = sorted({len(piece) for piece in self.ids})

    @property
    def folds(self) -> bool:
        """True if the tokenizer reads folded text, with case markers."""
        return bool(self.table.markers)

    def tokens(self, data: bytes) -> list[int]:
        """Return the token ids of a document, without BOS."""
        if not data:
            return []
        ids = self._tokens(folded(data) if self.folds else data)
        if self.data(ids) != data:
            raise UserError(f"this tokenizer cannot spell the text's beginning; {NEXT_STEP}")
        return ids

    def _tokens(self, data: bytes) -> list[int]:
        """Return tokens whose pieces spell `data`."""
        # A reader drops the first blank, so a text that starts with one needs another in front.
        # If that one is spelled as a byte piece, which no reader drops, it is taken away again.
        extra = self.adds_blank or (self.drops_blank and data.startswith(b" "))
        ids = [i for run in self._runs(b" " * extra + data) for i in run]
        return ids[1:] if extra and not self.table.space[ids[0]] else ids

    def data(self, ids: Sequence[int] | np.ndarray, start_of_document: bool = True) -> bytes:
        """Return the bytes of tokens, at the start of a document or after an ordinary token."""
        spelled = self.spelled(ids, start_of_document)
        return unfolded(spelled) if self.folds else spelled

    def spelled(self, ids: Sequence[int] | np.ndarray, start_of_document: bool = True) -> bytes:
        """Return the bytes of tokens, as `data` does, but with the case markers in them."""
        ids = np.asarray(ids, dtype=np.int64)
        if not len(ids):
            return b""
        parts = [self.pieces[i] for i in ids.tolist()]
        at_start = self.table.boundary[BOS_ID] and start_of_document
        after_boundary = np.concatenate([[at_start], self.table.boundary[ids[:-1]]])
        for i in np.flatnonzero(after_boundary & self.table.space[ids]).tolist():
            parts[i] = parts[i][1:]
        return b"".join(parts)

    def _runs(self, data: bytes) -> Iterator[list[int]]:
        """Yield the tokens of each run of text, and of each run of other bytes, in order."""
        runs = RUNS.findall(data.decode("utf-8", "surrogateescape"))
        texts = [run for run in runs if not RAW.match(run)]
        encoded = iter(self.tokenizer.encode(texts, num_threads=1))
        for run in runs:
            raw = run.encode("utf-8", "surrogateescape")
            if RAW.match(run):
                yield self._byte_by_byte(raw)
            else:
                yield self._exact(run, raw, next(encoded))

    def _byte_by_byte(self, data: bytes) -> list[int]:
        """Return the byte pieces of `data`."""
        missing = [byte for byte in data if byte not in self.bytes]
        if missing:
            raise UserError(
                f"this tokenizer has no piece for the byte 0x{missing[0]:02X}; {NEXT_STEP}"
            )
        return [self.bytes[byte] for byte in data]

    def _exact(self, text: str, data: bytes, ids: list[int]) -> list[int]:
        """Return ids that spell `data`: the tokenizer's own, else line by line, else the fewest."""
        if b"".join([self.pieces[i] for i in ids]) == data:
            return ids
        lines = text.splitlines(keepends=True)
        if len(lines) == 1:
            return self._fewest(data)
        encoded = self.tokenizer.encode(lines, num_threads=1)
        return [
            i
            for line, line_ids in zip(lines, encoded, strict=True)
            for i in self._exact(line, line.encode(), line_ids)
        ]

    def _fewest(self, data: bytes) -> list[int]:
        """Return the fewest pieces that spell `data`; time grows linearly with its length.

        Dynamic programming from the end: the cost of a suffix is the fewest pieces that spell it.
        """
        never = len(data) + 1
        cost, best_length = [never] * len(data) + [0], [0] * len(data)
        for start in range(len(data) - 1, -1, -1):
            for end in [start + n for n in self.lengths if start + n <= len(data)]:
                if cost[end] + 1 < cost[start] and data[start:end] in self.ids:
                    cost[start], best_length[start] = cost[end] + 1, end - start
        if cost[0] >= never:
            raise UserError(f"this tokenizer has no pieces that spell {data[:40]!r}; {NEXT_STEP}")
        ids, start = [], 0
        while start < len(data):
            ids.append(self.ids[data[start : start + best_length[start]]])
            start += best_length[start]
        return ids
