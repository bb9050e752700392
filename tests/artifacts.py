"""Artifacts of small random models, shared by the tests."""

import dataclasses
from pathlib import Path

import models
import torch
from models import SMOKE

from train_gpt import (
    GPT,
    Config,
    encode_artifact,
    initialise,
    quantised,
    replacing,
)

TINY = SMOKE | dict(vocab_size=96, model_dim=32, num_heads=2, num_kv_heads=1, train_seq_len=32)
K = 5.0


def trained(cfg: Config, looping: bool = False) -> GPT:
    """Return a model with noise on every parameter, as if it had been trained."""
    model, noise = GPT(cfg), torch.Generator().manual_seed(3)
    initialise(model, cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=noise) * 0.1)
    model.looping = looping
    return model


def encoded(
    model: GPT, codec: str = "brotli", tokenizer: bytes = b"a tokenizer", k: float = K, **settings
) -> bytes:
    """Return the bytes of the artifact of `model`; `settings` replace those of the model."""
    cfg = dataclasses.replace(model.cfg, **settings)
    rounded = quantised(dict(model.named_parameters()), k, cfg, {})
    return encode_artifact(rounded, k, cfg, model.looping, codec, tokenizer)


def write(path: Path, data: bytes) -> Path:
    """Write `data` to `path` and return the path."""
    with replacing(path) as f:
        f.write(data)
    return path


def make_artifact(
    folder: Path,
    corpus,
    name: str = "model.ptz",
    tokenizer: bytes = b"",
    inside: bool = True,
    **settings,
) -> Path:
    """Write the artifact of a small random model for the corpus, and return its path."""
    model = models.trained(
        **dict(vocab_size=corpus.vocab_size, train_seq_len=32, train_batch_tokens=256) | settings
    )
    model.cfg = dataclasses.replace(model.cfg, embed_tokenizer=inside)
    own = (corpus.folder / "tokenizer.model").read_bytes()
    return write(folder / name, encoded(model, tokenizer=tokenizer or own))
