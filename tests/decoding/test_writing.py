"""A text shows whole characters and no stop string, and a wrong file is named in one line."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.decoding.drafters import ModelDrafter, NGramDrafter, SuffixDrafter
from fairway.decoding.reader import GeneratedToken
from fairway.decoding.strategies import Strategy
from fairway.decoding.writing import (
    EOS_ID,
    TextStream,
    Writer,
    overlap,
    search_texts,
    time_plain_decoding,
    write_text,
)
from train_gpt import BOS_ID, Config, UserError

PROMPT = "The people of"


@pytest.fixture(scope="module")
def files(artifacts, corpus) -> dict[str, Path]:
    """The shared artifacts and the tokenizer, by name."""
    names = ("model", "small", "bare", "stranger", "larger")
    paths = {name: artifacts / f"{name}.ptz" for name in names}
    return paths | {"tokenizer": corpus.folder / "tokenizer.model"}


@pytest.fixture(scope="module")
def writer(files) -> Writer:
    return Writer(str(files["model"]), device="cpu")


# ---- Printing ------------------------------------------------------------------------------------
piece_lengths = st.lists(st.integers(1, 5), max_size=60)


def printed(data: bytes, lengths: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """Return what a TextStream prints of data that comes in pieces of these lengths, then the
    rest.
    """
    stream, out = TextStream(stops), []
    for length in [*lengths, len(data)]:
        out.append(stream.feed(data[:length]))
        data = data[length:]
        if stream.stopped:
            return out
    return [*out, stream.feed(b"", last=True)]


@given(st.text(max_size=30), piece_lengths)
def test_text_cut_anywhere_is_printed_in_whole_characters(text, lengths):
    out = printed(text.encode(), lengths)
    assert "".join(out) == text and not any(
        "\ufffd" in part for part in out if "\ufffd" not in text
    )


@given(st.binary(max_size=40), piece_lengths)
def test_invalid_bytes_are_replaced_wherever_they_are_cut(data, lengths):
    assert "".join(printed(data, lengths)) == data.decode("utf-8", "replace")


@given(
    st.text("ab", max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    piece_lengths,
)
def test_the_text_before_a_stop_string_is_printed_and_nothing_of_it(text, stops, lengths):
    starts = [at for stop in stops if (at := text.find(stop)) >= 0]
    out = "".join(printed(text.encode(), lengths, tuple(stops)))
    if not starts:
        assert out == text
    else:  # the stop string that is complete first ends the text
        ends = min(text.find(stop) + len(stop) for stop in stops if stop in text)
        assert text.startswith(out) and min(starts) <= len(out) < ends or out == text[: min(starts)]
        assert not any(stop in out for stop in stops)


def test_text_that_may_begin_a_stop_string_waits_until_that_is_decided():
    stream = TextStream(("END.",))
    assert [stream.feed(part) for part in (b"one E", b"N", b"O", b" EN", b"D", b".x")] == [
        "one ",
        "",
        "ENO",
        " ",
        "",
        "",
    ]
    assert stream.stopped
    assert [overlap("abcab", stop) for stop in ("abd", "b", "cabx", "zz", "abcab")] == [
        2,
        0,
        3,
        0,
        2,
    ]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="--stop is empty"):
        TextStream(("a", ""))


# ---- Writing -------------------------------------------------------------------------------------
def steps_of(writer: Writer, text: str, then: int = EOS_ID):
    return iter(
        [GeneratedToken(token, -1.5) for token in [*writer.speller.tokens(text.encode()), then]]
    )


def test_a_text_ends_with_its_document_or_its_tokens(writer):
    text = "naïve 日本 🙂 people"
    for end in (BOS_ID, EOS_ID):
        seen = []
        out = write_text(
            steps_of(writer, text, end), writer.speller, 99, on_text=seen.append, fresh=True
        )
        assert (out.text, out.ended, "".join(seen)) == (text, "document", text)
        assert out.tokens == writer.speller.tokens(text.encode()) and out.mean_logp == -1.5
        assert not any("\ufffd" in part for part in seen) and len(seen) > 5
    out = write_text(steps_of(writer, text), writer.speller, 3, fresh=True)
    assert (
        out.ended == "tokens"
        and len(out.tokens) == 3
        and text.startswith(out.text.rstrip("\ufffd"))
    )


def test_a_stop_string_across_tokens_ends_the_text_before_it(writer):
    out = write_text(
        steps_of(writer, "we the people of"), writer.speller, 99, ["e peo"], fresh=True
    )
    assert (out.text, out.ended) == ("we th", "stop")
    assert b"e peo" in b"".join(writer.speller.pieces[token] for token in out.tokens)


def test_an_interrupted_text_keeps_what_was_written(writer):
    def steps():
        yield from first_steps
        raise KeyboardInterrupt

    first_steps = list(itertools.islice(steps_of(writer, "we the people of"), 4))
    out = write_text(steps(), writer.speller, 99, ["never"], fresh=True)
    assert out.ended == "interrupted" and out.tokens == [step.token for step in first_steps]
    assert "we the people of".startswith(out.text) and out.text


def test_an_empty_text_has_figures_too(writer):
    out = write_text(iter([GeneratedToken(EOS_ID, -1.0)]), writer.speller, 5)
    assert (out.text, out.tokens, out.mean_logp, out.rate) == ("", [], 0.0, 0.0)


def test_any_bytes_can_be_a_prompt(writer):
    for data in (b"", b"\xff\xfe", PROMPT.encode(), "日本".encode()[:4]):
        tokens = writer.tokens(data)
        assert tokens[0] == BOS_ID and writer.speller.data(tokens[1:]) == data


@pytest.fixture(scope="module")
def plain_tokens(writer) -> list[int]:
    """The 50 tokens that plain greedy decoding writes after the prompt."""
    steps, stats = writer.steps(writer.tokens(PROMPT.encode()), Strategy("greedy"), 0)
    assert stats is None
    return [next(steps).token for _ in range(50)]


@pytest.mark.parametrize("draft", ["ngram", "suffix", "layers", "layers:2", "small"])
def test_every_draft_writes_what_plain_decoding_writes(writer, files, plain_tokens, draft):
    prompt, kind = writer.tokens(PROMPT.encode()), str(files.get(draft, draft))
    steps, stats = writer.steps(prompt, Strategy("greedy"), 0, kind, 5)
    assert [next(steps).token for _ in range(50)] == plain_tokens
    assert stats.tokens >= 50 and stats.drafted > 0


def test_the_names_of_drafters(writer, files):
    for name, kind, layers in (
        ("ngram", NGramDrafter, 0),
        ("suffix", SuffixDrafter, 0),
        ("layers", ModelDrafter, 1),
        ("layers:2", ModelDrafter, 2),
        (str(files["small"]), ModelDrafter, 1),
    ):
        drafter = writer.drafter(name, Strategy(), np.random.default_rng(0))
        assert type(drafter) is kind and (
            not layers or drafter.reader.engine.model.cfg.num_layers == layers
        )


def test_plain_decoding_is_timed_past_the_end_of_a_document(writer):
    heard = []
    assert (
        time_plain_decoding(writer, writer.tokens(b""), Strategy("greedy"), 0, 40, heard.append) > 0
    )
    assert sum(heard) == 40


def test_texts_of_a_search_end_before_the_stop_string(writer):
    prompt = writer.tokens(PROMPT.encode())
    free = search_texts(writer, prompt, 3, 12, best=3)
    assert (
        len({one.text for one in free}) == 3
        and free[0].mean_logp >= free[1].mean_logp >= free[2].mean_logp
    )
    stop = free[0].text[4:6]
    assert all(
        stop not in one.text for one in search_texts(writer, prompt, 3, 12, best=3, stops=[stop])
    )


# ---- What is wrong -------------------------------------------------------------------------------
def test_a_tokenizer_comes_from_the_artifact_or_from_a_file_with_its_hash(files, tmp_path):
    assert Writer(str(files["bare"]), str(files["tokenizer"]), "cpu").tokens(b"the") == Writer(
        str(files["model"]), device="cpu"
    ).tokens(b"the")
    with pytest.raises(
        UserError, match="no tokenizer in the artifact nor at .*; set --tokenizer to"
    ):
        Writer(str(files["bare"]), device="cpu")
    with pytest.raises(UserError, match="no tokenizer at nowhere; set --tokenizer to"):
        Writer(str(files["bare"]), "nowhere", "cpu")
    (tmp_path / "other.model").write_bytes(b"other")
    with pytest.raises(
        UserError, match="other.model is tokenizer [0-9a-f]{12}, .* with [0-9a-f]{12}; unset --tok"
    ):
        Writer(str(files["model"]), str(tmp_path / "other.model"), "cpu")


@pytest.mark.parametrize(
    "draft, message",
    [
        (
            "suffixes",
            "--draft is 'suffixes', which is no file; take one of none, ngram, suffix, layers, "
            "layers:K",
        ),
        ("layers:x", "layers:K with a whole number"),
        ("layers:", None),
        ("layers:3", "the model has 3; take 1 to 2"),
        ("stranger", "trained with tokenizer [0-9a-f]{12}, but the artifact with [0-9a-f]{12}"),
        ("larger", "knows 392 tokens, but the artifact 384"),
        ("tokenizer", "not a Fairway artifact"),
    ],
)
def test_an_unusable_draft_is_refused_in_one_line(writer, files, draft, message):
    if message is None:
        assert writer.draft_model(draft).cfg.num_layers == 1
        return
    with pytest.raises(UserError, match=message) as refused:
        writer.drafter(str(files.get(draft, draft)), Strategy(), np.random.default_rng(0))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("most", [0, 33])
def test_more_drafts_than_an_engine_can_forget_are_refused(writer, most):
    with pytest.raises(UserError, match=f"--drafts is {most}; it must be 1 to 32"):
        writer.steps([1], Strategy(), 0, "ngram", most)


def test_a_missing_device_is_refused(files):
    missing = "mps" if Config().device != "mps" else "cuda"
    with pytest.raises(UserError, match=f"--device is {missing}, but PyTorch sees only"):
        Writer(str(files["model"]), device=missing)
