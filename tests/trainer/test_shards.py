"""The trainer reads the tokens that were written, or says why it cannot."""

import os
import shutil
import struct

import numpy as np
import pytest
import sentencepiece
from conftest import english_like, to_tokens, train_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from fairway.shards import write_shard
from train_gpt import (
    BOS_ID,
    ByteTable,
    Config,
    TokenStream,
    UserError,
    audit_bytes,
    document_bounds,
    load_data,
    read_shard,
    replacing,
)


def refused(path, vocab_size: int = 0) -> str:
    with pytest.raises(UserError) as caught:
        read_shard(path, vocab_size)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


# ---- The file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [0, 65535, 256], list(range(5000))])
def test_round_trip(tmp_path, tokens):
    path = tmp_path / "a_train_0.bin"
    write_shard(path, np.array(tokens))
    back = read_shard(path)
    assert back.dtype == np.dtype("<u2") and back.tolist() == tokens
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if tokens:
        with pytest.raises(ValueError, match="read-only"):
            back[0] = 7


def test_golden_bytes(tmp_path):
    """Return a shard: 256 little-endian int32 (magic, version, count), then uint16 tokens."""
    path = tmp_path / "golden.bin"
    write_shard(path, np.array([1, 258, 65535]))
    assert path.read_bytes() == bytes.fromhex("88d834010100000003000000") + bytes(
        253 * 4
    ) + bytes.fromhex("01000201ffff")


def shard_bytes(count: int, tokens: bytes, magic: int = 20240520, version: int = 1) -> bytes:
    return struct.pack("<3i", magic, version, count) + bytes(253 * 4) + tokens


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a token shard of version 1; write it with data/prepare.py"),
        (b"hello", "not a token shard"),
        (bytes(1024), "not a token shard"),
        (shard_bytes(1, b"ab")[:1023], "not a token shard"),
        (shard_bytes(1, b"ab", magic=20240521), "not a token shard"),
        (shard_bytes(1, b"ab", version=2), "not a token shard of version 1"),
        (shard_bytes(3, b"abcd"), "header says 3 tokens, it holds 2; "),
        (shard_bytes(2, b"abc"), "header says 2 tokens, it holds 1.5"),
        (shard_bytes(2, b""), "header says 2 tokens, it holds 0"),
        (shard_bytes(2, b"abcdef"), "header says 2 tokens, it holds 3"),
        (shard_bytes(-1, b""), "header says -1 tokens, it holds 0"),
        (shard_bytes(2**31 - 1, b"ab"), "header says 2147483647 tokens, it holds 1"),
    ],
)
def test_damage_is_named(tmp_path, data, says):
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    assert says in refused(path)


def test_what_cannot_be_opened(tmp_path):
    assert "cannot be read (No such file or directory); prepare the data again" in refused(
        tmp_path / "none.bin"
    )
    assert "cannot be read (Is a directory)" in refused(tmp_path)


def test_vocabulary_is_checked_at_the_edge(tmp_path):
    path = tmp_path / "a.bin"
    write_shard(path, np.array([1, 5, 383]))
    assert len(read_shard(path, 384)) == 3
    message = refused(path, 383)
    assert "token 383 >= VOCAB_SIZE=383; set it or DATA_PATH" in message


