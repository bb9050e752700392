"""Drafters with heads of their own, and trees of guesses that one pass verifies.

bench/drafts.py trains and measures them. A tree is lossless without a rule of its own: each token
is drawn from the model as without drafts, and a guess matters only if it is the token drawn.
"""

from __future__ import annotations

import contextlib
import heapq
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from attention import Row
from torch import Tensor, nn

from fairway.decoding.drafters import Drafter
from fairway.decoding.reader import GeneratedToken, Reader
from fairway.decoding.speculative import Speculation
from fairway.decoding.strategies import Strategy, draw, log_softmax
from fairway.scoring.few_rows import MOST_ROWS, for_few_rows, multiplied
from fairway.scoring.memory import Memory, model_rope
from train_gpt import GPT, Block, attend, linear, normalised

BREADTH = 4  # guesses for one place in the text
LEAST = 0.06  # chance below which one more guess costs more than it brings
MEDUSA_HEADS = 3


class Node(NamedTuple):
    """A guessed token, and the number of the guess before it: -1 is the text itself."""

    token: int
    parent: int


class TreeDrafter(Protocol):
    """Called in a cycle: `propose`, then the model verifies, then `learn`."""

    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        """Return at most `most` guesses, parents first. `states` [n - 1, D] are the model's last
        hidden states, of all tokens of the text but the last.
        """

    def learn(self, rows: np.ndarray, path: list[int]) -> None:
        """Learn the logits of all guesses, and which of them came true; row 0 is the text's."""


# ==== HIDDEN STATES ===============================================================================
@contextlib.contextmanager
def last_states(model: GPT) -> Iterator[list[Tensor]]:
    """Collect what the head multiplies, [B, T, D], in each pass of the model inside the block."""
    states: list[Tensor] = []

    def collect(_block: nn.Module, _inputs: tuple, lanes: list[Tensor]) -> None:
        states.append(normalised(sum(lanes) / 2))

    hook = model.blocks[-1].register_forward_hook(collect)
    try:
        yield states
    finally:
        hook.remove()


# ==== A CACHE THAT READS TREES ====================================================================
class TreeMemory(Memory):
    """A cache that reads a tree of guesses in one pass, and keeps the last hidden states."""

    def __init__(self, model: GPT, **options):
        super().__init__(model, **options)
        self.states = Row()  # [n, D], what the head multiplies

    def logits(self, tokens_BT: Tensor) -> Tensor:
        with last_states(self.model) as states:
            out = super().logits(tokens_BT)
        self.states.append(states[-1][0])
        return out

    def crop(self, length: int) -> None:
        super().crop(length)
        self.states.count = length

    def read_tree(self, tokens: list[int], parents: list[int]) -> Tensor:
        """Read nodes [N], the first behind the text, each other behind its parent; return [N, V].

        The cache holds all of them, until `keep` says which ones belong to the text.
        """
        n, before = len(tokens), self.tokens[0, self.used - 2 : self.used].tolist()
        self.make_room(torch.tensor([tokens]))
        depth, ancestors, tails = [0] * n, torch.eye(n, dtype=torch.bool), [[*before, tokens[0]]]
        for i, parent in enumerate(parents[1:], 1):
            depth[i] = depth[parent] + 1
            ancestors[i] |= ancestors[parent]
            tails.append([*tails[parent][1:], tokens[i]])
        self.tokens[:, self.used : self.used + n] = torch.tensor(tokens)
        at, earlier = self.read + torch.tensor(depth), min(self.used, self.window - 1)
        near = torch.arange(self.read - earlier, self.read) > (at - self.window)[:, None]
        self.mask, self.next_pass = torch.cat([near, ancestors], dim=1), 0
        x = self.model.embed(torch.tensor(tails))[:, -1][None]
        rope = tuple(table[at] for table in self.rope)
        with last_states(self.model) as states:
            out = self.model.from_embedded(x, rope, self.attention)[0]
        self.states.append(states[-1][0])
        self.read, self.used = self.read + n, self.used + n
        return out

    @torch.inference_mode()
    def keep(self, path: list[int], n: int) -> None:
        """Keep of the last n nodes those of the path, in its order."""
        chosen = torch.tensor(path)
        for row, dim, start in (
            (self.tokens, -1, self.used - n),
            (self.data, -2, self.used - n),
            (self.steps, -2, self.used - n),
            (self.states.room, -2, self.read - n),
        ):
            if row is not None:
                kept = row.index_select(dim, start + chosen)
                row.narrow(dim, start, len(path)).copy_(kept)
        self.read, self.used = self.read - n + len(path), self.used - n + len(path)
        self.states.count = self.read


