"""Convert an artifact to CoreML shards for Apple's Neural Engine, and check them.

Conversion works on any machine. --check interprets the saved shards and compares them with
PyTorch: every shape, chunking and quantisation, or the one whose options are given. The shards
take and return keys and values, for 1 to --tokens tokens a call; the program that runs them does
the embedding, the slots and the mask (docs/COREML.md). For fp16, the export first measures
activations on training text; values that would overflow are scaled, or the export is refused.

Example:
    fairway export-coreml --artifact final_model.int6.ptz --quantise artifact --check
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairway.command_line import UsageError, check_writable, json_bytes, progress_bar

if TYPE_CHECKING:
    import numpy as np

    from fairway.coreml.export import ExportOptions, ExportSource
    from fairway.decoding.writing import Writer

DATA = Path(__file__).resolve().parents[2] / "data" / "embedded"
MIN_TEXT = 256  # tokens; the ranges of a shorter text say little about another text
MODES = ("check", "audit", "bench")
PROMPT_LENGTHS, ROUNDS = (1, 16, 100, 400, 800), 3  # of --bench
# The fields of ExportOptions: type and help. The defaults stay in that class, which imports torch.
EXPORT_OPTIONS: dict[str, tuple[type, str]] = {
    "precision": (str, "of numbers between operations: fp16 or fp32 (default: fp16)"),
    "quantise": (
        str,
        "how weights are stored: none, artifact (int8, the artifact's own codes), int8 (a scale a "
        "channel), int8-tensor (a scale a tensor), int4 (a scale for 32 weights), palette6, "
        "palette4, palette3 or palette2 (64, 16, 8 or 4 values for 32 channels) (default: none)",
    ),
    "shapes": (
        str,
        "how calls of 1 to --tokens tokens are accepted: fixed, range, enumerated or "
        "multifunction; docs/COREML.md says which run on the Neural Engine (default: "
        "multifunction)",
    ),
    "tokens": (int, "tokens in one call at most, 1 to 4 (default: 4)"),
    "chunks": (int, "number of shards that the layers are cut into (default: 1)"),
    "layers_per_shard": (int, "layers in each shard, instead of --chunks"),
    "vocab_shards": (
        int,
        "number of shards that the vocabulary is cut into (default: at most 4096 tokens in each)",
    ),
    "context": (int, "tokens that a token sees, itself included (default: as in training)"),
    "states": (
        int,
        "tensors that a shard keeps its keys and values in, 1 or 2; 0: they are inputs and "
        "outputs (default: 0)",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of this verb."""
    add = parser.add_argument
    add(
        "--artifact",
        default="final_model.int6.ptz",
        metavar="FILE",
        help="the model (default: %(default)s)",
    )
    add("--out", metavar="DIR", help="folder of the shards (default: coreml)")
    add(
        "--data",
        default=str(DATA),
        metavar="DIR",
        help="folder of text shards: activations are measured on training text, shards compared "
        "on validation text (default: the embedded corpus)",
    )
    add = parser.add_argument_group("options of the export").add_argument
    for name, (kind, text) in EXPORT_OPTIONS.items():
        add(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar="N" if kind is int else "NAME",
            help=text,
        )
    add = parser.add_argument_group("instead of an export").add_argument
    add(
        "--check",
        action="store_true",
        help="export and compare with PyTorch: all variants, or the one whose options are given, "
        "which is kept in --out if it passes; exit code 1 if one misses a limit",
    )
    add(
        "--audit",
        action="store_true",
        help="on a Mac: list the operations of --out that do not run on the Neural Engine",
    )
    add(
        "--bench",
        action="store_true",
        help="measure the tokens a second of --out, plain and speculative, after prompts of 1 to "
        "800 tokens; away from a Mac the interpreter runs, and its times say nothing about one",
    )
    add("--json", metavar="FILE", help="write the report of --check, --audit or --bench")


def run(options: argparse.Namespace) -> int:
    """Check that the options go together, then export, check, audit or time the shards."""
    modes = [name for name in MODES if getattr(options, name)]
    if len(modes) > 1:
        raise UsageError(f"--{' and --'.join(modes)} are both given; leave one out")
    if options.json and not modes:
        raise UsageError("--json goes with --check, --audit or --bench; leave it out")
    check_writable("--json", options.json)
    changed = {n: v for n in EXPORT_OPTIONS if (v := getattr(options, n)) is not None}
    if options.check and options.out and not changed:
        raise UsageError(
            "--out does nothing with a --check of all variants; leave it out, or name one variant "
            "by its options"
        )
    options.out = options.out or "coreml"
    if options.audit or options.bench:
        if changed:
            raise UsageError(
                f"--{modes[0]} reads an earlier export; leave the options of an export out"
            )
        return audit_folder(options) if options.audit else bench_folder(options)
    with removing_partial_files():
        return convert(options, changed)


