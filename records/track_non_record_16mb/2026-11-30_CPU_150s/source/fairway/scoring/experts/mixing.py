"""The mixture of the neural model with the experts: one pass over columns.

The weights of a token depend only on what came before it. Each expert is a distribution over the
whole vocabulary, and so is each pool of them. The linear pool is a mean with weights that sum to
one. The logarithmic pool raises the logit of the match expert's hint and divides by what that adds
to the sum. `distribution` runs the same arithmetic for every candidate at once, so the certificate
can add up what is counted.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numba import njit

from fairway.scoring.experts.match import Matches, match_probabilities
from fairway.scoring.experts.ngram import ContextCounts, ngram_probabilities
from fairway.scoring.experts.state import open_state, same_shape, write_state
from fairway.scoring.experts.temperature import TEMPERATURES, tempered
from fairway.scoring.settings import EvalConfig

EXPERTS = ("neural", "sharp", "flat", "ngram", "bigram", "match", "chain", "tilt")
NEURAL, SHARP, FLAT, NGRAM, BIGRAM, MATCH, CHAIN, TILT = range(len(EXPERTS))
COUNT = len(EXPERTS)
WEIGHTS = ("exponential", "em", "sets")
EXPONENTIAL, EM, SETS = range(len(WEIGHTS))

# The constants below were tuned on training text alone: the unread end of the shard that the cpu
# model learns from.

# The chain trusts each context length over the shorter ones by how often such evidence was right:
# by how often the context was followed, by how many kinds of token (`kinds_bucket`), and by how
# sure the neural model is (entropy below 1, below 3, above).
SEEN_EDGES = np.array([2, 3, 5, 9, 17, 65])
TRUST_SHAPE = (len(SEEN_EDGES) + 1, 5, 3)
TRUST_PRIOR = 5.0  # tokens that the initial trust is worth
TRUST_GRAMS, TRUST_MATCH = 0.05, 0.5  # initial trust in counts, and in a match
MOST_TRUSTED = 2000.0  # tokens that a trust remembers: then both its counts are halved

# A weight set is chosen by length of the match, longest context that was seen before, and recent
# advantage of the chain over the neural model in nats a token.
LENGTH_EDGES = np.array([1, 12, 16, 24, 32])
ADVANTAGE_EDGES = np.array([-0.05, 0.0, 0.05, 0.2])
LENGTHS, LONGEST, ADVANTAGES = len(LENGTH_EDGES) + 1, 5, len(ADVANTAGE_EDGES) + 1
RECENT_RATE = 0.02  # part of the recent advantage that the newest token has

LIFT_RATE, POOL_RATE = 0.05, 0.002  # learning rates of the tilt and of the logarithmic pool
MOST_LIFT = 25.0  # of a logit: no honest hint reaches it, and its exponential is still exact
LEAST_RATE = 1e-9  # of hints: keeps the logarithm of their odds finite
SURE_BITS = 60.0  # 2^-60 of the neural probability is lost in the rounding of a sum
TINY, LN2 = 1e-300, math.log(2.0)

# Buckets of every count or length up to the last edge, which stands for all above it: one load
# instead of branches.
SEEN_BUCKETS = np.searchsorted(SEEN_EDGES, np.arange(SEEN_EDGES[-1] + 1), side="right")
LENGTH_BUCKETS = np.searchsorted(LENGTH_EDGES, np.arange(LENGTH_EDGES[-1] + 1), side="right")


class MixtureRows(NamedTuple):
    """Columns about m targets: what the neural model and the experts say."""

    logp: np.ndarray  # float64 [m]: natural logarithm of the model's probability of the target
    sharp: np.ndarray  # float64 [m]: the same at a lower temperature
    flat: np.ndarray  # float64 [m]: the same at a higher temperature
    hint_logp: np.ndarray  # float64 [m]: the model's log-probability of the match expert's hint
    entropy: np.ndarray  # float64 [m]: of the model's distribution, nats
    counts: ContextCounts
    matches: Matches
    targets: np.ndarray  # int64 [m]
    sizes: np.ndarray  # int64 [m]: bytes that each target stands for


class MixtureState(NamedTuple):
    """Everything that the mixture learns."""

    trust: np.ndarray  # [orders + 1, *TRUST_SHAPE, 2]: right, all; the last order is the match
    weights: np.ndarray  # [sets, experts]
    lift: np.ndarray  # [LENGTHS, 2]: tilt's lift of a hint's logit; pool's share of its log-odds
    recent: np.ndarray  # [1]: recent advantage of the chain over the neural model, nats a token
    account: np.ndarray  # [2]: bits gained over the neural model, bytes scored


class MixtureSettings(NamedTuple):
    """The settings as compiled code takes them."""

    kind: int  # one of WEIGHTS
    pooled: bool  # the logarithmic pool is scored
    chained: bool  # the chain is in the mixture, or its advantage chooses the weight set
    tilted: bool  # the tilt is in the mixture
    lr: float
    floor: float
    rate: float
    guard: float


def initial_state(orders: int, experts: tuple[str, ...], neural: float) -> MixtureState:
    """Return the state before any token; experts that were not chosen weigh nothing."""
    trust = np.full((orders + 1, *TRUST_SHAPE, 2), TRUST_PRIOR)
    trust[:orders, ..., 0] *= TRUST_GRAMS
    trust[orders, ..., 0] *= TRUST_MATCH
    others = max(len(experts) - 1, 1)
    weights = np.array(
        [neural if e == "neural" else (1 - neural) * (e in experts) / others for e in EXPERTS]
    )
    sets, lift = LENGTHS * LONGEST * ADVANTAGES, np.zeros((LENGTHS, 2))
    lift[:, 1] = 0.5
    return MixtureState(
        trust, np.tile(weights / weights.sum(), (sets, 1)), lift, np.zeros(1), np.zeros(2)
    )


# Called at every token: inlined, because passing their arrays to a call took longer than their
# work.
inlined = njit(cache=True, nogil=True, error_model="numpy", inline="always")


# ==== EXPERTS =====================================================================================
@inlined
def edges_reached(value, edges):
    """Return how many edges a value has reached."""
    n = 0
    while n < len(edges) and value >= edges[n]:
        n += 1
    return n


@inlined
def length_bucket(length):
    """Return the bucket of a match's length: 0 without a match."""
    return LENGTH_BUCKETS[min(length, LENGTH_EDGES[-1])]


