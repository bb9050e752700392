"""Settings of an evaluation: all are used, and wrong names and values are refused."""

import ast
import dataclasses
import re
from dataclasses import fields

import pytest
from conftest import ROOT
from test_settings import ORDINARY

from fairway.scoring.settings import EvalConfig, settings_help
from train_gpt import PRESETS, Config, UserError, check_value

NAMES = [f.name for f in fields(EvalConfig)]


def refusal(**env) -> str:
    with pytest.raises(UserError) as caught:
        EvalConfig.from_env({name: str(value) for name, value in env.items()})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 250
    return message


def is_config(node: ast.expr) -> bool:
    return (
        node.id in ("cfg", "settings")
        if isinstance(node, ast.Name)
        else getattr(node, "attr", "") == "cfg"
    )


def test_every_setting_is_read():
    """Each is read as an attribute; a value that is only checked or hashed is not used."""
    read = set()
    for path in [*(ROOT / "fairway").rglob("*.py"), ROOT / "eval_final.py"]:
        read |= {
            n.attr
            for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and is_config(n.value)
        }
    assert set(NAMES) - read == set()


def test_settings_are_frozen_explained_and_bounded():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EvalConfig().eval_stride = 1
    for f in fields(EvalConfig):
        assert f.metadata["help"] and len(f.metadata["help"]) < 120, f.name
        assert type(f.default) in (str, bool) or f.metadata["low"] is not None, (
            f"{f.name} has no lower bound"
        )


ROLES = {
    "place",
    "runtime",
    "neural",
    "experts",
    "mixture",
    "ttt",
    "correction",
    "certificate",
    "size",
}


def test_every_setting_has_a_role_and_every_role_a_setting():
    assert {f.metadata["role"] for f in fields(EvalConfig)} == ROLES


def test_help_has_a_line_for_each_setting():
    lines = settings_help().splitlines()
    assert [line.split()[0] for line in lines] == [name.upper() for name in NAMES]
    for line, f in zip(lines, fields(EvalConfig), strict=True):
        shown = f"{f.default:d}" if type(f.default) is bool else str(f.default)
        assert " ".join(line.split()) == " ".join(
            [f.name.upper(), *shown.split(), *f.metadata["help"].split()]
        )


# ---- One value -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("EVAL_STRIDE", "2.5", "it must be a whole number (default 64)"),
        ("EVAL_STRIDE", "", "a whole number"),
        ("EVAL_STRIDE", "0", "it must be from 1 to 65536"),
        ("EVAL_SEQ_LEN", "65537", "it must be from 0 to 65536"),
        ("EVAL_SEQ_LEN", "-1", "it must be from 0"),
        ("EVAL_MODE", "slide", "it must be one of sliding, cached"),
        ("EVAL_DOCUMENTS", "yes", "it must be 0 or 1"),
        ("EVAL_BATCH_TOKENS", "-1", "from 0 to any finite value"),
        ("NGRAM_ORDERS", "17", "it must be from 1 to 16"),
        ("MATCH_LEAST", "0", "it must be from 1 to 64"),
        ("MIX_MODE", "geometric", "it must be one of linear, log"),
        ("MIX_LR", "fast", "it must be a number (default 1.0)"),
        ("MIX_LR", "-1", "it must be from 0 to 100"),
        ("MIX_FLOOR", "0.21", "it must be from 0 to 0.2"),
        ("MIX_RATE", "0", "it must be from 0.0001 to 1"),
        ("MIX_NEURAL", "1", "it must be from 0.01 to 0.99"),
        ("MIX_GUARD", "nan", "it must be from 0 to 10"),
        ("MIX_WEIGHTS", "softmax", "it must be one of exponential, em, sets"),
        ("TTT", "slot", "it must be one of none, chunks, lora, phases, bias"),
        ("TTT_EPOCHS", "0", "it must be from 1 to 100"),
        ("TTT_SECONDS", "inf", "it must be from 0"),
        ("DEVICE", "tpu", "it must be one of cpu, cuda, mps"),
        ("CORRECTION_CODEC", "zip", "it must be one of varint, rice, modelled"),
        ("CERTIFY_SECONDS", "0.5", "it must be from 1"),
        ("SIZE_BUDGET_BYTES", "0", "it must be from 1"),
    ],
)
def test_a_bad_value_names_the_setting_what_it_got_and_what_it_takes(name, text, says):
    message = refusal(**{name: text})
    assert message.startswith(f"{name} is ") and says in message and text in message


