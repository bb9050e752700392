"""The mixture in plain Python: dictionaries and loops, slow and obvious; an oracle."""

import bisect
import math
from typing import NamedTuple

from fairway.scoring.experts import mixing as m
from fairway.scoring.experts.ngram import DISCOUNTS, ESCAPES


class Row(NamedTuple):
    """One target, and what is known about it."""

    logp: float
    sharp: float
    flat: float
    hint_logp: float
    entropy: float
    counts: list  # (hits, seen, kinds) by context length
    hint: int  # -1: none
    length: int
    rate: float
    target: int
    size: int


def rows_of(rows: m.MixtureRows) -> list[Row]:
    """Turn columns into a list of rows."""
    orders = range(rows.counts.hits.shape[1])
    columns = (rows.logp, rows.sharp, rows.flat, rows.hint_logp, rows.entropy)
    return [
        Row(
            *(float(column[j]) for column in columns),
            [tuple(int(part[j, k]) for part in rows.counts) for k in orders],
            int(rows.matches.hint[j]),
            int(rows.matches.length[j]),
            float(rows.matches.rate[j]),
            int(rows.targets[j]),
            int(rows.sizes[j]),
        )
        for j in range(len(rows.logp))
    ]


def bucket(value: float, edges) -> int:
    """Return how many edges a value has reached."""
    return bisect.bisect_right(list(edges), value)


def positive(log_probability: float) -> float:
    """Return the probability, above zero."""
    return max(math.exp(log_probability), m.TINY)


def interpolated(counts: list, vocab_size: int) -> float:
    """Return the n-gram's probability: longer and longer contexts, each over the shorter ones."""
    p = 1 / vocab_size
    for k, (hits, seen, kinds) in enumerate(counts):
        d, c = DISCOUNTS[min(k, len(DISCOUNTS) - 1)], ESCAPES[min(k, len(ESCAPES) - 1)]
        if seen:
            p = (max(hits - d, 0) + (d + c) * kinds * p) / (seen + c * kinds)
    return p


def lift(row: Row, by: float) -> float:
    """Return the target's log-probability after the hint's logit rose: p(hint) e^by, normalised."""
    by = min(max(by, -m.MOST_LIFT), m.MOST_LIFT)
    hint = math.exp(row.hint_logp)
    return row.logp + by * (row.hint == row.target) - math.log1p(hint * math.expm1(by))


