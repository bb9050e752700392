"""Compress any files without loss into one bitstream, with an artifact as the model.

Decompressing takes as long, and needs the same artifact. docs/BITSTREAM.md describes the file.

Example:
  fairway compress --artifact final_model.int6.ptz --out texts.fwy README.md LICENSE
  fairway compress --experts --out book.fwy book.txt      smaller and slower
  cat a.txt | fairway compress --out - - > a.fwy          standard input to standard output
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fairway.command_line import UsageError, check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="any file; - for standard input")
    parser.add_argument("--out", required=True, metavar="F.fwy", help="the bitstream; - for stdout")
    parser.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    parser.add_argument(
        "--experts",
        action="store_true",
        help="mix the model with n-gram and match experts; the settings of eval_final.py apply, "
        "for example NGRAM_ORDERS=4",
    )
    parser.add_argument(
        "--streams",
        type=int,
        default=0,
        metavar="B",
        help="parts that step together: more are faster and compress less (default: by size, "
        "at most 64)",
    )
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="needed if the artifact holds none"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), default="", help="default: the fastest here"
    )


def run(options: argparse.Namespace) -> int:
    """Write the bitstream, and print its size and the bits per byte."""
    from fairway.compression.compressor import Compressor
    from fairway.compression.pipes import read_input, token_bar, write_output
    from fairway.scoring.settings import EvalConfig

    names = ["text" if name == "-" else Path(name).name for name in options.files]
    repeated = next((name for name in names if names.count(name) > 1), "")
    if repeated:
        raise UsageError(
            f"two files are called {repeated!r}; rename one, a bitstream holds no folders"
        )
    if options.streams < 0:
        raise UsageError(f"--streams is {options.streams}; it must be 1 or more")
    if options.out != "-":
        check_writable("--out", options.out)
    files = [(name, read_input(file)) for name, file in zip(names, options.files, strict=True)]
    settings = EvalConfig.from_env(os.environ) if options.experts else None
    compressor = Compressor.load(options.artifact, options.device, options.tokenizer)
    began = time.perf_counter()
    with token_bar("encoding") as bar:

        def set_total(count: int) -> None:
            bar.total = count

        coded = compressor.encode(files, settings, options.streams, bar.update, set_total)
    seconds, size = time.perf_counter() - began, sum(len(data) for _, data in files)
    write_output(options.out, coded)
    per_byte = f" {8 * len(coded) / size:.4f} bits/byte" if size else ""
    print(
        f"{size} bytes -> {len(coded)}{per_byte} {bar.total / seconds:.0f} tokens/s; decompressing "
        f"needs the artifact too: {Path(options.artifact).stat().st_size} bytes",
        file=sys.stderr,
    )
    return 0
