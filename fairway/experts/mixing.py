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

from fairway.experts import match, ngram
from fairway.experts.match import Matches
from fairway.experts.ngram import Evidence
from fairway.experts.table import reading_state, same_shape, write_state
from fairway.settings import EvalConfig

EXPERTS = ("neural", "sharp", "flat", "ngram", "bigram", "match", "chain", "tilt")
NEURAL, SHARP, FLAT, NGRAM, BIGRAM, MATCH, CHAIN, TILT = range(len(EXPERTS))
TEMPERATURES = {"sharp": 0.85, "flat": 1.2}  # the neural model again, so that a mixture can correct how sure it is
WEIGHTS = ("exponential", "share", "em", "sets", "gate")
EXPONENTIAL, SHARE, EM, SETS, GATE = range(len(WEIGHTS))

# The constants below were tuned on training text alone: the unread end of the shard that the cpu model learns from.
# The chain: how far each context length is believed over the ones below it, learnt by what was seen there.
SEEN_EDGES = np.array([2, 3, 5, 9, 17, 65])  # times that a context was followed
TRUSTS = (len(SEEN_EDGES) + 1, 5, 3)  # by that, by how many kinds followed, by how sure the neural model is
TRUST_PRIOR, TRUST_GRAMS, TRUST_MATCH, MOST_TRUSTED = 5.0, 0.05, 0.5, 2000.0  # worth in tokens, values, memory
# Sets of weights: match length x longest context seen x who did better lately.
LENGTH_EDGES = np.array([1, 12, 16, 24, 32])
ADVANTAGE_EDGES = np.array([-0.05, 0.0, 0.05, 0.2])  # nats a token, chain over neural
LENGTHS, LONGEST, ADVANTAGES = len(LENGTH_EDGES) + 1, 5, len(ADVANTAGE_EDGES) + 1
MEMORY = 0.02  # the part of that advantage which the newest token has
FEATURES = LENGTHS + LONGEST + 3  # of the gate: those sets, entropy, advantage, and one
GATE_RATE, LIFT_RATE, POOL_RATE = 0.02, 0.05, 0.002
SURE_BITS = 60.0  # an account so full cannot be emptied by one token


class Inputs(NamedTuple):
    """What mixing reads about m targets: columns of the neural model, and what the experts knew."""

    logp: np.ndarray  # float64[m], natural logarithms of the model's probabilities of the targets
    sharp: np.ndarray  # the same at a lower temperature
    flat: np.ndarray  # and at a higher one
    hint: np.ndarray  # the model's log-probability of the match expert's hint
    entropy: np.ndarray  # of the model's distribution, nats
    grams: Evidence
    matches: Matches
    targets: np.ndarray  # int64[m]
    sizes: np.ndarray  # int64[m] bytes that each target stands for


class State(NamedTuple):
    """All that mixing learns."""

    trust: np.ndarray  # [orders + 1, *TRUSTS, 2]: the chain's, of each context length and of the match; right, all
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
    start = np.array([neural if e == "neural" else (1 - neural) * (e in experts) / max(len(experts) - 1, 1)
                      for e in EXPERTS])
    sets, lift = LENGTHS * LONGEST * ADVANTAGES, np.zeros((LENGTHS, 2))
    lift[:, 1] = 0.5
    return State(trust, np.tile(start / start.sum(), (sets, 1)), np.zeros(sets), np.zeros((len(EXPERTS), FEATURES)),
                 lift, np.zeros(1), np.zeros(2))


# ==== WHAT EACH EXPERT SAYS ===========================================================================================
@njit(cache=True, nogil=True, error_model="numpy")
def bucket(value, edges):
    """How many edges a value has reached."""
    n = 0
    while n < len(edges) and value >= edges[n]:
        n += 1
    return n


@njit(cache=True, nogil=True, error_model="numpy")
def kinds_bucket(kinds, seen):
    """0: only one token ever followed; 4: never the same one twice."""
    if kinds == 1:
        return 0
    return 1 if 4 * kinds <= seen else 2 if 2 * kinds <= seen else 3 if kinds < seen else 4


