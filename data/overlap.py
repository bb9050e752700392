"""Find validation text in training shards: windows of 64 tokens, and short whole documents.

The search is exact and reads the training tokens once. For windows of W tokens, let k = W // 2.
Every window contains a run of k tokens that starts at a multiple of W - k + 1. So the script
indexes only those runs of the validation tokens, and looks up every run of k training tokens.
Equal hashes only propose a match. The tokens decide: they are compared, and the match is extended
to both sides. A window never contains BOS, so no match spans two documents. A document shorter
than a window matches when a training document equals it from BOS to BOS; the report lists those
separately.

Memory: 6 bytes per validation token, one mapped shard, and about 200 MB for any number of shards.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

# When this file runs as a script, Python searches data/ for modules, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.progress import progress_bar
from fairway.command_line import Parser, UsageError, run_reporting
from train_gpt import BOS_ID, UserError, document_bounds, list_shards, read_shard, replacing

BLOCK = 1 << 20  # training tokens hashed in one step
PAIRS = 1 << 14  # candidate pairs compared in one step
PRINTED = 50  # documents of each kind; --json lists all

EXAMPLES = """examples:
  python data/overlap.py --train 'data/embedded/*_train_*.bin' --val 'data/embedded/*_val_*.bin'
  python data/overlap.py --train 'train/*.bin' --val 'val/*.bin' --window 32 --json overlap.json

exit code: 0 no overlap, 1 overlap found, 2 error"""


class Hashes:
    """Polynomial hashes, modulo 2**64, of any slices of a block of at most `longest` tokens.

    The hash of a slice is the difference of two prefix sums, scaled down to position 0, so equal
    slices have equal hashes wherever they lie.
    """

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
        """Return uint64[n + 1]: sums over the tokens before each position."""
        sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum((tokens + np.uint64(1)) * self.up[: len(tokens)], out=sums[1:])
        return sums

    def slices(self, prefix: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Return the hashes of the slices from `starts` to `ends`."""
        return (prefix[ends] - prefix[starts]) * self.down[starts]

    def runs(self, prefix: np.ndarray, first: int, last: int, k: int) -> np.ndarray:
        """Return the hashes of the k tokens from each of first … last - 1."""
        return (prefix[first + k : last + k] - prefix[first:last]) * self.down[first:last]


class ShardSequence:
    """Several shards read as one sequence of tokens.

    A shard with the next number continues the one before it, since the challenge's export cuts
    documents at the end of a shard. If a number is missing, a BOS goes between the two shards, so
    that no window spans the gap.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths, sizes = paths, [len(read_shard(p)) for p in paths]
        self.gaps = [False, *(not follows(a, b) for a, b in pairwise(paths))]
        ends = np.cumsum(sizes) + np.cumsum(self.gaps)
        self.starts = (ends - sizes).tolist()
        self.tokens = int(ends[-1])

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all tokens in order, at most BLOCK at a time."""
        for path, gap in zip(self.paths, self.gaps, strict=True):
            if gap:
                yield np.array([BOS_ID], np.uint16)
            shard = read_shard(path)  # a memory map; only one at a time, so that memory is bounded
            for i in range(0, len(shard), BLOCK):
                yield np.asarray(shard[i : i + BLOCK])

    def locate(self, offset: int) -> tuple[str, int]:
        """Return the shard that holds token `offset`, and the token's position in it."""
        i = max(int(np.searchsorted(self.starts, offset, side="right")) - 1, 0)
        return str(self.paths[i]), int(offset) - self.starts[i]

    def read_all(self) -> np.ndarray:
        """Return all tokens as one uint16 array."""
        tokens, n = np.empty(self.tokens, np.uint16), 0
        for block in self.blocks():
            tokens[n : n + len(block)] = block
            n += len(block)
        return tokens


def follows(a: Path, b: Path) -> bool:
    """Return True if b's name is a's with the number at its end increased by one."""
    (head_a, n_a), (head_b, n_b) = (re.fullmatch(r"(.*?)(\d*)", p.stem).groups() for p in (a, b))
    return (
        (a.parent, head_a) == (b.parent, head_b)
        and n_a + n_b != ""
        and (int(n_b or -1) == int(n_a or -2) + 1)
    )


