"""Weight-only rounding to tables of values: NF4, palettes, and palettes of mixed widths."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.methods.integers import by_groups, is_matrix, with_matrices
from fairway.methods.method import Calibration, Method
from fairway.methods.stored import Lookup
from train_gpt import GPT, entropy_bits

NORMAL_FLOAT_TAIL = 0.9677083  # the largest quantile of NF4 (QLoRA, arXiv 2305.14314)
KMEANS_ROUNDS = 60
WIDTHS = (2, 3, 4, 5, 6)  # of mixed palettes, in bits


# ==== NF4 =========================================================================================
def normal_float() -> Tensor:
    """Return NF4's 16 values: quantiles of the normal distribution, zero among them, in [-1, 1]."""
    negative = torch.linspace(1 - NORMAL_FLOAT_TAIL, 0.5, 8, dtype=torch.float64)
    positive = torch.linspace(0.5, NORMAL_FLOAT_TAIL, 9, dtype=torch.float64)[1:]
    values = torch.special.ndtri(torch.cat([negative, positive]))
    return (values / values.max()).half()


def nearest_index(values: Tensor, table: Tensor) -> Tensor:
    """Return the index of the entry of an ascending table that is nearest to each value."""
    table = table.float()
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.uint8)


@dataclass(frozen=True)
class NormalFloat(Method):
    """NF4 of QLoRA: each matrix as indices into one table of 16 values, the quantiles of a normal
    distribution, times the absolute maximum of each `group` columns of a row; vectors as float16.
    The table is finer near zero, where most weights are, than the steps of int4.
    """

    group_columns: int
    group = "weight-only"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return with_matrices(model, lambda _, w: self.stored(w))

    def stored(self, weight: Tensor) -> Lookup:
        table, parts = normal_float(), by_groups(weight, self.group_columns)
        scales = parts.abs().amax(dim=1, keepdim=True).bfloat16().float()
        scales = scales.masked_fill(scales == 0, 1.0)
        indices = nearest_index(parts / scales, table).view(len(weight), -1)
        return Lookup(indices[:, : weight.size(1)], table[None], scales.view(len(weight), -1))


# ==== PALETTES ====================================================================================
def kmeans_centres(values: Tensor, count: int) -> Tensor:
    """Return `count` ascending centres for each row of values, [rows, count], in float64.

    Lloyd's rounds start at equal quantiles, so that the result is the same every time. Rows are
    sorted once; sums between two borders are then differences of running sums.
    """
    ordered = values.double().sort(dim=1).values
    rows, n = ordered.shape
    running = F.pad(ordered.cumsum(dim=1), (1, 0))
    middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count * n
    centres = ordered[:, middle.long()].contiguous()
    first, last = torch.zeros(rows, 1, dtype=torch.long), torch.full((rows, 1), n)
    borders = first
    for _ in range(KMEANS_ROUNDS):
        before, inner = borders, torch.searchsorted(ordered, (centres[:, 1:] + centres[:, :-1]) / 2)
        borders = torch.cat([first, inner, last], dim=1)
        if torch.equal(before, borders):
            break
        sizes, sums = borders.diff(dim=1), running.gather(1, borders).diff(dim=1)
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return centres


def palette(weight: Tensor, bits: int, band_rows: int) -> Lookup:
    """Return indices into a table of 2^bits values for each band of at most `band_rows` rows."""
    rows, columns = weight.shape
    bands = -(-rows // band_rows)
    each = -(-rows // bands)
    bands = -(-rows // each)
    full = weight[torch.arange(bands * each).clamp(max=rows - 1)]  # the last row fills its band
    values = full.reshape(bands, each * columns).float()
    tables = kmeans_centres(values, 2**bits).half()
    middles = (tables[:, 1:].float() + tables[:, :-1].float()) / 2
    indices = torch.searchsorted(middles, values).to(torch.uint8)
    return Lookup(indices.view(-1, columns)[:rows].contiguous(), tables)


@dataclass(frozen=True)
class Palette(Method):
    """Each matrix as indices of `bits` bits into a table for each band of `band_rows` rows; vectors
    as float16. The tables are the centres that k-means finds for the weights of the band, from a
    start at equal quantiles. A table adapts to any distribution, and costs two bytes a value.
    """

    bits: int
    band_rows: int = 32
    group = "weight-only"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return with_matrices(model, lambda _, w: palette(w, self.bits, self.band_rows))


# ==== MIXED WIDTHS ================================================================================
@dataclass(frozen=True)
class MixedPalettes(Method):
    """Palettes whose width, 2 to 6 bits, is chosen for each matrix. The loss on calibration text is
    measured with one matrix rounded at a time, at every width. From 2 bits for all, the widening
    that saves most loss a byte is taken, until the palettes have `bits` bits a weight on average.
    """

    bits: float
    band_rows: int = 32
    calibration_rows: int = 8
    group = "weight-only"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        matrices = {n: p.detach() for n, p in model.named_parameters() if is_matrix(n, model)}
        options = {
            name: [palette(w, bits, self.band_rows) for bits in WIDTHS]
            for name, w in matrices.items()
        }
        losses = losses_alone(model, options, calibration.training(self.calibration_rows))
        sizes = {name: [palette_bytes(o) for o in own] for name, own in options.items()}
        budget = self.bits / 8 * sum(w.numel() for w in matrices.values())
        chosen = widths_in_budget(losses, sizes, budget)
        return with_matrices(model, lambda name, _: options[name][chosen[name]])


def palette_bytes(stored: Lookup) -> float:
    """Return the bytes of a palette: entropy of its indices, and its tables."""
    return entropy_bits(stored.indices) / 8 + 2 * stored.tables.numel()


@torch.no_grad()
def losses_alone(
    model: GPT, options: Mapping[str, list[Lookup]], tokens: Tensor
) -> dict[str, list[float]]:
    """Return the loss with each matrix replaced by each of its options, all others as they were."""
    trial, losses = copy.deepcopy(model), {}
    parameters = dict(trial.named_parameters())
    for name, stored in options.items():
        p, losses[name] = parameters[name], []
        before = p.clone()
        for option in stored:
            p.copy_(option.weight())
            losses[name].append(trial(tokens[:, :-1], tokens[:, 1:]).mean().item())
        p.copy_(before)
    return losses


def widths_in_budget(
    losses: Mapping[str, list[float]], sizes: Mapping[str, list[float]], budget: float
) -> dict[str, int]:
    """Return the index of the option for each name, with a sum of sizes within the budget.

    Start with the first options; widen, in any number of options at once, what saves most loss a
    byte and fits.
    """
    chosen = dict.fromkeys(losses, 0)
    spent = sum(own[0] for own in sizes.values())
    while True:
        moves = []
        for name, at in chosen.items():
            for to in range(at + 1, len(sizes[name])):
                saved = losses[name][at] - losses[name][to]
                cost = sizes[name][to] - sizes[name][at]
                if saved > 0 and spent + cost <= budget:
                    moves.append((saved / max(cost, 1e-9), name, to, cost))
        if not moves:
            return chosen
        _, name, to, cost = max(moves)
        chosen[name], spent = to, spent + cost
