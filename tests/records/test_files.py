"""Files of anyone: read within limits, refused in one line, written complete or not at all."""

import ast
import hashlib
import json
import os

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from fairway.records.files import (
    RecordError,
    parse_json,
    read_bytes,
    read_events,
    read_json,
    read_text,
    replace_text,
    replacing,
    sha256,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def refusal(call, *arguments) -> str:
    with pytest.raises(RecordError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@given(VALUES)
def test_json_comes_back(value):
    assert parse_json(json.dumps(value), "x") == value


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda b: b.decode("latin-1")))
def test_any_text_is_json_or_one_line(text):
    try:
        value = parse_json(text, "x.json")
    except RecordError as e:
        assert str(e).startswith("x.json is no JSON: ")
    else:
        assert json.dumps(value, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        "NaN",
        "[Infinity]",
        '{"a": -Infinity}',
        "1e999",
        "-1e999",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        "",
        "{",
        '{"a": 1}}',
    ],
)
def test_values_that_json_lacks_are_refused(text):
    assert refusal(parse_json, text, "x.json").startswith("x.json is no JSON: ")


def test_only_regular_files_within_the_limit_are_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc\xff")
    assert read_bytes(path, 4) == b"abc\xff" and read_text(path) == "abc\ufffd"
    assert "has 4 bytes; at most 3 are read" in refusal(read_bytes, path, 3)
    with open(tmp_path / "vast", "wb") as f:
        f.truncate(1 << 40)
    assert "at most" in refusal(read_text, tmp_path / "vast")
    os.mkfifo(tmp_path / "pipe")  # a reader that opened it plainly would wait for ever
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "loop", "absent", "."):
        assert str(tmp_path / name) in refusal(read_bytes, tmp_path / name)
    assert "no regular file" in refusal(read_bytes, "/dev/zero")
    assert refusal(read_bytes, "a\0b")


def test_damaged_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"event": "a"}\n\n[1]\n{"event": NaN}\n{"event": "b"}\n{"event": "c', encoding="utf-8"
    )
    assert read_events(path) == ([{"event": "a"}, {"event": "b"}], 3)


def test_a_file_appears_under_its_name_when_it_is_complete(tmp_path):
    path = tmp_path / "a.json"
    replace_text(path, "[1]")
    with pytest.raises(ZeroDivisionError), replacing(path) as f:
        f.write(b"[2")
        assert read_json(path) == [1]
        f.write(b"%d" % (1 / 0))
    assert read_json(path) == [1] and os.listdir(tmp_path) == ["a.json"]
    replace_text(path, "[3]")
    assert read_json(path) == [3] and sha256(path) == hashlib.sha256(b"[3]").hexdigest()


def test_both_functions_that_replace_files_are_one_text():
    """The trainer imports nothing of the repository, so it has its own; only the error differs."""
    texts = []
    for name, error in (("train_gpt.py", "UserError"), ("fairway/records/files.py", "RecordError")):
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        texts.append(ast.unparse(functions["replacing"]).replace(error, "Error"))
    assert texts[0] == texts[1]
