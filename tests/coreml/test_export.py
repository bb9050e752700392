"""What an export is asked for, what it leaves behind, and that values which would overflow are brought into range."""

import os
import resource
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import trained

from fairway.coreml import export as module
from fairway.coreml.engine import Chain, interpreted
from fairway.coreml.export import (
    LEAST_WEIGHTS,
    Choice,
    Source,
    export,
    folder_bytes,
    grid_steps,
    need_ours,
    replacing_folder,
    save_shard,
)
from fairway.coreml.graph import host_tables
from fairway.coreml.interpret import InterpretError, Program
from fairway.coreml.manifest import NAME, read_folder
from fairway.coreml.mlpackage import matrices, read_package
from fairway.scoring.memory import Memory
from train_gpt import GPT, PRESETS, Artifact, Config, UserError, initialise

apple = pytest.mark.apple


# ---- Choices ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "asked, message",
    [
        (dict(precision="fp64"), "--precision is 'fp64'; take one of fp16, fp32"),
        (
            dict(quantise="int5"),
            "--quantise is 'int5'; take one of none, artifact, int8, int8-tensor, int4, palette6",
        ),
        (
            dict(shapes="any"),
            "--shapes is 'any'; take one of fixed, range, enumerated, multifunction",
        ),
        (dict(tokens=5), "--tokens is 5; it must be 1 to 4"),
        (dict(tokens=0), "--tokens is 0"),
        (dict(chunks=0), "--chunks is 0"),
        (dict(layers_per_shard=-1), "--layers-per-shard is -1"),
        (
            dict(chunks=2, layers_per_shard=1),
            "--layers-per-shard is 1 and --chunks 2; leave one of them out",
        ),
        (dict(context=-4), "--context is -4"),
        (dict(vocab_shards=1000), "--vocab-shards is 1000"),
    ],
)
def test_what_cannot_be_is_refused_by_option(asked, message):
    with pytest.raises(UserError) as e:
        Choice(**asked)
    assert str(e.value).startswith(message)


def test_how_layers_and_vocabulary_are_cut():
    assert Choice(chunks=4).cuts(11) == [0, 3, 6, 9, 11] and Choice(layers_per_shard=4).cuts(
        11
    ) == [0, 4, 8, 11]
    assert Choice().cuts(11) == [0, 11] and Choice(layers_per_shard=99).cuts(11) == [0, 11]
    assert Choice().split(1024) == [0, 1024] and Choice().split(8192) == [0, 4096, 8192]
    assert Choice(vocab_shards=3).split(97) == [0, 33, 65, 97]
    with pytest.raises(
        UserError, match="--chunks is 12, but the model has 11 layers; take at most that many"
    ):
        Choice(chunks=12).cuts(11)
    with pytest.raises(UserError, match="--vocab-shards is 99, but the vocabulary has 97 tokens"):
        Choice(vocab_shards=99).split(97)


# ---- Folders ---------------------------------------------------------------------------------------------------------
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    for text in ("one", "two"):
        with replacing_folder(out) as folder:
            (folder / "a").write_text(text)
            assert not out.exists() or (out / "a").read_text() == "one"
        assert (out / "a").read_text() == text
    with pytest.raises(OSError, match="disk full"), replacing_folder(out) as folder:
        (folder / "a").write_text("three")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "a").read_text() == "two"


def test_whatever_goes_wrong_between_the_two_moves_the_old_folder_is_there(tmp_path, monkeypatch):
    out, moves, rename = tmp_path / "out", [], os.rename
    with replacing_folder(out) as folder:
        (folder / "a").write_text("one")

    def interrupted(*paths):
        moves.append(paths)
        if len(moves) == 2:
            raise KeyboardInterrupt
        rename(*paths)

    monkeypatch.setattr(module.os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing_folder(out) as folder:
        (folder / "a").write_text("two")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "a").read_text() == "one"


def test_what_a_killed_export_has_left_is_put_back(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("one")
    (tmp_path / ".out.part").mkdir()
    with pytest.raises(OSError, match="again"), replacing_folder(out):
        raise OSError("again")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "a").read_text() == "one"


