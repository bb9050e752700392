"""The manifest of a folder of shards, and the checks before a runtime trusts the folder.

    coreml/  manifest.json  host.bin  layers0.mlpackage  layers1.mlpackage  head0.mlpackage ...

All shapes follow from a few numbers (fairway/coreml/layout.py). A reader derives them again, and
every package must declare exactly these shapes. Every file must have the hash in the manifest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.coreml import layout
from fairway.coreml.layout import SHAPES, Dims, Interface, concrete_shape
from fairway.coreml.mlpackage import (
    FEATURE_DTYPES,
    InputFeature,
    Package,
    TensorType,
    package_hashes,
    read_package,
)
from train_gpt import UserError, file_sha256, replacing

MANIFEST_FILE, HOST_FILE, FORMAT, VERSION = "manifest.json", "host.bin", "fairway-coreml", 2
MAX_MANIFEST_BYTES = 1 << 24
MAX_NUMBERS = 1 << 28  # in one cache; the consensus model at a context of 2,048 has 11.5 million
DTYPES = {name: FEATURE_DTYPES[name] for name in ("fp16", "fp32")}
STATEFUL = [(shapes, "fp16") for shapes in SHAPES if shapes != "multifunction"]
TABLES = ("embed", "bigram", "smear")


class ManifestError(UserError):
    """A folder holds shards that do not belong together, or that differ from the manifest."""


@dataclass(frozen=True)
class Manifest:
    """The numbers that describe a folder of shards; manifest.json holds them by these names."""

    artifact_sha256: str
    tokenizer_sha256: str
    dims: Dims
    rope_base: float
    precision: str  # of inputs, outputs, and values between operations
    quantise: str  # how weights are stored
    shapes: str  # how calls of different lengths are accepted
    states: int  # of a shard of layers; 0: keys and values are inputs and outputs
    sizes: tuple[int, ...]  # numbers of tokens that a call may have
    cuts: tuple[int, ...]  # first pass of each shard of layers, and the end
    split: tuple[int, ...]  # first token of each part of the vocabulary, and the end
    tables: Mapping[str, tuple[int, ...]]  # shapes of the tables in host.bin, in file order
    sha256: Mapping[str, str]  # of every file except manifest.json

    def interfaces(self) -> dict[str, Interface]:
        """Return the interface of every shard, in the order in which shards run."""
        layers = {
            f"layers{n}": layout.layers_interface(first, end, self.dims, self.states)
            for n, (first, end) in enumerate(zip(self.cuts, self.cuts[1:], strict=False))
        }
        return layers | {
            f"head{n}": layout.head_interface(n, self.split, self.dims)
            for n in range(len(self.split) - 1)
        }

    def functions(self) -> dict[str, tuple[int, ...]]:
        """Return the functions of each package, with the call sizes that each accepts."""
        if self.shapes == "multifunction":
            return {f"t{size}": (size,) for size in self.sizes}
        return {"main": self.sizes}

    def function_for(self, tokens: int) -> tuple[str, int]:
        """Return the function to call for `tokens` tokens, and the size to pad the call to."""
        size = next(size for size in self.sizes if size >= tokens)
        return next(name for name, sizes in self.functions().items() if size in sizes), size

    @property
    def dtype(self) -> type:
        return DTYPES[self.precision]


# ==== WRITING =====================================================================================
def write_host(folder: Path, tables: Mapping[str, np.ndarray], precision: str) -> None:
    """Write host.bin: the tables one after the other, little-endian, in the given precision."""
    largest = max(float(np.abs(table).max()) for table in tables.values())
    if largest > float(np.finfo(DTYPES[precision]).max):
        raise UserError(
            f"the embeddings have values of up to {largest:.0f}, which {precision} cannot hold; "
            "take --precision fp32"
        )
    dtype = np.dtype(DTYPES[precision]).newbyteorder("<")
    with replacing(folder / HOST_FILE) as f:
        for table in tables.values():
            f.write(np.ascontiguousarray(table, dtype=dtype).tobytes())


def folder_hashes(folder: Path, shards: list[str]) -> dict[str, str]:
    """Return the SHA-256 of host.bin and of each file of each package, by path in the folder."""
    hashes = {HOST_FILE: file_sha256(folder / HOST_FILE)}
    for shard in shards:
        package = f"{shard}.mlpackage"
        for name, digest in package_hashes(folder / package).items():
            hashes[f"{package}/{name}"] = digest
    return hashes


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json: the manifest's numbers, and the fields derived from them."""
    data = dataclasses.asdict(manifest) | {"dims": manifest.dims._asdict()}
    data |= derived_fields(manifest)
    data["tables"] = [dict(name=name, shape=shape) for name, shape in manifest.tables.items()]
    text = json.dumps({"format": FORMAT, "version": VERSION, **data}, indent=1)
    with replacing(folder / MANIFEST_FILE) as f:
        f.write(text.encode() + b"\n")


