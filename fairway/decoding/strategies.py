"""Decoding strategies: each is a function from one step's logits to logits in which some tokens are
ruled out, and the next token is sampled from the rest.

The log-probability reported for a token is always the model's own: `log_softmax` of the logits as
the model gave them, before any penalty, temperature or filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fairway.decoding.strategy_options import STRATEGY_NAMES, STRATEGY_OPTIONS, option_name
from train_gpt import UserError

RULED_OUT = -np.inf  # the logit of a token that cannot be drawn


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities, float64[..., V], in nats."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities, float64[V]."""
    p = np.exp(logits - logits.max())
    return p / p.sum()


def keep_only(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Rule out every token but `tokens`, which are token numbers or a mask over the vocabulary."""
    out = np.full_like(logits, RULED_OUT)
    out[tokens] = logits[tokens]
    return out


def shortest_prefix(order: np.ndarray, p: np.ndarray, mass: float) -> np.ndarray:
    """Return the shortest prefix of `order` whose tokens together have probability `mass`."""
    return order[: int(np.searchsorted(np.cumsum(p[order]), mass)) + 1]


# ==== STRATEGIES ==================================================================================
# float64[V] -> float64[V], with the one number that governs each. Among equal logits the lowest
# token number comes first (a stable sort), so that a text does not depend on the platform's sort.
def greedy(logits: np.ndarray) -> np.ndarray:
    """Keep the best token alone."""
    return keep_only(logits, np.array([logits.argmax()]))


def temperature(logits: np.ndarray, value: float) -> np.ndarray:
    """Divide the logits by `value`: below 1 favours likely tokens, above 1 flattens."""
    # Measured from the best logit, so that a tiny temperature overflows to -inf, never to +inf.
    with np.errstate(over="ignore"):
        return (logits - logits.max()) / value


def top_k(logits: np.ndarray, count: int) -> np.ndarray:
    """Keep the `count` best tokens."""
    return keep_only(logits, np.argsort(-logits, kind="stable")[:count])


def top_p(logits: np.ndarray, mass: float) -> np.ndarray:
    """Keep the fewest best tokens that together have probability `mass` (arXiv 1904.09751)."""
    p = softmax(logits)
    return keep_only(logits, shortest_prefix(np.argsort(-p, kind="stable"), p, mass))


def min_p(logits: np.ndarray, fraction: float) -> np.ndarray:
    """Keep tokens with at least `fraction` of the best probability (arXiv 2407.01082); 0: all."""
    return keep_only(
        logits, logits >= logits.max() + (math.log(fraction) if fraction else RULED_OUT)
    )


def typical(logits: np.ndarray, mass: float) -> np.ndarray:
    """Keep the fewest tokens that together have probability `mass`, taken in the order of how near
    their surprise is to the mean surprise, the entropy (arXiv 2202.00666).
    """
    logp = log_softmax(logits)
    p, surprise = np.exp(logp), np.where(np.isfinite(logp), -logp, np.inf)
    entropy = p[p > 0] @ surprise[p > 0]
    nearest_first = np.argsort(np.abs(surprise - entropy), kind="stable")
    return keep_only(logits, shortest_prefix(nearest_first, p, mass))


FILTERS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "top-k": top_k,
    "top-p": top_p,
    "min-p": min_p,
    "typical": typical,
}  # greedy and temperature filter nothing


def repetition_penalty(logits: np.ndarray, text: Sequence[int], penalty: float) -> np.ndarray:
    """Make the tokens of `text` less likely: divide their positive logits by `penalty` and multiply
    their negative ones by it (arXiv 1909.05858).
    """
    seen, out = np.asarray(text, np.int64), logits.copy()
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


# ==== ONE INTERFACE ===============================================================================
def default_of(name: str) -> float:
    """Return the default of a strategy's number."""
    return STRATEGY_OPTIONS[name].default


@dataclass(frozen=True)
class Strategy:
    """A strategy's name and its numbers: Strategy("top-p", top_p=0.9).distribution(logits,
    text).
    """

    name: str = "top-p"
    temperature: float = default_of("temperature")  # used by all strategies but greedy
    top_k: int = default_of("top_k")
    top_p: float = default_of("top_p")
    min_p: float = default_of("min_p")
    typical: float = default_of("typical")
    repetition_penalty: float = default_of("repetition_penalty")

    def __post_init__(self):
        if self.name not in STRATEGY_NAMES:
            raise UserError(f"--strategy is {self.name!r}; take one of {', '.join(STRATEGY_NAMES)}")
        for name, option in STRATEGY_OPTIONS.items():
            value = getattr(self, name)
            if not option.accepts(value):
                raise UserError(
                    f"{option_name(name)} is {value:g}; it must be {option.range_words}"
                )

    @property
    def greedy(self) -> bool:
        """True if the best token is always taken."""
        return self.name == "greedy"

    def penalised(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """Return the logits under the repetition penalty, after checking that they are finite."""
        best = logits.max()
        if not math.isfinite(best):
            raise UserError(
                f"the model's best logit is {best}: this artifact cannot be decoded here; check it "
                "with eval_final.py, or take --device cpu"
            )
        if self.repetition_penalty == 1:
            return logits
        return repetition_penalty(logits, text, self.repetition_penalty)

    def distribution(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """Return the probabilities, float64[V], from which the token after `text` is drawn."""
        logits = self.penalised(logits, text)
        if self.greedy:
            return softmax(greedy(logits))
        logits = temperature(logits, self.temperature)
        if self.name in FILTERS:
            logits = FILTERS[self.name](logits, getattr(self, self.name.replace("-", "_")))
        return softmax(logits)


def draw(p: np.ndarray, rng: np.random.Generator) -> int:
    """Draw a token in proportion to `p`, which need not sum to 1; never one of probability 0."""
    sums = np.cumsum(p)
    at = np.searchsorted(sums, rng.random() * sums[-1], side="right")
    # The product may round up to the full sum, which would point behind the last possible token.
    return int(min(at, np.searchsorted(sums, sums[-1])))
