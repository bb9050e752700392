"""Packed code, unpacked without running it: stubs that execute what they decompress, and archives.

Whatever a stub holds, the work is limited: in bytes, in depth, and in a decompressor's dictionary.
"""

from __future__ import annotations

import ast
import base64
import binascii
import bz2
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

from fairway.records.files import RecordError, parse_json
from fairway.records.syntax import constant_value, dotted_name

LIMIT, MOST = 16 << 20, 2000  # unpacked bytes, files of one archive


class Unreadable(Exception):
    """Raised for anything but constants that known decoders turn into text within the limits."""


def readable(holds: Any, why: str) -> None:
    if not holds:
        raise Unreadable(why)


def unpack_stub(tree: ast.Module, layers: list[str]) -> str | None:
    """Return the text that a stub's `exec(decompress(decode("…")))` would run; None if it is no
    stub.
    """
    for statement in tree.body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and dotted_name(call.func) == "exec" and call.args:
            undone: list[str] = []
            try:
                value = Evaluator(tree, undone).value(call.args[0])
            except (
                Unreadable,
                ValueError,
                EOFError,
                RecursionError,
                MemoryError,
                binascii.Error,
                zlib.error,
                lzma.LZMAError,
                OSError,
            ):
                continue
            layers += undone
            return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return None


class Evaluator:
    """Evaluate constants, names bound to them at the top of a module, decoders and
    decompressors.
    """

    def __init__(self, tree: ast.Module, layers: list[str]):
        self.layers, self.known, self.bound = layers, {}, {}
        for node in tree.body:
            if isinstance(node, ast.Import):
                self.known |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.known |= {
                    alias.asname or alias.name: f"{node.module}.{alias.name}"
                    for alias in node.names
                }
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.bound[node.targets[0].id] = node.value

    def value(self, node: ast.AST | None, depth: int = 0) -> Any:
        """Return the text or bytes of an expression."""
        if depth >= 40:
            raise Unreadable("packed too deep")
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            return node.value
        if isinstance(node, ast.Name) and node.id in self.bound:
            return self.value(self.bound[node.id], depth + 1)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.value(node.left, depth + 1) + self.value(node.right, depth + 1)
        if isinstance(node, ast.Call):
            return self.call(node, depth)
        raise Unreadable

    def call(self, node: ast.Call, depth: int) -> Any:
        """Return the value of a call: str.encode, bytes.decode, compile, a decoder or a
        decompressor.
        """
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in ("decode", "encode")
            and dotted_name(node.func.value) not in self.known
        ):
            value = self.value(node.func.value, depth + 1)
            return (bytes.decode if node.func.attr == "decode" else str.encode)(
                value, "utf-8", "replace"
            )
        name = self.dotted(node.func)
        if not node.args:
            raise Unreadable(name)
        value = self.value(node.args[0], depth + 1)
        if name == "compile":
            return value
        if isinstance(value, str):
            value = value.encode("latin-1")
        module, _, function = name.rpartition(".")
        if name in DECODERS:
            self.layers.append(function.removesuffix("decode"))
            return DECODERS[name](value)
        if function != "decompress" or module not in DECOMPRESSORS:
            raise Unreadable(name)
        self.layers.append(module)
        options = {k.arg: k.value for k in node.keywords if k.arg} | dict(
            zip(
                ("format", "memlimit", "filters") if module == "lzma" else ("wbits",),
                node.args[1:],
                strict=False,
            )
        )
        return DECOMPRESSORS[module](value, {key: self.option(v) for key, v in options.items()})

    def dotted(self, node: ast.AST) -> str:
        """Return the full name of a function: `L.decompress` after `import lzma as L` is
        lzma.decompress.
        """
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Call)
            and dotted_name(node.value.func) == "__import__"
            and node.value.args
        ):
            return f"{constant_value(node.value.args[0])}.{node.attr}"
        first, _, rest = dotted_name(node).partition(".")
        return ".".join(filter(None, [self.known.get(first, first), rest]))

    def option(self, node: ast.AST) -> Any:
        """Return a number, one of lzma's constants, or a list of its filters."""
        name = self.dotted(node).removeprefix("lzma.")
        if re.fullmatch(r"(FORMAT|FILTER|MF|MODE|CHECK)_\w+|PRESET_\w+", name):
            return getattr(lzma, name)
        if isinstance(node, ast.List):
            return [
                {
                    str(constant_value(k)): self.option(v)
                    for k, v in zip(f.keys, f.values, strict=True)
                }
                for f in node.elts
                if isinstance(f, ast.Dict)
            ]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -self.option(node.operand)
        if type(constant_value(node)) is not int:
            raise Unreadable("an option that is no number")
        return constant_value(node)


