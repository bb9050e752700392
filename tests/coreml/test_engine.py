"""Shards as an engine: slots that come round, tokens taken back, and the text that PyTorch would write.

Most of this runs the graph in PyTorch behind the engine; the last part runs saved packages."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, trained

from fairway.compression.loading import load
from fairway.coreml import graph, layout
from fairway.coreml.engine import REWIND, Chain, Shards, interpreted, load_chain
from fairway.coreml.graph import host_tables
from fairway.coreml.manifest import HOST, Folder, Manifest, hashes_of, read_manifest, write_manifest
from fairway.decoding.beam import beam_search
from fairway.decoding.drafters import NGramDrafter, SuffixDrafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.speculative import Speculation
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory
from train_gpt import UserError

pytestmark = pytest.mark.apple
GREEDY = Strategy("greedy")
MODELS = {name: trained(looping=True, **FEATURES[name]).eval() for name in ("plain", "all")}
TOKENS = np.random.default_rng(0).integers(2, 97, 400).tolist()


def in_torch(model):
    """A runner: each shard's graph, as it is before it is converted."""

    def load(folder: Folder, shard: str, function: str):
        m = folder.manifest
        module = graph.shards(model, m.dims, list(m.cuts), list(m.split))[shard]

        @torch.no_grad()
        def call(given):
            made = module(*(torch.from_numpy(given[n]) for n in module.interface.inputs))
            made = made if isinstance(made, tuple) else (made,)
            return {n: v.numpy() for n, v in zip(module.interface.outputs, made, strict=True)}

        return call

    return load


def chain_of(name: str, slots: int = 16, shapes: str = "enumerated", tokens: int = 4) -> Chain:
    model = MODELS[name]
    d, tables = graph.dims_of(model, slots), host_tables(model)
    manifest = Manifest(
        "a" * 64,
        "b" * 64,
        d,
        1e4,
        "fp32",
        "none",
        shapes,
        tuple(layout.sizes(shapes, tokens)),
        (0, 1, d.passes),
        (0, 50, 97),
        {n: t.shape for n, t in tables.items()},
        {},
    )
    return Chain(Folder(Path("nowhere"), manifest, {}, tables), in_torch(model))


CHAINS = {name: chain_of(name) for name in MODELS}


@torch.no_grad()
def wanted(name: str, tokens: list[int], window: int = 16) -> np.ndarray:
    memory = Memory(MODELS[name], window)
    return torch.cat([memory.logits(torch.tensor([[t]]))[0] for t in tokens]).numpy()


# ---- Slots -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slots", [3, 16])
def test_slots_that_come_round_are_a_window(name, slots):
    chain, out, at = chain_of(name, slots), [], 0
    stream = chain.stream()
    for step in [1, 4, 2, 3, 4] * 6:
        out.append(chain(stream, TOKENS[at : at + step]))
        at += step
    assert np.abs(np.concatenate(out) - wanted(name, TOKENS[:at], slots)).max() < 2e-5


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=14),
    st.integers(0, 30),
)
def test_taking_back_and_going_on_is_never_having_read_it(steps, before):
    """Wrong tokens are read and taken back, as far as before the last calls; what is then said is the same."""
    chain = CHAINS["plain"]
    stream, straight, text = chain.stream(), chain.stream(), []
    for at in range(0, before, 4):
        piece = TOKENS[at : min(at + 4, before)]
        chain(stream, piece), chain(straight, piece)
        text += piece
    for step, back in steps:
        piece = TOKENS[50 + len(text) : 50 + len(text) + step]
        chain(stream, piece)
        for _ in range(back):
            chain(stream, [3])
        stream.crop(stream.read - back)
        chain(straight, piece)
    assert stream.read == straight.read
    found, right = chain(stream, [5, 6]), chain(straight, [5, 6])
    assert np.abs(found - right).max() < 1e-5
    assert np.array_equal(np.sort(stream.positions), np.sort(straight.positions))


def test_everything_can_be_taken_back_until_slots_are_overwritten_and_then_so_many():
    chain = CHAINS["plain"]
    stream = chain.stream()
    for t in TOKENS[:15]:
        chain(stream, [t])
    stream.crop(0)
    assert stream.read == 0 and (stream.positions == -1).all()
    for t in TOKENS[:200]:
        chain(stream, [t])
    with pytest.raises(ValueError, match="200 tokens were read; they cannot be cropped to 100"):
        stream.crop(100)
    with pytest.raises(ValueError, match="cropped to 201"):
        stream.crop(201)
    stream.crop(200 - REWIND)
    assert np.abs(chain(stream, TOKENS[136:138]) - wanted("plain", TOKENS[:138])[-2:]).max() < 2e-5


@pytest.mark.parametrize("back", [63, 64, 70, 71, 72, 73, 99, 100])
def test_as_long_as_nothing_was_overwritten_anything_can_be_taken_back(back):
    chain = chain_of("all", slots=128)
    stream = chain.stream()
    for at in range(0, 100, 4):
        chain(stream, TOKENS[at : at + 4])
    stream.crop(100 - back)
    text = [*TOKENS[: 100 - back], 7, 8]
    assert np.abs(chain(stream, [7, 8]) - wanted("all", text, 128)[-2:]).max() < 2e-5


