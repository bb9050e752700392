"""The mixture in plain Python: dictionaries and loops, slow and obvious. Tests compare the compiled one with it."""

import bisect
import math
from typing import NamedTuple

from fairway.scoring.experts import mixing as m
from fairway.scoring.experts.ngram import DISCOUNTS, ESCAPES


class Row(NamedTuple):
    """What is known about one target, and the target."""

    logp: float
    sharp: float
    flat: float
    hint_logp: float
    entropy: float
    grams: list  # (hits, seen, kinds) by context length
    hint: int  # -1: none
    length: int
    rate: float
    target: int
    size: int


def rows_of(inputs: m.Inputs) -> list[Row]:
    """The columns turned round."""
    grams = [
        [tuple(int(part[j, k]) for part in inputs.grams) for k in range(inputs.grams.hits.shape[1])]
        for j in range(len(inputs.logp))
    ]
    columns = (inputs.logp, inputs.sharp, inputs.flat, inputs.hint, inputs.entropy)
    return [
        Row(
            *(float(c[j]) for c in columns),
            grams[j],
            int(inputs.matches.hint[j]),
            int(inputs.matches.length[j]),
            float(inputs.matches.rate[j]),
            int(inputs.targets[j]),
            int(inputs.sizes[j]),
        )
        for j in range(len(inputs.logp))
    ]


def bucket(value: float, edges) -> int:
    return bisect.bisect_right(list(edges), value)


def positive(log_probability: float) -> float:
    return max(math.exp(log_probability), m.TINY)


def blended(grams: list, vocab_size: int) -> float:
    """Counts of longer and longer contexts, each interpolated with what the shorter ones gave."""
    p = 1 / vocab_size
    for k, (hits, seen, kinds) in enumerate(grams):
        d, c = DISCOUNTS[min(k, len(DISCOUNTS) - 1)], ESCAPES[min(k, len(ESCAPES) - 1)]
        if seen:
            p = (max(hits - d, 0) + (d + c) * kinds * p) / (seen + c * kinds)
    return p


def lift(row: Row, by: float) -> float:
    """log-probability of the target once the hint's logit rose: p(hint) e^by and every other p, over their sum."""
    by = min(max(by, -m.MOST_LIFT), m.MOST_LIFT)
    hint = math.exp(row.hint_logp)
    return row.logp + by * (row.hint == row.target) - math.log1p(hint * math.expm1(by))


