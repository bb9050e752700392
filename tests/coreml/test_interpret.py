"""The interpreter equals PyTorch, checks every declaration, and names what it cannot run."""

import shutil

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from fairway.coreml import graph, layout
from fairway.coreml.engine import ShardChain, interpreter_runner
from fairway.coreml.export import ExportOptions, ExportSource, export_shards
from fairway.coreml.graph import host_tables
from fairway.coreml.interpret import (
    OPERATIONS,
    InterpretedFunction,
    InterpretError,
    blockwise_shift_scale,
    interpret,
    lut_to_dense,
    output_elements,
)
from fairway.coreml.mlpackage import (
    FEATURE_DTYPES,
    MODEL,
    NUMBER_TYPES,
    PackageError,
    TensorType,
    package_functions,
    read_package,
)
from fairway.coreml.tools import import_coremltools
from fairway.coreml.wire import read_message
from train_gpt import GPT, Artifact

apple = pytest.mark.apple
rng = np.random.default_rng(0)
X = rng.standard_normal((1, 6, 2, 5))


def run(name: str, **operands) -> np.ndarray:
    return OPERATIONS[name](operands)


# ---- Operations, against PyTorch -----------------------------------------------------------------
@pytest.mark.parametrize(
    "name, options, torch_op",
    [
        ("tanh", {}, torch.tanh),
        ("sigmoid", {}, torch.sigmoid),
        ("relu", {}, F.relu),
        ("abs", {}, torch.abs),
        ("exp", {}, torch.exp),
        ("square", {}, torch.square),
        ("leaky_relu", dict(alpha=0.3), lambda x: F.leaky_relu(x, 0.3)),
        ("softmax", dict(axis=-1), lambda x: x.softmax(-1)),
        ("softmax", dict(axis=1), lambda x: x.softmax(1)),
        ("transpose", dict(perm=np.array([0, 3, 1, 2])), lambda x: x.permute(0, 3, 1, 2)),
        (
            "reduce_mean",
            dict(axes=np.array([1]), keep_dims=True),
            lambda x: x.mean(1, keepdim=True),
        ),
        ("reduce_sum", dict(axes=np.array([2, 3]), keep_dims=False), lambda x: x.sum((2, 3))),
        (
            "reduce_max",
            dict(axes=np.array([-1]), keep_dims=True),
            lambda x: x.amax(-1, keepdim=True),
        ),
        ("expand_dims", dict(axes=np.array([0])), lambda x: x[None]),
        ("squeeze", dict(axes=np.array([0])), lambda x: x[0]),
        (
            "slice_by_index",
            dict(
                begin=np.array([0, 1, 0, 4]),
                end=np.array([0, 5, 2, 1]),
                stride=np.array([1, 2, 1, 1]),
                begin_mask=np.array([True, False, False, True]),
                end_mask=np.array([True, False, True, True]),
            ),
            lambda x: x[:, 1:5:2],
        ),
    ],
)
def test_operations_of_one_tensor_equal_torch(name, options, torch_op):
    np.testing.assert_allclose(
        run(name, x=X, **options), torch_op(torch.from_numpy(X)).numpy(), rtol=1e-12
    )


def test_operations_of_two_tensors_equal_torch():
    a, b = rng.standard_normal((1, 3, 4, 6)), rng.standard_normal((1, 1, 6, 5))
    ta, tb = torch.from_numpy(a), torch.from_numpy(b)
    np.testing.assert_allclose(run("matmul", x=a, y=b), (ta @ tb).numpy(), rtol=1e-12)
    np.testing.assert_allclose(
        run("matmul", x=a, y=b.swapaxes(2, 3), transpose_y=True), (ta @ tb).numpy(), rtol=1e-12
    )
    np.testing.assert_allclose(
        run("matmul", x=a.swapaxes(2, 3), y=b, transpose_x=True), (ta @ tb).numpy(), rtol=1e-12
    )
    weight = rng.standard_normal((7, 6, 1, 1))
    plain = dict(
        pad_type="valid",
        groups=1,
        strides=np.array([1, 1]),
        dilations=np.array([1, 1]),
        pad=np.zeros(4, int),
    )
    np.testing.assert_allclose(
        run("conv", x=X, weight=weight, **plain),
        F.conv2d(torch.from_numpy(X), torch.from_numpy(weight)).numpy(),
        rtol=1e-12,
    )
    for changed in (
        dict(groups=2),
        dict(strides=np.array([2, 1])),
        dict(pad_type="same"),
        dict(pad=np.ones(4, int)),
    ):
        with pytest.raises(InterpretError, match="not 1x1"):
            run("conv", x=X, weight=weight, **plain | changed)


