"""The root of the repository, and a model that is trained for a minute, for all benches."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = str(ROOT / "data" / "embedded" / "*_val_*.bin")  # the validation split of `make data`


def train_for_a_minute(folder: str | Path, missing: str) -> Path:
    """Train PRESET=cpu into a folder and return it; `missing` is the option that would avoid it."""
    print(f"no {missing}: training PRESET=cpu for a minute", file=sys.stderr, flush=True)
    settings = dict(PRESET="cpu", MAX_WALLCLOCK_SECONDS="60", RUN_ID="bench", OUT_DIR=str(folder))
    subprocess.run(
        [sys.executable, ROOT / "train_gpt.py"],
        env=os.environ | settings,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return Path(folder)