class TreeSpeculation(Speculation):
    """Speculation over trees; it counts how often the guesses of each depth were right."""

    def __init__(
        self,
        memory: TreeMemory,
        prompt: Sequence[int],
        strategy: Strategy,
        rng: np.random.Generator,
        drafter: TreeDrafter,
        most: int,
    ):
        super().__init__(Reader(memory), prompt, strategy, rng, Silent(), most)
        self.memory, self.trees = memory, drafter
        self.tried, self.right = np.zeros(64, int), np.zeros(64, int)

    def round(self) -> list[GeneratedToken]:
        began = time.perf_counter()
        states = self.memory.states.held
        nodes = self.trees.propose(self.text, states, self.most) if self.memory.used > 1 else []
        self.stats.draft_seconds += time.perf_counter() - began
        tokens, rows, path = self.walk(nodes)
        self.trees.learn(rows, path)
        self.count(nodes, path)
        self.stats.tokens += len(tokens)
        self.stats.verifications += 1
        self.stats.drafted += len(nodes)
        self.stats.accepted += len(path) - 1
        self.stats.seconds += time.perf_counter() - began
        return tokens

    def walk(self, nodes: list[Node]) -> tuple[list[GeneratedToken], np.ndarray, list[int]]:
        """Draw tokens as long as they were guessed; return them, all logits, and the way taken."""
        exact = not nodes and self.exact == self.reader.length
        tokens, parents = [self.text[-1]], [-1]
        for node in nodes:
            tokens.append(node.token)
            parents.append(node.parent + 1)
        with torch.inference_mode():
            if nodes:
                logits = self.memory.read_tree(tokens, parents)
            else:
                logits = self.memory.logits(torch.tensor([tokens]))[0]
        rows, path, settled = logits.numpy().astype(np.float64), [0], []
        self.exact += exact
        while True:
            row, again = rows[path[-1]], False
            if len(self.text) > self.exact and self.is_close_call(row):
                self.memory.keep(path, len(tokens))
                row, again = self.read_again(), True
            token = draw(self.strategy.distribution(row, self.text), self.rng)
            self.text.append(token)
            settled.append(GeneratedToken(token, float(log_softmax(row)[token])))
            sons = [i for i, p in enumerate(parents) if p == path[-1] and tokens[i] == token]
            if again or not sons:
                break
            path.append(sons[0])
        if not again:
            self.memory.keep(path, len(tokens))
        return settled, rows, path

    def count(self, nodes: list[Node], path: list[int]) -> None:
        """Count the places that had a guess, by depth, as long as all before were right."""
        for depth, at in enumerate(path):
            self.tried[depth] += any(node.parent + 1 == at for node in nodes)
            self.right[depth] += depth + 1 < len(path)


class Silent:
    """A drafter that guesses nothing."""

    def follow(self, text: Sequence[int]) -> None: ...
    def propose(self, most: int) -> list:
        return []

    def learn(self, *_: object) -> None: ...


class Chain:
    """Guesses of a drafter that knows no trees, one behind the other."""

    def __init__(self, drafter: Drafter):
        self.drafter = drafter

    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        self.drafter.follow(text)
        return [Node(guess.token, i - 1) for i, guess in enumerate(self.drafter.propose(most))]

    def learn(self, rows: np.ndarray, path: list[int]) -> None:
        self.drafter.learn(len(path) - 1)


# ==== HEADS =======================================================================================
@torch.no_grad()
def hidden_states(model: GPT, tokens_BT: Tensor) -> Tensor:
    """Return what the head multiplies, [B, T, D]."""
    with last_states(model) as states:
        model.logits(tokens_BT)
    return states[-1]


class Medusa(nn.Module):
    """Heads that predict the second, third and fourth token after a state (arXiv 2401.10774).

    Each adds one matrix to the state, and the model's own embedding reads the sum.
    """

    def __init__(self, model: GPT):
        super().__init__()
        D = model.cfg.model_dim
        self.steps = nn.ModuleList(linear(D, D) for _ in range(MEDUSA_HEADS))
        for step in self.steps:
            nn.init.zeros_(step.weight)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """Return the state of each head."""
        return [normalised(hidden + F.silu(step(hidden))) for step in self.steps]

    def loss(self, model: GPT, tokens_BT: Tensor) -> Tensor:
        hidden, total = hidden_states(model, tokens_BT), 0.0
        for ahead, state in enumerate(self(hidden), 2):
            logits = model.head(state[:, :-ahead])
            total = total + F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, ahead:].flatten())
        return total / len(self.steps)


