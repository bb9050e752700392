"""Export an artifact to a folder of .mlpackage shards: graph, conversion, weights, manifest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fairway.artifact_reader import read_artifact
from fairway.coreml import graph, layout, ranges
from fairway.coreml.graph import EXACT, HeadShard, LayersShard, Precision, host_tables
from fairway.coreml.interpret import InterpretedFunction
from fairway.coreml.layout import MAX_TOKENS, SHAPES, CacheAxis, T, concrete_shape
from fairway.coreml.manifest import (
    DTYPES,
    FORMAT,
    HOST_FILE,
    MANIFEST_FILE,
    Manifest,
    folder_hashes,
    write_host,
    write_manifest,
)
from fairway.coreml.mlpackage import Package, conv_weights, package_bytes, read_package
from fairway.coreml.tools import import_coremltools, silenced
from train_gpt import GPT, Artifact, UserError, build_model, file_sha256

# --quantise: the method of coremltools and its options, and the words of the help.
QUANTISATIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "none": ("", {}, "as computed"),
    "artifact": ("", {}, "int8, the artifact's own codes, their steps in fp16"),
    "int8": ("linear", dict(dtype="int8", granularity="per_channel"), "int8, a scale a channel"),
    "int8-tensor": (
        "linear",
        dict(dtype="int8", granularity="per_tensor"),
        "int8, a scale a tensor",
    ),
    "int4": (
        "linear",
        dict(dtype="int4", granularity="per_block", block_size=32),
        "int4, a scale for 32 weights",
    ),
    **{
        f"palette{bits}": (
            "palette",
            dict(
                nbits=bits,
                mode="kmeans",
                granularity="per_grouped_channel",
                group_size=32,
                enable_per_channel_scale=False,
            ),
            f"{2**bits} values for 32 channels, {bits} bits a weight",
        )
        for bits in (6, 4, 3, 2)
    },
}
MIN_WEIGHTS = 512  # smaller matrices stay as computed
MAX_VOCAB_PART = 4096  # tokens of one head shard


@dataclass(frozen=True)
class ExportOptions:
    """The options of an export, by the names that they have on the command line."""

    precision: str = "fp16"
    quantise: str = "none"
    shapes: str = "multifunction"
    tokens: int = MAX_TOKENS  # in one call at most
    chunks: int = 1  # shards of layers, nearly equal
    layers_per_shard: int = 0  # used instead of chunks unless 0
    vocab_shards: int = 0  # 0: as many as keep each below MAX_VOCAB_PART tokens
    context: int = 0  # tokens that a token sees, itself included; 0: as in training
    states: int = 0  # that a shard keeps its keys and values in; 0: they are inputs and outputs

    def __post_init__(self):
        for name, choices in (
            ("precision", DTYPES),
            ("quantise", QUANTISATIONS),
            ("shapes", SHAPES),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"--{name} is {value!r}; take one of {', '.join(choices)}")
        for name, low, high in (
            ("tokens", 1, MAX_TOKENS),
            ("chunks", 1, 4096),
            ("layers_per_shard", 0, 4096),
            ("vocab_shards", 0, 256),
            ("context", 0, 1 << 16),
            ("states", layout.STATES[0], layout.STATES[-1]),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {value}; it must be {low} to {high}")
        if self.layers_per_shard and self.chunks != 1:
            raise UserError(
                f"--layers-per-shard is {self.layers_per_shard} and --chunks {self.chunks}; "
                "leave one of them out"
            )

        if self.states and self.precision == "fp32":
            raise UserError(f"--states is {self.states} and --precision fp32; CoreML keeps fp16")
        if self.states and self.shapes == "multifunction":
            raise UserError(
                f"--states is {self.states} and --shapes multifunction, whose functions may not "
                "share a state; take --shapes fixed, range or enumerated"
            )

    def cuts(self, passes: int) -> list[int]:
        """Return the first pass of each shard of layers, and the end."""
        if self.chunks > passes:
            raise UserError(
                f"--chunks is {self.chunks}, but the model has {passes} layers; take at most "
                "that many"
            )
        if self.layers_per_shard:
            return [*range(0, passes, self.layers_per_shard), passes]
        return layout.even_cuts(passes, self.chunks)

    def split(self, vocab: int) -> list[int]:
        """Return the first token of each part of the vocabulary, and the end."""
        parts = self.vocab_shards or -(-vocab // MAX_VOCAB_PART)
        if parts > vocab:
            raise UserError(f"--vocab-shards is {parts}, but the vocabulary has {vocab} tokens")
        return layout.even_cuts(vocab, parts)


@dataclass(frozen=True)
class ExportSource:
    """An artifact, its model, and the tables that its host looks up."""

    path: Path
    artifact: Artifact
    model: GPT
    tables: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | Path) -> ExportSource:
        artifact = read_artifact(path)
        model = build_model(artifact).eval()
        return cls(Path(path), artifact, model, host_tables(model))


# ==== THE EXPORT ==================================================================================
def plan_precision(
    source: ExportSource, options: ExportOptions, text: np.ndarray, log: Callable[[str], None]
) -> Precision:
    """Return the precision of the export; for fp16, measure ranges on `text` and log one line."""
    if options.precision == "fp32":
        return EXACT
    measured = ranges.measure_ranges(source.model, source.tables, text)
    precision = ranges.plan_fp16(measured)
    log(ranges.ranges_line(measured, precision))
    return precision


def export_shards(
    source: ExportSource,
    options: ExportOptions,
    out: str | Path,
    text: np.ndarray,
    log: Callable[[str], None],
    on_progress: Callable[[int], None] = lambda shards: None,
) -> Manifest:
    """Write the folder `out`, completely or not at all, and return its manifest.

    `text` holds training tokens on which fp16 ranges are measured. `on_progress` gets 1 after each
    shard.
    """
    coremltools, out = import_coremltools(), Path(out).resolve()
    dims = graph.model_dims(source.model, options.context or source.model.cfg.train_seq_len)
    cuts, split = options.cuts(dims.passes), options.split(dims.vocab)
    sizes = layout.call_sizes(options.shapes, options.tokens)
    check_replaceable(out)
    precision = plan_precision(source, options, text, log)
    with replacing_folder(out) as folder:
        shards = graph.build_shards(source.model, dims, cuts, split, precision, options.states)
        check_representable(shards, options.precision)
        for name, shard in shards.items():
            save_shard(coremltools, shard, options, sizes, folder / f"{name}.mlpackage")
            on_progress(1)
        write_host(folder, source.tables, options.precision)
        manifest = Manifest(
            file_sha256(source.path),
            source.artifact.header["tokenizer_sha256"],
            dims,
            source.model.cfg.rope_base,
            options.precision,
            options.quantise,
            options.shapes,
            options.states,
            tuple(sizes),
            tuple(cuts),
            tuple(split),
            {name: table.shape for name, table in source.tables.items()},
            folder_hashes(folder, list(shards)),
        )
        write_manifest(folder, manifest)
    return manifest


def shards_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of all programs and weights, without the tables of the host."""
    return sum(package_bytes(folder / f"{name}.mlpackage") for name in manifest.interfaces())


