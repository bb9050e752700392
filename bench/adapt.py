"""Measure the gain of test-time training: each form against the same windows with fixed weights.

    python bench/adapt.py [--artifact final_model.int6.ptz] [--val GLOB] [--tokens 50000]

Without an artifact, PRESET=cpu is trained for a minute. The first tokens of the shards are scored
(unset: the embedded validation text). `chunks` and `bias` are compared with sliding windows, `lora`
and `phases` with windows that do not cross documents. Settings of an evaluation (TTT_LR,
EVAL_STRIDE, ...) may be given in the environment. The last line is JSON.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, run_reporting
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.neural import make_neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import GPT, Artifact, Runtime, best_device, build_model

ROOT = Path(__file__).resolve().parent.parent
# TTT, and whether windows start at each document. "none" comes before what is compared with it.
FORMS = (
    ("none", False),
    ("chunks", False),
    ("bias", False),
    ("none", True),
    ("lora", True),
    ("phases", True),
)


def artifact_at(path: str) -> Artifact:
    """Read an artifact, or train one for a minute if no path is given."""
    if path:
        return read_artifact(path)
    with tempfile.TemporaryDirectory() as folder:
        print("no --artifact: training PRESET=cpu for a minute", flush=True)
        settings = dict(PRESET="cpu", OUT_DIR=folder, MAX_WALLCLOCK_SECONDS="60", RUN_ID="bench")
        subprocess.run(
            [sys.executable, ROOT / "train_gpt.py"],
            env=os.environ | settings,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return read_artifact(Path(folder) / "final_model.int6.ptz")


def bits_and_seconds(
    model: GPT, cfg: EvalConfig, tokens: np.ndarray, rt: Runtime
) -> tuple[float, float]:
    """Score a text: return its bits, and the seconds that this took."""
    columns = columns_in_memory(len(tokens) - 1, {"logp": "f8"})
    scorer, began = make_neural(model, cfg, rt), time.perf_counter()
    scorer.fill(tokens, columns)
    assert columns.complete(), "every row is scored once"
    return -math.fsum(columns["logp"]) / math.log(2), time.perf_counter() - began


def main() -> int:
    """Print one line for each form, then all of them as JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--artifact", default="", help="unset: PRESET=cpu, trained for a minute")
    parser.add_argument(
        "--val", default=str(ROOT / "data/embedded/*_val_*.bin"), help="pattern of the shards"
    )
    parser.add_argument("--tokens", type=int, default=50_000, help="number of tokens to score")
    options = parser.parse_args()
    cfg = replace(EvalConfig.from_env(os.environ), val_files=options.val)
    artifact, device = artifact_at(options.artifact), torch.device(cfg.device or best_device())
    model, rt = build_model(artifact, device), Runtime(0, 1, device, device.type)
    text = load_text(cfg, artifact)
    tokens = text.tokens[: options.tokens]
    size = int(text.sizes[: len(tokens) - 1].sum())
    rows, baselines = [], {}
    for ttt, documents in FORMS:
        settings = replace(cfg, ttt=ttt, eval_documents=documents)
        bits, seconds = bits_and_seconds(model, settings, tokens, rt)
        bpb = bits / size
        base_bpb, base_seconds = baselines.setdefault(documents, (bpb, seconds))
        print(
            f"{'frozen' if ttt == 'none' else ttt:7} "
            f"{'documents apart' if documents else 'sliding windows':18} {bpb:10.6f} BPB "
            f"{bpb - base_bpb:+10.6f}  {seconds:7.1f} s, {seconds / base_seconds:5.2f} x",
            flush=True,
        )
        gain = base_bpb - bpb
        rows.append(dict(ttt=ttt, documents=documents, bpb=bpb, gain=gain, seconds=seconds))
    about = dict(bench="adapt", threads=torch.get_num_threads(), tokens=len(tokens), bytes=size)
    print(json.dumps(about | dict(rows=rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/adapt", main))
