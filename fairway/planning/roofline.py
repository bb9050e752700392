"""The time of a training step: work over the rates that machines reach, part by part.

The rates are shares of the data sheet's peaks. Where no better source stands next to a constant,
`bench/planning.py` fitted it to half of the published step times in published.csv; the other half
checks it (docs/PLANNING.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fairway.planning.machines import GpuHost
from fairway.planning.workload import (
    FORWARD_ATTENTION,
    FORWARD_TRAFFIC,
    Parameters,
    count_parameters,
    work_of_pass,
)


class Rates(NamedTuple):
    """Shares of a GPU's peaks that kernels reach, and the processor's time for each tensor."""

    products: float
    fa2: float  # FlashAttention 2, which PyTorch ships
    fa3: float  # FlashAttention 3, for Hopper
    memory: float
    host_us: float  # for each tensor: launches of eager operators, and whatever else is left


GPTQ_SECONDS = 10.0  # of the clock, before the end: assumed; the trainer times it in warm-up
RATES = Rates(products=0.60, fa2=0.19, fa3=0.37, memory=0.82, host_us=67.0)
# FlashAttention 2 where it was written for, on A100: its paper shows about 120 of 312 TFLOP/s at
# 2,048 tokens and heads of 64 channels, forward and backward, causal. No published run checks it.
OTHER_ATTENTION = 0.38
# "varlen" is FlashAttention 3 within documents, as records from #1530 on have it and this trainer
# has not: of the pairs in windows of 2,048 tokens, 49.8 % are of one document in the first 451
# documents of the challenge's validation split (8,192 pieces, 735 tokens on average).
DOCUMENT_SHARE = 0.5
NEWTON_SCHULZ_SHARE = 0.25  # of peak: products of 512 x 512 leave most of an H100 idle
# Bytes for each parameter and step: sums of gradients, clipping, AdamW or momentum, the new value.
OPTIMISER_BYTES, AVERAGE_BYTES, ROUNDING_BYTES = 100.0, 12.0, 75.0
PARTS = ("products", "attention", "memory traffic", "optimiser", "collectives", "host", "rounding")


class StepTime(NamedTuple):
    """Seconds of one step by what takes them, in the order of PARTS."""

    products: float
    attention: float
    traffic: float
    optimiser: float
    collectives: float
    host: float
    rounding: float  # quantisation-aware training: the weights are rounded at each step

    @property
    def total(self) -> float:
        return sum(self)

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return PARTS[max(range(len(PARTS)), key=lambda i: self[i])]


def attention_of(machine: GpuHost) -> str:
    """Return the attention kernel that the trainer finds on a machine."""
    return "fa3" if machine.gpu.hopper else "fa2"


def graph_seconds(
    cfg: Any, machine: GpuHost, tokens: float, looping=False, rates=RATES, kernel=""
) -> tuple[float, float, float]:
    """Return seconds of products, attention and memory traffic of a pass over `tokens` a GPU."""
    gpu, work, kernel = machine.gpu, work_of_pass(cfg, looping), kernel or attention_of(machine)
    share = OTHER_ATTENTION if not gpu.hopper else rates.fa2 if kernel == "fa2" else rates.fa3
    seen = DOCUMENT_SHARE if kernel == "varlen" else 1.0
    return (
        tokens * work.product_flops / (gpu.peak_flops * rates.products),
        tokens * work.attention_flops * seen / (gpu.peak_flops * share),
        tokens * work.traffic_bytes / (gpu.memory_bytes_s * rates.memory),
    )


def forward_seconds(cfg: Any, machine: GpuHost, tokens: float, context: float = 0) -> float:
    """Return seconds of a forward pass over `tokens` a GPU, each with up to `context` before it."""
    products, attention, traffic = graph_seconds(cfg, machine, tokens, bool(cfg.num_loops))
    longer = (context or cfg.train_seq_len) / cfg.train_seq_len
    return products / 3 + attention * FORWARD_ATTENTION * longer + traffic * FORWARD_TRAFFIC


def orthogonal_flops(parameters: Parameters, steps: int, world: int) -> float:
    """Return FLOPs of Newton-Schulz on the rank with most matrices; each shape is shared."""
    flops = 0.0
    for shape in set(parameters.matrices):
        short, long = sorted(shape)
        count = -(-parameters.matrices.count(shape) // world)
        flops += count * steps * (4 * short * short * long + 2 * short**3)
    return flops


def step_time(
    cfg: Any, machine: GpuHost, looping=False, rounding=False, rates=RATES, kernel=""
) -> StepTime:
    """Return the time of one step of the whole batch."""
    gpu, world, held = machine.gpu, machine.count, count_parameters(cfg)
    tokens = cfg.train_batch_tokens / world
    memory = gpu.memory_bytes_s * rates.memory
    averages = AVERAGE_BYTES * bool(cfg.ema_decay)
    flops = orthogonal_flops(held, cfg.muon_backend_steps, world)
    # Gradients in fp32 and Muon's updates in bf16 go through an all-reduce each.
    shared = 4.0 * held.total + 2.0 * sum(r * c for r, c in held.matrices)
    return StepTime(
        *graph_seconds(cfg, machine, tokens, looping, rates, kernel),
        flops / (gpu.peak_flops * NEWTON_SCHULZ_SHARE)
        + held.total * (OPTIMISER_BYTES + averages) / memory,
        shared * 2 * (world - 1) / world / gpu.bus_bytes_s,
        held.tensors * rates.host_us * 1e-6,
        rounding * held.total * ROUNDING_BYTES / memory,
    )


class Stage(NamedTuple):
    """A part of the run whose steps take equal time."""

    name: str  # "plain", "looped", "plain, rounded", "looped, rounded"
    steps: float
    seconds: float
    step: StepTime


def stages(cfg: Any, machine: GpuHost, rates=RATES, kernel="") -> list[Stage]:
    """Return the stages of a run: without and with depth recurrence, without and with rounding.

    Each starts at a part of the run's progress, which is that of the clock or of ITERATIONS,
    whichever is further.
    """
    cap = cfg.max_wallclock_seconds - GPTQ_SECONDS * cfg.gptq
    cap = cap if cfg.max_wallclock_seconds else float("inf")
    switches = {cfg.loop_at_frac if cfg.num_loops else 1.0, cfg.qat_start_frac, 0.0, 1.0}
    edges = sorted(edge for edge in switches if edge <= 1)
    found, clock, done = [], 0.0, 0.0
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        looping = bool(cfg.num_loops) and start >= cfg.loop_at_frac
        rounding = cfg.qat_start_frac < 1 and start >= cfg.qat_start_frac
        time = step_time(cfg, machine, looping, rounding, rates, kernel)
        # Progress reaches `end` by the clock or by the count of steps, whichever comes first.
        steps = max(0.0, min((end * cap - clock) / time.total, end * cfg.iterations - done))
        clock, done = clock + steps * time.total, done + steps
        name = ("looped" if looping else "plain") + (", rounded" if rounding else "")
        found.append(Stage(name, steps, steps * time.total, time))
    return found


def mean_step_seconds(cfg: Any, machine: GpuHost, rates=RATES, kernel="") -> float:
    """Return the mean step time of a run: training time over steps, as logs print it."""
    parts = stages(cfg, machine, rates, kernel)
    return sum(s.seconds for s in parts) / sum(s.steps for s in parts)
