"""A score, proved: its first tokens are encoded at the price that was counted for them, and a process that is given the
artifact and the file, and nothing else, decodes them.

    python -m fairway.compression.proof --artifact final_model.int6.ptz eval/proof.fwy --out tokens.bin

That is the decoder, and what it writes is a shard. Whoever peeks cannot decode, and whoever deals out more than one for
all tokens together pays for it in bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fairway.compression.bitstream import read_bitstream
from fairway.compression.compressor import Coder
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.settings import EvalConfig
from train_gpt import UserError, read_shard, replacing, write_shard

ROOT = Path(__file__).resolve().parents[1]
SLACK, SLACK_BYTES = (
    0.001,
    64,
)  # what the file may exceed its claim by: a part of it, and the header's bytes


class ProofFacts(NamedTuple):
    """Whether a proof decodes at the claimed price, in one line and in numbers."""

    passed: bool
    figure: str
    details: dict[str, Any]


def prove_score(evaluation: Evaluation, count: int) -> ProofFacts:
    """Write eval/proof.fwy, the first tokens of a score at its price, and decode it elsewhere."""
    # The decoder needs the path of a tokenizer that lies next to the shards.
    cfg = replace(evaluation.cfg, tokenizer_path=evaluation.text.tokenizer_path)
    tokens, path = evaluation.text.tokens[:count], evaluation.folder / "proof.fwy"
    with evaluation.stage("proof"):
        with evaluation.bar("encoding", count - 1) as bar:
            write_proof(cfg, tokens, path, bar.update)
        return prove(cfg, tokens, evaluation.logp[: count - 1], path)


def write_proof(
    cfg: EvalConfig, tokens: np.ndarray, path: Path, told: Callable[[int], object]
) -> None:
    """The bitstream of a split's first tokens, from the artifact as it is on disk."""
    coded = Coder.of(cfg.checkpoint, cfg.device, cfg.tokenizer_path).encode_proof(tokens, cfg, told)
    with replacing(path) as f:
        f.write(coded)


def prove(cfg: EvalConfig, tokens: np.ndarray, logp: np.ndarray, path: Path) -> ProofFacts:
    """Of the bitstream at `path`: whether it gives back the tokens, and for the bits that were counted for all but the
    first."""
    began = time.perf_counter()
    back = decoded_elsewhere(cfg, path)
    return verdict(
        tokens,
        back,
        -float(logp.sum()) / np.log(2),
        8 * path.stat().st_size,
        time.perf_counter() - began,
    )


def decoded_elsewhere(cfg: EvalConfig, path: Path) -> np.ndarray | str:
    """The tokens as a new process reads them, in a folder where nothing else lies; or why it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "tokens.bin"
        tokenizer = (
            ["--tokenizer", Path(cfg.tokenizer_path).resolve()] if cfg.tokenizer_path else []
        )
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "fairway.compression.proof",
                "--artifact",
                Path(cfg.checkpoint).resolve(),
                "--out",
                out,
                "--device",
                cfg.device,
                *tokenizer,
                path.resolve(),
            ],
            cwd=ROOT,
            stderr=None if sys.stderr.isatty() else subprocess.PIPE,
            text=True,
        )
        return (
            read_shard(out)
            if done.returncode == 0
            else (done.stderr or "see above").strip().splitlines()[-1]
        )


def verdict(
    tokens: np.ndarray, back: np.ndarray | str, claimed: float, real: int, seconds: float
) -> ProofFacts:
    """Of a file of `real` bits that was claimed to need `claimed`, and of what came back."""
    ratio, most = real / claimed, (1 + SLACK) * claimed + 8 * SLACK_BYTES
    details = dict(
        tokens=len(tokens),
        claimed_bits=claimed,
        file_bits=real,
        ratio=ratio,
        decode_seconds=seconds,
    )
    if isinstance(back, str):
        return ProofFacts(False, f"another process could not decode: {back}", details)
    if not np.array_equal(back, tokens):
        return ProofFacts(False, "another process decoded other tokens than were written", details)
    figure = (
        f"{len(tokens):,} tokens, {claimed:,.0f} bits claimed, {real:,} in the file: {ratio:.5f}x"
    )
    return ProofFacts(real <= most, figure, details)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Decode a proof into a shard of tokens.")
    parser.add_argument("file", help="what eval_final.py --prove wrote")
    parser.add_argument("--artifact", required=True)
    parser.add_argument("--out", required=True, metavar="FILE", help="the shard")
    parser.add_argument(
        "--tokenizer", default="", metavar="FILE", help="where the artifact holds none"
    )
    parser.add_argument("--device", default="", choices=("", "cpu", "cuda", "mps"))
    given = parser.parse_args(arguments)
    try:
        header, payload = read_bitstream(given.file)
        coder = Coder.of(given.artifact, given.device, given.tokenizer)
        with tqdm(
            total=header.count, desc="decoding", unit="tok", unit_scale=True, delay=3, leave=False
        ) as bar:
            write_shard(given.out, coder.decode_proof(header, payload, bar.update))
    except (UserError, OSError) as e:
        print(f"proof: error: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
