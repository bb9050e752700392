"""Kernels of scaled dot-product attention, one at a time."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fairway.methods.method import Calibration, Method, NotHere
from fairway.methods.parcel import with_stored
from train_gpt import GPT, attend

BACKENDS = {
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def why_not(model: GPT, kernel: str) -> str:
    """Attend once in the model's shape by one kernel alone; return why it cannot run, or ""."""
    cfg, device = model.cfg, model.cos.device
    width, dtype = cfg.model_dim // cfg.num_heads, model.stream_dtype
    q, k = (
        torch.zeros(1, heads, 8, width, dtype=dtype, device=device)
        for heads in (cfg.num_heads, cfg.num_kv_heads)
    )
    with warnings.catch_warnings(record=True) as notes, sdpa_kernel(BACKENDS[kernel]):
        warnings.simplefilter("always")
        try:
            attend(q, k, k)
        except RuntimeError as e:
            # On a GPU, PyTorch warns with a reason for each kernel that it passes over.
            reasons = [str(note.message).split("(Triggered")[0].strip() for note in notes]
            return " ".join([str(e).splitlines()[0], *reasons])
    return ""


@dataclass(frozen=True)
class AttentionKernel(Method):
    """The weights as they are, in float32, and attention by one of PyTorch's kernels alone: math,
    which writes all scores to memory; flash and efficient, which never do; or cuDNN's. Each is
    tried first on one attention of the model's shape; a kernel that this machine lacks is not run,
    with PyTorch's reason.
    """

    kernel: str
    group = "attention kernels"

    @property
    def same_score_as(self) -> str:
        return "fp32" if self.kernel == "flash" else ""  # what PyTorch chooses on a CPU

    def apply(self, model: GPT, calibration: Calibration) -> GPT:
        if reason := why_not(model, self.kernel):
            where = model.cos.device.type
            raise NotHere(f"no {self.kernel} kernel on this {where}: {reason:.150}; try a GPU")
        return with_stored(model, {})

    def running(self) -> contextlib.AbstractContextManager:
        return sdpa_kernel(BACKENDS[self.kernel])
