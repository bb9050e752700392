"""The root of the repository, and short runs of PRESET=cpu, for all benches."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import train_gpt

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


def read_events(log: Path) -> list[dict]:
    """Return the events of a run's JSON log, or none where there is no log."""
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def train_in(folder: Path, **settings: str) -> dict[str, dict]:
    """Train PRESET=cpu on the embedded corpus in a folder of its own; return its last events.

    A run that ended with these settings is not repeated, and one that was interrupted is resumed.
    Steps end it, not the clock. The events are named: `final` holds the score.
    """
    env = {
        **os.environ,
        "PRESET": "cpu",
        "DATA_PATH": str(ROOT / "data" / "embedded"),
        "MAX_WALLCLOCK_SECONDS": "0",
        "OUT_DIR": str(folder),
        "RUN_ID": "bench",
        "CHECKPOINT_SECONDS": "60",
        "VAL_LOSS_EVERY": "0",
        "TRAIN_LOG_EVERY": "50",
        **settings,
    }
    log, wanted = folder / "logs" / "bench.jsonl", asdict(train_gpt.Config.from_env(env, "cpu"))
    events = read_events(log)
    before = events[0]["settings"] if events else {}
    differing = {name for name, value in wanted.items() if before.get(name) != value}
    same = differing <= {"resume", *train_gpt.names_with_role(train_gpt.Config, "place")}
    if not (same and events[-1]["event"] == "final"):
        words = " ".join(f"{name}={value}" for name, value in settings.items())
        print(f"\n{folder.name}: {words}", flush=True)
        env["RESUME"] = str(int(same and (folder / "checkpoint.pt").exists()))
        subprocess.run([sys.executable, ROOT / "train_gpt.py"], env=env, check=True)
        events = read_events(log)
    return {e["event"]: e for e in events}


def training_options(description: str, folder: str) -> argparse.Namespace:
    """Return the options of a bench that trains with several seeds, in out/`folder`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=500)
    add(
        "--seeds",
        type=lambda text: [int(seed) for seed in text.split(",")],
        default=[1337, 42, 2025],
        help="separated by commas (default: 1337,42,2025)",
    )
    add("--out", type=Path, default=ROOT / "out" / folder, help="folder for the runs")
    return parser.parse_args()
