"""Run every rule against a scorer and collect the verdicts in a certificate."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fairway.certificate import accounts, rules
from fairway.certificate.trial import CALL_SECONDS, CannotTell, RuleBroken, Trial
from fairway.scoring.settings import LEAST_CERTIFIED_TOKENS
from train_gpt import ByteTable, UserError


@dataclass(frozen=True)
class Verdict:
    """The finding of one rule: "ok", "FAIL" or "cannot tell", and a short line with the figure."""

    rule: str
    verdict: str
    figure: str
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Certificate:
    """The verdicts on one scorer, and the circumstances: vocabulary, lengths, seed, seconds."""

    verdicts: list[Verdict]
    about: dict[str, Any]

    @property
    def passed(self) -> bool:
        """True if no rule failed."""
        return all(v.verdict != "FAIL" for v in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """Return the content of certificate.json."""
        return {"passed": self.passed, **self.about, "rules": [asdict(v) for v in self.verdicts]}

    def table(self) -> str:
        """Return a table of rule, verdict and figure, one line a rule."""
        rows = [("rule", "verdict", "figure")]
        rows += [(v.rule, v.verdict, v.figure) for v in self.verdicts]
        return "\n".join(
            f"{rule:13}{verdict:13}{figure}".rstrip() for rule, verdict, figure in rows
        )


Rule = Callable[[], tuple[str, dict]]


def certify(
    scorer: Any,
    tokens: np.ndarray,
    *,
    byte_table: ByteTable | None = None,
    tokenizer: Any = None,
    claimed: np.ndarray | None = None,
    sizes: dict | None = None,
    budget_bytes: int = 16_000_000,
    seconds: float = 120.0,
    call_seconds: float = CALL_SECONDS,
    seed: int = 0,
    on_progress: Callable[[str, float], None] | None = None,
) -> Certificate:
    """Run `scorer` against every rule on a prefix of `tokens`, in about `seconds`.

    `claimed` holds the log-probabilities counted for all of `tokens`; scores of prefixes must agree
    with it. `sizes` is {"artifact": bytes, "code": {path: bytes}}. A single call may take
    `call_seconds`, or `seconds` if that is longer. `on_progress(rule, fraction)` is called before
    each rule.
    """
    start = time.perf_counter()
    if len(tokens) < LEAST_CERTIFIED_TOKENS:
        raise UserError(
            f"a certificate needs at least {LEAST_CERTIFIED_TOKENS} tokens, not {len(tokens)}; "
            "give it a longer text"
        )
    claimed = None if claimed is None else np.asarray(claimed, np.float64)
    trial = Trial(scorer, tokens, claimed, seconds, seed, call_seconds)
    if byte_table is None and tokenizer is not None:
        byte_table = ByteTable.of(tokenizer, trial.vocab_size)
    if byte_table is not None and not trial.dead and len(byte_table.base) != trial.vocab_size:
        raise UserError(
            f"the byte table has {len(byte_table.base)} pieces, but the scorer's vocabulary is "
            f"{trial.vocab_size}; give its own"
        )
    verdicts = []
    every_rule = rules_by_name(trial, byte_table, tokenizer, sizes, budget_bytes)
    for name, rule in every_rule.items():
        if on_progress:
            on_progress(name, len(verdicts) / len(every_rule))
        verdicts.append(apply_rule(name, rule, trial))
    about = {
        "vocab_size": trial.vocab_size,
        "tokens": len(tokens),
        "excerpt_tokens": len(trial.x),
        "longest_tokens": trial.reach,
        "tolerance": trial.tolerance,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return Certificate(verdicts, about)


def rules_by_name(
    trial: Trial, table: ByteTable | None, tokenizer: Any, sizes: dict | None, budget_bytes: int
) -> dict[str, Rule]:
    """Return every rule, ready to run, in the order of the certificate."""
    return {
        "causal": lambda: rules.check_causal(trial),
        "normalised": lambda: rules.check_normalised(trial),
        "target-blind": lambda: rules.check_target_blind(trial, table),
        "score first": lambda: rules.check_score_first(trial),
        "one pass": lambda: rules.check_one_pass(trial),
        "coverage": lambda: accounts.check_coverage(trial, table),
        "claim": lambda: rules.check_claim(trial),
        "bytes": lambda: accounts.check_bytes(trial, table, tokenizer),
        "canary": lambda: rules.check_canary(trial),
        "paid prefix": lambda: rules.check_paid_prefix(trial),
        "smear": lambda: rules.check_smear(trial),
        "sizes": lambda: accounts.check_sizes(sizes, budget_bytes),
    }


def apply_rule(name: str, rule: Rule, trial: Trial) -> Verdict:
    """Run one rule; a scorer that does not answer breaks coverage and leaves the rest open."""
    if trial.dead and name != "sizes":
        return Verdict(name, "FAIL" if name == "coverage" else "cannot tell", trial.dead)
    try:
        figure, details = rule()
        return Verdict(name, "ok", figure, details)
    except CannotTell as e:
        return Verdict(name, "cannot tell", str(e))
    except RuleBroken as e:
        return Verdict(name, "FAIL", str(e), e.details)
