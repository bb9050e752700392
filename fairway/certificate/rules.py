"""The rules about what a scorer may see and must hold. Each returns its figure and details, or
raises RuleBroken or CannotTell.

`#N` is a pull request or issue of openai/parameter-golf that broke the rule, or passed it. The four
conditions behind most rules (C1 causal, C2 normalised, C3 score before update, C4 one pass) are
from #1017.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from fairway.certificate.trial import (
    SHORTEST,
    CannotTell,
    RuleBroken,
    Trial,
    largest_difference,
)
from fairway.scoring.commits import Commit, verify_chain
from train_gpt import BOS_ID, ByteTable

# Allowed error of a sum of probabilities, and of a score against its distribution: a float64 sum
# over 65,536 tokens rounds by less.
EXACT = 1e-9
# The largest tolerance that a scorer may ask for. Batching moves fp32 log-probabilities by 1e-6 to
# 1e-5; a scorer that could ask for more would have its leaks forgiven (the zoo's
# GenerousTolerance).
TOLERANCE_LIMIT = 1e-4
# Nats won on random tokens: an honest scorer wins more than this once in a million runs.
CHANCE = math.log(1e6)


# ==== CAUSAL ======================================================================================
def check_causal(trial: Trial) -> tuple[str, dict]:
    """Check that no score up to a row depends on what follows the row (C1).

    The rest of the text is replaced by other tokens, cut off, or moved behind a new BOS. Two passes
    (#846), training on a chunk before scoring it (#402, #677) and SLOT (#1240, #1336) move a score.
    """
    if not 0 <= trial.tolerance <= TOLERANCE_LIMIT:
        raise RuleBroken(
            f"the scorer asks for a tolerance of {trial.tolerance:g}; at most "
            f"{TOLERANCE_LIMIT:g} is allowed"
        )
    rows, least = rows_to_cut(trial)
    cuts, apart = {}, 0.0
    for at, (kind, row) in enumerate(trial.while_time(rows, 0.3, least)):
        # A third of the rows get the third change too, which finds less than the other two.
        for change, text in changed_after(trial, trial.x, row, with_bos=at % 3 == 0):
            scores = trial.score(text)[: row + 1]
            apart = max(apart, check_cut(trial, scores, trial.base, row, kind, change))
        cuts[kind] = cuts.get(kind, 0) + 1
    for kind, boundary_rows in trial.kinds.items():
        if len(boundary_rows) and not cuts.get(kind):
            # The kind begins beyond the excerpt: one cut, of the longest text there is time for.
            apart = max(apart, cut_long_text(trial, int(boundary_rows[0]) - 1, kind))
            cuts[kind] = 1
    counts = ", ".join(f"{count} {kind}" for kind, count in cuts.items())
    return f"{sum(cuts.values())} cuts ({counts}) moved no score by more than {apart:.2g}", {
        "cuts": cuts,
        "apart": apart,
    }


def rows_to_cut(trial: Trial) -> tuple[list[tuple[str, int]], int]:
    """Return (kind, row) in rounds, and the length of the first round, which is always tested.

    A round has the rows just before, at and after one boundary of each kind, and eight other rows:
    leaks such as SLOT's show only inside a chunk, batch leaks only across a boundary.
    """
    last = len(trial.x) - 3
    kinds = {kind: trial.rng.permutation(rows[rows < last]) for kind, rows in trial.kinds.items()}
    others = [row for row in trial.rows(math.inf, 0, 800) if row <= last]
    rows, least = [], 0
    for nth in range(100):
        rows += [
            (kind, int(boundary_rows[nth]) + step)
            for kind, boundary_rows in kinds.items()
            if nth < len(boundary_rows)
            for step in (-1, 0, 1)
        ]
        rows += [("other", row) for row in others[8 * nth : 8 * nth + 8]]
        least = least or len(rows)
    return rows, least


def changed_after(
    trial: Trial, tokens: np.ndarray, row: int, with_bos: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield texts that equal `tokens` up to the row's target, with the name of the change."""
    same, after = tokens[: row + 2], tokens[row + 2 :]
    yield "replaced", np.concatenate([same, trial.replaced(after)])
    yield "cut off", same  # finds scorers that know where the text ends
    if with_bos:  # finds scorers that know where the document ends
        yield (
            "moved behind a BOS",
            np.concatenate([same, [BOS_ID], after[:-1]]).astype(tokens.dtype),
        )


def check_cut(
    trial: Trial, scores: np.ndarray, expected: np.ndarray, row: int, kind: str, change: str
) -> float:
    """Compare the scores up to `row`; return the largest difference."""
    why = f"when the tokens after row {row} ({kind}) were {change}"
    return trial.check_same(scores, expected[: row + 1], why)


def cut_long_text(trial: Trial, row: int, kind: str) -> float:
    """Cut the longest prefix after one row; return the largest difference."""
    long, apart = trial.tokens[: trial.reach], 0.0
    for change, text in changed_after(trial, long, row, with_bos=False):
        scores = trial.score(text)[: row + 1]
        apart = max(apart, check_cut(trial, scores, trial.long_scores(), row, kind, change))
    return apart


# ==== DISTRIBUTIONS ===============================================================================
def check_normalised(trial: Trial) -> tuple[str, dict]:
    """Check that distributions sum to 1 and that their entry for the target is its score (C2).

    This stopped the hashed n-gram caches (#779 and over thirty others): a cache keyed by the target
    lifts the right token and divides by nothing. In #886 a position sums to about 277.
    """
    count, worst, tolerance = 0, 0.0, max(EXACT, trial.tolerance)
    for row in trial.rows(0.12, 12, 400):
        held = trial.distribution(trial.x, row + 1)
        if not np.isfinite(held).all() or held.min() < 0:
            raise RuleBroken(
                f"at row {row} the distribution holds {held.min():.3g}: no probability", row=row
            )
        total = math.fsum(held)  # exact, so that the rule does not judge its own rounding
        if abs(total - 1) > EXACT:
            raise RuleBroken(
                f"at row {row} the distribution sums to {total:.10g}", row=row, total=total
            )
        entry = float(held[trial.x[row + 1]])
        counted = math.log(entry) if entry else -math.inf
        if differs(counted, trial.base[row], tolerance):
            raise RuleBroken(
                f"at row {row} the score counted {trial.base[row]:.6f}, the distribution holds "
                f"{counted:.6f}",
                row=row,
            )
        count, worst = count + 1, max(worst, abs(total - 1))
    return f"{count} positions: sums within {worst:.1e} of 1, each entry is its score", {
        "positions": count,
        "apart": worst,
    }


def differs(a: float, b: float, tolerance: float) -> bool:
    """Return True if two log-probabilities differ by more than the tolerance."""
    return largest_difference(np.array([a]), np.array([b]))[0] > tolerance


def check_target_blind(trial: Trial, table: ByteTable | None) -> tuple[str, dict]:
    """Check that the score of a swapped target is what the distribution held for it (C1, C2).

    A distribution that has looked at its target is normalised and still wrong. Experts that read
    the target's own word-start flag fail here (#1420, #1967, #2018, #2140); a tilt towards a hint
    chosen from the prefix passes (#1514, #2135).
    """
    positions = swaps = 0
    tolerance = max(EXACT, trial.tolerance)
    for row in trial.rows(0.22, 6, 200):
        i, x = row + 1, trial.x
        held = trial.distribution(x, i)
        check_looks_back_only(trial, row, held)
        for y in swapped_targets(trial, held, int(x[i]), table):
            text = x.copy()
            text[i] = y
            score = trial.score(text)[row]
            expected = math.log(held[y]) if held[y] > 0 else -math.inf
            if differs(score, expected, tolerance):
                raise RuleBroken(
                    f"at row {row}, target swapped for {y}: scored {score:.6f}, held "
                    f"{expected:.6f}",
                    row=row,
                )
            swaps += 1
        positions += 1
    return f"{swaps} swaps at {positions} positions scored what was held", {
        "swaps": swaps,
        "positions": positions,
    }


def check_looks_back_only(trial: Trial, row: int, held: np.ndarray) -> None:
    """Check that a row's distribution stays the same when its target and the rest are replaced."""
    i, x = row + 1, trial.x
    all_replaced = np.concatenate([x[:i], trial.replaced(x[i:])])
    target_replaced_and_last = np.append(x[:i], trial.replaced(x[i : i + 1]))
    for text in (all_replaced, target_replaced_and_last):
        apart, _ = largest_difference(trial.distribution(text, i), held)
        if apart > max(1e-12, trial.tolerance):  # 1e-12: a probability, not a logarithm
            raise RuleBroken(
                f"distribution() of row {row} moved by {apart:.2g} with the tokens from its target "
                "on",
                row=row,
                apart=min(apart, 1e300),
            )


def swapped_targets(
    trial: Trial, held: np.ndarray, actual: int, table: ByteTable | None
) -> list[int]:
    """Return tokens to put in the target's place: the likeliest other token, the least likely, a
    random one, and one that begins a word if the target does not (or the reverse).
    """
    order = np.argsort(-held)
    picked = [*order[:2][order[:2] != actual][:1], order[-1], trial.rng.integers(trial.vocab_size)]
    if table is not None:
        other_kind = np.flatnonzero(table.space != table.space[actual])
        picked += list(trial.rng.permutation(other_kind)[:1])
    return [y for y in dict.fromkeys(map(int, picked)) if y != actual]


# ==== SCORE FIRST, ONE PASS =======================================================================
def check_score_first(trial: Trial) -> tuple[str, dict]:
    """Check that the log is chained, that its nats are those of the scores, and that a chunk's
    state was fixed before the chunk was seen (C3).

    Scoring a chunk and then learning from it is what makes test-time training legal (#77, #461,
    #549, #1413); learning first was ruled out (#402, #568, #677).
    """
    x = trial.text_of_two_chunks()
    scores = trial.score(x)
    log = trial.commits()
    check_log(trial, log, scores)
    trial.score(x)
    if [c.state for c in trial.commits()] != [c.state for c in log]:
        if trial.tolerance:
            raise CannotTell("the same text leaves other states: rounding differs from run to run")
        raise RuleBroken("the same text leaves other states when scored again")
    adaptive, tested = len({c.state for c in log}) > 1, 0
    order = dict.fromkeys([*range(min(2, len(log))), *trial.rng.permutation(len(log)).tolist()])
    for k in trial.while_time(list(order), 0.08, 4):
        start = log[k].first + 1
        trial.score(np.concatenate([x[:start], trial.replaced(x[start:])]))
        compare_logs(log, trial.commits(), k, adaptive)
        tested += 1
    kind = "adaptive, each state older than its chunk" if adaptive else "no adaptive state"
    return f"{len(log)} commits chained; {kind} ({tested} replaced)", {
        "commits": len(log),
        "tested": tested,
        "adaptive": adaptive,
        "last": log[-1].chain if log else "",
    }


def check_log(trial: Trial, log: list[Commit], scores: np.ndarray) -> None:
    """Check the chain, so that no commit was changed afterwards, and the nats of each commit."""
    if (broken := verify_chain(log)) is not None:
        raise RuleBroken(f"the chain breaks at commit {broken} of {len(log)}", commit=broken)
    for k, c in enumerate(log):
        nats = -math.fsum(scores[c.first : c.first + c.count])
        if not abs(nats - c.nats) <= (EXACT + trial.tolerance) * max(c.count, 1):
            raise RuleBroken(
                f"commit {k} counts {c.nats:.6f} nats, its rows were scored {nats:.6f}", commit=k
            )


def compare_logs(log: list[Commit], other: list[Commit], k: int, adaptive: bool) -> None:
    """Compare the log with one of a text that differs from chunk k on.

    The states up to chunk k must be the same. The next one must differ, or it would be no digest of
    what was learned: a counter in its place would pass every other test (the zoo's
    StateIsACounter).
    """
    before = [c[:2] for c in other[:k]] == [c[:2] for c in log[:k]]
    if not before or len(other) <= k or other[k].first != log[k].first:
        raise RuleBroken(
            f"commits before {k} lie elsewhere when chunk {k} and what follows are replaced",
            commit=k,
        )
    if [c.state for c in other[: k + 1]] != [c.state for c in log[: k + 1]]:
        raise RuleBroken(
            f"the state before commit {k} already knows chunk {k} or what follows", commit=k
        )
    has_next = k + 1 < min(len(log), len(other))
    if adaptive and has_next and other[k + 1].state == log[k + 1].state:
        raise RuleBroken(
            f"the state after commit {k} is the same for another chunk {k}: it is no digest of "
            "what was learned",
            commit=k,
        )


def check_one_pass(trial: Trial) -> tuple[str, dict]:
    """Check that the same text scores the same again, at once and after other texts (C4).

    A scorer that remembers an earlier call has read the text before it scores it: two passes in two
    calls (#846).
    """
    apart, x, row = 0.0, trial.x, len(trial.base) // 2
    held = trial.distribution(x, row + 1)
    for nth, between in enumerate((x[:0], x[:0], trial.random_tokens(len(x)), trial.replaced(x))):
        if len(between):
            trial.score(between)
        why = f"when the same text was scored again ({nth})"
        apart = max(apart, trial.check_same(trial.score(x), trial.base, why))
    moved, _ = largest_difference(trial.distribution(x, row + 1), held)
    if moved > max(1e-12, trial.tolerance):
        raise RuleBroken(
            f"distribution() of row {row} moved by {moved:.2g} between two calls", row=row
        )
    return f"4 further calls moved no score by more than {apart:.2g}", {"calls": 4, "apart": apart}


# ==== CLAIM AND PAID PREFIX =======================================================================
def check_claim(trial: Trial) -> tuple[str, dict]:
    """Check that short prefixes score what was counted on a long text, and that distributions held
    it.

    A scorer could recognise the certificate by the length of its texts and be honest there only.
    The claim was made before, on the full text.
    """
    claimed = trial.claimed is not None
    if claimed and len(trial.claimed) != len(trial.tokens) - 1:
        raise RuleBroken(
            f"{len(trial.claimed):,} scores were claimed for {len(trial.tokens) - 1:,} targets"
        )
    long, size = trial.long_scores(), len(trial.x)
    full = len(trial.tokens) if claimed else trial.reach
    apart = trial.check_same(trial.base, long[: size - 1], f"between {full:,} tokens and {size:,}")
    lengths = [SHORTEST, size // 2 + 1, *([trial.reach] if claimed else [])]
    for length in lengths:
        scores = trial.score(trial.tokens[:length])
        why = f"between {full:,} tokens and {length:,}"
        apart = max(apart, trial.check_same(scores, long[: length - 1], why))
    count = claimed_distributions(trial, long)
    lengths = sorted({size, *lengths})
    return (
        f"prefixes of {lengths[0]:,} to {lengths[-1]:,} of {full:,} tokens, and {count} "
        "distributions, agree",
        {"lengths": lengths, "positions": count, "apart": apart},
    )


def claimed_distributions(trial: Trial, long: np.ndarray) -> int:
    """Compare the scores of a long text with distributions at random rows; return the number."""
    count, order = 0, trial.rng.permutation(trial.reach - 1)[:64].tolist()
    for row in trial.while_time(order, 0.06, 3):
        held = trial.distribution(trial.tokens[: trial.reach], row + 1)[trial.tokens[row + 1]]
        logp = math.log(held) if held > 0 else -math.inf
        if not abs(logp - long[row]) <= max(EXACT, trial.tolerance):
            raise RuleBroken(
                f"at row {row} {long[row]:.6f} was claimed; the distribution holds {held:.6g}",
                row=row,
            )
        count += 1
    return count


def check_paid_prefix(trial: Trial) -> tuple[str, dict]:
    """Check that the text scores no worse when its first one to three tokens are dropped.

    Validation tokens stored in the artifact are ruled out (#168, #262, #275). Answers stored by
    position no longer fit a text that has moved. Losses of up to 0.01 nats a token are allowed: the
    windows of an honest scorer move too.
    """
    drop, far = int(trial.rng.integers(1, 4)), trial.tokens[: trial.reach]
    moved = trial.score(np.concatenate([far[:1], far[1 + drop :]]))
    # The first rows are left out: they have lost part of their context.
    lost = trial.long_scores()[SHORTEST // 2 + drop :] - moved[SHORTEST // 2 :]
    if not np.isfinite(lost).all():
        raise CannotTell("some scores are not finite")
    mean, error = float(lost.mean()), float(lost.std() / math.sqrt(len(lost)))
    details = {"dropped": drop, "tokens": len(lost), "nats_lost": mean, "standard_error": error}
    if mean > max(5 * error, 0.01):
        raise RuleBroken(
            f"{drop} tokens dropped at the front cost {mean:.4f} nats on each of {len(lost):,} "
            "others",
            **details,
        )
    return (
        f"{drop} tokens dropped at the front: {mean:+.5f} nats a token on the {len(lost):,} others",
        details,
    )


# ==== CANARY AND SMEAR ============================================================================
def check_canary(trial: Trial) -> tuple[str, dict]:
    """Check that the mean score on uniform random tokens is no better than -ln V nats.

    This needs no knowledge of the method: hashed caches, SLOT, two passes and paid prefixes all
    beat chance. It fails by more than 4 standard errors, or by a likelihood ratio of a million.
    That ratio has mean 1 for every honest scorer, however its scores spread (Markov's inequality).
    """
    seconds = trial.seconds / 12
    length = int(np.clip(seconds / max(trial.per_token, 1e-9), 4 * SHORTEST, 1 << 20))
    runs = [*trial.random_runs, trial.score(trial.random_tokens(length))]
    chance, details = math.log(trial.vocab_size), []
    for scores in runs:
        if not np.isfinite(scores).all():
            raise CannotTell("some scores are not finite")
        n = len(scores)
        won, error = float(scores.sum() + n * chance), float(scores.std() / math.sqrt(n))
        details.append({"tokens": n + 1, "nats_over_ln_v": -won / n, "standard_error": error})
        if won / n > 4 * error + EXACT or won > CHANCE:
            raise RuleBroken(
                f"{chance - won / n:.4f} nats on {n + 1:,} random tokens: no honest scorer is "
                f"under ln {trial.vocab_size} = {chance:.4f}",
                runs=details,
            )
    last = details[-1]
    return (
        f"{chance + last['nats_over_ln_v']:.4f} nats on {last['tokens']:,} random tokens, ln V is "
        f"{chance:.4f} ({len(runs)} lengths)"
    ), {"runs": details}


def check_smear(trial: Trial) -> tuple[str, dict]:
    """Check that the embedding at a BOS does not depend on the document before it.

    A smear gate that adds the embedding before was worth 0.00255 BPB across documents; the rows had
    to be fixed (#1797, #1851; #1988 disputes that it is a leak). Attention across packed documents
    is allowed, so only the smeared embeddings are compared.
    """
    if not hasattr(trial.scorer, "embeddings"):
        raise CannotTell("the scorer does not show its embeddings")
    x, inserted = trial.x.copy(), len(trial.x) // 2
    x[inserted] = BOS_ID  # so that there is one in any text
    own = np.setdiff1d(np.flatnonzero(x == BOS_ID), [0, inserted])
    positions = [inserted, *trial.rng.permutation(own)[:7].tolist()]
    first = trial.embeddings(x)
    for at in positions:
        moved = trial.embeddings(np.concatenate([trial.replaced(x[:at]), x[at:]]))
        apart, _ = largest_difference(moved[at], first[at])
        if apart > trial.tolerance:
            raise RuleBroken(
                f"at the BOS of position {at} it moved by {apart:.2g} with the document before",
                position=at,
            )
    return f"{len(positions)} BOS read the same after any document", {"places": len(positions)}