@inlined
def kinds_bucket(kinds, seen):
    """Return 0 where only one token ever followed, up to 4 where none followed twice."""
    return (kinds > 1) * (1 + (4 * kinds > seen) + (2 * kinds > seen) + (kinds >= seen))


@inlined
def chain_probability(j, p, entropy, counts, matches, target, trust, trust_rows, credits):
    """Return the chain's probability of target j, and how many rows of `trust` [*, 2] it used.

    It starts from the neural p. Each context's counts in turn, then the match's hint, move it as
    far as such evidence proved right before: p <- t * counted + (1 - t) * p. For learning,
    `trust_rows` keeps which rows gave t, and `credits` which part of the new p came from the
    evidence.
    """
    (hits, seen, kinds), (hint, length, rate) = counts, matches
    orders, used = hits.shape[1], 0
    sure = (entropy >= 1.0) + (entropy >= 3.0)
    for k in range(orders + 1):
        if k < orders and seen[j, k] > 0:
            hit, times = np.int64(hits[j, k]), np.int64(seen[j, k])
            a = SEEN_BUCKETS[min(times, SEEN_EDGES[-1])]
            b = kinds_bucket(np.int64(kinds[j, k]), times)
        elif k == orders and hint[j] >= 0:
            hit, times = np.int64(hint[j] == target), 1
            a, b = length_bucket(length[j]), min(int(rate[j] * 5), 4)
        else:
            continue
        row = ((k * TRUST_SHAPE[0] + a) * TRUST_SHAPE[1] + b) * TRUST_SHAPE[2] + sure
        right, uses = trust[row, 0], trust[row, 1]
        # Both parts of the new p, times uses * times: one division instead of three.
        from_evidence, from_below = right * hit, (uses - right) * times * p
        trust_rows[used] = row
        credits[used] = from_evidence / max(from_evidence + from_below, TINY)
        used, p = used + 1, (from_evidence + from_below) * (1.0 / (uses * times))
    return p, used


