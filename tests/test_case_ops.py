"""Test the case transform: any text comes back, and markers have no bytes, in whole or in parts."""

import re

from hypothesis import given
from hypothesis import strategies as st

from fairway.case_ops import PIECES, Unfolding, fold, unfold
from train_gpt import CASE_MARKERS

ANY = st.text(st.characters(exclude_categories=["Cs"]))
CROWDED = st.text(st.sampled_from([*"aBcZ \n'1É", *PIECES]), max_size=16)


def bytes_counted(folded: str) -> int:
    return len("".join(c for c in folded if c not in CASE_MARKERS).encode())


@given(ANY | CROWDED)
def test_any_text_comes_back_and_its_bytes_are_those_of_the_pieces(text):
    folded = fold(text)
    assert unfold(folded) == text
    assert bytes_counted(folded) == len(text.encode())
    assert not re.search("[A-Z]", folded)


@given(CROWDED, st.lists(st.integers(1, 3)))
def test_text_that_comes_in_parts_is_the_same(text, sizes):
    folded, out, unfolding = fold(text), [], Unfolding()
    for size in [*sizes, len(folded)]:
        out.append(unfolding.feed(folded[:size]))
        folded = folded[size:]
    assert "".join(out) + unfolding.feed(folded, last=True) == text


@given(CROWDED)
def test_text_that_was_never_folded_can_be_read_too(text):
    assert not set(unfold(text)) & {*CASE_MARKERS} or PIECES[3] in text


def test_words_share_their_small_letters():
    title, caps, capital, _ = PIECES
    assert fold("The cat") == f"{title}the cat"
    assert fold("in New York") == f"in{title} new{title} york"
    assert fold("NASA, iPhone") == f"{caps}nasa, i{capital}phone"
    assert fold("A  B") == f"{title}a {title} b"
    assert fold("DON'T") == f"{caps}don'{title}t"
    assert fold("McDonald USAid") == f"{title}mc{capital}donald{title} u{capital}s{capital}aid"


def test_a_capital_that_is_certain_is_not_held_back():
    unfolding = Unfolding()
    assert unfolding.feed(fold("The")) == "The"
    assert unfolding.feed(fold(" NASA")) == ""  # more capitals may follow
    assert unfolding.feed(".") == " NASA."
