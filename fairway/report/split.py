"""The validation split with its log-probabilities: shards, columns of an evaluation, tokenizer.

Everything is checked against the hashes and sizes in score.json. No model is run.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import math
import os
import re
import stat
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.records.run import RunFiles, dict_at
from fairway.report.artifact import MOST_TOKENIZER, brotli_content, read_artifact_file
from fairway.report.data import (
    Missing,
    clean_text,
    finite_number,
    no_score,
    objects_in,
    whole_number,
)

ROOT = Path(__file__).resolve().parents[2]
BOS_ID = 1  # every document starts with it
MOST_SPLIT_TOKENS = 1 << 28  # four times FineWeb's split
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
PART = 1 << 22  # rows that are read at a time
PASSAGE = 48  # tokens
PASSAGE_STRIDE = 12
RERUN = "run eval_final.py again"
# Case markers of folded text (fairway/case_ops.py) as signs that a page can show.
MARKER_SIGNS = {0xE001: "⇧", 0xE002: "⇪", 0xE003: "⇧", 0xE004: "⟨escape⟩"}


# ==== FILES =======================================================================================
def map_column(folder: Path, name: str, rows: int, loss: float) -> np.ndarray:
    """Map a column of log-probabilities in nats, and check it against the loss that was printed for
    it.
    """
    path, start = folder / "eval" / name, io.BytesIO()
    np.lib.format.write_array_header_1_0(
        start, dict(descr="<f8", fortran_order=False, shape=(rows,))
    )
    header, size = read_start(path, len(start.getvalue()))
    if header != start.getvalue() or size != len(header) + 8 * rows:
        raise Missing(f"eval/{name} is not there, or not {rows:,} rows; {RERUN}")
    logp = np.memmap(path, "<f8", "r", len(header), (rows,))
    # Written with `not`, this also refuses NaN.
    if not abs(float(np.mean(logp)) + loss) < 1e-6 * max(1.0, abs(loss)):
        raise Missing(f"eval/{name} is of another evaluation than eval/score.json; {RERUN}")
    return logp


def read_start(path: Path, count: int) -> tuple[bytes, int]:
    """Return the first bytes of a regular file and its size; (b"", 0) if it is none."""
    try:
        with open(
            path,
            "rb",
            opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)),
        ) as f:
            status = os.fstat(f.fileno())
            return (f.read(count), status.st_size) if stat.S_ISREG(status.st_mode) else (b"", 0)
    except (OSError, ValueError):
        return b"", 0


def map_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard; an empty array if it is none."""
    start, size = read_start(path, 12)
    count = (size - SHARD_HEADER_BYTES) // 2
    header = [int.from_bytes(start[i : i + 4], "little") for i in (0, 4, 8)]
    if (
        header != [SHARD_MAGIC, SHARD_VERSION, count]
        or count <= 0
        or size != SHARD_HEADER_BYTES + 2 * count
    ):
        return np.zeros(0, "<u2")
    return np.memmap(path, "<u2", "r", SHARD_HEADER_BYTES, (count,))


