"""Compare compression methods on one model: score, bytes as shipped, speed and memory.

Each method runs in a process of its own and leaves one JSON file, OUT/raw/MODEL/METHOD.json, and
the files that it would ship, OUT/files/MODEL/METHOD/. Finished ones are skipped, so that a run that
was stopped goes on. --table draws the table and the pictures from the JSON files; --audit says
whether the table can be trusted.

Example:
    fairway compare --model final_model.int6.ptz --methods quick --table --audit
    fairway compare --model final_model.int6.ptz --methods int4-g32,nf4 --workers 2
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", metavar="FILE", help="an artifact, or a checkpoint.pt of train_gpt.py")
    add("--methods", default="quick", metavar="NAMES", help="quick, all, or names with commas")
    add("--list", action="store_true", help="print the methods, what they do, and exit")
    add("--data", default="", metavar="DIR", help="folder of shards (default: data/embedded)")
    add("--val-tokens", type=int, default=0, metavar="N", help="score N tokens; 0 = all")
    add("--tokenizer", default="", metavar="FILE", help="the tokenizer, if the model has none")
    add("--out", default="results", metavar="DIR", help="where results go (default: %(default)s)")
    add("--workers", type=int, default=0, metavar="N", help="cells at a time (default: one a core)")
    add("--retry", action="store_true", help="run cells again that failed or ran with other code")
    add("--table", action="store_true", help="write the table and its pictures")
    add("--audit", action="store_true", help="refuse a table that cannot be trusted")


def run(options: argparse.Namespace) -> int:
    from fairway.methods import harness
    from fairway.methods.cell import ROOT, Spec
    from fairway.methods.registry import METHODS
    from fairway.methods.subject import named
    from train_gpt import UserError

    if options.list:
        for name, method in METHODS.items():
            print(f"{name:16} {method.group}: {' '.join((method.__doc__ or '').split())}")
        return 0
    if not options.model:
        raise UserError("--model is missing; name an artifact or a checkpoint")
    names, path = harness.named_methods(options.methods), Path(options.model)
    if not path.is_file():
        raise UserError(f"--model {path} is no file; train one with `make run`")
    data = Path(options.data) if options.data else ROOT / "data" / "embedded"
    if not list(data.glob("*_val_*.bin")):
        raise UserError(f"no *_val_*.bin in {data}; run `make data`, or set --data")
    out = Path(options.out).absolute() / "raw" / named(path)
    spec = Spec(
        str(path.absolute()),
        "",
        0,
        str(data.absolute()),
        str(out),
        options.val_tokens,
        options.tokenizer,
    )
    cells = harness.cells_of(spec, names)
    left = [cell for cell in cells if harness.is_open(cell, options.retry)]
    print(f"{len(cells)} cells, {len(cells) - len(left)} finished before; results: {out}")
    harness.run_cells(left, options.workers or os.cpu_count() or 1, print)
    results = [harness.read_cell(harness.result_path(cell)) for cell in cells]
    broken = sum(r is None or r["status"] == "failed" for r in results)
    if broken:
        print(f"{broken} cells failed; --retry runs them again")
    return int(bool(broken))
