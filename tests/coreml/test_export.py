"""Options of an export, the folder that it writes, and values that would overflow fp16."""

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
from fairway.coreml.engine import ShardChain, interpreter_runner
from fairway.coreml.export import (
    MIN_WEIGHTS,
    ExportOptions,
    ExportSource,
    check_replaceable,
    export_shards,
    grid_steps,
    replacing_folder,
    shards_bytes,
)
from fairway.coreml.graph import host_tables
from fairway.coreml.interpret import InterpretedFunction, InterpretError
from fairway.coreml.manifest import MANIFEST_FILE, read_shard_folder
from fairway.coreml.mlpackage import conv_weights, read_package
from fairway.scoring.memory import Memory
from train_gpt import GPT, PRESETS, Artifact, Config, UserError, initialise

apple = pytest.mark.apple


# ---- Options -------------------------------------------------------------------------------------
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
        (dict(states=3), "--states is 3; it must be 0 to 2"),
        (dict(states=1, precision="fp32"), "--states is 1 and --precision fp32; CoreML keeps fp16"),
        (dict(states=2), "--states is 2 and --shapes multifunction, whose functions may not share"),
        (dict(context=-4), "--context is -4"),
        (dict(vocab_shards=1000), "--vocab-shards is 1000"),
    ],
)
def test_wrong_options_are_refused_by_name(asked, message):
    with pytest.raises(UserError) as e:
        ExportOptions(**asked)
    assert str(e.value).startswith(message)


def test_cuts_of_layers_and_vocabulary():
    assert ExportOptions(chunks=4).cuts(11) == [0, 3, 6, 9, 11] and ExportOptions(
        layers_per_shard=4
    ).cuts(11) == [0, 4, 8, 11]
    assert ExportOptions().cuts(11) == [0, 11] and ExportOptions(layers_per_shard=99).cuts(11) == [
        0,
        11,
    ]
    assert ExportOptions().split(1024) == [0, 1024] and ExportOptions().split(8192) == [
        0,
        4096,
        8192,
    ]
    assert ExportOptions(vocab_shards=3).split(97) == [0, 33, 65, 97]
    with pytest.raises(
        UserError, match="--chunks is 12, but the model has 11 layers; take at most that many"
    ):
        ExportOptions(chunks=12).cuts(11)
    with pytest.raises(UserError, match="--vocab-shards is 99, but the vocabulary has 97 tokens"):
        ExportOptions(vocab_shards=99).split(97)


# ---- Folders -------------------------------------------------------------------------------------
def test_a_folder_is_replaced_completely_or_not_at_all(tmp_path):
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


def test_an_interrupt_between_the_two_renames_keeps_the_old_folder(tmp_path, monkeypatch):
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


def test_a_folder_that_a_killed_export_moved_is_restored(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "a").write_text("one")
    (tmp_path / ".out.part").mkdir()
    with pytest.raises(OSError, match="again"), replacing_folder(out):
        raise OSError("again")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "a").read_text() == "one"


@pytest.mark.parametrize("manifest", ["{}", "[]", "", '{"format": "fairway-coreml"}'])
def test_a_folder_with_other_files_is_not_replaced(tmp_path, manifest):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / MANIFEST_FILE).write_text(manifest)
    (tmp_path / "s" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is no export of ours"):
        check_replaceable(tmp_path / "s")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    for out in (tmp_path, tmp_path / "a"):
        with pytest.raises(UserError, match="is where you are; name a folder in it"):
            check_replaceable(out)


@apple
def test_a_symbolic_link_to_a_folder_stays_a_link(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "save_shard", exported.saving(shapes="fixed", precision="fp32"))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for _ in range(2):
        export_shards(
            exported.source,
            ExportOptions(shapes="fixed", precision="fp32"),
            tmp_path / "link",
            exported.text,
            print,
        )
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / MANIFEST_FILE).is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_weights_that_fp16_cannot_hold_are_refused():
    model = trained(num_layers=1)
    with torch.no_grad():
        model.blocks[0].attn.proj.weight *= 1e7
    chain = module.graph.build_shards(model, module.graph.model_dims(model, 4), [0, 1], [0, 97])
    with pytest.raises(
        UserError, match="passes.0.attn.proj.weight of layers0 has weights that fp16 cannot hold"
    ):
        module.check_representable(chain, "fp16")
    module.check_representable(chain, "fp32")


