"""`fairway plan`: the trainer's settings, the counts, the published runs, the log, the page."""

import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
from fairway.cli import main
from fairway.command_line import UsageError
from fairway.planning import front
from fairway.planning.evaluation_time import VAL_TOKENS
from fairway.planning.fitting import fitted_memory, fitted_rates, step_error
from fairway.planning.machines import GPUS, parse_machine
from fairway.planning.memory_need import KEPT, training_bytes
from fairway.planning.planned_run import plan_data, plan_run
from fairway.planning.published import FITTED_MACHINE, published_runs
from fairway.planning.roofline import RATES, stages, step_time
from fairway.planning.size_budget import code_bits, model_bytes_at, size_plan
from fairway.planning.trainer_settings import read_settings
from fairway.planning.workload import count_parameters, work_of_pass

H100 = parse_machine("8xh100")
RECORD = ROOT / "records/track_non_record_16mb/2026-11-30_CPU_150s/train_seed42.log"


def plan_of(preset="consensus", words=(), gpus="8xh100"):
    return plan_run(preset, read_settings(preset, words), parse_machine(gpus), VAL_TOKENS)


# ==== SETTINGS ====================================================================================
def test_settings_are_the_trainers():
    for preset, values in train_gpt.PRESETS.items():
        assert asdict(read_settings(preset, [])) == asdict(train_gpt.Config(**values))
    assert read_settings("cpu", ["PRESET=smoke", "GPTQ=1"]).gptq


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("MUON_WEIGHT_DECAY=1", "did you mean MUON_WD?"),
        ("NUM_LAYER=3", "did you mean NUM_LAYERS?"),
        ("NUM_LAYERS=three", "must be a whole number"),
        ("NUM_HEADS=7", "a multiple of NUM_HEADS=7"),
        ("ROPE_DIMS=3", "even, at most 64"),
        ("VOCAB_SIZE=70000", "from 4 to 65536"),
        ("PRESET=no", "must be one of cpu"),
        ("SOMETHING_ELSE=1", "SOMETHING_ELSE is no setting"),
        ("frontier", "write NAME=value"),
    ],
)
def test_a_wrong_setting_is_one_line(word, message, capsys):
    assert main(["plan", word]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_planning_imports_no_torch_and_answers_at_once():
    code = "import sys; from fairway.cli import main; main(['plan']); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.splitlines()[-1].split()
    assert "fairway.planning.front" in loaded
    assert not {"torch", "numpy", "train_gpt"} & set(loaded)


# ==== COUNTS ======================================================================================
@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("baseline", []),
        ("consensus", []),
        ("frontier", []),
        ("frontier", ["MLP_MULT=2.7", "NUM_KV_HEADS=2", "PARALLEL_START_LAYER=3", "NUM_LOOPS=3"]),
        ("smoke", ["ATTN_GATE=1", "NUM_HEADS=8", "BIGRAM_VOCAB_SIZE=0", "SMEAR_GATE=0"]),
        ("consensus", ["SKIP_GATES=1"]),
    ],
)
def test_parameters_are_those_of_the_model(preset, words):
    cfg = read_settings(preset, words)
    with torch.device("meta"):
        model = train_gpt.GPT(train_gpt.Config(**asdict(cfg)))
    sizes = [p.numel() for p in model.parameters()]
    held = count_parameters(cfg)
    assert (held.total, held.tensors) == (sum(sizes), len(sizes))


SMALL_FRONTIER = ["VOCAB_SIZE=1024", "MLP_MULT=3", "BIGRAM_VOCAB_SIZE=2048"]


@pytest.mark.parametrize(
    ("preset", "words", "looping", "gigabytes"),
    [
        ("consensus", [], False, 69.7),
        ("frontier", SMALL_FRONTIER, False, 96.2),
        ("frontier", SMALL_FRONTIER, True, 146.7),
        ("frontier", ["BIGRAM_VOCAB_SIZE=2048"], False, 106.2),
    ],
)
def test_traffic_is_that_of_the_compiled_graph(preset, words, looping, gigabytes):
    """The figures were counted in the graph that Inductor compiles for 98,304 tokens."""
    work = work_of_pass(read_settings(preset, words), looping)
    assert work.traffic_bytes * 98_304 / 1e9 == pytest.approx(gigabytes, rel=0.02)


def test_products_are_six_flops_for_each_weight_that_multiplies():
    cfg = read_settings("baseline", [])
    matrices = sum(r * c for r, c in count_parameters(cfg).matrices) + 1024 * 512
    assert work_of_pass(cfg, False).product_flops == 6 * matrices
    # Four FLOPs forward and ten backward for each of the 512 pairs a token sees on average.
    assert work_of_pass(cfg, False).attention_flops == 9 * 14 * 512 * 512


