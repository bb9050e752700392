"""From an artifact to a folder of .mlpackage shards: graph, conversion, weights made smaller, manifest."""

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

from fairway.coreml import graph, layout, ranges
from fairway.coreml.graph import EXACT, Head, Layers, Precision, host_tables
from fairway.coreml.interpret import Program
from fairway.coreml.layout import MOST_TOKENS, SHAPES, Axis, T, concrete
from fairway.coreml.manifest import (
    DTYPES,
    FORMAT,
    HOST,
    NAME,
    Manifest,
    hashes_of,
    write_host,
    write_manifest,
)
from fairway.coreml.mlpackage import Package, matrices, read_package, size_of
from fairway.coreml.tools import import_coremltools, quiet
from train_gpt import GPT, Artifact, build_model, file_sha256, need, read_artifact

# How weights are kept: what coremltools is asked for, and in what words.
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
LEAST_WEIGHTS = 512  # of a matrix that is worth making smaller
MOST_PART = 4096  # of the vocabulary, in one shard


@dataclass(frozen=True)
class Choice:
    """What an export is to be."""

    precision: str = "fp16"
    quantise: str = "none"
    shapes: str = "multifunction"
    tokens: int = MOST_TOKENS  # of a call at most
    chunks: int = 1  # shards of about one size; or
    layers_per_shard: int = 0
    vocab_shards: int = 0  # 0: so that none has more than MOST_PART tokens
    context: int = 0  # tokens that a prediction looks back on; 0: as in training

    def __post_init__(self):
        for name, choices in (
            ("precision", tuple(DTYPES)),
            ("quantise", tuple(QUANTISATIONS)),
            ("shapes", SHAPES),
        ):
            value = getattr(self, name)
            need(value in choices, f"--{name} is {value!r}; take one of {', '.join(choices)}")
        for name, low, high in (
            ("tokens", 1, MOST_TOKENS),
            ("chunks", 1, 4096),
            ("layers_per_shard", 0, 4096),
            ("vocab_shards", 0, 256),
            ("context", 0, 1 << 16),
        ):
            value = getattr(self, name)
            need(
                low <= value <= high,
                f"--{name.replace('_', '-')} is {value}; it must be {low} to {high}",
            )
        need(
            not self.layers_per_shard or self.chunks == 1,
            f"--layers-per-shard is {self.layers_per_shard} and "
            f"--chunks {self.chunks}; leave one of them out",
        )

    def cuts(self, passes: int) -> list[int]:
        need(
            self.chunks <= passes,
            f"--chunks is {self.chunks}, but the model has {passes} layers; take at most that many",
        )
        if self.layers_per_shard:
            return [*range(0, passes, self.layers_per_shard), passes]
        return layout.even(passes, self.chunks)

    def split(self, vocab: int) -> list[int]:
        parts = self.vocab_shards or -(-vocab // MOST_PART)
        need(parts <= vocab, f"--vocab-shards is {parts}, but the vocabulary has {vocab} tokens")
        return layout.even(vocab, parts)


# ==== WHAT IS EXPORTED ================================================================================================
@dataclass(frozen=True)
class Source:
    """An artifact, its model, and what its host does in tables."""

    path: Path
    artifact: Artifact
    model: GPT
    tables: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | Path) -> Source:
        artifact = read_artifact(path)
        model = build_model(artifact).eval()
        return cls(Path(path), artifact, model, host_tables(model))


def precision_for(
    source: Source, choice: Choice, text: np.ndarray, say: Callable[[str], None]
) -> Precision:
    """Of what is computed; fp16 after a look at how large values become on `text`."""
    if choice.precision == "fp32":
        return EXACT
    found = ranges.measure(source.model, source.tables, text)
    precision = ranges.half_precision(found)
    say(ranges.told(found, precision))
    return precision


