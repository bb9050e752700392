"""Fit rates and memory to the half of the published runs that is not held out.

Both minimise the squares of relative errors, pulled weakly towards a prior guess, because many
records share a shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fairway.planning.memory_need import Kept, kept_counts, other_bytes
from fairway.planning.published import PublishedRun
from fairway.planning.roofline import Rates, mean_step_seconds, stages

# Of an H100, 600 TFLOP/s in products, 350 in FlashAttention 3 with heads of 64 channels, and 2.8
# TB/s are what kernels of this size reach, so they are pulled hard. FlashAttention 2 in PyTorch of
# March 2026 and the processor's time are guesses: 300 TFLOP/s, eight launches of 5 us a tensor.
PRIOR = Rates(products=0.607, fa2=0.30, fa3=0.36, memory=0.836, host_us=40.0)
# Weight of each constant's relative distance from its prior, against the error of one run.
PRIOR_WEIGHTS = Rates(products=1.0, fa2=0.1, fa3=1.0, memory=1.0, host_us=0.1)
# A guess: what autograd must keep in bf16, and four copies of each parameter in fp32.
KEPT_PRIOR = Kept(stream=12.0, hidden=2.0, xsa=2.0, lanes=1.0, logit=1.5, ends=6.0, parameter=16.0)
KEPT_WEIGHTS = [0.03] * len(KEPT_PRIOR)


def pulled_factors(parts: Any, wanted: Any, weights: Iterable[float]) -> Any:
    """Return factors of the columns of `parts` whose rows then sum to `wanted`, pulled to 1."""
    import numpy as np

    pull = np.array([*weights])
    rows = np.concatenate([parts, np.diag(pull)])
    return np.linalg.lstsq(rows, np.concatenate([wanted, pull]), rcond=None)[0]


def part_seconds(run: PublishedRun, rates: Rates) -> dict[str, float]:
    """Return the mean seconds of a step by the rate that they depend on; "" for the rest."""
    parts = dict.fromkeys([*Rates._fields, ""], 0.0)
    run_stages = stages(run.cfg, run.machine, rates, run.attention)
    all_steps = sum(s.steps for s in run_stages)
    for stage in run_stages:
        weight, step = stage.steps / all_steps, stage.step
        for name, seconds in (
            ("products", step.products),
            ("fa2" if run.attention == "fa2" else "fa3", step.attention),
            ("memory", step.traffic),
            ("host_us", step.host),
            ("", step.optimiser + step.collectives + step.rounding),
        ):
            parts[name] += weight * seconds
    return parts


def fitted_rates(runs: Iterable[PublishedRun]) -> Rates:
    """Fit the rates to step times. Times are linear in 1/rate but for the length of stages."""
    import numpy as np

    def slowness(rates: Rates) -> np.ndarray:  # the host's is a time, the others are speeds
        return np.array([*(1 / np.array(rates[:-1])), rates.host_us])

    runs, rates = [run for run in runs if not run.held_out], PRIOR
    measured = np.array([run.step_ms / 1000 for run in runs])
    for _ in range(10):
        seconds = [part_seconds(run, rates) for run in runs]
        parts = np.array([[s[name] for name in Rates._fields] for s in seconds])
        rest = np.array([s[""] for s in seconds])
        at_prior = parts * slowness(PRIOR) / slowness(rates) / measured[:, None]
        slow = slowness(PRIOR) * pulled_factors(at_prior, 1 - rest / measured, PRIOR_WEIGHTS)
        rates = Rates(*(1 / slow[:-1]), slow[-1])
    return Rates(*map(float, rates))


def fitted_memory(runs: Iterable[PublishedRun]) -> Kept:
    """Fit what a pass keeps to peaks of memory."""
    import numpy as np

    runs = [run for run in runs if not run.held_out and run.peak_mib]
    peaks = np.array([run.peak_mib * 2.0**20 for run in runs])
    rest = np.array([other_bytes(run.cfg, run.machine.count) for run in runs])
    parts = np.array([kept_counts(run.cfg) for run in runs]) * np.array(KEPT_PRIOR)
    factors = pulled_factors(parts / peaks[:, None], 1 - rest / peaks, KEPT_WEIGHTS)
    return Kept(*map(float, factors * np.array(KEPT_PRIOR)))


def step_error(run: PublishedRun, rates: Rates) -> float:
    """Return the relative error of the predicted step time: 0.1 is 10 % too long."""
    return 1000 * mean_step_seconds(run.cfg, run.machine, rates, run.attention) / run.step_ms - 1
