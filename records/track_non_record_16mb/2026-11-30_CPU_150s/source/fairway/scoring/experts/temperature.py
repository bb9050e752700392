"""The neural model again, sharper and flatter, so that a mixture can correct how sure it is.

Neural scoring has logits on a device, a mixture has log-probabilities in numpy: each has its own
function, because one formula for both would round differently and change scores in their last
digits.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

TEMPERATURES = {"sharp": 0.85, "flat": 1.2}  # column name: temperature


def tempered(logp: np.ndarray, temperature: float) -> np.ndarray:
    """Return log-probabilities float64 [..., V] at another temperature."""
    scaled = logp / temperature
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def tempered_at(logits_RV: Tensor, picked_R: Tensor, temperature: float) -> Tensor:
    """Return tempered log-probabilities [R] of one token a row, whose logits are `picked_R`."""
    return picked_R / temperature - (logits_RV / temperature).logsumexp(dim=1)
