"""The history of runs: found, joined, filtered, compared; damaged lines are named."""

import json

import pytest
from history_lines import A, B, C, evaluation_line, training_line, write_lines, write_log
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.files import RecordError
from fairway.records.history import (
    compare_runs,
    filter_rows,
    find_files,
    find_row,
    listing,
    parse_filter,
    read_history,
    rows_json,
)


@pytest.fixture
def history(tmp_path):
    scores = (
        evaluation_line(A, 11, 1.58),
        evaluation_line(A, 12, 1.57, mix_weights="gate"),
        evaluation_line(A, 13, 1.56),
        evaluation_line(B, 21, 1.5),
    )
    return read_history([write_lines(tmp_path / "runs.jsonl", A, B, C, *scores)])


# ==== Reading =====================================================================================
def test_files_are_found_here_and_below_out_without_following_links(tmp_path):
    wanted = [write_lines(tmp_path / name / "runs.jsonl", A) for name in (".", "out", "out/a/b")]
    write_lines(tmp_path / "elsewhere/runs.jsonl", A)
    (tmp_path / "out/loop").symlink_to(tmp_path / "out")
    (tmp_path / "out/d/runs.jsonl").mkdir(parents=True)
    assert sorted(find_files(tmp_path)) == sorted(wanted)
    assert len(read_history([*wanted, wanted[0]]).rows) == 3  # a file named twice counts once
    assert find_files(tmp_path / "nothing") == []


def test_an_evaluation_is_paired_with_the_training_of_its_artifact(history):
    found = [(r.columns["run_id"], r.columns["final_bpb"]) for r in history.rows]
    # The same evaluation again replaces the one before; other settings make another row; newest
    # last.
    assert found == [("first", 1.57), ("first", 1.56), ("second", 1.5), ("third", None)]
    last = history.rows[2].columns
    assert (last["number"], last["steps"], last["seconds"], last["bpb"]) == (3, 620, 150.5, 1.62)
    assert (last["bytes"], last["certified"], last["world_size"]) == (700_020 + 350_000, True, 2)
    assert history.rows[3].columns["bytes"] == 700_030 + 99_000


def test_an_evaluation_without_its_training_is_a_row_too(tmp_path):
    (row,) = read_history(
        [write_lines(tmp_path / "runs.jsonl", evaluation_line(A, 5, 1.5, certified=None))]
    ).rows
    assert (row.columns["bpb"], row.columns["final_bpb"], row.columns["bytes"]) == (
        None,
        1.5,
        1_050_000,
    )
    assert "1.500000" in listing([row]) and json.loads(rows_json([row]))[0]["certified"] is None


def test_damaged_lines_are_named_and_the_others_read(tmp_path):
    bad = [
        '{"time": 1',
        "[]",
        "null",
        '{"time": NaN}',
        "{}",
        '{"time": 1, "start": []}',
        "[" * 100_000,
        json.dumps(dict(A, time="late")),
        "\x00\x01",
        '{"time": ' + "9" * 5000 + "}",
    ]
    history = read_history([write_lines(tmp_path / "runs.jsonl", bad[0], A, "", *bad[1:], B)])
    assert [row.columns["run_id"] for row in history.rows] == ["first", "second"]
    assert [name.split(":")[-1] for name in history.damaged] == ["1", *map(str, range(4, 13))]


KEYS = st.sampled_from("start settings sha256 final val bpb seconds device".split())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(
    parts=st.lists(
        st.tuples(st.sampled_from("time start val artifact final run_id".split()), JSON), max_size=3
    ),
    cut=st.integers(0, 300),
)
def test_no_line_whatever_it_holds_stops_the_list(tmp_path_factory, parts, cut):
    path = tmp_path_factory.mktemp("h") / "runs.jsonl"
    history = read_history(
        [
            write_lines(
                path, A | dict(parts), evaluation_line(A, 7, 1.5) | dict(parts), json.dumps(B)[:cut]
            )
        ]
    )
    assert len(listing(history.rows).splitlines()) == 1 + len(history.rows)
    assert len(json.loads(rows_json(history.rows))) == len(history.rows)
    for row in history.rows:
        assert compare_runs(row, history.rows[0]).startswith("A  ")


