"""The modelled codec: entries coded with the model's own opinion of each row.

**Flags.** One flag a row says whether the row is listed. Its chance is the model's tail mass at
that row times a learned ratio: rows that were listed, divided by rows that were expected. The ratio
is first learned by how recent the last entries are, since errors come in bursts, and then by that
and the size of the tail; the finer class starts at the ratio of the wider one. Only + - x / are
used, so equal views give equal codes on any machine.

**Tokens.** The model's distribution, cut to its tail. Each token's part is multiplied by its own
ratio of listed to expected, and `token_frequencies` makes whole numbers of it. An entry outside the
tail can be coded too; it costs about 26 bits.

Writer and reader count alike, so no statistics are stored. The floor is the sum of -log2 of these
chances before they become whole numbers. All flags come before the first token: so a reader asks
the model only for the rows that are listed, once, in batches. A reader needs the writer's view, to
the last bit.
"""

import numpy as np
from numba import njit

from fairway.compression.leb128 import write_number
from fairway.correction import range_coder as rc
from fairway.correction.entries import (
    CorrectionError,
    Entries,
    ModelView,
    check_entries,
    read_count,
)
from fairway.correction.range_coder import consume_symbol, decode_position, encode_symbol

PRICE, WRITE, READ = range(3)  # what the kernels do
FLAG_TOTAL, TOKEN_TOTAL = 1 << 28, 1 << 26  # sums of the frequencies
LEAST_CHANCE = 2.0**-26  # of a flag being set, and of it being clear: both can always be coded
LEAST_MASS = 2.0**-14  # of a tail: a model that calls a listed row impossible is soon corrected
OCTAVE = np.array(
    [max(i, 1).bit_length() - 1 for i in range((1 << 16) + 1)], np.uint8
)  # floor log2
# Classes of recency: 14 octaves of rows since the fourth last entry, 8 of rows since the last.
AGES = 14
RECENT, TAILS = 8 * AGES, 17
DOUBT = 4.0  # entries after which a class counts as much as the wider class
TOKEN_DOUBT = 1.0  # the same for one token
BATCH_VALUES = 1 << 22  # probabilities that are computed at a time: 32 MiB


@njit(cache=True)
def ratio(listed, expected, wider):
    """Return listed / expected, pulled to the ratio of the wider class.

    The pull is weaker where more rows are listed than expected: there the model is too sure.
    """
    doubt = DOUBT * min(1.0, (expected + 1) / (listed + 1))
    return (listed + doubt * wider) / (expected + doubt)


@njit(cache=True)
def flag_rows(mode, coder, buffer, tail, flags, bits, last, counts, room):
    """Code the rows from `last[4]` on: price into `bits`, write `flags`, or read into `flags`.

    `last` holds the rows of the last four entries, newest first, and the row to continue from.
    `counts` holds listed and expected rows of each class. Return the number of set flags; reading
    stops after `room` of them.
    """
    seen, row = 0, last[4]
    for i in range(len(tail)):
        if mode == READ and seen == room:
            break
        mass = min(max(tail[i], LEAST_MASS), 1.0)
        recent = min(OCTAVE[min(row - last[0], 65536)], 7) * AGES + min(
            OCTAVE[min(row - last[3], 65536)], AGES - 1
        )
        both = RECENT + recent * TAILS + OCTAVE[int(mass * 65536)]
        wider = ratio(counts[0, recent], counts[1, recent], 1.0)
        chance = mass * ratio(counts[0, both], counts[1, both], wider)
        chance = min(max(chance, LEAST_CHANCE), 1 - LEAST_CHANCE)
        if mode == PRICE:
            bits[i] = -np.log2(chance if flags[i] else 1 - chance)
        else:
            size = np.int64(chance * FLAG_TOTAL)  # listed rows come first
            if mode == READ:
                flags[i] = decode_position(coder, FLAG_TOTAL) < np.uint64(size)
            first, width = (0, size) if flags[i] else (size, FLAG_TOTAL - size)
            if mode == READ:
                consume_symbol(coder, buffer, first, width)
            else:
                encode_symbol(coder, buffer, first, width, FLAG_TOTAL)
        counts[1, recent] += mass
        counts[1, both] += mass
        if flags[i]:
            counts[0, recent] += 1
            counts[0, both] += 1
            last[3], last[2], last[1], last[0] = last[2], last[1], last[0], row
            seen += 1
        row += 1
    last[4] = row
    return seen


