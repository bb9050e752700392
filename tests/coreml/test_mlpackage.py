"""Our reader agrees with coremltools on every package, and refuses damaged ones in one line."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.coreml.export import MIN_WEIGHTS, QUANTISATIONS, compress_weights
from fairway.coreml.interpret import InterpretedFunction
from fairway.coreml.mlpackage import (
    MODEL,
    NUMBER_TYPES,
    WEIGHTS,
    PackageError,
    conv_weights,
    program_constant,
    read_package,
    unpack_numbers,
    weights_from_blob,
)
from fairway.coreml.tools import import_coremltools

pytestmark = pytest.mark.apple


@pytest.fixture
def copied(exported, tmp_path):
    """Return a copy of a package, which a test may damage."""
    shutil.copytree(
        exported(shapes="fixed", precision="fp32") / "layers0.mlpackage", tmp_path / "p.mlpackage"
    )
    return tmp_path / "p.mlpackage"


# ---- Against coremltools -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "shapes, precision",
    [("fixed", "fp16"), ("range", "fp32"), ("enumerated", "fp32"), ("multifunction", "fp16")],
)
def test_our_reader_agrees_with_coremltools(exported, shapes, precision):
    path = exported(shapes=shapes, precision=precision) / "layers0.mlpackage"
    import_coremltools()
    from coremltools.proto import Model_pb2

    theirs, ours = Model_pb2.Model(), read_package(path)
    theirs.ParseFromString((path / MODEL).read_bytes())
    assert ours.functions.keys() == theirs.mlProgram.functions.keys()
    for name, function in theirs.mlProgram.functions.items():
        block = function.block_specializations[function.opset]
        mine = ours.functions[name]
        assert list(mine.inputs) == [i.name for i in function.inputs] and list(
            mine.outputs
        ) == list(block.outputs)
        assert [
            (op["type"], [o["name"] for o in op["outputs"]]) for op in mine.body["operations"]
        ] == [(op.type, [o.name for o in op.outputs]) for op in block.operations]
        sizes = {feature.shapes for feature in mine.inputs.values()}
        assert len(sizes) > 2 and all(
            feature.number == precision for feature in mine.inputs.values()
        )


def weights_of(path) -> dict[str, np.ndarray]:
    """Return the weights of each convolution, by the name of its output."""
    package = read_package(path)
    constants = InterpretedFunction(package).constants
    return {name: constants[matrix.name] for name, matrix in conv_weights(package).items()}


@pytest.mark.parametrize("quantise", [name for name, (kind, *_) in QUANTISATIONS.items() if kind])
def test_compressed_weights_unpack_as_in_coremltools(exported, quantise, tmp_path):
    ct, plain = import_coremltools(), exported(shapes="fixed") / "layers0.mlpackage"
    model = compress_weights(ct, ct.models.MLModel(str(plain), skip_model_load=True), quantise)
    model.save(str(tmp_path / "small.mlpackage"))
    ct.optimize.coreml.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    kept = conv_weights(read_package(tmp_path / "small.mlpackage"))
    assert all(m.plain == (m.elements <= MIN_WEIGHTS) for m in kept.values())
    ours, theirs, before = map(
        weights_of, (tmp_path / "small.mlpackage", tmp_path / "dense.mlpackage", plain)
    )
    assert ours.keys() == theirs.keys() == before.keys() and len(ours) == 12
    for name in ours:
        moved = np.abs(ours[name].astype(float) - before[name]).max()
        assert moved == 0 if kept[name].plain else 0 < moved < 1
        assert ours[name].dtype == theirs[name].dtype == np.float16
        np.testing.assert_array_equal(ours[name], theirs[name])


@given(
    st.sampled_from([k for k in NUMBER_TYPES.values() if k.bits < 8]),
    st.lists(st.integers(0, 63), max_size=40),
)
def test_narrow_numbers_are_packed_from_the_lowest_bit(kind, values):
    values = [v % (1 << kind.bits) for v in values]
    bits = "".join(f"{v:0{kind.bits}b}"[::-1] for v in values)
    bits += "0" * (-len(bits) % 8)
    data = np.array([int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)], np.uint8)
    signed = [v - 16 if kind.name == "int4" and v > 7 else v for v in values]
    assert unpack_numbers(data, kind, (len(values),)).tolist() == signed


# ---- Damage --------------------------------------------------------------------------------------
def test_a_missing_file_is_named(copied):
    for name in (WEIGHTS, MODEL, "Manifest.json"):
        (copied / name).unlink()
        with pytest.raises(PackageError, match=f"{name.split('/')[-1]}.*export it again"):
            read_package(copied)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_weight_file_is_refused(copied, where):
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[: int(where * len(data))])
    with pytest.raises(PackageError, match="cut short|damaged"):
        InterpretedFunction(read_package(copied))


def test_a_damaged_weight_entry_is_refused(copied):
    data = bytearray((copied / WEIGHTS).read_bytes())
    at = data.index((0xDEADBEEF).to_bytes(4, "little"))
    data[at] ^= 1
    (copied / WEIGHTS).write_bytes(data)
    with pytest.raises(PackageError, match=f"entry at {at} of weight.bin is no fp32: damaged"):
        InterpretedFunction(read_package(copied))


def test_weights_outside_the_package_are_never_opened():
    with pytest.raises(PackageError, match="weights in '/etc/passwd'"):
        weights_from_blob(
            {"file": "/etc/passwd", "offset": 0}, NUMBER_TYPES[11], (1,), np.zeros(200, np.uint8)
        )


def test_declared_sizes_are_checked():
    weights = np.zeros(256, np.uint8)
    weights[:12] = np.array([0xDEADBEEF, 2, 1 << 30], "<u4").view(np.uint8)
    with pytest.raises(PackageError, match="not 16: damaged"):
        weights_from_blob(
            {"file": "@model_path/weights/weight.bin", "offset": 0}, NUMBER_TYPES[11], (4,), weights
        )
    huge = {
        "type": {"tensor": {"dtype": 11, "rank": 2, "dims": [{"constant": {"size": 1 << 40}}] * 2}}
    }
    with pytest.raises(PackageError, match="a tensor of shape"):
        program_constant(huge, weights)


@given(st.data())
def test_flipped_bytes_give_finite_results_or_one_error(exported, tmp_path_factory, data):
    path = exported(shapes="fixed", precision="fp32") / "head0.mlpackage"
    damaged = tmp_path_factory.mktemp("damaged") / "p.mlpackage"
    shutil.copytree(path, damaged)
    for name, least in ((MODEL, 1), (WEIGHTS, 0)):
        raw = bytearray((damaged / name).read_bytes())
        for _ in range(data.draw(st.integers(least, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (damaged / name).write_bytes(raw[: len(raw) - data.draw(st.sampled_from([0, 0, 0, 1, 77]))])
    try:
        program = InterpretedFunction(read_package(damaged))
        found = program(
            {
                n: np.ones([high for _, high in f.shapes[0]], np.float32)
                for n, f in program.inputs.items()
            }
        )
        assert found.keys() == program.outputs.keys() and all(
            np.isfinite(v).all() for v in found.values()
        )
    except PackageError as e:
        assert "\n" not in str(e) and str(damaged) in str(e)
    shutil.rmtree(damaged)
