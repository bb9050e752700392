"""The GPUs that a run may be planned for, with what their makers state, and prices.

Peaks are dense bf16 matrix products without sparsity, from the data sheets. Prices are dollars for
one GPU for one hour: $2.50 is the $20 for 8xH100 that the challenge's people pay; the others are
assumed. `--dollars` replaces them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from fairway.command_line import UsageError, did_you_mean

WORLDS = (1, 2, 4, 8)  # the trainer's: a batch has eight parts


class Gpu(NamedTuple):
    """The limits of one GPU."""

    name: str
    peak_flops: float  # bf16 products, FLOP/s
    memory_bytes_s: float
    memory_bytes: float
    bus_bytes_s: float  # to the other GPUs, in all-reduces, as NCCL's tests count "bus bandwidth"
    hopper: bool  # has FlashAttention 3
    dollars_hour: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989e12, 3.35e12, 80e9, 360e9, True, 2.50),
        Gpu("h200", 989e12, 4.80e12, 141e9, 360e9, True, 3.20),
        Gpu("a100", 312e12, 2.04e12, 80e9, 230e9, False, 1.50),
        Gpu("4090", 165e12, 1.01e12, 24e9, 20e9, False, 0.50),
        Gpu("5090", 209e12, 1.79e12, 32e9, 40e9, False, 0.80),
    )
}


class GpuHost(NamedTuple):
    """Some equal GPUs in one host."""

    gpu: Gpu
    count: int

    @property
    def name(self) -> str:
        return f"{self.count}x{self.gpu.name}"


def parse_machine(text: str) -> GpuHost:
    """`parse_machine("8xH100")` is eight H100; `h100` alone is one."""
    match = re.fullmatch(r"(?:(\d{1,3})x)?(\w+)", text.strip().lower())
    count, name = (int(match[1] or 1), match[2]) if match else (0, text)
    if name not in GPUS:
        hint = did_you_mean(name, list(GPUS))
        raise UsageError(f"--gpus {text}: known are {', '.join(GPUS)}, as in 8xh100{hint}")
    if count not in WORLDS:
        raise UsageError(f"--gpus {text}: a batch has eight parts, so 1, 2, 4 or 8 GPUs share it")
    return GpuHost(GPUS[name], count)
