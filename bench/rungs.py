"""The shapes, rungs and variants of the ladder (bench/ladder.py), as data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from trials import TRIALS

import train_gpt
from fairway.command_line import did_you_mean
from train_gpt import Config, UserError

Settings = dict[str, str]


# ==== SHAPES ======================================================================================
# Settings that belong to size, batch and length of a run. They are the same in all variants; their
# values are those of the presets. Muon's momentum is one of them: its values depend on the number
# of steps, and PRESET=cpu replaces those of the preset that it starts from.
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
    top: str  # rungs of FRONTIER and SHORT that pay at this size, so that its `frontier` has them
    scaled: dict[str, str]  # settings of rungs where the presets' are for eleven layers of 512

    def settings(self) -> Settings:
        values = train_gpt.PRESETS[self.preset]
        names = [name for name in SHAPE_NAMES if name.lower() in values]
        return {name: as_text(values[name.lower()]) for name in names} | words(self.own)


def as_text(value: Any) -> str:
    """Return the value of a setting as the environment holds it."""
    return str(int(value) if isinstance(value, bool) else value)


def in_proportion(xsa: int, rope: int, lanes: int, loops: tuple[int, int]) -> dict[str, str]:
    """Return the settings of the rungs whose values follow the number of layers and the width."""
    return {
        "xsa": f"XSA_LAST_N={xsa}",
        "rope": f"ROPE_DIMS={rope}",
        "lanes": f"PARALLEL_START_LAYER={lanes}",
        "loops": f"LOOP_START={loops[0]} LOOP_END={loops[1]}",
    }


# Of eleven layers, the preset frontier runs 3 to 5 three times and has two lanes from 8 on; of a
# head's 64 channels, 16 rotate. The values keep these proportions. cpu4 has 4.1 times the weights
# of cpu. The tokenizer is not in the artifact, as in the challenge.
PAYS = (
    "xsa attn_gate skip_gates row_norm polar case slow mlp2 late_qat last ns4 sampled plain_start"
)
SHAPES = {
    "cpu": Shape(
        "cpu",
        "EMBED_TOKENIZER=0 SWA_EVERY=10",
        PAYS,
        in_proportion(xsa=4, rope=8, lanes=3, loops=(1, 1)),
    ),
    "cpu4": Shape(
        "cpu",
        "EMBED_TOKENIZER=0 SWA_EVERY=10 NUM_LAYERS=6 MODEL_DIM=256 NUM_HEADS=8 NUM_KV_HEADS=4 "
        "HOLDOUT_TOKENS=8192",
        PAYS,
        in_proportion(xsa=6, rope=8, lanes=4, loops=(2, 3)),
    ),
    "smoke": Shape(
        "smoke",
        "EMBED_TOKENIZER=0 SWA_EVERY=10 BIGRAM_DIM=32",
        PAYS,
        {
            "bigram": "BIGRAM_VOCAB_SIZE=64",
            **in_proportion(xsa=2, rope=4, lanes=1, loops=(1, 1)),
        },
    ),
}


# ==== RUNGS =======================================================================================
class Rung(NamedTuple):
    """One technique: the settings that turn it on, with the values of its preset."""

    name: str
    settings: str
    about: str
    case: bool = False  # the text is in tokens with case markers


# `swa` completes consensus; it starts later than in the preset, as runs are short. FRONTIER is the
# preset, for runs of thousands of steps; SHORT is for runs of hundreds. A shape has those of their
# rungs that pay at its size, and any other can be tried on top of them.
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
    Rung("mlp4", "MLP_MULT=4", "MLP of four model widths, not three"),
    Rung("leaky", "LEAKY_SLOPE=0.5", "squared LeakyReLU, not squared ReLU"),
    Rung("xsa", "XSA_LAST_N=11", "exclusive attention in all layers"),
    Rung("ln_scale", "LN_SCALE=1", "inputs of layer i scaled by 1/sqrt(i+1)"),
    Rung("rope", "ROPE_DIMS=16", "a quarter of a head's channels rotate"),
    Rung("qk_gain", "QK_GAIN_INIT=5", "initial gain of queries 5, not 1.5"),
    Rung("attn_gate", "ATTN_GATE=1", "a gate for each head"),
    Rung("skip_gates", "SKIP_GATES=1", "skips mixed in by sigmoids, not added"),
    Rung("lanes", "PARALLEL_START_LAYER=8", "two lanes in the last layers"),
    Rung("loops", "LOOP_START=3 LOOP_END=5 NUM_LOOPS=2", "depth recurrence"),
    Rung("row_norm", "MUON_ROW_NORMALIZE=1", "equal rows before Newton-Schulz"),
    Rung("polar", "MUON_POLAR_EXPRESS=1", "Polar Express polynomials"),
    Rung("late_rates", "MATRIX_LR=0.026 SCALAR_LR=0.02 TIED_EMBED_LR=0.03", "other learning rates"),
    Rung("beta2", "BETA2=0.99", "a longer memory of AdamW"),
    Rung("late_decay", "MUON_WD=0.095 EMBED_WD=0.085 ADAM_WD=0.02", "weight decay of frontier"),
    Rung("schedule", "WARMDOWN_FRAC=0.85 MIN_LR=0.1", "the rate falls for 85 %, to a tenth"),
    Rung("ema", "EMA_DECAY=0.9975 SWA_START_FRAC=1", "moving average in place of SWA"),
    Rung("gptq", "GPTQ=1 QAT_START_FRAC=1", "GPTQ in place of QAT"),
]
SHORT = [
    Rung(
        "case",
        "BIGRAM_VOCAB_SIZE=0 EMBED_BITS=6",
        "more pieces, with case markers; no BigramHash",
        case=True,
    ),
    Rung("slow", "MATRIX_LR=0.013 SCALAR_LR=0.02 TIED_EMBED_LR=0.02", "half the learning rates"),
    Rung("mlp2", "MLP_MULT=2", "MLP of two model widths, for more steps"),
    Rung("late_qat", "QAT_START_FRAC=0.85", "rounded weights in the last 15 % of training"),
    Rung("last", "SWA_START_FRAC=1", "no averages, and no time to choose between them"),
    Rung("ns4", "MUON_BACKEND_STEPS=4", "four iterations of Newton-Schulz, not five"),
    Rung("sampled", "SAMPLED_FRAC=0.85", "a loss over few pieces, until 85 % of the run"),
    Rung("plain_start", "ORTHO_INIT=0", "initial matrices that are not orthogonal"),
]
# What is no part of the trainer: patches of bench/trials.py, which the ladder applies by name.
MORE_OF_TRIALS = {
    "tail_ema": "EMA_DECAY=0.99",
    "signs": "BIGRAM_VOCAB_SIZE=2048",
    "learned_xsa": "XSA_LAST_N=0",
    "half_gate": "ATTN_GATE=0",
}
TRIED = [
    Rung(name, f"TRIAL={name} {MORE_OF_TRIALS.get(name, '')}", str(trial.__doc__))
    for name, trial in TRIALS.items()
]
TRIED.append(Rung("pairs", "BIGRAM_VOCAB_SIZE=2048", "BigramHash beside more pieces"))
LATER = FRONTIER + SHORT + TRIED
BASELINE, MIDDLE, TOP = "baseline", "consensus", "frontier"
ENDS = [BASELINE, MIDDLE, TOP]
WITHOUT, WITH = "without-", "with-"


class Variant(NamedTuple):
    """A model of the ladder, and the one that it is compared with."""

    name: str
    label: str  # in the table
    settings: Settings  # all that the shape does not set
    below: str  # name of the variant that it is compared with, "" for none
    about: str
    case: bool  # trained on --case-data


def rung_settings(shape: Shape, rung: Rung) -> Settings:
    """Return what a rung turns on, with the shape's values where it scales them."""
    return words(rung.settings) | words(shape.scaled.get(rung.name, ""))