@pytest.mark.parametrize("manifest", ["{}", "[]", "", '{"format": "fairway-coreml"}'])
def test_a_folder_that_only_looks_like_an_export_is_left_alone(tmp_path, manifest):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / NAME).write_text(manifest)
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no export of ours"):
        need_ours(tmp_path / "s")


def test_nobody_loses_the_folder_that_he_is_in(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out in (tmp_path, tmp_path / "a"):
        with pytest.raises(UserError, match="is where you are; name a folder in it"):
            need_ours(out)


@apple
def test_a_link_to_a_folder_stays_one(exported, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export(
            exported.source,
            Choice(shapes="fixed", precision="fp32"),
            tmp_path / "link",
            exported.text,
            print,
        )
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / NAME).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_weights_that_fp16_cannot_hold_are_refused():
    model = trained(num_layers=1)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 1e7
    chain = module.graph.shards(model, module.graph.dims_of(model, 4), [0, 1], [0, 97])
    with pytest.raises(
        UserError, match="passes.0.attn.proj.weight of layers0 has weights that fp16 cannot hold"
    ):
        module.need_representable(chain, "fp16")
    module.need_representable(chain, "fp32")


@apple
def test_a_folder_of_something_else_is_left_alone(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no export of ours; name another folder"):
        export(exported.source, Choice(), tmp_path, exported.text, print)
    with pytest.raises(UserError, match="is no export of ours"):
        export(exported.source, Choice(), tmp_path / "notes.txt", exported.text, print)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@apple
def test_an_export_that_fails_half_way_leaves_the_old_one(exported, tmp_path, monkeypatch):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    before, saved = (tmp_path / "s" / NAME).read_bytes(), []

    def failing(ct, shard, *args):
        saved.append(shard)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save_shard(ct, shard, *args)

    monkeypatch.setattr(module, "save_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        export(
            exported.source,
            Choice(shapes="fixed", precision="fp32"),
            tmp_path / "s",
            exported.text,
            print,
        )
    assert (tmp_path / "s" / NAME).read_bytes() == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["s"]
    read_folder(tmp_path / "s")


@apple
def test_nothing_is_in_a_folder_but_what_the_manifest_names(exported):
    folder = exported(shapes="multifunction", precision="fp16")
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    named = {
        f"{shard}.mlpackage/{file}"
        for shard in ("layers0", "head0")
        for file in (
            "Manifest.json",
            "Data/com.apple.CoreML/model.mlmodel",
            "Data/com.apple.CoreML/weights/weight.bin",
        )
    }
    assert found == named | {NAME, "host.bin"}


@apple
def test_functions_share_their_weights(exported):
    one, both = (exported(shapes=shapes, precision="fp16") for shapes in ("fixed", "multifunction"))
    sizes = [
        (folder / "layers0.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        for folder in (one, both)
    ]
    assert sizes[1] < 1.05 * sizes[0]
    assert folder_bytes(both, read_folder(both).manifest) > sizes[1]


# ---- The artifact's own codes ----------------------------------------------------------------------------------------
@given(
    st.lists(st.lists(st.integers(-127, 127), min_size=3, max_size=3), min_size=1, max_size=9),
    st.lists(st.floats(1e-4, 1e3), min_size=9, max_size=9),
)
def test_rows_of_whole_multiples_are_seen_as_such(codes, steps):
    weight = torch.tensor(codes) * torch.tensor(steps[: len(codes)])[:, None]
    found = grid_steps(weight)
    again = weight / found
    assert (again - again.round()).abs().max() < 1e-2 and again.abs().max() < 127.5
    assert torch.allclose(again.round() * found, weight, rtol=1e-5, atol=0)


def test_rows_that_are_no_multiples_have_no_step():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert grid_steps(weight) is None
    weight[1:] = torch.round(weight[1:] * 9)
    assert grid_steps(weight) is None and grid_steps(weight[1:]).flatten().tolist() == [
        1.0,
        1.0,
        1.0,
    ]


@apple
def test_the_artifacts_codes_are_kept_as_int8(exported):
    plain, kept = (exported(shapes="fixed", quantise=quantise) for quantise in ("none", "artifact"))
    a, b = (Program(read_package(folder / "layers0.mlpackage")) for folder in (plain, kept))
    small = matrices(read_package(kept / "layers0.mlpackage"))
    for name, matrix in matrices(read_package(plain / "layers0.mlpackage")).items():
        wanted, found = (
            a.constants[matrix.name].astype(float),
            b.constants[small[name].name].astype(float),
        )
        assert small[name].plain == (matrix.elements <= LEAST_WEIGHTS)
        assert np.abs(wanted - found).max() <= 2.0**-10 * np.abs(wanted).max()


@apple
def test_weights_that_lie_on_no_grid_are_refused(exported, tmp_path):
    model = trained(num_layers=1).eval()
    source = Source(exported.source.path, exported.source.artifact, model, host_tables(model))
    with pytest.raises(
        UserError, match="--quantise artifact: passes.0.attn.q is no multiple of a step a row"
    ):
        export(
            source,
            Choice(shapes="fixed", quantise="artifact"),
            tmp_path / "s",
            exported.text % 97,
            print,
        )


# ---- Values that overflow --------------------------------------------------------------------------------------------
def wild(exported, times: float = 600.0) -> Source:
    """A model whose second layer squares numbers that fp16 cannot square, and says the same as a tame one."""
    model = trained(num_layers=2).eval()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= times
        model.blocks[1].mlp.proj.weight /= times**2
    return Source(exported.source.path, exported.source.artifact, model, host_tables(model))


@apple
def test_an_activation_that_would_overflow_is_measured_and_right(exported, tmp_path, monkeypatch):
    source, text, said = wild(exported), np.random.default_rng(0).integers(2, 97, 200), []
    with torch.no_grad():
        wanted = Memory(source.model).logits(torch.from_numpy(text[None, :4]))[0].numpy()
    export(source, Choice(shapes="fixed"), tmp_path / "measured", text, said.append)
    assert "passes.1.act by" in said[0]
    chain = Chain(tmp_path / "measured", interpreted())
    assert np.abs(chain(chain.stream(), text[:4].tolist()) - wanted).max() < 0.02 * wanted.std()

    measured = module.precision_for
    monkeypatch.setattr(module, "precision_for", lambda *args: measured(*args)._replace(scales={}))
    export(source, Choice(shapes="fixed"), tmp_path / "not", text, said.append)
    chain = Chain(tmp_path / "not", interpreted())
    with pytest.raises(InterpretError, match="overflows fp16"):
        chain(chain.stream(), text[:4].tolist())


@apple
def test_groups_that_do_not_divide_are_refused_by_name(exported, tmp_path):
    model = trained(num_layers=1, model_dim=48, num_heads=4, num_kv_heads=2).eval()
    source = Source(exported.source.path, exported.source.artifact, model, host_tables(model))
    with pytest.raises(
        UserError, match="--quantise int4 left .* as before, since its width does not divide"
    ):
        export(
            source,
            Choice(shapes="fixed", quantise="int4"),
            tmp_path / "s",
            exported.text % 97,
            print,
        )
    assert list(tmp_path.iterdir()) == []


@apple
@pytest.mark.slow
def test_a_model_of_27_million_weights_is_exported_and_says_what_pytorch_says(tmp_path):
    """About two minutes; prints the largest memory of the process."""
    model = GPT(Config(**PRESETS["consensus"]))
    initialise(model, model.cfg)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):  # which start at zero
                p += 0.02 * torch.randn(p.shape, generator=noise)
        model.tok_emb.weight *= 8
    source = Source(
        tmp_path / "a",
        Artifact(model.cfg, {}, b"", {"tokenizer_sha256": ""}),
        model.eval(),
        host_tables(model),
    )
    (tmp_path / "a").write_bytes(b"")
    tokens = np.random.default_rng(0).integers(2, 1024, 600)
    choice = Choice(precision="fp32", shapes="fixed", context=256)
    export(source, choice, tmp_path / "s", tokens, print)
    chain = Chain(tmp_path / "s", interpreted())
    with torch.no_grad():
        wanted = Memory(model, 256).logits(torch.from_numpy(tokens[None, :4]))[0].numpy()
    assert np.abs(chain(chain.stream(), tokens[:4].tolist()) - wanted).max() < 1e-4
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