def derived_fields(manifest: Manifest) -> dict[str, Any]:
    """Return shapes, functions and the cache rule, for runtimes that do not derive them."""

    def shapes(tensors: Mapping[str, layout.Shape]) -> dict[str, list[list[int]]]:
        return {
            name: [list(concrete_shape(shape, size)) for size in manifest.sizes]
            for name, shape in tensors.items()
        }

    shards = [
        dict(
            name=name,
            package=f"{name}.mlpackage",
            inputs=shapes(interface.inputs),
            outputs=shapes(interface.outputs),
            states={name: list(shape) for name, shape in interface.states.items()},
        )
        for name, interface in manifest.interfaces().items()
    ]
    functions = {name: list(sizes) for name, sizes in manifest.functions().items()}
    # The text of `axes` and `rule` is part of the format: a reader compares it with its own.
    cache = dict(
        axes="1, channels of a head, key/value heads, slots",
        slots=manifest.dims.slots,
        masked=layout.MASKED,
        rule="token p is kept in slot p mod slots once it is accepted; a token looks back on as "
        "many as there are slots, itself included; the mask's last T columns are the tokens of "
        "the call",
    )
    if manifest.states:
        places = manifest.dims.slots + layout.SPARE
        cache = dict(
            axes="passes, their keys and values; channels of a head, key/value heads, places",
            slots=manifest.dims.slots,
            places=places,
            masked=layout.MASKED,
            rule="token p goes to place p mod places in the call that reads it, where `write` says "
            "so; a token looks back on as many as there are slots, itself included; rejected "
            "tokens are hidden by the mask until others take their places",
        )
    return dict(shards=shards, functions=functions, cache=cache)


# ==== READING =====================================================================================
class ShardFolder(NamedTuple):
    """A checked folder: every file has its hash, and every package the shapes that it must have."""

    path: Path
    manifest: Manifest
    packages: dict[str, Package]
    tables: dict[str, np.ndarray]


def read_shard_folder(path: str | Path) -> ShardFolder:
    """Read and check a folder, or raise UserError: one line that says what does not fit."""
    path = Path(path)
    manifest = read_manifest(path)
    shards = list(manifest.interfaces())
    for shard in shards:
        if not (path / f"{shard}.mlpackage").is_dir():
            raise ManifestError(
                f"{path}: shard {shard}.mlpackage is missing; export the folder again"
            )
    if not (path / HOST_FILE).is_file():
        raise ManifestError(f"{path}: {HOST_FILE} is missing; export the folder again")
    check_host_size(path, manifest)
    check_hashes(path, folder_hashes(path, shards), manifest)
    packages = {}
    for shard, interface in manifest.interfaces().items():
        packages[shard] = read_package(path / f"{shard}.mlpackage")
        check_shard(packages[shard], interface, manifest)
    return ShardFolder(path, manifest, packages, read_host(path, manifest))