class Eagle(nn.Module):
    """One layer that predicts the next state from a state and the token after it (2401.15077).

    In training it reads its own predictions too, as it does in drafting, `UNROLLED` times.
    """

    UNROLLED = 3

    def __init__(self, model: GPT):
        super().__init__()
        cfg = model.cfg
        self.join, self.block = linear(2 * cfg.model_dim, cfg.model_dim), Block(cfg, 0)
        self.rope = model_rope(model, 1 << 14)

    def forward(self, hidden: Tensor, embedded: Tensor, rope: tuple, attention=attend) -> Tensor:
        """Return the predicted states [B, T, D]."""
        x = self.join(torch.cat([hidden, embedded], dim=-1))
        return normalised(self.block(x, x, x, rope, attention)[0])

    def loss(self, model: GPT, tokens_BT: Tensor) -> Tensor:
        hidden = hidden_states(model, tokens_BT)
        embedded, goal = normalised(model.tok_emb(tokens_BT[:, 1:-1])), hidden[:, 1:-1]
        rope = tuple(table[: embedded.size(1)] for table in self.rope)
        state, total = hidden[:, :-2], 0.0
        for _ in range(self.UNROLLED):
            out = self(state, embedded, rope)
            logits = model.head(out)
            nats = F.cross_entropy(logits.flatten(0, 1), tokens_BT[:, 2:].flatten())
            total = total + nats + F.mse_loss(out, goal)
            state = torch.cat([hidden[:, :1], out[:, :-1]], dim=1)
        return total / self.UNROLLED


class Hydra(nn.Module):
    """Two matrices that predict the next state from a state and the token after it, again and
    again (2402.05109): an EAGLE layer that reads no text but that.
    """

    UNROLLED = 3

    def __init__(self, model: GPT):
        super().__init__()
        D = model.cfg.model_dim
        self.join, self.out = linear(2 * D, 2 * D), linear(2 * D, D)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Return the predicted states."""
        joined = self.join(torch.cat([hidden, embedded], dim=-1))
        return normalised(hidden + self.out(F.relu(joined).square()))

    def loss(self, model: GPT, tokens_BT: Tensor) -> Tensor:
        embedded = normalised(model.tok_emb(tokens_BT))
        n, total = tokens_BT.size(1) - 1 - self.UNROLLED, 0.0
        state = hidden_states(model, tokens_BT)[:, :n]
        for after in range(1, 1 + self.UNROLLED):
            state = self(state, embedded[:, after : after + n])
            wanted = tokens_BT[:, after + 1 : after + 1 + n].flatten()
            total = total + F.cross_entropy(model.head(state).flatten(0, 1), wanted)
        return total / self.UNROLLED


def train_head(
    head: nn.Module, model: GPT, batches, steps: int, rate: float = 2e-3, on_step=None
) -> float:
    """Train a head on batches [B, T] while the model stays as it is; return the last mean loss."""
    model.requires_grad_(False)
    optimiser = torch.optim.AdamW(head.parameters(), lr=rate, betas=(0.9, 0.95))
    mean = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = head.loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        mean += (loss.item() - mean) / min(step + 1, 50)
        if on_step:
            on_step(mean)
    return mean


# ==== TREES OF GUESSES ============================================================================
def likeliest(logits: Tensor) -> tuple[list[int], list[float]]:
    """Return the BREADTH likeliest tokens and their probabilities."""
    p, tokens = logits.softmax(-1).topk(BREADTH)
    return tokens.tolist(), p.tolist()


class MedusaDrafter:
    """A tree of the likeliest combinations of what the heads predict for each place."""

    def __init__(self, head: Medusa, model: GPT):
        self.head, self.model = head, model

    @torch.inference_mode()
    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        places = [likeliest(row) for row in self.model.head(torch.stack(self.head(states[-1])))]
        # The best chance first; equal ones in the order in which they were found.
        nodes: list[Node] = []
        waiting = [
            (-p, i, -1, 0, token) for i, (token, p) in enumerate(zip(*places[0], strict=True))
        ]
        heapq.heapify(waiting)
        found = len(waiting)
        while waiting and len(nodes) < most and -waiting[0][0] >= LEAST:
            chance, _, parent, depth, token = heapq.heappop(waiting)
            nodes.append(Node(token, parent))
            if depth + 1 < len(places):
                for son, p in zip(*places[depth + 1], strict=True):
                    heapq.heappush(waiting, (chance * p, found, len(nodes) - 1, depth + 1, son))
                    found += 1
        return nodes

    def learn(self, rows: np.ndarray, path: list[int]) -> None: ...


class EagleDrafter:
    """A chain of the likeliest tokens, and at each place of it the next likely ones beside it."""

    def __init__(self, head: Eagle, model: GPT):
        self.head, self.model = head, model
        self.cache, self.read = Row(), 0  # keys and values of states of the text

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the cache and the piece, which the cache takes in."""
        self.cache.append(torch.stack([k[0], v[0]]))
        keys, values = self.cache.held[:, None]
        T, n = q.size(2), self.cache.count
        mask = torch.arange(n) <= torch.arange(n - T, n)[:, None] if T > 1 else None
        gqa = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=gqa)

    def predicted(self, states: Tensor, tokens: Sequence[int]) -> Tensor:
        """Read states [T, D], each with the token after it; return the last predicted state."""
        at = self.cache.count
        rope = tuple(table[at : at + len(tokens)] for table in self.head.rope)
        embedded = normalised(self.model.tok_emb(torch.tensor(tokens)))
        return self.head(states[None], embedded[None], rope, self.attention)[0, -1]

    @torch.inference_mode()
    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        self.cache.count = self.read  # forget what was read ahead
        state = self.predicted(states[self.read :], text[self.read + 1 :])
        self.read = len(states)
        nodes: list[Node] = []
        parent, chance = -1, 1.0
        while len(nodes) < most:
            tokens, p = likeliest(self.model.head(state))
            likely = [token for token, q in zip(tokens, p, strict=True) if chance * q >= LEAST]
            nodes += [Node(token, parent) for token in likely[: most - len(nodes)]]
            if not likely or len(nodes) >= most:
                break
            parent, chance = len(nodes) - len(likely), chance * p[0]
            state = self.predicted(state[None], likely[:1])
        return nodes

    def learn(self, rows: np.ndarray, path: list[int]) -> None: ...


