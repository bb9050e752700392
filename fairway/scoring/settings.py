"""Settings of an evaluation: upper-case names in the environment, as for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from train_gpt import check_value, knob, need, parse_value, refuse_near_misses


@dataclass(frozen=True)
class EvalConfig:
    # What is scored, and where results go
    checkpoint: str = knob("final_model.int6.ptz", "the artifact")
    val_files: str = knob("", "pattern of the shards to score; unset: *_val_*.bin of DATA_PATH")
    data_path: str = knob("", "folder of shards; unset: FineWeb if there, else embedded corpus")
    tokenizer_path: str = knob("", "SentencePiece model; unset: the one inside the artifact")
    out_dir: str = knob(".", "where eval/ (columns, score.json, certificate.json) is written")
    device: str = knob("", "unset: the best there is", choices=("", "cpu", "cuda", "mps"))
    wandb_mode: str = knob(
        "", "Weights & Biases, when asked for", choices=("", "online", "offline", "disabled")
    )
    # Neural scoring
    eval_mode: str = knob(
        "sliding",
        "sliding: windows anew; cached: each piece reads keys and values of those before",
        choices=("sliding", "cached"),
    )
    eval_seq_len: int = knob(
        0, "tokens that a prediction may look back on; 0 = the model's TRAIN_SEQ_LEN", 0, 65_536
    )
    eval_stride: int = knob(64, "tokens between sliding windows", 1, 65_536)
    eval_documents: bool = knob(False, "windows start anew at each BOS")
    ntk_rope: bool = knob(True, "slow RoPE down when EVAL_SEQ_LEN is longer than in training")
    eval_batch_tokens: int = knob(
        0, "tokens of a forward pass at most; 0 = 8192 on a CPU, else 65536", 0
    )
    # Experts
    ngram_orders: int = knob(6, "longest gram that is counted", 1, 16)
    ngram_memory_mb: int = knob(2304, "memory of the counts at most", 1, 1 << 20)
    match_least: int = knob(8, "tokens of the shortest match", 1, 64)
    expert_reset: bool = knob(False, "experts forget at each BOS")
    # Mixture
    mix_mode: str = knob(
        "linear",
        "pool of probabilities, or of their logarithms over the hints",
        choices=("linear", "log"),
    )
    mix_weights: str = knob(
        "sets", "how linear weights learn", choices=("exponential", "share", "em", "sets", "gate")
    )
    mix_lr: float = knob(1.0, "exponential weights: power of each expert's probability", 0, 100)
    mix_floor: float = knob(0.01, "exponential weights: least weight, before renormalising", 0, 0.2)
    mix_share: float = knob(0.1, "share: part of the weight dealt out anew at each token", 0, 1)
    mix_rate: float = knob(0.05, "em and sets: how fast weights move", 1e-4, 1)
    mix_neural: float = knob(
        0.5, "initial weight of the neural expert; the others share the rest", 0.01, 0.99
    )
    mix_guard: float = knob(
        0.0001, "bits a byte that mixing may ever cost over the neural score; 0 = no bound", 0, 10
    )
    # Test-time training
    ttt: str = knob(
        "none",
        "chunks: train on each chunk once scored; lora: adapters for each document; bias: a "
        "vocabulary bias",
        choices=("none", "chunks", "lora", "bias"),
    )
    ttt_chunk: int = knob(
        0, "tokens that are scored, then trained on; 0 = what suits TTT", 0, 1 << 24
    )
    ttt_lr: float = knob(0.0, "its learning rate; 0 = what suits TTT", 0, 1e3)
    ttt_epochs: int = knob(1, "chunks, lora: steps on a chunk that has been scored", 1, 100)
    ttt_rank: int = knob(32, "of the adapters", 1, 4096)
    ttt_seconds: float = knob(
        0.0, "no training after so long: scores then hang on the machine; 0 = no limit", 0
    )
    # Correction table and certificate
    use_correction: bool = knob(
        False, "also build, or read, a correction table: an oracle, apart from the score"
    )
    correction_codec: str = knob("modelled", "its coding", choices=("varint", "rice", "modelled"))
    correction_bytes: int = knob(
        -1,
        "its size at most; 0 = only entries that save more than they cost; -1 = a byte "
        "for each 25 tokens",
        -1,
    )
    certify_seconds: float = knob(60.0, "time that --certify may take, about", 1)
    extra_code_files: str = knob(
        "", "files counted as code beside those imported, separated by commas"
    )
    size_budget_bytes: int = knob(16_000_000, "artifact and code together", 1)

    def __post_init__(self):
        for f in fields(self):
            check_value(f, getattr(self, f.name))
        need(
            self.eval_mode == "cached"
            or not self.eval_seq_len
            or self.eval_stride <= self.eval_seq_len,
            f"EVAL_STRIDE is {self.eval_stride}; it must be at most EVAL_SEQ_LEN={self.eval_seq_len}",
        )

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> EvalConfig:
        refuse_near_misses(env, cls)
        return cls(
            **{
                f.name: parse_value(f, env[f.name.upper()])
                for f in fields(cls)
                if f.name.upper() in env
            }
        )


def settings_help() -> str:
    """A line for each setting: name, default, meaning."""
    shown = [
        (f, int(f.default) if type(f.default) is bool else f.default) for f in fields(EvalConfig)
    ]
    return "\n".join(
        f"{f.name.upper():20} {default!s:>21}  {f.metadata['help']}" for f, default in shown
    )
