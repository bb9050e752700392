"""The rules about accounts: every target counted once, every byte, and all code and weights."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import numpy as np

from fairway.case_ops import unfold
from fairway.certificate.rules import EXACT
from fairway.certificate.trial import SHORTEST, CannotTell, RuleBroken, Trial
from fairway.scoring.commits import Commit
from fairway.scoring.shipped import ROOT, counted_code_bytes, imported_code
from train_gpt import ByteTable, UserError, audit_bytes, document_bounds

CANONICAL_BYTES = 151_080_891  # of the challenge's validation text, with any tokenizer
CANONICAL_TARGETS = {
    62_021_632: "SP1024",
    40_540_160: "SP8192",
    47_851_520: "CaseOps",
    47_853_343: "CaseOps, tail",
}
COUNT_PIECE = 1 << 22  # tokens whose bytes are counted at once, to bound memory
AUDITED_TOKENS = 1 << 20  # tokens from which documents are decoded
# Our own code that is imported to judge a score, once it is known: no part of what computed it.
JUDGES = (
    "fairway/certificate/",
    "fairway/compression/",  # the proof
    "fairway/correction/",  # the oracle, which is printed next to the score
    "fairway/scoring/ablation.py",  # other mixtures, which are made after the score
    "fairway/case_ops.py",  # it puts capitals back, to count the bytes of a text
    "fairway/verbs/",
    "fairway/cli.py",
    "fairway/command_line.py",
    "fairway/__main__.py",
)


# ==== COVERAGE ====================================================================================
def check_coverage(trial: Trial, table: ByteTable | None) -> tuple[str, dict]:
    """Check that each target has one finite log-probability and each row one commit, and that the
    totals of the challenge's split are right.

    Windows that overlap at the end of the text counted the tail twice (#174, #558); a cut split or
    a wrong number of bytes changes the score without any change of the model (#1923, #2138).
    """
    for tokens in (trial.tokens[:2], trial.tokens[:3], trial.tokens[: SHORTEST + 1], trial.x):
        scores = trial.score(tokens)
        wrong = ~np.isfinite(scores) | (scores > EXACT)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise RuleBroken(
                f"row {at} of {len(scores)} has the log-probability {scores[at]:.6g}", row=at
            )
    details: dict[str, Any] = {"targets": len(trial.tokens) - 1}
    with contextlib.suppress(CannotTell):
        details["rows_committed"] = committed_rows(trial.commits(), len(trial.x) - 1)
    if trial.claimed is not None:
        finite = np.isfinite(trial.claimed).all()
        if not finite or trial.claimed.max() > EXACT:
            raise RuleBroken("among the claimed scores is one that is not finite, or above 0")
    figure = f"{len(trial.x) - 1:,} rows, each once and finite"
    if table is not None:
        details["bytes"] = target_bytes(table, trial.tokens)
        figure += f"; the text: {details['targets']:,} targets, {details['bytes']:,} bytes"
        split = canonical_split(details["targets"], details["bytes"])
        figure += f", canonical for {split}" if split else ""
    return figure, details


def committed_rows(log: list[Commit], rows: int) -> int:
    """Check that each of `rows` rows is in exactly one commit, in the order of the text."""
    covered = np.zeros(rows, np.int64)
    for c in log:
        if c.first + c.count > rows:
            raise RuleBroken(f"a commit has {c.count} rows from row {c.first} on, among {rows}")
        covered[c.first : c.first + c.count] += 1
    if (covered != 1).any():
        at = int(np.flatnonzero(covered != 1)[0])
        raise RuleBroken(
            f"{(covered != 1).sum()} of {rows} rows are not counted once: row {at}, "
            f"{covered[at]} times",
            row=at,
        )
    firsts = [c.first for c in log]
    if firsts != sorted(firsts):
        raise RuleBroken("commits are not in the order of the text")
    return rows


def target_bytes(table: ByteTable, tokens: np.ndarray) -> int:
    """Return the bytes of the targets of `tokens`, counted piece by piece."""
    return sum(
        int(table.count(np.asarray(tokens[at : at + COUNT_PIECE + 1])).sum(dtype=np.int64))
        for at in range(0, len(tokens) - 1, COUNT_PIECE)
    )


def canonical_split(targets: int, size: int) -> str:
    """Return the name of the challenge's split with so many targets ("" if none), and check its
    bytes.

    A tail shorter than a window may be left out, so up to 1,024 more targets and 0.01 % of the
    bytes are allowed.
    """
    name = next((n for rows, n in CANONICAL_TARGETS.items() if 0 <= targets - rows < 1024), "")
    if name and abs(size / CANONICAL_BYTES - 1) > 1e-4:
        raise RuleBroken(
            f"{size:,} bytes for the challenge's {name} split, which has {CANONICAL_BYTES:,}"
        )
    return name


# ==== BYTES =======================================================================================
def check_bytes(trial: Trial, table: ByteTable | None, tokenizer: Any) -> tuple[str, dict]:
    """Check the byte table against the text that the tokens decode to, and the commits against the
    table.

    Bytes are the denominator of the score. Counting the blank of a piece twice was worth a sixth of
    it (#1719), miscounting it a fifth (#897).
    """
    if table is None:
        raise CannotTell("no byte table and no tokenizer were given")
    figures, details = [], {}
    with contextlib.suppress(CannotTell):
        trial.score(trial.x)
        log = trial.commits()
        check_committed_bytes(log, table.count(trial.x))
        details["commits"] = len(log)
        figures.append(f"{len(log)} commits agree")
    if tokenizer is not None:
        details |= audit_documents(trial, table, tokenizer)
        figures.append(
            f"{details['documents']} documents decode to their {details['bytes']:,} bytes"
        )
    if not figures:
        raise CannotTell("no tokenizer, and no commits, to hold the byte table against")
    return "; ".join(figures), details


def check_committed_bytes(log: list[Commit], sizes: np.ndarray) -> None:
    """Check the bytes of each commit against `sizes`, the bytes of each row."""
    sums = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    for k, c in enumerate(log):
        first, last = np.clip([c.first, c.first + c.count], 0, len(sums) - 1)
        if c.bytes != sums[last] - sums[first]:
            raise RuleBroken(
                f"commit {k} counts {c.bytes} bytes, the table {sums[last] - sums[first]}",
                commit=k,
            )


def audit_documents(trial: Trial, table: ByteTable, tokenizer: Any) -> dict[str, int]:
    """Decode documents and compare their UTF-8 length with the table; return how many and how
    long.
    """
    tokens = trial.tokens[:AUDITED_TOKENS]
    bounds = document_bounds(tokens)
    documents = list(zip(bounds[:-1], bounds[1:], strict=True))
    if len(documents) > 1:
        documents.pop()  # it may be cut off inside a character
    counts = {"bytes": 0, "documents": 0}
    for start, end in trial.while_time(documents, 0.05, 8):
        # The only document may be cut off inside a character as well: leave its last bytes out.
        while len(bounds) == 2 and end > start + 1 and tokenizer.is_byte(int(tokens[end - 1])):
            end -= 1
        try:
            size = audit_bytes(tokenizer, table, np.asarray(tokens[start:end]))
        except UserError as e:
            raise RuleBroken(str(e)) from None
        check_unfolded(tokenizer, table, tokens[start:end], size)
        counts["bytes"] += size
        counts["documents"] += 1
    return counts


def check_unfolded(tokenizer: Any, table: ByteTable, tokens: np.ndarray, size: int) -> None:
    """Check that the text behind case markers has the bytes that its folded tokens count."""
    if not table.markers:
        return
    text = unfold(tokenizer.decode(np.asarray(tokens).tolist()))
    if (length := len(text.encode())) != size:
        raise RuleBroken(
            f"a document has {length} bytes when its capitals are put back, by the table {size}"
        )


# ==== SIZES =======================================================================================
@functools.lru_cache(maxsize=16)  # packing takes half a second, and one process may judge many
def packed_bytes(code: tuple[tuple[str, int], ...]) -> int:
    """Return the bytes that files of this repository, (path, size) each, count in a record."""
    return counted_code_bytes(dict(code))


def check_sizes(sizes: dict | None, budget_bytes: int) -> tuple[str, dict]:
    """Check that artifact and counted code fit the budget, and that all imported code is counted.

    Files of this repository count packed, as records ship them; others at their plain size. Scripts
    measured in another form than the one that ships exceeded the limit (#1809, #1835).
    """
    if sizes is None:
        raise CannotTell("no sizes were given")
    artifact = int(sizes["artifact"])
    code = {str(path): int(size) for path, size in sizes["code"].items()}
    relative = {path: os.path.relpath(ROOT / path, ROOT).replace(os.sep, "/") for path in code}
    counted = {relative[path]: size for path, size in code.items()}
    ours = {path: size for path, size in counted.items() if not path.startswith("../")}
    packed = packed_bytes(tuple(sorted(ours.items()))) + sum(counted.values()) - sum(ours.values())
    total = artifact + packed
    details = {"artifact": artifact, "code": code, "total": total, "budget": budget_bytes}
    for path, size in imported_code().items():
        if counted.get(path, -1) < size and not path.startswith(JUDGES):
            raise RuleBroken(
                f"{path} is imported with {size:,} bytes, counted as {counted.get(path, 0):,}",
                **details,
            )
    if total > budget_bytes:
        raise RuleBroken(
            f"{total:,} bytes, {total - budget_bytes:,} over the budget of {budget_bytes:,}",
            **details,
        )
    return (
        f"{total:,} of {budget_bytes:,} bytes, {packed:,} of them code, packed, in {len(code)} "
        "files",
        details,
    )
