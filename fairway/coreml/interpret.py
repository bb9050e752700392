"""Run a saved .mlpackage in numpy: its program and its weights, as they ship.

Each operation is computed in float64 and rounded once, to the type that the program declares
("declared") or to fp32 ("fp32", what the graph would give without fp16). Sums therefore do not
depend on the number of positions in a call; a device may round more often. The type of each
operand, the type and shape of each result, and each input of a call must match the declaration.
An operation that this module does not know is an error that names it. States are read and written
by operations of the program; a caller hands them in, and they change in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.coreml.mlpackage import (
    FEATURE_DTYPES,
    NUMBER_TYPES,
    Package,
    PackageError,
    TensorType,
    program_constant,
    read_package,
    tensor_type,
)

PRECISIONS = ("declared", "fp32")
FLOATS = (NUMBER_TYPES[10].name, NUMBER_TYPES[11].name)
MAX_NUMBERS = 1 << 27  # in all constants, and in all live tensors of a call
MALFORMED = (  # what a malformed program raises in numpy, or in the code that reads it
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    ArithmeticError,
    MemoryError,
)
ALWAYS_FP32 = ("epsilon", "alpha")  # parameters that do not follow the type of the tensor
Operands = dict[str, Any]


class InterpretError(PackageError):
    """A program cannot be run here, or does not accept this call."""


# ==== OPERATIONS ==================================================================================
# Each takes operands by name and returns one result, or a list of them. Real numbers come as
# float64, integers as they are.
def conv_op(a: Operands) -> np.ndarray:
    """Compute a 1x1 convolution, which is a matrix product over axis 1."""
    weight, x = a["weight"], a["x"]
    if not (
        weight.shape[2:] == (1, 1)
        and x.ndim == 4
        and a.get("groups", 1) == 1
        and a.get("pad_type") == "valid"
        and all(np.all(a.get(n, 1) == 1) for n in ("strides", "dilations"))
        and not np.any(a.get("pad", 0))
    ):
        raise InterpretError("a convolution that is not 1x1")
    out = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x, optimize=True)
    return out + a["bias"][None, :, None, None] if "bias" in a else out


def matmul_op(a: Operands) -> np.ndarray:
    """Multiply matrices, each transposed first if the operation says so."""
    x = a["x"].swapaxes(-1, -2) if a.get("transpose_x") else a["x"]
    return x @ (a["y"].swapaxes(-1, -2) if a.get("transpose_y") else a["y"])


def softmax_op(a: Operands) -> np.ndarray:
    """Compute a softmax over one axis."""
    e = np.exp(a["x"] - a["x"].max(axis=int(a["axis"]), keepdims=True))
    return e / e.sum(axis=int(a["axis"]), keepdims=True)


def batch_norm_op(a: Operands) -> np.ndarray:
    """Normalise axis 1 by the mean and variance given."""
    scale = a.get("gamma", 1.0) / np.sqrt(a["variance"] + a["epsilon"])
    shift = a.get("beta", 0.0) - a["mean"] * scale
    return a["x"] * scale[None, :, None, None] + shift[None, :, None, None]


def split_op(a: Operands) -> list[np.ndarray]:
    """Cut a tensor along one axis, into parts of given sizes or into equal parts."""
    x, axis = a["x"], int(a["axis"])
    if "split_sizes" in a:
        parts = a["split_sizes"]
    else:
        parts = [x.shape[axis] // int(a["num_splits"])] * int(a["num_splits"])
    if sum(parts) != x.shape[axis]:
        raise InterpretError(f"a split of {x.shape[axis]} into {list(parts)}")
    return np.split(x, np.cumsum(parts)[:-1], axis=axis)


def slice_op(a: Operands) -> np.ndarray:
    """Slice each axis by begin, end and stride; a mask leaves one end open or drops the axis."""
    x, unset = a["x"], np.zeros(a["x"].ndim, bool)
    open_begin, open_end, squeeze = (
        a.get(name, unset) for name in ("begin_mask", "end_mask", "squeeze_mask")
    )
    stride, index = a.get("stride", np.ones(x.ndim, np.int64)), []
    for n in range(x.ndim):
        begin = None if open_begin[n] else int(a["begin"][n])
        end = None if open_end[n] else int(a["end"][n])
        index.append(int(a["begin"][n]) if squeeze[n] else slice(begin, end, int(stride[n])))
    return x[tuple(index)]


def leaky_relu_op(a: Operands) -> np.ndarray:
    """Multiply negative numbers by alpha."""
    return np.where(a["x"] >= 0, a["x"], a["alpha"] * a["x"])


def reduce_op(reduce: Callable) -> Callable[[Operands], np.ndarray]:
    """Return the operation that applies a numpy reduction to the axes given."""
    return lambda a: reduce(a["x"], axis=tuple(map(int, a["axes"])), keepdims=bool(a["keep_dims"]))


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
    "leaky_relu": leaky_relu_op,
    "conv": conv_op,
    "matmul": matmul_op,
    "softmax": softmax_op,
    "batch_norm": batch_norm_op,
    "reduce_mean": reduce_op(np.mean),
    "reduce_sum": reduce_op(np.sum),
    "reduce_max": reduce_op(np.max),
    "split": split_op,
    "slice_by_index": slice_op,
    "concat": lambda a: np.concatenate(a["values"], axis=int(a["axis"])),
    "transpose": lambda a: a["x"].transpose(tuple(map(int, a["perm"]))),
    "expand_dims": lambda a: np.expand_dims(a["x"], tuple(map(int, a["axes"]))),
    "squeeze": lambda a: np.squeeze(a["x"], tuple(map(int, a["axes"])) if "axes" in a else None),
    "reshape": lambda a: a["x"].reshape(tuple(map(int, a["shape"]))),
    "identity": lambda a: a["x"],
    "cast": lambda a: a["x"],
}
READ, WRITE = "read_state", "write_state"
OPERATIONS[READ] = lambda a: a["input"]
OPERATIONS[WRITE] = lambda a: a["data"]
ELEMENTWISE = ("add", "sub", "mul", "real_div", "maximum", "minimum")


def output_elements(operation: str, a: Operands) -> int:
    """Return an upper bound of the numbers in the result, from the shapes of the operands alone.

    The interpreter checks it before it computes, so that a hostile program cannot fill the memory.
    """
    if operation in ELEMENTWISE:
        return math.prod(np.broadcast_shapes(np.shape(a["x"]), np.shape(a["y"])))
    if operation == "matmul":
        x, y = np.shape(a["x"]), np.shape(a["y"])
        return math.prod(np.broadcast_shapes(x[:-2], y[:-2])) * max(x[-2:]) * max(y[-2:])
    if operation == "conv":
        return np.size(a["x"]) // max(np.shape(a["weight"])[1], 1) * np.shape(a["weight"])[0]
    if operation == "batch_norm":
        return np.size(a["x"]) // max(np.shape(a["x"])[1], 1) * np.size(a["mean"])
    if operation == "concat":
        return sum(np.size(value) for value in a["values"])
    if operation in (READ, WRITE):
        return np.size(a["input"])
    return np.size(a["x"])


# ==== COMPRESSED WEIGHTS ==========================================================================
def repeat_blocks(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Expand a tensor with one entry for each block to `shape`, one entry for each element.

    repeat_blocks([[1, 2]], (2, 4)) is [[1, 1, 2, 2], [1, 1, 2, 2]].
    """
    if blocks.ndim != len(shape) or any(
        n == 0 or total % n for n, total in zip(blocks.shape, shape, strict=True)
    ):
        raise InterpretError(f"blocks of {blocks.shape} in a tensor of {shape}")
    for axis, (n, total) in enumerate(zip(blocks.shape, shape, strict=True)):
        blocks = np.repeat(blocks, total // n, axis=axis)
    return blocks


def blockwise_shift_scale(a: Operands) -> np.ndarray:
    """Return scale * (data - offset); scale and offset have one entry for each block."""
    data = a["data"].astype(np.float64)
    if "offset" in a:
        data = data - repeat_blocks(a["offset"].astype(np.float64), data.shape)
    return data * repeat_blocks(a["scale"].astype(np.float64), data.shape)


def lut_to_dense(a: Operands) -> np.ndarray:
    """Return lut[block of the element][index of the element]; each entry is one number."""
    indices, lut = a["indices"], a["lut"]
    if (
        lut.ndim != indices.ndim + 2
        or lut.shape[-1] != 1
        or int(indices.max(initial=0)) >= lut.shape[-2]
    ):
        raise InterpretError(f"a palette of shape {lut.shape} for indices of {indices.shape}")
    blocks = np.arange(math.prod(lut.shape[:-2])).reshape(lut.shape[:-2])
    return lut.reshape(-1, lut.shape[-2])[repeat_blocks(blocks, indices.shape), indices]


DECOMPRESSORS: dict[str, Callable[[Operands], np.ndarray]] = {
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_lut_to_dense": lut_to_dense,
}


# ==== PROGRAMS ====================================================================================
class Instruction(NamedTuple):
    """One operation of a function, with its constants filled in."""

    operation: str
    compute: Callable[[Operands], Any]
    constants: Operands
    operands: dict[str, list[str] | str]  # names of computed values; a list for `values` of concat
    outputs: list[tuple[str, TensorType]]

    @property
    def names(self) -> list[str]:
        """Names of the computed values that this operation reads."""
        return [
            name
            for source in self.operands.values()
            for name in (source if isinstance(source, list) else [source])
        ]


class InterpretedFunction:
    """A function of a package; call it with arrays by name."""

    def __init__(self, package: Package, function: str = "", precision: str = "declared"):
        if precision not in PRECISIONS:
            raise InterpretError(f"precision {precision!r}; take one of {', '.join(PRECISIONS)}")
        name = function or package.default
        if name not in package.functions:
            raise InterpretError(
                f"{package.path} has no function {name!r}; it has {', '.join(package.functions)}"
            )
        self.path, self.name, self.precision = package.path, name, precision
        self.inputs, self.outputs = package.functions[name].inputs, package.functions[name].outputs
        self.states = package.functions[name].states
        self.constants: dict[str, Any] = {}
        self.types: dict[str, str] = {n: feature.number for n, feature in self.inputs.items()}
        self.types |= {n: declared.number.name for n, declared in self.states.items()}
        self.constant_numbers = 0
        try:
            prepared = [
                self.prepare(op, package.weights)
                for op in package.functions[name].body["operations"]
            ]
            self.instructions = [instruction for instruction in prepared if instruction]
            if missing := self.outputs.keys() - self.types.keys():
                raise InterpretError(f"nothing computes {', '.join(missing)}")
        except MALFORMED as e:
            raise InterpretError(
                f"{self.path}: function {name} is malformed ({type(e).__name__}: {e!s:.99})"
            ) from None
        except PackageError as e:
            raise InterpretError(f"{self.path}: {e}") from None
        self.last_used = {
            n: nth for nth, instruction in enumerate(self.instructions) for n in instruction.names
        }

    def prepare(self, op: dict[str, Any], weights: np.ndarray) -> Instruction | None:
        """Return the instruction for `op`, or None if its value is a constant, which is kept."""
        kind, outputs = op["type"], [(o["name"], o["type"]) for o in op.get("outputs", [])]
        if kind == "const":
            self.define_constant(outputs[0][0], program_constant(op["attributes"]["val"], weights))
            return None
        constants, operands = {}, {}
        for name, argument in op.get("inputs", {}).items():
            values = [self.resolve(binding, weights) for binding in argument["bindings"]]
            if all(known for known, _ in values):
                constants[name] = [v for _, v in values] if name == "values" else values[0][1]
            elif name == "values":
                operands[name] = [binding["name"] for binding in argument["bindings"]]
            else:
                operands[name] = values[0][1]
        if kind in DECOMPRESSORS:
            self.decompress(kind, constants | operands, *outputs[0])
            return None
        if kind not in OPERATIONS or op.get("blocks"):
            raise InterpretError(
                f"operation {kind!r:.60} is not known here; its result is {outputs[0][0]!r:.60}"
            )
        typed = [(name, tensor_type(t)) for name, t in outputs]
        for name, _ in typed:
            self.check_new(name)
        sources = [n for s in operands.values() for n in (s if isinstance(s, list) else [s])]
        states = [n for n in sources if n in self.states]
        if states != [operands.get("input")][: kind in (READ, WRITE)] or (kind == WRITE and typed):
            raise InterpretError(
                f"{kind!r:.60} takes {', '.join(sources)!r:.60}; {READ} and {WRITE} take a state, "
                "and no other operation takes one"
            )
        if kind == WRITE:  # its result takes the place of the state
            typed = [(name, self.states[name]) for name in states]
        self.check_types(kind, constants, operands, typed)
        self.types |= {name: t.number.name for name, t in typed}
        wide = {name: as_float64(value) for name, value in constants.items()}
        return Instruction(kind, OPERATIONS[kind], wide, operands, typed)

    def decompress(self, kind: str, operands: Operands, name: str, value_type: dict) -> None:
        """Unpack compressed weights, and keep them as a constant of their declared type."""
        declared = tensor_type(value_type)
        value = DECOMPRESSORS[kind](operands).astype(declared.number.dtype)
        if value.shape != declared.shape:
            raise InterpretError(f"{name} unpacks to {value.shape}, not {declared}")
        self.define_constant(name, value)

    def check_new(self, name: str) -> None:
        if name in self.types or name in self.constants:
            raise InterpretError(f"{name!r:.60} is computed twice")

    def define_constant(self, name: str, value: Any) -> None:
        """Keep a constant; require finite numbers, and a total that fits the memory limit."""
        self.check_new(name)
        self.constant_numbers += np.size(value)
        if self.constant_numbers > MAX_NUMBERS:
            raise InterpretError(f"more than {MAX_NUMBERS} numbers in constants")
        array = isinstance(value, np.ndarray)
        if array and value.dtype.kind == "f" and not np.isfinite(value).all():
            raise InterpretError(f"constant {name} holds infinities or NaN")
        self.constants[name] = value
        if array:
            self.types[name] = next(
                (t.name for t in NUMBER_TYPES.values() if t.dtype is value.dtype.type), ""
            )

    def resolve(self, binding: dict[str, Any], weights: np.ndarray) -> tuple[bool, Any]:
        """Return (True, the value) for a constant operand, else (False, the name of the value)."""
        if "value" in binding:
            return True, program_constant(binding["value"], weights)
        name = binding["name"]
        if name not in self.constants and name not in self.types:
            raise InterpretError(f"{name!r:.60} is used before it is computed")
        return name in self.constants, self.constants.get(name, name)

    def check_types(
        self, kind: str, constants: Operands, operands: dict, outputs: list[tuple[str, TensorType]]
    ) -> None:
        """Require that every operation but a cast keeps the type of its numbers."""
        if kind == "cast":
            return
        taken = {
            self.types[name]
            for source in operands.values()
            for name in (source if isinstance(source, list) else [source])
        } | {
            "fp16" if value.dtype == np.float16 else "fp32"
            for name, value in constants.items()
            if name not in ALWAYS_FP32 and isinstance(value, np.ndarray) and value.dtype.kind == "f"
        }
        declared = {t.number.name for _, t in outputs}
        if taken != declared or len(declared) != 1:
            raise InterpretError(
                f"{kind} of {' and '.join(sorted(taken))} is declared "
                f"{' and '.join(sorted(declared))}: {outputs[0][0]}"
            )

    # ==== A CALL ==================================================================================
    def new_state(self) -> dict[str, np.ndarray]:
        """Return the states as they are before the first call."""
        return {n: np.zeros(t.shape, t.number.dtype) for n, t in self.states.items()}

    def __call__(
        self, arrays: Mapping[str, np.ndarray], state: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Run the function; arrays and results have the declared types and shapes.

        The arrays of `state` are replaced by those after the call, unless it fails.
        """
        state = state or {}
        self.check_call(arrays, state)
        values = {name: as_float64(np.asarray(arrays[name])) for name in self.inputs}
        values |= {name: as_float64(state[name]) for name in self.states}
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            for nth, instruction in enumerate(self.instructions):
                self.execute(instruction, values)
                for name in instruction.names:  # free the values that no later instruction reads
                    kept = name in self.outputs or name in self.states
                    if self.last_used[name] == nth and not kept:
                        values.pop(name, None)
        state |= {n: values[n].astype(t.number.dtype) for n, t in self.states.items()}
        return {
            name: self.lookup(name, values).astype(FEATURE_DTYPES[t.number.name])
            for name, t in self.outputs.items()
        }

    def check_call(self, arrays: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        if odd := state.keys() ^ self.states.keys():
            raise InterpretError(
                f"{self.path}: states {', '.join(sorted(odd))} are missing or unknown"
            )
        for name, declared in self.states.items():
            if (state[name].shape, state[name].dtype) != (declared.shape, declared.number.dtype):
                raise InterpretError(f"{self.path}: state {name} must be {declared}")
        if odd := arrays.keys() ^ self.inputs.keys():
            raise InterpretError(
                f"{self.path}: inputs {', '.join(sorted(odd))} are missing or unknown"
            )
        for name, feature in self.inputs.items():
            shape, dtype = np.shape(arrays[name]), np.asarray(arrays[name]).dtype
            if not feature.accepts(shape) or dtype != FEATURE_DTYPES[feature.number]:
                raise InterpretError(
                    f"{self.path}: input {name} is {dtype} of {list(shape)}; it must be {feature}"
                )

    def execute(self, instruction: Instruction, values: dict[str, np.ndarray]) -> None:
        """Compute one operation, check its results and add them to `values`."""
        operands = {
            name: [self.lookup(n, values) for n in source]
            if isinstance(source, list)
            else self.lookup(source, values)
            for name, source in instruction.operands.items()
        } | instruction.constants
        operation, outputs = instruction.operation, instruction.outputs
        try:
            live = sum(v.size for v in values.values()) + output_elements(operation, operands)
            if live > MAX_NUMBERS:
                raise ValueError(f"more than {MAX_NUMBERS} numbers at a time")
            results = instruction.compute(operands)
        except MALFORMED as e:
            raise InterpretError(
                f"{self.path}: {operation} cannot compute {outputs[0][0]!r:.60} ({e!s:.99})"
            ) from None
        results = results if isinstance(results, list) else [results]
        if len(results) != len(outputs):
            raise InterpretError(
                f"{self.path}: {operation} has {len(results)} results, not {len(outputs)}"
            )
        for value, (name, declared) in zip(results, outputs, strict=True):
            if len(value.shape) != len(declared.shape) or any(
                b not in (None, a) for a, b in zip(value.shape, declared.shape, strict=True)
            ):
                raise InterpretError(
                    f"{self.path}: the result {name} of {operation} is {list(value.shape)}; "
                    f"it is declared {declared}"
                )
            values[name] = self.round_result(value, operation, name, declared)

    def lookup(self, name: str, values: dict[str, np.ndarray]) -> np.ndarray:
        return values[name] if name in values else as_float64(self.constants[name])

    def round_result(
        self, value: np.ndarray, operation: str, name: str, declared: TensorType
    ) -> np.ndarray:
        """Round to the declared type, or to fp32 if this function runs in fp32."""
        if declared.number.name not in FLOATS:
            return value.astype(declared.number.dtype)  # towards zero
        value = value.astype(np.float32 if self.precision == "fp32" else declared.number.dtype)
        if not np.isfinite(value).all():
            raise InterpretError(
                f"{self.path}: {operation} overflows {declared.number.name} in {name}; "
                "export with other training text, or in fp32"
            )
        return value.astype(np.float64)


def as_float64(value: Any) -> Any:
    """Return real numbers as float64; other values, and integers, stay as they are."""
    if isinstance(value, list):
        return [as_float64(one) for one in value]
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(np.float64)
    return value


def interpret(
    path: str | Path, function: str = "", precision: str = "declared"
) -> InterpretedFunction:
    """Read a package and return one of its functions, ready to be called."""
    return InterpretedFunction(read_package(path), function, precision)
