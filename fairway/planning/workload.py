"""The work that a model's settings ask for: parameters, FLOPs and bytes, without a model.

`cfg` is a Config of the trainer. Counts are for one token unless they say otherwise. A pass is
forward and backward; a layer that is looped runs several times in a pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

# Elements of 2 bytes that kernels other than products and attention move for each token in a pass.
# They were counted in the graph that torch.compile makes of train_gpt.py for an H100, as
# differences between graphs with and without each part (98,304 tokens, 4 layers of width 512).
TRAFFIC_STREAM = 42.3  # for each layer and channel: norms, residuals, skips, queries, scales
TRAFFIC_KV = 3.0  # for each layer and channel of keys, and of values
TRAFFIC_HIDDEN = 5.0  # for each layer and hidden channel of the MLP
TRAFFIC_XSA, TRAFFIC_GATE, TRAFFIC_PARTIAL_ROPE = 12.7, 5.7, 3.7  # for each such layer and channel
TRAFFIC_LANES = 9.9  # for each layer of two lanes and channel
TRAFFIC_LOGIT = 3.05  # for each piece of the vocabulary
TRAFFIC_ENDS, TRAFFIC_SMEAR, TRAFFIC_BIGRAM = 16.0, 2.0, 5.0  # for each channel, once
FORWARD_TRAFFIC = 0.41  # share of the forward half
# Causal attention: 2 products forward, 5 backward (FlashAttention computes the scores again).
FORWARD_ATTENTION = 2 / 7


class Parameters(NamedTuple):
    """The parameters of a model by how they are trained and stored."""

    attention: list[tuple[int, int]]  # shapes of matrices
    mlp: list[tuple[int, int]]
    bigram: list[tuple[int, int]]  # the projection of the bigram table
    embeddings: list[tuple[int, int]]
    plain: int  # vectors, gates, scalars
    plain_tensors: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """The shapes that Muon trains."""
        return self.attention + self.mlp + self.bigram

    @property
    def total(self) -> int:
        return sum(map(math.prod, self.matrices + self.embeddings)) + self.plain

    @property
    def tensors(self) -> int:
        return len(self.matrices) + len(self.embeddings) + self.plain_tensors


class Work(NamedTuple):
    """The work of one token in a pass."""

    product_flops: float
    attention_flops: float
    traffic_bytes: float


def layer_order(cfg: Any, looping: bool) -> list[int]:
    """Return the layers in running order, as the trainer's GPT.passes does."""
    layers, end = list(range(cfg.num_layers)), cfg.loop_end + 1
    again = layers[cfg.loop_start : end] * (cfg.num_loops * looping)
    return layers[:end] + again + layers[end:]


def count_parameters(cfg: Any) -> Parameters:
    """Count every parameter of the trainer's GPT."""
    D, H, layers = cfg.model_dim, cfg.num_heads, cfg.num_layers
    kv, hidden = cfg.num_kv_heads * (D // H), int(cfg.mlp_mult * D)
    lanes = len(lane_layers(cfg))
    skips = max(len(layer_order(cfg, looping)) // 2 for looping in (False, True))
    vectors = skips * (1 + cfg.skip_gates) + cfg.smear_gate
    gate = H * min(12, D) if cfg.attn_gate else 0
    bigram = bool(cfg.bigram_vocab_size)
    return Parameters(
        [(D, D), (kv, D), (kv, D), (D, D)] * layers,
        [(hidden, D), (D, hidden)] * layers,
        [(D, cfg.bigram_dim)] * bigram,
        [(cfg.vocab_size, D)] + [(cfg.bigram_vocab_size, cfg.bigram_dim)] * bigram,
        layers * (H + 4 * D + gate) + 4 * lanes + vectors * D + bigram,
        layers * (4 + cfg.attn_gate) + lanes + 1 + cfg.skip_gates + cfg.smear_gate + bigram,
    )


def lane_layers(cfg: Any) -> range:
    """Return the layers that keep two lanes."""
    first = cfg.parallel_start_layer or cfg.num_layers
    return range(min(first, cfg.num_layers), cfg.num_layers)


def work_of_pass(cfg: Any, looping: bool, length: float = 0) -> Work:
    """Return the work of one token, forward and backward, in sequences of `length` tokens.

    A position attends to half of the sequence on average.
    """
    D, V, order = cfg.model_dim, cfg.vocab_size, layer_order(cfg, looping)
    kv, hidden = cfg.num_kv_heads * (D // cfg.num_heads), int(cfg.mlp_mult * D)
    bigram = cfg.bigram_dim * D if cfg.bigram_vocab_size else 0
    weights = len(order) * (2 * D * D + 2 * kv * D + 2 * hidden * D) + V * D + bigram
    context = (length or cfg.train_seq_len) / 2
    layer = TRAFFIC_STREAM * D + TRAFFIC_KV * 2 * kv + TRAFFIC_HIDDEN * hidden
    layer += D * (TRAFFIC_GATE * cfg.attn_gate + TRAFFIC_PARTIAL_ROPE * bool(cfg.rope_dims))
    exclusive = sum(i >= cfg.num_layers - cfg.xsa_last_n for i in order)
    two_lanes = sum(i in lane_layers(cfg) for i in order)
    elements = len(order) * layer + D * (TRAFFIC_XSA * exclusive + TRAFFIC_LANES * two_lanes)
    elements += TRAFFIC_LOGIT * V + TRAFFIC_ENDS * D
    elements += D * (TRAFFIC_SMEAR * cfg.smear_gate + TRAFFIC_BIGRAM * bool(bigram))
    # 7 products of context x width, 2 FLOPs each.
    return Work(6.0 * weights, 14.0 * len(order) * context * D, 2.0 * elements)