def check_representable(shards: dict[str, LayersShard | HeadShard], precision: str) -> None:
    """Require that every weight fits the precision of the export."""
    largest = float(np.finfo(DTYPES[precision]).max)
    for shard, module in shards.items():
        for name, weight in module.named_parameters():
            if float(weight.abs().max()) > largest:
                raise UserError(
                    f"{name} of {shard} has weights that {precision} cannot hold; take "
                    "--precision fp32"
                )


# ==== REPLACING A FOLDER ==========================================================================
def check_replaceable(out: Path) -> None:
    """Require that `out` is absent, empty or an earlier export, and not the current folder."""
    here = Path.cwd()
    if out == here or out in here.parents:
        raise UserError(f"--out {out} is where you are; name a folder in it")
    names = {p.name for p in out.iterdir()} if out.is_dir() else set()
    with contextlib.suppress(OSError, ValueError):
        data = json.loads((out / MANIFEST_FILE).read_bytes()) if MANIFEST_FILE in names else {}
        if type(data) is dict and data.get("format") == FORMAT:
            names -= {MANIFEST_FILE, HOST_FILE}
            names = {name for name in names if not name.endswith(".mlpackage")}
    if names or (out.exists() and not out.is_dir()):
        raise UserError(f"--out {out} exists and is no export of ours; name another folder")


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Write a folder next to `out`, then rename it: `out` is always the old or the new folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    restore_folder(out, old)  # if a process was killed between the two renames below
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        yield part
        for path in filter(Path.is_file, part.rglob("*")):
            with path.open("rb") as f:
                os.fsync(f.fileno())
        if out.exists():
            out.rename(old)
        part.rename(out)
    except shutil.Error as e:  # holds a list of all files that could not be copied
        raise OSError(f"{out}: {e.args[0][0][2]}") from None
    finally:
        restore_folder(out, old)
        shutil.rmtree(part, ignore_errors=True)


