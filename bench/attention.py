"""Attention policies: what each layer keeps of the text before, as variants of one cache.

bench/context.py measures them. A policy holds the keys and values of one pass through a layer, and
attends to them. All read a text piece by piece through `PolicyEngine`, in float32, one stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fairway.scoring.memory import in_int8, model_rope
from train_gpt import GPT, rotate

FIRST = 4  # tokens that a window may keep from the start of the text (StreamingLLM, 2309.17453)
PAGE = 16  # tokens of a page (Quest, 2406.10774)
BLOCK = 32  # tokens that share a step of a channel in 4 bits (KIVI, 2402.02750)


def grouped(q_HTC: Tensor, groups: int) -> Tensor:
    """Return queries [G, H/G, T, C]: those that read one head of keys side by side."""
    return q_HTC.unflatten(0, (groups, -1))


def attend_where(q_HTC: Tensor, k_GNC: Tensor, v_GNC: Tensor, mask: Tensor | None) -> Tensor:
    """Attend where the mask [.., T, N] allows it; without one, everywhere."""
    gqa = len(q_HTC) != len(k_GNC)
    parts = (part[None] for part in (q_HTC, k_GNC, v_GNC))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=gqa)[0]


class Row:
    """Tensors [.., T, C] one behind the other, in room that doubles when it is full."""

    def __init__(self) -> None:
        self.room, self.count = torch.empty(0), 0

    def append(self, new: Tensor) -> None:
        """Add T more."""
        end = self.count + new.size(-2)
        if not self.room.numel() or end > self.room.size(-2):
            wider = new.new_empty(*new.shape[:-2], 2 * end, new.size(-1))
            wider[..., : self.count, :] = self.held if self.count else 0
            self.room = wider
        self.room[..., self.count : end, :] = new
        self.count = end

    def keep(self, last: int) -> None:
        """Forget all but the last ones."""
        self.room[..., :last, :] = self.room[..., self.count - last : self.count, :].clone()
        self.count = last

    @property
    def held(self) -> Tensor:
        """Return what was added."""
        return self.room[..., : self.count, :]

    @property
    def bytes(self) -> int:
        """Bytes of what was added."""
        return self.held.nbytes if self.count else 0


class Everything:
    """Keep and read all tokens."""

    def __init__(self) -> None:
        self.count = 0  # tokens read so far
        self.both = Row()  # keys and values, [2, G, N, C]

    def append(self, k_GTC: Tensor, v_GTC: Tensor) -> None:
        """Keep the keys and values of a piece."""
        self.both.append(torch.stack([k_GTC, v_GTC]))
        self.count += k_GTC.size(1)

    def kept(self) -> tuple[Tensor, Tensor]:
        """Return keys and values [G, N, C]."""
        return tuple(self.both.held)

    def attend(self, q_HTC: Tensor, k_GTC: Tensor, v_GTC: Tensor) -> Tensor:
        """Keep the piece, and return what its queries read."""
        self.append(k_GTC, v_GTC)
        T = q_HTC.size(1)
        return self.read(q_HTC, torch.arange(self.count - T, self.count))

    def read(self, q_HTC: Tensor, at_T: Tensor) -> Tensor:
        """Return what queries at these positions read, each of itself and what is before it."""
        mask = at_T[:, None] >= torch.arange(self.count) if len(at_T) > 1 else None
        return attend_where(q_HTC, *self.kept(), mask)

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return self.both.bytes


class Split(Everything):
    """Read keys in chunks, and join them by an online softmax (split-K, as in FlashDecoding)."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk

    def read(self, q_HTC: Tensor, at_T: Tensor) -> Tensor:
        k, v = self.kept()
        q = grouped(q_HTC, len(k)) / math.sqrt(k.size(2))
        peak = q.new_full((*q.shape[:3], 1), -math.inf)
        total, mixed = torch.zeros_like(peak), torch.zeros_like(q)
        for start in range(0, self.count, self.chunk):
            part = slice(start, start + self.chunk)
            scores = q @ k[:, None, part].mT
            if len(at_T) > 1:
                later = torch.arange(self.count)[part] > at_T[:, None]
                scores = scores.masked_fill(later, -math.inf)
            most = torch.maximum(peak, scores.amax(-1, keepdim=True))
            weights, fade = (scores - most).exp(), (peak - most).exp()
            total, mixed = total * fade + weights.sum(-1, keepdim=True), mixed * fade
            mixed, peak = mixed + weights @ v[:, None, part], most
        return (mixed / total).flatten(0, 1)


