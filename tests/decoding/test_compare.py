"""The tables of --compare: figures that add up, and text that fits the screen whatever it holds."""

import io
import json

import pytest
from artifacts import make_artifact
from rich.console import Console

from fairway.decoding.compare import Task, compare, of_texts, tables
from fairway.decoding.strategies import FILTERS, Strategy
from fairway.decoding.writing import Writer, Written

PROMPTS = (b"The people", b"")


@pytest.fixture(scope="module")
def found(tmp_path_factory, corpus) -> tuple[dict, Task, list[int]]:
    writer = Writer(str(make_artifact(tmp_path_factory.mktemp("compare"), corpus)), device="cpu")
    task, heard = Task(PROMPTS, Strategy(), 8, 2, 0, ("ngram", "layers"), 4), []
    return compare(writer, task, heard.append), task, heard


def test_every_strategy_writes_after_every_prompt(found):
    rows = [(row["strategy"], row["prompt"], row["count"]) for row in found[0]["texts"]]
    names = [*FILTERS, "greedy, penalty", "beam"]
    once = ("greedy", "greedy, penalty", "beam")
    assert rows == [
        (name, prompt.decode(), 1 if name in once else 2) for name in names for prompt in PROMPTS
    ]
    assert [(row["strategy"], row["count"]) for row in found[0]["strategies"]] == [
        (name, 2 if name in once else 4) for name in names
    ]


def test_progress_counts_every_text(found):
    _, task, heard = found
    assert len(heard) == sum(heard) == task.runs == 2 * (3 + 5 * 2) + 2 * 4 * 2


def test_averages_are_over_texts_and_tokens():
    texts = [
        Written("a", [5, 6], [-1.0, -2.0], seconds=0.5),
        Written("a", [7], [-3.0], seconds=0.5),
        Written("", [], [], seconds=0.5),
    ]
    assert of_texts(texts) == dict(
        count=3, distinct=2, mean_tokens=1.0, mean_logp=-2.0, text_logp=-2.0, tokens_per_second=2.0
    )


def test_drafts_are_told_for_greedy_and_for_sampling(found):
    rows = found[0]["drafts"]
    assert [(row["draft"], row["strategy"]) for row in rows] == [
        (draft, name) for draft in ("ngram", "layers") for name in ("greedy", "top-p")
    ]
    for row in rows:
        assert row["tokens"] == row["verifications"] + row["accepted"] >= 16
        assert 0 <= row["acceptance"] <= 1 <= row["tokens_per_verification"]
        assert row["ratio"] == pytest.approx(row["plain_seconds"] / row["seconds"])


def test_what_is_found_is_json(found):
    assert json.loads(json.dumps(found[0], allow_nan=False)) == found[0]


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_screen_whatever_the_text(found, width):
    rows = [
        row | dict(text="[bold]no markup[/]\n" + 30 * "long 日本 ") for row in found[0]["texts"]
    ]
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in tables(found[0] | dict(texts=rows)):
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
