"""docs/runtime.swift, checked without a Swift compiler.

A Swift grammar parses it. The keys that it reads are written by the Python code, its constants are
equal to those in Python, and its header says that nobody has compiled or run it.
"""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from fairway.coreml import host, layout
from fairway.coreml.layout import Dims
from fairway.coreml.manifest import (
    DTYPES,
    FORMAT,
    HOST_FILE,
    MANIFEST_FILE,
    TABLES,
    VERSION,
    Manifest,
    write_manifest,
)
from fairway.coreml.mlpackage import LISTING, MODEL, WEIGHTS
from fairway.decoding.drafters import NGramDrafter

pytestmark = pytest.mark.apple
SWIFT = (Path(__file__).resolve().parents[2] / "docs" / "runtime.swift").read_text(encoding="utf-8")


# ---- Reading Swift -------------------------------------------------------------------------------
@cache
def parse(source: str):
    """Return the root of the syntax tree; tree-sitter always returns one, with ERROR nodes."""
    import tree_sitter_swift
    from tree_sitter import Language, Parser

    return Parser(Language(tree_sitter_swift.language())).parse(source.encode()).root_node


def descendants(node) -> Iterator:
    """Yield a node and all nodes below it."""
    yield node
    for child in node.children:
        yield from descendants(child)


def syntax_errors(source: str) -> list[str]:
    """Return one line for each ERROR or MISSING node."""
    return [
        f"line {node.start_point.row + 1}: {'missing ' if node.is_missing else ''}{node.type}"
        for node in descendants(parse(source))
        if node.is_error or node.is_missing
    ]


def text_of(node) -> str:
    return node.text.decode()


def identifiers(node) -> list[str]:
    """Return the names that a property or an enum case declares."""
    names = [n.children[0] if n.type == "pattern" else n for n in node.children]
    return [text_of(n) for n in names if n.type == "simple_identifier"]


def coding_keys(node) -> dict[str, str]:
    """Return the JSON key of each property that `enum CodingKeys` names."""
    keys, last = {}, ""
    for entry in node.child_by_field_name("body").children:
        for part in entry.children if entry.type == "enum_entry" else ():
            if part.type == "simple_identifier":
                last = text_of(part)
                keys[last] = last
            elif part.type == "line_string_literal":
                keys[last] = text_of(part).strip('"')
    return keys


def structs_of(source: str) -> dict[str, dict[str, str]]:
    """Return for each `struct NAME: Decodable` its JSON keys and their types."""
    structs = {}
    for node in parse(source).children:
        if node.type != "class_declaration" or node.children[0].type != "struct":
            continue
        inherited = [text_of(n) for n in node.children if n.type == "inheritance_specifier"]
        if "Decodable" not in inherited:
            continue
        name, types, keys = text_of(node.child_by_field_name("name")), {}, {}
        for member in node.child_by_field_name("body").children:
            if member.type == "property_declaration":
                (kind,) = (n for n in member.children if n.type == "type_annotation")
                types |= dict.fromkeys(identifiers(member), text_of(kind).lstrip(": "))
            elif member.type == "class_declaration":
                keys = coding_keys(member)
        assert not keys or keys.keys() == types.keys(), f"{name}: CodingKeys are not its properties"
        structs[name] = {keys.get(one, one): kind for one, kind in types.items()}
    return structs


def has_literal(node) -> bool:
    """Tell whether a property is set to a literal, or to a negative one."""
    literal = node.children[-1].type.endswith("_literal") or text_of(node.children[-1])[0] == "-"
    return literal and any(n.type == "=" for n in node.children)


def constant_in(source: str, name: str) -> str:
    """Return the text of the value of `let NAME = ...`."""
    (node,) = (
        n
        for n in descendants(parse(source))
        if n.type == "property_declaration" and identifiers(n) == [name] and has_literal(n)
    )
    return text_of(node.children[-1])


