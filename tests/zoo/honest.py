"""Scorers that keep every rule. Most cheats of the zoo are one of these with one thing wrong."""

import hashlib

import numpy as np

from fairway.certificate.synthetic import synthetic_tokens
from fairway.scoring.commits import CHAIN_START, chained
from train_gpt import BOS_ID, ByteTable

V, CHUNK = 48, 64


class ToyTokenizer:
    """The part of a SentencePiece model that byte counts need: four controls, then pieces of 1 to 3
    bytes.
    """

    pieces = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        *("▁" * (i % 2) + "aé€"[i % 3] for i in range(V - 4)),
    ]

    def vocab_size(self) -> int:
        return V

    def is_control(self, i: int) -> bool:
        return i < 3

    def is_unknown(self, i: int) -> bool:
        return i == 3

    def is_unused(self, i: int) -> bool:
        return False

    def is_byte(self, i: int) -> bool:
        return False

    def id_to_piece(self, i: int) -> str:
        return self.pieces[i]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.pieces[i].replace("▁", " ") for i in ids if i > 3)


TOKENIZER = ToyTokenizer()
TABLE = ByteTable.of(TOKENIZER, V)
TEXT = synthetic_tokens(V, 1200, seed=7)


def ledger(
    tokens: np.ndarray,
    scores: np.ndarray,
    firsts: list[int],
    states: list[str],
    table: ByteTable = TABLE,
) -> list:
    """Return the commits of chunks that begin at `firsts`."""
    log, counts = [], table.count(tokens)
    for first, end, state in zip(firsts, [*firsts[1:], len(scores)], states, strict=True):
        log.append(
            chained(
                log[-1].chain if log else CHAIN_START,
                first,
                end - first,
                -scores[first:end].sum(),
                counts[first:end].sum(),
                state,
            )
        )
    return log


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def picked(rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the probability of each target, float64[n-1]."""
    return rows[np.arange(len(rows)), tokens[1:]]


class Bigram:
    """Counts which token follows which, as the text goes by; 64 rows a commit."""

    vocab_size, breaks = V, None

    def __init__(self):
        self.commits = []

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return the distribution held for every target, float64[n-1, V]."""
        counts, held, self.states = np.full((V, V), 0.05), np.empty((len(tokens) - 1, V)), []
        for row, (context, target) in enumerate(
            zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True)
        ):
            if row % CHUNK == 0:
                self.states.append(digest(counts))
            held[row] = counts[context]
            counts[context, target] += 1
        return held / held.sum(axis=1, keepdims=True)

    def score(self, tokens: np.ndarray) -> np.ndarray:
        scores = np.log(picked(self.rows(tokens), tokens))
        self.commits = ledger(tokens, scores, list(range(0, len(scores), CHUNK)), self.states)
        return scores

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        return self.rows(tokens)[i - 1]


class Uniform:
    """Gives every token the same probability, and offers nothing but the two methods."""

    breaks = None

    def score(self, tokens: np.ndarray) -> np.ndarray:
        return np.full(len(tokens) - 1, -np.log(V))

    def distribution(self, tokens: np.ndarray, i: int) -> np.ndarray:
        return np.full(V, 1 / V)


class Static(Bigram):
    """Reads a table from training, which the text never changes (track A of #1017)."""

    table = np.random.default_rng(0).dirichlet(np.full(V, 0.3), V) * 0.99 + 0.01 / V

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        self.states = [digest(self.table)] * len(range(0, len(tokens) - 1, CHUNK))
        return self.table[tokens[:-1]]


class Windowed(Static):
    """Uses sliding windows of 32 rows and a stride of 16: a row also knows the earlier tokens of
    its window.
    """

    size, stride = 32, 16

    def firsts(self, n: int) -> list[int]:
        return [0, *range(self.size, n, self.stride)]

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        held = super().rows(tokens).copy()
        firsts = np.array(self.firsts(len(held)))
        for row in range(len(held)):
            scored_from = int(firsts[firsts <= row][-1])
            start = max(0, scored_from + self.stride - self.size) if scored_from else 0
            recent = np.bincount(tokens[start : row + 1], minlength=V)
            held[row] = 0.8 * held[row] + 0.2 * recent / recent.sum()
        return held

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {
            "window": np.array(self.firsts(len(tokens) - 1)),
            "batch": np.arange(128, len(tokens) - 1, 128),
        }


class ScoreFirst(Bigram):
    """Trains at test time by chunks: a chunk is scored with the old state, committed, then
    learned.
    """

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        counts, held, self.states = np.full((V, V), 0.05), np.empty((len(tokens) - 1, V)), []
        for first in range(0, len(held), CHUNK):
            self.states.append(digest(counts))
            contexts, targets = tokens[first:-1][:CHUNK], tokens[first + 1 :][:CHUNK]
            held[first : first + CHUNK] = counts[contexts]
            for _ in range(3):  # epochs on what was scored already are allowed
                np.add.at(counts, (contexts, targets), 0.5)
        return held / held.sum(axis=1, keepdims=True)

    def boundaries(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        return {"chunk": np.arange(0, len(tokens) - 1, CHUNK)}


class Tilted(Bigram):
    """Lifts one hint, the likeliest token after the prefix, by e^2, and divides all by the
    normaliser 1 + p(hint)(e^2 - 1) (#1514).
    """

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        held = super().rows(tokens)
        hints = np.arange(len(held)), held.argmax(axis=1)
        held[hints] *= np.exp(2.0)
        return held / held.sum(axis=1, keepdims=True)


class Smeared(Bigram):
    """Its first layer adds half of the embedding before, never across a BOS; its batches round
    differently.
    """

    tolerance, vectors = 1e-6, np.random.default_rng(1).normal(size=(V, 4))

    def score(self, tokens: np.ndarray) -> np.ndarray:
        return super().score(tokens) + 1e-8 * np.sin(len(tokens))

    def embeddings(self, tokens: np.ndarray) -> np.ndarray:
        read = self.vectors[tokens]
        before = np.concatenate([read[:1], read[:-1]])
        return read + 0.5 * np.where((tokens == BOS_ID)[:, None], 0, before)


HONEST = [Bigram, Uniform, Static, Windowed, ScoreFirst, Tilted, Smeared]