class Window(Everything):
    """Keep the last `window` tokens, and the `first` of the text.

    A first token is read as if it stood right before the window: its key is turned on as far as the
    text has moved away from it. So no distance is longer than `first` + `window`.
    """

    def __init__(self, window: int, first: int, turn: Callable[[int], tuple[Tensor, Tensor]]):
        super().__init__()
        self.window, self.first, self.turn, self.start = window, first, turn, Row()

    def append(self, k_GTC: Tensor, v_GTC: Tensor) -> None:
        if (left := self.first - self.count) > 0:
            self.start.append(torch.stack([k_GTC, v_GTC])[:, :, :left])
        if self.both.count > 2 * self.window:
            self.both.keep(self.window - 1)
        super().append(k_GTC, v_GTC)

    def read(self, q_HTC: Tensor, at_T: Tensor) -> Tensor:
        size = min(self.both.count, len(at_T) + self.window - 1)
        k, v = self.both.held[:, :, -size:]
        key = torch.arange(self.count - size, self.count)
        mask = (key <= at_T[:, None]) & (key > at_T[:, None] - self.window)
        end = int(at_T[-1]) + 1 - self.window  # where the window of the last query begins
        if (n := min(self.first, end)) > 0:  # the piece reads them where its last token does
            k_first, v_first = self.start.held[:, :, :n]
            k = torch.cat([rotate(k_first[None], *self.turn(end - n))[0], k], dim=1)
            v = torch.cat([v_first, v], dim=1)
            before = torch.arange(n) <= at_T[:, None] - self.window
            mask = torch.cat([before, mask], dim=1)
        return attend_where(q_HTC, k, v, mask if len(at_T) > 1 else None)

    @property
    def bytes(self) -> int:
        """Bytes of window and first tokens; the room of those that are about to go is not kept."""
        token = self.both.bytes // max(self.both.count, 1)
        return token * min(self.both.count, self.window) + self.start.bytes


