"""What a model has read, kept as keys and values, so that the next tokens cost one pass over themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train_gpt import GPT, rope_tables


def rotations(model: GPT, length: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """RoPE's cos and sin for `length` positions; a stretch slows it as NTK scaling does, so that a context that many
    times longer turns the slowest dimension no further than training did."""
    cfg = model.cfg
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    base = cfg.rope_base * stretch ** (dims / max(dims - 2, 1))
    return tuple(table.to(model.cos.device) for table in rope_tables(length, dims, base))


class Memory:
    """A batch of streams, B at a time, fed in pieces: `logits` of a piece sees the `window` tokens that end in each of
    its positions, pieces before it included. `rope` must be as long as the streams.

    Memory(model, window, rope).logits(a), then .logits(b), is what .logits of both together gives."""

    def __init__(self, model: GPT, window: int, rope: tuple[Tensor, Tensor]):
        self.model, self.window, self.rope = model, window, rope
        self.keys: list[Tensor] = []  # of each pass, [B, G, at most window - 1, C]
        self.values: list[Tensor] = []
        self.read, self.turn, self.mask = 0, 0, None
        self.last: Tensor | None = None  # two tokens: the smear gate looks back by one, at a bigram that does so too

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V]: what each position says of the token after it."""
        T, kept = tokens_BT.size(1), self.keys[0].size(2) if self.keys else 0
        seen = tokens_BT if self.last is None else torch.cat([self.last, tokens_BT], dim=1)
        x = self.model.embed(seen)[:, -T:]
        here = torch.arange(kept, kept + T, device=x.device)[:, None]
        there = torch.arange(kept + T, device=x.device)
        self.mask, self.turn = (there <= here) & (there > here - self.window), 0
        cos, sin = (table[self.read : self.read + T] for table in self.rope)
        out = self.model.from_embedded(x, (cos, sin), self.attention)
        self.read, self.last = self.read + T, seen[:, -2:]
        return out

    def attention(self, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Attention of one pass over what it kept and over the piece; called once a pass, in order."""
        i, self.turn = self.turn, self.turn + 1
        if i < len(self.keys):
            k_BGTC, v_BGTC = torch.cat([self.keys[i], k_BGTC], dim=2), torch.cat([self.values[i], v_BGTC], dim=2)
        else:
            self.keys.append(k_BGTC), self.values.append(v_BGTC)
        keep = max(0, k_BGTC.size(2) - (self.window - 1))
        self.keys[i], self.values[i] = k_BGTC[:, :, keep:], v_BGTC[:, :, keep:]
        grouped = q_BHTC.size(1) != k_BGTC.size(1)
        return F.scaled_dot_product_attention(q_BHTC, k_BGTC, v_BGTC, attn_mask=self.mask, enable_gqa=grouped)
