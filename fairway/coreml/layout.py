"""What goes into each shard of a model and what comes out of it: names and shapes, from a few numbers.

All that a chain of shards hands on has one name in all of it: a shard takes what it names from what is there, and what
it gives is there for those after it. Positions are the last axis, as the Neural Engine likes it:

    x0            [1, width, 1, T]      embeddings; x7, the stream after seven passes; lane7, its second lane
    cos, sin      [1, rotary, 1, T]     RoPE at each position
    mask          [1, 1, T, slots + T]  added to attention: 0 where a position may look, MASKED where it may not
    k3, v3        [1, head, kv, slots]  keys and values of the fourth pass, kept by the runtime in slots
    k3_new, ...   [1, head, kv, T]      those of these positions, for the runtime to keep if it wants them
    logits0, ...  [1, part, 1, T]       of a part of the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

MASKED = -1e4  # far below any score, and a number in fp16
MOST_TOKENS = 4  # of a call
SHAPES = ("fixed", "range", "enumerated", "multifunction")
T = "T"  # an axis of as many positions as a call has


class Axis(NamedTuple):
    """slots + T."""

    slots: int


Shape = tuple[int | str | Axis, ...]


class Dims(NamedTuple):
    """The numbers of a model that shapes follow from."""

    width: int
    heads: int
    kv_heads: int
    head: int  # channels of one
    rotary: int  # pairs of channels that RoPE turns
    vocab: int
    parted: tuple[bool, ...]  # after each pass: whether the stream has two lanes
    slots: int  # tokens that are kept: what a prediction looks back on, itself included

    @property
    def passes(self) -> int:
        return len(self.parted)


class Interface(NamedTuple):
    """Of one shard, in order."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]


def concrete(shape: Shape, tokens: int) -> tuple[int, ...]:
    """The shape in a call of so many tokens."""
    return tuple(
        tokens if axis == T else axis.slots + tokens if isinstance(axis, Axis) else axis
        for axis in shape
    )


def skip_of(nth: int, passes: int) -> int | None:
    """Pass `nth` adds the stream as it was after so many passes; None: it adds nothing. 4 passes: 2 adds x2, 3 x1."""
    back = nth - passes // 2
    return passes // 2 - back if 0 <= back < passes // 2 else None


def lane(nth: int, dims: Dims) -> list[str]:
    return [f"lane{nth}"] if nth and dims.parted[nth - 1] else []


def layers(first: int, end: int, dims: Dims) -> Interface:
    """Of a shard of passes first to end - 1."""
    skips = {nth: skip_of(nth, dims.passes) for nth in range(dims.passes)}
    before = sorted({s for nth in range(first, end) if (s := skips[nth]) and s < first})
    later = sorted({s for nth in range(end, dims.passes) if (s := skips[nth]) and first < s < end})
    stream, turn = (1, dims.width, 1, T), (1, dims.rotary, 1, T)
    names = [f"x{first}", *["x0"][: first > 0], *lane(first, dims), *(f"x{s}" for s in before)]
    inputs: dict[str, Shape] = dict.fromkeys(names, stream)
    inputs |= {"cos": turn, "sin": turn, "mask": (1, 1, T, Axis(dims.slots))}
    outputs: dict[str, Shape] = dict.fromkeys(
        [f"x{end}", *lane(end, dims), *(f"x{s}" for s in later)], stream
    )
    for nth in range(first, end):
        for name in (f"k{nth}", f"v{nth}"):
            inputs[name] = (1, dims.head, dims.kv_heads, dims.slots)
            outputs[f"{name}_new"] = (1, dims.head, dims.kv_heads, T)
    return Interface(inputs, outputs)


def head(nth: int, split: Sequence[int], dims: Dims) -> Interface:
    """Of the shard of the `nth` part of the vocabulary; `split`: where the parts begin, and the end."""
    names = [f"x{dims.passes}", *lane(dims.passes, dims)]
    return Interface(
        dict.fromkeys(names, (1, dims.width, 1, T)),
        {f"logits{nth}": (1, split[nth + 1] - split[nth], 1, T)},
    )


def even(total: int, parts: int) -> list[int]:
    """Where `parts` parts of about one size begin, and the end: even(7, 2) is [0, 4, 7]."""
    return [-(-total * nth // parts) for nth in range(parts + 1)]


def sizes(shapes: str, tokens: int) -> list[int]:
    """How many tokens a call may have; a runtime fills up a step to the next of them."""
    return {
        "fixed": [tokens],
        "range": list(range(1, tokens + 1)),
        "multifunction": sorted({1, tokens}),
        "enumerated": sorted({1, min(2, tokens), tokens}),
    }[shapes]
