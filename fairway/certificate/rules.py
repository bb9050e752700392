"""The rules: each returns its figure and details, or raises Failed or CannotTell."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import numpy as np

from fairway.certificate.trial import SHORTEST, CannotTell, Failed, Trial, gap
from fairway.scoring.commits import verify_chain
from fairway.scoring.shipped import ROOT, counted_code_bytes, imported_code
from train_gpt import BOS_ID, ByteTable, ShardError, audit_bytes, document_bounds

EXACT = 1e-9  # of a sum of probabilities, and of a log-probability against its distribution
TOLERANCE_LIMIT = 1e-4
CHANCE = math.log(
    1e6
)  # nats won on random tokens: an honest scorer wins more once in a million runs
# Rooms that judge or accompany a score once it is known: no part of what computed it.
NOT_COUNTED = ("fairway/certificate/", "fairway/compression/", "fairway/correction/")
CANONICAL_BYTES = 151_080_891  # of the challenge's validation text, by whichever tokenizer
CANONICAL_TARGETS = {
    62_021_632: "SP1024",
    40_540_160: "SP8192",
    47_851_520: "CaseOps",
    47_853_343: "CaseOps, tail",
}


def causal(trial: Trial) -> tuple[str, dict]:
    """Scores before a cut do not hang on what comes after it: other tokens, none at all, or a new document."""
    if not 0 <= trial.tolerance <= TOLERANCE_LIMIT:
        raise Failed(
            f"the scorer asks for a tolerance of {trial.tolerance:g}; at most {TOLERANCE_LIMIT:g} is allowed"
        )
    x, rounds, least, met, apart = trial.x, [], 0, {}, 0.0
    kinds = {
        kind: trial.rng.permutation(rows[rows < len(x) - 3]) for kind, rows in trial.kinds.items()
    }
    sampled = [row for row in trial.rows(math.inf, 0, 800) if row < len(x) - 2]
    for nth in range(
        100
    ):  # a round: just before, at and after one boundary of each kind, and eight other rows
        near = [
            (kind, int(rows[nth]) + step)
            for kind, rows in kinds.items()
            if nth < len(rows)
            for step in (-1, 0, 1)
        ]
        rounds += near + [("other", row) for row in sampled[8 * nth : 8 * nth + 8]]
        least = least or len(rounds)
    for at, (kind, row) in enumerate(trial.while_time(rounds, 0.3, least)):
        kept, after = x[: row + 2], x[row + 2 :]
        texts = {"replaced": np.concatenate([kept, trial.others(after)]), "cut off": kept}
        if at % 3 == 0:
            texts["moved behind a BOS"] = np.concatenate(
                [kept, np.array([BOS_ID], x.dtype), after[:-1]]
            )
        for change, text in texts.items():
            got = trial.score(text)[: row + 1]
            apart = max(
                apart,
                trial.need_same(
                    got,
                    trial.base[: row + 1],
                    f"when the tokens after row {row} ({kind}) were {change}",
                ),
            )
        met[kind] = met.get(kind, 0) + 1
    for (
        kind,
        rows,
    ) in (
        trial.kinds.items()
    ):  # beyond the excerpt: one cut, of the longest text that there is time for
        if len(rows) and not met.get(kind):
            row, far = int(rows[0]) - 1, trial.tokens[: trial.reach]
            for after, change in ((trial.others(far[row + 2 :]), "replaced"), (far[:0], "cut off")):
                got = trial.score(np.concatenate([far[: row + 2], after]))[: row + 1]
                apart = max(
                    apart,
                    trial.need_same(
                        got,
                        trial.long_scores()[: row + 1],
                        f"when the tokens after row {row} ({kind}) were {change}",
                    ),
                )
            met[kind] = 1
    told = ", ".join(f"{count} {kind}" for kind, count in met.items())
    return f"{sum(met.values())} cuts ({told}) moved no score by more than {apart:.2g}", {
        "cuts": met,
        "apart": apart,
    }


def normalised(trial: Trial) -> tuple[str, dict]:
    """The distribution sums to 1, and its entry for the target is the score that was counted."""
    count, worst, tolerance = 0, 0.0, max(EXACT, trial.tolerance)
    for row in trial.rows(0.12, 12, 400):
        held = trial.distribution(trial.x, row + 1)
        if not np.isfinite(held).all() or held.min() < 0:
            raise Failed(
                f"at row {row} the distribution holds {held.min():.3g}: no probability", row=row
            )
        total = math.fsum(held)
        if abs(total - 1) > EXACT:
            raise Failed(
                f"at row {row} the distribution sums to {total:.10g}", row=row, total=total
            )
        entry = float(held[trial.x[row + 1]])
        counted = math.log(entry) if entry else -math.inf
        if gap(np.array([counted]), trial.base[row : row + 1])[0] > tolerance:
            raise Failed(
                f"at row {row} the score counted {trial.base[row]:.6f}, the distribution holds {counted:.6f}",
                row=row,
            )
        count, worst = count + 1, max(worst, abs(total - 1))
    return f"{count} positions: sums within {worst:.1e} of 1, each entry is its score", {
        "positions": count,
        "apart": worst,
    }


def swapped_targets(
    trial: Trial, held: np.ndarray, actual: int, table: ByteTable | None
) -> list[int]:
    """The likeliest other token, the unlikeliest, one at random, and a word start where the target is none."""
    order = np.argsort(-held)
    picked = [*order[:2][order[:2] != actual][:1], order[-1], trial.rng.integers(trial.vocab_size)]
    if table is not None:
        picked += list(
            trial.rng.permutation(np.flatnonzero(table.space != table.space[actual]))[:1]
        )
    return [y for y in dict.fromkeys(map(int, picked)) if y != actual]


def target_blind(trial: Trial, table: ByteTable | None) -> tuple[str, dict]:
    """With the target swapped for y, the score is what the distribution held for y; that never looks ahead itself."""
    positions = swaps = 0
    tolerance = max(EXACT, trial.tolerance)
    for row in trial.rows(0.22, 6, 200):
        i, x = row + 1, trial.x
        held = trial.distribution(x, i)
        for text in (
            np.concatenate([x[:i], trial.others(x[i:])]),
            np.append(x[:i], trial.others(x[i : i + 1])),
        ):
            if (apart := gap(trial.distribution(text, i), held)[0]) > max(1e-12, trial.tolerance):
                raise Failed(
                    f"distribution() of row {row} moved by {apart:.2g} with the tokens from its target on",
                    row=row,
                    apart=min(apart, 1e300),
                )
        for y in swapped_targets(trial, held, int(x[i]), table):
            text = x.copy()
            text[i] = y
            got, expected = trial.score(text)[row], math.log(held[y]) if held[y] > 0 else -math.inf
            if gap(np.array([got]), np.array([expected]))[0] > tolerance:
                raise Failed(
                    f"at row {row}, target swapped for {y}: scored {got:.6f}, held {expected:.6f}",
                    row=row,
                )
            swaps += 1
        positions += 1
    return f"{swaps} swaps at {positions} positions scored what was held", {
        "swaps": swaps,
        "positions": positions,
    }


def score_first(trial: Trial) -> tuple[str, dict]:
    """The log is whole, its nats are the scores, and a chunk's state was fixed before the chunk was seen."""
    x, scores = trial.x, trial.score(trial.x)
    log = trial.commits()
    if (broken := verify_chain(log)) is not None:
        raise Failed(f"the chain breaks at commit {broken} of {len(log)}", commit=broken)
    for k, c in enumerate(log):
        nats = -math.fsum(scores[c.first : c.first + c.count])
        if not abs(nats - c.nats) <= (EXACT + trial.tolerance) * max(c.count, 1):
            raise Failed(
                f"commit {k} counts {c.nats:.6f} nats, its rows were scored {nats:.6f}", commit=k
            )
    again = (trial.score(x), trial.commits())[1]
    if [c.state for c in again] != [c.state for c in log]:
        if trial.tolerance:
            raise CannotTell("the same text leaves other states: rounding differs from run to run")
        raise Failed("the same text leaves other states when scored again")
    adaptive, tested = len({c.state for c in log}) > 1, 0
    order = dict.fromkeys([*range(min(2, len(log))), *trial.rng.permutation(len(log)).tolist()])
    for k in trial.while_time(list(order), 0.08, 4):
        start = log[k].first + 1
        trial.score(np.concatenate([x[:start], trial.others(x[start:])]))
        other = trial.commits()
        if (
            [c[:2] for c in other[:k]] != [c[:2] for c in log[:k]]
            or len(other) <= k
            or other[k].first != log[k].first
        ):
            raise Failed(
                f"commits before {k} lie elsewhere when chunk {k} and what follows are replaced",
                commit=k,
            )
        if [c.state for c in other[: k + 1]] != [c.state for c in log[: k + 1]]:
            raise Failed(
                f"the state before commit {k} already knows chunk {k} or what follows", commit=k
            )
        if (
            adaptive
            and k + 1 < min(len(log), len(other))
            and other[k + 1].state == log[k + 1].state
        ):
            raise Failed(
                f"the state after commit {k} is the same for another chunk {k}: it is no digest of what was "
                "learned",
                commit=k,
            )
        tested += 1
    kind = "adaptive, each state older than its chunk" if adaptive else "no adaptive state"
    return f"{len(log)} commits chained; {kind} ({tested} replaced)", {
        "commits": len(log),
        "tested": tested,
        "adaptive": adaptive,
        "last": log[-1].chain if log else "",
    }