@njit(cache=True, nogil=True, error_model="numpy")
def chain_probability(j, logp, entropy, grams, matches, target, trust, places, steps):
    """The neural probability, then each context's counts in turn, then the match's hint, each believed as far as such
    evidence has proved right: p <- t * counted + (1 - t) * p. Also how many there were; `places` and `steps` keep,
    for learning, which trusts were used and what part of p each gave."""
    hits, seen, kinds = grams
    orders, p, used = hits.shape[1], math.exp(logp), 0
    sure = 0 if entropy < 1.0 else 1 if entropy < 3.0 else 2
    for k in range(orders + 1):
        if k < orders and seen[j, k] > 0:
            counted = hits[j, k] / seen[j, k]
            a, b = bucket(seen[j, k], SEEN_EDGES), kinds_bucket(kinds[j, k], seen[j, k])
        elif k == orders and matches[0][j] >= 0:
            counted = 1.0 if matches[0][j] == target else 0.0
            a, b = bucket(matches[1][j], LENGTH_EDGES), min(int(matches[2][j] * 5), 4)
        else:
            continue
        t = trust[k, a, b, sure, 0] / trust[k, a, b, sure, 1]
        new = t * counted + (1 - t) * p
        places[used, 0], places[used, 1], places[used, 2], places[used, 3] = k, a, b, sure
        steps[used] = t * counted / max(new, 1e-300)
        used, p = used + 1, new
    return p, used


@njit(cache=True, nogil=True, error_model="numpy")
def lifted(logp, hint_logp, is_hint, lift):
    """log p once the hint's logit has risen: divided by 1 + p(hint) (e^lift - 1), so that the sum stays one (#1514)."""
    return logp + (lift if is_hint else 0.0) - math.log1p(math.exp(hint_logp) * math.expm1(lift))


@njit(cache=True, nogil=True, error_model="numpy")
def opinions(j, inputs, counted, state, p, places, steps, vocab_size):
    """Each expert's probability of the target, into p; an expert without an opinion has the neural model's. Also how
    many trusts the chain used, and log-probability and odds of the logarithmic pool."""
    logp, hint_logp, matches, target = inputs.logp[j], inputs.hint[j], inputs.matches, inputs.targets[j]
    p[NEURAL], p[SHARP], p[FLAT] = math.exp(logp), math.exp(inputs.sharp[j]), math.exp(inputs.flat[j])
    p[NGRAM], p[BIGRAM], p[MATCH] = counted[0][j], counted[1][j], counted[2][j]
    p[CHAIN], used = chain_probability(
        j, logp, inputs.entropy[j], inputs.grams, matches, target, state.trust, places, steps)
    if matches[0][j] < 0:
        p[MATCH] = p[TILT] = p[NEURAL]
        return used, logp, 0.0
    is_hint, a = matches[0][j] == target, bucket(matches[1][j], LENGTH_EDGES)
    p[TILT] = math.exp(lifted(logp, hint_logp, is_hint, state.lift[a, 0]))
    odds = math.log(matches[2][j] / (1 - matches[2][j]) * (vocab_size - 1))
    return used, lifted(logp, hint_logp, is_hint, state.lift[a, 1] * odds), odds


@njit(cache=True, nogil=True, error_model="numpy")
def situation(j, inputs, state, kind, features):
    """Which set of weights a target uses, and the gate's features of it: of the text before it only."""
    seen, longest = inputs.grams[1], 0
    while longest < seen.shape[1] and seen[j, longest] > 0:
        longest += 1
    a, b = bucket(inputs.matches[1][j], LENGTH_EDGES), min(max(longest - 2, 0), LONGEST - 1)
    for f in range(FEATURES):
        features[f] = 0.0
    features[a] = features[LENGTHS + b] = features[FEATURES - 1] = 1.0
    features[LENGTHS + LONGEST] = inputs.entropy[j] / 3.0
    features[LENGTHS + LONGEST + 1] = min(max(4 * state.recent[0], -2.0), 2.0)
    return (a * LONGEST + b) * ADVANTAGES + bucket(state.recent[0], ADVANTAGE_EDGES) if kind == SETS else 0


