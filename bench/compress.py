"""Compare our bits per byte with the compressors that people use, on the same texts.

    python bench/compress.py [--artifact A] [--bytes N] [--val GLOB] [--text FILE...]

The texts are the first N bytes of the embedded validation split (its documents, a line end between
them) and of any --text (.txt, or .jsonl with "text", also .xz). Every codec must give a text back
byte for byte. Ours runs as `fairway compress` and `fairway decompress`, each in a new process. Its
decoder needs the artifact too; its bytes are printed, and are part of no figure. PPMd (variant I,
64 MiB) runs with several orders, and the best one counts. The last line is JSON.
"""

import argparse
import bz2
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
sys.path.insert(0, str(ROOT))  # data/ is not installed

import brotli  # noqa: E402
import numpy as np  # noqa: E402
import pyppmd  # noqa: E402
import sentencepiece  # noqa: E402
import zstandard  # noqa: E402

from data.documents import Files  # noqa: E402
from fairway.artifact_reader import read_artifact  # noqa: E402
from fairway.compression.spelling import Speller  # noqa: E402
from train_gpt import UserError, document_bounds, list_shards, read_shard  # noqa: E402

PPMD_ORDERS, PPMD_BYTES = (3, 4, 5, 6, 8, 12, 16, 24, 32), 64 << 20
# A pair of functions: compress, decompress.
Codec = tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]


def ppmd(order: int) -> Codec:
    """Return PPMd with a context of `order` bytes."""
    options = dict(max_order=order, mem_size=PPMD_BYTES)
    return (
        lambda data: pyppmd.compress(data, **options),
        lambda packed: pyppmd.decompress(packed, **options),
    )


def zstd() -> Codec:
    """Return zstd as --ultra -22 --long=27 runs it."""
    options = zstandard.ZstdCompressionParameters.from_level(22, window_log=27, enable_ldm=True)
    return (
        zstandard.ZstdCompressor(compression_params=options).compress,
        zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress,
    )


def other_codecs() -> dict[str, Codec]:
    """Return the codecs to compare with, by the names that the table shows."""
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


def figures(
    name: str, data: bytes, size: int, encode_seconds: float, decode_seconds: float, **more
) -> dict:
    """Return the figures of one codec on one text."""
    return dict(
        name=name,
        bytes=size,
        bits_per_byte=8 * size / len(data),
        encode_seconds=encode_seconds,
        decode_seconds=decode_seconds,
        **more,
    )


def measure_codec(name: str, codec: Codec, data: bytes) -> dict:
    """Compress a text and get it back."""
    began = time.perf_counter()
    packed = codec[0](data)
    middle = time.perf_counter()
    check_same(name, codec[1](packed), data)
    return figures(name, data, len(packed), middle - began, time.perf_counter() - middle)


def check_same(name: str, decoded: bytes, data: bytes) -> None:
    """Refuse a codec that gives other bytes back."""
    if decoded != data:
        raise UserError(f"{name} does not give the text back")


def run_verb(*arguments: str | Path) -> tuple[float, float]:
    """Run a verb in a new process; return its seconds, loading included, and its tokens/s."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "fairway", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    lines = [""] + done.stderr.splitlines()
    if done.returncode:
        raise UserError(lines[-1])
    return time.perf_counter() - began, float(re.search(r"(\d+) tokens/s", lines[-1])[1])


def measure_ours(name: str, options: list[str], data: bytes, artifact: str) -> dict:
    """Compress a text with the artifact and get it back."""
    with tempfile.TemporaryDirectory() as folder:
        text, file, out = (Path(folder) / part for part in ("text", "text.fwy", "out"))
        text.write_bytes(data)
        encoding = run_verb("compress", "--artifact", artifact, "--out", file, *options, text)
        decoding = run_verb("decompress", "--artifact", artifact, file, "--out", out)
        check_same(name, (out / "text").read_bytes(), data)
        return figures(
            name,
            data,
            file.stat().st_size,
            encoding[0],
            decoding[0],
            encode_tokens_per_second=encoding[1],
            decode_tokens_per_second=decoding[1],
        )


def embedded_text(pattern: str, artifact: str, most: int) -> bytes:
    """Return at most `most` bytes of the text of some shards."""
    paths = list_shards(pattern)
    if not paths:
        raise UserError(f"no shards match {pattern}; run `make data`, or pass --val")
    loaded = read_artifact(artifact)
    if not loaded.tokenizer:
        raise UserError(
            f"{artifact} has no tokenizer inside, which decodes the shards; train with "
            "EMBED_TOKENIZER=1"
        )
    speller = Speller(
        sentencepiece.SentencePieceProcessor(model_proto=loaded.tokenizer), loaded.config.vocab_size
    )
    tokens = np.concatenate([read_shard(path, loaded.config.vocab_size) for path in paths])[:most]
    documents = np.split(tokens, document_bounds(tokens)[1:-1])
    return b"\n".join(speller.data(document[1:]) for document in documents)[:most]


def read_texts(options: argparse.Namespace) -> dict[str, bytes]:
    """Return the texts to compress, by name."""
    texts = {"validation split": embedded_text(options.val, options.artifact, options.bytes)}
    for path in map(Path, options.text):
        parts, size = [], 0
        for document in Files([path]):
            parts.append(document.text().encode())
            size += len(parts[-1]) + 1
            if size > options.bytes:
                break
        texts[path.name] = b"\n".join(parts)[: options.bytes]
    return texts


def compare(data: bytes, artifact: str) -> list[dict]:
    """Return a row of figures for each codec, ours last."""
    rows = [measure_codec(name, codec, data) for name, codec in other_codecs().items()]
    tuned = [r for r in rows if r["name"].startswith("PPMd")]
    best = min(tuned, key=lambda r: r["bytes"])
    rows = [r for r in rows if r not in tuned] + [
        best | dict(tried={r["name"]: r["bytes"] for r in tuned})
    ]
    return rows + [
        measure_ours("ours, the model alone", [], data, artifact),
        measure_ours("ours, with experts", ["--experts"], data, artifact),
    ]


def main() -> None:
    """Print a table for each text, and then JSON."""
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
    options = parser.parse_args()
    size, tables = Path(options.artifact).stat().st_size, []
    print(f"artifact: {size:,} bytes, needed by both of ours, in neither figure")
    for name, data in read_texts(options).items():
        print(
            f"\n{name}: {len(data):,} bytes\n{'':28} {'bytes':>10} {'bits/byte':>10} "
            f"{'encode s':>9} {'decode s':>9}  {'tokens/s':>14}",
            flush=True,
        )
        rows = compare(data, options.artifact)
        for r in rows:
            rates = [
                f"{r[k]:.0f}"
                for k in ("encode_tokens_per_second", "decode_tokens_per_second")
                if k in r
            ]
            print(
                f"{r['name']:28} {r['bytes']:10,} {r['bits_per_byte']:10.4f} "
                f"{r['encode_seconds']:9.1f} {r['decode_seconds']:9.1f}  {' / '.join(rates):>14}",
                flush=True,
            )
        tables.append(dict(text=name, bytes=len(data), rows=rows))
    print(json.dumps(dict(artifact_bytes=size, texts=tables)))


if __name__ == "__main__":
    main()
