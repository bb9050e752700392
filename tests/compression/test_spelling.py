"""Any bytes become tokens and come back, with tokenizers that keep a text and with others."""

import gc
import time

import numpy as np
import pytest
import sentencepiece
from conftest import english_like, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from data.prepare import Tokenizer
from fairway.compression.spelling import Speller
from train_gpt import BOS_ID, ByteTable, UserError

LOSSY = dict(
    normalization_rule_name="nmt_nfkc", add_dummy_prefix=True, remove_extra_whitespaces=True
)
KINDS = {
    "kept": {},
    "lossy": LOSSY,
    "lossy, unigram": LOSSY | dict(model_type="unigram"),
    "no prefix, blanks lost": dict(remove_extra_whitespaces=True),
    "prefix, blanks kept": dict(add_dummy_prefix=True),
    "blanks behind": dict(treat_whitespace_as_suffix=True),
    "symbols": LOSSY | dict(user_defined_symbols=["<s>x", "\n"]),
}
CORNERS = [
    b"",
    b"a",
    b" ",
    b"  ",
    b" a",
    b"a ",
    b"\n",
    b"\n a\n\n",
    b"\0",
    b"\0\0a\0",
    b"\xff",
    b"a\xffb",
    b"\xe2\x96",
    "▁".encode(),
    "▁▁ ▁a▁".encode(),
    " ▁".encode(),
    b"<s>",
    b"</s><unk><0x41><pad>",
    b"\xed\xa0\x80\xed\xb0\x80",
    "ﬁ ½ Å\u00a0\u3000x²\ufeff\ufffd".encode(),
    b"\xc0\x80\xf8\x88",
    "日本🙂".encode()[:-1],
    b"\r\n\t\x0b\x0c\x85",
    bytes(range(256)),
    b"The  nation .\n",
]
TEXTS = english_like(0, 400)


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, sentencepiece.SentencePieceProcessor]:
    return {
        kind: sentencepiece.SentencePieceProcessor(
            model_proto=train_tokenizer(TEXTS, 384, **options)
        )
        for kind, options in KINDS.items()
    }


@pytest.fixture(scope="module")
def spellers(tokenizers) -> dict[str, Speller]:
    return {kind: Speller(tokenizer, 400) for kind, tokenizer in tokenizers.items()}


@pytest.fixture(scope="module")
def without_bytes() -> Speller:
    model = train_tokenizer(TEXTS, 200, byte_fallback=False)
    return Speller(sentencepiece.SentencePieceProcessor(model_proto=model), 200)


each = pytest.mark.parametrize("kind", KINDS)
mixtures = st.lists(
    st.one_of(
        st.binary(max_size=9),
        st.text(max_size=9).map(str.encode),
        st.sampled_from(CORNERS),
        st.sampled_from(TEXTS).map(str.encode),
    ),
    max_size=6,
).map(b"".join)


# ==== EXACTLY =====================================================================================
@each
@given(data=mixtures)
def test_any_bytes_come_back(spellers, kind, data):
    ids = spellers[kind].tokens(data)
    assert spellers[kind].data(ids) == data and all(
        3 < i < 384 for i in ids
    )  # no BOS, whatever the text says


@each
@pytest.mark.parametrize("data", CORNERS, ids=range(len(CORNERS)))
def test_corners(spellers, kind, data):
    assert spellers[kind].data(spellers[kind].tokens(data)) == data


@each
@given(data=mixtures)
def test_bytes_come_back_even_if_the_tokenizer_normalises(tokenizers, kind, data):
    """If normalisation were on, lines and then the fewest pieces would spell the text."""
    speller = Speller(tokenizers[kind], 384)
    speller.tokenizer = tokenizers[kind]
    assert speller.data(speller.tokens(data)) == data


# ==== AS THE MODEL WAS TRAINED ====================================================================
@each
def test_text_that_survives_is_segmented_as_in_training(tokenizers, spellers, kind):
    tokenizer, same = tokenizers[kind], 0
    for text in english_like(5, 100):
        ids = tokenizer.encode(text)
        if tokenizer.decode(ids) == text:
            assert spellers[kind].tokens(text.encode()) == ids
            same += 1
    assert same > 50


