"""What the CoreML shards of an artifact cost and miss, and what an export of the consensus model takes.

    python bench/coreml.py [--artifact A] [--data DIR] [--large-only]

First every shape, chunking and quantisation against PyTorch (as export_coreml.py --check), then the text that n-gram
drafts write through the shards, then random weights in the consensus model's shapes: seconds, largest memory of a
process of its own, bytes, and the largest difference of a logit. Shards are interpreted; nothing here runs on a Mac.
Without arguments: the artifact and the embedded text of `make run`.
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

from fairway.coreml.engine import Chain, Shards, interpreted  # noqa: E402
from fairway.coreml.export import Choice, Source, export, folder_bytes  # noqa: E402
from fairway.coreml.graph import host_tables  # noqa: E402
from fairway.coreml.parity import LONG, check, table_of, variants  # noqa: E402
from fairway.coreml.ranges import measure  # noqa: E402
from fairway.decoding.drafters import NGramDrafter  # noqa: E402
from fairway.decoding.reader import Reader, decode_plainly  # noqa: E402
from fairway.decoding.speculative import Speculation  # noqa: E402
from fairway.decoding.strategies import Strategy  # noqa: E402
from fairway.scoring.memory import Memory  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from fairway.scoring.text import load_text  # noqa: E402
from train_gpt import GPT, PRESETS, Artifact, Config, initialise, read_shard  # noqa: E402

PROMPT, WRITTEN, PLACES = 64, 128, 5  # tokens, and how many prompts
LARGE = [
    Choice("fp32", shapes="fixed"),
    Choice("fp16", shapes="fixed"),
    Choice("fp16"),
    Choice("fp16", shapes="fixed", chunks=4),
    Choice("fp16", quantise="int8", shapes="fixed"),
    Choice("fp16", quantise="int4", shapes="fixed"),
    Choice("fp16", quantise="palette4", shapes="fixed"),
]


# ==== WHAT THEY SAY ===================================================================================================
def compare_all(source: Source, folder: str) -> None:
    text = load_text(EvalConfig(data_path=folder), source.artifact)
    measured = read_shard(sorted(Path(folder).glob("*_train_*.bin"))[0])[: 2 * LONG]
    choices = list(variants(Choice(), len(source.model.passes(source.model.looping))))
    with (
        tempfile.TemporaryDirectory() as out,
        tqdm(total=len(choices) * LONG, desc="comparing", leave=False) as told,
    ):
        found = check(
            source,
            choices,
            text,
            np.array(measured),
            Path(out) / "s",
            told=told.update,
            runner=interpreted(),
        )
    Console(width=150).print(table_of(found))
    r = measure(source.model, source.tables, measured)["head.norm"]
    print(
        f"before the last norm positions have root mean squares of {r.least_rms:.1f} to {r.rms:.1f}\n"
    )
    write_some(source, text.tokens, choices[0])


def write_some(source: Source, tokens: np.ndarray, choice: Choice) -> None:
    """Greedy text after some places of the split, drafted and not, through the shards and in PyTorch."""
    rows, greedy = [], Strategy("greedy")
    with tempfile.TemporaryDirectory() as out:
        export(source, choice, Path(out) / "s", np.zeros(0, int), lambda line: None)
        chain = Chain(Path(out) / "s", interpreted())
        for at in np.linspace(0, len(tokens) - PROMPT, PLACES, dtype=int):
            prompt, texts = tokens[at : at + PROMPT].tolist(), []
            for reader in (Reader(Memory(source.model)), Reader(Shards(chain), most=chain.most)):
                reader.last(prompt[:-1])
                rng, before = np.random.default_rng(0), chain.used.calls
                steps = (
                    Speculation(reader, prompt, greedy, rng, NGramDrafter(), 3)
                    if texts
                    else decode_plainly(reader, prompt, greedy, rng)
                )
                texts.append([step.token for step, _ in zip(steps, range(WRITTEN), strict=False)])
            calls = chain.used.calls - before
            rows.append((steps.stats.acceptance, WRITTEN / calls, texts[0] == texts[1]))
    print(
        f"n-gram drafts through shards in {choice.precision}, {WRITTEN} tokens after each of {PLACES} prompts:"
    )
    for acceptance, per_call, same in rows:
        print(
            f"  {acceptance:4.0%} of guesses accepted, {per_call:.2f} tokens a call, text of PyTorch: "
            f"{'yes' if same else 'NO'}"
        )


# ==== THE CONSENSUS MODEL'S SHAPES ====================================================================================
def large_source(folder: Path) -> Source:
    """Random weights under which a layer adds about as much as it is given, and logits deviate by about 1."""
    model = GPT(Config(**PRESETS["consensus"]))
    initialise(model, model.cfg)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".proj.weight"):  # which start at zero
                p += 0.02 * torch.randn(p.shape, generator=noise)
        model.tok_emb.weight *= 8
    (folder / "random").write_bytes(b"")
    return Source(
        folder / "random",
        Artifact(model.cfg, {}, b"", {"tokenizer_sha256": ""}),
        model.eval(),
        host_tables(model),
    )


def one_large(choice: Choice) -> dict:
    """An export and a call of it, in a process of its own."""
    tokens = np.random.default_rng(0).integers(2, 1024, 600)
    with tempfile.TemporaryDirectory() as out:
        source, began = large_source(Path(out)), time.perf_counter()
        manifest = export(source, choice, Path(out) / "s", tokens, lambda line: None)
        seconds, chain = time.perf_counter() - began, Chain(Path(out) / "s", interpreted())
        logits = chain(chain.stream(), tokens[:4].tolist())
        called = time.perf_counter()
        chain(chain.stream(), tokens[:4].tolist())
        called = time.perf_counter() - called
        size = folder_bytes(Path(out) / "s", manifest)
    with torch.no_grad():
        wanted = Memory(source.model, 256).logits(torch.from_numpy(tokens[None, :4]))[0].numpy()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return dict(
        seconds=seconds,
        peak=peak,
        bytes=size,
        gap=float(np.abs(logits - wanted).max()),
        std=float(wanted.std()),
        call=called,
        weights=sum(p.numel() for p in source.model.parameters()),
    )


def compare_large() -> None:
    print(
        "\nrandom weights in the shapes of PRESET=consensus, context 256\n\n"
        f"{'':44}{'export s':>9}{'GiB':>7}{'MB':>8}{'ms a call':>11}{'logit gap':>11}  (deviation)"
    )
    for choice in LARGE:
        fields = dict(
            precision=choice.precision,
            quantise=choice.quantise,
            shapes=choice.shapes,
            chunks=choice.chunks,
            context=256,
        )
        done = subprocess.run(
            [sys.executable, __file__, "--one", json.dumps(fields)], capture_output=True, text=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        name = f"{choice.precision}, {choice.shapes}, {choice.chunks} in all, {choice.quantise}"
        print(
            f"{name:44}{found['seconds']:9.1f}{found['peak']:7.2f}{found['bytes'] / 1e6:8.2f}"
            f"{1000 * found['call']:11.0f}{found['gap']:11.1e}  ({found['std']:.2f})",
            flush=True,
        )
    print(f"{found['weights']:,} weights")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default=str(ROOT / "final_model.int6.ptz"))
    parser.add_argument("--data", default=str(ROOT / "data" / "embedded"))
    parser.add_argument("--large-only", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.one:
        print(json.dumps(one_large(Choice(**json.loads(given.one)))))
        return
    if not given.large_only:
        compare_all(Source.read(given.artifact), given.data)
    compare_large()


if __name__ == "__main__":
    main()
