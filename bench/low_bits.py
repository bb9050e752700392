"""Compare few bits and many weights with more bits and fewer weights, at equal bytes and tokens.

    python bench/low_bits.py [--steps 500] [--seeds 1337,42,2025] [--out FOLDER]

The first run is PRESET=cpu with the first seed, but embeddings at 8 bits and QAT from half of the
run on. The bytes of its artifact are the target of every other run. Each candidate has more
weights; its trainer bisects k, and thus the steps of rounding, until the file meets that target.
Candidates train once with the first seed. Then the best of 6 bits and the best of 3 bits or fewer
train with the other seeds, too. Best means the lowest loss on held-out training text, rounded as it
ships. The score is that of the artifact read back from disk. A run that is interrupted resumes;
finished runs are not repeated.

Zeros, k, and bits a weight are those of the matrices of attention and MLP. Their codes, 2 for
ternary, are coded as in the file, and as the field's ternary record packs them: five to a byte,
then LZMA. A step's milliseconds are processor time of one thread, with QAT. The last line is JSON.
"""

import json
import lzma
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from artifact import entropy_bytes
from short_run import ROOT, train_in, training_options

import train_gpt
from fairway.artifact_reader import read_artifact


class Candidate(NamedTuple):
    """The settings in which runs differ."""

    bits: int  # of attention and MLP matrices; 2 is ternary
    embed_bits: int
    width: int
    qat_start: float  # part of the run before QAT
    codec: str  # the one that is smaller for such codes

    def settings(self) -> dict[str, str]:
        """Return them as the trainer's environment names them."""
        return dict(
            ATTN_BITS=str(self.bits),
            MLP_BITS=str(self.bits),
            EMBED_BITS=str(self.embed_bits),
            MODEL_DIM=str(self.width),
            QAT_START_FRAC=str(self.qat_start),
            CODEC=self.codec,
        )

    def config(self) -> train_gpt.Config:
        """Return PRESET=cpu with these settings, on the embedded corpus."""
        own = train_gpt.parse_settings(train_gpt.Config, self.settings())
        data_path = str(ROOT / "data" / "embedded")
        return train_gpt.Config(**train_gpt.PRESETS["cpu"] | own, data_path=data_path)


PRESET = Candidate(6, 8, 128, 0.5, "auto")
# Widths whose finest steps exceed the bytes of PRESET a little, and at 6 bits also by much: their
# steps are then as coarse as those of 4 and 3 bits, but no code is clipped.
CANDIDATES = [
    Candidate(6, 8, 160, 0.5, "brotli"),
    Candidate(6, 8, 192, 0.5, "brotli"),
    Candidate(3, 6, 192, 0.5, "ans"),
    Candidate(2, 6, 240, 0.5, "ans"),
]


def read_codes(folder: Path, artifact: str, cfg: train_gpt.Config) -> list[np.ndarray]:
    """Return the codes of an artifact's matrices of attention and MLP, as bytes."""
    shipped = read_artifact(folder / artifact)
    state = torch.load(folder / "final_model.pt", weights_only=True)
    rounded = train_gpt.quantised(state, shipped.header["k"], cfg, {})
    for name, weight in shipped.weights.items():
        assert torch.equal(rounded[name].weight(), weight), f"{name} differs from the artifact"
    inner = [r for name, r in rounded.items() if ".attn." in name or ".mlp." in name]
    return [r.values.to(torch.int8).numpy().view(np.uint8) for r in inner if r.steps is not None]


def base3_lzma(codes: list[np.ndarray]) -> int:
    """Return the bytes of codes -1, 0 and 1 packed five to a byte, then by LZMA."""
    trits = np.concatenate([c.ravel() for c in codes]).view(np.int8) + 1
    fives = np.pad(trits, (0, -len(trits) % 5)).reshape(-1, 5)
    packed = (fives @ 3 ** np.arange(5)).astype(np.uint8)
    return len(lzma.compress(packed.tobytes(), preset=9 | lzma.PRESET_EXTREME))


def measure_codes(codes: list[np.ndarray], codec: str, bits: int) -> dict:
    """Return the part of zeros, and the bits a weight: coded, by entropy, and in base 3 by LZMA."""
    count = sum(c.size for c in codes)
    return dict(
        zeros=sum(int((c == 0).sum()) for c in codes) / count,
        coded_bits=8 * len(train_gpt.encode_planes(codec, codes)) / count,
        entropy_bits=8 * entropy_bytes(codes) / count,
        base3_lzma_bits=8 * base3_lzma(codes) / count if bits == 2 else None,
    )


def step_milliseconds(cfg: train_gpt.Config) -> float:
    """Return the processor time of a training step with QAT: the median of five, on one thread."""
    rt = train_gpt.set_up_runtime(cfg, {})
    data, model = train_gpt.load_data(cfg), train_gpt.GPT(cfg).placed(rt.device)
    train_gpt.initialise(model, cfg)
    run = train_gpt.make_run(cfg, rt, data, None, model, data.train)
    run.qat, seconds = True, []
    for _ in range(7):
        began = time.process_time()
        train_gpt.take_step(run, 0.0)
        seconds.append(time.process_time() - began)
    return 1000 * statistics.median(seconds[2:])


