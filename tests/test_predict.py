"""Test bench/predict.py on planted results of a ladder, whose answers are known."""

import importlib
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from conftest import ROOT

from train_gpt import UserError

TECHNIQUES = {  # setting, its value, its published gain
    "a": ("LEAKY_SLOPE", "0.5", 0.001),
    "b": ("XSA_LAST_N", "4", 0.002),
    "c": ("ATTN_GATE", "1", 0.003),
    "d": ("MUON_ROW_NORMALIZE", "1", 0.004),
    "e": ("QK_GAIN_INIT", "5", 0.005),
}
SHAPE = {"NUM_LAYERS": "4", "MAX_WALLCLOCK_SECONDS": "300"}
NOISE = (-0.0001, 0.0, 0.0001)  # of three seeds


@pytest.fixture
def predict(monkeypatch):
    """Import the bench as a script does, from its own folder."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("predict")


def published(predict, names="abcde", **gains):
    """Return the planted techniques, perhaps with other published gains."""
    starter = predict.STARTER
    return [
        predict.Published(
            n,
            gains.get(n, TECHNIQUES[n][2]),
            1,
            {TECHNIQUES[n][0]: starter[TECHNIQUES[n][0]]},
            frozenset(),
        )
        for n in names
    ]


def plant(folder, ours, seconds=300.0, seeds=3, status="done", shape="cpu"):
    """Write a ladder whose rungs gain `ours`, and the top without each of them."""
    on, bpb, variants = {}, 2.0, {"baseline": ({}, 2.0)}
    for name, gain in ours.items():
        on, bpb = on | {TECHNIQUES[name][0]: TECHNIQUES[name][1]}, bpb - gain
        variants[name] = (on, bpb)
    for name, gain in ours.items():
        rest = {n: v for n, v in on.items() if n != TECHNIQUES[name][0]}
        variants[f"without-{name}"] = (rest, bpb + gain)
    for variant, (settings, score) in variants.items():
        for seed in range(seeds):
            write_run(
                folder, variant, seed, SHAPE | settings, score + NOISE[seed], seconds, status, shape
            )


def write_run(folder, variant, seed, settings, bpb, seconds=300.0, status="done", shape="cpu"):
    run = {
        "status": status,
        "shape": shape,
        "variant": variant,
        "settings": settings,
        "seconds": seconds,
        "steps": 0,
        "seed": seed,
        "data": f"{variant}'s shards of the text",
        "judged": {"near": {"bpb": bpb - 0.1}, "far": {"bpb": bpb + 0.1}},
    }
    group = folder / "raw" / f"{shape}-{seconds:g}s-text"
    group.mkdir(parents=True, exist_ok=True)
    (group / f"{variant}.seed{seed}.json").write_text(json.dumps(run))


def panels(predict, folder, names="abcde", judge="", **gains):
    return predict.panels_of(predict.read_runs([folder]), published(predict, names, **gains), judge)


def test_equal_order_gives_rho_one_and_no_technique_misleads(predict, tmp_path):
    plant(tmp_path, {"c": 0.03, "a": 0.01, "e": 0.05, "b": 0.02, "d": 0.04})
    added, left_out = panels(predict, tmp_path)
    assert (added.way, left_out.way) == ("added", "left out")
    for panel in (added, left_out):
        assert [round(g.bpb, 6) for g in panel.gains] == [0.01, 0.02, 0.03, 0.04, 0.05]
        rho, low, high = predict.rho_with_interval(panel.gains)
        assert rho == pytest.approx(1) and low <= high == pytest.approx(1)
        assert all(g.agrees and g.is_sure for g in panel.gains)
        assert predict.misleading(panel) == []


def test_reversed_order_and_wrong_signs(predict, tmp_path):
    plant(tmp_path, {"a": 0.05, "b": 0.04, "c": 0.03, "d": -0.02, "e": -0.03})
    panel = panels(predict, tmp_path)[0]
    rho, low, high = predict.rho_with_interval(panel.gains)
    assert rho == pytest.approx(-1) and low == pytest.approx(-1)
    assert [g.published.technique for g in predict.misleading(panel)] == ["d", "e"]
    assert "3 of 5" in predict.summary_table([panel])


def test_a_wrong_sign_within_the_noise_does_not_mislead(predict, tmp_path):
    plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04, "e": -0.00001})
    panel = panels(predict, tmp_path)[0]
    assert [g.agrees for g in panel.gains] == [True] * 4 + [False]
    assert predict.misleading(panel) == []


def test_spearman_shares_the_ranks_of_ties(predict):
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, (2, 8))
        ours = float(predict.spearman(a.astype(float), b.astype(float)))
        assert ours == pytest.approx(scipy_stats.spearmanr(a, b)[0], nan_ok=True)
    assert predict.ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]


def test_equal_published_gains_have_no_order(predict, tmp_path):
    plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04})
    equal = dict.fromkeys("abcd", 0.001)
    panel = panels(predict, tmp_path, "abcd", **equal)[0]
    assert predict.rho_with_interval(panel.gains) is None
    assert "all gains are equal" in predict.summary_table([panel])


def test_fewer_than_four_techniques_are_said_in_place_of_a_number(predict, tmp_path):
    plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03})
    panel = panels(predict, tmp_path)[0]
    assert predict.rho_with_interval(panel.gains) is None
    assert "| 3 of 3 | too few techniques (3 of 4 at least) |" in predict.summary_table([panel])


def test_one_seed_has_a_sign_and_no_verdict(predict, tmp_path):
    plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03, "d": -0.04}, seeds=1)
    panel = panels(predict, tmp_path)[0]
    assert [g.error for g in panel.gains] == [None] * 4
    assert [g.agrees for g in panel.gains] == [True, True, True, False]
    assert predict.misleading(panel) == [] and predict.seeds_text(panel) == "1"


def test_missing_and_failed_runs_are_left_out(predict, tmp_path):
    plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04})
    group = tmp_path / "raw" / "cpu-300s-text"
    (group / "a.seed2.json").unlink()
    for path in group.glob("without-c.*"):
        path.write_text(json.dumps({"status": "failed", "error": "no memory"}))
    added, left_out = panels(predict, tmp_path)
    assert {g.published.technique: len(g.with_it) for g in added.gains}["a"] == 2
    assert predict.seeds_text(added) == "2 to 3"
    assert [g.published.technique for g in left_out.gains] == ["a", "b", "d"]


def test_budgets_are_parts_of_the_longest_of_their_shape(predict, tmp_path):
    ours = {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04}
    for seconds in (30.0, 150.0, 300.0):
        plant(tmp_path, ours, seconds)
    plant(tmp_path, ours, 600.0, shape="cpu4")
    found = panels(predict, tmp_path)
    added = [(p.shape, p.run) for p in found if p.way == "added"]
    assert added == [
        ("cpu", "30 s (10 %)"),
        ("cpu", "150 s (50 %)"),
        ("cpu", "300 s (100 %)"),
        ("cpu4", "600 s (100 %)"),
    ]
    assert set(predict.series_of(found)) == {p.title for p in found} and len(found) == 8


def test_one_judge_or_the_mean_over_all(predict, tmp_path):
    plant(tmp_path, {"a": 0.01})
    runs = predict.read_runs([tmp_path])
    assert predict.score_of(runs[0], "") == pytest.approx(predict.score_of(runs[0], "near") + 0.1)
    assert panels(predict, tmp_path, judge="far")[0].texts == ("far",)
    assert panels(predict, tmp_path, judge="absent") == []


def test_a_pair_must_differ_in_the_technique_alone(predict):
    technique = predict.Published("t", 0.1, 1, {"NUM_LOOPS": 0}, frozenset({"LOOP_START"}))

    def variant(**settings):
        return predict.Variant("v", settings, [1.0])

    off = variant(NUM_LAYERS="4", LOOP_START="0")
    assert predict.makes(technique, variant(NUM_LAYERS="4", NUM_LOOPS="2", LOOP_START="1"), off)
    assert predict.makes(technique, variant(NUM_LAYERS="4.0", NUM_LOOPS="2"), off)
    assert not predict.makes(technique, variant(NUM_LAYERS="5", NUM_LOOPS="2"), off)
    assert not predict.makes(technique, off, variant(NUM_LAYERS="4", NUM_LOOPS="2"))
    assert not predict.makes(technique, variant(NUM_LAYERS="4", LOOP_START="1"), off)


def test_the_published_gains_name_settings_and_pull_requests(predict):
    gains = predict.read_published()
    assert len(gains) >= 15 and len({g.technique for g in gains}) == len(gains)
    assert all(g.pull_request > 0 and g.gain and g.without for g in gains)


def test_an_unknown_setting_among_the_published_gains_is_named(predict, tmp_path):
    row = {"technique": "t", "gain": 0.1, "pull_request": 1, "without": {"LEAKY": 0}}
    (tmp_path / "gains.json").write_text(json.dumps({"gains": [row]}))
    with pytest.raises(UserError, match=r"gains.json: LEAKY is no setting"):
        predict.read_published(tmp_path / "gains.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"status": "done", "seed": 1}'])
def test_a_broken_result_is_named(predict, tmp_path, text):
    (tmp_path / "a.seed1.json").write_text(text)
    with pytest.raises(UserError, match=r"a.seed1.json is no result of bench/ladder.py"):
        predict.read_runs([tmp_path])


def test_page_picture_and_last_line(predict, tmp_path, monkeypatch, capsys):
    for seconds in (30.0, 300.0):
        plant(tmp_path, {"a": 0.01, "b": 0.02, "c": 0.03, "d": 0.04, "e": -0.05}, seconds)
    page, drawn = tmp_path / "page.md", tmp_path / "prediction.svg"
    page.write_text(
        "# Page\n<!-- compare: predict -->\nearlier table\n<!-- end of compare: predict -->\nend\n"
    )
    monkeypatch.setattr(predict, "read_published", lambda: published(predict))
    arguments = ["predict", str(tmp_path), "--into", str(page), "--picture", str(drawn)]
    monkeypatch.setattr("sys.argv", arguments)
    assert predict.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [p["fraction"] for p in result["panels"]] == [0.1, 1.0, 0.1, 1.0]
    assert result["panels"][0]["misleading"] == ["e"]
    text = page.read_text()
    assert "earlier table" not in text and text.endswith("end\n") and "**-0.0500 ± 0.0001**" in text
    root = ET.fromstring(drawn.read_text())
    circles = [c for c in root.iter() if c.tag.endswith("circle")]
    assert len(circles) == 4 * 5 * 2 and sum(c.get("class") == "other" for c in circles) == 4


def test_nothing_to_compare_is_said(predict, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["predict", str(tmp_path)])
    with pytest.raises(UserError, match="0 finished runs"):
        predict.main()
