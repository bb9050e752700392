"""The same run by PyTorch and by MLX, and each artifact's score by the other.

    python bench/mlx.py [PRESET]      (default: smoke; two to three minutes on MLX's Linux CPU build)

Trains both from the same first weights on the embedded corpus, then lets eval_final.py score MLX's artifact: its
neural windows side by side and sliding must be the trainer's own. On Linux the seconds say nothing of a Mac.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, out: Path, **settings: str) -> tuple[str, float]:
    """What a script printed, and the seconds it took."""
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
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / script)], env=env, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr}")
    return done.stdout, time.perf_counter() - began


def bpb(pattern: str, text: str) -> float:
    return float(re.search(pattern + r".*?val_bpb:([0-9.]+)", text)[1])


def main() -> None:
    preset = sys.argv[1] if len(sys.argv) > 1 else "smoke"
    with tempfile.TemporaryDirectory() as folder:
        torch_says, torch_s = run("train_gpt.py", Path(folder) / "torch", PRESET=preset)
        mlx_says, mlx_s = run("train_gpt_mlx.py", Path(folder) / "mlx", PRESET=preset)
        artifact = next((Path(folder) / "mlx").glob("final_model.*.ptz"))
        scored, _ = run("eval_final.py", Path(folder) / "mlx", CHECKPOINT=str(artifact))
    print(f"PRESET={preset}, embedded corpus, validation BPB of the artifact read back\n")
    rows = (
        ("train_gpt.py, side by side", bpb("roundtrip_exact", torch_says)),
        ("train_gpt_mlx.py, side by side", bpb("roundtrip_exact", mlx_says)),
        ("  its artifact by eval_final.py", bpb("ladder:neural, windows side by side", scored)),
        ("train_gpt_mlx.py, sliding", bpb("sliding_window_exact", mlx_says)),
        ("  its artifact by eval_final.py", bpb("ladder:neural, sliding", scored)),
    )
    for name, value in rows:
        print(f"{name:34} {value:.8f}")
    print(f"seconds, scoring included: train_gpt.py {torch_s:.0f}, train_gpt_mlx.py {mlx_s:.0f}")


if __name__ == "__main__":
    main()