def candidate_pairs(
    keys: np.ndarray, hashes: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs of equal values as two arrays, at most PAIRS pairs at a time.

    The first array holds positions in the sorted `keys`, the second positions in `hashes`.
    """
    left = np.searchsorted(keys, hashes, side="left")
    counts = np.searchsorted(keys, hashes, side="right") - left
    ends = np.cumsum(counts)
    for low in range(0, int(ends[-1]) if len(ends) else 0, PAIRS):
        n = np.arange(low, min(low + PAIRS, ends[-1]))
        place = np.searchsorted(ends, n, side="right")
        yield left[place] + n - (ends[place] - counts[place]), place


def count_leading(flags: np.ndarray) -> np.ndarray:
    """Count, in each row, the True values before the first False."""
    return np.where(flags.all(axis=1), flags.shape[1], np.argmin(flags, axis=1))


class Overlap:
    """The validation tokens, an index of their runs, and the matches found so far."""

    def __init__(self, tokens: np.ndarray, window: int) -> None:
        self.window, self.k = window, window // 2
        self.reach = window - self.k  # tokens that a window has on either side of its run, at most
        self.hashes = Hashes(BLOCK + 4 * window)
        self.bounds = document_bounds(tokens)
        # Windows and short documents exclude BOS. The first document may start without one.
        self.starts = self.bounds[:-1] + (tokens[self.bounds[:-1]] == BOS_ID)
        self.lengths = self.bounds[1:] - self.starts
        self.tokens = np.full(len(tokens) + 2 * self.reach, BOS_ID, np.uint16)
        self.tokens[self.reach : self.reach + len(tokens)] = tokens
        self.matched = np.zeros(len(tokens), bool)  # True where a matched window starts
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
        self.exhausted = np.zeros(len(at), bool)  # every window around this run is matched
        # A lookup by the upper bits avoids nearly all of the binary searches.
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

    def scan(self, train: ShardSequence) -> None:
        """Search all training tokens, block by block; blocks overlap as far as windows reach."""
        edge = np.full(self.reach, BOS_ID, np.uint16)
        buffer, offset = edge, -self.reach
        with progress_bar(train.tokens, "scan", "tok") as bar:
            for block in chain(train.blocks(), [edge]):
                seen, buffer = len(buffer), np.concatenate([buffer, block])
                prefix = self.hashes.prefix(buffer)
                self._scan_runs(buffer, prefix, offset)
                self._scan_short(buffer, prefix, offset, seen)
                # The next run to look up must lie `reach` tokens after the next buffer's start.
                cut = max(len(buffer) - (self.k + 2 * self.reach - 1), 0)
                buffer, offset = buffer[cut:], offset + cut
                bar.update(len(block))

    def _scan_runs(self, buffer: np.ndarray, prefix: np.ndarray, offset: int) -> None:
        first, last = self.reach, len(buffer) - self.k - self.reach + 1
        if last <= first or not len(self.keys):
            return
        hashes = self.hashes.runs(prefix, first, last, self.k)
        hits = np.flatnonzero(self.sieve[hashes >> self.shift])
        for slots, place in candidate_pairs(self.keys, hashes[hits]):
            fresh = ~self.exhausted[slots]
            self._extend(buffer, slots[fresh], hits[place[fresh]] + first, offset)

    def _extend(self, buffer: np.ndarray, slots: np.ndarray, t: np.ndarray, offset: int) -> None:
        """Compare the tokens to both sides of each run, and mark the windows that match."""
        k, reach, width = self.k, self.reach, self.k + 2 * self.reach
        ours = sliding_window_view(self.tokens, width)[self.at[slots]]
        theirs = sliding_window_view(buffer, width)[t - reach]
        inside = ours != BOS_ID
        same = (ours == theirs) & inside
        equal = same[:, reach : reach + k].all(axis=1)
        before = count_leading(same[:, :reach][:, ::-1])
        after = count_leading(same[:, reach + k :])
        full = (before == count_leading(inside[:, :reach][:, ::-1])) & (
            after == count_leading(inside[:, reach + k :])
        )
        self.exhausted[slots[equal & full]] = True
        hit = np.flatnonzero(equal & (before + after >= reach))
        start = self.at[slots[hit]] - before[hit]
        count = before[hit] + after[hit] - reach + 1
        windows = start[:, None] + np.arange(reach + 1)
        self.matched[windows[np.arange(reach + 1) < count[:, None]]] = True
        documents, which = np.unique(
            np.searchsorted(self.bounds, start, side="right") - 1, return_index=True
        )
        for document, i in zip(documents.tolist(), which, strict=True):
            place = (int(start[i]), offset + int(t[hit[i]] - before[hit[i]]))
            self.first.setdefault(document, place)

    def _scan_short(self, buffer: np.ndarray, prefix: np.ndarray, offset: int, seen: int) -> None:
        """Compare the short training documents that end in the new part of the buffer."""
        bos = np.flatnonzero(buffer == BOS_ID)
        starts, ends = bos[:-1] + 1, bos[1:]
        chosen = (ends >= seen) & (ends > starts) & (ends - starts < self.window)
        starts, ends = starts[chosen], ends[chosen]
        for slots, place in candidate_pairs(
            self.short_keys, self.hashes.slices(prefix, starts, ends)
        ):
            for document, i in zip(self.short_documents[slots].tolist(), place, strict=True):
                if document not in self.short:
                    start = self.reach + self.starts[document]
                    body = self.tokens[start : start + self.lengths[document]]
                    if np.array_equal(body, buffer[starts[i] : ends[i]]):
                        self.short[document] = offset + int(starts[i])

    def report(self, train: ShardSequence) -> dict:
        """Return all matches in the form that --json writes."""
        matched = np.add.reduceat(self.matched, self.bounds[:-1], dtype=np.int64)
        documents = []
        for document, (ours, theirs) in sorted(self.first.items()):
            shard, at = train.locate(theirs)
            documents.append(
                {
                    "document": document,
                    "windows_found": int(matched[document]),
                    "windows": int(self.lengths[document]) - self.window + 1,
                    "offset": ours - int(self.bounds[document]),
                    "shard": shard,
                    "shard_offset": at,
                }
            )
        short = []
        for document, theirs in sorted(self.short.items()):
            shard, at = train.locate(theirs)
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
            "val_tokens": len(self.matched),
            "overlap": documents,
            "short_overlap": short,
        }


def open_shards(option: str, pattern: str) -> ShardSequence:
    """Open the shards that match `pattern`; `option` names it in errors."""
    paths = list_shards(pattern)
    if not paths:
        raise UserError(
            f"{option} {pattern}: no such shard; quote the pattern, and check that it "
            "ends like '*_train_*.bin'"
        )
    shards = ShardSequence(paths)
    if not shards.tokens:
        raise UserError(f"{option} {pattern}: the shards hold no tokens; prepare them again")
    return shards


def print_report(report: dict) -> None:
    """Print a line for each of the first documents, and one that counts all."""
    for x in report["overlap"][:PRINTED]:
        print(
            f"document:{x['document']} windows:{x['windows_found']}/{x['windows']} "
            f"first_at:{x['offset']} found_in:{x['shard']} at:{x['shard_offset']}"
        )
    for x in report["short_overlap"][:PRINTED]:
        print(
            f"short_document:{x['document']} tokens:{x['tokens']} "
            f"found_in:{x['shard']} at:{x['shard_offset']}"
        )
    if max(len(report["overlap"]), len(report["short_overlap"])) > PRINTED:
        print(f"only the first {PRINTED} of each kind are printed; --json FILE lists all")
    print(
        f"overlap: {len(report['overlap'])} of {report['val_documents']} validation documents "
        f"share {report['window']} tokens or more with {report['train_tokens']} training tokens; "
        f"{len(report['short_overlap'])} shorter ones equal a training document"
    )


def main(arguments: list[str] | None = None) -> int:
    """Scan the shards of the command line; return 1 if they overlap, else 0."""
    parser = Parser(
        prog="data/overlap.py",
        description="List validation text that is also in training shards.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--train", required=True, metavar="GLOB", help="training shards")
    parser.add_argument("--val", required=True, metavar="GLOB", help="validation shards")
    parser.add_argument("--window", type=int, default=64, help="tokens per window (default 64)")
    parser.add_argument("--json", metavar="FILE", help="write all matches to FILE")
    args = parser.parse_args(arguments)
    if not 8 <= args.window <= 4096:
        raise UsageError(f"--window {args.window}: must be 8 to 4096; 64 is the usual choice")
    train, val = open_shards("--train", args.train), open_shards("--val", args.val)
    if both := {p.resolve() for p in train.paths} & {p.resolve() for p in val.paths}:
        raise UserError(f"{min(both)} is in --train and in --val; narrow one of the patterns")
    overlap = Overlap(val.read_all(), args.window)
    overlap.scan(train)
    report = overlap.report(train)
    if args.json:
        with replacing(args.json) as f:
            f.write(json.dumps(report, indent=1).encode() + b"\n")
    print_report(report)
    return 1 if report["overlap"] or report["short_overlap"] else 0


def main_or_usage_error() -> int:
    """Run `main` with exit code 2 for every error, since 1 means that overlap was found."""
    try:
        return main()
    except UserError as e:
        raise UsageError(str(e)) from None
    except OSError as e:
        raise UsageError(f"{e.filename or 'files'}: {e.strerror or e}") from None


if __name__ == "__main__":
    sys.exit(run_reporting("overlap", main_or_usage_error))
