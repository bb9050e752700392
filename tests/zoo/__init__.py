"""Scorers that each break one rule of a score, and honest ones: `python -m tests.zoo` prints who is
caught.

The attribute `breaks` of a class names the rule that must catch it; None: it must pass.
"""

from tests.zoo import ahead, books, targets
from tests.zoo.honest import HONEST, TEXT, TOKENIZER

__all__ = ["CHEATS", "HONEST", "UNSEEN", "certificate_of", "zoo_table"]

from fairway.certificate.judge import Certificate, certify
from fairway.scoring.shipped import imported_code

CHEATS = [*ahead.CHEATS, *targets.CHEATS, *books.CHEATS]
UNSEEN = books.UNSEEN  # no run of a scorer can tell these from an honest one
CALL_SECONDS = 8.0  # the zoo's NeverAnswers waits so long; the others answer at once


def certificate_of(kind: type, seconds: float = 0.12, seed: int = 0) -> Certificate:
    """Return the certificate of one of the zoo's scorers."""
    return certify(
        kind(),
        TEXT,
        tokenizer=TOKENIZER,
        sizes={"artifact": getattr(kind, "artifact", 1_000_000), "code": imported_code()},
        seconds=seconds,
        call_seconds=getattr(kind, "call_seconds", CALL_SECONDS),
        seed=seed,
    )


def zoo_table(kinds: list[type]) -> str:
    """Return a table with rules across and scorers down. A dot is ok, x is FAIL, a question mark is
    cannot tell; [x] is the rule that the scorer breaks.
    """
    lines = []
    for kind in kinds:
        verdicts = certificate_of(kind).verdicts
        rules = [v.rule for v in verdicts]
        marks = [{"ok": ".", "FAIL": "x", "cannot tell": "?"}[v.verdict] for v in verdicts]
        marks = [
            f"[{mark}]" if rule == kind.breaks else mark
            for rule, mark in zip(rules, marks, strict=True)
        ]
        cells = [f"{mark:^{len(rule)}}" for rule, mark in zip(rules, marks, strict=True)]
        lines.append(f"{kind.__name__:22}" + " ".join(cells))
    return "\n".join(line.rstrip() for line in (f"{'':22}" + " ".join(rules), *lines))
