"""fairway/records/checks: its own check catches each bad folder, good ones pass, damage breaks
none.
"""

import ast
import json
import random
import time
from pathlib import Path

import pytest

from fairway.records.checks import CHECKS, check_record, run_check, source
from fairway.records.files import RecordError
from fairway.records.folder import read_claims, read_record_folder, runs_claimed
from tests.zoo.records import BAD, GOOD, folder_name, good_files, table, write
from tests.zoo.records.bad import submission_with, with_function, without
from tests.zoo.records.good import make

ROOT = Path(__file__).resolve().parents[2]

UNTOLD = {"certificate", "step_time"}  # checks of what honest logs of some dialects do not state
# Which checks read a file of that kind: what else they judge stays as it was.
READS = {
    "md": {"files", "helpers", "units", "numbers", "seeds"},
    "json": CHECKS.keys()
    - source.SOURCE_CHECKS.keys()
    - {"stub", "arithmetic", "loss_range", "step_time", "log_whole"},
    "log": CHECKS.keys() - source.SOURCE_CHECKS.keys() - {"stub", "schema", "date"},
}


def verdicts(files, folder):
    return {v.check: v for v in check_record(write(files, folder))}


def failed(found) -> set[str]:
    return {name for name, verdict in found.items() if verdict.verdict == "FAIL"}


def whole(found) -> bool:
    """Tell whether every check ended as it should, in one printable line."""
    return list(found) == list(CHECKS) and all(
        v.verdict in ("ok", "FAIL", "cannot tell")
        and "broke" not in v.text
        and v.text.isprintable()
        and v.text
        for v in found.values()
    )


# ==== The zoo =====================================================================================
def test_the_docs_name_every_check_and_every_bad_folder():
    docs = (ROOT / "docs/LEGALITY.md").read_text(encoding="utf-8")
    assert (
        table() in docs and {name for name in [*CHECKS, "run"] if f"`{name}`" not in docs} == set()
    )


@pytest.mark.parametrize("name", GOOD)
def test_good_folders_pass(name, tmp_path):
    found = verdicts(good_files(name), tmp_path / name)
    assert (
        whole(found) and {n: v.text for n, v in found.items() if v.verdict != "ok"}.keys() <= UNTOLD
    )
    assert GOOD[name] != "ours" or all(v.verdict == "ok" for v in found.values())


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_caught_by_their_own_check(name, tmp_path):
    fault = BAD[name]
    found = verdicts(fault.build(), tmp_path / folder_name(name))
    own = found[fault.check]
    assert whole(found) and own.verdict == fault.verdict, own
    assert failed(found) - {fault.check} == set(fault.also)
    assert fault.verdict == "FAIL" or own.warnings


def test_the_zoo_has_enough_of_every_kind():
    assert len(BAD) >= 50 and {fault.check for fault in BAD.values()} == set(CHECKS)
    assert table().count("\n") == len(BAD) + 1


def test_warnings_name_their_line(tmp_path):
    found = verdicts(BAD["target_in_hash_key"].build(), tmp_path / "2026-05-01_x")["patterns"]
    name, line = found.warnings[0].split(" ")[0].split(":")
    assert "target" in (tmp_path / "2026-05-01_x" / name).read_text().splitlines()[int(line) - 1]


# ==== Judged rightly ==============================================================================
def test_the_other_track_has_no_limits_of_seeds_time_and_machine(tmp_path):
    files = make(
        "ours",
        seeds=(42,),
        each=dict(
            gpu="NVIDIA GeForce RTX 4090",
            world_size=1,
            train_seconds=9000.0,
            eval_seconds=2000.0,
            tokens=214_935,
            bytes=617_458,
        ),
        said={"track": "non_record_16mb"},
    )
    found = verdicts(files, tmp_path / "2026-05-01_x")
    assert failed(found) == set() and whole(found)


def test_a_certificate_in_the_folder_silences_no_pattern(tmp_path):
    """A certificate is a file like the others: anyone can write one."""
    counted = with_function(
        "def cached(keys, context, target):\n    key_hash = (context * 31) ^ target\n    return "
        "key_hash"
    )
    files = make("ours", trainer=counted["train_gpt.py"].decode())
    found = verdicts(files, tmp_path / "2026-05-01_a")
    assert found["certificate"].verdict == "ok" and found["patterns"].verdict == "cannot tell"


