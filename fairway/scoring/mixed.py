"""The experts over a text, and the scorer that mixes them with the neural model and logs what was scored when."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from fairway.scoring.columns import Columns, columns_in_memory
from fairway.scoring.commits import CHAIN_START, Commit, chained
from fairway.scoring.experts.match import Match, Matches
from fairway.scoring.experts.mixing import EXPERTS, Mixture, MixtureRows
from fairway.scoring.experts.ngram import NGram
from fairway.scoring.neural import KINDS, Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import ByteTable, normalised

COMMIT_ROWS = 1024  # rows that are scored, then committed, then learnt from
DEFAULT_EXPERTS = tuple(
    e for e in EXPERTS if e not in ("bigram", "tilt")
)  # those two say nothing that chain does not


# ==== THE EXPERTS OVER A TEXT =========================================================================================
def make_match(vocab_size: int, cfg: EvalConfig, delay: int = 0) -> Match:
    return Match(vocab_size, cfg.match_least, delay=delay, reset=cfg.expert_reset)


def find_matches(tokens: np.ndarray, vocab_size: int, cfg: EvalConfig, delay: int = 0) -> Matches:
    """The match expert over a whole text, row by row: its hints are what the neural model is asked about."""
    expert = make_match(vocab_size, cfg, delay)
    expert.fill(tokens[:1])
    return expert.fill(tokens[1:])


class Chunk(NamedTuple):
    first: int  # row
    inputs: MixtureRows
    state: str  # digest of the n-gram expert before these rows: of all tokens before them, which the match expert read


def chunks(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    matches: Matches,
    grams: NGram,
    starts: list[int] | None = None,
) -> Iterator[Chunk]:
    """Rows in order, with all that a mixture reads about them; the n-gram expert learns each chunk as it is made."""
    starts = starts or list(range(0, columns.rows, COMMIT_ROWS))
    for first, end in pairwise([*starts, columns.rows]):
        at = slice(first, end)
        state, targets = grams.digest(), tokens[at.start + 1 : at.stop + 1]
        yield Chunk(
            first,
            MixtureRows(
                *(
                    np.array(columns[name][at])
                    for name in ("logp", "sharp", "flat", "hint", "entropy")
                ),
                grams.fill(targets),
                Matches(*(part[at] for part in matches)),
                targets.astype(np.int64),
                sizes[at].astype(np.int64),
            ),
            state,
        )


def empty_ngram(vocab_size: int, cfg: EvalConfig, expected_tokens: int, delay: int = 0) -> NGram:
    return NGram(
        vocab_size,
        cfg.ngram_orders,
        cfg.ngram_memory_mb << 20,
        delay=delay,
        reset=cfg.expert_reset,
        expected_tokens=expected_tokens,
    )


def make_ngram(vocab_size: int, cfg: EvalConfig, tokens: np.ndarray, delay: int = 0) -> NGram:
    """The n-gram expert, having read the first token, which no row is about."""
    expert = empty_ngram(vocab_size, cfg, max(len(tokens), 1), delay)
    expert.fill(tokens[:1])
    return expert


# ==== THE SCORER ======================================================================================================
class MixedScorer:
    """What is counted: the neural model, mixed with experts that learn from what has been scored. `score` and
    `distribution` are the contract of every scorer; the rest is for the certificate."""

    tolerance = (
        2e-5  # of log-probabilities: a shorter text runs in other shapes, which round otherwise
    )

    def __init__(self, neural: Neural, cfg: EvalConfig, table: ByteTable):
        self.neural, self.cfg, self.table, self.vocab_size = (
            neural,
            cfg,
            table,
            neural.model.cfg.vocab_size,
        )
        self.commits: list[Commit] = []
        self.mixture, self.grams = (
            Mixture(self.vocab_size, cfg, DEFAULT_EXPERTS),
            None,
        )  # as the last score left them

    def score(self, tokens: np.ndarray) -> np.ndarray:
        matches = find_matches(tokens, self.vocab_size, self.cfg)
        columns = columns_in_memory(len(matches.hint), KINDS)
        self.neural.fill(tokens, columns, matches.hint)
        return self.mixed(tokens, columns, matches)

    def mixed(
        self,
        tokens: np.ndarray,
        columns: Columns,
        matches: Matches,
        told: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """The mixture over columns that are filled, logged chunk by chunk in `commits`."""
        self.mixture, self.commits = Mixture(self.vocab_size, self.cfg, DEFAULT_EXPERTS), []
        sizes, out, chain = self.table.count(tokens), np.empty(columns.rows), CHAIN_START
        self.grams, learnt = (
            make_ngram(self.vocab_size, self.cfg, tokens),
            dict(self.neural.digests),
        )
        for first, inputs, state in chunks(
            tokens, sizes, columns, matches, self.grams, sorted(learnt)
        ):
            before = hashlib.sha256(
                (state + self.mixture.digest() + learnt.get(first, "")).encode()
            ).hexdigest()
            logp = self.mixture.fill(inputs)
            out[first : first + len(logp)] = logp
            self.commits.append(
                chained(
                    chain, first, len(logp), -float(logp.sum()), int(inputs.sizes.sum()), before
                )
            )
            chain = self.commits[-1].chain
            if told:
                told(first + len(logp))
        return out

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        """float64[V] for position i, from tokens[:i] alone: all of it is scored and learnt again."""
        known = np.append(tokens[:i], 0).astype(
            tokens.dtype
        )  # a row has a target; any token serves, it is not read
        p = self.neural.distributions(known, np.array([i - 1]))[0]
        self.score(tokens[:i])
        match = make_match(self.vocab_size, self.cfg)
        match.fill(tokens[:i])
        return self.mixture.distribution(p, self.grams.candidate_counts(), match.hint())

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "chunk": np.arange(0, max(len(tokens) - 1, 0), COMMIT_ROWS),
            **self.neural.boundaries(tokens),
        }

    @torch.no_grad()
    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        """Token embeddings once they are smeared: float[n, D]. The hashed bigram is left out; it names the token before
        a BOS as attention does, and no row was ever turned down for it."""
        model = self.neural.model
        x = torch.from_numpy(tokens.astype(np.int64))[None].to(model.cos.device)
        plain = normalised(model.tok_emb(x))
        return (plain if model.smear is None else model.smear(plain, x))[0].float().cpu().numpy()