# ==== WEIGHTS =========================================================================================================
@njit(cache=True, nogil=True, error_model="numpy")
def dot(a, b):
    """In a loop, as all below: at eight experts an array expression costs more than its arithmetic."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def weigh(kind, state, which, features, w):
    """The weights of this target, into w; they sum to one. The gate's are the first ones times e^(gate . features)."""
    for e in range(len(w)):
        w[e] = state.weights[which, e]
    if kind == GATE:
        total = 0.0
        for e in range(len(w)):
            w[e] *= math.exp(min(dot(state.gate[e], features), 300.0))
            total += w[e]
        for e in range(len(w)):
            w[e] /= total


@njit(cache=True, nogil=True, error_model="numpy")
def learn_gate(gate, features, w, p, q):
    """Up the gradient of log q."""
    for e in range(len(w)):
        step = GATE_RATE * (w[e] * p[e] / q - w[e])
        for f in range(len(features)):
            gate[e, f] += step * features[f]


@njit(cache=True, nogil=True, error_model="numpy")
def learn_em(state, which, w, p, q, rate):
    """Towards each expert's part of the mixture; by large steps at first."""
    state.visits[which] += 1
    step = max(rate, 1.0 / (state.visits[which] + 1.5 / rate))
    for e in range(len(w)):
        state.weights[which, e] += step * (w[e] * p[e] / q - w[e])


@njit(cache=True, nogil=True, error_model="numpy")
def learn_exponential(own, w, p, lr, floor, share):
    """w * p^lr, no less than the floor, to sum one again; then a share of it is dealt out evenly."""
    total, live = 0.0, 0
    for e in range(len(w)):
        if w[e] > 0:
            live += 1
            own[e] = max(w[e] * (p[e] if lr == 1.0 else p[e] ** lr), floor, 1e-300)
            total += own[e]
    for e in range(len(w)):
        if w[e] > 0:
            own[e] = (1 - share) * own[e] / total + share / live


@njit(cache=True, nogil=True, error_model="numpy")
def learn_weights(kind, state, which, features, w, p, q, rates):
    """Move the weights that were used towards the experts that were right."""
    lr, floor, share, rate = rates
    if kind == GATE:
        learn_gate(state.gate, features, w, p, q)
    elif kind == EXPONENTIAL or kind == SHARE:
        learn_exponential(state.weights[which], w, p, lr, floor if kind == EXPONENTIAL else 0.0,
                          share if kind == SHARE else 0.0)
    else:
        learn_em(state, which, w, p, q, rate)


@njit(cache=True, nogil=True, error_model="numpy")
def learn_trust(trust, used, places, steps):
    for i in range(used):
        k, a, b, sure = places[i, 0], places[i, 1], places[i, 2], places[i, 3]
        right, every = trust[k, a, b, sure, 0], trust[k, a, b, sure, 1]
        fade = 0.5 if every >= MOST_TRUSTED else 1.0
        trust[k, a, b, sure, 0], trust[k, a, b, sure, 1] = fade * right + steps[i], fade * every + 1.0


@njit(cache=True, nogil=True, error_model="numpy")
def learn_lift(j, inputs, lift, odds):
    """Both lifts go up their gradient: whether the hint came true, less the probability that it had."""
    a, hint, hit = bucket(inputs.matches[1][j], LENGTH_EDGES), inputs.hint[j], inputs.matches[0][j] == inputs.targets[j]
    lift[a, 0] += LIFT_RATE * (hit - math.exp(lifted(hint, hint, True, lift[a, 0])))
    lift[a, 1] += POOL_RATE * odds * (hit - math.exp(lifted(hint, hint, True, lift[a, 1] * odds)))


@njit(cache=True, nogil=True, error_model="numpy")
def insured(mixed, logp, account, guard):
    """log of part * mixture + (1 - part) * neural. The part is what the account, all gains so far and `guard` bits for
    each byte, could pay if the mixture gave the target nothing: so it never costs more than `guard` bits a byte."""
    funds = account[0] + guard * account[1]
    if guard == 0.0 or funds > SURE_BITS:
        return mixed
    part = -math.expm1(-max(funds, 0.0) * math.log(2.0))
    return math.log(part * math.exp(mixed) + (1 - part) * math.exp(logp))