# ==== ONE RUN =====================================================================================
class ScoredSplit:
    """The split and the columns of a run, each read when first asked for; each may be Missing."""

    def __init__(self, run: RunFiles):
        self.run = run
        self.settings, self.hashes = dict_at(run.score, "settings"), dict_at(run.score, "sha256")

    @cached_property
    def rows(self) -> int:
        if self.run.score is None:
            raise no_score(self.run)
        rows = whole_number(self.run.score.get("tokens"))
        if not rows or rows >= MOST_SPLIT_TOKENS:
            raise Missing(
                f"eval/score.json states no tokens between 1 and {MOST_SPLIT_TOKENS:,}; {RERUN}"
            )
        return rows

    @cached_property
    def mixture(self) -> np.ndarray:
        """The final log-probability of each target, in nats [rows]."""
        return map_column(
            self.run.folder,
            "final_logp.npy",
            self.rows,
            finite_number(self.run.score.get("val_loss")),
        )

    @cached_property
    def neural(self) -> np.ndarray:
        """The column of the neural scorer, whichever way it scored."""
        ttt, mode = clean_text(self.settings.get("ttt")), clean_text(self.settings.get("eval_mode"))
        name = mode if ttt in ("", "none") else f"ttt_{ttt}"
        rungs = objects_in(self.run.score.get("ladder")) if self.rows else []
        if not re.fullmatch(r"[a-z_]{1,30}", name) or len(rungs) < 2:
            raise Missing(f"eval/score.json names no neural column; {RERUN}")
        return map_column(
            self.run.folder,
            f"columns/{name}/logp.npy",
            self.rows,
            finite_number(rungs[-2].get("loss")),
        )

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Log-probabilities in nats [rows] of the mixture and, if it is there, the neural
        scorer.
        """
        columns = {"mixture": self.mixture}
        with contextlib.suppress(Missing):
            columns["neural"] = self.neural
        return columns

    @cached_property
    def shards(self) -> list[Path]:
        """The split's files, by the names in the evaluation's settings."""
        names, folder = (clean_text(self.settings.get(k), 1000) for k in ("val_files", "data_path"))
        pattern = Path(names or f"{folder or 'data/embedded'}/*_val_*.bin")
        for base in dict.fromkeys([Path(), self.run.folder, ROOT]):
            try:
                matching = sorted(fnmatch.filter(os.listdir(base / pattern.parent), pattern.name))
            except (OSError, ValueError):
                continue
            matching = [name for name in matching if not re.search(r"_bytes_\d+\.bin$", name)]
            if matching:
                return [base / pattern.parent / name for name in matching[:10_000]]
        raise Missing(
            f"no shards match {clean_text(str(pattern), 200)} any more; put them back (make data), "
            "or score again with VAL_FILES"
        )

    @cached_property
    def tokens(self) -> np.ndarray:
        """The tokens that the evaluation saw: uint16 [rows + 1]."""
        parts, rows = [], self.rows
        for path in self.shards:
            parts.append(map_shard(path))
            if sum(map(len, parts)) > rows + 1:
                break
        tokens = np.concatenate(parts)
        if len(tokens) != rows + 1 or hashlib.sha256(tokens).hexdigest() != self.hashes.get("data"):
            raise Missing(
                f"the shards next to {clean_text(self.shards[0].name)} are not those that were "
                f"scored ({rows + 1:,} tokens, by hash); put them back (make data), or score again "
                "with VAL_FILES"
            )
        return tokens

    @cached_property
    def tokenizer(self) -> Any:
        """The SentencePiece model of this split, from the artifact or from next to the shards."""
        import sentencepiece

        wanted = self.hashes.get("tokenizer")
        for model in (self.embedded, self.next_to_shards):
            data = model()
            if data and hashlib.sha256(data).hexdigest() == wanted:
                try:
                    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
                except (RuntimeError, ValueError):
                    continue
                if int(self.tokens.max()) < processor.vocab_size():
                    return processor
        raise Missing(
            "no tokenizer with the evaluation's hash in the artifact, nor as tokenizer.model "
            "next to the shards; put it there"
        )

    def embedded(self) -> bytes:
        try:
            return brotli_content(read_artifact_file(self.run).tokenizer)
        except Missing:
            return b""

    def next_to_shards(self) -> bytes:
        path = self.shards[0].parent / "tokenizer.model"
        try:
            return (
                path.read_bytes()
                if path.is_file() and path.stat().st_size <= MOST_TOKENIZER
                else b""
            )
        except OSError:
            return b""


# ==== WHAT FIGURES MAKE OF THEM ===================================================================
class BinnedMeans(NamedTuple):
    """Means of bins; arrays [bins]."""

    x: np.ndarray  # where a bin lies
    mean: np.ndarray  # nats per token
    error: np.ndarray  # standard error of the mean, as if tokens were independent
    share: np.ndarray  # part of all tokens that is in the bin


def binned_means(
    source: ScoredSplit, x: np.ndarray, bins: Callable[[int, int], np.ndarray]
) -> dict[str, BinnedMeans]:
    """Return the means of each column. `x` is the place of each bin; `bins(start, stop)` gives the
    bins of rows.

    Rows are read in parts, in order, since a split may have 60 million of them.
    """
    totals = {name: np.zeros((3, len(x))) for name in source.columns}
    for start in range(0, source.rows, PART):
        stop = min(start + PART, source.rows)
        own = bins(start, stop)
        for name, logp in source.columns.items():
            loss = -logp[start:stop]
            for total, weights in zip(totals[name], (None, loss, np.square(loss)), strict=True):
                total += np.bincount(own, weights, len(x))
    columns = {}
    for name, (count, total, squares) in totals.items():
        filled = count > 0
        n, mean = count[filled], total[filled] / count[filled]
        error = np.sqrt(np.maximum(squares[filled] / n - mean**2, 0) / n)
        columns[name] = BinnedMeans(np.asarray(x, float)[filled], mean, error, n / source.rows)
    return columns


def by_split(source: ScoredSplit) -> dict[str, BinnedMeans]:
    """Return loss by place in the split, in percent."""
    count = int(np.clip(source.rows // 512, 2, 64))
    return binned_means(
        source,
        100 * (np.arange(count) + 0.5) / count,
        lambda start, stop: np.arange(start, stop) * count // source.rows,
    )


def by_document(source: ScoredSplit) -> dict[str, BinnedMeans]:
    """Return loss by the number of tokens of the document before a token; bins double every
    three.
    """
    edges = np.unique(
        np.round(2 ** (np.arange(3 * source.rows.bit_length() + 1) / 3)).astype(np.int64)
    )
    last = 0  # row at which the current document began

    def bins(start: int, stop: int) -> np.ndarray:
        nonlocal last
        at = np.arange(start, stop)
        began = np.maximum.accumulate(np.where(source.tokens[start:stop] == BOS_ID, at, last))
        last = int(began[-1])
        return np.searchsorted(edges, at - began + 1, side="right") - 1

    return binned_means(source, bin_middles(edges, source.rows), bins)


def by_rank(source: ScoredSplit) -> dict[str, BinnedMeans]:
    """Return loss by the target's rank in the split, most frequent first; each bin doubles."""
    targets = source.tokens[1:]
    counts = np.bincount(targets)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(1, len(counts) + 1)
    edges = 2 ** np.arange(0, len(counts).bit_length())
    bins = np.searchsorted(edges, rank, side="right") - 1
    return binned_means(
        source,
        bin_middles(edges, np.count_nonzero(counts)),
        lambda start, stop: bins[targets[start:stop]],
    )


