"""The commit log: which rows were scored in which order, and what the scorer knew before each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple


class Commit(NamedTuple):
    """One chunk of scored rows, chained to the commits before it."""

    first: int  # target row
    count: int  # rows
    nats: float  # sum of -log p over the rows
    bytes: int  # counted for the rows
    state: str  # hex digest of all adaptive state before the rows were scored
    chain: str  # SHA-256 (hex) of the previous chain and of all other fields


CHAIN_START = "fairway commit log 1"


def chained(previous: str, first: int, count: int, nats: float, bytes: int, state: str) -> Commit:
    """Return the commit that follows the one whose chain is `previous` (CHAIN_START: the first)."""
    fields = dict(
        first=int(first), count=int(count), nats=float(nats), bytes=int(bytes), state=str(state)
    )
    text = previous + json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return Commit(**fields, chain=hashlib.sha256(text.encode()).hexdigest())


def verify_chain(commits: Iterable[Commit]) -> int | None:
    """Return the index of the first commit that does not follow from those before it, or None."""
    chain = CHAIN_START
    for index, commit in enumerate(commits):
        if chained(chain, *commit[:5]).chain != commit[5]:
            return index
        chain = commit[5]
    return None
