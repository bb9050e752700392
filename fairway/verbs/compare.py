"""Compare compression methods on one model: score, bytes as shipped, speed and memory.

Each method runs in a process of its own and leaves one JSON file, OUT/raw/MODEL/METHOD.json, and
the files that it would ship, OUT/files/MODEL/METHOD/. Finished ones are skipped, so that a run that
was stopped goes on. --table draws the table and the pictures from the JSON files; --audit says
whether the table can be trusted. --cluster sends the same cells to a Ray cluster, whose machines
must hold repository, model and shards at the same paths.

Example:
    fairway compare --model final_model.int6.ptz --methods quick --table --audit
    fairway compare --model final_model.int6.ptz --methods int4-g32,nf4 --workers 2
    ray start --head && fairway compare --model final_model.int6.ptz --cluster auto
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fairway.methods.cell import Spec


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
    add("--cluster", metavar="ADDRESS", help="send the cells to the Ray cluster at this address")
    add("--retry", action="store_true", help="run cells again that failed or ran with other code")
    add("--table", action="store_true", help="write the table and its pictures")
    add("--into", type=Path, metavar="PAGE", help="with --table: also rewrite its part of a page")
    add("--audit", action="store_true", help="refuse a table that cannot be trusted")


def run(options: argparse.Namespace) -> int:
    from fairway.methods import harness
    from fairway.methods.registry import METHODS

    if options.list:
        for name, method in METHODS.items():
            print(f"{name:16} {method.group}: {' '.join((method.__doc__ or '').split())}")
        return 0
    names = harness.named_methods(options.methods)
    spec = spec_of(options)
    cells = harness.cells_of(spec, names)
    left = [cell for cell in cells if harness.is_open(cell, options.retry)]
    print(f"{len(cells)} cells, {len(cells) - len(left)} finished before; results: {spec.out}")
    jobs, reporter = [harness.job_of(cell) for cell in left], harness.Reporter(print)
    if options.cluster:
        from fairway.methods.cluster import run_on_cluster

        run_on_cluster(jobs, options.cluster, options.workers, reporter)
    else:
        harness.run_cells(jobs, options.workers or os.cpu_count() or 1, reporter)
    results = [harness.read_cell(harness.result_path(cell)) for cell in cells]
    broken = sum(r is None or r["status"] == "failed" for r in results)
    if broken:
        print(f"{broken} cells failed; --retry runs them again")
    trusted = judge(Path(spec.out)) if options.audit or options.table else True
    if options.table and trusted:
        write_results(Path(spec.out), options.into)
    return int(bool(broken) or not trusted)


def spec_of(options: argparse.Namespace) -> Spec:
    """Return what all cells share, once the files that they need are known to be there."""
    from fairway.methods.cell import ROOT, Spec
    from fairway.methods.subject import is_artifact, named
    from train_gpt import UserError

    if not options.model:
        raise UserError("--model is missing; name an artifact or a checkpoint")
    path = Path(options.model)
    if not path.is_file():
        raise UserError(f"--model {path} is no file; train one with `make run`")
    is_artifact(path)
    data = Path(options.data) if options.data else ROOT / "data" / "embedded"
    if not list(data.glob("*_val_*.bin")):
        raise UserError(f"no *_val_*.bin in {data}; run `make data`, or set --data")
    if options.val_tokens < 0 or options.workers < 0:
        raise UserError("--val-tokens and --workers must be 0 or more; leave them out")
    return Spec(
        model=str(path.absolute()),
        method="",
        seed=0,
        data=str(data.absolute()),
        out=str(Path(options.out).absolute() / "raw" / named(path)),
        val_tokens=options.val_tokens,
        tokenizer=options.tokenizer,
    )


def judge(folder: Path) -> bool:
    """Print what the audit finds; return whether it found nothing."""
    from fairway.methods.audit import RULES, audit
    from fairway.methods.comparison import read_cells

    cells = read_cells(folder)
    found = audit(cells, folder.parents[1] / "files" / folder.name)
    for finding in found:
        print(f"FAIL {finding.rule}: {finding.cell}: {finding.message}")
    print(f"audit: {len(RULES)} rules, {len(cells)} results, {len(found)} findings")
    return not found


def write_results(folder: Path, page: Path | None) -> None:
    """Write the table as Markdown and JSON, and its pictures; perhaps also into a page."""
    from fairway.command_line import json_bytes
    from fairway.methods.comparison import markdown, read_cells, replace_section, table_json
    from fairway.report.methods import write_pictures
    from train_gpt import replacing

    cells, out = read_cells(folder), folder.parents[1]
    text, rows = markdown(cells), table_json(cells)
    files = {f"{folder.name}.md": text.encode(), f"{folder.name}.json": json_bytes(rows)}
    if page:
        files[page.absolute()] = replace_section(
            page.read_text("utf-8"), folder.name, text
        ).encode()
    for name, content in files.items():
        with replacing(out / name) as f:
            f.write(content)
    pictures = write_pictures(rows, out, folder.name)
    print("\n".join(map(str, [*(out / name for name in files), *pictures])))
