"""A model's key-value cache: the next tokens cost one pass over themselves only."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fairway.scoring.few_rows import for_few_rows
from train_gpt import GPT, Runtime, UserError, attend, rope_tables

# How keys and values are stored; None: in the type of the model's activations.
STORAGE = {"model": None, "fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
REWIND = 64  # tokens that can always be cropped, even after older ones have left the window
LEAST_ROOM = 64  # tokens that the first tensors have room for


def model_rope(model: GPT, length: int, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return RoPE's cos and sin for `length` positions.

    `stretch` slows the rotation as NTK scaling does: in a context that many times longer, the
    slowest dimension turns no further than in training.
    """
    cfg = model.cfg
    dims = cfg.rope_dims or cfg.model_dim // cfg.num_heads
    base = cfg.rope_base * stretch ** (dims / max(dims - 2, 1))
    return tuple(table.to(model.cos.device) for table in rope_tables(length, dims, base))


def first_layers(model: GPT, count: int) -> GPT:
    """Return the first `count` blocks under the model's head: a draft that costs no bytes.

    It shares the model's weights. The skip connections are left out, because they lead to later
    blocks, which the draft does not have.
    """
    layers = model.cfg.num_layers
    if not 1 <= count < layers:
        raise UserError(
            f"a draft of the first {count} layers: the model has {layers}; take 1 to {layers - 1}"
        )
    with torch.device("meta"):  # allocates no weights
        draft = GPT(replace(model.cfg, num_layers=count, num_loops=0, skip_gates=False))
    draft.tok_emb, draft.bigram, draft.smear = model.tok_emb, model.bigram, model.smear
    draft.blocks, draft.stream_dtype = model.blocks[:count], model.stream_dtype
    draft.skip_weights = nn.Parameter(
        torch.zeros(draft.skip_weights.shape, device=model.cos.device)
    )
    draft.cos, draft.sin = model.cos, model.sin
    return draft.train(model.training)


