"""Measure bits an entry of each correction codec, and what a table is worth once it is charged.

    python bench/correction.py [--artifact A] [--val GLOB] [--rows 62000000]

Synthetic entries: 908 thousand, drawn evenly from 62 million rows, V = 1024, for the codecs that do
not use the model; --rows scales both. Real entries: all targets of a split to which an artifact
gives less than 2^-10, and less than 2^-13. Without --artifact, PRESET=cpu is trained for a minute.

Floors. varint: the sum of its code lengths; rice: entries at random positions and log2 V bits a
token; modelled: the sum of -log2 of its own chances. `flags` is the entropy of the flags, in bits
an entry, if only the octave of the tail is known: a static bound, which a codec that sees bursts
may pass. The table is made from the text that it corrects, so no oracle_bpb is a score. The last
line is JSON.
"""

import argparse
import json
import math
import sys
import tempfile
import time

import numpy as np
import torch
from short_run import EMBEDDED, train_for_a_minute
from tqdm import tqdm

import train_gpt
from fairway.artifact_reader import read_artifact
from fairway.correction import table
from fairway.correction.entries import Entries, ModelView, position_entropy
from fairway.correction.oracle import model_view, view_scorer
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text

ENTRIES = 907_927  # of the table that #232 published
ROWS = 62_021_845  # targets of the challenge's validation split
BITS = (10, 13)  # real entries cost more than this


def static_flag_bits(entries: Entries, view: ModelView) -> float:
    """Return bits an entry of the flags, with one constant rate for each octave of the tail."""
    octaves = np.frexp(np.maximum(view.tail, 2.0**-30))[1]
    listed = octaves[entries.positions]
    sizes = {o: int((octaves == o).sum()) for o in np.unique(octaves)}
    bits = sum(position_entropy(int((listed == o).sum()), n) for o, n in sizes.items())
    return bits / len(entries.positions)


def timed(function):
    """Return the result of a function and the seconds that it took."""
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began


def measure(
    label: str, entries: Entries, view: ModelView, logp: np.ndarray | None, size: int
) -> list[dict]:
    """Print and return a row of figures for each codec that can use this view."""
    rows, count = [], len(entries.positions)
    for name, codec in table.CODECS.items():
        if name == "modelled" and view.tail is None:
            continue
        few = Entries(entries.positions[:9], entries.tokens[:9])
        codec.decode(codec.encode(few, view), view)  # compiles, and caches the distributions
        payload, encode = timed(lambda codec=codec: codec.encode(entries, view))
        back, decode = timed(lambda codec=codec, payload=payload: codec.decode(payload, view))
        assert all(np.array_equal(a, b) for a, b in zip(entries, back, strict=True)), (
            f"{name} is not lossless"
        )
        floor, bits = codec.floor_bits(entries, view), 8 * len(payload)
        row = dict(
            source=label,
            codec=name,
            rows=view.rows,
            entries=count,
            bytes=len(payload),
            bits_an_entry=bits / count,
            floor=floor / count,
            over_floor=bits / floor - 1,
            encode_seconds=encode,
            decode_seconds=decode,
        )
        rows.append(row)
        row["of_varint"] = len(payload) / rows[0]["bytes"]
        line = (
            f"{label:20}{name:9}{count:>8}{len(payload) / count:>9.3f}{bits / count:>9.3f}"
            f"{floor / count:>9.3f}{100 * row['over_floor']:>+8.2f} %{row['of_varint']:>8.4f}"
            f"{encode:>8.2f}{decode:>8.2f}"
        )
        if logp is not None:
            cost = table.charge(logp, entries, table.file_size(entries, view, name), size)
            row |= cost._asdict() | dict(saved_an_entry=cost.saved_bits / count, text_bytes=size)
            line += f"{row['saved_an_entry']:>8.2f}{cost.oracle_bpb:>9.4f}{cost.charged_bpb:>9.4f}"
        print(line, flush=True)
    return rows


def measure_synthetic(rows: int) -> list[dict]:
    """Measure entries that are drawn evenly from `rows` rows."""
    rng = np.random.default_rng(0)
    positions = np.sort(
        rng.choice(rows, max(1, round(rows * ENTRIES / ROWS)), replace=False, shuffle=False)
    )
    entries = Entries(positions, rng.integers(0, 1024, len(positions)))
    return measure("synthetic, even", entries, ModelView(rows, 1024), None, 0)


