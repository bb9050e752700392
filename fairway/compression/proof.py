"""Prove a score by decoding its first tokens, encoded at the price that the score counts for them.

A new process then decodes them from the artifact and that file alone. A scorer that looks ahead
cannot be decoded, and probabilities that sum to more than one cost extra bytes in the file.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import train_gpt
from fairway.compression.compressor import Compressor
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.settings import EvalConfig
from train_gpt import read_shard, replacing

ROOT = Path(train_gpt.__file__).resolve().parent
# The file may exceed the claim by this fraction, for frequencies that are whole numbers, and by
# these bytes, for the header and the coder's last words.
SLACK, SLACK_BYTES = 0.001, 64


class ProofFacts(NamedTuple):
    """The result of a proof: does it hold, the line that says so, and its figures."""

    passed: bool
    figure: str
    details: dict[str, Any]


def prove_score(evaluation: Evaluation, count: int) -> ProofFacts:
    """Write eval/proof.fwy, the first `count` tokens of a scored text, and decode it elsewhere."""
    text = evaluation.text
    # The tokenizer may be next to the shards; the decoder must find the same one.
    cfg = replace(evaluation.cfg, tokenizer_path=text.tokenizer_path)
    tokens, path = text.tokens[:count], evaluation.folder / "proof.fwy"
    with evaluation.stage("proof"):
        with evaluation.bar("encoding", len(tokens) - 1) as bar:
            write_proof(cfg, tokens, path, bar.update)
        return check_proof(cfg, tokens, evaluation.logp[: len(tokens) - 1], path)


def write_proof(
    cfg: EvalConfig, tokens: np.ndarray, path: Path, on_progress: Callable[[int], object]
) -> None:
    """Write the bitstream of a text's first tokens, with the artifact as it is on disk."""
    compressor = Compressor.load(cfg.checkpoint, cfg.device, cfg.tokenizer_path)
    coded = compressor.encode_proof(tokens, cfg, on_progress)
    with replacing(path) as f:
        f.write(coded)


def check_proof(cfg: EvalConfig, tokens: np.ndarray, logp: np.ndarray, path: Path) -> ProofFacts:
    """Decode the proof at `path` in a new process and compare it with what was scored.

    `logp` are the log-probabilities in nats of all tokens but the first.
    """
    began = time.perf_counter()
    decoded = decode_elsewhere(cfg, path)
    seconds = time.perf_counter() - began
    claimed_bits = -float(logp.sum()) / np.log(2)
    return proof_facts(tokens, decoded, claimed_bits, 8 * path.stat().st_size, seconds)


def decode_elsewhere(cfg: EvalConfig, path: Path) -> np.ndarray | str:
    """Return the tokens that a new process decodes from a proof, or the line that says why not."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens.bin"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "fairway", "decode-proof", path.resolve(), "--out", out),
                *("--artifact", Path(cfg.checkpoint).resolve(), "--device", cfg.device),
                *("--tokenizer", cfg.tokenizer_path and Path(cfg.tokenizer_path).resolve()),
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,  # a terminal shows its bar
            text=True,
        )
        if done.returncode == 0:
            return read_shard(out)
        return (done.stderr or "see above").strip().splitlines()[-1]


def proof_facts(
    tokens: np.ndarray,
    decoded: np.ndarray | str,
    claimed_bits: float,
    file_bits: int,
    seconds: float,
) -> ProofFacts:
    """Compare what was decoded with the tokens, and the size of the file with the claim."""
    details = dict(
        tokens=len(tokens),
        claimed_bits=claimed_bits,
        file_bits=file_bits,
        ratio=file_bits / claimed_bits,
        decode_seconds=seconds,
    )
    if isinstance(decoded, str):
        return ProofFacts(False, f"another process could not decode: {decoded}", details)
    if not np.array_equal(decoded, tokens):
        return ProofFacts(False, "another process decoded other tokens than were written", details)
    figure = (
        f"{len(tokens):,} tokens, {claimed_bits:,.0f} bits claimed, "
        f"{file_bits:,} in the file: {details['ratio']:.5f}x"
    )
    most = (1 + SLACK) * claimed_bits + 8 * SLACK_BYTES
    return ProofFacts(file_bits <= most, figure, details)