def one_pass(trial: Trial) -> tuple[str, dict]:
    """No call remembers another: the same text scores the same, again and after another text."""
    apart, x, row = 0.0, trial.x, len(trial.base) // 2
    held = trial.distribution(x, row + 1)
    for nth, between in enumerate((x[:0], x[:0], trial.random_tokens(len(x)), trial.others(x))):
        if len(between):
            trial.score(between)
        apart = max(
            apart,
            trial.need_same(
                trial.score(x), trial.base, f"when the same text was scored again ({nth})"
            ),
        )
    if (moved := gap(trial.distribution(x, row + 1), held)[0]) > max(1e-12, trial.tolerance):
        raise Failed(f"distribution() of row {row} moved by {moved:.2g} between two calls", row=row)
    return f"4 further calls moved no score by more than {apart:.2g}", {"calls": 4, "apart": apart}


def claim(trial: Trial) -> tuple[str, dict]:
    """What was counted on a long text is what short prefixes of it score, and what the distributions held."""
    given = trial.claimed is not None
    if given and len(trial.claimed) != len(trial.tokens) - 1:
        raise Failed(
            f"{len(trial.claimed):,} scores were claimed for {len(trial.tokens) - 1:,} targets"
        )
    long, size = trial.long_scores(), len(trial.x)
    whole = len(trial.tokens) if given else trial.reach
    apart = trial.need_same(trial.base, long[: size - 1], f"between {whole:,} tokens and {size:,}")
    lengths = [SHORTEST, size // 2 + 1, *([trial.reach] if given else [])]
    for length in lengths:
        got = trial.score(trial.tokens[:length])
        apart = max(
            apart,
            trial.need_same(got, long[: length - 1], f"between {whole:,} tokens and {length:,}"),
        )
    count, order = 0, trial.rng.permutation(trial.reach - 1)[:64].tolist()
    for row in trial.while_time(order, 0.06, 3):
        held = trial.distribution(trial.tokens[: trial.reach], row + 1)[trial.tokens[row + 1]]
        if not abs((math.log(held) if held > 0 else -math.inf) - long[row]) <= max(
            EXACT, trial.tolerance
        ):
            raise Failed(
                f"at row {row} {long[row]:.6f} was claimed; the distribution holds {held:.6g}",
                row=row,
            )
        count += 1
    lengths = sorted({size, *lengths})
    return (
        f"prefixes of {lengths[0]:,} to {lengths[-1]:,} of {whole:,} tokens, and {count} distributions, agree",
        {"lengths": lengths, "positions": count, "apart": apart},
    )


def paid_prefix(trial: Trial) -> tuple[str, dict]:
    """The text moved by a few tokens scores no worse: whoever stored the answers by position loses them."""
    drop, far = int(trial.rng.integers(1, 4)), trial.tokens[: trial.reach]
    moved = trial.score(np.concatenate([far[:1], far[1 + drop :]]))
    lost = trial.long_scores()[SHORTEST // 2 + drop :] - moved[SHORTEST // 2 :]
    if not np.isfinite(lost).all():
        raise CannotTell("some scores are not finite")
    mean, error = float(lost.mean()), float(lost.std() / math.sqrt(len(lost)))
    details = {"dropped": drop, "tokens": len(lost), "nats_lost": mean, "standard_error": error}
    if mean > max(5 * error, 0.01):
        raise Failed(
            f"{drop} tokens dropped at the front cost {mean:.4f} nats on each of {len(lost):,} others",
            **details,
        )
    return (
        f"{drop} tokens dropped at the front: {mean:+.5f} nats a token on the {len(lost):,} others",
        details,
    )


def coverage(trial: Trial, table: ByteTable | None) -> tuple[str, dict]:
    """Each target has one finite log-probability, each row one commit; totals are the split's."""
    for tokens in (trial.tokens[:2], trial.tokens[:3], trial.tokens[: SHORTEST + 1], trial.x):
        scores = trial.score(tokens)
        if not np.isfinite(scores).all() or scores.max() > EXACT:
            at = int(np.flatnonzero(~np.isfinite(scores) | (scores > EXACT))[0])
            raise Failed(
                f"row {at} of {len(scores)} has the log-probability {scores[at]:.6g}", row=at
            )
    details: dict[str, Any] = {"targets": len(trial.tokens) - 1}
    with contextlib.suppress(CannotTell):
        covered = np.zeros(len(trial.x) - 1, np.int64)
        for c in trial.commits():
            if c.first + c.count > len(covered):
                raise Failed(f"a commit of {c.count} rows from {c.first} on, among {len(covered)}")
            covered[c.first : c.first + c.count] += 1
        if (covered != 1).any():
            at = int(np.flatnonzero(covered != 1)[0])
            raise Failed(
                f"{(covered != 1).sum()} of {len(covered)} rows are not counted once: row {at}, "
                f"{covered[at]} times",
                row=at,
            )
        firsts = [c.first for c in trial.commits()]
        if firsts != sorted(firsts):
            raise Failed("commits are not in the order of the text")
        details["rows_committed"] = len(covered)
    if trial.claimed is not None and not (
        np.isfinite(trial.claimed).all() and trial.claimed.max() <= EXACT
    ):
        raise Failed("among the claimed scores is one that is not finite, or above 0")
    told = f"{len(trial.x) - 1:,} rows, each once and finite"
    if table is not None:
        step = 1 << 22
        details["bytes"] = sum(
            int(table.count(np.asarray(trial.tokens[at : at + step + 1])).sum(dtype=np.int64))
            for at in range(0, len(trial.tokens) - 1, step)
        )
        told += f"; the text: {details['targets']:,} targets, {details['bytes']:,} bytes"
        name = next(
            (n for rows, n in CANONICAL_TARGETS.items() if 0 <= details["targets"] - rows < 1024),
            "",
        )
        if (
            name and abs(details["bytes"] / CANONICAL_BYTES - 1) > 1e-4
        ):  # a tail shorter than a window may be left out
            raise Failed(
                f"{details['bytes']:,} bytes for the challenge's {name} split, which has {CANONICAL_BYTES:,}"
            )
        told += f", canonical for {name}" if name else ""
    return told, details


def byte_counts(trial: Trial, table: ByteTable | None, tokenizer: Any) -> tuple[str, dict]:
    """The byte table against the text that its tokens decode to, by documents; the commits against the table."""
    if table is None:
        raise CannotTell("no byte table and no tokenizer were given")
    told, details = [], {}
    with contextlib.suppress(CannotTell):
        trial.score(trial.x)
        counts = np.concatenate([[0], np.cumsum(table.count(trial.x), dtype=np.int64)])
        log = trial.commits()
        for k, c in enumerate(log):
            first, last = np.clip([c.first, c.first + c.count], 0, len(counts) - 1)
            if c.bytes != counts[last] - counts[first]:
                raise Failed(
                    f"commit {k} counts {c.bytes} bytes, the table {counts[last] - counts[first]}",
                    commit=k,
                )
        details["commits"] = len(log)
        told.append(f"{len(log)} commits agree")
    if tokenizer is not None:
        tokens = trial.tokens[: 1 << 20]
        bounds = document_bounds(tokens)
        documents = list(zip(bounds[:-1], bounds[1:], strict=True))[
            : None if len(bounds) == 2 else -1
        ]
        audited = 0
        for start, end in trial.while_time(
            documents, 0.05, 8
        ):  # the last may be cut inside a character
            while len(bounds) == 2 and end > start + 1 and tokenizer.is_byte(int(tokens[end - 1])):
                end -= 1
            try:
                there = audit_bytes(tokenizer, table, np.asarray(tokens[start:end]))
                details["bytes"] = details.get("bytes", 0) + there
            except ShardError as e:
                raise Failed(str(e)) from None
            audited += 1
        details["documents"] = audited
        told.append(f"{audited} documents decode to their {details['bytes']:,} bytes")
    if not told:
        raise CannotTell("no tokenizer, and no commits, to hold the byte table against")
    return "; ".join(told), details


def canary(trial: Trial) -> tuple[str, dict]:
    """On uniform random tokens nobody averages under ln V nats, unless by luck: 4 standard errors of it, or a
    likelihood ratio of a million to one (whose mean is 1 for any honest scorer, however its scores spread)."""
    share = int(np.clip(trial.seconds / 12 / max(trial.per_token, 1e-9), 4 * SHORTEST, 1 << 20))
    runs, floor, details = (
        [*trial.random_runs, trial.score(trial.random_tokens(share))],
        math.log(trial.vocab_size),
        [],
    )
    for scores in runs:
        if not np.isfinite(scores).all():
            raise CannotTell("some scores are not finite")
        won, error = (
            float(scores.sum() + len(scores) * floor),
            float(scores.std() / math.sqrt(len(scores))),
        )
        details.append(
            {
                "tokens": len(scores) + 1,
                "nats_over_ln_v": -won / len(scores),
                "standard_error": error,
            }
        )
        if won / len(scores) > 4 * error + EXACT or won > CHANCE:
            raise Failed(
                f"{floor - won / len(scores):.4f} nats on {len(scores) + 1:,} random tokens: no honest scorer "
                f"is under ln {trial.vocab_size} = {floor:.4f}",
                runs=details,
            )
    last = details[-1]
    return (
        f"{floor + last['nats_over_ln_v']:.4f} nats on {last['tokens']:,} random tokens, ln V is {floor:.4f} "
        f"({len(runs)} lengths)"
    ), {"runs": details}


def smear(trial: Trial) -> tuple[str, dict]:
    """What the first layer reads at a BOS does not hang on the document before it."""
    if not hasattr(trial.scorer, "embeddings"):
        raise CannotTell("the scorer does not show its embeddings")
    x, made = trial.x.copy(), len(trial.x) // 2
    x[made] = BOS_ID  # whether or not the text has one
    places = [
        made,
        *trial.rng.permutation(np.setdiff1d(np.flatnonzero(x == BOS_ID), [0, made]))[:7].tolist(),
    ]
    first = trial.embeddings(x)
    for at in places:
        moved = trial.embeddings(np.concatenate([trial.others(x[:at]), x[at:]]))
        if (apart := gap(moved[at], first[at])[0]) > trial.tolerance:
            raise Failed(
                f"at the BOS of position {at} it moved by {apart:.2g} with the document before",
                position=at,
            )
    return f"{len(places)} BOS read the same after any document", {"places": len(places)}


def code_and_artifact(sizes: dict | None, budget_bytes: int) -> tuple[str, dict]:
    """Artifact and counted code fit the budget; all code that was really imported is counted, at its real size."""
    if sizes is None:
        raise CannotTell("no sizes were given")
    code = {str(path): int(size) for path, size in sizes["code"].items()}
    counted = {
        os.path.relpath(ROOT / path, ROOT).replace(os.sep, "/"): size for path, size in code.items()
    }
    packed = counted_code_bytes(code)
    total = int(sizes["artifact"]) + packed
    details = {
        "artifact": int(sizes["artifact"]),
        "code": code,
        "total": total,
        "budget": budget_bytes,
    }
    for path, size in imported_code().items():
        if counted.get(path, -1) < size and not path.startswith(NOT_COUNTED):
            raise Failed(
                f"{path} is imported with {size:,} bytes, counted as {counted.get(path, 0):,}",
                **details,
            )
    if total > budget_bytes:
        raise Failed(
            f"{total:,} bytes, {total - budget_bytes:,} over the budget of {budget_bytes:,}",
            **details,
        )
    return (
        f"{total:,} of {budget_bytes:,} bytes, {packed:,} of them code, packed, in {len(code)} files",
        details,
    )
