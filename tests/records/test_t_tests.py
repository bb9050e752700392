"""fairway/records/t_tests.py: both tests by hand, by scipy, and on published figures."""

import json
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.files import RecordError
from fairway.records.t_tests import (
    SeedScores,
    one_sample,
    read_seeds,
    significance_text,
    welch,
)
from tests.zoo.records.dialects import RunFacts, april, baseline, march, our_eval, ours

T_2 = 6.964557  # exceeded in 1% of cases with 2 degrees of freedom; with 3 and 4: 4.541, 3.747


def seeds(*nats: float, factor: float = 1.69) -> SeedScores:
    return SeedScores(list(nats), [v / factor for v in nats], 62_021_632, 0)


# ==== By hand =====================================================================================
def test_one_sample_by_hand():
    """Mean 2, deviation 1, standard error 1/√3; with 2 degrees of freedom P(T > t) = 1/2 - t / 2√(2
    + t²).
    """
    test = one_sample(seeds(1, 2, 3), 4, bar=0)
    assert test.t == pytest.approx(2 * math.sqrt(3)) and test.df == 2
    assert test.p == pytest.approx(0.5 - 2 * math.sqrt(3) / (2 * math.sqrt(14)))
    assert test.difference == (pytest.approx(2), pytest.approx(2 / 1.69))
    # 4 seeds: t = 4.00 < 4.54; 5: t = 4.47 > 3.75
    more = T_2 / math.sqrt(3) - 2
    assert (
        test.missing
        == f"5 seeds of this mean and spread, or {more:.6f} nats more with these 3 seeds"
    )
    assert one_sample(seeds(1, 2, 3), 4, bar=0.5).t == pytest.approx(1.5 * math.sqrt(3))


def test_welch_by_hand():
    """Variances 1/3 and (5/3)/4; Welch and Satterthwaite's (a + b)² / (a²/2 + b²/3)."""
    test = welch(seeds(1, 2, 3), seeds(5, 6, 7, 8))
    a, b = 1 / 3, 5 / 12
    assert test.t == pytest.approx(4.5 / math.sqrt(a + b))
    assert test.df == pytest.approx((a + b) ** 2 / (a**2 / 2 + b**2 / 3))
    assert test.difference[0] == pytest.approx(4.5) and test.p == pytest.approx(0.00179, abs=2e-5)
    assert test.missing == ""


@given(
    new=st.lists(st.floats(1, 2), min_size=2, max_size=6),
    old=st.lists(st.floats(1, 2), min_size=2, max_size=6),
)
def test_both_tests_agree_with_another_implementation(new, old):
    from scipy.stats import ttest_1samp, ttest_ind

    if min(statistics.stdev(new), statistics.stdev(old)) < 1e-6:
        return
    one, two = one_sample(seeds(*new), 1.5), welch(seeds(*new), seeds(*old))
    assert one.p == pytest.approx(
        ttest_1samp(new, 1.495, alternative="less").pvalue, rel=1e-6, abs=1e-12
    )
    assert two.p == pytest.approx(
        ttest_ind(new, old, equal_var=False, alternative="less").pvalue, rel=1e-6, abs=1e-12
    )


# ==== Published figures, from the seeds that their records give ===================================
PR_1019 = SeedScores(
    [1.88276292, 1.88156874, 1.88220393], [1.11508120, 1.11437394, 1.11475014], 62_021_632, 0
)
PR_549 = SeedScores(
    [1.88976776, 1.89110239, 1.88919190], [1.11922988, 1.12002032, 1.11888882], 62_021_632, 0
)
SEQ_2048 = [1.20576485, 1.20617460, 1.20715923]
SEQ_4096 = [1.20143417, 1.19945102, 1.20319508]
MLP_3X = [1.94265607, 1.94207795, 1.94121940]
SEQ_2048_QAT = [1.96032898, 1.95825352, 1.95627871]


def test_welch_of_1019_against_549():
    """Its submission.json has t = -11.8339 and df 3.3063 in BPB; the sign there is of new - old."""
    in_bpb = welch(PR_1019._replace(nats=PR_1019.bpb), PR_549._replace(nats=PR_549.bpb))
    assert (round(in_bpb.t, 4), round(in_bpb.df, 4)) == (11.8339, 3.3063)
    test = welch(PR_1019, PR_549)
    assert round(test.t, 2) == 11.83 and round(test.df, 2) == 3.31 and test.p < 0.001
    assert test.difference == (
        pytest.approx(0.00784215, abs=5e-9),
        pytest.approx(0.00464458, abs=5e-7),
    )


