"""Use an artifact as a lossless compressor: of files, or of the tokens of a proof."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.compression.bitstream import (
    DEVICES,
    EXPERT_SETTINGS,
    HASH_BYTES,
    SETTINGS,
    Header,
    Machine,
    bitstream_bytes,
    changed_settings,
    check_header,
    short_digest,
)
from fairway.compression.loading import load
from fairway.compression.predictors import MixedPredictor, RollingPredictor, WindowedPredictor
from fairway.compression.spelling import Speller
from fairway.compression.token_coder import (
    FREQUENCY_SUM,
    BitstreamError,
    Predictor,
    decode_tokens,
    default_streams,
    encode_tokens,
)
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, Runtime, file_sha256

OnTokens = Callable[[int], object]  # gets a number of tokens


@dataclass(frozen=True)
class Compressor:
    """A model and its tokenizer, ready to encode and to decode on one device."""

    model: GPT
    speller: Speller
    runtime: Runtime
    sha256: bytes  # of the artifact's file

    @classmethod
    def load(cls, path: str | Path, device: str = "", tokenizer: str = "") -> Compressor:
        """Return the compressor of an artifact's file; see `loading.load`."""
        _, model, speller, runtime = load(path, tokenizer, device)
        return cls(model, speller, runtime, bytes.fromhex(file_sha256(path)))

    # ==== ENCODE ==================================================================================
    def encode(
        self,
        files: Sequence[tuple[str, bytes]],
        settings: EvalConfig | None = None,
        streams: int = 0,
        on_progress: OnTokens | None = None,
        on_start: OnTokens | None = None,
    ) -> bytes:
        """Return the bitstream of files, (name, bytes) each.

        Without `settings` the model predicts alone. With `streams` 0, their number follows the
        size. `on_start` gets the number of tokens, `on_progress` how many each step adds.
        """
        documents = [np.array([BOS_ID, *self.speller.tokens(data)], np.uint16) for _, data in files]
        tokens = np.concatenate(documents)[1:]  # the first BOS is known to a decoder
        header = self.header(
            b"".join(data for _, data in files),
            streams=streams or default_streams(len(tokens)),
            count=len(tokens),
            first=BOS_ID,
            files=tuple((name, len(data)) for name, data in files),
            experts=changed_settings(settings, EXPERT_SETTINGS),
        )
        if on_start:
            on_start(len(tokens))
        return bitstream_bytes(header, self.encode_payload(header, tokens, on_progress))

    def encode_proof(
        self, tokens: np.ndarray, settings: EvalConfig, on_progress: OnTokens | None = None
    ) -> bytes:
        """Return the bitstream of a split's first tokens, at the price that `settings` score."""
        header = self.header(
            tokens.astype("<u2").tobytes(),
            streams=1,
            count=len(tokens) - 1,
            first=int(tokens[0]),
            files=None,
            experts=changed_settings(settings, SETTINGS),
        )
        return bitstream_bytes(header, self.encode_payload(header, tokens[1:], on_progress))

    def header(self, data: bytes, **values: Any) -> Header:
        """Return a checked header; a wrong one must not show only after hours of coding."""
        header = Header(self.sha256[:HASH_BYTES], short_digest(data), self.machine(), **values)
        check_header(header)
        return header

    def machine(self) -> Machine:
        """Return what the probabilities on this machine depend on."""
        kind = self.runtime.device.type
        name = f"{kind}, {torch.backends.cpu.get_cpu_capability()}" if kind == "cpu" else kind
        version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:3])
        device = DEVICES.index(name) if name in DEVICES else 0
        return Machine(version, device, torch.get_num_threads())

    def encode_payload(
        self, header: Header, tokens: np.ndarray, on_progress: OnTokens | None
    ) -> bytes:
        """Return the payload of tokens; none have none, and no model runs for them."""
        return encode_tokens(self.predictor(header), tokens, on_progress) if len(tokens) else b""

    # ==== DECODE ==================================================================================
    def decode(
        self, header: Header, payload: bytes, on_progress: OnTokens | None = None
    ) -> list[tuple[str, bytes]]:
        """Return the files of a bitstream, every byte, or raise BitstreamError."""
        if header.files is None:
            raise BitstreamError("holds the tokens of a proof; fairway decode-proof decodes it")
        with self.as_written(header):
            tokens = np.append(BOS_ID, self.decode_payload(header, payload, on_progress))
            starts = np.flatnonzero(tokens == BOS_ID)
            texts = [self.speller.data(document[1:]) for document in np.split(tokens, starts[1:])]
            files = [(name, text) for (name, _), text in zip(header.files, texts, strict=False)]
            complete = len(texts) == len(header.files)
            sizes = tuple((name, len(text)) for name, text in files)
            if (
                not complete
                or sizes != header.files
                or short_digest(b"".join(texts)) != header.digest
            ):
                raise BitstreamError("the decoded text does not match its checksum")
        return files

    def decode_proof(
        self, header: Header, payload: bytes, on_progress: OnTokens | None = None
    ) -> np.ndarray:
        """Return uint16[count + 1], the tokens of a proof and the one before them."""
        if header.files is not None:
            raise BitstreamError("holds a text; fairway decompress decodes it")
        with self.as_written(header):
            decoded = self.decode_payload(header, payload, on_progress)
            tokens = np.append(np.uint16(header.first), decoded)
            if short_digest(tokens.astype("<u2").tobytes()) != header.digest:
                raise BitstreamError("the decoded tokens do not match their checksum")
        return tokens

    def decode_payload(
        self, header: Header, payload: bytes, on_progress: OnTokens | None
    ) -> np.ndarray:
        """Return uint16[count]; a count that the payload cannot hold is refused at once."""
        V, count = len(self.speller.pieces), header.count
        if header.first >= V:
            raise BitstreamError(f"the first token is {header.first}, but the artifact knows {V}")
        least_bits = -np.log2(1 - (V - 1) / FREQUENCY_SUM)  # of the most certain token
        if count * least_bits > 8 * len(payload) + 64 or (payload and not count):
            raise BitstreamError(f"{count} tokens cannot be in {len(payload)} bytes")
        if not count:
            return np.zeros(0, np.uint16)
        return decode_tokens(self.predictor(header), payload, count, on_progress)

    @contextlib.contextmanager
    def as_written(self, header: Header) -> Iterator[None]:
        """Run the body as the writer ran: with the same artifact and number of threads.

        The file's checksum held before. So if the body fails to decode, this machine computes other
        probabilities than the writer's, and the error names both machines.
        """
        ours = self.sha256[:HASH_BYTES]
        if header.artifact != ours:
            raise BitstreamError(
                f"was made with artifact {header.artifact.hex()}, and this is {ours.hex()}; "
                "pass --artifact with that one"
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(header.made_on.threads)
        try:
            yield
        except BitstreamError as e:
            theirs, here = header.made_on, self.machine()
            difference = (
                "both have the same description: an earlier Fairway may have written it"
                if theirs == here
                else f"it was made on: {theirs}; this is: {here}"
            )
            raise BitstreamError(
                f"{e}: this machine computes other probabilities than the one that wrote it "
                f"({difference})"
            ) from None
        finally:
            torch.set_num_threads(threads)

    # ==== PREDICT =================================================================================
    def predictor(self, h: Header) -> Predictor:
        """Return the predictor that a header asks for.

        A proof is read in the windows of its score; the streams of a text roll on.
        """
        first, cfg = h.first_tokens(), h.settings()
        if h.files is None:
            if h.streams != 1 or cfg is None:
                raise BitstreamError("a proof must have one stream and experts")
            neural = WindowedPredictor(Neural(self.model, cfg, self.runtime), first)
        else:
            neural = RollingPredictor(self.model, first)
        if cfg is None:
            return neural
        return MixedPredictor(neural, self.speller.table, cfg, first, h.count)
