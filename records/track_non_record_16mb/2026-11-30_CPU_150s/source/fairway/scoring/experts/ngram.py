"""The n-gram expert: exact online counts of grams of 1 to `orders` tokens, and their probabilities.

Every gram that was read is an entry of one open-addressing table. Its key is exact: the entry of
the gram without its last token (the parent), and that token. So no collision can change a count,
and a hash is never trusted alone. Entries never move, so the index of an entry stands for its gram.
The context of k tokens before a target is the entry that the last k tokens led to: one lookup for
each order and token, and no text is hashed twice.

`words` (int64) holds two words for each entry:

    word 0: parent << 33 | token << 17 | kinds     46 bits of key, 17 bits of kinds
    word 1: count << 32 | seen

`count` is how often the gram was read, `seen` how often any token followed it, and `kinds` how many
different ones did. Entries 0..V-1 are the single tokens, entry V is the empty context, and the
hashed entries follow. A free entry has count 0. `seen` and `kinds` count only followers that have
entries of their own. They therefore stay the sum and the number of the counts below when the table
is full, and the probabilities still sum to one.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts.prefetch import prefetch
from fairway.scoring.experts.state import (
    LONGEST_TEXT,
    TokenDigest,
    all_within,
    check_settings,
    check_tokens,
    open_state,
    same_shape,
    write_state,
)
from train_gpt import BOS_ID, UserError

KIND = "n-gram"
HIGHEST_ORDERS = 32
BLOCK = 2048  # tokens that one order passes over before the next: their entries stay in the cache
AHEAD = 12  # tokens: how early an entry is prefetched
FILLED = (
    0.8  # most of the hashed entries in use: a failing search then probes 13 of them on average
)
WORD = (1 << 32) - 1  # mask of the low half of a word
KINDS = (1 << 17) - 1  # mask of `kinds`: 0 to 65,536
LARGEST_TABLE = (1 << 30) - 1  # entries: 30 bits of parent and 16 of token make a key
USED, LOGGED = 0, 1  # indices into `counters`


class ContextCounts(NamedTuple):
    """Counts about m targets, each before it was read, by context length; uint32 [m, K]."""

    hits: np.ndarray  # how often the target followed the last k tokens
    seen: np.ndarray  # how often any token followed the last k tokens
    kinds: np.ndarray  # how many different tokens followed them


class GramTable(NamedTuple):
    """The table as compiled code takes it."""

    words: np.ndarray  # int64 [2 * entries]
    root: int  # entry of the empty context: the vocabulary's size
    capacity: int  # hashed entries
    limit: int  # most of them in use
    counters: np.ndarray  # int64 [2]: hashed entries in use, entries logged
    log: np.ndarray  # int32: entries to clear at the next BOS; empty where nothing is reset


# ==== ONE GRAM ====================================================================================
# Called for every order of every token: inlined, because a call costs more than they do.
inlined = njit(cache=True, nogil=True, inline="always")


@inlined
def home_entry(parent, token, root, capacity):
    """Return the entry where the search for a gram begins: 32 mixed bits scaled to the capacity.

    Multiplications of int64 wrap, as the mixing needs.
    """
    mixed = (parent << 16 | token) * -7046029254386353131
    mixed ^= (mixed >> 32) & WORD
    mixed *= -4658895280553007687
    return root + 1 + ((((mixed >> 32) & WORD) * capacity) >> 32)


@inlined
def find_gram(words, root, capacity, parent, token):
    """Return the entry of a gram, or the free one where it would go (its count is 0)."""
    entry = np.int64(token)
    if parent != root:
        key, entry = parent << 16 | token, home_entry(parent, token, root, capacity)
        while (words[2 * entry + 1] >> 32) != 0 and (words[2 * entry] >> 17) != key:
            entry += 1
            if entry == root + 1 + capacity:
                entry = root + 1
    return entry


@inlined
def look_up_gram(words, root, capacity, parent, token):
    """Return entry, hits, seen and kinds of a token; -1 and zeros without a context."""
    entry, hits, seen, kinds = -1, 0, 0, 0
    if parent >= 0:
        entry = find_gram(words, root, capacity, parent, token)
        hits, seen = words[2 * entry + 1] >> 32, words[2 * parent + 1] & WORD
        kinds = words[2 * parent] & KINDS
    return entry, hits, seen, kinds


@inlined
def count_gram(words, root, limit, counters, log, parent, token, entry):
    """Count a gram once and return its entry; -1 if it is new and the table is full."""
    is_new, has_room = (words[2 * entry + 1] >> 32) == 0, True
    if is_new and entry > root:
        has_room = counters[USED] < limit
        counters[USED] += has_room
    if is_new and has_room:
        if len(log):
            log[counters[LOGGED]] = entry
            counters[LOGGED] += 1
        words[2 * entry] = (parent << 16 | token) << 17
        words[2 * parent] += 1
    if has_room:
        words[2 * entry + 1] += 1 << 32
        words[2 * parent + 1] += 1
    return entry if has_room else -1


@inlined
def prefetch_entry(words, entry):
    """Prefetch an entry and the next cache line: in a well-filled table searches reach it."""
    prefetch(words, 2 * entry)
    prefetch(words, 2 * entry + 8)


# ==== A TEXT ======================================================================================
@njit(cache=True, nogil=True)
def count_order(
    table, k, targets, reads, next_read, followers, writes, next_write, counting, counts
):
    """Pass one order over a block: look up the targets, then count the followers if `counting`.

    `reads` and `writes` are the entries of contexts of k tokens, one for each target and each
    follower, or -1. They are replaced by those of k + 1 tokens: `next_read` and `next_write` come
    first, and those after the block are returned. Orders touch different counts, so passing order
    by order changes no result, but all entries of a pass are known early and can be prefetched.
    Without a delay, followers are the targets and writes the reads: one search serves both.
    """
    words, root, capacity, limit, counters, log = table
    hits, seen, kinds = counts
    delayed = counting and followers is not targets
    for j in range(len(targets)):
        if k and j + AHEAD < len(targets):
            ahead = j + AHEAD
            prefetch_entry(words, home_entry(reads[ahead], targets[ahead], root, capacity))
            if delayed:
                prefetch_entry(words, home_entry(writes[ahead], followers[ahead], root, capacity))
        entry, hits[j, k], seen[j, k], kinds[j, k] = look_up_gram(
            words, root, capacity, reads[j], targets[j]
        )
        exists = entry >= 0 and (k == 0 or hits[j, k] > 0)
        if counting:
            written = -1
            if writes[j] >= 0:
                same = writes[j] == reads[j] and followers[j] == targets[j]
                if same:
                    written = entry
                else:
                    written = find_gram(words, root, capacity, writes[j], followers[j])
                written = count_gram(
                    words, root, limit, counters, log, writes[j], followers[j], written
                )
                exists = exists or (same and written >= 0)
            writes[j], next_write = next_write, written
        reads[j], next_read = next_read, entry if exists else -1
    return next_read, next_write


@njit(cache=True, nogil=True)
def count_order_with_room(table, k, targets, reads, next_read, counts):
    """Do what `count_order` does, in half the time, in the usual case.

    All contexts exist, nothing is delayed or logged, and the block cannot fill the table. So no
    branch depends on whether a gram is new, which processors predict badly.
    """
    words, root, capacity, _, counters, _ = table
    hits, seen, kinds = counts
    made = 0
    for j in range(len(targets)):
        if k and j + AHEAD < len(targets):
            ahead = home_entry(reads[j + AHEAD], targets[j + AHEAD], root, capacity)
            prefetch_entry(words, ahead)
        parent, token = reads[j], np.int64(targets[j])
        key, entry = parent << 16 | token, token
        if k:
            entry = home_entry(parent, token, root, capacity)
            # A free entry may look like the gram of key 0; it is the one to take even so.
            while (words[2 * entry] >> 17) != key and (words[2 * entry + 1] >> 32) != 0:
                entry += 1
                if entry == root + 1 + capacity:
                    entry = root + 1
        numbers, above = words[2 * entry + 1], words[2 * parent + 1]
        hits[j, k], seen[j, k] = numbers >> 32, above & WORD
        kinds[j, k] = words[2 * parent] & KINDS
        is_new = np.int64((numbers >> 32) == 0)
        words[2 * entry] |= (key << 17) * is_new  # a free entry's words are 0
        words[2 * parent] += is_new
        words[2 * entry + 1] = numbers + (1 << 32)
        words[2 * parent + 1] = above + 1
        made += is_new
        reads[j], next_read = next_read, entry
    if k:
        counters[USED] += made
    return next_read


@njit(cache=True, nogil=True)
def count_block(table, targets, followers, contexts, counting, counts, buffers):
    """Pass all orders over one block, the lowest first.

    `contexts` [2, K + 1] are, by length, the entries of the contexts before the next target and
    before the next follower to count (-1: none); they move on past the block. `buffers` is
    int64 [2, BLOCK].
    """
    m, orders = len(targets), contexts.shape[1] - 1
    reads = buffers[0, :m]
    writes = reads if followers is targets else buffers[1, :m]
    reads[:] = table.root
    writes[:] = table.root
    has_room = counting and followers is targets and not len(table.log)
    if has_room and orders > 1:
        has_room = table.counters[USED] + m * (orders - 1) <= table.limit
        has_room = has_room and contexts[0, 1:orders].min() >= 0
    for k in range(orders):
        if has_room:
            contexts[:, k + 1] = count_order_with_room(
                table, k, targets, reads, contexts[0, k + 1], counts
            )
            continue
        contexts[0, k + 1], contexts[1, k + 1] = count_order(
            table,
            k,
            targets,
            reads,
            contexts[0, k + 1],
            followers,
            writes,
            contexts[1, k + 1],
            counting,
            counts,
        )


@njit(cache=True, nogil=True)
def clear_table(table, contexts):
    """Empty every entry in use, by the log of those that were made since the last time."""
    words, root, counters, log = table.words, table.root, table.counters, table.log
    for i in range(counters[LOGGED]):
        words[2 * log[i]] = words[2 * log[i] + 1] = 0
    words[2 * root] = words[2 * root + 1] = 0
    counters[:] = 0
    contexts[:, 1:] = -1


@njit(cache=True, nogil=True)
def count_document(table, stream, at, stop, begin, delay, contexts, counts, buffers):
    """Look up targets stream[at:stop] of one document, counting tokens `delay` behind them.

    Followers that wait to be counted start at `begin`. While the table fills, blocks are kept so
    short that none can fill it. Which grams still find room then never depends on the blocks.
    """
    hits, seen, kinds = counts
    row, orders = 0, contexts.shape[1] - 1
    while at < stop:
        m, counting = min(BLOCK, stop - at), at - delay >= begin
        if not counting:
            m = min(m, begin + delay - at)
        elif orders > 1 and table.counters[USED] < table.limit:
            m = min(m, max(1, (table.limit - table.counters[USED]) // (orders - 1)))
        targets = stream[at : at + m]
        followers = stream[at - delay : at - delay + m] if counting else targets
        rows = hits[row : row + m], seen[row : row + m], kinds[row : row + m]
        count_block(table, targets, followers, contexts, counting, rows, buffers)
        at, row = at + m, row + m


@njit(cache=True, nogil=True)
def count_stream(table, stream, fresh, delay, reset, contexts, counts):
    """Look up stream[fresh:] and count as it goes; stream[:fresh] still waits to be counted.

    Returns where the tokens begin that may be counted later. With `reset`, a BOS is predicted from
    the old document; then everything is emptied and the BOS is the first token of the new one.
    """
    hits, seen, kinds = counts
    # Typed zeros, not literals: for a literal Numba would compile everything below a second time.
    at, begin, orders, never = fresh, np.int64(0), contexts.shape[1] - 1, np.bool_(False)
    buffers, unused = np.empty((2, BLOCK), np.int64), np.empty((3, 1, orders), np.uint32)
    while at < len(stream):
        stop = at
        while stop < len(stream) and not (reset and stream[stop] == BOS_ID):
            stop += 1
        row, end = at - fresh, stop - fresh
        rows = hits[row:end], seen[row:end], kinds[row:end]
        count_document(table, stream, at, stop, begin, delay, contexts, rows, buffers)
        at = stop
        if at < len(stream):
            bos = stream[at : at + 1]
            rows = hits[end : end + 1], seen[end : end + 1], kinds[end : end + 1]
            count_block(table, bos, bos, contexts, never, rows, buffers)
            clear_table(table, contexts)
            rows, begin = (unused[0], unused[1], unused[2]), at
            count_document(table, stream, at, at + 1, begin, delay, contexts, rows, buffers)
            at += 1
    return begin


@njit(cache=True, nogil=True)
def look_up_candidates(table, contexts, first, counts):
    """Fill in the counts about candidates first, first + 1, ... for the next position."""
    words, root, capacity = table.words, table.root, table.capacity
    hits, seen, kinds = counts
    for k in range(hits.shape[1]):
        parent = root if k == 0 else contexts[0, k]
        for j in range(len(hits)):
            _, hits[j, k], seen[j, k], kinds[j, k] = look_up_gram(
                words, root, capacity, parent, first + j
            )


# ==== PROBABILITIES ===============================================================================
# By context length, the last for all longer ones. Tuned on training text alone: first passes over
# 0.2, 1 and 10 million tokens of web text and 0.2 and 4 million of speeches, V = 1024, in bits a
# token over the last million of each:
#   absolute discount of .85 alone     5.828  5.280  4.641  5.426  4.161
#   escapes alone, 2 a kind            5.778  5.234  4.570  5.421  4.086
#   both as below                      5.679  5.091  4.384  5.284  3.916
DISCOUNTS = (0.0, 0.0, 0.5, 0.6, 0.6, 0.6)
ESCAPES = (2.0, 2.0, 2.5, 3.0, 4.0, 2.0)


@njit(cache=True, nogil=True)
def interpolate(counts, vocab_size, orders, discounts, escapes, out):
    """Fill out [m] with probabilities: from 1/V up through the orders.

    With s seen, n kinds, discount d and escape c, each order turns p into
    (max(hits - d, 0) + (d + c) n p) / (s + c n); an order that saw nothing leaves p as it is.
    The sum over the vocabulary stays 1 because hits sum to s and n of them are not 0.
    """
    hits, seen, kinds = counts
    for j in range(len(out)):
        p = 1.0 / vocab_size
        for k in range(orders):
            if seen[j, k]:
                d, c = discounts[min(k, len(discounts) - 1)], escapes[min(k, len(escapes) - 1)]
                p = (max(hits[j, k] - d, 0.0) + (d + c) * kinds[j, k] * p) / (
                    seen[j, k] + c * kinds[j, k]
                )
        out[j] = p


def ngram_probabilities(counts: ContextCounts, vocab_size: int, orders: int = 0) -> np.ndarray:
    """Return the n-gram expert's probability of each of m targets, float64 [m].

    `orders` limits the contexts to fewer than so many tokens (0: all): 2 makes it the bigram
    expert.
    """
    out, counted = np.empty(len(counts.hits)), counts.hits.shape[1]
    orders = min(orders, counted) if orders else counted
    interpolate(tuple(counts), vocab_size, orders, DISCOUNTS, ESCAPES, out)
    return out


# ==== THE EXPERT ==================================================================================
def entry_bytes(reset: bool) -> int:
    """Return the memory of one entry: two words, and 4 bytes of the log that a reset needs."""
    return 16 + 4 * bool(reset)


class NGram:
    """Online counts of grams of 1..orders tokens.

    `fill` scores and learns a text; `probability`, `distribution` and `update` take one token at a
    time. `memory_bytes` bounds the table: once it is full, new grams are dropped and known ones are
    still counted. `expected_tokens` (0: unknown) makes it no larger than that many tokens can need.
    With `delay` D, the counts about position t come from tokens[:t - D]. `reset` empties the state
    at each BOS, which then is the first token of its document; otherwise grams run across
    documents.

        expert = NGram(1024)
        expert.fill(tokens).hits[-1]  # how often the last token had followed its 0..5 predecessors
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
        if not 1 <= orders <= HIGHEST_ORDERS:
            raise UserError(
                f"the n-gram's orders are {orders}, outside 1 to {HIGHEST_ORDERS}; change it"
            )
        self.vocab_size, self.orders = vocab_size, orders
        self.delay, self.reset = delay, bool(reset)
        room = memory_bytes // entry_bytes(reset) - vocab_size - 1
        if room < 2:
            raise UserError(
                f"the n-gram's memory is {memory_bytes} bytes, but VOCAB_SIZE={vocab_size} alone "
                f"takes {(vocab_size + 3) * entry_bytes(reset)}; raise it"
            )
        if expected_tokens:
            room = min(room, 2 + int(expected_tokens * (orders - 1) / FILLED))
        self.capacity = min(room, LARGEST_TABLE - vocab_size - 1)
        # One entry stays free, so that every search ends.
        self.limit = min(int(self.capacity * FILLED), self.capacity - 1)
        self.table = np.zeros(2 * (vocab_size + 1 + self.capacity), np.int64)
        self.log = np.zeros(vocab_size + self.limit if reset else 0, np.int32)
        self.counters = np.zeros(2, np.int64)
        # Entries before the next target, and before the next follower to count, by context length.
        self.contexts = np.full((2, orders + 1), -1, np.int64)
        self.pending = np.zeros(0, np.uint16)  # the last `delay` tokens: not counted yet
        self.position = 0
        self.text_digest = TokenDigest(f"{KIND} {self._settings().tolist()}")

    def _settings(self) -> np.ndarray:
        return np.array(
            [self.vocab_size, self.orders, self.delay, self.reset, self.capacity], np.int64
        )

    def _table(self) -> GramTable:
        return GramTable(
            self.table, self.vocab_size, self.capacity, self.limit, self.counters, self.log
        )

    def _empty_counts(self, m: int) -> ContextCounts:
        return ContextCounts(*(np.empty((m, self.orders), np.uint32) for _ in range(3)))

    def fill(self, tokens: np.ndarray) -> ContextCounts:
        """Return the counts about each token before it was read, then learn it.

        The pieces in which a text arrives make no difference.
        """
        tokens = check_tokens(tokens, self.vocab_size, self.position)
        counts, stream = self._empty_counts(len(tokens)), np.concatenate([self.pending, tokens])
        begin = count_stream(
            self._table(),
            stream,
            len(self.pending),
            self.delay,
            self.reset,
            self.contexts,
            tuple(counts),
        )
        self.pending = stream[max(begin, len(stream) - self.delay) :].copy()
        self.position += len(tokens)
        self.text_digest.feed(tokens)
        return counts

    def update(self, token: int) -> None:
        """Learn one token."""
        self.fill(np.array([token]))

    def side_by_side(self, streams: int) -> list["NGram"]:
        """Return an expert for each stream; each has its own contexts, all share the counts."""
        experts = [copy.copy(self) for _ in range(streams)]
        for expert in experts:
            expert.contexts = self.contexts.copy()
        return experts

    def candidate_counts(self) -> ContextCounts:
        """Return the counts about every candidate for the next token; m = V."""
        return self._candidates(0, self.vocab_size)

    def _candidates(self, first: int, m: int) -> ContextCounts:
        counts = self._empty_counts(m)
        look_up_candidates(self._table(), self.contexts, first, tuple(counts))
        return counts

    def probability(self, target: int) -> float:
        """Return the probability of the next token, from one lookup for each order."""
        (target,) = check_tokens(np.array([target]), self.vocab_size, 0).tolist()
        return float(ngram_probabilities(self._candidates(target, 1), self.vocab_size)[0])

    def distribution(self) -> np.ndarray:
        """Return the distribution of the next token, float64 [V]."""
        return ngram_probabilities(self.candidate_counts(), self.vocab_size)

    def digest(self) -> str:
        """Return the SHA-256 of the settings and all tokens read, which determine the state."""
        return self.text_digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the state to a file."""
        names = ("table", "log", "counters", "contexts", "pending")
        arrays = {name: getattr(self, name) for name in names}
        arrays |= {"settings": self._settings(), "position": np.int64(self.position)}
        write_state(path, KIND, arrays | self.text_digest.arrays())

    @classmethod
    def load(cls, path: str | Path) -> "NGram":
        """Return the expert that was saved; it goes on as if it had never stopped."""
        with open_state(path, KIND) as saved:
            vocab_size, orders, delay, reset, capacity = saved["settings"].tolist()
            memory_bytes = (capacity + vocab_size + 1) * entry_bytes(reset)
            expert = cls(vocab_size, orders, memory_bytes, delay, bool(reset))
            for name in ("table", "log", "counters", "contexts"):
                setattr(expert, name, same_shape(saved[name], getattr(expert, name)))
            expert.pending = check_tokens(saved["pending"], vocab_size, 0)
            expert.position = int(saved["position"])
            expert.text_digest.restore(saved)
            entries, (used, logged) = vocab_size + 1 + capacity, expert.counters.tolist()
            if not (
                0 <= used <= expert.limit
                and 0 <= logged <= len(expert.log)
                and all_within(expert.log, 0, entries)
                and all_within(expert.contexts, -1, entries)
                and len(expert.pending) <= delay <= LONGEST_TEXT
            ):
                raise ValueError("out of bounds")
        return expert