@pytest.mark.parametrize(
    "scores, old, bar, t, p",
    [
        (
            SEQ_2048,
            1.2243657,
            0.005,
            31.42,
            0.00051,
        ),  # these two in BPB, the bar as well, against the best record so far
        (SEQ_4096, 1.21613611, 0.005, 9.06, 0.006),  # from a rounded deviation: exactly, t = 9.04
        (MLP_3X, 2.07269931, 0, 313.20, 1e-5),  # these two in nats, against the baseline
        (SEQ_2048_QAT, 2.07269931, 0.005, 93.6, 1e-4),
    ],
)
def test_one_sample_tests_of_march(scores, old, bar, t, p):
    test = one_sample(SeedScores(scores, scores, 0, 0), old, bar)
    assert test.t == pytest.approx(t, rel=0.003) and test.df == 2 and test.missing == ""
    assert round(test.p, 5) == p if t == 31.42 else test.p <= p * 1.02


# ==== What is missing =============================================================================
def test_one_seed_is_no_test():
    one = one_sample(seeds(1.9), 2.0)
    assert (one.t, one.df, one.p) == (None, None, None) and "2 at least" in one.missing
    assert one.difference[0] == pytest.approx(0.1)
    for new, old, whose in (
        (seeds(1.9), seeds(2, 2.1), "new"),
        (seeds(1.8, 1.9), seeds(2.0), "old"),
    ):
        assert welch(new, old).t is None and welch(new, old).missing.startswith(
            f"the {whose} record has one seed"
        )


def test_without_spread_any_gain_is_certain():
    assert one_sample(seeds(1.9, 1.9), 2.0)[1:4] == (math.inf, 1, 0.0)
    worse = one_sample(seeds(1.9, 1.9), 1.9)
    assert worse.t == -math.inf and worse.p == 1 and "no number of seeds" in worse.missing
    assert welch(seeds(1.5, 1.5), seeds(1.5, 1.5))[1:4] == (0.0, 2, 0.5)


def test_a_mean_on_the_wrong_side_stays_there():
    test = one_sample(seeds(1.997, 1.998, 1.999), 2.0)
    assert test.missing.startswith(
        "no number of seeds, since the mean is 0.003000 nats on the wrong side; "
    )
    assert float(test.missing.split("; ")[1].split()[0]) == pytest.approx(
        0.003 + T_2 * 0.001 / math.sqrt(3), abs=2e-6
    )


@given(
    new=st.lists(st.floats(1, 1.1), min_size=2, max_size=5),
    old=st.lists(st.floats(1, 1.2), min_size=2, max_size=5),
)
def test_the_missing_nats_are_enough_and_no_more(new, old):
    """Adding the missing nats reaches p < 0.01; a little less does not."""
    for run in (lambda s: one_sample(s, statistics.fmean(old)), lambda s: welch(s, seeds(*old))):
        test = run(seeds(*new))
        if test.missing and statistics.stdev(new) > 1e-4:
            lacking = float(test.missing.split(" nats more")[0].split()[-1])
            better, nearly = (run(seeds(*(v - lacking - d for v in new))) for d in (2e-6, -2e-6))
            assert better.missing == "" and (nearly.missing or lacking < 4e-6)


@given(new=st.lists(st.floats(1.0, 1.1), min_size=2, max_size=4), old=st.floats(1.0, 1.2))
def test_the_seeds_that_are_missing_are_enough(new, old):
    test = one_sample(seeds(*new), old)
    first = test.missing.split(" ")[0]
    if first.isdigit():
        n, mean, spread = int(first), statistics.fmean(new), statistics.stdev(new)
        more = statistics.NormalDist(0, 1).samples(n, seed=1)
        centre, scale = statistics.fmean(more), statistics.stdev(more)
        assert (
            one_sample(seeds(*(mean + (v - centre) / scale * spread for v in more)), old).p
            < 0.0100001
        )


# ==== Between tokenizers ==========================================================================
def test_another_tokenizer_is_compared_through_bytes():
    """The same BPB is the same score under tokenizers of 2.4 and 3.7 bytes per token."""
    new, old = seeds(2.80, 2.81, 2.82, factor=2.583), seeds(1.84, 1.85, 1.86, factor=1.6885)
    test = welch(new, old)
    assert test.difference[1] == pytest.approx(
        statistics.fmean(old.bpb) - statistics.fmean(new.bpb)
    )
    assert test.difference[0] == pytest.approx(test.difference[1] * 2.583)
    assert "another tokenizer or split" in significance_text(
        new, old
    ) and "another" not in significance_text(PR_1019, PR_549)


def test_the_report_is_a_table_of_both():
    text = significance_text(PR_1019, PR_549)
    assert (
        "1.882179  0.000597  1.114735  0.000354" in text
        and "t = 11.83, df = 3.31, p = 4.0e-04, p < 0.01" in text
    )
    assert (
        "one sample, against 1.890021 - 0.005 nats: t = 8.24, df = 2.00, p = 0.0072, p < 0.01"
        in text
    )
    assert "missing: one seed has no spread" in significance_text(seeds(1.9), seeds(2.0))


