"""Decoding from scratch: how a language model's numbers become text, in one file of plain Python.

    python docs/decoding_from_scratch.py            # a minute or two: models learn, write in every way, are compared
    python docs/decoding_from_scratch.py --quick    # seconds: the same road with hardly any training

Read it from top to bottom; each part uses only what stands above it.

    1  data         a language of names, small enough that we know all of its laws
    2  gradients    numbers that remember how they were made
    3  model        a transformer that reads one character at a time and remembers
    4  training     Adam, and what there is to beat
    5  strategies   what a step gives, and the few ways to choose from it
    6  beam         several texts at once
    7  speculation  a small model guesses, the large one checks, and nothing changes but the speed
    8  proof        every course that chance can take, added up
    9  tables       all of it side by side

Only the standard library is imported, so nothing is hidden: no tensors, no kernels. `fairway generate` does the same with
the real model, and fairway/decoding/ holds these ideas in the shapes that a GPU likes.
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

# ---- 1. Data ---------------------------------------------------------------------------------------------------------
# A grammar makes the names. One of its laws is out of reach for whoever sees only neighbours: vowel harmony, as in
# Finnish or Turkish. All vowels of a name come from one family, so `tholan` and `ethil` are lawful and `tholin` is
# not. To obey, a model must look back across the consonants to a vowel it has read, and that is what attention is for.
# Since the grammar is ours, we also know what a perfect model would score, and of any text whether it is lawful.
FAMILIES = (
    {"a": 5, "o": 3, "u": 2},
    {"e": 5, "i": 4, "y": 1},
)  # a piece, and how often it comes against its like
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
END = 0  # the full stop stands before every name and after it
ROOM = 16  # characters that a model can read, the first full stop included


def slots(vowels: dict, syllables: int) -> list[dict]:
    """A name is one piece from each of these, in this order."""
    return [FIRST_ONSETS, *[vowels, INNER_CODAS, ONSETS] * (syllables - 1), vowels, LAST_CODAS]


def make_name(rng: random.Random) -> str:
    (syllables,) = rng.choices([*SYLLABLES], [*SYLLABLES.values()])
    return "".join(
        rng.choices([*slot], [*slot.values()])[0] for slot in slots(rng.choice(FAMILIES), syllables)
    )


def likelihood(name: str) -> float:
    """The probability that the grammar makes this name, summed over all ways to cut it into pieces; 0: not lawful."""

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
    """Names that all differ, so that none can be learned in training and asked for afterwards."""
    names: dict[str, None] = {}  # a set that keeps its order
    while len(names) < count:
        names[make_name(rng)] = None
    return [*names]


def encode(start: str) -> list[int]:
    """The beginning of a name as tokens: "ab" -> [END, a, b]."""
    return [END, *map(ALPHABET.index, start)]


def decode(text: list[int]) -> str:
    """[END, a, b, END] -> "ab"."""
    return "".join(ALPHABET[token] for token in text if token != END)


# ---- 2. Gradients ----------------------------------------------------------------------------------------------------
# How much does the loss change when one weight does? Let each number remember from which numbers it was made, its
# parents, and by how much it moves when each of them moves, its slopes. Then the chain rule is one line: a parent's
# gradient grows by slope times the gradient of what was made from it. It must run only once the latter is complete, so
# from youngest to oldest: nobody is born before their parents.
class Traced:
    """A float that remembers how it was made."""

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
        """Adds to the `grad` of all that this number came from, how much this number moves with it."""
        reached, frontier = set(), {self}
        while frontier:  # generation by generation, as a recursion would be too deep
            reached |= frontier
            frontier = set().union(*(number.parents for number in frontier)) - reached
        self.grad += 1.0
        for number in sorted(reached, key=attrgetter("birth"), reverse=True):
            for parent, slope in zip(number.parents, number.slopes, strict=True):
                parent.grad += slope * number.grad


# Every function below takes plain floats too, and then gives plain floats: the model is written once, learns with
# Traced numbers, and decodes with floats, which is faster and leaves no trace.
Number = Traced | float
Vector = list[Number]
Matrix = list[list[Number]]


def plain(x: Number) -> float:
    return x.value if isinstance(x, Traced) else x


def exp(x: Number) -> Number:
    if isinstance(x, Traced):
        y = math.exp(x.value)
        return Traced(y, (x,), (y,))
    return math.exp(x)


def relu_squared(x: Number) -> Number:
    if isinstance(x, Traced):
        y = max(x.value, 0.0)
        return Traced(y * y, (x,), (2 * y,))
    return max(x, 0.0) ** 2


def dot(a: Vector, b: Vector) -> Number:
    """Nearly all of the work. As single products and sums it would be 2n numbers to remember; here it is one, with 2n
    parents: the slope along each of a is its partner in b, and the other way round."""
    if isinstance(a[0], Traced):
        a_values, b_values = [x.value for x in a], [x.value for x in b]
        return Traced(sum(map(mul, a_values, b_values)), (*a, *b), (*b_values, *a_values))
    return sum(map(mul, a, b))


def total(a: Vector) -> Number:
    if isinstance(a[0], Traced):
        return Traced(sum(x.value for x in a), tuple(a), (1.0,) * len(a))
    return sum(a)


def log_softmax(logits: list[float]) -> list[float]:
    """Any numbers become logarithms of probabilities. The largest is taken off first: this changes nothing, as it
    cancels, except that exp can no longer overflow."""
    top = max(logits)
    log_sum = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - log_sum for x in logits]


def surprise(logits: Vector, token: int) -> Number:
    """-ln of the probability that softmax gives to this token, in nats. One number again, as its slopes are so simple:
    what the model expected, minus what came."""
    logs = log_softmax([plain(x) for x in logits])
    if isinstance(logits[0], Traced):
        slopes = tuple(math.exp(x) - (i == token) for i, x in enumerate(logs))
        return Traced(-logs[token], tuple(logits), slopes)
    return -logs[token]


# ---- 3. Model --------------------------------------------------------------------------------------------------------
# A transformer that reads one token at a time. Of each token it keeps a key (what it can be found by) and a value
# (what it has to say) in every layer; the next token compares its query with all keys and takes in a mixture of the
# values. The past cannot see the future because the future is not there yet, so causality needs no mask. And the
# memory that inference calls a "KV cache" is no trick added later: it is simply what the model remembers, in training
# too.
@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    heads: int
    room: int = ROOM


@dataclass
class Model:
    shape: Shape
    weights: dict[str, Matrix]

    def mapped(self, change: Callable[[Number], Number]) -> Model:
        """The same model with every weight changed: .mapped(Traced) can learn, .mapped(plain) is fast."""
        return Model(
            self.shape,
            {name: [[*map(change, row)] for row in m] for name, m in self.weights.items()},
        )

    def numbers(self) -> list[Number]:
        return [x for matrix in self.weights.values() for row in matrix for x in row]


def new_model(shape: Shape, rng: random.Random) -> Model:
    """Weights of plain floats; a matrix has a row for each output, and `even` keeps the size of what it multiplies.
    Queries and keys start small: attention is at first a plain mean of the past, which is never wrong by much."""

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
    return [x + y for x, y in zip(a, b, strict=True)]


def linear(matrix: Matrix, x: Vector) -> Vector:
    return [dot(row, x) for row in matrix]


def normed(x: Vector) -> Vector:
    """RMSNorm: the same direction, at length sqrt(n)."""
    scale = (dot(x, x) * (1 / len(x)) + 1e-6) ** -0.5
    return [y * scale for y in x]


class Reader:
    """A model in the middle of a text: it has read `length` tokens, and keeps their `keys` and `values`."""

    def __init__(self, model: Model):
        self.model, self.length = model, 0
        self.keys: list[Matrix] = [
            [] for _ in range(model.shape.layers)
        ]  # a layer, a token, a channel
        self.values: list[Matrix] = [[] for _ in range(model.shape.layers)]

    def read(self, tokens: list[int]) -> list[Vector]:
        """For each token the logits of the one after it: what the model says at this point of the text.

        .read(a) and then .read(b) give what .read(a + b) gives, and cost as much: nothing is read twice. A GPU would
        take all tokens of one `read` in parallel, a pass."""
        return [self.step(token) for token in tokens]

    def crop(self, length: int) -> None:
        """Forgets all tokens but the first `length`, as if the others had never been read."""
        self.length = min(self.length, length)
        for kept in (*self.keys, *self.values):
            del kept[length:]

    def fork(self) -> Reader:
        """A second reader at the same point. Only the lists are copied: what has been read never changes."""
        twin = Reader(self.model)
        twin.length, twin.keys, twin.values = (
            self.length,
            [k[:] for k in self.keys],
            [v[:] for v in self.values],
        )
        return twin

    def step(self, token: int) -> Vector:
        """One token in, logits out. x is what the model thinks at this place; each layer adds to it, first what it
        finds in the text so far, then what it makes of that."""
        w = self.model.weights
        x = add(w["letters"][token], w["places"][self.length])  # who it is, and where
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
        """Leaves this token's key and value for later ones, and takes from all values so far, this one included, as
        much of each as its key fits the query."""
        w, shape = self.model.weights, self.model.shape
        self.keys[layer].append(linear(w[f"key {layer}"], x))
        self.values[layer].append(linear(w[f"value {layer}"], x))
        size = shape.width // shape.heads
        query = [
            q * size**-0.5 for q in linear(w[f"query {layer}"], x)
        ]  # a sum of `size` products, at the size of one
        mixed = []
        for head in range(shape.heads):  # each head looks through its own slice of the channels
            part = slice(head * size, (head + 1) * size)
            scores = [dot(query[part], key[part]) for key in self.keys[layer]]
            top = max(
                map(plain, scores)
            )  # cancels, as in log_softmax, so it may be a constant with no gradient
            shares = [exp(score + -top) for score in scores]
            scale = total(shares) ** -1.0
            channels = zip(*(value[part] for value in self.values[layer]), strict=True)
            mixed += [dot(shares, channel) * scale for channel in channels]
        return mixed


def surprises(model: Model, name: str) -> list[Number]:
    """Of each character of the name and of its end, in nats."""
    text = [*encode(name), END]
    return [
        surprise(logits, token)
        for logits, token in zip(Reader(model).read(text[:-1]), text[1:], strict=True)
    ]


def nats_a_character(cost: Callable[[str], float], names: list[str]) -> float:
    """`cost` of a whole name in nats; its end counts as a character."""
    return sum(map(cost, names)) / sum(len(name) + 1 for name in names)


# ---- 4. Training -----------------------------------------------------------------------------------------------------
# Adam (arXiv 1412.6980) follows the mean of each weight's recent gradients, divided by their typical size: all weights
# then move at one pace. Both means start at zero, and the divisors below make up for that.
@dataclass
class Adam:
    weights: list[Traced]
    steps: int = 0
    mean: list[float] = field(init=False)
    square: list[float] = field(init=False)

    def __post_init__(self):
        self.mean, self.square = [0.0] * len(self.weights), [0.0] * len(self.weights)

    def step(self, rate: float, keep_mean: float = 0.9, keep_square: float = 0.99) -> None:
        """Moves every weight, and sets its gradient back to zero."""
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
    """The same model, taught by steps of `batch` names at a rate that falls to zero; tells stderr how it goes."""
    learner = model.mapped(Traced)
    adam, begun, lately = Adam(learner.numbers()), time.monotonic(), []
    for step in range(1, steps + 1):
        costs = [cost for name in rng.choices(names, k=batch) for cost in surprises(learner, name)]
        loss = total(costs) * (1 / len(costs))
        loss.backward()
        adam.step(rate=0.015 * (1 - (step - 1) / steps))
        lately.append(loss.value)
        if step % max(1, steps // 10) == 0 or step == steps:
            left = (time.monotonic() - begun) / step * (steps - step)
            loss_lately, lately = sum(lately) / len(lately), []
            print(
                f"{title}: step {step} of {steps}, loss {loss_lately:.3f}, {left:.0f} s left",
                file=sys.stderr,
            )
    return learner.mapped(plain)


def neighbours(names: list[str]) -> Callable[[str], float]:
    """The baseline: which character follows which, by counting, from a half, so that nothing is impossible."""
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


# ---- 5. Strategies ---------------------------------------------------------------------------------------------------
# A model writes nothing. It gives logits, one number a character, and somebody has to choose. A strategy turns the
# logits into the probabilities with which the next character is drawn. Seen so, greedy is no special case: it draws
# too, from a distribution with one certain outcome. That will pay in part 7.
Strategy = Callable[[list[float]], list[float]]
Draw = Callable[[list[float]], int]  # weights -> the index that was drawn


def temperature(logits: list[float], t: float = 1.0) -> list[float]:
    """t = 1 is the model's own distribution; below 1 the likely gets likelier, above 1 the unlikely does."""
    return [math.exp(x) for x in log_softmax([x / t for x in logits])]


