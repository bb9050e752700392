"""Measure bytes and seconds of each artifact codec, against the entropy of what it codes.

    python bench/artifact.py [--state final_model.pt] [--quick]

There are two states. One was trained (`--state`, else a minute of PRESET=cpu is run). The other has
the shapes of the consensus model, 26.8 M weights, with the tails and the uneven spread of trained
rows. Each is rounded at the k that fits 16,000,000 bytes and at k = 12.85 (#1855). The bound is the
order-0 entropy of each plane; tables are counted in every file. Times are the median of three
runs, for brotli of one. The last line is JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from short_run import train_for_a_minute

import train_gpt

RECORD_K = 12.85


def trained_state(path: str) -> tuple[dict[str, torch.Tensor], train_gpt.Config]:
    """Return the weights of a cpu run before rounding, and its settings."""
    cfg = train_gpt.Config(**train_gpt.PRESETS["cpu"])
    if path:
        return torch.load(path, weights_only=True), cfg
    with tempfile.TemporaryDirectory() as folder:
        train_for_a_minute(folder, "--state")
        return torch.load(Path(folder) / "final_model.pt", weights_only=True), cfg


def consensus_state() -> tuple[dict[str, torch.Tensor], train_gpt.Config]:
    """Return Student-t weights (8 degrees), spread log-normally by row and column (0.2)."""
    cfg, noise = train_gpt.Config(**train_gpt.PRESETS["consensus"]), np.random.default_rng(0)
    state = {}
    for name, p in train_gpt.GPT(cfg).named_parameters():
        w = noise.standard_normal(p.shape, dtype=np.float32)
        if p.ndim == 2:
            w *= np.sqrt(8 / noise.chisquare(8, p.shape)).astype(np.float32)
            w *= np.exp(0.2 * noise.standard_normal((len(w), 1))) * np.exp(
                0.2 * noise.standard_normal((1, w.shape[1]))
            )
        state[name] = torch.from_numpy(np.asarray(w, dtype=np.float32))
    return state, cfg


def entropy_bytes(planes: list[np.ndarray]) -> float:
    """Return the order-0 entropy of all planes."""
    bits = 0.0
    for plane in planes:
        counts = np.bincount(plane.ravel(), minlength=256)
        counts = counts[counts > 0]
        bits -= (counts * np.log2(counts / counts.sum())).sum()
    return bits / 8


def timed(function, runs: int):
    """Return the result of a call, and the median seconds of so many calls."""
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - began)
    return result, statistics.median(seconds)


def measure_codecs(label: str, state, cfg, k: float, names: list[str]) -> list[dict]:
    """Print and return a row for each named codec, on one state at one k."""
    planes = train_gpt.planes_of(train_gpt.quantised(state, k, cfg, {}))
    bound, symbols = entropy_bytes(planes), sum(p.size for p in planes)
    shapes, rows = [p.shape for p in planes], []
    for name in names:
        runs = 3 if name == "ans" else 1
        payload, encode = timed(lambda name=name: train_gpt.encode_planes(name, planes), runs)
        back, decode = timed(
            lambda name=name, payload=payload: train_gpt.decode_planes(name, payload, shapes), runs
        )
        assert all(np.array_equal(a, b) for a, b in zip(planes, back, strict=True)), (
            f"{name} is not lossless"
        )
        over = 100 * (len(payload) / bound - 1)
        print(
            f"{label:18} k {k:5.2f} {symbols:>10} symbols  {name:7}{len(payload):>10} bytes, "
            f"bound {over:+6.2f} %  encode {encode:6.2f} s  decode {decode:5.2f} s",
            flush=True,
        )
        rows.append(
            dict(
                state=label,
                k=k,
                symbols=symbols,
                codec=name,
                bytes=len(payload),
                entropy_bytes=bound,
                over_percent=over,
                encode_seconds=encode,
                decode_seconds=decode,
            )
        )
    return rows


def main() -> None:
    """Measure both states, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--state",
        default="final_model.pt" if Path("final_model.pt").exists() else "",
        help="a final_model.pt of PRESET=cpu",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the entropy coder alone: seconds instead of minutes"
    )
    options = parser.parse_args()
    names, rows = ["ans"] if options.quick else ["ans", "brotli", "zstd"], []
    for label, (state, cfg) in (
        ("trained, cpu", trained_state(options.state)),
        ("26.8 M, consensus", consensus_state()),
    ):
        fitted = train_gpt.bisect_k(state, train_gpt.size_target(cfg), cfg)
        for k in (fitted, RECORD_K):
            rows += measure_codecs(label, state, cfg, k, names)
    print(json.dumps({"bench": "artifact", "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
