"""Shards as an engine: slots are reused, tokens can be cropped, and the text is that of PyTorch.

Most tests run the graph in PyTorch behind the engine; the last part runs saved packages.
"""

import dataclasses
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, trained

from fairway.compression.loading import load
from fairway.coreml import graph, layout
from fairway.coreml.engine import REWIND, ShardChain, ShardEngine, interpreter_runner, load_chain
from fairway.coreml.graph import host_tables
from fairway.coreml.layout import SPARE, STATES
from fairway.coreml.manifest import (
    HOST_FILE,
    Manifest,
    ShardFolder,
    folder_hashes,
    read_manifest,
    write_manifest,
)
from fairway.decoding.beam import beam_search
from fairway.decoding.drafters import NGramDrafter, SuffixDrafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.speculative import Speculation
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory
from train_gpt import UserError

pytestmark = pytest.mark.apple
GREEDY = Strategy("greedy")
MODELS = ("plain", "all")
TOKENS = np.random.default_rng(0).integers(2, 97, 400).tolist()


@cache
def model_named(name: str):
    return trained(looping=True, **FEATURES[name]).eval()


def torch_runner(model):
    """Return a runner that computes each shard's graph in PyTorch, before any conversion."""

    def load(folder: ShardFolder, shard: str, function: str):
        m = folder.manifest
        module = graph.build_shards(model, m.dims, list(m.cuts), list(m.split), states=m.states)[
            shard
        ]
        return TorchFunction(module)

    return load


class TorchFunction:
    """The graph of a shard as a loaded function."""

    def __init__(self, module):
        self.module, self.interface = module, module.interface

    def new_state(self):
        return {n: torch.zeros(shape) for n, shape in self.interface.states.items()}

    @torch.no_grad()
    def __call__(self, inputs, state=None):
        for name in self.interface.states:
            getattr(self.module, name).copy_(state[name])
        outputs = self.module(*(torch.from_numpy(inputs[n]) for n in self.interface.inputs))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for name in self.interface.states:
            state[name] = getattr(self.module, name).clone()
        return {n: v.numpy() for n, v in zip(self.interface.outputs, outputs, strict=True)}


def chain_of(
    name: str, slots: int = 16, shapes: str = "enumerated", tokens: int = 4, states: int = 0
) -> ShardChain:
    """Return a chain of two shards of layers and two heads, of a small model."""
    model = model_named(name)
    d, tables = graph.model_dims(model, slots), host_tables(model)
    manifest = Manifest(
        "a" * 64,
        "b" * 64,
        d,
        1e4,
        "fp32",
        "none",
        shapes,
        states,
        tuple(layout.call_sizes(shapes, tokens)),
        (0, 1, d.passes),
        (0, 50, 97),
        {n: t.shape for n, t in tables.items()},
        {},
    )
    return ShardChain(ShardFolder(Path("nowhere"), manifest, {}, tables), torch_runner(model))


@cache
def shared_chain(name: str, slots: int = 16, states: int = 0) -> ShardChain:
    """Return a chain for all tests that neither change its runner nor read its counts."""
    return chain_of(name, slots, states=states)


@torch.no_grad()
def torch_logits(name: str, tokens: list[int], window: int = 16) -> np.ndarray:
    """Return the logits of PyTorch, read token by token, float32[n, V]."""
    memory = Memory(model_named(name), window)
    return torch.cat([memory.logits(torch.tensor([[t]]))[0] for t in tokens]).numpy()