@inlined
def within_most_lift(lift):
    """Return the lift of a logit, at most MOST_LIFT either way."""
    return min(max(lift, -MOST_LIFT), MOST_LIFT)


@inlined
def lifted(p, hint_p, is_hint, growth):
    """Return p after e^logit of the hint grew by a factor; `hint_p` is the hint's probability.

    Dividing by 1 + p(hint) (growth - 1) keeps the sum at one: the closed form of #1514.
    """
    return (p * growth if is_hint else p) / (1 + hint_p * (growth - 1))


def expert_columns(
    rows: MixtureRows, experts: tuple[str, ...], pooled: bool, vocab_size: int
) -> tuple[np.ndarray, ...]:
    """Return eight columns float64 [m] about m targets.

    Probabilities of the first six experts, above zero; the neural probability of the hint; and the
    logarithm of its odds by the match expert. Where nothing reads a column, the neural one stands
    in for it: the bigram costs a pass over the counts, the last two an exponential and a logarithm.
    """
    neural, sharp, flat = (
        np.maximum(np.exp(logp), TINY) for logp in (rows.logp, rows.sharp, rows.flat)
    )
    bigram = hint_p = log_odds = neural
    if "bigram" in experts:
        bigram = ngram_probabilities(rows.counts, vocab_size, 2)
    if pooled or "tilt" in experts:
        hint_p = np.exp(rows.hint_logp)
    if pooled:
        rate = np.clip(rows.matches.rate, LEAST_RATE, 1 - LEAST_RATE)
        log_odds = np.log(rate / (1 - rate) * (vocab_size - 1))
    counted = ngram_probabilities(rows.counts, vocab_size)
    matched = match_probabilities(rows.matches, rows.targets, vocab_size)
    matched = np.where(rows.matches.hint < 0, neural, matched)  # without a hint: the neural model
    return neural, sharp, flat, counted, bigram, matched, hint_p, log_odds


# ==== WEIGHTS =====================================================================================
@inlined
def weight_set(length, seen, j, recent):
    """Return the set of weights for target j; all of it is known before the target."""
    longest = 0
    while longest < seen.shape[1] and seen[j, longest] > 0:
        longest += 1
    order = min(max(longest - 2, 0), LONGEST - 1)
    advantage = edges_reached(recent, ADVANTAGE_EDGES)
    return (length_bucket(length) * LONGEST + order) * ADVANTAGES + advantage


@inlined
def dot(a, b):
    """Return the scalar product, in a loop: for eight experts numpy costs more than the sum."""
    total = 0.0
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@inlined
def learn_em(weights, which, w, p, q, rate):
    """Move weights towards each expert's part of the mixture q: one step of online EM."""
    scale = rate / q
    for e in range(len(w)):
        weights[which, e] += w[e] * (p[e] * scale - rate)


@inlined
def learn_exponential(weights, which, w, p, lr, floor):
    """Multiply weights by p^lr, raise them to the floor, and make them sum to one again."""
    total = 0.0
    for e in range(len(w)):
        if w[e] > 0:
            weights[which, e] = max(w[e] * (p[e] if lr == 1.0 else p[e] ** lr), floor, TINY)
            total += weights[which, e]
    for e in range(len(w)):
        if w[e] > 0:
            weights[which, e] /= total


