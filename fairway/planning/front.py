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


class Question(NamedTuple):
    """The options of the command; None stands for one that was not given."""

    preset: str | None = None
    words: Sequence[str] = ()  # NAME=value
    gpus: str | None = None
    dollars: float | None = None
    val_tokens: int | None = None
    log: Path | None = None


class Answer(NamedTuple):
    """One answer in both forms."""

    text: str
    data: dict[str, Any]


def answer(asked: Question) -> Answer:
    """Plan a run, and compare it with a log if one is named."""
    if asked.dollars is not None and not 0 <= asked.dollars < math.inf:
        raise UsageError(f"--dollars {asked.dollars}: give a price of zero or more")
    if asked.val_tokens is not None and asked.val_tokens < 1:
        raise UsageError(f"--val-tokens {asked.val_tokens}: give a whole number from 1 on")
    try:
        return planned(asked) if asked.log is None else compared(asked, asked.log)
    except OverflowError:  # a number left the range of floats
        message = "these settings are too large to plan; check ITERATIONS and the like"
        raise UsageError(message) from None


def planned(asked: Question) -> Answer:
    """Plan the run that the options describe."""
    machine = parse_machine(DEFAULT_GPUS if asked.gpus is None else asked.gpus)
    preset = asked.preset or DEFAULT_PRESET
    cfg = read_settings(preset, asked.words)
    plan = plan_run(preset, cfg, machine, asked.val_tokens or VAL_TOKENS, asked.dollars)
    return Answer(plan_text(plan), plan_data(plan))


def compared(asked: Question, path: Path) -> Answer:
    """Plan the run that a log describes, with what the options say instead, and compare."""
    run = read_measured(path)
    ran_on = logged_machine(run)
    machine = ran_on if asked.gpus is None else parse_machine(asked.gpus)
    machine = machine or parse_machine(DEFAULT_GPUS)
    same = machine == ran_on or (asked.gpus is not None and ran_on is None)
    own = [] if asked.preset else logged_words(run)
    preset = asked.preset or logged_preset(run) or DEFAULT_PRESET
    cfg = read_settings("baseline" if own else preset, [*own, *asked.words])
    name = f"settings of {path.name}" if own else preset
    plan = plan_run(name, cfg, machine, asked.val_tokens or VAL_TOKENS, asked.dollars)
    rows = compare(plan, run, same)
    data = plan_data(plan) | {"compared": [row._asdict() for row in rows]}
    return Answer(comparison_text(plan, run, rows), data)
