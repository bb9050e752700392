"""Train the same run with PyTorch and with MLX, and compare the scores of the artifacts.

    python bench/mlx.py [PRESET]      (default: smoke; two to three minutes with MLX's CPU build)

Both start from the same weights and read the embedded corpus. eval_final.py then scores MLX's
artifact: its neural scores, side by side and sliding, must equal the trainer's own. The seconds
that it prints on Linux say nothing about a Mac.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from short_run import ROOT


def run_script(script: str, out: Path, *options: str, **settings: str) -> tuple[str, float]:
    """Run a script of the root; return what it printed and the seconds it took."""
    env = dict(
        os.environ,
        OUT_DIR=str(out),
        DATA_PATH=str(ROOT / "data" / "embedded"),
        OMP_NUM_THREADS="1",
        MLX_DISABLE_COMPILE="1",
        DEVICE="cpu",
        RUN_ID="bench",
        **settings,
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *options], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr}")
    return done.stdout, time.perf_counter() - start


def read_bpb(pattern: str, text: str) -> float:
    """Return the val_bpb of the first line in which `pattern` matches."""
    return float(re.search(pattern + r".*?val_bpb:([0-9.]+)", text)[1])


def main() -> None:
    """Train with both, score both artifacts, and print a table."""
    preset = sys.argv[1] if len(sys.argv) > 1 else "smoke"
    with tempfile.TemporaryDirectory() as folder:
        torch_out, mlx_out = Path(folder) / "torch", Path(folder) / "mlx"
        torch_text, torch_s = run_script("train_gpt.py", torch_out, PRESET=preset)
        mlx_text, mlx_s = run_script("train_gpt_mlx.py", mlx_out, PRESET=preset)
        artifact = next(mlx_out.glob("final_model.*.ptz"))
        eval_text, _ = run_script("eval_final.py", mlx_out, "--compare", CHECKPOINT=str(artifact))
    print(f"PRESET={preset}, embedded corpus, validation BPB of the artifact as read from disk\n")
    rows = (
        ("train_gpt.py, side by side", read_bpb("roundtrip_exact", torch_text)),
        ("train_gpt_mlx.py, side by side", read_bpb("roundtrip_exact", mlx_text)),
        ("  its artifact by eval_final.py", read_bpb("ladder:neural, windows side", eval_text)),
        ("train_gpt_mlx.py, sliding", read_bpb("sliding_window_exact", mlx_text)),
        ("  its artifact by eval_final.py", read_bpb("ladder:neural, sliding", eval_text)),
    )
    for name, bpb in rows:
        print(f"{name:34} {bpb:.8f}")
    print(f"seconds, scoring included: train_gpt.py {torch_s:.0f}, train_gpt_mlx.py {mlx_s:.0f}")


if __name__ == "__main__":
    main()
