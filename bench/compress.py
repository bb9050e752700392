"""Bits per byte of what people use and of ours, on the same texts, each taken back byte for byte.

    python bench/compress.py [--artifact A] [--bytes N] [--val GLOB] [--text FILE...]

The embedded validation split (its documents, a line end between them) and any --text (.txt or .jsonl with "text", also
.xz), the first N bytes of each. Ours encodes and decodes with compress_text.py, each in a process of its own; its
decoder needs the artifact, whose bytes stand beside it and are in no figure. PPMd (variant I, 64 MiB) gets each of
several orders, and the best one counts. The last line is JSON.
"""

import argparse
import bz2
import glob
import gzip
import json
import lzma
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import brotli  # noqa: E402
import numpy as np  # noqa: E402
import pyppmd  # noqa: E402
import sentencepiece  # noqa: E402
import zstandard  # noqa: E402

from data.documents import Files  # noqa: E402
from fairway.compression.spelling import Speller  # noqa: E402
from train_gpt import document_bounds, need, read_artifact, read_shard  # noqa: E402

PPMD_ORDERS, PPMD_BYTES = (3, 4, 5, 6, 8, 12, 16, 24, 32), 64 << 20
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def ppmd(order: int) -> Codec:
    options = dict(max_order=order, mem_size=PPMD_BYTES)
    return lambda data: pyppmd.compress(data, **options), lambda packed: pyppmd.decompress(
        packed, **options
    )


def zstd() -> Codec:
    """--ultra -22 --long=27."""
    options = zstandard.ZstdCompressionParameters.from_level(22, window_log=27, enable_ldm=True)
    return (
        zstandard.ZstdCompressor(compression_params=options).compress,
        zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress,
    )


def others() -> dict[str, Codec]:
    return {
        "gzip -9": (lambda data: gzip.compress(data, 9, mtime=0), gzip.decompress),
        "bzip2 -9": (lambda data: bz2.compress(data, 9), bz2.decompress),
        "xz -9e": (
            lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
            lzma.decompress,
        ),
        "zstd -22 --ultra --long=27": zstd(),
        "brotli -11, 16 MiB window": (
            lambda data: brotli.compress(data, quality=11, lgwin=24),
            brotli.decompress,
        ),
        **{f"PPMd, order {order}": ppmd(order) for order in PPMD_ORDERS},
    }


def row(name: str, data: bytes, size: int, seconds: float, back: float, **more) -> dict:
    return dict(
        name=name,
        bytes=size,
        bits_per_byte=8 * size / len(data),
        encode_seconds=seconds,
        decode_seconds=back,
        **more,
    )


def measured(name: str, codec: Codec, data: bytes) -> dict:
    began = time.perf_counter()
    packed = codec[0](data)
    middle = time.perf_counter()
    need(codec[1](packed) == data, f"{name} does not give the text back")
    return row(name, data, len(packed), middle - began, time.perf_counter() - middle)


def script(*arguments: str | Path) -> tuple[float, float]:
    """compress_text.py in a process of its own: its seconds, loading included, and the tokens/s that it tells."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "compress_text.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    lines = [""] + done.stderr.splitlines()
    need(done.returncode == 0, lines[-1])
    return time.perf_counter() - began, float(re.search(r"(\d+) tokens/s", lines[-1])[1])


def ours(name: str, options: list[str], data: bytes, artifact: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        text, file, out = (Path(folder) / part for part in ("text", "text.fwy", "out"))
        text.write_bytes(data)
        encoding = script("encode", "--artifact", artifact, "--out", file, *options, text)
        decoding = script("decode", "--artifact", artifact, file, "--out", out)
        need((out / "text").read_bytes() == data, f"{name} does not give the text back")
        return row(
            name,
            data,
            file.stat().st_size,
            encoding[0],
            decoding[0],
            encode_tokens_per_second=encoding[1],
            decode_tokens_per_second=decoding[1],
        )


def embedded(pattern: str, artifact: str, most: int) -> bytes:
    paths = sorted(glob.glob(pattern))
    need(paths, f"no shards match {pattern}; run `make data`, or pass --val")
    found = read_artifact(artifact)
    need(
        found.tokenizer,
        f"{artifact} has no tokenizer inside, and the shards are decoded with it; train with "
        "EMBED_TOKENIZER=1",
    )
    speller = Speller(
        sentencepiece.SentencePieceProcessor(model_proto=found.tokenizer), found.config.vocab_size
    )
    tokens = np.concatenate([read_shard(path, found.config.vocab_size) for path in paths])[:most]
    documents = np.split(tokens, document_bounds(tokens)[1:-1])
    return b"\n".join(speller.data(document[1:]) for document in documents)[:most]


def texts(given: argparse.Namespace) -> dict[str, bytes]:
    found = {"validation split": embedded(given.val, given.artifact, given.bytes)}
    for path in map(Path, given.text):
        parts, size = [], 0
        for document in Files([path]):
            parts.append(document.text().encode())
            size += len(parts[-1]) + 1
            if size > given.bytes:
                break
        found[path.name] = b"\n".join(parts)[: given.bytes]
    return found


def compared(data: bytes, artifact: str) -> list[dict]:
    rows = [measured(name, codec, data) for name, codec in others().items()]
    tuned = [r for r in rows if r["name"].startswith("PPMd")]
    best = min(tuned, key=lambda r: r["bytes"])
    rows = [r for r in rows if r not in tuned] + [
        best | dict(tried={r["name"]: r["bytes"] for r in tuned})
    ]
    return rows + [
        ours("ours, the model alone", [], data, artifact),
        ours("ours, with experts", ["--experts"], data, artifact),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument(
        "--bytes", type=int, default=1_000_000, metavar="N", help="of each text, the first N"
    )
    parser.add_argument(
        "--val", metavar="GLOB", default=str(ROOT / "data" / "embedded" / "*_val_*.bin")
    )
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE")
    given = parser.parse_args()
    size, tables = Path(given.artifact).stat().st_size, []
    print(f"artifact: {size:,} bytes, needed by both of ours, in neither figure")
    for name, data in texts(given).items():
        print(
            f"\n{name}: {len(data):,} bytes\n{'':28} {'bytes':>10} {'bits/byte':>10} {'encode s':>9} {'decode s':>9}"
            f"  {'tokens/s':>14}",
            flush=True,
        )
        rows = compared(data, given.artifact)
        for r in rows:
            rates = [
                f"{r[k]:.0f}"
                for k in ("encode_tokens_per_second", "decode_tokens_per_second")
                if k in r
            ]
            print(
                f"{r['name']:28} {r['bytes']:10,} {r['bits_per_byte']:10.4f} {r['encode_seconds']:9.1f} "
                f"{r['decode_seconds']:9.1f}  {' / '.join(rates):>14}",
                flush=True,
            )
        tables.append(dict(text=name, bytes=len(data), rows=rows))
    print(json.dumps(dict(artifact_bytes=size, texts=tables)))


if __name__ == "__main__":
    main()