def test_the_size_is_the_trainers_own_prediction():
    words = ["ATTN_BITS=6", "MLP_BITS=5", "EMBED_BITS=7"]
    cfg = read_settings("smoke", words)
    state = {
        name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in train_gpt.GPT(train_gpt.Config(**asdict(cfg))).named_parameters()
    }
    for k in (2.5, 4.0, 9.0, 30.0):
        trainers = train_gpt.predicted_bytes(state, k, cfg)
        assert model_bytes_at(cfg, k) == pytest.approx(trainers, rel=0.01)


def test_k_spends_the_budget_and_no_more():
    cfg = read_settings("consensus", [])
    plan = size_plan(cfg)
    room = cfg.size_budget_bytes - cfg.size_margin_bytes
    assert plan.fits and 0.999 * room < plan.total_bytes <= room
    assert code_bits(10.0, 6) == pytest.approx(7.05 - math.log2(10), abs=0.1)
    assert plan.error == pytest.approx(plan.k / 107, rel=0.01)
    small, large = (
        size_plan(read_settings("cpu", [])),
        size_plan(read_settings("consensus", ["NUM_LAYERS=200"])),
    )
    assert small.k == train_gpt.LEAST_K[6] and small.total_bytes < 1_200_000
    assert not large.fits and large.k == 64


# ==== PUBLISHED RUNS ==============================================================================
def test_every_second_run_is_held_out_in_the_order_of_pull_requests():
    runs = [run for run in published_runs() if run.machine.name == FITTED_MACHINE]
    assert len(runs) >= 20
    assert [r.pull_request for r in runs] == sorted(r.pull_request for r in runs)
    assert [r.held_out for r in runs] == [i % 2 == 1 for i in range(len(runs))]
    assert all(r.held_out for r in published_runs() if r.machine.name != FITTED_MACHINE)


def test_shapes_have_the_parameters_that_the_logs_print():
    """Value embeddings (#414 to #1394) and untied MLPs (#1204) are parts that we do not have."""
    for run in published_runs():
        least = 0.88 if run.pull_request == 1204 else 0.983
        assert least < count_parameters(run.cfg).total / run.parameters <= 1.0005, run.folder


@pytest.mark.parametrize("held_out", [False, True])
def test_predicted_step_times_are_near_the_published_ones(held_out):
    errors = [abs(step_error(r, RATES)) for r in published_runs() if r.held_out == held_out]
    assert statistics.median(errors) <= 0.15
    assert max(errors) <= 0.30


def test_predicted_memory_is_near_the_published_one():
    for run in published_runs():
        if run.peak_mib:
            need = training_bytes(run.cfg, run.machine.count) / 2**20
            assert need == pytest.approx(run.peak_mib, rel=0.05), run.folder


def test_constants_are_what_the_fitted_half_gives():
    runs = published_runs()
    assert fitted_rates(runs) == pytest.approx(RATES, rel=0.03)
    assert fitted_memory(runs) == pytest.approx(KEPT, rel=0.03)
    altered = [r._replace(step_ms=2 * r.step_ms) if r.held_out else r for r in runs]
    assert fitted_rates(altered) == fitted_rates(runs)


# ==== PROPERTIES ==================================================================================
@st.composite
def setting_words(draw):
    """Words of a valid setting of every kind that the plan reads."""
    heads = draw(st.sampled_from([1, 2, 4, 8]))
    layers, length = draw(st.integers(1, 40)), draw(st.sampled_from([2, 48, 256, 1024, 4096]))
    first = draw(st.integers(0, layers - 1))
    values = dict(
        NUM_LAYERS=layers,
        MODEL_DIM=heads * draw(st.sampled_from([8, 64, 128])),
        NUM_HEADS=heads,
        NUM_KV_HEADS=draw(st.sampled_from([1, heads])),
        MLP_MULT=draw(st.floats(0.25, 16)),
        VOCAB_SIZE=draw(st.integers(4, 65_536)),
        TRAIN_SEQ_LEN=length,
        TRAIN_BATCH_TOKENS=8 * length * draw(st.integers(1, 100)),
        MICRO_BATCH_TOKENS=draw(st.sampled_from([0, 1, 5000])),
        BIGRAM_VOCAB_SIZE=draw(st.sampled_from([0, 2, 4096])),
        SMEAR_GATE=draw(st.integers(0, 1)),
        ATTN_GATE=draw(st.integers(0, 1)),
        SKIP_GATES=draw(st.integers(0, 1)),
        XSA_LAST_N=draw(st.sampled_from([0, 256])),
        ROPE_DIMS=draw(st.sampled_from([0, 4])),
        PARALLEL_START_LAYER=draw(st.integers(0, 50)),
        LOOP_START=first,
        LOOP_END=draw(st.integers(first, layers - 1)),
        NUM_LOOPS=draw(st.integers(0, 3)),
        LOOP_AT_FRAC=draw(st.sampled_from([0, 0.35, 1])),
        QAT_START_FRAC=draw(st.sampled_from([0, 0.5, 1])),
        EMA_DECAY=draw(st.sampled_from([0, 0.99])),
        GPTQ=draw(st.integers(0, 1)),
        ITERATIONS=draw(st.sampled_from([1, 9000, 10**9])),
        MAX_WALLCLOCK_SECONDS=draw(st.sampled_from([0, 11, 600])),
        ATTN_BITS=draw(st.integers(2, 8)),
        EMBED_TOKENIZER=draw(st.integers(0, 1)),
    )
    return {name: str(value) for name, value in values.items()}


