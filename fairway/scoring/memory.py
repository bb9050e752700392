"""What a model has read, kept as keys and values, so that the next tokens cost one pass over themselves."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_gpt import GPT, Runtime, attend, need, rope_tables

KEPT = {
    "model": None,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}  # None: as it computes them
REWIND = 64  # tokens that can be cropped once older ones have left the window
LEAST_ROOM = 64  # tokens


def rotations(model: GPT, length: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """RoPE's cos and sin for `length` positions; a stretch slows it as NTK scaling does, so that a context that many
    times longer turns the slowest dimension no further than training did."""
    cfg = model.cfg
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    base = cfg.rope_base * stretch ** (dims / max(dims - 2, 1))
    return tuple(table.to(model.cos.device) for table in rope_tables(length, dims, base))


def first_layers(model: GPT, count: int) -> GPT:
    """The model's first blocks under its own head, sharing its weights: a draft that costs no bytes. The skips, which
    lead from blocks that it has to blocks that it has not, are left out."""
    layers = model.cfg.num_layers
    need(
        1 <= count < layers,
        f"a draft of the first {count} layers: the model has {layers}; take 1 to {layers - 1}",
    )
    with torch.device("meta"):  # no weights of its own
        draft = GPT(replace(model.cfg, num_layers=count, num_loops=0))
    draft.tok_emb, draft.bigram, draft.smear = model.tok_emb, model.bigram, model.smear
    draft.blocks, draft.stream_dtype = model.blocks[:count], model.stream_dtype
    draft.skip_weights = nn.Parameter(
        torch.zeros(draft.skip_weights.shape, device=model.cos.device)
    )
    draft.cos, draft.sin = model.cos, model.sin
    return draft.train(model.training)


def in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and step of each token and head, symmetric: [..., C] -> int8[..., C], fp16[..., 1]."""
    step = (x.float().abs().amax(dim=-1, keepdim=True) / 127).clamp(min=2.0**-14).half()
    return (x.float() / step.float()).round().clamp(-127, 127).to(torch.int8), step