@apple
def test_an_export_does_not_replace_other_files(exported, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no export of ours; name another folder"):
        export_shards(exported.source, ExportOptions(), tmp_path, exported.text, print)
    with pytest.raises(UserError, match="is no export of ours"):
        export_shards(
            exported.source, ExportOptions(), tmp_path / "notes.txt", exported.text, print
        )
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@apple
def test_an_interrupted_export_keeps_the_old_folder(exported, tmp_path, monkeypatch):
    shutil.copytree(exported(shapes="fixed", precision="fp32"), tmp_path / "s")
    before, saved = (tmp_path / "s" / MANIFEST_FILE).read_bytes(), []
    copy_shard = exported.saving(shapes="fixed", precision="fp32")

    def interrupted_save(ct, shard, *args):
        saved.append(shard)
        if len(saved) == 2:
            raise KeyboardInterrupt
        copy_shard(ct, shard, *args)

    monkeypatch.setattr(module, "save_shard", interrupted_save)
    with pytest.raises(KeyboardInterrupt):
        export_shards(
            exported.source,
            ExportOptions(shapes="fixed", precision="fp32"),
            tmp_path / "s",
            exported.text,
            print,
        )
    assert (tmp_path / "s" / MANIFEST_FILE).read_bytes() == before and [
        p.name for p in tmp_path.iterdir()
    ] == ["s"]
    read_shard_folder(tmp_path / "s")


@apple
def test_a_folder_holds_only_the_files_of_the_manifest(exported):
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
    assert found == named | {MANIFEST_FILE, "host.bin"}


@apple
def test_functions_share_their_weights(exported):
    one, both = (exported(shapes=shapes, precision="fp16") for shapes in ("fixed", "multifunction"))
    sizes = [
        (folder / "layers0.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        for folder in (one, both)
    ]
    assert sizes[1] < 1.05 * sizes[0]
    assert shards_bytes(both, read_shard_folder(both).manifest) > sizes[1]


# ---- The artifact's own codes --------------------------------------------------------------------
@given(
    st.lists(st.lists(st.integers(-127, 127), min_size=3, max_size=3), min_size=1, max_size=9),
    st.lists(st.floats(1e-4, 1e3), min_size=9, max_size=9),
)
def test_the_step_of_each_row_is_found(codes, steps):
    weight = torch.tensor(codes) * torch.tensor(steps[: len(codes)])[:, None]
    found = grid_steps(weight)
    again = weight / found
    assert (again - again.round()).abs().max() < 1e-2 and again.abs().max() < 127.5
    assert torch.allclose(again.round() * found, weight, rtol=1e-5, atol=0)


def test_rows_without_a_step_give_none():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert grid_steps(weight) is None
    weight[1:] = torch.round(weight[1:] * 9)
    assert grid_steps(weight) is None and grid_steps(weight[1:]).flatten().tolist() == [
        1.0,
        1.0,
        1.0,
    ]


@apple
def test_the_artifacts_codes_are_stored_as_int8(exported):
    plain, kept = (exported(shapes="fixed", quantise=quantise) for quantise in ("none", "artifact"))
    a, b = (
        InterpretedFunction(read_package(folder / "layers0.mlpackage")) for folder in (plain, kept)
    )
    small = conv_weights(read_package(kept / "layers0.mlpackage"))
    for name, matrix in conv_weights(read_package(plain / "layers0.mlpackage")).items():
        wanted, found = (
            a.constants[matrix.name].astype(float),
            b.constants[small[name].name].astype(float),
        )
        assert small[name].plain == (matrix.elements <= MIN_WEIGHTS)
        assert np.abs(wanted - found).max() <= 2.0**-10 * np.abs(wanted).max()


@apple
def test_weights_without_a_step_are_refused(exported, tmp_path):
    model = trained(num_layers=1).eval()
    source = ExportSource(exported.source.path, exported.source.artifact, model, host_tables(model))
    with pytest.raises(
        UserError,
        match="--quantise artifact: the rows of passes.0.attn.q are not multiples of a step",
    ):
        export_shards(
            source,
            ExportOptions(shapes="fixed", quantise="artifact"),
            tmp_path / "s",
            exported.text % 97,
            print,
        )


# ---- Values that overflow ------------------------------------------------------------------------
def source_with_large_values(exported, times: float = 600.0) -> ExportSource:
    """Return a model whose second layer squares numbers that fp16 cannot square."""
    model = trained(num_layers=2).eval()
    with torch.no_grad():
        model.blocks[1].mlp.fc.weight *= times
        model.blocks[1].mlp.proj.weight /= times**2
    return ExportSource(exported.source.path, exported.source.artifact, model, host_tables(model))


@apple
def test_an_activation_that_would_overflow_is_scaled(exported, tmp_path, monkeypatch):
    source, text, lines = (
        source_with_large_values(exported),
        np.random.default_rng(0).integers(2, 97, 200),
        [],
    )
    with torch.no_grad():
        wanted = Memory(source.model).logits(torch.from_numpy(text[None, :4]))[0].numpy()
    export_shards(source, ExportOptions(shapes="fixed"), tmp_path / "measured", text, lines.append)
    assert "passes.1.act by" in lines[0]
    chain = ShardChain(tmp_path / "measured", interpreter_runner())
    assert np.abs(chain(chain.new_cache(), text[:4].tolist()) - wanted).max() < 0.02 * wanted.std()

    measured = module.plan_precision
    monkeypatch.setattr(module, "plan_precision", lambda *args: measured(*args)._replace(scales={}))
    export_shards(source, ExportOptions(shapes="fixed"), tmp_path / "not", text, lines.append)
    chain = ShardChain(tmp_path / "not", interpreter_runner())
    with pytest.raises(InterpretError, match="overflows fp16"):
        chain(chain.new_cache(), text[:4].tolist())


@apple
def test_a_width_that_groups_do_not_divide_is_refused_by_name(exported, tmp_path):
    model = trained(num_layers=1, model_dim=48, num_heads=4, num_kv_heads=2).eval()
    source = ExportSource(exported.source.path, exported.source.artifact, model, host_tables(model))
    with pytest.raises(
        UserError, match="--quantise int4 left .* as before, since its width does not divide"
    ):
        export_shards(
            source,
            ExportOptions(shapes="fixed", quantise="int4"),
            tmp_path / "s",
            exported.text % 97,
            print,
        )
    assert list(tmp_path.iterdir()) == []


@apple
@pytest.mark.slow
def test_a_model_of_27_million_weights_equals_pytorch(tmp_path):
    """Export the consensus model in about two minutes; print the peak memory of the process."""
    model = GPT(Config(**PRESETS["consensus"]))
    initialise(model, model.cfg)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(0)
        for name, p in model.named_parameters():
            if name.endswith("proj.weight"):  # these start at zero
                p += 0.02 * torch.randn(p.shape, generator=noise)
        model.tok_emb.weight *= 8
    source = ExportSource(
        tmp_path / "a",
        Artifact(model.cfg, {}, b"", {"tokenizer_sha256": ""}),
        model.eval(),
        host_tables(model),
    )
    (tmp_path / "a").write_bytes(b"")
    tokens = np.random.default_rng(0).integers(2, 1024, 600)
    options = ExportOptions(precision="fp32", shapes="fixed", context=256)
    export_shards(source, options, tmp_path / "s", tokens, print)
    chain = ShardChain(tmp_path / "s", interpreter_runner())
    with torch.no_grad():
        wanted = Memory(model, 256).logits(torch.from_numpy(tokens[None, :4]))[0].numpy()
    assert np.abs(chain(chain.new_cache(), tokens[:4].tolist()) - wanted).max() < 1e-4
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
