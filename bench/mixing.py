"""Measure what each mixture gains over the neural score, on texts that the model never saw.

    python bench/mixing.py [--artifact A --val GLOB...]
    python bench/mixing.py --docs train.jsonl.xz --texts a.jsonl.xz b.jsonl.xz --tokenizer MODEL

The second form makes shards of all texts, trains a model in the cpu shape on --docs (one thread,
--seconds), and scores each of --texts. Files that --folder has already are not made again. Scoring
is eval_final.py's own, so each line is its ablation: single-pass, normalised, causal. Without
arguments: the artifact and the embedded split of `make run`. The rows of test-time training come
from bench/adapt.py. The last line is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from short_run import ROOT

MODEL = dict(PRESET="cpu", OMP_NUM_THREADS="1")


def run_once(result: Path, arguments: list, **env: str) -> None:
    """Run a script of this repository, unless its result exists."""
    if not result.exists():
        print(f"making {result}", file=sys.stderr, flush=True)
        subprocess.run(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **env},
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )


def stem(path: str) -> str:
    """Return a file's name up to its first dot."""
    return Path(path).name.split(".")[0]


def prepare(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """Return the artifact, and a pattern of shards for each text; make them where needed."""
    if not options.docs:
        return options.artifact, {pattern: pattern for pattern in options.val}
    folder, tokenizer = Path(options.folder).resolve(), Path(options.tokenizer).resolve()
    for source, fraction in [(options.docs, 0.002), *((text, 1) for text in options.texts)]:
        out = folder / stem(source)
        arguments = [ROOT / "data" / "prepare.py", "--docs", Path(source).resolve()]
        arguments += ["--tokenizer", tokenizer, "--out", out, "--val-fraction", fraction]
        run_once(out / "manifest.json", arguments)
    artifact = folder / "final_model.int6.ptz"
    run_once(
        artifact,
        [ROOT / "train_gpt.py"],
        **MODEL,
        OUT_DIR=str(folder),
        RUN_ID="mixing",
        DATA_PATH=str(folder / stem(options.docs)),
        MAX_WALLCLOCK_SECONDS=str(options.seconds),
    )
    patterns = {stem(text): str(folder / stem(text) / "*_val_*.bin") for text in options.texts}
    return str(artifact), patterns


def score_text(artifact: str, name: str, pattern: str, folder: Path) -> dict:
    """Score one text by eval_final.py, print its ablation, and return its score.json.

    Columns that are still right are not made again.
    """
    env = dict(CHECKPOINT=artifact, VAL_FILES=pattern, OUT_DIR=str(folder))
    subprocess.run(
        [sys.executable, ROOT / "eval_final.py", "--compare"],
        env={**os.environ, **env},
        check=True,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    score = json.loads((folder / "eval" / "score.json").read_text())
    print(f"\n{name}: {score['tokens']:,} tokens, {score['bytes']:,} bytes")
    print(f"{'':34}  {'BPB':>9}  {'gain':>9}")
    base = score["ladder"][-2]["bpb"]
    for row in [*score["ladder"][:-1], *score["ablation"], score["ladder"][-1]]:
        print(f"{row['name']:34}  {row['bpb']:9.5f}  {base - row['bpb']:+9.5f}")
    keys = ("tokens", "bytes", "ladder", "ablation", "sha256", "seconds")
    return {key: score[key] for key in keys}


def main() -> None:
    """Make what is missing, score each text, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument("--val", nargs="+", metavar="GLOB", default=["data/embedded/*_val_*.bin"])
    parser.add_argument("--docs", metavar="FILE", help="train on this text")
    parser.add_argument("--texts", nargs="+", metavar="FILE", default=[], help="score these texts")
    parser.add_argument("--tokenizer", metavar="MODEL")
    parser.add_argument("--seconds", type=float, default=2700.0, help="of training (default 2700)")
    parser.add_argument("--folder", default="out/bench_mixing")
    options = parser.parse_args()
    if options.docs and not (options.texts and options.tokenizer):
        parser.error("--docs needs --texts and --tokenizer")
    artifact, patterns = prepare(options)
    if not Path(artifact).exists():
        parser.error(f"no artifact at {artifact}; run `make run`, or name one with --artifact")
    scores = Path(options.folder) / "scored"
    results = {
        name: score_text(artifact, name, pattern, scores / stem(name.replace("*", "all")))
        for name, pattern in patterns.items()
    }
    print(
        "\ngain: over the neural score with sliding windows; all, delayed: experts know only text "
        "older than 1,024 tokens"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
