"""Measure the size and the errors of CoreML shards, and the cost of exporting the consensus model.

    python bench/coreml.py [--artifact A] [--data DIR] [--large-only]

First every shape, chunking and quantisation against PyTorch (as fairway export-coreml --check),
then text written with n-gram drafts through the shards. Then random weights in the shapes of the
consensus model: seconds, peak memory of a process of its own, bytes, and the largest difference of
a logit. Shards are interpreted; nothing here runs on a Mac. Without arguments: the artifact and
the embedded text of `make run`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fairway.coreml.engine import (  # noqa: E402
    ShardChain,
    ShardEngine,
    interpreter_runner,
)
from fairway.coreml.export import (  # noqa: E402
    ExportOptions,
    ExportSource,
    export_shards,
    shards_bytes,
)
from fairway.coreml.graph import host_tables  # noqa: E402
from fairway.coreml.parity import (  # noqa: E402
    LONG,
    check_variants,
    export_variants,
    parity_table,
)
from fairway.coreml.ranges import measure_ranges  # noqa: E402
from fairway.decoding.drafters import NGramDrafter  # noqa: E402
from fairway.decoding.reader import Reader, decode_plainly  # noqa: E402
from fairway.decoding.speculative import Speculation  # noqa: E402
from fairway.decoding.strategies import Strategy  # noqa: E402
from fairway.scoring.memory import Memory  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from fairway.scoring.text import load_text  # noqa: E402
from train_gpt import GPT, PRESETS, Artifact, Config, initialise, list_shards, read_shard  # noqa: E402

PROMPT, WRITTEN, PROMPTS = 64, 128, 5  # tokens of a prompt, tokens written, number of prompts
LARGE = [
    ExportOptions("fp32", shapes="fixed"),
    ExportOptions("fp16", shapes="fixed"),
    ExportOptions("fp16"),
    ExportOptions("fp16", shapes="fixed", chunks=4),
    ExportOptions("fp16", quantise="int8", shapes="fixed"),
    ExportOptions("fp16", quantise="int4", shapes="fixed"),
    ExportOptions("fp16", quantise="palette4", shapes="fixed"),
]


# ==== AGAINST PYTORCH =============================================================================
def compare_all(source: ExportSource, folder: str) -> None:
    """Print the parity table of all variants, the range before the last norm, and drafted text."""
    text = load_text(EvalConfig(data_path=folder), source.artifact)
    training = np.array(read_shard(list_shards(Path(folder) / "*_train_*.bin")[0])[: 2 * LONG])
    variants = list(
        export_variants(ExportOptions(), len(source.model.passes(source.model.looping)))
    )
    with (
        tempfile.TemporaryDirectory() as out,
        tqdm(total=len(variants) * LONG, desc="comparing", leave=False, disable=None) as bar,
    ):
        report = check_variants(
            source,
            variants,
            text,
            training,
            Path(out) / "s",
            on_progress=bar.update,
            runner=interpreter_runner(),
        )
    Console(width=150).print(parity_table(report))
    r = measure_ranges(source.model, source.tables, training)["head.norm"]
    print(f"the RMS of positions before the last norm is {r.least_rms:.1f} to {r.rms:.1f}\n")
    write_texts(source, text.tokens, variants[0])


def write_texts(source: ExportSource, tokens: np.ndarray, options: ExportOptions) -> None:
    """Write greedy text after some prompts in PyTorch, and with drafts through the shards."""
    rows, greedy = [], Strategy("greedy")
    with tempfile.TemporaryDirectory() as out:
        export_shards(source, options, Path(out) / "s", np.zeros(0, int), lambda line: None)
        chain = ShardChain(Path(out) / "s", interpreter_runner())
        for at in np.linspace(0, len(tokens) - PROMPT, PROMPTS, dtype=int):
            prompt, texts = tokens[at : at + PROMPT].tolist(), []
            engines = (
                Reader(Memory(source.model)),
                Reader(ShardEngine(chain), most=chain.most),
            )
            for reader in engines:
                reader.last(prompt[:-1])
                rng, before = np.random.default_rng(0), chain.counts.calls
                if texts:
                    steps = Speculation(reader, prompt, greedy, rng, NGramDrafter(), 3)
                else:
                    steps = decode_plainly(reader, prompt, greedy, rng)
                texts.append([step.token for step, _ in zip(steps, range(WRITTEN), strict=False)])
            calls = chain.counts.calls - before
            rows.append((steps.stats.acceptance, WRITTEN / calls, texts[0] == texts[1]))
    print(
        f"n-gram drafts through {options.precision} shards, {WRITTEN} tokens after each of "
        f"{PROMPTS} prompts:"
    )
    for acceptance, per_call, same in rows:
        print(
            f"  {acceptance:4.0%} of guesses accepted, {per_call:.2f} tokens a call, same text as "
            f"PyTorch: {'yes' if same else 'NO'}"
        )


# ==== THE CONSENSUS MODEL =========================================================================
def large_source(folder: Path) -> ExportSource:
    """Return random weights whose layers add about as much as they get, and logits of about 1."""
    model = GPT(Config(**PRESETS["consensus"]))
    initialise(model, model.cfg)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".proj.weight"):  # these start at zero
                p += 0.02 * torch.randn(p.shape, generator=noise)
        model.tok_emb.weight *= 8
    (folder / "random").write_bytes(b"")
    return ExportSource(
        folder / "random",
        Artifact(model.cfg, {}, b"", {"tokenizer_sha256": ""}),
        model.eval(),
        host_tables(model),
    )


def measure_large(options: ExportOptions) -> dict:
    """Export the large model and call it once; this runs in a process of its own."""
    tokens = np.random.default_rng(0).integers(2, 1024, 600)
    with tempfile.TemporaryDirectory() as out:
        source, began = large_source(Path(out)), time.perf_counter()
        manifest = export_shards(source, options, Path(out) / "s", tokens, lambda line: None)
        seconds = time.perf_counter() - began
        chain = ShardChain(Path(out) / "s", interpreter_runner())
        logits = chain(chain.new_cache(), tokens[:4].tolist())
        called = time.perf_counter()
        chain(chain.new_cache(), tokens[:4].tolist())
        called = time.perf_counter() - called
        size = shards_bytes(Path(out) / "s", manifest)
    with torch.no_grad():
        wanted = Memory(source.model, 256).logits(torch.from_numpy(tokens[None, :4]))[0].numpy()
    return dict(
        seconds=seconds,
        peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        bytes=size,
        gap=float(np.abs(logits - wanted).max()),
        std=float(wanted.std()),
        call=called,
        weights=sum(p.numel() for p in source.model.parameters()),
    )


def compare_large() -> None:
    """Print one line for each of LARGE."""
    print(
        "\nrandom weights in the shapes of PRESET=consensus, context 256\n\n"
        f"{'':44}{'export s':>9}{'GiB':>7}{'MB':>8}{'ms a call':>11}{'logit gap':>11}"
        "  (deviation)"
    )
    for options in LARGE:
        fields = dict(
            precision=options.precision,
            quantise=options.quantise,
            shapes=options.shapes,
            chunks=options.chunks,
            context=256,
        )
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(fields)], capture_output=True, text=True
        )
        row = json.loads(done.stdout.splitlines()[-1])
        chunks = f"{options.chunks} shard" + "s"[: options.chunks > 1]
        name = f"{options.precision}, {options.shapes}, {chunks}, {options.quantise}"
        print(
            f"{name:44}{row['seconds']:9.1f}{row['peak']:7.2f}{row['bytes'] / 1e6:8.2f}"
            f"{1000 * row['call']:11.0f}{row['gap']:11.1e}  ({row['std']:.2f})",
            flush=True,
        )
    print(f"{row['weights']:,} weights")


def main() -> None:
    """Run all comparisons, or with --one a single large export."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default=str(ROOT / "final_model.int6.ptz"))
    parser.add_argument("--data", default=str(ROOT / "data" / "embedded"))
    parser.add_argument("--large-only", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure_large(ExportOptions(**json.loads(options.one)))))
        return
    if not options.large_only:
        compare_all(ExportSource.read(options.artifact), options.data)
    compare_large()


if __name__ == "__main__":
    main()
