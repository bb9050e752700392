"""From a model and a split to a correction table, and back: the view that both sides take, building, reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fairway.correction.entries import Entries, View
from fairway.correction.table import (
    EMPTY_BYTES,
    Table,
    choose,
    entries_of,
    make_table,
    read_table,
    split_sha256,
    threshold_for,
)
from fairway.scoring.neural import Neural, in_float64
from fairway.scoring.settings import EvalConfig
from train_gpt import GPT, Runtime

TOKENS_A_BYTE = 25  # of a split, where no budget is given: the table of #108 had one byte for 22


def default_budget(rows: int) -> int:
    return EMPTY_BYTES + rows // TOKENS_A_BYTE


def viewer(model: GPT, rt: Runtime) -> Neural:
    """The scorer behind every view: whoever reads a table must hold what its maker held, whatever is set besides."""
    return Neural(model, EvalConfig(eval_mode="cached"), rt)


def views(
    neural: Neural, tokens: np.ndarray, wanted: np.ndarray | None
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """(rows, distributions [r, V]) of every batch, or of those that hold a wanted row. Batches are the whole split's in
    either case: a row that runs beside others may round otherwise, and the two sides must agree to the bit."""
    windows = neural.plan(tokens)
    held = np.ones(len(windows.first), bool)
    if wanted is not None:
        held[:] = False
        held[np.searchsorted(windows.first, wanted, side="right") - 1] = True
    for batch in neural.batches(windows):
        if held[batch[batch >= 0]].any():
            for rows, logits in neural.passes(tokens, windows, batch):
                yield rows, in_float64(logits).softmax(dim=1)


def model_view(
    neural: Neural, tokens: np.ndarray, threshold: float, told: Callable[[int], None] | None = None
) -> View:
    """What the model holds of each row: one pass for the tails, and another each time distributions are asked for."""
    rows, size = len(tokens) - 1, neural.model.cfg.vocab_size
    tail = np.empty(rows)
    for own, p in views(neural, tokens, None):
        tail[own] = torch.where(p < threshold, p, 0.0).sum(dim=1).cpu().numpy()
        if told:
            told(len(own))

    def distributions(positions: np.ndarray) -> np.ndarray:
        found = np.empty((len(positions), size))
        place = np.full(rows, -1)
        place[positions] = np.arange(len(positions))
        for own, p in views(neural, tokens, positions):
            here = place[own] >= 0
            if here.any():
                found[place[own][here]] = p[torch.from_numpy(here).to(p.device)].cpu().numpy()
        return found

    return View(rows, size, threshold, tail, distributions)


def build_table(
    neural: Neural,
    tokens: np.ndarray,
    logp: np.ndarray,
    codec: str,
    budget: int | None,
    artifact: bytes,
    told: Callable[[int], None] | None = None,
) -> tuple[Table, Entries]:
    """The table of a split: within the budget or, at None, of the entries that save more bits than they cost. `logp`
    are the neural model's log-probabilities, `artifact` the SHA-256 of its file."""
    view = model_view(neural, tokens, threshold_for(logp, budget), told)
    entries = choose(logp, tokens[1:], view, codec, budget)
    return make_table(entries, view, codec, split_sha256(tokens), artifact), entries


def stored_table(
    path: Path,
    neural: Neural,
    tokens: np.ndarray,
    artifact: bytes,
    told: Callable[[int], None] | None = None,
) -> tuple[Table, Entries]:
    """A table from its file, decoded under the model that it was made with."""
    table = read_table(
        path, len(tokens) - 1, neural.model.cfg.vocab_size, split_sha256(tokens), artifact
    )
    return table, entries_of(table, model_view(neural, tokens, table.threshold, told))