@pytest.mark.parametrize(
    "f", [f for f in fields(EvalConfig) if type(f.default) in (int, float)], ids=lambda f: f.name
)
def test_limits_hold_at_the_edge_and_not_beyond(f):
    low, high, step = f.metadata["low"], f.metadata["high"], 1 if type(f.default) is int else 1e-3
    for edge, beyond in ((low, low - step), (high, (high or 0) + step)):
        if edge is not None:
            check_value(f, type(f.default)(edge))
            with pytest.raises(UserError, match=f"^{f.name.upper()} is .* from {low} to "):
                check_value(f, type(f.default)(beyond))


@pytest.mark.parametrize("value", ["64", 64.0, None, True, [64]])
def test_a_value_of_another_type_is_refused(value):
    with pytest.raises(UserError, match="EVAL_STRIDE is .*, not int"):
        EvalConfig(eval_stride=value)


def test_parsing_keeps_the_declared_type():
    cfg = EvalConfig.from_env(
        dict(EVAL_STRIDE="7", MIX_LR="2", EVAL_DOCUMENTS="1", EVAL_MODE="cached", NTK_ROPE="0")
    )
    assert (cfg.eval_stride, cfg.mix_lr, cfg.eval_documents, cfg.eval_mode, cfg.ntk_rope) == (
        7,
        2.0,
        True,
        "cached",
        0,
    )
    assert all(type(getattr(cfg, f.name)) is type(f.default) for f in fields(cfg))
    assert EvalConfig.from_env({}) == EvalConfig()


def test_a_stride_that_would_leave_rows_out_is_refused():
    message = refusal(EVAL_SEQ_LEN=32, EVAL_STRIDE=33)
    assert message == "EVAL_STRIDE is 33; it must be at most EVAL_SEQ_LEN=32"
    assert EvalConfig(eval_seq_len=32, eval_stride=32).eval_stride == 32
    assert (
        EvalConfig(eval_stride=65_536).eval_seq_len == 0
    )  # the model's own, which is not known yet


# ---- Names ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("EVAL_STRID", "EVAL_STRIDE"),
        ("EVALSTRIDE", "EVAL_STRIDE"),
        ("STRIDE_EVAL", "EVAL_STRIDE"),
        ("MIX_LRS", "MIX_LR"),
        ("TTT_EPOCH", "TTT_EPOCHS"),
        ("MIX_WEIGHT", "MIX_WEIGHTS"),
        ("NGRAM_ORDER", "NGRAM_ORDERS"),
        ("EXPERTS_RESET", "EXPERT_RESET"),
        ("USE_CORRECTIONS", "USE_CORRECTION"),
        ("VAL_FILE", "VAL_FILES"),
        ("CHECKPOINTS", "CHECKPOINT"),
        ("eval_mode", "EVAL_MODE"),
        ("NTKROPE", "NTK_ROPE"),
        ("NUM_LAYER", "NUM_LAYERS"),
    ],
)
def test_a_near_miss_names_the_right_one(name, right):
    message = refusal(**{name: "1"})
    assert message == f"{name}=1 is no setting; did you mean {right}? See --help"


def test_every_setting_in_lower_case_is_a_near_miss_of_itself():
    for name in NAMES:
        assert f"did you mean {name.upper()}?" in refusal(**{name: "0"}), name


def test_ordinary_environment_variables_are_ignored():
    for name in ORDINARY:
        assert EvalConfig.from_env({name: "something"}) == EvalConfig(), name


def test_one_environment_serves_trainer_and_evaluation():
    ours = {
        f.name.upper(): f"{f.default:d}" if type(f.default) is bool else str(f.default)
        for f in fields(EvalConfig)
    }
    theirs = {
        f.name.upper(): f"{f.default:d}" if type(f.default) is bool else str(f.default)
        for f in fields(Config)
    }
    for preset in PRESETS:
        assert EvalConfig.from_env(theirs | ours | {"PRESET": preset}) == EvalConfig()
    for name, value in ours.items():
        Config.from_env({"PRESET": "smoke", name: value}, "cpu")
    shared = set(NAMES) & {f.name for f in fields(Config)}
    assert shared == {
        "data_path",
        "tokenizer_path",
        "out_dir",
        "device",
        "extra_code_files",
        "size_budget_bytes",
    }


def test_settings_have_one_home():
    """Only verbs and our own scorer for `fairway certify`, which no one calls with arguments, read
    settings from the environment; the sandbox passes PATH on, and a cell of `fairway compare` gets
    all of it.
    """
    for path in (ROOT / "fairway").rglob("*.py"):
        text = re.sub(
            r'os\.environ\.get\(\s*"(PATH|PYTHONPATH)"|os\.environ \| ',
            "",
            path.read_text(encoding="utf-8"),
        )
        reads = path.parent.name == "verbs" or path.name == "own_scorer.py"
        assert reads or "os.environ" not in text, path