@njit(cache=True)
def token_frequencies(weights, counts, out):
    """Fill `out` with whole numbers, at least 1, for weights[V] times the ratio of each token.

    `counts` holds how often each token was listed and expected. Return both sums: of the weighted
    parts, and of the whole numbers.
    """
    total, frequency_sum = 0.0, 0
    for v in range(len(weights)):
        total += weights[v] * ((counts[0, v] + TOKEN_DOUBT) / (counts[1, v] + TOKEN_DOUBT))
    scale = TOKEN_TOTAL / total if total > 0 else 0.0
    for v in range(len(weights)):
        part = weights[v] * ((counts[0, v] + TOKEN_DOUBT) / (counts[1, v] + TOKEN_DOUBT))
        out[v] = 1 + np.int64(part * scale)
        frequency_sum += out[v]
    return total, frequency_sum


@njit(cache=True)
def token_rows(mode, coder, buffer, threshold, rows, tokens, bits, counts):
    """Code one of `tokens` for each distribution in rows[m, V]; these are cut to their tails."""
    sizes = np.empty(rows.shape[1], np.int64)
    for i in range(len(tokens)):
        weights, mass = rows[i], 0.0
        for v in range(len(weights)):
            weights[v] = weights[v] if 0 < weights[v] < threshold else 0.0
            mass += weights[v]
        total, frequency_sum = token_frequencies(weights, counts, sizes)
        token, first = tokens[i], 0
        if mode == READ:
            place, token = np.int64(decode_position(coder, frequency_sum)), 0
            while first + sizes[token] <= place:
                first += sizes[token]
                token += 1
            tokens[i] = token
            consume_symbol(coder, buffer, first, sizes[token])
        elif mode == WRITE:
            first = sizes[:token].sum()
            encode_symbol(coder, buffer, first, sizes[token], frequency_sum)
        else:
            part = weights[token] * (
                (counts[0, token] + TOKEN_DOUBT) / (counts[1, token] + TOKEN_DOUBT)
            )
            bits[i] = np.log2(total / part) if part > 0 else np.log2(frequency_sum / sizes[token])
        counts[0, token] += 1
        for v in range(len(weights)):
            counts[1, v] += weights[v] / mass if mass > 0 else 0.0


def check_view(view: ModelView) -> None:
    """Refuse a view without the model's opinion, or with one of other rows."""
    if view.tail is None or view.distributions is None:
        raise CorrectionError(
            "the modelled codec needs the model's tail mass and distributions; choose varint or "
            "rice, which need neither"
        )
    if len(view.tail) != view.rows:
        raise CorrectionError(
            f"the view has tail masses of {len(view.tail)} rows, but the split has {view.rows} rows"
        )


def code_flags(
    mode: int, coder: np.ndarray, data: np.ndarray, view: ModelView, positions: np.ndarray
) -> list:
    """Code every row up to the last entry.

    READ fills `positions` and returns nothing of use. WRITE returns parts of bytes; PRICE returns,
    for each batch, the bits of all rows and those of its entries.
    """
    last, counts = np.array([-65537] * 4 + [0]), np.zeros((2, RECENT * (1 + TAILS)))
    parts, seen, end = [], 0, view.rows
    if mode != READ:
        end = int(positions[-1]) + 1 if len(positions) else 0
    for start in range(0, end, rc.BATCH):
        if seen == len(positions):
            break
        tail = np.array(view.tail[start : min(start + rc.BATCH, end)], np.float64)
        if not np.isfinite(tail).all():
            raise CorrectionError(
                f"the model's tail mass is not finite between rows {start} and "
                f"{start + len(tail)}; are there NaN in its weights?"
            )
        flags, bits = np.zeros(len(tail), np.bool_), np.empty(len(tail))
        if mode != READ:
            inside = slice(*np.searchsorted(positions, [start, start + len(tail)]))
            flags[positions[inside] - start] = True
        room = len(positions) - seen
        flagged = flag_rows(mode, coder, data, tail, flags, bits, last, counts, room)
        if mode == READ:
            positions[seen : seen + flagged] = start + np.flatnonzero(flags)
        else:
            parts.append((bits.sum(), bits[flags]) if mode == PRICE else rc.flush(coder, data))
        seen += flagged
    if seen != len(positions):
        raise CorrectionError(
            f"the correction table holds {seen} entries, not the {len(positions)} that it states: "
            "damaged, or of another model"
        )
    return parts


