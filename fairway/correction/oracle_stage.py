"""The correction table of a finished evaluation: what the score would be with it, and its price."""

from __future__ import annotations

from typing import Any

from fairway.correction import oracle, table
from fairway.scoring.evaluation import Evaluation


def correction_section(evaluation: Evaluation) -> dict[str, Any]:
    """Apply a correction table to a score, log what it saves and costs, and return its section.

    The table is the one next to the artifact, or one that is built here. It was made from the text
    that is scored, so the result is an oracle and no score.
    """
    cfg, text, logp = evaluation.cfg, evaluation.text, evaluation.logp
    path = table.table_path(cfg.checkpoint)
    neural = oracle.view_scorer(evaluation.model, evaluation.rt)
    artifact = bytes.fromhex(evaluation.hashes["artifact"])
    with evaluation.stage("correction"), evaluation.bar("correction", len(logp)) as bar:
        if path.exists():
            correction, entries = oracle.load_table(path, neural, text.tokens, artifact, bar.update)
        else:
            correction, entries = oracle.build_table(
                neural,
                text.tokens,
                evaluation.columns["logp"],
                cfg.correction_codec,
                budget_of(cfg.correction_bytes, len(logp)),
                artifact,
                bar.update,
            )
        size = len(table.table_bytes(correction))
        table.corrected_logp(logp, entries, text.tokens[1:])  # refuses entries of another text
        cost = table.charge(logp, entries, size, text.bytes)
    section = dict(
        entries=len(entries.tokens),
        bytes=size,
        codec=correction.codec,
        stored=path.exists(),
        **cost._asdict(),
    )
    evaluation.log(
        f"{table.NOTICE}\n"
        f"correction:{correction.codec} entries:{section['entries']} bytes:{size} "
        f"saved_bits:{cost.saved_bits:.0f} paid_bits:{cost.paid_bits:.0f}\n"
        f"oracle_bpb:{cost.oracle_bpb:.8f}\ncharged_bpb:{cost.charged_bpb:.8f}",
        "correction",
        **section,
    )
    return section


def budget_of(correction_bytes: int, rows: int) -> int | None:
    """Return the table's bytes for a value of CORRECTION_BYTES; None: only entries that pay."""
    return {-1: oracle.default_budget(rows), 0: None}.get(correction_bytes, correction_bytes)
