"""The n-gram expert: exact online counts of grams of 1 to `orders` tokens, and the probability they give.

Every gram seen is an entry of one open-addressing table, and its key is exact: the entry of the gram without its last
token, and that token. Entries never move, so an entry's place stands for its whole gram, and no collision can change a
count. The context of order k before a target is the entry that its last k tokens touched: one lookup an order a token.

Layout of `table` (int64, two words an entry): [key << 17 | kinds, count << 32 | seen], key = place of parent << 16 |
token. Entries 0..V-1 are the single tokens, entry V is the empty context, the hashed ones follow. An entry that is
free has count 0. `seen` and `kinds` count followers that have entries: also when the table is full they are the sum
and the number of the counts below, so the distribution stays exact.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts.state import (
    LONGEST_TEXT,
    Chain,
    check_settings,
    check_tokens,
    inside,
    prefetch,
    reading_state,
    same_shape,
    write_state,
)
from train_gpt import BOS_ID, need

KIND = "n-gram"
HIGHEST_ORDERS = 32
BLOCK = 2048  # tokens that one order passes over before the next order does: their entries stay in the cache
AHEAD = 12  # tokens: how early an entry is asked for
FILLED = 0.8  # of the hashed entries, at most: a search for what is not there then meets 13 of them
WORD = (1 << 32) - 1  # of count << 32 | seen
KINDS = (1 << 17) - 1  # 0 to 65,536 kinds of follower
LARGEST_TABLE = (1 << 30) - 1  # entries: a key has 46 bits
USED, LOGGED = 0, 1  # places in `counters`


class Evidence(NamedTuple):
    """What was known about m targets before each was seen, for K context lengths k = 0..K-1. All uint32 [m, K]."""

    hits: np.ndarray  # how often the target followed the last k tokens before
    seen: np.ndarray  # how often anything followed the last k tokens
    kinds: np.ndarray  # how many different tokens followed them


# ==== COUNTING ========================================================================================================
@njit(cache=True, nogil=True, forceinline=True)
def home(parent, token, root, capacity):
    """Where the search for a gram begins: 32 well-mixed bits scaled to the hashed entries. Signed words wrap."""
    mixed = (parent << 16 | token) * -7046029254386353131
    mixed ^= (mixed >> 32) & WORD
    mixed *= -4658895280553007687
    return root + 1 + ((((mixed >> 32) & WORD) * capacity) >> 32)


@njit(cache=True, nogil=True, forceinline=True)
def find(table, root, capacity, parent, token):
    """The entry of a gram, or the free one where it would go (its count is 0)."""
    if parent == root:
        return token
    key, place = parent << 16 | token, home(parent, token, root, capacity)
    while (table[2 * place + 1] >> 32) != 0 and (table[2 * place] >> 17) != key:
        place += 1
        if place == root + 1 + capacity:
            place = root + 1
    return place


@njit(cache=True, nogil=True, forceinline=True)
def look_up(table, root, capacity, parent, token):
    """Entry, hits, seen and kinds of a token after a context; entry -1 where the context has none."""
    if parent < 0:
        return -1, 0, 0, 0
    place = find(table, root, capacity, parent, token)
    return (
        place,
        table[2 * place + 1] >> 32,
        table[2 * parent + 1] & WORD,
        table[2 * parent] & KINDS,
    )


@njit(cache=True, nogil=True, forceinline=True)
def insert(table, root, limit, counters, log, parent, token, place):
    """Count a gram at its entry. A new one is made unless the table is full: then -1, and nothing was counted."""
    if (table[2 * place + 1] >> 32) == 0:
        if place > root:
            if counters[USED] >= limit:
                return -1
            counters[USED] += 1
        if len(log):
            log[counters[LOGGED]] = place
            counters[LOGGED] += 1
        table[2 * place] = (parent << 16 | token) << 17
        table[2 * parent] += 1
    table[2 * place + 1] += 1 << 32
    table[2 * parent + 1] += 1
    return place


@njit(cache=True, nogil=True, forceinline=True)
def ask_early(table, word):
    """A cache line and the next one, which a search often reaches once the table is well filled."""
    prefetch(table, word)
    prefetch(table, word + 8)


@njit(cache=True, nogil=True)
def pass_order(
    table,
    root,
    capacity,
    limit,
    counters,
    log,
    k,
    x,
    reads,
    read,
    y,
    writes,
    write,
    writing,
    evidence,
):
    """One order over a block: evidence about targets x after the contexts reads, then count followers y after writes.

    `reads` and `writes` are the entries of contexts of k tokens, one a target, and become those of k + 1 tokens;
    `read` and `write` are the first of those, and the ones after the block are returned. Orders touch different
    counts, so going order by order changes nothing, but every entry to come is known and can be asked for early.
    Where x is y, and reads is writes, one search does for both: so it is always when there is no delay.
    """
    hits, seen, kinds = evidence
    apart = writing and y is not x
    for j in range(len(x)):
        if k and j + AHEAD < len(x):
            ask_early(table, 2 * home(reads[j + AHEAD], x[j + AHEAD], root, capacity))
            if apart:
                ask_early(table, 2 * home(writes[j + AHEAD], y[j + AHEAD], root, capacity))
        place, hits[j, k], seen[j, k], kinds[j, k] = look_up(table, root, capacity, reads[j], x[j])
        found = place >= 0 and (k == 0 or hits[j, k] > 0)
        if writing:
            spot = -1
            if writes[j] >= 0:
                twin = writes[j] == reads[j] and y[j] == x[j]
                spot = place if twin else find(table, root, capacity, writes[j], y[j])
                spot = insert(table, root, limit, counters, log, writes[j], y[j], spot)
                found = found or (twin and spot >= 0)
            writes[j], write = write, spot
        reads[j], read = read, place if found else -1
    return read, write


@njit(cache=True, nogil=True)
def pass_block(
    table, root, capacity, limit, counters, log, x, y, contexts, writing, evidence, buffers
):
    """All orders over one block, the lowest first. `contexts` [2, K + 1] are, by context length, the entries before
    the next target and before the next follower to count (-1: none); they move on past the block."""
    m, orders = len(x), contexts.shape[1] - 1
    reads = buffers[0, :m]
    writes = reads if y is x else buffers[1, :m]
    reads[:] = root
    writes[:] = root
    for k in range(orders):
        contexts[0, k + 1], contexts[1, k + 1] = pass_order(
            table,
            root,
            capacity,
            limit,
            counters,
            log,
            k,
            x,
            reads,
            contexts[0, k + 1],
            y,
            writes,
            contexts[1, k + 1],
            writing,
            evidence,
        )


@njit(cache=True, nogil=True)
def clear(table, root, counters, log, contexts):
    """Empty what was touched since the last time."""
    for i in range(counters[LOGGED]):
        table[2 * log[i]] = table[2 * log[i] + 1] = 0
    table[2 * root] = table[2 * root + 1] = 0
    counters[:] = 0
    contexts[:, 1:] = -1


@njit(cache=True, nogil=True)
def advance(
    table,
    root,
    capacity,
    limit,
    counters,
    log,
    stream,
    at,
    stop,
    begin,
    delay,
    contexts,
    evidence,
    buffers,
):
    """Targets stream[at:stop] of one document; the followers waiting to be counted are those from `begin`.

    While the table fills, blocks are so short that none can fill it: what still finds room never depends on them.
    """
    hits, seen, kinds = evidence
    row, orders = 0, contexts.shape[1] - 1
    while at < stop:
        m, writing = min(BLOCK, stop - at), at - delay >= begin
        if not writing:
            m = min(m, begin + delay - at)
        elif orders > 1 and counters[USED] < limit:
            m = min(m, max(1, (limit - counters[USED]) // (orders - 1)))
        x = stream[at : at + m]
        y = stream[at - delay : at - delay + m] if writing else x
        rows = hits[row : row + m], seen[row : row + m], kinds[row : row + m]
        pass_block(
            table, root, capacity, limit, counters, log, x, y, contexts, writing, rows, buffers
        )
        at, row = at + m, row + m


@njit(cache=True, nogil=True)
def count(
    table, root, capacity, limit, counters, log, stream, fresh, delay, reset, contexts, evidence
):
    """Evidence on stream[fresh:], counting as it goes; stream[:fresh] waits to be counted. Returns where the tokens
    that may be counted later begin. A BOS is predicted from the old document, then everything is emptied for it."""
    hits, seen, kinds = evidence
    at, begin, orders = fresh, 0, contexts.shape[1] - 1
    buffers = np.empty((2, BLOCK), np.int64)
    unused = np.empty((3, 1, orders), np.uint32)
    while at < len(stream):
        stop = at
        while stop < len(stream) and not (reset and stream[stop] == BOS_ID):
            stop += 1
        rows = (
            hits[at - fresh : stop - fresh],
            seen[at - fresh : stop - fresh],
            kinds[at - fresh : stop - fresh],
        )
        advance(
            table,
            root,
            capacity,
            limit,
            counters,
            log,
            stream,
            at,
            stop,
            begin,
            delay,
            contexts,
            rows,
            buffers,
        )
        at = stop
        if at < len(stream):
            row, bos = at - fresh, stream[at : at + 1]
            rows = hits[row : row + 1], seen[row : row + 1], kinds[row : row + 1]
            pass_block(
                table,
                root,
                capacity,
                limit,
                counters,
                log,
                bos,
                bos,
                contexts,
                False,
                rows,
                buffers,
            )
            clear(table, root, counters, log, contexts)
            rows = unused[0], unused[1], unused[2]
            advance(
                table,
                root,
                capacity,
                limit,
                counters,
                log,
                stream,
                at,
                at + 1,
                at,
                delay,
                contexts,
                rows,
                buffers,
            )
            at, begin = at + 1, at
    return begin


@njit(cache=True, nogil=True)
def look_up_all(table, root, capacity, contexts, first, evidence):
    """Evidence about candidates first, first + 1, ... for the next place; changes nothing."""
    hits, seen, kinds = evidence
    for k in range(hits.shape[1]):
        parent = root if k == 0 else contexts[0, k]
        for j in range(len(hits)):
            place, hits[j, k], seen[j, k], kinds[j, k] = look_up(
                table, root, capacity, parent, first + j
            )


# ==== PROBABILITIES ===================================================================================================
# By context length, the last for all longer ones. Tuned on training text alone: first passes over 0.2, 1 and 10 million
# tokens of web text and 0.2 and 4 million of speeches, V = 1024, in bits a token over the last million of each:
#   absolute discount of .85 alone     5.828  5.280  4.641  5.426  4.161
#   escapes alone, 2 a kind            5.778  5.234  4.570  5.421  4.086
#   both as below                      5.679  5.091  4.384  5.284  3.916
DISCOUNTS = (0.0, 0.0, 0.5, 0.6, 0.6, 0.6)
ESCAPES = (2.0, 2.0, 2.5, 3.0, 4.0, 2.0)


@njit(cache=True, nogil=True)
def interpolate(evidence, vocab_size, orders, discounts, escapes, out):
    """From 1/V up through the orders: with s seen, n kinds, discount d, escape c, each order turns p into
    (max(hits - d, 0) + (d + c) n p) / (s + c n); one that saw nothing leaves p as it is. The sum stays 1 exactly
    because hits sum to s and n of them are not 0."""
    hits, seen, kinds = evidence
    for j in range(len(out)):
        p = 1.0 / vocab_size
        for k in range(orders):
            if seen[j, k]:
                d, c = discounts[min(k, len(discounts) - 1)], escapes[min(k, len(escapes) - 1)]
                p = (max(hits[j, k] - d, 0.0) + (d + c) * kinds[j, k] * p) / (
                    seen[j, k] + c * kinds[j, k]
                )
        out[j] = p


def probabilities(evidence: Evidence, vocab_size: int) -> np.ndarray:
    """The n-gram expert's probability of each of m targets; float64 [m]."""
    out = np.empty(len(evidence.hits))
    interpolate(tuple(evidence), vocab_size, evidence.hits.shape[1], DISCOUNTS, ESCAPES, out)
    return out


