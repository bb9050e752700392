"""The tables of --compare hold figures that add up and text that fits the screen."""

import io
import json

import pytest
from rich.console import Console

from fairway.decoding.strategies import Strategy
from fairway.decoding.strategy_options import STRATEGY_NAMES
from fairway.decoding.strategy_table import (
    StrategyComparison,
    compare_strategies,
    comparison_tables,
    text_averages,
)
from fairway.decoding.writing import GeneratedText, Writer

PROMPTS = (b"The people", b"")


@pytest.fixture(scope="module")
def comparison(artifacts) -> tuple[dict, StrategyComparison, list[int]]:
    """The results of a comparison, its task, and what its progress callback received."""
    writer = Writer(str(artifacts / "model.ptz"), device="cpu")
    task, heard = StrategyComparison(PROMPTS, Strategy(), 8, 2, 0, ("ngram", "layers"), 4), []
    return compare_strategies(writer, task, heard.append), task, heard


def test_every_strategy_writes_after_every_prompt(comparison):
    rows = [(row["strategy"], row["prompt"], row["count"]) for row in comparison[0]["texts"]]
    names = [*STRATEGY_NAMES, "greedy, penalty", "beam"]
    once = ("greedy", "greedy, penalty", "beam")
    assert rows == [
        (name, prompt.decode(), 1 if name in once else 2) for name in names for prompt in PROMPTS
    ]
    assert [(row["strategy"], row["count"]) for row in comparison[0]["strategies"]] == [
        (name, 2 if name in once else 4) for name in names
    ]


def test_progress_counts_every_text(comparison):
    _, task, heard = comparison
    assert len(heard) == sum(heard) == task.runs == 2 * (3 + 5 * 2) + 2 * 4 * 2


def test_averages_are_taken_over_texts_and_tokens():
    texts = [
        GeneratedText("a", [5, 6], [-1.0, -2.0], seconds=0.5),
        GeneratedText("a", [7], [-3.0], seconds=0.5),
        GeneratedText("", [], [], seconds=0.5),
    ]
    assert text_averages(texts) == dict(
        count=3, distinct=2, mean_tokens=1.0, mean_logp=-2.0, text_logp=-2.0, tokens_per_second=2.0
    )


def test_each_draft_is_measured_for_greedy_and_for_sampling(comparison):
    rows = comparison[0]["drafts"]
    assert [(row["draft"], row["strategy"]) for row in rows] == [
        (draft, name) for draft in ("ngram", "layers") for name in ("greedy", "top-p")
    ]
    for row in rows:
        assert row["tokens"] == row["verifications"] + row["accepted"] >= 16
        assert 0 <= row["acceptance"] <= 1 <= row["tokens_per_verification"]
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])


def test_the_results_survive_json(comparison):
    assert json.loads(json.dumps(comparison[0], allow_nan=False)) == comparison[0]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_screen_whatever_the_text(comparison, width):
    rows = [
        row | dict(text="[bold]no markup[/]\n" + 30 * "long 日本 ")
        for row in comparison[0]["texts"]
    ]
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in comparison_tables(comparison[0] | dict(texts=rows)):
        console.print(table)
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width for line in lines) and "[bold]no markup[/]↵" in out.getvalue()
    assert (
        sum(
            "Speculative decoding" in line
            or "All prompts" in line
            or "After 'The people'" in line
            or "From the start of a document" in line
            for line in lines
        )
        == 4
    )