def greedy(logits: list[float]) -> list[float]:
    """The most likely, always; of equals the first."""
    return only([1.0] * len(logits), [logits.index(max(logits))])


def top_k(logits: list[float], k: int) -> list[float]:
    """The k most likely, however likely they are."""
    return only(temperature(logits), ranked(logits)[:k])


def top_p(logits: list[float], p: float) -> list[float]:
    """As few as together have probability p: many where the model is in doubt, one where it is sure."""
    probabilities, chosen, mass = temperature(logits), [], 0.0
    for token in ranked(logits):
        chosen.append(token)
        mass += probabilities[token]
        if mass >= p:
            break
    return only(probabilities, chosen)


def ranked(logits: list[float]) -> list[int]:
    """All tokens, the most likely first; equals in the order of the alphabet."""
    return sorted(range(len(logits)), key=lambda token: -logits[token])


def only(probabilities: list[float], tokens: list[int]) -> list[float]:
    """These tokens alone, in their proportions, so that they sum to one again."""
    mass = sum(probabilities[token] for token in tokens)
    return [x / mass if token in tokens else 0.0 for token, x in enumerate(probabilities)]


def dice(rng: random.Random) -> Draw:
    return lambda weights: rng.choices(range(len(weights)), weights)[0]


def ended(text: list[int], room: int) -> bool:
    """A name ends with a full stop, or where the model has no place left to read."""
    return len(text) > room or (len(text) > 1 and text[-1] == END)


