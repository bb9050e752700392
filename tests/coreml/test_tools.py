"""coremltools is imported without its output, and Ctrl-C during the import is not lost."""

import os
import signal
import sys
import warnings

import pytest

from fairway.coreml.tools import deferred_interrupts, import_coremltools, silenced
from train_gpt import UserError


def test_ctrl_c_is_raised_when_the_block_ends():
    continued, before = False, signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), deferred_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            continued = True
        except BaseException:  # noqa: B036  modules of coremltools do this
            pytest.fail("the interrupt came inside the block")
    assert continued and signal.getsignal(signal.SIGINT) == before


def test_output_is_silenced_and_errors_pass(capfd):
    with pytest.raises(ValueError, match="seen"), silenced():
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("warned", stacklevel=1)
        raise ValueError("seen")
    assert capfd.readouterr() == ("", "")


def test_missing_coremltools_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(
        UserError, match="coremltools is not installed .*pip install -r requirements-apple.txt"
    ):
        import_coremltools()
