"""Decoding from scratch: how a language model's numbers become text, in one file of plain Python.

    python docs/decoding_from_scratch.py            # trains, decodes in every way: two minutes
    python docs/decoding_from_scratch.py --quick    # the same with hardly any training: seconds

Read it from top to bottom. Each part uses only the parts above it.

    1  data         a language of names, so small that we know its rules exactly
    2  gradients    numbers that remember how they were computed
    3  model        a transformer that reads one character at a time and remembers
    4  training     Adam, and the baseline to beat
    5  strategies   the output of one step, and the ways to choose a character from it
    6  beam         several texts at once
    7  speculation  a small model guesses, the large one verifies: same text, other speed
    8  proof        every course that chance can take, added up
    9  tables       everything side by side

It imports the standard library only, so that nothing is hidden: no tensors, no kernels. The command
`fairway generate` does the same with the real model, and fairway/decoding/ has the same ideas in a
form that suits a GPU.
"""

from __future__ import annotations

import argparse
import gc
import heapq
import itertools
import math
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter, mul

# ---- 1. Data -------------------------------------------------------------------------------------
# A grammar makes the names. One of its rules cannot be learned from neighbouring characters alone:
# vowel harmony, which Finnish and Turkish have too. All vowels of a name come from one family, so
# `tholan` and `ethil` are valid and `tholin` is not. A model that follows this rule must look back
# across the consonants to an earlier vowel. Attention does that. And because we wrote the grammar,
# we know the score of a perfect model, and we can check whether any text is valid.
#
# Each dictionary below maps a piece of a name to its weight, which says how often it is chosen.
FAMILIES = (
    {"a": 5, "o": 3, "u": 2},
    {"e": 5, "i": 4, "y": 1},
)
ONSETS = {
    "b": 2,
    "d": 3,
    "k": 3,
    "l": 4,
    "m": 4,
    "n": 3,
    "r": 3,
    "s": 3,
    "t": 3,
    "v": 2,
    "br": 1,
    "st": 1,
    "th": 2,
}
FIRST_ONSETS = {"": 6} | ONSETS
INNER_CODAS = {"": 6, "l": 1, "n": 2, "r": 2}
LAST_CODAS = {"": 5, "n": 4, "r": 2, "s": 2, "th": 1}
SYLLABLES = {2: 3, 3: 2}
ALPHABET = "." + "".join(sorted(set("".join([*FAMILIES[0], *FAMILIES[1], *ONSETS]))))
END = 0  # the token of the full stop, which comes before every name and after it
ROOM = 16  # characters that a model can read, including the first full stop


def slots(vowels: dict, syllables: int) -> list[dict]:
    """Return the choices for each piece of a name, in order: a name takes one piece from each."""
    return [FIRST_ONSETS, *[vowels, INNER_CODAS, ONSETS] * (syllables - 1), vowels, LAST_CODAS]


def make_name(rng: random.Random) -> str:
    """Draw a name from the grammar."""
    (syllables,) = rng.choices([*SYLLABLES], [*SYLLABLES.values()])
    return "".join(
        rng.choices([*slot], [*slot.values()])[0] for slot in slots(rng.choice(FAMILIES), syllables)
    )


def likelihood(name: str) -> float:
    """Return the probability that the grammar makes this name; 0 if it is not valid.

    The sum runs over all ways to cut the name into pieces.
    """

    def ways(rest: str, empty: list[dict]) -> float:
        if not empty:
            return float(rest == "")
        fits = ((piece, weight) for piece, weight in empty[0].items() if rest.startswith(piece))
        return sum(weight * ways(rest[len(piece) :], empty[1:]) for piece, weight in fits) / sum(
            empty[0].values()
        )

    shares = (
        (vowels, count, weight / sum(SYLLABLES.values()) / len(FAMILIES))
        for vowels in FAMILIES
        for count, weight in SYLLABLES.items()
    )
    return sum(share * ways(name, slots(vowels, count)) for vowels, count, share in shares)


def make_names(count: int, rng: random.Random) -> list[str]:
    """Return names that all differ, so that no test name occurs in training."""
    names: dict[str, None] = {}  # used as a set that keeps its order
    while len(names) < count:
        names[make_name(rng)] = None
    return [*names]


def encode(start: str) -> list[int]:
    """Return the beginning of a name as tokens: "ab" -> [END, a, b]."""
    return [END, *map(ALPHABET.index, start)]


def decode(text: list[int]) -> str:
    """Return the characters of a text: [END, a, b, END] -> "ab"."""
    return "".join(ALPHABET[token] for token in text if token != END)


