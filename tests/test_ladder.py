"""The ladder of techniques: its rungs, its runs, and the statistics of its table."""

import json
import math
import shutil
from concurrent.futures import Future
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT, own_signals

from fairway.command_line import run_reporting
from fairway.methods import harness
from train_gpt import GPT, PRESETS, Config, parse_settings

with pytest.MonkeyPatch.context() as patch:  # the modules of a bench import each other by name
    patch.syspath_prepend(ROOT / "bench")
    import ladder
    import ladder_table
    import rungs

SHAPES = pytest.mark.parametrize("shape", rungs.SHAPES.values(), ids=rungs.SHAPES)


def config(shape: rungs.Shape, variant: rungs.Variant) -> dict:
    env = shape.settings() | variant.settings | {"PRESET": rungs.BASELINE}
    return asdict(Config.from_env(env, ""))


def differing(a: dict, b: dict) -> set[str]:
    return {name.upper() for name in a if a[name] != b[name]}


# ==== RUNGS =======================================================================================
def test_the_ends_of_the_ladder_are_the_presets():
    shape = rungs.SHAPES["cpu"]
    built = {v.name: config(shape, v) for v in rungs.cumulative(shape)}
    of_shape = parse_settings(Config, shape.settings())
    wanted = asdict(Config(**PRESETS["consensus"] | of_shape))
    own = {"ITERATIONS", "SWA_START_FRAC"}
    assert differing(built["consensus"], wanted) == own
    assert differing(built["baseline"], asdict(Config())) <= {*rungs.SHAPE_NAMES, "ITERATIONS"}
    frontier = {n.upper(): v for n, v in PRESETS["frontier"].items()}
    for rung in rungs.FRONTIER:
        for name, value in rungs.words(rung.settings).items():
            assert float(frontier[name]) == float(value), rung.name


@SHAPES
def test_each_rung_changes_its_settings_and_no_others(shape):
    variants = rungs.cumulative(shape)
    assert len({v.name for v in variants}) == len(rungs.rungs_of(shape)) + 1
    for below, variant, rung in zip(variants, variants[1:], rungs.rungs_of(shape), strict=False):
        changed = differing(config(shape, below), config(shape, variant))
        assert changed == rungs.rung_settings(shape, rung).keys(), rung.name
        assert variant.below == below.name and variant.case - below.case == rung.case


@SHAPES
def test_leaving_one_out_changes_its_settings_and_no_others(shape):
    left = {r.name: rungs.rung_settings(shape, r).keys() for r in rungs.rungs_of(shape)}
    top = config(shape, rungs.variants_of(shape)["frontier"])
    left_out = rungs.leave_one_out(shape)
    for variant in left_out:
        name = variant.name.removeprefix(rungs.WITHOUT)
        assert differing(config(shape, variant), top) == left.pop(name), name
        assert variant.case == (name != "case")
    # What later rungs replace cannot be left out.
    assert left.keys() == {"rates", "bigram", "mlp3", "qat", "swa", "ortho"}


@SHAPES
def test_one_more_changes_its_settings_and_no_others(shape):
    rest = {r.name: rungs.rung_settings(shape, r).keys() for r in rungs.LATER}
    top = config(shape, rungs.variants_of(shape)["frontier"])
    for variant in rungs.one_more(shape):
        name = variant.name.removeprefix(rungs.WITH)
        assert differing(config(shape, variant), top) <= rest.pop(name), name
    assert rest.keys() == set(shape.top.split())


def test_cpu4_has_four_times_the_weights():
    def weights(name: str) -> int:
        shape = rungs.SHAPES[name]
        with torch.device("meta"):
            model = GPT(Config(**config(shape, rungs.variants_of(shape)["consensus"])))
        return sum(p.numel() for p in model.parameters())

    assert 3.7 < weights("cpu4") / weights("cpu") < 4.3


def test_variants_are_chosen_by_groups_and_by_names():
    shape = rungs.SHAPES["cpu"]

    def names(text: str) -> list[str]:
        return [v.name for v in rungs.chosen_variants(text, shape)]

    assert names("ends") == ["baseline", "consensus", "frontier"]
    assert names("without-polar, frontier,without-polar") == ["without-polar", "frontier"]
    assert names("with-loops") == ["with-loops"] and "with-rope" in names("one-more")
    assert names("ladder")[:3] == ["baseline", "int6", "mlp3"]
    assert names("leave-one-out")[:2] == ["frontier", "without-int6"]


