"""The file of a compressed model: round trips, damage, and what it may not cost."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairway.methods import parcel
from fairway.methods.integers import absmax_steps, rounded_matrix
from fairway.methods.parcel import (
    PRELUDE,
    ParcelError,
    fits_nibble,
    from_plane,
    pack,
    plane_shape,
    stored_of,
    to_plane,
    unpack,
    with_stored,
)
from fairway.methods.stored import Codes, Floats, Lookup, Repaired, spread
from tests.models import ALL_ON, SMALL
from train_gpt import CODECS, GPT, Config, UserError, initialise


def model_of(**changes) -> GPT:
    cfg = Config(**SMALL | changes)
    model = GPT(cfg)
    initialise(model, cfg)
    return model.eval()


def codes(rows: int, columns: int, most: int = 7) -> Codes:
    values = torch.randint(-most, most + 1, (rows, columns), dtype=torch.int8)
    return Codes(values, torch.rand(rows, 2).bfloat16().float())


@given(
    dtype=st.sampled_from(parcel.TYPES),
    shape=st.lists(st.integers(0, 7), min_size=0, max_size=3),
    seed=st.integers(0, 99),
)
def test_every_array_comes_back_from_its_plane(dtype, shape, seed):
    raw = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * 4, dtype=np.uint8)
    array = raw.view(dtype)[: int(np.prod(shape))].reshape(shape)
    for nibbles in (False, True) if fits_nibble(array) else (False,):
        plane = to_plane(array, nibbles)
        assert plane.dtype == np.uint8 and plane.shape == plane_shape(dtype, shape, nibbles)
        assert from_plane(plane, dtype, shape, nibbles).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype, low, high", [("int8", -8, 7), ("uint8", 0, 15)])
def test_codes_of_four_bits_go_two_a_byte(dtype, low, high):
    array = np.arange(low, high + 1).astype(dtype).reshape(1, -1)
    plane = to_plane(array, True)
    assert plane.size == 8 and np.array_equal(from_plane(plane, dtype, [1, 16], True), array)
    assert not fits_nibble(array + 1) and not fits_nibble(array.astype("f4"))


def test_a_model_comes_back_to_the_bit_with_every_kind_of_tensor():
    model = model_of(**ALL_ON)
    names = [n for n, p in model.named_parameters() if n.endswith("attn.q.weight")]
    rows, columns = dict(model.named_parameters())[names[0]].shape
    tables = torch.randn(4, 16).half()
    indices = torch.randint(0, 16, (rows, columns), dtype=torch.uint8)
    kinds = [
        codes(rows, columns),
        Codes(
            codes(rows, columns).codes, torch.rand(rows, 1).bfloat16().float(), torch.ones(rows, 1)
        ),
        Codes(codes(rows, columns).codes, torch.ones(rows, 3), scales=torch.ones(columns) / 2),
        Lookup(indices, tables),
        Lookup(indices, tables[:1], torch.rand(rows, 2).bfloat16().float()),
        Repaired(codes(rows, columns), codes(rows, 3), codes(3, columns)),
        Floats(torch.randn(rows, columns).bfloat16()),
    ]
    assert len(kinds) == len(names)
    changed = with_stored(model, dict(zip(names, kinds, strict=True)))
    read = unpack(pack(changed, ["ans"]))
    tokens = torch.randint(0, 97, (2, 16))
    assert torch.equal(read.logits(tokens), changed.logits(tokens))
    for name, p in changed.named_parameters():
        assert torch.equal(dict(read.named_parameters())[name], p), name
    assert read.cfg == changed.cfg and read.looping == changed.looping
    assert pack(read, ["ans"]) == pack(changed, ["ans"])
    # The input of a method stays as it was.
    assert not torch.equal(dict(model.named_parameters())[names[0]], kinds[0].weight())


def test_the_smallest_of_all_codecs_is_taken():
    changed = with_stored(model_of(), {"tok_emb.weight": codes(97, 32)})
    sizes = [len(pack(changed, [c], [n])) for c in CODECS for n in (False, True)]
    assert len(pack(changed)) == min(size for size in sizes if size) < max(sizes)


def test_a_model_that_no_method_made_has_nothing_to_pack():
    with pytest.raises(UserError, match="not made by a method"):
        stored_of(model_of())


@given(seed=st.integers(0, 2**20))
def test_damage_is_an_error_and_never_another_model(seed):
    rng, blob = np.random.default_rng(seed), bytearray(DAMAGED_BLOB)
    kind = rng.integers(3)
    if kind == 0:
        blob = blob[: rng.integers(len(blob))]
    elif kind == 1:
        blob[rng.integers(len(blob))] ^= 1 << rng.integers(8)
    else:
        blob += bytes(rng.integers(1, 9))
    with pytest.raises(ParcelError):
        unpack(bytes(blob))


DAMAGED_BLOB = pack(with_stored(model_of(), {}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda h: h["tensors"].pop("tok_emb.weight"), "damaged|missing|symbols"),
        (lambda h: h.update(codec="lzma"), "damaged"),
        (
            lambda h: h["tensors"]["tok_emb.weight"][1][0].__setitem__(2, [1 << 20, 1 << 20]),
            "shape",
        ),
        (lambda h: h["tensors"]["tok_emb.weight"][1][0].__setitem__(1, "object"), "type"),
        (lambda h: h["tensors"]["tok_emb.weight"].__setitem__(0, "pickle"), "damaged"),
        (lambda h: h["model"].update(num_layers=2), "no part of this model"),
        (lambda h: h["model"].update(num_layers=10**9), "NUM_LAYERS"),
    ],
)
def test_a_header_that_lies_is_refused_with_a_right_checksum(change, message):
    import hashlib

    import brotli

    magic, size, _ = PRELUDE.unpack_from(DAMAGED_BLOB)
    body = DAMAGED_BLOB[PRELUDE.size :]
    header = json.loads(brotli.decompress(body[:size]))
    change(header)
    packed = brotli.compress(json.dumps(header).encode())
    body = packed + body[size:]
    prelude = struct.pack("<8sI32s", magic, len(packed), hashlib.sha256(body).digest())
    with pytest.raises(UserError, match=message):
        unpack(prelude + body)


# ---- Rounding ------------------------------------------------------------------------------------
def test_spread_repeats_a_group_and_cuts_the_last():
    assert spread(torch.tensor([[1.0, 2.0]]), 5).tolist() == [[1, 1, 1, 2, 2]]
    assert spread(torch.tensor([[1.0]]), 3).tolist() == [[1, 1, 1]]


@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 3, 7, 8, 10, 64]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    columns=st.integers(1, 24),  # of which few are a multiple of the group
)
def test_absolute_maximum_steps_clip_nothing(seed, bits, group, scale, columns):
    weight = scale * torch.randn(5, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    stored = rounded_matrix(weight, bits, group, 0.0)
    steps = spread(stored.steps, columns)
    assert ((stored.weight() - weight).abs() <= 0.5001 * steps).all()
    assert torch.equal(absmax_steps(weight, bits).bfloat16().float(), absmax_steps(weight, bits))


def test_smaller_groups_err_less():
    weight = torch.randn(16, 256) * torch.rand(256).exp()
    errors = [(rounded_matrix(weight, 4, g, 0.0).weight() - weight).norm() for g in (0, 128, 32)]
    assert errors[0] > errors[1] > errors[2]
