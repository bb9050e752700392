"""Import coremltools, which takes seconds and prints many lines that no user needs."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from types import ModuleType

from train_gpt import UserError


def import_coremltools() -> ModuleType:
    """Import coremltools without the lines that it prints on a machine that is not a Mac."""
    try:
        with silenced(), deferred_interrupts():
            import coremltools
            import coremltools.optimize
    except ImportError as e:
        raise UserError(
            f"coremltools is not installed ({e}); pip install -r requirements-apple.txt"
        ) from None
    return coremltools


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends, then raise KeyboardInterrupt.

    Modules of coremltools catch every exception while they are imported, this one included.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Hide the progress bars, warnings and notes of a conversion. Exceptions still pass."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
