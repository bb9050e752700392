"""Find validation text in training shards: whole documents, or any window of 64 tokens.

Exact, in one pass over the training tokens. Cut a window of W tokens in half, k = W // 2: every
window holds one run of k tokens that starts at a multiple of W - k + 1, so it is enough to index
those runs of the validation tokens and to look up every run of k training tokens. A hash only
proposes; the tokens themselves, compared and extended to both sides, decide. Windows never hold
BOS, so a document is matched by its own tokens. A document shorter than a window is found when
a training document is equal to it, from BOS to BOS; those are listed apart.

Memory: 6 bytes a validation token, one mapped shard and about 200 MB, however many shards.
"""

from __future__ import annotations

import argparse
import glob
import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: train_gpt

from data.common import progress, run
from train_gpt import BOS_ID, UserError, document_bounds, read_shard, replacing

BLOCK = 1 << 20  # training tokens looked at in one go
PAIRS = 1 << 14  # candidate pairs compared in one go
SHOWN = 50  # documents printed; --json lists all

EXAMPLES = """examples:
  python data/overlap.py --train 'data/embedded/*_train_*.bin' --val 'data/embedded/*_val_*.bin'
  python data/overlap.py --train 'train/*.bin' --val 'val/*.bin' --window 32 --json overlap.json

exit code: 0 nothing found, 1 overlap found, 2 could not run"""


