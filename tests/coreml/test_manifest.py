"""A folder of shards is refused unless every file, shape and place follows from its numbers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairway.coreml.engine import ShardChain, interpreter_runner
from fairway.coreml.manifest import (
    HOST_FILE,
    MANIFEST_FILE,
    ManifestError,
    folder_hashes,
    read_manifest,
    read_shard_folder,
    write_manifest,
)
from fairway.coreml.mlpackage import LISTING, WEIGHTS, PackageError
from train_gpt import UserError

pytestmark = pytest.mark.apple
CHOICE = dict(shapes="fixed", precision="fp32", layers_per_shard=1, vocab_shards=2)


@pytest.fixture
def folder(exported, tmp_path):
    """Return a copy of four shards, which a test may damage: layers0, layers1, head0, head1."""
    shutil.copytree(exported(**CHOICE), tmp_path / "s")
    return tmp_path / "s"


def change_manifest(folder, sign: bool = False, **parts) -> None:
    """Change parts of the manifest; with `sign`, also set the hashes of the files as they are."""
    data = json.loads((folder / MANIFEST_FILE).read_text()) | parts
    if sign:
        data["sha256"] = folder_hashes(folder, [shard["name"] for shard in data["shards"]])
    (folder / MANIFEST_FILE).write_text(json.dumps(data))


def refused(folder, message: str) -> None:
    """Require that reading the folder ends in one line that matches `message`."""
    with pytest.raises(UserError, match=message) as e:
        read_shard_folder(folder)
    assert "\n" not in str(e.value)


def test_a_written_folder_is_read_back(exported, folder):
    found = read_shard_folder(folder)
    assert list(found.packages) == ["layers0", "layers1", "head0", "head1"]
    assert found.manifest.artifact_sha256 == exported.source_sha256 and found.manifest.cuts == (
        0,
        1,
        2,
    )
    for name, table in exported.source.tables.items():
        np.testing.assert_array_equal(found.tables[name], table)
    data = json.loads((folder / MANIFEST_FILE).read_text())
    assert data["shards"][0]["inputs"]["mask"] == [[1, 1, 4, 36]] and data["functions"] == {
        "main": [4]
    }


# ---- Planted faults ------------------------------------------------------------------------------
def test_a_corrupted_weight_file_is_refused(folder):
    path = folder / "layers0.mlpackage" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-100:] = bytes(100)
    path.write_bytes(data)
    refused(
        folder,
        "layers0.mlpackage/.*weight.bin has hash .*, but the manifest was written for .*: damaged",
    )


@pytest.mark.parametrize("a, b", [("layers0", "layers1"), ("head0", "head1"), ("layers0", "head0")])
def test_swapped_shards_are_refused(folder, a, b):
    for source, target in ((a, "x"), (b, a), ("x", b)):
        (folder / f"{source}.mlpackage").rename(folder / f"{target}.mlpackage")
    refused(
        folder,
        r"has hash .*, but the manifest was written for .*: damaged, or from another export; "
        "export the folder again",
    )
    change_manifest(folder, sign=True)  # with new hashes, inputs and outputs give them away
    refused(folder, "a shard from another place in the chain")


def test_a_listing_that_names_another_model_is_refused(folder):
    listing = folder / "layers0.mlpackage" / LISTING
    listing.write_text(
        listing.read_text()
        .replace("com.apple.CoreML\\/model.mlmodel", "elsewhere.mlmodel")
        .replace("com.apple.CoreML/model.mlmodel", "elsewhere.mlmodel")
    )
    refused(folder, "layers0.mlpackage/Manifest.json has hash")
    change_manifest(folder, sign=True)
    refused(
        folder,
        "its Manifest.json names 'Data/elsewhere.mlmodel' as the model, not Data/com.apple.CoreML/",
    )


@pytest.mark.parametrize(
    "name, value", [("shards", []), ("functions", {"main": [3]}), ("cache", {"slots": 31})]
)
def test_derived_fields_must_follow_from_the_numbers(folder, name, value):
    change_manifest(folder, **{name: value})
    refused(folder, f"manifest.json is damaged .ValueError: {name} do not follow from its numbers")


def test_a_missing_shard_is_refused(folder):
    shutil.rmtree(folder / "layers1.mlpackage")
    refused(folder, "shard layers1.mlpackage is missing; export the folder again")


def test_a_missing_short_or_nan_host_file_is_refused(folder):
    data = (folder / HOST_FILE).read_bytes()
    (folder / HOST_FILE).write_bytes(data[:-4])
    change_manifest(folder, sign=True)
    refused(folder, "host.bin has .* bytes, not")
    (folder / HOST_FILE).write_bytes(np.full(len(data) // 4, np.nan, "<f4").tobytes())
    change_manifest(folder, sign=True)
    refused(folder, "host.bin holds infinities or NaN")
    (folder / HOST_FILE).unlink()
    refused(folder, "host.bin is missing")


def test_a_stale_hash_is_refused(folder):
    change_manifest(
        folder,
        sha256=json.loads((folder / MANIFEST_FILE).read_text())["sha256"] | {HOST_FILE: "0" * 64},
    )
    refused(folder, "host.bin has hash .*, but the manifest was written for '000000000000'")


def test_a_shard_of_another_context_length_is_refused(exported, folder):
    other = exported(**CHOICE | dict(vocab_shards=1, context=20))
    shutil.rmtree(folder / "layers1.mlpackage")
    shutil.copytree(other / "layers1.mlpackage", folder / "layers1.mlpackage")
    change_manifest(folder, sign=True)
    refused(
        folder,
        r"layers1.mlpackage: mask is fp32 of \[1, 1, 4, 24\], but a context of 32 wants "
        r"\[1, 1, 4, 36\]",
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
def test_a_manifest_of_another_export_is_refused(folder, parts, message):
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **parts))
    refused(folder, message)


def test_a_call_with_a_mask_of_another_length_is_refused(folder):
    chain = ShardChain(folder, interpreter_runner())
    cache, inputs = chain.new_cache(), chain.inputs
    chain.inputs = lambda *args: {
        n: v[..., :-1] if n == "mask" else v for n, v in inputs(*args).items()
    }
    with pytest.raises(
        PackageError,
        match=r"input mask is float32 of .*4, 35\]; it must be fp32 of \[1, 1, 4, 36\]",
    ):
        chain(cache, [5])


# ---- Hostile folders with new hashes ------------------------------------------------------------
@pytest.mark.parametrize(
    "file, message",
    [
        (HOST_FILE, "host.bin has 32212254720 bytes, not"),
        (f"layers0.mlpackage/{WEIGHTS}", "more than any export"),
        (f"head1.mlpackage/{LISTING}", "more than any export"),
    ],
)
def test_a_huge_file_is_refused_before_it_is_read(folder, file, message):
    with (folder / file).open("r+b") as f:
        f.truncate(30 << 30)  # a sparse file, which takes no room on disk
    refused(folder, message)


def test_a_symbolic_link_is_not_followed(folder, tmp_path):
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


def test_control_characters_do_not_reach_the_terminal(folder):
    change_manifest(
        folder,
        sha256=json.loads((folder / MANIFEST_FILE).read_text())["sha256"]
        | {"\x1b]0;owned\x07": "\x1b[31m"},
    )
    with pytest.raises(UserError) as e:
        read_shard_folder(folder)
    assert "\x1b" not in str(e.value) and "owned" in str(e.value)


# ---- Files that are no manifest ------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is damaged"),
        ("[]", "is no manifest"),
        ('{"format": "other"}', "is no manifest"),
        ("[" * 9999, "is damaged"),
        ('{"format": "fairway-coreml", "version": 1}', "has version 1; this reader knows 2"),
        ('{"format": "fairway-coreml", "version": 2}', "is damaged .KeyError"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(folder, text, message):
    (folder / MANIFEST_FILE).write_text(text)
    refused(folder, message)


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path):
    refused(tmp_path, "holds no manifest.json; make one with fairway export-coreml")


any_value = st.one_of(
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
def test_any_value_in_any_field_is_refused_or_works(exported, tmp_path, data):
    manifest_data = json.loads((exported(**CHOICE) / MANIFEST_FILE).read_text())
    at = manifest_data
    key = data.draw(
        st.sampled_from([k for k in manifest_data if k not in ("shards", "functions", "cache")])
    )
    while isinstance(at[key], dict) and data.draw(st.booleans()):
        at = at[key]
        key = data.draw(st.sampled_from(list(at)))
    at[key] = data.draw(any_value)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(manifest_data))
    try:
        manifest = read_manifest(tmp_path)
        manifest.interfaces(), manifest.functions(), manifest.function_for(1)
    except ManifestError as e:
        assert "\n" not in str(e)