def generate(model: Model, strategy: Strategy, draw: Draw, start: str = "") -> list[int]:
    """All of autoregressive decoding: read what is new, shape the last logits, draw, write, again."""
    reader, text = Reader(model), encode(start)
    while not ended(text, model.shape.room):
        text.append(draw(strategy(reader.read(text[reader.length :])[-1])))
    return text


def log_probability(model: Model, text: list[int]) -> float:
    """What the model itself says of a text, ln p, whoever chose its characters. Never the filtered probabilities: they
    would praise a strategy for what it has left out."""
    logits = Reader(model).read(text[:-1])
    return sum(log_softmax(row)[token] for row, token in zip(logits, text[1:], strict=True))


# ---- 6. Beam search --------------------------------------------------------------------------------------------------
# Greedy takes the best next step, which need not begin the best name. Beam search goes on with the `width` best
# beginnings at once. A sum of logarithms only falls as a name grows, so ln p alone prefers short names; divided by
# length**penalty it does so less, and 1 compares the mean of a character.
def beam(
    model: Model, width: int, penalty: float, start: str = ""
) -> list[tuple[float, list[int]]]:
    """The best names found, at most `width`, the best first, as (ln p of what follows the start, text)."""

    def score(found: tuple) -> float:
        return found[0] / (len(found[1]) - len(begun)) ** penalty

    begun = encode(start)
    live, done = [(0.0, begun, Reader(model))], []
    while live:
        grown = []
        for log_p, text, reader in live:
            logs = log_softmax(reader.read(text[reader.length :])[-1])
            grown += [(log_p + x, [*text, token], reader) for token, x in enumerate(logs)]
        done += [(log_p, text) for log_p, text, _ in grown if ended(text, model.shape.room)]
        grown = [found for found in grown if not ended(found[1], model.shape.room)]
        live = [
            (log_p, text, reader.fork())
            for log_p, text, reader in heapq.nlargest(width, grown, key=score)
        ]
    return heapq.nlargest(width, done, key=score)


