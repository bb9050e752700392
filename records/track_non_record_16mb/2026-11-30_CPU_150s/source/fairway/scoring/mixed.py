"""The scorer whose score counts: the model, mixed with experts that learn from scored text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from fairway.scoring.columns import Columns, columns_in_memory
from fairway.scoring.commits import CHAIN_START, Commit, chained
from fairway.scoring.counting import CountedText, rows_ahead
from fairway.scoring.experts.match import Match, Matches
from fairway.scoring.experts.mixing import EXPERTS, Mixture, MixtureRows
from fairway.scoring.experts.ngram import NGram
from fairway.scoring.neural import KINDS, Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import ByteTable, normalised

COMMIT_ROWS = 1024  # rows that are scored, then committed, then learned from
# bigram and tilt add nothing to what chain already says.
DEFAULT_EXPERTS = tuple(e for e in EXPERTS if e not in ("bigram", "tilt"))


# ==== THE EXPERTS OVER A TEXT =====================================================================
def make_match(vocab_size: int, cfg: EvalConfig, delay: int = 0) -> Match:
    """Return a match expert that has read nothing; it learns each token `delay` tokens late."""
    return Match(vocab_size, cfg.match_least, delay=delay, reset=cfg.expert_reset)


def find_matches(tokens: np.ndarray, vocab_size: int, cfg: EvalConfig, delay: int = 0) -> Matches:
    """Run the match expert over a whole text: one hint for each row.

    The neural model is then asked for the probability of each hint.
    """
    expert = make_match(vocab_size, cfg, delay)
    expert.fill(tokens[:1])
    return expert.fill(tokens[1:])


def empty_ngram(vocab_size: int, cfg: EvalConfig, expected_tokens: int, delay: int = 0) -> NGram:
    """Return an n-gram expert that has read nothing, with tables for `expected_tokens`."""
    return NGram(
        vocab_size,
        cfg.ngram_orders,
        cfg.ngram_memory_mb << 20,
        delay=delay,
        reset=cfg.expert_reset,
        expected_tokens=expected_tokens,
    )


def make_ngram(vocab_size: int, cfg: EvalConfig, tokens: np.ndarray, delay: int = 0) -> NGram:
    """Return the n-gram expert of a text. It has read the first token, which no row predicts."""
    expert = empty_ngram(vocab_size, cfg, max(len(tokens), 1), delay)
    expert.fill(tokens[:1])
    return expert


def count_ahead(
    tokens: np.ndarray, vocab_size: int, cfg: EvalConfig, threads: int = 1, delay: int = 0
) -> CountedText:
    """Return the n-gram counts about tokens[1:]; with two threads they are made ahead."""
    grams = make_ngram(vocab_size, cfg, tokens, delay)
    return CountedText(grams, tokens[1:], rows_ahead(cfg, threads))


class Chunk(NamedTuple):
    """Consecutive rows, with everything that a mixture reads about them."""

    first: int  # row
    inputs: MixtureRows
    state: str  # digest of the n-gram expert before these rows; it covers all tokens before them


def chunks(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    matches: Matches,
    counted: CountedText,
    starts: list[int] | None = None,
) -> Iterator[Chunk]:
    """Yield the rows of a text in order; the n-gram expert has learned what was yielded.

    `starts` are the first rows of the chunks; without them a chunk has COMMIT_ROWS rows.
    """
    starts = starts or list(range(0, columns.rows, COMMIT_ROWS))
    names = ("logp", "sharp", "flat", "hint", "entropy")
    for first, end in pairwise([*starts, columns.rows]):
        rows = slice(first, end)
        state, targets = counted.digest(), tokens[first + 1 : end + 1]
        inputs = MixtureRows(
            *(np.array(columns[name][rows]) for name in names),
            counted.take(end - first),
            Matches(*(part[rows] for part in matches)),
            targets.astype(np.int64),
            sizes[rows].astype(np.int64),
        )
        yield Chunk(first, inputs, state)


# ==== THE SCORER ==================================================================================
class MixedScorer:
    """The neural model, mixed with experts. `score` and `distribution` are every scorer's contract.

    The other public names (`tolerance`, `commits`, `boundaries`, `embeddings`) are for the
    certificate.
    """

    # Log-probabilities of a shorter text may differ by this: other shapes round differently.
    tolerance = 2e-5

    def __init__(self, neural: Neural, cfg: EvalConfig, table: ByteTable):
        self.neural, self.cfg, self.table = neural, cfg, table
        self.vocab_size = neural.model.cfg.vocab_size
        self.commits: list[Commit] = []  # of the last score, as `mixture` and `grams` are
        self.mixture = Mixture(self.vocab_size, cfg, DEFAULT_EXPERTS)
        self.grams: NGram | None = None

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Return float64[n - 1]: the log-probability of tokens[1:], in order."""
        matches = find_matches(tokens, self.vocab_size, self.cfg)
        columns = columns_in_memory(len(matches.hint), KINDS)
        self.neural.fill(tokens, columns, matches.hint)
        return self.mixed(tokens, columns, matches)

    def mixed(
        self,
        tokens: np.ndarray,
        columns: Columns,
        matches: Matches,
        counted: CountedText | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Mix filled columns with the experts, and log each chunk in `commits`.

        `counted` are the text's n-gram counts where they are made ahead. `on_progress` is called
        with the number of rows that are done.
        """
        counted = counted or count_ahead(tokens, self.vocab_size, self.cfg)
        self.mixture = Mixture(self.vocab_size, self.cfg, DEFAULT_EXPERTS)
        self.grams, self.commits, chain = counted.grams, [], CHAIN_START
        sizes, out = self.table.count(tokens), np.empty(columns.rows)
        trained = dict(self.neural.digests)  # first row → digest of what test-time training learned
        for first, inputs, state in chunks(
            tokens, sizes, columns, matches, counted, sorted(trained)
        ):
            states = state + self.mixture.digest() + trained.get(first, "")
            before = hashlib.sha256(states.encode()).hexdigest()
            logp = self.mixture.fill(inputs)
            count, nats = len(logp), -float(logp.sum())
            out[first : first + count] = logp
            commit = chained(chain, first, count, nats, int(inputs.sizes.sum()), before)
            self.commits.append(commit)
            chain = commit.chain
            if on_progress:
                on_progress(first + count)
        return out

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        """Return float64[V] for position i, from tokens[:i] alone, which are scored again."""
        # The row needs a target. Any token will do, because it is not read.
        known = np.append(tokens[:i], 0).astype(tokens.dtype)
        p = self.neural.distributions(known, np.array([i - 1]))[0]
        self.score(tokens[:i])
        match = make_match(self.vocab_size, self.cfg)
        match.fill(tokens[:i])
        return self.mixture.distribution(p, self.grams.candidate_counts(), match.hint())

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows at which something begins, by kind: where a leak would show first."""
        chunk_starts = np.arange(0, max(len(tokens) - 1, 0), COMMIT_ROWS)
        return {"chunk": chunk_starts, **self.neural.boundaries(tokens)}

    @torch.no_grad()
    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """Return the token embeddings after the smear gate: float[n, D].

        The hashed bigram is left out. It reads the token before a BOS, as attention does, and no
        row was ever refused for that.
        """
        model = self.neural.model
        x = torch.from_numpy(tokens.astype(np.int64))[None].to(model.cos.device)
        plain = normalised(model.tok_emb(x))
        smeared = plain if model.smear is None else model.smear(plain, x)
        return smeared[0].float().cpu().numpy()
