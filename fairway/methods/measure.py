"""Measurements of one model: latency, greedy text, score, cache, memory. All on a CPU or a GPU."""

from __future__ import annotations

import hashlib
import itertools
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

from fairway.decoding.drafters import LOOKUP_DRAFTERS, model_drafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.speculative import Speculation, SpeculationStats
from fairway.decoding.strategies import Strategy
from fairway.scoring.columns import columns_in_memory
from fairway.scoring.memory import Memory, bytes_per_token, first_layers
from fairway.scoring.neural import Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text
from train_gpt import BOS_ID, GPT, Runtime, UserError

WARMUP, SAMPLES = 5, 30  # forward passes
NEW_TOKENS = 64  # of each prompt
PROMPTS = ("The people of the United States", "My fellow citizens", "In the last year we have")
SPECULATION_ROUNDS, MOST_GUESSES = 3, 8
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


def generation(
    model: GPT, texts: list[list[int]], storage: str = "fp32", draft: str = ""
) -> dict[str, Any]:
    """Write greedily after each prompt; a model without blocks reads all its text at each token."""
    engine = "cache" if hasattr(model, "blocks") else "recomputed"
    engine, wrote, speeds = f"{engine}, draft {draft}" if draft else engine, [], []
    for text in texts:
        began = time.perf_counter()
        if draft:
            tokens, _ = with_draft(model, text, draft)
        elif engine == "cache":
            tokens = with_cache(model, text, storage)
        else:
            tokens = recomputed(model, text)
        speeds.append(NEW_TOKENS / (time.perf_counter() - began))
        wrote.append(tokens)
    text_hash = hashlib.sha256(np.array(wrote, "<u2")).hexdigest()
    return {
        "engine": engine,
        "prompts": len(texts),
        "tokens": NEW_TOKENS,
        "tokens_per_second": statistics.median(speeds),
        "samples": speeds,
        "text_sha256": text_hash,
    }


def prompt_reader(model: GPT, text: list[int], storage: str) -> Reader:
    """Return a reader that has read a prompt but its last token, as decoding wants it."""
    reader = Reader(Memory(model, storage=storage), model.cos.device)
    if len(text) > 1:
        reader.last(text[:-1])
    return reader


def with_cache(model: GPT, text: list[int], storage: str) -> list[int]:
    reader = prompt_reader(model, text, storage)
    steps = decode_plainly(reader, text, Strategy("greedy"), np.random.default_rng(0))
    return [step.token for step in itertools.islice(steps, NEW_TOKENS)]


def recomputed(model: Any, text: list[int]) -> list[int]:
    tokens, context = list(text), model.cfg.train_seq_len
    for _ in range(NEW_TOKENS):
        with torch.inference_mode():
            logits = model.logits(torch.tensor([tokens[-context:]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(text) :]


def speculation(model: GPT, texts: list[list[int]], draft: str) -> dict[str, Any]:
    """Write after each prompt with a draft and without, in turn; both must write the same."""
    total, plain, speeds = SpeculationStats(), [], []
    for text in texts * SPECULATION_ROUNDS:
        began = time.perf_counter()
        expected = with_cache(model, text, "fp32")
        plain.append(NEW_TOKENS / (time.perf_counter() - began))
        began = time.perf_counter()
        written, stats = with_draft(model, text, draft)
        speeds.append(NEW_TOKENS / (time.perf_counter() - began))
        if written != expected:
            raise UserError(f"with the draft {draft}, the text differs from that without it")
        for name in ("tokens", "verifications", "drafted", "accepted"):
            setattr(total, name, getattr(total, name) + getattr(stats, name))
    return {
        "draft": draft,
        "plain_tokens_per_second": statistics.median(plain),
        "tokens_per_second": statistics.median(speeds),
        "speedup": statistics.median(a / b for a, b in zip(speeds, plain, strict=True)),
        "tokens_per_verification": total.tokens_per_verification,
        "acceptance": total.acceptance,
    }


def with_draft(model: GPT, text: list[int], draft: str) -> tuple[list[int], SpeculationStats]:
    reader, strategy = prompt_reader(model, text, "fp32"), Strategy("greedy")
    rng, written = np.random.default_rng(0), []
    if draft in LOOKUP_DRAFTERS:
        drafter = LOOKUP_DRAFTERS[draft]()
    else:
        layers = first_layers(model, max(1, model.cfg.num_layers // 4))
        drafter = model_drafter(layers, model, Reader(Memory(layers)), strategy, rng)
    steps = Speculation(reader, text, strategy, rng, drafter, MOST_GUESSES)
    for step in itertools.islice(steps, NEW_TOKENS):
        written.append(step.token)
    return written, steps.stats


# ==== SCORE =======================================================================================
def score(model: GPT, text: Text, tokens: np.ndarray, cfg: EvalConfig, rt: Runtime) -> np.ndarray:
    """Return the log-probability of each of tokens[1:], in sliding windows."""
    neural = Neural(model, cfg, rt)
    columns = columns_in_memory(len(tokens) - 1, {"logp": "f8"})
    neural.fill(tokens, columns)
    return columns["logp"]


# ==== CACHE =======================================================================================
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
        analytic = length * bytes_per_token(model, storage)
        points.append({"tokens": length, "measured": memory.stored_bytes, "analytic": analytic})
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
