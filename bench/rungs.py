"""The shapes, rungs and variants of the ladder (bench/ladder.py), as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import train_gpt
from fairway.command_line import did_you_mean
from train_gpt import Config, UserError

Settings = dict[str, str]


# ==== SHAPES ======================================================================================
# Settings that belong to size, batch and length of a run. They are the same in all variants; their
# values are those of the presets. Muon's momentum is one of them: its values depend on the number
# of steps, and PRESET=cpu replaces those of the presets that it starts from.
SHAPE_NAMES = """
NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS TRAIN_SEQ_LEN TRAIN_BATCH_TOKENS VAL_BATCH_SIZE
HOLDOUT_TOKENS COMPILE WARMUP_STEPS VAL_LOSS_EVERY TRAIN_LOG_EVERY CHECKPOINT_SECONDS SWA_EVERY
EMBED_TOKENIZER MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS BIGRAM_DIM
""".split()


def words(text: str) -> Settings:
    """Return the settings that a line names, as `A=1 B=2`."""
    return dict(word.split("=", 1) for word in text.split())


class Shape(NamedTuple):
    """The size of a model and the length of its steps."""

    preset: str  # whose values the settings of SHAPE_NAMES take
    own: str  # values that differ from the preset's
    scaled: str  # values of rungs that the presets chose for eleven layers of width 512

    def settings(self) -> Settings:
        values = train_gpt.PRESETS[self.preset]
        names = [name for name in SHAPE_NAMES if name.lower() in values]
        return {name: as_text(values[name.lower()]) for name in names} | words(self.own)


def as_text(value: Any) -> str:
    """Return the value of a setting as the environment holds it."""
    return str(int(value) if isinstance(value, bool) else value)


# Of eleven layers, frontier runs 3 to 5 three times and has two lanes from 8 on; of a head's 64
# channels, 16 rotate. The values keep these proportions. cpu4 has 4.1 times the weights of cpu, and
# holds out fewer tokens: the choices at the end of frontier would take 40 s of its clock.
SHAPES = {
    "cpu": Shape(
        "cpu",
        "",
        "XSA_LAST_N=4 ROPE_DIMS=8 PARALLEL_START_LAYER=3 LOOP_START=1 LOOP_END=1",
    ),
    "cpu4": Shape(
        "cpu",
        "NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=8 NUM_KV_HEADS=4 HOLDOUT_TOKENS=8192",
        "XSA_LAST_N=6 ROPE_DIMS=8 PARALLEL_START_LAYER=4 LOOP_START=2 LOOP_END=3",
    ),
    "smoke": Shape(
        "smoke",
        "",
        "BIGRAM_VOCAB_SIZE=64 XSA_LAST_N=2 ROPE_DIMS=4 PARALLEL_START_LAYER=1 "
        "LOOP_START=1 LOOP_END=1",
    ),
}


# ==== RUNGS =======================================================================================
class Rung(NamedTuple):
    """One technique: the settings that turn it on, with the values of its preset."""

    name: str
    settings: str
    about: str


# `swa` completes consensus, and `gptq` completes frontier: the ladder names these two rungs so. SWA
# starts as late as in PRESET=cpu.
CONSENSUS = [
    Rung("int6", "ATTN_BITS=6 MLP_BITS=6", "6 bits for matrices of attention and MLP, not 8"),
    Rung("mlp3", "MLP_MULT=3", "MLP of three model widths, not two"),
    Rung("rates", "MATRIX_LR=0.025 SCALAR_LR=0.025 TIED_EMBED_LR=0.035", "lower learning rates"),
    Rung("warmdown", "WARMDOWN_FRAC=0.4", "the rate falls for 40 % of the run, not for 9 %"),
    Rung("decay", "MUON_WD=0.04 ADAM_WD=0.04 EMBED_WD=0.04", "weight decay"),
    Rung("clip", "GRAD_CLIP_NORM=0.3", "clipped gradients"),
    Rung("ortho", "ORTHO_INIT=1", "orthogonal initial matrices"),
    Rung("smear", "SMEAR_GATE=1", "SmearGate: mix in the embedding before"),
    Rung("bigram", "BIGRAM_VOCAB_SIZE=2048", "BigramHash: a table of hashed token pairs"),
    Rung("qat", "QAT_START_FRAC=0.5", "rounded weights in the second half of training"),
    Rung("swa", "SWA_START_FRAC=0.9", "late weights averaged"),
]
FRONTIER = [
    Rung("leaky", "LEAKY_SLOPE=0.5", "squared LeakyReLU, not squared ReLU"),
    Rung("xsa", "XSA_LAST_N=11", "exclusive attention in all layers"),
    Rung("ln_scale", "LN_SCALE=1", "inputs of layer i scaled by 1/sqrt(i+1)"),
    Rung("rope", "ROPE_DIMS=16", "a quarter of a head's channels rotate"),
    Rung("qk_gain", "QK_GAIN_INIT=5", "initial gain of queries 5, not 1.5"),
    Rung("attn_gate", "ATTN_GATE=1", "a gate for each head"),
    Rung("lanes", "PARALLEL_START_LAYER=8", "two lanes in the last layers"),
    Rung("loops", "LOOP_START=3 LOOP_END=5 NUM_LOOPS=2", "depth recurrence"),
    Rung("row_norm", "MUON_ROW_NORMALIZE=1", "equal rows before Newton-Schulz"),
    Rung("polar", "MUON_POLAR_EXPRESS=1", "Polar Express polynomials"),
    Rung(
        "late_rates",
        "MATRIX_LR=0.026 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 BETA2=0.99",
        "learning rates and beta2 of frontier",
    ),
    Rung("late_decay", "MUON_WD=0.09 EMBED_WD=0.085 ADAM_WD=0.02", "weight decay of frontier"),
    Rung("schedule", "WARMDOWN_FRAC=0.75 MIN_LR=0.1", "the rate falls for 75 %, down to a tenth"),
    Rung("ema", "EMA_DECAY=0.9965 SWA_START_FRAC=1", "moving average in place of SWA"),
    Rung("gptq", "GPTQ=1 QAT_START_FRAC=1", "GPTQ in place of QAT"),
]
RUNGS = CONSENSUS + FRONTIER
BASELINE, MIDDLE, TOP = "baseline", "consensus", "frontier"
ENDS = [BASELINE, MIDDLE, TOP]
WITHOUT = "without-"


class Variant(NamedTuple):
    """A model of the ladder, and the one that it is compared with."""

    name: str
    label: str  # in the table
    settings: Settings  # all that the shape does not set
    below: str  # name of the variant that it is compared with, "" for none
    about: str


def rung_settings(shape: Shape, rung: Rung) -> Settings:
    """Return what a rung turns on, with the shape's values where it scales them."""
    own, scaled = words(rung.settings), words(shape.scaled)
    return {name: scaled.get(name, value) for name, value in own.items()}


