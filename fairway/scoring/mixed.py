"""From an artifact and a text to the score: neural columns, experts, mixture, and the log of what was scored when."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch

import train_gpt
from fairway.certificate import CHAIN_START, Commit, chained
from fairway.certificate.rules import imported_code
from fairway.scoring.columns import Columns, columns_in_memory
from fairway.scoring.experts.match import Match, Matches
from fairway.scoring.experts.mixing import EXPERTS, Inputs, Mixture
from fairway.scoring.experts.ngram import NGram
from fairway.scoring.neural import KINDS, Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import Artifact, ByteTable, need, normalised, proven_table, read_shard

ROOT = Path(train_gpt.__file__).resolve().parent
COMMIT_ROWS = 1024  # rows that are scored, then committed, then learnt from
DEFAULT_EXPERTS = tuple(
    e for e in EXPERTS if e not in ("bigram", "tilt")
)  # those two say nothing that chain does not


class Text(NamedTuple):
    """A split that is to be scored, and how many bytes each of its targets stands for."""

    tokens: np.ndarray  # uint16[n]
    sizes: np.ndarray  # int16[n - 1]
    table: ByteTable
    tokenizer: sentencepiece.SentencePieceProcessor
    tokenizer_path: str  # empty: it is the artifact's own
    name: str
    sha256: str

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    def bpb(self, logp: np.ndarray) -> float:
        return float(-np.sum(logp, dtype=np.float64) / np.log(2) / self.bytes)


def load_text(cfg: EvalConfig, artifact: Artifact) -> Text:
    """The shards of a split, and the proof that the artifact's tokenizer wrote them."""
    data = ROOT / "data"
    fineweb = data / "datasets" / f"fineweb10B_sp{artifact.config.vocab_size}"
    folder = (
        Path(cfg.data_path) if cfg.data_path else fineweb if fineweb.is_dir() else data / "embedded"
    )
    pattern = cfg.val_files or str(folder / "*_val_*.bin")
    paths = [Path(p) for p in sorted(glob.glob(pattern))]
    need(paths, f"no shards match {pattern}; run `make data`, or set VAL_FILES or DATA_PATH")
    tokens, size = np.concatenate([read_shard(p) for p in paths]), artifact.config.vocab_size
    need(
        len(tokens) > 1,
        f"{pattern} holds {len(tokens)} tokens; at least 2 are needed to predict one",
    )
    need(
        tokens.max() < size,
        f"{pattern} holds token {tokens.max()}, but the artifact knows {size}; set VAL_FILES to "
        "shards that its tokenizer wrote",
    )
    tokenizer, origin = load_tokenizer(cfg.tokenizer_path, artifact, paths[0].parent)
    table = proven_table(tokenizer, origin, tokens)
    sizes = table.count(tokens)
    need(sizes.sum() > 0, f"the tokens of {pattern} stand for no bytes; bits per byte need some")
    own = artifact.tokenizer and not cfg.tokenizer_path
    return Text(
        tokens,
        sizes,
        table,
        tokenizer,
        "" if own else origin,
        pattern,
        hashlib.sha256(tokens).hexdigest(),
    )


def load_tokenizer(
    given: str, artifact: Artifact, beside: Path, option: str = "TOKENIZER_PATH"
) -> tuple[Any, str]:
    """The tokenizer that the artifact was trained with: inside it, or a file with its hash. `option` is how the user
    gives one."""
    path = Path(given) if given else beside / "tokenizer.model"
    if artifact.tokenizer and not given:
        return sentencepiece.SentencePieceProcessor(
            model_proto=artifact.tokenizer
        ), "the artifact's tokenizer"
    absent = f"no tokenizer at {path}" if given else f"no tokenizer in the artifact nor at {path}"
    need(path.is_file(), f"{absent}; set {option} to the one that the artifact was trained with")
    ours, theirs = train_gpt.file_sha256(path), artifact.header["tokenizer_sha256"]
    need(
        ours == theirs,
        f"{path} is tokenizer {ours[:12]}, but the artifact was trained with {theirs[:12]}; unset "
        f"{option} or set it to that one",
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), str(path)


def code_sizes(extra: str) -> dict[str, int]:
    """Bytes of every file of this repository that is imported by now, and of those named besides."""
    named = [Path(name.strip()) for name in extra.split(",") if name.strip()]
    for path in named:
        need(path.is_file(), f"EXTRA_CODE_FILES names {path}, which is no file")
    return imported_code() | {str(path): path.stat().st_size for path in named}


def code_hashes(names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of each file that `code_sizes` names: a record must ship these and no others."""
    return {
        name: train_gpt.file_sha256(ROOT / name if (ROOT / name).is_file() else name)
        for name in names
    }


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
    inputs: Inputs
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
            Inputs(
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
        return self.mixture.distribution(p, self.grams.evidence(), match.hint())

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


# ==== ABLATION ========================================================================================================
THREE = ("neural", "ngram", "match")
# name: settings and experts of each mixture that is tried on the same columns.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{f"+ {e}": (dict(mix_weights="em"), ("neural", e)) for e in EXPERTS[3:]},
    "+ temperature": (dict(mix_weights="em"), ("neural", "sharp", "flat")),
    "all, linear": (dict(mix_weights="exponential"), THREE),
    "all, log": (dict(mix_mode="log"), THREE),
    "fixed share": (dict(mix_weights="share"), THREE),
    "online EM": (dict(mix_weights="em"), THREE),
    "contextual": (dict(mix_weights="sets"), THREE),
    "contextual, chain": (dict(mix_weights="sets"), (*THREE, "chain")),
    "gate, chain": (dict(mix_weights="gate"), (*THREE, "chain")),
}


def ablation(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    matches: Matches,
    vocab_size: int,
    cfg: EvalConfig,
    told: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Sum of log-probabilities for each mixture of VARIANTS, all in one pass over the columns."""
    tried = {
        name: Mixture(vocab_size, replace(cfg, **settings), experts)
        for name, (settings, experts) in VARIANTS.items()
    }
    sums = dict.fromkeys(tried, 0.0)
    for chunk in chunks(tokens, sizes, columns, matches, make_ngram(vocab_size, cfg, tokens)):
        for name, mixture in tried.items():
            sums[name] += float(mixture.fill(chunk.inputs).sum())
        if told:
            told(chunk.first + len(chunk.inputs.targets))
    return sums


def delayed(
    tokens: np.ndarray,
    sizes: np.ndarray,
    columns: Columns,
    vocab_size: int,
    cfg: EvalConfig,
    delay: int,
) -> float:
    """Sum of log-probabilities of a linear mixture whose experts know only text that is `delay` tokens old."""
    matches, total = find_matches(tokens, vocab_size, cfg, delay), 0.0
    mixture = Mixture(vocab_size, replace(cfg, mix_mode="linear"), DEFAULT_EXPERTS)
    for chunk in chunks(
        tokens, sizes, columns, matches, make_ngram(vocab_size, cfg, tokens, delay)
    ):
        total += float(mixture.fill(chunk.inputs).sum())
    return total


def as_rows(sums: Mapping[str, float], text: Text, base: float) -> list[dict[str, Any]]:
    """Bits per byte and gain over `base` of each, for a table and for JSON."""
    found = {name: -total / np.log(2) / text.bytes for name, total in sums.items()}
    return [dict(name=name, bpb=bpb, gain=base - bpb) for name, bpb in found.items()]