class ReferenceMixture:
    def __init__(self, vocab_size: int, cfg, experts=m.EXPERTS):
        self.vocab_size, self.cfg = vocab_size, cfg
        others = max(len(experts) - 1, 1)
        first = {
            e: cfg.mix_neural if e == "neural" else (1 - cfg.mix_neural) / others
            for e in m.EXPERTS
            if e in experts
        }
        self.first = {e: w / sum(first.values()) for e, w in first.items()}
        self.weights, self.visits = {}, {}  # by set
        self.gate = {e: [0.0] * m.FEATURES for e in self.first}
        self.trust = {}  # by what is believed in which situation -> [right, all]
        self.tilts, self.pools = {}, {}  # by length of the match
        self.recent, self.gained, self.bytes = 0.0, 0.0, 0

    def fill(self, rows: list[Row]) -> list[float]:
        return [self.step(row) for row in rows]

    def step(self, row: Row) -> float:
        """log-probability of the target; then it is learnt."""
        length = bucket(row.length, m.LENGTH_EDGES)
        rate = min(max(row.rate, m.LEAST_RATE), 1 - m.LEAST_RATE)
        odds = math.log(rate / (1 - rate) * (self.vocab_size - 1))
        tilt, pool = self.tilts.get(length, 0.0), self.pools.get(length, 0.5)
        chain, believed = self.chain(row)
        p = dict(
            neural=positive(row.logp),
            sharp=positive(row.sharp),
            flat=positive(row.flat),
            ngram=blended(row.grams, self.vocab_size),
            bigram=blended(row.grams[:2], self.vocab_size),
            chain=max(chain, m.TINY),
            match=positive(row.logp),
            tilt=positive(row.logp),
        )
        pooled = row.logp
        if row.hint >= 0:
            p["match"] = (
                row.rate if row.hint == row.target else (1 - row.rate) / (self.vocab_size - 1)
            )
            p["tilt"], pooled = positive(lift(row, tilt)), lift(row, pool * odds)
        features, where = self.situation(row, length)
        w = self.weigh(features, where)
        q = max(sum(w[e] * p[e] for e in w), m.TINY)
        out = self.insured(pooled if self.cfg.mix_mode == "log" else math.log(q), row.logp)
        self.learn_weights(features, where, w, p, q)
        for place, right in believed:
            self.learn_trust(place, right)
        if row.hint >= 0:
            hit = float(row.hint == row.target)
            asked = row._replace(logp=row.hint_logp, target=row.hint)
            self.tilts[length] = tilt + m.LIFT_RATE * (hit - math.exp(lift(asked, tilt)))
            self.pools[length] = pool + m.POOL_RATE * odds * (
                hit - math.exp(lift(asked, pool * odds))
            )
        self.recent += m.MEMORY * (math.log(p["chain"]) - row.logp - self.recent)
        self.gained += (out - row.logp) / math.log(2)
        self.bytes += row.size
        return out

    def chain(self, row: Row) -> tuple[float, list]:
        """The neural probability, moved towards each context's counts and then to the hint; and what was believed."""
        p, believed = math.exp(row.logp), []
        sure = 0 if row.entropy < 1 else 1 if row.entropy < 3 else 2
        says = []
        for k, (hits, seen, kinds) in enumerate(row.grams):
            if seen:
                share = kinds / seen
                spread = (
                    0
                    if kinds == 1
                    else 1
                    if share <= 0.25
                    else 2
                    if share <= 0.5
                    else 3
                    if share < 1
                    else 4
                )
                says.append((("gram", k, bucket(seen, m.SEEN_EDGES), spread, sure), hits / seen))
        if row.hint >= 0:
            group = bucket(row.length, m.LENGTH_EDGES)
            says.append(
                (
                    ("match", 0, group, min(int(row.rate * 5), 4), sure),
                    float(row.hint == row.target),
                )
            )
        for place, counted in says:
            right, every = self.trust.get(place, self.fresh_trust(place))
            t = right / every
            p = t * counted + (1 - t) * p
            believed.append((place, t * counted / max(p, m.TINY)))
        return p, believed

    def fresh_trust(self, place) -> tuple[float, float]:
        return m.TRUST_PRIOR * (
            m.TRUST_MATCH if place[0] == "match" else m.TRUST_GRAMS
        ), m.TRUST_PRIOR

    def learn_trust(self, place, credit: float) -> None:
        right, every = self.trust.get(place, self.fresh_trust(place))
        fade = 0.5 if every >= m.MOST_TRUSTED else 1.0
        self.trust[place] = fade * right + credit, fade * every + 1

    def situation(self, row: Row, length: int) -> tuple[list[float], tuple]:
        contexts = 0
        for _, seen, _ in row.grams:
            if not seen:
                break
            contexts += 1
        longest = min(max(contexts - 2, 0), m.LONGEST - 1)
        features = [float(i == length) for i in range(m.LENGTHS)] + [
            float(i == longest) for i in range(m.LONGEST)
        ]
        features += [row.entropy / 3, min(max(4 * self.recent, -2.0), 2.0), 1.0]
        sets = (length, longest, bucket(self.recent, m.ADVANTAGE_EDGES))
        return features, sets if self.cfg.mix_weights == "sets" else ()

    def weigh(self, features: list[float], where: tuple) -> dict[str, float]:
        w = dict(self.weights.get(where, self.first))
        if self.cfg.mix_weights == "gate":
            for e in w:
                w[e] *= math.exp(
                    min(sum(g * f for g, f in zip(self.gate[e], features, strict=True)), 300.0)
                )
            w = {e: w[e] / sum(w.values()) for e in w}
        return w

    def learn_weights(self, features, where, w, p, q) -> None:
        cfg = self.cfg
        if cfg.mix_weights == "gate":
            for e in w:
                for f, feature in enumerate(features):
                    self.gate[e][f] += m.GATE_RATE * (w[e] * p[e] / q - w[e]) * feature
        elif cfg.mix_weights in ("exponential", "share"):
            floor = cfg.mix_floor if cfg.mix_weights == "exponential" else 0.0
            share = cfg.mix_share if cfg.mix_weights == "share" else 0.0
            new = {e: max(w[e] * p[e] ** cfg.mix_lr, floor, m.TINY) for e in w}
            self.weights[where] = {
                e: (1 - share) * new[e] / sum(new.values()) + share / len(w) for e in w
            }
        else:
            visits = self.visits[where] = self.visits.get(where, 0) + 1
            step = max(cfg.mix_rate, 1 / (visits + 1.5 / cfg.mix_rate))
            self.weights[where] = {e: w[e] + step * (w[e] * p[e] / q - w[e]) for e in w}

    def insured(self, mixed: float, logp: float) -> float:
        """log of (1 - 2^-funds) * mixture + 2^-funds * neural: at worst it costs the funds."""
        if not self.cfg.mix_guard:
            return mixed
        funds = max(self.gained + self.cfg.mix_guard * self.bytes, 0.0)
        terms = [logp - funds * math.log(2)]
        if funds:
            terms.append(mixed + math.log(-math.expm1(-funds * math.log(2))))
        return max(terms) + math.log(sum(math.exp(t - max(terms)) for t in terms))