# ---- 2. Gradients --------------------------------------------------------------------------------
# How much does the loss change if one weight changes? Let each number remember two things: its
# parents, which are the numbers it was computed from, and its slopes, which say how much it moves
# when each parent moves. Then the chain rule is one line: add slope times the gradient of the child
# to the gradient of the parent. This may happen only once the gradient of the child is complete. So
# we go from the youngest number to the oldest, because a number is always younger than its parents.
class Traced:
    """A float that remembers how it was computed."""

    __slots__ = ("value", "grad", "parents", "slopes", "birth")
    births = itertools.count()

    def __init__(
        self, value: float, parents: tuple[Traced, ...] = (), slopes: tuple[float, ...] = ()
    ):
        self.value, self.grad, self.parents, self.slopes = value, 0.0, parents, slopes
        self.birth = next(Traced.births)

    def __add__(self, other: Traced | float) -> Traced:
        if isinstance(other, Traced):
            return Traced(self.value + other.value, (self, other), (1.0, 1.0))
        return Traced(self.value + other, (self,), (1.0,))

    def __mul__(self, other: Traced | float) -> Traced:
        if isinstance(other, Traced):
            return Traced(self.value * other.value, (self, other), (other.value, self.value))
        return Traced(self.value * other, (self,), (other,))

    def __pow__(self, power: float) -> Traced:
        return Traced(self.value**power, (self,), (power * self.value ** (power - 1),))

    def backward(self) -> None:
        """Add to the `grad` of each ancestor how much this number moves when the ancestor does."""
        reached, frontier = set(), {self}
        while frontier:  # one generation at a time, because a recursion would be too deep
            reached |= frontier
            frontier = set().union(*(number.parents for number in frontier)) - reached
        self.grad += 1.0
        for number in sorted(reached, key=attrgetter("birth"), reverse=True):
            for parent, slope in zip(number.parents, number.slopes, strict=True):
                parent.grad += slope * number.grad


# Every function below also accepts plain floats, and then returns plain floats. So we write the
# model once. It trains with Traced numbers, and it decodes with floats, which is faster.
Number = Traced | float
Vector = list[Number]
Matrix = list[list[Number]]


def plain(x: Number) -> float:
    """Return the value without its history."""
    return x.value if isinstance(x, Traced) else x


def exp(x: Number) -> Number:
    """Return e to the power of x; the slope is the result itself."""
    if isinstance(x, Traced):
        y = math.exp(x.value)
        return Traced(y, (x,), (y,))
    return math.exp(x)


def relu_squared(x: Number) -> Number:
    """Return the square of x if x is positive, else 0."""
    if isinstance(x, Traced):
        y = max(x.value, 0.0)
        return Traced(y * y, (x,), (2 * y,))
    return max(x, 0.0) ** 2


def dot(a: Vector, b: Vector) -> Number:
    """Return the dot product, which is nearly all of the work.

    Single products and sums would be 2n numbers to remember. Here it is one number with 2n parents:
    the slope of each element of a is its partner in b, and the reverse.
    """
    if isinstance(a[0], Traced):
        a_values, b_values = [x.value for x in a], [x.value for x in b]
        return Traced(sum(map(mul, a_values, b_values)), (*a, *b), (*b_values, *a_values))
    return sum(map(mul, a, b))


def total(a: Vector) -> Number:
    """Return the sum."""
    if isinstance(a[0], Traced):
        return Traced(sum(x.value for x in a), tuple(a), (1.0,) * len(a))
    return sum(a)


def log_softmax(logits: list[float]) -> list[float]:
    """Turn any numbers into logarithms of probabilities.

    Subtracting the largest number first changes nothing, because it cancels, but keeps exp from
    overflowing.
    """
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


def surprise(logits: Vector, token: int) -> Number:
    """Return -ln of the probability that softmax gives to this token, in nats.

    This is one number again, because its slopes are simple: the predicted probability of each
    character, minus 1 for the one that came.
    """
    logs = log_softmax([plain(x) for x in logits])
    if isinstance(logits[0], Traced):
        slopes = tuple(math.exp(x) - (i == token) for i, x in enumerate(logs))
        return Traced(-logs[token], tuple(logits), slopes)
    return -logs[token]


# ---- 3. Model ------------------------------------------------------------------------------------
# This transformer reads one token at a time. In every layer it stores a key and a value for each
# token: the key is what later tokens compare with, the value is what they receive. A new token
# compares its query with all keys so far and takes a weighted mean of the values. Later tokens do
# not exist yet when an earlier one is read, so causality needs no mask. And the "KV cache" of
# inference is no later addition: it is simply the memory of the model, in training too.
@dataclass(frozen=True)
class Shape:
    """The size of a model; `room` is the longest text that it can read."""

    width: int
    layers: int
    heads: int
    room: int = ROOM


@dataclass
class Model:
    """Weight matrices by name."""

    shape: Shape
    weights: dict[str, Matrix]

    def mapped(self, change: Callable[[Number], Number]) -> Model:
        """Return the model with every weight changed: .mapped(Traced) can learn, .mapped(plain) is
        fast.
        """
        return Model(
            self.shape,
            {name: [[*map(change, row)] for row in m] for name, m in self.weights.items()},
        )

    def numbers(self) -> list[Number]:
        """Return all weights in one list."""
        return [x for matrix in self.weights.values() for row in matrix for x in row]