def check_hashes(path: Path, hashes: dict[str, str], manifest: Manifest) -> None:
    """Require that the files and the manifest have the same names and hashes."""
    for name in sorted(hashes.keys() | manifest.sha256.keys()):
        now, then = hashes.get(name, "nothing"), manifest.sha256.get(name, "nothing")
        if now != then:
            # A hostile manifest may hold control characters, which must not reach a terminal.
            safe = name if name in hashes else repr(name)[:99]
            raise ManifestError(
                f"{path}: {safe} has hash {now[:12]}, but the manifest was written for "
                f"{then[:12]!r}: damaged, or from another export; export the folder again"
            )


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json of a folder, without its packages."""
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise ManifestError(f"{path} holds no {MANIFEST_FILE}; make one with fairway export-coreml")
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{file} is too large")
        return parse_manifest(json.loads(file.read_bytes()), file)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise ManifestError(
            f"{file} is damaged ({type(e).__name__}: {e!s:.80}); export the folder again"
        ) from None
    except OSError as e:
        raise ManifestError(f"{file}: cannot be read ({e.strerror})") from None


def parse_manifest(data: Any, file: Path) -> Manifest:
    """Return the manifest that parsed JSON holds; derived fields must equal our own."""
    if type(data) is not dict or data.get("format") != FORMAT:
        raise ManifestError(f"{file} is no manifest of shards")
    if data.get("version") != VERSION:
        raise ManifestError(
            f"{file} has version {data.get('version')}; this reader knows {VERSION}"
        )
    dims = Dims(**data["dims"])
    names = {f.name for f in dataclasses.fields(Manifest)} - {"dims"}
    parts = {n: tuple(v) if type(v := data[n]) is list else v for n in names}
    parts["tables"] = {table["name"]: tuple(table["shape"]) for table in data["tables"]}
    if len(parts["tables"]) != len(data["tables"]):
        raise ValueError("a table occurs twice")
    manifest = Manifest(dims=dims._replace(parted=tuple(dims.parted)), **parts)
    check_manifest_numbers(manifest)
    for name, right in derived_fields(manifest).items():
        if data[name] != right:
            raise ValueError(f"{name} do not follow from its numbers")
    return manifest


def integers_within(low: int, high: int, *values: Any) -> bool:
    """Tell whether all values are integers from `low` to `high`; bool does not count as one."""
    return all(type(v) is int and low <= v <= high for v in values)


def rises_to(numbers: Sequence[int], last: int) -> bool:
    """Tell whether the numbers rise strictly from 0 to `last`."""
    return (
        len(numbers) > 1
        and numbers[0] == 0
        and numbers[-1] == last
        and integers_within(0, last, *numbers)
        and all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    )


def check_manifest_numbers(m: Manifest) -> None:
    """Require that the numbers behind all shapes are in range and agree with each other."""
    d, limit = m.dims, 1 << 20
    sizes = (d.width, d.heads, d.kv_heads, d.head, d.rotary, d.vocab, d.slots)
    bigram = m.tables.get("bigram", (2, d.width))
    hashes = (m.artifact_sha256, m.tokenizer_sha256, m.quantise, *m.sha256.values())
    # In this order, since later checks rely on earlier ones. Each is computed when it is reached.
    checks = (
        ("dims", lambda: integers_within(1, limit, *sizes)),
        (
            "parted",
            lambda: integers_within(1, 4096, d.passes) and all(type(p) is bool for p in d.parted),
        ),
        (
            "heads",
            lambda: (
                d.heads % d.kv_heads == 0 and 2 * d.rotary <= d.head and d.heads * d.head == d.width
            ),
        ),
        (
            "dims",
            lambda: (
                2 * d.passes * d.head * d.kv_heads * (d.slots + layout.SPARE) <= MAX_NUMBERS
                and d.width * d.vocab <= MAX_NUMBERS
            ),
        ),
        ("rope_base", lambda: type(m.rope_base) is float and 1 <= m.rope_base < math.inf),
        ("precision", lambda: m.precision in DTYPES),
        ("shapes", lambda: m.shapes in SHAPES),
        ("states", lambda: integers_within(0, layout.STATES[-1], m.states)),
        ("states", lambda: not m.states or (m.shapes, m.precision) in STATEFUL),
        (
            "sizes",
            lambda: (
                m.sizes
                and integers_within(1, layout.MAX_TOKENS, *m.sizes)
                and list(m.sizes) == sorted({*m.sizes})
            ),
        ),
        ("cuts", lambda: rises_to(m.cuts, d.passes)),
        ("split", lambda: rises_to(m.split, d.vocab)),
        (
            "tables",
            lambda: (
                set(m.tables) <= set(TABLES)
                and m.tables.get("embed") == (d.vocab, d.width)
                and m.tables.get("smear", (d.width,)) == (d.width,)
                and bigram[1:] == (d.width,)
                and integers_within(2, limit, *bigram[:1])
            ),
        ),
        ("hashes", lambda: all(type(v) is str for v in hashes)),
    )
    for name, holds in checks:
        if not holds():
            raise ValueError(f"{name} out of range")


def check_shard(package: Package, interface: Interface, manifest: Manifest) -> None:
    """Require that a package has exactly the functions, inputs and outputs that it must have."""
    functions = manifest.functions()
    if package.functions.keys() != functions.keys():
        raise ManifestError(
            f"{package.path} has functions {', '.join(package.functions)}, not "
            f"{', '.join(functions)}: from another export"
        )
    for name, sizes in functions.items():
        function = package.functions[name]
        if function.inputs.keys() != interface.inputs.keys() or list(function.outputs) != list(
            interface.outputs
        ):
            raise ManifestError(
                f"{package.path} takes {', '.join(function.inputs)} and returns "
                f"{', '.join(function.outputs)}; wanted are {', '.join(interface.inputs)} and "
                f"{', '.join(interface.outputs)}: a shard from another place in the chain"
            )
        states = {n: (m.number.name, m.shape) for n, m in function.states.items()}
        if states != {n: (manifest.precision, shape) for n, shape in interface.states.items()}:
            raise ManifestError(
                f"{package.path} keeps states {', '.join(map(str, function.states.values()))}; "
                "not those of this manifest: a shard from another export"
            )
        for tensor, shape in interface.outputs.items():
            wanted = [concrete_shape(shape, size) for size in sizes]
            check_output(package, tensor, function.outputs[tensor], wanted, manifest)
        for tensor, shape in interface.inputs.items():
            wanted = [concrete_shape(shape, size) for size in sizes]
            check_input(package, tensor, function.inputs[tensor], wanted, manifest)


def check_output(
    package: Package, name: str, declared: TensorType, wanted: list[tuple[int, ...]], m: Manifest
) -> None:
    """Require precision and shape of an output; an axis that depends on the call may be open."""
    fits = all(
        len(declared.shape) == len(one)
        and all(a in (None, b) for a, b in zip(declared.shape, one, strict=True))
        for one in wanted
    )
    if not fits or declared.number.name != m.precision:
        raise ManifestError(
            f"{package.path}: {name} is {declared}; wanted is {m.precision} of "
            f"{list(wanted[0])}: a shard from another export"
        )


def check_input(
    package: Package, name: str, feature: InputFeature, wanted: list[tuple[int, ...]], m: Manifest
) -> None:
    """Require that an input has the manifest's precision and accepts exactly the wanted shapes."""
    if feature.number != m.precision:
        raise ManifestError(f"{package.path}: {name} is {feature}, not {m.precision}")
    if m.shapes == "range":
        exact = feature.shapes == (tuple(zip(wanted[0], wanted[-1], strict=True)),)
    else:
        exact = {tuple((n, n) for n in shape) for shape in wanted} == set(feature.shapes)
    if not exact:
        raise ManifestError(
            f"{package.path}: {name} is {feature}, but a context of {m.dims.slots} wants "
            f"{' or '.join(map(str, map(list, dict.fromkeys(wanted))))}: a shard from another "
            "export"
        )


def check_host_size(path: Path, manifest: Manifest) -> None:
    """Require that host.bin has as many bytes as the manifest's tables."""
    wanted = np.dtype(manifest.dtype).itemsize * sum(map(math.prod, manifest.tables.values()))
    if (size := (path / HOST_FILE).stat().st_size) != wanted:
        raise ManifestError(
            f"{path / HOST_FILE} has {size} bytes, not {wanted}; export the folder again"
        )


def read_host(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Read the tables of host.bin as float32."""
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    data = np.fromfile(path / HOST_FILE, dtype).astype(np.float32)
    if not np.isfinite(data).all():
        raise ManifestError(f"{path / HOST_FILE} holds infinities or NaN; export the folder again")
    parts = np.split(data, np.cumsum([math.prod(s) for s in manifest.tables.values()])[:-1])
    return {
        name: part.reshape(shape)
        for part, (name, shape) in zip(parts, manifest.tables.items(), strict=True)
    }