def code_tokens(
    mode: int, coder: np.ndarray, data: np.ndarray, view: ModelView, entries: Entries
) -> list:
    """Code the token of each entry.

    READ fills `entries.tokens`, WRITE returns parts of bytes, PRICE the bits of each entry.
    """
    counts, parts = np.zeros((2, view.vocab_size)), []
    step = max(1, BATCH_VALUES // view.vocab_size)
    for i in range(0, len(entries.positions), step):
        positions, tokens = (column[i : i + step] for column in entries)
        rows = np.array(view.distributions(positions), np.float64, order="C")
        if rows.shape != (len(positions), view.vocab_size):
            raise CorrectionError(
                f"the model gives distributions of shape {rows.shape}, not {len(positions)} of "
                f"{view.vocab_size} tokens"
            )
        bits = np.empty(len(tokens))
        token_rows(mode, coder, data, view.threshold, rows, tokens, bits, counts)
        parts.append(bits if mode == PRICE else rc.flush(coder, data) if mode == WRITE else b"")
    return parts


def prices(entries: Entries, logp: np.ndarray, view: ModelView) -> np.ndarray:
    """Return the bits of each entry, float64[m].

    These are its flag, an equal share of the bits of all clear flags, and its token under the
    model's tail, without what is learned on the way.
    """
    check_view(view)
    entries = check_entries(*entries, view)
    parts = code_flags(PRICE, rc.new_writer(), np.zeros(0, np.uint8), view, entries.positions)
    flags = np.concatenate([np.zeros(0), *(bits for _, bits in parts)])
    share = (sum(bits for bits, _ in parts) - flags.sum()) / max(1, len(flags))
    tail = np.log2(np.maximum(view.tail[entries.positions], LEAST_CHANCE))
    tokens = tail - logp[entries.positions] / np.log(2)
    return flags + share + np.clip(tokens, 0, np.log2(TOKEN_TOTAL))


def floor_bits(entries: Entries, view: ModelView) -> float:
    """Return the sum of -log2 of the chances that code these entries, in bits."""
    check_view(view)
    entries, empty = check_entries(*entries, view), np.zeros(0, np.uint8)
    flags = code_flags(PRICE, rc.new_writer(), empty, view, entries.positions)
    tokens = code_tokens(PRICE, rc.new_writer(), empty, view, entries)
    return float(sum(bits for bits, _ in flags) + sum(bits.sum() for bits in tokens))


def encode(entries: Entries, view: ModelView) -> bytes:
    """Return the payload of the entries."""
    check_view(view)
    entries, coder = check_entries(*entries, view), rc.new_writer()
    buffer = np.empty(rc.MOST_BYTES * rc.BATCH, np.uint8)
    parts = code_flags(WRITE, coder, buffer, view, entries.positions)
    parts += code_tokens(WRITE, coder, buffer, view, entries)
    coded = b"".join(parts) + rc.final_bytes(coder)
    return write_number(len(entries.positions)) + coded.rstrip(b"\0")


def decode(payload: bytes, view: ModelView) -> Entries:
    """Return the entries of a payload, or raise CorrectionError."""
    check_view(view)
    count, start = read_count(payload, view)
    data = np.frombuffer(payload, np.uint8)[start:].copy()
    coder = rc.new_reader(data)
    entries = Entries(np.zeros(count, np.int64), np.zeros(count, np.int64))
    code_flags(READ, coder, data, view, entries.positions)
    code_tokens(READ, coder, data, view, entries)
    return check_entries(*entries, view)
