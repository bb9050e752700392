"""A folder of shards is believed only when every file, shape and place is what the model's numbers call for."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairway.coreml.engine import Chain, interpreted
from fairway.coreml.manifest import (
    HOST,
    NAME,
    ManifestError,
    hashes_of,
    read_folder,
    read_manifest,
    write_manifest,
)
from fairway.coreml.mlpackage import LISTING, WEIGHTS, PackageError
from train_gpt import UserError

pytestmark = pytest.mark.apple
CHOICE = dict(shapes="fixed", precision="fp32", layers_per_shard=1, vocab_shards=2)


@pytest.fixture
def folder(exported, tmp_path):
    """Four shards that a test may spoil: layers0, layers1, head0, head1."""
    shutil.copytree(exported(**CHOICE), tmp_path / "s")
    return tmp_path / "s"


def changed(folder, sign: bool = False, **parts) -> None:
    """The manifest with other parts; signed: with the hashes of what now lies there."""
    data = json.loads((folder / NAME).read_text()) | parts
    if sign:
        data["sha256"] = hashes_of(folder, [shard["name"] for shard in data["shards"]])
    (folder / NAME).write_text(json.dumps(data))


def refused(folder, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        read_folder(folder)
    assert "\n" not in str(e.value)


def test_what_was_written_is_read(exported, folder):
    found = read_folder(folder)
    assert list(found.packages) == ["layers0", "layers1", "head0", "head1"]
    assert found.manifest.artifact_sha256 == exported.source_sha256 and found.manifest.cuts == (
        0,
        1,
        2,
    )
    for name, table in exported.source.tables.items():
        np.testing.assert_array_equal(found.tables[name], table)
    data = json.loads((folder / NAME).read_text())
    assert data["shards"][0]["inputs"]["mask"] == [[1, 1, 4, 36]] and data["functions"] == {
        "main": [4]
    }


# ---- Planted faults --------------------------------------------------------------------------------------------------
def test_a_corrupted_weight_file(folder):
    path = folder / "layers0.mlpackage" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.write_bytes(data)
    refused(
        folder,
        "layers0.mlpackage/.*weight.bin has hash .*, but the manifest was written for .*: damaged",
    )


@pytest.mark.parametrize("a, b", [("layers0", "layers1"), ("head0", "head1"), ("layers0", "head0")])
def test_swapped_shards(folder, a, b):
    for source, target in ((a, "x"), (b, a), ("x", b)):
        (folder / f"{source}.mlpackage").rename(folder / f"{target}.mlpackage")
    refused(
        folder,
        r"has hash .*, but the manifest was written for .*: damaged, or of another export; export it again",
    )
    changed(folder, sign=True)  # whoever signs them anew is told by what they take and give
    refused(folder, "a shard of another place")


def test_a_listing_that_names_another_model(folder):
    listing = folder / "layers0.mlpackage" / LISTING
    listing.write_text(
        listing.read_text()
        .replace("com.apple.CoreML\\/model.mlmodel", "elsewhere.mlmodel")
        .replace("com.apple.CoreML/model.mlmodel", "elsewhere.mlmodel")
    )
    refused(folder, "layers0.mlpackage/Manifest.json has hash")
    changed(folder, sign=True)
    refused(
        folder,
        "its Manifest.json names 'Data/elsewhere.mlmodel' as the model, not Data/com.apple.CoreML/model",
    )


@pytest.mark.parametrize(
    "what, value", [("shards", []), ("functions", {"main": [3]}), ("cache", {"slots": 31})]
)
def test_what_is_spelt_out_must_follow_from_the_numbers(folder, what, value):
    changed(folder, **{what: value})
    refused(folder, f"manifest.json is damaged .ValueError: {what} do not follow from its numbers")


def test_a_missing_shard_and_a_missing_host(folder):
    shutil.rmtree(folder / "layers1.mlpackage")
    refused(folder, "shard layers1.mlpackage is missing; export it again")


def test_a_host_file_that_is_gone_short_or_no_numbers(folder):
    data = (folder / HOST).read_bytes()
    (folder / HOST).write_bytes(data[:-4])
    changed(folder, sign=True)
    refused(folder, "host.bin has .* bytes, not")
    (folder / HOST).write_bytes(np.full(len(data) // 4, np.nan, "<f4").tobytes())
    changed(folder, sign=True)
    refused(folder, "host.bin holds no numbers")
    (folder / HOST).unlink()
    refused(folder, "host.bin is missing")


def test_a_stale_hash(folder):
    changed(folder, sha256=json.loads((folder / NAME).read_text())["sha256"] | {HOST: "0" * 64})
    refused(folder, "host.bin has hash .*, but the manifest was written for '000000000000'")


def test_a_shard_of_another_context_length(exported, folder):
    other = exported(**CHOICE, context=20)
    shutil.rmtree(folder / "layers1.mlpackage")
    shutil.copytree(other / "layers1.mlpackage", folder / "layers1.mlpackage")
    changed(folder, sign=True)
    refused(
        folder,
        r"layers1.mlpackage: mask is fp32 of \[1, 1, 4, 24\], but a context of 32 wants \[1, 1, 4, 36\]",
    )


@pytest.mark.parametrize(
    "parts, message",
    [
        (dict(precision="fp16"), "host.bin has .* bytes, not"),
        (dict(shapes="multifunction", sizes=(1, 4)), "has functions main, not t1, t4"),
        (dict(sizes=(3,)), r"x1 is fp32\[1, 32, 1, 4\]; wanted is fp32 of \[1, 32, 1, 3\]"),
        (
            dict(cuts=(0, 2)),
            "layers1.mlpackage/.* has hash nothing, but the manifest was written for",
        ),
        (
            dict(split=(0, 100, 384)),
            "logits0 is fp32.1, 192, 1, 4.; wanted is fp32 of .1, 100, 1, 4.",
        ),
        (
            dict(split=(0, 384)),
            "head1.mlpackage/.* has hash nothing, but the manifest was written for",
        ),
    ],
)
def test_a_manifest_of_another_export(folder, parts, message):
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **parts))
    refused(folder, message)


def test_a_mask_of_another_length_in_a_call(folder):
    chain = Chain(folder, interpreted())
    stream, given = chain.stream(), chain.given
    chain.given = lambda *args: {
        n: v[..., :-1] if n == "mask" else v for n, v in given(*args).items()
    }
    with pytest.raises(
        PackageError,
        match=r"input mask is float32 of .*4, 35\]; it must be fp32 of \[1, 1, 4, 36\]",
    ):
        chain(stream, [5])


# ---- Folders that somebody signed anew -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "file, message",
    [
        (HOST, "host.bin has 32212254720 bytes, not"),
        (f"layers0.mlpackage/{WEIGHTS}", "more than any export"),
        (f"head1.mlpackage/{LISTING}", "more than any export"),
    ],
)
def test_a_huge_file_is_refused_before_it_is_read(folder, file, message):
    with open(folder / file, "r+b") as f:
        f.truncate(30 << 30)  # of no blocks: it takes no room
    refused(folder, message)


def test_a_link_to_another_file_is_not_followed(folder, tmp_path):
    path = folder / "layers0.mlpackage" / WEIGHTS
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(folder, "has no Data/com.apple.CoreML/weights/weight.bin")


@pytest.mark.parametrize(
    "parts",
    [
        dict(slots=1 << 20, parted=(False,) * 40, head=64, width=256),
        dict(head=16),
        dict(vocab=1 << 20, width=1 << 18, head=1 << 16),
    ],
)
def test_numbers_that_would_fill_the_memory_are_refused(folder, parts):
    m = read_manifest(folder)
    dims = m.dims._replace(**parts)
    cuts, split = (0, dims.passes), (0, dims.vocab)
    write_manifest(folder, dataclasses.replace(m, dims=dims, cuts=cuts, split=split))
    refused(folder, "manifest.json is damaged .ValueError: (dims|heads|tables) out of range")


def test_names_cannot_speak_to_a_terminal(folder):
    changed(
        folder,
        sha256=json.loads((folder / NAME).read_text())["sha256"] | {"\x1b]0;owned\x07": "\x1b[31m"},
    )
    with pytest.raises(UserError) as e:
        read_folder(folder)
    assert "\x1b" not in str(e.value) and "owned" in str(e.value)


# ---- Manifests that nobody wrote -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is damaged"),
        ("[]", "is no manifest"),
        ('{"format": "other"}', "is no manifest"),
        ("[" * 9999, "is damaged"),
        ('{"format": "fairway-coreml", "version": 2}', "of version 2; this reader knows 1"),
        ('{"format": "fairway-coreml", "version": 1}', "is damaged .KeyError"),
    ],
)
def test_files_that_are_no_manifest(folder, text, message):
    (folder / NAME).write_text(text)
    refused(folder, message)


def test_a_folder_without_one_says_how_to_make_it(tmp_path):
    refused(tmp_path, "holds no manifest.json; make one with export_coreml.py")


odd = st.one_of(
    st.none(),
    st.integers(-9, 1 << 70),
    st.floats(),
    st.text(max_size=4),
    st.booleans(),
    st.lists(st.integers(-2, 5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers()),
)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_anywhere_is_refused_or_serves(exported, tmp_path, data):
    whole = json.loads((exported(**CHOICE) / NAME).read_text())
    at = whole
    key = data.draw(
        st.sampled_from([k for k in whole if k not in ("shards", "functions", "cache")])
    )
    while isinstance(at[key], dict) and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(list(at)))
    at[key] = data.draw(odd)
    (tmp_path / NAME).write_text(json.dumps(whole))
    try:
        manifest = read_manifest(tmp_path)
        manifest.interfaces(), manifest.functions(), manifest.function_for(1)
    except ManifestError as e:
        assert "\n" not in str(e)
