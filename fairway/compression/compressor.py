"""An artifact as a lossless compressor: files, or the tokens of a proof, to a bitstream and back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
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
    WHOLE,
    BitstreamError,
    Header,
    MadeOn,
    Predictor,
    Told,
    check_header,
    decode_tokens,
    default_streams,
    described,
    digest_of,
    encode_tokens,
    packed,
)
from fairway.compression.loading import load
from fairway.compression.spelling import Speller
from fairway.compression.streams import Mixed, Rolling, Windowed
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from train_gpt import BOS_ID, GPT, Runtime, file_sha256, need


@dataclass(frozen=True)
class Coder:
    """A model and its tokenizer, ready to encode and to decode on one device."""

    model: GPT
    speller: Speller
    runtime: Runtime
    sha256: bytes

    @classmethod
    def of(cls, path: str | Path, device: str = "", tokenizer: str = "") -> Coder:
        _, model, speller, runtime = load(path, tokenizer, device)
        return cls(model, speller, runtime, bytes.fromhex(file_sha256(path)))

    def made_on(self) -> MadeOn:
        kind = self.runtime.device.type
        name = f"{kind}, {torch.backends.cpu.get_cpu_capability()}" if kind == "cpu" else kind
        version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:3])
        return MadeOn(
            version, DEVICES.index(name) if name in DEVICES else 0, torch.get_num_threads()
        )

    def predictor(self, h: Header) -> Predictor:
        """A proof is read in the windows of its score; a text rolls on, in several streams."""
        first, cfg = h.first_tokens(), h.settings()
        if h.files is None:
            need(
                h.streams == 1 and cfg is not None,
                "a proof is one stream, with experts",
                BitstreamError,
            )
            neural = Windowed(Neural(self.model, cfg, self.runtime), first)
        else:
            neural = Rolling(self.model, first)
        return neural if cfg is None else Mixed(neural, self.speller.table, cfg, first, h.count)

    def header(self, data: bytes, **known: Any) -> Header:
        """Checked before hours are spent on what it announces."""
        header = Header(self.sha256[:HASH_BYTES], digest_of(data), self.made_on(), **known)
        check_header(header)
        return header

    def encode(
        self,
        files: Sequence[tuple[str, bytes]],
        settings: EvalConfig | None = None,
        streams: int = 0,
        told: Told | None = None,
        began: Told | None = None,
    ) -> bytes:
        """A bitstream of files, (name, bytes) each; 0 streams: as many as suit their size. `began` gets the number of
        tokens before the first is coded."""
        spelt = [np.array([BOS_ID, *self.speller.tokens(data)], np.uint16) for _, data in files]
        tokens = np.concatenate(spelt)[1:]  # without the very first BOS
        header = self.header(
            b"".join(data for _, data in files),
            streams=streams or default_streams(len(tokens)),
            count=len(tokens),
            first=BOS_ID,
            files=tuple((name, len(data)) for name, data in files),
            experts=described(settings, EXPERT_SETTINGS),
        )
        if began:
            began(len(tokens))
        return packed(header, self.coded(header, tokens, told))

    def encode_proof(
        self, tokens: np.ndarray, settings: EvalConfig, told: Told | None = None
    ) -> bytes:
        """A bitstream of a split's first tokens, at the price that `settings` score them with."""
        header = self.header(
            tokens.astype("<u2").tobytes(),
            streams=1,
            count=len(tokens) - 1,
            first=int(tokens[0]),
            files=None,
            experts=described(settings, SETTINGS),
        )
        return packed(header, self.coded(header, tokens[1:], told))

    def coded(self, header: Header, tokens: np.ndarray, told: Told | None) -> bytes:
        return encode_tokens(self.predictor(header), tokens, told) if len(tokens) else b""

    def decode(
        self, header: Header, payload: bytes, told: Told | None = None
    ) -> list[tuple[str, bytes]]:
        """The files of a bitstream, or BitstreamError: never another text."""
        need(
            header.files is not None,
            "holds the tokens of a proof, and no text; python -m fairway.compression.proof decodes it",
            BitstreamError,
        )
        with self.as_written(header):
            tokens = np.concatenate([[BOS_ID], self.decoded(header, payload, told)])
            starts = np.flatnonzero(tokens == BOS_ID)
            parts = [self.speller.data(part[1:]) for part in np.split(tokens, starts[1:])]
            found = tuple(
                (name, len(part)) for (name, _), part in zip(header.files, parts, strict=False)
            )
            need(
                len(parts) == len(header.files)
                and found == header.files
                and digest_of(b"".join(parts)) == header.digest,
                "what comes out does not match its checksum",
                BitstreamError,
            )
        return [(name, part) for (name, _), part in zip(header.files, parts, strict=True)]

    def decode_proof(self, header: Header, payload: bytes, told: Told | None = None) -> np.ndarray:
        """uint16[count + 1]: the tokens of a proof, the first included, or BitstreamError."""
        need(
            header.files is None,
            "holds a text, and no tokens of a proof; compress_text.py decodes it",
            BitstreamError,
        )
        with self.as_written(header):
            tokens = np.append(np.uint16(header.first), self.decoded(header, payload, told))
            need(
                digest_of(tokens.astype("<u2").tobytes()) == header.digest,
                "what comes out does not match its checksum",
                BitstreamError,
            )
        return tokens

    def decoded(self, header: Header, payload: bytes, told: Told | None) -> np.ndarray:
        V = len(self.speller.pieces)
        need(
            header.first < V,
            f"the first token is {header.first}, but the artifact knows {V}",
            BitstreamError,
        )
        least = -np.log2(1 - (V - 1) / WHOLE)  # bits of a token that is as certain as can be
        need(
            header.count * least <= 8 * len(payload) + 64 and (header.count > 0 or not payload),
            f"{header.count} tokens cannot lie in {len(payload)} bytes",
            BitstreamError,
        )
        return (
            decode_tokens(self.predictor(header), payload, header.count, told)
            if header.count
            else np.zeros(0, np.uint16)
        )

    @contextlib.contextmanager
    def as_written(self, header: Header) -> Iterator[None]:
        """The artifact and the number of threads that wrote a file. What fails here although the file is whole, fails
        because the numbers are others."""
        ours = self.sha256[:HASH_BYTES]
        need(
            header.artifact == ours,
            f"was made with artifact {header.artifact.hex()}, and this is {ours.hex()}; "
            "pass --artifact with that one",
            BitstreamError,
        )
        before = torch.get_num_threads()
        torch.set_num_threads(header.made_on.threads)
        try:
            yield
        except BitstreamError as e:
            there, here = header.made_on, self.made_on()
            where = (
                "by their names both are alike"
                if there == here
                else f"there: {there}; here: {here}"
            )
            raise BitstreamError(
                f"{e}: this machine computes other probabilities than the one that wrote it ({where})"
            ) from None
        finally:
            torch.set_num_threads(before)