class HydraDrafter:
    """A chain of the likeliest tokens with others beside them, of the commonest pieces only.

    A pass of MOST_ROWS tokens costs little more than one of two, and one of more tokens much more:
    so many are guessed, or none.
    """

    def __init__(self, head: Hydra, model: GPT, pieces: Tensor):
        self.head, self.model, self.pieces = head, model, pieces
        self.rows = model.tok_emb.weight[pieces].detach()
        for_few_rows(head)

    def predicted(self, state: Tensor) -> tuple[list[int], list[float]]:
        """Return the likeliest tokens of a state and their probabilities."""
        cap = self.model.cfg.logit_softcap
        places, p = likeliest(cap * torch.tanh(multiplied(state, self.rows) / cap))
        return self.pieces[places].tolist(), p

    @torch.inference_mode()
    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        state, token, most = states[-1], text[-1], min(most, MOST_ROWS - 1)
        nodes: list[Node] = []
        parent = -1
        while len(nodes) < most:
            state = self.head(state, normalised(self.model.tok_emb.weight[token]))
            tokens, p = self.predicted(state)
            if p[0] < LEAST and not nodes:
                break
            # One beside the first is worth its place if it is likelier than one behind the first.
            count = 1 + sum(q >= p[0] ** 2 for q in p[1:])
            parent, first = len(nodes), parent
            nodes += [Node(t, first) for t in tokens[: min(count, most - len(nodes))]]
            token = tokens[0]
        return nodes

    def learn(self, rows: np.ndarray, path: list[int]) -> None: ...


# ==== WITHOUT A HEAD ==============================================================================
class Jacobi:
    """Guess what the model itself last predicted for the places ahead (Jacobi decoding), and what
    such predictions were after the last token before (a pool of n-grams, as in Lookahead,
    arXiv 2402.02057).
    """

    AHEAD = 4

    def __init__(self) -> None:
        self.ahead: list[int] = []
        self.pool: dict[int, list[int]] = {}  # token → what was predicted after it

    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        guesses = self.pool.get(text[-1], [])[:most] or self.ahead[:most]
        return [Node(token, i - 1) for i, token in enumerate(guesses)]

    def learn(self, rows: np.ndarray, path: list[int]) -> None:
        best = rows.argmax(-1).tolist()
        line = best[path[-1] :]  # what follows the last right token, and guesses behind it
        self.ahead = (line[1:] + line[-1:] * self.AHEAD)[: self.AHEAD]
        if len(line) > 1:
            self.pool[line[0]] = line[1 : 1 + self.AHEAD]


class Cascade:
    """Ask the first drafter; where it guesses nothing, the second."""

    def __init__(self, first: TreeDrafter, second: TreeDrafter):
        self.both, self.asked = (first, second), first

    def propose(self, text: Sequence[int], states: Tensor, most: int) -> list[Node]:
        for drafter in self.both:
            self.asked = drafter
            if nodes := drafter.propose(text, states, most):
                return nodes
        return []

    def learn(self, rows: np.ndarray, path: list[int]) -> None:
        self.asked.learn(rows, path)
