"""Get the files of a bitstream back, every byte, or one line that says why not.

It needs the artifact that compressed them, and a machine that computes the same probabilities.

Example:
  fairway decompress --artifact final_model.int6.ptz texts.fwy --out texts
  fairway decompress a.fwy --out - > a.txt                to standard output
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from fairway.command_line import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("file", metavar="F.fwy", help="the bitstream; - for standard input")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for the files; - for standard output"
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="needed if the artifact holds none"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "mps"), default="", help="default: the one that encoded"
    )


def run(options: argparse.Namespace) -> int:
    """Write the files, and print their number and size."""
    from fairway.compression.compressor import Compressor
    from fairway.compression.pipes import read_piped_bitstream, token_bar, write_output
    from train_gpt import UserError, best_device

    header, payload = read_piped_bitstream(options.file)
    kind = header.made_on.kind
    if not options.device and kind not in ("cpu", best_device()):
        raise UserError(
            f"{options.file} was made on {kind}, and this machine has only {best_device()}: "
            f"decode it on a machine with {kind}, or try --device {best_device()}"
        )
    folder, to_stdout = Path(options.out), options.out == "-"
    paths = ["-" if to_stdout else str(folder / name) for name, _ in header.files or ()]
    for path in [] if to_stdout or options.force else paths:
        if Path(path).exists():
            raise UserError(f"{path} exists already; choose another --out, or pass --force")
    for path in [] if to_stdout else paths:
        check_writable("--out", path)
    compressor = Compressor.load(options.artifact, options.device or kind, options.tokenizer)
    began = time.perf_counter()
    try:
        with token_bar("decoding", header.count) as bar:
            files = compressor.decode(header, payload, bar.update)
    except UserError as e:
        raise UserError(f"{options.file}: {e}") from None
    seconds = time.perf_counter() - began
    for path, (_, data) in zip(paths, files, strict=True):
        write_output(path, data)
    print(
        f"{len(files)} files, {header.size} bytes, checksum right, "
        f"{header.count / seconds:.0f} tokens/s",
        file=sys.stderr,
    )
    return 0