def new_model(shape: Shape, rng: random.Random) -> Model:
    """Return a model with random weights, plain floats. A matrix has a row for each output.

    Weights of size `even` keep the size of the vectors that they multiply. Queries and keys start
    small, so that attention starts as an even mean of the past, a safe first guess.
    """

    def matrix(rows: int, columns: int, size: float) -> Matrix:
        return [[rng.gauss(0.0, size) for _ in range(columns)] for _ in range(rows)]

    width, even = shape.width, shape.width**-0.5
    weights = {
        "letters": matrix(len(ALPHABET), width, 0.5),
        "places": matrix(shape.room, width, 0.2),
    }
    for layer in range(shape.layers):
        for name, size in {"query": 0.3, "key": 0.3, "value": 1.0, "mix": 1.0}.items():
            weights[f"{name} {layer}"] = matrix(width, width, size * even)
        weights[f"up {layer}"] = matrix(2 * width, width, even)
        weights[f"down {layer}"] = matrix(width, 2 * width, 0.3 * even)
    return Model(shape, weights | {"head": matrix(len(ALPHABET), width, 0.3 * even)})


def add(a: Vector, b: Vector) -> Vector:
    """Return the sum of two vectors."""
    return [x + y for x, y in zip(a, b, strict=True)]


def linear(matrix: Matrix, x: Vector) -> Vector:
    """Return the matrix times the vector."""
    return [dot(row, x) for row in matrix]


def normed(x: Vector) -> Vector:
    """Return the vector scaled to length sqrt(n) (RMSNorm)."""
    scale = (dot(x, x) * (1 / len(x)) + 1e-6) ** -0.5
    return [y * scale for y in x]


class Reader:
    """A model in the middle of a text: it has read `length` tokens and stores their keys and
    values.
    """

    def __init__(self, model: Model):
        self.model, self.length = model, 0
        # Indexed by layer, token and channel.
        self.keys: list[Matrix] = [[] for _ in range(model.shape.layers)]
        self.values: list[Matrix] = [[] for _ in range(model.shape.layers)]

    def read(self, tokens: list[int]) -> list[Vector]:
        """Return, for each token, the logits of the token after it.

        read(a) followed by read(b) gives the same as read(a + b) and costs the same, because
        nothing is read twice. A GPU reads all tokens of one `read` in parallel: that is one pass.
        """
        return [self.step(token) for token in tokens]

    def crop(self, length: int) -> None:
        """Forget all tokens after the first `length`, as if they had never been read."""
        self.length = min(self.length, length)
        for rows in (*self.keys, *self.values):
            del rows[length:]

    def fork(self) -> Reader:
        """Return a second reader at the same point. Copying the lists is enough: keys and values
        never change.
        """
        twin = Reader(self.model)
        twin.length, twin.keys, twin.values = (
            self.length,
            [k[:] for k in self.keys],
            [v[:] for v in self.values],
        )
        return twin

    def step(self, token: int) -> Vector:
        """Read one token and return the logits.

        x is the state of the model at this position. Each layer adds two things to it: first the
        result of attention to the text so far, then the result of a small network.
        """
        w = self.model.weights
        x = add(w["letters"][token], w["places"][self.length])  # which character, and where
        self.length += 1
        for layer in range(self.model.shape.layers):
            x = add(x, linear(w[f"mix {layer}"], self.attend(layer, normed(x))))
            x = add(
                x,
                linear(
                    w[f"down {layer}"], [*map(relu_squared, linear(w[f"up {layer}"], normed(x)))]
                ),
            )
        return linear(w["head"], normed(x))

    def attend(self, layer: int, x: Vector) -> Vector:
        """Store this token's key and value; return a mean of all values so far, including this one.

        The better a key fits the query, the more its value counts.
        """
        w, shape = self.model.weights, self.model.shape
        self.keys[layer].append(linear(w[f"key {layer}"], x))
        self.values[layer].append(linear(w[f"value {layer}"], x))
        size = shape.width // shape.heads
        # A dot product is a sum of `size` products. This scales it to the size of one of them.
        query = [q * size**-0.5 for q in linear(w[f"query {layer}"], x)]
        mixed = []
        for head in range(shape.heads):  # each head works on its own slice of the channels
            part = slice(head * size, (head + 1) * size)
            scores = [dot(query[part], key[part]) for key in self.keys[layer]]
            # The maximum cancels, as in log_softmax, so it needs no gradient.
            top = max(map(plain, scores))
            shares = [exp(score + -top) for score in scores]
            scale = total(shares) ** -1.0
            channels = zip(*(value[part] for value in self.values[layer]), strict=True)
            mixed += [dot(shares, channel) * scale for channel in channels]
        return mixed