@njit(cache=True, nogil=True, error_model="numpy")
def mix(inputs, counted, state, vocab_size, kind, pooled, rates, guard, learn, out, used_weights):
    """The pass: out[j] = log-probability of target j, then learn it. Without `learn` the rows are candidates for one
    place, and nothing moves. `counted` is what n-gram, bigram and match give the targets."""
    orders, experts = inputs.grams[0].shape[1], len(used_weights)
    p, w, features = np.empty(experts), np.empty(experts), np.empty(FEATURES)
    places, steps = np.empty((orders + 1, 4), np.int64), np.empty(orders + 1)
    for j in range(len(out)):
        used, pool, odds = opinions(j, inputs, counted, state, p, places, steps, vocab_size)
        which = situation(j, inputs, state, kind, features)
        weigh(kind, state, which, features, w)
        q = max(dot(w, p), 1e-300)
        out[j] = insured(pool if pooled else math.log(q), inputs.logp[j], state.account, guard)
        if learn:
            for e in range(experts):
                used_weights[e] += w[e]
            learn_weights(kind, state, which, features, w, p, q, rates)
            learn_trust(state.trust, used, places, steps)
            if inputs.matches[0][j] >= 0:
                learn_lift(j, inputs, state.lift, odds)
            state.recent[0] += MEMORY * (math.log(max(p[CHAIN], 1e-300)) - inputs.logp[j] - state.recent[0])
            state.account[0] += (out[j] - inputs.logp[j]) / math.log(2.0)
            state.account[1] += inputs.sizes[j]


# ==== THE MIXTURE =====================================================================================================
class Mixture:
    """Streaming: `fill` may be called chunk after chunk, and how the text is cut is no matter."""

    def __init__(self, vocab_size: int, cfg: EvalConfig, experts: tuple[str, ...] = EXPERTS):
        self.vocab_size, self.cfg, self.experts = vocab_size, cfg, experts
        self.state = initial_state(cfg.ngram_orders, experts, cfg.mix_neural)
        self.trace: list[np.ndarray] = []  # mean weights of each call, for the report

    def _mix(self, inputs: Inputs, learn: bool) -> np.ndarray:
        cfg, out, used = self.cfg, np.empty(len(inputs.logp)), np.zeros(len(EXPERTS))
        counted = (ngram.probabilities(inputs.grams, self.vocab_size),
                   ngram.bigram_probabilities(inputs.grams, self.vocab_size),
                   match.probabilities(inputs.matches, inputs.targets, self.vocab_size))
        mix(inputs, counted, self.state, self.vocab_size, WEIGHTS.index(cfg.mix_weights), cfg.mix_mode == "log",
            (cfg.mix_lr, cfg.mix_floor, cfg.mix_share, cfg.mix_rate), cfg.mix_guard, learn, out, used)
        if learn and len(out):
            self.trace.append(used / len(out))
        return out

    def fill(self, inputs: Inputs) -> np.ndarray:
        """float64[m]: the log-probability of each target before it was seen; then it is learnt."""
        return self._mix(inputs, learn=True)

    def distribution(self, p: np.ndarray, grams: Evidence, hint: tuple[int, int, float]) -> np.ndarray:
        """float64[V] for the next place, given the neural distribution p, the n-gram's evidence about every candidate,
        and the match expert's (hint, length, rate)."""
        size, logp = self.vocab_size, np.log(np.maximum(p, 1e-300))
        again = {name: logp / t - np.log(np.exp(logp / t).sum()) for name, t in TEMPERATURES.items()}
        token, length, rate = hint
        matches = Matches(np.full(size, token, np.int32), np.full(size, length, np.uint16), np.full(size, rate))
        return np.exp(self._mix(Inputs(
            logp, again["sharp"], again["flat"], np.full(size, logp[max(token, 0)]), np.full(size, -(p * logp).sum()),
            grams, matches, np.arange(size), np.zeros(size, np.int64)), learn=False))

    def digest(self) -> str:
        """SHA-256 of all that was learnt."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.state)).hexdigest()

    def save(self, path: str | Path) -> None:
        write_state(path, "mixture", self.state._asdict())

    def restore(self, path: str | Path) -> None:
        """The state as it was saved by a mixture of the same settings."""
        with reading_state(path, "mixture") as saved:
            self.state = State(*(same_shape(saved[name], own) for name, own in self.state._asdict().items()))