def export(
    source: Source,
    choice: Choice,
    out: str | Path,
    text: np.ndarray,
    say: Callable[[str], None],
    done: Callable[[int], None] = lambda shards: None,
) -> Manifest:
    """Write the folder `out`, whole or not at all; `text`: training tokens to measure, `done` hears of each shard."""
    coremltools, out = import_coremltools(), Path(out).resolve()
    dims = graph.dims_of(source.model, choice.context or source.model.cfg.train_seq_len)
    cuts, split = choice.cuts(dims.passes), choice.split(dims.vocab)
    sizes = layout.sizes(choice.shapes, choice.tokens)
    need_ours(out)
    precision = precision_for(source, choice, text, say)
    with replacing_folder(out) as folder:
        chain = graph.shards(source.model, dims, cuts, split, precision)
        need_representable(chain, choice.precision)
        for name, shard in chain.items():
            save_shard(coremltools, shard, choice, sizes, folder / f"{name}.mlpackage")
            done(1)
        write_host(folder, source.tables, choice.precision)
        manifest = Manifest(
            file_sha256(source.path),
            source.artifact.header["tokenizer_sha256"],
            dims,
            source.model.cfg.rope_base,
            choice.precision,
            choice.quantise,
            choice.shapes,
            tuple(sizes),
            tuple(cuts),
            tuple(split),
            {name: table.shape for name, table in source.tables.items()},
            hashes_of(folder, list(chain)),
        )
        write_manifest(folder, manifest)
    return manifest


def folder_bytes(folder: Path, manifest: Manifest) -> int:
    """Of weights and programs; the host's tables apart."""
    return sum(size_of(folder / f"{name}.mlpackage") for name in manifest.interfaces())


def need_representable(chain: dict[str, Layers | Head], precision: str) -> None:
    largest = float(np.finfo(DTYPES[precision]).max)
    for shard, module in chain.items():
        for name, weight in module.named_parameters():
            need(
                float(weight.abs().max()) <= largest,
                f"{name} of {shard} has weights that {precision} cannot hold; "
                "take --precision fp32",
            )


def need_ours(out: Path) -> None:
    """A folder that holds anything else is not replaced, nor one that somebody stands in."""
    here = Path.cwd()
    need(
        out != here and out not in here.parents,
        f"--out {out} is where you are; name a folder in it",
    )
    there = {p.name for p in out.iterdir()} if out.is_dir() else set()
    with contextlib.suppress(OSError, ValueError):
        told = json.loads((out / NAME).read_bytes()) if NAME in there else {}
        if type(told) is dict and told.get("format") == FORMAT:
            there = {
                name
                for name in there
                if name not in (NAME, HOST) and not name.endswith(".mlpackage")
            }
    need(
        not there and (out.is_dir() or not out.exists()),
        f"--out {out} exists and is no export of ours; name another folder",
    )


@contextlib.contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Write a folder beside `out`, then put it in its place: there is the old one or the new, never half of one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    put_back(out, old)  # what a process that was killed between the two moves below has left
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for path in filter(Path.is_file, beside.rglob("*")):
            with open(path, "rb") as f:
                os.fsync(f.fileno())
        if out.exists():
            os.rename(out, old)
        os.rename(beside, out)
    except shutil.Error as e:  # a list of all that could not be copied
        raise OSError(f"{out}: {e.args[0][0][2]}") from None
    finally:
        put_back(out, old)
        shutil.rmtree(beside, ignore_errors=True)


def put_back(out: Path, old: Path) -> None:
    """The old folder where there is no new one; else it has served."""
    if old.exists() and not out.exists():
        os.rename(old, out)
    shutil.rmtree(old, ignore_errors=True)


# ==== CONVERSION ======================================================================================================
def save_shard(
    ct: ModuleType, shard: Layers | Head, choice: Choice, sizes: list[int], path: Path
) -> None:
    with quiet():
        if choice.shapes != "multifunction":
            made = smaller(ct, convert(ct, shard, choice, sizes), choice.quantise)
            made.save(str(path))
        else:  # a package a function, then one of all that keeps each weight once
            both = ct.utils.MultiFunctionDescriptor()
            for size in sizes:
                part = path.with_name(f"{path.stem}.t{size}.mlpackage")
                smaller(ct, convert(ct, shard, choice, [size]), choice.quantise).save(str(part))
                both.add_function(
                    str(part), src_function_name="main", target_function_name=f"t{size}"
                )
            both.default_function_name = f"t{sizes[0]}"
            ct.utils.save_multifunction(both, str(path))
            for size in sizes:
                shutil.rmtree(path.with_name(f"{path.stem}.t{size}.mlpackage"))
    (path / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    package = read_package(path)
    need_smaller(package, choice.quantise)
    for function in package.functions:  # that it can be read, and every operation of it run
        Program(package, function)


def convert(ct: ModuleType, shard: Layers | Head, choice: Choice, sizes: list[int]) -> Any:
    """A model of coremltools; its one function takes calls of these sizes."""
    shapes, dtype = shard.interface.inputs, DTYPES[choice.precision]
    if choice.quantise == "artifact":
        note_codes(shard)
    flexible = len(sizes) > 1
    sample = (
        min(3, sizes[-1]) if flexible else sizes[0]
    )  # torch takes a 1 for a constant, and the least of a range too
    program = torch.export.export(
        shard,
        tuple(torch.zeros(concrete(shape, sample)) for shape in shapes.values()),
        strict=False,
        dynamic_shapes=dynamic_shapes(shard, sizes) if flexible else None,
    ).run_decompositions({})
    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
        inputs=[
            ct.TensorType(name=name, shape=declared(ct, shape, choice.shapes, sizes), dtype=dtype)
            for name, shape in shapes.items()
        ],
        outputs=[ct.TensorType(name=name, dtype=dtype) for name in shard.interface.outputs],
        compute_precision=ct.precision.FLOAT32
        if choice.precision == "fp32"
        else ct.precision.FLOAT16,
    )