# ---- 7. Speculative decoding -----------------------------------------------------------------------------------------
# A pass of a large model costs nearly the same for one token as for five, since most of its time goes into fetching
# the weights. So let a small model, the draft, guess K characters one by one, and let the large one, the target, read
# them all in one pass: then it has said at each place what it would have said anyway (arXiv 2211.17192, 2302.01318).
# Let q be the draft's probabilities at a place and p the target's. The guess x, drawn from q, is kept with probability
# min(1, p(x) / q(x)). In place of the first that is refused, a character is drawn from what the guesses leave over,
# max(0, p - q) scaled to sum to one; the guesses after it are dropped, and both models forget what they read in vain.
# If all are kept, the pass has one more distribution to draw from: K guesses give up to K + 1 characters.
#
# Why nothing changes. The character x comes out in one of two ways. It is guessed and kept, with probability q(x) ·
# min(1, p(x) / q(x)) = min(p(x), q(x)). Or some guess is refused, with probability 1 - Σ min(p, q), and x is drawn
# from what is left over, with probability max(0, p(x) - q(x)) / Σ max(0, p - q). As max(0, p - q) is p - min(p, q),
# its sum is that same 1 - Σ min(p, q), and cancels. Together: min(p(x), q(x)) + max(0, p(x) - q(x)) = p(x). A bad
# draft costs time and nothing else. Greedy is contained: there p and q are each certain of one character, and a guess
# stays if they agree. Our `read` takes tokens one after the other, so here no seconds are saved; what is counted is
# passes.
@dataclass
class Tally:
    """What speculation did. A guess after a refused one is drafted, but never judged."""

    tokens: int = 0
    passes: int = 0
    drafted: int = 0
    judged: int = 0
    kept: int = 0


