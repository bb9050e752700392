"""What a longer look back is worth, and what it costs: every way in which eval_final.py can score the model alone.

    python bench/scoring.py [--artifact A] [--val GLOB] [--tokens N]

One artifact, one text, one thread; seconds are processor time, so that a shared machine does not count. The last line
is JSON. Without arguments: the artifact and the embedded split of `make run`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from fairway.scoring.columns import columns_in_memory  # noqa: E402
from fairway.scoring.neural import Neural  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from fairway.scoring.text import load_text  # noqa: E402
from train_gpt import Runtime, build_model, read_artifact  # noqa: E402


def ways(length: int) -> dict[str, dict]:
    return {
        "windows side by side": dict(eval_stride=length),
        "sliding, stride half a window": dict(eval_stride=length // 2),
        "sliding, stride 64": dict(),
        "sliding, stride 64, documents apart": dict(eval_documents=True),
        "cached": dict(eval_mode="cached"),
        "cached, documents apart": dict(eval_mode="cached", eval_documents=True),
        "cached, 1.5x the context, NTK": dict(eval_mode="cached", eval_seq_len=length * 3 // 2),
        "cached, 1.5x the context, plain RoPE": dict(
            eval_mode="cached", eval_seq_len=length * 3 // 2, ntk_rope=False
        ),
        "cached, 2x the context, NTK": dict(eval_mode="cached", eval_seq_len=2 * length),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument("--val", metavar="GLOB", default="")
    parser.add_argument(
        "--tokens", type=int, default=10**9, metavar="N", help="score the first N tokens only"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    artifact = read_artifact(given.artifact)
    text, runtime = (
        load_text(EvalConfig(val_files=given.val), artifact),
        Runtime(0, 1, torch.device("cpu"), "cpu"),
    )
    model, tokens = build_model(artifact), text.tokens[: given.tokens]
    text = text._replace(sizes=text.sizes[: len(tokens) - 1])
    print(
        f"{len(tokens) - 1:,} tokens, {text.bytes:,} bytes, windows of {model.cfg.train_seq_len}\n"
    )
    print(f"{'':38}  {'BPB':>9}  {'gain':>9}  {'seconds':>8}")
    rows = []
    for name, settings in ways(model.cfg.train_seq_len).items():
        columns, began = columns_in_memory(len(tokens) - 1, {"logp": "f8"}), time.process_time()
        Neural(model, EvalConfig(**settings), runtime).fill(tokens, columns)
        rows.append(
            dict(name=name, bpb=text.bpb(columns["logp"]), seconds=time.process_time() - began)
        )
        gain = rows[0]["bpb"] - rows[-1]["bpb"]
        print(
            f"{name:38}  {rows[-1]['bpb']:9.5f}  {gain:+9.5f}  {rows[-1]['seconds']:8.1f}",
            flush=True,
        )
    print(
        json.dumps(
            dict(
                tokens=len(tokens) - 1, bytes=text.bytes, window=model.cfg.train_seq_len, rows=rows
            )
        )
    )


if __name__ == "__main__":
    main()
