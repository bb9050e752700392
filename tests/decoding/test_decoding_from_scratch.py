"""docs/decoding_from_scratch.py: gradients as torch's, caches that forget, exact speculation."""

import ast
import importlib.util
import itertools
import math
import random
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st
from plain_adam import PlainAdam

PATH = ROOT / "docs" / "decoding_from_scratch.py"
spec = importlib.util.spec_from_file_location("decoding_from_scratch", PATH)
scratch = sys.modules["decoding_from_scratch"] = importlib.util.module_from_spec(
    spec
)  # dataclasses look it up
spec.loader.exec_module(scratch)

V = len(scratch.ALPHABET)
TRACED = scratch.Traced


def a_model(
    seed: int,
    width: int = 8,
    layers: int = 2,
    heads: int = 2,
    room: int = scratch.ROOM,
    loud: float = 3.0,
):
    """Return a model with random weights, scaled by `loud` so that models disagree strongly."""
    model = scratch.new_model(scratch.Shape(width, layers, heads, room), random.Random(seed))
    return model.mapped(lambda x: loud * x)


def texts(max_size: int = scratch.ROOM - 1):
    return st.lists(st.integers(1, V - 1), max_size=max_size)


def spell(tokens: list[int]) -> str:
    return scratch.decode(tokens)


# ---- Gradients -----------------------------------------------------------------------------------
OPERATIONS = {  # name: our function of three numbers, and torch's if the code differs
    "add": (lambda a, b, c: a + b + a, None),
    "add a float": (lambda a, b, c: a + 2.5, None),
    "mul": (lambda a, b, c: a * b * a, None),
    "mul by a float": (lambda a, b, c: b * -1.5, None),
    "pow": (lambda a, b, c: (a * a + 0.5) ** -0.5 * b, None),
    "exp": (lambda a, b, c: scratch.exp(a * b), lambda a, b, c: (a * b).exp()),
    "relu_squared": (
        lambda a, b, c: scratch.relu_squared(a) * b,
        lambda a, b, c: a.relu().square() * b,
    ),
    "dot": (lambda a, b, c: scratch.dot([a, b, c], [c, b, a]), lambda a, b, c: 2 * a * c + b * b),
    "total": (lambda a, b, c: scratch.total([a, b, c, a]) * c, lambda a, b, c: (2 * a + b + c) * c),
    "surprise": (
        lambda a, b, c: scratch.surprise([a, b * c, c], 1),
        lambda a, b, c: -F.log_softmax(torch.stack([a, b * c, c]), 0)[1],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(values=st.lists(st.floats(-4, 4), min_size=3, max_size=3))
def test_the_gradient_of_each_operation_is_torchs(name, values):
    ours, theirs = OPERATIONS[name]
    mine = [TRACED(x) for x in values]
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]
    result, wanted = ours(*mine), (theirs or ours)(*tensors)
    result.backward()
    grads = torch.autograd.grad(wanted, tensors, allow_unused=True)
    assert result.value == pytest.approx(wanted.item(), rel=1e-12, abs=1e-12)
    assert [x.grad for x in mine] == pytest.approx(
        [0 if g is None else g.item() for g in grads], rel=1e-10, abs=1e-12
    )
    assert ours(*values) == pytest.approx(
        result.value, rel=1e-12, abs=1e-12
    )  # floats give the same value


def test_a_chain_longer_than_the_recursion_limit_works():
    x = y = TRACED(1.0)
    for _ in range(50_000):
        y = y + x
    y.backward()
    assert (y.value, x.grad) == (50_001, 50_001)


def torch_losses(model, weights: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """Return the surprise at each position, computed in torch under a causal mask."""
    shape, rows = model.shape, [[*scratch.encode(name), scratch.END] for name in names]
    T = max(map(len, rows)) - 1
    tokens = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in rows])
    wanted = torch.tensor([row[1:] + [-100] * (T + 1 - len(row)) for row in rows])
    x = weights["letters"][tokens] + weights["places"][:T]

    def heads(y):
        return y.unflatten(-1, (shape.heads, -1)).transpose(1, 2)

    def norm(y):
        return F.rms_norm(y, (shape.width,), eps=1e-6)

    for i in range(shape.layers):
        q, k, v = (heads(norm(x) @ weights[f"{name} {i}"].T) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + y.transpose(1, 2).flatten(2) @ weights[f"mix {i}"].T
        x = x + (norm(x) @ weights[f"up {i}"].T).relu().square() @ weights[f"down {i}"].T
    return F.cross_entropy(
        (norm(x) @ weights["head"].T).flatten(0, 1), wanted.flatten(), reduction="none"
    )


def as_tensors(model) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(m, dtype=torch.float64, requires_grad=True)
        for name, m in model.weights.items()
    }