def joined(shape: Shape, rungs: Iterable[Rung]) -> Settings:
    """Return the settings of several rungs, the later over the earlier."""
    return {n: v for rung in rungs for n, v in rung_settings(shape, rung).items()}


def cumulative(shape: Shape) -> list[Variant]:
    """Return the ladder from bottom to top; the last rungs of two presets bear the presets' names.

    The one above `int6` is named `mlp3` and has the settings of both.
    """
    variants = [Variant(BASELINE, BASELINE, {}, "", "the challenge's starter settings")]
    for at, rung in enumerate(RUNGS, 1):
        names = {CONSENSUS[-1].name: MIDDLE, FRONTIER[-1].name: TOP}
        name = names.get(rung.name, rung.name)
        label = f"+ {rung.name}" + (f" = {name}" if name != rung.name else "")
        below = variants[-1].name
        variants.append(Variant(name, label, joined(shape, RUNGS[:at]), below, rung.about))
    return variants


def leave_one_out(shape: Shape) -> list[Variant]:
    """Return the top without each rung; leave away those whose settings later rungs replace."""
    top, variants = joined(shape, RUNGS), []
    for rung in RUNGS:
        settings = joined(shape, [r for r in RUNGS if r is not rung])
        if settings != top:
            name = WITHOUT + rung.name
            variants.append(Variant(name, f"− {rung.name}", settings, TOP, rung.about))
    return variants


def variants_of(shape: Shape) -> dict[str, Variant]:
    return {v.name: v for v in [*cumulative(shape), *leave_one_out(shape)]}


def chosen_variants(text: str, shape: Shape) -> list[Variant]:
    """Return the variants that --variants names, each once."""
    known = variants_of(shape)
    groups = {
        "ladder": [v.name for v in cumulative(shape)],
        "leave-one-out": [TOP, *(v.name for v in leave_one_out(shape))],
        "ends": ENDS,
    }
    names = []
    for word in filter(None, map(str.strip, text.split(","))):
        if word not in known and word not in groups:
            hint = did_you_mean(word, [*groups, *known])
            raise UserError(f"--variants names {word!r}, which is no variant{hint}; see --list")
        names += groups.get(word, [word])
    if not names:
        raise UserError("--variants names no variant; take ends, ladder, or names of --list")
    return [known[name] for name in dict.fromkeys(names)]


def starter_value(name: str) -> str:
    return as_text(getattr(Config(), name.lower()))


def print_variants(shape: str) -> None:
    """Print each variant, the settings that it changes, and what they are."""
    for variant in variants_of(SHAPES[shape]).values():
        below = variants_of(SHAPES[shape]).get(variant.below)
        before = below.settings if below else {}
        names = dict.fromkeys([*variant.settings, *before])
        changed = [n for n in names if variant.settings.get(n) != before.get(n)]
        text = " ".join(f"{n}={variant.settings.get(n, starter_value(n))}" for n in changed)
        print(f"{variant.name:20} {variant.about}\n{'':20} {text}".rstrip())
    print(f"\nshape {shape}: {' '.join(f'{n}={v}' for n, v in SHAPES[shape].settings().items())}")
