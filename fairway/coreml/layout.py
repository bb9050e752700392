"""Names and shapes of the inputs and outputs of every shard, derived from a few numbers.

A tensor has one name in the whole chain of shards. A shard reads the names that it needs, and its
outputs are available to all shards after it. Positions are the last axis, because the Neural
Engine pads the last axis to 64 bytes:

    x0            [1, width, 1, T]      embeddings; x7 is the residual stream after seven passes,
                                        lane7 its second lane
    cos, sin      [1, rotary, 1, T]     RoPE at each position
    mask          [1, 1, T, slots + T]  added to attention scores: 0, or MASKED to hide a key
    k3, v3        [1, head, kv, slots]  keys and values of the fourth pass, stored by the runtime
    k3_new, ...   [1, head, kv, T]      keys and values of this call's tokens
    logits0, ...  [1, part, 1, T]       logits of one part of the vocabulary

A shard that keeps state holds the keys and values of its passes itself, in one tensor or in two:

    mask          [1, 1, T, places]     over the places of the state, those of this call included
    write         [1, 1, T, places]     1 where a token of the call goes, 0 elsewhere
    kv            [2 n, head, kv, places]  keys, values of its first pass, of its second, ...
    keys, values  [n, head, kv, places]    instead of kv, if there are two states
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

MASKED = -1e4  # far below any attention score, and finite in fp16
MAX_TOKENS = 4  # in one call
SHAPES = ("fixed", "range", "enumerated", "multifunction")
STATES = (0, 1, 2)  # of a shard of layers; CoreML-LLM saw three fail on a phone
SPARE = 64  # places of a state beyond the slots, so that rejected tokens overwrite nothing needed
T = "T"  # an axis whose length is the number of tokens in the call


class CacheAxis(NamedTuple):
    """An axis of length slots + T: the cached keys, then those of the call."""

    slots: int


Shape = tuple[int | str | CacheAxis, ...]


class Dims(NamedTuple):
    """The numbers of a model from which all shapes follow."""

    width: int
    heads: int
    kv_heads: int
    head: int  # channels of one head
    rotary: int  # pairs of channels that RoPE rotates
    vocab: int
    parted: tuple[bool, ...]  # for each pass: does the stream have two lanes after it?
    slots: int  # tokens in the cache: a token sees this many, itself included

    @property
    def passes(self) -> int:
        return len(self.parted)


class Interface(NamedTuple):
    """Inputs, outputs and states of one shard, in order."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    states: dict[str, Shape]


def concrete_shape(shape: Shape, tokens: int) -> tuple[int, ...]:
    """Return the shape in a call of `tokens` tokens."""
    return tuple(
        tokens if axis == T else axis.slots + tokens if isinstance(axis, CacheAxis) else axis
        for axis in shape
    )


def call_bytes(interfaces: Mapping[str, Interface], tokens: int, number: int) -> int:
    """Return the bytes that go into and out of all shards in a call, `number` bytes a number."""
    tensors = [
        shape
        for part in interfaces.values()
        for shape in (*part.inputs.values(), *part.outputs.values())
    ]
    return number * sum(math.prod(concrete_shape(shape, tokens)) for shape in tensors)


def skip_source(nth: int, passes: int) -> int | None:
    """Return n if pass `nth` adds the stream xn as a skip connection, else None.

    With 4 passes, pass 2 adds x2 and pass 3 adds x1: the second half reads the first backwards.
    """
    back = nth - passes // 2
    return passes // 2 - back if 0 <= back < passes // 2 else None


def lane_names(nth: int, dims: Dims) -> list[str]:
    """Return the name of the second lane after `nth` passes, or an empty list."""
    return [f"lane{nth}"] if nth and dims.parted[nth - 1] else []


def state_shapes(passes: int, dims: Dims, states: int) -> dict[str, Shape]:
    """Return the states of a shard of so many passes."""
    names = ((), ("kv",), ("keys", "values"))[states]
    shape = 2 * passes // max(states, 1), dims.head, dims.kv_heads, dims.slots + SPARE
    return dict.fromkeys(names, shape)


def layers_interface(first: int, end: int, dims: Dims, states: int = 0) -> Interface:
    """Return the interface of a shard of passes `first` to `end` - 1 with so many states."""
    skips = {nth: skip_source(nth, dims.passes) for nth in range(dims.passes)}
    needed = sorted({s for nth in range(first, end) if (s := skips[nth]) and s < first})
    later = sorted({s for nth in range(end, dims.passes) if (s := skips[nth]) and first < s < end})
    stream, rope = (1, dims.width, 1, T), (1, dims.rotary, 1, T)
    names = [f"x{first}", *["x0"][: first > 0], *lane_names(first, dims)]
    inputs: dict[str, Shape] = dict.fromkeys([*names, *(f"x{s}" for s in needed)], stream)
    inputs |= {"cos": rope, "sin": rope}
    outputs: dict[str, Shape] = dict.fromkeys(
        [f"x{end}", *lane_names(end, dims), *(f"x{s}" for s in later)], stream
    )
    if states:
        inputs |= dict.fromkeys(["mask", "write"], (1, 1, T, dims.slots + SPARE))
        return Interface(inputs, outputs, state_shapes(end - first, dims, states))
    inputs["mask"] = (1, 1, T, CacheAxis(dims.slots))
    for nth in range(first, end):
        for name in (f"k{nth}", f"v{nth}"):
            inputs[name] = (1, dims.head, dims.kv_heads, dims.slots)
            outputs[f"{name}_new"] = (1, dims.head, dims.kv_heads, T)
    return Interface(inputs, outputs, {})


def head_interface(nth: int, split: Sequence[int], dims: Dims) -> Interface:
    """Return the interface of the shard that computes logits of tokens split[nth]:split[nth + 1].

    `split` holds the first token of each part and the size of the vocabulary.
    """
    names = [f"x{dims.passes}", *lane_names(dims.passes, dims)]
    return Interface(
        dict.fromkeys(names, (1, dims.width, 1, T)),
        {f"logits{nth}": (1, split[nth + 1] - split[nth], 1, T)},
        {},
    )


def even_cuts(total: int, parts: int) -> list[int]:
    """Return the start of each of `parts` nearly equal parts, and the end.

    even_cuts(7, 2) is [0, 4, 7].
    """
    return [-(-total * nth // parts) for nth in range(parts + 1)]


def call_sizes(shapes: str, tokens: int) -> list[int]:
    """Return the numbers of tokens that one call may have. A runtime pads to the next of them."""
    return {
        "fixed": [tokens],
        "range": list(range(1, tokens + 1)),
        "multifunction": sorted({1, tokens}),
        "enumerated": sorted({1, min(2, tokens), tokens}),
    }[shapes]
