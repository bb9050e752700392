"""Honest logs of one run in each dialect: what a training with these facts would print.

Each number is written once, in RunFacts, and everything else follows from it. So a log, a
submission.json and a README of the same facts agree.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import NamedTuple

RULE = "=" * 100
SOURCE = '''"""Trains a language model."""
import os

def main():
    seed = int(os.environ.get("SEED", 1337))
    print(f"seed:{seed}")
    print(f"step:1/2 train_loss:{1.0:.4f} train_time:{10:.0f}ms step_avg:{5:.2f}ms")
    print("final_int8_zlib_roundtrip_exact val_loss:0.50000000 val_bpb:0.30000000")

if __name__ == "__main__":
    main()
'''


class RunFacts(NamedTuple):
    seed: int = 1337
    source: str = SOURCE  # "" leaves the code out, as many logs do
    code_bytes: int | None = None  # as logged; None: of `source`
    artifact_bytes: int = 15_400_000
    loss: float = 1.9005  # of the artifact, windows side by side
    final_loss: float = 1.88  # of what is claimed; baseline() has `loss` only
    step: int = 6700  # the last
    steps: int = 20_000  # planned
    train_seconds: float = 586.1
    gptq_seconds: float = 6.8
    reserved_seconds: float = 14.0
    eval_seconds: float = 84.7  # all that counts
    tokens: int = 62_021_632  # scored in validation, and their bytes: the SP1024 split's
    bytes: int = 151_080_891
    vocab_size: int = 1024
    shards: int = 80
    world_size: int = 8
    gpu: str = "NVIDIA H100 80GB HBM3"
    dataset: str = "fineweb10B_sp1024"
    parameters: int = 27_038_812
    train_batch_tokens: int = 524_288
    max_wallclock_seconds: float = 600.0
    artifact_sha256: str = "a" * 64  # these three: in our own logs
    data_sha256: str = "d" * 64
    val_sha256: str = "b" * 64

    def bpb_of(self, loss: float) -> float:
        return loss / math.log(2) * self.tokens / self.bytes

    @property
    def bpb(self) -> float:
        return self.bpb_of(self.loss)

    @property
    def final_bpb(self) -> float:
        return self.bpb_of(self.final_loss)

    @property
    def code(self) -> int:
        return len(self.source.encode()) if self.code_bytes is None else self.code_bytes

    @property
    def total_bytes(self) -> int:
        return self.artifact_bytes + self.code


def curve(facts: RunFacts) -> list[tuple[int, float, float]]:
    """Return (step, loss, seconds) of the lines about training: from ln V down to near the final
    loss.
    """
    at = sorted({1, min(2, facts.step), *range(500, facts.step, 500), facts.step})
    top, end, rate = math.log(facts.vocab_size), facts.loss, facts.train_seconds / facts.step
    return [(s, end + (top - end) * math.exp(-4 * (s - 1) / facts.step), rate * s) for s in at]


def scored(label: str, facts: RunFacts, loss: float, seconds: float, extra: str = "") -> list[str]:
    """Return the two lines of a score."""
    bpb = facts.bpb_of(loss)
    return [
        f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f}{extra} eval_time:{1000 * seconds:.0f}ms",
        f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}",
    ]


def machine(facts: RunFacts) -> list[str]:
    """Return the lines about versions and GPUs."""
    cards = [
        f"|   {i}  {facts.gpu}          On  |   00000000:{i:02X}:00.0 Off |                    0 |"
        for i in range(facts.world_size)
    ]
    return [
        RULE,
        "Running Python 3.12.3 (main, Feb  4 2025, 14:48:35) [GCC 13.3.0]",
        "Running PyTorch 2.9.1+cu128",
        "+" + "-" * 89 + "+",
        *cards,
        "+" + "-" * 89 + "+",
        "",
        RULE,
    ]


def header(facts: RunFacts) -> list[str]:
    return [
        "val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=./data/tokenizers/bpe.model",
        f"train_loader:dataset:{facts.dataset} train_shards:{facts.shards}",
        f"val_loader:shards pattern=./data/datasets/{facts.dataset}/fineweb_val_*.bin "
        f"tokens:{facts.tokens}",
        f"model_params:{facts.parameters}",
        f"world_size:{facts.world_size} grad_accum_steps:{8 // facts.world_size}",
        "sdp_backends:cudnn=False flash=True mem_efficient=False math=False",
        "attention_mode:gqa num_heads:8 num_kv_heads:4",
        "tie_embeddings:True embed_lr:0.05 head_lr:0.0 matrix_lr:0.04 scalar_lr:0.04",
        f"train_batch_tokens:{facts.train_batch_tokens} train_seq_len:1024 "
        f"iterations:{facts.steps} warmup_steps:2 "
        f"max_wallclock_seconds:{facts.max_wallclock_seconds:.3f}",
        f"seed:{facts.seed}",
    ]


def steps(facts: RunFacts) -> list[str]:
    lines = ["warmup_step:1/2", "warmup_step:2/2"]
    for step, loss, seconds in curve(facts):
        timed = f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / step:.2f}ms"
        lines.append(f"step:{step}/{facts.steps} train_loss:{loss:.4f} {timed}")
    lines.append(
        f"step:{facts.step}/{facts.steps} val_loss:{facts.loss:.4f} val_bpb:{facts.bpb:.4f} {timed}"
    )
    if facts.step < facts.steps:
        lines.append(
            f"stopping_early: wallclock_cap train_time:{1000 * facts.train_seconds:.0f}ms "
            f"step:{facts.step}/{facts.steps}"
        )
    return lines


def sizes(facts: RunFacts, label: str) -> list[str]:
    raw = 4 * facts.parameters
    return [
        f"Serialized model: {raw} bytes",
        f"Code size: {facts.code} bytes",
        f"Total submission size: {raw + facts.code} bytes",
        f"Serialized model {label}: {facts.artifact_bytes} bytes (payload:{raw // 4} "
        f"raw_torch:{raw // 4 + 45000})",
        f"Total submission size {label}: {facts.total_bytes} bytes",
    ]


def text_of(facts: RunFacts, lines: list[str]) -> str:
    return (f"{facts.source}\n" if facts.source else "") + "\n".join(lines) + "\n"


def baseline(facts: RunFacts) -> str:
    """Return a log of the challenge's first trainer; it claims the artifact's score, `loss`."""
    return text_of(
        facts,
        [
            *(machine(facts) if facts.source else []),
            *header(facts),
            *steps(facts),
            "peak memory allocated: 10184 MiB reserved: 10200 MiB",
            *sizes(facts, "int8+zlib"),
            *scored("final_int8_zlib_roundtrip", facts, facts.loss, facts.eval_seconds),
        ],
    )


def march(facts: RunFacts) -> str:
    """Return a log with GPTQ in reserved training time, averaged weights, and a sliding-window
    claim.
    """
    lines = [
        *(machine(facts) if facts.source else []),
        *header(facts),
        f"gptq:reserving {1000 * facts.reserved_seconds:.0f}ms from training budget, "
        f"effective={1000 * (facts.max_wallclock_seconds - facts.reserved_seconds):.0f}ms",
        *steps(facts),
        "peak memory allocated: 22846 MiB reserved: 22894 MiB",
        "ema:applying EMA weights",
        f"DIAGNOSTIC post_ema val_loss:{facts.loss:.4f} val_bpb:{facts.bpb:.4f} eval_time:2074ms",
        "gptq:calibrating with 64 batches (training data)...",
        f"gptq:calibrated 66 layers in {facts.gptq_seconds:.1f}s",
        *sizes(facts, "int6+lzma"),
        *scored("final_int6_roundtrip", facts, facts.loss, 6.4),
        *scored(
            "final_int6_sliding_window",
            facts,
            facts.final_loss,
            facts.eval_seconds - 6.4,
            " stride:64",
        ),
    ]
    return text_of(facts, lines)


def april(facts: RunFacts) -> str:
    """Return a log with settings in a block, minutes of training time, and a claim of test-time
    training.
    """
    settings = dict(
        compressor="brotli",
        distributed=True,
        gptq_reserve_seconds=facts.reserved_seconds,
        iterations=facts.steps,
        max_wallclock_seconds=facts.max_wallclock_seconds,
        rank=0,
        seed=facts.seed,
        train_batch_tokens=facts.train_batch_tokens,
        train_seq_len=2048,
        ttt_enabled=True,
        vocab_size=facts.vocab_size,
        world_size=facts.world_size,
    )
    lines = [RULE, "Hyperparameters:", *(f"  {name}: {value}" for name, value in settings.items())]
    if facts.source:
        lines += [RULE, "Source code:", RULE, facts.source, *machine(facts)]
    lines += [
        f"train_shards: {facts.shards}",
        f"val_tokens: {facts.tokens}",
        f"model_params:{facts.parameters}",
        f"gptq:reserving {facts.reserved_seconds:.0f}s, "
        f"effective={1000 * (facts.max_wallclock_seconds - facts.reserved_seconds):.0f}ms",
        "warmup_step: 1/20",
        "warmup_step: 20/20",
    ]
    for step, loss, seconds in curve(facts):
        rate = facts.train_batch_tokens * step / seconds
        lines.append(
            f"{step}/{facts.steps} train_loss: {loss:.4f} train_time: {seconds / 60:.1f}m tok/s: "
            f"{rate:.0f}"
        )
    code, ttt = facts.code, facts.eval_seconds - 25.5
    lines += [
        f"{facts.step}/{facts.steps} val_loss: {facts.loss:.4f} val_bpb: {facts.bpb:.4f}",
        f"stopping_early: wallclock_cap train_time: {1000 * facts.train_seconds:.0f}ms "
        f"step: {facts.step}/{facts.steps}",
        "peak memory allocated: 39045 MiB reserved: 39124 MiB",
        f"diagnostic pre-quantization post-ema val_loss:{facts.loss:.8f} val_bpb:{facts.bpb:.8f} "
        "eval_time:7440ms",
        f"Serialized model: {4 * facts.parameters} bytes",
        f"Code size (uncompressed): {4 * code} bytes",
        f"Code size (compressed): {code} bytes",
        "GPTQ:collecting Hessians from calibration data...",
        f"GPTQ:collected 67 Hessians in {facts.gptq_seconds:.1f}s",
        f"Serialized model quantized+brotli: {facts.artifact_bytes} bytes",
        f"Total submission size quantized+brotli: {facts.total_bytes} bytes",
        f"quantized val_loss:{facts.loss:.8f} val_bpb:{facts.bpb:.8f} eval_time:25500ms",
        "ttt_lora:compile warmup done (137.6s)",
        f"quantized_ttt_phased val_loss:{facts.final_loss:.8f} val_bpb:{facts.final_bpb:.8f} "
        f"eval_time:{1000 * ttt:.0f}ms",
        f"total_eval_time:{ttt:.1f}s",
    ]
    return "\n".join(lines) + "\n"


def ours(facts: RunFacts) -> str:
    """Return our training log; it claims the artifact's score `loss`, and `our_eval` claims
    `final_loss`.
    """
    settings = dict(
        data_path="data",
        out_dir=".",
        run_id="cpu",
        seed=facts.seed,
        iterations=facts.steps,
        max_wallclock_seconds=facts.max_wallclock_seconds,
        train_batch_tokens=facts.train_batch_tokens,
        train_seq_len=1024,
        vocab_size=facts.vocab_size,
        gptq=False,
        codec="auto",
    )
    texts = dict(code=facts.source, settings=json.dumps(settings, sort_keys=True), tokenizer="")
    hashes = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    head = header(facts)
    head[1] += " tokens:3980238"
    head[2] += f" bytes:{facts.bytes}"
    model = [
        f"Serialized model: {4 * facts.parameters} bytes",
        f"Code size: {facts.code} bytes",
        f"codec:brotli bytes:{facts.artifact_bytes}",
        f"Serialized model int6+brotli: {facts.artifact_bytes} bytes (k:2.500 ratio:5.48x)",
        f"Total submission size int6+brotli: {facts.total_bytes} bytes (budget:16000000 "
        f"left:{16_000_000 - facts.total_bytes})",
    ]
    return text_of(
        facts,
        [
            *machine(facts),
            f"settings: {json.dumps(settings)}",
            "run_id:cpu preset:cpu device:cpu x86_64 torch:2.13.0+cpu",
            " ".join(
                f"{name}_sha256:{value}"
                for name, value in {**hashes, "data": facts.data_sha256}.items()
            ),
            *head,
            "size:predicted before training k:2.500 artifact:754514 bytes target:15880454",
            *steps(facts),
            "averages:last:3.2833 swa:3.2871 kept:last",
            *model,
            *scored("final_int6_brotli_roundtrip", facts, facts.loss, facts.eval_seconds),
        ],
    )


def our_eval(facts: RunFacts) -> str:
    """Return our logs/eval.txt: the ladder from the artifact's score to `final_loss`."""
    loss, bpb, final, gain = facts.loss, facts.bpb, facts.final_bpb, facts.bpb - facts.final_bpb
    return (
        "\n".join(
            [
                f"artifact:final_model.int6.ptz bytes:{facts.artifact_bytes} "
                f"sha256:{facts.artifact_sha256}",
                f"val_loader:shards pattern=data/fineweb_val_*.bin tokens:{facts.tokens} "
                f"bytes:{facts.bytes} sha256:{facts.val_sha256}",
                *scored("final_int6_roundtrip", facts, loss, 0.4),
                *scored("final", facts, facts.final_loss, 0.6),
                f"ablation:+ ngram              val_bpb:{bpb - gain / 2:.8f} gain:{gain / 2:+.8f}",
                f"ladder:neural, windows side by side     val_bpb:{bpb:.8f} gain:{0:+.8f} "
                "seconds:0.4",
                f"ladder:+ experts, mixed: final          val_bpb:{final:.8f} gain:{gain:+.8f} "
                "seconds:0.6",
                "stages:load:1.1s blocks:0.4s mixture:0.6s "
                f"total_eval_time:{1000 * facts.eval_seconds:.0f}ms",
                f"Total submission size: {facts.total_bytes} bytes "
                f"(artifact:{facts.artifact_bytes} code:{facts.code} in 28 files, budget:16000000)",
                f"val_bpb:{final:.8f} val_loss:{facts.final_loss:.8f}",
            ]
        )
        + "\n"
    )
