"""The text that is scored: its shards, its tokenizer, and the bytes of each token."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

import train_gpt
from fairway.scoring.settings import EvalConfig
from train_gpt import (
    TOKENIZER_PLACES,
    Artifact,
    ByteTable,
    UserError,
    check_sidecar,
    file_sha256,
    list_shards,
    proven_table,
    read_shard,
)

ROOT = Path(train_gpt.__file__).resolve().parent


class Text(NamedTuple):
    """The tokens of a split, and the number of bytes that each target token stands for."""

    tokens: np.ndarray  # uint16[n]
    sizes: np.ndarray  # int16[n - 1]
    table: ByteTable
    tokenizer: sentencepiece.SentencePieceProcessor
    tokenizer_path: str  # "" if it came from inside the artifact
    name: str  # the pattern of its shards
    sha256: str

    @property
    def bytes(self) -> int:
        """Bytes of all targets: the denominator of bits per byte."""
        return int(self.sizes.sum())

    def bpb(self, logp: np.ndarray) -> float:
        """Return bits per byte for the log-probabilities (nats) of all targets."""
        return float(-np.sum(logp, dtype=np.float64) / np.log(2) / self.bytes)


def load_text(cfg: EvalConfig, artifact: Artifact) -> Text:
    """Read the shards of a split, and prove that the artifact's tokenizer wrote them."""
    pattern, paths = find_shards(cfg, artifact.config.vocab_size)
    shards, vocab_size = [read_shard(p) for p in paths], artifact.config.vocab_size
    tokens = np.concatenate(shards)
    if len(tokens) < 2:
        raise UserError(
            f"{pattern} holds {len(tokens)} tokens; at least 2 are needed to predict one"
        )
    if tokens.max() >= vocab_size:
        raise UserError(
            f"{pattern} holds token {tokens.max()}, but the artifact knows {vocab_size}; set "
            "VAL_FILES to shards that its tokenizer wrote"
        )
    tokenizer, origin = load_tokenizer(cfg.tokenizer_path, artifact, paths[0].parent)
    table = proven_table(tokenizer, origin, tokens)
    for path, shard in zip(paths, shards, strict=True):
        check_sidecar(path, shard, table)
    sizes = table.count(tokens)
    if sizes.sum() <= 0:
        raise UserError(f"the tokens of {pattern} stand for no bytes; bits per byte need some")
    embedded = artifact.tokenizer and not cfg.tokenizer_path
    tokenizer_path = "" if embedded else origin
    sha256 = hashlib.sha256(tokens).hexdigest()
    return Text(tokens, sizes, table, tokenizer, tokenizer_path, pattern, sha256)


def find_shards(cfg: EvalConfig, vocab_size: int) -> tuple[str, list[Path]]:
    """Return the pattern of the shards to score, and the files that match it, sorted."""
    data = ROOT / "data"
    fineweb = data / "datasets" / f"fineweb10B_sp{vocab_size}"
    default = fineweb if fineweb.is_dir() else data / "embedded"
    pattern = cfg.val_files or str(Path(cfg.data_path or default) / "*_val_*.bin")
    if not (paths := list_shards(pattern)):
        raise UserError(
            f"no shards match {pattern}; run `make data`, or set VAL_FILES or DATA_PATH"
        )
    return pattern, paths


def load_tokenizer(
    path_given: str, artifact: Artifact, folder: Path, option: str = "TOKENIZER_PATH"
) -> tuple[Any, str]:
    """Return the tokenizer that the artifact was trained with, and where it was found.

    It is the file `path_given` (the user's `option`), else the one inside the artifact, else one
    where training looks for it, seen from `folder`. A file must have the hash that the artifact
    names.
    """
    if artifact.tokenizer and not path_given:
        processor = sentencepiece.SentencePieceProcessor(model_proto=artifact.tokenizer)
        return processor, "the artifact's tokenizer"
    V = artifact.config.vocab_size
    paths = [Path(path_given)] if path_given else [folder / p.format(V) for p in TOKENIZER_PLACES]
    if not (path := next((p for p in paths if p.is_file()), None)):
        places = " or ".join(map(str, paths))
        places = f"at {places}" if path_given else f"in the artifact nor at {places}"
        raise UserError(
            f"no tokenizer {places}; set {option} to the one that the artifact was trained with"
        )
    ours, theirs = file_sha256(path), artifact.header["tokenizer_sha256"]
    if ours != theirs:
        raise UserError(
            f"{path} is tokenizer {ours[:12]}, but the artifact was trained with {theirs[:12]}; "
            f"unset {option} or set it to that one"
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), str(path)
