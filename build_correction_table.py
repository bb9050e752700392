"""List the worst-predicted tokens of a split with the right ones, and say what that buys and what it costs.

    python build_correction_table.py --artifact final_model.int6.ptz --val 'data/embedded/*_val_*.bin' --attach

The table is made from the text that it then "predicts": oracle_bpb is no score, and charged_bpb, with every bit of the
table added, mostly shows that it does not pay. docs/LEGALITY.md says why no record may use it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from fairway.correction.oracle import build_table, default_budget, viewer
from fairway.correction.table import CODECS, NOTICE, attach, charge, table_bytes, write_table
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import code_sizes
from fairway.scoring.text import load_text
from train_gpt import Runtime, UserError, best_device, build_model, file_sha256, need, read_artifact


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    parser.add_argument(
        "--val", default="", metavar="GLOB", help="shards (default: the embedded split)"
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=-1,
        metavar="BYTES",
        help="of the table; 0: only entries that "
        "save more than they cost (default: a byte for each 25 tokens)",
    )
    parser.add_argument("--codec", choices=CODECS, default="modelled", help="default: %(default)s")
    parser.add_argument("--out", metavar="FILE", help="where the table goes (default: nowhere)")
    parser.add_argument(
        "--attach",
        action="store_true",
        help="put it beside the artifact, within 16,000,000 bytes; "
        "eval_final.py finds it there with USE_CORRECTION=1",
    )
    return parser.parse_args(arguments)


def build(given: argparse.Namespace) -> dict:
    cfg = EvalConfig(checkpoint=given.artifact, val_files=given.val)
    artifact, sha256 = read_artifact(cfg.checkpoint), bytes.fromhex(file_sha256(cfg.checkpoint))
    text, device = load_text(cfg, artifact), torch.device(best_device())
    neural = viewer(build_model(artifact, device), Runtime(0, 1, device, device.type))
    rows = len(text.tokens) - 1
    columns, budget = (
        columns_in_memory(rows, {"logp": "f8"}),
        None if given.budget == 0 else given.budget,
    )
    need(given.budget >= -1, f"--budget is {given.budget}; it must be a number of bytes, or 0")
    with tqdm(total=rows, desc="scoring", unit="tok", unit_scale=True, delay=3, leave=False) as bar:
        neural.fill(text.tokens, columns, on_progress=lambda own, _: bar.update(len(own)))
    with tqdm(total=rows, desc="tails", unit="tok", unit_scale=True, delay=3, leave=False) as bar:
        table, entries = build_table(
            neural,
            text.tokens,
            columns["logp"],
            given.codec,
            default_budget(rows) if budget == -1 else budget,
            sha256,
            bar.update,
        )
    size, count = len(table_bytes(table)), len(entries.tokens)
    if given.attach:
        print(f"attached:{attach(given.artifact, table, sum(code_sizes('').values()))}")
    if given.out:
        print(f"written:{Path(given.out)} bytes:{write_table(given.out, table)}")
    cost = charge(columns["logp"], entries, size, text.bytes)
    return dict(
        codec=given.codec,
        entries=count,
        rows=rows,
        table_bytes=size,
        bits_an_entry=8 * size / max(count, 1),
        neural_bpb=text.bpb(columns["logp"]),
        **cost._asdict(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    given = parsed(arguments)
    try:
        found = build(given)
    except KeyboardInterrupt:
        print("build_correction_table: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (UserError, OSError) as e:
        print(f"build_correction_table: error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1
    print(
        f"{NOTICE}\nentries:{found['entries']} of {found['rows']} rows codec:{found['codec']} "
        f"bytes:{found['table_bytes']} bits_an_entry:{found['bits_an_entry']:.2f}"
    )
    print(f"saved_bits:{found['saved_bits']:.0f} paid_bits:{found['paid_bits']:.0f}")
    for name in ("neural_bpb", "oracle_bpb", "charged_bpb"):
        print(f"{name}:{found[name]:.8f}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
