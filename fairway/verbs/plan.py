"""Predict what a run takes before you rent a machine: time, memory, bytes, dollars.

SETTING=VALUE words override the preset, as environment variables do for train_gpt.py. The
prediction is a roofline checked against published runs (docs/PLANNING.md). --log sets what a
finished run measured next to it; a log of train_gpt.py brings its own settings.

Example:
    fairway plan --preset frontier --gpus 8xh100 VOCAB_SIZE=4096 MLP_MULT=3
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    parser.add_argument("--preset", metavar="P", help="default: consensus")
    parser.add_argument("--gpus", metavar="NxGPU", help="8xh100 (default), 1xh200, 4x4090, …")
    parser.add_argument("--dollars", type=float, metavar="D", help="price of the machine per hour")
    parser.add_argument(
        "--val-tokens", type=int, metavar="N", help="tokens to score; default: 62,021,632"
    )
    parser.add_argument("--log", type=Path, metavar="LOG", help="compare with this run's log")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(options: argparse.Namespace) -> int:
    from fairway.command_line import json_bytes
    from fairway.planning import front

    asked = front.Question(
        options.preset,
        options.settings,
        options.gpus,
        options.dollars,
        options.val_tokens,
        options.log,
    )
    answer = front.answer(asked)
    print(json_bytes(answer.data).decode().rstrip() if options.json else answer.text)
    return 0