# ==== STATISTICS ==================================================================================
def test_p_is_welchs_of_two_sides():
    """The distribution of t has a closed form for two and for four degrees of freedom."""
    d = ladder_table.welch_two_sided([1.0, 3.0], [2.0, 4.0])  # t = 1 / sqrt(2), df = 2
    assert d.bpb == -1 and math.isclose(d.p, 1 - math.sqrt(0.5) / math.sqrt(2.5), rel_tol=1e-9)
    assert ladder_table.welch_two_sided([2.0, 4.0], [1.0, 3.0]) == (1.0, pytest.approx(d.p))
    d = ladder_table.welch_two_sided(
        [1.0, 2.0, 3.0], [5.0, 6.0, 7.0]
    )  # t = 4 / sqrt(2 / 3), df = 4
    t = 4 / math.sqrt(2 / 3)
    x = t / math.sqrt(1 + t * t / 4)
    assert math.isclose(d.p, 1 - 3 / 4 * x * (1 - x * x / 12), rel_tol=1e-9)
    assert ladder_table.welch_two_sided([1.0], [2.0, 2.5]).p is None
    assert ladder_table.welch_two_sided([1.0, 1.0], [1.0, 1.0]) == (0.0, 1.0)


def made_up(variant: str, seed: int, bpb: float, **changes) -> dict:
    """Return the result of a run that was never done."""
    return {
        "shape": "cpu",
        "variant": variant,
        "seed": seed,
        "settings": rungs.SHAPES["cpu"].settings() | {"VOCAB_SIZE": "1024"},
        "data": "core",
        "seconds": 300.0,
        "steps": 0,
        "threads": 1,
        "stride": 64,
        "judge_documents": 0,
        "fingerprints": {},
        "device": "cpu",
        "environment": {
            "code_sha256": "a",
            "hardware": {"processor": "P", "cores": 2},
            "versions": {"torch": "2"},
        },
        "status": "done",
        "steps_taken": 100 + seed,
        "tokens_per_second": 1000.0,
        "artifact_bytes": 700_000,
        "judged": {"val": {"bpb": bpb, "tokens": 10, "bytes": 30}},
        **changes,
    }


def results_of(scores: dict[str, list[float]]) -> ladder_table.Results:
    return {n: [made_up(n, i, v) for i, v in enumerate(bpb)] for n, bpb in scores.items()}


def test_the_table_compares_each_rung_with_the_one_below():
    results = results_of(
        {
            "baseline": [2.0, 2.1],
            "int6": [2.0, 2.12],
            "consensus": [1.0, 1.01, 1.02],
            "frontier": [0.5, 0.51, 0.52],
            "without-polar": [0.6, 0.61, 0.62],
            "with-loops": [0.6, 0.61, 0.62],
        }
    )
    shape = rungs.SHAPES["cpu"]
    sections = ladder_table.sections_of(results, shape)
    below = {name: [(r.name, r.below) for r in rows] for name, rows in sections.items()}
    pairs = [("consensus", "baseline"), ("frontier", "consensus"), ("frontier", "baseline")]
    assert below["Ends"] == [("baseline", ""), *pairs]
    assert below["Ladder"][1:] == [("int6", "baseline"), ("consensus", "int6"), pairs[1]]
    assert below["Leave one out"] == [("frontier", ""), ("without-polar", "frontier")]
    assert below["One more"] == [("frontier", ""), ("with-loops", "frontier")]
    text = ladder_table.markdown(results)
    assert "| baseline | 0, 1 | 2.0500 ± 0.0707 | – | – | 100 | 1,000 | 700,000 |" in text
    assert "| + int6 | 0, 1 | 2.0600 ± 0.0849 | +0.0100 |" in text and ", not shown |" in text
    assert "| + swa = consensus against int6 | 0, 1, 2 |" in text
    assert "| − polar | 0, 1, 2 | 0.6100 ± 0.0100 | +0.1000 | 2.6e-04 |" in text
    assert "`frontier` beats `consensus` on val: -0.5000 BPB" in text
    assert "differ in" not in text and "Failed" not in text
    rows = ladder_table.table_json("g", results)["sections"]["Ladder"]
    assert rows[0]["differences"] == {} and rows[1]["differences"]["val"]["p"] > 0.5
    json.dumps(rows, allow_nan=False)