@pytest.mark.parametrize("layers, heads", [(1, 1), (1, 4), (2, 2)])
def test_the_gradient_of_the_whole_model_is_torchs(layers, heads):
    names = ["tholan", "y", "", "brethikeserath"]
    model = a_model(layers, layers=layers, heads=heads, loud=1.5)
    learner, weights = model.mapped(TRACED), as_tensors(model)
    costs = [cost for name in names for cost in scratch.surprises(learner, name)]
    loss = scratch.total(costs) * (1 / len(costs))
    loss.backward()
    wanted = torch_losses(model, weights, names).sum() / len(costs)
    wanted.backward()
    assert loss.value == pytest.approx(wanted.item(), rel=1e-12)
    for name, matrix in learner.weights.items():
        grads = torch.tensor([[x.grad for x in row] for row in matrix], dtype=torch.float64)
        assert torch.allclose(grads, weights[name].grad, rtol=1e-9, atol=1e-12), name
        assert grads.abs().max() > 1e-6, f"{name} has no part in the loss"


def test_adam_moves_as_torchs_does():
    mine = [TRACED(x) for x in (0.5, -1.0, 2.0)]
    theirs = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    adam, reference = (
        scratch.Adam(mine),
        PlainAdam([theirs], 0.1, beta2=0.99),
    )
    for _ in range(20):
        scratch.dot(mine, [x + float(i) for i, x in enumerate(mine)]).backward()
        adam.step(0.1)
        (theirs * (theirs + torch.arange(3))).sum().backward()
        reference.step()
    assert [x.value for x in mine] == pytest.approx(theirs.tolist(), abs=1e-6)
    assert [x.grad for x in mine] == [0, 0, 0]


# ---- Data and training ---------------------------------------------------------------------------
def test_the_grammar_gives_its_own_names_a_probability(monkeypatch):
    names = scratch.make_names(300, random.Random(1))
    assert len({*names}) == 300 and names == scratch.make_names(300, random.Random(1))
    assert all(scratch.likelihood(name) > 0 and len(name) < scratch.ROOM for name in names)
    assert not any(map(scratch.likelihood, ["tholin", "", "t", "xa", "tholan."]))
    monkeypatch.setattr(scratch, "SYLLABLES", {2: 1})
    monkeypatch.setattr(
        scratch, "ONSETS", {"s": 1, "t": 2, "st": 3}
    )  # "asta" can be cut in two ways
    monkeypatch.setattr(scratch, "INNER_CODAS", {"": 1, "s": 1})
    every = {
        "".join(parts)
        for vowels in scratch.FAMILIES
        for parts in itertools.product(*scratch.slots(vowels, 2))
    }
    assert sum(map(scratch.likelihood, every)) == pytest.approx(1, abs=1e-12)


def test_the_baseline_is_a_distribution_and_training_learns(capsys):
    names = scratch.make_names(30, random.Random(2))
    count = scratch.neighbours(names)
    follow = {
        a: math.exp(count(a * 2) - count(a * 3)) for a in scratch.ALPHABET[1:]
    }  # p(a after a)
    assert all(0 < p < 1 for p in follow.values()) and follow["a"] < 0.02  # two vowels never meet
    before = a_model(3, layers=1, loud=1.0)
    after = scratch.train("tiny", before, names, 20, random.Random(3))
    losses = [
        scratch.nats_a_character(lambda name, m=m: sum(scratch.surprises(m, name)), names)
        for m in (before, after)
    ]
    assert losses[1] < losses[0] - 0.3 and losses[0] < math.log(V) + 0.5
    assert all(isinstance(x, float) for x in after.numbers())
    printed = capsys.readouterr()
    assert printed.out == "" and "tiny: step 20 of 20, loss" in printed.err
    assert "0 s left" in printed.err