def check_kind(structs: dict, value: object, kind: str, where: str) -> None:
    """Require that Swift can decode a JSON value as this type."""
    inner = kind[1:-1]
    if kind in structs:
        assert type(value) is dict, where
        for key, of in structs[kind].items():
            assert key in value, f"{where}.{key} is not written"
            check_kind(structs, value[key], of, f"{where}.{key}")
    elif kind.startswith("[String: "):
        assert type(value) is dict and value, where
        for key, one in value.items():
            check_kind(structs, one, inner.removeprefix("String: "), f"{where}.{key}")
    elif kind.startswith("["):
        assert type(value) is list and value, where
        for one in value:
            check_kind(structs, one, inner, where)
    else:
        kinds = {
            "Int": (int,),
            "Double": (int, float),
            "Float": (int, float),
            "String": (str,),
            "Bool": (bool,),
            "Precision": (str,),
        }
        assert type(value) in kinds[kind], f"{where} is {value!r}, not {kind}"
        assert kind != "Precision" or value in precision_cases(SWIFT), where


def precision_cases(source: str) -> list[str]:
    """Return the cases of enum Precision."""
    (node,) = (
        n
        for n in parse(source).children
        if n.type == "class_declaration" and text_of(n).startswith("enum Precision")
    )
    entries = node.child_by_field_name("body").children
    return [name for n in entries if n.type == "enum_entry" for name in identifiers(n)]


def check_keys(source: str, data: dict) -> None:
    structs = structs_of(source)
    assert structs.keys() == {"Manifest", "Dims", "Shard", "Table", "CacheRule"}
    check_kind(structs, data, "Manifest", MANIFEST_FILE)


def check_constants(source: str) -> None:
    def value(name: str) -> str:
        return constant_in(source, name)

    assert float(value("masked")) == layout.MASKED
    assert float.fromhex(value("epsilon")) == host.EPS
    assert int(value("bos")) == host.BOS
    assert tuple(json.loads(value("runLengths"))) == NGramDrafter.RUN_LENGTHS
    assert tuple(json.loads(value("tableNames"))) == TABLES
    tokens, buckets = np.random.default_rng(0).integers(0, 1 << 16, 500), 2039
    embed = host.Embedding({"embed": np.zeros((1, 1)), "bigram": np.zeros((buckets, 1))})
    current, previous = int(value("currentFactor")), int(value("previousFactor"))
    hashed = [
        ((current * b) ^ (previous * a)) % (buckets - 1)
        for a, b in zip(tokens, tokens[1:], strict=False)
    ]
    assert embed.buckets(tokens).tolist() == [buckets - 1, *hashed]
    assert precision_cases(source) == list(DTYPES)
    assert f'manifest.format == "{FORMAT}" && manifest.version == {VERSION},' in source
    root = json.loads(value("root"))
    for name in (
        HOST_FILE,
        MANIFEST_FILE,
        *(path.replace(root, r"\(root)") for path in (LISTING, MODEL, WEIGHTS)),
    ):
        assert f'"{name}"' in source, name


def check_names(source: str, data: dict) -> None:
    """Require that the runtime feeds all inputs that no shard computes, and reads their outputs."""
    passes = range(len(data["dims"]["parted"]))
    inputs, outputs = (
        {name for shard in data["shards"] for name in shard[way]} for way in ("inputs", "outputs")
    )
    letters = re.search(r'flatMap \{ \["(\w)\\\(\$0\)", "(\w)\\\(\$0\)"\] \}', source).groups()
    cached = {f"{letter}{nth}" for nth in passes for letter in letters}
    assert set(re.findall(r'have\["(\w+)"\] = ', source)) | cached == inputs - outputs
    new, logits = (
        re.search(rf'try found\("{name}"', source)
        for name in (r"\\\(\$0\)(\w+)", r"(\w+)\\\(part\)")
    )
    parts = range(len(data["split"]) - 1)
    assert {f"{name}{new[1]}" for name in cached} | {
        f"{logits[1]}{nth}" for nth in parts
    } <= outputs


def check_header(source: str) -> None:
    header = source.split("\nimport ")[0]
    assert all(line.startswith("//") or not line for line in header.split("\n"))
    assert "// Not compiled and not run by us: no Mac was at hand." in header


# ---- Against the Python code ---------------------------------------------------------------------
@pytest.fixture
def written(tmp_path):
    """Return manifest.json of two shards of two passes, the last with two lanes, and two heads."""
    dims = Dims(8, 4, 2, 6, 2, 10, (False, False, True, True), 5)
    tables = {"embed": (10, 8), "bigram": (7, 8), "smear": (8,)}
    write_manifest(
        tmp_path,
        Manifest(
            "a" * 64,
            "b" * 64,
            dims,
            1e4,
            "fp16",
            "none",
            "multifunction",
            0,
            (1, 4),
            (0, 2, 4),
            (0, 5, 10),
            tables,
            {HOST_FILE: "c" * 64},
        ),
    )
    return json.loads((tmp_path / MANIFEST_FILE).read_text())


