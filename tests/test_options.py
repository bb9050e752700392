"""What command lines share."""

import json

import pytest

from fairway.options import Parser, save_json
from train_gpt import UserError


@pytest.mark.parametrize("arguments, message", [
    (["--count", "x"], "argument --count: invalid int value: 'x'; see --help"),
    (["--what"], "unrecognized arguments: --what; see --help")])
def test_a_mistake_is_one_line_that_somebody_catches(arguments, message):
    parser = Parser()
    parser.add_argument("--count", type=int)
    with pytest.raises(UserError, match=message) as e:
        parser.parse_args(arguments)
    assert "\n" not in str(e.value) and parser.parse_args(["--count", "3"]).count == 3


def test_what_was_found_is_a_file_where_one_is_named(tmp_path):
    save_json(None, {"a": 1})
    save_json(str(tmp_path / "x.json"), {"text": "naïve \udcff"})
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "x.json").read_bytes())["text"].startswith("naïve ")
