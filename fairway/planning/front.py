"""The answer of `fairway plan`: a plan, or a plan next to what a log measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fairway.command_line import UsageError
from fairway.planning.evaluation_time import VAL_TOKENS
from fairway.planning.log_comparison import (
    compare,
    comparison_text,
    logged_machine,
    logged_preset,
    logged_words,
    read_measured,
)
from fairway.planning.machines import parse_machine
from fairway.planning.plan_text import plan_text
from fairway.planning.planned_run import plan_data, plan_run
from fairway.planning.trainer_settings import DEFAULT_PRESET, read_settings

DEFAULT_GPUS = "8xh100"


class Answer(NamedTuple):
    """One answer in both forms."""

    text: str
    data: dict[str, Any]


def answer(
    preset: str | None,
    words: Sequence[str],
    gpus: str | None,
    dollars: float | None,
    val_tokens: int | None,
    log: Path | None,
) -> Answer:
    """Plan a run with these options; None stands for an option that was not given."""
    try:
        return finite_answer(preset, words, gpus, dollars, val_tokens, log)
    except OverflowError:
        raise UsageError(
            "these settings are too large to plan; check ITERATIONS and the like"
        ) from None


def finite_answer(
    preset: str | None,
    words: Sequence[str],
    gpus: str | None,
    dollars: float | None,
    val_tokens: int | None,
    log: Path | None,
) -> Answer:
    """Plan a run, or raise OverflowError where a number leaves the range of floats."""
    if dollars is not None and not 0 <= dollars < math.inf:
        raise UsageError(f"--dollars {dollars}: give a price of zero or more")
    if val_tokens is not None and val_tokens < 1:
        raise UsageError(f"--val-tokens {val_tokens}: give a whole number from 1 on")
    tokens = val_tokens or VAL_TOKENS
    if log is None:
        machine = parse_machine(DEFAULT_GPUS if gpus is None else gpus)
        cfg = read_settings(preset or DEFAULT_PRESET, words)
        plan = plan_run(preset or DEFAULT_PRESET, cfg, machine, tokens, dollars)
        return Answer(plan_text(plan), plan_data(plan))
    run = read_measured(log)
    ran_on = logged_machine(run)
    machine = ran_on if gpus is None else parse_machine(gpus)
    machine = machine or parse_machine(DEFAULT_GPUS)
    own = [] if preset else logged_words(run)
    start = preset or logged_preset(run) or DEFAULT_PRESET
    cfg = read_settings("baseline" if own else start, [*own, *words])
    name = f"settings of {log.name}" if own else start
    plan = plan_run(name, cfg, machine, tokens, dollars)
    rows = compare(
        plan, run, same_machine=machine == ran_on or (gpus is not None and ran_on is None)
    )
    data = plan_data(plan) | {"compared": [row._asdict() for row in rows]}
    return Answer(comparison_text(plan, run, rows), data)