def limited(data: bytes) -> bytes:
    """Return the data, or raise Unreadable if there is more than LIMIT bytes of it."""
    if len(data) > LIMIT:
        raise Unreadable(f"unpacks to more than {LIMIT} bytes")
    return data


def undo_lzma(data: bytes, options: dict[str, Any]) -> bytes:
    filters = options.get("filters")
    for one in filters or []:  # the filter of a raw stream sets its memory
        if not 0 < one.get("dict_size", 1) <= 256 << 20:
            raise Unreadable("a dictionary too large")
    raw = options.get("format") == lzma.FORMAT_RAW
    decoder = lzma.LZMADecompressor(
        options.get("format", lzma.FORMAT_AUTO), None if raw else 512 << 20, filters
    )
    return limited(decoder.decompress(data, LIMIT + 1))


def undo_zlib(data: bytes, options: dict[str, Any]) -> bytes:
    return limited(zlib.decompressobj(options.get("wbits", 47)).decompress(data, LIMIT + 1))


def undo_bz2(data: bytes, _: dict[str, Any]) -> bytes:
    return limited(bz2.BZ2Decompressor().decompress(data, LIMIT + 1))


def undo_brotli(data: bytes, _: dict[str, Any]) -> bytes:
    import brotli

    try:
        return limited(brotli.Decompressor().process(data, output_buffer_limit=LIMIT + 1))
    except brotli.error:
        raise Unreadable from None


def undo_zstandard(data: bytes, _: dict[str, Any]) -> bytes:
    import zstandard

    try:
        with zstandard.ZstdDecompressor(max_window_size=128 << 20).stream_reader(data) as reader:
            return limited(reader.read(LIMIT + 1))
    except zstandard.ZstdError:
        raise Unreadable from None


DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "base64.b85decode": base64.b85decode,
    "base64.a85decode": base64.a85decode,
    "base64.b64decode": base64.b64decode,
    "base64.b32decode": base64.b32decode,
    "base64.b16decode": base64.b16decode,
    "bytes.fromhex": binascii.unhexlify,
    "binascii.unhexlify": binascii.unhexlify,
    "binascii.a2b_base64": binascii.a2b_base64,
}
DECOMPRESSORS = {
    "lzma": undo_lzma,
    "zlib": undo_zlib,
    "gzip": undo_zlib,
    "bz2": undo_bz2,
    "brotli": undo_brotli,
    "zstandard": undo_zstandard,
}


def archive_members(name: str, data: bytes) -> dict[str, bytes]:
    """Return the Python files in a zip, a tar, or JSON of names and texts; {} if it is none of
    them.
    """
    for unpack in (data.__getitem__, *DECOMPRESSORS.values()):
        try:
            plain = data if unpack == data.__getitem__ else unpack(data, {})
            members = (
                zip_members(plain)
                if zipfile.is_zipfile(io.BytesIO(plain))
                else json_members(plain, name)
                if plain.startswith(b"{")
                else tar_members(plain)
            )
        except (
            Unreadable,
            ValueError,
            EOFError,
            OSError,
            MemoryError,
            zlib.error,
            lzma.LZMAError,
            tarfile.TarError,
            RecordError,
            zipfile.BadZipFile,
            NotImplementedError,
            RuntimeError,
        ):
            continue
        if members:
            return {f"{name}!{inner}": content for inner, content in members.items()}
    return {}


def zip_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = [i for i in archive.infolist() if i.filename.endswith(".py")]
        if len(infos) > MOST or sum(i.file_size for i in infos) > LIMIT:
            raise Unreadable("too much in an archive")
        return {i.filename: archive.open(i).read(LIMIT) for i in infos}


def json_members(data: bytes, name: str) -> dict[str, bytes]:
    texts = parse_json(data.decode("utf-8"), name)
    return {
        key: text.encode("utf-8", "replace") for key, text in texts.items() if isinstance(text, str)
    }


def tar_members(data: bytes) -> dict[str, bytes]:
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
        while (info := archive.next()) is not None and len(members) < MOST:
            if info.isfile() and info.name.endswith(".py"):
                members[info.name] = archive.extractfile(info).read(LIMIT)
    return members
