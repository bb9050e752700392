"""What each way of mixing gains over the neural score, on texts that the model never saw.

    python bench/mixing.py [--artifact A --val GLOB...]
    python bench/mixing.py --docs train.jsonl.xz --texts a.jsonl.xz b.jsonl.xz --tokenizer MODEL [--seconds 2700]

The second form makes shards of all texts, trains a model in the cpu shape on --docs (one thread, --seconds),
and scores each of --texts; what is there in --folder already is not made again. Scoring is eval_final.py's own, so each
line is its ablation: single-pass, normalised, causal. The last line is JSON. Without arguments: the artifact and the
embedded split of `make run`. The test-time training rows come from bench/adapt.py.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = dict(PRESET="cpu", OMP_NUM_THREADS="1")


def step(made: Path, arguments: list, **env: str) -> None:
    """Run a script of this repository, unless what it makes is there."""
    if not made.exists():
        print(f"making {made}", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **env},
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )


def stem(path: str) -> str:
    return Path(path).name.split(".")[0]


def prepared(given: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The artifact, and a pattern of shards for each text."""
    if not given.docs:
        return given.artifact, {pattern: pattern for pattern in given.val}
    folder, prepare = Path(given.folder).resolve(), ROOT / "data" / "prepare.py"
    for source, fraction in [(given.docs, 0.002), *((text, 1) for text in given.texts)]:
        step(
            folder / stem(source) / "manifest.json",
            [
                prepare,
                "--docs",
                Path(source).resolve(),
                "--tokenizer",
                Path(given.tokenizer).resolve(),
                "--out",
                folder / stem(source),
                "--val-fraction",
                fraction,
            ],
        )
    step(
        folder / "final_model.int6.ptz",
        [ROOT / "train_gpt.py"],
        **MODEL,
        OUT_DIR=str(folder),
        RUN_ID="mixing",
        DATA_PATH=str(folder / stem(given.docs)),
        MAX_WALLCLOCK_SECONDS=str(given.seconds),
    )
    return str(folder / "final_model.int6.ptz"), {
        stem(text): str(folder / stem(text) / "*_val_*.bin") for text in given.texts
    }


def scored(artifact: str, name: str, pattern: str, folder: Path) -> dict:
    """eval_final.py's score.json of one text."""
    env = dict(CHECKPOINT=artifact, VAL_FILES=pattern, OUT_DIR=str(folder))
    subprocess.run(
        [sys.executable, ROOT / "eval_final.py"],
        env={**os.environ, **env},
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )  # columns that are still right are not made again
    score = json.loads((folder / "eval" / "score.json").read_text())
    print(
        f"\n{name}: {score['tokens']:,} tokens, {score['bytes']:,} bytes\n{'':34}  {'BPB':>9}  {'gain':>9}"
    )
    base = score["ladder"][-2]["bpb"]
    for row in [*score["ladder"][:-1], *score["ablation"], score["ladder"][-1]]:
        print(f"{row['name']:34}  {row['bpb']:9.5f}  {base - row['bpb']:+9.5f}")
    return {
        key: score[key] for key in ("tokens", "bytes", "ladder", "ablation", "sha256", "seconds")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument("--val", nargs="+", metavar="GLOB", default=["data/embedded/*_val_*.bin"])
    parser.add_argument("--docs", metavar="FILE", help="train on this text")
    parser.add_argument("--texts", nargs="+", metavar="FILE", default=[], help="score these")
    parser.add_argument("--tokenizer", metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=2700.0, help="of training (default 2700)")
    parser.add_argument("--folder", default="out/bench_mixing")
    given = parser.parse_args()
    if given.docs and not (given.texts and given.tokenizer):
        parser.error("--docs needs --texts and --tokenizer")
    artifact, texts = prepared(given)
    if not Path(artifact).exists():
        parser.error(f"no artifact at {artifact}; run `make run`, or name one with --artifact")
    results = {
        name: scored(
            artifact, name, pattern, Path(given.folder) / "scored" / stem(name.replace("*", "all"))
        )
        for name, pattern in texts.items()
    }
    print(
        "\ngain: over the neural score with sliding windows; all, delayed: experts know text older than 1,024 tokens"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
