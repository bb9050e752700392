"""Compare `fairway plan` with published step times, memory and evaluation times.

    python bench/planning.py

It prints every published run of fairway/planning/published.csv, fitted half first, the errors of
each half, and the rates that the fitted half gives. The last line is JSON.
"""

from __future__ import annotations

import json
import statistics

from fairway.planning.evaluation_time import sliding_seconds
from fairway.planning.fitting import fitted_memory, fitted_rates, step_error
from fairway.planning.memory_need import KEPT, training_bytes
from fairway.planning.published import FITTED_MACHINE, PublishedRun, published_runs
from fairway.planning.roofline import RATES, mean_step_seconds

NAME_WIDTH = 38  # of a folder without its date


def shape_of(run: PublishedRun) -> tuple:
    """Return what decides a predicted step time."""
    return run.cfg, run.attention, run.machine


def step_table(title: str, runs: list[PublishedRun], seen: set[tuple]) -> list[float]:
    """Print measured and predicted step times; return the relative errors.

    `seen` holds the shapes of the fitted half.
    """
    print(f"\n{title}")
    print(f"{'PR':>6}  {'folder':{NAME_WIDTH}} kernel  tokens/step  published  predicted  error")
    errors = []
    for run in runs:
        error = step_error(run, RATES)
        predicted = 1000 * mean_step_seconds(run.cfg, run.machine, RATES, run.attention)
        name = run.folder.partition("_")[2][:NAME_WIDTH]
        if run.machine.name != FITTED_MACHINE:
            name = f"{run.machine.name}: {name}"[:NAME_WIDTH]
        print(
            f"{f'#{run.pull_request}' if run.pull_request else 'start':>6}  {name:{NAME_WIDTH}} "
            f"{run.attention:6} {run.cfg.train_batch_tokens:12,} {run.step_ms:10.2f} "
            f"{predicted:10.2f} {100 * error:+5.1f}%"
        )
        errors.append(error)
    print_errors("all rows", errors)
    # Late records share a shape, and would outvote the others.
    shapes = {shape_of(run): e for run, e in zip(runs, errors, strict=True)}
    print_errors("one row for each shape", list(shapes.values()))
    if seen and (new := [e for shape, e in shapes.items() if shape not in seen]):
        print_errors("of these, shapes that no fitted row has", new)
    return errors


def print_errors(what: str, errors: list[float]) -> None:
    sizes = [abs(e) for e in errors]
    print(
        f"  {what}: {len(sizes)}, median error {100 * statistics.median(sizes):.1f} %, "
        f"worst {100 * max(sizes):.1f} %"
    )


def other_checks(runs: list[PublishedRun]) -> dict[str, list[float]]:
    """Print how far memory and evaluation times are off; return measured / predicted."""
    memory = [
        run.peak_mib * 2**20 / training_bytes(run.cfg, run.machine.count)
        for run in runs
        if run.peak_mib
    ]
    scored = [r for r in runs if r.sliding_seconds and r.attention != "fa2"]  # earlier: eager
    sliding = [r.sliding_seconds / sliding_seconds(r.cfg, r.machine, r.val_tokens) for r in scored]
    for name, ratios in (("peak of memory", memory), ("sliding windows, compiled", sliding)):
        print(
            f"{name}, published / predicted: median {statistics.median(ratios):.2f}, from "
            f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} runs"
        )
    return {"memory": memory, "sliding": sliding}


def main() -> None:
    """Print the tables, the fit, and one line of JSON."""
    runs = published_runs()
    ours = [run for run in runs if run.machine.name == FITTED_MACHINE]
    groups = {
        "fitted half, 8xh100": [run for run in ours if not run.held_out],
        "held-out half, 8xh100": [run for run in ours if run.held_out],
        "other machines, never fitted": [run for run in runs if run not in ours],
    }
    print("ms a step: training time over steps of each log, next to the prediction")
    errors, seen = {}, set()
    for title, rows in groups.items():
        errors[title] = step_table(title, rows, seen)
        seen = seen or {shape_of(run) for run in rows}
    print()
    ratios = other_checks(runs)
    fits = {"rates": (RATES, fitted_rates(runs)), "memory": (KEPT, fitted_memory(runs))}
    for used, fitted in fits.values():
        print(f"\nin use      {used}\nfitted now  {type(fitted)(*(round(v, 3) for v in fitted))}")
    data = {"errors": errors, "ratios": ratios, **{name: fit[1] for name, fit in fits.items()}}
    print(json.dumps({"bench": "planning", **data}))


if __name__ == "__main__":
    main()