@pytest.mark.parametrize(
    "function,check_name,verdict",
    [
        ("def f():\n    import socket\n    return socket.gethostname()", "network", "ok"),
        (
            "def f():\n    import subprocess\n    subprocess.run(['git', 'rev-parse', 'HEAD'])",
            "network",
            "ok",
        ),
        (
            "def f():\n    import subprocess\n    subprocess.run('nvidia-smi', shell=True)",
            "network",
            "ok",
        ),
        ("def f():\n    import os\n    os.system('pip install brotli')", "network", "FAIL"),
        (
            "def f():\n    from huggingface_hub import hf_hub_download as get\n    get('x')",
            "network",
            "FAIL",
        ),
        ("def f(log):\n    log('see /scratch/golfer/readme')", "paths", "ok"),
        ("def f():\n    return open('../other/file.bin')", "paths", "FAIL"),
        ("def f():\n    return open('/proc/cpuinfo')", "paths", "ok"),
        (
            "def f():\n    import torch\n    return torch.load('x', weights_only=True)",
            "loading",
            "ok",
        ),
        ("def f():\n    import torch\n    return torch.load('x')", "loading", "cannot tell"),
        ("def f():\n    exec(open('notes.txt').read())", "loading", "FAIL"),
        ("def f():\n    return np.load('x', allow_pickle=True)", "loading", "FAIL"),
        ("def f():\n    limit_bytes = 16_777_216\n    return limit_bytes", "units", "FAIL"),
        ("def f():\n    buffer = 16 << 20\n    return buffer", "units", "ok"),
        ("def f(h):\n    return TokenLoader(h.val_files)", "validation", "FAIL"),
        ("def f(h):\n    return ValidationData(h.val_files)", "validation", "ok"),
        ("def f(h):\n    calib_files = h.val_files\n    return calib_files", "validation", "FAIL"),
        (
            "def eval_ttt(chunks, opt):\n    loss_sum = 0\n    for c in chunks:\n        loss_sum "
            "+= c\n        opt.step()",
            "patterns",
            "ok",
        ),
    ],
)
def test_code_is_judged_by_what_it_does(function, check_name, verdict, tmp_path):
    files = with_function(function)
    assert (
        run_check(check_name, read_record_folder(write(files, tmp_path / "2026-05-01_x"))).verdict
        == verdict
    )


@pytest.mark.parametrize(
    "change,check_name",
    [
        (
            lambda files: files | {"README.md": files["README.md"] + b"\nIt fits under 16 MiB.\n"},
            "units",
        ),
        (
            lambda files: submission_with(files, lambda data: data.update(seeds=[42, 42, 1337])),
            "seeds",
        ),
        (lambda files: submission_with(files, lambda data: data.update(date="soon")), "date"),
        (
            lambda files: (
                files
                | {
                    "README.md": files["README.md"].replace(
                        b"| 42 |", b"| 99 | 6700 | 1.1290 | |\n| 42 |"
                    )
                }
            ),
            "seeds",
        ),
        (
            lambda files: (
                files
                | {
                    "README.md": files["README.md"].replace(
                        b"| 42 | 6700 | 1.1134", b"| 42 | 6700 | 1.1123"
                    )
                }
            ),
            "numbers",
        ),
    ],
)
def test_small_changes_are_seen(change, check_name, tmp_path):
    files = make()
    changed = change(files)
    assert changed != files and failed(verdicts(changed, tmp_path / "2026-05-01_x")) >= {check_name}


def test_no_folder_is_a_mistake_of_the_user(tmp_path):
    with pytest.raises(RecordError, match="is no folder"):
        check_record(tmp_path / "nowhere")


# ==== Damage ======================================================================================
def test_every_file_may_be_missing_empty_binary_or_huge(tmp_path):
    files = make("ours")
    for i, name in enumerate(sorted(n for n in files if "2025" not in n and "1337" not in n)):
        for j, content in enumerate((None, b"", bytes(range(256)) * 40)):
            changed = without(files, name) if content is None else files | {name: content}
            assert whole(verdicts(changed, tmp_path / f"2026-05-01_{i}_{j}")), (name, content)
    folder = write(files, tmp_path / "2026-05-01_huge")
    for name in (
        "train_gpt.py",
        "submission.json",
        "README.md",
        "eval_seed42.log",
        "certificate_seed42.json",
    ):
        with open(folder / name, "r+b") as f:
            f.truncate(1 << 30)
    (folder / "loop").symlink_to(folder)
    good, reading, huge = write(files, tmp_path / "2026-05-01_good"), [], []
    for _ in range(2):
        times = [time.process_time()]
        check_record(good)
        times.append(time.process_time())
        found = {v.check: v for v in check_record(folder)}
        times.append(time.process_time())
        reading.append(times[1] - times[0])
        huge.append(times[2] - times[1])
    assert whole(found) and failed(found) >= {"files", "schema", "bytes"}
    assert min(huge) < 3 * min(reading)  # a GiB takes twenty times as long to read