def test_mutated_shards_end_in_an_array_or_in_shard_error(tmp_path):
    rng, path = np.random.default_rng(5), tmp_path / "mutant.bin"
    good, other = (
        shard_bytes(n, rng.integers(0, 384, n).astype("<u2").tobytes()) for n in (300, 40)
    )
    outcomes = {True: 0, False: 0}
    for i in range(1000):
        data = bytearray(good)
        if i % 4 == 0:
            data = data[: rng.integers(0, len(data))]
        elif i % 4 == 1:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(0, len(data))] ^= 1 << rng.integers(8)
        elif i % 4 == 2:
            cut = rng.integers(0, len(other))
            data = data[: rng.integers(0, len(data))] + other[cut:]
        else:
            data[:12] = struct.pack(
                "<3i", *rng.choice([20240520, 1, 300, 0, -1, 2**31 - 1, -(2**31)], 3)
            )
        path.write_bytes(data)
        try:
            tokens = read_shard(path, 384)
        except UserError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert (
                tokens.dtype == np.dtype("<u2")
                and 2 * len(tokens) + 1024 == len(data)
                and tokens.max() < 384
            )
    assert min(outcomes.values()) > 50  # both ends were reached


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as f:
        f.write(b"old")
    for error in (RuntimeError("disk on fire"), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing(path) as f:
            f.write(b"half of the new")
            assert path.read_bytes() == b"old"
            raise error
        assert path.read_bytes() == b"old" and [p.name for p in path.parent.iterdir()] == ["file"]
    with replacing(path) as f:
        f.write(b"new")
    assert path.read_bytes() == b"new" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_replacing_leaves_alone_what_is_no_regular_file(tmp_path):
    """A device, above all: as root, a rename would put a file in its place."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with (
            pytest.raises(UserError, match="is no regular file, so it cannot be replaced"),
            replacing(path) as f,
        ):
            f.write(b"x")
    assert (tmp_path / "pipe").is_fifo() and [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_replacing_where_nothing_can_be_written_says_so(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"), replacing(tmp_path / "file" / "below") as f:
        f.write(b"x")


def test_document_bounds():
    assert document_bounds(np.array([1, 5, 1, 1, 6])).tolist() == [0, 2, 3, 5]
    assert document_bounds(np.array([5, 1, 6])).tolist() == [
        0,
        1,
        3,
    ]  # a shard may start inside a document
    assert document_bounds(np.array([], int)).tolist() == [0]


# ---- Bytes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prefixed():
    """Train a tokenizer like the challenge's: decoding removes its dummy blank again."""
    model = train_tokenizer(english_like(0, 400), 384, add_dummy_prefix=True)
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def check_text(tokenizer, texts: list[str]) -> None:
    tokens = to_tokens(tokenizer, texts)
    table = ByteTable.of(tokenizer, tokenizer.vocab_size())
    wanted = sum(len(text.encode()) for text in texts)
    assert int(table.count(np.concatenate([[BOS_ID], tokens])).sum()) == wanted
    assert audit_bytes(tokenizer, table, tokens) == wanted


@given(
    texts=st.lists(
        st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0▁")),
        min_size=1,
    )
)
def test_bytes_of_any_text_that_is_kept_exactly(corpus, texts):
    for text in (
        texts
    ):  # what the table must count is what the tokenizer gives back, and here that is the text
        assert corpus.tokenizer.decode(corpus.tokenizer.encode(text)) == text
    check_text(corpus.tokenizer, texts)


@given(
    texts=st.lists(
        st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0▁")).filter(
            lambda t: not t.startswith(" ")
        ),
        min_size=1,
    )
)
def test_bytes_of_any_text_with_a_dummy_blank(prefixed, texts):
    check_text(prefixed, [text for text in texts if prefixed.decode(prefixed.encode(text)) == text])


def test_every_text_of_the_corpus(corpus):
    check_text(corpus.tokenizer, corpus.texts[:300])


@given(data=st.data())
def test_bytes_of_any_tokens(corpus, prefixed, data):
    """Any tokens but control pieces, in any order, count as they decode."""
    for tokenizer in (corpus.tokenizer, prefixed):
        ordinary = [i for i in range(4, 384) if not tokenizer.is_byte(i)]
        ids = data.draw(st.lists(st.sampled_from(ordinary), max_size=20))
        counted = ByteTable.of(tokenizer, 384).count(np.array([BOS_ID, *ids])).sum()
        assert counted == len(tokenizer.decode(ids).encode())


def test_the_leading_blank_counts_only_where_it_is_decoded(corpus, prefixed):
    for tokenizer, leading in ((corpus.tokenizer, 4), (prefixed, 3)):
        table, the = ByteTable.of(tokenizer, 384), tokenizer.piece_to_id("▁the")
        assert the > 3 and table.space[the] and table.base[the] == 3
        assert table.count(np.array([BOS_ID, the, the])).tolist() == [leading, 4]
        assert (
            audit_bytes(tokenizer, table, np.array([BOS_ID, the, the, BOS_ID, the]))
            == 2 * leading + 4
        )