# ---- Reading -------------------------------------------------------------------------------------
@given(kept=texts(7), dropped=texts(8), then=texts(8), seed=st.integers(0, 9))
def test_reading_after_a_crop_equals_reading_from_the_start(kept, dropped, then, seed):
    model = a_model(seed)
    reader = scratch.Reader(model)
    whole = reader.read([0, *kept, *dropped])
    reader.crop(1 + len(kept))
    twin = reader.fork()
    twin.read(dropped)  # leaves its origin as it was
    again = reader.read(then)
    fresh = scratch.Reader(model).read([0, *kept, *then])
    assert reader.length == 1 + len(kept) + len(then)
    assert (whole[: 1 + len(kept)], again) == (fresh[: 1 + len(kept)], fresh[1 + len(kept) :])


@given(text=texts(), seed=st.integers(0, 9))
def test_log_probabilities_are_the_models_own(text, seed):
    model = a_model(seed, loud=1.5)
    wanted = -torch_losses(model, as_tensors(model), [spell(text)]).sum().item()
    assert scratch.log_probability(model, [0, *text, 0]) == pytest.approx(wanted, rel=1e-9)


# ---- Strategies ----------------------------------------------------------------------------------
LOGITS = st.lists(st.floats(-30, 30), min_size=1, max_size=30)


@given(
    logits=LOGITS,
    t=st.floats(0.05, 20),
    k=st.integers(1, 40),
    p=st.floats(0.001, 1),
    shift=st.floats(-500, 500),
)
def test_every_strategy_gives_a_distribution_of_the_right_size(logits, t, k, p, shift):
    by_name = {
        "greedy": scratch.greedy(logits),
        "t": scratch.temperature(logits, t),
        "k": scratch.top_k(logits, k),
        "p": scratch.top_p(logits, p),
    }
    own = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0)
    for name, shares in by_name.items():
        assert len(shares) == len(logits) and min(shares) >= 0, name
        assert sum(shares) == pytest.approx(1, abs=1e-12), name
        assert shares[logits.index(max(logits))] == max(shares), name
    assert max(by_name["greedy"]) == 1
    assert sum(x > 0 for x in by_name["k"]) == min(k, len(logits))
    chosen = [i for i, x in enumerate(by_name["p"]) if x > 0]
    assert own[chosen].sum() >= p - 1e-9
    assert (
        own[chosen].sum() - own[chosen].min() < p + 1e-9
    )  # without the least likely it would not be enough
    tempered = torch.softmax(torch.tensor(logits, dtype=torch.float64) / t, 0).tolist()
    assert by_name["t"] == pytest.approx(tempered, abs=1e-12)
    assert scratch.temperature([x + shift for x in logits], t) == pytest.approx(
        by_name["t"], abs=1e-6
    )
    assert scratch.top_k(logits, len(logits)) == pytest.approx(own.tolist(), abs=1e-12)