def surprises(model: Model, name: str) -> list[Number]:
    """Return the surprise at each character of the name and at its end, in nats."""
    text = [*encode(name), END]
    return [
        surprise(logits, token)
        for logits, token in zip(Reader(model).read(text[:-1]), text[1:], strict=True)
    ]


def nats_a_character(cost: Callable[[str], float], names: list[str]) -> float:
    """Return the mean cost of a character, given the cost of a name; the end counts as a
    character.
    """
    return sum(map(cost, names)) / sum(len(name) + 1 for name in names)


# ---- 4. Training ---------------------------------------------------------------------------------
# Adam (arXiv 1412.6980) moves each weight along the mean of its recent gradients, divided by their
# typical size, so that all weights move at a similar speed. Both running means start at zero; the
# factor on `rate` below corrects for that.
@dataclass
class Adam:
    """The optimizer, with a running mean of gradients and of their squares for each weight."""

    weights: list[Traced]
    steps: int = 0
    mean: list[float] = field(init=False)
    square: list[float] = field(init=False)

    def __post_init__(self):
        self.mean, self.square = [0.0] * len(self.weights), [0.0] * len(self.weights)

    def step(self, rate: float, keep_mean: float = 0.9, keep_square: float = 0.99) -> None:
        """Move every weight, and set its gradient back to zero."""
        self.steps += 1
        rate *= math.sqrt(1 - keep_square**self.steps) / (1 - keep_mean**self.steps)
        for i, weight in enumerate(self.weights):
            grad, weight.grad = weight.grad, 0.0
            self.mean[i] = mean = keep_mean * self.mean[i] + (1 - keep_mean) * grad
            self.square[i] = square = keep_square * self.square[i] + (1 - keep_square) * grad * grad
            weight.value -= rate * mean / (math.sqrt(square) + 1e-8)


