"""The same model through torch.compile, and through ONNX Runtime."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import zstandard
from torch import Tensor, nn

from fairway.methods import parcel
from fairway.methods.method import Calibration, Method
from fairway.methods.parcel import ParcelError, with_stored
from fairway.scoring.memory import model_rope
from fairway.scoring.neural import ROUND, window_logits
from train_gpt import GPT, Config, compress_zstd

ONNX_FILE = "model.onnx.zst"
OPSET = 20
SIZES = ("train_seq_len", "vocab_size")


class WindowReader:
    """A model that another runtime computes, whole windows at a time, as scoring calls it.

    Embedding is left to the runtime, so that `embed` hands the tokens on.
    """

    def __init__(self, cfg: Config, logits: Callable[[Tensor], Tensor]):
        self.cfg, self.logits = cfg, logits
        self.cos = torch.zeros(0)  # says that the logits come on the CPU

    def eval(self) -> WindowReader:
        return self

    def embed(self, tokens_BT: Tensor) -> Tensor:
        return tokens_BT

    def from_embedded(self, tokens_BT: Tensor, rope: tuple[Tensor, Tensor], first: int) -> Tensor:
        return self.logits(tokens_BT)[:, first:]


def longest(cfg: Config) -> int:
    """Return the longest window that scoring asks for."""
    return cfg.train_seq_len + ROUND


# ==== TORCH.COMPILE ===============================================================================
class CompiledReader(WindowReader):
    """A model whose windows of any length run through one compiled function, one at a time.

    Batches would be compiled a second time, because the compiler makes a case of its own of one.
    """

    def __init__(self, model: GPT, backend: str):
        super().__init__(model.cfg, self.read)
        self.model, self.rope = model.eval(), model_rope(model, longest(model.cfg))
        self.compiled = torch.compile(window_logits, fullgraph=True, dynamic=True, backend=backend)

    def read(self, tokens_BT: Tensor) -> Tensor:
        # Copies, because a view would be compiled again for each shape of what it is a view of.
        with torch.inference_mode():
            rope = [table[: tokens_BT.size(1)].clone() for table in self.rope]
            rows = [row[None].clone() for row in tokens_BT]
            return torch.cat([self.compiled(self.model, row, *rope) for row in rows])


@dataclass(frozen=True)
class Compile(Method):
    """The weights as they are, in float32, and windows through torch.compile with dynamic lengths.
    The first pass compiles, with an empty cache of compiled code, and stands apart from the timed
    ones. Text is written by reading all of it again for each token, because a cache that grows
    would be compiled again and again.
    """

    backend: str = "inductor"
    group = "runtimes"
    code = ("runtimes.py",)
    memory_unreliable = "the compiler runs in the same process"

    def apply(self, model: GPT, calibration: Calibration) -> CompiledReader:
        return CompiledReader(with_stored(model, {}), self.backend)

    def pack(self, model: CompiledReader) -> bytes:
        return parcel.pack(model.model)

    def load(self, folder: Path) -> CompiledReader:
        return CompiledReader(super().load(folder), self.backend)

    def running(self) -> contextlib.AbstractContextManager:
        from torch._inductor.utils import fresh_inductor_cache

        return fresh_inductor_cache()  # or compiling would be free the second time


# ==== ONNX ========================================================================================
class Windows2D(nn.Module):
    """A model with the rotations inside, as one function of tokens."""

    def __init__(self, model: GPT):
        super().__init__()
        self.model = model
        for name, table in zip(("cos", "sin"), model_rope(model, longest(model.cfg)), strict=True):
            self.register_buffer(name, table)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.size(1)
        return window_logits(self.model, tokens, self.cos[:T], self.sin[:T])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the notes of exporters and quantisers; exceptions pass."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
        ):
            yield
    finally:
        logging.disable(before)


def exported(model: GPT) -> bytes:
    """Return a model as an ONNX file that takes any number of sequences of any length."""
    dims = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=longest(model.cfg))
    example = torch.zeros(2, 8, dtype=torch.int64)
    with quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.onnx.export(
            Windows2D(model).eval(),
            (example,),
            dynamo=True,
            dynamic_shapes={"tokens": dict(enumerate(dims))},
            opset_version=OPSET,
            verbose=False,
        )
        path = Path(folder, "model.onnx")
        program.save(path, external_data=False)
        return path.read_bytes()


def in_dynamic_int8(onnx: bytes) -> bytes:
    """Return an ONNX file with matrices in int8 and activations rounded as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with quiet(), tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        source.write_bytes(onnx)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, per_channel=True)
        return target.read_bytes()


def packed_onnx(onnx_file: bytes, cfg: Config) -> bytes:
    """Return what ships: a checksum, and the ONNX file with the sizes that a reader needs."""
    import onnx

    model = onnx.load_from_string(onnx_file)
    for node in model.graph.node:  # the exporter notes the lines of Python that it came from
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    onnx.helper.set_model_props(model, {name: str(getattr(cfg, name)) for name in SIZES})
    payload = compress_zstd(model.SerializeToString(deterministic=True))
    return hashlib.sha256(payload).digest() + payload


class OnnxReader(WindowReader):
    """A session of ONNX Runtime on the bytes that ship."""

    def __init__(self, packed: bytes):
        import onnxruntime

        digest, payload = packed[:32], packed[32:]
        if hashlib.sha256(payload).digest() != digest:
            raise ParcelError(f"{ONNX_FILE} does not match its checksum: damaged")
        data = zstandard.ZstdDecompressor(max_window_size=2**25).decompress(payload)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        self.session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        sizes = {n: int(v) for n, v in self.session.get_modelmeta().custom_metadata_map.items()}
        cfg = Config(**sizes, train_batch_tokens=8 * sizes["train_seq_len"])
        super().__init__(cfg, self.read)
        self.packed = packed

    def read(self, tokens_BT: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"tokens": tokens_BT.numpy()})
        return torch.from_numpy(logits)


@dataclass(frozen=True)
class OnnxRuntime(Method):
    """The model exported to ONNX, with sequences of any number and length, and run by ONNX Runtime:
    in float32, or with its dynamic int8, which rounds the matrices by columns and each activation
    as it comes. The file ships compressed by zstd and needs no other code of ours. The exporter
    writes the tied embedding twice, once turned round, and its int8 keeps the first as float32.
    """

    int8: bool = False
    group = "runtimes"
    needs = ("onnx", "onnxscript", "onnxruntime")
    requirements = "requirements-methods.txt"
    code = ("runtimes.py",)
    memory_unreliable = "the exporter runs in the same process"

    def apply(self, model: GPT, calibration: Calibration) -> OnnxReader:
        onnx_file = exported(with_stored(model, {}))
        onnx_file = in_dynamic_int8(onnx_file) if self.int8 else onnx_file
        return OnnxReader(packed_onnx(onnx_file, model.cfg))

    def pack(self, model: OnnxReader) -> bytes:
        return model.packed

    def ship(self, model: OnnxReader, folder: Path) -> None:
        (folder / ONNX_FILE).write_bytes(model.packed)

    def load(self, folder: Path) -> OnnxReader:
        return OnnxReader((folder / ONNX_FILE).read_bytes())