@given(weights=st.lists(st.floats(0, 1), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_a_draw_never_gives_an_outcome_without_weight(weights, seed):
    assume(sum(weights) > 0)
    draw = scratch.dice(random.Random(seed))
    assert all(weights[draw(weights)] > 0 for _ in range(20))


# ---- Beam ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("penalty", [0, 0.7, 1])
def test_a_wide_beam_finds_the_same_as_a_search_of_everything(penalty):
    model = a_model(5, room=2)
    every = [[0, a, b] for a in range(1, V) for b in range(V)] + [[0, 0]]
    every.sort(key=lambda text: -scratch.log_probability(model, text) / (len(text) - 1) ** penalty)
    found = scratch.beam(model, 40, penalty)
    assert [text for _, text in found] == every[:40]
    assert [x for x, _ in found] == pytest.approx(
        [scratch.log_probability(model, text) for text in every[:40]]
    )


@given(seed=st.integers(0, 30), width=st.integers(1, 4), start=texts(3))
def test_a_beam_gives_the_models_own_probability_of_distinct_texts(seed, width, start):
    model = a_model(seed, layers=1, room=8)
    found = scratch.beam(model, width, 1, spell(start))
    assert len({tuple(text) for _, text in found}) == len(found) == width
    given_start = scratch.log_probability(model, [0, *start]) if start else 0
    assert [x + given_start for x, _ in found] == pytest.approx(
        [scratch.log_probability(model, text) for _, text in found]
    )
    means = [x / (len(text) - 1 - len(start)) for x, text in found]
    assert means == sorted(means, reverse=True)
    assert all(
        text[: len(start) + 1] == [0, *start] and scratch.ended(text, 8) for _, text in found
    )


# ---- Speculation ---------------------------------------------------------------------------------
@given(
    seed=st.integers(0, 999), K=st.integers(1, 6), start=texts(), room=st.integers(5, scratch.ROOM)
)
def test_greedy_speculation_writes_what_greedy_writes(seed, K, start, room):
    target, draft = a_model(seed, room=room), a_model(seed + 1, width=4, layers=1, room=room)
    start, tally = spell(start[: room - 1]), scratch.Tally()
    draw = scratch.dice(random.Random(seed))
    plain = scratch.generate(target, scratch.greedy, draw, start)
    assert (
        scratch.generate_speculatively(target, draft, K, scratch.greedy, draw, tally, start)
        == plain
    )
    assert tally.tokens == len(plain) - 1 - len(start)
    assert (
        tally.kept <= tally.judged <= tally.drafted <= K * tally.passes
        and tally.passes <= tally.tokens
    )
    twin = scratch.Tally()  # a draft that is the target is never refused
    assert (
        scratch.generate_speculatively(target, target, K, scratch.greedy, draw, twin, start)
        == plain
    )
    assert (
        twin.kept == twin.judged == twin.drafted
        and twin.passes <= math.ceil(twin.tokens / (K + 1)) + 1
    )


@given(
    p=st.lists(st.floats(0, 1), min_size=2, max_size=9),
    q=st.lists(st.floats(0, 1), min_size=9, max_size=9),
)
def test_kept_guesses_and_leftovers_add_up_to_p(p, q):
    q = q[: len(p)]
    assume(sum(p) > 1e-3 and sum(q) > 1e-3)
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    rest = scratch.leftover(p, q)
    refused = 1 - sum(map(min, p, q))
    assert sum(rest) == pytest.approx(1)
    assert [min(a, b) + refused * c for a, b, c in zip(p, q, rest, strict=True)] == pytest.approx(
        p, abs=1e-9
    )


def test_every_course_is_counted_once():
    def play(draw):
        first = draw([0.25, 0.0, 0.75])
        return [first, draw([0.5, 0.5])] if first else [first]

    assert sorted(scratch.every_course(play)) == [([0], 0.25), ([2, 0], 0.375), ([2, 1], 0.375)]


@pytest.mark.parametrize(
    "strategy",
    [
        scratch.temperature,
        partial(scratch.temperature, t=0.5),
        partial(scratch.top_k, k=4),
        partial(scratch.top_p, p=0.8),
        scratch.greedy,
    ],
)
def test_speculation_leaves_every_distribution_unchanged(strategy):
    target, draft = a_model(1, layers=1), a_model(2, width=4, layers=1)
    assert scratch.distance(target, draft, 1, strategy, scratch.leftover) < 1e-12
    if strategy is not scratch.temperature:  # fewer courses
        assert scratch.distance(target, draft, 2, strategy, scratch.leftover) < 1e-12
    wrong = scratch.distance(target, draft, 1, strategy, lambda p, q: p)
    assert (
        wrong > 1e-3 or strategy is scratch.greedy
    )  # one certain outcome: there both rules are the same


# ---- The script ----------------------------------------------------------------------------------
def run(*args: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(PATH), *args], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_a_quick_run_prints_every_table(tmp_path):
    done = run("--quick", "--steps", "6", "--seed", "9", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(f"Table {i}." in done.stdout for i in (1, 2, 3)) and "wrote the same" in done.stdout
    for row in (
        "greedy",
        "temperature 1 ",
        "top-k 3",
        "top-p 0.8",
        "beam 10, penalty 1",
        "speculative, K = 3",
        "sampling, K = 4",
        "greedy, K = 1",
        "leftover, max(0, p - q)",
    ):
        assert f"\n  {row}" in done.stdout, row
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "target: step 6 of 6, loss" in done.stderr and "draft: step" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments_and_help(tmp_path):
    bad = run("--steps", "0", cwd=tmp_path)
    assert bad.returncode == 2 and "--steps must be 1 or more, got 0" in bad.stderr.splitlines()[-1]
    shown = run("--help", cwd=tmp_path)
    assert shown.returncode == 0 and all(
        option in shown.stdout for option in ("--quick", "--seed", "--steps")
    )


def test_it_imports_the_standard_library_only():
    imported = [
        node
        for node in ast.walk(ast.parse(PATH.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in imported
        for alias in node.names
    }
    assert names and {name.split(".")[0] for name in names} <= sys.stdlib_module_names
