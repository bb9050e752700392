"""fairway/records/logs.py: every dialect gives its facts back, and any text gives a log."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.files import RecordError
from fairway.records.logs import (
    MOST_LINES,
    RunLog,
    parse_log,
    parse_number,
    parse_seconds,
    parse_whole,
    read_log,
)
from tests.zoo.records.dialects import SOURCE, RunFacts, april, baseline, march, our_eval, ours

DIALECTS = {"baseline": baseline, "march": march, "april": april, "fairway": ours}
FACTS = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 10**9),
        source=st.sampled_from([SOURCE, "", "import a\n\nclass B:\n    pass\n"]),
        artifact_bytes=st.integers(10**5, 16 * 10**6),
        code_bytes=st.integers(1, 10**6),
        loss=st.floats(1.8, 6),
        final_loss=st.floats(0.5, 1.7),
        step=st.integers(1, 3000),
        steps=st.integers(3001, 10**6),
        train_seconds=st.integers(1, 10**7).map(lambda n: n / 1000),
        gptq_seconds=st.integers(0, 999).map(lambda n: n / 10),
        reserved_seconds=st.integers(0, 500).map(float),
        eval_seconds=st.integers(261, 9999).map(lambda n: n / 10),
        tokens=st.integers(10**7, 10**8),
        bytes=st.integers(10**7, 10**9),
        vocab_size=st.sampled_from([256, 1024, 8192]),
        shards=st.integers(1, 2000),
        world_size=st.sampled_from([1, 2, 4, 8]),
        parameters=st.integers(1, 10**9),
    )
).map(lambda drawn: RunFacts(**drawn))


# ==== What is written is read =====================================================================
@pytest.mark.parametrize("dialect", DIALECTS)
@given(facts=FACTS)
def test_every_dialect_gives_its_facts_back(dialect, facts):
    log = parse_log(DIALECTS[dialect](facts))
    assert (log.dialect, log.source, log.seed, log.world_size) == (
        dialect,
        facts.source,
        facts.seed,
        facts.world_size,
    )
    assert (log.tokens, log.train_shards, log.parameters) == (
        facts.tokens,
        facts.shards,
        facts.parameters,
    )
    assert (log.last_step, log.planned_steps, log.train_seconds) == (
        facts.step,
        facts.steps,
        facts.train_seconds,
    )
    assert (log.artifact_bytes, log.code_bytes) == (facts.artifact_bytes, facts.code_bytes)
    assert (log.total_bytes, log.truncated, log.runs) == (facts.total_bytes, False, 1)
    loss = facts.loss if dialect in ("baseline", "fairway") else facts.final_loss
    assert log.final.loss == pytest.approx(loss, abs=6e-9) and log.final.exact
    assert log.final.bpb == pytest.approx(facts.bpb_of(loss), abs=6e-9)
    assert log.eval_seconds == pytest.approx(facts.eval_seconds, abs=0.002)
    assert log.vocab_size == (facts.vocab_size if dialect in ("april", "fairway") else None)
    assert log.val_bytes == (facts.bytes if dialect == "fairway" else None)
    gptq = (
        (facts.gptq_seconds, facts.reserved_seconds)
        if dialect in ("march", "april")
        else (None, None)
    )
    assert (log.calibration_seconds, log.times.get("gptq:reserving")) == gptq
    has_machine = facts.source or dialect == "fairway"
    assert log.hardware == (f"{facts.world_size}x {facts.gpu}" if has_machine else None)
    assert log.steps[0].loss == pytest.approx(math.log(facts.vocab_size), abs=1e-4)


@given(facts=FACTS)
def test_our_evaluation_gives_its_facts_back(facts):
    log = parse_log(our_eval(facts))
    assert (log.dialect, log.tokens, log.val_bytes) == ("fairway", facts.tokens, facts.bytes)
    assert (log.artifact_bytes, log.code_bytes, log.total_bytes) == (
        facts.artifact_bytes,
        facts.code_bytes,
        facts.total_bytes,
    )
    assert log.hashes == {"artifact": facts.artifact_sha256, "val": facts.val_sha256}
    assert log.final.loss == pytest.approx(facts.final_loss, abs=6e-9) and log.final.label == ""
    assert log.eval_seconds == pytest.approx(facts.eval_seconds) and log.train_seconds is None
    assert [s.label for s in log.scores if "ladder" in s.label or "ablation" in s.label] == []


def test_settings_and_hashes_of_our_logs():
    log = parse_log(ours(RunFacts(seed=7)))
    assert log.settings["gptq"] == "False" and log.settings["max_wallclock_seconds"] == "600.0"
    assert (
        log.hashes.keys() == {"code", "settings", "tokenizer", "data"}
        and log.hashes["data"] == "d" * 64
    )
    assert (
        log.settings["dataset"] == "fineweb10B_sp1024" and log.settings["tie_embeddings"] == "True"
    )


def test_lines_are_numbered_from_one_and_point_at_the_log():
    text = march(RunFacts())
    log, lines = parse_log(text), text.split("\n")
    assert lines[log.final.line - 1].startswith("final_int6_sliding_window_exact")
    assert lines[log.steps[0].line - 1].startswith("step:1/") and log.text_lines == len(lines) - 1
    assert lines[log.lines["gptq:calibrated"] - 1].startswith("gptq:calibrated 66")
    # Calibration came after the last step
    assert log.lines["stopping_early"] < log.lines["gptq:calibrated"]


# ==== What a log does not say is None =============================================================
def test_an_empty_log_says_nothing():
    log = parse_log("")
    said = {
        name: getattr(log, name)
        for name, value in vars(RunLog).items()
        if isinstance(value, property)
    }
    assert said.pop("truncated") is True and log.dialect == "unknown" and log.settings == {}
    assert set(said.values()) == {None}


def test_code_is_not_mistaken_for_log():
    """Code has print(f"…") lines like those of a log; here a docstring holds such a line."""
    code = SOURCE.replace(
        "language model.", "model.\nfinal_x val_loss:0.10000000 val_bpb:0.10000000\nseed:5"
    )
    log = parse_log(baseline(RunFacts(source=code, seed=3)))
    assert log.seed == 3 and log.final.label == "final_int8_zlib_roundtrip_exact"
    for cut in (code, f"{code}\n{'=' * 100}\n"):
        assert (
            parse_log(cut).final is None
            and parse_log(cut).seed is None
            and parse_log(cut).truncated
        )


def test_code_that_holds_a_rule_stays_one():
    code = SOURCE.replace("def main", f'RULE = """\n{"=" * 100}\n"""\ndef main')
    assert parse_log(march(RunFacts(source=code))).source == code


@pytest.mark.parametrize(
    "line, value",
    [
        ("final val_loss:nan val_bpb:NaN", None),
        ("final val_loss:1e999 val_bpb:-inf", None),
        (f"final val_loss:{'9' * 5000} val_bpb:{'9' * 5000}", None),
        ("final val_loss:１.５ val_bpb:１.１", None),
        ("final val_loss:1.5 val_bpb:1.2", 1.2),
        ("final val_loss: 1.5 val_bpb: 1.2", 1.2),
        ("val_bpb:          1.12278022", None),
        ("a_label val_bpb:1.2", 1.2),
        (" final val_loss:1.5 val_bpb:1.2", None),
        ("step:1/2 val_loss:1.5 val_bpb:1.2", None),
        ("val_bpb:1.2 val_loss:1.5", 1.2),
        ("final stride:64 val_loss:1.5 val_bpb:1.2 eval_time:9ms", 1.2),
        ("ladder:x val_bpb:1.2", None),
        ("pre-quantization post-ema val_loss:1.5 val_bpb:1.2", None),
        ("DIAGNOSTIC x val_loss:1.5 val_bpb:1.2", None),
    ],
)
def test_lines_are_recognised_as_scores(line, value):
    final = parse_log(line + "\n").final
    assert (final.bpb if final else None) == value


@pytest.mark.parametrize(
    "text, want",
    [
        ("12", 12.0),
        ("-2e-5", -2e-5),
        ("1e400", None),
        ("0x1", None),
        ("", None),
        ("1" * 19, None),
        ("1_000", None),
        ("٣", None),
        ("1.5ms", None),
    ],
)
def test_numbers(text, want):
    assert parse_number(text) == want
    assert parse_whole(text) == (12 if text == "12" else None)


def test_times_have_units():
    assert [parse_seconds(t) for t in ("1401ms", "12.7s", "10.0m", "12.7", "s", "1e3s")] == [
        1.401,
        12.7,
        600,
        *[None] * 3,
    ]


# ==== Choices =====================================================================================
def test_the_claim_is_the_last_score_in_its_exact_form():
    lines = [
        "final_a val_loss:2.0 val_bpb:1.2 eval_time:1000ms",
        "final_a_exact val_loss:2.00000000 val_bpb:1.20000000",
        "final_b val_loss:1.9000 val_bpb:1.1000 eval_time:2500ms",
    ]
    log = parse_log("\n".join(lines) + "\n")
    assert log.final.label == "final_b" and not log.final.exact and log.eval_seconds == 3.5
    exact = "\n".join([*lines, "final_b_exact val_loss:1.90000001 val_bpb:1.10000001"])
    assert parse_log(exact).final.loss == 1.90000001
    assert parse_log("\n".join(lines[:2][::-1]) + "\n").final.label == "final_a_exact"


def test_evaluation_counts_all_scoring_but_diagnostics():
    text = april(RunFacts(eval_seconds=400))
    # Not the 7.4 s of the diagnostic before quantisation
    assert parse_log(text).eval_seconds == 400
    assert parse_log(text + "total_eval_time:700.5s\n").eval_seconds == 700.5
    # Less than its own parts: not believed
    assert parse_log(text + "total_eval_time:1.0s\n").eval_seconds == 400


def test_training_ends_at_the_last_stated_time():
    text = april(RunFacts(train_seconds=588.047))
    assert parse_log(text).train_seconds == 588.047
    assert parse_log(re.sub("stopping_early.*\n", "", text)).train_seconds == 588.0  # 9.8 minutes
    late = ours(RunFacts()).replace(
        "averages:", "gptq:collected 9 Hessians train_time:612000ms\naverages:"
    )
    assert parse_log(late).train_seconds == 612.0


def test_a_total_with_the_raw_model_is_no_total():
    text = "Serialized model: 1000 bytes\nCode size: 10 bytes\nTotal submission size: 1010 bytes\n"
    assert (
        parse_log(text).total_bytes,
        parse_log(text).artifact_bytes,
        parse_log(text).code_bytes,
    ) == (None, None, 10)
    more = text + "Serialized model x+zstd: 300 bytes\nTotal submission size: 310 bytes\n"
    assert (parse_log(more).total_bytes, parse_log(more).artifact_bytes) == (310, 300)


def test_shapes_of_single_records():
    log = parse_log(
        "params:73 L:10 ws:8 s:7\n--- Hyperparameters ---\nseed=7 vocab_size=8192\nstep:1000/10000 "
        "loss:3.3114 t:91476ms avg:91.5ms\nstep:6530/10000 val_loss:3.05 val_bpb:1.18 "
        "train_time:599602ms\nartifact:15.92MB code:70853\nbudget:15992753/16000000 "
        "(15.99/16.00MB) FITS\nfinal_sliding val_loss:2.9901 val_bpb:1.1578 (stride=16, T=0.90) "
        "eval_time:429023ms\n"
    )
    assert (log.seed, log.vocab_size, log.parameters, log.world_size) == (7, 8192, 73, 8)
    assert (log.code_bytes, log.total_bytes, log.artifact_bytes, log.step_avg_ms) == (
        70853,
        15992753,
        None,
        91.5,
    )
    assert (log.train_seconds, log.eval_seconds) == (599.602, 429.023)
    stamped = "".join(
        f"1776142360.538 {line}\n" for line in april(RunFacts(source="")).splitlines()
    )
    assert parse_log(stamped).seed == 1337 and parse_log(stamped).dialect == "april"


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("source", ["", SOURCE])
def test_the_last_run_in_a_file_counts(dialect, source):
    first, last = (
        RunFacts(seed=1, loss=3, final_loss=2.9, source=source),
        RunFacts(seed=2, step=600, source=source),
    )
    both = parse_log(DIALECTS[dialect](first) + DIALECTS[dialect](last))
    alone = parse_log(DIALECTS[dialect](last))
    assert both.runs == 2 and both.seed == 2 and both.source == alone.source
    assert both.final.bpb == alone.final.bpb and both.eval_seconds == alone.eval_seconds
    assert [s.step for s in both.steps] == [
        s.step for s in alone.steps
    ] and both.total_bytes == alone.total_bytes


def test_a_run_that_was_resumed_is_one_run():
    """A resumed run appends to its log and repeats the steps after the checkpoint."""
    first = ours(RunFacts(step=2000)).split("step:2000/20000 train_loss")[0]
    again = ours(RunFacts(step=3000)).replace(
        "step:1/20000", "resumed step:1000 train_time:99ms\nstep:1001/20000"
    )
    log = parse_log(first + re.sub(r"step:(2|500|1000)/20000.*\n", "", again))
    assert [s.step for s in log.steps] == [
        1,
        2,
        500,
        1000,
        1001,
        1500,
        2000,
        2500,
        3000,
        3000,
    ] and log.runs == 1
    assert log.train_seconds == RunFacts().train_seconds and log.final.exact


# ==== Damage ======================================================================================
def test_truncated_logs_are_recognised():
    text = baseline(RunFacts())
    assert not parse_log(text).truncated and not parse_log(text[:-1]).truncated
    timed = text.rindex("eval_time")
    for cut in (
        text[:-3],
        text[: text.index("final_int8")],
        text[: len(text) // 2],
        text[: timed + 12],
    ):
        assert parse_log(cut).truncated


@given(data=st.data(), dialect=st.sampled_from([*DIALECTS.values(), our_eval]))
def test_a_damaged_log_gives_a_log(data, dialect):
    """Each field of a cut, doubled or overwritten log is what a log may say, or None."""
    text = dialect(RunFacts())
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.integers(0, len(text)))
        b = min(len(text), a + data.draw(st.integers(0, 2000)))
        text = data.draw(
            st.sampled_from(
                [
                    text[:a] + text[b:],
                    text[:b] + text[a:],
                    text[:a],
                    text[a:],
                    text[:a] + "\x00\ud800�９"[a % 4] + text[a + 1 :],
                    text[:a]
                    + data.draw(
                        st.sampled_from(
                            [":", "\n", "9" * 400, "e999", "=" * 100 + "\n", "nan", "\r", "-"]
                        )
                    )
                    + text[b:],
                ]
            )
        )
    check_types(parse_log(text))


@given(
    text=st.text(
        alphabet=st.sampled_from(list('step:/0123456789.\n =val_osbptrime{}"')), max_size=400
    )
)
def test_any_text_gives_a_log(text):
    check_types(parse_log(text))


def check_types(log: RunLog) -> None:
    for name, value in vars(RunLog).items():
        if isinstance(value, property):
            found = getattr(log, name)
            assert found is None or not isinstance(found, float) or math.isfinite(found), name
    assert all(math.isfinite(s.loss) and s.line >= 1 for s in log.steps)
    assert all(s.bytes >= 0 for s in log.sizes) and log.truncated in (True, False)
    assert all(s.loss is not None or s.bpb is not None for s in log.scores)


@pytest.mark.parametrize(
    "text",
    [
        "a" * 20_000_000,
        "1" * 20_000_000,
        "\n" * 20_000_000,
        "settings: " + '{"a":' * 10_000,
        "val_loss:" * 2_000_000,
        ("a:b " * 1000 + "\n") * 200,
        ("=" * 100 + "\n") * 20_000,
        "1/2 loss:1\n" * (MOST_LINES // 10),
        "Hyperparameters:\n" * 10_000,
        "settings: {" + '"a": {' * 900 + "}" * 901,
    ],
    ids=lambda t: t[:12],
)
def test_hostile_texts_are_read_in_no_time(text):
    log = parse_log(text)
    assert log.truncated and len(log.steps) <= MOST_LINES


def test_both_ends_of_a_huge_log_are_read():
    text = "seed:4\n" + "\n" * MOST_LINES + "final_exact val_loss:1.00000000 val_bpb:0.60000000\n"
    assert parse_log(text).seed == 4 and parse_log(text).final.bpb == 0.6


def test_a_file_is_read_in_any_encoding_and_a_folder_is_refused(tmp_path):
    path = tmp_path / "train.log"
    path.write_bytes(
        b"\xff\xfe\x00" + baseline(RunFacts()).replace("\n", "\r\n").encode() + b"\x80"
    )
    assert read_log(path).seed == 1337 and read_log(path).final.exact
    with pytest.raises(RecordError, match="no regular file|directory"):
        read_log(tmp_path)
