"""Speculative decoding: a draft guesses tokens ahead, and the model verifies them at once."""

from __future__ import annotations

from dataclasses import dataclass

from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import with_stored
from train_gpt import GPT


@dataclass(frozen=True)
class Drafted(Method):
    """The weights as they are, in float32, and greedy text written with a draft: runs of tokens
    that occurred before (ngram), a trie of them (suffix), or the model's own first layers. The text
    is that of plain decoding, or the row fails. Tokens a second of both, taken in turn, and tokens
    for each pass of the model say what the draft gains.
    """

    draft: str
    group = "speculation"
    same_score_as = "fp32"

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        return with_stored(model, {})
