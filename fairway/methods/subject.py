"""The model that methods are applied to: float weights, from an artifact or a checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fairway.artifact_reader import read_artifact
from train_gpt import (
    ARTIFACT_MAGIC,
    GPT,
    MODEL_FIELDS,
    TOKENIZER_PLACES,
    Artifact,
    Config,
    UserError,
    build_model,
    file_sha256,
)

FLOAT_WEIGHTS = "final_model.pt"  # the trainer writes it next to the artifact
CHECKPOINT = "checkpoint.pt"
MOST_ROUNDING_ERROR = 0.5  # of a matrix, relative: int4 has 0.1, other weights have 1.4


class Subject(NamedTuple):
    """A model to compare methods on."""

    name: str  # of its folder of results
    model: GPT
    artifact: Artifact  # its configuration and tokenizer
    weights_from: str
    checkpoint: Path | None  # with averages of weights, if the run left one


def is_artifact(path: Path) -> bool:
    """Return whether a file begins as an artifact; refuse what is no checkpoint either."""
    try:
        with open(path, "rb") as f:
            start = f.read(len(ARTIFACT_MAGIC))
    except OSError as e:
        raise UserError(f"--model {path} cannot be read ({e.strerror}); check its name") from None
    if start != ARTIFACT_MAGIC and start[:2] != b"PK":
        raise UserError(
            f"--model {path} is neither an artifact nor a checkpoint of train_gpt.py; name one"
        )
    return start == ARTIFACT_MAGIC


def load_subject(path: Path, tokenizer: str = "", data: Path | None = None) -> Subject:
    """Return the float model of an artifact or of a checkpoint."""
    return of_artifact(path) if is_artifact(path) else of_checkpoint(path, tokenizer, data)


def named(path: Path) -> str:
    """Return a name for results: the file's, and the start of its hash."""
    return f"{path.name.split('.')[0]}-{file_sha256(path)[:8]}"


def of_artifact(path: Path) -> Subject:
    """Take the float weights that lie next to an artifact, or else its own, rounded ones."""
    artifact, source = read_artifact(path), path.with_name(FLOAT_WEIGHTS)
    model = build_model(artifact).eval()
    weights_from = f"{path.name}: rounded already, because no {FLOAT_WEIGHTS} of this run is there"
    if source.is_file():
        state = read_state(source)
        if is_rounded_from(artifact.weights, state):
            model.load_state_dict(state, strict=True)
            weights_from = source.name
    checkpoint = path.with_name(CHECKPOINT)
    return Subject(
        named(path), model, artifact, weights_from, checkpoint if checkpoint.is_file() else None
    )


def of_checkpoint(path: Path, tokenizer: str, data: Path | None) -> Subject:
    state = read_state(path)
    if not isinstance(state, dict) or not {"settings", "model", "looping"} <= state.keys():
        raise UserError(
            f"--model {path} holds weights without settings; name the artifact next to it"
        )
    known = {n: v for n, v in state["settings"].items() if n in MODEL_FIELDS}
    cfg = Config(**known, train_batch_tokens=8 * known["train_seq_len"])
    folder = data or Path(__file__).resolve().parents[2] / "data" / "embedded"
    places = [Path(tokenizer)] if tokenizer else []
    places += [folder / p.format(cfg.vocab_size) for p in TOKENIZER_PLACES]
    if not (found := next((p for p in places if p.is_file()), None)):
        raise UserError(f"no tokenizer for {path} at {places[0]}; set --tokenizer")
    header = {"looping": bool(state["looping"]), "tokenizer_sha256": file_sha256(found)}
    artifact = Artifact(cfg, state["model"], found.read_bytes(), header)
    return Subject(named(path), build_model(artifact).eval(), artifact, path.name, path)


def read_state(path: Path) -> Any:
    """Return what torch saved in a file, without running code of the file."""
    try:
        if zipfile.ZipFile(path).testzip() is not None:
            raise UserError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged zip raises almost anything
        raise UserError(f"{path} is damaged ({type(e).__name__}); name another --model") from None


def is_rounded_from(rounded: Mapping[str, Tensor], state: Any) -> bool:
    """Return whether `state` has the weights that were rounded to `rounded`."""
    if not isinstance(state, dict) or state.keys() != rounded.keys():
        return False
    if any(state[n].shape != w.shape for n, w in rounded.items()):
        return False
    errors = [(state[n].float() - w).norm() / w.norm().clamp(min=1e-9) for n, w in rounded.items()]
    return max(errors).item() < MOST_ROUNDING_ERROR