# By which checks, of much damage
SEEN = {
    "json": {"schema", "numbers"},
    "md": {"numbers"},
    "log": {"log_whole"},
}
WRONG = [
    None,
    True,
    -1,
    0,
    1e308,
    2**70,
    "",
    "1.1",
    "x" * 300,
    [],
    {},
    [[[]]],
    {"42": None},
    [1, "2", None],
    float("nan"),
]


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    """Return JSON with a value of another type, a key less, nesting, or damaged text."""
    tree = json.loads(data)
    at, path = tree, rng.choice(list(tree))
    while isinstance(at[path], dict) and at[path] and rng.random() < 0.7:
        at, path = at[path], rng.choice(list(at[path]))
    kind = rng.randrange(5)
    if kind == 4 and isinstance(at[path], int | float):
        at[path] *= 1.01
    elif kind == 0:
        at[path] = rng.choice(WRONG)
    elif kind == 1:
        del at[path]
    elif kind == 2:
        at[path] = json.loads("[" * 300 + "]" * 300)
    text = json.dumps(tree).encode()
    return mutated_text(text, rng) if kind == 3 else text


def mutated_text(data: bytes, rng: random.Random) -> bytes:
    """Return the text cut, flipped, doubled, or with other numbers."""
    i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    j = min(j, i + 200)
    kind = rng.randrange(5)
    if kind == 0:
        return data[:i]
    if kind == 1:
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
    if kind == 2:
        return data[:j] + data[i:]
    if kind == 3:
        return data[:i] + data[j:]
    digits = rng.choice(
        [b"nan", b"-7", b"9" * 40, b"1e999", b"", b"\0", b"|||", b"val_loss:", b"seed:"]
    )
    return data[:i] + digits + data[i:]


def reread(folder, name: str, data: bytes, tmp_path):
    """Return `folder` with another content of one file; only that file is read again."""
    new = read_record_folder(write({name: data}, tmp_path / "2026-05-01_x"))
    changed = (
        dict(submission=new.submission, submission_name=new.submission_name)
        if name.endswith(".json")
        else dict(readme=new.readme)
        if name == "README.md"
        else dict(
            runs=[new.runs[0] if run.name == name and new.runs else run for run in folder.runs],
            texts=folder.texts | new.texts,
        )
    )
    said = read_claims(changed.get("submission", folder.submission))
    changed |= dict(
        faults=new.faults, claims=said, record=runs_claimed(changed.get("runs", folder.runs), said)
    )
    (tmp_path / "2026-05-01_x" / name).unlink()
    return folder._replace(**changed)


@pytest.mark.parametrize(
    "kind,name,change,count",
    [
        ("march", "submission.json", mutated_json, 400),
        ("march", "README.md", mutated_text, 200),
        ("baseline", "train_seed42.log", mutated_text, 150),
        ("april", "train_seed42.log", mutated_text, 150),
        ("ours", "train_seed42.log", mutated_text, 100),
    ],
)
def test_a_thousand_mutated_files_give_verdicts(kind, name, change, count, tmp_path):
    rng, files = random.Random(f"{kind} {name}"), make(kind)
    folder = read_record_folder(write(files, tmp_path / "2026-05-01_whole"))
    seen = set()
    for _ in range(count):
        data = change(files[name], rng)
        changed = reread(folder, name, data, tmp_path)
        found = {n: run_check(n, changed) for n in READS[name.split(".")[-1]]}
        assert not any("broke" in v.text or not v.text.isprintable() for v in found.values()), (
            data,
            found,
        )
        seen |= failed(found)
    assert seen >= SEEN[name.split(".")[-1]], seen


def test_the_largest_good_folder_costs_few_readings_of_its_code(tmp_path):
    """0.6 s alone. The limit is in times of Python's own parser: both are slowed by the same."""
    files = make("ours")
    padding = "\n".join(
        f"def unused_{i}(x):\n    return [x + {i}, {{'a': x}}]" for i in range(2000)
    )
    files = make(
        "ours",
        code={"fairway_small/report.py": files["fairway_small/report.py"].decode() + padding},
    )
    log = files["train_seed42.log"]
    files["train_seed42.log"] = log.replace(
        b"warmup_step:2/2", b"ttt_chunk [1/9] bpb=1.1\n" * 10_000 + b"warmup_step:2/2"
    )
    folder = write(files, tmp_path / "2026-05-01_x")
    code = (folder / "fairway_small/report.py").read_text()
    parsing, checking = [], []
    for _ in range(2):
        times = [time.process_time()]
        ast.parse(code)
        times.append(time.process_time())
        found = check_record(folder)
        times.append(time.process_time())
        parsing.append(times[1] - times[0])
        checking.append(times[2] - times[1])
    assert all(v.verdict == "ok" for v in found)
    assert min(checking) < 20 * min(parsing)
