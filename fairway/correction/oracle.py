"""Build a correction table from a model and a split, and read it back under the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fairway.correction.entries import Entries, ModelView
from fairway.correction.table import (
    EMPTY_BYTES,
    Table,
    choose_entries,
    make_table,
    read_table,
    split_sha256,
    table_entries,
    threshold_for,
)
from fairway.scoring.neural import Neural, in_float64
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime

TOKENS_A_BYTE = 25  # of a split, for the default budget; the table of #108 had a byte for each 22


def default_budget(rows: int) -> int:
    """Return the bytes of a table for `rows` rows if the user names none."""
    return EMPTY_BYTES + rows // TOKENS_A_BYTE


def view_scorer(model: GPT, rt: Runtime) -> Neural:
    """Return the scorer behind every view.

    Its settings are fixed: a reader must compute the very numbers that the writer computed.
    """
    return Neural(model, EvalConfig(eval_mode="cached"), rt)


def batch_distributions(
    neural: Neural, tokens: np.ndarray, wanted: np.ndarray | None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield rows int64[r] and distributions [r, V] of all batches, or of those with a wanted row.

    The batches are those of the whole split in both cases. A row in another batch may round
    differently, and writer and reader must agree to the last bit.
    """
    windows = neural.plan(tokens)
    selected = np.ones(len(windows.first), bool)
    if wanted is not None:
        selected[:] = False
        selected[np.searchsorted(windows.first, wanted, side="right") - 1] = True
    for batch in neural.batches(windows):
        if selected[batch[batch >= 0]].any():
            for rows, logits in neural.passes(tokens, windows, batch):
                yield rows, in_float64(logits).softmax(dim=1)


def model_view(
    neural: Neural,
    tokens: np.ndarray,
    threshold: float,
    on_progress: Callable[[int], object] | None = None,
) -> ModelView:
    """Return the model's view of a split.

    This takes one pass for the tails, and one more each time that distributions are asked for.
    """
    rows, vocab_size = len(tokens) - 1, neural.model.cfg.vocab_size
    tail = np.empty(rows)
    for batch_rows, p in batch_distributions(neural, tokens, None):
        tail[batch_rows] = torch.where(p < threshold, p, 0.0).sum(dim=1).cpu().numpy()
        if on_progress:
            on_progress(len(batch_rows))

    def distributions(positions: np.ndarray) -> np.ndarray:
        out = np.empty((len(positions), vocab_size))
        index = np.full(rows, -1)
        index[positions] = np.arange(len(positions))
        for batch_rows, p in batch_distributions(neural, tokens, positions):
            wanted = index[batch_rows] >= 0
            if wanted.any():
                mask = torch.from_numpy(wanted).to(p.device)
                out[index[batch_rows][wanted]] = p[mask].cpu().numpy()
        return out

    return ModelView(rows, vocab_size, threshold, tail, distributions)


def build_table(
    neural: Neural,
    tokens: np.ndarray,
    logp: np.ndarray,
    codec: str,
    budget: int | None,
    artifact: bytes,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[Table, Entries]:
    """Return a split's table of at most `budget` bytes, and its entries.

    With a budget of None, only entries count that save more bits than they cost. `logp` are the
    neural model's log-probabilities, `artifact` is the SHA-256 of its file.
    """
    view = model_view(neural, tokens, threshold_for(logp, budget), on_progress)
    entries = choose_entries(logp, tokens[1:], view, codec, budget)
    return make_table(entries, view, codec, split_sha256(tokens), artifact), entries


def load_table(
    path: Path,
    neural: Neural,
    tokens: np.ndarray,
    artifact: bytes,
    on_progress: Callable[[int], object] | None = None,
) -> tuple[Table, Entries]:
    """Return a table from its file, and its entries, decoded under the model that wrote it."""
    vocab_size, split = neural.model.cfg.vocab_size, split_sha256(tokens)
    table = read_table(path, len(tokens) - 1, vocab_size, split, artifact)
    view = model_view(neural, tokens, table.threshold, on_progress)
    return table, table_entries(table, view)