def leftover(p: list[float], q: list[float]) -> list[float]:
    """From what to draw after a refusal."""
    rest = [max(0.0, a - b) for a, b in zip(p, q, strict=True)]
    mass = sum(rest)
    return [x / mass for x in rest] if mass else p  # p equals q but for rounding: then no matter


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
    """One round: the 1 to K + 1 tokens that come after `text`, for one pass of the target."""
    K = min(
        K, target.model.shape.room - len(text)
    )  # all that is written must have a place to be read
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
                reader.crop(len(text) + i)  # whatever was read from this guess on was read in vain
            return [*guesses[:i], draw(instead(p[i], q[i]))]
        tally.kept += 1
    return (
        guesses if END in guesses else [*guesses, draw(p[-1])]
    )  # all kept: one more, as the pass has said it too


def generate_speculatively(
    target: Model,
    draft: Model,
    K: int,
    strategy: Strategy,
    draw: Draw,
    tally: Tally,
    start: str = "",
) -> list[int]:
    """What `generate` gives, or is as likely to give, in fewer passes of the target."""
    readers, text = (Reader(target), Reader(draft)), encode(start)
    while not ended(text, target.shape.room):
        new = speculate(*readers, text, K, strategy, draw, tally)
        tally.tokens += len(new)
        text += new
    return text


# ---- 8. Proof --------------------------------------------------------------------------------------------------------
# The argument above is about a formula. Is it also true of the code? Samples could only make it plausible. But
# `speculate` has no other source of chance than `draw`, so we can play all of its courses: whenever it draws, it is
# run once for each outcome, and the probabilities are multiplied. What comes out is exact, and it is the code itself
# that is counted.
class Course:
    """A `draw` that follows a script, then takes the first way at each new crossroads and notes down the others."""

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
    """Each result that `play(draw)` can have, with its probability; as often as there are ways to it."""
    scripts: list[list[int]] = [[]]
    while scripts:
        course = Course(scripts.pop())
        result = play(course.draw)
        scripts += course.others
        yield result, course.chance


