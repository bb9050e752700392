"""The harness of bench/context.py: names, contexts, heads, table, picture and command."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import initial, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import context
from context import VARIANTS

from train_gpt import UserError, read_shard

POOL = np.arange(301, 400)


@pytest.fixture
def small(monkeypatch):
    """Contexts of 256 tokens at most, so that a small model reads them at once."""
    monkeypatch.setattr(context, "LONGEST", 256)
    monkeypatch.setattr(context, "CONTEXTS", (64, 128, 256))
    monkeypatch.setattr(context, "DISTANCES", (32, 64, 128))
    monkeypatch.setattr(context, "PIECE", 32)


def text_of(tokens):
    return SimpleNamespace(tokens=tokens, sizes=np.full(len(tokens) - 1, 3))


# ==== NAMES =======================================================================================
def test_half_of_a_sequence_is_names_that_come_again():
    rng, counts = np.random.default_rng(0), set()
    for _ in range(40):
        text = context.recall_sequence(rng, np.zeros(256, int), POOL)
        at = np.flatnonzero(text)
        assert len(text) == 256 and len(at) == 21 * context.NAME
        names = {*map(tuple, text[at].reshape(21, context.NAME))}
        assert all(len({*name}) == context.NAME for name in names)
        counts.add(len(names))
    assert min(counts) == 2 and max(counts) > 12


def test_training_shards_have_names_in_every_second_sequence(tmp_path, corpus):
    context.write_recall_data(corpus.folder, tmp_path / "out", 64)
    mixed = read_shard(tmp_path / "out" / "recall_train_000000.bin")
    plain = np.concatenate([read_shard(p) for p in sorted(corpus.folder.glob("*_train_*.bin"))])
    rows, before = (x[: len(mixed)].reshape(-1, 64) for x in (mixed, plain))
    changed = (rows != before).any(1)
    assert changed[::2].all() and not changed[1::2].any()
    assert {p.name for p in corpus.folder.glob("*_val_*.bin")} < {
        p.name for p in (tmp_path / "out").iterdir()
    }
    with pytest.raises(UserError, match="no \\*_train_"):
        context.write_recall_data(tmp_path, tmp_path / "out", 64)


@pytest.mark.parametrize("seen", [40, 100, 256])
def test_recall_is_whole_within_what_a_reader_sees_and_none_beyond(small, monkeypatch, seen):
    def induction(_engine, tokens):
        """Expect after two tokens what came after them before, `seen` tokens back at most."""
        best = np.zeros(len(tokens) - 1, int)
        for t in range(1, len(tokens) - 1):
            for j in range(max(1, t - seen), t):
                if (tokens[j - 1 : j + 1] == tokens[t - 1 : t + 1]).all():
                    best[t] = tokens[j + 1]
        return None, best

    monkeypatch.setattr(context, "read_all", induction)
    model = trained(num_layers=1, vocab_size=500)
    tokens = np.random.default_rng(0).integers(2, 500, 600)
    starts = context.streams_of(tokens, 3)
    got = context.recall_by_distance(model, VARIANTS["all"], [], text_of(tokens), starts)
    for distance, recalled in zip(context.DISTANCES, got, strict=True):
        if distance + 10 < seen:
            assert recalled == 1.0
        if distance > seen:
            assert recalled < 0.1
    chance = context.recall_by_distance(
        model, VARIANTS["all"], [], text_of(tokens), starts, told=False
    )
    assert max(chance) < 0.1


def test_names_need_pieces():
    assert context.alphabet(320).tolist() == [*range(301, 320)]
    for size in (1024, 4096, 65536):
        pieces = context.alphabet(size)
        assert len(set(pieces)) == 64 and 300 < pieces.min() and pieces.max() < size
    with pytest.raises(UserError, match="306 pieces; names need 12"):
        context.alphabet(306)


# ==== CONTEXTS AND HEADS ==========================================================================
def test_bits_are_those_of_whole_attention_by_context(small):
    model = trained(num_layers=2, train_seq_len=256, train_batch_tokens=2048)
    tokens = np.random.default_rng(1).integers(2, 97, 600)
    starts = context.streams_of(tokens, 2)
    got, best = context.bits_by_context(model, VARIANTS["all"], [], text_of(tokens), starts)
    bits, choices = [], []
    for start in starts:
        row = torch.from_numpy(tokens[None, start : start + 257])
        with torch.no_grad():
            bits.append(model(row[:, :-1], row[:, 1:])[0] / np.log(2))
            choices.append(model.logits(row[:, :-1])[0, 128:].argmax(-1))
    assert torch.equal(torch.cat(choices), torch.from_numpy(best))
    for i, length in enumerate(context.CONTEXTS):
        part = torch.stack(bits)[:, length // 2 : length]
        assert got[i] == pytest.approx(part.mean().item() / 3, abs=1e-4)
    with pytest.raises(UserError, match="257 or more"):
        context.streams_of(tokens[:200], 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_reads_a_text(small, name):
    model = trained(num_layers=2)
    heads = [[0.9, 0.1], [0.5, 0.2]]
    engine = context.engine_of(model, VARIANTS[name], heads)
    tokens = np.random.default_rng(2).integers(2, 97, 256)
    nats, best = context.read_all(engine, tokens)
    assert nats.shape == best.shape == (255,) and np.isfinite(nats).all() and engine.bytes > 0


def test_the_best_heads_keep_everything():
    model = trained(num_layers=2)
    engine = context.engine_of(model, VARIANTS["half of heads"], [[0.9, 0.1], [0.5, 0.2]])
    assert [policy.groups.tolist() for policy in engine.policies] == [[True, False]] * 2


def test_heads_that_change_nothing_close(monkeypatch):
    monkeypatch.setattr(context, "GATE_STEPS", 40)
    monkeypatch.setattr(context, "LETTERS", 30)
    model = initial(train_seq_len=64, train_batch_tokens=512)  # attention writes nothing yet
    gates = context.classify_heads(model, np.random.default_rng(3).integers(2, 97, 4000))
    assert np.max(gates) == 0


# ==== COMMAND =====================================================================================
def found():
    row = dict(
        about="x",
        cost=[dict(context=c, ms=dict(median=1.0), bytes=1_500_000) for c in context.CONTEXTS],
        bpb=[2.0 + i / 10 for i in range(len(context.CONTEXTS))],
        recall=[i / 10 for i in range(len(context.DISTANCES))],
        agree=0.5,
        as_a_draft=1.25,
    )
    shape = dict(layers=2, width=32, heads=2, vocabulary=97, trained_on=64, weights=1234)
    return dict(
        model=shape,
        streams=2,
        threads=1,
        contexts=context.CONTEXTS,
        distances=context.DISTANCES,
        chance=[0.0] * len(context.DISTANCES),
        prefix=dict(again=1.0, afresh=20.0),
        policies=dict.fromkeys(VARIANTS, row),
    )


def test_table_and_picture_show_each_policy():
    text = context.table(found())
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(VARIANTS) and len({line.count("|") for line in lines}) == 1
    assert "| all: x | 1.00 | 1.00 | 1.00 | 1.50 | 2.0000 | 2.2000 | 2.3000 | 2.5000 |" in text
    drawn = context.picture(found())
    assert drawn.count("<polyline") == 3 * len(context.DRAWN)
    assert all(name in drawn for name in context.DRAWN)


def test_the_command_reads_what_it_wrote(tmp_path, monkeypatch, capsys):
    out, page = tmp_path / "context.json", tmp_path / "page.md"
    page.write_text("# Page\n")
    monkeypatch.setattr(sys, "argv", ["context", "--table", "--out", str(out), "--into", str(page)])
    with pytest.raises(UserError, match="measure first"):
        context.run()
    out.write_text(json.dumps(found()))
    assert context.run() == 0
    assert "| all: x |" in page.read_text() and "| all: x |" in capsys.readouterr().out


def test_a_draft_gains_what_it_guesses_right_for_less():
    assert context.as_a_draft(0.0, 0.5) == pytest.approx(1 / 1.5)
    assert context.as_a_draft(1.0, 0.0) == 17
    assert context.as_a_draft(0.9, 1.0) < 1
    assert context.as_a_draft(0.8, 0.25) == pytest.approx((1 + 0.8 + 0.64 + 0.512) / 1.75)


def test_distances_fit_the_longest_text():
    asked = context.NAME * len(context.DISTANCES)
    assert max(context.DISTANCES) + asked <= context.LONGEST
    places = [context.LONGEST - asked - d for d in context.DISTANCES]
    for a, b in itertools.combinations(places, 2):
        assert abs(a - b) >= 2 * asked  # names are told apart, in whatever order they are asked for
