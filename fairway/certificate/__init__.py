"""Run a scorer against the rules that its score must keep, and say which it kept.

    python -m fairway.certificate mine:Scorer --val 'data/*_val_*.bin' --tokenizer tokenizer.model

A scorer has two methods: `score(tokens) -> float64[n-1]`, the log-probability in nats of tokens[1:] in order, and
`distribution(tokens, i) -> float64[V]`, what it held for position i before it saw tokens[i]. It may also offer
`vocab_size`; `tolerance` (of log-probabilities, where batching changes rounding: 1e-4 at most); `boundaries(tokens)`,
the target rows at which its windows, chunks, documents, batches and ranks begin, by kind; `commits`, the log of its
last score(); and `embeddings(tokens) -> float[n, D]`, its token embeddings once they are smeared. What it does not
offer is not held against it: "cannot tell". Row j is about the target tokens[j+1]. docs/LEGALITY.md has the ruling
behind each rule, and what no run can see.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from fairway.certificate import rules
from fairway.certificate.trial import CannotTell, Failed, Trial
from fairway.scoring.commits import CHAIN_START, Commit, chained, verify_chain
from fairway.scoring.settings import LEAST_CERTIFIED_TOKENS
from train_gpt import ByteTable, need

__all__ = ["CHAIN_START", "Certificate", "Commit", "Verdict", "certify", "chained", "verify_chain"]


@dataclass(frozen=True)
class Verdict:
    rule: str
    verdict: str  # "ok", "FAIL" or "cannot tell"
    figure: str  # one short line
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Certificate:
    verdicts: list[Verdict]
    about: dict[str, Any]  # vocabulary, lengths, tolerance, seed, seconds

    @property
    def passed(self) -> bool:
        return all(v.verdict != "FAIL" for v in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **self.about, "rules": [asdict(v) for v in self.verdicts]}

    def table(self) -> str:
        rows = [
            ("rule", "verdict", "figure"),
            *((v.rule, v.verdict, v.figure) for v in self.verdicts),
        ]
        return "\n".join(
            f"{rule:13}{verdict:13}{figure}".rstrip() for rule, verdict, figure in rows
        )


def judged(name: str, rule: Callable[[], tuple[str, dict]]) -> Verdict:
    try:
        figure, details = rule()
        return Verdict(name, "ok", figure, details)
    except CannotTell as e:
        return Verdict(name, "cannot tell", str(e))
    except Failed as e:
        return Verdict(name, "FAIL", str(e), e.details)


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
    seed: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> Certificate:
    """Run `scorer` against every rule on (a prefix of) `tokens`, in about `seconds`.

    `claimed`: the log-probabilities counted for the whole of `tokens`, which prefixes must then reproduce. `sizes`:
    {"artifact": bytes, "code": {path: bytes}}. `progress(rule, fraction)` is told before each rule.
    """
    start = time.perf_counter()
    need(
        len(tokens) >= LEAST_CERTIFIED_TOKENS,
        f"a certificate needs at least {LEAST_CERTIFIED_TOKENS} tokens, not {len(tokens)}; give it "
        "a longer text",
    )
    trial = Trial(
        scorer, tokens, None if claimed is None else np.asarray(claimed, np.float64), seconds, seed
    )
    table = (
        byte_table
        if byte_table is not None or tokenizer is None
        else ByteTable.of(tokenizer, trial.vocab_size)
    )
    need(
        table is None or trial.dead or len(table.base) == trial.vocab_size,
        f"the byte table has "
        f"{len(table.base) if table else 0} pieces, the scorer's vocabulary is {trial.vocab_size}; give its own",
    )
    tests: dict[str, Callable[[], tuple[str, dict]]] = {
        "causal": lambda: rules.causal(trial),
        "normalised": lambda: rules.normalised(trial),
        "target-blind": lambda: rules.target_blind(trial, table),
        "score first": lambda: rules.score_first(trial),
        "one pass": lambda: rules.one_pass(trial),
        "coverage": lambda: rules.coverage(trial, table),
        "claim": lambda: rules.claim(trial),
        "bytes": lambda: rules.byte_counts(trial, table, tokenizer),
        "canary": lambda: rules.canary(trial),
        "paid prefix": lambda: rules.paid_prefix(trial),
        "smear": lambda: rules.smear(trial),
        "sizes": lambda: rules.code_and_artifact(sizes, budget_bytes),
    }
    verdicts = []
    for name, test in tests.items():
        if progress:
            progress(name, len(verdicts) / len(tests))
        if trial.dead and name != "sizes":  # nothing comes back from it: coverage is what it breaks
            verdicts.append(
                Verdict(name, "FAIL" if name == "coverage" else "cannot tell", trial.dead)
            )
        else:
            verdicts.append(judged(name, test))
    return Certificate(
        verdicts,
        {
            "vocab_size": trial.vocab_size,
            "tokens": len(tokens),
            "excerpt_tokens": len(trial.x),
            "longest_tokens": trial.reach,
            "tolerance": trial.tolerance,
            "seed": seed,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )
