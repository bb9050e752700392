"""Keys and values kept in fewer bits than the model computes them in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fairway.methods.measure import CACHE_LENGTHS
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import with_stored
from fairway.scoring.memory import STORAGE, in_int8
from train_gpt import GPT, attend


def as_kept(x_BGTC: Tensor, storage: str) -> Tensor:
    """Return keys or values as a cache of this storage gives them back."""
    if storage == "int8":
        codes, step = in_int8(x_BGTC)
        return (codes.float() * step.float()).type_as(x_BGTC)
    return x_BGTC.to(STORAGE[storage]).type_as(x_BGTC)


def reading_kept(model: GPT, storage: str) -> GPT:
    """Let a model attend, also in whole windows, to what a cache would have kept."""
    read = model.from_embedded

    def attend_to_kept(q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        return attend(q_BHTC, as_kept(k_BGTC, storage), as_kept(v_BGTC, storage))

    def from_embedded(x0: Tensor, rope, attention=attend_to_kept, **part: Any) -> Tensor:
        return read(x0, rope, attention, **part)

    model.from_embedded = from_embedded
    return model


@dataclass(frozen=True)
class CacheType(Method):
    """The weights as they are, in float32, and keys and values as a cache keeps them: in float32,
    in bfloat16, or in int8 with a float16 step for each token and head. Windows are scored with the
    same rounding as a cache would give, text is written from such a cache, and its bytes are
    measured from 128 to 4,096 tokens against what the model's shape says.
    """

    storage: str
    group = "cache"
    cache_lengths = CACHE_LENGTHS
    code = ("cache_types.py",)

    @property
    def same_score_as(self) -> str:
        return "fp32" if self.storage == "fp32" else ""

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return reading_kept(with_stored(model, {}), self.storage)

    def load(self, folder: Path) -> GPT:
        return reading_kept(super().load(folder), self.storage)
