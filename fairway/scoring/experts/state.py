"""What the experts' tables share: prefetching, checked tokens, a chained digest, and files of state."""

import contextlib
import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from train_gpt import UserError, need, replacing

SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 4, 1 << 16
LONGEST_TEXT = (1 << 31) - 1  # tokens: a count has 31 bits


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of array[index] (1-D, index not checked). Changes speed and nothing else."""

    def generate(context, builder, signature, arguments):
        array_type = signature.args[0]
        view = context.make_array(array_type)(context, builder, arguments[0])
        item = cgutils.get_item_pointer(
            context, builder, array_type, view, [arguments[1]], wraparound=False
        )
        pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        )
        # For writing, kept in every cache, data.
        builder.call(hint, [builder.bitcast(item, pointer), word(1), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


def check_settings(vocab_size: int, delay: int) -> None:
    need(
        SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY,
        f"VOCAB_SIZE is {vocab_size}, but experts take {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}; change it",
    )
    need(
        0 <= delay <= LONGEST_TEXT,
        f"a delay of {delay} tokens is outside 0 to {LONGEST_TEXT}; change it",
    )


def check_tokens(tokens: np.ndarray, vocab_size: int, position: int) -> np.ndarray:
    """The tokens as contiguous uint16, each of them below the vocabulary's size, none after LONGEST_TEXT."""
    tokens = np.asarray(tokens)
    need(
        tokens.ndim == 1 and (tokens.dtype.kind in "iu" or not len(tokens)),
        f"tokens are {tokens.dtype} of {tokens.ndim} dimensions, but experts read a row of integers; pass token ids",
    )
    need(
        position + len(tokens) <= LONGEST_TEXT,
        f"{position + len(tokens)} tokens are more than the {LONGEST_TEXT} that counts can hold; score in parts",
    )
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    need(
        0 <= low and high < vocab_size,
        f"the text holds token {low if low < 0 else high}, but VOCAB_SIZE is "
        f"{vocab_size}; set VOCAB_SIZE, or DATA_PATH, so that the two agree",
    )
    return np.ascontiguousarray(tokens, dtype=np.uint16)


class Chain:
    """SHA-256 over settings and every token fed, a block chained to the next: equal for equal histories however they
    were cut into calls, different after each token, and it can be saved (a running hashlib object cannot)."""

    BLOCK = 1 << 13  # bytes: 4,096 tokens

    def __init__(self, settings: str):
        self.link, self.rest = hashlib.sha256(settings.encode()).digest(), b""

    def feed(self, tokens: np.ndarray) -> None:
        data = memoryview(self.rest + tokens.astype("<u2", copy=False).tobytes())
        whole = len(data) - len(data) % self.BLOCK
        for at in range(0, whole, self.BLOCK):
            self.link = hashlib.sha256(self.link + data[at : at + self.BLOCK]).digest()
        self.rest = bytes(data[whole:])

    def hexdigest(self) -> str:
        return hashlib.sha256(self.link + self.rest).hexdigest()

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "link": np.frombuffer(self.link, np.uint8),
            "rest": np.frombuffer(self.rest, np.uint8),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        link, rest = arrays["link"], arrays["rest"]
        if (
            link.dtype != np.uint8
            or rest.dtype != np.uint8
            or link.shape != (32,)
            or len(rest) >= self.BLOCK
        ):
            raise ValueError("the chain")
        self.link, self.rest = link.tobytes(), rest.tobytes()


def write_state(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray]) -> None:
    """One file of plain arrays, uncompressed, each with its checksum; replaced, never half-written."""
    with replacing(path) as f:
        np.savez(f, kind=np.frombuffer(kind.encode(), np.uint8), **arrays)


@contextlib.contextmanager
def reading_state(path: str | Path, kind: str) -> Iterator[Mapping[str, np.ndarray]]:
    """The arrays of such a file by name. What is missing, damaged, foreign, or found wrong by the reader (ValueError)
    leaves as a UserError of one line."""
    try:
        with open(path, "rb") as f:
            if not zipfile.is_zipfile(f):
                raise ValueError("foreign")
            f.seek(0)
            with np.load(f, allow_pickle=False) as arrays:
                if arrays["kind"].tobytes() != kind.encode():
                    raise ValueError("of another kind")
                yield arrays
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        EOFError,
        MemoryError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
        SyntaxError,
        struct.error,
        tokenize.TokenError,
        zipfile.BadZipFile,
        zlib.error,
        UserError,
    ):
        raise UserError(
            f"{path}: not a whole file of {kind} state; delete it and score from the start"
        ) from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror or e}); score from the start"
        ) from None


def same_shape(found: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """What was found in a file, if it is of the very shape and type of what would stand there."""
    if found.shape != ours.shape or found.dtype != ours.dtype:
        raise ValueError("shape")
    return np.ascontiguousarray(found)


def inside(places: np.ndarray, low: int, end: int) -> bool:
    """Whether all places lie in low..end-1. Compiled code checks no index, so what a file holds is checked first."""
    return not places.size or (low <= int(places.min()) and int(places.max()) < end)
