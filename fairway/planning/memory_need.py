"""GPU memory at the peak of a training step."""

from __future__ import annotations

from typing import Any, NamedTuple

from fairway.planning.workload import count_parameters, lane_layers, layer_order


class Kept(NamedTuple):
    """Elements of 2 bytes that the forward half keeps for each token, and bytes of parameters."""

    stream: float  # for each layer and channel
    hidden: float  # for each layer and hidden channel of the MLP
    xsa: float  # for each such layer and channel
    lanes: float  # for each layer of two lanes and channel
    logit: float  # for each piece of the vocabulary
    ends: float  # for each channel, once: embedding and last norm
    parameter: float  # bytes for each parameter: weights, gradients, momentum


# Fitted by bench/planning.py to the peaks of memory that the fitted half of the logs prints.
KEPT = Kept(stream=12.8, hidden=1.7, xsa=2.3, lanes=0.8, logit=1.9, ends=5.9, parameter=15.2)
AVERAGE_BYTES = 4.0  # for each parameter: EMA or SWA in fp32
NEWTON_SCHULZ_BYTES = 8.0  # for each weight that this rank orthogonalises at once


def pass_tokens(cfg: Any) -> int:
    """Return the tokens of one pass on one GPU: an eighth of the batch, or MICRO_BATCH_TOKENS."""
    eighth, length = cfg.train_batch_tokens // 8, cfg.train_seq_len
    return min(eighth, max(1, (cfg.micro_batch_tokens or eighth) // length) * length)


def kept_counts(cfg: Any) -> Kept:
    """Return what each number of KEPT is multiplied with, in bytes or parameters."""
    D, order, held = cfg.model_dim, layer_order(cfg, bool(cfg.num_loops)), count_parameters(cfg)
    exclusive = sum(i >= cfg.num_layers - cfg.xsa_last_n for i in order)
    two_lanes = sum(i in lane_layers(cfg) for i in order)
    hidden = len(order) * int(cfg.mlp_mult * D)
    elements = (len(order) * D, hidden, exclusive * D, two_lanes * D, cfg.vocab_size, D)
    return Kept(*(2.0 * pass_tokens(cfg) * count for count in elements), held.total)


def other_bytes(cfg: Any, world: int) -> float:
    """Return bytes of averages of weights and of Muon's work on one of `world` GPUs."""
    held, averages = count_parameters(cfg), bool(cfg.ema_decay) + (cfg.swa_start_frac < 1)
    weights = sum(rows * columns for rows, columns in held.matrices)
    return held.total * averages * AVERAGE_BYTES + weights * NEWTON_SCHULZ_BYTES / world


def training_bytes(cfg: Any, world: int) -> float:
    """Return the bytes that training allocates on one of `world` GPUs, looped if the run loops."""
    parts = zip(KEPT, kept_counts(cfg), strict=True)
    return sum(kept * count for kept, count in parts) + other_bytes(cfg, world)
