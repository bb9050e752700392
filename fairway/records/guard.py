"""Guard every Python process that a record starts: no connection, no file outside its own folders.

The sandbox copies this file into a sitecustomize.py, so it imports nothing of this project. It
stops mistakes and plain cheats. What avoids Python (ctypes, a C program) meets the kernel's limits
instead.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Mapping

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event → number of its arguments that are changed paths.
CHANGES = {
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.utime": 1,
    "os.rename": 2,
    "os.link": 2,
    "shutil.rmtree": 1,
}
CONNECTIONS = (
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "socket.gethostbyname",
)
PROCESS_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn")
# What torch, numba and trainers start: compilers, and what tells about the machine.
PROGRAMS = {
    "python",
    "nvidia-smi",
    "gcc",
    "cc",
    "g++",
    "c++",
    "clang",
    "ld",
    "as",
    "ldconfig",
    "uname",
    "objdump",
    "lscpu",
    "ptxas",
    "lrzip",
    "file",
}
LOCAL = ("127.0.0.1", "localhost", "::1", "", None)


class Guard:
    """Refuse files, programs and connections: each refusal is a PermissionError and a line of
    `log`.
    """

    def __init__(self, readable: Iterable[str], writable: Iterable[str], log: str):
        self.writable = tuple(os.path.realpath(p) + os.sep for p in writable)
        self.readable = self.writable + tuple(os.path.realpath(p) + os.sep for p in readable)
        self.lines = os.open(log, os.O_WRONLY | os.O_APPEND)
        self.home = os.path.dirname(log) + os.sep

    def refuse(self, what: str) -> None:
        os.write(self.lines, (what[:300].replace("\n", " ") + "\n").encode("utf-8", "replace"))
        raise PermissionError(f"not in a record: {what}")

    def file(self, path: object, writes: bool) -> None:
        """Refuse a path outside the folders that may be read or written."""
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike) or not os.fspath(path):
            return  # the number of an open file
        path = os.path.abspath(os.fspath(path))
        real = os.path.realpath(path)
        if real in ("/dev/null", "/dev/tty") or (real + os.sep).startswith(
            self.writable if writes else self.readable
        ):
            return
        if writes or os.path.lexists(path):
            self.refuse(f"{'writes' if writes else 'reads'} {path}")

    def program(self, event: str, args: tuple) -> None:
        """Refuse any program but Python under this guard, compilers, and those that describe the
        machine.
        """
        command = args[1] if event == "os.spawn" else args[0]
        words = (
            [os.fsdecode(w) for w in args[1]]
            if event == "subprocess.Popen" and not isinstance(args[1], str | bytes)
            else os.fsdecode(command or "").split()
        )
        name = os.path.basename(os.fsdecode(command or words[0] if words else "").split(None, 1)[0])
        if name.rstrip("0123456789.") not in PROGRAMS:
            self.refuse(f"runs {os.fsdecode(command or ' '.join(words))[:100]}")
        if name.startswith("python") and not self.guarded(
            words[1:], args[3] if event == "subprocess.Popen" else None
        ):
            self.refuse(f"runs {' '.join(words)[:100]} past the guard")

    def guarded(self, options: list[str], env: Mapping[str, str] | None) -> bool:
        """Tell whether a Python started this way reads sitecustomize.py, and so this guard."""
        own = list(
            itertools.takewhile(lambda word: word[:1] == "-" and word not in ("-c", "-m"), options)
        )
        path = (
            os.environ.get("PYTHONPATH")
            if env is None
            else env.get("PYTHONPATH", env.get(b"PYTHONPATH"))
        )
        return (
            not any(set(word) & set("IES") for word in own)
            and bool(path)
            and self.home in os.fsdecode(path)
        )

    def connection(self, event: str, args: tuple) -> None:
        """Refuse look-ups and connections beyond this machine."""
        if event in ("socket.getaddrinfo", "socket.gethostbyname"):
            if args[0] not in LOCAL and args[0] != os.uname().nodename:
                self.refuse(f"looks up {args[0]}")
        elif isinstance(args[1], tuple) and args[1] and args[1][0] not in LOCAL:
            self.refuse(f"connects to {':'.join(map(str, args[1][:2]))}")

    def hook(self, event: str, args: tuple) -> None:
        """Judge one audit event of Python."""
        if event == "open":
            mode, flags = args[1], args[2] or 0
            self.file(
                args[0],
                any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & WRITING),
            )
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                self.file(path, True)
        elif event == "os.symlink":
            self.file(args[1], True)
        elif event in CONNECTIONS:
            self.connection(event, args)
        elif event in PROCESS_EVENTS:
            self.program(event, args)


def install(readable: Iterable[str], writable: Iterable[str], log: str) -> None:
    """Guard this process from here on, and every process that it starts with its environment."""
    sys.addaudithook(Guard(readable, writable, log).hook)