# ==== Filters =====================================================================================
@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        ([], [1, 2, 3, 4]),
        (["num_layers=6"], [3]),
        (["NUM_LAYERS=4.0"], [1, 2, 4]),
        (["num_layers!=4"], [3]),
        (["final_bpb<1.57"], [2, 3]),
        (["final_bpb>1.5", "final_bpb<1.57"], [2]),
        (["final_bpb!=1.5"], [1, 2, 4]),
        (["compile=true"], [3]),
        (["compile=0"], [1, 2, 4]),
        (["certified=1"], [1, 2, 3]),
        (["run_id=first"], [1, 2]),
        (["mix_weights=gate"], [1]),
        (["eval.mix_weights=sets"], [2, 3]),
        (["device=cpu x86_64"], [1, 2, 3, 4]),
        (["eval.device=cpu"], [1, 2, 3]),
        (["codec=aut"], []),
        (["time>1970-01-01"], [1, 2, 3, 4]),
        (["steps>629"], [4]),
        (["codec="], []),
        (["number=2"], [2]),
    ],
)
def test_filters_compare_numbers_as_numbers_and_all_else_as_text(history, filters, numbers):
    assert [row.columns["number"] for row in filter_rows(history.rows, filters)] == numbers


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "num_layer=4",
            "num_layer is neither a column nor a setting of these runs; did you mean num_layers",
        ),
        ("zzzz=4", "columns are number, time"),
        ("num_layers", "is no filter; write key=value"),
        ("num_layers>=4", ""),
        ("<4", "is no filter"),
    ],
)
def test_a_filter_that_means_nothing_is_refused_with_what_is_near(history, text, says):
    if not says:
        assert parse_filter(text, history.rows).value == "=4"  # which no number is
        return
    with pytest.raises(RecordError) as caught:
        filter_rows(history.rows, [text])
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_list_shows_no_control_characters(tmp_path):
    (row,) = read_history(
        [write_lines(tmp_path / "runs.jsonl", training_line("a\x1b[2J\nb", 1))]
    ).rows
    assert (
        "\x1b" not in listing([row])
        and len(listing([row]).splitlines()) == 2
        and "a?[2J?b" in listing([row])
    )


# ==== Two runs ====================================================================================
def test_a_run_is_found_by_number_run_id_folder_or_log(tmp_path, history):
    assert find_row("3", history).columns["run_id"] == "second"
    assert find_row("first", history) is history.rows[1]  # the newest of that name
    write_log(tmp_path, "second", "pass\n")
    assert find_row(str(tmp_path / "logs/second.txt"), history).columns["number"] == 3
    assert find_row(str(tmp_path), history).columns["run_id"] == "second"
    for name, says in (
        ("secnd", "did you mean second"),
        ("99", "`fairway runs` lists them"),
    ):
        with pytest.raises(RecordError, match=says):
            find_row(name, history)


def test_a_run_older_than_the_list_is_read_from_its_own_log(tmp_path, history):
    write_log(tmp_path / "old", "ancient", "pass\n")
    events = [
        {"event": name, "time": 5} | A[name] for name in ("start", "val", "artifact", "final")
    ]
    write_lines(
        tmp_path / "old/logs/ancient.jsonl",
        *(e | ({"run_id": "ancient"} if e["event"] == "start" else {}) for e in events),
    )
    row = find_row(str(tmp_path / "old"), history)
    assert (row.columns["run_id"], row.columns["bpb"], row.columns["number"]) == (
        "ancient",
        1.61,
        None,
    )
    assert "no setting differs" in compare_runs(
        row, row
    ) and "no code line differs" in compare_runs(row, row)
    write_lines(tmp_path / "old/logs/ancient.jsonl", "x")
    with pytest.raises(RecordError, match="names no settings"):
        find_row(str(tmp_path / "old"), history)


def test_a_comparison_shows_settings_hashes_code_and_what_the_score_did(tmp_path):
    one, two = "import os\nx = 1\n", "import os\nx = 2\ny = 3\n"
    a, b = training_line("a", 10, one), training_line("b", 20, two, num_layers=6, new=True)
    rows = read_history(
        [
            write_lines(
                tmp_path / "runs.jsonl",
                a,
                b,
                evaluation_line(a, 11, 1.5),
                evaluation_line(b, 21, 1.25, mix_weights="gate"),
            )
        ]
    ).rows
    write_log(tmp_path, "a", one), write_log(tmp_path, "b", two)
    text = compare_runs(*rows)
    for line in (
        "num_layers        4 -> 6",
        "new               (none) -> true",
        'eval.mix_weights  "sets" -> "gate"',
        "final bpb            1.500000 -> 1.250000  (-0.250000)",
        "artifact bytes       700,010 -> 700,020  (+10)",
        "evaluation seconds   41.0 -> 51.0  (+10.0)",
        "-x = 1",
        "+x = 2",
        "+y = 3",
        " import os",
    ):
        assert line in text.splitlines(), text
    assert (
        f"code differs: {a['start']['sha256']['code'][:12]} -> " in text
        and "data differs" not in text
    )
    write_log(tmp_path, "b", one)
    assert (
        "the code of b" in compare_runs(*rows)
        and "is gone" in compare_runs(*rows)
        and "+x = 2" not in compare_runs(*rows)
    )
    (tmp_path / "logs/b.txt").unlink()
    assert "is gone" in compare_runs(*rows)
