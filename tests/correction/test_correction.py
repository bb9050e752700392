"""Correction tables: codecs return what they got, files refuse damage, and sums add up."""

import hashlib
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.correction import modelled, rice, table
from fairway.correction import range_coder as rc
from fairway.correction.entries import CorrectionError, Entries, ModelView, position_entropy
from fairway.correction.table import (
    CODECS,
    boosted,
    charge,
    choose_entries,
    corrected_distribution,
    corrected_logp,
    saved_bits,
)
from train_gpt import UserError

each = pytest.mark.parametrize("name", list(CODECS))
SPLIT, ARTIFACT = b"s" * 32, b"a" * 32


def view_of(p: np.ndarray, threshold: float) -> ModelView:
    """Return the view of distributions float64[rows, V] in memory."""
    tail = np.where(p < threshold, p, 0).sum(1)
    return ModelView(
        len(p), p.shape[1], threshold, tail.astype(np.float32), lambda positions: p[positions]
    )


def drawn(
    rows: int, vocab_size: int, seed: int = 0, spread: float = 2.5
) -> tuple[np.ndarray, np.ndarray]:
    """Return distributions of a model that errs as often as it says, and targets from them."""
    rng = np.random.default_rng(seed)
    p = np.exp(spread * rng.standard_normal((rows, vocab_size)))
    p /= p.sum(1, keepdims=True)
    return p, np.minimum((p.cumsum(1) < rng.random((rows, 1))).sum(1), vocab_size - 1)


def below(p: np.ndarray, targets: np.ndarray, threshold: float) -> Entries:
    rows = np.flatnonzero(p[np.arange(len(p)), targets] < threshold)
    return Entries(rows, targets[rows])


