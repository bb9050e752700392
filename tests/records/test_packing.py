"""Packing: runs must be one experiment, figures agree everywhere, a folder is complete or
absent.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from finished_runs import (
    CODE,
    ENTRY,
    SHIPPED,
    TRAIN,
    made_run,
    names_in,
    pack_runs,
    write_files,
)
from hypothesis import given
from hypothesis import strategies as st

from fairway.records import packing, trainer_source
from fairway.records.checks import run_check
from fairway.records.files import RecordError
from fairway.records.folder import read_record_folder
from fairway.records.packed_code import counted_bytes, pack_sources, shipped_files
from fairway.records.pull_request import check_repository
from fairway.records.schema import problems
from fairway.report import draw_picture
from train_gpt import PRESETS, Config, packed_code_bytes


@pytest.fixture
def root(tmp_path) -> Path:
    return write_files(tmp_path / "root", CODE)


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [made_run(tmp_path / f"seed{seed}", seed) for seed in (1337, 42, 2025)]


# ==== What is written =============================================================================
def test_a_record_holds_logs_code_scores_and_a_picture_of_all_seeds(runs, root, tmp_path):
    folder = pack_runs(runs, root, tmp_path / "records")
    assert folder == tmp_path / "records/track_non_record_16mb/2026-05-01_Gates_v2.1"
    per_seed = [
        f"{kind}_seed{s}.{end}"
        for kind, end in (
            ("train", "log"),
            ("eval", "log"),
            ("score", "json"),
            ("certificate", "json"),
        )
        for s in (1337, 42, 2025)
    ]
    assert names_in(folder) == sorted(
        [*SHIPPED, *per_seed, "README.md", "submission.json", "requirements.txt", "picture.png"]
    )
    for run, seed in zip(runs, (1337, 42, 2025), strict=True):
        assert (folder / f"train_seed{seed}.log").read_bytes() == (
            run / f"logs/train_seed{seed}.txt"
        ).read_bytes()
        for kind in ("score", "certificate"):
            text = (folder / f"{kind}_seed{seed}.json").read_text()
            assert json.loads(text) == json.loads((run / f"eval/{kind}.json").read_text())
            assert text.count("\n") == len(json.loads(text))
    assert (folder / "requirements.txt").read_text() == "numpy==2.4.6\ntqdm==4.70.1\n"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_record_may_carry_the_artifact_of_its_first_seed(runs, root, tmp_path):
    entry = ENTRY._replace(with_artifact=True)
    folder = pack_runs(runs, root, tmp_path / "records", entry)
    carried = folder / "final_model_seed42.int6.ptz"
    assert [p.name for p in folder.glob("*.ptz")] == [carried.name]
    assert carried.read_bytes() == (runs[1] / "final_model.int6.ptz").read_bytes()
    assert f"| `{carried.name}` |" in (folder / "README.md").read_text()
    result = run_check("artifacts", read_record_folder(folder))
    assert (result.verdict, result.text) == ("ok", f"{carried.name}: as scored")
    for run in runs:
        (run / "final_model.int6.ptz").unlink()
    with pytest.raises(RecordError, match="--with-artifact: .* has no artifact with the hash"):
        pack_runs(runs, root, tmp_path / "records", entry, replace=True)
    assert carried.is_file()


def test_submission_json_has_means_the_largest_size_and_no_problems(runs, root, tmp_path):
    folder = pack_runs(runs, root, tmp_path / "records")
    data = json.loads((folder / "submission.json").read_text())
    assert problems(data, complete=True) == []
    scores = [1.1 + s / 1e5 for s in (42, 1337, 2025)]
    assert data["val_bpb"] == round(sum(scores) / 3, 6) and data["val_loss"] == round(
        2 * sum(scores) / 3, 6
    )
    assert data["val_bpb_std"] == 0.010069
    assert data["seeds"] == [42, 1337, 2025] and list(data["seed_results"]) == [
        "42",
        "1337",
        "2025",
    ]
    largest, code = len("artifact of 2025") * 12_025, sum(len(CODE[name]) for name in SHIPPED)
    assert (data["bytes_code"], data["bytes_total"]) == (code, largest + code)
    assert data["seed_results"]["42"] == dict(
        val_loss=2.20084,
        val_bpb=1.10042,
        pre_quant_val_bpb=1.21042,
        artifact_bytes=len("artifact of 42") * 10_042,
        steps=542,
        step_avg_ms=277.53,
        train_time_s=150.4,
        eval_time_s=3.5,
    )
    assert data["compliance"]["certified"] is True


def test_a_run_without_evaluation_has_the_score_of_its_training(root, tmp_path):
    runs = [made_run(tmp_path / f"seed{s}", s, evaluated=False) for s in (1, 2)]
    folder = pack_runs(runs, root, tmp_path / "records")
    data = json.loads((folder / "submission.json").read_text())
    assert data["val_bpb"] == 1.200015 and data["compliance"]["certified"] is None
    text = (folder / "README.md").read_text()
    assert "eval_final.py was not run" in text and "Runs: 2; three seeds are the custom." in text
    assert not [
        name for name in names_in(folder) if name.startswith(("eval_seed", "score", "certificate"))
    ]


def test_the_readme_has_every_section_and_the_figures_of_submission_json(runs, root, tmp_path):
    folder = pack_runs(
        runs,
        root,
        tmp_path / "records",
        ENTRY._replace(name="Gates <b> | [x](y)", blurb="One | two"),
    )
    text, data = (
        (folder / "README.md").read_text(),
        json.loads((folder / "submission.json").read_text()),
    )
    assert re.findall("^#+ (.+)$", text, re.M) == [
        f"Gates &lt;b&gt; &#124; &#91;x&#93;(y): {data['val_bpb']:.6f} BPB",
        "What was not done",
        "Results",
        "What changed",
        "Architecture",
        "Training",
        "Quantisation",
        "The score, step by step",
        "Rule compliance",
        "Run command",
        "Requirements",
        "Reproduction",
        "Lineage and credits",
        "Included files",
    ]
    assert "One &#124; two" in text
    for seed, result in data["seed_results"].items():
        assert f"| {seed} | {result['steps']} | {result['step_avg_ms']:.2f} |" in text
        assert (
            f"| {result['val_bpb']:.6f} | {result['val_loss']:.6f} | {result['artifact_bytes']:,} |"
            in text
        )
    assert f"{data['bytes_total']:,} bytes" in text and f"{data['val_bpb_std']:.6f}" in text
    assert "| causal | ok | ok | ok |" in text and "| smear | not run | not run | not run |" in text
    for name in names_in(folder):
        assert f"`{name}`" in text, name
    assert "not the challenge's FineWeb split: 1,000 tokens" in text and "not run on 8×H100" in text


def test_the_run_command_names_settings_that_differ_from_the_preset(runs, root, tmp_path):
    folder = pack_runs(runs, root, tmp_path / "records")
    block = re.search(r"```bash\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert (
        "PRESET=cpu NUM_LAYERS=5 CODEC='a b' GPTQ=1 NUM_HEADS=4 TRAIN_BATCH_TOKENS=2048 python "
        "train_gpt.py" in block
    )
    assert "for seed in 42 1337 2025; do" in block and "python eval_final.py\n" in block
    assert (
        "SEED=$seed RUN_ID=train_seed$seed" in block and "DATA_PATH=../../../data/embedded" in block
    )
    assert subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True).stderr == ""


def test_settings_and_presets_of_the_real_trainer_are_read_without_running_it():
    source = (ROOT / "train_gpt.py").read_text()
    assert trainer_source.trainer_presets(source) == PRESETS
    assert trainer_source.setting_defaults(source, "Config") == {
        n: f.default for n, f in Config.__dataclass_fields__.items()
    }
    assert trainer_source.setting_roles(source, "Config") == {
        n: f.metadata["role"] for n, f in Config.__dataclass_fields__.items()
    }
    for text in ("PRESETS = open('x')", "("):
        assert trainer_source.trainer_presets(text) == {}


def test_presets_may_be_texts_or_dicts():
    config = """
