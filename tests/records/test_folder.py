"""fairway/records/folder.py: a folder as data, in any state of damage."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.folder import LOG_LIMIT, final_score, read_claims, read_record_folder, seed_in
from tests.zoo.records import GOOD, good_files, write
from tests.zoo.records.good import make


@pytest.mark.parametrize("name", GOOD)
def test_good_folders_are_read_whole(name, tmp_path):
    folder = read_record_folder(write(good_files(name), tmp_path / "track_10min_16mb" / name))
    assert (
        folder.track == "10min_16mb" and not folder.faults and folder.readme.startswith("# Bigrams")
    )
    assert [run.seed for run in folder.runs] == [1337, 2025, 42] and [
        run.seed for run in folder.record
    ] == [1337, 42, 2025]
    assert {run.log.dialect for run in folder.runs} == {GOOD[name].replace("ours", "fairway")}
    ours = GOOD[name] == "ours"
    assert all(
        (run.eval_log is not None)
        == (run.score is not None)
        == (run.certificate is not None)
        == ours
        for run in folder.runs
    )
    assert (
        folder.claims.record.bpb
        == json.loads((folder.path / "submission.json").read_text())["val_bpb"]
    )


def test_the_track_is_that_of_the_folder_above_else_of_the_json(tmp_path):
    files = make(said={"track": "non_record_16mb"})
    assert read_record_folder(write(files, tmp_path / "a")).track == "non_record_16mb"
    assert (
        read_record_folder(write(files, tmp_path / "track_10min_16mb" / "a")).track == "10min_16mb"
    )
    assert read_record_folder(write(make(said={"track": 3}), tmp_path / "b")).track == "10min_16mb"


@pytest.mark.parametrize(
    "name,seed",
    [
        ("train_seed42.log", 42),
        ("logs/train_seed-7.txt", 7),
        ("train_seed_1337.txt", 1337),
        ("train.log", None),
        ("ternary_log_7.txt", 7),
        ("train_seed" + "9" * 30 + ".log", None),
    ],
)
def test_seeds_in_names(name, seed):
    assert seed_in(name) == seed


def test_among_logs_of_one_seed_the_claimed_one_counts(tmp_path):
    files = make()
    other = make(only={42: dict(final_loss=1.95)})["train_seed42.log"]
    folder = read_record_folder(write(files | {"first_seed42.log": other}, tmp_path))
    assert [run.name for run in folder.record] == [
        "train_seed1337.log",
        "train_seed42.log",
        "train_seed2025.log",
    ]
    folder = read_record_folder(
        write(
            files | {"train_seed42.log": other, "z_seed42.log": files["train_seed42.log"]}, tmp_path
        )
    )
    assert [run.name for run in folder.record] == [
        "train_seed1337.log",
        "z_seed42.log",
        "train_seed2025.log",
    ]
    assert all(final_score(run) is not None for run in folder.record)


def test_links_pipes_and_loops_are_named_and_not_followed(tmp_path):
    folder = write(make(), tmp_path / "record")
    (folder / "loop").symlink_to(folder)
    (folder / "self.log").symlink_to("self.log")
    (folder / "train_gpt.py").unlink()
    (folder / "train_gpt.py").symlink_to("/etc/passwd")
    os.mkfifo(folder / "train_seed7.log")
    found = read_record_folder(folder)
    assert set(found.faults) == {"loop", "self.log", "train_gpt.py", "train_seed7.log"}
    assert found.code.entries == () and len(found.runs) == 3


def test_huge_empty_and_binary_files_are_named(tmp_path):
    folder = write(
        make()
        | {
            "train_seed42.log": b"",
            "train_seed2025.log": os.urandom(2000).replace(b"\n", b"\0") * 9,
        },
        tmp_path,
    )
    for name in ("README.md", "submission.json", "train_gpt.py", "train_seed1337.log"):
        with open(folder / name, "r+b") as f:
            f.truncate(1 << 30)
    found = read_record_folder(folder)
    assert {"README.md", "submission.json", "train_seed42.log", "train_seed1337.log"} <= set(
        found.faults
    )
    assert "at most" in found.faults["README.md"] and found.faults["train_seed42.log"] == "empty"
    assert found.code.sources["train_gpt.py"].fault and LOG_LIMIT < 1 << 30


def test_an_empty_folder_is_read(tmp_path):
    found = read_record_folder(tmp_path)
    assert (found.files, found.runs, found.submission, found.code.entries) == ({}, [], None, ())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["val_bpb", "val_loss", "seeds", "seed_results", "42", "seed", "bytes_total", "x"]
            ),
            inner,
        )
    ),
    max_leaves=12,
)


@given(anything)
def test_claims_are_read_from_any_json(data):
    found = read_claims(data)
    assert all(type(seed) is int for seed in found.seeds) and isinstance(found.data, dict)
