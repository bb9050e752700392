"""A saved .mlpackage, run in numpy: its program and its weights, as shipped.

Every operation is computed in float64 and rounded once, to the type that the program declares ("declared"), or to fp32
("fp32": what the graph would give without fp16). That is one rounding an operation, and sums that do not depend on how
many positions a call has; a device may round more often. Every operand's type, every result's type and shape and every
input of a call are held to what is declared. An operation that is not known here is an error that names it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.coreml.mlpackage import (
    KINDS,
    LIKE,
    Package,
    PackageError,
    Type,
    constant,
    read_package,
    type_of,
)
from train_gpt import need

PRECISIONS = ("declared", "fp32")
FLOATS = (KINDS[10].name, KINDS[11].name)
MOST_HELD = 1 << 27  # numbers of all constants, and of all that a call holds at a time
BROKEN = (
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ArithmeticError,
    MemoryError,
)  # by a malformed program
ALWAYS_FP32 = ("epsilon", "alpha")  # parameters, whatever the type of the tensor
Operands = dict[str, Any]


class InterpretError(PackageError):
    """A program that cannot be run here, or a call that it does not take."""


# ==== OPERATIONS ======================================================================================================
# From operands by name to the result, or results; numbers come as float64 (or as integers, where they are).
def conv(a: Operands) -> np.ndarray:
    """1x1, which is a matrix product over axis 1."""
    weight, x = a["weight"], a["x"]
    plain = (
        weight.shape[2:] == (1, 1)
        and x.ndim == 4
        and a.get("groups", 1) == 1
        and a.get("pad_type") == "valid"
    )
    need(
        plain
        and all(np.all(a.get(n, 1) == 1) for n in ("strides", "dilations"))
        and not np.any(a.get("pad", 0)),
        "a convolution that is not 1x1",
        InterpretError,
    )
    out = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x, optimize=True)
    return out + a["bias"][None, :, None, None] if "bias" in a else out


def matmul(a: Operands) -> np.ndarray:
    x = a["x"].swapaxes(-1, -2) if a.get("transpose_x") else a["x"]
    return x @ (a["y"].swapaxes(-1, -2) if a.get("transpose_y") else a["y"])


def softmax(a: Operands) -> np.ndarray:
    e = np.exp(a["x"] - a["x"].max(axis=int(a["axis"]), keepdims=True))
    return e / e.sum(axis=int(a["axis"]), keepdims=True)


def batch_norm(a: Operands) -> np.ndarray:
    scale = a.get("gamma", 1.0) / np.sqrt(a["variance"] + a["epsilon"])
    shift = a.get("beta", 0.0) - a["mean"] * scale
    return a["x"] * scale[None, :, None, None] + shift[None, :, None, None]


def split(a: Operands) -> list[np.ndarray]:
    x, axis = a["x"], int(a["axis"])
    parts = (
        a["split_sizes"]
        if "split_sizes" in a
        else [x.shape[axis] // int(a["num_splits"])] * int(a["num_splits"])
    )
    need(
        sum(parts) == x.shape[axis],
        f"a split of {x.shape[axis]} into {list(parts)}",
        InterpretError,
    )
    return np.split(x, np.cumsum(parts)[:-1], axis=axis)


def slice_by_index(a: Operands) -> np.ndarray:
    x, none = a["x"], np.zeros(a["x"].ndim, bool)
    begin_mask, end_mask, squeeze = (
        a.get(n, none) for n in ("begin_mask", "end_mask", "squeeze_mask")
    )
    stride, index = a.get("stride", np.ones(x.ndim, np.int64)), []
    for n in range(x.ndim):
        begin, end = int(a["begin"][n]), int(a["end"][n])
        index.append(
            begin
            if squeeze[n]
            else slice(
                None if begin_mask[n] else begin, None if end_mask[n] else end, int(stride[n])
            )
        )
    return x[tuple(index)]


def leaky_relu(a: Operands) -> np.ndarray:
    return np.where(a["x"] >= 0, a["x"], a["alpha"] * a["x"])


def reduced(how: Callable) -> Callable[[Operands], np.ndarray]:
    return lambda a: how(a["x"], axis=tuple(map(int, a["axes"])), keepdims=bool(a["keep_dims"]))


OPERATIONS: dict[str, Callable[[Operands], Any]] = {
    "add": lambda a: a["x"] + a["y"],
    "sub": lambda a: a["x"] - a["y"],
    "mul": lambda a: a["x"] * a["y"],
    "real_div": lambda a: a["x"] / a["y"],
    "maximum": lambda a: np.maximum(a["x"], a["y"]),
    "minimum": lambda a: np.minimum(a["x"], a["y"]),
    "square": lambda a: np.square(a["x"]),
    "sqrt": lambda a: np.sqrt(a["x"]),
    "inverse": lambda a: 1 / (a["x"] + a["epsilon"]),
    "rsqrt": lambda a: 1 / np.sqrt(a["x"] + a["epsilon"]),
    "exp": lambda a: np.exp(a["x"]),
    "abs": lambda a: np.abs(a["x"]),
    "tanh": lambda a: np.tanh(a["x"]),
    "sigmoid": lambda a: 1 / (1 + np.exp(-a["x"])),
    "relu": lambda a: np.maximum(a["x"], 0.0),
    "leaky_relu": leaky_relu,
    "conv": conv,
    "matmul": matmul,
    "softmax": softmax,
    "batch_norm": batch_norm,
    "reduce_mean": reduced(np.mean),
    "reduce_sum": reduced(np.sum),
    "reduce_max": reduced(np.max),
    "split": split,
    "slice_by_index": slice_by_index,
    "concat": lambda a: np.concatenate(a["values"], axis=int(a["axis"])),
    "transpose": lambda a: a["x"].transpose(tuple(map(int, a["perm"]))),
    "expand_dims": lambda a: np.expand_dims(a["x"], tuple(map(int, a["axes"]))),
    "squeeze": lambda a: np.squeeze(a["x"], tuple(map(int, a["axes"])) if "axes" in a else None),
    "reshape": lambda a: a["x"].reshape(tuple(map(int, a["shape"]))),
    "identity": lambda a: a["x"],
    "cast": lambda a: a["x"],
}
ELEMENTWISE = ("add", "sub", "mul", "real_div", "maximum", "minimum")


def elements_made(operation: str, a: Operands) -> int:
    """At most, by operands' shapes alone: known before anything is computed."""
    if operation in ELEMENTWISE:
        return math.prod(np.broadcast_shapes(np.shape(a["x"]), np.shape(a["y"])))
    if operation == "matmul":
        x, y = np.shape(a["x"]), np.shape(a["y"])
        return math.prod(np.broadcast_shapes(x[:-2], y[:-2])) * max(x[-2:]) * max(y[-2:])
    if operation == "conv":
        return np.size(a["x"]) // max(np.shape(a["weight"])[1], 1) * np.shape(a["weight"])[0]
    if operation == "batch_norm":
        return np.size(a["x"]) // max(np.shape(a["x"])[1], 1) * np.size(a["mean"])
    return (
        sum(np.size(value) for value in a["values"]) if operation == "concat" else np.size(a["x"])
    )


