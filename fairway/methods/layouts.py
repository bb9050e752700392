"""Other ways to lay the codes of a matrix out before a codec packs them.

Each holds the same `Codes` and ships other arrays; the weight stays what it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fairway.methods.stored import Arrays, Codes, inside


@dataclass(frozen=True)
class Layout(ABC):
    """Codes [rows, columns] and a reversible way to write them as other arrays."""

    codes: Codes
    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]] = ("packed",)  # the arrays that stand for the codes

    def arrays(self) -> Arrays:
        arrays = self.codes.arrays()
        codes = arrays.pop("codes")
        return {"shape": np.array(codes.shape, "<u2"), **self.laid_out(codes), **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Layout:
        rest, (rows, columns) = dict(arrays), (int(n) for n in arrays["shape"])
        codes = cls.read({n: rest.pop(n) for n in cls.parts}, rows, columns)
        rest.pop("shape")
        return cls(Codes.from_arrays({"codes": codes, **rest}))

    @staticmethod
    @abstractmethod
    def laid_out(codes: np.ndarray) -> Arrays:
        """Return codes as the arrays of this layout."""

    @staticmethod
    @abstractmethod
    def read(arrays: Arrays, rows: int, columns: int) -> np.ndarray:
        """Return the codes [rows, columns] of these arrays."""

    def weight(self) -> Tensor:
        return self.codes.weight()


class BaseThree(Layout):
    """Ternary codes, five a byte: 3^5 is 243."""

    kind = "base3"

    @staticmethod
    def laid_out(codes: np.ndarray) -> Arrays:
        digits = (codes.reshape(-1) + 1).astype(np.uint8)
        digits = np.pad(digits, (0, -len(digits) % 5)).reshape(-1, 5)
        return {"packed": (digits @ 3 ** np.arange(5)).astype(np.uint8)[None]}

    @staticmethod
    def read(arrays: Arrays, rows: int, columns: int) -> np.ndarray:
        inside(arrays["packed"], 243, "five ternary codes")
        digits = arrays["packed"].reshape(-1, 1) // 3 ** np.arange(5) % 3
        return (digits.reshape(-1)[: rows * columns].astype(np.int8) - 1).reshape(rows, columns)


class BitPlanes(Layout):
    """Codes in Gray code, where neighbours differ in one bit, and a plane for each bit."""

    kind = "bitplanes"
    parts = tuple(f"bit{i}" for i in range(8))

    @staticmethod
    def laid_out(codes: np.ndarray) -> Arrays:
        offset = codes.reshape(-1).astype(np.int16) + 128
        gray = (offset ^ offset >> 1).astype(np.uint8)
        return {f"bit{i}": np.packbits(gray >> i & 1)[None] for i in range(8)}

    @staticmethod
    def read(arrays: Arrays, rows: int, columns: int) -> np.ndarray:
        packed = np.concatenate([arrays[f"bit{i}"] for i in range(8)])
        bits = np.unpackbits(packed, axis=1, count=rows * columns).astype(np.int16)
        # Each bit of the number is the sum of those of its Gray code from there up.
        places = np.cumsum(bits[::-1], axis=0)[::-1] & 1
        codes = (places << np.arange(8)[:, None]).sum(axis=0) - 128
        return codes.astype(np.int8).reshape(rows, columns)


class SortedRows(Layout):
    """Rows next to those that they resemble, and the place that each had."""

    kind = "sorted"
    parts = ("sorted", "order")

    @staticmethod
    def laid_out(codes: np.ndarray) -> Arrays:
        order = by_similarity(codes)
        return {"sorted": codes[order], "order": order.astype("<u2")}

    @staticmethod
    def read(arrays: Arrays, rows: int, columns: int) -> np.ndarray:
        order, codes = arrays["order"].astype(int), np.empty((rows, columns), np.int8)
        if sorted(order) != [*range(rows)]:
            raise ValueError("the order of rows is no permutation")
        codes[order] = arrays["sorted"]
        return codes


def by_similarity(codes: np.ndarray) -> np.ndarray:
    """Return an order of rows in which each is followed by the nearest of those that are left."""
    rows = torch.from_numpy(codes.astype(np.float32))
    square = rows.square().sum(dim=1)
    # Sums of squares of small integers are exact, so that the order is the same everywhere.
    apart = square[:, None] + square[None] - 2 * rows @ rows.T
    order = [int(square.argmax())]
    for _ in range(len(codes) - 1):
        apart[:, order[-1]] = torch.inf
        order.append(int(apart[order[-1]].argmin()))
    return np.array(order)


LAYOUTS = {kind.kind: kind for kind in (BaseThree, BitPlanes, SortedRows)}
