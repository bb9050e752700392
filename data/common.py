"""What the three scripts of data/ share: a progress bar, and errors that end in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from tqdm import tqdm

from train_gpt import UserError


def progress(total: int, what: str, unit: str) -> tqdm:
    """A bar with rate and ETA on a terminal, silence in a log."""
    tqdm.monitor_interval = 0  # its watching thread would be forked into the workers
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None, mininterval=0.5)


def run(main: Callable[[], int], failed: int = 1) -> NoReturn:
    """Exit with what `main` returns; what the user can mend becomes one line and `failed`."""
    try:
        code = main()
    except UserError as e:
        code, message = failed, str(e)
    except OSError as e:
        code, message = failed, f"{e.filename or 'a file'}: {e.strerror or e}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command goes on from here"
    else:
        sys.exit(code)
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