def convert(options: argparse.Namespace, changed: dict[str, Any]) -> int:
    """Export once, or export and check; `changed` holds the export options that were set."""
    from fairway.coreml.export import ExportOptions, ExportSource, check_replaceable
    from train_gpt import UserError

    try:
        export_options = ExportOptions(**changed)
    except UserError as e:
        raise UsageError(str(e)) from None
    if changed or not options.check:  # a check of all variants keeps none of them
        check_replaceable(Path(options.out).resolve())
    source = ExportSource.read(options.artifact)
    if options.check:
        return check_shards(source, export_options, bool(changed), options)
    return export_once(source, export_options, options)


@contextlib.contextmanager
def removing_partial_files() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that cleanup code runs and no half-written folder stays."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_line(line: str) -> None:
    """Print to stdout at once, above a progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(line)
    sys.stdout.flush()


def save_report(path: str | None, report: dict[str, Any]) -> None:
    """Write the report as JSON, unless no file was named."""
    from train_gpt import replacing

    if path:
        with replacing(path) as f:
            f.write(json_bytes(report))


# ==== TEXT ========================================================================================
def training_text(folder: str, vocab_size: int) -> np.ndarray:
    """Return tokens to measure activations on, from a training shard: never the scored text."""
    import numpy as np

    from fairway.coreml.parity import LONG
    from train_gpt import UserError, list_shards, read_shard

    paths = list_shards(Path(folder) / "*_train_*.bin")
    if not paths:
        raise UserError(
            f"no training shards (*_train_*.bin) in {folder}; run `make data`, or set --data"
        )
    text = np.array(read_shard(paths[0], vocab_size)[: 2 * LONG])
    if len(text) < MIN_TEXT:
        raise UserError(
            f"{paths[0]} holds {len(text)} tokens; activations are measured on at least {MIN_TEXT}"
        )
    return text


# ==== MODES =======================================================================================
def export_once(
    source: ExportSource, export_options: ExportOptions, options: argparse.Namespace
) -> int:
    """Export to --out and print one line about it."""
    import numpy as np

    from fairway.coreml.export import export_shards, shards_bytes
    from fairway.coreml.residency import doubts_about

    cfg, text = source.model.cfg, np.zeros(0, int)
    if export_options.precision == "fp16":
        text = training_text(options.data, cfg.vocab_size)
    passes = len(source.model.passes(source.model.looping))
    total = len(export_options.cuts(passes)) + len(export_options.split(cfg.vocab_size)) - 2
    with progress_bar(total, "exporting", "shard") as bar:
        manifest = export_shards(source, export_options, options.out, text, print_line, bar.update)
    shards, functions = manifest.interfaces(), manifest.functions()
    print_line(
        f"exported:{options.out} shards:{len(shards)} ({', '.join(shards)}) "
        f"functions:{','.join(functions)} context:{manifest.dims.slots} "
        f"precision:{export_options.precision} quantise:{export_options.quantise} "
        f"bytes:{shards_bytes(Path(options.out), manifest)}"
    )
    for doubt in doubts_about(Path(options.out), manifest):
        print_line(f"may leave the Neural Engine: {doubt}")
    return 0


def check_shards(
    source: ExportSource, export_options: ExportOptions, one: bool, options: argparse.Namespace
) -> int:
    """Check one variant, and keep it in --out if it passes, or check all of them."""
    import shutil
    import tempfile

    from rich.console import Console

    from fairway.coreml.export import replacing_folder
    from fairway.coreml.parity import LONG, check_variants, export_variants, parity_table
    from fairway.scoring.settings import EvalConfig
    from fairway.scoring.text import load_text

    passes = len(source.model.passes(source.model.looping))
    variants = [export_options] if one else list(export_variants(export_options, passes))
    config = EvalConfig(checkpoint=str(source.path), data_path=options.data)
    text = load_text(config, source.artifact)
    training = training_text(options.data, source.model.cfg.vocab_size)
    total = len(variants) * min(LONG, len(text.sizes))
    with (
        tempfile.TemporaryDirectory() as folder,
        progress_bar(total, "comparing", "tok") as bar,
    ):
        path = Path(folder) / "variant"
        report = check_variants(source, variants, text, training, path, print_line, bar.update)
        if one and report["passed"]:
            with replacing_folder(Path(options.out).resolve()) as out:
                shutil.copytree(path, out, dirs_exist_ok=True)
            print_line(f"kept:{options.out}")
    Console(width=None if sys.stdout.isatty() else 165).print(parity_table(report))
    for row in report["variants"]:
        for failure in row["failures"]:
            print_line(f"FAIL: {row['name']}: {failure}")
    print_line(f"parity:{'passed' if report['passed'] else 'FAILED'} variants:{len(variants)}")
    save_report(options.json, report)
    return 0 if report["passed"] else 1


def audit_folder(options: argparse.Namespace) -> int:
    """Print the devices of each function, and the operations outside the Neural Engine."""
    from fairway.coreml.mac import audit_devices, require_mac
    from fairway.coreml.manifest import read_shard_folder

    require_mac("--audit")
    functions = list(audit_devices(read_shard_folder(options.out)))
    for one in functions:
        devices = ", ".join(f"{count} on {device}" for device, count in one["devices"].items())
        print_line(f"{one['shard']} {one['function']}: {devices}")
        for op in one["elsewhere"]:
            print_line(
                f"  {op['device']:6} {op['operation']:30} {op['output']:40} "
                f"cost {op['cost'] or 0:.5f}"
            )
    save_report(options.json, dict(folder=options.out, functions=functions))
    return 0


def bench_row(writer: Writer, prompt: list[int], draft: str, tokens: int) -> dict[str, Any]:
    """Return speed and acceptance of `tokens` greedy tokens after a prompt, median of ROUNDS."""
    import statistics
    import time

    from fairway.decoding.strategies import Strategy

    most, rows = max(1, writer.engines.most - 1), []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        steps, stats = writer.steps(prompt, Strategy("greedy"), 0, draft, most)
        next(steps)  # a drafter settles several tokens at once: the first round is the prompt's
        prompt_s = time.perf_counter() - began
        calls, before = writer.engines.calls, stats.tokens if stats else 1
        began = time.perf_counter()
        for _ in range(tokens):
            next(steps)
        seconds = time.perf_counter() - began
        made = (stats.tokens if stats else 1 + tokens) - before
        rows.append((made / seconds, prompt_s, (writer.engines.calls - calls) / max(made, 1)))
    rate, prompt_s, calls = map(statistics.median, zip(*rows, strict=True))
    row = dict(prompt=len(prompt), draft=draft, tokens_a_second=rate, prompt_seconds=prompt_s)
    row |= dict(calls_a_token=calls, acceptance=stats.acceptance if stats else None)
    return row | dict(draft_share=stats.draft_seconds / stats.seconds if stats else 0.0)


def bench_folder(options: argparse.Namespace) -> int:
    """Measure greedy decoding after prompts of several lengths, without drafts and with n-grams.

    On a Mac CoreML runs the shards, elsewhere the interpreter does, whose times say nothing about a
    device; calls and acceptance are the same there.
    """
    from fairway.coreml.engine import connect_shards
    from fairway.decoding.writing import Writer

    on_mac = sys.platform == "darwin"
    writer = Writer(options.artifact, connect=connect_shards(options.out, options.artifact))
    text = training_text(options.data, writer.model.cfg.vocab_size).tolist()
    drafts = ("none", "ngram") if writer.engines.most > 1 else ("none",)
    rows, runtime = [], "CoreML" if on_mac else "interpreter"
    print_line(f"runtime:{runtime} tokens a call: {writer.engines.most}")
    with progress_bar(len(PROMPT_LENGTHS) * len(drafts), "timing", "row") as bar:
        for length in PROMPT_LENGTHS:
            for draft in drafts:
                row = bench_row(writer, text[:length], draft, 64 if on_mac else 16)
                rows.append(row)
                bar.update(1)
                accepted = "" if row["acceptance"] is None else f" accepted:{row['acceptance']:.0%}"
                print_line(
                    f"prompt:{length} draft:{draft} tok/s:{row['tokens_a_second']:.1f} "
                    f"prompt_s:{row['prompt_seconds']:.2f} calls/tok:{row['calls_a_token']:.2f} "
                    f"drafting:{row['draft_share']:.0%}{accepted}"
                )
    save_report(options.json, dict(folder=options.out, runtime=runtime, rows=rows))
    return 0
