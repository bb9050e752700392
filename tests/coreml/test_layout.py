"""Every tensor that a shard reads exists when it runs, wherever the chain is cut."""

import math

from hypothesis import given
from hypothesis import strategies as st

from fairway.coreml import layout
from fairway.coreml.layout import (
    SPARE,
    CacheAxis,
    Dims,
    Interface,
    T,
    call_sizes,
    concrete_shape,
    even_cuts,
    skip_source,
)


def dims(passes: int, parted: tuple[bool, ...] = (), slots: int = 8) -> Dims:
    return Dims(32, 4, 2, 8, 4, 97, parted or (False,) * passes, slots)


@given(st.integers(1, 14))
def test_skip_sources_are_those_of_the_model(passes):
    """The first half of the passes feeds the second in reverse: GPT.from_embedded uses a stack."""
    stack = []
    for nth in range(passes):
        wanted = stack.pop() if nth >= passes // 2 and stack else None
        assert skip_source(nth, passes) == wanted
        if nth < passes // 2:
            stack.append(nth + 1)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.data())
def test_wherever_a_chain_is_cut_each_shard_finds_its_inputs(parted, data):
    d = dims(len(parted), tuple(parted))
    cuts = [
        0,
        *sorted(
            data.draw(st.sets(st.integers(1, d.passes - 1)) if d.passes > 1 else st.just(set()))
        ),
        d.passes,
    ]
    split = even_cuts(97, data.draw(st.integers(1, 5)))
    have = {"x0", "cos", "sin", "mask"} | {f"{c}{n}" for n in range(d.passes) for c in "kv"}
    chain = [layout.layers_interface(a, b, d) for a, b in zip(cuts, cuts[1:], strict=False)]
    chain += [layout.head_interface(n, split, d) for n in range(len(split) - 1)]
    for interface in chain:
        assert interface.inputs.keys() <= have
        assert not interface.outputs.keys() & (have | interface.inputs.keys()), (
            "a name is computed twice"
        )
        have |= interface.outputs.keys()
    assert {f"{c}{n}_new" for n in range(d.passes) for c in "kv"} <= have
    heads = chain[len(cuts) - 1 :]
    assert sum(interface.outputs[f"logits{n}"][1] for n, interface in enumerate(heads)) == 97


@given(st.integers(1, 9), st.integers(1, 2), st.data())
def test_states_take_the_place_of_keys_and_values(passes, states, data):
    d = dims(passes)
    first = data.draw(st.integers(0, passes - 1))
    end = data.draw(st.integers(first + 1, passes))
    without, with_ = (layout.layers_interface(first, end, d, n) for n in (0, states))
    assert len(with_.states) == states and not without.states
    assert not any(name[0] in "kv" for name in (*with_.inputs, *with_.outputs))
    size = sum(math.prod(shape) for shape in with_.states.values())
    assert size == 2 * (end - first) * 8 * 2 * (8 + SPARE)
    streams = {n: shape for n, shape in without.outputs.items() if n[0] not in "kv"}
    assert with_.outputs == streams


def test_bytes_of_a_call():
    one = Interface({"a": (1, 3, 1, T), "b": (2, CacheAxis(4))}, {"c": (T,)}, {"d": (99,)})
    assert layout.call_bytes({"x": one, "y": one}, 2, 2) == 2 * 2 * (6 + 12 + 2)


def test_shapes_in_a_call():
    assert concrete_shape((1, 4, T, CacheAxis(8)), 3) == (1, 4, 3, 11)
    interface = layout.layers_interface(1, 2, dims(4))
    assert list(interface.inputs) == ["x1", "x0", "cos", "sin", "mask", "k1", "v1"]
    assert list(interface.outputs) == ["x2", "k1_new", "v1_new"]
    assert concrete_shape(interface.inputs["k1"], 2) == (1, 8, 2, 8)
    assert concrete_shape(interface.outputs["k1_new"], 2) == (1, 8, 2, 2)


def test_parts_are_even_and_each_kind_of_shapes_has_its_sizes():
    assert even_cuts(7, 2) == [0, 4, 7] and even_cuts(4, 4) == [0, 1, 2, 3, 4]
    assert [call_sizes(name, 4) for name in layout.SHAPES] == [[4], [1, 2, 3, 4], [1, 2, 4], [1, 4]]
    assert [call_sizes(name, 1) for name in layout.SHAPES] == [[1], [1], [1], [1]]
