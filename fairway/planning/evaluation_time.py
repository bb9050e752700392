"""Seconds that scoring a text takes, by mode, after training is over."""

from __future__ import annotations

import math
from typing import Any

from fairway.planning.machines import GpuHost
from fairway.planning.memory_need import pass_tokens
from fairway.planning.roofline import RATES, forward_seconds, graph_seconds
from fairway.planning.workload import FORWARD_TRAFFIC, layer_order

VAL_TOKENS = 62_021_632  # scored targets of the challenge's split with 1,024 pieces
STRIDE = 64  # EVAL_STRIDE's default
# A cached stream reads 128 tokens at a time (PIECE in fairway/scoring/neural.py), an eighth of the
# tokens twice (WARM), with kernels that are not fused: in a simulated pass those moved up to 133 GB
# where compiled ones moved 17.
CACHED_PIECE, CACHED_AGAIN, EAGER_TRAFFIC = 128, 9 / 8, 8.0
TTT_CHUNK = 16  # windows: the default of TTT_CHUNK, 32,768 tokens at the usual length
# Of a step of test-time training whose chunk is shared by eight GPUs: its operators are not
# compiled, and their launches take longer than their work. #549: 410 s less 98 s of sliding windows
# over 3 epochs of 1,893 chunks; #1413: 293 s less 84 s over 3 of 1,238. 55 and 56 ms a step.
TTT_STEP_SECONDS = 0.055
# n-gram, match and mixture on one thread: 103.5 s for 62 M tokens (bench/results/experts.txt).
EXPERT_SECONDS = 1.67e-6


def sliding_seconds(cfg: Any, machine: GpuHost, tokens: float) -> float:
    """Return seconds of windows every 64 tokens: each window is read whole, from the start."""
    again = max(1.0, cfg.train_seq_len / STRIDE)
    return forward_seconds(cfg, machine, tokens * again / machine.count)


def cached_seconds(cfg: Any, machine: GpuHost, tokens: float) -> float:
    """Return seconds of cached streams: every token is read about once, with a full window."""
    kv = 4.0 * cfg.num_kv_heads * (cfg.model_dim // cfg.num_heads)  # bf16 keys and values
    layers = len(layer_order(cfg, bool(cfg.num_loops)))
    shared = tokens * CACHED_AGAIN / machine.count
    compute = forward_seconds(cfg, machine, shared, context=2 * cfg.train_seq_len)
    traffic = graph_seconds(cfg, machine, shared, bool(cfg.num_loops))[2] * (EAGER_TRAFFIC - 1)
    reads = shared * layers * kv * cfg.train_seq_len / CACHED_PIECE
    return compute + FORWARD_TRAFFIC * traffic + reads / (machine.gpu.memory_bytes_s * RATES.memory)


def ttt_seconds(cfg: Any, machine: GpuHost, tokens: float) -> float:
    """Return seconds of sliding windows with one step on each chunk after it is scored."""
    chunk = TTT_CHUNK * cfg.train_seq_len
    work = sum(graph_seconds(cfg, machine, chunk / machine.count, bool(cfg.num_loops)))
    steps = math.ceil(tokens / chunk) * max(TTT_STEP_SECONDS, work)
    return sliding_seconds(cfg, machine, tokens) + steps


def block_seconds(cfg: Any, machine: GpuHost, tokens: float) -> float:
    """Return seconds of plain blocks: every token is read once, with half a window on average."""
    # A last batch is filled up.
    full = math.ceil(tokens / machine.count / pass_tokens(cfg)) * pass_tokens(cfg)
    return forward_seconds(cfg, machine, full)


def evaluation_seconds(cfg: Any, machine: GpuHost, tokens: float) -> dict[str, float]:
    """Return seconds by mode; experts and mixture run on the processor and come on top."""
    return {
        "plain blocks": block_seconds(cfg, machine, tokens),
        f"sliding windows, stride {STRIDE}": sliding_seconds(cfg, machine, tokens),
        "cached": cached_seconds(cfg, machine, tokens),
        "test-time training, chunks": ttt_seconds(cfg, machine, tokens),
        "experts and mixture, on top": tokens * EXPERT_SECONDS,
    }
