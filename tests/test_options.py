"""What command lines share."""

import json

import pytest

from fairway.options import Parser, need_place, save_json
from train_gpt import UserError


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--count", "x"], "argument --count: invalid int value: 'x'; see --help"),
        (["--what"], "unrecognized arguments: --what; see --help"),
    ],
)
def test_a_mistake_is_one_line_that_somebody_catches(arguments, message):
    parser = Parser()
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError, match=message) as e:
        parser.parse_args(arguments)
    assert "\n" not in str(e.value) and parser.parse_args(["--count", "3"]).count == 3


def test_a_part_of_an_options_name_is_a_mistake():
    parser = Parser()
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError, match="unrecognized arguments: --cou"):
        parser.parse_args(["--cou", "3"])


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (
        None,
        str(tmp_path / "x.json"),
        str(tmp_path / "new" / "x.json"),
        str(tmp_path / "file"),
    ):
        need_place(path)
    for path in (str(tmp_path), str(tmp_path / "file" / "x.json")):
        with pytest.raises(UserError, match="cannot be written there; name another file"):
            need_place(path)


def test_what_was_found_is_a_file_where_one_is_named(tmp_path):
    save_json(None, {"a": 1})
    save_json(str(tmp_path / "x.json"), {"text": "naïve \udcff"})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_bytes())["text"].startswith("naïve ")
