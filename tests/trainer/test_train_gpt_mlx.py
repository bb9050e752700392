"""Test train_gpt_mlx.py: its numbers against PyTorch's, and whole runs as users start them."""

import ast
import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import FEATURES, SMOKE, STATEFUL, config, some_tokens, trained
from test_training import Finished

import train_gpt
from fairway.artifact_reader import read_artifact
from fairway.records.logs import read_log
from fairway.records.run import read_run
from fairway.shards import write_shard
from train_gpt import GPT, PRESETS, Config, Runtime, UserError

# On Linux MLX compiles each kernel with g++, which takes 85 s for a model of two layers.
os.environ["MLX_DISABLE_COMPILE"] = "1"
mx = pytest.importorskip(
    "mlx.core", reason="mlx is not installed: pip install -r requirements-apple.txt"
)

import train_gpt_mlx as ours  # noqa: E402
from train_gpt_mlx import Optimiser, Run, to_arrays, to_ids, to_tensors  # noqa: E402

pytestmark = pytest.mark.apple
ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "train_gpt_mlx.py")
CPU = Runtime(0, 1, torch.device("cpu"), "cpu")
QUICK = dict(
    MODEL_DIM=32,  # of smoke's 64: MLX multiplies at 2 GFLOP/s on a CPU
    ITERATIONS=3,
    CODEC="brotli",
    TRAIN_LOG_EVERY=1,
    MAX_WALLCLOCK_SECONDS=0,
    HOLDOUT_TOKENS=1024,
    TRAIN_BATCH_TOKENS=512,
    VAL_BATCH_SIZE=4096,
    DEVICE="cpu",
    MLX_DISABLE_COMPILE=1,
)
LONG = QUICK | STATEFUL | dict(ITERATIONS=12)
ALL_ON = QUICK | dict(
    PRESET="frontier",
    COMPILE=0,
    NUM_LAYERS=4,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    TRAIN_SEQ_LEN=32,
    ITERATIONS=6,
    WARMUP_STEPS=0,
    HOLDOUT_TOKENS=512,
    ROPE_DIMS=4,
    PARALLEL_START_LAYER=3,
    LOOP_START=1,
    LOOP_END=2,
    LOOP_AT_FRAC=0.3,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=32,
    SWA_START_FRAC=0.5,
    SWA_EVERY=1,
    CODEC="ans",
    MLP_BITS=5,
    VAL_LOSS_EVERY=3,
    GRAD_CLIP_NORM=0.5,
)


def twin(model: GPT) -> "ours.GPT":
    """Return the same model in MLX."""
    copy = ours.GPT(model.cfg)
    copy.load_weights(list(to_arrays(dict(model.named_parameters())).items()), strict=True)
    copy.looping = model.looping
    return copy


def make_run(cfg: Config, weights: dict, tokens: np.ndarray, data=None) -> Run:
    """Return a run without a log that reads its batches from `tokens`."""
    mx.set_default_device(mx.cpu)
    return Run(
        cfg,
        CPU,
        None,
        data,
        ours.GPT(cfg),
        weights,
        Optimiser(weights, cfg),
        train_gpt.TokenStream([tokens]),
        k=oracle.K,
    )


def normal(*shape, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return normal random numbers of this seed."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- The oracle and the model ------------------------------------------------------------------
def test_mlx_matches_the_golden_file():
    golden = oracle.read()
    cfg, run = (
        golden.cfg,
        make_run(golden.cfg, {n: mx.array(w) for n, w in golden.weights.items()}, golden.tokens),
    )
    logits = np.array(run.model.holding(run.weights).logits(to_ids(golden.batch(0)[0])))
    loss, gradients = ours.accumulate_gradients(run, run.weights)
    run.stream.at, steps, losses = 0, [], []
    for step in range(cfg.iterations):
        progress = train_gpt.progress_of(step, 0.0, cfg)
        run.qat = progress >= cfg.qat_start_frac
        ours.take_step(run, progress)
        losses.append(run.loss.item())
        if step < 3:
            steps.append({n: np.array(w) for n, w in run.weights.items()})
    errors = oracle.differences(
        golden,
        golden._replace(
            logits=logits,
            loss=loss.item(),
            gradients={n: np.array(g) for n, g in gradients.items()},
            steps=steps,
            losses=np.array(losses),
        ),
    )
    assert all(errors[name] <= limit for name, limit in oracle.TOLERANCES.items()), errors


@pytest.mark.parametrize("name", FEATURES)
def test_logits_match_pytorch_for_each_feature(name):
    model, tokens = trained(looping=name != "loops_off", **FEATURES[name]), some_tokens()
    with torch.no_grad():
        wanted = model.logits(tokens).numpy()
    assert np.abs(np.array(twin(model).logits(to_ids(tokens.numpy()))) - wanted).max() <= 1e-5


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["plain", "all", "xsa"])
def test_gradients_match_pytorch(name, sampled):
    model, tokens = trained(looping=True, **FEATURES[name]), some_tokens(8, 17)
    params, (x, y) = dict(model.named_parameters()), (tokens[:, :-1], tokens[:, 1:])
    cfg = dataclasses.replace(model.cfg, sampled_pieces=8)
    run = make_run(cfg, to_arrays(params), tokens.flatten().numpy())
    sample = train_gpt.sample(run, y) if sampled else None
    loss = model(x, y, sample).mean()
    wanted = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    run.model.looping = True
    arrays = [to_ids(t.numpy()) for t in (x, y)] + [mx.array(part.numpy()) for part in sample or ()]
    got = ours.gradient_function(run, sampled)(run.weights, *arrays)
    assert np.allclose(got[0][0].item(), loss.item(), atol=1e-6)
    for (n, g), w in zip(to_tensors(got[1]).items(), wanted, strict=True):
        assert (g - w).abs().max() <= 1e-4 * w.abs().max().clamp(min=1e-6), n


