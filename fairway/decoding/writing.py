"""From an artifact and a prompt to text: load the model, spell its tokens as they come, time
both.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fairway.artifact_reader import read_artifact
from fairway.case_ops import Unfolding
from fairway.compression.loading import Loaded, load
from fairway.compression.spelling import Speller
from fairway.decoding.beam import beam_search
from fairway.decoding.drafters import LOOKUP_DRAFTERS, Drafter, model_drafter
from fairway.decoding.reader import EngineSource, GeneratedToken, Reader, decode_plainly
from fairway.decoding.speculative import Speculation, SpeculationStats
from fairway.decoding.strategies import Strategy
from fairway.decoding.strategy_options import DRAFT_KINDS
from fairway.scoring.memory import Memory, first_layers
from train_gpt import BOS_ID, GPT, UserError, build_model

EOS_ID = 2
ENDS = (BOS_ID, EOS_ID)  # a document ends where the next one begins
MOST_DRAFTS = 32  # every engine can forget 64 tokens again


# ==== LOADING =====================================================================================
class Writer:
    """A model with its tokenizer, its device and the precision of its cache, ready to write.

    `connect`, if given, maps the loaded model to an EngineSource that runs in the model's place.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str = "",
        device: str = "",
        cache: str = "model",
        connect: Callable[[Loaded], EngineSource] | None = None,
    ):
        loaded = load(path, tokenizer, device)
        self.artifact, self.model, self.speller, self.runtime = loaded
        self.cache, self.engines = cache, connect(loaded) if connect else None

    @property
    def context(self) -> int:
        """Number of tokens that the model sees at a time."""
        return self.engines.context if self.engines else self.model.cfg.train_seq_len

    def tokens(self, prompt: bytes) -> list[int]:
        """Return the prompt's tokens, BOS first."""
        return [BOS_ID, *self.speller.tokens(prompt)]

    def reader(self, model: GPT | None = None) -> Reader:
        """Return a new reader: of `model`, a drafter, always in PyTorch; by default of the model
        itself, on the engine chosen for it.
        """
        if self.engines and model is None:
            return Reader(self.engines.new_engine(), most=self.engines.most)
        return Reader(Memory(model or self.model, storage=self.cache), self.runtime.device)

    def read_prompt(
        self, prompt: Sequence[int], on_progress: Callable[[int], None] | None = None
    ) -> Reader:
        """Return a reader that has read the prompt except its last token."""
        reader = self.reader()
        if len(prompt) > 1:
            reader.last(prompt[:-1], on_progress)
        return reader

    def steps(
        self,
        prompt: Sequence[int],
        strategy: Strategy,
        seed: int,
        draft: str = "none",
        most: int = 8,
        on_progress: Callable[[int], None] | None = None,
    ) -> tuple[Iterator[GeneratedToken], SpeculationStats | None]:
        """Read the prompt; return the endless tokens after it, and the statistics of the drafter if
        there is one.
        """
        check_most_drafts(most)
        if draft != "none" and self.engines and self.engines.most == 1:
            raise UserError(
                f"--draft is {draft!r}, but these shards take one token a call, so that no guess "
                "can be verified; export them with --tokens 2 to 4"
            )
        rng = np.random.default_rng(seed)
        if draft == "none":
            reader = self.read_prompt(prompt, on_progress)
            return decode_plainly(reader, prompt, strategy, rng), None
        drafter = self.drafter(draft, strategy, rng)
        reader = self.read_prompt(prompt, on_progress)
        speculation = Speculation(reader, prompt, strategy, rng, drafter, most)
        return iter(speculation), speculation.stats

    def drafter(self, kind: str, strategy: Strategy, rng: np.random.Generator) -> Drafter:
        """Return the drafter that `--draft KIND` names."""
        if kind in LOOKUP_DRAFTERS:
            return LOOKUP_DRAFTERS[kind]()
        model = self.draft_model(kind)
        return model_drafter(model, self.model, self.reader(model), strategy, rng)

    def draft_model(self, kind: str) -> GPT:
        """Return the model's own first layers, or the model of an artifact with the same
        tokenizer.
        """
        name, _, count = kind.partition(":")
        if name == "layers":
            if count and not count.isdecimal():
                raise UserError(f"--draft is {kind!r}; it must be layers:K with a whole number K")
            return first_layers(self.model, int(count or max(1, self.model.cfg.num_layers // 4)))
        if not Path(kind).exists():
            raise UserError(
                f"--draft is {kind!r}, which is no file; take one of {', '.join(DRAFT_KINDS)}, or "
                "the path of a smaller artifact"
            )
        other = read_artifact(kind)
        ours, theirs = (a.header["tokenizer_sha256"][:12] for a in (self.artifact, other))
        if ours != theirs:
            raise UserError(
                f"--draft {kind} was trained with tokenizer {theirs}, but the artifact with {ours}"
                "; take a draft with the same tokenizer"
            )
        ours, theirs = (a.config.vocab_size for a in (self.artifact, other))
        if ours != theirs:
            raise UserError(
                f"--draft {kind} knows {theirs} tokens, but the artifact {ours}; take a draft with "
                "the same tokenizer"
            )
        return build_model(other, self.runtime.device).eval()


def check_most_drafts(most: int) -> None:
    """Raise UserError if so many guesses cannot be verified at once."""
    if not 1 <= most <= MOST_DRAFTS:
        raise UserError(f"--drafts is {most}; it must be 1 to {MOST_DRAFTS}")


# ==== SPELLING ====================================================================================
class TextStream:
    """Turn bytes, fed piece by piece, into text that can be printed at once: whole characters only,
    and nothing of a stop string. `folds`: the bytes spell folded text, with case markers.
    """

    def __init__(self, stops: Sequence[str] = (), folds: bool = False):
        if not all(stops):
            raise UserError("--stop is empty; give some text that ends the output")
        self.decoder, self.stops = codecs.getincrementaldecoder("utf-8")(errors="replace"), stops
        self.unfolding = Unfolding() if folds else None
        self.waiting, self.stopped = "", False  # waiting: text that may begin a stop string

    def feed(self, data: bytes, last: bool = False) -> str:
        """Return the text that can be printed now; `last` says that no more bytes will come."""
        text = self.decoder.decode(data, last)
        self.waiting += self.unfolding.feed(text, last) if self.unfolding else text
        matches = [at for stop in self.stops if (at := self.waiting.find(stop)) >= 0]
        self.stopped = bool(matches)
        hold = 0 if last else max((overlap(self.waiting, stop) for stop in self.stops), default=0)
        end = min(matches) if matches else len(self.waiting) - hold
        out, self.waiting = self.waiting[:end], "" if matches else self.waiting[end:]
        return out


def overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of `text` that begin `stop`: 2 for abc, bcd."""
    lengths = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


@dataclass
class GeneratedText:
    """A text with its tokens, their log-probabilities and the time that they took."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: str = "tokens"  # the reason: tokens, document, stop or interrupted
    seconds: float = 0.0  # spent in the model, not in printing

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return len(self.tokens) / max(self.seconds, 1e-9)

    @property
    def mean_logp(self) -> float:
        """Mean log-probability of a token, in nats."""
        return sum(self.logps) / max(len(self.logps), 1)


def write_text(
    steps: Iterator[GeneratedToken],
    speller: Speller,
    tokens: int,
    stops: Sequence[str] = (),
    on_text: Callable[[str], None] = lambda text: None,
    fresh: bool = False,
) -> GeneratedText:
    """Take up to `tokens` tokens from `steps`, until a document ends, a stop string comes, or
    Ctrl-C.

    `on_text` gets the text as it comes. `fresh`: the tokens begin a document.
    """
    out, stream = GeneratedText(), TextStream(stops, speller.folds)

    def put(data: bytes, last: bool = False) -> None:
        text = stream.feed(data, last)
        out.text += text
        if text:
            on_text(text)

    try:
        while len(out.tokens) < tokens and not stream.stopped:
            began = time.perf_counter()
            token, logp = next(steps)
            out.seconds += time.perf_counter() - began
            if token in ENDS:
                out.ended = "document"
                break
            out.tokens.append(token)
            out.logps.append(logp)
            put(speller.spelled([token], fresh and len(out.tokens) == 1))
    except KeyboardInterrupt:
        out.ended = "interrupted"
    if stream.stopped:
        out.ended = "stop"
    else:
        put(b"", last=True)
    return out


# ==== TIMING AND SEARCHING ========================================================================
def time_plain_decoding(
    writer: Writer,
    prompt: Sequence[int],
    strategy: Strategy,
    seed: int,
    tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> float:
    """Return the seconds that plain decoding takes for `tokens` tokens, whatever they are."""
    (steps, _), began = writer.steps(prompt, strategy, seed), time.perf_counter()
    for _ in range(tokens):
        next(steps)
        on_progress(1)
    return time.perf_counter() - began


def search_texts(
    writer: Writer,
    prompt: Sequence[int],
    width: int,
    tokens: int,
    length_penalty: float = 1.0,
    best: int = 1,
    stops: Sequence[str] = (),
    on_progress: Callable[[int], None] | None = None,
) -> list[GeneratedText]:
    """Return the `best` texts of a beam search, best first; each has the seconds of the search."""
    speller = writer.speller

    def is_complete(tokens: tuple[int, ...]) -> bool:
        data = speller.data(tokens, start_of_document=False) if stops else b""
        return tokens[-1] in ENDS or any(stop.encode() in data for stop in stops)

    reader, began = writer.read_prompt(prompt), time.perf_counter()
    hypotheses = beam_search(
        reader, prompt, width, tokens, length_penalty, best, is_complete, on_progress
    )
    seconds, texts = time.perf_counter() - began, []
    for found in hypotheses:
        steps = map(GeneratedToken, found.tokens, found.logps)
        text = write_text(steps, speller, len(found.tokens), stops, fresh=len(prompt) == 1)
        text.seconds = seconds
        texts.append(text)
    return texts