# ==== COMPRESSED WEIGHTS ==============================================================================================
def spread(small: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of one entry a block, once for each of the block's elements."""
    fits = small.ndim == len(shape) and all(
        n and whole % n == 0 for n, whole in zip(small.shape, shape, strict=True)
    )
    need(fits, f"blocks of {small.shape} in a tensor of {shape}", InterpretError)
    for axis, (n, whole) in enumerate(zip(small.shape, shape, strict=True)):
        small = np.repeat(small, whole // n, axis=axis)
    return small


def blockwise_shift_scale(a: Operands) -> np.ndarray:
    """scale * (data - offset), each scale for a block."""
    data = a["data"].astype(np.float64)
    if "offset" in a:
        data = data - spread(a["offset"].astype(np.float64), data.shape)
    return data * spread(a["scale"].astype(np.float64), data.shape)


def lut_to_dense(a: Operands) -> np.ndarray:
    """lut[block of the element][index of the element]; one number an entry."""
    indices, lut = a["indices"], a["lut"]
    need(
        lut.ndim == indices.ndim + 2
        and lut.shape[-1] == 1
        and int(indices.max(initial=0)) < lut.shape[-2],
        f"a palette of shape {lut.shape} for indices of {indices.shape}",
        InterpretError,
    )
    blocks = np.arange(math.prod(lut.shape[:-2])).reshape(lut.shape[:-2])
    return lut.reshape(-1, lut.shape[-2])[spread(blocks, indices.shape), indices]


DECOMPRESSED: dict[str, Callable[[Operands], np.ndarray]] = {
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
}


# ==== PROGRAMS ========================================================================================================
class Step(NamedTuple):
    """One operation of a function, its constants in place."""

    operation: str
    function: Callable[[Operands], Any]
    constants: Operands
    operands: dict[
        str, list[str] | str
    ]  # by name, from what was computed; a list where it takes many
    outputs: list[tuple[str, Type]]

    @property
    def names(self) -> list[str]:
        """Of all that it takes of what was computed."""
        return [n for of in self.operands.values() for n in (of if isinstance(of, list) else [of])]


class Program:
    """A function of a package, ready to be called with arrays by name."""

    def __init__(self, package: Package, function: str = "", precision: str = "declared"):
        need(
            precision in PRECISIONS,
            f"precision {precision!r}; take one of {', '.join(PRECISIONS)}",
            InterpretError,
        )
        name = function or package.default
        need(
            name in package.functions,
            f"{package.path} has no function {name!r}; it has {', '.join(package.functions)}",
            InterpretError,
        )
        self.path, self.name, self.precision = package.path, name, precision
        self.inputs, self.outputs = package.functions[name].inputs, package.functions[name].outputs
        self.constants: dict[str, Any] = {}
        self.types: dict[str, str] = {n: feature.kind for n, feature in self.inputs.items()}
        self.held = 0  # numbers of constants
        try:
            prepared = (
                self.prepare(op, package.weights)
                for op in package.functions[name].body["operations"]
            )
            self.steps = [step for step in prepared if step]
            missing = self.outputs.keys() - self.types.keys()
            need(not missing, f"nothing computes {', '.join(missing)}", InterpretError)
            self.last_used = {n: nth for nth, step in enumerate(self.steps) for n in step.names}
        except BROKEN as e:
            raise InterpretError(
                f"{self.path}: function {name} is malformed ({type(e).__name__}: {e!s:.99})"
            ) from None
        except PackageError as e:
            raise InterpretError(f"{self.path}: {e}") from None

    def prepare(self, op: dict[str, Any], weights: np.ndarray) -> Step | None:
        """A step; nothing of what is known before any call, which is computed now."""
        kind, outputs = op["type"], [(o["name"], o["type"]) for o in op["outputs"]]
        if kind == "const":
            self.define(outputs[0][0], constant(op["attributes"]["val"], weights))
            return None
        constants, operands = {}, {}
        for name, argument in op.get("inputs", {}).items():
            values = [self.bound(binding, weights) for binding in argument["bindings"]]
            if all(known for known, _ in values):
                constants[name] = [v for _, v in values] if name == "values" else values[0][1]
            else:
                operands[name] = (
                    [b["name"] for b in argument["bindings"]] if name == "values" else values[0][1]
                )
        if kind in DECOMPRESSED:
            declared, held = (
                type_of(outputs[0][1]),
                {
                    n: v
                    for n, (_, v) in (
                        (n, self.bound(a["bindings"][0], weights)) for n, a in op["inputs"].items()
                    )
                },
            )
            value = DECOMPRESSED[kind](held).astype(declared.kind.holder)
            need(
                value.shape == declared.shape,
                f"{outputs[0][0]} unpacks to {value.shape}, not {declared}",
                InterpretError,
            )
            self.define(outputs[0][0], value)
            return None
        need(
            kind in OPERATIONS and not op.get("blocks"),
            f"operation {kind!r:.60} is not known here; it makes {outputs[0][0]!r:.60}",
            InterpretError,
        )
        typed = [(name, type_of(t)) for name, t in outputs]
        for name, _ in typed:
            self.need_new(name)
        self.check_kinds(kind, constants, operands, typed)
        self.types |= {name: t.kind.name for name, t in typed}
        return Step(
            kind, OPERATIONS[kind], {n: wide(v) for n, v in constants.items()}, operands, typed
        )

    def need_new(self, name: str) -> None:
        need(
            name not in self.types and name not in self.constants,
            f"{name!r:.60} is made twice",
            InterpretError,
        )

    def define(self, name: str, value: Any) -> None:
        self.need_new(name)
        self.held += np.size(value)
        need(self.held <= MOST_HELD, f"more than {MOST_HELD} numbers in constants", InterpretError)
        plain = (
            not isinstance(value, np.ndarray)
            or value.dtype.kind != "f"
            or bool(np.isfinite(value).all())
        )
        need(plain, f"constant {name} holds values that are no numbers", InterpretError)
        self.constants[name] = value
        if isinstance(value, np.ndarray):
            self.types[name] = next(
                (k.name for k in KINDS.values() if k.holder is value.dtype.type), ""
            )

    def bound(self, binding: dict[str, Any], weights: np.ndarray) -> tuple[bool, Any]:
        """Whether the operand is known now, and it, or the name that it will have."""
        if "value" in binding:
            return True, constant(binding["value"], weights)
        name = binding["name"]
        need(
            name in self.constants or name in self.types,
            f"{name!r:.60} is used before it is made",
            InterpretError,
        )
        return name in self.constants, self.constants.get(name, name)

    def check_kinds(
        self, kind: str, constants: Operands, operands: dict, outputs: list[tuple[str, Type]]
    ) -> None:
        """Tensors of numbers keep their type through every operation but a cast."""
        names = [
            n
            for value in operands.values()
            for n in (value if isinstance(value, list) else [value])
        ]
        found = {self.types[n] for n in names}
        found |= {
            "fp16" if v.dtype == np.float16 else "fp32"
            for n, v in constants.items()
            if n not in ALWAYS_FP32 and isinstance(v, np.ndarray) and v.dtype.kind == "f"
        }
        made = {t.kind.name for _, t in outputs}
        if kind != "cast":
            need(
                found == made and len(made) == 1,
                f"{kind} of {' and '.join(sorted(found))} is declared "
                f"{' and '.join(sorted(made))}: {outputs[0][0]}",
                InterpretError,
            )

    # ==== A CALL ======================================================================================================
    def __call__(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.check(given)
        values = {name: wide(np.asarray(given[name])) for name in self.inputs}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for nth, step in enumerate(self.steps):
                self.take(step, values)
                for name in step.names:  # what nobody reads any more
                    if self.last_used[name] == nth and name not in self.outputs:
                        values.pop(name, None)
        return {
            name: self.value(name, values).astype(LIKE[t.kind.name])
            for name, t in self.outputs.items()
        }

    def check(self, given: Mapping[str, np.ndarray]) -> None:
        odd = given.keys() ^ self.inputs.keys()
        need(
            not odd,
            f"{self.path}: inputs {', '.join(sorted(odd))} are missing or unknown",
            InterpretError,
        )
        for name, feature in self.inputs.items():
            shape, dtype = np.shape(given[name]), np.asarray(given[name]).dtype
            need(
                feature.takes(shape) and dtype == LIKE[feature.kind],
                f"{self.path}: input {name} is {dtype} of {list(shape)}; it must be {feature}",
                InterpretError,
            )

    def take(self, step: Step, values: dict[str, np.ndarray]) -> None:
        operands = {
            name: [self.value(n, values) for n in of]
            if isinstance(of, list)
            else self.value(of, values)
            for name, of in step.operands.items()
        }
        operands |= step.constants
        try:
            held = sum(v.size for v in values.values()) + elements_made(step.operation, operands)
            need(held <= MOST_HELD, f"more than {MOST_HELD} numbers at a time", ValueError)
            made = step.function(operands)
        except BROKEN as e:
            raise InterpretError(
                f"{self.path}: {step.operation} cannot make {step.outputs[0][0]!r:.60} ({e!s:.99})"
            ) from None
        made = made if isinstance(made, list) else [made]
        need(
            len(made) == len(step.outputs),
            f"{self.path}: {step.operation} makes {len(made)} tensors, not {len(step.outputs)}",
            InterpretError,
        )
        for value, (name, declared) in zip(made, step.outputs, strict=True):
            fits = len(value.shape) == len(declared.shape) and all(
                b is None or a == b for a, b in zip(value.shape, declared.shape, strict=True)
            )
            need(
                fits,
                f"{self.path}: {step.operation} makes {name} of {list(value.shape)}; it is declared {declared}",
                InterpretError,
            )
            values[name] = self.rounded(value, step, name, declared)

    def value(self, name: str, values: dict[str, np.ndarray]) -> np.ndarray:
        return values[name] if name in values else wide(self.constants[name])

    def rounded(self, value: np.ndarray, step: Step, name: str, declared: Type) -> np.ndarray:
        if declared.kind.name not in FLOATS:
            return value.astype(declared.kind.holder)  # towards zero
        as_kind = np.float32 if self.precision == "fp32" else declared.kind.holder
        value = value.astype(as_kind)
        need(
            np.isfinite(value).all(),
            f"{self.path}: {step.operation} overflows {declared.kind.name} in {name}; "
            "export with other text to measure, or in fp32",
            InterpretError,
        )
        return value.astype(np.float64)


def wide(value: Any) -> Any:
    """Numbers as they are computed with."""
    if isinstance(value, list):
        return [wide(one) for one in value]
    return (
        value.astype(np.float64)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f"
        else value
    )


def interpret(path: str | Path, function: str = "", precision: str = "declared") -> Program:
    return Program(read_package(path), function, precision)
