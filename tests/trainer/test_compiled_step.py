"""train_gpt.py, compiled: one graph a pass, none made inside the clock, few operators around it."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt
from bench.eager_operators import Operators
from train_gpt import GPT, PRESETS, Config, Data, Log, Runtime

CPU = Runtime(0, 1, torch.device("cpu"), "cpu")
TINY = dict(
    num_layers=3,
    model_dim=16,
    num_heads=4,
    num_kv_heads=2,
    rope_dims=0,
    vocab_size=64,
    bigram_vocab_size=16,
    bigram_dim=4,
    train_seq_len=16,
    train_batch_tokens=512,
    micro_batch_tokens=64,
    parallel_start_layer=2,
    loop_start=1,
    loop_end=1,
    loop_at_frac=0.3,
)


@pytest.fixture
def counter():
    """Return a backend of torch.compile that counts graphs and leaves them as they are."""
    # Imported here because it takes two seconds, which every process of the tests would pay.
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    return CompileCounter()


@pytest.mark.parametrize(
    ("preset", "looping"),
    [
        *((preset, False) for preset in PRESETS),
        *(
            pytest.param(preset, True, marks=[pytest.mark.slow] * (preset != "frontier"))
            for preset in PRESETS
        ),
    ],
)
def test_a_pass_of_every_preset_is_one_graph(preset, looping, counter):
    cfg = Config(**PRESETS[preset] | TINY | dict(num_loops=int(looping)))
    model = GPT(cfg)
    model.looping = looping
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    tokens = torch.randint(0, 64, (2, 16))
    assert torch.equal(compiled(tokens, tokens), model(tokens, tokens)) and counter.frame_count == 1


@pytest.mark.parametrize("preset", [pytest.param("consensus", marks=pytest.mark.slow), "frontier"])
def test_nothing_is_compiled_inside_the_clock(preset, counter, tmp_path, monkeypatch):
    """From warm-up to the choices: loops, rounding, validation, averages, changing rates."""
    compile_really = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **how: compile_really(f, backend=counter, **how)
    )
    changes = dict(compile=True, iterations=8, warmup_steps=4, qat_start_frac=0.5)
    changes |= dict(swa_start_frac=0.6, swa_every=1, val_loss_every=4, val_batch_size=1024)
    changes |= dict(num_loops=1, out_dir=str(tmp_path), holdout_tokens=100)
    cfg = Config(**PRESETS[preset] | TINY | changes)
    tokens = np.random.default_rng(0).integers(4, 64, 5000).astype("<u2")
    (tmp_path / "tokenizer").write_bytes(b"of no use here")
    paths = dict(folder=tmp_path, tokenizer_path=tmp_path / "tokenizer")
    counts = dict(val=tokens[:700], val_bytes=1400, holdout=tokens[:101], fingerprint="")
    run = train_gpt.set_up(
        cfg, CPU, Data(train=[tokens], table=None, **paths, **counts), Log(cfg, CPU, "log")
    )
    inside = [0]

    def set_clock(self, running):
        """Add what was compiled since the clock was started, or remember where it was started."""
        if self.clock is not None:
            inside[0] += counter.frame_count - self.frames
        self.frames = counter.frame_count
        set_clock_really(self, running)

    set_clock_really = train_gpt.Run.set_clock
    train_gpt.warm_up(run)
    graphs = counter.frame_count
    assert graphs >= 4  # passes without and with loops, rounding, passes without gradients
    monkeypatch.setattr(train_gpt.Run, "set_clock", set_clock)
    train_gpt.train(run)
    train_gpt.choose(run)
    assert run.qat and run.model.looping and run.averages.swa_count >= 3
    # Validation, without and with loops, is compiled while the clock stands.
    assert inside == [0] and counter.frame_count <= graphs + 2


@pytest.mark.parametrize(
    "preset, qat", [("consensus", False), ("consensus", True), ("frontier", False)]
)
def test_a_step_needs_few_operators_around_its_compiled_passes(preset, qat):
    """At full depth, where every operator is a kernel that the host must launch."""
    cfg = Config(**PRESETS[preset] | TINY | dict(num_layers=11, qat_start_frac=0.5))
    run = train_gpt.make_run(cfg, CPU, None, None, GPT(cfg), [np.arange(2000) % 64])
    run.k, run.qat = 5.0, qat
    # Compiled code is not counted: passes, and the rounding of codes.
    weights = sum(p.sum() for p in run.params)
    run.loss_fn = lambda x, y: weights
    zeros = [torch.zeros_like(p) for p in run.params]
    gradients = lambda loss, params, **_: zeros  # noqa: E731
    run.round_fn = lambda banks, steps, bits: run.rounded.banks
    train_gpt.take_step(run, 0.0)  # makes the momenta
    with pytest.MonkeyPatch.context() as patch, Operators() as operators:
        patch.setattr(torch.autograd, "grad", gradients)
        train_gpt.take_step(run, 0.0)
    passes, counts = len([*train_gpt.batch_passes(run)]), operators.counts
    assert counts.total() - 5 * passes <= 200
    assert not counts["_local_scalar_dense"] and not counts["item"]  # the host reads nothing


@pytest.mark.parametrize("preset", ["consensus", "frontier"])
def test_a_pass_at_full_shape_fits_a_gpu_of_80_gb(preset):
    """Sum what autograd keeps of an eager pass, an eighth of a batch; compiled code keeps less."""
    cfg, kept = Config(**PRESETS[preset]), {}

    def keep(value):
        storage = value.untyped_storage()
        kept[id(storage)] = storage  # so that no other storage gets its id
        return value

    with FakeTensorMode():
        model = GPT(cfg)
        model.stream_dtype, model.looping = torch.bfloat16, bool(cfg.num_loops)
        rows = cfg.train_batch_tokens // 8 // cfg.train_seq_len
        x = torch.zeros(rows, cfg.train_seq_len, dtype=torch.long)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(x, x)
        activations = sum(storage.nbytes() for storage in kept.values())
        buffers = 5 * 4 * sum(p.numel() for p in model.parameters())
    # 30.6 GB for consensus, 60.3 for frontier with its loops; weights, gradients, rounded weights
    # and the optimisers' averages are 0.6.
    assert 20e9 < activations < 65e9 and buffers < 1e9