class Config:
    layers: int = knob(9, "layers", role="model")
    width: float = knob(2.0, "width")
    gptq: bool = knob(False, "GPTQ")
    out_dir: str = knob(".", "folder", role="place")

"""
    texts = """PRESET_LINES = {"base": "LAYERS=11 WIDTH=3", "wide": "PRESET=base GPTQ=1 WIDTH=4"}
PRESETS = {name: read_preset(name) for name in PRESET_LINES}"""
    dicts = """BASE = dict(layers=11, width=3.0)
PRESETS = {"base": BASE, "wide": BASE | {"gptq": True, "width": 4.0}, "odd": open("x")}"""
    base = {"layers": 11, "width": 3.0}
    for presets in (texts, dicts):
        assert trainer_source.trainer_presets(config + presets) == {
            "base": base,
            "wide": base | {"gptq": True, "width": 4.0},
        }
    assert trainer_source.free_settings(config, "Config") == {"out_dir"}
    old = config.replace(', role="model"', "").replace(', role="place"', "")
    assert "run_id" in trainer_source.free_settings(old, "Config")


def test_against_the_record_before_it_names_settings_and_both_tests(root, tmp_path):
    before = pack_runs(
        [made_run(tmp_path / f"old{s}", s, mlp_mult=2.0, gptq=False) for s in (7, 8, 9)],
        root,
        tmp_path / "records",
        ENTRY._replace(slug="before"),
    )
    runs = [made_run(tmp_path / f"new{s}", s) for s in (1, 2, 3)]
    text = (
        pack_runs(runs, root, tmp_path / "records", ENTRY._replace(against=before)) / "README.md"
    ).read_text()
    changed = text[text.index("## What changed") : text.index("## Architecture")]
    assert "Against `2026-05-01_before`" in changed and "| MLP_MULT | 2.0 | 3.0 |" in changed
    assert (
        "| GPTQ | False | True |" in changed
        and "SEED" not in changed
        and "NUM_LAYERS" not in changed
    )
    assert changed.count(" p = ") == 2 and "No significance test" not in text


def test_the_picture_is_drawn_from_the_runs(runs, root, tmp_path):
    """Draw the real picture once, of one run: matplotlib takes seconds."""
    folder = pack_runs(runs[:1], root, tmp_path / "records", draw=draw_picture)
    assert (folder / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "](picture.png)" in (folder / "README.md").read_text()


# ==== What is refused =============================================================================
def changed(path: Path, change) -> None:
    """Change one JSON file, or the events of a log, in place."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def start(key, value):
    def change(event):
        if event.get("event") == "start":
            (event["sha256"] if key in event["sha256"] else event["settings"])[key] = value

    return change


