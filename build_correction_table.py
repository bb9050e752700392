"""Build a table of the tokens that a model predicts worst, and print what it saves and costs.

The table is made from the text that it corrects. So oracle_bpb is no score, and charged_bpb, which
adds every bit of the table, mostly shows that it does not pay. docs/LEGALITY.md says why no record
may use it.

Example:
  python build_correction_table.py --artifact final_model.int6.ptz --attach
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, UsageError, check_writable, run_reporting
from fairway.correction.oracle import build_table, default_budget, view_scorer
from fairway.correction.table import CODECS, NOTICE, attach, charge, table_bytes, write_table
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import code_sizes, counted_code_bytes
from fairway.scoring.text import load_text
from train_gpt import Runtime, best_device, build_model, file_sha256


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = Parser(prog="build_correction_table.py", description=__doc__)
    parser.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    parser.add_argument(
        "--val", default="", metavar="GLOB", help="shards (default: those of eval_final.py)"
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=-1,
        metavar="BYTES",
        help="bytes of the table; 0: only entries that save more than they cost "
        "(default: a byte for each 25 tokens)",
    )
    parser.add_argument("--codec", choices=CODECS, default="modelled", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", help="write the table to this file")
    parser.add_argument(
        "--attach",
        action="store_true",
        help="write it next to the artifact, where eval_final.py finds it with USE_CORRECTION=1; "
        "both and the code must fit 16,000,000 bytes",
    )
    options = parser.parse_args(arguments)
    if options.budget < -1:
        raise UsageError(f"--budget is {options.budget}; it must be a number of bytes, or 0")
    check_writable("--out", options.out)
    return options


def progress_bar(label: str, rows: int) -> tqdm:
    """Return a progress bar that shows after 3 s, and only on a terminal."""
    return tqdm(
        total=rows, desc=label, unit="tok", unit_scale=True, delay=3, leave=False, disable=None
    )


def build(options: argparse.Namespace) -> dict[str, Any]:
    """Build the table, write it where the options say, and return its figures."""
    cfg = EvalConfig(checkpoint=options.artifact, val_files=options.val)
    artifact, sha256 = read_artifact(cfg.checkpoint), bytes.fromhex(file_sha256(cfg.checkpoint))
    text, device = load_text(cfg, artifact), torch.device(best_device())
    neural = view_scorer(build_model(artifact, device), Runtime(0, 1, device, device.type))
    rows = len(text.tokens) - 1
    columns = columns_in_memory(rows, {"logp": "f8"})
    budget = {-1: default_budget(rows), 0: None}.get(options.budget, options.budget)
    with progress_bar("scoring", rows) as bar:
        neural.fill(text.tokens, columns, on_progress=lambda scored, _: bar.update(len(scored)))
    logp = columns["logp"]
    with progress_bar("tails", rows) as bar:
        table, entries = build_table(
            neural, text.tokens, logp, options.codec, budget, sha256, bar.update
        )
    size, count = len(table_bytes(table)), len(entries.tokens)
    if options.attach:
        code = counted_code_bytes(code_sizes(""))
        print(f"attached:{attach(options.artifact, table, code)}")
    if options.out:
        print(f"written:{Path(options.out)} bytes:{write_table(options.out, table)}")
    return dict(
        codec=options.codec,
        entries=count,
        rows=rows,
        table_bytes=size,
        bits_an_entry=8 * size / max(count, 1),
        neural_bpb=text.bpb(logp),
        **charge(logp, entries, size, text.bytes)._asdict(),
    )


def run(arguments: Sequence[str] | None) -> int:
    """Build the table and print its figures, the last line as JSON."""
    figures = build(parse(arguments))
    print(
        f"{NOTICE}\nentries:{figures['entries']} of {figures['rows']} rows "
        f"codec:{figures['codec']} bytes:{figures['table_bytes']} "
        f"bits_an_entry:{figures['bits_an_entry']:.2f}"
    )
    print(f"saved_bits:{figures['saved_bits']:.0f} paid_bits:{figures['paid_bits']:.0f}")
    for name in ("neural_bpb", "oracle_bpb", "charged_bpb"):
        print(f"{name}:{figures[name]:.8f}")
    print(json.dumps(figures))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    message = "interrupted; nothing was written"
    return run_reporting("build_correction_table", lambda: run(arguments), message)


if __name__ == "__main__":
    sys.exit(main())