def numbers(value):
    """Yield every number of nested JSON."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


@given(setting_words(), st.sampled_from(sorted(GPUS)), st.sampled_from([1, 2, 4, 8]))
def test_any_valid_setting_gives_finite_positive_numbers(words, gpu, count):
    texts = [f"{name}={value}" for name, value in words.items()]
    plan = plan_of("baseline", texts, f"{count}x{gpu}")
    data = plan_data(plan)
    assert all(math.isfinite(n) and n >= 0 for n in numbers(data))
    assert plan.step_seconds > 0 and plan.train_seconds > 0 and data["tokens"] >= 0
    assert min(*plan.memory_bytes.values(), *plan.evaluation.values(), plan.size.k) > 0
    limit = float(words["MAX_WALLCLOCK_SECONDS"])
    assert plan.steps <= float(words["ITERATIONS"]) * (1 + 1e-9)
    assert not limit or plan.train_seconds <= limit * (1 + 1e-9)
    assert all(len(line) <= 100 for line in front.plan_text(plan).split("\n"))


@given(setting_words(), st.sampled_from(["1x4090", "8xh100"]))
def test_more_layers_never_cost_less(words, gpus):
    deeper = words | {"NUM_LAYERS": str(int(words["NUM_LAYERS"]) + 1)}
    if words["PARALLEL_START_LAYER"] > "0":  # the same layers keep two lanes
        deeper["PARALLEL_START_LAYER"] = words["PARALLEL_START_LAYER"]
    plans = [plan_of("baseline", [f"{n}={v}" for n, v in w.items()], gpus) for w in (words, deeper)]
    for looping in (False, True):
        times = [step_time(p.cfg, p.machine, looping).total for p in plans]
        assert times[0] < times[1]
    assert plans[0].parameters.total < plans[1].parameters.total
    for figure in ("memory_bytes", "evaluation"):
        for key, value in getattr(plans[0], figure).items():
            assert value <= getattr(plans[1], figure)[key] * (1 + 1e-12)
    assert plans[0].size.k <= plans[1].size.k * (1 + 1e-3)


def test_loops_and_rounding_start_where_the_settings_say():
    words = ["QAT_START_FRAC=0.5", "LOOP_AT_FRAC=0.25", "GPTQ=0"]
    parts = stages(read_settings("frontier", words), H100)
    assert [p.name for p in parts] == ["plain", "looped", "looped, rounded"]
    assert [p.seconds for p in parts] == pytest.approx([150, 150, 300])
    few = stages(read_settings("frontier", [*words, "ITERATIONS=100"]), H100)
    assert [p.steps for p in few] == pytest.approx([25, 25, 50])


def test_more_gpus_take_less_time_and_more_bandwidth_too():
    seconds = [plan_of(gpus=f"{n}xh100").step_seconds for n in (1, 2, 4, 8)]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] < 8 * seconds[3]
    assert plan_of(gpus="8xh200").step_seconds < plan_of().step_seconds


# ==== THE COMMAND =================================================================================
def test_the_page_answers_each_question(capsys):
    assert main(["plan", "--preset", "frontier", "--gpus", "8xH100", "VOCAB_SIZE=4096"]) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "bound by", "steps", "GB on", "k = ", "sliding", "$"):
        assert word in text
    assert "looped" in text and "at $20.00 an hour" in text


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (["--gpus", "1x4090", "MLP_MULT=4"], "MICRO_BATCH_TOKENS takes a pass in smaller parts"),
        (["NUM_LAYERS=200"], "does not fit even with k = 64"),
        (["--gpus", "1xh100"], "  over 600 s"),
    ],
)
def test_what_cannot_work_is_said(words, warning, capsys):
    assert main(["plan", "--preset", "frontier", *words]) == 0
    assert warning in capsys.readouterr().out
    assert main(["plan", "--preset", "consensus"]) == 0
    assert warning not in capsys.readouterr().out


def test_json_and_text_come_from_one_plan(capsys):
    assert main(["plan", "--json", "--dollars", "36", "--val-tokens", "1000"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["parameters"] == 26_829_913 and data["train_dollars"] == pytest.approx(6)
    assert data["val_tokens"] == 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "8xh10"], "known are h100, h200, a100"),
        (["--gpus", "3xh100"], "1, 2, 4 or 8"),
        (["--gpus", ""], "known are"),
        (["--dollars", "nan"], "--dollars nan"),
        (["--val-tokens", "0"], "--val-tokens 0"),
        (["ITERATIONS=1" + 400 * "0", "MAX_WALLCLOCK_SECONDS=0"], "too large to plan"),
        (["--log", "README.md"], "no line of a training step"),
        (["--log", "no.txt"], "no.txt"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["plan", *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_machines_are_named_as_people_write_them():
    assert parse_machine(" 2xA100 ").name == "2xa100" and parse_machine("h200").count == 1
    with pytest.raises(UsageError, match="did you mean h100"):
        parse_machine("8xh1000")


def h100_log(path: Path, **changed) -> Path:
    """Write a log such as our trainer writes on eight H100."""
    cfg = asdict(read_settings("consensus", [])) | changed
    parameters = count_parameters(train_gpt.Config(**cfg)).total
    path.write_text(
        f"settings: {json.dumps(cfg)}\n"
        "run_id:x preset:consensus device:NVIDIA H100 80GB HBM3 torch:2.13.0\n"
        f"code_sha256:{64 * '0'}\n"
        f"model_params:{parameters}\nworld_size:8 grad_accum_steps:1\n"
        "step:7000/9000 train_loss:1.9000 train_time:588000ms step_avg:84.00ms tok/s:9362286\n"
        "peak memory allocated: 20480 MiB reserved: 20500 MiB\n"
        "Serialized model int6+ans: 15900000 bytes (k:5.2 ratio:6.7x)\n"
        "Total submission size int6+ans: 15940000 bytes (budget:16000000 left:60000)\n"
    )
    return path


def test_a_log_of_ours_brings_settings_and_machine(tmp_path, capsys):
    log = h100_log(tmp_path / "run.txt", mlp_mult=4.0)
    assert main(["plan", "--json", "--log", str(log)]) == 0
    data = json.loads(capsys.readouterr().out)
    measured = {row["name"]: row["measured"] for row in data["compared"]}
    predicted = {row["name"]: row["predicted"] for row in data["compared"]}
    assert measured["ms a step"] == pytest.approx(84)
    assert measured["steps"] == 7000 and measured["bytes of the artifact"] == 15_900_000
    assert measured["GB at the peak"] == pytest.approx(20480 * 2**20 / 1e9)
    assert predicted["parameters"] > 30e6  # MLP_MULT=4 of the log, not the preset's 3
    assert main(["plan", "--log", str(log)]) == 0
    text = capsys.readouterr().out
    assert "measured / predicted" in text and "NVIDIA H100" in text and "8xh100" in text
    assert all(len(line) <= 100 for line in text.split("\n"))
    assert "parameters differ" not in text
    assert main(["plan", "--log", str(log), "NUM_LAYERS=12"]) == 0  # words override the log
    assert "parameters differ" in capsys.readouterr().out


def test_a_log_of_another_trainer_takes_settings_from_the_command(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text(
        "model_params:17059912\nworld_size:8 grad_accum_steps:1\n"
        "|   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |       0 |\n"
        "seed:1337\nstep:13780/20000 train_loss:2.0606 train_time:600038ms step_avg:43.54ms\n"
        "final_sliding_window val_loss:2.0100 val_bpb:1.1900 eval_time:70000ms\n"
    )
    words = ["--gpus", "8xh100", "--preset", "baseline", "--log", str(log), "--json"]
    assert main(["plan", *words]) == 0
    data = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in data["compared"]]
    assert data["compared"][0]["predicted"] == data["compared"][0]["measured"] == 17_059_912
    assert "s of sliding windows" in names and "GB at the peak" not in names


def test_times_of_another_machine_are_not_compared(capsys):
    assert main(["plan", "--log", str(RECORD)]) == 0
    text = capsys.readouterr().out
    assert "ms a step" not in text and "another machine" in text
    row = next(line for line in text.splitlines() if line.startswith("parameters"))
    assert row.endswith("1.000")
