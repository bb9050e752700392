"""A progress bar on stderr, shared by the three scripts of this folder."""

from __future__ import annotations

from tqdm import tqdm


def progress_bar(total: int, label: str, unit: str) -> tqdm:
    """Return a bar with rate and ETA; it draws nothing when stderr is not a terminal."""
    # tqdm's monitor thread would be copied into the worker processes that prepare.py forks.
    tqdm.monitor_interval = 0
    return tqdm(total=total, desc=label, unit=unit, unit_scale=True, disable=None, mininterval=0.5)