def test_batch_norm_split_and_concat_equal_torch():
    mean, variance, gamma, beta = (rng.random(6) for _ in range(4))
    wanted = F.batch_norm(*map(torch.from_numpy, (X, mean, variance, gamma, beta)), eps=1e-3)
    found = run(
        "batch_norm", x=X, mean=mean, variance=variance, gamma=gamma, beta=beta, epsilon=1e-3
    )
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-12)
    parts = run("split", x=X, axis=1, split_sizes=np.array([1, 2, 3]))
    assert [p.shape[1] for p in parts] == [1, 2, 3] and len(
        run("split", x=X, axis=1, num_splits=3)
    ) == 3
    np.testing.assert_array_equal(run("concat", values=parts, axis=1), X)
    with pytest.raises(InterpretError, match="a split of 6 into"):
        run("split", x=X, axis=1, split_sizes=np.array([1, 2]))


def test_compressed_weights_unpack_as_computed_by_hand():
    data, scale = (
        np.array([[1, -2, 3, 4], [5, 6, 7, -8]], np.int8),
        np.array([[1.0, 2.0], [4.0, 8.0]]),
    )
    assert blockwise_shift_scale(dict(data=data, scale=scale)).tolist() == [
        [1, -2, 6, 8],
        [20, 24, 56, -64],
    ]
    offset = np.array([[1, 0], [0, 1]], np.int8)
    assert blockwise_shift_scale(dict(data=data, scale=scale, offset=offset)).tolist() == [
        [0, -3, 6, 8],
        [20, 24, 48, -72],
    ]
    lut, indices = (
        np.array([[[[1.0], [2.0]]], [[[3.0], [4.0]]]]),
        np.array([[0, 1], [1, 0]], np.uint8),
    )
    assert lut_to_dense(dict(lut=lut, indices=indices)).tolist() == [[1, 2], [4, 3]]
    with pytest.raises(InterpretError, match="a palette"):
        lut_to_dense(dict(lut=lut, indices=indices + 1))
    with pytest.raises(InterpretError, match="blocks of"):
        blockwise_shift_scale(dict(data=data, scale=np.ones((2, 3))))


# ---- Whole packages ------------------------------------------------------------------------------
def inputs_for(
    program: InterpretedFunction, interface: layout.Interface, tokens: int
) -> dict[str, np.ndarray]:
    """Return random inputs of a call of `tokens` tokens."""
    draw = np.random.default_rng(1)
    return {
        name: draw.standard_normal(layout.concrete_shape(shape, tokens)).astype(
            FEATURE_DTYPES[program.inputs[name].number]
        )
        for name, shape in interface.inputs.items()
    }


def zeros_for(program: InterpretedFunction) -> dict[str, np.ndarray]:
    """Return fp32 zeros for each input of a program with fixed shapes."""
    return {
        name: np.zeros([high for _, high in feature.shapes[0]], np.float32)
        for name, feature in program.inputs.items()
    }