def bin_middles(edges: np.ndarray, last: int) -> np.ndarray:
    """Return the geometric middle of each bin that begins at an edge; the last one ends at
    `last`.
    """
    ends = np.append(edges[1:] - 1, last).clip(max=last)
    return np.sqrt(edges * np.maximum(ends, edges))


class Passage(NamedTuple):
    """A window of the split with a high loss."""

    first: int  # row of the first token
    document: int  # counted from 1
    mean: float  # bits per token
    pieces: list[tuple[str, float]]  # text and its bits


def worst_passages(source: ScoredSplit, count: int) -> list[Passage]:
    """Return the windows with the highest mean, worst first, none overlapping another."""
    tokens, tokenizer = source.tokens, source.tokenizer
    length = min(PASSAGE, source.rows)
    starts = np.arange(0, source.rows - length + 1, PASSAGE_STRIDE)
    sums = np.concatenate([[0.0], np.cumsum(source.mixture)]) / -math.log(2)
    dear, passages = (sums[starts + length] - sums[starts]) / length, []
    for i in np.argsort(-dear, kind="stable")[: 40 * count]:
        first = int(starts[i])
        if len(passages) < count and all(abs(first - other.first) >= length for other in passages):
            bits = source.mixture[first : first + length] / -math.log(2)
            document = np.count_nonzero(tokens[: first + 2] == BOS_ID)
            pieces = token_texts(
                tokenizer, tokens[first + 1 : first + length + 1].tolist(), bits.tolist()
            )
            passages.append(Passage(first, document, float(dear[i]), pieces))
    return passages


def token_texts(tokenizer: Any, tokens: list[int], bits: list[float]) -> list[tuple[str, float]]:
    """Return (text, bits) of the tokens. Bytes that form one character become one text with their
    mean bits.
    """
    texts: list[tuple[str, float]] = []
    costs: list[float] = []
    raw = b""
    for token, cost in zip([*tokens, None], [*bits, 0.0], strict=True):
        if token is not None and tokenizer.is_byte(token):
            raw += bytes([int(tokenizer.id_to_piece(token)[3:5], 16)])
            costs.append(cost)
            continue
        if costs:
            texts.append((raw.decode("utf-8", "replace"), sum(costs) / len(costs)))
            raw, costs = b"", []
        if token is not None:
            control = tokenizer.is_control(token) or tokenizer.is_unknown(token)
            text = (
                "⟨new document⟩"
                if token == BOS_ID
                else "⟨?⟩"
                if control
                else tokenizer.id_to_piece(token).translate(MARKER_SIGNS)
            )
            texts.append((text[:64].replace("▁", " "), cost))
    return texts
