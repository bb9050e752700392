"""Columns on disk: reused for the same key, emptied for another, refused in one line if damaged."""

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.scoring import columns as module
from fairway.scoring.columns import COVERED, columns_in_memory, open_columns
from train_gpt import UserError

TYPES = {"logp": "f8", "hint": "f4"}
KEY = dict(artifact="a", eval_stride=64, ntk_rope=True)
FILES = ["columns.json", "covered.npy", "hint.npy", "logp.npy"]


def put(columns, rows, value: float = 1.5) -> None:
    columns.put(
        np.array(rows), {"logp": np.full(len(rows), value), "hint": np.full(len(rows), -value)}
    )


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def refusal(folder, rows: int = 5, create: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        open_columns(folder, rows, TYPES, KEY, create)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message and len(message) < 300
    return message


@pytest.fixture
def folder(tmp_path):
    """Return a folder with columns of five rows, two of them filled."""
    put(open_columns(tmp_path / "a" / "b", 5, TYPES, KEY), [1, 3])
    return tmp_path / "a" / "b"


def test_the_same_key_finds_the_rows_that_were_filled(folder):
    again = open_columns(folder, 5, TYPES, dict(reversed(KEY.items())))
    assert again["logp"].tolist() == [0, 1.5, 0, 1.5, 0] and again["hint"].tolist() == [
        0,
        -1.5,
        0,
        -1.5,
        0,
    ]
    assert (
        again.covered.tolist() == [0, 1, 0, 1, 0]
        and again.rows == 5
        and again.names == ["logp", "hint"]
    )
    assert [again[name].dtype.str for name in (*TYPES, COVERED)] == ["<f8", "<f4", "|u1"]
    assert names(folder) == FILES and not again.complete()
    put(again, [0, 2, 4])
    assert open_columns(folder, 5, TYPES, KEY).complete()


@pytest.mark.parametrize(
    "changed",
    [
        dict(key=KEY | dict(eval_stride=32)),
        dict(key=KEY | dict(more=1)),
        dict(rows=6),
        dict(rows=0),
        dict(kinds=TYPES | dict(logp="f4")),
        dict(kinds={"logp": "f8"}),
    ],
)
def test_another_key_empties_the_folder(folder, changed):
    (folder / "old.npy").write_bytes(b"something")
    wanted = dict(rows=5, kinds=TYPES, key=KEY) | changed
    columns = open_columns(folder, **wanted)
    assert (
        not columns.covered.any() and not columns["logp"].any() and columns.rows == wanted["rows"]
    )
    assert names(folder) == sorted(
        ["columns.json", "covered.npy", *(f"{name}.npy" for name in wanted["kinds"])]
    )


@pytest.mark.parametrize("text", [None, "", "{", "null", "[1]", '"\ud800"'])
def test_a_missing_or_damaged_manifest_empties_the_columns(folder, text):
    manifest = folder / "columns.json"
    manifest.unlink()
    if text is not None:
        manifest.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert not open_columns(folder, 5, TYPES, KEY).covered.any()
    assert json.loads(manifest.read_text())["key"] == KEY


@given(
    st.sampled_from(FILES[1:]),
    st.integers(0, 400),
    st.one_of(st.none(), st.binary(min_size=1, max_size=3)),
)
def test_a_damaged_file_is_refused_or_has_the_right_shape(tmp_path_factory, name, at, noise):
    """Header and length are checked; the values are not."""
    folder = tmp_path_factory.mktemp("damaged") / "columns"
    put(open_columns(folder, 40, TYPES, KEY), [1, 3])
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(
        whole[:at] if noise is None else whole[:at] + noise + whole[at + len(noise) :]
    )
    try:
        columns = open_columns(folder, 40, TYPES, KEY)
    except UserError as e:
        assert "\n" not in str(e) and str(folder) in str(e) and "delete" in str(e)
    else:
        assert all(
            columns[name].shape == (40,) and columns[name].dtype == kind
            for name, kind in {**TYPES, COVERED: "u1"}.items()
        )


@pytest.mark.parametrize("keep", [0, 5, 64, 127, 128, 136, -1])
def test_a_file_cut_short_is_refused_and_nothing_is_lost(folder, keep):
    """It is not lengthened with zeros: they would be certainties in rows that count as filled."""
    whole = (folder / "logp.npy").read_bytes()
    (folder / "logp.npy").write_bytes(whole[:keep])
    for create in (True, False):
        assert "delete" in refusal(folder, create=create)
    assert names(folder) == FILES


@pytest.mark.parametrize(
    "other",
    [
        np.zeros(6),
        np.zeros(4),
        np.zeros((5, 1)),
        np.zeros(5, "f4"),
        np.zeros(5, ">f8"),
        np.array([None] * 5),
    ],
)
def test_a_file_of_another_shape_or_type_is_refused(folder, other):
    np.save(folder / "logp.npy", other, allow_pickle=True)
    assert "delete" in refusal(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "hint.npy").unlink()
    assert "hint.npy" in refusal(folder)


@pytest.mark.parametrize("how", ["at once", "at the third file", "without fallocate", "manifest"])
def test_no_space_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, how):
    calls = []

    def full(*_args):
        calls.append(_args)
        if how != "at the third file" or len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if how == "without fallocate":
        monkeypatch.delattr(os, "posix_fallocate")
        monkeypatch.setattr(module, "bytes", lambda n: full(), raising=False)
    elif how == "manifest":
        monkeypatch.setattr(module, "replacing", full)
    else:
        monkeypatch.setattr(os, "posix_fallocate", full)
    message = refusal(tmp_path / "columns")
    assert (
        "no columns of 5 rows (65 bytes): No space left on device; free space, or set OUT_DIR"
        in message
    )
    assert calls and not (tmp_path / "columns").exists()


