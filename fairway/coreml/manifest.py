"""What a runtime must know of a folder of shards, and what it must check before it believes it.

    coreml/  manifest.json  host.bin  layers0.mlpackage  layers1.mlpackage  head0.mlpackage ...

All shapes follow from a few numbers (fairway/coreml/layout.py): they are worked out again from those, and every package
must declare exactly them. Every file must have the hash that the manifest names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fairway.coreml import layout
from fairway.coreml.layout import SHAPES, Dims, Interface, concrete
from fairway.coreml.mlpackage import LIKE, Feature, Package, Type, files_of, read_package
from train_gpt import UserError, file_sha256, need, replacing

NAME, HOST, FORMAT, VERSION = "manifest.json", "host.bin", "fairway-coreml", 1
MOST_BYTES = 1 << 24
MOST_KEPT = (
    1 << 28
)  # keys and values of one text; the consensus model at a context of 2,048 has 11.5 million
DTYPES = {name: LIKE[name] for name in ("fp16", "fp32")}
TABLES = ("embed", "bigram", "smear")


class ManifestError(UserError):
    """A folder of shards that do not belong together, or are not what the manifest says."""


@dataclass(frozen=True)
class Manifest:
    artifact_sha256: str
    tokenizer_sha256: str
    dims: Dims
    rope_base: float
    precision: str  # of the numbers between operations, and of all that goes in and comes out
    quantise: str  # what weights are kept as
    shapes: str  # how calls of several lengths are taken
    sizes: tuple[int, ...]  # tokens that a call may have
    cuts: tuple[int, ...]  # passes at which shards begin, and the end
    split: tuple[int, ...]  # tokens at which parts of the vocabulary begin, and the end
    tables: Mapping[str, tuple[int, ...]]  # of host.bin, in order, one behind the other: shapes
    sha256: Mapping[str, str]  # of every file but this one

    def interfaces(self) -> dict[str, Interface]:
        """Of every shard, in the order of the chain."""
        chain = {
            f"layers{n}": layout.layers(first, end, self.dims)
            for n, (first, end) in enumerate(zip(self.cuts, self.cuts[1:], strict=False))
        }
        return chain | {
            f"head{n}": layout.head(n, self.split, self.dims) for n in range(len(self.split) - 1)
        }

    def functions(self) -> dict[str, tuple[int, ...]]:
        """Functions of each package, and the tokens that a call of each may have."""
        if self.shapes == "multifunction":
            return {f"t{size}": (size,) for size in self.sizes}
        return {"main": self.sizes}

    def function_for(self, tokens: int) -> tuple[str, int]:
        """What to call for so many tokens, and how many it is called with: the next size there is."""
        size = next(size for size in self.sizes if size >= tokens)
        return next(name for name, sizes in self.functions().items() if size in sizes), size

    @property
    def dtype(self) -> type:
        return DTYPES[self.precision]


# ==== WRITING =========================================================================================================
def write_host(folder: Path, tables: Mapping[str, np.ndarray], precision: str) -> None:
    largest = max(float(np.abs(table).max()) for table in tables.values())
    need(
        largest <= float(np.finfo(DTYPES[precision]).max),
        f"the embeddings have values of up to {largest:.0f}, which "
        f"{precision} cannot hold; take --precision fp32",
    )
    with replacing(folder / HOST) as f:
        for table in tables.values():
            f.write(
                np.ascontiguousarray(
                    table, dtype=np.dtype(DTYPES[precision]).newbyteorder("<")
                ).tobytes()
            )


def hashes_of(folder: Path, shards: list[str]) -> dict[str, str]:
    found = {HOST: file_sha256(folder / HOST)}
    for shard in shards:
        package = f"{shard}.mlpackage"
        found |= {
            f"{package}/{name}": digest for name, digest in files_of(folder / package).items()
        }
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    data = dataclasses.asdict(manifest) | {"dims": manifest.dims._asdict(), **spelt_out(manifest)}
    data["tables"] = [
        dict(name=name, shape=shape) for name, shape in manifest.tables.items()
    ]  # in order
    with replacing(folder / NAME) as f:
        f.write(
            json.dumps({"format": FORMAT, "version": VERSION, **data}, indent=1).encode() + b"\n"
        )


def spelt_out(manifest: Manifest) -> dict[str, Any]:
    """What follows from the manifest's numbers, for runtimes that do not want to work it out."""

    def spelt(of):
        return {
            name: [list(concrete(shape, size)) for size in manifest.sizes]  # noqa: E731
            for name, shape in of.items()
        }

    shards = [
        dict(
            name=name,
            package=f"{name}.mlpackage",
            inputs=spelt(one.inputs),
            outputs=spelt(one.outputs),
        )
        for name, one in manifest.interfaces().items()
    ]
    functions = {name: list(sizes) for name, sizes in manifest.functions().items()}
    cache = dict(
        axes="1, channels of a head, key/value heads, slots",
        slots=manifest.dims.slots,
        masked=layout.MASKED,
        rule="token p is kept in slot p mod slots once it is accepted; a token looks back on as many as there are "
        "slots, itself included; the mask's last T columns are the tokens of the call",
    )
    return dict(shards=shards, functions=functions, cache=cache)


