"""Packages are read by our own code as coremltools reads them, and damaged ones are refused in one line."""

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairway.coreml.export import LEAST_WEIGHTS, QUANTISATIONS, smaller
from fairway.coreml.interpret import Program
from fairway.coreml.layout import SHAPES
from fairway.coreml.mlpackage import (
    KINDS,
    MODEL,
    WEIGHTS,
    PackageError,
    constant,
    from_blob,
    matrices,
    read_package,
    unpacked,
)
from fairway.coreml.tools import import_coremltools

pytestmark = pytest.mark.apple


@pytest.fixture
def copied(exported, tmp_path):
    """A package that a test may spoil."""
    shutil.copytree(
        exported(shapes="fixed", precision="fp32") / "layers0.mlpackage", tmp_path / "p.mlpackage"
    )
    return tmp_path / "p.mlpackage"


# ---- Against coremltools ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shapes", SHAPES)
def test_our_reader_sees_what_coremltools_sees(exported, shapes):
    path = exported(shapes=shapes) / "layers0.mlpackage"
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
        assert len(sizes) > 2 and all(feature.kind == "fp16" for feature in mine.inputs.values())


def weights_of(path) -> dict[str, np.ndarray]:
    """Of each convolution, by the name of what it makes."""
    package = read_package(path)
    constants = Program(package).constants
    return {name: constants[matrix.name] for name, matrix in matrices(package).items()}


@pytest.mark.parametrize("quantise", [name for name, (kind, *_) in QUANTISATIONS.items() if kind])
def test_small_weights_unpack_to_what_coremltools_says(exported, quantise, tmp_path):
    ct, plain = import_coremltools(), exported(shapes="fixed") / "layers0.mlpackage"
    model = smaller(ct, ct.models.MLModel(str(plain), skip_model_load=True), quantise)
    model.save(str(tmp_path / "small.mlpackage"))
    ct.optimize.coreml.decompress_weights(model).save(str(tmp_path / "dense.mlpackage"))
    kept = matrices(read_package(tmp_path / "small.mlpackage"))
    assert all(m.plain == (m.elements <= LEAST_WEIGHTS) for m in kept.values())
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
    st.sampled_from([k for k in KINDS.values() if k.bits < 8]),
    st.lists(st.integers(0, 63), max_size=40),
)
def test_narrow_numbers_follow_one_another_from_the_lowest_bit(kind, values):
    values = [v % (1 << kind.bits) for v in values]
    bits = "".join(f"{v:0{kind.bits}b}"[::-1] for v in values)
    bits += "0" * (-len(bits) % 8)
    data = np.array([int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)], np.uint8)
    signed = [v - 16 if kind.name == "int4" and v > 7 else v for v in values]
    assert unpacked(data, kind, (len(values),)).tolist() == signed


# ---- Damage ----------------------------------------------------------------------------------------------------------
def test_a_package_that_lacks_a_file_says_which(copied):
    for name in (WEIGHTS, MODEL, "Manifest.json"):
        (copied / name).unlink()
        with pytest.raises(PackageError, match=f"{name.split('/')[-1]}.*export it again"):
            read_package(copied)


@pytest.mark.parametrize("where", [0.1, 0.5, 0.9, 0.999])
def test_a_weight_file_that_is_cut_short_is_told(copied, where):
    data = (copied / WEIGHTS).read_bytes()
    (copied / WEIGHTS).write_bytes(data[: int(where * len(data))])
    with pytest.raises(PackageError, match="cut short|damaged"):
        Program(read_package(copied))


def test_an_entry_of_weights_that_is_no_entry_is_told(copied):
    data = bytearray((copied / WEIGHTS).read_bytes())
    at = data.index((0xDEADBEEF).to_bytes(4, "little"))
    data[at] ^= 1
    (copied / WEIGHTS).write_bytes(data)
    with pytest.raises(PackageError, match=f"entry at {at} of weight.bin is no fp32: damaged"):
        Program(read_package(copied))


def test_weights_elsewhere_are_never_opened():
    with pytest.raises(PackageError, match="weights in '/etc/passwd'"):
        from_blob({"file": "/etc/passwd", "offset": 0}, KINDS[11], (1,), np.zeros(200, np.uint8))


def test_sizes_are_not_believed():
    weights = np.zeros(256, np.uint8)
    weights[:12] = np.array([0xDEADBEEF, 2, 1 << 30], "<u4").view(np.uint8)
    with pytest.raises(PackageError, match="not 16: damaged"):
        from_blob({"file": "@model_path/weights/weight.bin", "offset": 0}, KINDS[11], (4,), weights)
    huge = {
        "type": {"tensor": {"dtype": 11, "rank": 2, "dims": [{"constant": {"size": 1 << 40}}] * 2}}
    }
    with pytest.raises(PackageError, match="a tensor of shape"):
        constant(huge, weights)


@given(st.data())
def test_flipped_bytes_end_in_a_program_or_in_one_error(exported, tmp_path_factory, data):
    path = exported(shapes="fixed", precision="fp32") / "head0.mlpackage"
    spoilt = tmp_path_factory.mktemp("spoilt") / "p.mlpackage"
    shutil.copytree(path, spoilt)
    for name, least in ((MODEL, 1), (WEIGHTS, 0)):
        raw = bytearray((spoilt / name).read_bytes())
        for _ in range(data.draw(st.integers(least, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        (spoilt / name).write_bytes(raw[: len(raw) - data.draw(st.sampled_from([0, 0, 0, 1, 77]))])
    try:
        program = Program(read_package(spoilt))
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
        assert "\n" not in str(e) and str(spoilt) in str(e)
    shutil.rmtree(spoilt)