@pytest.mark.parametrize("preset", PRESETS)
def test_names_and_shapes_of_parameters_match_pytorch(preset):
    cfg = Config(**PRESETS[preset])
    with torch.device("meta"):
        wanted = {n: tuple(p.shape) for n, p in GPT(cfg).named_parameters()}
    shapes = {n: w.shape for n, w in ours.tree_flatten(ours.GPT(cfg).parameters())}
    assert shapes == wanted
    state = Optimiser({n: mx.zeros(s) for n, s in wanted.items()}, cfg)
    assert set(state.momentum) | set(state.first) == set(wanted) and not set(state.momentum) & set(
        state.first
    )


def test_both_trainers_start_from_the_same_bits():
    model = GPT(config(**FEATURES["all"]))
    train_gpt.initialise(model, model.cfg)
    weights = to_tensors(ours.first_weights(model.cfg))
    assert list(weights) == [n for n, _ in model.named_parameters()]
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


def test_bigram_buckets_of_the_largest_tokens_do_not_overflow():
    cfg = config(vocab_size=65_536, bigram_vocab_size=1 << 20, bigram_dim=8)
    tokens = np.random.default_rng(0).integers(0, 65_536, (2, 50))
    tokens[0, :3] = 65_535
    wanted = train_gpt.BigramHash(cfg).buckets(torch.from_numpy(tokens)).numpy()
    assert np.array_equal(np.array(ours.BigramHash(cfg).buckets(to_ids(tokens))), wanted)


def test_xsa_matches_pytorch_for_small_values_and_its_gradient_is_finite_for_zeros():
    y, v = normal(1, 4, 3, 8), normal(1, 2, 3, 8, seed=1)
    v[0, 0], v[0, 1, 0] = 1e-4 * v[0, 0], 0.0
    wanted = train_gpt.without_own_value(y, v)
    got = ours.without_own_value(mx.array(y.numpy()), mx.array(v.numpy()))
    assert np.allclose(np.array(got), wanted.numpy(), atol=1e-5)
    slope = mx.grad(lambda v: ours.without_own_value(mx.array(y.numpy()), v).sum())(
        mx.array(v.numpy())
    )
    assert np.isfinite(np.array(slope)).all()


# ---- Rounding ----------------------------------------------------------------------------------
@given(
    st.integers(0, 2**20),
    st.sampled_from([4, 5, 6, 7, 8, train_gpt.PLAIN_BITS]),
    st.floats(2.5, 64.0),
    st.integers(-12, 6),
    st.sampled_from([1, 2, 7, 64, 300]),
)
def test_rounding_in_training_equals_the_exports(seed, bits, k, power, columns):
    """Rows of equal steps are equal to the bit; steps are equal, or neighbours in bf16."""
    weight = normal(5, columns, seed=seed) * normal(5, 1, seed=seed + 1).exp() * 10.0**power
    weight[seed % 5] *= seed % 3
    wanted = train_gpt.quantise(weight, k, bits)
    got = to_tensors({"w": ours.round_weight(mx.array(weight.numpy()), k, bits)})["w"]
    if bits == train_gpt.PLAIN_BITS:
        assert torch.equal(got, wanted.weight())
        return
    steps = to_tensors({"s": ours.row_steps(mx.array(weight.numpy()), k, bits)})["s"]
    assert ((steps - wanted.steps).abs() <= wanted.steps * 2.0**-7).all()
    same = (steps == wanted.steps)[:, 0]
    assert same.float().mean() >= 0.6 and torch.equal(got[same], wanted.weight()[same])
    codes = train_gpt.to_codes(weight, steps, bits)
    assert torch.equal(got, codes * steps)


def test_vectors_are_clipped_to_the_range_of_fp16():
    assert np.array_equal(
        np.array(ours.round_weight(mx.array([1e9, -1e9, 0.1]), 3.0, 16)),
        np.array([65504, -65504, np.float16(0.1)], np.float32),
    )


