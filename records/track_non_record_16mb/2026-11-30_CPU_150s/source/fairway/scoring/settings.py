"""Settings of an evaluation: upper-case names in the environment, as for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from train_gpt import UserError, check_value, knob, parse_value, refuse_near_misses

LEAST_CERTIFIED_TOKENS = 128  # a shorter text cannot be certified; known before it is scored


@dataclass(frozen=True)
class EvalConfig:
    """Every setting with its default.

    Roles: place (where files lie), runtime (device, batches), neural (what a prediction reads),
    experts, mixture, ttt (test-time training), correction, certificate, size.
    """

    # What is scored, and where results go
    checkpoint: str = knob("final_model.int6.ptz", "the artifact", role="place")
    val_files: str = knob(
        "", "pattern of the shards to score; unset: *_val_*.bin of DATA_PATH", role="place"
    )
    data_path: str = knob(
        "",
        "folder of shards; unset: FineWeb if it was downloaded, else embedded corpus",
        role="place",
    )
    tokenizer_path: str = knob(
        "", "SentencePiece model; unset: the one inside the artifact", role="place"
    )
    out_dir: str = knob(
        ".", "where eval/ (columns, score.json, certificate.json) is written", role="place"
    )
    device: str = knob("", "unset: the fastest one found", choices=" cpu cuda mps", role="runtime")
    # Neural scoring
    eval_mode: str = knob(
        "sliding",
        "sliding: windows from scratch; cached: keys and values of earlier pieces are reused",
        choices="sliding cached",
        role="neural",
    )
    eval_seq_len: int = knob(
        0,
        "tokens of context for a prediction; 0 = the model's TRAIN_SEQ_LEN",
        0,
        65_536,
        role="neural",
    )
    eval_stride: int = knob(64, "tokens between sliding windows", 1, 65_536, role="neural")
    eval_documents: bool = knob(False, "no window crosses a BOS", role="neural")
    ntk_rope: bool = knob(
        True, "slow RoPE down when EVAL_SEQ_LEN is longer than in training", role="neural"
    )
    eval_compile: str = knob(
        "auto",
        "torch.compile of the pass over windows; auto: on CUDA. It rounds in another way",
        choices="auto on off",
        role="runtime",
    )
    eval_batch_tokens: int = knob(
        0, "most tokens of a forward pass; 0 = 8192 on a CPU, else 65536", 0, role="runtime"
    )
    # Experts
    ngram_orders: int = knob(6, "longest n-gram that is counted", 1, 16, role="experts")
    ngram_memory_mb: int = knob(
        2304, "most memory of the n-gram counts", 1, 1 << 20, role="experts"
    )
    match_least: int = knob(8, "tokens of the shortest match", 1, 64, role="experts")
    expert_reset: bool = knob(False, "experts forget at each BOS", role="experts")
    # Mixture
    mix_mode: str = knob(
        "linear",
        "linear: weighted mean of probabilities; log: the hint's logit is raised",
        choices="linear log",
        role="mixture",
    )
    mix_weights: str = knob(
        "sets",
        "how linear weights learn",
        choices="exponential em sets",
        role="mixture",
    )
    mix_lr: float = knob(
        1.0, "exponential weights: power of each expert's probability", 0, 100, role="mixture"
    )
    mix_floor: float = knob(
        0.01, "exponential weights: least weight, before renormalising", 0, 0.2, role="mixture"
    )
    mix_rate: float = knob(0.05, "em and sets: step size of the weights", 1e-4, 1, role="mixture")
    mix_neural: float = knob(
        0.5,
        "initial weight of the neural expert; the others share the rest",
        0.01,
        0.99,
        role="mixture",
    )
    mix_guard: float = knob(
        0.0001,
        "most bits a byte that mixing may lose to the neural score; 0 = no bound",
        0,
        10,
        role="mixture",
    )
    # Test-time training
    ttt: str = knob(
        "none",
        "chunks: all weights; lora: adapters for each document; phases: both; bias: of logits",
        choices="none chunks lora phases bias",
        role="ttt",
    )
    ttt_chunk: int = knob(
        0,
        "tokens scored, then learned; 0 = 16 windows (lora, phases: a quarter, bias: one)",
        0,
        1 << 24,
        role="ttt",
    )
    ttt_phase: int = knob(
        0,
        "phases: tokens until all weights learn; 0 = 16 windows for each document side by side",
        0,
        1 << 31,
        role="ttt",
    )
    ttt_lr: float = knob(
        0.0, "learning rate, of adapters in phases; 0 = default of TTT", 0, 1e3, role="ttt"
    )
    ttt_epochs: int = knob(1, "steps on each scored chunk; bias: always 1", 1, 100, role="ttt")
    ttt_rank: int = knob(32, "rank of the adapters", 1, 4096, role="ttt")
    ttt_seconds: float = knob(
        0.0,
        "seconds after which training stops, so that scores depend on the machine; 0 = never",
        0,
        role="ttt",
    )
    # Correction table and certificate
    use_correction: bool = knob(
        False,
        "also read or build a correction table: an oracle, never part of the score",
        role="correction",
    )
    correction_codec: str = knob(
        "modelled", "codec of the table", choices="varint rice modelled", role="correction"
    )
    correction_bytes: int = knob(
        -1,
        "its largest size; 0 = entries that save more than they cost; -1 = a byte per 25 tokens",
        -1,
        role="correction",
    )
    certify_seconds: float = knob(
        60.0, "time that --certify may take, approximately", 1, role="certificate"
    )
    extra_code_files: str = knob(
        "",
        "files to count as code in addition to the imported ones, separated by commas",
        role="size",
    )
    size_budget_bytes: int = knob(16_000_000, "most bytes of artifact and code", 1, role="size")

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        sliding = self.eval_mode == "sliding"
        if sliding and self.eval_seq_len and self.eval_stride > self.eval_seq_len:
            raise UserError(
                f"EVAL_STRIDE is {self.eval_stride}; it must be at most "
                f"EVAL_SEQ_LEN={self.eval_seq_len}"
            )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> EvalConfig:
        """Read the settings from an environment; a name close to a setting's is an error."""
        refuse_near_misses(env, cls)
        return cls(
            **{
                f.name: parse_value(f, env[f.name.upper()])
                for f in fields(cls)
                if f.name.upper() in env
            }
        )


def settings_help() -> str:
    """Return one line for each setting: name, default, meaning."""
    lines = []
    for f in fields(EvalConfig):
        default = int(f.default) if type(f.default) is bool else f.default
        lines.append(f"{f.name.upper():20} {default!s:>21}  {f.metadata['help']}")
    return "\n".join(lines)
