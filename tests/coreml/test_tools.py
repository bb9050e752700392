"""How coremltools is imported: quietly, and so that Ctrl-C is not lost."""

import os
import signal
import sys
import warnings

import pytest

from fairway.coreml.tools import deferred_interrupts, import_coremltools, quiet
from train_gpt import UserError


def test_an_interrupt_counts_once_it_is_over():
    went_on, before = False, signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            went_on = True
        except BaseException:  # noqa: B036  as modules of coremltools do
            pytest.fail("it came at once")
    assert went_on and signal.getsignal(signal.SIGINT) == before


def test_nothing_is_printed_and_errors_go_through(capfd):
    with pytest.raises(ValueError, match="seen"), quiet():
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        raise ValueError("seen")
    assert capfd.readouterr() == ("", "")


def test_its_absence_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(
        UserError, match="coremltools is not installed .*pip install -r requirements-apple.txt"
    ):
        import_coremltools()
