"""Scorers that break the rules of a score, one each, beside honest ones: `python -m tests.zoo` prints who is caught.

Each class says in `breaks` which rule must catch it; None: it must pass.
"""

from tests.zoo import ahead, books, targets
from tests.zoo.honest import HONEST, TEXT, TOKENIZER

__all__ = ["CHEATS", "HONEST", "UNSEEN", "verdicts_on", "zoo_table"]

from fairway.certificate import Certificate, certify
from fairway.scoring.shipped import imported_code

CHEATS = [*ahead.CHEATS, *targets.CHEATS, *books.CHEATS]
UNSEEN = books.UNSEEN  # what no run of a scorer can tell from an honest one


def verdicts_on(kind: type, seconds: float = 0.12, seed: int = 0) -> Certificate:
    """The certificate of one of the zoo's scorers."""
    sizes = {"artifact": getattr(kind, "artifact", 1_000_000), "code": imported_code()}
    return certify(kind(), TEXT, tokenizer=TOKENIZER, sizes=sizes, seconds=seconds, seed=seed)


def zoo_table(kinds: list[type]) -> str:
    """Rules across, scorers down: ok is a dot, FAIL a cross, cannot tell a question mark; [x] is the rule it breaks."""
    lines = []
    for kind in kinds:
        verdicts = verdicts_on(kind).verdicts
        rules = [v.rule for v in verdicts]
        marks = [{"ok": ".", "FAIL": "x", "cannot tell": "?"}[v.verdict] for v in verdicts]
        marks = [
            f"[{m}]" if rule == kind.breaks else m for rule, m in zip(rules, marks, strict=True)
        ]
        cells = [f"{mark:^{len(rule)}}" for rule, mark in zip(rules, marks, strict=True)]
        lines.append(f"{kind.__name__:22}" + " ".join(cells))
    return "\n".join(line.rstrip() for line in (f"{'':22}" + " ".join(rules), *lines))