# ---- Slots ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("slots", [3, 16])
@pytest.mark.parametrize("states", STATES)
def test_reused_slots_are_a_sliding_window(name, slots, states):
    chain, out, at = shared_chain(name, slots, states), [], 0
    text_cache = chain.new_cache()
    for step in [1, 4, 2, 3, 4] * 6:  # 84 tokens: the places of a state are used again, too
        out.append(chain(text_cache, TOKENS[at : at + step]))
        at += step
    assert np.abs(np.concatenate(out) - torch_logits(name, TOKENS[:at], slots)).max() < 2e-5


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=14),
    st.integers(0, 90),
    st.sampled_from(STATES),
)
def test_cropped_tokens_leave_no_trace(steps, before, states):
    """Wrong tokens are read and cropped, across several calls; later logits do not change."""
    chain = shared_chain("plain", states=states)
    text_cache, straight, text = chain.new_cache(), chain.new_cache(), []
    for at in range(0, before, 4):
        piece = TOKENS[at : min(at + 4, before)]
        chain(text_cache, piece), chain(straight, piece)
        text += piece
    for step, back in steps:
        piece = TOKENS[150 + len(text) : 150 + len(text) + step]
        chain(text_cache, piece)
        for _ in range(back):
            chain(text_cache, [3])
        text_cache.crop(text_cache.read - back)
        chain(straight, piece)
    assert text_cache.read == straight.read
    found, right = chain(text_cache, [5, 6]), chain(straight, [5, 6])
    assert np.abs(found - right).max() < 1e-5
    seen = [
        np.sort(cache.positions[cache.positions > cache.read - 16])
        for cache in (text_cache, straight)
    ]
    assert np.array_equal(*seen)


@pytest.mark.parametrize("states", STATES)
def test_after_slots_are_overwritten_only_the_last_tokens_can_be_cropped(states):
    chain = shared_chain("plain", states=states)
    text_cache = chain.new_cache()
    for t in TOKENS[:15]:
        chain(text_cache, [t])
    text_cache.crop(0)
    assert text_cache.read == 0 and (text_cache.positions == -1).all()
    for t in TOKENS[:200]:
        chain(text_cache, [t])
    with pytest.raises(ValueError, match="200 tokens were read; they cannot be cropped to 100"):
        text_cache.crop(100)
    with pytest.raises(ValueError, match="cropped to 201"):
        text_cache.crop(201)
    text_cache.crop(200 - REWIND)
    assert (
        np.abs(chain(text_cache, TOKENS[136:138]) - torch_logits("plain", TOKENS[:138])[-2:]).max()
        < 2e-5
    )


@pytest.mark.parametrize("back", [63, 64, 70, 71, 72, 73, 99, 100])
def test_until_a_slot_is_overwritten_any_token_can_be_cropped(back):
    chain = shared_chain("all", 128)
    text_cache = chain.new_cache()
    for at in range(0, 100, 4):
        chain(text_cache, TOKENS[at : at + 4])
    text_cache.crop(100 - back)
    text = [*TOKENS[: 100 - back], 7, 8]
    assert np.abs(chain(text_cache, [7, 8]) - torch_logits("all", text, 128)[-2:]).max() < 2e-5


def test_spare_places_are_as_many_as_tokens_can_be_cropped():
    assert SPARE == REWIND


@pytest.mark.parametrize("states", STATES)
def test_a_copy_is_independent(states):
    chain = shared_chain("all", states=states)
    text_cache = chain.new_cache()
    chain(text_cache, TOKENS[:3])
    other = text_cache.copy()
    chain(other, [9, 9, 9]), other.crop(3), chain(other, [7])
    assert np.array_equal(chain(text_cache, [5]), logits_after(chain, TOKENS[:3], [5]))


def logits_after(chain: ShardChain, before: list[int], piece: list[int]) -> np.ndarray:
    """Return the logits of `piece` after a fresh cache has read `before`."""
    cache = chain.new_cache()
    chain(cache, before)
    return chain(cache, piece)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "a call of 0 tokens; these shards take 1 to 4 tokens"),
        ([1] * 5, "a call of 5 tokens"),
        ([97], "outside the vocabulary of 97"),
        ([-1], "outside the vocabulary of 97"),
    ],
)
def test_calls_of_wrong_lengths_or_tokens_are_refused(tokens, message):
    chain = shared_chain("plain")
    with pytest.raises(UserError, match=message):
        chain(chain.new_cache(), tokens)


