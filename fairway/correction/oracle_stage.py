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
    path = table.sidecar(cfg.checkpoint)
    neural = oracle.viewer(evaluation.model, evaluation.rt)
    artifact = bytes.fromhex(evaluation.hashes["artifact"])
    with evaluation.stage("correction"), evaluation.bar("correction", len(logp)) as bar:
        if path.exists():
            made, entries = oracle.stored_table(path, neural, text.tokens, artifact, bar.update)
        else:
            made, entries = oracle.build_table(
                neural,
                text.tokens,
                evaluation.columns["logp"],
                cfg.correction_codec,
                budget_of(cfg.correction_bytes, len(logp)),
                artifact,
                bar.update,
            )
        size = len(table.table_bytes(made))
        table.apply(logp, entries, text.tokens[1:])  # refuses entries that are not this text's
        cost = table.charge(logp, entries, size, text.bytes)
    section = dict(
        entries=len(entries.tokens),
        bytes=size,
        codec=made.codec,
        stored=path.exists(),
        **cost._asdict(),
    )
    evaluation.log(
        f"{table.NOTICE}\n"
        f"correction:{made.codec} entries:{section['entries']} bytes:{size} "
        f"saved_bits:{cost.saved_bits:.0f} paid_bits:{cost.paid_bits:.0f}\n"
        f"oracle_bpb:{cost.oracle_bpb:.8f}\ncharged_bpb:{cost.charged_bpb:.8f}",
        "correction",
        **section,
    )
    return section


def budget_of(correction_bytes: int, rows: int) -> int | None:
    """Return the table's bytes for a value of CORRECTION_BYTES; None: only entries that pay."""
    return {-1: oracle.default_budget(rows), 0: None}.get(correction_bytes, correction_bytes)