class Memory:
    """B streams, fed in pieces: `logits` of a piece sees the `window` tokens that end in each of its positions, pieces
    before it included (0: as many as in training). A `rope` that is given must be as long as the streams.

    Memory(model).logits(a), then .logits(b), is what .logits of both together gives."""

    def __init__(
        self,
        model: GPT,
        window: int = 0,
        rope: tuple[Tensor, Tensor] | None = None,
        kept: str = "model",
    ):
        need(
            kept in KEPT,
            f"keys and values cannot be kept as {kept!r}; take one of {', '.join(KEPT)}",
        )
        self.model, self.window, self.kept = model, window or model.cfg.train_seq_len, kept
        self.rope, self.grows = rope or (model.cos, model.sin), rope is None
        self.rt = Runtime(0, 1, model.cos.device, model.cos.device.type)
        self.read, self.used, self.turn, self.mask = 0, 0, 0, None
        # The last `used` of the tokens read, and what the passes made of them; the rest of each is room for more.
        self.tokens: Tensor | None = None  # [B, room]
        self.data: Tensor | None = None  # [passes, 2, B, G, room, C], keys and values
        self.steps: Tensor | None = None  # [passes, 2, B, G, room, 1], of int8

    # ==== READING =====================================================================================================
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """[B, T, V]: what each position says of the token after it."""
        T = tokens_BT.size(1)
        self.make_room(tokens_BT)
        first = max(
            0, self.used - 2
        )  # the smear gate looks back by one token, at a bigram that does so too
        self.tokens[:, self.used : self.used + T] = tokens_BT
        self.mask, self.turn = self.seen(T), 0
        cos, sin = (table[self.read : self.read + T] for table in self.rope)
        with self.rt.autocast():
            x = self.model.embed(self.tokens[:, first : self.used + T])[:, -T:]
            out = self.model.from_embedded(x, (cos, sin), self.attention)
        self.read, self.used = self.read + T, self.used + T
        return out

    def seen(self, T: int) -> Tensor | None:
        """Which of the keys that `attention` takes each of T positions sees; None: all of them."""
        if T == 1:
            return None
        kept = min(self.used, self.window - 1)
        here = torch.arange(kept, kept + T, device=self.tokens.device)[:, None]
        there = torch.arange(kept + T, device=self.tokens.device)
        return (there <= here) & (there > here - self.window)

    def attention(self, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Attention of one pass over what it kept and over the piece; called once a pass, in order."""
        nth, self.turn, T = self.turn, self.turn + 1, q_BHTC.size(2)
        if self.data is None:
            self.lay_out(k_BGTC)
        self.keep(nth, torch.stack([k_BGTC, v_BGTC]))
        if self.used == 0 and T <= self.window and self.data.dtype == k_BGTC.dtype:
            return attend(q_BHTC, k_BGTC, v_BGTC)
        first = max(0, self.used - (self.window - 1))
        k, v = self.kept_at(nth, slice(first, self.used + T)).type_as(q_BHTC)
        return F.scaled_dot_product_attention(
            q_BHTC, k, v, attn_mask=self.mask, enable_gqa=q_BHTC.size(1) != k.size(1)
        )

    # ==== KEEPING =====================================================================================================
    def make_room(self, tokens_BT: Tensor) -> None:
        """For one more piece, by moving what is still needed to tensors of twice that size: now and then, so that a
        token costs the same however many came before."""
        B, T = tokens_BT.shape
        if self.grows and self.read + T > len(self.rope[0]):
            self.rope = rotations(self.model, 2 * (self.read + T))
        if self.tokens is not None and self.used + T <= self.tokens.size(1):
            return
        keep = min(self.used, self.window + 1 + REWIND)
        room = max(LEAST_ROOM, 2 * (keep + T))
        old, self.tokens = (
            self.tokens,
            torch.zeros(B, room, dtype=torch.int64, device=tokens_BT.device),
        )
        if old is None:
            return
        here, there = slice(0, keep), slice(self.used - keep, self.used)
        self.tokens[:, here] = old[:, there]
        for name in ("data", "steps"):
            if (old := getattr(self, name)) is not None:
                new = old.new_zeros(*old.shape[:4], room, old.size(5))
                new[..., here, :] = old[..., there, :]
                setattr(self, name, new)
        self.used = keep

    def lay_out(self, k_BGTC: Tensor) -> None:
        B, G, _, C = k_BGTC.shape
        shape = len(self.model.passes(self.model.looping)), 2, B, G, self.tokens.size(1)
        self.data = torch.zeros(
            *shape, C, dtype=KEPT[self.kept] or k_BGTC.dtype, device=k_BGTC.device
        )
        if self.kept == "int8":
            self.steps = torch.zeros(*shape, 1, dtype=torch.float16, device=k_BGTC.device)

    def keep(self, nth: int, both: Tensor) -> None:
        """[2, B, G, T, C] of a pass, behind what is kept."""
        at = slice(self.used, self.used + both.size(3))
        if self.steps is not None:
            both, self.steps[nth, :, :, :, at] = in_int8(both)
        self.data[nth, :, :, :, at] = both

    def kept_at(self, nth: int, at: slice) -> Tensor:
        both = self.data[nth, :, :, :, at]
        return both if self.steps is None else both.float() * self.steps[nth, :, :, :, at].float()

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on, as if they had never been read."""
        used = self.used - (self.read - length)
        if not 0 <= length <= self.read or used < min(length, self.window + 1):
            raise ValueError(
                f"{self.read} tokens were read, {self.used} are kept: they cannot be cropped to {length}"
            )
        self.read, self.used = length, used

    def pick(self, rows: Tensor) -> None:
        """The streams become those of these numbers: int64[B']."""
        self.tokens = self.tokens[rows]
        self.data = self.data.index_select(2, rows)
        self.steps = None if self.steps is None else self.steps.index_select(2, rows)

    @property
    def held(self) -> int:
        """Bytes of the keys and values of the tokens that are kept."""
        return sum(
            part[..., : self.used, :].numel() * part.element_size()
            for part in (self.data, self.steps)
            if part is not None
        )


def bytes_a_token(model: GPT, kept: str) -> int:
    """What `held` grows by with each token of a stream, by arithmetic."""
    cfg, size = (
        model.cfg,
        {"fp32": 4, "bf16": 2, "int8": 1, "model": model.stream_dtype.itemsize}[kept],
    )
    a_head = size * cfg.model_dim // cfg.num_heads + 2 * (kept == "int8")
    return len(model.passes(model.looping)) * 2 * cfg.num_kv_heads * a_head