# ==== READING =========================================================================================================
class Folder(NamedTuple):
    """A folder that was checked: every file as the manifest says, every package as the model wants it."""

    path: Path
    manifest: Manifest
    packages: dict[str, Package]
    tables: dict[str, np.ndarray]


def read_folder(path: str | Path) -> Folder:
    """Ends in a Folder, or in one line about what does not fit."""
    path = Path(path)
    manifest = read_manifest(path)
    shards = list(manifest.interfaces())
    for shard in shards:
        need(
            (path / f"{shard}.mlpackage").is_dir(),
            f"{path}: shard {shard}.mlpackage is missing; export it again",
            ManifestError,
        )
    need((path / HOST).is_file(), f"{path}: {HOST} is missing; export it again", ManifestError)
    need_host_size(path, manifest)
    found = hashes_of(path, shards)
    for name in sorted(found.keys() | manifest.sha256.keys()):
        now, then = found.get(name, "nothing"), manifest.sha256.get(name, "nothing")
        shown = (
            name if name in found else repr(name)[:99]
        )  # a manifest may say anything, to a terminal too
        need(
            now == then,
            f"{path}: {shown} has hash {now[:12]}, but the manifest was written for {then[:12]!r}: "
            "damaged, or of another export; export it again",
            ManifestError,
        )
    packages = {}
    for shard, interface in manifest.interfaces().items():
        packages[shard] = read_package(path / f"{shard}.mlpackage")
        check_shard(packages[shard], interface, manifest)
    return Folder(path, manifest, packages, read_host(path, manifest))


def read_manifest(path: Path) -> Manifest:
    file = path / NAME
    need(file.is_file(), f"{path} holds no {NAME}; make one with export_coreml.py", ManifestError)
    try:
        need(file.stat().st_size <= MOST_BYTES, f"{file} is too large", ManifestError)
        data = json.loads(file.read_bytes())
        need(
            type(data) is dict and data.get("format") == FORMAT,
            f"{file} is no manifest of shards",
            ManifestError,
        )
        need(
            data.get("version") == VERSION,
            f"{file} is of version {data.get('version')}; this reader knows {VERSION}",
            ManifestError,
        )
        dims = Dims(**data["dims"])
        names = {f.name for f in dataclasses.fields(Manifest)} - {"dims"}
        parts = {n: tuple(v) if type(v := data[n]) is list else v for n in names}
        parts["tables"] = {table["name"]: tuple(table["shape"]) for table in data["tables"]}
        need(len(parts["tables"]) == len(data["tables"]), "a table twice", ValueError)
        manifest = Manifest(dims=dims._replace(parted=tuple(dims.parted)), **parts)
        check_numbers(manifest)
        for what, right in spelt_out(manifest).items():
            need(data[what] == right, f"{what} do not follow from its numbers", ValueError)
        return manifest
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise ManifestError(
            f"{file} is damaged ({type(e).__name__}: {e!s:.80}); export it again"
        ) from None
    except OSError as e:
        raise ManifestError(f"{file}: cannot be read ({e.strerror})") from None