def note_codes(shard: Layers | Head) -> None:
    """Tell coremltools, in buffers that it looks for, the step of each row of weights that are whole multiples of one:
    what it then rounds to int8 is what it is given."""
    shard.register_buffer("_COREML_/metadata_version", torch.tensor(1))
    for name, module in shard.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > LEAST_WEIGHTS:
            steps = grid_steps(module.weight.flatten(1))
            need(
                steps is not None,
                f"--quantise artifact: {name} is no multiple of a step a row; take another one",
            )
            for what, value in (
                ("compression_type", torch.tensor([3])),
                ("quantization_n_bits", torch.tensor(8)),
                ("quantization_scale", steps),
            ):
                module.register_buffer(f"_COREML_/weight/{what}", value)


def grid_steps(weight_OI: Tensor, most: int = 127) -> Tensor | None:
    """[O, 1]: for each row the largest step of which all its weights are multiples, `most` of them at most; None where
    a row has none. The largest weight is some number of steps: the first number that suits all others is the right
    one."""
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


def dynamic_shapes(shard: Layers | Head, sizes: list[int]) -> Any:
    """For torch.export: T, and what is a fixed number longer."""
    t = torch.export.Dim("T", min=1, max=sizes[-1])
    shapes = tuple(
        {
            at: t if axis == T else t + axis.slots
            for at, axis in enumerate(shape)
            if axis == T or isinstance(axis, Axis)
        }
        for shape in shard.interface.inputs.values()
    )
    return (
        (shapes,) if isinstance(shard, Layers) else shapes
    )  # Layers.forward takes all as one *inputs


def declared(ct: ModuleType, shape: layout.Shape, shapes: str, sizes: list[int]) -> Any:
    """What coremltools is told of an input's shape."""
    at_each = [concrete(shape, size) for size in sizes]
    if len(set(at_each)) == 1:
        return at_each[0]
    if shapes == "enumerated":
        return ct.EnumeratedShapes(at_each)
    return tuple(
        low if low == high else ct.RangeDim(low, high, low)
        for low, high in zip(at_each[0], at_each[-1], strict=True)
    )


def smaller(ct: ModuleType, model: Any, quantise: str) -> Any:
    """The same with its matrices quantised or palettised."""
    kind, options, _ = QUANTISATIONS[quantise]
    if not kind:
        return model
    api = ct.optimize.coreml
    if kind == "linear":
        config = api.OpLinearQuantizerConfig(
            mode="linear_symmetric", weight_threshold=LEAST_WEIGHTS, **options
        )
        return api.linear_quantize_weights(
            model, api.OptimizationConfig(op_type_configs={"conv": config})
        )
    config = api.OpPalettizerConfig(weight_threshold=LEAST_WEIGHTS, **options)
    return api.palettize_weights(model, api.OptimizationConfig(op_type_configs={"conv": config}))


def need_smaller(package: Package, quantise: str) -> None:
    """coremltools passes over what it cannot do with no more than a warning."""
    left = [m.name for m in matrices(package).values() if m.plain and m.elements > LEAST_WEIGHTS]
    need(
        quantise == "none" or not left,
        f"--quantise {quantise} left {', '.join(left[:3])} as before, since its width "
        "does not divide into groups of 32; take another one",
    )
