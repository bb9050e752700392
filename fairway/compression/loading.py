"""An artifact file as something that runs: its model on a device, and its tokenizer as a speller of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from fairway.compression.spelling import Speller
from fairway.scoring.text import load_tokenizer
from train_gpt import GPT, Artifact, Runtime, best_device, build_model, need, read_artifact

SMALL = 1 << 22  # weights


class Loaded(NamedTuple):
    artifact: Artifact
    model: GPT
    speller: Speller
    runtime: Runtime


def load(path: str | Path, tokenizer: str = "", device: str = "") -> Loaded:
    """The tokenizer is the artifact's own, or one beside it, or the one given; the device the best there is.

    A step of a small model is over before a second thread has woken up: on an idle machine two take as long as one, on
    a busy one many times as long. So it gets one."""
    kind = device or best_device()
    need(
        kind in ("cpu", best_device()),
        f"--device is {kind}, but PyTorch sees only {best_device()} here; leave it out",
    )
    artifact = read_artifact(path)
    speaks, _ = load_tokenizer(tokenizer, artifact, Path(path).parent, "--tokenizer")
    model = build_model(artifact, kind).eval()
    if kind == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    return Loaded(
        artifact,
        model,
        Speller(speaks, artifact.config.vocab_size),
        Runtime(0, 1, torch.device(kind), kind),
    )
