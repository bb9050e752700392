"""Measure what the consensus features gain at the cpu shape, at equal tokens and seeds.

    python bench/train.py [--steps 500] [--seeds 1337,42,2025] [--out FOLDER]

`consensus` is PRESET=cpu: SmearGate, BigramHash, MLP 3x, orthogonal initial matrices, Muon with
weight decay, clipping, QAT at 6 bits and SWA. `baseline` is the same shape with the challenge's
starter settings: none of these, MLP 2x, 8 bits. Both train on the embedded corpus, on a CPU. The
score is that of the artifact read back from disk. A run that is interrupted resumes; finished runs
are not repeated. The last line is JSON.
"""

import json
import statistics
from pathlib import Path

from short_run import train_in, training_options

import train_gpt

# Settings of PRESET=cpu that `baseline` keeps: shape, batch, and the warm-up of momentum.
SHAPE = {
    "num_layers",
    "model_dim",
    "num_heads",
    "num_kv_heads",
    "train_seq_len",
    "train_batch_tokens",
    "compile",
    "val_batch_size",
    "holdout_tokens",
    "warmup_steps",
    "muon_momentum_warmup_steps",
}


def settings_of(features: str) -> dict[str, str]:
    """Return the environment: for `baseline`, the starter's value of what PRESET=cpu changes."""
    if features == "consensus":
        return {}
    starter = train_gpt.Config()
    values = {n: getattr(starter, n) for n in train_gpt.PRESETS["cpu"] if n not in SHAPE}
    return {n.upper(): str(int(v) if isinstance(v, bool) else v) for n, v in values.items()}


def run(features: str, seed: int, steps: int, out: Path) -> dict:
    """Train once in a folder of its own, unless that is done; return figures of its log."""
    settings = settings_of(features) | dict(SEED=str(seed), ITERATIONS=str(steps))
    last = train_in(out / f"{features}_seed{seed}", **settings)
    return dict(
        features=features,
        seed=seed,
        bpb=last["final"]["bpb"],
        bpb_before_rounding=last["val"]["bpb"],
        tokens=last["train"]["tokens"],
        tokens_per_second=last["train"]["tokens"] / last["train"]["seconds"],
        artifact_bytes=last["artifact"]["bytes"],
        parameters=last["model"]["parameters"],
    )


def main() -> None:
    """Train every run, then print a table and one line of JSON."""
    options = training_options(__doc__, "bench_train")
    rows = [
        run(features, seed, options.steps, options.out)
        for seed in options.seeds
        for features in ("baseline", "consensus")
    ]
    mean = f"BPB, mean of {len(options.seeds)}"
    print(f"\n{'features':10} {mean:>16} {'deviation':>10} {'tokens/s':>9} {'parameters':>11}")
    summary = {}
    for features in ("baseline", "consensus"):
        of_kind = [r for r in rows if r["features"] == features]
        bpb = [r["bpb"] for r in of_kind]
        spread = statistics.stdev(bpb) if len(bpb) > 1 else 0.0
        speed = statistics.median(r["tokens_per_second"] for r in of_kind)
        summary[features] = dict(
            mean=statistics.mean(bpb), deviation=spread, tokens_per_second=speed
        )
        print(
            f"{features:10} {statistics.mean(bpb):16.4f} {spread:10.4f} {speed:9.0f} "
            f"{of_kind[0]['parameters']:11}"
        )
    gain = summary["baseline"]["mean"] - summary["consensus"]["mean"]
    print(f"consensus is {gain:.4f} BPB lower, at equal tokens ({rows[0]['tokens']})")
    print(json.dumps({"bench": "train", "gain_bpb": gain, "summary": summary, "runs": rows}))


if __name__ == "__main__":
    main()
