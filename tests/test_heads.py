"""Trees of guesses and drafters with heads (bench/heads.py): exact caches, lossless texts."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from chi_square import chi_square_p
from models import FEATURES, some_tokens, trained

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import heads
from heads import (
    Cascade,
    Chain,
    Eagle,
    EagleDrafter,
    Hydra,
    HydraDrafter,
    Jacobi,
    Medusa,
    MedusaDrafter,
    Node,
    TreeMemory,
    TreeSpeculation,
    train_head,
)

from fairway.decoding.drafters import NGramDrafter, SuffixDrafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory

GREEDY, SAMPLED = Strategy("greedy"), Strategy("top-p", temperature=0.8, top_p=0.95)
TREE = ([3, 5, 7, 9, 5, 11], [-1, 0, 0, 1, 2, 4])  # tokens, parents


class Guesser:
    """Guess random trees, right tokens among them as often as `truth` knows the text."""

    def __init__(self, seed: int, truth: list[int]):
        self.rng, self.truth, self.learnt = np.random.default_rng(seed), truth, 0

    def propose(self, text, states, most):
        assert len(states) == len(text) - 1
        nodes = []
        for at in range(int(self.rng.integers(0, most + 1))):
            parent = int(self.rng.integers(-1, at))
            depth, up = 1, parent
            while up >= 0:
                depth, up = depth + 1, nodes[up].parent
            place = len(text) + depth - 1
            known = place < len(self.truth) and self.rng.random() < 0.6
            nodes.append(Node(self.truth[place] if known else int(self.rng.integers(97)), parent))
        return nodes

    def learn(self, rows, path):
        self.learnt += len(path) - 1


def model_named(name):
    return (
        trained(looping=True, num_layers=2) if name == "plain" else trained(True, **FEATURES[name])
    )


def prompt_of(seed, length=12):
    return some_tokens(1, length, seed)[0].tolist()


def memory_after(model, prompt):
    memory = TreeMemory(model, window=80)
    Reader(memory).last(prompt[:-1])
    return memory


def texts(model, prompt, strategy, count, drafter, seed=0, most=6):
    steps = TreeSpeculation(
        memory_after(model, prompt), prompt, strategy, np.random.default_rng(seed), drafter, most
    )
    return [step.token for step in islice(steps, count)], steps


def plain_text(model, prompt, count):
    reader = Reader(Memory(model, window=80))
    reader.last(prompt[:-1])
    steps = decode_plainly(reader, prompt, GREEDY, np.random.default_rng(0))
    return [step.token for step in islice(steps, count)]


# ==== THE CACHE ===================================================================================
@pytest.mark.parametrize("name", ["plain", "all", "skip_gates"])
def test_a_node_of_a_tree_reads_its_own_way_and_nothing_else(name):
    model, prompt = model_named(name).eval(), prompt_of(1)
    memory = memory_after(model, prompt)
    tokens, parents = TREE
    with torch.inference_mode():
        rows = memory.read_tree(tokens, parents)
        for i in range(len(tokens)):
            path, at = [], i
            while at >= 0:
                path, at = [tokens[at], *path], parents[at]
            other = memory_after(model, prompt)
            wanted = other.logits(torch.tensor([path]))[0, -1]
            torch.testing.assert_close(rows[i], wanted, atol=2e-4, rtol=0)
            state = other.states.held[-1]
            torch.testing.assert_close(memory.states.held[11 + i], state, atol=2e-4, rtol=0)
        memory.keep([0, 2, 4], len(tokens))
        assert memory.read == 14 and memory.states.count == 14
        after = memory.logits(torch.tensor([[8, 9]]))[0]
        wanted = memory_after(model, [*prompt[:-1], 3, 7, 5, 0]).logits(torch.tensor([[8, 9]]))[0]
        torch.testing.assert_close(after, wanted, atol=2e-4, rtol=0)


def test_a_window_holds_for_each_node():
    model, prompt = model_named("plain").eval(), prompt_of(2, 40)
    small, plain = TreeMemory(model, window=16), TreeMemory(model, window=16)
    tokens, parents = [3, 5, 7, 9], [-1, 0, 1, 2]
    with torch.inference_mode():
        for memory in (small, plain):
            Reader(memory).last(prompt)
        rows = small.read_tree(tokens, parents)
        wanted = plain.logits(torch.tensor([tokens]))[0]
    torch.testing.assert_close(rows, wanted, atol=2e-4, rtol=0)


# ==== LOSSLESS ====================================================================================
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_texts_are_the_same_whatever_is_guessed(name, seed):
    model, prompt = model_named(name).eval(), prompt_of(seed)
    wanted = plain_text(model, prompt, 24)
    guesser = Guesser(seed, [*prompt, *wanted])
    got, steps = texts(model, prompt, GREEDY, 24, guesser)
    assert got == wanted
    assert steps.stats.accepted == guesser.learnt > 0
    assert steps.right.sum() == steps.stats.accepted and (steps.right <= steps.tried).all()


@pytest.mark.parametrize(
    "kind", ["medusa", "eagle", "hydra", "ngram", "suffix", "jacobi", "cascade"]
)
def test_each_drafter_leaves_greedy_texts_as_they_are(kind):
    model = model_named("plain").eval().requires_grad_(False)
    torch.manual_seed(0)
    made = {
        "medusa": lambda: MedusaDrafter(Medusa(model), model),
        "eagle": lambda: EagleDrafter(Eagle(model), model),
        "hydra": lambda: HydraDrafter(Hydra(model), model, torch.arange(60)),
        "ngram": lambda: Chain(NGramDrafter()),
        "suffix": lambda: Chain(SuffixDrafter()),
        "jacobi": Jacobi,
        "cascade": lambda: Cascade(Chain(NGramDrafter()), EagleDrafter(Eagle(model), model)),
    }[kind]
    for seed in range(3):
        prompt = prompt_of(seed)
        prompt = [*prompt, *prompt[2:]]
        assert texts(model, prompt, GREEDY, 20, made())[0] == plain_text(model, prompt, 20)


class Always(TreeSpeculation):
    """A planted wrong rule: a guess is taken although another token was drawn."""

    def walk(self, nodes):
        settled, rows, path = super().walk(nodes)
        if nodes and len(path) == 1 and self.rng.random() < 0.3:
            self.text[-1] = nodes[0].token
            settled[-1] = settled[-1]._replace(token=nodes[0].token)
        return settled, rows, path


class Again(TreeSpeculation):
    """A planted wrong rule: a token that was not guessed is drawn once more."""

    def walk(self, nodes):
        settled, rows, path = super().walk(nodes)
        if nodes and len(path) == 1:
            row = rows[0]
            token = heads.draw(self.strategy.distribution(row, self.text[:-1]), self.rng)
            self.text[-1] = token
            settled[-1] = settled[-1]._replace(token=token)
        return settled, rows, path


def pair_p(kind, draws=500):
    """Return the p of pairs of sampled tokens against their exact distribution."""
    model, prompt = trained(num_layers=1, vocab_size=97).eval(), prompt_of(5, 8)
    strategy = Strategy("top-k", temperature=0.7, top_k=3)
    memory = memory_after(model, prompt)
    with torch.inference_mode():
        first = strategy.distribution(
            memory.logits(torch.tensor([prompt[-1:]]))[0, -1].double().numpy(), prompt
        )
        exact = {}
        for a in np.flatnonzero(first):
            other = memory_after(model, [*prompt, int(a), 0])
            other.crop(len(prompt))
            row = other.logits(torch.tensor([[int(a)]]))[0, -1].double().numpy()
            for b, p in enumerate(strategy.distribution(row, [*prompt, int(a)])):
                if p:
                    exact[int(a), b] = first[a] * p
    best = max(exact, key=exact.get)
    rng, seen = np.random.default_rng(0), Counter()
    for _ in range(draws):
        memory.crop(len(prompt) - 1)
        steps = kind(
            memory,
            prompt,
            strategy,
            rng,
            Fixed([Node(best[0], -1), Node(best[1], 0), Node(best[1], -1)]),
            3,
        )
        seen[tuple(step.token for step in islice(steps, 2))] += 1
    if set(seen) - set(exact):
        return 0.0  # a pair that cannot come
    pairs = [pair for pair in exact if exact[pair] * draws > 5]
    rest = draws * (1 - sum(exact[pair] for pair in pairs))
    counts = [seen[pair] for pair in pairs] + [draws - sum(seen[pair] for pair in pairs)]
    return chi_square_p(np.array(counts), np.array([*(draws * exact[p] for p in pairs), rest]))


class Fixed:
    """Guess the same tree every time."""

    def __init__(self, nodes):
        self.nodes = nodes

    def propose(self, text, states, most):
        return self.nodes[:most]

    def learn(self, rows, path): ...


def test_sampled_texts_have_the_exact_distribution_and_wrong_rules_do_not():
    assert pair_p(TreeSpeculation) > 0.001
    assert pair_p(Always) < 1e-6
    assert pair_p(Again) < 1e-6


# ==== HEADS =======================================================================================
@pytest.mark.parametrize("kind", [Medusa, Eagle, Hydra])
def test_heads_learn_a_text_that_repeats_itself(kind):
    model = model_named("plain").eval()
    torch.manual_seed(0)
    head = kind(model)
    rows = torch.arange(16)[None] % 5 + 20 + torch.arange(16)[:, None]
    losses = []
    train_head(head, model, itertools.repeat(rows), 60, 1e-2, losses.append)
    assert losses[-1] < 0.75 * losses[0]
    assert all(not p.requires_grad for p in model.parameters())


def test_states_are_what_the_head_reads():
    model, tokens = model_named("all").eval(), some_tokens(2, 16)
    states = heads.hidden_states(model, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model.head(states), model.logits(tokens))


def test_eagle_reads_a_text_piece_by_piece_as_at_once():
    model, tokens = model_named("plain").eval(), some_tokens(1, 16)
    torch.manual_seed(0)
    drafter, states = EagleDrafter(Eagle(model), model), heads.hidden_states(model, tokens)[0]
    with torch.inference_mode():
        drafter.predicted(states[:5], tokens[0, 1:6].tolist())
        last = drafter.predicted(states[5:15], tokens[0, 6:16].tolist())
        embedded = heads.normalised(model.tok_emb(tokens[:, 1:]))
        rope = tuple(table[:15] for table in drafter.head.rope)
        wanted = drafter.head(states[None, :15], embedded, rope)[0, -1]
    torch.testing.assert_close(last, wanted, atol=1e-4, rtol=0)


def test_hydra_puts_beside_a_guess_what_is_likelier_than_one_behind_it(monkeypatch):
    model = model_named("plain").eval()
    drafter = HydraDrafter(Hydra(model), model, torch.tensor([7, 8, 9, 10]))
    chances = {"sure": [0.9, 0.05, 0.03, 0.02], "split": [0.4, 0.3, 0.2, 0.1], "none": [0.05] * 4}
    wanted = {
        "sure": [(7, -1), (7, 0), (7, 1)],
        "split": [(7, -1), (8, -1), (9, -1)],
        "none": [],
    }
    for name, p in chances.items():
        monkeypatch.setattr(drafter, "predicted", lambda state, p=p: ([7, 8, 9, 10], p))
        nodes = drafter.propose([2, 3], torch.zeros(1, 32), 8)
        assert [tuple(node) for node in nodes] == wanted[name]
