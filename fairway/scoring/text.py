"""The text that is scored: its shards, its tokenizer, and the bytes of each token."""

from __future__ import annotations

import glob
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece

import train_gpt
from fairway.scoring.settings import EvalConfig
from train_gpt import Artifact, ByteTable, need, proven_table, read_shard

ROOT = Path(train_gpt.__file__).resolve().parent


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
