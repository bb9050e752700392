"""How the next token is chosen: each strategy a function of one step's logits, which rules some tokens out.

What is left is sampled from. The log-probability that is reported of a token is always the model's own: `log_softmax`
of the logits as they came, before any penalty, temperature or filter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from train_gpt import need

NEVER = -np.inf  # the logit of a token that is ruled out


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64[..., V] of log-probabilities, in nats."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits - logits.max())
    return p / p.sum()


def only(logits: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The logits of the tokens `kept` (numbers, or a mask); the others are ruled out."""
    out = np.full_like(logits, NEVER)
    out[kept] = logits[kept]
    return out


def enough(order: np.ndarray, p: np.ndarray, mass: float) -> np.ndarray:
    """The first tokens of `order` that together have `mass`; at least one."""
    return order[: int(np.searchsorted(np.cumsum(p[order]), mass)) + 1]


# ==== STRATEGIES ======================================================================================================
# float64[V] -> float64[V], with the one number that governs them. Among equals the token of the lowest number is first.
def greedy(logits: np.ndarray) -> np.ndarray:
    """The best token alone."""
    return only(logits, np.array([logits.argmax()]))


def temperature(logits: np.ndarray, value: float) -> np.ndarray:
    """Below 1: more of what is likely; above 1: flatter. Counted from the best, so that no quotient overflows."""
    with np.errstate(over="ignore"):  # of a tiny value: to minus infinity, as it should
        return (logits - logits.max()) / value


def top_k(logits: np.ndarray, count: int) -> np.ndarray:
    """The `count` best."""
    return only(logits, np.argsort(-logits, kind="stable")[:count])


def top_p(logits: np.ndarray, mass: float) -> np.ndarray:
    """The fewest tokens, best first, that have `mass` together (arXiv 1904.09751)."""
    p = softmax(logits)
    return only(logits, enough(np.argsort(-p, kind="stable"), p, mass))


def min_p(logits: np.ndarray, part: float) -> np.ndarray:
    """Every token with at least this part of the best one's probability (arXiv 2407.01082); 0 keeps all."""
    return only(logits, logits >= logits.max() + (math.log(part) if part else NEVER))


def typical(logits: np.ndarray, mass: float) -> np.ndarray:
    """The fewest tokens that have `mass` together, those first whose surprise is nearest to the mean one: to the
    entropy (arXiv 2202.00666)."""
    logp = log_softmax(logits)
    p, surprise = np.exp(logp), np.where(np.isfinite(logp), -logp, np.inf)
    entropy = p[p > 0] @ surprise[p > 0]
    return only(logits, enough(np.argsort(np.abs(surprise - entropy), kind="stable"), p, mass))


def repetition_penalty(logits: np.ndarray, text: Sequence[int], penalty: float) -> np.ndarray:
    """Tokens of the text so far become less likely: their logits, where positive, are divided by the penalty, and
    multiplied where not (arXiv 1909.05858)."""
    seen, out = np.asarray(text, np.int64), logits.copy()
    out[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return out


# ==== ONE INTERFACE ===================================================================================================
class Knob(NamedTuple):
    """A number that the user sets: which values it takes, in code and in words."""

    takes: Callable[[float], bool]
    words: str
    help: str


KNOBS = {
    "temperature": Knob(
        lambda x: 0 < x < math.inf,
        "more than 0 (for the best token always: --strategy greedy)",
        "below 1: safer; above 1: bolder",
    ),
    "top_k": Knob(
        lambda x: x >= 1, "a whole number of at least 1", "sample among the K best tokens"
    ),
    "top_p": Knob(
        lambda x: 0 < x <= 1,
        "more than 0 and at most 1",
        "sample among the best tokens that have this much probability together",
    ),
    "min_p": Knob(
        lambda x: 0 <= x < 1,
        "at least 0 and less than 1",
        "sample among the tokens with at least this part of the best one's probability",
    ),
    "typical": Knob(
        lambda x: 0 < x <= 1,
        "more than 0 and at most 1",
        "sample among the tokens that surprise as "
        "much as is usual here, which have this much probability together",
    ),
    "repetition_penalty": Knob(
        lambda x: 1 <= x < math.inf,
        "at least 1, which is none",
        "makes tokens of the text so far less likely",
    ),
}
FILTERS: dict[str, Callable[[np.ndarray, float], np.ndarray] | None] = {
    "greedy": None,
    "temperature": None,
    "top-k": top_k,
    "top-p": top_p,
    "min-p": min_p,
    "typical": typical,
}


@dataclass(frozen=True)
class Strategy:
    """A way to choose, by name, and its numbers: Strategy("top-p", top_p=0.9).distribution(logits, text)."""

    name: str = "top-p"
    temperature: float = 0.8  # of all but greedy
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.1
    typical: float = 0.9
    repetition_penalty: float = 1.0

    def __post_init__(self):
        need(self.name in FILTERS, f"--strategy is {self.name!r}; take one of {', '.join(FILTERS)}")
        for name, knob in KNOBS.items():
            value = getattr(self, name)
            need(
                knob.takes(value),
                f"--{name.replace('_', '-')} is {value:g}; it must be {knob.words}",
            )

    @property
    def greedy(self) -> bool:
        return self.name == "greedy"

    def penalised(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """The logits, once it is sure that they are numbers, under the penalty."""
        best = logits.max()
        need(
            math.isfinite(best),
            f"the model's best logit is {best}: this artifact cannot be decoded here; check it "
            "with eval_final.py, or take --device cpu",
        )
        plain = self.repetition_penalty == 1
        return logits if plain else repetition_penalty(logits, text, self.repetition_penalty)

    def distribution(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """float64[V]: what the token after `text` is drawn from."""
        logits = self.penalised(logits, text)
        if self.greedy:
            return softmax(greedy(logits))
        logits, chosen = temperature(logits, self.temperature), FILTERS[self.name]
        return softmax(
            chosen(logits, getattr(self, self.name.replace("-", "_"))) if chosen else logits
        )


def draw(p: np.ndarray, rng: np.random.Generator) -> int:
    """A token, each as often as `p` says (it need not sum to 1); never one of probability 0."""
    sums = np.cumsum(p)
    at = np.searchsorted(sums, rng.random() * sums[-1], side="right")
    return int(min(at, np.searchsorted(sums, sums[-1])))  # a product that rounds up to the whole
