"""Write token shards, and the byte sidecar of each: the bytes of every token, in the same form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from train_gpt import SHARD_MAGIC, SHARD_VERSION, ByteTable, replacing


def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write tokens, or any other numbers of 16 bits, after a shard's header, in one move."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    with replacing(path) as f:
        f.write(header.tobytes() + np.ascontiguousarray(tokens, dtype="<u2").tobytes())


def sidecar_path(shard: Path) -> Path:
    """Return x_val_bytes_000000.bin for x_val_000000.bin."""
    start, _, number = shard.name.rpartition("_")
    return shard.with_name(f"{start}_bytes_{number}")


def write_sidecar(shard: Path, tokens: np.ndarray, table: ByteTable) -> Path:
    """Write the bytes of each of a shard's tokens beside it; return the path."""
    beside = sidecar_path(shard)
    write_shard(beside, table.count(np.concatenate([tokens[:1], tokens])))
    return beside