def test_control_unknown_and_byte_pieces(corpus):
    table = ByteTable.of(corpus.tokenizer, 400)
    assert table.base[:4].tolist() == [0] * 4 and not table.space[:4].any()
    assert set(table.base[[i for i in range(384) if corpus.tokenizer.is_byte(i)]].tolist()) == {1}
    assert table.base[384:].tolist() == [0] * 16  # ids beyond the tokenizer have no bytes
    challenge = ByteTable(
        np.array([0, 0, 3, 1]), np.array([0, 0, 1, 1], bool), np.array([1, 1, 0, 0], bool)
    )
    assert challenge.count(np.array([1, 2, 3])).tolist() == [
        3,
        2,
    ]  # the docstring's example: BOS ▁the ▁a


def test_long_pieces_do_not_overflow(tmp_path):
    piece = "a" * 100
    model = train_tokenizer(
        [f"{piece} b"] * 50, 360, max_sentencepiece_length=120, hard_vocab_limit=False
    )
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
    check_text(tokenizer, [piece * 40])


def test_the_audit_names_the_token(corpus):
    table = ByteTable.of(corpus.tokenizer, 384)
    tokens = to_tokens(corpus.tokenizer, corpus.texts[:3])
    token = int(tokens[document_bounds(tokens)[1] + 3])  # of the second document
    table.base[token] += 1
    first = int(np.flatnonzero(tokens == token)[0])
    start = int(max(b for b in document_bounds(tokens) if b <= first))
    with pytest.raises(UserError) as caught:
        audit_bytes(corpus.tokenizer, table, tokens)
    message = str(caught.value)
    assert message.startswith(f"the document at token {start} decodes to ") and "BPB" in message
    assert f"token {token} ({corpus.tokenizer.id_to_piece(token)!r})" in message


def test_the_audit_is_not_led_astray_by_characters_of_several_bytes(corpus):
    """A prefix cut inside a character decodes to other bytes, but no token is wrong there."""
    wrong = corpus.tokenizer.piece_to_id("▁the")
    for before in range(12):
        ids = corpus.tokenizer.encode("ꙮ" * before + " the" + "ꙮ" * 7)
        assert wrong > 3 and ids.count(wrong) == 1 and len(ids) >= 3 * before + 22
        table = ByteTable.of(corpus.tokenizer, 384)
        table.base[wrong] += 1
        with pytest.raises(UserError, match=rf"token {wrong} \('▁the'\)"):
            audit_bytes(corpus.tokenizer, table, np.array([BOS_ID, *ids]))


def test_the_audit_bears_long_runs_of_byte_pieces(corpus):
    """A page of a script that the vocabulary lacks is thousands of byte pieces in a row."""
    the, table = corpus.tokenizer.piece_to_id("▁the"), ByteTable.of(corpus.tokenizer, 384)
    table.base[the] += 1
    ids = corpus.tokenizer.encode(" the" + "ꙮ" * 1000)
    with pytest.raises(UserError, match=rf"token {the} \('▁the'\)"):
        audit_bytes(corpus.tokenizer, table, np.array([BOS_ID, *ids]))


def test_the_audit_finds_bytes_that_no_text_has(corpus):
    """A lone continuation byte decodes to U+FFFD, three bytes: no text has such tokens."""
    lone = corpus.tokenizer.piece_to_id("<0x80>")
    with pytest.raises(UserError, match=rf"token {lone} \('<0x80>'\)"):
        audit_bytes(
            corpus.tokenizer,
            ByteTable.of(corpus.tokenizer, 384),
            np.array([BOS_ID, 300, lone, 300]),
        )


