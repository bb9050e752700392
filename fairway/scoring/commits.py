"""The commit log: what was scored, chunk by chunk, and what the scorer knew before each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import NamedTuple


class Commit(NamedTuple):
    first: int  # target row
    count: int  # rows
    nats: float  # sum of -log p over them
    bytes: int  # counted for them
    state: str  # hex digest of all adaptive state before they were scored
    chain: str  # SHA-256 (hex) of the chain before it and of all the other fields


CHAIN_START = "fairway commit log 1"


def chained(previous: str, first: int, count: int, nats: float, bytes: int, state: str) -> Commit:
    """The commit that follows `previous`, the chain of the one before it (CHAIN_START for the first)."""
    fields = dict(
        first=int(first), count=int(count), nats=float(nats), bytes=int(bytes), state=str(state)
    )
    text = previous + json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return Commit(**fields, chain=hashlib.sha256(text.encode()).hexdigest())


def verify_chain(commits: Iterable[Commit]) -> int | None:
    """Index of the first commit that does not follow from those before it; None where all do."""
    chain = CHAIN_START
    for at, commit in enumerate(commits):
        if chained(chain, *commit[:5]).chain != commit[5]:
            return at
        chain = commit[5]
    return None
