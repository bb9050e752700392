"""The codes of one rounding, through one codec and one layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fairway.methods import parcel
from fairway.methods.integers import Integers
from fairway.methods.layouts import LAYOUTS, Layout
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import stored_of, with_stored
from fairway.methods.stored import Codes
from train_gpt import CODECS, GPT, entropy_bits


@dataclass(frozen=True)
class Coded(Method):
    """The codes of another row, packed otherwise; the model is the same to the last bit. The codec
    is zstd, brotli, LZMA or the artifact's entropy coder. Codes lie as they are, or in bit-planes
    of their Gray code, or with similar rows next to each other and the order of rows charged, or,
    if they are ternary, five a byte as the field's ternary record has them. Bit-planes and sorted
    rows take whatever codec makes least of them. `bound_bytes` is the order-0 entropy of all planes
    of bytes as the codec sees them. The entropy coder may fall below it, because it gives rows of
    one kind a table of their own; it cannot fall below what those tables leave.
    """

    base: str  # the row with the same codes
    bits: int
    k: float
    codec: str = ""  # all are tried
    layout: str = ""  # codes as they are
    group = "codecs"

    @property
    def same_score_as(self) -> str:
        return self.base

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        model = Integers(self.bits, k=self.k).apply(model, calibration)
        if not self.layout:
            return model
        kind = LAYOUTS[self.layout]
        stored = {n: kind(s) if isinstance(s, Codes) else s for n, s in stored_of(model).items()}
        return with_stored(model, stored)

    def pack(self, model: GPT) -> bytes:
        return parcel.pack(model, [self.codec] if self.codec else CODECS, [False])

    def figures(self, model: GPT) -> dict[str, Any]:
        _, planes = parcel.laid_out(model, nibbles=False)
        bits = sum(entropy_bits(torch.from_numpy(plane)) for plane in planes)
        rounded = [s.codes if isinstance(s, Layout) else s for s in stored_of(model).values()]
        codes = torch.cat([r.codes.flatten() for r in rounded if isinstance(r, Codes)])
        return {"bound_bytes": bits / 8, "zero_fraction": (codes == 0).float().mean().item()}
