"""The code that a record ships: which files, and how they are packed.

Packed code is an archive `code.xz` (LZMA over JSON {name: text}), two stubs under the names of the
scripts, and the readable files in source/. Stubs and archive count as code; source/ does not, since
no script reads it.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fairway.records.files import RecordError, read_bytes
from fairway.records.run import RunFiles, dict_at
from fairway.records.shipped_code import (
    ENTRIES,
    READABLE,
    import_closure,
    imports_in,
    read_code_file,
)

ARCHIVE = "code.xz"


def shipped_files(root: Path, runs: Sequence[RunFiles] = ()) -> list[str]:
    """Return the names of the Python files that a record ships, relative to `root`, sorted.

    A scored run's score.json names what the score used. Without a score these are the files that
    both scripts import when they start; parts that functions import (certificate, proof, correction
    table) stay out.
    """
    if not all((root / name).is_file() for name in ENTRIES):
        raise RecordError(
            f"{root} lacks train_gpt.py or eval_final.py; run this from the repository"
        )
    used = {name for run in runs for name in dict_at(run.score, "code")}
    if used:
        return sorted(used | set(ENTRIES))
    return import_closure(root, lazy=False)


def requirements_text(root: Path, names: Sequence[str]) -> str:
    """Return the lines of requirements.txt for the packages that these files import.

    A package that comes with another and has no line of its own (llvmlite with numba) gets no
    version.
    """
    own = {name.split("/")[0].removesuffix(".py") for name in names} | {""}
    wanted = {
        wanted_import.module.split(".")[0]
        for name in names
        for wanted_import in imports_in(read_code_file(name, read_bytes(root / name)))
    }
    lines = read_bytes(root / "requirements.txt").decode("utf-8", "replace").splitlines()
    pinned = {
        re.split(r"[^\w-]", line)[0].lower().replace("-", "_"): line.strip() for line in lines
    }
    packages = sorted(wanted - own - set(sys.stdlib_module_names), key=str.lower)
    return "".join(f"{pinned.get(name.lower(), name)}\n" for name in packages)


STUB = '''"""Run {script} from the archive {archive}. Its readable copy is {readable}/{script}."""

import atexit
import hashlib
import json
import lzma
import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

SHA256 = "{sha256}"


def run(archive: str, script: str) -> None:
    path = Path(__file__).resolve().parent / archive
    packed = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(packed).hexdigest() != SHA256:
        fault = f"{{path}} is missing, or its sha256 is not {{SHA256[:12]}}"
        sys.exit(f"{{script}}: error: {{fault}}; get it again")
    folder, owner, leave = Path(tempfile.mkdtemp(prefix="code-")), os.getpid(), os._exit

    def clean() -> None:
        if os.getpid() == owner:  # a forked worker leaves the files to the others
            shutil.rmtree(folder, ignore_errors=True)

    def clean_and_leave(code: int) -> None:
        clean()
        leave(code)

    atexit.register(clean)
    os._exit = clean_and_leave  # a rank under torchrun ends this way
    for name, text in json.loads(lzma.decompress(packed)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    sys.path.insert(0, str(folder))
    runpy.run_path(str(folder / script), run_name="__main__")


if __name__ == "__main__":
    run("{archive}", "{script}")
'''


def pack_sources(sources: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files of packed code by name. The same sources give the same bytes."""
    texts = {name: code.decode() for name, code in sorted(sources.items())}
    plain = json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode()
    # lc=4 and pb=0 suit text: 1.5 % smaller than the preset alone.
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0}
    ]
    archive = lzma.compress(plain, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)
    digest = hashlib.sha256(archive).hexdigest()
    stubs = {
        script: STUB.format(
            script=script, archive=ARCHIVE, readable=READABLE, sha256=digest
        ).encode()
        for script in ENTRIES
    }
    readable = {f"{READABLE}/{name}": code for name, code in sources.items()}
    return {**stubs, ARCHIVE: archive, **readable}


def is_code(name: str) -> bool:
    """Tell whether a file of a record counts as code."""
    return name.endswith((".py", ".xz")) and not name.startswith(f"{READABLE}/")


def counted_bytes(files: dict[str, bytes]) -> int:
    """Return the bytes of code that a record with these files counts."""
    return sum(len(content) for name, content in files.items() if is_code(name))
