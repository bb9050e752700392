"""CaseOps: text without capitals, and markers that say where they were. Nothing is lost.

A word is a run of ASCII letters. A marker stands before each word with capitals. If a blank comes
before the word, it stays with the word and the marker comes first. So a tokenizer needs one piece,
" the", for a word in any case.

    "The cat"       -> "{TITLE}the cat"
    "in New York"   -> "in{TITLE} new{TITLE} york"
    "NASA, iPhone"  -> "{CAPS}nasa, i{CAPITAL}phone"

A marker is a piece of its own and counts no bytes. Letters have as many bytes in either case, so
the bytes of a token follow from its piece (`train_gpt.ByteTable`). Markers are private characters
of Unicode, of three bytes. A text that holds one itself spells it by an escape, which counts three
bytes, and markers, which count none.
"""

from __future__ import annotations

import re

from train_gpt import CASE_MARKERS

TITLE, CAPS, CAPITAL = CASE_MARKERS
ESCAPE = "\ue004"
PIECES = [*CASE_MARKERS, ESCAPE]  # what a tokenizer must keep whole
# No spelling begins another, and each has one escape: three bytes, as many as its character.
SPELLINGS = {
    ESCAPE: ESCAPE + TITLE,
    TITLE: ESCAPE + CAPS,
    CAPS: ESCAPE + CAPITAL + TITLE,
    CAPITAL: ESCAPE + CAPITAL + CAPS,
}
SPELLED = {spelling: character for character, spelling in SPELLINGS.items()}
CAPITALISED = re.compile("( ?)((?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*)")
MARKED = re.compile(
    f"{ESCAPE}(?:{CAPITAL}?[{TITLE}{CAPS}])?|[{TITLE}{CAPITAL}](?: ?[a-z])?|{CAPS}(?: ?[a-z]+)?"
)
# Where a text ends so, what follows may change the meaning of its end.
UNDECIDED = re.compile(f"{ESCAPE}{CAPITAL}?|[{TITLE}{CAPITAL}] ?|{CAPS} ?[a-z]*")


def fold(text: str) -> str:
    """Return a text with its capitals as markers; `unfold` undoes it to the character."""
    return CAPITALISED.sub(folded_word, text.translate(str.maketrans(SPELLINGS)))


def folded_word(match: re.Match) -> str:
    """Return a word with capitals, and the blank before it, in small letters and markers."""
    blank, word = match.groups()
    if len(word) > 1 and word.isupper():
        return CAPS + blank + word.lower()
    if word[0].isupper():
        first, word = TITLE + blank + word[0].lower(), word[1:]
    else:
        first = blank
    return first + re.sub("[A-Z]", lambda m: CAPITAL + m[0].lower(), word)


def unfold(text: str) -> str:
    """Return the text that was folded. In a text that never was, markers in no place vanish."""
    return MARKED.sub(unfolded_part, text)


def unfolded_part(match: re.Match) -> str:
    """Return what a marker, or an escape, makes of what follows it."""
    part = match[0]
    return SPELLED.get(part, "") if part[0] == ESCAPE else part[1:].upper()


class Unfolding:
    """Undo `fold` in a text that comes piece by piece."""

    def __init__(self) -> None:
        self.waiting = ""  # its meaning depends on what follows

    def feed(self, text: str, last: bool = False) -> str:
        """Return the text that is certain now; `last` says that no more will come."""
        text = self.waiting + text
        starts = [] if last else [match.start() for match in MARKED.finditer(text)]
        at = next((start for start in starts if UNDECIDED.fullmatch(text, start)), len(text))
        self.waiting = text[at:]
        return unfold(text[:at])