def progress_bar(label: str, rows: int) -> tqdm:
    """Return a progress bar that shows after 3 s, and only on a terminal."""
    return tqdm(
        total=rows, desc=label, unit="tok", unit_scale=True, delay=3, leave=False, disable=None
    )


def measure_real(path: str, pattern: str) -> list[dict]:
    """Measure the targets of a split that an artifact predicts worst."""
    artifact, rows, device = read_artifact(path), [], torch.device("cpu")
    text = load_text(EvalConfig(val_files=pattern), artifact)
    neural = view_scorer(train_gpt.build_model(artifact), train_gpt.Runtime(0, 1, device, "cpu"))
    columns = columns_in_memory(len(text.sizes), {"logp": "f8"})
    targets = text.tokens[1:].astype(np.int64)
    with progress_bar("scoring", len(targets)) as bar:
        neural.fill(text.tokens, columns, on_progress=lambda scored, _: bar.update(len(scored)))
    logp, plain = columns["logp"], text.bpb(columns["logp"])
    print(
        f"{len(logp)} real targets, {text.bytes} bytes, {plain:.6f} bits per byte without a table",
        flush=True,
    )
    for bits in BITS:
        listed = np.flatnonzero(logp < -bits * math.log(2))
        if not len(listed):
            raise train_gpt.UserError(
                f"no target costs over {bits} bits: nothing to measure; set --val to more text"
            )
        # Distributions are cached, so that the clock sees codecs alone: `measure` asks first.
        with progress_bar("tails", len(targets)) as bar:
            view = model_view(neural, text.tokens, 2.0**-bits, bar.update).cached_for(listed)
        entries = Entries(listed, targets[listed])
        measured = measure(f"real, over {bits} bits", entries, view, logp, text.bytes)
        static = static_flag_bits(entries, view)
        print(
            f"{'':20}flags {static:.3f} bits an entry given the tail's octave, "
            f"{position_entropy(len(listed), view.rows) / len(listed):.3f} given nothing",
            flush=True,
        )
        pay = {
            name: len(table.choose_entries(logp, targets, view, name).positions)
            for name in table.CODECS
        }
        print(
            f"{'':20}entries that pay for themselves: "
            + ", ".join(f"{n} {c}" for n, c in pay.items()),
            flush=True,
        )
        rows += [
            row | dict(plain_bpb=plain, static_flags=static, paying=pay[row["codec"]])
            for row in measured
        ]
    return rows


def measure_application() -> dict:
    """Measure the time of a million entries on four million rows."""
    rng = np.random.default_rng(0)
    logp, targets = -20 * rng.random(4_000_000), rng.integers(0, 1024, 4_000_000).astype(np.uint16)
    entries = Entries(np.arange(0, 4_000_000, 4), targets[::4].astype(np.int64))
    _, seconds = timed(lambda: table.corrected_logp(logp, entries, targets))
    print(
        f"{len(entries.positions)} entries applied to {len(logp)} rows in {seconds:.3f} s",
        flush=True,
    )
    return dict(source="apply", rows=len(logp), entries=len(entries.positions), seconds=seconds)


def main() -> None:
    """Print a table of all measurements, and then JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--artifact", default="", help="an artifact of train_gpt.py; unset: trained for a minute"
    )
    parser.add_argument("--val", default=EMBEDDED, help="pattern of shards")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the synthetic table")
    args = parser.parse_args()
    print(
        f"{'source':20}{'codec':9}{'entries':>8}{'bytes':>9}{'bits':>9}{'floor':>9}{'over':>10}"
        f"{'varint':>8}{'encode':>8}{'decode':>8}{'saved':>8}{'oracle':>9}{'charged':>9}",
        flush=True,
    )
    rows = measure_synthetic(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        artifact = args.artifact
        if not artifact:
            trained = train_for_a_minute(folder, "--artifact")
            artifact = str(trained / "final_model.int6.ptz")
        rows += measure_real(artifact, args.val)
    rows.append(measure_application())
    print(json.dumps({"bench": "correction", "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    try:
        main()
    except train_gpt.UserError as e:
        sys.exit(f"correction: error: {e}")
