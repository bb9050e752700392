"""Measure what context gains and costs: all ways in which eval_final.py scores the model alone.

    python bench/scoring.py [--artifact A] [--val GLOB] [--tokens N]

One artifact, one text, one thread. Seconds are processor time, so that other work on the machine
does not count. The last line is JSON. Without options: the artifact and the embedded text of
`make run`.
"""

import json
import sys
import time

import torch

from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, run_reporting
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import Runtime, build_model


def window_settings(length: int) -> dict[str, dict]:
    """Return the settings of each way to score, for a model trained on windows of `length`."""
    longer = dict(eval_mode="cached", eval_seq_len=length * 3 // 2)
    return {
        "windows side by side": dict(eval_stride=length),
        "sliding, stride half a window": dict(eval_stride=length // 2),
        "sliding, stride 64": dict(),
        "sliding, stride 64, documents apart": dict(eval_documents=True),
        "cached": dict(eval_mode="cached"),
        "cached, documents apart": dict(eval_mode="cached", eval_documents=True),
        "cached, 1.5x the context, NTK": longer,
        "cached, 1.5x the context, plain RoPE": longer | dict(ntk_rope=False),
        "cached, 2x the context, NTK": dict(eval_mode="cached", eval_seq_len=2 * length),
    }


def main() -> int:
    """Print one line for each way to score, then all of them as JSON."""
    parser = Parser(description=__doc__)
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument("--val", metavar="GLOB", default="")
    parser.add_argument(
        "--tokens", type=int, default=10**9, metavar="N", help="score the first N tokens only"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    artifact = read_artifact(options.artifact)
    text = load_text(EvalConfig(val_files=options.val), artifact)
    runtime = Runtime(0, 1, torch.device("cpu"), "cpu")
    model, tokens = build_model(artifact), text.tokens[: options.tokens]
    text, length = text._replace(sizes=text.sizes[: len(tokens) - 1]), model.cfg.train_seq_len
    print(f"{len(tokens) - 1:,} tokens, {text.bytes:,} bytes, windows of {length}\n")
    print(f"{'':38}  {'BPB':>9}  {'gain':>9}  {'seconds':>8}")
    rows = []
    for name, settings in window_settings(length).items():
        columns, began = columns_in_memory(len(tokens) - 1, {"logp": "f8"}), time.process_time()
        Neural(model, EvalConfig(**settings), runtime).fill(tokens, columns)
        seconds, bpb = time.process_time() - began, text.bpb(columns["logp"])
        rows.append(dict(name=name, bpb=bpb, seconds=seconds))
        gain = rows[0]["bpb"] - bpb
        print(f"{name:38}  {bpb:9.5f}  {gain:+9.5f}  {seconds:8.1f}", flush=True)
    print(json.dumps(dict(tokens=len(tokens) - 1, bytes=text.bytes, window=length, rows=rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/scoring", main))