@inlined
def learn_trust(trust, used, trust_rows, credits):
    """Credit each row of trust that the chain used with its part of the probability."""
    for i in range(used):
        right, uses = trust[trust_rows[i], 0], trust[trust_rows[i], 1]
        fade = 0.5 if uses >= MOST_TRUSTED else 1.0
        trust[trust_rows[i], 0] = fade * right + credits[i]
        trust[trust_rows[i], 1] = fade * uses + 1.0


@inlined
def insured(mixed, logp, account, guard):
    """Return log of part * mixture + (1 - part) * neural, so that mixing never costs much.

    The funds are all bits gained so far and `guard` bits for each byte. The neural part is
    2^-funds: what the funds can pay if the mixture gave the target nothing. So over any text the
    mixture never costs more than `guard` bits a byte.
    """
    funds = max(account[0] + guard * account[1], 0.0)
    if guard == 0.0 or (funds > SURE_BITS and mixed > logp - SURE_BITS * LN2):
        return mixed
    if funds == 0.0:
        return logp
    least, most = logp - funds * LN2, mixed + math.log(-math.expm1(-funds * LN2))
    return max(least, most) + math.log1p(math.exp(-abs(most - least)))


# ==== THE PASS ====================================================================================
@njit(cache=True, nogil=True, error_model="numpy")
def mix_rows(rows, columns, state, settings, learn, out, weight_sums):
    """Fill out [m] with the log-probability of each target, learning each after it was scored.

    Without `learn` the rows are candidates for one position, and the state stays as it is.
    `columns` is what `expert_columns` returned; `weight_sums` [COUNT] adds up the weights used.
    """
    # Each array gets a name before the loop: taking it out of a tuple counts references each time.
    logp, entropy, targets, sizes = rows.logp, rows.entropy, rows.targets, rows.sizes
    counts, matches = rows.counts, rows.matches
    (_, seen, _), (hint, length, _) = counts, matches
    neural, sharp, flat, counted, bigram, matched, hint_p, log_odds = columns
    weights, lift, recent, account = state.weights, state.lift, state.recent, state.account
    kind, pooled, chained, tilted, lr, floor, rate, guard = settings
    orders, trust = seen.shape[1], state.trust.reshape(-1, 2)
    trust_rows, credits = np.empty(orders + 1, np.int64), np.empty(orders + 1)
    p, w, used = np.empty(COUNT), np.empty(COUNT), 0
    for j in range(len(out)):
        p[NEURAL], p[SHARP], p[FLAT] = neural[j], sharp[j], flat[j]
        p[NGRAM], p[BIGRAM], p[MATCH] = counted[j], bigram[j], matched[j]
        p[CHAIN] = p[TILT] = neural[j]
        if chained:
            believed, used = chain_probability(
                j, neural[j], entropy[j], counts, matches, targets[j], trust, trust_rows, credits
            )
            p[CHAIN] = max(believed, TINY)
        which = weight_set(length[j], seen, j, recent[0]) if kind == SETS else 0
        pool, hit, bucket, growth = logp[j], hint[j] == targets[j], length_bucket(length[j]), 1.0
        if hint[j] >= 0 and tilted:
            growth = math.exp(within_most_lift(lift[bucket, 0]))
            p[TILT] = max(lifted(neural[j], hint_p[j], hit, growth), TINY)
        for e in range(COUNT):
            w[e] = weights[which, e]
        q = max(dot(w, p), TINY)
        if pooled:
            pool_lift = within_most_lift(lift[bucket, 1] * log_odds[j]) if hint[j] >= 0 else 0.0
            pool_growth = math.exp(pool_lift)
            pool += (pool_lift if hit else 0.0) - math.log1p(hint_p[j] * (pool_growth - 1))
        out[j] = insured(pool if pooled else math.log(q), logp[j], account, guard)
        if learn:
            for e in range(COUNT):
                weight_sums[e] += w[e]
            if kind == EXPONENTIAL:
                learn_exponential(weights, which, w, p, lr, floor)
            else:
                learn_em(weights, which, w, p, q, rate)
            learn_trust(trust, used, trust_rows, credits)
            # Both lifts climb their gradient: the hint came true, less the probability of that.
            if hint[j] >= 0 and tilted:
                lift[bucket, 0] += LIFT_RATE * (hit - lifted(hint_p[j], hint_p[j], True, growth))
            if hint[j] >= 0 and pooled:
                surprise = hit - lifted(hint_p[j], hint_p[j], True, pool_growth)
                lift[bucket, 1] += POOL_RATE * log_odds[j] * surprise
            recent[0] += RECENT_RATE * (math.log(p[CHAIN]) - logp[j] - recent[0])
            account[0] += (out[j] - logp[j]) / LN2
            account[1] += sizes[j]