def in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round to codes int8[..., C] and steps fp16[..., 1], one step for each token and head."""
    step = (x.float().abs().amax(dim=-1, keepdim=True) / 127).clamp(min=2.0**-14).half()
    return (x.float() / step.float()).round().clamp(-127, 127).to(torch.int8), step


class Memory:
    """The key-value cache of B streams that are read in pieces.

    Each position sees the `window` tokens that end in it (0: as many as in training), in earlier
    pieces too. A `rope` must be as long as the streams; without one it grows with them. If no
    stream is longer than `longest` tokens, the cache is allocated once.

    Memory(model).logits(a), then .logits(b), gives what .logits of both together gives.
    """

    def __init__(
        self,
        model: GPT,
        window: int = 0,
        rope: tuple[Tensor, Tensor] | None = None,
        storage: str = "model",
        longest: int = 0,
    ):
        if storage not in STORAGE:
            raise UserError(
                f"keys and values cannot be kept as {storage!r}; take one of {', '.join(STORAGE)}"
            )
        for_few_rows(model)
        self.model, self.window, self.storage = model, window or model.cfg.train_seq_len, storage
        self.longest = longest
        self.rope, self.rope_grows = rope or (model.cos, model.sin), rope is None
        self.rt = Runtime(0, 1, model.cos.device, model.cos.device.type)
        self.read = 0  # tokens that were read
        self.used = 0  # of them the last ones, which the tensors below hold
        self.next_pass, self.mask = 0, None  # while a piece is read: see `attention` and `visible`
        # The first `used` places are in use; the others are room for more.
        self.tokens: Tensor | None = None  # [B, room]
        self.data: Tensor | None = None  # [passes, 2, B, G, room, C], keys and values
        self.steps: Tensor | None = None  # [passes, 2, B, G, room, 1], with int8 only

    # ==== READING =================================================================================
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Read a piece and return its logits [B, T, V]: each position predicts the next token."""
        T = tokens_BT.size(1)
        self.make_room(tokens_BT)
        # The smear gate reads one token back, and the bigram of that token reads one further.
        first = max(0, self.used - 2)
        self.tokens[:, self.used : self.used + T] = tokens_BT
        self.mask, self.next_pass = self.visible(T), 0
        cos, sin = (table[self.read : self.read + T] for table in self.rope)
        with self.rt.autocast():
            x = self.model.embed(self.tokens[:, first : self.used + T])[:, -T:]
            out = self.model.from_embedded(x, (cos, sin), self.attention)
        self.read, self.used = self.read + T, self.used + T
        return out

    def visible(self, T: int) -> Tensor | None:
        """Return the mask [T, keys]: which keys each position sees; None: all of them."""
        if T == 1:
            return None
        earlier = min(self.used, self.window - 1)
        query = torch.arange(earlier, earlier + T, device=self.tokens.device)[:, None]
        key = torch.arange(earlier + T, device=self.tokens.device)
        return (key <= query) & (key > query - self.window)

    def attention(self, q_BHTC: Tensor, k_BGTC: Tensor, v_BGTC: Tensor) -> Tensor:
        """Attend to the cache and the piece; the model calls this once for each pass, in order."""
        nth, self.next_pass, T = self.next_pass, self.next_pass + 1, q_BHTC.size(2)
        if self.data is None:
            self.allocate_cache(k_BGTC)
        self.store(nth, k_BGTC, v_BGTC)
        if self.used == 0 and T <= self.window and self.data.dtype == k_BGTC.dtype:
            return attend(q_BHTC, k_BGTC, v_BGTC)
        first = max(0, self.used - (self.window - 1))
        k, v = self.stored(nth, slice(first, self.used + T)).type_as(q_BHTC)
        return F.scaled_dot_product_attention(
            q_BHTC, k, v, attn_mask=self.mask, enable_gqa=q_BHTC.size(1) != k.size(1)
        )

    # ==== STORING =================================================================================
    def make_room(self, tokens_BT: Tensor) -> None:
        """Make room for a piece, if necessary by moving what is still needed to the front.

        There is room for twice what is needed, so that moves are rare and a token costs the same
        however many came before it. Tensors that are too small are replaced by larger ones, one
        after another; with `longest` none ever is.
        """
        B, T = tokens_BT.shape
        if self.rope_grows and self.read + T > len(self.rope[0]):
            self.rope = model_rope(self.model, 2 * (self.read + T))
        if self.tokens is not None and self.used + T <= self.tokens.size(1):
            return
        keep = min(self.used, self.window + 1 + REWIND)
        room = max(LEAST_ROOM, 2 * (keep + T))
        if self.tokens is None:
            most = min(self.longest, 2 * (self.window + 1 + REWIND + T))
            self.tokens = tokens_BT.new_zeros(B, max(room, most), dtype=torch.int64)
            return
        for name, dim in (("tokens", -1), ("data", -2), ("steps", -2)):
            if getattr(self, name) is not None:
                setattr(self, name, self.moved(getattr(self, name), dim, keep, room))
        self.used = keep

    def moved(self, old: Tensor, dim: int, keep: int, room: int) -> Tensor:
        """Return a tensor that begins with the last `keep` used places of `old`: itself if it can.

        If `old` has room enough, at least half of it is moved away from: nothing overlaps.
        """
        shape = list(old.shape)
        shape[dim] = room
        new = old if old.size(dim) >= room else old.new_zeros(shape)
        new.narrow(dim, 0, keep).copy_(old.narrow(dim, self.used - keep, keep))
        return new

    def allocate_cache(self, k_BGTC: Tensor) -> None:
        """Allocate the cache for keys of this shape."""
        B, G, _, C = k_BGTC.shape
        shape = len(self.model.passes(self.model.looping)), 2, B, G, self.tokens.size(1)
        dtype, device = STORAGE[self.storage] or self.model.stream_dtype, k_BGTC.device
        self.data = torch.zeros(*shape, C, dtype=dtype, device=device)
        if self.storage == "int8":
            self.steps = torch.zeros(*shape, 1, dtype=torch.float16, device=device)

    def store(self, nth: int, *both: Tensor) -> None:
        """Append keys and values [B, G, T, C] of a pass."""
        places = slice(self.used, self.used + both[0].size(2))
        for which, part in enumerate(both):
            if self.steps is not None:
                part, self.steps[nth, which, :, :, places] = in_int8(part)
            self.data[nth, which, :, :, places] = part

    def stored(self, nth: int, places: slice) -> Tensor:
        """Return keys and values [2, B, G, T, C] of a pass; from int8 as float32."""
        both = self.data[nth, :, :, :, places]
        if self.steps is None:
            return both
        return both.float() * self.steps[nth, :, :, :, places].float()

    def crop(self, length: int) -> None:
        """Forget the tokens from `length` on, as if they had never been read."""
        used = self.used - (self.read - length)
        if not 0 <= length <= self.read or used < min(length, self.window + 1):
            raise ValueError(
                f"{self.read} tokens were read, {self.used} are kept: they cannot be cropped to "
                f"{length}"
            )
        self.read, self.used = length, used

    def pick(self, rows: Tensor) -> None:
        """Replace the streams by those with these numbers, int64[B']; one may occur repeatedly."""
        self.tokens = self.tokens[rows]
        self.data = self.data.index_select(2, rows)
        self.steps = None if self.steps is None else self.steps.index_select(2, rows)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the keys and values in use."""
        return sum(
            part[..., : self.used, :].numel() * part.element_size()
            for part in (self.data, self.steps)
            if part is not None
        )


def bytes_per_token(model: GPT, storage: str) -> int:
    """Return by how much `stored_bytes` grows with each token of a stream."""
    cfg = model.cfg
    size = {"fp32": 4, "bf16": 2, "int8": 1, "model": model.stream_dtype.itemsize}[storage]
    per_head = size * cfg.model_dim // cfg.num_heads + 2 * (storage == "int8")
    return len(model.passes(model.looping)) * 2 * cfg.num_kv_heads * per_head
