"""Compare vocabularies of 1,024, 4,096 and 8,192 pieces, with and without case markers, at equal
bytes.

    python bench/vocabulary.py --train TEXT.jsonl.xz --val OTHER.jsonl.xz [--seconds 240]

Each tokenizer is trained on the training documents. The validation documents are another file, so
that no tokenizer and no model has seen them. All artifacts have one size, --bytes, without the
tokenizer: a larger vocabulary has more rows of embeddings, and its model is as much narrower. The
trainer bisects k until the file fits. Training takes equal time. BPB is over the bytes of the
original text, which all variants share; the artifact is read back from disk.

Runs are those of bench/ladder.py: one JSON file each in OUT/raw, resumed and skipped in its way.
The table is OUT/vocabulary.md; --into PAGE also writes it between two markers of a page.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from ladder import ROOT, UNREACHED, LadderRun, fingerprint, run_all, seeds_of
from ladder_table import read_results
from rungs import MIDDLE, SHAPES, variants_of

from fairway.command_line import Parser, run_reporting
from fairway.methods.comparison import replace_section
from train_gpt import UserError, list_shards, replacing

PAGE_NAME = "vocabulary"


class Vocabulary(NamedTuple):
    """A tokenizer, and the width at which its model reaches --bytes with fine steps."""

    size: int
    case_ops: bool
    width: int

    @property
    def name(self) -> str:
        return f"sp{self.size}" + "-case" * self.case_ops


VOCABULARIES = [
    Vocabulary(size, case_ops, width)
    for size, width in ((1024, 208), (4096, 168), (8192, 128))
    for case_ops in (False, True)
]


# ==== TEXTS =======================================================================================
def prepare(vocabulary: Vocabulary, options: Namespace) -> Path:
    """Write shards of both texts with a tokenizer of the first; return their folder."""
    folder = options.out.absolute() / "data" / vocabulary.name
    script, case = str(ROOT / "data" / "prepare.py"), ["--case-ops"] * vocabulary.case_ops
    train, val = folder / "train", folder / "val"
    own = ["--tokenizer", f"train:{vocabulary.size}", "--val-fraction", "0", *case]
    same = ["--tokenizer", str(train / "tokenizer.model"), "--val-fraction", "1"]
    for out, texts, how in ((train, options.train, own), (val, options.val, same)):
        command = [sys.executable, script, "--docs", *map(str, texts), "--out", str(out), *how]
        if subprocess.run(command).returncode:
            raise UserError(f"data/prepare.py failed for {out}; its error is above")
    joint = folder / "joint"
    joint.mkdir(exist_ok=True)
    for path in [*train.glob("*_train_*.bin"), *val.glob("*_val_*.bin"), train / "tokenizer.model"]:
        shutil.copyfile(path, joint / path.name)
    if not list_shards(joint / "*_val_*.bin"):
        raise UserError("--val has no document with any text; name another file")
    return joint


def run_of(vocabulary: Vocabulary, data: Path, seed: int, options: Namespace) -> LadderRun:
    """Return the run of one vocabulary and seed: consensus at the cpu shape, its width apart."""
    shape = SHAPES["cpu"]
    own = dict(
        VOCAB_SIZE=str(vocabulary.size),
        MODEL_DIM=str(vocabulary.width),
        EMBED_TOKENIZER="0",
        SIZE_BUDGET_BYTES=str(options.bytes),
        ITERATIONS=str(UNREACHED),
        MAX_WALLCLOCK_SECONDS=f"{options.seconds:g}",
    )
    pattern = str(data / "*_val_*.bin")
    return LadderRun(
        shape="cpu",
        variant=vocabulary.name,
        settings=shape.settings() | variants_of(shape)[MIDDLE].settings | own,
        seconds=options.seconds,
        steps=0,
        seed=seed,
        data=str(data),
        tokenizer=str(data / "tokenizer.model"),
        judges={"val": pattern},
        fingerprints={
            "training": fingerprint(str(data / "*_train_*.bin")),
            "val": fingerprint(pattern),
        },
        judge_documents=0,
        stride=options.stride,
        threads=1,
        out=str(options.out.absolute() / "raw" / PAGE_NAME),
    )


# ==== TABLE =======================================================================================
def row_text(vocabulary: Vocabulary, results: list[dict[str, Any]], first: float) -> str:
    """Return a line of the table: means over seeds."""
    bpb = [r["judged"]["val"]["bpb"] for r in results]
    deviation = f" ± {statistics.stdev(bpb):.4f}" if len(bpb) > 1 else ""
    mean = {
        key: statistics.fmean(r[key] for r in results)
        for key in ("artifact_bytes", "steps_taken", "tokens_per_second")
    }
    judged, seeds = results[0]["judged"]["val"], ", ".join(str(r["seed"]) for r in results)
    return (
        f"| {vocabulary.name} | {vocabulary.width} | {judged['tokens']:,} | "
        f"{judged['bytes'] / judged['tokens']:.3f} | {statistics.fmean(bpb):.4f}{deviation} | "
        f"{statistics.fmean(bpb) - first:+.4f} | {mean['artifact_bytes']:,.0f} | "
        f"{mean['steps_taken']:,.0f} | {mean['tokens_per_second']:,.0f} | {seeds} |"
    )


def markdown(results: dict[str, list[dict[str, Any]]]) -> str:
    """Return the table of all vocabularies that have results."""
    done = {n: [r for r in rows if r["status"] == "done"] for n, rows in results.items()}
    known = [v for v in VOCABULARIES if done.get(v.name)]
    if not known:
        raise UserError("no run is done; see the errors above")
    run, machine = done[known[0].name][0], done[known[0].name][0]["environment"]["hardware"]
    first = statistics.fmean(r["judged"]["val"]["bpb"] for r in done[known[0].name])
    head = (
        "| vocabulary | width | tokens of the text | bytes a token | BPB | difference | artifact | "
        "steps | tokens/s | seeds |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|---|"
    )
    about = (
        f"{run['seconds']:g} s of training a run, one thread, {machine['processor']}, "
        f"{machine['cores']} cores; four layers, `consensus` techniques. The text has "
        f"{run['judged']['val']['bytes']:,} bytes and is scored in windows of 256 tokens, stride "
        f"{run['stride']}. `-case`: tokens of text without capitals, with case markers. The "
        "tokenizer is not in the artifact, as in the challenge."
    )
    rows = [row_text(v, done[v.name], first) for v in known]
    return f"{about}\n\n{head}\n" + "\n".join(rows) + f"\n\n{gains_of_markers(done)}\n"


def gains_of_markers(done: dict[str, list[dict[str, Any]]]) -> str:
    """Say for each size what case markers change, in BPB."""
    means = {
        name: statistics.fmean(r["judged"]["val"]["bpb"] for r in runs)
        for name, runs in done.items()
        if runs
    }
    pairs = [(v, v._replace(case_ops=False).name) for v in VOCABULARIES if v.case_ops]
    texts = [
        f"{v.size:,} pieces {means[v.name] - means[plain]:+.4f}"
        for v, plain in pairs
        if v.name in means and plain in means
    ]
    return f"With case markers less without: {', '.join(texts) or 'no pair is done'} (BPB)."


def options_parser() -> Parser:
    parser = Parser(prog="bench/vocabulary.py", description=__doc__)
    add = parser.add_argument
    add("--train", nargs="+", type=Path, metavar="FILE", required=True, help="training documents")
    add("--val", nargs="+", type=Path, metavar="FILE", required=True, help="text to score")
    add("--bytes", type=int, default=1_440_000, help="of artifact and code (default: %(default)s)")
    add("--seconds", type=float, default=240.0, metavar="S", help="of training, a run")
    add("--seeds", default="1337,42,2025", metavar="N,N", help="default: %(default)s")
    add("--stride", type=int, default=128, metavar="N", help="of scored windows (default: 128)")
    add("--workers", type=int, default=0, metavar="N", help="runs at a time (default: all cores)")
    add("--retry", action="store_true", help="run again what failed or ran with other code")
    add("--into", type=Path, metavar="PAGE", help="also write the table into its part of a page")
    add("--out", type=Path, default=ROOT / "out" / "vocabulary", metavar="DIR")
    parser.set_defaults(threads=1, cluster="")
    return parser


def main() -> int:
    options = options_parser().parse_args()
    seeds = seeds_of(options.seeds)
    folders = {vocabulary: prepare(vocabulary, options) for vocabulary in VOCABULARIES}
    runs = [
        run_of(vocabulary, folder, seed, options)
        for seed in seeds
        for vocabulary, folder in folders.items()
    ]
    failed = run_all(runs, options)
    text = markdown(read_results(options.out / "raw" / PAGE_NAME))
    files = {options.out / "vocabulary.md": text}
    if options.into:
        files[options.into] = replace_section(options.into.read_text("utf-8"), PAGE_NAME, text)
    for path, content in files.items():
        with replacing(path) as f:
            f.write(content.encode())
    print(text)
    return int(bool(failed))


if __name__ == "__main__":
    ended = "interrupted; the same command goes on"
    sys.exit(run_reporting("bench/vocabulary", main, ended))