def train(candidate: Candidate, seed: int, steps: int, out: Path, artifact_bytes: int = 0) -> dict:
    """Train a candidate to an artifact of so many bytes (0: no target); return its figures."""
    name = f"int{candidate.bits}_embed{candidate.embed_bits}_width{candidate.width}"
    folder = out / f"{name}_qat{candidate.qat_start:g}_seed{seed}"
    settings = candidate.settings() | dict(SEED=str(seed), ITERATIONS=str(steps))
    if artifact_bytes:
        cfg = candidate.config()
        size_budget = artifact_bytes + cfg.size_margin_bytes + train_gpt.code_bytes(cfg)
        settings["SIZE_BUDGET_BYTES"] = str(size_budget)
    last = train_in(folder, **settings)
    averages, artifact = last["averages"], last["artifact"]
    codes = read_codes(folder, Path(artifact["path"]).name, candidate.config())
    return dict(
        candidate=candidate._asdict(),
        seed=seed,
        bpb=last["final"]["bpb"],
        holdout_nats=averages[averages["kept"]],
        bpb_before_rounding=last["val"]["bpb"],
        k=max(artifact["k"], train_gpt.LEAST_K[candidate.bits]),
        codec=artifact["codec"],
        artifact_bytes=artifact["bytes"],
        weights=last["model"]["parameters"],
        tokens=last["train"]["tokens"],
        **measure_codes(codes, artifact["codec"], candidate.bits),
    )


def summarise(rows: list[dict]) -> dict:
    """Return mean and deviation of the scores of one candidate, with the figures of its first."""
    scores = [row["bpb"] for row in rows]
    return rows[0] | dict(
        seeds=len(rows),
        mean=statistics.mean(scores),
        deviation=statistics.stdev(scores) if len(rows) > 1 else None,
    )


def print_table(summaries: dict[Candidate, dict], best_of_6: float) -> None:
    """Print a line for each candidate, from the lowest score to the highest."""
    print(
        f"\n{'bits':>4} {'embed':>5} {'width':>5} {'QAT':>5} {'weights':>9} {'k':>6} {'codec':>6} "
        f"{'bytes':>7} {'zeros':>6} {'coded':>6} {'order 0':>7} {'base3':>6} {'ms/step':>7} "
        f"{'held out':>8} {'seeds':>5} {'BPB':>7} {'deviation':>9} {'to best of 6':>12}"
    )
    for c, s in sorted(summaries.items(), key=lambda item: item[1]["mean"]):
        base3 = f"{s['base3_lzma_bits']:6.3f}" if s["base3_lzma_bits"] else f"{'':6}"
        deviation = f"{s['deviation']:9.4f}" if s["deviation"] is not None else f"{'':9}"
        print(
            f"{c.bits:4} {c.embed_bits:5} {c.width:5} {c.qat_start:5g} {s['weights']:9} "
            f"{s['k']:6.2f} {s['codec']:>6} {s['artifact_bytes']:7} {s['zeros']:6.1%} "
            f"{s['coded_bits']:6.3f} {s['entropy_bits']:7.3f} {base3} {s['step_ms']:7.0f} "
            f"{s['holdout_nats']:8.4f} {s['seeds']:5} {s['mean']:7.4f} {deviation} "
            f"{s['mean'] - best_of_6:+12.4f}"
        )


def compare(low: dict, six: dict) -> dict:
    """Return and print how much the mean of few bits is above that of a model of 6 bits."""
    difference, error = low["mean"] - six["mean"], None
    if low["seeds"] > 1:
        error = math.hypot(*(s["deviation"] / math.sqrt(s["seeds"]) for s in (low, six)))
    text = f" ± {error:.4f} (standard error)" if error else ", one seed"
    width, bits = six["candidate"]["width"], low["candidate"]["bits"]
    print(f"{bits} bits against 6 bits at width {width}: {difference:+.4f} BPB{text}")
    return dict(bits=bits, width_of_6=width, difference_bpb=difference, standard_error=error)


def main() -> None:
    """Train every run, then print a table and one line of JSON."""
    options = training_options(__doc__, "bench_low_bits")
    first, *others = options.seeds
    rows = {PRESET: [train(PRESET, first, options.steps, options.out)]}
    target = rows[PRESET][0]["artifact_bytes"]
    for c in CANDIDATES:
        rows[c] = [train(c, first, options.steps, options.out, target)]

    low, six = (
        min((c for c in rows if c.bits in bits), key=lambda c: rows[c][0]["holdout_nats"])
        for bits in ((2, 3), (6,))
    )
    for seed in others:
        for c in (low, six):
            rows[c].append(train(c, seed, options.steps, options.out, target))
    torch.set_num_threads(1)
    summaries = {}
    for c, of_kind in rows.items():
        summaries[c] = summarise(of_kind) | dict(step_ms=step_milliseconds(c.config()))
    print_table(summaries, summaries[six]["mean"])
    difference = compare(summaries[low], summaries[six])
    runs = [row for of_kind in rows.values() for row in of_kind]
    summary = list(summaries.values())
    result = dict(bench="low_bits", **difference, summary=summary, runs=runs)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