# ---- The stream ----------------------------------------------------------------------------------
def taken(stream: TokenStream, count: int) -> np.ndarray:
    """Return the next `count` tokens and one more, and move on by `count`, as a step does."""
    tokens = stream.peek(count + 1)
    stream.at += count
    return tokens


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.integers(1, 60), min_size=1, max_size=8),
)
def test_the_stream_is_one_whatever_the_cuts(sizes, takes):
    whole = np.arange(sum(sizes))
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]))
    at = 0
    for count in takes:
        wanted = np.take(whole, np.arange(at, at + count + 1), mode="wrap")
        assert stream.peek(count + 1).tolist() == wanted.tolist()
        ahead = stream.peek(3, count)  # as after `count` tokens more
        got = taken(stream, count)
        assert got.dtype == np.int64 and got.tolist() == wanted.tolist()
        at += count
        assert ahead.tolist() == stream.peek(3).tolist()


def test_the_stream_goes_on_from_its_state():
    first = TokenStream([np.arange(10), np.arange(10, 25)])
    taken(first, 17)
    second = TokenStream([np.arange(25)])
    second.at = first.at
    assert taken(second, 30).tolist() == taken(first, 30).tolist()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 9))
def test_an_epoch_has_every_sequence_once_however_it_is_cut(sizes, length):
    whole = np.arange(sum(sizes))
    stream = TokenStream(np.split(whole, np.cumsum(sizes)[:-1]))
    count = max(1, len(whole) // length)
    rows = stream.sequences(count, length)
    assert sorted(rows[:, 0].tolist()) == [length * i for i in range(count)]
    for row in rows:
        wanted = np.take(whole, row[0] + np.arange(length + 1), mode="wrap")
        assert row.tolist() == wanted.tolist()
    part = count // 2
    head = stream.sequences(part, length) if part else rows[:0]
    assert stream.sequences(count - part, length, part * length).tolist() == rows[part:].tolist()
    stream.at = part * length  # as after these
    tail = stream.sequences(count - part, length)
    assert np.concatenate([head, tail]).tolist() == rows.tolist()


def test_a_batch_is_from_all_over_the_text_but_from_one_window():
    def firsts(tokens: int, at: int) -> np.ndarray:
        stream = TokenStream([np.arange(tokens)])
        stream.at = at
        return np.sort(stream.sequences(8, 1)[:, 0])

    assert np.diff(firsts(10_000, 0)).max() < 2000
    late = firsts(1 << 18, 1 << 17)  # in the third window of 65,536 sequences
    assert (1 << 17) <= late[0] and late[-1] < 3 << 16 and np.diff(late).max() < 13_000


# ---- Loading -------------------------------------------------------------------------------------


def config(folder, **settings) -> Config:
    return Config(**dict(data_path=str(folder), vocab_size=384, holdout_tokens=4096) | settings)


def load_error(folder, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load_data(config(folder, **settings))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def copy(corpus, tmp_path):
    return shutil.copytree(corpus.folder, tmp_path / "copy")


def test_load_data(corpus):
    data = load_data(config(corpus.folder))
    train = np.concatenate([read_shard(p) for p in sorted(corpus.folder.glob("*_train_*.bin"))])
    val = read_shard(corpus.folder / "tiny_val_000000.bin")
    assert data.folder == corpus.folder and data.tokenizer_path == corpus.folder / "tokenizer.model"
    assert np.array_equal(data.val, val)
    assert np.array_equal(np.concatenate([*data.train, data.holdout]), train)
    assert data.val_bytes == sum(len(text.encode()) for text in english_like(2, 100))


def test_holdout_is_apart_from_the_training_stream(corpus):
    """Tokens are numbered, so that each can be told apart wherever it turns up."""
    data = load_data(config(corpus.folder))
    assert len(data.holdout) == 4097  # 4,096 targets
    total, stream = sum(map(len, data.train)), TokenStream(data.train)
    once = taken(stream, 2 * total)
    train = np.concatenate([read_shard(p) for p in sorted(corpus.folder.glob("*_train_*.bin"))])
    assert once.tolist() == np.take(train[:-4097], np.arange(2 * total + 1), mode="wrap").tolist()
    assert np.array_equal(data.holdout, train[-4097:])


def test_a_small_last_shard_gives_a_tenth_at_most(copy):
    write_shard(copy / "tiny_train_000002.bin", read_shard(copy / "tiny_train_000001.bin")[:500])
    data = load_data(config(copy))
    assert len(data.holdout) == 51 and len(data.train[-1]) == 449


def test_the_fingerprint_is_of_what_is_read(copy, tmp_path):
    before = load_data(config(copy)).fingerprint
    assert load_data(config(copy)).fingerprint == before
    moved = shutil.copytree(copy, tmp_path / "moved")
    assert load_data(config(moved)).fingerprint == before
    for name in ("tiny_train_000000.bin", "tiny_train_000001.bin", "tiny_val_000000.bin"):
        tokens, kept = np.array(read_shard(moved / name)), (moved / name).read_bytes()
        ordinary = np.flatnonzero(tokens > 270)[:2]
        tokens[ordinary] = tokens[ordinary][::-1] + 1
        write_shard(moved / name, np.where(tokens < 384, tokens, 383))
        assert load_data(config(moved)).fingerprint != before, name
        (moved / name).write_bytes(kept)


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_shards(copy, split):
    for path in copy.glob(f"*_{split}_*.bin"):
        path.unlink()
    assert load_error(copy) == (f"no *_{split}_*.bin in {copy}; run `make data`, or set DATA_PATH")


def test_no_folder(tmp_path):
    assert "no *_train_*.bin in" in load_error(tmp_path / "nowhere")


def test_a_shard_cut_short(copy):
    path = copy / "tiny_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-10])
    assert load_error(copy).startswith(f"{path}: header says")


def test_too_few_tokens(copy):
    for name, tokens in (("tiny_train_000000", [1] * 50), ("tiny_train_000001", [1] * 49)):
        write_shard(copy / f"{name}.bin", np.array(tokens))
    assert "99 training, " in load_error(copy) and "too few" in load_error(copy)
    write_shard(copy / "tiny_train_000000.bin", np.array([1] * 500))
    write_shard(copy / "tiny_val_000000.bin", np.array([1]))
    assert "1 validation tokens are too few" in load_error(copy)


def test_shards_of_a_larger_vocabulary(corpus):
    message = load_error(corpus.folder, vocab_size=300)
    assert ">= VOCAB_SIZE=300; set it or DATA_PATH" in message


def test_shards_of_a_smaller_vocabulary(corpus):
    assert load_error(corpus.folder, vocab_size=512) == (
        f"VOCAB_SIZE is 512, {corpus.folder / 'tokenizer.model'} has 384 pieces; "
        "set it or TOKENIZER_PATH"
    )


def test_another_tokenizer_of_the_same_size(copy):
    other = train_tokenizer([text[::-1].upper() for text in english_like(0, 400)], 384)
    assert sentencepiece.SentencePieceProcessor(model_proto=other).vocab_size() == 384
    (copy / "tokenizer.model").write_bytes(other)
    message = load_error(copy)
    assert message.startswith(f"{copy / 'tokenizer.model'} did not write these shards: ")
    assert message.endswith("set TOKENIZER_PATH to the model that did")


def test_no_tokenizer(copy):
    (copy / "tokenizer.model").unlink()
    message = load_error(copy)
    assert str(copy / "tokenizer.model") in message and "set TOKENIZER_PATH" in message
    assert "no tokenizer at" in load_error(copy, tokenizer_path=str(copy / "else.model"))


@pytest.mark.parametrize("data", [b"", b"no model", bytes(1000)])
def test_a_tokenizer_that_is_none(copy, data):
    (copy / "tokenizer.model").write_bytes(data)
    assert (
        load_error(copy)
        == f"{copy / 'tokenizer.model'} is no SentencePiece model; set TOKENIZER_PATH to one"
    )


def test_the_trainer_stops_in_one_line(trainer_here, copy, tmp_path):
    path = copy / "tiny_train_000000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    done = trainer_here(tmp_path / "out", DATA_PATH=copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith(f"train_gpt: error: {path}: header says")
        and done.stderr.count("\n") == 1
    )
    assert list((tmp_path / "out").iterdir()) == []
