"""From an artifact and a prompt to text on a screen: what is loaded, what is shown when, and what it took."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fairway.compression.loading import load
from fairway.compression.spelling import Speller
from fairway.coreml.engine import Shards, load_chain
from fairway.decoding.drafts import Draft, Model, NGram, Suffix
from fairway.decoding.search import Reader, Step, beam, plain
from fairway.decoding.speculative import Speculation, Stats
from fairway.decoding.strategies import Strategy
from fairway.scoring.memory import Memory, first_layers
from train_gpt import BOS_ID, GPT, build_model, need, read_artifact

EOS_ID = 2
ENDS = (BOS_ID, EOS_ID)  # a document ends where the next one begins
MOST_DRAFTS = 32
DRAFTS = ("none", "ngram", "suffix", "layers", "layers:K")


# ==== WHAT IS LOADED ==================================================================================================
class Writer:
    """A model, its tokenizer, the device that it runs on, and how it keeps keys and values; or, where a folder of
    CoreML shards is named, those shards in the model's place."""

    def __init__(
        self,
        path: str,
        tokenizer: str = "",
        device: str = "",
        kept: str = "model",
        shards: str = "",
    ):
        loaded = load(path, tokenizer, device)
        self.artifact, self.model, self.speller, self.runtime = loaded
        self.kept, self.chain = kept, load_chain(shards, path, loaded) if shards else None

    @property
    def context(self) -> int:
        return self.chain.manifest.dims.slots if self.chain else self.model.cfg.train_seq_len

    def tokens(self, prompt: bytes) -> list[int]:
        return [BOS_ID, *self.speller.tokens(prompt)]

    def reader(self, model: GPT | None = None) -> Reader:
        """Of the shards, where there are any; of another model, a draft, always in PyTorch."""
        if self.chain and model is None:
            return Reader(Shards(self.chain), most=self.chain.most)
        return Reader(Memory(model or self.model, kept=self.kept), self.runtime.device)

    def read(self, prompt: Sequence[int], told: Callable[[int], None] | None = None) -> Reader:
        """A reader that has read the prompt but for its last token."""
        reader = self.reader()
        if len(prompt) > 1:
            reader.last(prompt[:-1], told)
        return reader

    def steps(
        self,
        prompt: Sequence[int],
        strategy: Strategy,
        seed: int,
        draft: str = "none",
        most: int = 8,
        told: Callable[[int], None] | None = None,
    ) -> tuple[Iterator[Step], Stats | None]:
        """What the model writes after the prompt, which is read at once, and, with a draft, what that does for it."""
        need(1 <= most <= MOST_DRAFTS, f"--drafts is {most}; it must be 1 to {MOST_DRAFTS}")
        need(
            draft == "none" or not self.chain or self.chain.most > 1,
            f"--draft is {draft!r}, but these shards take "
            "one token a call, so that no guess can be verified; export them with --tokens 2 to 4",
        )
        rng = np.random.default_rng(seed)
        if draft == "none":
            return plain(self.read(prompt, told), prompt, strategy, rng), None
        drafted = self.draft(draft, strategy, rng)
        speculation = Speculation(self.read(prompt, told), prompt, strategy, rng, drafted, most)
        return iter(speculation), speculation.stats

    def draft(self, kind: str, strategy: Strategy, rng: np.random.Generator) -> Draft:
        """What `--draft` names."""
        if kind in ("ngram", "suffix"):
            return NGram() if kind == "ngram" else Suffix()
        model = self.draft_model(kind)
        theirs, ours = (
            1 + len(m.passes(m.looping)) for m in (model, self.model)
        )  # the head is worth one more
        return Model(self.reader(model), strategy, rng, theirs / ours)

    def draft_model(self, kind: str) -> GPT:
        """The model's own first layers, or an artifact of the same tokenizer."""
        name, _, count = kind.partition(":")
        if name == "layers":
            need(
                not count or count.isdecimal(),
                f"--draft is {kind!r}; it must be layers:K with a whole number K",
            )
            return first_layers(self.model, int(count or max(1, self.model.cfg.num_layers // 4)))
        need(
            Path(kind).exists(),
            f"--draft is {kind!r}, which is no file; take one of {', '.join(DRAFTS)}, or the "
            "path of a smaller artifact",
        )
        other = read_artifact(kind)
        ours, theirs = (a.header["tokenizer_sha256"][:12] for a in (self.artifact, other))
        need(
            ours == theirs,
            f"--draft {kind} was trained with tokenizer {theirs}, but the artifact with {ours}; take "
            "a draft that speaks in the same tokens",
        )
        need(
            other.config.vocab_size == self.artifact.config.vocab_size,
            f"--draft {kind} knows "
            f"{other.config.vocab_size} tokens, but the artifact {self.artifact.config.vocab_size}",
        )
        return build_model(other, self.runtime.device).eval()


# ==== WHAT IS SHOWN ===================================================================================================
class Screen:
    """Bytes in, text out: whole characters only, and nothing of a stop string."""

    def __init__(self, stops: Sequence[str] = ()):
        need(all(stops), "--stop is empty; give some text that ends the output")
        self.decoder, self.stops = codecs.getincrementaldecoder("utf-8")(errors="replace"), stops
        self.waiting, self.stopped = "", False  # waiting: what may turn out to begin a stop string

    def feed(self, data: bytes, last: bool = False) -> str:
        """What can be shown now; `last`: nothing more will come."""
        self.waiting += self.decoder.decode(data, last)
        found = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        self.stopped = bool(found)
        keep = 0 if last else max((overlap(self.waiting, stop) for stop in self.stops), default=0)
        end = min(found) if found else len(self.waiting) - keep
        out, self.waiting = self.waiting[:end], "" if found else self.waiting[end:]
        return out


def overlap(text: str, stop: str) -> int:
    """How many characters of `stop` the text ends with."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0
    )


@dataclass
class Written:
    """What was written, and what it took."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: str = "tokens"  # tokens, document, stop or interrupted
    seconds: float = 0.0  # of the model, not of the screen

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return len(self.tokens) / max(self.seconds, 1e-9)

    @property
    def mean_logp(self) -> float:
        return sum(self.logps) / max(len(self.logps), 1)


def write(
    steps: Iterator[Step],
    speller: Speller,
    tokens: int,
    stops: Sequence[str] = (),
    show: Callable[[str], None] = lambda text: None,
    fresh: bool = False,
) -> Written:
    """Up to so many tokens of `steps`, shown as they come, until a document ends, a stop string comes, or Ctrl-C;
    `fresh`: they begin the document."""
    out, screen = Written(), Screen(stops)

    def put(data: bytes, last: bool = False) -> None:
        text = screen.feed(data, last)
        out.text += text
        if text:
            show(text)

    try:
        while len(out.tokens) < tokens and not screen.stopped:
            began = time.perf_counter()
            token, logp = next(steps)
            out.seconds += time.perf_counter() - began
            if token in ENDS:
                out.ended = "document"
                break
            out.tokens.append(token)
            out.logps.append(logp)
            put(speller.data([token], fresh and len(out.tokens) == 1))
    except KeyboardInterrupt:
        out.ended = "interrupted"
    if screen.stopped:
        out.ended = "stop"
    else:
        put(b"", last=True)
    return out


# ==== AROUND IT =======================================================================================================
def measure_plain(
    writer: Writer,
    prompt: Sequence[int],
    strategy: Strategy,
    seed: int,
    tokens: int,
    told: Callable[[int], None] = lambda done: None,
) -> float:
    """Seconds that plain decoding takes for so many tokens, whatever they are."""
    (steps, _), began = writer.steps(prompt, strategy, seed), time.perf_counter()
    for _ in range(tokens):
        next(steps)
        told(1)
    return time.perf_counter() - began


def search(
    writer: Writer,
    prompt: Sequence[int],
    width: int,
    tokens: int,
    length_penalty: float = 1.0,
    best: int = 1,
    stops: Sequence[str] = (),
    told: Callable[[int], None] | None = None,
) -> list[Written]:
    """The best texts that a beam search finds, best first; each has the seconds of the whole search."""
    pieces = writer.speller.pieces

    def ended(tokens: tuple[int, ...]) -> bool:
        spelt = b"".join(pieces[token] for token in tokens) if stops else b""
        return tokens[-1] in ENDS or any(stop.encode() in spelt for stop in stops)

    reader, began = writer.read(prompt), time.perf_counter()
    found, out = beam(reader, prompt, width, tokens, length_penalty, best, ended, told), []
    seconds = time.perf_counter() - began
    for one in found:
        steps = (Step(token, logp) for token, logp in zip(one.tokens, one.logps, strict=True))
        out.append(write(steps, writer.speller, len(one.tokens), stops, fresh=len(prompt) == 1))
        out[-1].seconds = seconds
    return out