def drop(name):
    return lambda event: event.update(event="gone") if event.get("event") == name else None


JSONL, SCORE = "logs/train_seed42.jsonl", "eval/score.json"
REFUSALS = {
    "code": (
        JSONL,
        start("code", "0" * 64),
        ["train_seed1337.txt", "hash of their code", "000000000000"],
    ),
    "data": (
        JSONL,
        start("data", "0" * 64),
        ["the hash of their data", "dddddddddddd and 000000000000"],
    ),
    "tokenizer": (
        JSONL,
        start("tokenizer", "0" * 64),
        ["the hash of their tokenizer", "777777777777"],
    ),
    "setting": (
        JSONL,
        start("num_layers", 6),
        ["differ in NUM_LAYERS: 5 and 6", "train_seed42.txt"],
    ),
    "absent setting": (JSONL, start("new", 1), ["differ in NEW: null and 1"]),
    "seed": (JSONL, start("seed", 1337), ["both have seed 1337"]),
    "no seed": (JSONL, start("seed", "x"), ["names no seed"]),
    "no final": (JSONL, drop("final"), ["train_seed42.txt has no final score"]),
    "no artifact": (JSONL, drop("artifact"), ["names no artifact"]),
    "no val": (JSONL, drop("val"), ["has no val with a number as bpb"]),
    "split": (
        SCORE,
        lambda s: s["sha256"].update(data="0" * 64),
        ["the hash of the split they score"],
    ),
    "tokens": (SCORE, lambda s: s.update(tokens=999), ["the tokens they score: 1000 and 999"]),
    "evaluation": (
        SCORE,
        lambda s: s["settings"].update(eval_stride=32),
        ["EVAL_STRIDE of the evaluation: 64 and 32"],
    ),
    "other artifact": (
        SCORE,
        lambda s: s["sha256"].update(artifact="0" * 64),
        ["json is damaged, or of another"],
    ),
    "other code": (
        SCORE,
        lambda s: s["code"].update({"eval_final.py": "0" * 64}),
        ["eval_final.py has", "with 0"],
    ),
    "no code": (SCORE, lambda s: s.pop("code"), ["score.json names no code"]),
    "time unknown": (SCORE, lambda s: s.update(eval_seconds=None), ["knows no time of scoring"]),
    "text score": (SCORE, lambda s: s.update(val_bpb="1.1"), ["score.json has no number for bpb"]),
    "odd ladder": (SCORE, lambda s: s.update(ladder=[1, 2]), ["hold what neither script writes"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_runs_of_different_experiments_are_refused_before_anything_is_written(
    name, runs, root, tmp_path
):
    path, change, words = REFUSALS[name]
    changed(runs[1] / path, change)
    with pytest.raises(RecordError) as caught:
        pack_runs(runs, root, tmp_path / "records")
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value
    assert not (tmp_path / "records").exists() or names_in(tmp_path / "records") == []


ODD = [None, "x\n", -1, 1e308, [], {}, True, 10**400, "\ud800|<b>", {"a": [{}]}]


@given(
    name=st.sampled_from(["logs/train_seed1.jsonl", SCORE, "eval/certificate.json"]),
    where=st.integers(0, 10_000),
    value=st.sampled_from(ODD),
)
def test_whatever_a_run_holds_it_is_packed_or_refused_in_one_line(
    tmp_path_factory, name, where, value
):
    folder = tmp_path_factory.mktemp("odd")
    run, root = made_run(folder / "run", 1), write_files(folder / "root", CODE)
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    places = [(at, key) for at in tables(lines) for key in at]
    at, key = places[where % len(places)]
    at[key] = value
    (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        assert (pack_runs([run], root, folder / "records") / "README.md").is_file()
    except RecordError as e:
        assert "\n" not in str(e) and not list((folder / "records").rglob("*.json"))


def tables(data) -> list[dict]:
    """Return every JSON object in a value."""
    inner = data.values() if type(data) is dict else data if type(data) is list else ()
    return [
        *([data] if type(data) is dict else []),
        *(table for value in inner for table in tables(value)),
    ]


def test_files_that_do_not_belong_together_are_refused(runs, root, tmp_path):
    out = tmp_path / "records"
    with pytest.raises(RecordError, match="4 runs were given, but they are 3"):
        pack_runs([*runs, runs[0] / "logs/train_seed1337.txt"], root, out)
    (runs[0] / "final_model.int6.ptz").write_bytes(b"other")
    with pytest.raises(RecordError, match="final_model.int6.ptz has sha256 .* wrote over it"):
        pack_runs(runs, root, out)
    made_run(runs[0], 1337, evaluated=False)
    for name in ("score.json", "certificate.json"):
        (runs[0] / "eval" / name).unlink()
    with pytest.raises(
        RecordError, match="train_seed42.txt was evaluated, .*train_seed1337.txt was not"
    ):
        pack_runs(runs, root, out)
    (root / "train_gpt.py").write_text(TRAIN + "#")
    with pytest.raises(
        RecordError, match="train_gpt.py has sha256 .* pack from the checkout that trained it"
    ):
        pack_runs(runs[1:], root, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(slug="../up"), "--slug is '../up'"),
        (dict(slug=""), "--slug is ''"),
        (dict(slug=".x"), "--slug"),
        (dict(slug="a" * 81), "--slug"),
        (dict(date="2026-02-30"), "--date is '2026-02-30'"),
        (dict(date="20260201"), "--date"),
        (dict(author="  "), "--author"),
        (dict(author="a\nb"), "--author"),
        (dict(github_id="a b"), "--github-id is 'a b'"),
        (dict(blurb="a\x1b[2J"), "--blurb"),
        (dict(track="10min"), "--track is 10min"),
        (dict(against=Path("nowhere")), "--against is nowhere"),
        (dict(pack_code="zip"), "--pack-code is 'zip'"),
    ],
)
def test_a_bad_option_is_named(change, says, runs, root, tmp_path):
    with pytest.raises(RecordError) as caught:
        pack_runs(runs, root, tmp_path / "records", ENTRY._replace(**change))
    assert (
        says in str(caught.value)
        and "\n" not in str(caught.value)
        and not (tmp_path / "records").exists()
    )


# ==== Whole or not at all =========================================================================
def test_a_write_that_fails_leaves_what_was_there(runs, root, tmp_path, monkeypatch):
    out, real = tmp_path / "records", packing.write_file
    old = pack_runs(runs, root, out)
    before = {name: (old / name).read_bytes() for name in names_in(old)}
    with pytest.raises(
        RecordError, match="is there already; choose another --slug, or give --replace"
    ):
        pack_runs(runs, root, out)
    for failing in range(0, 19, 3):
        left = [failing]

        def write(path, content, left=left):
            left[0] -= 1
            if left[0] < 0:
                path.write_bytes(content[:3])
                raise OSError(28, "No space left on device", str(path))
            real(path, content)

        monkeypatch.setattr(packing, "write_file", write)
        with pytest.raises(OSError, match="No space left"):
            pack_runs(runs, root, out, replace=True)
        assert {name: (old / name).read_bytes() for name in names_in(old)} == before
        assert [p.name for p in old.parent.iterdir()] == [old.name]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from fairway.records.packing import pack_record
from fairway.records.readme import Entry
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
rename = os.rename
def second(a, b):
    if str(a).endswith(".part"): die()
    rename(a, b)
os.rename = second
runs = [Path(p) for p in {runs!r}]
pack_record(runs, Entry(*{entry!r}), Path({code!r}), Path({out!r}), {draw}, replace=True)
"""


@pytest.mark.parametrize(
    "draw", ["die", "lambda runs, path: path.write_bytes(b'x')"], ids=["drawing", "renaming"]
)
def test_a_kill_leaves_nothing_half_written_and_the_next_pack_repairs_it(
    draw, runs, root, tmp_path
):
    old = pack_runs(runs, root, tmp_path / "records")
    before = {name: (old / name).read_bytes() for name in names_in(old)}
    code = KILLED.format(
        root=str(ROOT),
        draw=draw,
        runs=[str(r) for r in runs],
        entry=tuple(ENTRY),
        code=str(root),
        out=str(tmp_path / "records"),
    )
    assert (
        subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode
        == -signal.SIGKILL
    )
    kept = old if old.exists() else old.with_name(f".{old.name}.old")
    assert {name: (kept / name).read_bytes() for name in names_in(kept)} == before
    with pytest.raises(RecordError, match="is there already"):
        pack_runs(runs, root, tmp_path / "records")
    assert {name: (old / name).read_bytes() for name in names_in(old)} == before
    assert pack_runs(runs, root, tmp_path / "records", replace=True) == old
    assert [p.name for p in old.parent.iterdir()] == [old.name]


# ==== Packed code =================================================================================
def run_in(folder: Path, *arguments: str, temporary: Path) -> subprocess.CompletedProcess:
    temporary.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={"TMPDIR": str(temporary)},
        text=True,
        capture_output=True,
    )


def test_packed_scripts_run_from_the_archive_and_leave_nothing(runs, root, tmp_path):
    folder, temporary = (
        pack_runs(runs, root, tmp_path / "records", ENTRY._replace(pack_code="lzma")),
        tmp_path / "tmp",
    )
    done = run_in(folder, "train_gpt.py", "--help", temporary=temporary)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith(
        'train --help """Trains."""\nTrue '
    )
    assert done.stdout.split()[-1].startswith(str(temporary)) and list(temporary.iterdir()) == []
    assert run_in(folder, "train_gpt.py", "leave", temporary=temporary).returncode == 7
    assert run_in(folder, "eval_final.py", temporary=temporary).stdout == "eval Config\n"
    assert list(temporary.iterdir()) == []
    data = json.loads((folder / "submission.json").read_text())
    assert data["bytes_code"] == sum(
        (folder / n).stat().st_size for n in ("train_gpt.py", "eval_final.py", "code.xz")
    )
    assert {name: (folder / "source" / name).read_text() for name in SHIPPED} == {
        n: CODE[n] for n in SHIPPED
    }


def test_a_damaged_archive_is_refused_in_one_line(runs, root, tmp_path):
    folder = pack_runs(runs, root, tmp_path / "records", ENTRY._replace(pack_code="lzma"))
    archive = bytearray((folder / "code.xz").read_bytes())
    archive[len(archive) // 2] ^= 1
    (folder / "code.xz").write_bytes(archive)
    for _ in range(2):
        done = run_in(folder, "eval_final.py", temporary=tmp_path / "tmp")
        assert (
            done.returncode == 1
            and len(done.stderr.splitlines()) == 1
            and "its sha256 is not" in done.stderr
        )
        (folder / "code.xz").unlink(missing_ok=True)
    assert not (tmp_path / "tmp").exists() or list((tmp_path / "tmp").iterdir()) == []


def test_our_code_counts_at_most_90_000_bytes_and_training_reserves_enough():
    """Training must reserve what the record counts, and not much more: the rest goes to weights."""
    names = shipped_files(ROOT)
    assert {"train_gpt.py", "eval_final.py", "fairway/scoring/experts/ngram.py"} <= set(names)
    rooms = ("records", "report", "correction", "certificate", "decoding", "coreml", "verbs")
    assert not [name for name in names if name.startswith(tuple(f"fairway/{r}" for r in rooms))]
    counted = counted_bytes(pack_sources({name: (ROOT / name).read_bytes() for name in names}))
    reserved = packed_code_bytes([ROOT / name for name in sorted(names, key="train_gpt.py".__ne__)])
    assert counted <= 90_000 and 0 <= reserved - counted <= 3000


def test_the_same_sources_give_the_same_bytes():
    sources = {name: text.encode() for name, text in CODE.items()}
    assert pack_sources(sources) == pack_sources(dict(reversed(sources.items())))


def test_the_files_that_ship_are_those_that_the_score_used_or_both_scripts_import(root):
    assert shipped_files(root) == SHIPPED
    (root / "eval_final.py").unlink()
    with pytest.raises(RecordError, match="lacks train_gpt.py or eval_final.py"):
        shipped_files(root)


def test_a_file_that_the_score_used_must_still_be_there(runs, root, tmp_path):
    changed(runs[1] / SCORE, lambda s: s["code"].update({"fairway/gone.py": "0" * 64}))
    with pytest.raises(RecordError, match="was made with fairway/gone.py, which is not in"):
        pack_runs(runs, root, tmp_path / "records")


# ==== The pull request ============================================================================
@pytest.fixture
def repository(runs, root, tmp_path):
    def git(*arguments):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=b", *arguments],
            cwd=root,
            check=True,
            capture_output=True,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        )

    git("init", "-q")
    (root / ".gitignore").write_text("__pycache__/\n*.fwy\n")
    git("add", "."), git("commit", "-qm", "code")
    return pack_runs(runs, root, root / "records"), git


def test_a_repository_may_hold_one_new_folder_and_nothing_else(repository):
    folder, git = repository
    check_repository(folder)
    git("add", "records")
    check_repository(folder)
    for name, says in (
        (folder.parents[2] / "stray.txt", "stray.txt is changed or new as well"),
        (folder / "x.fwy", "x.fwy is ignored by git"),
    ):
        name.write_text("x")
        with pytest.raises(RecordError, match=says):
            check_repository(folder)
        name.unlink()
    git("commit", "-qm", "record")
    check_repository(folder)
    (folder / "README.md").write_text("x")
    with pytest.raises(RecordError, match="README.md was committed before and is changed now"):
        check_repository(folder)
