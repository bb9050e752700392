"""Hold the decision log, docs/EXPERIMENTS.md, to its form and to the files that it cites."""

import re

import pytest
from conftest import ROOT

from bench import experiments

PAGE = experiments.PAGE.read_text(encoding="utf-8")
ENTRIES = experiments.read_experiments(PAGE)
CITED = re.compile(r"\bcommits? ([0-9a-f]+)(?: and ([0-9a-f]+))?")
# A figure from one of these has no file that a test could read.
UNCHECKED = re.compile(r"\bcommits? [0-9a-f]|closing note|not repeated here")


def decimals(text: str) -> set[str]:
    """Return the numbers with a decimal point, without signs: "+0.10 ± 2" gives 0.10."""
    return set(re.findall(r"\d+\.\d+", text))


def result_files(entry: experiments.Experiment) -> list[str]:
    return re.findall(r"bench/results/[\w./-]+\w", entry.measured)


def test_the_table_is_current():
    assert experiments.with_table(PAGE) == PAGE, "run python bench/experiments.py"


def test_entries_have_a_status_a_text_and_a_name_of_their_own():
    assert [e.idea for e in ENTRIES if e.status not in experiments.STATUSES] == []
    assert [e.idea for e in ENTRIES if not (e.files and e.measured and e.decided_by)] == []
    assert [e.idea for e in ENTRIES if len(e.text.split()) < 4] == []
    assert len({experiments.anchor(e.idea) for e in ENTRIES}) == len(ENTRIES)
    assert [e.idea for e in ENTRIES if "|" in e.idea + e.decided_by] == []


def test_at_least_25_entries_have_a_number():
    assert sum(bool(re.search(r"\d", e.decided_by)) for e in ENTRIES) >= 25


def test_what_ships_and_what_is_cited_exists():
    """Rejected ideas may name a file that is gone."""
    kept = [e for e in ENTRIES if e.status in ("shipping", "prototype")]
    missing = [f"{e.idea}: {f}" for e in kept for f in e.files if not (ROOT / f).is_file()]
    missing += [
        f"{e.idea}: {f}" for e in ENTRIES for f in result_files(e) if not (ROOT / f).is_file()
    ]
    assert missing == []


def test_commits_are_named_by_seven_digits():
    cited = [name for pair in CITED.findall(PAGE) for name in pair if name]
    assert cited and {len(name) for name in cited} == {7}
    # A hash after a hyphen is part of a file's name.
    assert re.findall(r"(?<![-\w])(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{8,40}\b", PAGE) == []


def test_deciding_figures_are_in_the_files_that_are_cited():
    wrong = []
    for entry in ENTRIES:
        if (files := result_files(entry)) and not UNCHECKED.search(entry.measured):
            known = set().union(*(decimals((ROOT / f).read_text(encoding="utf-8")) for f in files))
            wrong += [f"{entry.idea}: {n}" for n in decimals(entry.decided_by) - known]
    assert wrong == []


def test_an_entry_is_read_with_fields_of_several_lines():
    page = (
        f"# Page\n{experiments.START}old\n{experiments.END}\n## Group\n\n### A b, c\n\n"
        "Status: shelved\nFiles: `a.py`,\n`b/c.py`\nMeasured: by hand\nDecided by: 1.5 against\n"
        "1.6\n\nText of\n\ntwo paragraphs.\n\n## Other\n\nNo entry.\n"
    )
    (entry,) = experiments.read_experiments(page)
    assert entry == (
        "A b, c",
        "shelved",
        ["a.py", "b/c.py"],
        "by hand",
        "1.5 against 1.6",
        "Text of\n\ntwo paragraphs.",
    )
    written = experiments.with_table(page)
    assert "| 1 | [A b, c](#a-b-c) | shelved | 1.5 against 1.6 |" in written
    assert "old" not in written and experiments.with_table(written) == written


def test_an_entry_without_a_field_is_named():
    with pytest.raises(SystemExit, match="'Idea' must begin with the fields Status"):
        experiments.read_experiments("### Idea\n\nStatus: shipping\nMeasured: no\n\nText.\n")
