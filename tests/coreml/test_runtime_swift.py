"""docs/runtime.swift, as far as it can be held without a Swift compiler: the keys that it reads are written, its
constants are those of the Python, its brackets close, and it says that nobody has run it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fairway.coreml import host, layout
from fairway.coreml.layout import Dims
from fairway.coreml.manifest import (
    DTYPES,
    FORMAT,
    HOST,
    NAME,
    TABLES,
    VERSION,
    Manifest,
    write_manifest,
)
from fairway.coreml.mlpackage import LISTING, MODEL, WEIGHTS
from fairway.decoding.drafters import NGramDrafter

SWIFT = (Path(__file__).resolve().parents[2] / "docs" / "runtime.swift").read_text(encoding="utf-8")
PAIRS = {"(": ")", "[": "]", "{": "}"}


# ---- Reading Swift ---------------------------------------------------------------------------------------------------
def code_of(source: str) -> str:
    """Without comments and without what strings say; code that is interpolated stays. Brackets that do not close, and
    strings that do not end, are an AssertionError."""
    out, open_brackets, at = [], [], 0  # a " among the brackets: a string that is interpolated into
    while at < len(source):
        c = source[at]
        if open_brackets[-1:] == ['"']:
            assert c != "\n", f"a string that does not end, after {''.join(out)[-60:]!r}"
            if source.startswith("\\(", at):
                open_brackets.append("(")
                out.append("(")
                at += 1
            elif c == "\\":
                at += 1
            elif c == '"':
                open_brackets.pop()
                out.append('"')
        elif source.startswith("//", at):
            at = source.find("\n", at) - 1
        else:
            out.append(c)
            if c == '"' or c in PAIRS:
                open_brackets.append(c)
            elif c in PAIRS.values():
                opened = open_brackets.pop() if open_brackets else ""
                assert PAIRS.get(opened) == c, (
                    f"{opened!r} is closed by {c!r}, after {''.join(out)[-60:]!r}"
                )
        at += 1
    assert not open_brackets, f"{open_brackets} are never closed"
    return "".join(out)


def structs_of(source: str) -> dict[str, dict[str, str]]:
    """Of each `struct NAME: Decodable`: its keys in JSON, and their types."""
    found = {}
    for name, body in re.findall(r"^struct (\w+): Decodable \{\n(.*?)^\}", source, re.M | re.S):
        types = {
            one.strip(): kind.strip()
            for names, kind in re.findall(r"^ {4}let ([\w, ]+): ([^/\n]+)", body, re.M)
            for one in names.split(",")
        }
        keys = {}
        for case in re.findall(r"^ {8}case (.+)$", body, re.M):
            for one in case.split(","):
                one, _, key = one.partition("=")
                keys[one.strip()] = key.strip().strip('"') or one.strip()
        assert not keys or keys.keys() == types.keys(), f"{name}: CodingKeys are not its properties"
        found[name] = {keys.get(one, one): kind for one, kind in types.items()}
    return found


def check_kind(structs: dict, value: object, kind: str, where: str) -> None:
    """A value of JSON is what Swift decodes as this type."""
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
        assert kind != "Precision" or value in cases_of(SWIFT), where


def cases_of(source: str) -> list[str]:
    """Of enum Precision."""
    return re.search(r"enum Precision: String, Decodable \{\n    case (.+)", source)[1].split(", ")


def check_keys(source: str, data: dict) -> None:
    structs = structs_of(source)
    assert structs.keys() == {"Manifest", "Dims", "Shard", "Table", "CacheRule"}
    check_kind(structs, data, "Manifest", NAME)


def check_constants(source: str) -> None:
    def value(name: str) -> str:
        return re.search(rf"^ *(?:static )?let {name}(?:: \w+)? = (.+?)(?:  //.*)?$", source, re.M)[
            1
        ]

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
    assert cases_of(source) == list(DTYPES)
    assert f'manifest.format == "{FORMAT}" && manifest.version == {VERSION},' in source
    root = json.loads(value("root"))
    for name in (
        HOST,
        NAME,
        *(path.replace(root, r"\(root)") for path in (LISTING, MODEL, WEIGHTS)),
    ):
        assert f'"{name}"' in source, name


def check_names(source: str, data: dict) -> None:
    """The runtime feeds what no shard gives, and takes the keys, values and logits that they do."""
    passes = range(len(data["dims"]["parted"]))
    takes, gives = (
        {name for shard in data["shards"] for name in shard[way]} for way in ("inputs", "outputs")
    )
    letters = re.search(r'flatMap \{ \["(\w)\\\(\$0\)", "(\w)\\\(\$0\)"\] \}', source).groups()
    kept = {f"{letter}{nth}" for nth in passes for letter in letters}
    assert set(re.findall(r'have\["(\w+)"\] = ', source)) | kept == takes - gives
    new, logits = (
        re.search(rf'try found\("{name}"', source)
        for name in (r"\\\(\$0\)(\w+)", r"(\w+)\\\(part\)")
    )
    parts = range(len(data["split"]) - 1)
    assert {f"{name}{new[1]}" for name in kept} | {f"{logits[1]}{nth}" for nth in parts} <= gives


def check_header(source: str) -> None:
    header = source.split("\nimport ")[0]
    assert all(line.startswith("//") or not line for line in header.split("\n"))
    assert "// Not compiled and not run by us: no Mac was at hand." in header


# ---- Held against the Python -----------------------------------------------------------------------------------------
@pytest.fixture
def written(tmp_path):
    """manifest.json of four passes, the last of them of two lanes, in two shards, and two parts of a vocabulary."""
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
            (1, 4),
            (0, 2, 4),
            (0, 5, 10),
            tables,
            {HOST: "c" * 64},
        ),
    )
    return json.loads((tmp_path / NAME).read_text())


def test_every_key_that_is_read_is_written_and_of_its_kind(written):
    check_keys(SWIFT, written)


def test_constants_are_those_of_the_python():
    check_constants(SWIFT)


def test_what_is_fed_and_taken_has_the_names_of_the_layout(written):
    check_names(SWIFT, written)


def test_brackets_and_strings_close():
    code = code_of(SWIFT)
    assert "Not compiled" not in code and "manifest.json" not in code and "0x1p-23" in code
    assert max(map(len, SWIFT.split("\n"))) <= 120


def test_it_says_that_it_was_neither_compiled_nor_run():
    check_header(SWIFT)


def test_the_reader_of_swift_sees_what_it_should():
    assert code_of('let a = "(\\(b("}")) \\" {" // (\nf()') == 'let a = "(b(""))" \nf()'
    for wrong in ("f(]", "f(", ")", 'let a = "b\n"', 'let a = "\\(b"'):
        with pytest.raises(AssertionError):
            code_of(wrong)
    struct = (
        "struct A: Decodable {\n    let b, c: [Int]  // d\n    let e: B\n\n    enum CodingKeys {\n"
        '        case b, c\n        case e = "f"\n    }\n}\n'
    )
    assert structs_of(struct) == {"A": {"b": "[Int]", "c": "[Int]", "f": "B"}}


# ---- Planted faults --------------------------------------------------------------------------------------------------
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
        ("manifest.version == 1", "manifest.version == 2"),
        ("fp16, fp32", "fp32"),
        ("weights/weight.bin", "weights.bin"),
        ('"host.bin"', '"host.dat"'),
    ],
)
def test_a_wrong_constant_is_found(right, wrong):
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
def test_a_key_that_is_not_written_or_of_another_kind_is_found(written, right, wrong):
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
def test_a_wrong_name_is_found(written, right, wrong):
    assert right in SWIFT
    with pytest.raises(AssertionError):
        check_names(SWIFT.replace(right, wrong), written)


def test_a_header_that_claims_nothing_is_found():
    with pytest.raises(AssertionError):
        check_header(SWIFT.replace("Not compiled and not run", "Run"))