class Hashes:
    """Polynomial hashes modulo 2**64 of any slices of a block, by differences of prefix sums."""

    MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse

    def __init__(self, longest: int) -> None:
        inverse = pow(self.MULTIPLIER, -1, 1 << 64)
        self.up, self.down = (self._powers(x, longest + 1) for x in (self.MULTIPLIER, inverse))

    @staticmethod
    def _powers(x: int, n: int) -> np.ndarray:
        factors = np.full(n, x, np.uint64)
        factors[0] = 1
        return np.cumprod(factors)

    def prefix(self, tokens: np.ndarray) -> np.ndarray:
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum((tokens + np.uint64(1)) * self.up[: len(tokens)], out=sums[1:])
        return sums

    def slices(self, prefix: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return (prefix[ends] - prefix[starts]) * self.down[starts]

    def runs(self, prefix: np.ndarray, first: int, last: int, k: int) -> np.ndarray:
        """Hashes of the k tokens from each of first … last - 1."""
        return (prefix[first + k : last + k] - prefix[first:last]) * self.down[first:last]


class Stream:
    """Shards as one run of tokens, in blocks; `where` names the shard of an offset.

    Consecutive numbers continue each other, since exports cut documents at a shard's end; where
    a number is missing a BOS goes in between, so that no window spans the gap.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, sizes = paths, [len(read_shard(p)) for p in paths]
        self.gaps = [False, *(not follows(a, b) for a, b in pairwise(paths))]
        ends = np.cumsum(sizes) + np.cumsum(self.gaps)
        self.starts = (ends - sizes).tolist()
        self.tokens = int(ends[-1])

    def blocks(self) -> Iterator[np.ndarray]:
        for path, gap in zip(self.paths, self.gaps, strict=True):
            if gap:
                yield np.array([BOS_ID], np.uint16)
            shard = read_shard(path)  # mapped one at a time, so that memory stays bounded
            for i in range(0, len(shard), BLOCK):
                yield np.asarray(shard[i : i + BLOCK])

    def where(self, offset: int) -> tuple[str, int]:
        i = max(int(np.searchsorted(self.starts, offset, side="right")) - 1, 0)
        return str(self.paths[i]), int(offset) - self.starts[i]

    def whole(self) -> np.ndarray:
        tokens, n = np.empty(self.tokens, np.uint16), 0
        for block in self.blocks():
            tokens[n : n + len(block)] = block
            n += len(block)
        return tokens


def follows(a: Path, b: Path) -> bool:
    """Whether b's name is a's with the number at its end raised by one."""
    (head_a, n_a), (head_b, n_b) = (re.fullmatch(r"(.*?)(\d*)", p.stem).groups() for p in (a, b))
    return (
        (a.parent, head_a) == (b.parent, head_b)
        and n_a + n_b != ""
        and (int(n_b or -1) == int(n_a or -2) + 1)
    )


def candidates(keys: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (slot in the sorted keys, place in hashes) of equal hashes, at most PAIRS at a time."""
    left = np.searchsorted(keys, hashes, side="left")
    counts = np.searchsorted(keys, hashes, side="right") - left
    ends = np.cumsum(counts)
    for low in range(0, int(ends[-1]) if len(ends) else 0, PAIRS):
        n = np.arange(low, min(low + PAIRS, ends[-1]))
        place = np.searchsorted(ends, n, side="right")
        yield left[place] + n - (ends[place] - counts[place]), place


def leading(flags: np.ndarray) -> np.ndarray:
    """How many flags of each row hold before the first that does not."""
    return np.where(flags.all(axis=1), flags.shape[1], np.argmin(flags, axis=1))


class Overlap:
    """The validation tokens, an index of what to look up, and what has been found so far."""

    def __init__(self, tokens: np.ndarray, window: int) -> None:
        self.window, self.k = window, window // 2
        self.reach = window - self.k  # how far windows around a run extend to either side
        self.hashes = Hashes(BLOCK + 4 * window)
        self.bounds = document_bounds(tokens)
        # Windows and short documents leave BOS out; the first document may lack it.
        self.starts = self.bounds[:-1] + (tokens[self.bounds[:-1]] == BOS_ID)
        self.lengths = self.bounds[1:] - self.starts
        self.tokens = np.full(len(tokens) + 2 * self.reach, BOS_ID, np.uint16)
        self.tokens[self.reach : self.reach + len(tokens)] = tokens
        self.found = np.zeros(len(tokens), bool)  # windows, by their first token
        self.first: dict[int, tuple[int, int]] = {}  # document → offsets in val and in training
        self.short: dict[int, int] = {}  # short document → offset in training
        self._index_runs(tokens)
        self._index_short(tokens)

    def _index_runs(self, tokens: np.ndarray) -> None:
        at = np.arange(0, max(len(tokens) - self.k + 1, 0), self.reach + 1)
        bos = np.flatnonzero(tokens == BOS_ID)
        at = at[np.searchsorted(bos, at) == np.searchsorted(bos, at + self.k)]
        keys = np.empty(len(at), np.uint64)
        for low in range(0, len(tokens), BLOCK):
            i, j = np.searchsorted(at, [low, low + BLOCK])
            prefix = self.hashes.prefix(tokens[low : low + BLOCK + self.k])
            keys[i:j] = self.hashes.slices(prefix, at[i:j] - low, at[i:j] - low + self.k)
        order = np.argsort(keys, kind="stable")
        self.at, self.keys = at[order], keys[order]
        self.exhausted = np.zeros(len(at), bool)  # every window around this run is found
        # One look into a sieve of the upper bits spares nearly all of the binary searches.
        bits = min(max(len(at).bit_length() + 4, 16), 26)
        self.shift, self.sieve = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self.sieve[self.keys >> self.shift] = True

    def _index_short(self, tokens: np.ndarray) -> None:
        documents = np.flatnonzero((self.lengths < self.window) & (self.lengths > 0))
        keys = np.zeros(len(documents), np.uint64)
        for i, document in enumerate(documents):
            start, n = self.starts[document], self.lengths[document]
            keys[i] = self.hashes.prefix(tokens[start : start + n])[-1]
        order = np.argsort(keys, kind="stable")
        self.short_documents, self.short_keys = documents[order], keys[order]

    def scan(self, stream: Stream) -> None:
        """Look at all training tokens, block by block, keeping what windows need around them."""
        edge = np.full(self.reach, BOS_ID, np.uint16)
        buffer, offset = edge, -self.reach
        with progress(stream.tokens, "scan", "tok") as bar:
            for block in chain(stream.blocks(), [edge]):
                seen, buffer = len(buffer), np.concatenate([buffer, block])
                prefix = self.hashes.prefix(buffer)
                self._scan_runs(buffer, prefix, offset)
                self._scan_short(buffer, prefix, offset, seen)
                # The next run to look at must be `reach` tokens into the next buffer.
                cut = max(len(buffer) - (self.k + 2 * self.reach - 1), 0)
                buffer, offset = buffer[cut:], offset + cut
                bar.update(len(block))

    def _scan_runs(self, buffer: np.ndarray, prefix: np.ndarray, offset: int) -> None:
        first, last = self.reach, len(buffer) - self.k - self.reach + 1
        if last <= first or not len(self.keys):
            return
        hashes = self.hashes.runs(prefix, first, last, self.k)
        hits = np.flatnonzero(self.sieve[hashes >> self.shift])
        for slots, place in candidates(self.keys, hashes[hits]):
            fresh = ~self.exhausted[slots]
            self._extend(buffer, slots[fresh], hits[place[fresh]] + first, offset)

    def _extend(self, buffer: np.ndarray, slots: np.ndarray, t: np.ndarray, offset: int) -> None:
        """Compare the tokens themselves, both ways from each run, and mark the windows found."""
        k, reach, width = self.k, self.reach, self.k + 2 * self.reach
        ours = sliding_window_view(self.tokens, width)[self.at[slots]]
        theirs = sliding_window_view(buffer, width)[t - reach]
        inside = ours != BOS_ID
        same = (ours == theirs) & inside
        equal = same[:, reach : reach + k].all(axis=1)
        back, on = leading(same[:, :reach][:, ::-1]), leading(same[:, reach + k :])
        full = (back == leading(inside[:, :reach][:, ::-1])) & (
            on == leading(inside[:, reach + k :])
        )
        self.exhausted[slots[equal & full]] = True
        hit = np.flatnonzero(equal & (back + on >= reach))
        start = self.at[slots[hit]] - back[hit]
        count = back[hit] + on[hit] - reach + 1
        windows = start[:, None] + np.arange(reach + 1)
        self.found[windows[np.arange(reach + 1) < count[:, None]]] = True
        documents, which = np.unique(
            np.searchsorted(self.bounds, start, side="right") - 1, return_index=True
        )
        for document, i in zip(documents.tolist(), which, strict=True):
            place = (int(start[i]), offset + int(t[hit[i]] - back[hit[i]]))
            self.first.setdefault(document, place)

    def _scan_short(self, buffer: np.ndarray, prefix: np.ndarray, offset: int, seen: int) -> None:
        """Training documents that end in the new part of the buffer and are short enough."""
        bos = np.flatnonzero(buffer == BOS_ID)
        starts, ends = bos[:-1] + 1, bos[1:]
        chosen = (ends >= seen) & (ends > starts) & (ends - starts < self.window)
        starts, ends = starts[chosen], ends[chosen]
        for slots, place in candidates(self.short_keys, self.hashes.slices(prefix, starts, ends)):
            for document, i in zip(self.short_documents[slots].tolist(), place, strict=True):
                if document not in self.short:
                    start = self.reach + self.starts[document]
                    body = self.tokens[start : start + self.lengths[document]]
                    if np.array_equal(body, buffer[starts[i] : ends[i]]):
                        self.short[document] = offset + int(starts[i])

    def report(self, train: Stream) -> dict:
        """What was found, as --json writes it."""
        found = np.add.reduceat(self.found, self.bounds[:-1], dtype=np.int64)
        documents = []
        for document, (ours, theirs) in sorted(self.first.items()):
            shard, at = train.where(theirs)
            documents.append(
                {
                    "document": document,
                    "windows_found": int(found[document]),
                    "windows": int(self.lengths[document]) - self.window + 1,
                    "offset": ours - int(self.bounds[document]),
                    "shard": shard,
                    "shard_offset": at,
                }
            )
        short = []
        for document, theirs in sorted(self.short.items()):
            shard, at = train.where(theirs)
            short.append(
                {
                    "document": document,
                    "tokens": int(self.lengths[document]),
                    "shard": shard,
                    "shard_offset": at,
                }
            )
        return {
            "window": self.window,
            "train_tokens": train.tokens,
            "val_documents": len(self.lengths),
            "val_tokens": len(self.found),
            "overlap": documents,
            "short_overlap": short,
        }


def shards(setting: str, pattern: str) -> Stream:
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    if not paths:
        raise UserError(
            f"{setting} {pattern}: no such shard; quote the pattern, and see that it "
            "ends like '*_train_*.bin'"
        )
    stream = Stream(paths)
    if not stream.tokens:
        raise UserError(f"{setting} {pattern}: the shards hold no tokens; prepare them again")
    return stream


def show(report: dict) -> None:
    for x in report["overlap"][:SHOWN]:
        print(
            f"document:{x['document']} windows:{x['windows_found']}/{x['windows']} "
            f"first_at:{x['offset']} found_in:{x['shard']} at:{x['shard_offset']}"
        )
    for x in report["short_overlap"][:SHOWN]:
        print(
            f"short_document:{x['document']} tokens:{x['tokens']} "
            f"found_in:{x['shard']} at:{x['shard_offset']}"
        )
    if max(len(report["overlap"]), len(report["short_overlap"])) > SHOWN:
        print(f"only the first {SHOWN} of each kind are shown; --json FILE lists all")
    print(
        f"overlap: {len(report['overlap'])} of {report['val_documents']} validation documents "
        f"share {report['window']} tokens or more with {report['train_tokens']} training tokens; "
        f"{len(report['short_overlap'])} shorter ones are there whole"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="List validation text that is also in training shards.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--train", required=True, metavar="GLOB", help="training shards")
    parser.add_argument("--val", required=True, metavar="GLOB", help="validation shards")
    parser.add_argument("--window", type=int, default=64, help="tokens in a row (default 64)")
    parser.add_argument("--json", metavar="FILE", help="write the whole list there")
    args = parser.parse_args(arguments)
    if not 8 <= args.window <= 4096:
        raise UserError(f"--window {args.window}: must be 8 to 4096; 64 is the usual choice")
    train, val = shards("--train", args.train), shards("--val", args.val)
    if both := {p.resolve() for p in train.paths} & {p.resolve() for p in val.paths}:
        raise UserError(f"{min(both)} is in --train and in --val; narrow one of the patterns")
    overlap = Overlap(val.whole(), args.window)
    overlap.scan(train)
    report = overlap.report(train)
    if args.json:
        with replacing(args.json) as f:
            f.write(json.dumps(report, indent=1).encode() + b"\n")
    show(report)
    return 1 if report["overlap"] or report["short_overlap"] else 0


if __name__ == "__main__":
    run(main, failed=2)