def bigram_probabilities(evidence: Evidence, vocab_size: int) -> np.ndarray:
    """The bigram expert's: contexts of no and one token only; float64 [m]."""
    out = np.empty(len(evidence.hits))
    interpolate(
        tuple(evidence), vocab_size, min(2, evidence.hits.shape[1]), DISCOUNTS, ESCAPES, out
    )
    return out


# ==== THE EXPERT ======================================================================================================
def entry_bytes(reset: bool) -> int:
    """Of memory for each entry: its two words, and its place in the list of what a BOS empties."""
    return 16 + 4 * bool(reset)


class NGram:
    """Online counts of grams of 1..orders tokens; `fill` scores and learns a text, the rest is one token at a time.

    `memory_bytes` bounds the table; once it is full, new grams are not kept and those there go on counting.
    `expected_tokens` (0: unknown) makes it no larger than that many tokens can need. With `delay` D the evidence about
    position t is from grams within tokens[:t - D]. `reset` empties the state at each BOS, which then counts as the
    first token of its document; otherwise grams run across documents.
    """

    def __init__(
        self,
        vocab_size: int,
        orders: int = 6,
        memory_bytes: int = 1 << 28,
        delay: int = 0,
        reset: bool = False,
        expected_tokens: int = 0,
    ):
        check_settings(vocab_size, delay)
        need(
            1 <= orders <= HIGHEST_ORDERS,
            f"the n-gram's orders are {orders}, outside 1 to {HIGHEST_ORDERS}; change it",
        )
        self.vocab_size, self.orders, self.delay, self.reset = (
            vocab_size,
            orders,
            delay,
            bool(reset),
        )
        room = memory_bytes // entry_bytes(reset) - vocab_size - 1
        need(
            room >= 2,
            f"the n-gram's memory is {memory_bytes} bytes, but VOCAB_SIZE={vocab_size} alone takes "
            f"{(vocab_size + 3) * entry_bytes(reset)}; raise it",
        )
        if expected_tokens:
            room = min(room, 2 + int(expected_tokens * (orders - 1) / FILLED))
        self.capacity = min(room, LARGEST_TABLE - vocab_size - 1)
        self.limit = min(
            int(self.capacity * FILLED), self.capacity - 1
        )  # one is free: every search ends
        self.table = np.zeros(2 * (vocab_size + 1 + self.capacity), np.int64)
        self.log = np.zeros(
            vocab_size + self.limit if reset else 0, np.int32
        )  # entries to empty at the next BOS
        self.counters = np.zeros(2, np.int64)
        self.contexts = np.full(
            (2, orders + 1), -1, np.int64
        )  # of the next target, and of the next follower to count
        self.pending = np.zeros(
            0, np.uint16
        )  # the last `delay` tokens of the document: not counted yet
        self.position = 0
        self.chain = Chain(f"{KIND} {self._settings().tolist()}")

    def _settings(self) -> np.ndarray:
        return np.array(
            [self.vocab_size, self.orders, self.delay, self.reset, self.capacity], np.int64
        )

    def _empty_evidence(self, m: int) -> Evidence:
        return Evidence(*(np.empty((m, self.orders), np.uint32) for _ in range(3)))

    def fill(self, tokens: np.ndarray) -> Evidence:
        """Evidence about each token before it was seen, then learn it. How the text is cut into calls is no matter."""
        tokens = check_tokens(tokens, self.vocab_size, self.position)
        evidence, stream = self._empty_evidence(len(tokens)), np.concatenate([self.pending, tokens])
        begin = count(
            self.table,
            self.vocab_size,
            self.capacity,
            self.limit,
            self.counters,
            self.log,
            stream,
            len(self.pending),
            self.delay,
            self.reset,
            self.contexts,
            tuple(evidence),
        )
        self.pending = stream[max(begin, len(stream) - self.delay) :].copy()
        self.position += len(tokens)
        self.chain.feed(tokens)
        return evidence

    def update(self, token: int) -> None:
        self.fill(np.array([token]))

    def side_by_side(self, streams: int) -> list["NGram"]:
        """Experts for as many streams, each with contexts of its own, that share all counts."""
        found = [copy.copy(self) for _ in range(streams)]
        for expert in found:
            expert.contexts = self.contexts.copy()
        return found

    def evidence(self) -> Evidence:
        """About every candidate for the next token; m = V."""
        return self._candidates(0, self.vocab_size)

    def _candidates(self, first: int, m: int) -> Evidence:
        evidence = self._empty_evidence(m)
        look_up_all(
            self.table, self.vocab_size, self.capacity, self.contexts, first, tuple(evidence)
        )
        return evidence

    def probability(self, target: int) -> float:
        """Of the next token, from one lookup an order."""
        (target,) = check_tokens(np.array([target]), self.vocab_size, 0).tolist()
        return float(probabilities(self._candidates(target, 1), self.vocab_size)[0])

    def distribution(self) -> np.ndarray:
        """Of the next token; float64 [V]."""
        return probabilities(self.evidence(), self.vocab_size)

    def digest(self) -> str:
        """SHA-256 of the settings and all tokens learnt, which together determine the state."""
        return self.chain.hexdigest()

    def save(self, path: str | Path) -> None:
        write_state(
            path,
            KIND,
            dict(
                settings=self._settings(),
                position=np.int64(self.position),
                table=self.table,
                log=self.log,
                counters=self.counters,
                contexts=self.contexts,
                pending=self.pending,
                **self.chain.arrays(),
            ),
        )

    @classmethod
    def load(cls, path: str | Path) -> "NGram":
        """The expert as it was saved: it goes on as if never stopped."""
        with reading_state(path, KIND) as saved:
            vocab_size, orders, delay, reset, capacity = saved["settings"].tolist()
            memory_bytes = (capacity + vocab_size + 1) * entry_bytes(reset)
            expert = cls(vocab_size, orders, memory_bytes, delay, bool(reset))
            for name in ("table", "log", "counters", "contexts"):
                setattr(expert, name, same_shape(saved[name], getattr(expert, name)))
            expert.pending = check_tokens(saved["pending"], vocab_size, 0)
            expert.position = int(saved["position"])
            expert.chain.restore(saved)
            entries, (used, logged) = vocab_size + 1 + capacity, expert.counters.tolist()
            if not (
                0 <= used <= expert.limit
                and 0 <= logged <= len(expert.log)
                and inside(expert.log, 0, entries)
                and inside(expert.contexts, -1, entries)
                and len(expert.pending) <= delay <= LONGEST_TEXT
            ):
                raise ValueError("out of bounds")
        return expert