def rungs_of(shape: Shape) -> list[Rung]:
    """Return the rungs of a shape, from the bottom to its `frontier`."""
    return CONSENSUS + [rung for rung in LATER if rung.name in shape.top.split()]


def joined(shape: Shape, rungs: Iterable[Rung]) -> Settings:
    """Return the settings of several rungs, the later over the earlier."""
    return {n: v for rung in rungs for n, v in rung_settings(shape, rung).items()}


def with_case(rungs: Iterable[Rung]) -> bool:
    """Return whether one of the rungs trains on text with case markers."""
    return any(rung.case for rung in rungs)


def cumulative(shape: Shape) -> list[Variant]:
    """Return the ladder from bottom to top: the one above `int6` is `mlp3`, with both settings.

    The last rung of CONSENSUS and the last of all are named `consensus` and `frontier`.
    """
    rungs = rungs_of(shape)
    variants = [Variant(BASELINE, BASELINE, {}, "", "the challenge's starter settings", False)]
    for at, rung in enumerate(rungs, 1):
        names = {CONSENSUS[-1].name: MIDDLE, rungs[-1].name: TOP}
        name = names.get(rung.name, rung.name)
        label = f"+ {rung.name}" + (f" = {name}" if name != rung.name else "")
        below = variants[-1].name
        settings, case = joined(shape, rungs[:at]), with_case(rungs[:at])
        variants.append(Variant(name, label, settings, below, rung.about, case))
    return variants


def leave_one_out(shape: Shape) -> list[Variant]:
    """Return the top without each rung; leave away those whose settings later rungs replace."""
    rungs, variants = rungs_of(shape), []
    top = joined(shape, rungs)
    for rung in rungs:
        others = [r for r in rungs if r is not rung]
        settings, case = joined(shape, others), with_case(others)
        if settings != top or rung.case:
            name, label = WITHOUT + rung.name, f"− {rung.name}"
            variants.append(Variant(name, label, settings, TOP, rung.about, case))
    return variants


def one_more(shape: Shape) -> list[Variant]:
    """Return the top with each rung of LATER that it lacks."""
    rungs = rungs_of(shape)
    return [
        Variant(
            WITH + rung.name,
            f"+ {rung.name}",
            joined(shape, [*rungs, rung]),
            TOP,
            rung.about,
            with_case([*rungs, rung]),
        )
        for rung in LATER
        if rung not in rungs
    ]


def variants_of(shape: Shape) -> dict[str, Variant]:
    every = [*cumulative(shape), *leave_one_out(shape), *one_more(shape)]
    return {v.name: v for v in every}


def chosen_variants(text: str, shape: Shape) -> list[Variant]:
    """Return the variants that --variants names, each once."""
    known = variants_of(shape)
    groups = {
        "ladder": [v.name for v in cumulative(shape)],
        "leave-one-out": [TOP, *(v.name for v in leave_one_out(shape))],
        "one-more": [TOP, *(v.name for v in one_more(shape))],
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
    return as_text(getattr(Config(), name.lower(), ""))  # TRIAL is none of the trainer


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