@apple
@pytest.mark.parametrize("precision, far", [("fp32", 2e-5), ("fp16", 0.02)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_saved_shard_equals_its_graph(exported, precision, far, tokens):
    folder, model = exported(shapes="multifunction", precision=precision), exported.source.model
    dims = graph.model_dims(model, 32)
    for name, shard in graph.build_shards(model, dims, [0, 2], [0, dims.vocab]).items():
        program = interpret(folder / f"{name}.mlpackage", f"t{tokens}")
        given = inputs_for(program, shard.interface, tokens)
        with torch.no_grad():
            wanted = shard(*(torch.from_numpy(given[n]).float() for n in shard.interface.inputs))
        found = program(given)
        for output, tensor in zip(
            found, wanted if isinstance(wanted, tuple) else (wanted,), strict=True
        ):
            assert found[output].dtype == FEATURE_DTYPES[precision]
            assert np.abs(found[output].astype(float) - tensor.numpy()).max() < far * max(
                1, tensor.abs().max().item()
            )


@apple
def test_an_fp16_program_run_in_fp32_is_nearer(exported):
    folder = exported(shapes="multifunction", precision="fp16")
    model, errors = exported.source.model, []
    shard = graph.build_shards(
        model, graph.model_dims(model, 32), [0, 2], [0, model.cfg.vocab_size]
    )["layers0"]
    for precision in ("declared", "fp32"):
        program = interpret(folder / "layers0.mlpackage", "t4", precision)
        given = inputs_for(program, shard.interface, 4)
        with torch.no_grad():
            wanted = shard(*(torch.from_numpy(given[n]).float() for n in shard.interface.inputs))[
                0
            ].numpy()
        errors.append(np.abs(program(given)["x2"].astype(np.float64) - wanted).mean())
    assert errors[1] < errors[0]


@apple
def test_exported_weights_match_the_golden_file(tmp_path):
    """The golden logits of PyTorch and MLX come from fp32 shards too, in calls of 1 to 4 tokens."""
    golden = oracle.read()
    model = GPT(golden.cfg).eval()
    model.load_state_dict({n: torch.from_numpy(w) for n, w in golden.weights.items()})
    source = ExportSource(
        oracle.PATH,
        Artifact(golden.cfg, {}, b"", {"tokenizer_sha256": ""}),
        model,
        host_tables(model),
    )
    export_shards(
        source,
        ExportOptions(precision="fp32", shapes="range", chunks=2),
        tmp_path / "s",
        np.zeros(0, int),
        print,
    )
    chain, (inputs, _) = ShardChain(tmp_path / "s", interpreter_runner()), golden.batch(0)
    for row, wanted in zip(inputs[:3].tolist(), golden.logits, strict=False):
        stream, at, out = chain.new_cache(), 0, []
        for step in (1, 4, 2, 3, 4, 2):
            out.append(chain(stream, row[at : at + step]))
            at += step
        assert np.abs(np.concatenate(out) - wanted).max() < oracle.TOLERANCES["logits"]


# ---- What is refused -----------------------------------------------------------------------------
@pytest.fixture
def program(exported) -> tuple[InterpretedFunction, dict]:
    folder, model = exported(shapes="multifunction", precision="fp16"), exported.source.model
    interface = layout.layers_interface(0, 2, graph.model_dims(model, 32))
    made = interpret(folder / "layers0.mlpackage", "t4")
    return made, inputs_for(made, interface, 4)


@apple
def test_a_call_must_match_the_declaration(program):
    call, given = program
    with pytest.raises(
        InterpretError,
        match=r"input mask is float16 of .*, 35\]; it must be fp16 of \[1, 1, 4, 36\]",
    ):
        call(given | dict(mask=given["mask"][..., :-1]))
    with pytest.raises(InterpretError, match=r"input x0 is float32 of .* it must be fp16"):
        call(given | dict(x0=given["x0"].astype(np.float32)))
    with pytest.raises(InterpretError, match=r"input k0 is float16 of \[1, 8, 2, 31\]"):
        call(given | dict(k0=given["k0"][..., 1:]))
    with pytest.raises(InterpretError, match="inputs mask are missing or unknown"):
        call({n: v for n, v in given.items() if n != "mask"})
    with pytest.raises(InterpretError, match="has no function 't3'; it has t1, t4"):
        interpret(call.path, "t3")


@apple
def test_an_overflow_names_its_operation(program):
    call, given = program
    with pytest.raises(
        InterpretError, match="overflows fp16 in .*; export with other training text, or in fp32"
    ):
        call(given | dict(x0=given["x0"] * np.float16(20000)))


@pytest.fixture
def spoil(exported, tmp_path):
    """Return `spoil(change)`, which saves a package whose program `change(operations)` changed.

    `operations` maps a type to the operations of that type, as coremltools parses them.
    """

    def make(change):
        path = tmp_path / "p.mlpackage"
        shutil.copytree(exported(shapes="fixed", precision="fp32") / "layers0.mlpackage", path)
        import_coremltools()
        from coremltools.proto import Model_pb2

        spec = Model_pb2.Model()
        spec.ParseFromString((path / MODEL).read_bytes())
        function = spec.mlProgram.functions["main"]
        operations = {}
        for op in function.block_specializations[function.opset].operations:
            operations.setdefault(op.type, []).append(op)
        change(operations)
        (path / MODEL).write_bytes(spec.SerializeToString())
        return path

    return make


@apple
def test_an_unknown_operation_is_named(spoil):
    path = spoil(lambda operations: setattr(operations["relu"][0], "type", "scaled_tanh"))
    with pytest.raises(
        InterpretError, match="operation 'scaled_tanh' is not known here; its result is 'relu"
    ):
        interpret(path)


@apple
def test_declared_types_and_shapes_are_checked(spoil):
    path = spoil(
        lambda ops: setattr(
            ops["conv"][0].outputs[0].type.tensorType.dimensions[1].constant, "size", 31
        )
    )
    program = interpret(path)
    given = zeros_for(program)
    with pytest.raises(
        InterpretError,
        match=r"the result .* of conv is \[1, 32, 1, 4\]; it is declared fp32\[1, 31, 1, 4\]",
    ):
        program(given)


@apple
def test_a_type_that_changes_without_a_cast_is_refused(spoil):
    path = spoil(
        lambda operations: setattr(operations["add"][0].outputs[0].type.tensorType, "dataType", 10)
    )
    with pytest.raises(InterpretError, match="add of fp32 is declared fp16"):
        interpret(path)


def spoil_attribute(operation: str, name: str, value: int):
    """Return a change that sets a constant operand of an operation to another number."""

    def change(ops):
        made = {op.outputs[0].name: op for op in ops["const"]}
        held = (
            made[ops[operation][0].inputs[name].arguments[0].name]
            .attributes["val"]
            .immediateValue.tensor
        )
        held.ints.values[:] = [value] * len(held.ints.values)

    return change


@apple
@pytest.mark.parametrize(
    "change",
    [
        lambda ops: setattr(ops["relu"][0], "type", "split"),
        lambda ops: setattr(ops["relu"][0], "type", "concat"),
        lambda ops: setattr(ops["relu"][0], "type", "constexpr_lut_to_dense"),
        lambda ops: setattr(ops["softmax"][0], "type", "conv"),
        lambda ops: setattr(ops["mul"][0], "type", "reshape"),
        lambda ops: setattr(ops["const"][0].outputs[0], "name", "x0"),
        lambda ops: setattr(ops["conv"][0].outputs[0], "name", "mask"),
        lambda ops: ops["add"][0].ClearField("inputs"),
        spoil_attribute("softmax", "axis", 99),
        spoil_attribute("split", "axis", -9),
        spoil_attribute("split", "split_sizes", 0),
        spoil_attribute("concat", "axis", 1 << 30),
        spoil_attribute("transpose", "perm", 5),
    ],
)
def test_a_malformed_program_is_one_error(spoil, change):
    path = spoil(change)
    with pytest.raises(PackageError) as e:
        program = interpret(path)
        program(zeros_for(program))
    assert "\n" not in str(e.value)


@apple
def test_memory_is_bounded(exported, monkeypatch):
    path = exported(shapes="fixed", precision="fp32") / "layers0.mlpackage"
    program = interpret(path)
    given = zeros_for(program)
    monkeypatch.setattr("fairway.coreml.interpret.MAX_NUMBERS", 4000)
    with pytest.raises(InterpretError, match="cannot compute .* .more than 4000 numbers at a time"):
        program(given)
    with pytest.raises(InterpretError, match="more than 4000 numbers in constants"):
        interpret(path)


@pytest.mark.parametrize(
    "operation, operands, most",
    [
        ("add", dict(x=np.zeros((30_000, 1)), y=np.zeros((1, 30_000))), 900_000_000),
        ("matmul", dict(x=np.zeros((2, 1, 3, 4)), y=np.zeros((1, 5, 4, 6))), 10 * 4 * 6),
        ("conv", dict(x=np.zeros((1, 4, 1, 3)), weight=np.zeros((7, 4, 1, 1))), 21),
        ("concat", dict(values=[np.zeros(5), np.zeros(6)]), 11),
        ("tanh", dict(x=np.zeros((2, 3))), 6),
    ],
)
def test_the_size_of_a_result_is_known_before_it_is_computed(operation, operands, most):
    assert output_elements(operation, operands) == most


def test_a_cast_to_integers_rounds_towards_zero():
    program = InterpretedFunction.__new__(InterpretedFunction)
    program.precision, program.path = "declared", ""
    found = program.round_result(
        np.array([1.9, -1.9]), "cast", "x", TensorType(NUMBER_TYPES[23], (2,))
    )
    assert found.tolist() == [1, -1] and found.dtype == np.int32


@apple
def test_a_tensor_that_nothing_computes_is_refused(spoil):
    path = spoil(lambda ops: setattr(ops["add"][0].inputs["x"].arguments[0], "name", "ghost"))
    with pytest.raises(InterpretError, match="'ghost' is used before it is computed"):
        interpret(path)


# ---- States --------------------------------------------------------------------------------------
@pytest.fixture
def stateful(exported):
    """Return a function that keeps state, and inputs that write one token to place 5."""
    package = read_package(exported(shapes="fixed", states=1) / "layers0.mlpackage")
    function, numbers = InterpretedFunction(package), np.random.default_rng(1)
    inputs = {}
    for name, feature in function.inputs.items():
        shape = [high for _, high in feature.shapes[0]]
        inputs[name] = numbers.standard_normal(shape).astype(np.float16)
    inputs["mask"][:], inputs["write"][:] = 0, 0
    inputs["write"][0, 0, 0, 5] = 1
    return function, inputs


@apple
def test_a_state_changes_where_a_token_is_written_and_nowhere_else(stateful):
    function, inputs = stateful
    state = function.new_state()
    function(inputs, state)
    (kept,) = state.values()
    assert kept.dtype == np.float16 and (kept[..., 5] != 0).any(axis=(1, 2)).all()
    before = kept.copy()
    inputs["write"][0, 0, 0] = 0
    inputs["write"][0, 0, 0, 6] = 1
    function(inputs, state)
    assert np.array_equal(np.delete(state["kv"], 6, 3), np.delete(before, 6, 3))


@apple
def test_a_call_needs_its_states_and_a_failed_one_leaves_them(stateful):
    function, inputs = stateful
    with pytest.raises(InterpretError, match="states kv are missing or unknown"):
        function(inputs)
    with pytest.raises(InterpretError, match="state kv must be fp16"):
        function(inputs, {"kv": np.zeros(3, np.float16)})
    state = function.new_state()
    inputs["x0"][:] = 6e4
    with pytest.raises(InterpretError, match="overflows"):
        function(inputs, state)
    assert not state["kv"].any()


@apple
@pytest.mark.parametrize(
    "changed, message",
    [
        (
            lambda op: op["inputs"]["input"]["bindings"][0].update(name="x0"),
            "write_state.* takes .*x0.*take a state, and no other",
        ),
        (lambda op: op.update(type="identity"), "identity.* takes .*kv"),
        (lambda op: op["inputs"].clear(), "write_state.* takes ''; read_state"),
    ],
)
def test_states_are_only_read_and_written(stateful, exported, changed, message):
    package = read_package(exported(shapes="fixed", states=1) / "layers0.mlpackage")
    operations = package.functions["main"].body["operations"]
    changed(next(op for op in operations if op["type"] == "write_state"))
    with pytest.raises(InterpretError, match=message):
        InterpretedFunction(package)


@apple
def test_a_described_state_is_the_one_that_the_program_has(exported):
    model = read_message(
        (exported(shapes="fixed", states=1) / "layers0.mlpackage" / MODEL).read_bytes()
    )
    (described,) = model["description"]["states"]
    described["type"]["state"]["array"]["shape"][0] += 1
    with pytest.raises(PackageError, match="describes other states"):
        package_functions(model)
