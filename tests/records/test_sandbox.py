"""fairway/records/sandbox.py: the limits of a record that runs, and how its run is judged."""

import sys
import time
from pathlib import Path

import pytest

from fairway.records.checks import check_result
from fairway.records.checks.base import CheckResult
from fairway.records.folder import read_record_folder
from fairway.records.sandbox import Sandbox, check_run, tokenizer_of, training_texts
from fairway.records.shipped_code import import_closure
from tests.zoo.records import write
from tests.zoo.records.good import make

ROOT = Path(__file__).resolve().parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of the Linux kernel")


@pytest.fixture
def ran(tmp_path):
    """Return `ran(code, seconds=20)`, which tells how a script ends in a sandbox."""
    box = Sandbox(tmp_path / "box")

    def run(code: str, seconds: float = 20):
        (box.copy / "script.py").write_text(code)
        return box.run(["script.py"], {}, seconds)

    run.box = box
    return run


def test_a_script_may_use_its_own_folders(ran):
    ended = ran(
        "import tempfile, json, os\nopen('made.txt', "
        "'w').write('x')\nos.mkdir('d')\nos.rename('made.txt', "
        "'d/b')\ntempfile.NamedTemporaryFile().write(b'x')\nprint(os.environ['HOME'], "
        "sorted(os.environ))"
    )
    assert ended.code == 0 and ended.refused == [] and str(ran.box.home) in ended.output
    assert "SECRET" not in ended.output and (ran.box.copy / "d" / "b").read_text() == "x"


@pytest.mark.parametrize(
    "code,refused",
    [
        (
            "import socket\nsocket.socket().connect(('203.0.113.1', 80))",
            "connects to 203.0.113.1:80",
        ),
        (
            "import urllib.request\nurllib.request.urlopen('http' + '://example.org/x')",
            "looks up example.org",
        ),
        ("open('OUT').read()", "reads OUT"),
        ("open('OUT', 'a')", "writes OUT"),
        ("import os\nos.remove('OUT')", "writes OUT"),
        ("import os\nos.symlink('OUT', 'link')\nopen('link').read()", "reads COPY/link"),
        ("import subprocess\nsubprocess.run(['cat', 'OUT'])", "runs cat"),
        ("import os\nos.system('id > out.txt')", "runs id > out.txt"),
        (
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'open(\"OUT\")'])",
            "reads OUT",
        ),
        (
            "import subprocess, sys\nsubprocess.run([sys.executable, '-I', '-c', 'print(1)'])",
            "past the guard",
        ),
        (
            "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1)'], env={})",
            "past the guard",
        ),
        ("try:\n    open('OUT')\nexcept OSError:\n    print('went on')", "reads OUT"),
    ],
)
def test_files_and_programs_outside_are_refused_and_reported(ran, tmp_path, code, refused):
    outside = tmp_path / "outside.txt"
    outside.write_text("private")
    ended = ran(code.replace("OUT", str(outside)))
    wanted = refused.replace("OUT", str(outside)).replace("COPY", str(ran.box.copy))
    assert any(line.endswith(wanted) for line in ended.refused), ended
    assert "private" not in ended.output and outside.read_text() == "private"


@linux
def test_time_memory_and_output_have_limits(ran):
    start = time.monotonic()
    ended = ran(
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(600)'])\ntime.sleep(600)",
        seconds=0.4,
    )
    assert ended.code is None and time.monotonic() - start < 60
    assert ran("x = bytearray(20 << 30)").code not in (0, None)
    assert len(ran("print('x' * 1000000)").output) <= 64 << 10


def test_a_record_runs_from_inside_itself(tmp_path):
    folder = read_record_folder(write(make("ours"), tmp_path / "record"))
    found = check_result("run", check_run, folder)
    assert (
        found.verdict == "ok" and "trained and evaluated" in found.text and "val_bpb:" in found.text
    )
    assert sorted(p.name for p in folder.path.rglob("*.ptz")) == []


@pytest.mark.parametrize(
    "old,new,verdict,why",
    [
        (
            'with open("final_model.int8.ptz", "wb")',
            'with open("/scratch/model.ptz", "wb")',
            "FAIL",
            "writes /scratch/model.ptz",
        ),
        (
            "    main()\n",
            "    raise RuntimeError('CUDA is required')\n",
            "cannot tell",
            "this machine has none",
        ),
        ("    main()\n", "    import fla\n", "cannot tell", "No module named 'fla'"),
        (
            "    main()\n",
            "    raise ValueError('no such thing')\n",
            "FAIL",
            "ended with code 1: ValueError: no such thing",
        ),
        ("    main()\n", "    pass\n", "FAIL", "without an artifact"),
        (
            "f.write(artifact)",
            "f.write(artifact + bytes(16_000_000))",
            "FAIL",
            "16,000,000 are allowed",
        ),
    ],
)
def test_runs_are_judged(tmp_path, monkeypatch, old, new, verdict, why):
    monkeypatch.setenv("SECRET", "x")
    files = make()
    assert old.encode() in files["train_gpt.py"]
    files["train_gpt.py"] = files["train_gpt.py"].replace(old.encode(), new.encode())
    found: CheckResult = check_result(
        "run", check_run, read_record_folder(write(files, tmp_path / "record"))
    )
    assert found.verdict == verdict and why in found.text


def test_a_tokenizer_is_as_large_as_the_text_allows(tmp_path):
    folder = read_record_folder(write(make(), tmp_path))
    _, size = tokenizer_of(training_texts(folder, 3000), 8192)
    assert 256 < size < 8192


@pytest.mark.slow
def test_our_own_code_runs_within_two_minutes(tmp_path):
    files = {name: (ROOT / name).read_bytes() for name in import_closure(ROOT)}
    folder = read_record_folder(
        write(files | {"README.md": (ROOT / "README.md").read_bytes()}, tmp_path / "record")
    )
    found = check_result("run", check_run, folder)
    assert found.verdict == "ok", found.text
    assert set(files) | {"README.md"} == {
        p.relative_to(folder.path).as_posix() for p in folder.path.rglob("*.*")
    }
