"""The mixture: one pass over columns, in which every weight is set by what came before the token that it weighs.

Each expert is a full distribution over the vocabulary, and so is every pool of them: weights that sum to one (linear),
or a hint token whose logit rises, divided by what that adds to the sum (logarithmic). `distribution` is the same
arithmetic for every candidate at once, so what is counted can be summed up and looked at.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts import match, ngram
from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.ngram import ContextCounts
from fairway.scoring.experts.state import open_state, same_shape, write_state
from fairway.scoring.experts.temperature import TEMPERATURES, tempered
from fairway.scoring.settings import EvalConfig

EXPERTS = ("neural", "sharp", "flat", "ngram", "bigram", "match", "chain", "tilt")
NEURAL, SHARP, FLAT, NGRAM, BIGRAM, MATCH, CHAIN, TILT = range(len(EXPERTS))
COUNT = len(EXPERTS)
WEIGHTS = ("exponential", "share", "em", "sets", "gate")
EXPONENTIAL, SHARE, EM, SETS, GATE = range(len(WEIGHTS))

# The constants below were tuned on training text alone: the unread end of the shard that the cpu model learns from.
# The chain: how far each context length is believed over the ones below it, learnt by what was seen there.
SEEN_EDGES = np.array([2, 3, 5, 9, 17, 65])  # times that a context was followed
TRUSTS = (
    len(SEEN_EDGES) + 1,
    5,
    3,
)  # by that, by how many kinds followed, by how sure the neural model is
TRUST_PRIOR, TRUST_GRAMS, TRUST_MATCH, MOST_TRUSTED = (
    5.0,
    0.05,
    0.5,
    2000.0,
)  # worth in tokens, values, memory
# Sets of weights: match length x longest context seen x who did better lately.
LENGTH_EDGES = np.array([1, 12, 16, 24, 32])
ADVANTAGE_EDGES = np.array([-0.05, 0.0, 0.05, 0.2])  # nats a token, chain over neural
LENGTHS, LONGEST, ADVANTAGES = len(LENGTH_EDGES) + 1, 5, len(ADVANTAGE_EDGES) + 1
MEMORY = 0.02  # the part of that advantage which the newest token has
FEATURES = LENGTHS + LONGEST + 3  # of the gate: those sets, entropy, advantage, and one
GATE_RATE, LIFT_RATE, POOL_RATE = 0.02, 0.05, 0.002
MOST_LIFT, LEAST_RATE = (
    25.0,
    1e-9,
)  # what no honest hint reaches, and beyond which exponentials are no numbers
SURE_BITS = 60.0  # what 2^-60 of the neural probability would add to a sum is lost in rounding
TINY, LN2 = 1e-300, math.log(2.0)
# `bucket` of every count or length up to the last edge, where all above it belong too: one load instead of branches.
SEEN_BUCKETS = np.searchsorted(SEEN_EDGES, np.arange(SEEN_EDGES[-1] + 1), side="right")
LENGTH_BUCKETS = np.searchsorted(LENGTH_EDGES, np.arange(LENGTH_EDGES[-1] + 1), side="right")


class Inputs(NamedTuple):
    """What mixing reads about m targets: columns of the neural model, and what the experts knew."""

    logp: np.ndarray  # float64[m], natural logarithms of the model's probabilities of the targets
    sharp: np.ndarray  # the same at a lower temperature
    flat: np.ndarray  # and at a higher one
    hint: np.ndarray  # the model's log-probability of the match expert's hint
    entropy: np.ndarray  # of the model's distribution, nats
    grams: ContextCounts
    matches: Matches
    targets: np.ndarray  # int64[m]
    sizes: np.ndarray  # int64[m] bytes that each target stands for


class State(NamedTuple):
    """All that mixing learns."""

    trust: (
        np.ndarray
    )  # [orders + 1, *TRUSTS, 2]: the chain's, of each context length and of the match; right, all
    weights: np.ndarray  # [sets, experts]
    visits: np.ndarray  # [sets] how often each was used
    gate: np.ndarray  # [experts, FEATURES]
    lift: np.ndarray  # [LENGTHS, 2]: the tilt's lift of a hint's logit, and how much of its odds the log pool takes
    recent: np.ndarray  # [1] advantage of the chain over the neural model lately
    account: np.ndarray  # [2] bits gained over the neural model, bytes scored


def initial_state(orders: int, experts: tuple[str, ...], neural: float) -> State:
    trust = np.full((orders + 1, *TRUSTS, 2), TRUST_PRIOR)
    trust[:orders, ..., 0] *= TRUST_GRAMS
    trust[orders, ..., 0] *= TRUST_MATCH
    start = np.array(
        [
            neural if e == "neural" else (1 - neural) * (e in experts) / max(len(experts) - 1, 1)
            for e in EXPERTS
        ]
    )
    sets, lift = LENGTHS * LONGEST * ADVANTAGES, np.zeros((LENGTHS, 2))
    lift[:, 1] = 0.5
    return State(
        trust,
        np.tile(start / start.sum(), (sets, 1)),
        np.zeros(sets),
        np.zeros((len(EXPERTS), FEATURES)),
        lift,
        np.zeros(1),
        np.zeros(2),
    )


# Called at every token: as calls, passing their arrays alone took longer than what they do.
part = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


# ==== WHAT EACH EXPERT SAYS =======================================================================
@part
def bucket(value, edges):
    """How many edges a value has reached."""
    n = 0
    while n < len(edges) and value >= edges[n]:
        n += 1
    return n


@part
def kinds_bucket(kinds, seen):
    """0: only one token ever followed; 4: never the same one twice."""
    return (kinds > 1) * (1 + (4 * kinds > seen) + (2 * kinds > seen) + (kinds >= seen))


@part
def chain_probability(j, p, entropy, grams, matches, target, trust, places, steps):
    """The neural p, then each context's counts in turn, then the match's hint, each believed as far as such evidence
    has proved right: p <- t * counted + (1 - t) * p. Also how many there were; `places` and `steps` keep, for
    learning, which rows of `trust` [*, 2] were used and what part of p each gave."""
    (hits, seen, kinds), (hint, length, rate) = grams, matches
    orders, used = hits.shape[1], 0
    sure = (entropy >= 1.0) + (entropy >= 3.0)
    for k in range(orders + 1):
        if k < orders and seen[j, k] > 0:
            hit, every = np.int64(hits[j, k]), np.int64(seen[j, k])
            a, b = (
                SEEN_BUCKETS[min(every, SEEN_EDGES[-1])],
                kinds_bucket(np.int64(kinds[j, k]), every),
            )
        elif k == orders and hint[j] >= 0:
            hit, every = np.int64(hint[j] == target), 1
            a, b = LENGTH_BUCKETS[min(length[j], LENGTH_EDGES[-1])], min(int(rate[j] * 5), 4)
        else:
            continue
        at = ((k * TRUSTS[0] + a) * TRUSTS[1] + b) * TRUSTS[2] + sure
        right, uses = trust[at, 0], trust[at, 1]
        from_here, from_below = (
            right * hit,
            (uses - right) * every * p,
        )  # of the new p, both times uses * every
        places[used], steps[used] = at, from_here / max(from_here + from_below, TINY)
        used, p = used + 1, (from_here + from_below) * (1.0 / (uses * every))
    return p, used


@part
def within(lift):
    return min(max(lift, -MOST_LIFT), MOST_LIFT)


@part
def lifted(p, hint, is_hint, growth):
    """p once e^logit of the hint is `growth` times as large: divided by 1 + p(hint) (growth - 1), so that the sum stays
    one (#1514)."""
    return (p * growth if is_hint else p) / (1 + hint * (growth - 1))


def opinions(inputs: Inputs, vocab_size: int) -> tuple[np.ndarray, ...]:
    """About m targets, eight of float64[m]: probabilities by the first six experts, above zero, the neural probability
    of the hint, and its odds by the match expert, as a logarithm. Without a hint, the match expert's is the neural."""
    neural, sharp, flat = (
        np.maximum(np.exp(logp), TINY) for logp in (inputs.logp, inputs.sharp, inputs.flat)
    )
    hint, rate = inputs.matches.hint, np.clip(inputs.matches.rate, LEAST_RATE, 1 - LEAST_RATE)
    matched = match.match_probabilities(inputs.matches, inputs.targets, vocab_size)
    return (
        neural,
        sharp,
        flat,
        ngram.ngram_probabilities(inputs.grams, vocab_size),
        ngram.ngram_probabilities(inputs.grams, vocab_size, 2),
        np.where(hint < 0, neural, matched),
        np.exp(inputs.hint),
        np.log(rate / (1 - rate) * (vocab_size - 1)),
    )


@part
def situation(j, length, seen, entropy, recent, kind, features):
    """Which set of weights a target uses, and the gate's features of it: of the text before it only."""
    longest = 0
    while longest < seen.shape[1] and seen[j, longest] > 0:
        longest += 1
    a, b = LENGTH_BUCKETS[min(length, LENGTH_EDGES[-1])], min(max(longest - 2, 0), LONGEST - 1)
    if kind == GATE:
        for f in range(FEATURES):
            features[f] = 0.0
        features[a] = features[LENGTHS + b] = features[FEATURES - 1] = 1.0
        features[LENGTHS + LONGEST] = entropy / 3.0
        features[LENGTHS + LONGEST + 1] = min(max(4 * recent, -2.0), 2.0)
    return (a * LONGEST + b) * ADVANTAGES + bucket(recent, ADVANTAGE_EDGES) if kind == SETS else 0


# ==== WEIGHTS =====================================================================================
@part
def dot(a, b):
    """In a loop, as all below: at eight experts an array expression costs more than its arithmetic."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@part
def weigh(kind, weights, gate, which, features, w):
    """The weights of this target, into w; they sum to one. The gate's are the first ones times e^(gate . features)."""
    for e in range(len(w)):
        w[e] = weights[which, e]
    if kind == GATE:
        total = 0.0
        for e in range(len(w)):
            sway = 0.0
            for f in range(len(features)):
                sway += gate[e, f] * features[f]
            w[e] *= math.exp(min(sway, 300.0))
            total += w[e]
        for e in range(len(w)):
            w[e] /= total


@part
def learn_gate(gate, features, w, p, q):
    """Up the gradient of log q."""
    for e in range(len(w)):
        step = GATE_RATE * (w[e] * p[e] / q - w[e])
        for f in range(len(features)):
            gate[e, f] += step * features[f]


@part
def learn_em(weights, visits, which, w, p, q, rate):
    """Towards each expert's part of the mixture; by large steps at first."""
    visits[which] += 1
    step = max(rate, 1.0 / (visits[which] + 1.5 / rate))
    scale = step / q
    for e in range(len(w)):
        weights[which, e] += w[e] * (p[e] * scale - step)


@part
def learn_exponential(weights, which, w, p, lr, floor, share):
    """w * p^lr, no less than the floor, to sum one again; then a share of it is dealt out evenly."""
    total, live = 0.0, 0
    for e in range(len(w)):
        if w[e] > 0:
            live += 1
            weights[which, e] = max(w[e] * (p[e] if lr == 1.0 else p[e] ** lr), floor, TINY)
            total += weights[which, e]
    for e in range(len(w)):
        if w[e] > 0:
            weights[which, e] = (1 - share) * weights[which, e] / total + share / live


@part
def learn_weights(kind, weights, visits, gate, which, features, w, p, q, rates):
    """Move the weights that were used towards the experts that were right."""
    lr, floor, share, rate = rates
    if kind == GATE:
        learn_gate(gate, features, w, p, q)
    elif kind == EXPONENTIAL or kind == SHARE:
        learn_exponential(
            weights,
            which,
            w,
            p,
            lr,
            floor if kind == EXPONENTIAL else 0.0,
            share if kind == SHARE else 0.0,
        )
    else:
        learn_em(weights, visits, which, w, p, q, rate)


@part
def learn_trust(trust, used, places, steps):
    for i in range(used):
        right, every = trust[places[i], 0], trust[places[i], 1]
        fade = 0.5 if every >= MOST_TRUSTED else 1.0
        trust[places[i], 0], trust[places[i], 1] = fade * right + steps[i], fade * every + 1.0


@part
def learn_lift(a, hint, hit, odds, growth, pool_growth, lift):
    """Both lifts go up their gradient: whether the hint came true, less the probability that it had."""
    lift[a, 0] += LIFT_RATE * (hit - lifted(hint, hint, True, growth))
    lift[a, 1] += POOL_RATE * odds * (hit - lifted(hint, hint, True, pool_growth))


@part
def insured(mixed, logp, account, guard):
    """log of part * mixture + (1 - part) * neural. The part is what the account, all gains so far and `guard` bits for
    each byte, could pay if the mixture gave the target nothing: so it never costs more than `guard` bits a byte."""
    funds = max(account[0] + guard * account[1], 0.0)
    if guard == 0.0 or (funds > SURE_BITS and mixed > logp - SURE_BITS * LN2):
        return mixed
    if funds == 0.0:
        return logp
    least, most = logp - funds * LN2, mixed + math.log(-math.expm1(-funds * LN2))
    return max(least, most) + math.log1p(math.exp(-abs(most - least)))


@njit(cache=True, nogil=True, error_model="numpy")
def mix(inputs, said, state, kind, pooled, rates, guard, learn, out, used_weights):
    """The pass: out[j] = log-probability of target j, then learn it. Without `learn` the rows are candidates for one
    place, and nothing moves. `said` is what `opinions` returned."""
    # Each array has its name before the loop: taking one out of a tuple counts references, at every token.
    logp, entropy, targets, sizes, grams, matches = (
        inputs.logp,
        inputs.entropy,
        inputs.targets,
        inputs.sizes,
        inputs.grams,
        inputs.matches,
    )
    (_, seen, _), (hint, length, _) = grams, matches
    neural, sharp, flat, ngrams, bigrams, matched, hints, odds = said
    weights, visits, gate = state.weights, state.visits, state.gate
    lift, recent, account = state.lift, state.recent, state.account
    orders, trust = seen.shape[1], state.trust.reshape(-1, 2)
    p, w, features = np.empty(COUNT), np.empty(COUNT), np.empty(FEATURES)
    places, steps = np.empty(orders + 1, np.int64), np.empty(orders + 1)
    for j in range(len(out)):
        p[NEURAL], p[SHARP], p[FLAT], p[NGRAM], p[BIGRAM], p[MATCH] = (
            neural[j],
            sharp[j],
            flat[j],
            ngrams[j],
            bigrams[j],
            matched[j],
        )
        p[TILT] = neural[j]
        believed, used = chain_probability(
            j, neural[j], entropy[j], grams, matches, targets[j], trust, places, steps
        )
        p[CHAIN] = max(believed, TINY)
        which = situation(j, length[j], seen, entropy[j], recent[0], kind, features)
        pool, hit, a, growth, pool_growth = logp[j], hint[j] == targets[j], 0, 1.0, 1.0
        if hint[j] >= 0:
            a = LENGTH_BUCKETS[min(length[j], LENGTH_EDGES[-1])]
            pool_lift = within(lift[a, 1] * odds[j])
            growth, pool_growth = math.exp(within(lift[a, 0])), math.exp(pool_lift)
            p[TILT] = max(lifted(neural[j], hints[j], hit, growth), TINY)
            if pooled:
                pool += (pool_lift if hit else 0.0) - math.log1p(hints[j] * (pool_growth - 1))
        weigh(kind, weights, gate, which, features, w)
        q = max(dot(w, p), TINY)
        out[j] = insured(pool if pooled else math.log(q), logp[j], account, guard)
        if learn:
            for e in range(COUNT):
                used_weights[e] += w[e]
            learn_weights(kind, weights, visits, gate, which, features, w, p, q, rates)
            learn_trust(trust, used, places, steps)
            if hint[j] >= 0:
                learn_lift(a, hints[j], hit, odds[j], growth, pool_growth, lift)
            recent[0] += MEMORY * (math.log(p[CHAIN]) - logp[j] - recent[0])
            account[0] += (out[j] - logp[j]) / LN2
            account[1] += sizes[j]


# ==== THE MIXTURE =================================================================================
class Mixture:
    """Streaming: `fill` may be called chunk after chunk, and how the text is cut is no matter."""

    def __init__(self, vocab_size: int, cfg: EvalConfig, experts: tuple[str, ...] = EXPERTS):
        self.vocab_size, self.cfg, self.experts = vocab_size, cfg, experts
        self.state = initial_state(cfg.ngram_orders, experts, cfg.mix_neural)
        self.trace: list[np.ndarray] = []  # mean weights of each call, for the report

    def _mix(self, inputs: Inputs, learn: bool) -> np.ndarray:
        cfg, out, used = self.cfg, np.empty(len(inputs.logp)), np.zeros(len(EXPERTS))
        mix(
            inputs,
            opinions(inputs, self.vocab_size),
            self.state,
            WEIGHTS.index(cfg.mix_weights),
            cfg.mix_mode == "log",
            (cfg.mix_lr, cfg.mix_floor, cfg.mix_share, cfg.mix_rate),
            cfg.mix_guard,
            learn,
            out,
            used,
        )
        if learn and len(out):
            self.trace.append(used / len(out))
        return out

    def fill(self, inputs: Inputs) -> np.ndarray:
        """float64[m]: the log-probability of each target before it was seen; then it is learnt."""
        return self._mix(inputs, learn=True)

    def distribution(
        self, p: np.ndarray, grams: ContextCounts, hint: tuple[int, int, float]
    ) -> np.ndarray:
        """float64[V] for the next place, given the neural distribution p, the n-gram's evidence about every candidate,
        and the match expert's (hint, length, rate)."""
        size, logp = self.vocab_size, np.log(np.maximum(p, TINY))
        again = {name: tempered(logp, t) for name, t in TEMPERATURES.items()}
        token, length, rate = hint
        matches = Matches(
            np.full(size, token, np.int32), np.full(size, length, np.uint16), np.full(size, rate)
        )
        return np.exp(
            self._mix(
                Inputs(
                    logp,
                    again["sharp"],
                    again["flat"],
                    np.full(size, logp[max(token, 0)]),
                    np.full(size, -(p * logp).sum()),
                    grams,
                    matches,
                    np.arange(size),
                    np.zeros(size, np.int64),
                ),
                learn=False,
            )
        )

    def digest(self) -> str:
        """SHA-256 of all that was learnt."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.state)).hexdigest()

    def save(self, path: str | Path) -> None:
        write_state(path, "mixture", self.state._asdict())

    def restore(self, path: str | Path) -> None:
        """The state as it was saved by a mixture of the same settings."""
        with open_state(path, "mixture") as saved:
            self.state = State(
                *(same_shape(saved[name], own) for name, own in self.state._asdict().items())
            )