def restore_folder(out: Path, old: Path) -> None:
    """Rename `old` to `out` if there is no `out`; delete it otherwise."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


# ==== CONVERSION ==================================================================================
def save_shard(
    ct: ModuleType,
    shard: LayersShard | HeadShard,
    options: ExportOptions,
    sizes: list[int],
    path: Path,
) -> None:
    """Convert a shard, make its weights smaller, save the package, and check that it can be run."""
    with silenced():
        if options.shapes != "multifunction":
            model = convert_shard(ct, shard, options, sizes)
            compress_weights(ct, model, options.quantise).save(str(path))
        else:  # one package a function, then one of all functions, which stores each weight once
            functions = ct.utils.MultiFunctionDescriptor()
            parts = {size: path.with_name(f"{path.stem}.t{size}.mlpackage") for size in sizes}
            for size, part in parts.items():
                model = convert_shard(ct, shard, options, [size])
                compress_weights(ct, model, options.quantise).save(str(part))
                functions.add_function(
                    str(part), src_function_name="main", target_function_name=f"t{size}"
                )
            functions.default_function_name = f"t{sizes[0]}"
            ct.utils.save_multifunction(functions, str(path))
            for part in parts.values():
                shutil.rmtree(part)
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    package = read_package(path)
    check_compressed(package, options.quantise)
    for function in package.functions:  # the interpreter raises if it does not know an operation
        InterpretedFunction(package, function)


def convert_shard(
    ct: ModuleType, shard: LayersShard | HeadShard, options: ExportOptions, sizes: list[int]
) -> Any:
    """Return a coremltools model whose one function accepts calls of these sizes."""
    shapes, dtype = shard.interface.inputs, DTYPES[options.precision]
    if options.quantise == "artifact":
        attach_codes(shard)
    flexible = len(sizes) > 1
    # torch.export would turn a size of 1, or the lowest of a range, into a constant.
    sample = min(3, sizes[-1]) if flexible else sizes[0]
    program = torch.export.export(
        shard,
        tuple(torch.zeros(concrete_shape(shape, sample)) for shape in shapes.values()),
        strict=False,
        dynamic_shapes=dynamic_shapes(shard, sizes) if flexible else None,
    ).run_decompositions({})
    precision = ct.precision.FLOAT32 if options.precision == "fp32" else ct.precision.FLOAT16
    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        inputs=[
            ct.TensorType(name=n, shape=coreml_shape(ct, s, options.shapes, sizes), dtype=dtype)
            for n, s in shapes.items()
        ],
        outputs=[ct.TensorType(name=name, dtype=dtype) for name in shard.interface.outputs],
        states=[
            ct.StateType(wrapped_type=ct.TensorType(shape=s, dtype=dtype), name=n)
            for n, s in shard.interface.states.items()
        ],
        compute_precision=precision,
    )


def attach_codes(shard: LayersShard | HeadShard) -> None:
    """Attach the artifact's quantisation steps to each large matrix, in coremltools' own buffers.

    coremltools then rounds each weight to the int8 code that the artifact holds.
    """
    shard.register_buffer("_COREML_/metadata_version", torch.tensor(1))
    for name, module in shard.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > MIN_WEIGHTS:
            steps = grid_steps(module.weight.flatten(1))
            if steps is None:
                raise UserError(
                    f"--quantise artifact: the rows of {name} are not multiples of a step; take "
                    "another quantisation"
                )
            for key, value in (
                ("compression_type", torch.tensor([3])),
                ("quantization_n_bits", torch.tensor(8)),
                ("quantization_scale", steps),
            ):
                module.register_buffer(f"_COREML_/weight/{key}", value)


def grid_steps(weight_OI: Tensor, most: int = 127) -> Tensor | None:
    """Return the step of each row, [O, 1], or None if a row has none.

    All weights of a row are integer multiples of its step, at most `most` times. A row's largest
    weight is some number of steps: the smallest number that suits all its weights is the right one.
    """
    peak = weight_OI.abs().amax(dim=1, keepdim=True)
    steps, left = torch.where(peak > 0, 0.0, 1.0), (peak > 0).flatten()
    for count in range(1, most + 1):
        rows = left.nonzero().flatten()
        if not len(rows):
            break
        codes = weight_OI[rows] * (count / peak[rows])
        fits = (codes - codes.round()).abs().amax(dim=1) < 1e-3
        steps[rows[fits]] = peak[rows[fits]] / count
        left[rows[fits]] = False
    return None if left.any() else steps


def dynamic_shapes(shard: LayersShard | HeadShard, sizes: list[int]) -> Any:
    """Return the `dynamic_shapes` of torch.export: the axes T and slots + T of each input."""
    t = torch.export.Dim("T", min=1, max=sizes[-1])
    shapes = tuple(
        {
            at: t if axis == T else t + axis.slots
            for at, axis in enumerate(shape)
            if axis == T or isinstance(axis, CacheAxis)
        }
        for shape in shard.interface.inputs.values()
    )
    # LayersShard.forward takes all its tensors as one *inputs.
    return (shapes,) if isinstance(shard, LayersShard) else shapes


def coreml_shape(ct: ModuleType, shape: layout.Shape, shapes: str, sizes: list[int]) -> Any:
    """Return the shape of an input as coremltools wants it: fixed, enumerated or a range."""
    concrete = [concrete_shape(shape, size) for size in sizes]
    if len(set(concrete)) == 1:
        return concrete[0]
    if shapes == "enumerated":
        return ct.EnumeratedShapes(concrete)
    return tuple(
        low if low == high else ct.RangeDim(low, high, low)
        for low, high in zip(concrete[0], concrete[-1], strict=True)
    )


def compress_weights(ct: ModuleType, model: Any, quantise: str) -> Any:
    """Return the coremltools model with its matrices quantised or palettised."""
    method, options, _ = QUANTISATIONS[quantise]
    if not method:
        return model
    api = ct.optimize.coreml
    if method == "linear":
        config = api.OpLinearQuantizerConfig(
            mode="linear_symmetric", weight_threshold=MIN_WEIGHTS, **options
        )
        return api.linear_quantize_weights(
            model, api.OptimizationConfig(op_type_configs={"conv": config})
        )
    config = api.OpPalettizerConfig(weight_threshold=MIN_WEIGHTS, **options)
    return api.palettize_weights(model, api.OptimizationConfig(op_type_configs={"conv": config}))


def check_compressed(package: Package, quantise: str) -> None:
    """Require that large matrices are compressed: coremltools skips some with a mere warning."""
    if quantise == "none":
        return
    weights = conv_weights(package).values()
    if plain := [w.name for w in weights if w.plain and w.elements > MIN_WEIGHTS]:
        raise UserError(
            f"--quantise {quantise} left {', '.join(plain[:3])} as before, since its width does "
            "not divide into groups of 32; take another quantisation"
        )