# ---- Optimisers --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "changed",
    [
        dict(muon_polar_express=True),
        dict(muon_row_normalize=True, muon_wd=0.1),
        dict(adam_wd=0.1, embed_wd=0.2),
        dict(beta1=0.8, beta2=0.99, adam_eps=1e-3, muon_backend_steps=3),
        dict(grad_clip_norm=0.3),
        dict(grad_clip_norm=1e6),
    ],
    ids=str,
)
def test_optimiser_steps_match_pytorch_for_the_same_gradients(changed):
    cfg = config(**FEATURES["all"] | changed)
    model = trained(**FEATURES["all"])
    params = dict(model.named_parameters())
    run = train_gpt.make_run(cfg, CPU, None, None, model, [np.zeros(1)])
    weights = to_arrays(params)
    optimiser = Optimiser(weights, cfg)
    for step in range(4):
        gradients = {
            n: normal(*p.shape, seed=7 * step + i, scale=0.1)
            for i, (n, p) in enumerate(params.items())
        }
        own = to_arrays(gradients)
        if cfg.grad_clip_norm:
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            scale = (cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {n: g * scale for n, g in gradients.items()}
            own = ours.clip_gradients(own, cfg.grad_clip_norm)
        torch._foreach_copy_(run.gradients.params, list(gradients.values()))
        for theirs in run.optimisers:
            for group in theirs.param_groups:
                group["lr"] = group["peak_lr"] * 0.5
                group["momentum"] = 0.9
            theirs.step()
        weights = optimiser.step(weights, own, 0.5, 0.9)
    assert list(weights) == list(params)
    for n, w in to_tensors(weights).items():
        assert (w - params[n]).abs().max() <= 2e-5 * params[n].abs().max(), n


# ---- Micro-batches -----------------------------------------------------------------------------
def test_a_step_does_not_depend_on_micro_batches():
    golden, results = oracle.read(), []
    for size in (16, 0):  # one sequence; an eighth of the batch
        cfg = dataclasses.replace(golden.cfg, train_batch_tokens=640, micro_batch_tokens=size)
        run = make_run(cfg, {n: mx.array(w) for n, w in golden.weights.items()}, golden.tokens)
        assert ours.micro_tokens(cfg) == (size or 80)
        ours.take_step(run, 0.0)
        results.append((run.loss.item(), to_tensors(run.weights)))
    (one, first), (other, second) = results
    assert one == pytest.approx(other, abs=1e-6)
    assert all((first[n] - second[n]).abs().max() < 1e-5 for n in first)


def test_a_signal_ends_a_step_between_micro_batches_and_changes_nothing():
    golden = oracle.read()
    run = make_run(
        dataclasses.replace(golden.cfg, micro_batch_tokens=16),
        {n: mx.array(w) for n, w in golden.weights.items()},
        golden.tokens,
    )
    ours.take_step(run, 0.0)
    before, calls = dict(vars(run)), []
    gradients_of = ours.gradient_function(run)

    def interrupt_third(*inputs):
        calls.append(inputs)
        run.signum = signal.SIGINT if len(calls) == 3 else 0
        return gradients_of(*inputs)

    run.gradient_functions[False, False] = interrupt_third
    momentum = dict(run.optimiser.momentum)
    assert not ours.take_step(run, 0.0) and len(calls) == 3
    assert {n: v for n, v in vars(run).items() if n != "signum"} == {
        n: v for n, v in before.items() if n != "signum"
    }
    assert run.stream.at == 128 and all(run.optimiser.momentum[n] is m for n, m in momentum.items())
    run.signum, run.gradient_functions[False, False] = 0, gradients_of
    assert ours.take_step(run, 0.0)


def test_micro_batches_are_whole_sequences_that_fit_in_memory():
    for preset in PRESETS:
        cfg = Config(**PRESETS[preset])
        size = ours.micro_tokens(cfg)
        assert size % cfg.train_seq_len == 0 and size * ours.activation_bytes(cfg) <= 9e9, preset
    cfg = Config(**PRESETS["consensus"])
    assert (
        ours.micro_tokens(cfg) * ours.activation_bytes(cfg) < 5e9
        and 98_304 * ours.activation_bytes(cfg) > 1e11
    )
    assert ours.micro_tokens(Config(**PRESETS["cpu"])) == 256  # an eighth
    assert ours.micro_tokens(dataclasses.replace(cfg, micro_batch_tokens=5000)) == 4096


@pytest.mark.parametrize(
    "changed",
    [
        {},
        dict(train_seq_len=128),
        dict(vocab_size=2048),
        dict(mlp_mult=6.0),
        dict(num_layers=7, loop_start=1, loop_end=3, num_loops=2),
    ],
    ids=str,
)
def test_the_estimate_of_activations_matches_mlx(changed):
    """Measure how much more a pass of twice as many sequences needs: weights need no more."""
    length = changed.get("train_seq_len", 64)
    cfg = config(
        **dict(num_layers=4, model_dim=64, train_seq_len=length, vocab_size=256)
        | changed
        | dict(train_batch_tokens=8 * length)
    )
    run, peaks = make_run(cfg, ours.first_weights(cfg), np.zeros(1, np.uint16)), []
    run.model.looping = bool(cfg.num_loops)
    for rows in (256 // length, 512 // length):
        x = mx.zeros((rows, length), mx.int32)
        mx.eval(x, run.weights)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(ours.gradient_function(run)(run.weights, x, x))
        peaks.append(mx.get_peak_memory() - before)
    measured = (peaks[1] - peaks[0]) / 256
    assert 0.95 * measured <= ours.activation_bytes(cfg) <= 1.3 * measured


def test_progress_is_printed_every_ten_seconds(monkeypatch, capsys):
    clock = iter([0.0, 8.0, 12.0, 18.0, 40.0, 42.0])
    monkeypatch.setattr(ours.time, "perf_counter", lambda: next(clock))
    on_progress = ours.progress_printer("scoring")
    for fraction in (0.2, 0.3, 0.45, 0.8, 0.84):
        on_progress(fraction)
    assert capsys.readouterr().err == "scoring 30% eta:28s\nscoring 80% eta:10s\n"


def test_only_the_first_step_prints_progress(monkeypatch):
    golden, calls = oracle.read(), []
    run = make_run(golden.cfg, {n: mx.array(w) for n, w in golden.weights.items()}, golden.tokens)
    monkeypatch.setattr(
        ours, "progress_printer", lambda label: lambda part: calls.append((label, part))
    )
    for _ in range(2):
        ours.take_step(run, 0.0)
    assert calls == [("first step", (i + 1) / 8) for i in range(8)]


# ---- Artifacts ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def data(corpus):
    return train_gpt.load_data(
        Config(**SMOKE | dict(vocab_size=corpus.vocab_size, data_path=str(corpus.folder)))
    )


@pytest.mark.parametrize("codec", ["auto", "zstd", "brotli", "ans"])
def test_equal_weights_give_equal_bytes(codec, data, tmp_path):
    cfg, lines = config(**FEATURES["all"] | dict(codec=codec)), []
    model = trained(looping=True, **FEATURES["all"])

    def log(line, *_, **__):
        lines.append(line)

    theirs = train_gpt.make_run(cfg, CPU, data, log, model, [np.zeros(1)])
    mine = dataclasses.replace(
        make_run(cfg, to_arrays(dict(model.named_parameters())), data.holdout, data), log=log
    )
    mine.model.looping = True
    inputs = ours.size_inputs(mine)
    wanted, _, chosen = train_gpt.fit_artifact(theirs, {})
    got, _, own = train_gpt.fit_artifact(inputs, {})
    assert got == wanted and own == chosen and len(lines) == 6 * (codec == "auto")
    assert train_gpt.code_bytes(inputs.cfg) == train_gpt.packed_code_bytes(
        [train_gpt.__file__, ours.__file__]
    )


def test_each_trainer_reads_the_others_artifact(tmp_path):
    model, tokens = trained(looping=True, **FEATURES["all"]), some_tokens()
    mine = to_arrays(dict(model.named_parameters()))
    for weights in (dict(model.named_parameters()), to_tensors(mine)):
        rounded = train_gpt.quantised(weights, 3.0, model.cfg, {})
        (tmp_path / "a").write_bytes(
            train_gpt.encode_artifact(rounded, 3.0, model.cfg, True, "ans", b"")
        )
        artifact = read_artifact(tmp_path / "a")
        with torch.no_grad():
            wanted = train_gpt.build_model(artifact).logits(tokens).numpy()
        built = ours.build_model(artifact)
        assert (
            built.looping
            and np.abs(np.array(built.logits(to_ids(tokens.numpy()))) - wanted).max() <= 1e-5
        )


def test_hessians_match_pytorch(monkeypatch):
    monkeypatch.setattr(ours, "gptq_factor", lambda hessian: hessian)
    cfg, tokens = (
        config(**FEATURES["all"], gptq=True),
        some_tokens(1, 600).flatten().numpy(),
    )
    model = trained(looping=True, **FEATURES["all"])
    theirs = train_gpt.make_run(cfg, CPU, None, None, model, [tokens])
    run = make_run(cfg, to_arrays(dict(model.named_parameters())), tokens)
    run.model.looping = True
    wanted, got = train_gpt.collect_factors(theirs, lambda h: h), ours.collect_factors(run)
    assert set(got) == set(wanted) and all(
        torch.allclose(got[n], h, rtol=1e-4, atol=1e-3) for n, h in wanted.items()
    )
    assert not any(m.watch for _, m in run.model.named_modules() if isinstance(m, ours.Linear))


# ---- Whole runs --------------------------------------------------------------------------------
@contextlib.contextmanager
def signals_restored():
    """Give pytest its signal handlers back afterwards."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.fixture(scope="module")
def short_corpus(corpus, tmp_path_factory) -> Path:
    """The corpus with ten validation documents: MLX scores about 5,000 tokens/s on this CPU."""
    folder = tmp_path_factory.mktemp("short_corpus")
    for path in corpus.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    path = folder / "tiny_val_000000.bin"
    tokens = np.array(train_gpt.read_shard(path))
    write_shard(path, tokens[: train_gpt.document_bounds(tokens)[10]])
    return folder


@pytest.fixture(scope="module")
def trainer_env(trainer_env, short_corpus):
    """`trainer_env(out_dir, **settings)`: as conftest's, with the short corpus."""

    def build(out_dir, **settings) -> dict[str, str]:
        return trainer_env(out_dir, **dict(DATA_PATH=short_corpus) | settings)

    return build


@pytest.fixture(scope="module")
def train_here(trainer_env):
    """`train_here(folder, **settings)`: a whole run in this process; `by` chooses the trainer."""

    def run(folder: Path, by=ours, **settings) -> Finished:
        folder.mkdir(parents=True, exist_ok=True)
        screen = io.StringIO()
        with (
            signals_restored(),
            contextlib.redirect_stdout(screen),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            by.main(trainer_env(folder, **settings))
        return Finished(folder, screen.getvalue())

    return run


def start(trainer_env, folder: Path, **settings) -> subprocess.Popen:
    """Start a run in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        [sys.executable, SCRIPT],
        env=trainer_env(folder, **settings),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def refusal(trainer_env, folder: Path, **settings) -> str:
    """Return the error of a run that must be refused and must write no file."""
    before = sorted(folder.rglob("*"))
    with (
        signals_restored(),
        pytest.raises(UserError) as caught,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        ours.main(trainer_env(folder, **settings))
    assert sorted(folder.rglob("*")) == before and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, train_here) -> Finished:
    return train_here(
        tmp_path_factory.mktemp("uninterrupted"), **LONG, VAL_LOSS_EVERY=6, EVAL_STRIDE=24
    )


def test_a_run_writes_the_files_and_events_of_train_gpt(uninterrupted):
    assert {
        str(p.relative_to(uninterrupted.folder))
        for p in uninterrupted.folder.rglob("*")
        if p.is_file()
    } == {
        "checkpoint_mlx.pt",
        "final_model.int6.ptz",
        "final_model.pt",
        "runs.jsonl",
        "logs/test.txt",
        "logs/test.jsonl",
    }
    events = (
        "start model size val train qat loop averages rounding quantised artifact final sliding"
    )
    assert {e["event"] for e in uninterrupted.events} == {*events.split(), "checkpoint"}
    state = torch.load(uninterrupted.folder / "final_model.pt", weights_only=True)
    GPT(Config(**uninterrupted.one("start")["settings"])).load_state_dict(state, strict=True)
    summary = json.loads((uninterrupted.folder / "runs.jsonl").read_text())
    assert summary["start"]["mlx"] == mx.__version__
    assert summary["final"]["bpb"] == uninterrupted.one("final")["bpb"]
    size = uninterrupted.artifact.stat().st_size
    assert uninterrupted.one("artifact")["bytes"] == size
    code = train_gpt.packed_code_bytes([train_gpt.__file__, SCRIPT])
    assert f": {size + code} bytes (budget:" in uninterrupted.text


def test_its_log_is_read_like_train_gpts(uninterrupted):
    log, run = read_log(uninterrupted.folder / "logs" / "test.txt"), read_run(uninterrupted.folder)
    assert (
        log.dialect == "fairway"
        and log.source.startswith('"""Train on Apple Silicon')
        and not log.truncated
    )
    assert (log.last_step, log.planned_steps, log.seed, log.settings["mlx"]) == (
        12,
        12,
        1337,
        mx.__version__,
    )
    assert log.hardware.startswith("mlx cpu") and {"code", "train_gpt", "data", "tokenizer"} <= set(
        log.hashes
    )
    assert log.hashes["code"] == train_gpt.file_sha256(SCRIPT)
    final = uninterrupted.one("sliding")
    assert log.final.label == f"{final['label']}_exact" == "final_int6_brotli_sliding_window_exact"
    assert log.final.bpb == pytest.approx(final["bpb"], abs=1e-8)
    assert run.artifact == uninterrupted.artifact and run.seed == 1337
    wanted = [
        r"step:1/12 train_loss:\S+ train_time:\d+ms step_avg:\S+ms tok/s:\d+ eta:\d+s$",
        r"qat:on step:4 k:\S+ max_loss_difference:0\.\d*[1-9]",
        r"step:6/12 val_loss:\S+ val_bpb:\S+ train_time",
        r"layer_loop:enabled step:6 passes:4$",
        r"swa:averaged \d checkpoints$",
        r"averages:last:\S+ swa:\S+ ema:\S+ kept:",
        r"gptq:collected 14 Hessians",
        r"rounding:nearest:\S+ gptq:",
        r"Serialized model int6\+brotli: \d+ bytes \(k:",
        r"final_int6_brotli_roundtrip_exact val_loss:\d\.\d{8} val_bpb:\d\.\d{8}$",
        r"final_int6_brotli_sliding_window_exact val_loss:\S+ val_bpb:\d\.\d{8} stride:24$",
    ]
    at = 0
    for pattern in wanted:
        found = re.compile(f"^{pattern}", re.M).search(uninterrupted.text, at)
        assert found, pattern
        at = found.end()


def test_eval_final_gives_its_artifact_the_same_scores(
    uninterrupted, short_corpus, tmp_path, capsys
):
    """Compare windows side by side, and sliding windows that overlap."""
    import eval_final

    env = dict(
        CHECKPOINT=str(uninterrupted.artifact),
        DATA_PATH=str(short_corpus),
        OUT_DIR=str(tmp_path),
        DEVICE="cpu",
        EVAL_STRIDE="24",
        PATH=os.environ["PATH"],
    )
    assert eval_final.main(env, ["--compare"]) == 0
    scores = dict(
        re.findall(
            r"^final_int6_(\w+)_exact val_loss:\S+ val_bpb:(\S+)", capsys.readouterr().out, re.M
        )
    )
    assert float(scores["roundtrip"]) == pytest.approx(uninterrupted.one("final")["bpb"], abs=1e-5)
    assert float(scores["sliding_window"]) == pytest.approx(
        uninterrupted.one("sliding")["bpb"], abs=1e-5
    )
    assert abs(float(scores["sliding_window"]) - float(scores["roundtrip"])) > 1e-4


@pytest.fixture(scope="module")
def quick(tmp_path_factory, train_here) -> Finished:
    """A run of three steps."""
    return train_here(tmp_path_factory.mktemp("quick"), **QUICK)


@pytest.mark.parametrize("settings", [QUICK, ALL_ON], ids=["smoke", "frontier"])
def test_a_run_matches_pytorch_step_by_step(settings, quick, train_here, tmp_path):
    """Compare the losses of all steps and the final score of the artifact."""
    mine = quick if settings is QUICK else train_here(tmp_path / "mlx", **settings)
    theirs = train_here(tmp_path / "torch", by=train_gpt, **settings)
    assert [e["loss"] for e in mine.all("train")] == pytest.approx(
        [e["loss"] for e in theirs.all("train")], abs=1e-4
    )
    assert [e["loss"] for e in mine.all("val")] == pytest.approx(
        [e["loss"] for e in theirs.all("val")], abs=1e-4
    )
    # The tolerance is wider: a weight half way between two codes may round the other way.
    assert mine.one("final")["loss"] == pytest.approx(theirs.one("final")["loss"], abs=5e-3)
    assert [e["kept"] for e in mine.all("averages")] == [e["kept"] for e in theirs.all("averages")]


def test_warm_up_is_undone_exactly(quick, train_here, tmp_path):
    assert quick.one("start")["settings"]["warmup_steps"] == 0
    warmed = train_here(tmp_path, **QUICK, WARMUP_STEPS=2)
    assert [e["loss"] for e in quick.all("train")] == [e["loss"] for e in warmed.all("train")]
    assert quick.artifact.read_bytes() == warmed.artifact.read_bytes()
    assert "warmup_step:2/2\n" in warmed.text


def test_warm_up_runs_all_functions_that_will_be_compiled(data):
    cfg = config(vocab_size=384, num_loops=1, loop_end=1, warmup_steps=2)
    run = make_run(cfg, ours.first_weights(cfg), data.holdout, data)
    weights, lines = run.weights, []
    ours.warm_up(
        dataclasses.replace(run, log=lines.append, gradient_functions=run.gradient_functions)
    )
    assert set(run.gradient_functions) == {(False, False), (True, False)} and lines == [
        "warmup_step:1/2",
        "warmup_step:2/2",
    ]
    assert run.weights is weights and not run.model.looping


def test_max_wallclock_seconds_ends_a_run(train_here, tmp_path):
    changes = dict(ITERATIONS=100_000, MAX_WALLCLOCK_SECONDS=6, HOLDOUT_TOKENS=512)
    run = train_here(tmp_path, **QUICK | changes | dict(SWA_START_FRAC=0.1, SWA_EVERY=1))
    stop = re.search(
        r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$", run.text, re.M
    )
    # The averages were compared after the last step, and within the clock.
    chosen = re.search(r"^chosen:train_time:(\d+)ms reserve:(\d+\.\d+)s( over.*)?$", run.text, re.M)
    reserve = 1000 * float(chosen[2])
    assert int(stop[2]) > 1 and int(stop[1]) < int(chosen[1])
    assert int(stop[1]) <= 6000 - reserve + 300 and (int(chosen[1]) > 6000) == bool(chosen[3])
    assert run.text.index("averages:last:") < chosen.start()


def test_a_clock_too_short_for_the_choices_is_refused(data, monkeypatch):
    run = make_run(
        cfg := config(vocab_size=384, max_wallclock_seconds=0.3),
        ours.first_weights(cfg),
        data.holdout,
        data,
    )
    with pytest.raises(UserError, match="at its end need 0.2 s, more than half; raise it, or low"):
        ours.warm_up(dataclasses.replace(run, log=lambda *_, **__: None))


def stop_in_process(trainer_env, folder: Path, signum: int) -> tuple[int, str]:
    """Start a process, send it a signal at step 5, and return its exit code and the last lines."""
    process = start(trainer_env, folder, **LONG)
    try:
        for line in process.stdout:
            if line.startswith("step:5/"):
                process.send_signal(signum)
                break
        rest, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert error == ""
    return process.returncode, rest


def stop_here(trainer_env, folder: Path, signum: int) -> tuple[int, str]:
    """Do the same in this process: it sends itself the signal when step 5 is printed."""

    class Screen(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step:5/"):
                signal.raise_signal(signum)
            return super().write(text)

    screen, error = Screen(), io.StringIO()
    with (
        signals_restored(),
        contextlib.redirect_stdout(screen),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as stop,
    ):
        ours.main(trainer_env(folder, **LONG))
    assert error.getvalue() == ""
    return stop.value.code, screen.getvalue()


@pytest.mark.parametrize(
    ("signum", "stop"),
    [
        (signal.SIGINT, stop_here),
        pytest.param(signal.SIGTERM, stop_in_process, marks=pytest.mark.slow),
    ],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_stopped_run_resumes_to_the_same_bits(
    signum, stop, uninterrupted, trainer_env, train_here, tmp_path
):
    code, text = stop(trainer_env, tmp_path, signum)
    assert code == 128 + signum and f"stopped by {signum.name}: RESUME=1 continues" in text
    assert (tmp_path / "checkpoint_mlx.pt").is_file() and not (
        tmp_path / "final_model.int6.ptz"
    ).exists()
    resumed = train_here(tmp_path, **LONG, RESUME=1, EVAL_STRIDE=24)
    assert 5 <= resumed.one("resume")["step"] < 12
    assert {e["step"]: e["loss"] for e in resumed.all("train")} == {
        e["step"]: e["loss"] for e in uninterrupted.all("train")
    }
    assert resumed.artifact.read_bytes() == uninterrupted.artifact.read_bytes()
    averages = [run.one("averages") | dict(time=0) for run in (resumed, uninterrupted)]
    assert averages[0] == averages[1] and set(averages[0]) >= {"last", "swa", "ema"}
    assert (
        resumed.one("qat")["step"] == 4 and resumed.one("loop")["step"] == 6
    )  # not switched on again
    assert resumed.one("sliding")["loss"] == uninterrupted.one("sliding")["loss"]


def test_resuming_a_finished_run_exports_it_again(uninterrupted, train_here, tmp_path):
    (tmp_path / "checkpoint_mlx.pt").write_bytes(
        (uninterrupted.folder / "checkpoint_mlx.pt").read_bytes()
    )
    again = train_here(tmp_path, **LONG, RESUME=1)
    assert again.artifact.read_bytes() == uninterrupted.artifact.read_bytes() and not again.all(
        "train"
    )


# ---- Refused runs ------------------------------------------------------------------------------
def test_resuming_with_other_settings_is_refused(uninterrupted, trainer_env):
    again = LONG | dict(RESUME=1, MATRIX_LR=0.5)
    assert refusal(trainer_env, uninterrupted.folder, **again) == (
        "MATRIX_LR is 0.5, but the checkpoint was made with 0.025; set it to that, or start again "
        "without RESUME"
    )


def test_resuming_on_other_shards_is_refused(uninterrupted, train_here, corpus, tmp_path):
    (tmp_path / "checkpoint_mlx.pt").write_bytes(
        (uninterrupted.folder / "checkpoint_mlx.pt").read_bytes()
    )
    with pytest.raises(
        UserError, match="has other shards than the checkpoint's run; set DATA_PATH"
    ):
        train_here(tmp_path, **LONG, RESUME=1, DATA_PATH=corpus.folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b[:999] + b"x" + b[1000:],
        lambda b: b"",
        lambda b: b"not a zip",
    ],
    ids=["cut", "flipped", "empty", "other"],
)
def test_a_damaged_checkpoint_is_refused(damage, uninterrupted, trainer_env, tmp_path):
    checkpoint = (uninterrupted.folder / "checkpoint_mlx.pt").read_bytes()
    (tmp_path / "checkpoint_mlx.pt").write_bytes(damage(checkpoint))
    assert "is damaged" in refusal(trainer_env, tmp_path, **LONG, RESUME=1)


def test_a_checkpoint_of_train_gpt_is_not_read(uninterrupted, trainer_env, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(
        (uninterrupted.folder / "checkpoint_mlx.pt").read_bytes()
    )
    assert "there is no" in refusal(trainer_env, tmp_path, **LONG, RESUME=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(MUON_WEIGHT_DECAY=0.1), "MUON_WEIGHT_DECAY=0.1 is no setting; did you mean MUON_WD?"),
        (dict(EVAL_STRIDES=8), "EVAL_STRIDES=8 is no setting; did you mean EVAL_STRIDE?"),
        (dict(EVAL_STRIDE=0), "EVAL_STRIDE is 0; it must be from 1"),
        (
            dict(EVAL_MODE="cached"),
            "EVAL_MODE is cached, but this trainer scores its artifact in sliding windows",
        ),
        (dict(EVAL_SEQ_LEN=128), "EVAL_SEQ_LEN is 128, but this trainer"),
        (
            dict(DEVICE="cuda"),
            "DEVICE is cuda; this trainer is for Apple Silicon: use train_gpt.py",
        ),
        (dict(WORLD_SIZE=2), "WORLD_SIZE is 2; this trainer uses one Mac"),
        (dict(PRESET="large"), "PRESET is 'large'; it must be one of cpu, "),
        (dict(MODEL_DIM=65), "MODEL_DIM is 65; it must be a multiple of NUM_HEADS=4"),
        (dict(DATA_PATH="nowhere"), "no *_train_*.bin in nowhere"),
        (dict(RESUME=1), "RESUME is 1, but there is no "),
    ],
    ids=lambda v: "" if isinstance(v, str) else str(v),
)
def test_wrong_settings_are_refused_in_one_line(settings, message, trainer_env, tmp_path):
    assert refusal(trainer_env, tmp_path, **QUICK | settings).startswith(message)


@pytest.mark.skipif(mx.metal.is_available(), reason="this is a Mac")
def test_a_missing_gpu_is_refused(trainer_env, tmp_path):
    assert refusal(trainer_env, tmp_path, **QUICK | dict(DEVICE="mps")) == (
        "DEVICE is mps, but MLX finds no Apple GPU; unset DEVICE"
    )


def test_a_model_that_cannot_fit_is_refused_before_it_trains(trainer_env, train_here, tmp_path):
    code = train_gpt.packed_code_bytes([train_gpt.__file__, SCRIPT])
    with pytest.raises(UserError, match="more than SIZE_BUDGET_BYTES="):
        train_here(
            tmp_path,
            **QUICK | dict(MODEL_DIM=64),
            SIZE_BUDGET_BYTES=code + 10_000,
            SIZE_MARGIN_BYTES=0,
        )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"),
            "set MICRO_BATCH_TOKENS to half",
        ),
        (
            RuntimeError("Command buffer execution failed: Insufficient Memory (00000008)"),
            "set MICRO_BATCH_TOKENS to half",
        ),
        (MemoryError(), "out of memory; set MICRO_BATCH_TOKENS"),
        (OSError(28, "No space left"), "No space left"),
    ],
    ids=str,
)
def test_errors_are_one_line_with_advice(error, message, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(ours, "main", fail)
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    assert ours.run_main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train_gpt_mlx: error: ") and message in line


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(ours, "main", lambda: [][0])
    monkeypatch.setattr(sys, "argv", [SCRIPT])
    with pytest.raises(IndexError):
        ours.run_main()


def test_a_loss_that_is_not_finite_ends_the_run(train_here, tmp_path):
    with pytest.raises(
        UserError, match=r"the loss of step \d is not finite; the last checkpoint: None; lower"
    ):
        train_here(tmp_path, **QUICK | dict(MATRIX_LR=1e30, TIED_EMBED_LR=1e30, GRAD_CLIP_NORM=0))


# ---- The file itself ---------------------------------------------------------------------------
def test_without_mlx_help_works_and_a_run_says_what_to_install(tmp_path):
    """One process starts the script three times, because importing torch takes two seconds."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'mlx'\")"
    )
    code = f"""
import runpy, sys
for words in (["--help"], ["--hepl"], []):
    sys.argv[1:] = words
    try:
        runpy.run_path({SCRIPT!r}, run_name="__main__")
    except SystemExit as stop:
        print(f"exit code {{stop.code}}", flush=True)
"""
    env = dict(PATH=os.environ["PATH"], PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    help_text, *exits = re.split(r"exit code ", done.stdout)
    assert done.returncode == 0 and [int(code) for code in exits] == [0, 2, 1]
    assert "ITERATIONS" in help_text and "MICRO_BATCH_TOKENS" in help_text
    assert done.stderr.splitlines() == [
        "train_gpt_mlx: error: unknown option --hepl; did you mean --help?; "
        "see train_gpt_mlx.py --help",
        "train_gpt_mlx: error: No module named 'mlx'; pip install -r requirements-apple.txt",
    ]


def test_importing_reads_no_environment_and_prints_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import train_gpt_mlx"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=dict(PATH=os.environ["PATH"], OMP_NUM_THREADS="1", PRESET="nonsense", ITERATIONS="-5"),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and list(
        tmp_path.iterdir()
    ) == []


def test_help_lists_every_setting_and_the_differences(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--help"])
    assert ours.run_main() == 0
    text = capsys.readouterr().out
    assert {f.name.upper() for f in fields(Config)} | {"PRESET", "EVAL_STRIDE"} <= {
        line.split()[0] for line in text.splitlines() if line.strip()
    }
    assert "checkpoint_mlx.pt" in text and "mx.compile" in text
    assert set(ours.HELP) <= {f.name for f in fields(Config)} | {"eval_stride", "eval_documents"}


def test_every_setting_is_read():
    """A setting counts as read in this file, or in the functions of train_gpt that it calls."""
    trees = {m: ast.parse(inspect.getsource(m)) for m in (ours, train_gpt)}
    theirs = {
        n.name: n for n in trees[train_gpt].body if isinstance(n, ast.FunctionDef | ast.ClassDef)
    }
    left_out = {"GPT", "make_optimisers", "set_up", "main", "train", "take_step", "Config", "Run"}

    def read(tree):
        return {
            n.attr
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute)
            and (
                isinstance(n.value, ast.Name)
                and n.value.id == "cfg"
                or isinstance(n.value, ast.Attribute)
                and n.value.attr == "cfg"
            )
        }

    def names(tree):
        return {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}

    (passes,) = (n for n in theirs["GPT"].body if getattr(n, "name", "") == "passes")
    settings_read, seen = read(trees[ours]) | read(passes), set()  # MLX's GPT has this method too
    todo = {
        a.name
        for n in ast.walk(trees[ours])
        if isinstance(n, ast.ImportFrom) and n.module == "train_gpt"
        for a in n.names
    } | {
        n.attr
        for n in ast.walk(trees[ours])
        if isinstance(n, ast.Attribute)
        and isinstance(n.value, ast.Name)
        and n.value.id == "train_gpt"
    }
    while todo := (todo & theirs.keys()) - seen - left_out:
        name = todo.pop()
        seen.add(name)
        settings_read |= read(theirs[name])
        todo |= names(theirs[name])
    # One rank, whose passes are eighths: MLX has no other sums.
    assert {f.name for f in fields(Config)} - settings_read == {"exact_sums"}


def test_sliding_scores_each_token_once_as_planned(data):
    """The model's loss of a token is the token itself, so the mean shows what was scored."""
    cfg, shapes = config(vocab_size=384), []

    class Model:
        def __call__(self, x, y):
            shapes.append(x.shape)
            return y.astype(mx.float32)

    for length in (2, 3, 16, 17, 18, 30, 500):
        tokens = np.arange(1, length + 1)
        for stride in (1, 3, 16, 64):
            got = ours.sliding_nats(Model(), tokens, cfg, ours.EvalConfig(eval_stride=stride))
            assert got == pytest.approx(np.arange(2, length + 1).mean())
    assert {shape[1] for shape in shapes} == {16}


@pytest.mark.slow
def test_compiled_code_takes_the_same_steps(train_here, trainer_env, tmp_path):
    """Slow on Linux only, where MLX compiles each kernel with g++."""
    settings = QUICK | dict(ITERATIONS=2, NUM_LAYERS=1, GPTQ=0, EVAL_STRIDE=64)
    start_time, plain = time.monotonic(), train_here(tmp_path / "plain", **settings)
    process = start(
        trainer_env, tmp_path / "compiled", **settings | dict(MLX_DISABLE_COMPILE=None, COMPILE=1)
    )
    try:
        text, error = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, error
    assert "compile:mx.compile" in text and time.monotonic() - start_time < 900
    assert [e["loss"] for e in Finished(tmp_path / "compiled", text).all("train")] == pytest.approx(
        [e["loss"] for e in plain.all("train")], abs=1e-5
    )
