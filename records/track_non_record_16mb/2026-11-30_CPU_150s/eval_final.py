"""Run eval_final.py from the archive code.xz. Its readable copy is source/eval_final.py."""

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

SHA256 = "1c1e22d88ee7e8b7068c0403f982df9a834dbc7f66d8295078ec5cd9fa943a1c"


def run(archive: str, script: str) -> None:
    path = Path(__file__).resolve().parent / archive
    packed = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(packed).hexdigest() != SHA256:
        fault = f"{path} is missing, or its sha256 is not {SHA256[:12]}"
        sys.exit(f"{script}: error: {fault}; get it again")
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
    run("code.xz", "eval_final.py")