def train(
    title: str, model: Model, names: list[str], steps: int, rng: random.Random, batch: int = 4
) -> Model:
    """Return the model after `steps` steps of `batch` names each; report progress on stderr.

    The learning rate falls linearly to zero.
    """
    learner = model.mapped(Traced)
    adam, began, recent = Adam(learner.numbers()), time.monotonic(), []
    for step in range(1, steps + 1):
        costs = [cost for name in rng.choices(names, k=batch) for cost in surprises(learner, name)]
        loss = total(costs) * (1 / len(costs))
        loss.backward()
        adam.step(rate=0.015 * (1 - (step - 1) / steps))
        recent.append(loss.value)
        if step % max(1, steps // 10) == 0 or step == steps:
            left = (time.monotonic() - began) / step * (steps - step)
            mean_loss, recent = sum(recent) / len(recent), []
            print(
                f"{title}: step {step} of {steps}, loss {mean_loss:.3f}, {left:.0f} s left",
                file=sys.stderr,
            )
    return learner.mapped(plain)


def neighbours(names: list[str]) -> Callable[[str], float]:
    """Return the baseline's cost of a name: it counts which character follows which.

    Counts start at a half, so that nothing is impossible.
    """
    counts = {token: [0.5] * len(ALPHABET) for token in range(len(ALPHABET))}
    for name in names:
        for before, after in itertools.pairwise([*encode(name), END]):
            counts[before][after] += 1
    return lambda name: (
        -sum(
            math.log(counts[before][after] / sum(counts[before]))
            for before, after in itertools.pairwise([*encode(name), END])
        )
    )


# ---- 5. Strategies -------------------------------------------------------------------------------
# A model does not write. It returns logits, one number for each character, and something must
# choose. A strategy turns the logits into the probabilities from which the next character is drawn.
# Greedy decoding then needs no special case: it draws from a distribution with one certain outcome.
# Part 7 uses that.
Strategy = Callable[[list[float]], list[float]]
Draw = Callable[[list[float]], int]  # weights -> the index that was drawn


def temperature(logits: list[float], t: float = 1.0) -> list[float]:
    """Return the model's own distribution at t = 1. Below 1 likely characters gain, above 1
    unlikely ones.
    """
    return [math.exp(x) for x in log_softmax([x / t for x in logits])]


def greedy(logits: list[float]) -> list[float]:
    """Return certainty of the most likely character; among equals, the first."""
    return only([1.0] * len(logits), [logits.index(max(logits))])


def top_k(logits: list[float], k: int) -> list[float]:
    """Keep the k most likely characters, however likely they are."""
    return only(temperature(logits), ranked(logits)[:k])


def top_p(logits: list[float], p: float) -> list[float]:
    """Keep the fewest characters with probability p together: many if the model is in doubt, one if
    it is sure.
    """
    probabilities, chosen, mass = temperature(logits), [], 0.0
    for token in ranked(logits):
        chosen.append(token)
        mass += probabilities[token]
        if mass >= p:
            break
    return only(probabilities, chosen)


def ranked(logits: list[float]) -> list[int]:
    """Return all tokens, the most likely first; equal ones in the order of the alphabet."""
    return sorted(range(len(logits)), key=lambda token: -logits[token])


def only(probabilities: list[float], tokens: list[int]) -> list[float]:
    """Return the probabilities of these tokens alone, scaled to sum to one again."""
    mass = sum(probabilities[token] for token in tokens)
    return [x / mass if token in tokens else 0.0 for token, x in enumerate(probabilities)]


def dice(rng: random.Random) -> Draw:
    """Return a draw that takes its chance from `rng`."""
    return lambda weights: rng.choices(range(len(weights)), weights)[0]


def ended(text: list[int], room: int) -> bool:
    """Return True if the name has its full stop, or if the model has no room left to read."""
    return len(text) > room or (len(text) > 1 and text[-1] == END)


def generate(model: Model, strategy: Strategy, draw: Draw, start: str = "") -> list[int]:
    """Write a text. This is all of autoregressive decoding: read the new token, turn the last
    logits into probabilities, draw, append, and repeat.
    """
    reader, text = Reader(model), encode(start)
    while not ended(text, model.shape.room):
        text.append(draw(strategy(reader.read(text[reader.length :])[-1])))
    return text


def log_probability(model: Model, text: list[int]) -> float:
    """Return ln p of a text by the model itself, whichever strategy wrote it.

    Filtered probabilities would not do: they would reward a strategy for what it rules out.
    """
    logits = Reader(model).read(text[:-1])
    return sum(log_softmax(row)[token] for row, token in zip(logits, text[1:], strict=True))


# ---- 6. Beam search ------------------------------------------------------------------------------
# Greedy decoding takes the best next character, but the best name need not begin with it. Beam
# search continues the `width` best beginnings at once. A sum of logarithms only falls as a name
# grows, so ln p alone prefers short names. Dividing by length**penalty weakens this; penalty 1
# compares the mean per character.
def beam(
    model: Model, width: int, penalty: float, start: str = ""
) -> list[tuple[float, list[int]]]:
    """Return the best names, at most `width`, best first, as (ln p of the part after the start,
    text).
    """

    def score(candidate: tuple) -> float:
        return candidate[0] / (len(candidate[1]) - len(prefix)) ** penalty

    prefix = encode(start)
    live, done = [(0.0, prefix, Reader(model))], []
    while live:
        grown = []
        for log_p, text, reader in live:
            logs = log_softmax(reader.read(text[reader.length :])[-1])
            grown += [(log_p + x, [*text, token], reader) for token, x in enumerate(logs)]
        done += [(log_p, text) for log_p, text, _ in grown if ended(text, model.shape.room)]
        grown = [candidate for candidate in grown if not ended(candidate[1], model.shape.room)]
        live = [
            (log_p, text, reader.fork())
            for log_p, text, reader in heapq.nlargest(width, grown, key=score)
        ]
    return heapq.nlargest(width, done, key=score)


# ---- 7. Speculative decoding ---------------------------------------------------------------------
# A pass of a large model costs nearly the same for one token as for five, because most of the time
# goes into loading the weights. So let a small model, the draft, guess K characters one by one, and
# let the large model, the target, read all of them in one pass (arXiv 2211.17192, 2302.01318). The
# pass returns the target's distribution at each position, the same as it would have returned one by
# one.
#
# Let q be the draft's probabilities at a position and p the target's. The guess x was drawn from q.
# Keep it with probability min(1, p(x) / q(x)). At the first guess that is refused, draw another
# character from max(0, p - q), scaled to sum to one; drop the later guesses, and let both models
# forget them. If all guesses are kept, the pass has one more distribution to draw from. So K
# guesses give up to K + 1 characters.
#
# Why does nothing change? A character x can come out in two ways.
#
#   - It is guessed and kept. The probability is q(x) · min(1, p(x) / q(x)) = min(p(x), q(x)).
#   - A guess is refused, and x is drawn instead. Refusal has probability 1 - Σ min(p, q), and the
#     draw has probability max(0, p(x) - q(x)) / Σ max(0, p - q). Because max(0, p - q) is p -
#     min(p, q), its sum is also 1 - Σ min(p, q), and the two cancel. What remains is max(0, p(x) -
#     q(x)).
#
# Together: min(p(x), q(x)) + max(0, p(x) - q(x)) = p(x). A bad draft costs time and nothing else.
#
# Greedy decoding is a special case: p and q are each certain of one character, and a guess is kept
# if they agree. Our `read` takes tokens one after the other, so this file saves no seconds. It
# counts passes.
@dataclass
class Tally:
    """Counts of what speculation did. Guesses after a refused one are drafted but never judged."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    judged: int = 0
    kept: int = 0


def leftover(p: list[float], q: list[float]) -> list[float]:
    """Return the distribution to draw from after a refusal."""
    rest = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    mass = sum(rest)
    return [x / mass for x in rest] if mass else p  # p and q differ by rounding only


def speculate(
    target: Reader,
    draft: Reader,
    text: list[int],
    K: int,
    strategy: Strategy,
    draw: Draw,
    tally: Tally,
    instead: Callable[[list[float], list[float]], list[float]] = leftover,
) -> list[int]:
    """Return the next 1 to K + 1 tokens after `text`, for one pass of the target."""
    K = min(K, target.model.shape.room - len(text))  # the target must have room to read all of it
    guesses, q = [], []
    while len(guesses) < K and END not in guesses:
        q.append(strategy(draft.read((text + guesses)[draft.length :])[-1]))
        guesses.append(draw(q[-1]))
    logits = target.read((text + guesses)[target.length :])
    p = [strategy(row) for row in logits[len(logits) - len(guesses) - 1 :]]
    tally.passes, tally.drafted = tally.passes + 1, tally.drafted + len(guesses)
    for i, guess in enumerate(guesses):
        keep = min(1.0, p[i][guess] / q[i][guess])
        tally.judged += 1
        if draw([1 - keep, keep]) == 0:
            for reader in (target, draft):
                reader.crop(len(text) + i)  # forget this guess and those after it
            return [*guesses[:i], draw(instead(p[i], q[i]))]
        tally.kept += 1
    # All guesses are kept. The pass gave one more distribution, so one more token is free.
    return guesses if END in guesses else [*guesses, draw(p[-1])]


def generate_speculatively(
    target: Model,
    draft: Model,
    K: int,
    strategy: Strategy,
    draw: Draw,
    tally: Tally,
    start: str = "",
) -> list[int]:
    """Write a text with the same probabilities as `generate`, in fewer passes of the target."""
    readers, text = (Reader(target), Reader(draft)), encode(start)
    while not ended(text, target.shape.room):
        new = speculate(*readers, text, K, strategy, draw, tally)
        tally.tokens += len(new)
        text += new
    return text


# ---- 8. Proof ------------------------------------------------------------------------------------
# The argument above is about a formula. Does it also hold for the code? Samples could only make it
# plausible. But `draw` is the only source of chance in `speculate`, so we can run every course that
# it can take. Whenever it draws, we run it once for each outcome and multiply the probabilities.
# The result is exact, and it is about the code itself.
class Course:
    """A `draw` that follows a script of outcomes; after it, the first outcome of each new draw is
    taken and the others are noted for later courses.
    """

    def __init__(self, script: list[int]):
        self.script, self.taken, self.chance = script, [], 1.0
        self.others: list[list[int]] = []

    def draw(self, weights: list[float]) -> int:
        if len(self.taken) < len(self.script):
            outcome = self.script[len(self.taken)]
        else:
            outcome, *others = (i for i, weight in enumerate(weights) if weight > 0)
            self.others += [[*self.taken, other] for other in others]
        self.taken.append(outcome)
        self.chance *= weights[outcome]
        return outcome


def every_course(play: Callable[[Draw], list[int]]) -> Iterator[tuple[list[int], float]]:
    """Yield each result of `play(draw)` with its probability, once for each course that leads to
    it.
    """
    scripts: list[list[int]] = [[]]
    while scripts:
        course = Course(scripts.pop())
        result = play(course.draw)
        scripts += course.others
        yield result, course.chance


class ByHeart(Reader):
    """A reader that computes each text once and remembers the logits: `every_course` reads the same
    few texts many times.
    """

    def __init__(self, model: Model):
        super().__init__(model)
        self.text: tuple[int, ...] = ()
        self.known: dict[tuple[int, ...], Vector] = {}

    def step(self, token: int) -> Vector:
        self.text, self.length = (*self.text, token), self.length + 1
        if self.text not in self.known:
            self.known[self.text] = Reader(self.model).read([*self.text])[-1]
        return self.known[self.text]

    def crop(self, length: int) -> None:
        self.text, self.length = self.text[:length], length


def first_two(
    target: Reader, strategy: Strategy, results: Iterator[tuple[list[int], float]]
) -> dict[tuple, float]:
    """Return the probability of each beginning of two tokens (or of END alone).

    A text starts with one of the results, and the target continues by itself. If a round is exact,
    this equals what the target writes alone, and later rounds follow by induction.
    """
    chances: dict[tuple, float] = defaultdict(float)
    for tokens, chance in results:
        if len(tokens) > 1 or tokens == [END]:
            chances[tuple(tokens[:2])] += chance
        else:
            target.crop(0)
            for token, p in enumerate(strategy(target.read([END, *tokens])[-1])):
                chances[*tokens, token] += chance * p
    return chances


def distance(
    target_model: Model, draft_model: Model, K: int, strategy: Strategy, instead: Callable
) -> float:
    """Return the total variation between the beginnings of `speculate` and those of the target.

    It is half the sum of all differences: 0 if they agree, 1 if they have nothing in common. It is
    computed, not sampled.
    """
    target, draft = ByHeart(target_model), ByHeart(draft_model)

    def one_round(draw: Draw) -> list[int]:
        target.crop(0), draft.crop(0)
        return speculate(target, draft, [END], K, strategy, draw, Tally(), instead)

    alone = enumerate(strategy(Reader(target_model).read([END])[-1]))
    wanted = first_two(target, strategy, (([token], p) for token, p in alone))
    written = first_two(target, strategy, every_course(one_round))
    return sum(abs(written[start] - wanted[start]) for start in {*written, *wanted}) / 2


# ---- 9. Tables -----------------------------------------------------------------------------------
# What to look for in the tables:
#
#   - The likeliest text is not a typical one. Without a penalty, beam search finds the highest ln p
#     of all, mostly in names that are too short to be valid.
#   - A higher temperature gives more variety and fewer valid names.
#   - A filter removes many errors of the model, because most of them are unlikely characters.
#   - Speculation has the same columns as temperature 1, up to chance. It gains as long as guesses
#     are cheap and good. Beyond some K, more guesses cost as much as they save.
STRATEGIES: dict[str, Strategy] = {
    "greedy": greedy,
    "temperature 0.6": partial(temperature, t=0.6),
    "temperature 1": temperature,
    "temperature 1.5": partial(temperature, t=1.5),
    "top-k 3": partial(top_k, k=3),
    "top-p 0.8": partial(top_p, p=0.8),
}


def print_table(head: str, rows: list[list]) -> None:
    """Print a table: the first column to the left, the others to the right."""
    cells = [head.split("|"), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = (
            cell.strip().rjust(width) for cell, width in zip(row, widths, strict=True)
        )
        print("  " + "  ".join([first.strip().ljust(widths[0]), *others]))
    print()


def print_losses(models: dict[str, Model], names: list[str], held_out: list[str]) -> None:
    """Print the cost of a character for each model, the baseline and the grammar."""
    print(f"Nats a character on {len(held_out)} names that no model was trained on:\n")
    costs = {
        "all characters equally likely": lambda name: (len(name) + 1) * math.log(len(ALPHABET)),
        "which follows which, counted": neighbours(names),
    }
    costs |= {
        f"{title}, {len(model.numbers())} weights": lambda name, model=model: sum(
            surprises(model, name)
        )
        for title, model in models.items()
    }
    costs["the grammar itself: the best possible"] = lambda name: -math.log(likelihood(name))
    print_table(
        "|trained on|held out",
        [
            [title, *(f"{nats_a_character(cost, part):.3f}" for part in (names, held_out))]
            for title, cost in costs.items()
        ],
    )


def print_step(model: Model) -> None:
    """Print the probabilities after a few beginnings."""

    def line(title: str, strategy: Strategy, start: str) -> None:
        p = strategy(Reader(model).read(encode(start))[-1])
        print(
            f"  {title:<16}" + "  ".join(f"{ALPHABET[i]} {p[i]:.2f}" for i in ranked(p)[:7] if p[i])
        )

    print("The target after two beginnings: does it see the vowel across the m?\n")
    for start in ("thom", "them"):
        line(start, temperature, start)
    print("\nAfter 'thor': the same logits, as each strategy would draw from them:\n")
    for title, strategy in STRATEGIES.items():
        line(title, strategy, "thor")
    print()


def print_diversity(written: dict[str, list[list[int]]], model: Model, names: list[str]) -> None:
    """Print names of each strategy, and how varied, new and valid they are."""
    print("Side by side:\n")
    rows = []
    for title, texts in written.items():
        spelled = [decode(text) for text in texts]
        print(f"  {title:<20}{' '.join(name or '-' for name in spelled)[:58].rsplit(' ', 1)[0]}")
        new = sum(name not in names for name in spelled)
        valid = sum(likelihood(name) > 0 for name in spelled)
        rows.append(
            [
                title,
                len(spelled),
                len({*spelled}),
                *(f"{x / len(spelled):.0%}" for x in (new, valid)),
                f"{sum(map(len, spelled)) / len(spelled):.2f}",
                f"{sum(log_probability(model, text) for text in texts) / len(spelled):.2f}",
            ]
        )
    print(
        "\nTable 1. Diversity. New: not in the training list. Valid: the grammar can make\n"
        "it. Length and ln p are means of a name; ln p is the model's own, unfiltered.\n"
    )
    print_table("strategy|names|distinct|new|valid|length|ln p", rows)


def print_acceptance(tallies: dict[str, Tally], cost: float) -> None:
    """Print how many guesses were kept, and what that gains; `cost` is that of one guess."""
    print(
        "Table 2. Speculation. Judged, drafted: the share of such guesses that was kept.\n"
        "A pass: tokens for each pass of the target; plain decoding has 1. Saved: share\n"
        "of the passes. Gain: the speed-up if a pass costs 1, however much it reads, and\n"
        f"a guess {cost:.2f}: the ratio of draft to target in multiplications.\n"
    )
    print_table(
        "|judged|drafted|tokens|passes|a pass|saved|gain",
        [
            [
                title,
                f"{t.kept / t.judged:.1%}",
                f"{t.kept / t.drafted:.1%}",
                t.tokens,
                t.passes,
                f"{t.tokens / t.passes:.2f}",
                f"{1 - t.passes / t.tokens:.0%}",
                f"{t.tokens / (t.passes + cost * t.drafted):.2f}x",
            ]
            for title, t in tallies.items()
        ],
    )


def print_proof(target: Model, draft: Model) -> None:
    """Print how far speculation is from the target, for the right rule and for a wrong one."""
    print(
        "Table 3. Proof. All courses of a round added up: how far the first two\n"
        "characters are from those of the target alone (total variation, 0 to 1).\n"
        "The second rule sounds right, and is wrong.\n"
    )
    rules = {"leftover, max(0, p - q)": leftover, "the target's p": lambda p, q: p}
    print_table(
        "after a refusal, draw from|K = 1|K = 2",
        [
            [title, *(f"{distance(target, draft, K, temperature, rule):.1e}" for K in (1, 2))]
            for title, rule in rules.items()
        ],
    )


def decode_in_every_way(
    target: Model, draft: Model, starts: list[str], samples: int, rng: random.Random
) -> tuple:
    """Return the texts of each strategy and the tallies of speculation, by title."""
    draw = dice(rng)
    written = {
        title: [generate(target, strategy, draw) for _ in range(samples)]
        for title, strategy in STRATEGIES.items()
    }
    for penalty in (0, 1):
        written[f"beam 10, penalty {penalty}"] = [text for _, text in beam(target, 10, penalty)]
    plain_greedy, tallies = [generate(target, greedy, draw, start) for start in starts], {}
    for K in (1, 2, 3, 4):
        tally = tallies[f"sampling, K = {K}"] = Tally()
        texts = [
            generate_speculatively(target, draft, K, temperature, draw, tally)
            for _ in range(samples)
        ]
        written |= {"speculative, K = 3": texts} if K == 3 else {}
    for K in (1, 2, 3, 4):
        tally = tallies[f"greedy, K = {K}"] = Tally()
        same = [
            generate_speculatively(target, draft, K, greedy, draw, tally, start) for start in starts
        ]
        assert same == plain_greedy, "greedy speculation must write what greedy writes"
    return written, tallies


def multiplications(model: Model) -> int:
    """Return the multiplications that one token takes, without the few of attention."""
    return sum(
        len(m) * len(m[0]) for name, m in model.weights.items() if name not in ("letters", "places")
    )


def run(seed: int, steps: int, samples: int, to_learn: int) -> None:
    """Train both models, decode in every way, print the tables."""
    rng, began = random.Random(seed), time.monotonic()
    everything = make_names(to_learn + to_learn // 4, rng)
    names, held_out = everything[:to_learn], everything[to_learn:]
    print(f"{len(names)} names to learn from, such as {', '.join(names[:5])}.\n")
    target = train("target", new_model(Shape(width=16, layers=1, heads=4), rng), names, steps, rng)
    draft = train("draft", new_model(Shape(width=8, layers=1, heads=2), rng), names, steps, rng)
    print_losses({"draft": draft, "target": target}, names, held_out)
    print_step(target)
    starts = sorted({name[:2] for name in held_out})
    written, tallies = decode_in_every_way(target, draft, starts, samples, rng)
    print_diversity(written, target, names)
    print_acceptance(tallies, multiplications(draft) / multiplications(target))
    print(f"Greedy speculation wrote the same {len(starts)} names as greedy, with every K.\n")
    print_proof(target, draft)
    print(f"{time.monotonic() - began:.0f} seconds.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=4, help="seed of names, weights, batches and draws (default: 4)"
    )
    parser.add_argument("--steps", type=int, help="training steps of each model (default: 700)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="100 names, 12 steps, 20 samples a strategy",
    )
    args = parser.parse_args()
    steps = args.steps if args.steps is not None else 12 if args.quick else 700
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")
    gc.disable()  # numbers never form cycles, so the collector would search for nothing
    sys.stdout.reconfigure(line_buffering=True)
    try:
        run(
            args.seed,
            steps,
            **(
                {"samples": 20, "to_learn": 100}
                if args.quick
                else {"samples": 500, "to_learn": 800}
            ),
        )
    except KeyboardInterrupt:
        sys.exit("stopped")
    except BrokenPipeError:  # after `| head`; Python would write once more at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
