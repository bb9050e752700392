"""All methods by name: one line each. `fairway compare --methods` takes these names."""

from __future__ import annotations

from fairway.methods.activations import Int8Activations
from fairway.methods.averaging import Averaged
from fairway.methods.awq import ActivationScaled
from fairway.methods.cache_types import CacheType
from fairway.methods.clipping import ClipSearch
from fairway.methods.coded import Coded
from fairway.methods.drafted import Drafted
from fairway.methods.floats import Clamped, FloatWeights
from fairway.methods.gptq import GPTQ
from fairway.methods.integers import Integers, OffsetIntegers
from fairway.methods.kernels import AttentionKernel
from fairway.methods.learned_rounding import LearnedRounding
from fairway.methods.lqer import LowRankRepair
from fairway.methods.method import Method
from fairway.methods.palettes import MixedPalettes, NormalFloat, Palette
from fairway.methods.pruning import Pruned, PrunedTuned, TwoOfFour
from fairway.methods.runtimes import Compile, OnnxRuntime
from fairway.methods.torchao_int8 import TorchaoInt8
from fairway.methods.training import Ternary, Tuned
from fairway.methods.vocabulary import SmallerVocabulary

METHODS: dict[str, Method] = {
    "fp32": FloatWeights("fp32"),
    "fp32-clamped": Clamped(),
    "bf16": FloatWeights("bf16"),
    "fp16": FloatWeights("fp16"),
    "int8": Integers(8),
    "int6": Integers(6),
    "int5": Integers(5),
    "int4": Integers(4),
    "int4-g32": Integers(4, 32),
    "int4-g64": Integers(4, 64),
    "int4-g128": Integers(4, 128),
    "int3": Integers(3),
    "int3-g32": Integers(3, 32),
    "int2-g32": Integers(2, 32),
    "int8-rms": Integers(8, k=4.4),
    "int6-rms": Integers(6, k=3.6),
    "int5-rms": Integers(5, k=2.9),
    "int4-rms": Integers(4, k=2.5),
    "int3-rms": Integers(3, k=2.0),
    "int2-rms": Integers(2, k=1.2),
    "int6-rms-k5": Integers(6, k=5.0),
    "int6-rms-k7": Integers(6, k=7.0),
    "int6-rms-k12": Integers(6, k=12.0),
    "int6-rms-k16": Integers(6, k=16.0),
    "int5-rms-k4": Integers(5, k=4.0),
    "int4-rms-k3": Integers(4, k=3.0),
    "int4-rms-k3.5": Integers(4, k=3.5),
    "int3-rms-k2.5": Integers(3, k=2.5),
    "int2-offset-g32": OffsetIntegers(2, 32),
    "nf4-g64": NormalFloat(64),
    "palette4": Palette(4),
    "palette3": Palette(3),
    "palette2": Palette(2),
    "palette-mixed3": MixedPalettes(3.0),
    "gptq5": GPTQ(5),
    "gptq4": GPTQ(4),
    "gptq4-g64": GPTQ(4, 64),
    "gptq4-sampled": GPTQ(4, source="sampled"),
    "gptq4-random": GPTQ(4, source="random"),
    "clip4-weights": ClipSearch(4, "weights"),
    "clip4-outputs": ClipSearch(4, "outputs"),
    "autoround4": LearnedRounding(4),
    "awq4": ActivationScaled(4),
    "awq4-g64": ActivationScaled(4, 64),
    "lqer3": LowRankRepair(3, 4),
    "lqer3-act": LowRankRepair(3, 4, weighted=True),
    "lqer3-act-offset": LowRankRepair(3, 4, weighted=True, offsets=True),
    "lqer6-act-k12": LowRankRepair(6, 4, weighted=True, k=12.0),
    "w8a8": Int8Activations(),
    "w8a8-random": Int8Activations("random"),
    "w8a8-training": Int8Activations("training"),
    "w8a8-smooth-random": Int8Activations("random", smooth=True),
    "w8a8-smooth-training": Int8Activations("training", smooth=True),
    "w8a8-torchao": TorchaoInt8(),
    "compile": Compile(),
    "onnx": OnnxRuntime(),
    "onnx-int8": OnnxRuntime(int8=True),
    "int6-zstd": Coded("int6-rms", 6, 3.6, "zstd"),
    "int6-brotli": Coded("int6-rms", 6, 3.6, "brotli"),
    "int6-lzma": Coded("int6-rms", 6, 3.6, "lzma"),
    "int6-ans": Coded("int6-rms", 6, 3.6, "ans"),
    "int6-bitplanes": Coded("int6-rms", 6, 3.6, layout="bitplanes"),
    "int6-sorted": Coded("int6-rms", 6, 3.6, layout="sorted"),
    "trits-base3-lzma": Coded("int2-rms", 2, 1.2, "lzma", "base3"),
    "trits-ans": Coded("int2-rms", 2, 1.2, "ans"),
    "cache-fp32": CacheType("fp32"),
    "cache-bf16": CacheType("bf16"),
    "cache-int8": CacheType("int8"),
    "sdpa-math": AttentionKernel("math"),
    "sdpa-flash": AttentionKernel("flash"),
    "sdpa-efficient": AttentionKernel("efficient"),
    "sdpa-cudnn": AttentionKernel("cudnn"),
    "draft-ngram": Drafted("ngram"),
    "draft-suffix": Drafted("suffix"),
    "draft-layers": Drafted("layers"),
    "prune10": Pruned(0.1),
    "prune30": Pruned(0.3),
    "prune50": Pruned(0.5),
    "prune70": Pruned(0.7),
    "prune-2of4": TwoOfFour(),
    "prune50-tuned": PrunedTuned(0.5, distilled=False),
    "prune50-distilled": PrunedTuned(0.5, distilled=True),
    "vocab-unseen": SmallerVocabulary(rows=64, least=1),
    "vocab-rare": SmallerVocabulary(rows=256, least=16),
    "tuned6": Tuned(6),
    "qat3": Tuned(3),
    "qat2": Tuned(2),
    "ternary-g64": Ternary(64),
    "last": Averaged("last"),
    "last-int6": Averaged("last", 6),
    "swa": Averaged("swa"),
    "swa-int6": Averaged("swa", 6),
    "ema": Averaged("ema"),
    "ema-int6": Averaged("ema", 6),
}

# Enough for a first look in a few minutes: one or two of each group.
QUICK = (
    *("fp32", "bf16", "int6", "int6-rms", "int4-g32", "int4-rms", "palette-mixed3"),
    *("gptq4", "w8a8", "prune50", "onnx", "swa", "int6-zstd", "cache-int8", "draft-ngram"),
)
