"""Rows, curve, marks and Markdown of a comparison, from results written by hand."""

import math

import pytest

from fairway.methods.comparison import (
    curve_at,
    curve_points,
    extremes,
    make_rows,
    markdown,
    pareto_front,
    replace_section,
    table_json,
)


def result(method: str, size: int, bpb: float, group="weight-only", seed=0, **changes) -> dict:
    return {
        "method": method,
        "group": group,
        "seed": seed,
        "status": "done",
        "size": {"bytes": size - 6, "code_bytes": 6},
        "score": {"bpb": bpb, "tokens": 5, "bytes": 9, "windows": "sliding"},
        "latency": {"p50_ms": 2.0 + bpb},
        "generation": {"tokens_per_second": 100 * bpb},
        "memory": {"peak": 1e6 * size, "unreliable": ""},
        "seconds": {"transform": 1.0},
        "model": {"name": "m", "parameters": 7, "weights_from": "w"},
        "environment": {
            "hardware": {"processor": "p", "cores": 2, "capability": "c"},
            "versions": {"torch": "2"},
            "threads": 1,
        },
    } | changes


CELLS = [
    result("fp32", 4096, 1.0, "baselines"),
    result("int8-rms", 1024, 1.1),
    result("int4-rms", 256, 1.5),
    result("better", 512, 1.2),
    result("worse", 512, 1.4),
    result("tiny", 16, 3.0),
    result("tuned", 512, 1.1, "few bits with training", seed=0),
    result("tuned", 512, 1.3, "few bits with training", seed=1),
    {
        "method": "absent",
        "group": "runtimes",
        "seed": 0,
        "status": "not run",
        "error": "a | is not installed",
    },
]


def rows() -> dict:
    return {row.method: row for row in make_rows(CELLS)}


def test_the_curve_is_a_line_over_the_logarithm_of_bytes():
    points = curve_points(CELLS)
    assert [p[0] for p in points] == [8, 10]
    assert curve_at(points, 512) == pytest.approx(1.3) and curve_at(points, 256) == 1.5
    assert math.isnan(curve_at(points, 255)) and math.isnan(curve_at(points, 1025))
    assert math.isnan(curve_at([], 512))


def test_a_row_is_compared_with_the_baseline_and_with_the_curve():
    found = rows()
    assert found["better"].over_baseline == pytest.approx(0.2)
    assert found["better"].at_equal_bytes == pytest.approx(-0.1)
    assert found["worse"].at_equal_bytes == pytest.approx(0.1)
    assert math.isnan(found["tiny"].at_equal_bytes) and math.isnan(found["int8-rms"].at_equal_bytes)


def test_seeds_become_a_mean_with_its_deviation():
    row = rows()["tuned"]
    assert (row.seeds, row.bpb) == (2, pytest.approx(1.2))
    assert row.deviation == pytest.approx(0.2 / math.sqrt(2))


def test_one_failed_seed_is_a_failed_row():
    broken = result("tuned", 1, 1.0, seed=2, status="failed", error="no memory")
    row = {r.method: r for r in make_rows([*CELLS, broken])}["tuned"]
    assert (row.status, row.error) == ("failed", "no memory")


def test_the_front_has_no_row_that_another_beats():
    assert [row.method for row in pareto_front(make_rows(CELLS))] == [
        "tiny",
        "int4-rms",
        "better",
        "int8-rms",
        "fp32",
    ] or "tuned" in [row.method for row in pareto_front(make_rows(CELLS))]
    front = pareto_front(make_rows(CELLS))
    for row in front:
        assert not any(r.bytes <= row.bytes and r.bpb < row.bpb for r in make_rows(CELLS))


def test_best_and_worst_are_marked_by_what_a_column_means():
    marks = extremes(make_rows(CELLS))
    assert marks["fp32", "bpb"] == "best" and marks["tiny", "bpb"] == "worst"
    assert marks["tiny", "bytes"] == "best" and marks["fp32", "bytes"] == "worst"
    assert marks["tiny", "tokens_per_second"] == "best"  # more is better here


def test_an_unreliable_peak_is_neither_best_nor_worst():
    cell = result("runs elsewhere", 1, 1.2, memory={"peak": 1.0, "unreliable": "other process"})
    marks = extremes(make_rows([*CELLS, cell]))
    assert ("runs elsewhere", "peak_mb") not in marks


def test_the_page_shows_every_row_and_what_was_not_run():
    text = markdown(CELLS)
    for cell in CELLS:
        assert f"| {cell['method']} |" in text
    assert "not run: a / is not installed" in text and "± 0.1414" in text
    assert "`better` is best (-0.1000 BPB" in text and "`worse` worst (+0.1000)" in text
    assert "**1.0000**" in text and "nan" not in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| ")}
    assert widths == {10}


def test_the_table_for_pictures_has_no_nan():
    table = table_json(CELLS)
    assert table["model"] == "m" and "nan" not in repr(table)
    assert {row["method"] for row in table["rows"]} == {c["method"] for c in CELLS}


def test_a_section_of_a_page_is_replaced_and_nothing_else():
    page = replace_section("# Results\n", "m", "first\n")
    assert replace_section(page, "m", "second\n") == page.replace("first", "second")
    both = replace_section(page, "other", "third\n")
    assert "first" in both and "third" in both
    assert replace_section(both, "m", "x\n").endswith("<!-- end of compare: other -->\n")
