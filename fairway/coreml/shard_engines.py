"""CoreML shards in the place of the PyTorch model, as decoding asks for them."""

from __future__ import annotations

from collections.abc import Callable

from fairway.compression.loading import Loaded
from fairway.coreml.engine import Chain, Shards, load_chain


class ShardEngines:
    """Decoding engines that share one chain of shards (an EngineSource of fairway.decoding)."""

    def __init__(self, chain: Chain):
        self.chain = chain

    @property
    def context(self) -> int:
        """Number of tokens that the shards see at a time."""
        return self.chain.manifest.dims.slots

    @property
    def most(self) -> int:
        """Number of tokens that one call takes."""
        return self.chain.most

    @property
    def calls(self) -> int:
        """Number of calls so far."""
        return self.chain.used.calls

    def new_engine(self) -> Shards:
        """Return an engine for a new text."""
        return Shards(self.chain)


def connect_shards(folder: str, artifact: str) -> Callable[[Loaded], ShardEngines]:
    """Return what `Writer(artifact, connect=...)` needs to run the shards in `folder`.

    Connecting checks that the shards were exported from this artifact.
    """
    return lambda loaded: ShardEngines(load_chain(folder, artifact, loaded))