def test_every_key_that_is_read_is_written_with_its_type(written):
    check_keys(SWIFT, written)


def test_constants_equal_those_in_python():
    check_constants(SWIFT)


def test_inputs_and_outputs_have_the_names_of_the_layout(written):
    check_names(SWIFT, written)


def test_the_grammar_accepts_it():
    assert syntax_errors(SWIFT) == []
    assert max(map(len, SWIFT.split("\n"))) <= 120


def test_the_header_says_that_it_was_neither_compiled_nor_run():
    check_header(SWIFT)


def test_structs_are_read_with_keys_and_types():
    struct = (
        "struct A: Decodable {\n    let b, c: [Int]  // d\n    let e: B\n\n"
        "    enum CodingKeys: String, CodingKey {\n"
        '        case b, c\n        case e = "f"\n    }\n}\nstruct D {\n    let g: Int\n}\n'
    )
    assert structs_of(struct) == {"A": {"b": "[Int]", "c": "[Int]", "f": "B"}}


# ---- Planted faults ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "right, wrong",
    [
        ("struct Dims: Decodable {", "struct Dims: Decodable"),
        ("func need(_ holds: Bool,", "func need(_ holds: Bool"),
        ("return manifest\n}", "return manifest\n"),
        ("guard let present = value else", "guard let present = value"),
        ("let epsilon: Float = 0x1p-23", "let epsilon: Float = = 0x1p-23"),
        ("for a in 0..<shape[1] {", "for a in 0..<shape[1 {"),
        ("switch self {", "switch {"),
        ('"manifest.json"', '"manifest.json'),
    ],
)
def test_a_syntax_error_is_reported(right, wrong):
    assert right in SWIFT
    assert syntax_errors(SWIFT.replace(right, wrong, 1))


@pytest.mark.parametrize(
    "right, wrong",
    [
        ("36313", "36131"),
        ("27191", "27911"),
        ("masked: Float = -1e4", "masked: Float = -1e5"),
        ("0x1p-23", "0x1p-24"),
        ("let bos = 1", "let bos = 0"),
        ("[12, 8, 6, 4, 3, 2, 1]", "[12, 8, 6, 4, 2, 1]"),
        ('"embed", "bigram"', '"bigram", "embed"'),
        ('"fairway-coreml" &&', '"fairway" &&'),
        ("manifest.version == 2", "manifest.version == 1"),
        ("fp16, fp32", "fp32"),
        ("weights/weight.bin", "weights.bin"),
        ('"host.bin"', '"host.dat"'),
    ],
)
def test_a_wrong_constant_fails(right, wrong):
    assert right in SWIFT
    with pytest.raises(AssertionError):
        check_constants(SWIFT.replace(right, wrong))


@pytest.mark.parametrize(
    "right, wrong",
    [
        ('"rope_base"', '"ropeBase"'),
        ("let ropeBase: Double", "let ropeBase: Int"),
        ("let parted: [Bool]", "let parted: [Int]"),
        ("let sha256: [String: String]", "let sha256: [String]"),
        ("slots: Int\n    let masked", "slot: Int\n    let masked"),
        ("outputs: [String: [[Int]]]", "outputs: [String: [Int]]"),
        ("case width, head,", "case width,"),
    ],
)
def test_a_key_of_another_name_or_type_fails(written, right, wrong):
    assert right in SWIFT
    with pytest.raises(AssertionError):
        check_keys(SWIFT.replace(right, wrong), written)


@pytest.mark.parametrize(
    "right, wrong",
    [
        ('have["mask"]', 'have["masks"]'),
        ('["k\\($0)"', '["q\\($0)"'),
        ("_new", "_next"),
        ("logits\\(part)", "logit\\(part)"),
    ],
)
def test_a_wrong_name_fails(written, right, wrong):
    assert right in SWIFT
    with pytest.raises(AssertionError):
        check_names(SWIFT.replace(right, wrong), written)


def test_a_header_without_the_warning_fails():
    with pytest.raises(AssertionError):
        check_header(SWIFT.replace("Not compiled and not run", "Run"))