def test_a_copy_goes_its_own_way():
    chain = CHAINS["all"]
    stream = chain.stream()
    chain(stream, TOKENS[:3])
    other = stream.copy()
    chain(other, [9, 9, 9]), other.crop(3), chain(other, [7])
    assert np.array_equal(chain(stream, [5]), chain_after(chain, TOKENS[:3], [5]))


def chain_after(chain: Chain, before: list[int], piece: list[int]) -> np.ndarray:
    stream = chain.stream()
    chain(stream, before)
    return chain(stream, piece)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "a call of 0 tokens; these shards take 1 to 4"),
        ([1] * 5, "a call of 5 tokens"),
        ([97], "outside the 97"),
        ([-1], "outside the 97"),
    ],
)
def test_calls_that_no_shard_takes_are_refused(tokens, message):
    chain = CHAINS["plain"]
    with pytest.raises(UserError, match=message):
        chain(chain.stream(), tokens)


def test_steps_are_filled_up_to_the_next_size():
    called, chain = [], chain_of("plain")
    runner = chain.runner

    def watched(folder, shard, function):
        call = runner(folder, shard, function)

        def told(given):
            called.append((shard, next(iter(given.values())).shape[-1]))
            return call(given)

        return told

    chain.runner = watched
    stream = chain.stream()
    for count in (1, 2, 3, 4):
        chain(stream, TOKENS[:count])
    assert [size for shard, size in called if shard == "layers0"] == [1, 2, 4, 4]
    assert chain.used.calls == 4 and chain.used.tokens == 10


# ---- Decoding --------------------------------------------------------------------------------------------------------
def reader(chain: Chain) -> Reader:
    return Reader(Shards(chain), most=chain.most)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("draft", [None, NGramDrafter, SuffixDrafter])
def test_greedy_text_is_that_of_pytorch(name, draft):
    prompt, count = [1, *TOKENS[:20]], 60  # further than the window
    theirs, ours, rng = (
        Reader(Memory(MODELS[name], 16)),
        reader(chain_of(name)),
        np.random.default_rng(0),
    )
    theirs.last(prompt[:-1])
    right = [
        step.token
        for step, _ in zip(decode_plainly(theirs, prompt, GREEDY, rng), range(count), strict=False)
    ]
    ours.last(prompt[:-1])
    steps = (
        Speculation(ours, prompt, GREEDY, rng, draft(), 8)
        if draft
        else decode_plainly(ours, prompt, GREEDY, rng)
    )
    assert [step.token for step, _ in zip(steps, range(count), strict=False)] == right
    if draft:
        assert steps.stats.accepted > 5 and steps.most == 3, (
            "verified with the token before them, in one call"
        )


def test_beams_are_those_of_pytorch():
    prompt = [1, *TOKENS[:6]]
    found = []
    for one in (Reader(Memory(MODELS["all"], 16)), reader(chain_of("all"))):
        one.last(prompt[:-1])
        found.append([f.tokens for f in beam_search(one, prompt, 4, 8, best=3)])
    assert found[0] == found[1]


# ---- Saved packages --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "choice",
    [
        dict(shapes="range", precision="fp32"),
        dict(shapes="fixed", precision="fp32"),
        dict(shapes="multifunction", precision="fp32"),
    ],
)
def test_packages_write_the_text_of_pytorch(exported, choice):
    model = exported.source.model
    prompt, texts = [1, *(t % model.cfg.vocab_size for t in TOKENS[:9])], []
    chain = load_chain(
        exported(**choice), exported.source.path, load(exported.source.path), interpreted()
    )
    for one in (Reader(Memory(model)), reader(chain)):
        one.last(prompt[:-1])
        steps = Speculation(one, prompt, GREEDY, np.random.default_rng(0), NGramDrafter(), 3)
        texts.append([step.token for step, _ in zip(steps, range(50), strict=False)])
    assert texts[0] == texts[1] and chain.used.calls < 50 + len(prompt)


def test_shards_of_another_artifact_are_refused(exported, tmp_path):
    path, folder = exported.source.path, exported(shapes="fixed", precision="fp32")
    (tmp_path / "other").write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        UserError, match="was exported from artifact '.*', not from .*; export it again"
    ):
        load_chain(folder, tmp_path / "other", load(path))


@pytest.mark.parametrize("parts", [dict(rope_base=2e4), dict(tokenizer_sha256="0" * 64)])
def test_a_manifest_that_claims_the_artifact_but_has_other_numbers_is_refused(
    exported, tmp_path, parts
):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    write_manifest(tmp_path / "s", dataclasses.replace(read_manifest(tmp_path / "s"), **parts))
    with pytest.raises(
        UserError,
        match="says that it was exported from this artifact, but its numbers are of another",
    ):
        load_chain(tmp_path / "s", exported.source.path, load(exported.source.path))


def test_embeddings_of_another_model_are_refused(exported, tmp_path):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    data = bytearray((tmp_path / "s" / HOST).read_bytes())
    data[2] ^= 1
    (tmp_path / "s" / HOST).write_bytes(data)
    m = read_manifest(tmp_path / "s")
    write_manifest(
        tmp_path / "s",
        dataclasses.replace(m, sha256=hashes_of(tmp_path / "s", list(m.interfaces()))),
    )
    with pytest.raises(UserError, match="its numbers are of another one"):
        load_chain(tmp_path / "s", exported.source.path, load(exported.source.path))