class ByHeart(Reader):
    """A reader for going through the same few texts again and again: it reads each of them once, and remembers."""

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
    """The probability of each beginning of two tokens (or of END alone), if a text starts with such a result and the
    target goes on by itself. For an exact round that is what the target gives alone; the next rounds then follow by
    induction."""
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
    """Total variation between the beginnings that `speculate` writes and the target's own: half the sum of all
    differences, 0 if they agree, 1 if nothing is in common. Computed, not sampled."""
    target, draft = ByHeart(target_model), ByHeart(draft_model)

    def one_round(draw: Draw) -> list[int]:
        target.crop(0), draft.crop(0)
        return speculate(target, draft, [END], K, strategy, draw, Tally(), instead)

    alone = enumerate(strategy(Reader(target_model).read([END])[-1]))
    wanted = first_two(target, strategy, (([token], p) for token, p in alone))
    written = first_two(target, strategy, every_course(one_round))
    return sum(abs(written[start] - wanted[start]) for start in {*written, *wanted}) / 2


# ---- 9. Tables -------------------------------------------------------------------------------------------------------
# What to look for. The likeliest text is not a typical one: without a penalty, beam search finds the highest ln p of
# all, mostly in names too short to be lawful. Heat buys variety and pays with lawfulness. A filter repairs many of the
# model's errors, since most of them are unlikely characters. Speculation repeats every column of temperature 1, up to
# the luck of the dice. It gains as long as guesses are cheap and good; past some K, more of them cost what they save.
STRATEGIES: dict[str, Strategy] = {
    "greedy": greedy,
    "temperature 0.6": partial(temperature, t=0.6),
    "temperature 1": temperature,
    "temperature 1.5": partial(temperature, t=1.5),
    "top-k 3": partial(top_k, k=3),
    "top-p 0.8": partial(top_p, p=0.8),
}


