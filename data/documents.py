"""Read documents one by one from .jsonl and .txt files, compressed or not."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import zstandard

# When this file runs as a script, Python searches data/ for modules, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_gpt import UserError, file_sha256

DOCUMENT_BYTES = 64 << 20  # a longer document is refused


class Document(NamedTuple):
    """One document as undecoded bytes of the input; workers decode it."""

    index: int
    where: str  # file and line, for error messages
    data: bytes
    is_json: bool
    split: str = ""  # "train" or "val"; "" lets the hash of the text decide

    def text(self) -> str:
        """Return the document's text, or raise `UserError` with its file, line and problem."""
        try:
            text = self.data.decode()
            if self.is_json:
                text = json.loads(text)["text"]
            text.encode()  # JSON can hold half a surrogate pair, which UTF-8 cannot
            return text
        except UnicodeDecodeError as e:
            problem = f"not UTF-8 (byte {e.start})"
        except UnicodeEncodeError as e:
            problem = f"half a surrogate pair in text (character {e.start})"
        except (ValueError, RecursionError) as e:
            problem = f"not JSON ({getattr(e, 'msg', 'nested too deeply')})"
        except (KeyError, TypeError, AttributeError):
            problem = 'no field "text" with a string'
        raise UserError(f"{self.where}: {problem}; correct or remove this document")


class ZstdFrames(io.RawIOBase):
    """Decompress a zstd file of one or more frames.

    zstandard's own reader takes the end of a truncated file for the end of the text. This one
    raises `EOFError`.
    """

    def __init__(self, raw: io.BufferedReader) -> None:
        self.raw = raw
        self.frame: zstandard.ZstdDecompressionObj | None = None
        self.packed, self.ready = b"", b""  # not yet decompressed; not yet returned

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:
        """Fill `target` from its start; return the number of bytes, 0 at the end of the file."""
        while not self.ready:
            packed = self.packed or self.raw.read(1 << 14)
            if not packed:
                if self.frame:
                    raise EOFError("ends inside a frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready, self.packed = self.frame.decompress(packed), b""
            if self.frame.eof:
                self.packed, self.frame = self.frame.unused_data, None
        n = min(len(target), len(self.ready))
        target[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


class Files:
    """The documents of the files of --docs, in order.

    While they are iterated, `position` is the number of input bytes read so far (compressed bytes
    for a compressed file) and `count` the number of documents. `size` is the bytes of all files.
    """

    UNPACK = {
        ".xz": lzma.LZMAFile,
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
        ".zst": ZstdFrames,
    }

    def __init__(self, paths: list[Path]) -> None:
        for path in paths:
            if self.kind(path) not in (".jsonl", ".txt"):
                raise UserError(
                    f"--docs {path}: must end in .jsonl or .txt, optionally followed by .xz, .gz "
                    "or .zst; rename or convert it"
                )
            if not path.is_file():
                raise UserError(f"--docs {path}: no such file; check the path")
        self.paths, self.position, self.count = paths, 0, 0
        self.size = sum(path.stat().st_size for path in paths)

    def kind(self, path: Path) -> str:
        """Return the suffix that counts: `.jsonl` for a.jsonl and for a.jsonl.xz."""
        return (path.with_suffix("") if path.suffix in self.UNPACK else path).suffix

    def describe(self) -> list[dict]:
        """Return name, bytes and sha256 of each file, for the manifest."""
        return [
            {"file": str(p), "bytes": p.stat().st_size, "sha256": file_sha256(p)}
            for p in self.paths
        ]

    def __iter__(self) -> Iterator[Document]:
        self.position = self.count = done = 0
        for path in self.paths:
            before = self.count
            with path.open("rb") as raw:
                try:
                    for where, data in self._records(path, raw):
                        self.position = done + raw.tell()
                        yield Document(self.count, where, data, self.kind(path) == ".jsonl")
                        self.count += 1
                except (
                    lzma.LZMAError,
                    EOFError,
                    zlib.error,
                    gzip.BadGzipFile,
                    zstandard.ZstdError,
                ) as e:
                    raise UserError(f"{path}: truncated or damaged ({e}); get it again") from None
            if self.count == before:
                raise UserError(f"{path}: empty; remove it from --docs")
            done += path.stat().st_size

    def _records(self, path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, bytes]]:
        """Yield (place, bytes): each line of a .jsonl file that is not blank, or all of a .txt."""
        unpack = self.UNPACK.get(path.suffix)
        file = io.BufferedReader(unpack(raw), 1 << 20) if unpack else raw
        by_line, limit = self.kind(path) == ".jsonl", DOCUMENT_BYTES + 1
        records = iter(lambda: file.readline(limit), b"") if by_line else [file.read(limit)]
        for number, data in enumerate(records, 1):
            where = f"{path} line {number}" if by_line else str(path)
            if len(data) == limit:
                raise UserError(
                    f"{where}: a document of more than {DOCUMENT_BYTES >> 20} MiB; "
                    "split it into several"
                )
            if data.strip() if by_line else data:
                yield where, data