class ReferenceMixture:
    """The mixture of fairway.scoring.experts.mixing, with dictionaries for its tables."""

    def __init__(self, vocab_size: int, cfg, experts=m.EXPERTS):
        self.vocab_size, self.cfg = vocab_size, cfg
        others = max(len(experts) - 1, 1)
        first = {
            e: cfg.mix_neural if e == "neural" else (1 - cfg.mix_neural) / others
            for e in m.EXPERTS
            if e in experts
        }
        self.first = {e: w / sum(first.values()) for e, w in first.items()}
        self.weights = {}  # by set
        self.trust = {}  # by evidence and situation -> [right, all]
        self.tilts, self.pools = {}, {}  # by length of the match
        self.recent, self.gained, self.bytes = 0.0, 0.0, 0

    def fill(self, rows: list[Row]) -> list[float]:
        """Return the log-probability of each target, learning it afterwards."""
        return [self.step(row) for row in rows]

    def step(self, row: Row) -> float:
        """Return the log-probability of one target, then learn it."""
        length = bucket(row.length, m.LENGTH_EDGES)
        rate = min(max(row.rate, m.LEAST_RATE), 1 - m.LEAST_RATE)
        odds = math.log(rate / (1 - rate) * (self.vocab_size - 1))
        tilt, pool = self.tilts.get(length, 0.0), self.pools.get(length, 0.5)
        chain, credits = self.chain(row)
        p = dict(
            neural=positive(row.logp),
            sharp=positive(row.sharp),
            flat=positive(row.flat),
            ngram=interpolated(row.counts, self.vocab_size),
            bigram=interpolated(row.counts[:2], self.vocab_size),
            chain=max(chain, m.TINY),
            match=positive(row.logp),
            tilt=positive(row.logp),
        )
        pooled = row.logp
        if row.hint >= 0:
            rest = (1 - row.rate) / (self.vocab_size - 1)
            p["match"] = row.rate if row.hint == row.target else rest
            p["tilt"], pooled = positive(lift(row, tilt)), lift(row, pool * odds)
        where = self.weight_set(row, length)
        w = dict(self.weights.get(where, self.first))
        q = max(sum(w[e] * p[e] for e in w), m.TINY)
        out = self.insured(pooled if self.cfg.mix_mode == "log" else math.log(q), row.logp)
        self.learn_weights(where, w, p, q)
        for place, credit in credits:
            self.learn_trust(place, credit)
        if row.hint >= 0:
            hit = float(row.hint == row.target)
            of_hint = row._replace(logp=row.hint_logp, target=row.hint)
            self.tilts[length] = tilt + m.LIFT_RATE * (hit - math.exp(lift(of_hint, tilt)))
            surprise = hit - math.exp(lift(of_hint, pool * odds))
            self.pools[length] = pool + m.POOL_RATE * odds * surprise
        self.recent += m.RECENT_RATE * (math.log(p["chain"]) - row.logp - self.recent)
        self.gained += (out - row.logp) / math.log(2)
        self.bytes += row.size
        return out

    def chain(self, row: Row) -> tuple[float, list]:
        """Return the neural p moved by each context's counts, then the hint; and the credits."""
        p, credits = math.exp(row.logp), []
        sure = 0 if row.entropy < 1 else 1 if row.entropy < 3 else 2
        evidence = []
        for k, (hits, seen, kinds) in enumerate(row.counts):
            if seen:
                kinds_bucket = (
                    0 if kinds == 1 else 1 + bisect.bisect_left([0.25, 0.5], kinds / seen)
                )
                kinds_bucket = 4 if kinds > 1 and kinds == seen else kinds_bucket
                place = ("gram", k, bucket(seen, m.SEEN_EDGES), kinds_bucket, sure)
                evidence.append((place, hits / seen))
        if row.hint >= 0:
            place = ("match", bucket(row.length, m.LENGTH_EDGES), min(int(row.rate * 5), 4), sure)
            evidence.append((place, float(row.hint == row.target)))
        for place, counted in evidence:
            right, uses = self.trust.get(place, self.first_trust(place))
            t = right / uses
            p = t * counted + (1 - t) * p
            credits.append((place, t * counted / max(p, m.TINY)))
        return p, credits

    def first_trust(self, place) -> tuple[float, float]:
        """Return the trust before anything was learnt: right, all."""
        first = m.TRUST_MATCH if place[0] == "match" else m.TRUST_GRAMS
        return m.TRUST_PRIOR * first, m.TRUST_PRIOR

    def learn_trust(self, place, credit: float) -> None:
        """Count one use of a trust."""
        right, uses = self.trust.get(place, self.first_trust(place))
        fade = 0.5 if uses >= m.MOST_TRUSTED else 1.0
        self.trust[place] = fade * right + credit, fade * uses + 1

    def weight_set(self, row: Row, length: int) -> tuple:
        """Return the key of the weights for this row."""
        contexts = next((k for k, (_, seen, _) in enumerate(row.counts) if not seen), None)
        contexts = len(row.counts) if contexts is None else contexts
        longest = min(max(contexts - 2, 0), m.LONGEST - 1)
        advantage = bucket(self.recent, m.ADVANTAGE_EDGES)
        return (length, longest, advantage) if self.cfg.mix_weights == "sets" else ()

    def learn_weights(self, where, w, p, q) -> None:
        """Move the weights that were used towards the experts that were right."""
        cfg = self.cfg
        if cfg.mix_weights == "exponential":
            new = {e: max(w[e] * p[e] ** cfg.mix_lr, cfg.mix_floor, m.TINY) for e in w}
            self.weights[where] = {e: new[e] / sum(new.values()) for e in w}
        else:
            step = cfg.mix_rate
            self.weights[where] = {e: w[e] + step * (w[e] * p[e] / q - w[e]) for e in w}

    def insured(self, mixed: float, logp: float) -> float:
        """Return log of (1 - 2^-funds) * mixture + 2^-funds * neural: at worst it costs them."""
        if not self.cfg.mix_guard:
            return mixed
        funds = max(self.gained + self.cfg.mix_guard * self.bytes, 0.0)
        terms = [logp - funds * math.log(2)]
        if funds:
            terms.append(mixed + math.log(-math.expm1(-funds * math.log(2))))
        return max(terms) + math.log(sum(math.exp(t - max(terms)) for t in terms))