# ==== THE MIXTURE =================================================================================
class Mixture:
    """A mixture that learns as it scores; `fill` may be called chunk after chunk.

    Where a text is cut into chunks makes no difference. `experts` are those of EXPERTS that take
    part.
    """

    def __init__(self, vocab_size: int, cfg: EvalConfig, experts: tuple[str, ...] = EXPERTS):
        self.vocab_size, self.cfg, self.experts = vocab_size, cfg, experts
        self.state = initial_state(cfg.ngram_orders, experts, cfg.mix_neural)
        self.settings = MixtureSettings(
            kind=WEIGHTS.index(cfg.mix_weights),
            pooled=cfg.mix_mode == "log",
            chained="chain" in experts or cfg.mix_weights == "sets",
            tilted="tilt" in experts,
            lr=cfg.mix_lr,
            floor=cfg.mix_floor,
            rate=cfg.mix_rate,
            guard=cfg.mix_guard,
        )
        self.trace: list[np.ndarray] = []  # mean weights of each call [COUNT], for the report

    def _mix(self, rows: MixtureRows, learn: bool) -> np.ndarray:
        out, weight_sums = np.empty(len(rows.logp)), np.zeros(COUNT)
        columns = expert_columns(rows, self.experts, self.settings.pooled, self.vocab_size)
        mix_rows(rows, columns, self.state, self.settings, learn, out, weight_sums)
        if learn and len(out):
            self.trace.append(weight_sums / len(out))
        return out

    def fill(self, rows: MixtureRows) -> np.ndarray:
        """Return the log-probability of each target before it was read, float64 [m]; learn it."""
        return self._mix(rows, learn=True)

    def distribution(
        self, p: np.ndarray, counts: ContextCounts, hint: tuple[int, int, float]
    ) -> np.ndarray:
        """Return the distribution of the next token, float64 [V]; nothing is learnt.

        `p` [V] is the neural distribution, `counts` the n-gram's about every candidate, and `hint`
        the match expert's (hint, length, rate).
        """
        size, logp = self.vocab_size, np.log(np.maximum(p, TINY))
        token, length, rate = hint
        rows = MixtureRows(
            logp=logp,
            **{name: tempered(logp, t) for name, t in TEMPERATURES.items()},
            hint_logp=np.full(size, logp[max(token, 0)]),
            entropy=np.full(size, -(p * logp).sum()),
            counts=counts,
            matches=Matches(
                np.full(size, token, np.int32),
                np.full(size, length, np.uint16),
                np.full(size, rate),
            ),
            targets=np.arange(size),
            sizes=np.zeros(size, np.int64),
        )
        return np.exp(self._mix(rows, learn=False))

    def digest(self) -> str:
        """Return the SHA-256 of everything that was learnt."""
        return hashlib.sha256(b"".join(part.tobytes() for part in self.state)).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the state to a file."""
        write_state(path, "mixture", self.state._asdict())

    def restore(self, path: str | Path) -> None:
        """Take over the state that a mixture of the same settings saved."""
        with open_state(path, "mixture") as saved:
            self.state = MixtureState(
                *(same_shape(saved[name], own) for name, own in self.state._asdict().items())
            )