def check_numbers(m: Manifest) -> None:
    """All that shapes are worked out from, in range and of one mind."""
    whole = lambda low, high, *values: all(type(v) is int and low <= v <= high for v in values)  # noqa: E731

    def rising(of, last):
        return (
            of[0] == 0
            and of[-1] == last
            and whole(0, last, *of)  # noqa: E731
            and all(a < b for a, b in zip(of, of[1:], strict=False))
        )

    d = m.dims
    for holds, what in (
        (
            whole(1, 1 << 20, d.width, d.heads, d.kv_heads, d.head, d.rotary, d.vocab, d.slots),
            "dims",
        ),
        (whole(1, 4096, d.passes) and all(type(p) is bool for p in d.parted), "parted"),
        (
            d.heads % d.kv_heads == 0 and 2 * d.rotary <= d.head and d.heads * d.head == d.width,
            "heads",
        ),
        (
            2 * d.passes * d.head * d.kv_heads * d.slots <= MOST_KEPT
            and d.width * d.vocab <= MOST_KEPT,
            "dims",
        ),
        (type(m.rope_base) is float and 1 <= m.rope_base < math.inf, "rope_base"),
        (m.precision in DTYPES, "precision"),
        (m.shapes in SHAPES, "shapes"),
        (
            whole(1, layout.MOST_TOKENS, *m.sizes) and list(m.sizes) == sorted({*m.sizes}) != [],
            "sizes",
        ),
        (len(m.cuts) > 1 and rising(m.cuts, d.passes), "cuts"),
        (len(m.split) > 1 and rising(m.split, d.vocab), "split"),
        (set(m.tables) <= set(TABLES) and m.tables.get("embed") == (d.vocab, d.width), "tables"),
        (m.tables.get("smear", (d.width,)) == (d.width,), "tables"),
        (
            m.tables.get("bigram", (2, d.width))[1:] == (d.width,)
            and whole(2, 1 << 20, *m.tables.get("bigram", (2,))[:1]),
            "tables",
        ),
        (
            all(
                type(v) is str
                for v in (m.artifact_sha256, m.tokenizer_sha256, m.quantise, *m.sha256.values())
            ),
            "hashes",
        ),
    ):
        need(holds, f"{what} out of range", ValueError)


def check_shard(package: Package, interface: Interface, manifest: Manifest) -> None:
    """A package takes and gives exactly what the model's numbers call for."""
    functions = manifest.functions()
    need(
        package.functions.keys() == functions.keys(),
        f"{package.path} has functions "
        f"{', '.join(package.functions)}, not {', '.join(functions)}: of another export",
        ManifestError,
    )
    for name, sizes in functions.items():
        function = package.functions[name]
        need(
            function.inputs.keys() == interface.inputs.keys()
            and list(function.outputs) == list(interface.outputs),
            f"{package.path} takes {', '.join(function.inputs)} and gives {', '.join(function.outputs)}; wanted are "
            f"{', '.join(interface.inputs)} and {', '.join(interface.outputs)}: a shard of another place",
            ManifestError,
        )
        for what, shape in interface.outputs.items():
            check_output(
                package,
                what,
                function.outputs[what],
                [concrete(shape, size) for size in sizes],
                manifest,
            )
        for what, shape in interface.inputs.items():
            check_input(
                package,
                what,
                function.inputs[what],
                [concrete(shape, size) for size in sizes],
                manifest,
            )


def check_output(
    package: Package, what: str, given: Type, wanted: list[tuple[int, ...]], m: Manifest
) -> None:
    """An axis that depends on the call is held to what it is when the call is made."""
    fits = all(
        len(given.shape) == len(one)
        and all(a in (None, b) for a, b in zip(given.shape, one, strict=True))
        for one in wanted
    )
    need(
        fits and given.kind.name == m.precision,
        f"{package.path}: {what} is {given}; wanted is {m.precision} of "
        f"{list(wanted[0])}: a shard of another export",
        ManifestError,
    )


def check_input(
    package: Package, what: str, feature: Feature, wanted: list[tuple[int, ...]], m: Manifest
) -> None:
    need(
        feature.kind == m.precision,
        f"{package.path}: {what} is {feature}, not {m.precision}",
        ManifestError,
    )
    least, most = wanted[0], wanted[-1]
    if m.shapes == "range":
        exact = feature.shapes == (tuple(zip(least, most, strict=True)),)
    else:
        exact = {tuple((n, n) for n in shape) for shape in wanted} == set(feature.shapes)
    need(
        exact,
        f"{package.path}: {what} is {feature}, but a context of {m.dims.slots} wants "
        f"{' or '.join(map(str, map(list, dict.fromkeys(wanted))))}: a shard of another export",
        ManifestError,
    )


def need_host_size(path: Path, manifest: Manifest) -> None:
    wanted = np.dtype(manifest.dtype).itemsize * sum(
        math.prod(shape) for shape in manifest.tables.values()
    )
    there = (path / HOST).stat().st_size
    need(
        there == wanted,
        f"{path / HOST} has {there} bytes, not {wanted}; export it again",
        ManifestError,
    )


def read_host(path: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    sizes = {name: math.prod(shape) for name, shape in manifest.tables.items()}
    data = np.fromfile(path / HOST, np.dtype(manifest.dtype).newbyteorder("<")).astype(np.float32)
    need(
        bool(np.isfinite(data).all()),
        f"{path / HOST} holds no numbers; export it again",
        ManifestError,
    )
    parts = np.split(data, np.cumsum(list(sizes.values()))[:-1])
    return {
        name: part.reshape(shape)
        for part, (name, shape) in zip(parts, manifest.tables.items(), strict=True)
    }