class Pages(Everything):
    """Keep all tokens, but read only the `top` pages whose keys may match a query best (Quest).

    A page knows the least and the largest value of each channel of its keys. They bound every
    product with a query from above. The page under way and the one before it are always read.
    """

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top, self.bounds = top, Row()  # of full pages, [2, G, pages, C]

    def append(self, k_GTC: Tensor, v_GTC: Tensor) -> None:
        done = self.count // PAGE
        super().append(k_GTC, v_GTC)
        full = self.count // PAGE
        if full > done:
            new = self.both.held[0, :, done * PAGE : full * PAGE].unflatten(1, (-1, PAGE))
            self.bounds.append(torch.stack([new.amin(2), new.amax(2)]))

    def chosen(self, q_HTC: Tensor, at_T: Tensor) -> Tensor:
        """Return the numbers of the pages that each query reads besides its own, [G, T, top].

        Queries that share keys share pages. A page that is not full yet has no bounds.
        """
        low, high = self.bounds.held[:, :, None]
        q = grouped(q_HTC, len(low))
        reach = q.clamp(max=0) @ low.mT + q.clamp(min=0) @ high.mT  # [G, H/G, T, pages]
        last = at_T // PAGE - 1  # the page before the query's own
        pages = torch.arange(reach.size(-1))
        reach = reach.amax(1).masked_fill(pages == last[:, None], math.inf)
        reach = reach.masked_fill(pages > last[:, None], -math.inf)
        return reach.topk(self.top, dim=-1).indices

    def read(self, q_HTC: Tensor, at_T: Tensor) -> Tensor:
        if int(at_T[-1]) // PAGE <= self.top:
            return super().read(q_HTC, at_T)
        k, v = self.kept()
        chosen, own = self.chosen(q_HTC, at_T), int(at_T[-1]) // PAGE * PAGE
        if len(at_T) == 1:
            places = (chosen[:, 0, :, None] * PAGE + torch.arange(PAGE)).flatten(1)
            places = places[..., None].expand(-1, -1, k.size(2))
            k, v = (torch.cat([x.gather(1, places), x[:, own:]], dim=1) for x in (k, v))
            return attend_where(q_HTC, k, v, None)
        page, key = torch.arange(-(-self.count // PAGE)), torch.arange(self.count)
        seen = (page == (at_T // PAGE)[:, None]).repeat(len(k), 1, 1).scatter(2, chosen, True)
        seen = seen.repeat_interleave(PAGE, dim=2)[..., : self.count] & (key <= at_T[:, None])
        return attend_where(q_HTC, k, v, seen.repeat_interleave(len(q_HTC) // len(k), dim=0))

    @property
    def bytes(self) -> int:
        return self.both.bytes + self.bounds.bytes


class ByHead:
    """Heads of keys that retrieve keep everything, the others a window (DuoAttention, 2410.10819).

    `retrieves` says for each head of keys whether it does; the two kinds have a cache each.
    """

    def __init__(self, retrieves: Sequence[bool], window: Window) -> None:
        self.groups = torch.tensor(retrieves)
        self.caches = {True: Everything(), False: window}

    def attend(self, q_HTC: Tensor, k_GTC: Tensor, v_GTC: Tensor) -> Tensor:
        q = grouped(q_HTC, len(k_GTC))
        read = torch.empty_like(q)
        for kind, cache in self.caches.items():
            own = self.groups == kind
            if own.any():
                part = cache.attend(q[own].flatten(0, 1), k_GTC[own], v_GTC[own])
                read[own] = grouped(part, int(own.sum()))
        return read.flatten(0, 1)

    @property
    def bytes(self) -> int:
        """Bytes of both kinds."""
        return sum(cache.bytes for cache in self.caches.values())


class Rounded8(Everything):
    """Keep codes of 8 bits, with a step for each token and head."""

    def __init__(self) -> None:
        super().__init__()
        self.codes, self.steps = Row(), Row()

    def append(self, k_GTC: Tensor, v_GTC: Tensor) -> None:
        codes, steps = in_int8(torch.stack([k_GTC, v_GTC]))
        self.codes.append(codes)
        self.steps.append(steps)
        self.count += k_GTC.size(1)

    def kept(self) -> tuple[Tensor, Tensor]:
        return tuple(self.codes.held.float() * self.steps.held.float())

    @property
    def bytes(self) -> int:
        return self.codes.bytes + self.steps.bytes


class Packed4:
    """Codes of 4 bits, two a byte; `dim` is what shares a step: a token's channels, or a block's
    tokens. Steps and least values are fp16.
    """

    def __init__(self, dim: int) -> None:
        self.dim, self.rows = dim, [Row(), Row(), Row()]  # codes, steps, least values

    def append(self, x_GTC: Tensor) -> None:
        """Round T tokens, or one block of them."""
        low = x_GTC.amin(self.dim, keepdim=True).half()
        span = x_GTC.amax(self.dim, keepdim=True) - low.float()
        step = (span / 15).clamp(min=2.0**-14).half()
        codes = ((x_GTC - low.float()) / step.float()).round().clamp(0, 15).to(torch.uint8)
        parts = codes[..., ::2] | codes[..., 1::2] << 4, step, low
        for row, part in zip(self.rows, parts, strict=True):
            row.append(part)

    def held(self) -> Tensor:
        """Return what was rounded, [G, N, C]."""
        codes, step, low = (row.held for row in self.rows)
        if self.dim == 1:
            step, low = (part.repeat_interleave(BLOCK, dim=1) for part in (step, low))
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return pairs.float() * step.float() + low.float()

    @property
    def bytes(self) -> int:
        """Bytes of codes, steps and least values."""
        return sum(row.bytes for row in self.rows)


class Rounded4(Everything):
    """Keep codes of 4 bits: values by token; keys by token, or by channel in blocks of tokens.

    By channel, tokens of a block that is not full are kept as they are.
    """

    def __init__(self, by_channel: bool) -> None:
        super().__init__()
        self.block = BLOCK if by_channel else 1
        self.coded = Packed4(1 if by_channel else 2), Packed4(2)

    def append(self, k_GTC: Tensor, v_GTC: Tensor) -> None:
        super().append(k_GTC, v_GTC)
        while self.both.count >= self.block:
            size = self.block if self.block > 1 else self.both.count
            for row, part in zip(self.coded, self.both.held[:, :, :size], strict=True):
                row.append(part)
            self.both.keep(self.both.count - size)

    def kept(self) -> tuple[Tensor, Tensor]:
        if not self.coded[0].bytes:
            return super().kept()
        rest = self.both.held if self.both.count else [torch.empty(0)] * 2
        pairs = zip((row.held() for row in self.coded), rest, strict=True)
        return tuple(torch.cat([old, new], dim=1) if len(new) else old for old, new in pairs)

    @property
    def bytes(self) -> int:
        return self.both.bytes + sum(row.bytes for row in self.coded)


class PolicyEngine:
    """A model that reads one stream in pieces; pass i through a layer has the policy policies[i].

    `stretch` slows RoPE as NTK scaling does, for texts that many times longer than in training.
    """

    def __init__(self, model: GPT, longest: int, stretch: float = 1.0):
        self.model, self.rope = model, model_rope(model, longest, stretch)
        self.passes = len(model.passes(model.looping))
        self.policies: list = []
        self.tokens, self.next = torch.empty(1, 0, dtype=torch.int64), 0

    @property
    def read(self) -> int:
        """Tokens read so far."""
        return self.tokens.size(1)

    def turn(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the rotation from one position to that which is `count` later."""
        return tuple(table[count : count + 1] for table in self.rope)

    @torch.inference_mode()
    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Read a piece and return its logits [1, T, V]."""
        T, at = tokens_BT.size(1), self.read
        self.tokens, self.next = torch.cat([self.tokens, tokens_BT], dim=1), 0
        x = self.model.embed(self.tokens[:, max(0, at - 2) :])[:, -T:]
        rope = tuple(table[at : at + T] for table in self.rope)
        return self.model.from_embedded(x, rope, self.attention)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend by the policy of the next pass."""
        policy, self.next = self.policies[self.next], self.next + 1
        return policy.attend(q[0], k[0], v[0])[None]

    @property
    def bytes(self) -> int:
        """Bytes that all policies keep."""
        return sum(policy.bytes for policy in self.policies)
