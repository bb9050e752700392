"""Tensors as a compressed model ships them: plain arrays, and the weight that they stand for.

A kind has `arrays()`, what the file holds, `from_arrays`, its inverse, and `weight()`, float32. The
weight of a model is always computed from the arrays, so that memory and file cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from train_gpt import Rounded

Arrays = dict[str, np.ndarray]


class Stored(Protocol):
    """A tensor as the file holds it."""

    kind: str

    def arrays(self) -> Arrays: ...
    def weight(self) -> Tensor: ...


def bf16_bits(values: Tensor) -> np.ndarray:
    """Return bfloat16 values as uint16, because NumPy has no such type."""
    return values.detach().bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float()


def spread(values: Tensor, columns: int) -> Tensor:
    """Repeat one value a group, [rows, groups], over the columns of each group, [rows, columns].

    spread([[1, 2]], 5) is [[1, 1, 1, 2, 2]]: the last group may be shorter.
    """
    each = -(-columns // values.size(1))
    return values.repeat_interleave(each, dim=1)[:, :columns]


def inside(values: Tensor | np.ndarray, end: int, what: str) -> None:
    """Refuse indices of a damaged file before they are used."""
    if values.size and int(values.max()) >= end:
        raise ValueError(f"{what} {int(values.max())} of {end}")


@dataclass(frozen=True)
class Floats:
    """Values in a floating-point type: float32, float16 or bfloat16."""

    values: Tensor
    kind = "floats"

    def arrays(self) -> Arrays:
        if self.values.dtype == torch.bfloat16:
            return {"bf16": bf16_bits(self.values)}
        return {"values": self.values.detach().cpu().numpy()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Floats:
        if "bf16" in arrays:
            return Floats(from_bf16_bits(arrays["bf16"]).bfloat16())
        return Floats(torch.from_numpy(arrays["values"].copy()))

    def weight(self) -> Tensor:
        return self.values.float()


@dataclass(frozen=True)
class Codes:
    """Integer codes [rows, columns] times a step for each row and group of columns, bfloat16.

    With `offsets`, one for each step, the weight is code * step + offset. With `scales`, one for
    each column, it is multiplied by them.
    """

    codes: Tensor  # int8
    steps: Tensor  # float32, exact in bfloat16
    offsets: Tensor | None = None
    scales: Tensor | None = None
    kind = "codes"

    def arrays(self) -> Arrays:
        arrays = {"codes": self.codes.to(torch.int8).numpy(), "steps": bf16_bits(self.steps)}
        if self.offsets is not None:
            arrays["offsets"] = bf16_bits(self.offsets)
        if self.scales is not None:
            arrays["scales"] = bf16_bits(self.scales)
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Codes:
        named = {name: from_bf16_bits(arrays[name]) for name in arrays if name != "codes"}
        return Codes(torch.from_numpy(arrays["codes"].copy()), **named)

    @staticmethod
    def of(rounded: Rounded) -> Codes:
        """Take over what the trainer's quantiser made of a matrix."""
        return Codes(rounded.values.to(torch.int8), rounded.steps)

    def weight(self) -> Tensor:
        columns = self.codes.size(1)
        weight = self.codes.float() * spread(self.steps, columns)
        if self.offsets is not None:
            weight = weight + spread(self.offsets, columns)
        return weight if self.scales is None else weight * self.scales


@dataclass(frozen=True)
class Lookup:
    """Indices [rows, columns] into tables of values, float16, one for each band of rows.

    With `scales`, bfloat16 for each row and group of columns, the value is multiplied by one.
    """

    indices: Tensor  # uint8
    tables: Tensor  # float16 [bands, values]
    scales: Tensor | None = None
    kind = "lookup"

    def arrays(self) -> Arrays:
        arrays = {"indices": self.indices.numpy(), "tables": self.tables.numpy()}
        return arrays if self.scales is None else arrays | {"scales": bf16_bits(self.scales)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Lookup:
        inside(arrays["indices"], arrays["tables"].shape[1], "index")
        indices, tables = (torch.from_numpy(arrays[n].copy()) for n in ("indices", "tables"))
        scales = from_bf16_bits(arrays["scales"]) if "scales" in arrays else None
        return Lookup(indices, tables, scales)

    def weight(self) -> Tensor:
        rows, columns = self.indices.shape
        band = torch.arange(rows) // -(-rows // len(self.tables))
        weight = self.tables.float()[band[:, None], self.indices.long()]
        return weight if self.scales is None else weight * spread(self.scales, columns)


@dataclass(frozen=True)
class Repaired:
    """A stored matrix and a product of two stored factors that is added to it."""

    base: Codes
    left: Codes  # [rows, rank]
    right: Codes  # [rank, columns]
    kind = "repaired"

    def arrays(self) -> Arrays:
        parts = {"base": self.base, "left": self.left, "right": self.right}
        return {f"{p}.{n}": a for p, codes in parts.items() for n, a in codes.arrays().items()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> Repaired:
        def part(name: str) -> Codes:
            own = {n.split(".", 1)[1]: a for n, a in arrays.items() if n.startswith(f"{name}.")}
            return Codes.from_arrays(own)

        return Repaired(part("base"), part("left"), part("right"))

    def weight(self) -> Tensor:
        return self.base.weight() + self.left.weight() @ self.right.weight()


@dataclass(frozen=True)
class InputStep:
    """A stored matrix, and the step by which the inputs of its layer are rounded to int8."""

    base: Codes
    step: Tensor  # float32 [1]
    kind = "input step"

    def arrays(self) -> Arrays:
        return {**self.base.arrays(), "input_step": self.step.numpy()}

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray]) -> InputStep:
        own = {n: a for n, a in arrays.items() if n != "input_step"}
        return InputStep(Codes.from_arrays(own), torch.from_numpy(arrays["input_step"].copy()))

    def weight(self) -> Tensor:
        return self.base.weight()


KINDS = {kind.kind: kind for kind in (Floats, Codes, Lookup, Repaired, InputStep)}