def show(head: str, rows: list[list]) -> None:
    """A table whose columns are as wide as they must be: the first to the left, the others to the right."""
    cells = [head.split("|"), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = (
            cell.strip().rjust(width) for cell, width in zip(row, widths, strict=True)
        )
        print("  " + "  ".join([first.strip().ljust(widths[0]), *others]))
    print()


def show_losses(models: dict[str, Model], names: list[str], held_out: list[str]) -> None:
    print(f"Nats a character on {len(held_out)} names that nobody was trained on:\n")
    costs = {
        "all characters alike": lambda name: (len(name) + 1) * math.log(len(ALPHABET)),
        "which follows which, counted": neighbours(names),
    }
    costs |= {
        f"{title}, {len(model.numbers())} weights": lambda name, model=model: sum(
            surprises(model, name)
        )
        for title, model in models.items()
    }
    costs["the grammar itself: the best in the long run"] = lambda name: -math.log(likelihood(name))
    show(
        "|trained on|held out",
        [
            [title, *(f"{nats_a_character(cost, part):.3f}" for part in (names, held_out))]
            for title, cost in costs.items()
        ],
    )


def show_step(model: Model) -> None:
    def line(title: str, strategy: Strategy, start: str) -> None:
        p = strategy(Reader(model).read(encode(start))[-1])
        print(
            f"  {title:<16}" + "  ".join(f"{ALPHABET[i]} {p[i]:.2f}" for i in ranked(p)[:7] if p[i])
        )

    print("What the target says after two beginnings: does it see the vowel across the m?\n")
    for start in ("thom", "them"):
        line(start, temperature, start)
    print("\nAfter 'thor', the same logits, and from what each strategy would draw:\n")
    for title, strategy in STRATEGIES.items():
        line(title, strategy, "thor")
    print()


def show_diversity(written: dict[str, list[list[int]]], model: Model, names: list[str]) -> None:
    print("Side by side:\n")
    rows = []
    for title, texts in written.items():
        found = [decode(text) for text in texts]
        print(f"  {title:<20}{' '.join(name or '-' for name in found)[:58].rsplit(' ', 1)[0]}")
        new, lawful = (
            sum(name not in names for name in found),
            sum(likelihood(name) > 0 for name in found),
        )
        rows.append(
            [
                title,
                len(found),
                len({*found}),
                *(f"{x / len(found):.0%}" for x in (new, lawful)),
                f"{sum(map(len, found)) / len(found):.2f}",
                f"{sum(log_probability(model, text) for text in texts) / len(found):.2f}",
            ]
        )
    print(
        "\nTable 1. Diversity. New: not in the training list. Lawful: the grammar can\n"
        "make it. Length and ln p: means a name; ln p is the model's own, unfiltered.\n"
    )
    show("strategy|names|distinct|new|lawful|length|ln p", rows)


def show_acceptance(tallies: dict[str, Tally], cost: float) -> None:
    print(
        "Table 2. Speculation. Judged, drafted: how many of such guesses were kept.\n"
        "A pass: tokens for each pass of the target, where plain decoding has 1.\n"
        "Saved: of those passes. Gain: in speed, if a pass costs 1 however much it\n"
        f"reads and a guess {cost:.2f}, the draft's part of the target's multiplications.\n"
    )
    show(
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


def show_proof(target: Model, draft: Model) -> None:
    print(
        "Table 3. Proof. All courses of a round added up: how far the first two\n"
        "characters are from what the target alone writes (total variation, 0 to 1).\n"
        "The second rule sounds as good, and is not.\n"
    )
    rules = {"leftover, max(0, p - q)": leftover, "the target's p": lambda p, q: p}
    show(
        "after a refusal, draw from|K = 1|K = 2",
        [
            [title, *(f"{distance(target, draft, K, temperature, rule):.1e}" for K in (1, 2))]
            for title, rule in rules.items()
        ],
    )


def decode_in_every_way(
    target: Model, draft: Model, starts: list[str], samples: int, rng: random.Random
) -> tuple:
    """What each strategy wrote, and what speculation did, by title."""
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
    """To read one token, attention's few aside."""
    return sum(
        len(m) * len(m[0]) for name, m in model.weights.items() if name not in ("letters", "places")
    )


def run(seed: int, steps: int, samples: int, to_learn: int) -> None:
    rng, begun = random.Random(seed), time.monotonic()
    everything = make_names(to_learn + to_learn // 4, rng)
    names, held_out = everything[:to_learn], everything[to_learn:]
    print(f"{len(names)} names to learn from, such as {', '.join(names[:5])}.\n")
    target = train("target", new_model(Shape(width=16, layers=1, heads=4), rng), names, steps, rng)
    draft = train("draft", new_model(Shape(width=8, layers=1, heads=2), rng), names, steps, rng)
    show_losses({"draft": draft, "target": target}, names, held_out)
    show_step(target)
    starts = sorted({name[:2] for name in held_out})
    written, tallies = decode_in_every_way(target, draft, starts, samples, rng)
    show_diversity(written, target, names)
    show_acceptance(tallies, multiplications(draft) / multiplications(target))
    print(f"Greedy speculation wrote the same {len(starts)} names as greedy, with every K.\n")
    show_proof(target, draft)
    print(f"{time.monotonic() - begun:.0f} seconds.")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seed", type=int, default=4, help="of names, weights, batches and dice (default 4)"
    )
    parser.add_argument("--steps", type=int, help="training steps of each model (default 700)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="100 names, 12 steps, 20 samples a strategy: a first look",
    )
    args = parser.parse_args()
    steps = args.steps if args.steps is not None else 12 if args.quick else 700
    if steps < 1:
        parser.error(f"--steps must be 1 or more, got {steps}")
    gc.disable()  # what is made from what has no circles: all is freed in time, and the collector would search in vain
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
    except (
        BrokenPipeError
    ):  # `| head` has seen enough: nothing more can be written, not even on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
