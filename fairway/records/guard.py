"""Put in front of every Python process that a record starts: no connection, no file outside its own folders.

Copied into a sitecustomize.py by the sandbox, and imports nothing of this project. It stops mistakes and plain
cheats; what goes round Python (ctypes, a program in C) meets the kernel's limits instead: no network, and the limits of
resources.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Mapping

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.truncate": 1, "os.chmod": 1, "os.chown": 1, "os.utime": 1,
           "os.rename": 2, "os.link": 2, "shutil.rmtree": 1}  # event: how many of its arguments are paths that change
RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
# What torch, numba and trainers start: compilers, and what tells about the machine.
PROGRAMS = {"python", "nvidia-smi", "gcc", "cc", "g++", "c++", "clang", "ld", "as", "ldconfig", "uname", "objdump",
            "lscpu", "ptxas", "lrzip", "file"}
LOCAL = ("127.0.0.1", "localhost", "::1", "", None)


def install(readable: Iterable[str], writable: Iterable[str], told: str) -> None:
    """From here on, what is refused is a line of the file `told` as well as a PermissionError."""
    real = os.path.realpath
    writable = [real(p) + os.sep for p in writable]
    readable = [*writable, *(real(p) + os.sep for p in readable)]
    lines = os.open(told, os.O_WRONLY | os.O_APPEND)
    exists, home = os.path.lexists, os.path.dirname(told) + os.sep

    def refuse(what: str) -> None:
        os.write(lines, (what[:300].replace("\n", " ") + "\n").encode("utf-8", "replace"))
        raise PermissionError(f"not in a record: {what}")

    def inside(path: str, folders: list[str]) -> bool:
        return (real(path) + os.sep).startswith(tuple(folders)) or real(path) in ("/dev/null", "/dev/tty")

    def file(path: object, writes: bool) -> None:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            return  # an open file's number
        path = os.path.abspath(os.fspath(path))
        if writes and not inside(path, writable):
            refuse(f"writes {path}")
        if not writes and not inside(path, readable) and exists(path):
            refuse(f"reads {path}")

    def program(event: str, args: tuple) -> None:
        command = args[1] if event == "os.spawn" else args[0]
        words = [os.fsdecode(w) for w in args[1]] if event == "subprocess.Popen" and not isinstance(
            args[1], str | bytes) else os.fsdecode(command or "").split()
        name = os.path.basename(os.fsdecode(command or words[0] if words else "").split(None, 1)[0])
        if name.rstrip("0123456789.") not in PROGRAMS:
            refuse(f"runs {os.fsdecode(command or ' '.join(words))[:100]}")
        if name.startswith("python") and not guarded(words[1:], args[3] if event == "subprocess.Popen" else None):
            refuse(f"runs {' '.join(words)[:100]} past the guard")

    def guarded(options: list[str], env: Mapping[str, str] | None) -> bool:
        """Python reads sitecustomize.py unless an option or an environment of its own keeps it from that."""
        own = list(itertools.takewhile(lambda word: word[:1] == "-" and word not in ("-c", "-m"), options))
        path = os.environ.get("PYTHONPATH") if env is None else env.get("PYTHONPATH", env.get(b"PYTHONPATH"))
        return not any(set(word) & set("IES") for word in own) and bool(path) and home in os.fsdecode(path)

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            mode, flags = args[1], args[2] or 0
            writes = any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & WRITING)
            file(args[0], writes)
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                file(path, True)
        elif event == "os.symlink":
            file(args[1], True)
        elif event in ("socket.connect", "socket.bind", "socket.sendto"):
            address = args[1]
            if isinstance(address, tuple) and address and address[0] not in LOCAL:
                refuse(f"connects to {address[0]}:{address[1] if len(address) > 1 else ''}")
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            if args[0] not in LOCAL and args[0] != os.uname().nodename:
                refuse(f"looks up {args[0]}")
        elif event in RUNS:
            program(event, args)

    sys.addaudithook(hook)
