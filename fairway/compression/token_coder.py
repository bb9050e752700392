"""Code tokens with a predictor and a range coder, and decode them again.

docs/BITSTREAM.md specifies the streams, the frequencies and the range coder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import constriction
import numpy as np

from train_gpt import UserError

FREQUENCY_SUM = 2**24  # what the frequencies of the V tokens sum to at each step
BLOCK_TOKENS = 1 << 16  # a decoder joins its steps after so many tokens, to save memory
MOST_DEFAULT_STREAMS = 64
TOKENS_A_STREAM = 512  # fewer tokens are not worth a stream that starts without context


class BitstreamError(UserError):
    """A bitstream that is damaged, hostile, or not for this artifact or machine."""


class Predictor(Protocol):
    """B streams that step together. A coder needs nothing else of a model."""

    streams: int

    def probabilities(self) -> np.ndarray:
        """Return float64[B, V]: the next token's distribution in each stream; rows sum to 1."""

    def learn(self, tokens: np.ndarray) -> None:
        """Read int64[B], the next token of each stream."""


# ==== FREQUENCIES =================================================================================
def frequency_weights(p_BV: np.ndarray) -> np.ndarray:
    """Return float64[B, V] of whole numbers: the frequency of each token, less 1.

    Each row sums to FREQUENCY_SUM - V: the most probable token gets what rounding down leaves over.
    constriction scales a row so that it has this sum, here by exactly 1.0, and adds the 1. So it
    rounds nothing, and a decoder in any language finds the same frequencies.
    """
    valid = (
        np.isfinite(p_BV).all() and p_BV.min() >= 0 and np.abs(p_BV.sum(axis=1) - 1).max() <= 1e-6
    )
    if not valid:
        raise BitstreamError(
            "the predictor gives no probabilities: they must be 0 or more, and sum to 1"
        )
    row_sum = FREQUENCY_SUM - p_BV.shape[1]
    weights = np.floor(p_BV * row_sum)
    weights[np.arange(len(weights)), p_BV.argmax(axis=1)] += row_sum - weights.sum(axis=1)
    return weights


# ==== STREAMS =====================================================================================
def default_streams(count: int) -> int:
    """Return the number of streams for a text of `count` tokens.

    Streams share a batch, so more of them are faster. But each starts without context.
    """
    return max(1, min(MOST_DEFAULT_STREAMS, count // TOKENS_A_STREAM))


def stream_sizes(count: int, streams: int) -> np.ndarray:
    """Return int64[B], the tokens of each stream; streams follow each other, longer ones first."""
    return count // streams + (np.arange(streams) < count % streams)


def text_order(stepwise: np.ndarray, streams: int) -> np.ndarray:
    """Return tokens in the order of the text, from the order in which they were coded."""
    sizes, out = stream_sizes(len(stepwise), streams), np.empty_like(stepwise)
    for stream, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        out[start : start + size] = stepwise[stream::streams]
    return out


# ==== CODER =======================================================================================
def encode_tokens(
    predictor: Predictor,
    tokens: np.ndarray,
    on_progress: Callable[[int], object] | None = None,
) -> bytes:
    """Return the payload: the first token of each stream, then the second of each, and so on.

    `on_progress` gets the number of tokens that each step adds.
    """
    encoder = constriction.stream.queue.RangeEncoder()
    family = constriction.stream.model.Categorical(perfect=False)
    sizes = stream_sizes(len(tokens), predictor.streams)
    starts, steps = np.cumsum(sizes) - sizes, int(sizes[0])
    for step in range(steps):
        column = tokens[starts[sizes > step] + step].astype(np.int64)
        weights = frequency_weights(predictor.probabilities())[: len(column)]
        encoder.encode(column.astype(np.int32), family, weights)
        if step + 1 < steps:
            predictor.learn(column)
        if on_progress:
            on_progress(len(column))
    return encoder.get_compressed().astype("<u4").tobytes()


def decode_tokens(
    predictor: Predictor,
    payload: bytes,
    count: int,
    on_progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Return uint16[count], the tokens of a payload, or raise BitstreamError.

    A hostile header may promise any `count`: decoding stops as soon as the tokens have cost more
    bits than the payload holds, so that time and memory follow the payload.
    """
    if len(payload) % 4:
        raise BitstreamError("the payload's size is no multiple of 4 bytes")
    words = np.frombuffer(payload, "<u4").astype(np.uint32)
    decoder = constriction.stream.queue.RangeDecoder(words)
    family = constriction.stream.model.Categorical(perfect=False)
    bits_left = 8 * len(payload) + 64.0  # the coder may use two words beyond the end
    steps, columns, blocks = -(-count // predictor.streams), [], []
    for step in range(steps):
        weights = frequency_weights(predictor.probabilities())[: count - step * predictor.streams]
        try:
            column = decoder.decode(family, weights)
        except (AssertionError, ValueError, RuntimeError):
            raise BitstreamError("the payload does not decode") from None
        bits_left -= 24 * len(column) - np.log2(weights[np.arange(len(column)), column] + 1).sum()
        if bits_left < 0:
            raise BitstreamError("the payload ends before its tokens do")
        columns.append(column.astype(np.uint16))
        if step + 1 < steps:
            predictor.learn(column.astype(np.int64))
        if len(columns) * predictor.streams >= BLOCK_TOKENS:
            blocks, columns = [*blocks, np.concatenate(columns)], []
        if on_progress:
            on_progress(len(column))
    if not decoder.maybe_exhausted():
        raise BitstreamError("the payload continues after its last token")
    return text_order(
        np.concatenate([np.zeros(0, np.uint16), *blocks, *columns]), predictor.streams
    )