def test_the_table_says_how_far_judged_bytes_are_apart():
    results = results_of({"baseline": [2.0], "frontier": [1.0]})
    results["frontier"][0]["judged"]["val"]["bytes"] = 33
    text = ladder_table.markdown(results)
    assert "bytes between tokenizers: val by 10.00 %." in text and "val: 33" in text


def test_the_table_says_what_it_lacks():
    results = results_of({"baseline": [2.0], "consensus": [1.0, 1.1]})
    results["baseline"][0]["environment"] = results["baseline"][0]["environment"] | {
        "code_sha256": "b"
    }
    results["frontier"] = [made_up("frontier", 7, 0, status="failed", error="no | room")]
    text = ladder_table.markdown(results)
    assert "differ in code" in text and "`frontier.seed7`: no | room" in text
    assert "| frontier | failed: no / room |" in text
    assert "`consensus` is not shown to beat `baseline` on val: -0.9500 BPB, no p" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert "No run is done" in ladder_table.markdown({"frontier": results["frontier"]})


# ==== RUNS ========================================================================================
@pytest.fixture
def in_this_process(monkeypatch):
    """Run jobs here, because a process takes seconds to import what they need."""

    def submit(job: harness.Job) -> Future:
        with own_signals(120):
            ladder.run_here(ladder.LadderRun(**job.settings))
        future = Future()
        future.set_result(harness.read_cell(job.result))
        return future

    def run_cells(jobs: list[harness.Job], workers: int, reporter: harness.Reporter) -> None:
        harness.follow(jobs, submit, workers, reporter)

    monkeypatch.setattr(harness, "run_cells", run_cells)


@pytest.fixture
def bench(corpus, tmp_path, monkeypatch):
    """Return `bench(*words)`, which runs the script in this process, at the smoke shape."""

    def run(*words: str) -> int:
        common = ["--shape", "smoke", "--data", str(corpus.folder), "--judge-documents", "2"]
        common += ["--out", str(tmp_path / "out"), "--workers", "1"]
        monkeypatch.setattr("sys.argv", ["ladder.py", *common, *words])
        return run_reporting("bench/ladder", ladder.main)

    run.out = tmp_path / "out"
    return run