def test_space_is_reserved_when_columns_are_created(tmp_path):
    open_columns(tmp_path / "c", 100_000, TYPES, KEY)
    for name, size in (("logp", 8), ("hint", 4), (COVERED, 1)):
        assert (tmp_path / "c" / f"{name}.npy").stat().st_blocks * 512 >= 100_000 * size


def test_without_fallocate_files_are_the_same(tmp_path, monkeypatch):
    open_columns(tmp_path / "a", 100, TYPES, KEY)
    monkeypatch.delattr(os, "posix_fallocate")
    open_columns(tmp_path / "b", 100, TYPES, KEY)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_only_opening_creates_nothing(tmp_path, folder):
    assert "no columns of this artifact, text and settings" in refusal(
        tmp_path / "none", create=False
    )
    assert not (tmp_path / "none").exists()
    seen = open_columns(folder, 5, TYPES, KEY, create=False)
    assert seen.covered.tolist() == [0, 1, 0, 1, 0]
    put(seen, [0])  # one rank's rows are the other's too
    assert open_columns(folder, 5, TYPES, KEY).covered.tolist() == [1, 1, 0, 1, 0]


def test_only_opening_a_folder_of_another_key_is_refused(folder):
    with pytest.raises(
        UserError, match="holds no columns of this artifact, text and settings; all ranks must"
    ):
        open_columns(folder, 5, TYPES, KEY | dict(artifact="b"), create=False)
    assert open_columns(folder, 5, TYPES, KEY).covered.tolist() == [0, 1, 0, 1, 0]


def test_rows_are_counted_each_time():
    columns = columns_in_memory(4, TYPES)
    assert not columns.complete() and columns.rows == 4 and columns.names == ["logp", "hint"]
    put(columns, [0, 2])
    put(columns, [2, 3], 7.0)
    assert columns.covered.tolist() == [1, 0, 2, 1] and columns["logp"].tolist() == [1.5, 0, 7, 7]
    put(columns, [1])
    assert not columns.complete()
    columns.covered[2] = 1
    assert columns.complete() and columns_in_memory(0, TYPES).complete()


def test_no_rows(tmp_path):
    columns = open_columns(tmp_path / "c", 0, TYPES, KEY)
    assert columns.complete() and columns.rows == 0 and len(columns["logp"]) == 0
    assert open_columns(tmp_path / "c", 0, TYPES, KEY).rows == 0
