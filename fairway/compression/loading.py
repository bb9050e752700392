"""Load an artifact's file as something that runs: model, tokenizer and device."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fairway.artifact_reader import read_artifact
from fairway.compression.spelling import Speller
from fairway.scoring.text import load_tokenizer
from train_gpt import GPT, Artifact, Runtime, UserError, best_device, build_model

SMALL_MODEL = 1 << 22  # weights


class Loaded(NamedTuple):
    """An artifact with its model on a device and its tokenizer."""

    artifact: Artifact
    model: GPT
    speller: Speller
    runtime: Runtime


def load(path: str | Path, tokenizer: str = "", device: str = "") -> Loaded:
    """Return the artifact at `path`, ready to run.

    The tokenizer is the file named, or the one in the artifact, or the one next to it. The device
    is the one named, or the fastest here. A small model gets one thread on a CPU: its steps end
    before a second thread wakes up, so on a busy machine two threads take many times as long.
    """
    kind = device or best_device()
    if kind not in ("cpu", best_device()):
        raise UserError(
            f"--device is {kind}, but PyTorch sees only {best_device()} here; leave it out"
        )
    artifact = read_artifact(path)
    processor, _ = load_tokenizer(tokenizer, artifact, Path(path).parent, "--tokenizer")
    model = build_model(artifact, kind).eval()
    if kind == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    speller = Speller(processor, artifact.config.vocab_size)
    return Loaded(artifact, model, speller, Runtime(0, 1, torch.device(kind), kind))
