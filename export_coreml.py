"""An artifact as CoreML shards for Apple's Neural Engine.

    python export_coreml.py                                    final_model.int6.ptz -> coreml/, fp16, of 1 and 4 tokens
    python export_coreml.py --chunks 2 --quantise int8         two shards of layers, int8 weights
    python export_coreml.py --check --json parity.json         every shape, chunking and quantisation against PyTorch
    python export_coreml.py --check --shapes range --chunks 2  this one alone, which is kept in --out if it passes
    python export_coreml.py --audit                            on a Mac: which operations run on which device
    python export_coreml.py --bench                            on a Mac: tokens a second

Shards take and give keys and values, one call for 1 to --tokens tokens; whoever runs them does the embedding, the slots
and the mask (docs/COREML.md). Converted on any machine; checked by interpreting what was saved. Before fp16, values are
measured on training text: those that would overflow are scaled, or refused.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from tqdm import tqdm

from fairway.coreml.export import (
    QUANTISATIONS,
    Choice,
    Source,
    export,
    folder_bytes,
    need_ours,
    replacing_folder,
)
from fairway.coreml.layout import SHAPES
from fairway.coreml.mac import audited, need_mac, timed
from fairway.coreml.manifest import DTYPES, read_folder
from fairway.coreml.parity import LONG, check, table_of, variants
from fairway.coreml.shard_engines import connect_shards
from fairway.decoding.strategies import Strategy
from fairway.decoding.writing import Writer
from fairway.options import Parser, need_place, save_json
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text, load_text
from train_gpt import UserError, need, read_shard

HERE = Path(__file__).resolve().parent
LEAST_TEXT = 256  # tokens
HELP = {
    "precision": f"of numbers between operations: {', '.join(DTYPES)}",
    "quantise": "how weights are kept: "
    + "; ".join(f"{n}, {words}" for n, (_, _, words) in QUANTISATIONS.items()),
    "shapes": f"how calls of 1 to --tokens tokens are taken: {', '.join(SHAPES)} (docs/COREML.md says which "
    "run on the Neural Engine)",
    "tokens": "of a call at most, 1 to 4",
    "chunks": "shards that the layers are cut into",
    "layers_per_shard": "layers of each shard, in place of --chunks",
    "vocab_shards": "shards that the vocabulary is cut into (default: of at most 4096 tokens)",
    "context": "tokens that a prediction looks back on (default: as in training)",
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--artifact",
        default="final_model.int6.ptz",
        metavar="FILE",
        help="the model (default: %(default)s)",
    )
    add("--out", metavar="DIR", help="where shards are written (default: coreml)")
    add(
        "--data",
        default=str(HERE / "data" / "embedded"),
        metavar="DIR",
        help="folder of text shards: training "
        "text to measure activations on, validation text to compare on (default: the embedded corpus)",
    )
    what = parser.add_argument_group("what the shards are")
    for f in fields(Choice):
        kind, shown = type(f.default), f" (default: {f.default})" if f.default else ""
        what.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "NAME",
            help=HELP[f.name] + shown,
        )
    then = parser.add_argument_group("in place of an export")
    add = then.add_argument
    add(
        "--check",
        action="store_true",
        help="export and compare with PyTorch: all variants, or the one whose options "
        "are given, which is kept in --out if it passes; exit status 1 where one is too far off",
    )
    add("--json", metavar="FILE", help="write what --check, --audit or --bench found")
    add(
        "--audit",
        action="store_true",
        help="on a Mac: operations of --out that do not run on the Neural Engine",
    )
    add(
        "--bench",
        action="store_true",
        help="on a Mac: tokens a second of --out, plain and speculative",
    )
    return parser.parse_args(arguments)


def choice_of(given: argparse.Namespace) -> tuple[Choice, bool]:
    """What the export is to be, and whether any of it was asked for."""
    asked = {
        f.name: getattr(given, f.name) for f in fields(Choice) if getattr(given, f.name) is not None
    }
    return Choice(**asked), bool(asked)


def say(line: str) -> None:
    print(line, flush=True)


def bar(total: int, what: str, unit: str) -> tqdm:
    """Its ETA counts from the start: exporting comes in lumps."""
    every = 0.5 if sys.stderr.isatty() else 10  # seconds: a log is not a screen
    return tqdm(
        total=total, desc=what, unit=unit, delay=1, leave=False, smoothing=0, mininterval=every
    )


# ==== TEXT ============================================================================================================
def training_text(folder: str, vocab_size: int) -> np.ndarray:
    """What activations are measured on; never what is scored."""
    paths = sorted(Path(folder).glob("*_train_*.bin"))
    need(paths, f"no training shards (*_train_*.bin) in {folder}; run `make data`, or set --data")
    text = np.array(read_shard(paths[0], vocab_size)[: 2 * LONG])
    need(
        len(text) >= LEAST_TEXT,
        f"{paths[0]} holds {len(text)} tokens; values are measured on at least {LEAST_TEXT}",
    )
    return text


def validation_text(source: Source, folder: str) -> Text:
    return load_text(EvalConfig(checkpoint=str(source.path), data_path=folder), source.artifact)


# ==== WHAT IT DOES ====================================================================================================
def export_once(source: Source, choice: Choice, given: argparse.Namespace) -> int:
    text = (
        training_text(given.data, source.model.cfg.vocab_size)
        if choice.precision == "fp16"
        else np.zeros(0, int)
    )
    passes = len(source.model.passes(source.model.looping))
    total = len(choice.cuts(passes)) + len(choice.split(source.model.cfg.vocab_size)) - 2
    with bar(total, "exporting", "shard") as progress:
        manifest = export(source, choice, given.out, text, progress.write, progress.update)
    shards = manifest.interfaces()
    say(
        f"exported:{given.out} shards:{len(shards)} ({', '.join(shards)}) functions:{','.join(manifest.functions())} "
        f"context:{manifest.dims.slots} precision:{choice.precision} quantise:{choice.quantise} "
        f"bytes:{folder_bytes(Path(given.out), manifest)}"
    )
    return 0


def check_all(source: Source, choice: Choice, asked: bool, given: argparse.Namespace) -> int:
    choices = (
        [choice]
        if asked
        else list(variants(choice, len(source.model.passes(source.model.looping))))
    )
    text, measured = (
        validation_text(source, given.data),
        training_text(given.data, source.model.cfg.vocab_size),
    )
    total = len(choices) * min(LONG, len(text.sizes))
    with tempfile.TemporaryDirectory() as folder, bar(total, "comparing", "tok") as progress:
        variant = Path(folder) / "variant"
        found = check(source, choices, text, measured, variant, progress.write, progress.update)
        if asked and found["passed"]:
            with replacing_folder(Path(given.out).resolve()) as out:
                shutil.copytree(variant, out, dirs_exist_ok=True)
            progress.write(f"kept:{given.out}")
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table_of(found))
    for row in found["variants"]:
        for failure in row["failures"]:
            say(f"FAIL: {row['name']}: {failure}")
    say(f"parity:{'passed' if found['passed'] else 'FAILED'} variants:{len(choices)}")
    save_json(given.json, found)
    return 0 if found["passed"] else 1


def audit(given: argparse.Namespace) -> int:
    need_mac("--audit")
    found = list(audited(read_folder(given.out)))
    for one in found:
        say(
            f"{one['shard']} {one['function']}: "
            + ", ".join(f"{n} on {d}" for d, n in one["devices"].items())
        )
        for op in one["elsewhere"]:
            say(
                f"  {op['device']:6} {op['operation']:30} {op['output']:40} cost {op['cost'] or 0:.5f}"
            )
    save_json(given.json, dict(folder=given.out, functions=found))
    return 0


def written(writer: Writer, prompt: list[int], draft: str, tokens: int = 64) -> int:
    steps, _ = writer.steps(prompt, Strategy("greedy"), 0, draft)
    return sum(1 for _ in islice(steps, tokens))


def bench(given: argparse.Namespace) -> int:
    """Plain, and with n-gram drafts, after the same prompt."""
    need_mac("--bench")
    writer = Writer(given.artifact, connect=connect_shards(given.out, given.artifact))
    found = {}
    prompt = writer.tokens(b"The people of the United States")
    for draft in ("none", "ngram"):
        rates = timed(lambda draft=draft: written(writer, prompt, draft))
        found[draft] = dict(
            median=statistics.median(rates), least=min(rates), most=max(rates), runs=len(rates)
        )
        say(
            f"{draft}: {found[draft]['median']:.1f} tokens/s ({min(rates):.1f} to {max(rates):.1f}, {len(rates)} runs)"
        )
    save_json(given.json, dict(folder=given.out, **found))
    return 0


def run(given: argparse.Namespace) -> int:
    verbs = [name for name in ("check", "audit", "bench") if getattr(given, name)]
    need(len(verbs) < 2, f"--{' and --'.join(verbs)} are both given; leave one out")
    need(verbs or not given.json, "--json goes with --check, --audit or --bench; leave it out")
    need_place(given.json)
    choice, asked = choice_of(given)
    need(
        asked or not given.check or not given.out,
        "--out does nothing with a --check of all variants; leave it out, "
        "or name one by its options",
    )
    given.out = given.out or "coreml"
    if given.audit or given.bench:
        need(
            not asked,
            f"--{verbs[0]} looks at what was exported; leave the options of an export out",
        )
        return audit(given) if given.audit else bench(given)
    if asked or not given.check:  # else nothing is kept
        need_ours(Path(given.out).resolve())
    source = Source.read(given.artifact)
    return (
        check_all(source, choice, asked, given)
        if given.check
        else export_once(source, choice, given)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parsed(arguments))
    except KeyboardInterrupt:
        print("export_coreml: interrupted; what was there before is untouched", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        print(f"export_coreml: error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of a terminal that cannot show every name
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is half-written goes
    sys.exit(main())
