"""Layouts and codecs: the same codes come back, and damage does not."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.methods.coded import Coded
from fairway.methods.layouts import LAYOUTS, BaseThree, BitPlanes, SortedRows, by_similarity
from fairway.methods.parcel import PRELUDE, ParcelError, pack, stored_of, unpack
from fairway.methods.registry import METHODS
from fairway.methods.stored import Codes
from tests.models import trained

CODED = [name for name, method in METHODS.items() if isinstance(method, Coded)]


def codes_of(rows: int, columns: int, most: int, seed: int = 0) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-most, most + 1, (rows, columns), generator=generator)
    return Codes(codes.to(torch.int8), torch.rand(rows, 1, generator=generator).bfloat16().float())


@given(
    kind=st.sampled_from([*LAYOUTS.values()]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_codes_come_back_from_every_layout(kind, rows, columns, seed):
    codes = codes_of(rows, columns, 1 if kind is BaseThree else 127, seed)
    read = kind.from_arrays(kind(codes).arrays())
    assert torch.equal(read.codes.codes, codes.codes)
    assert torch.equal(read.weight(), codes.weight())


def test_layouts_are_as_small_as_they_say():
    trits = BaseThree(codes_of(4, 10, 1)).arrays()
    assert trits["packed"].size == 8 and trits["packed"].max() < 243
    planes = BitPlanes(codes_of(4, 16, 31)).arrays()
    assert [planes[f"bit{i}"].size for i in range(8)] == [8] * 8
    # Six bits of a code say something; the other two are the same in all.
    assert sum(len(np.unique(planes[f"bit{i}"])) == 1 for i in range(8)) == 2


def test_rows_that_are_alike_come_to_lie_together():
    kinds = np.array([[9, 9, 9, 9], [0, 0, 0, 0], [-9, 9, -9, 9]], np.int8)
    order = by_similarity(kinds[[0, 1, 2, 0, 1, 2, 0]])
    assert sorted(order) == [*range(7)]
    found = [[0, 1, 2, 0, 1, 2, 0][i] for i in order]
    assert sum(a != b for a, b in zip(found, found[1:], strict=False)) == 2


def test_arrays_that_no_layout_writes_are_refused():
    trits, rows = BaseThree(codes_of(2, 5, 1)).arrays(), SortedRows(codes_of(3, 5, 9)).arrays()
    with pytest.raises(ValueError, match="243"):
        BaseThree.from_arrays(trits | {"packed": np.full((1, 2), 243, np.uint8)})
    with pytest.raises(ValueError, match="permutation"):
        SortedRows.from_arrays(rows | {"order": np.array([0, 0, 2], "<u2")})


@pytest.mark.parametrize("name", CODED)
def test_every_coded_row_is_the_same_model(name):
    method, model = METHODS[name], trained(num_layers=1).eval()
    base = METHODS[method.base].apply(model, None)
    made = method.apply(model, None)
    read = unpack(method.packed(made))
    for ours, theirs in zip(read.parameters(), base.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    figures = method.figures(made)
    matrices = [s.codes.flatten() for s in stored_of(base).values() if isinstance(s, Codes)]
    zeros = (torch.cat(matrices) == 0).double().mean().item()
    assert figures["zero_fraction"] == pytest.approx(zeros, rel=1e-5)
    assert 0 < figures["bound_bytes"] < method.bytes(made)


@given(seed=st.integers(0, 999))
def test_a_damaged_lzma_file_is_refused(seed):
    rng, blob = np.random.default_rng(seed), LZMA_BLOB
    cut = blob[: int(rng.integers(len(blob) - 200, len(blob)))]
    for damaged in (cut, blob + bytes(rng.integers(1, 9))):
        for file in (bytes(damaged), resealed(bytes(damaged))):
            with pytest.raises(ParcelError):
                unpack(file)


def resealed(blob: bytes) -> bytes:
    """Return a file with a checksum that fits its bytes."""
    magic, size, _ = PRELUDE.unpack_from(blob)
    body = blob[PRELUDE.size :]
    return PRELUDE.pack(magic, size, hashlib.sha256(body).digest()) + body


LZMA_BLOB = pack(METHODS["int6-lzma"].apply(trained(num_layers=1), None), ["lzma"])