@given(
    text=st.lists(
        st.one_of(st.text(max_size=9), st.sampled_from(["▁", " ", "\n", *TEXTS[:20]]))
    ).map("".join)
)
def test_a_text_is_segmented_as_in_shards(tokenizers, spellers, text):
    """A text gets the tokens that data/prepare.py gives it, a literal ▁ included."""
    prepared = Tokenizer(tokenizers["kept"].serialized_model_proto(), "test")
    assert prepared.is_lossless and prepared.encode([text])[0] == spellers["kept"].tokens(
        text.encode()
    )


@each
@given(data=st.data())
def test_a_token_spells_as_many_bytes_as_the_score_counts(tokenizers, spellers, kind, data):
    """Draw any tokens, except pieces that end with a blank, which no score can count."""
    table, speller = ByteTable.of(tokenizers[kind], 400), spellers[kind]
    ids = data.draw(
        st.lists(
            st.integers(0, 399).filter(lambda i: speller.pieces[i].rfind(b" ") <= 0), max_size=20
        )
    )
    assert [len(speller.pieces[i]) for i in ids] == (table.base + table.space)[ids].tolist()
    counted = table.count(np.array([BOS_ID, *ids]))
    assert len(speller.data(ids)) == counted.sum()
    assert all(len(speller.data(ids[:n])) == counted[:n].sum() for n in range(len(ids)))


def test_the_first_blank(spellers):
    """The first blank is dropped at the start of a document, and only there."""
    for kind, swallows in (("kept", False), ("lossy", True), ("no prefix, blanks lost", True)):
        speller = spellers[kind]
        the = speller.pieces.index(b" the")
        assert speller.data([the, the]) == (b"the the" if swallows else b" the the")
        assert speller.data([the, BOS_ID, the], start_of_document=False) == (
            b" thethe" if swallows else b" the the"
        )
        assert speller.data([]) == b"" and speller.data(speller.tokens(b" the the")) == b" the the"


# ==== WHAT IT COSTS ===============================================================================
@each
def test_a_byte_that_is_no_text_costs_itself(spellers, kind):
    speller, a, b = spellers[kind], TEXTS[0].encode(), b" " + TEXTS[1].encode()
    assert len(speller.tokens(a + b"\xff" + b)) <= len(speller.tokens(a)) + 1 + len(
        speller.tokens(b)
    )
    assert len(speller.tokens(a + "▁".encode() + b)) <= len(speller.tokens(a)) + 3 + len(
        speller.tokens(b)
    )


def assert_linear_time(speller: Speller, data: bytes) -> list[int]:
    """Spell `data` and eight times as much; quadratic time would take 64 times as long.

    The shorter of three times counts for each. Garbage is not collected meanwhile: its time grows
    with all objects of the process.
    """
    seconds = {len(data): [], 8 * len(data): []}
    gc.disable()
    try:
        for text in 3 * (data, 8 * data):
            began = time.process_time()
            ids = speller.tokens(text)
            assert speller.data(ids) == text
            seconds[len(text)].append(time.process_time() - began)
    finally:
        gc.enable()
    short, long = map(min, seconds.values())
    assert long < 40 * short
    return ids


@pytest.mark.parametrize(
    "unit", [b"\xff", b"a", b" ", b"\0", b"\n", "▁".encode(), b"a\xff", "é日 ".encode()]
)
def test_time_grows_with_length_alone(spellers, unit):
    for kind in ("kept", "lossy"):
        assert_linear_time(spellers[kind], unit * (10_000 // len(unit)))


def test_the_fewest_pieces_in_linear_time(tokenizers):
    speller = Speller(tokenizers["lossy"], 384)
    speller.tokenizer = tokenizers["lossy"]
    ids = assert_linear_time(speller, b"the  nation" * 375)
    assert len(ids) <= (1 + len(speller.tokens(b"the  nation"))) * 3000


# ==== WHAT CANNOT BE SPELT ========================================================================
def test_without_byte_pieces(without_bytes):
    for text in english_like(5, 20):
        plain = "".join(c for c in text if c in "etaoin ").encode()
        assert without_bytes.data(without_bytes.tokens(plain)) == plain
    for data in (b"the \xff", "the ▁".encode(), "the ж".encode(), "of\nthe\nж".encode(), b"\0"):
        with pytest.raises(UserError, match="use an artifact whose tokenizer has byte pieces") as e:
            without_bytes.tokens(data)
        assert "\n" not in str(e.value)


def test_a_tokenizer_of_another_model(tokenizers):
    with pytest.raises(UserError, match="has 384 pieces, but the model knows 383"):
        Speller(tokenizers["kept"], 383)
