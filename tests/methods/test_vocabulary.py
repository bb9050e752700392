"""Vocabulary pruning: every text is spelled by the pieces that are left, and decodes to itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.compression.spelling import BLANK
from fairway.methods.method import Calibration, NotHere
from fairway.methods.pruning import ROUNDING
from fairway.methods.vocabulary import PIECES, SmallerVocabulary, SmallVocabulary, with_rows
from fairway.scoring.text import Text
from tests.models import trained
from train_gpt import ByteTable, UserError, read_shard

METHOD = SmallerVocabulary(rows=8, least=2)


def always(tokenizer) -> set[int]:
    """Return the pieces that are never dropped: control, bytes, and the blank."""
    rest = {i for i in range(tokenizer.vocab_size()) if tokenizer.is_byte(i)}
    return {0, 1, 2, 3, tokenizer.piece_to_id(BLANK)} | rest


@pytest.fixture(scope="module")
def model(corpus):
    sizes = dict(vocab_size=corpus.vocab_size, train_seq_len=32, train_batch_tokens=256)
    return trained(bigram_vocab_size=32, bigram_dim=8, smear_gate=True, **sizes)


@pytest.fixture(scope="module")
def calibration(corpus, model):
    shards = [read_shard(p) for p in sorted(corpus.folder.glob("*_train_*.bin"))]
    return Calibration(model, shards, 0, None, corpus.tokenizer)


@pytest.fixture(scope="module")
def val_text(corpus):
    tokens = read_shard(corpus.folder / "tiny_val_000000.bin")
    table = ByteTable.of(corpus.tokenizer, corpus.vocab_size)
    return Text(tokens, table.count(tokens), table, corpus.tokenizer, "", "val", "")


WRITING = st.text(max_size=40) | st.text("the of.,naïve €\n日 ", max_size=60)


@pytest.fixture(scope="module")
def vocabularies(corpus) -> list[SmallVocabulary]:
    """Return the smallest vocabulary, the whole one, and four that lack random pieces."""
    fixed, rng = always(corpus.tokenizer), np.random.default_rng(0)
    others = np.array(sorted({*range(corpus.vocab_size)} - fixed))
    parts = [others[rng.random(len(others)) < p] for p in (0, 0.2, 0.4, 0.6, 0.8, 1)]
    return [SmallVocabulary(corpus.tokenizer, sorted(fixed | {*part})) for part in parts]


@given(writing=WRITING, at=st.integers(0, 5))
def test_any_text_comes_back_whatever_pieces_are_dropped(corpus, vocabularies, writing, at):
    small, whole = vocabularies[at], ByteTable.of(corpus.tokenizer, corpus.vocab_size)
    # What the whole tokenizer loses (it reads a blank of its own as a space) is not ours.
    writing = corpus.tokenizer.decode(corpus.tokenizer.encode(writing))
    ids = np.array([1, *small.encode(writing)], np.uint16)
    assert ids.max() < len(small.kept)
    assert small.decode(ids.tolist()) == writing
    assert small.table(whole).count(ids).sum() == len(writing.encode())


def test_a_dropped_piece_is_spelled_by_the_longest_that_are_left(corpus):
    tokenizer = corpus.tokenizer
    dropped = tokenizer.piece_to_id("▁the")
    assert dropped > 3
    kept = [i for i in range(corpus.vocab_size) if i != dropped]
    small = SmallVocabulary(tokenizer, kept)
    pieces = [tokenizer.id_to_piece(kept[new]) for new in small.encode(" the")]
    assert "".join(pieces) == "▁the" and len(pieces) == 2
    assert small.encode("the people") == [i - (i > dropped) for i in tokenizer.encode("the people")]


def test_with_all_pieces_nothing_changes(corpus, model, val_text):
    small = with_rows(model, np.arange(corpus.vocab_size))
    tokens = torch.from_numpy(val_text.tokens[:64].astype(np.int64)).view(2, 32)
    assert torch.equal(small.logits(tokens), model.logits(tokens))
    assert np.array_equal(METHOD.retokenised(val_text, small).tokens, val_text.tokens)


def test_tokens_that_stay_get_the_logits_that_they_had(corpus, model, val_text):
    tokens = val_text.tokens[:32].astype(np.int64)
    kept = np.array(sorted(always(corpus.tokenizer) | {*tokens.tolist()}))
    assert len(kept) < corpus.vocab_size
    new = SmallVocabulary(corpus.tokenizer, kept).respelled(tokens).astype(np.int64)
    assert len(new) == 32 and not np.array_equal(new, tokens)
    ours = with_rows(model, kept).logits(torch.from_numpy(new)[None])
    theirs = model.logits(torch.from_numpy(tokens)[None])[..., torch.from_numpy(kept)]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_method_ships_its_pieces_and_scores_the_same_bytes(
    corpus, model, calibration, val_text, tmp_path
):
    small = METHOD.apply(model, calibration)
    METHOD.ship(small, tmp_path)
    loaded = METHOD.load(tmp_path)
    assert METHOD.bytes(small) == sum(p.stat().st_size for p in tmp_path.iterdir())
    retold = METHOD.retokenised(val_text, loaded)
    assert always(corpus.tokenizer) <= {*small.kept_pieces.tolist()}
    assert small.cfg.vocab_size < corpus.vocab_size and len(retold.tokens) > len(val_text.tokens)
    assert retold.bytes == val_text.bytes
    tokens = torch.from_numpy(retold.tokens[:64].astype(np.int64)).view(2, 32)
    assert torch.equal(loaded.logits(tokens), small.logits(tokens))
    assert METHOD.bytes(small) < ROUNDING.bytes(ROUNDING.apply(model, calibration))
    # A prompt is written in the same pieces.
    assert max(retold.tokenizer.encode("the people of the house")) < small.cfg.vocab_size


def test_what_cannot_be_pruned_is_refused_in_one_line(corpus, model, calibration, tmp_path):
    with pytest.raises(NotHere, match="--tokenizer"):
        METHOD.apply(model, Calibration(model, calibration.shards))
    METHOD.ship(METHOD.apply(model, calibration), tmp_path)
    (tmp_path / PIECES).write_bytes((tmp_path / PIECES).read_bytes()[:-1])
    with pytest.raises(UserError, match="both files"):
        METHOD.load(tmp_path)