# ==== Of folders ==================================================================================
def write(folder, submission, logs):
    folder.mkdir()
    if submission is not None:
        (folder / "submission.json").write_text(json.dumps(submission))
    for name, text in logs.items():
        (folder / name).write_text(text)
    return folder


def facts(seed: int) -> RunFacts:
    return RunFacts(seed=seed, final_loss=1.88 + seed / 10_000)


@pytest.mark.parametrize("dialect", [march, april])
def test_seeds_of_a_folder_have_all_digits(tmp_path, dialect):
    """submission.json has five digits, the logs eight."""
    results = {str(s): {"val_bpb": round(facts(s).final_bpb, 5)} for s in (1, 2, 3)}
    folder = write(
        tmp_path / "a",
        dict(seed_results=results, val_bpb=1.1136),
        {f"train_seed{s}.log": dialect(facts(s)) for s in (1, 2, 3)},
    )
    found = read_seeds(folder)
    assert found.nats == pytest.approx([1.8801, 1.8802, 1.8803], abs=1e-8)
    assert found.bpb == pytest.approx([facts(s).final_bpb for s in (1, 2, 3)], abs=1e-8)
    assert (found.tokens, found.bytes) == (62_021_632, 0)


def test_seeds_of_our_folder_are_its_evaluations(tmp_path):
    logs = {
        f"{kind}_seed{s}.log": write_log(facts(s))
        for s in (1, 2)
        for kind, write_log in (("train", ours), ("eval", our_eval))
    }
    results = {
        str(s): {"val_bpb": facts(s).final_bpb, "val_loss": facts(s).final_loss} for s in (1, 2)
    }
    for name, submission in (("a", dict(seed_results=results)), ("b", None)):
        found = read_seeds(write(tmp_path / name, submission, logs))
        assert (
            found.nats == pytest.approx([1.8801, 1.8802], abs=1e-8) and found.bytes == 151_080_891
        )


def test_without_a_list_the_logs_show_the_seeds(tmp_path):
    logs = {
        "train.log": baseline(RunFacts(loss=2.0)),
        "train_seed42.log": baseline(RunFacts(seed=42, loss=2.1)),
    }
    folder = write(tmp_path / "a", dict(val_bpb=RunFacts().bpb_of(2.1)), logs)
    assert sorted(read_seeds(folder).nats) == pytest.approx([2.0, 2.1])
    # A headline that no log shows is a run of its own: 1.15 of a log that has 1.18.
    other = write(tmp_path / "b", dict(val_bpb=0.9, val_loss=1.5), logs)
    assert read_seeds(other).nats == [1.5] and read_seeds(other).bpb == [0.9]


def test_nats_come_from_tokens_and_bytes_or_from_another_seed(tmp_path):
    bpb_only = {"1": {"val_bpb": 1.1}, "2": {"val_bpb": 1.2}}
    ratio = math.log(2) * 151_080_891 / 62_021_632
    logged = write(
        tmp_path / "a", dict(seed_results=bpb_only), {"eval_seed1.log": our_eval(RunFacts())}
    )
    assert read_seeds(logged).nats == pytest.approx([1.1 * ratio, 1.2 * ratio])
    paired = write(
        tmp_path / "b", dict(seed_results=bpb_only | {"3": {"val_bpb": 1.0, "val_loss": 1.7}}), {}
    )
    assert read_seeds(paired).nats == pytest.approx([1.87, 2.04, 1.7])
    alone = write(tmp_path / "c", dict(seed_results=bpb_only), {})
    with pytest.raises(
        RecordError, match="c: seed 1 has val_bpb but no val_loss, and no log says how many tokens"
    ):
        read_seeds(alone)


@pytest.mark.parametrize(
    "submission, said",
    [
        (None, "names no score"),
        ([], "names no score"),
        (dict(seed_results={"1": {}}), "names no score"),
        (
            dict(seed_results={"1": {"val_bpb": 1.1, "val_loss": 2}, "2": {}}),
            "seed 2 has neither val_loss nor val_bpb",
        ),
        (dict(val_bpb="1.1"), "names no score"),
        (dict(val_bpb=1.1), "its one run has val_bpb but no val_loss"),
    ],
)
def test_missing_scores_are_named(tmp_path, submission, said):
    with pytest.raises(RecordError, match=said) as e:
        read_seeds(
            write(tmp_path / "x", submission, {"train.log": "nothing", "requirements.txt": "numpy"})
        )
    assert "\n" not in str(e.value)


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(RecordError, match="is no folder; name one with"):
        read_seeds(tmp_path / "absent")
