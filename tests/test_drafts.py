"""The harness of bench/drafts.py: heads that are trained and kept, measurements and table."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import drafts
from heads import Node

from train_gpt import UserError


class Bar:
    def update(self, count): ...


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(drafts, "STEPS", {"medusa": 2, "eagle": 2, "hydra": 2})
    monkeypatch.setattr(drafts, "LENGTH", 16)
    monkeypatch.setattr(drafts, "OWN_LENGTH", 20)
    monkeypatch.setattr(drafts, "WIDTHS", (1, 2))


def model_and_text():
    model = (
        trained(num_layers=2, train_seq_len=64, train_batch_tokens=512).eval().requires_grad_(False)
    )
    return model, np.random.default_rng(0).integers(2, 97, 4000)


def test_heads_are_trained_once_and_kept(quick, tmp_path):
    model, tokens = model_and_text()
    first = drafts.trained_heads(model, tokens, tmp_path / "heads")
    assert {p.stem for p in (tmp_path / "heads").iterdir()} == set(drafts.STEPS)
    again = drafts.trained_heads(model, tokens, tmp_path / "heads")
    for name, head in first.items():
        for a, b in zip(head.parameters(), again[name].parameters(), strict=True):
            assert torch.equal(a, b)


def test_own_text_goes_on_from_its_start(quick):
    model, tokens = model_and_text()
    starts = torch.from_numpy(tokens[:24].reshape(3, 8))
    texts = drafts.own_text(model, starts)
    assert texts.shape == (3, 20) and torch.equal(texts[:, :8], starts)
    assert torch.equal(texts, drafts.own_text(model, starts))


def test_each_drafter_is_measured_and_leaves_texts_as_they_are(quick, tmp_path):
    model, tokens = model_and_text()
    made = drafts.drafters(
        model, drafts.trained_heads(model, tokens, tmp_path), drafts.commonest(tokens)
    )
    prompts = [tokens[:20].tolist() * 2, tokens[50:80].tolist()]
    for way, strategy in drafts.STRATEGIES.items():
        for name, make in made.items():
            row = drafts.bench_drafter(model, make, prompts, strategy, 8, Bar())
            assert row["least"] <= row["ratio"] <= row["most"], (way, name)
            assert row["tokens_a_pass"] >= 1 and len(row["accepted"]) == drafts.MOST
    assert set(drafts.differing_texts(model, made, tokens, 2, Bar()).values()) == {0}


def test_a_drafter_that_writes_itself_is_counted(quick, monkeypatch):
    model, tokens = model_and_text()

    class Wrong(drafts.TreeSpeculation):
        def walk(self, nodes):
            settled, rows, path = super().walk(nodes)
            self.text[-1] = nodes[0].token
            return [settled[0]._replace(token=nodes[0].token)], rows, path

    class Seven:
        def propose(self, text, states, most):
            return [Node(7, -1)]

        def learn(self, rows, path): ...

    monkeypatch.setattr(drafts, "TreeSpeculation", Wrong)
    assert drafts.differing_texts(model, {"seven": Seven}, tokens, 3, Bar()) == {"seven": 3}


def test_costs_of_wider_passes_are_in_passes_of_one(quick):
    model, _ = model_and_text()
    for costs in drafts.width_costs(model, 3, before=8).values():
        assert costs["1"] == 1.0 and costs["2"] > 0.3 and costs["ms"] > 0
    assert drafts.few_rows.MOST_ROWS == 4


def test_the_table_has_a_line_for_each_drafter():
    row = dict(text="free", strategy="greedy", drafter="EAGLE", ratio=1.4, least=1.1, most=1.6)
    row |= dict(
        rate=123.4, tokens_a_pass=2.0, drafted_a_pass=3.0, accepted=[0.5, 0.25, *[None] * 6]
    )
    widths = {str(w): 1.0 for w in drafts.WIDTHS} | {"ms": 2.0}
    shape = dict(layers=2, width=32, vocabulary=97, weights=1234)
    found = dict(model=shape, threads=1, tokens=8, prompts=50, widths={"this model": widths})
    text = drafts.table(found | dict(rows=[row], different={"EAGLE": 0}))
    assert (
        "| free | greedy | EAGLE | 1.40 (1.10 to 1.60) | 123 | 2.00 | 3.00 | 50% 25% – – – |"
        in text
    )
    assert "Greedy texts that differ, of 50: EAGLE 0." in text


def test_the_command_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["drafts", "--table", "--out", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="measure first"):
        drafts.run()
