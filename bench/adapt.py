"""What test-time training gains, each form against the same windows with weights that stay as they are.

    python bench/adapt.py [--artifact final_model.int6.ptz] [--val GLOB] [--tokens 50000]

Without an artifact, PRESET=cpu is trained for a minute. Scored are the first tokens of the shards (unset: the embedded
validation text). `chunks` and `bias` stand beside sliding windows, `lora` beside windows that start anew at each
document. Settings of evaluation (TTT_LR, EVAL_STRIDE...) may be given in the environment. The last line is JSON.
"""

import argparse
import glob
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
import sentencepiece
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from fairway.scoring.columns import columns_in_memory  # noqa: E402
from fairway.scoring.neural import make_neural  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402


def artifact_of(path: str) -> train_gpt.Artifact:
    if path:
        return train_gpt.read_artifact(path)
    with tempfile.TemporaryDirectory() as folder:
        print("no --artifact: training PRESET=cpu for a minute", flush=True)
        env = {
            **os.environ,
            "PRESET": "cpu",
            "OUT_DIR": folder,
            "MAX_WALLCLOCK_SECONDS": "60",
            "RUN_ID": "bench",
        }
        subprocess.run(
            [sys.executable, ROOT / "train_gpt.py"], env=env, check=True, stdout=subprocess.DEVNULL
        )
        return train_gpt.read_artifact(Path(folder) / "final_model.int6.ptz")


def measured(
    model: train_gpt.GPT, cfg: EvalConfig, tokens: np.ndarray, rt: train_gpt.Runtime
) -> tuple[float, float]:
    """Bits of the text, and seconds."""
    columns, scorer = (
        columns_in_memory(len(tokens) - 1, {"logp": "f8"}),
        make_neural(model, cfg, rt),
    )
    began = time.perf_counter()
    scorer.fill(tokens, columns)
    assert columns.complete(), "every row is scored once"
    return -math.fsum(columns["logp"]) / math.log(2), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="", help="unset: PRESET=cpu, trained for a minute")
    parser.add_argument(
        "--val", default=str(ROOT / "data/embedded/*_val_*.bin"), help="pattern of the shards"
    )
    parser.add_argument("--tokens", type=int, default=50_000, help="of their first tokens, so many")
    args = parser.parse_args()
    artifact, cfg = artifact_of(args.artifact), EvalConfig.from_env(os.environ)
    device = torch.device(cfg.device or train_gpt.best_device())
    model, rt = (
        train_gpt.build_model(artifact, device),
        train_gpt.Runtime(0, 1, device, device.type),
    )
    paths = sorted(glob.glob(args.val))
    train_gpt.need(paths, f"no shards match {args.val}; give --val")
    tokens = np.concatenate([train_gpt.read_shard(p, artifact.config.vocab_size) for p in paths])[
        : args.tokens
    ]
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=artifact.tokenizer)
    size = int(train_gpt.ByteTable.of(tokenizer, artifact.config.vocab_size).count(tokens).sum())
    rows, still = [], {}
    for ttt, documents in (
        ("none", False),
        ("chunks", False),
        ("bias", False),
        ("none", True),
        ("lora", True),
    ):
        bits, seconds = measured(model, replace(cfg, ttt=ttt, eval_documents=documents), tokens, rt)
        bpb = bits / size
        base = still.setdefault(documents, (bpb, seconds))
        print(
            f"{'frozen' if ttt == 'none' else ttt:7} {'each document anew' if documents else 'sliding windows':18} "
            f"{bpb:10.6f} BPB {bpb - base[0]:+10.6f}  {seconds:7.1f} s, {seconds / base[1]:5.2f} x",
            flush=True,
        )
        rows.append(
            dict(ttt=ttt, documents=documents, bpb=bpb, gain=base[0] - bpb, seconds=seconds)
        )
    print(
        json.dumps(
            {
                "bench": "adapt",
                "threads": torch.get_num_threads(),
                "tokens": len(tokens),
                "bytes": size,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
