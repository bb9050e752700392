"""fairway/records/schema.py: any JSON is judged, and each fault is named with both values."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.schema import FIRST_OF, KEYS, problems, read_submission

LEAST = dict(name="a run", github_id="someone", date="2026-03-18T14:56:29Z", val_bpb=1.2243657)
FULL = dict(
    author="A. Person",
    github_id="someone",
    name="Fairway",
    blurb="what was done",
    date="2026-05-01",
    track="non_record_16mb",
    val_loss=2.0,
    val_bpb=1.2,
    val_loss_std=0.1,
    val_bpb_std=0.06,
    seeds=[1, 2, 3],
    seed_results={
        str(seed): dict(
            val_loss=loss,
            val_bpb=loss * 0.6,
            artifact_bytes=size,
            steps=10,
            step_avg_ms=1.5,
            eval_time_s=20.0,
        )
        for seed, loss, size in ((1, 1.9, 700_000), (2, 2.0, 800_000), (3, 2.1, 750_000))
    },
    bytes_total=900_000,
    bytes_code=100_000,
    hardware="cpu",
    pytorch_version="2.13.0",
)


def changed(**changes):
    return copy.deepcopy(FULL) | changes


def test_good_files_have_no_problems():
    assert problems(FULL, complete=True) == [] and problems(FULL) == [] and problems(LEAST) == []
    assert set(FULL) == {name for name, key in KEYS.items() if key.ours}


@pytest.mark.parametrize(
    "data, said",
    [
        ([], "submission.json holds [], wanted an object"),
        ([{}], "submission.json holds a list of 1, wanted an object"),
        (changed(val_bpb="1.2"), "val_bpb is '1.2', wanted a number"),
        (changed(val_bpb=True), "val_bpb is True, wanted a number"),
        (changed(val_bpb=12.0), "val_bpb is 12, wanted bits for each byte, 0.2 to 8"),
        (changed(val_bpb=0.02), "val_bpb is 0.02, wanted bits for each byte"),
        (changed(bytes_total=15.9), "bytes_total is 15.9, wanted a whole number"),
        (changed(bytes_total=850_000.0, bytes_code=-1), "bytes_code is -1, wanted a whole number"),
        (changed(bytes_total=16), "bytes_total is 16, wanted bytes"),
        (
            changed(bytes_total=790_000),
            "bytes_total is 790000, wanted the largest seed's, at least 800000",
        ),
        (changed(bytes_code=900_000), "bytes_code is 900000, wanted less than bytes_total, 900000"),
        (changed(date="yesterday"), "date is 'yesterday', wanted YYYY-MM-DD"),
        (changed(date="2026-13-01"), "date is '2026-13-01', wanted YYYY-MM-DD"),
        (
            changed(val_bpb=1.14, val_loss=2.0),
            "val_bpb is 1.14 (that is the best seed), wanted the mean of 3 seeds, 1.2",
        ),
        (changed(val_loss=2.3), "val_loss is 2.3, wanted the mean of 3 seeds, 2"),
        (changed(val_bpb_std=0.01), "val_bpb_std is 0.01, wanted 0.06 from 3 seeds"),
        (changed(seeds=[1, 2, 2]), "seeds are [1, 2, 2], wanted distinct ones"),
        (changed(seeds=[1, 2, 4]), "seeds are [1, 2, 4] but seed_results has [1, 2, 3]"),
        (changed(seeds="1, 2, 3"), "seeds is '1, 2, 3', wanted a list of whole numbers"),
        (
            changed(seed_results=[1.2]),
            "seed_results is a list of 1, wanted an object with one entry a seed",
        ),
        (changed(val_loss=1.2), "val_loss is 1.2, wanted the mean of 3 seeds, 2"),
        (
            changed(val_loss=0.5),
            "val_loss is 0.5 with val_bpb 1.2: that is 0.60 bytes per token; wanted nats",
        ),
        (
            {k: v for k, v in FULL.items() if k != "author" and k != "github_id"},
            "author and github_id are missing",
        ),
        (
            {k: v for k, v in FULL.items() if k != "val_bpb"},
            "is it BPB under the wrong key? wanted both",
        ),
        (LEAST | {"val_bpb": None}, "val_bpb is missing"),
        (LEAST | {"name": ""}, "name is missing"),
        (changed(val_bpb=10**400), "val_bpb is a whole number of 1329 bits, wanted a number"),
    ],
)
def test_each_fault_is_named_with_both_values(data, said):
    found = problems(data)
    assert any(said in line for line in found), found
    assert all("\n" not in line and len(line) < 300 for line in found) and found


def test_what_we_write_is_complete():
    assert problems(LEAST) == [] and len(problems(LEAST, complete=True)) == len(FULL) - len(LEAST)
    assert problems(changed(blurb=""), complete=True) == [
        f"blurb is missing: {KEYS['blurb'].meaning}"
    ]


def test_rounding_is_no_fault():
    assert problems(changed(val_bpb=1.2, val_loss=2.00004, val_bpb_std=0.0600001)) == []
    five = {
        s: {"val_bpb": round(r["val_bpb"] + 0.000004, 5)} for s, r in FULL["seed_results"].items()
    }
    assert problems(LEAST | dict(val_bpb=1.2, seed_results=five)) == []
    assert problems(changed(val_bpb_std=0.049)) == []  # with n in place of n - 1


def test_seeds_of_two_splits_do_not_make_one_record():
    data = changed()
    data["seed_results"]["3"]["val_bpb"] = 1.0
    said = "seed 3's val_loss and val_bpb are in the ratio 2.1000, wanted 1.6667"
    assert any(said in line for line in problems(data))


def test_other_names_are_understood():
    said = read_submission(
        dict(
            run_name="x",
            mean_val_bpb=1.1,
            mean_val_loss=1.9,
            code_bytes=9,
            artifact_bytes_max=99,
            gpu="1x",
            seeds={"42": {"val_bpb": 1.1, "bytes_total": 98, "ms_per_step": 2.5}},
            std_bpb=0.1,
        )
    )
    assert (said.name, said.val_bpb, said.val_loss, said.bytes_code, said.bytes_total) == (
        "x",
        1.1,
        1.9,
        9,
        99,
    )
    assert (
        said.seeds == [42]
        and said.seed_results[42].bytes == 98
        and said.seed_results[42].step_avg_ms == 2.5
    )
    assert said.hardware == "1x" and said.val_bpb_std == 0.1 and said.author is None
    assert read_submission(dict(val_bpb=1.3, mean_bpb=1.1)).val_bpb == 1.3 and set(FIRST_OF) <= set(
        KEYS
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from([*KEYS, "1", "42", "val_bpb", "artifact_bytes"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@given(data=JSON, key=st.sampled_from([*KEYS]), value=JSON)
def test_any_json_is_judged(data, key, value):
    for judged in (data, changed(**{key: value})):
        for complete in (True, False):
            assert all(
                isinstance(line, str) and "\n" not in line for line in problems(judged, complete)
            )
    assert read_submission(data).seed_results is not None
