"""Compress any files without loss with a trained artifact, and get them back with that artifact alone.

The model predicts, a range coder keeps what it did not foresee: docs/BITSTREAM.md. Decoding takes as long as encoding,
needs the very same artifact, and returns every byte or an error; never another text.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from fairway.compression.bitstream import MOST_FILE_BYTES, Header, read_bitstream, unpacked
from fairway.compression.compressor import Coder
from fairway.scoring.settings import EvalConfig
from train_gpt import UserError, best_device, need, replacing

EXAMPLES = """examples:
  python compress_text.py encode --artifact final_model.int6.ptz --out texts.fwy a.txt b.txt
  python compress_text.py encode --experts --out book.fwy book.txt     smaller, and slower
  python compress_text.py decode --artifact final_model.int6.ptz texts.fwy --out texts
  python compress_text.py info texts.fwy
  cat a.txt | python compress_text.py encode --out - - | python compress_text.py decode - --out - | cmp - a.txt"""


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    style = dict(formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES)
    parser = argparse.ArgumentParser(description=__doc__, **style)
    verbs = parser.add_subparsers(dest="verb", required=True)
    encode = verbs.add_parser("encode", help="files to one bitstream", **style)
    encode.add_argument("texts", nargs="+", metavar="TEXT", help="any file; - for standard input")
    encode.add_argument(
        "--out", required=True, metavar="F.fwy", help="the bitstream; - for standard output"
    )
    encode.add_argument(
        "--experts",
        action="store_true",
        help="mix the model with n-gram and match experts; settings "
        "of eval_final.py count here too: MIX_WEIGHTS=exponential, NGRAM_ORDERS=4 ...",
    )
    encode.add_argument(
        "--streams",
        type=int,
        default=0,
        metavar="B",
        help="parts that step side by side: more are "
        "faster and compress less (default: by size, 64 at most)",
    )
    decode = verbs.add_parser("decode", help="a bitstream to its files", **style)
    decode.add_argument("file", metavar="F.fwy", help="the bitstream; - for standard input")
    decode.add_argument(
        "--out", required=True, metavar="DIR", help="where the files go; - for standard output"
    )
    decode.add_argument("--force", action="store_true", help="replace files that are there")
    for verb in (encode, decode):
        verb.add_argument("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
        verb.add_argument(
            "--tokenizer", default="", metavar="FILE", help="where the artifact holds none"
        )
        verb.add_argument(
            "--device",
            choices=("cpu", "cuda", "mps"),
            default="",
            help="default: the best there is to encode, and the one that encoded to decode",
        )
    verbs.add_parser("info", help="what a bitstream says of itself", **style).add_argument(
        "file", metavar="F.fwy"
    )
    return parser.parse_args(arguments)


def read_text(name: str) -> tuple[str, bytes]:
    return (
        ("text", sys.stdin.buffer.read(MOST_FILE_BYTES))
        if name == "-"
        else (Path(name).name, Path(name).read_bytes())
    )


def read_file(name: str) -> tuple[Header, bytes]:
    return (
        read_bitstream(name)
        if name != "-"
        else unpacked(sys.stdin.buffer.read(MOST_FILE_BYTES + 1), "-")
    )


def progress(what: str, total: int = 0) -> tqdm:
    return tqdm(total=total, desc=what, unit="tok", unit_scale=True, delay=10, leave=False)


def encode(given: argparse.Namespace, env: Mapping[str, str]) -> None:
    names = [("text" if name == "-" else Path(name).name) for name in given.texts]
    twice = next((name for name in names if names.count(name) > 1), None)
    need(
        twice is None,
        f"two of the files are called {twice!r}; rename one, a bitstream holds no folders",
    )
    need(given.streams >= 0, f"--streams is {given.streams}; it must be 1 or more")
    files = [read_text(name) for name in given.texts]
    settings = EvalConfig.from_env(env) if given.experts else None
    coder = Coder.of(given.artifact, given.device, given.tokenizer)
    began = time.perf_counter()
    with progress("encoding") as bar:
        coded = coder.encode(
            files, settings, given.streams, bar.update, lambda count: setattr(bar, "total", count)
        )
        count = bar.n
    seconds, size = time.perf_counter() - began, sum(len(data) for _, data in files)
    if given.out == "-":
        sys.stdout.buffer.write(coded)
        sys.stdout.buffer.flush()
    else:
        with replacing(given.out) as f:
            f.write(coded)
    per_byte = f" {8 * len(coded) / size:.4f} bits/byte" if size else ""
    print(
        f"{size} bytes -> {len(coded)}{per_byte} {count / seconds:.0f} tokens/s; decoding needs the artifact too: "
        f"{Path(given.artifact).stat().st_size} bytes",
        file=sys.stderr,
    )


def decode(given: argparse.Namespace) -> None:
    header, payload = read_file(given.file)
    made_on = header.made_on.kind
    need(
        given.device or made_on in ("cpu", best_device()),
        f"{given.file} was made on {made_on}, and this machine has "
        f"only {best_device()}: decode it on such a one, or try --device {best_device()}",
    )
    folder = Path(given.out)
    there = [
        name for name, _ in header.files or () if given.out != "-" and (folder / name).exists()
    ]
    need(
        not there or given.force,
        f"{folder / (there or [''])[0]} is there already; choose another --out, or --force",
    )
    coder = Coder.of(given.artifact, given.device or made_on, given.tokenizer)
    began = time.perf_counter()
    try:
        with progress("decoding", header.count) as bar:
            files = coder.decode(header, payload, bar.update)
    except UserError as e:
        raise UserError(f"{given.file}: {e}") from None
    seconds = time.perf_counter() - began
    for name, data in files:
        if given.out == "-":
            sys.stdout.buffer.write(data)
            continue
        with replacing(folder / name) as f:
            f.write(data)
    sys.stdout.buffer.flush()
    print(
        f"{len(files)} files, {header.size} bytes, checksum right, {header.count / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


def info(given: argparse.Namespace) -> None:
    header, payload = read_file(given.file)
    told = header._asdict() | dict(
        artifact=header.artifact.hex(),
        digest=header.digest.hex(),
        made_on=str(header.made_on),
        payload_bytes=len(payload),
    )
    print(json.dumps(told, indent=1, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None, env: Mapping[str, str] = os.environ) -> int:
    given = parsed(arguments)
    try:
        if given.verb == "encode":
            encode(given, env)
        else:
            {"decode": decode, "info": info}[given.verb](given)
        return 0
    except KeyboardInterrupt:
        print("compress_text: interrupted; nothing was written", file=sys.stderr)
        return 130
    except UserError as e:
        print(f"compress_text: error: {str(e).splitlines()[0]}", file=sys.stderr)
    except OSError as e:
        where = e.filename or vars(given).get("out")
        print(f"compress_text: error: {where}: {e.strerror or e}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