def logp_of(p: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.log(p[np.arange(len(p)), targets])


def same(a: Entries, b: Entries) -> bool:
    return np.array_equal(a.positions, b.positions) and np.array_equal(a.tokens, b.tokens)


@pytest.fixture(scope="module")
def model():
    """Return p[20000, 64], targets, and a view whose tail is everything below 2^-8."""
    p, targets = drawn(20_000, 64)
    return p, targets, view_of(p, 2.0**-8)


# ==== THE RANGE CODER =============================================================================
def plain_uniform_bytes(symbols: list[int], total: int) -> bytes:
    """Encode with the same range coder, on Python's integers."""
    low, span, out = 0, 2**64 - 1, []
    for symbol in symbols:
        step = span // total
        low, span = low + symbol * step, step
        while True:
            if span >= 2**56:
                break
            if (low >> 56) != ((low + span - 1) >> 56):
                if span >= 2**48:
                    break
                span = -low % 2**48
            out.append(low >> 56)
            low, span = (low << 8) % 2**64, span << 8
    return (bytes(out) + ((low + 2**48 - 1) >> 48).to_bytes(2, "big")).rstrip(b"\0")


@given(st.integers(2, 2**32), st.integers(0, 200), st.integers(0, 2**32 - 1), st.booleans())
def test_uniform_symbols_come_back_and_match_plain_integers(total, count, seed, extreme):
    rng = np.random.default_rng(seed)
    symbols = (
        rng.choice([0, total // 2, total - 1], count) if extreme else rng.integers(0, total, count)
    )
    data = rc.uniform_bytes(symbols, total)
    assert data == plain_uniform_bytes(symbols.tolist(), total)
    assert (
        extreme or 8 * len(data) <= count * math.log2(total) * 1.001 + 24
    )  # middles are cut more often than chance
    assert np.array_equal(
        rc.uniform_symbols(np.frombuffer(data, np.uint8).copy(), count, total), symbols
    )


def test_a_range_that_straddles_a_border_is_cut_and_read_back():
    """Middle symbols of odd totals keep the range across a byte's border until it is too small."""
    totals, coder, out = (
        [3] * 400 + [2**32 - 1, 2**32] * 40,
        rc.new_writer(),
        np.empty(8192, np.uint8),
    )
    cuts = 0
    for total in totals:
        coder[rc.STEP] = before = coder[rc.RANGE] // np.uint64(total)
        rc.encode_symbol(coder, out, total // 2, 1, total)
        cuts += int(coder[rc.RANGE]) not in {int(before) << 8 * i for i in range(9)}
    data = np.frombuffer(rc.flush(coder, out) + rc.final_bytes(coder), np.uint8).copy()
    coder = rc.new_reader(data)
    for total in totals:
        assert rc.decode_position(coder, total) == total // 2
        rc.consume_symbol(coder, data, total // 2, 1)
    assert cuts > 0


# ==== CODECS ======================================================================================
@st.composite
def cases(draw):
    """Draw any entries of any view, whatever the model says about them."""
    rows, vocab_size = draw(st.integers(0, 90)), draw(st.sampled_from([4, 5, 7, 256, 1000, 1024]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    p = np.exp(draw(st.sampled_from([0.0, 3.0, 30.0])) * rng.standard_normal((rows, vocab_size)))
    p /= p.sum(1, keepdims=True)
    kind = draw(st.sampled_from(["none", "all", "some", "ends"]))
    rate = {"none": 0, "all": 1, "some": draw(st.floats(0, 1)), "ends": 0}[kind]
    listed = rng.random(rows) < rate
    if kind == "ends":
        listed[[0, -1] if rows else []] = True
    rows = np.flatnonzero(listed)
    return Entries(rows, rng.integers(0, vocab_size, len(rows))), view_of(
        p, draw(st.sampled_from([2e-4, 0.1, 1.0]))
    )


@each
@given(case=cases())
def test_any_entries_come_back(name, case):
    entries, view = case
    assert same(CODECS[name].decode(CODECS[name].encode(entries, view), view), entries)


@pytest.mark.parametrize("name", ["varint", "rice"])
def test_large_vocabularies_and_far_rows_come_back(name):
    for rows, vocab_size in ((10**9, 65_536), (2**40, 50_257)):
        entries = Entries(
            np.array([0, 127, 128, 256, 10**6, rows - 1]),
            np.array([0, 255, 256, vocab_size - 1, 1, 2]),
        )
        view = ModelView(rows, vocab_size)
        assert same(CODECS[name].decode(CODECS[name].encode(entries, view), view), entries)


def test_the_modelled_codec_takes_65536_tokens():
    p, targets = drawn(40, 65_536)
    entries, view = below(p, targets, 1e-5), view_of(p, 1e-5)
    assert len(entries.positions) and same(
        modelled.decode(modelled.encode(entries, view), view), entries
    )


def test_payloads_are_those_of_older_code():
    """Varint and rice are computed by hand; the modelled codec's bytes come from older code."""
    entries, view = Entries(np.array([2, 3, 203]), np.array([5, 300, 1])), ModelView(256, 512)
    assert CODECS["varint"].encode(entries, view).hex(" ") == "03 02 05 00 00 2c 01 c7 01 01 00"
    entries, view = Entries(np.array([1, 2, 7]), np.array([3, 0, 2])), ModelView(8, 4)
    assert CODECS["rice"].encode(entries, view) == bytes(
        [3, 0, 0b10_0_11110]
    ) + plain_uniform_bytes([3, 0, 2], 4)
    rows, p = (
        np.arange(400),
        np.full((400, 8), 1.0),
    )  # parts of 1,024, so that every sum is exact on any machine
    p[rows, rows % 8] += 1000 - 8 * (rows % 100)
    p[rows, (rows + 3) % 8] += 16 + 8 * (rows % 100)
    listed = rows[rows % 23 == 5]
    payload = CODECS["modelled"].encode(
        Entries(listed, (5 * listed + 1) % 8), view_of(p / 1024, 0.02)
    )
    assert payload.hex() == "120bad68547655913a2b6ec5a28c3962096673e2a8c9"


@each
def test_bits_an_entry_are_within_2_percent_of_the_floor(name, model):
    p, targets, view = model
    entries = below(p, targets, view.threshold)
    assert len(entries.positions) > 600
    bits, floor = (
        8 * len(CODECS[name].encode(entries, view)),
        CODECS[name].floor_bits(entries, view),
    )
    assert 0.999 * floor - 16 < bits < 1.02 * floor


@pytest.mark.parametrize("vocab_size", [16, 1000, 1024, 50_257])
@pytest.mark.parametrize("rate", [0.3, 0.015, 0.0003])
def test_rice_is_within_2_percent_of_the_floor_for_any_vocabulary(vocab_size, rate):
    rng, rows = np.random.default_rng(1), int(4000 / rate)
    positions = np.unique(rng.integers(0, rows, 4000))
    entries, view = (
        Entries(positions, rng.integers(0, vocab_size, len(positions))),
        ModelView(rows, vocab_size),
    )
    floor = position_entropy(len(positions), rows) + len(positions) * math.log2(vocab_size)
    assert CODECS["rice"].floor_bits(entries, view) == pytest.approx(floor)
    assert 8 * len(CODECS["rice"].encode(entries, view)) < 1.02 * floor


def test_floors_are_what_the_schemes_say(model):
    """A second count, in plain Python, gives the same."""
    _, targets, _ = model
    rows, view = np.array([5, 140, 141, 20_000]), ModelView(30_000, 64)
    assert CODECS["varint"].floor_bits(Entries(rows, rows % 64), view) == 4 * 16 + 8 * (
        1 + 2 + 1 + 3
    )
    assert position_entropy(1, 4) == pytest.approx(-math.log2(0.25) - 3 * math.log2(0.75))
    assert position_entropy(0, 9) == position_entropy(9, 9) == 0


def test_the_modelled_codec_costs_what_a_true_model_says(model):
    """If the model is right, no code beats -log2 of its chances; learning adds little."""
    p, targets, view = model
    entries = below(p, targets, view.threshold)
    listed = np.zeros(len(p), bool)
    listed[entries.positions] = True
    true = (
        -np.log2(p[entries.positions, entries.tokens]).sum()
        - np.log2(1 - view.tail[~listed].astype(float)).sum()
    )
    assert modelled.floor_bits(entries, view) == pytest.approx(true, rel=0.04)
    assert len(modelled.encode(entries, view)) < 0.62 * len(CODECS["varint"].encode(entries, view))


def test_what_the_model_gets_wrong_is_learned():
    """The tail is hit four times as often as the model says, in bursts: 25 % is saved."""
    p, _ = drawn(20_000, 64, seed=3)
    view, rng = view_of(p, 2.0**-8), np.random.default_rng(4)
    rows = np.flatnonzero(rng.random(len(p)) < 4 * view.tail * (np.arange(len(p)) % 2000 < 500))
    weights = np.where((p[rows] < view.threshold) & (np.arange(64) % 8 == 0), p[rows], 0)
    entries = Entries(rows[weights.sum(1) > 0], weights.argmax(1)[weights.sum(1) > 0])
    unlisted = np.delete(view.tail.astype(float), entries.positions)
    model_says = -np.log2(p[entries.positions, entries.tokens]).sum() - np.log2(1 - unlisted).sum()
    assert 8 * len(modelled.encode(entries, view)) < 0.75 * model_says


def test_the_model_is_asked_for_listed_rows_only_and_in_batches(model, monkeypatch):
    p, targets, view = model
    entries, asked = below(p, targets, view.threshold), []

    def ask(positions):
        asked.append(positions)
        return p[positions]

    watched = ModelView(view.rows, view.vocab_size, view.threshold, view.tail, ask)
    payload = modelled.encode(entries, view)
    monkeypatch.setattr(modelled, "BATCH_VALUES", 64 * 100)
    assert modelled.encode(entries, watched) == payload  # batches leave no mark
    asked.clear()
    assert same(modelled.decode(payload, watched), entries)
    assert max(map(len, asked)) == 100 and np.array_equal(np.concatenate(asked), entries.positions)


def test_a_view_that_caches_rows_computes_them_once(model, monkeypatch):
    p, targets, view = model
    entries, asked = below(p, targets, view.threshold), []
    watched = ModelView(
        view.rows, 64, view.threshold, view.tail, lambda rows: asked.append(len(rows)) or p[rows]
    )
    assert (
        choose_entries(logp_of(p, targets), targets, watched, "rice", 700).positions.size
        and not asked
    )
    assert choose_entries(logp_of(p, targets), targets, watched, "modelled", 700).positions.size
    assert asked == [len(entries.positions)]
    monkeypatch.setattr("fairway.correction.entries.MOST_CACHED", 64 * len(entries.positions) - 1)
    assert (
        watched.cached_for(entries.positions) is watched
        and ModelView(9, 4).cached_for(entries.positions).distributions is None
    )


def test_rows_beyond_a_batch_of_flags_come_back():
    rows = 2 * rc.BATCH + 10
    p, tail = np.full(4, 0.25), np.full(rows, 0.01, np.float32)
    view = ModelView(rows, 4, 0.5, tail, lambda positions: np.tile(p, (len(positions), 1)))
    positions = np.array([3, rc.BATCH - 1, rc.BATCH, 2 * rc.BATCH - 1, rows - 1])
    entries = Entries(positions, positions % 4)
    assert same(modelled.decode(modelled.encode(entries, view), view), entries)


@each
def test_prices_add_up_to_the_payload(name, model):
    p, targets, view = model
    entries = below(p, targets, view.threshold)
    prices = CODECS[name].prices(entries, logp_of(p, targets), view)
    assert prices.shape == entries.positions.shape and (prices > 0).all()
    assert prices.sum() == pytest.approx(8 * len(CODECS[name].encode(entries, view)), rel=0.05)


# ==== DAMAGE ======================================================================================
def mutant(data: bytes, rng: np.random.Generator) -> bytes:
    kind, at = rng.integers(4), int(rng.integers(len(data)))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data + rng.bytes(int(rng.integers(1, 9)))
    if kind == 2:
        return data[:at] + rng.bytes(int(rng.integers(0, 9))) + data[at + int(rng.integers(9)) :]
    return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]


@each
def test_500_mutants_of_a_payload_end_in_entries_or_an_error(name, model):
    p, targets, _ = model
    p, targets = p[:1500], targets[:1500]
    view, rng, refused = view_of(p, 2.0**-8), np.random.default_rng(6), 0
    good = CODECS[name].encode(below(p, targets, view.threshold), view)
    for i in range(500):
        bad = rng.bytes(int(rng.integers(60))) if i % 10 == 0 else mutant(good, rng)
        try:
            positions, tokens = CODECS[name].decode(bad, view)
        except CorrectionError as e:
            refused += 1
            assert "\n" not in str(e)
        else:
            assert (np.diff(positions) > 0).all() and (
                not len(positions) or 0 <= positions[0] <= positions[-1] < 1500
            )
            assert len(positions) == len(tokens) and ((0 <= tokens) & (tokens < 64)).all()
    assert refused > 25


@each
@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff" * 9, b"\xff" * 8 + b"\x7f", b"\xff\xff\x03", b"\xe8\x07", b"\xe8\x07\x00"],
)
def test_a_hostile_payload_takes_no_memory(name, payload, model):
    view = ModelView(
        1500,
        64,
        2.0**-8,
        np.zeros(1500, np.float32),
        lambda positions: np.ones((len(positions), 64)) / 64,
    )
    CODECS[name].decode(
        CODECS[name].encode(Entries(np.array([1]), np.array([2])), view), view
    )  # compiled
    tracemalloc.start()
    try:
        positions, _ = CODECS[name].decode(payload, view)
        assert (
            name == "modelled" and len(positions) <= 1500
        )  # zeros that never end are a stream of its own
    except CorrectionError:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@each
@pytest.mark.parametrize(
    "positions, tokens, message",
    [
        ([1, 1], [0, 0], "do not increase"),
        ([2, 1], [0, 0], "do not increase"),
        ([-1], [0], "row -1"),
        ([0, 20_000], [0, 0], "row 20000, but the split has 20000 rows"),
        ([1], [64], "token 64, but the vocabulary has 64"),
        ([1, 2], [0], "2 positions but 1 tokens"),
    ],
)
def test_entries_that_no_table_may_hold_are_refused(name, positions, tokens, message, model):
    with pytest.raises(CorrectionError, match=message):
        CODECS[name].encode(Entries(np.array(positions), np.array(tokens)), model[2])


def test_a_view_without_a_model_is_refused():
    entries = Entries(np.array([1]), np.array([0]))
    for view, message in (
        (ModelView(9, 4), "choose varint or rice"),
        (
            ModelView(9, 4, 0.1, np.zeros(8), lambda p: np.ones((len(p), 4))),
            "8 rows, but the split has 9",
        ),
        (ModelView(9, 4, 0.1, np.full(9, np.nan), lambda p: np.ones((len(p), 4))), "not finite"),
        (ModelView(9, 4, 0.1, np.zeros(9), lambda p: np.ones((len(p), 5))), r"shape \(1, 5\)"),
    ):
        with pytest.raises(CorrectionError, match=message):
            modelled.encode(entries, view)


# ==== WHAT A TABLE DOES TO A SCORE ================================================================
@given(st.integers(2, 50), st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1, 5, 40]))
def test_the_closed_form_is_the_softmax_with_20_added(vocab_size, seed, spread):
    rng = np.random.default_rng(seed)
    logits, token = spread * rng.standard_normal(vocab_size), int(rng.integers(vocab_size))
    p = np.exp(logits - logits.max())
    p /= p.sum()
    logits[token] += 20
    raised = np.exp(logits - logits.max())
    raised /= raised.sum()
    full = corrected_distribution(p, token)
    assert full.sum() == pytest.approx(1, abs=1e-12) and np.allclose(
        full, raised, rtol=1e-9, atol=1e-300
    )
    assert math.exp(boosted(np.log(p[token]))) == pytest.approx(raised[token], rel=1e-9)
    assert saved_bits(np.log(p[token])) == pytest.approx(
        np.log2(raised[token]) - np.log2(p[token]), abs=1e-8
    )


def test_certain_and_impossible_tokens_stay_what_they_are():
    assert boosted(np.array([0.0]))[0] == pytest.approx(0, abs=1e-12)
    assert boosted(np.array([-1000.0]))[0] == -980
    assert saved_bits(np.array([-1000.0]))[0] == pytest.approx(20 / math.log(2))
    assert boosted(np.array([-np.inf]))[0] == -np.inf


def test_only_listed_rows_change(model):
    p, targets, view = model
    logp, entries = logp_of(p, targets), below(p, targets, view.threshold)
    out = corrected_logp(logp, entries, targets)
    others = np.delete(np.arange(len(p)), entries.positions)
    assert np.array_equal(out[others], logp[others])
    row = entries.positions[3]
    assert out[row] == pytest.approx(
        math.log(corrected_distribution(p[row], targets[row])[targets[row]])
    )
    with pytest.raises(CorrectionError, match="are not the targets"):
        corrected_logp(logp, Entries(entries.positions, (entries.tokens + 1) % 64), targets)


def test_a_million_entries_are_applied_without_a_loop():
    """The limit is in times of an exponential of all rows; twice its time is needed."""
    rng = np.random.default_rng(0)
    logp, targets = -20 * rng.random(4_000_000), rng.integers(0, 1024, 4_000_000).astype(np.uint16)
    entries = Entries(np.arange(0, 4_000_000, 4), targets[::4].astype(np.int64))
    applying, exponentials = [], []
    for _ in range(3):
        times = [time.process_time()]
        out = corrected_logp(logp, entries, targets)
        times.append(time.process_time())
        np.exp(logp)
        times.append(time.process_time())
        applying.append(times[1] - times[0])
        exponentials.append(times[2] - times[1])
    assert min(applying) < 12 * min(exponentials) and (out >= logp).all()


def test_every_bit_of_the_table_is_charged(model):
    p, targets, view = model
    logp, entries = logp_of(p, targets), below(p, targets, view.threshold)
    cost, text_bytes = charge(logp, entries, 1000, 50_000), 50_000
    assert cost.paid_bits == 8000
    assert cost.oracle_bpb == pytest.approx(
        -corrected_logp(logp, entries, targets).sum() / math.log(2) / text_bytes
    )
    assert cost.charged_bpb == pytest.approx(cost.oracle_bpb + 8000 / text_bytes)
    assert cost.saved_bits == pytest.approx(
        (corrected_logp(logp, entries, targets) - logp).sum() / math.log(2)
    )
    nothing = Entries(entries.positions[:0], entries.tokens[:0])
    assert charge(np.zeros(0), nothing, table.EMPTY_BYTES, 5).oracle_bpb == 0
    with pytest.raises(UserError, match="0 bytes of text"):
        charge(logp, entries, 1000, 0)


# ==== WHICH ENTRIES ===============================================================================
@each
def test_no_entry_pays_where_the_model_is_right(name, model):
    p, targets, view = model
    assert len(choose_entries(logp_of(p, targets), targets, view, name).positions) == 0


@each
def test_entries_pay_where_the_model_is_sure_and_wrong(name):
    """A third of the targets has a chance of 10^-8: an entry saves 26 bits and takes half."""
    rng = np.random.default_rng(2)
    p = np.full((9000, 64), 1e-8)
    p[:, 0] = 1 - 63e-8
    targets = np.where(rng.random(9000) < 1 / 3, rng.integers(1, 64, 9000), 0)
    logp, view = logp_of(p, targets), view_of(p, 2.0**-10)
    entries = choose_entries(logp, targets, view, name)
    cost = charge(logp, entries, table.file_size(entries, view, name), 20_000)
    assert (
        len(entries.positions) == (targets > 0).sum()
        and cost.charged_bpb < -logp.sum() / math.log(2) / 20_000
    )


@each
@pytest.mark.parametrize("budget", [table.EMPTY_BYTES, 240, 700, 1500])
def test_a_budget_is_filled_and_never_passed(name, budget, model):
    p, targets, view = model
    logp, every = logp_of(p, targets), below(p, targets, view.threshold)
    entries = choose_entries(logp, targets, view, name, budget)
    assert np.isin(entries.positions, every.positions).all()
    assert np.array_equal(entries.tokens, targets[entries.positions])
    assert table.file_size(entries, view, name) <= budget
    full = len(entries.positions) == len(every.positions)
    assert full or budget - table.file_size(entries, view, name) <= max(5, budget // 200)


def test_the_worst_predicted_come_first_where_prices_are_equal(model):
    p, targets, view = model
    logp = logp_of(p, targets)
    chosen = choose_entries(logp, targets, view, "varint", 400).positions
    assert logp[chosen].max() <= np.sort(logp)[len(chosen) + 40]


@each
def test_a_large_budget_takes_all_entries_and_a_tiny_one_is_refused(name, model):
    p, targets, view = model
    logp = logp_of(p, targets)
    assert same(choose_entries(logp, targets, view, name, 10**6), below(p, targets, view.threshold))
    with pytest.raises(UserError, match=f"a budget of 100 bytes .* has {table.EMPTY_BYTES}"):
        choose_entries(logp, targets, view, name, 100)


@each
def test_an_empty_split_has_an_empty_table(name):
    p = np.zeros((0, 16))
    entries = choose_entries(np.zeros(0), np.zeros(0, np.int64), view_of(p, 0.1), name, 10_000)
    assert (
        len(entries.positions) == 0
        and table.file_size(entries, view_of(p, 0.1), name) == table.EMPTY_BYTES
    )


def test_the_threshold_follows_the_budget():
    logp = -np.arange(1, 30_001) / 1000.0
    assert table.threshold_for(logp) == table.threshold_for(logp, 10**6) == 2.0**-10
    for budget in (100, 2000, 20_000):
        assert (logp < math.log(table.threshold_for(logp, budget))).sum() == pytest.approx(
            budget // 2, abs=1
        )
    assert table.threshold_for(np.zeros(0), 100) == 2.0**-10


# ==== THE FILE ====================================================================================
@pytest.fixture(scope="module")
def tables(model):
    p, targets, view = model
    entries = below(p, targets, view.threshold)
    return {name: table.make_table(entries, view, name, SPLIT, ARTIFACT) for name in CODECS}


def read(path, split=SPLIT, artifact=ARTIFACT, rows=20_000, vocab_size=64):
    return table.read_table(path, rows, vocab_size, split, artifact)


@each
def test_a_table_comes_back_from_its_file(name, tables, model, tmp_path):
    p, targets, view = model
    written = table.write_table(tmp_path / "t", tables[name])
    assert written == (tmp_path / "t").stat().st_size == len(table.table_bytes(tables[name]))
    assert written == table.file_size(below(p, targets, view.threshold), view, name)
    assert read(tmp_path / "t") == tables[name]
    assert same(table.table_entries(read(tmp_path / "t"), view), below(p, targets, view.threshold))
    assert [f.name for f in tmp_path.iterdir()] == ["t"]


def test_one_entry_comes_back_from_its_file_where_the_model_expects_every_row(tmp_path):
    view = ModelView(
        20_000, 64, 0.5, np.ones(20_000), lambda positions: np.full((len(positions), 64), 1 / 64)
    )
    entries = Entries(np.array([19_999]), np.array([3]))
    made = table.make_table(entries, view, "modelled", SPLIT, ARTIFACT)
    table.write_table(tmp_path / "t", made)
    assert same(table.table_entries(read(tmp_path / "t"), view), entries)


def test_a_table_of_another_origin_is_refused_with_both_names(tables, tmp_path):
    table.write_table(tmp_path / "t", tables["rice"])
    for change, message in (
        (dict(split=b"x" * 32), "the split 7373737373737373, but this is 7878"),
        (dict(artifact=b"x" * 32), "the artifact 6161616161616161, but this is 7878"),
        (dict(rows=19_999), "rows 20000, but this is 19999"),
        (dict(vocab_size=65), "a vocabulary of 64, but this is 65"),
    ):
        with pytest.raises(CorrectionError, match=f"t: made for {message}") as caught:
            read(tmp_path / "t", **change)
        assert "\n" not in str(caught.value)
    with pytest.raises(CorrectionError, match="cannot be read .No such file"):
        read(tmp_path / "none")
    with pytest.raises(CorrectionError, match="cannot be read .Is a directory"):
        read(tmp_path)


def test_a_table_cut_short_is_refused_at_every_length(tables, tmp_path):
    data = table.table_bytes(tables["varint"])
    for length in [*range(table.HEADER.size + 40), *range(len(data) - 40, len(data))]:
        (tmp_path / "t").write_bytes(data[:length])
        with pytest.raises(CorrectionError):
            read(tmp_path / "t")


def test_600_mutants_of_a_file_are_refused(tables, tmp_path):
    rng, path = np.random.default_rng(9), tmp_path / "t"
    for i in range(600):
        good = table.table_bytes(tables[list(CODECS)[i % 3]])
        bad = (
            mutant(good[: table.HEADER.size], rng) + good[table.HEADER.size :]
            if i % 2
            else mutant(good, rng)
        )
        if bad == good:
            continue
        path.write_bytes(bad)
        with pytest.raises(CorrectionError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(count=2**60), "cannot be of 20000 rows"),
        (dict(count=20_001), "cannot be of 20000 rows"),
        (dict(threshold=math.nan), "no probability"),
        (dict(threshold=0.0), "no probability"),
        (dict(codec="none"), "is not one of varint, rice, modelled"),
    ],
)
def test_a_hostile_header_with_a_right_checksum_is_refused(change, message, tables, tmp_path):
    path = tmp_path / "t"
    path.write_bytes(table.table_bytes(tables["rice"]._replace(**change)))
    with pytest.raises(CorrectionError, match=message):
        read(path)


def test_lengths_are_checked_before_anything_is_read(tables, tmp_path):
    head = bytearray(table.table_bytes(tables["rice"])[: table.HEADER.size])
    path, length = tmp_path / "t", 1 << 33
    head[48:56] = length.to_bytes(8, "little")
    with open(path, "wb") as f:  # a sparse file, as long as it says
        f.write(head)
        f.truncate(table.HEADER.size + length + 32)
    tracemalloc.start()
    with pytest.raises(CorrectionError, match=f"entries in {length} bytes"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@each
def test_a_view_that_differs_from_the_writers_is_refused(name, tables, model):
    p, targets, view = model
    with pytest.raises(
        CorrectionError, match="threshold 0.00390625, but the view is of 20000, 64 and 0.5"
    ):
        table.table_entries(
            tables[name], ModelView(view.rows, 64, 0.5, view.tail, view.distributions)
        )
    other = ModelView(
        view.rows, 64, view.threshold, view.tail * np.float32(1.01), view.distributions
    )
    if name == "modelled":
        with pytest.raises(CorrectionError, match="the model's numbers differ|of another model"):
            table.table_entries(tables[name], other)
    else:
        assert len(table.table_entries(tables[name], other).positions) == tables[name].count


def test_the_split_is_known_by_its_tokens():
    tokens = np.array([1, 2, 65_535], np.uint16)
    assert (
        table.split_sha256(tokens)
        == table.split_sha256(tokens.astype(np.int64))
        == hashlib.sha256(b"\1\0\2\0\xff\xff").digest()
    )


def test_a_table_is_attached_if_everything_fits(tables, tmp_path):
    artifact = tmp_path / "final_model.int6.ptz"
    artifact.write_bytes(b"x" * 1000)
    size = len(table.table_bytes(tables["rice"]))
    with pytest.raises(
        UserError,
        match=f"artifact 1000, code 500 and correction table {size} bytes are {1500 + size}, "
        f"more than {1499 + size}; lower --budget to {size - 1}",
    ):
        table.attach(artifact, tables["rice"], 500, 1499 + size)
    assert list(tmp_path.iterdir()) == [artifact]
    path = table.attach(artifact, tables["rice"], 500, 1500 + size)
    assert path == table.table_path(artifact) == tmp_path / "final_model.int6.ptz.corrections"
    assert read(path) == tables["rice"] and artifact.read_bytes() == b"x" * 1000


def test_the_rice_shift_is_the_best_there_is():
    gaps = np.random.default_rng(0).geometric(0.01, 3000) - 1
    shift, bits = rice.best_shift(gaps)
    assert bits == min(sum((int(g) >> s) + 1 + s for g in gaps) for s in range(20)) and shift in (
        5,
        6,
    )
