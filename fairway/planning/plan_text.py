"""A plan as text for a terminal of 100 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from fairway.planning.planned_run import EXPORT_SECONDS, START_UP_SECONDS, RunPlan
from fairway.planning.roofline import PARTS
from fairway.planning.workload import layer_order

BAR = 40  # characters for a whole step
LINE = 88  # characters right of a title
EVALUATION_LIMIT = 600.0  # seconds, on 8xH100


def rounded(value: float) -> str:
    """Return a number with three or four digits: `0.93`, `26.8`, `1,234`."""
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def section(title: str, lines: Iterator[str]) -> Iterator[str]:
    """Yield lines with a title left of the first one."""
    for i, line in enumerate(lines):
        yield f"{title if i == 0 else '':12}{line}".rstrip()


def model_lines(plan: RunPlan) -> Iterator[str]:
    cfg, held, work = plan.cfg, plan.parameters, plan.work
    passes = len(layer_order(cfg, bool(cfg.num_loops)))
    looped = f", {passes} passes when looped" if passes > cfg.num_layers else ""
    yield from textwrap.wrap(
        f"{held.total:,} parameters; {cfg.num_layers} layers{looped}, width {cfg.model_dim}, "
        f"vocabulary {cfg.vocab_size:,}",
        LINE,
    )
    yield (
        f"a token of training: {rounded(work.product_flops / 1e6)} MFLOPs of products, "
        f"{rounded(work.attention_flops / 1e6)} of attention, "
        f"{rounded(work.traffic_bytes / 1e3)} kB of traffic"
    )


def step_lines(plan: RunPlan) -> Iterator[str]:
    """Yield the parts of the last stage's step: the most expensive one."""
    stage = plan.stages[-1]
    batch, total = plan.cfg.train_batch_tokens, stage.step.total
    yield (
        f"{rounded(1000 * total)} ms for {batch:,} tokens ({stage.name}), "
        f"bound by {stage.step.bound}"
    )
    names = list(PARTS)
    names[1] = f"attention, {plan.attention}"
    for name, seconds in zip(names, stage.step, strict=True):
        if seconds:
            share = seconds / total
            bar = "#" * round(BAR * share)
            yield f"  {name:16}{rounded(1000 * seconds):>8} ms {100 * share:4.0f} %  {bar}"


def run_lines(plan: RunPlan) -> Iterator[str]:
    for stage in plan.stages if len(plan.stages) > 1 else ():
        ms = rounded(1000 * stage.step.total)
        yield f"{stage.name:18}{stage.steps:8,.0f} steps of {ms} ms, {stage.seconds:,.0f} s"
    tokens = plan.steps * plan.cfg.train_batch_tokens / 1e9
    ms = rounded(1000 * plan.step_seconds)
    yield f"{plan.steps:,.0f} steps, {ms} ms on average, MFU {100 * plan.mfu:.0f} %"
    yield f"{rounded(tokens)} G tokens in {plan.train_seconds:,.0f} s"


def memory_lines(plan: RunPlan) -> Iterator[str]:
    room = plan.machine.gpu.memory_bytes
    needs = ", ".join(
        f"{rounded(need / 1e9)} GB on {'1 GPU' if world == 1 else f'each of {world}'}"
        for world, need in plan.memory_bytes.items()
    )
    too_much = max(plan.memory_bytes.values()) > 0.95 * room
    yield f"{needs}, at the peak of training"
    if too_much:
        yield f"too much for {room / 1e9:.0f} GB: MICRO_BATCH_TOKENS takes a pass in smaller parts"
    else:
        yield f"of {room / 1e9:.0f} GB on each"


def size_lines(plan: RunPlan) -> Iterator[str]:
    size, cfg = plan.size, plan.cfg
    yield (
        f"{size.total_bytes:,} bytes of {size.budget_bytes:,}: model {size.model_bytes:,}, "
        f"tokenizer {size.tokenizer_bytes:,}, code {size.code_bytes:,}"
    )
    if not size.fits:
        yield f"does not fit even with k = {size.k:.0f}: lower NUM_LAYERS, MODEL_DIM or MLP_MULT"
        return
    levels = 2 ** (cfg.mlp_bits - 1) - 1
    yield (
        f"k = {size.k:.2f}, {size.weight_bits:.2f} bits a weight, relative error "
        f"k/{levels * 12**0.5:.0f} = {size.error:.3f} in MLPs"
    )


def evaluation_lines(plan: RunPlan) -> Iterator[str]:
    yield f"of {plan.val_tokens:,} tokens"
    for mode, seconds in plan.evaluation.items():
        over = "  over 600 s" if seconds > EVALUATION_LIMIT else ""
        yield f"  {mode:32}{rounded(seconds):>8} s{over}"


def dollar_lines(plan: RunPlan) -> Iterator[str]:
    training, whole = plan.dollars(plan.train_seconds), plan.dollars(plan.run_seconds)
    yield (
        f"${training:.2f} for training at ${plan.dollars_hour:.2f} an hour; ${whole:.2f} with "
        f"{START_UP_SECONDS + EXPORT_SECONDS:.0f} s of start-up"
    )
    yield f"and export, sliding windows and experts; ${3 * whole:.2f} for three seeds"


def plan_text(plan: RunPlan) -> str:
    """Return the plan, a section for each question."""
    parts = (
        ("model", model_lines(plan)),
        ("step", step_lines(plan)),
        ("run", run_lines(plan)),
        ("memory", memory_lines(plan)),
        ("artifact", size_lines(plan)),
        ("evaluation", evaluation_lines(plan)),
        ("dollars", dollar_lines(plan)),
    )
    lines = [f"{plan.preset} on {plan.machine.name}, predicted (docs/PLANNING.md says how well)"]
    for title, body in parts:
        lines += ["", *section(title, body)]
    return "\n".join(lines)