def test_calls_are_padded_to_the_next_size():
    called, chain = [], chain_of("plain")
    runner = chain.runner

    def watched(folder, shard, function):
        call = runner(folder, shard, function)

        def counted(inputs):
            called.append((shard, next(iter(inputs.values())).shape[-1]))
            return call(inputs)

        return counted

    chain.runner = watched
    text_cache = chain.new_cache()
    for count in (1, 2, 3, 4):
        chain(text_cache, TOKENS[:count])
    assert [size for shard, size in called if shard == "layers0"] == [1, 2, 4, 4]
    assert chain.counts.calls == 4 and chain.counts.tokens == 10


# ---- Decoding ------------------------------------------------------------------------------------
def reader(chain: ShardChain) -> Reader:
    """Return a reader of a new engine."""
    return Reader(ShardEngine(chain), most=chain.most)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("draft", [None, NGramDrafter, SuffixDrafter])
def test_greedy_text_equals_that_of_pytorch(name, draft):
    prompt, count = [1, *TOKENS[:20]], 60  # more tokens than the window holds
    theirs, ours, rng = (
        Reader(Memory(model_named(name), 16)),
        reader(shared_chain(name)),
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


def test_beams_equal_those_of_pytorch():
    prompt = [1, *TOKENS[:6]]
    found = []
    for one in (Reader(Memory(model_named("all"), 16)), reader(shared_chain("all"))):
        one.last(prompt[:-1])
        found.append([f.tokens for f in beam_search(one, prompt, 4, 8, best=3)])
    assert found[0] == found[1]


# ---- Saved packages ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "choice",
    [
        dict(shapes="range", precision="fp32"),
        dict(shapes="fixed", precision="fp32"),
        dict(shapes="multifunction", precision="fp32"),
        dict(shapes="fixed", states=1),
        dict(shapes="range", states=2, chunks=2),
    ],
)
def test_saved_packages_write_the_text_of_pytorch(exported, choice):
    model = exported.source.model
    prompt, texts = [1, *(t % model.cfg.vocab_size for t in TOKENS[:9])], []
    chain = load_chain(
        exported(**choice), exported.source.path, load(exported.source.path), interpreter_runner()
    )
    for one in (Reader(Memory(model)), reader(chain)):
        one.last(prompt[:-1])
        steps = Speculation(one, prompt, GREEDY, np.random.default_rng(0), NGramDrafter(), 3)
        texts.append([step.token for step, _ in zip(steps, range(200), strict=False)])
    assert texts[0] == texts[1] and chain.counts.calls < 200 + len(prompt)


def test_shards_of_another_artifact_are_refused(exported, tmp_path):
    path, folder = exported.source.path, exported(shapes="fixed", precision="fp32")
    (tmp_path / "other").write_bytes(path.read_bytes() + b"x")
    with pytest.raises(
        UserError, match="was exported from artifact '.*', not from .*; export it again"
    ):
        load_chain(folder, tmp_path / "other", load(path))


@pytest.mark.parametrize("parts", [dict(rope_base=2e4), dict(tokenizer_sha256="0" * 64)])
def test_a_manifest_with_the_artifacts_hash_and_other_numbers_is_refused(exported, tmp_path, parts):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    write_manifest(tmp_path / "s", dataclasses.replace(read_manifest(tmp_path / "s"), **parts))
    with pytest.raises(
        UserError,
        match="says that it was exported from this artifact, but its numbers are from another",
    ):
        load_chain(tmp_path / "s", exported.source.path, load(exported.source.path))


def test_embeddings_of_another_model_are_refused(exported, tmp_path):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    data = bytearray((tmp_path / "s" / HOST_FILE).read_bytes())
    data[2] ^= 1
    (tmp_path / "s" / HOST_FILE).write_bytes(data)
    m = read_manifest(tmp_path / "s")
    write_manifest(
        tmp_path / "s",
        dataclasses.replace(m, sha256=folder_hashes(tmp_path / "s", list(m.interfaces()))),
    )
    with pytest.raises(UserError, match="its numbers are from another one"):
        load_chain(tmp_path / "s", exported.source.path, load(exported.source.path))
