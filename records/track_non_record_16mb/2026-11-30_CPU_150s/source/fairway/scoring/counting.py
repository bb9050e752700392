"""The n-gram expert led over a text, by a thread of its own where a core is free for it.

Counts depend on the text alone, neither on the model nor on the mixture. So they can be made while
the matches are looked up, while the model scores, and while earlier rows are mixed.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from fairway.scoring.experts.ngram import ContextCounts, NGram
from fairway.scoring.settings import EvalConfig

BLOCK_ROWS = 1 << 14  # rows that the other thread counts in one go


def usable_threads(world: int) -> int:
    """Return how many threads one of `world` ranks may use; OMP_NUM_THREADS can lower it.

    torchrun sets OMP_NUM_THREADS=1 for all ranks, however many cores there are: then cores count.
    """
    if world == 1:
        return torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) // world)


def rows_ahead(cfg: EvalConfig, threads: int) -> int:
    """Return how many rows may be counted ahead: as many as take the memory of the table again."""
    return 0 if threads < 2 else (cfg.ngram_memory_mb << 20) // (12 * cfg.ngram_orders)


class CountedText:
    """The n-gram counts about each token of `targets`, each made before the token is learned.

    With `ahead` rows, another thread begins at once and keeps up to so many rows ready. That
    changes no count.

        with CountedText(NGram(1024), tokens) as counted:
            counts = counted.take(1024)  # about the first 1,024 tokens
    """

    def __init__(self, grams: NGram, targets: np.ndarray, ahead: int = 0):
        self.grams, self.targets, self.taken = grams, targets, 0
        self.text_digest = copy.copy(grams.text_digest)  # of the tokens that were taken
        self.pool = ThreadPoolExecutor(1) if ahead else None
        self.blocks: deque[Future[ContextCounts]] = deque()
        self.rest: list[ContextCounts] = []  # of a block that was taken in part
        self.submitted = 0
        while self.pool and self.submitted < min(max(ahead, BLOCK_ROWS), len(targets)):
            self.submit_block()

    def __enter__(self) -> CountedText:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop counting; what is not taken yet is lost."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def digest(self) -> str:
        """Return the digest of the expert as it was before the next row."""
        return self.text_digest.hexdigest()

    def take(self, m: int) -> ContextCounts:
        """Return the counts about the next m tokens."""
        targets = self.targets[self.taken : self.taken + m]
        self.taken += len(targets)
        counts = self.ready(len(targets)) if self.pool else self.grams.fill(targets)
        self.text_digest.feed(targets)
        return counts

    def submit_block(self) -> None:
        """Let the other thread count one more block."""
        block = self.targets[self.submitted : self.submitted + BLOCK_ROWS]
        if len(block):
            self.blocks.append(self.pool.submit(self.grams.fill, block))
            self.submitted += len(block)

    def ready(self, m: int) -> ContextCounts:
        """Return the next m rows of the other thread's counts, waiting for them if necessary."""
        while sum(len(counts.hits) for counts in self.rest) < m:
            self.rest.append(self.blocks.popleft().result())
            self.submit_block()
        parts = [
            np.concatenate(part) if len(part) > 1 else part[0]
            for part in zip(*self.rest, strict=True)
        ]
        self.rest = [ContextCounts(*(part[m:] for part in parts))]
        return ContextCounts(*(part[:m] for part in parts))
