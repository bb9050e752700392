"""Shared by the experts: checks of settings and tokens, a digest of the text, files of state."""

import contextlib
import hashlib
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from train_gpt import UserError, replacing

SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 4, 1 << 16
LONGEST_TEXT = (1 << 31) - 1  # tokens: a count has 31 bits


# ==== CHECKS ======================================================================================
def check_settings(vocab_size: int, delay: int) -> None:
    """Refuse a vocabulary size or a delay (in tokens) that no expert can work with."""
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise UserError(
            f"VOCAB_SIZE is {vocab_size}, but experts take {SMALLEST_VOCABULARY} to "
            f"{LARGEST_VOCABULARY}; change it"
        )
    if not 0 <= delay <= LONGEST_TEXT:
        raise UserError(f"a delay of {delay} tokens is outside 0 to {LONGEST_TEXT}; change it")


def check_tokens(tokens: np.ndarray, vocab_size: int, position: int) -> np.ndarray:
    """Return the tokens as contiguous uint16 [n]; `position` tokens were read before them.

    Compiled code checks no index, so every token must be below the vocabulary's size.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and len(tokens)):
        raise UserError(
            f"tokens are {tokens.dtype} of {tokens.ndim} dimensions, but experts read a row of "
            "integers; pass token ids"
        )
    if position + len(tokens) > LONGEST_TEXT:
        raise UserError(
            f"{position + len(tokens)} tokens are more than the {LONGEST_TEXT} that counts can "
            "hold; score in parts"
        )
    low, high = (int(tokens.min()), int(tokens.max())) if len(tokens) else (0, 0)
    if low < 0 or high >= vocab_size:
        raise UserError(
            f"the text holds token {low if low < 0 else high}, but VOCAB_SIZE is {vocab_size}; "
            "set VOCAB_SIZE, or DATA_PATH, so that the two agree"
        )
    return np.ascontiguousarray(tokens, dtype=np.uint16)


# ==== DIGEST ======================================================================================
class TokenDigest:
    """SHA-256 over settings and every token read: each block is hashed with the hash before it.

    Equal texts give equal digests, whatever the pieces they arrive in. The state can be saved,
    which a running hashlib object cannot.
    """

    BLOCK = 1 << 13  # bytes: 4,096 tokens

    def __init__(self, settings: str):
        self.link, self.rest = hashlib.sha256(settings.encode()).digest(), b""

    def feed(self, tokens: np.ndarray) -> None:
        """Add uint16 tokens."""
        data = memoryview(self.rest + tokens.astype("<u2", copy=False).tobytes())
        end = len(data) - len(data) % self.BLOCK
        for at in range(0, end, self.BLOCK):
            self.link = hashlib.sha256(self.link + data[at : at + self.BLOCK]).digest()
        self.rest = bytes(data[end:])

    def hexdigest(self) -> str:
        """Return the digest of everything fed so far."""
        return hashlib.sha256(self.link + self.rest).hexdigest()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the state as arrays, for `write_state`."""
        return {
            "link": np.frombuffer(self.link, np.uint8),
            "rest": np.frombuffer(self.rest, np.uint8),
        }

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over the state that `arrays` returned; ValueError where it cannot be one."""
        link, rest = arrays["link"], arrays["rest"]
        if not link.dtype == rest.dtype == np.uint8:
            raise ValueError("digest: not bytes")
        if link.shape != (32,) or len(rest) >= self.BLOCK:
            raise ValueError("digest: wrong size")
        self.link, self.rest = link.tobytes(), rest.tobytes()


# ==== FILES =======================================================================================
def write_state(path: str | Path, kind: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write plain arrays, uncompressed, each with its checksum; the file is replaced as a whole."""
    with replacing(path) as f:
        np.savez(f, kind=np.frombuffer(kind.encode(), np.uint8), **arrays)


# What numpy and zipfile raise when bytes are damaged, and our own checks.
DAMAGE = (
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
)


@contextlib.contextmanager
def open_state(path: str | Path, kind: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Yield the arrays of a state file by name.

    A missing, damaged or foreign file ends in a UserError of one line. So does a ValueError that
    the reader raises because the arrays do not fit each other.
    """
    try:
        with Path(path).open("rb") as f:
            if not zipfile.is_zipfile(f):
                raise ValueError("not a zip file")
            f.seek(0)
            with np.load(f, allow_pickle=False) as arrays:
                if arrays["kind"].tobytes() != kind.encode():
                    raise ValueError("state of something else")
                yield arrays
    except DAMAGE:
        raise UserError(
            f"{path}: not a whole file of {kind} state; delete it and score from the start"
        ) from None
    except OSError as e:
        raise UserError(
            f"{path}: cannot be read ({e.strerror or e}); score from the start"
        ) from None


def same_shape(saved: np.ndarray, ours: np.ndarray) -> np.ndarray:
    """Return the saved array, contiguous; ValueError if its shape or type differs from ours."""
    if saved.shape != ours.shape or saved.dtype != ours.dtype:
        raise ValueError("shape")
    return np.ascontiguousarray(saved)


def all_within(indices: np.ndarray, low: int, end: int) -> bool:
    """Tell whether all indices lie in low..end-1; compiled code would follow any other one."""
    return not indices.size or (low <= int(indices.min()) and int(indices.max()) < end)
