"""Measurements of one model: latency, greedy text, score, cache, memory. All on a CPU or a GPU."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairway.decoding.reader import Reader
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.memory import Memory
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text
from train_gpt import BOS_ID, GPT, Runtime

WARMUP, SAMPLES = 5, 30  # forward passes
NEW_TOKENS = 64  # of each prompt
PROMPTS = ("The people of the United States", "My fellow citizens", "In the last year we have")
CACHE_LENGTHS = (128, 256, 512, 1024, 2048, 4096)


# ==== TIME ========================================================================================
def percentile(samples: list[float], part: float) -> float:
    """Return the sample below which `part` of all lie; the audit computes it again."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def latency(forward: Callable[[torch.Tensor], Any], tokens: torch.Tensor) -> dict[str, Any]:
    """Time forward passes of one length; the first pass and the warm-up are kept apart."""
    times = []
    for _ in range(1 + WARMUP + SAMPLES):
        began = time.perf_counter()
        with torch.inference_mode():
            forward(tokens)
        times.append(1000 * (time.perf_counter() - began))
    samples = times[1 + WARMUP :]
    return {
        "tokens": tokens.numel(),
        "first_ms": times[0],
        "warmup_ms": times[1 : 1 + WARMUP],
        "samples_ms": samples,
        "mean_ms": statistics.mean(samples),
        "p50_ms": percentile(samples, 0.5),
        "p95_ms": percentile(samples, 0.95),
    }


# ==== TEXT ========================================================================================
def prompts(speller_ids: Callable[[str], list[int]], context: int) -> list[list[int]]:
    """Return the fixed prompts as tokens, BOS first, short enough for the model's context."""
    return [[BOS_ID, *speller_ids(text)][: max(1, context // 2)] for text in PROMPTS]


def generation(model: GPT, texts: list[list[int]]) -> dict[str, Any]:
    """Write greedily after each prompt; a model without blocks reads all its text at each token."""
    cached, wrote, speeds = hasattr(model, "blocks"), [], []
    for text in texts:
        began = time.perf_counter()
        tokens = with_cache(model, text) if cached else recomputed(model, text)
        speeds.append(NEW_TOKENS / (time.perf_counter() - began))
        wrote.append(tokens)
    text_hash = hashlib.sha256(np.array(wrote, "<u2")).hexdigest()
    return {
        "engine": "cache" if cached else "recomputed",
        "prompts": len(texts),
        "tokens": NEW_TOKENS,
        "tokens_per_second": statistics.median(speeds),
        "samples": speeds,
        "text_sha256": text_hash,
    }


def with_cache(model: GPT, text: list[int]) -> list[int]:
    reader, written = Reader(Memory(model), model.cos.device), []
    last = reader.last(text)
    for _ in range(NEW_TOKENS):
        written.append(int(last.argmax()))
        last = reader.read(written[-1:])[-1]
    return written


def recomputed(model: Any, text: list[int]) -> list[int]:
    tokens, context = list(text), model.cfg.train_seq_len
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = model.logits(torch.tensor([tokens[-context:]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(text) :]


# ==== SCORE =======================================================================================
def score(model: GPT, text: Text, tokens: np.ndarray, cfg: EvalConfig, rt: Runtime) -> np.ndarray:
    """Return the log-probability of each of tokens[1:], in sliding windows."""
    neural = Neural(model, cfg, rt)
    columns = columns_in_memory(len(tokens) - 1, {"logp": "f8"})
    neural.fill(tokens, columns)
    return columns["logp"]


# ==== CACHE =======================================================================================
def analytic_cache_bytes(model: GPT, tokens: int, storage: str) -> int:
    """Return the bytes of keys and values of `tokens` tokens, by arithmetic alone."""
    cfg = model.cfg
    passes, width = len(model.passes(model.looping)), cfg.model_dim // cfg.num_heads
    each = {"int8": width + 2, "bf16": 2 * width, "fp32": 4 * width}[storage]
    return passes * 2 * cfg.num_kv_heads * each * tokens


def cache_growth(model: GPT, storage: str = "fp32", lengths=CACHE_LENGTHS) -> list[dict[str, int]]:
    """Read random tokens; return measured and analytic bytes of the cache at some lengths."""
    points = []
    memory = Memory(model, window=max(lengths), storage=storage)
    rng = np.random.default_rng(0)
    for length in lengths:
        count = length - memory.read
        tokens = torch.from_numpy(rng.integers(0, model.cfg.vocab_size, (1, count)))
        with torch.inference_mode():
            memory.logits(tokens)
        measured = sum(
            part[..., : memory.used, :].numel() * part.element_size()
            for part in (memory.data, memory.steps)
            if part is not None
        )
        analytic = analytic_cache_bytes(model, length, storage)
        points.append({"tokens": length, "measured": measured, "analytic": analytic})
    return points


# ==== MEMORY AND MACHINE ==========================================================================
def resident_bytes() -> int:
    """Return the memory that this process holds now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a Mac has the peak only
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class MemorySampler:
    """The largest memory of this process, looked at every few milliseconds."""

    def __init__(self):
        self.before = self.peak = resident_bytes()

    @contextmanager
    def sampling(self, every_s: float = 0.005) -> Iterator[None]:
        """Sample in a thread while the body runs."""
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(every_s):
                self.peak = max(self.peak, resident_bytes())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.peak = max(self.peak, resident_bytes())


def hardware() -> dict[str, Any]:
    """Return what two rows of a table must share to be comparable."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    level = torch.backends.cpu.get_cpu_capability()
    return {"processor": name, "cores": os.cpu_count(), "capability": level}
