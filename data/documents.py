"""Files of text → documents: .jsonl and .txt, plain or packed, read as a stream."""

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: train_gpt

from train_gpt import UserError, file_sha256

DOCUMENT_BYTES = 64 << 20  # the longest document


class Document(NamedTuple):
    """One document as it lies in the input; workers make text of it."""

    index: int
    where: str  # file and line, for errors
    data: bytes
    is_json: bool
    split: str = ""  # "" lets the hash of the text decide

    def text(self) -> str:
        try:
            text = self.data.decode()
            if self.is_json:
                text = json.loads(text)["text"]
            text.encode()  # JSON can spell half a surrogate pair, which is no text
            return text
        except UnicodeDecodeError as e:
            problem = f"not UTF-8 (byte {e.start})"
        except UnicodeEncodeError as e:
            problem = f"half a surrogate pair in text (character {e.start})"
        except (ValueError, RecursionError) as e:
            problem = f"not JSON ({getattr(e, 'msg', 'nested too deeply')})"
        except (KeyError, TypeError, AttributeError):
            problem = 'no string "text" in it'
        raise UserError(f"{self.where}: {problem}; mend or leave out this document")


class ZstdFrames(io.RawIOBase):
    """Decompress frame after frame; unlike zstandard's own reader, a cut file is an error."""

    def __init__(self, raw: io.BufferedReader) -> None:
        self.raw, self.frame, self.rest, self.ready = raw, None, b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:
        while not self.ready:
            packed = self.rest or self.raw.read(1 << 14)
            if not packed:
                if self.frame:
                    raise EOFError("ends inside a frame")
                return 0
            self.frame = self.frame or zstandard.ZstdDecompressor().decompressobj()
            self.ready, self.rest = self.frame.decompress(packed), b""
            if self.frame.eof:
                self.rest, self.frame = self.frame.unused_data, None
        n = min(len(target), len(self.ready))
        target[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


class Files:
    """The documents of --docs, in order. `position` is how far in the (packed) bytes it is."""

    UNPACK = {
        ".xz": lzma.LZMAFile,
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
        ".zst": ZstdFrames,
    }

    def __init__(self, paths: list[Path]) -> None:
        for path in paths:
            if self.kind(path) not in (".jsonl", ".txt"):
                raise UserError(
                    f"--docs {path}: must end in .jsonl or .txt, or that and .xz, "
                    ".gz or .zst; rename or convert it"
                )
            if not path.is_file():
                raise UserError(f"--docs {path}: no such file; check the path")
        self.paths, self.position, self.count = paths, 0, 0
        self.size = sum(path.stat().st_size for path in paths)

    def kind(self, path: Path) -> str:
        return (path.with_suffix("") if path.suffix in self.UNPACK else path).suffix

    def describe(self) -> list[dict]:
        return [
            {"file": str(p), "bytes": p.stat().st_size, "sha256": file_sha256(p)}
            for p in self.paths
        ]

    def __iter__(self) -> Iterator[Document]:
        self.position = self.count = done = 0
        for path in self.paths:
            before = self.count
            with open(path, "rb") as raw:
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
                    raise UserError(f"{path}: cut or damaged ({e}); fetch it again") from None
            if self.count == before:
                raise UserError(f"{path}: empty; leave it out of --docs")
            done += path.stat().st_size

    def _records(self, path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, bytes]]:
        """Each line of a .jsonl but blank ones, or the whole of a .txt, and where it is."""
        unpack = self.UNPACK.get(path.suffix)
        file = io.BufferedReader(unpack(raw), 1 << 20) if unpack else raw
        by_line, most = self.kind(path) == ".jsonl", DOCUMENT_BYTES + 1
        records = iter(lambda: file.readline(most), b"") if by_line else [file.read(most)]
        for number, data in enumerate(records, 1):
            where = f"{path} line {number}" if by_line else str(path)
            if len(data) == most:
                raise UserError(
                    f"{where}: a document of more than {DOCUMENT_BYTES >> 20} MiB; "
                    "split it into documents"
                )
            if data.strip() if by_line else data:
                yield where, data
