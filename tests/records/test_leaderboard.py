"""records/README.md: ranked, escaped, the same bytes each time, and reported when it is stale."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.files import RecordError
from fairway.records.leaderboard import is_stale, leaderboard_text, write_leaderboard


def record(
    records: Path, name: str, bpb: float, track: str = "track_10min_16mb", /, **more
) -> Path:
    folder = records / track / name
    folder.mkdir(parents=True)
    data = dict(
        name=name[11:],
        val_bpb=bpb,
        date=name[:10],
        author="A",
        hardware="8xH100",
        bytes_total=15_900_000,
    )
    (folder / "submission.json").write_text(json.dumps(data | more))
    return folder


def rows(text: str) -> list[list[str]]:
    """Return the cells of each record's row; an entity is no cell end."""
    lines = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_records_are_ranked_by_score_then_date_in_each_track(tmp_path):
    record(tmp_path, "2026-04-02_late", 1.1)
    record(tmp_path, "2026-04-01_early", 1.1)
    record(tmp_path, "2026-05-01_best one", 1.0625)
    record(
        tmp_path, "2026-03-01_other", 0.9, "track_non_record_16mb", bytes_total=None, hardware=None
    )
    text = leaderboard_text(tmp_path)
    assert rows(text) == [
        [
            "1",
            "1.062500",
            "[best one](track_10min_16mb/2026-05-01_best%20one)",
            "2026-05-01",
            "A",
            "8xH100",
            "15,900,000",
        ],
        [
            "2",
            "1.100000",
            "[early](track_10min_16mb/2026-04-01_early)",
            "2026-04-01",
            "A",
            "8xH100",
            "15,900,000",
        ],
        [
            "3",
            "1.100000",
            "[late](track_10min_16mb/2026-04-02_late)",
            "2026-04-02",
            "A",
            "8xH100",
            "15,900,000",
        ],
        [
            "1",
            "0.900000",
            "[other](track_non_record_16mb/2026-03-01_other)",
            "2026-03-01",
            "A",
            "",
            "",
        ],
    ]
    assert re.findall("^## (.*)$", text, re.M) == [
        "10 minutes on 8×H100, 16 MB",
        "16 MB, no record",
    ]
    assert leaderboard_text(tmp_path) == text


def test_a_folder_that_is_being_written_is_no_record(tmp_path):
    record(tmp_path, "2026-04-01_x", 1.1)
    (tmp_path / "track_10min_16mb/.2026-04-02_y.part").mkdir()
    assert len(rows(leaderboard_text(tmp_path))) == 1


def test_without_records_the_page_says_so(tmp_path):
    (tmp_path / "track_10min_16mb").mkdir()
    assert "There are no records yet" in leaderboard_text(tmp_path) and "|" not in leaderboard_text(
        tmp_path
    )
    assert leaderboard_text(tmp_path) == leaderboard_text(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "has no submission.json"),
        ("{", "is no JSON"),
        ("[]", "has no val_bpb"),
        ('{"val_bpb": "1"}', "no val_bpb"),
        ('{"val_bpb": NaN}', "is no JSON"),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(content, says, tmp_path):
    folder = record(tmp_path, "2026-04-01_x", 1.1)
    (folder / "submission.json").unlink()
    if content is not None:
        (folder / "submission.json").write_text(content)
    with pytest.raises(RecordError, match=says) as caught:
        leaderboard_text(tmp_path)
    assert "2026-04-01_x" in str(caught.value) and "\n" not in str(caught.value)


def test_the_file_on_disk_is_stale_once_a_record_changes(tmp_path):
    assert is_stale(tmp_path)
    record(tmp_path, "2026-04-01_x", 1.1)
    assert write_leaderboard(tmp_path) == tmp_path / "README.md" and not is_stale(tmp_path)
    record(tmp_path, "2026-04-02_y", 1.2)
    assert is_stale(tmp_path)


@given(name=st.text(min_size=1), author=st.text(), hardware=st.text())
def test_no_text_breaks_the_table(tmp_path_factory, name, author, hardware):
    records = tmp_path_factory.mktemp("records")
    record(records, "2026-04-01_x", 1.1, name=name, author=author, hardware=hardware)
    text = leaderboard_text(records)
    (row,) = rows(text)
    assert len(row) == 7 and "<" not in text and row[2].endswith("](track_10min_16mb/2026-04-01_x)")
    assert row[2].count("[") == row[2].count("]") == 1 and "\\" not in text


def test_the_table_of_this_repository_is_up_to_date():
    assert not is_stale(ROOT / "records"), "run `fairway table`"