def test_runs_are_trained_scored_and_skipped(bench, corpus, in_this_process, capsys, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n")
    words = ["--steps", "4", "--variants", "baseline,frontier", "--seeds", "1,2"]
    words += ["--case-data", str(corpus.folder), "--bytes", "130000"]
    assert bench(*words, "--into", str(page)) == 0
    shown = capsys.readouterr().out
    assert "[4/4]" in shown
    assert "| frontier | 1, 2 |" in page.read_text()
    raw = next((bench.out / "raw").iterdir())
    assert len(list(raw.iterdir())) == 4
    result = json.loads((raw / "frontier.seed2.json").read_text())
    assert result["steps_taken"] == 4 and result["tokens"] == 4 * 2048
    assert result["judged"]["val"]["bytes"] > 100 and result["settings"]["EMBED_BITS"] == "6"
    assert result["total_bytes"] <= 130_000
    assert result["clock_seconds"] > result["training_seconds"] > 0
    assert str(ROOT) not in json.dumps(result) and str(tmp_path) not in json.dumps(result)
    files = bench.out / "files" / raw.name / "frontier.seed2"
    assert (files / "final_model.int6.ptz").stat().st_size == result["artifact_bytes"]
    assert not (files / "checkpoint.pt").exists()
    # One is cut, and scored again without training; another was of other settings.
    log = (files / "logs" / "train.jsonl").read_text()
    (raw / "frontier.seed2.json").write_text("{ cut")
    shutil.rmtree(bench.out / "files" / raw.name / "baseline.seed1")
    other = json.loads((raw / "baseline.seed1.json").read_text()) | {"stride": 1}
    (raw / "baseline.seed1.json").write_text(json.dumps(other))
    assert bench(*words) == 0
    assert "runs: 4, 2 of them left" in capsys.readouterr().out
    assert (files / "logs" / "train.jsonl").read_text() == log
    again = json.loads((raw / "frontier.seed2.json").read_text())
    assert again["judged"] == result["judged"]
    assert bench("--table") == 0


def test_a_run_that_fails_keeps_its_error_until_it_is_retried(bench, in_this_process, capsys):
    words = ["--seconds", "0.01", "--variants", "consensus", "--seeds", "1"]
    assert bench(*words) == 1
    assert "choices at its end need" in capsys.readouterr().out
    assert bench(*words) == 1
    assert "1, 0 of them left" in capsys.readouterr().out
    assert bench(*words, "--retry") == 1
    assert "1, 1 of them left" in capsys.readouterr().out


def test_an_interrupted_run_resumes(bench, in_this_process, monkeypatch, capsys):
    """Its result is that of a run that was never interrupted."""

    def interrupt(*_):
        raise KeyboardInterrupt

    words = ["--steps", "3", "--variants", "baseline", "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(ladder.train_gpt, "export", interrupt)
        assert bench(*words) == 130
    assert not list(bench.out.glob("raw/*/*"))
    assert bench(*words) == 0
    log = next(bench.out.glob("files/*/*/logs/train.txt"))
    assert log.read_text().count("\nresumed step:3 ") == 1
    result = next(bench.out.glob("raw/*/*"))
    resumed = json.loads(result.read_text())
    shutil.rmtree(bench.out)
    assert bench(*words) == 0
    again = json.loads(result.read_text())
    assert [resumed[n] for n in ("judged", "artifact_bytes", "tokens")] == [
        again[n] for n in ("judged", "artifact_bytes", "tokens")
    ]


@pytest.mark.parametrize(
    "more, message",
    [
        ([], "needs one of --seconds, --steps and --tokens; none is given"),
        (["--steps", "2", "--seconds", "3"], "--seconds and --steps: give one"),
        (["--tokens", "5"], "--tokens is 5, less than a step of 2048"),
        (["--steps", "-5"], "--steps is -5; it must be above 0"),
        (["--steps", "2", "--variants", "consensu"], "did you mean consensus?"),
        (["--steps", "2", "--variants", ","], "names no variant"),
        (["--steps", "2", "--seeds", "1,x"], "--seeds is '1,x'"),
        (["--steps", "2", "--data", "/"], "no *_train_*.bin in /"),
        (["--steps", "2", "--judges", "val"], "it must be NAME=PATTERN"),
        (["--steps", "2", "--judges", "val=nothing*"], "no shards match nothing*"),
        (["--steps", "2", "--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--steps", "2", "--variants", "frontier"], "frontier has the rung `case`; give"),
        (["--steps", "2", "--tokenizer", __file__], "is no SentencePiece model; name another"),
        (["--steps", "2", "--tokenizer", "/none"], "--data: no tokenizer /none; write it"),
        (["--steps", "2", "--case-data", "/"], "--case-data: no *_train_*.bin in /"),
        (["--steps", "2", "--into", "nothing.md"], "nothing.md is no file"),
        (
            ["--seconds", "2", "--variants", "consensus", "--workers", "999"],
            "--workers 999 with --threads 1 need more",
        ),
        (["--table"], "no results in"),
        (["--shap", "cpu"], "did you mean --shape?"),
    ],
)
def test_wrong_words_are_one_line(bench, more, message, capsys):
    assert bench(*more) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_list_names_each_variant_with_its_settings(bench, capsys):
    assert bench("--list") == 0
    shown = capsys.readouterr().out
    assert "without-polar" in shown and "MUON_POLAR_EXPRESS=0" in shown
    assert "with-loops" in shown and "LOOP_START=1 LOOP_END=1 NUM_LOOPS=2" in shown


def test_a_run_is_open_when_its_texts_or_its_code_changed(tmp_path):
    run = ladder.LadderRun(
        shape="cpu",
        variant="baseline",
        settings={},
        seconds=0,
        steps=3,
        seed=1,
        data="a",
        tokenizer="a",
        judges={"val": "b"},
        fingerprints={"val": "c"},
        judge_documents=0,
        stride=64,
        threads=1,
        out=str(tmp_path / "raw" / "g"),
    )
    done = ladder.header(run) | {"status": "done"}
    old = done | {"environment": {"code_sha256": "old"}}
    for result, opened, retried in (
        (done, False, False),
        (done | {"status": "failed"}, False, True),
        (old, False, True),
        (done | {"fingerprints": {"val": "d"}}, True, True),
    ):
        harness.write_json(run.job().result, result)
        assert (ladder.is_open(run, False), ladder.is_open(run, True)) == (opened, retried)
    harness.write_json(run.job().result, done)
    assert not ladder.is_open(replace(run, data="elsewhere", judges={"val": "there"}), False)
