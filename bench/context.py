"""Measure attention policies in contexts longer than training: cost, memory, BPB and recall.

    python bench/context.py --recall-data out/recall --data DATA
    DATA_PATH=out/recall TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=8192 python train_gpt.py
    python bench/context.py --artifact final_model.int6.ptz --data out/recall
    python bench/context.py --table --into docs/RESULTS.md --picture docs/context.svg

A policy says what each pass through a layer keeps and reads of the text before; they are those of
bench/attention.py. All read the same validation text, a stream at a time, in pieces of 128 tokens.

- Cost: milliseconds of one more token after so many, and bytes that are kept for them.
- BPB by context: of the tokens between half of a context length and the whole.
- Recall: a name of six pieces is put into the text; its first two come again so many tokens later.
  How many of the next four are the likeliest piece? The same after a name that was never told is
  chance.

--recall-data writes training shards in which names come again and again in every second sequence,
because in web text they do so too rarely for a model of a few minutes to learn it. Heads are
classified (DuoAttention) on such sequences of training text, never on the text that is scored.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from attention import (
    FIRST,
    PAGE,
    ByHead,
    Everything,
    Pages,
    PolicyEngine,
    Rounded4,
    Rounded8,
    Split,
    Window,
    attend_where,
)
from measured import add_result_options, publish
from pictures import label, svg

from fairway.artifact_reader import read_artifact
from fairway.command_line import Parser, check_writable, progress_bar, run_reporting
from fairway.scoring.memory import Memory
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import Text, load_text
from fairway.shards import write_shard
from train_gpt import (
    GPT,
    TokenStream,
    UserError,
    attend,
    build_model,
    list_shards,
    read_shard,
    replacing,
)

PIECE = 128  # tokens read at once
REFERENCE = "all, NTK"
LONGEST = 8192
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
DISTANCES = (128, 256, 512, 1024, 2048, 4096, 7680)
LETTERS = 300  # pieces up to this one are controls, bytes and letters; names have none of them
ALPHABET = 64  # pieces that names are made of: from more, a model of minutes learns no recall
EVERY = 2  # one training sequence of so many has names
NAME, CUE = 6, 2  # pieces of a name, and how many of them come again before it is asked for
SETTLE, TIMED = 8, 33  # tokens of each context whose time is not counted, and is
GATE_STEPS, GATE_RATE, GATE_PRICE = 120, 0.05, 0.02  # of the classification of heads
SHORT = 256  # tokens of the shorter window
RESULTS = Path(__file__).with_name("results") / "context"


# ==== POLICIES ====================================================================================
class Variant(NamedTuple):
    """A policy for every pass: `make(engine, pass, heads)`, and whether RoPE is stretched."""

    about: str
    make: Callable[[PolicyEngine, int, list[list[bool]]], Any]
    stretched: bool = True


def window(size: int, first: int = 0, full: tuple[int, ...] = ()) -> Callable:
    """Return a policy of windows, with everything in the passes `full`; -1 is the last one."""

    def make(engine: PolicyEngine, nth: int, _heads: list) -> Any:
        whole = nth in [n % engine.passes for n in full]
        return Everything() if whole else Window(size, first, engine.turn)

    return make


def by_head(share: float) -> Callable:
    """Return the policy that keeps everything for this share of the heads of keys."""

    def make(engine: PolicyEngine, nth: int, heads: list[list[float]]) -> Any:
        ranked = sorted(
            (-gate, i, j) for i, gates in enumerate(heads) for j, gate in enumerate(gates)
        )
        best = {(i, j) for _, i, j in ranked[: round(share * len(ranked))]}
        kinds = [(nth, j) in best for j in range(len(heads[nth]))]
        return ByHead(kinds, Window(SHORT, FIRST, engine.turn))

    return make


def same(policy: Callable[[], Any]) -> Callable:
    return lambda _engine, _nth, _heads: policy()


VARIANTS = {
    "all": Variant("everything, RoPE as trained", same(Everything), stretched=False),
    "all, NTK": Variant("everything, RoPE slowed by NTK scaling", same(Everything)),
    "split": Variant("the same in chunks of 512 keys (split-K)", same(lambda: Split(512))),
    "window 1024": Variant("1,024 tokens in all layers", window(1024), stretched=False),
    "window 256": Variant("256 tokens in all layers", window(SHORT), stretched=False),
    "window 256 + 4": Variant("and the first four", window(SHORT, FIRST), stretched=False),
    "all but one layer": Variant("windows of 256, all in the last layer", window(SHORT, 0, (-1,))),
    "all but two layers": Variant(
        "windows of 256, all in the second and the last layer", window(SHORT, 0, (1, -1))
    ),
    "quarter of heads": Variant("a quarter of the heads keeps everything", by_head(0.25)),
    "half of heads": Variant("half of the heads keeps everything", by_head(0.5)),
    "4 pages": Variant(f"own page and 4 others of {PAGE} tokens", same(lambda: Pages(4))),
    "16 pages": Variant(f"own page and 16 others of {PAGE} tokens", same(lambda: Pages(16))),
    "int8": Variant("8 bits, steps by token", same(Rounded8)),
    "int4 by token": Variant("4 bits, steps by token", same(lambda: Rounded4(False))),
    "int4 by channel": Variant("4 bits, steps of keys by channel", same(lambda: Rounded4(True))),
}


def engine_of(model: GPT, variant: Variant, heads: list[list[float]]) -> PolicyEngine:
    """Return an engine that has read nothing, with one policy a pass."""
    stretch = LONGEST / model.cfg.train_seq_len if variant.stretched else 1.0
    engine = PolicyEngine(model, LONGEST + PIECE, max(1.0, stretch))
    engine.policies = [variant.make(engine, nth, heads) for nth in range(engine.passes)]
    return engine


def read_all(engine: PolicyEngine, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Read tokens in pieces; return nats and likeliest piece of each token after the first."""
    nats, best = [], []
    row = torch.from_numpy(tokens[None].astype(np.int64))
    for piece, after in zip(row.split(PIECE, dim=1), row[:, 1:].split(PIECE, dim=1), strict=False):
        logits = engine.logits(piece)[0, : after.size(1)]
        nats.append(F.cross_entropy(logits, after[0], reduction="none"))
        best.append(logits.argmax(-1))
    return torch.cat(nats).double().numpy(), torch.cat(best).numpy()


# ==== NAMES =======================================================================================
def alphabet(V: int) -> np.ndarray:
    """Return the pieces that names are made of, evenly spaced in a vocabulary of V."""
    pieces = np.arange(LETTERS + 1, V)
    if len(pieces) < 2 * NAME:
        raise UserError(
            f"the vocabulary has {V} pieces; names need {2 * NAME} above piece {LETTERS}, so take "
            "a larger one"
        )
    return pieces[:: max(1, len(pieces) // ALPHABET)][:ALPHABET]


def names_of(rng: np.random.Generator, count: int, pool: np.ndarray) -> np.ndarray:
    """Return names [count, NAME], each of different pieces."""
    return np.stack([rng.choice(pool, NAME, replace=False) for _ in range(count)])


def with_names(
    text: np.ndarray, names: np.ndarray, places: list[int], asked: np.ndarray
) -> np.ndarray:
    """Put names into a text at these places, and those that are asked for at its end."""
    text = text.copy()
    for name, place in zip(names, places, strict=True):
        text[place : place + NAME] = name
    questions = asked.flatten()
    text[len(text) - len(questions) :] = questions
    return text


def recall_sequence(rng: np.random.Generator, text: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Return a text half of which is names that come again and again.

    They are 2 to 32: few come again soon, from which recall is learnt, many come again late.
    """
    names, text = names_of(rng, 2 ** int(rng.integers(1, 6)), pool), text.copy()
    places = rng.permutation(len(text) // NAME - 1)[: len(text) // NAME // 2] * NAME + 1
    for place in places:
        text[place : place + NAME] = names[rng.integers(len(names))]
    return text


def vocabulary_of(folder: Path) -> int:
    """Return the number of pieces of a folder's tokenizer."""
    path = folder / "tokenizer.model"
    if not path.is_file():
        raise UserError(f"no {path}; name a folder that has the tokenizer of its shards")
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def write_recall_data(source: Path, out: Path, length: int) -> None:
    """Write training shards with names in some sequences, and the validation shards."""
    train = list_shards(source / "*_train_*.bin")
    if not train:
        raise UserError(f"no *_train_*.bin in {source}; run `make data`, or name another --data")
    tokens = np.concatenate([read_shard(path) for path in train])
    rng, pool = np.random.default_rng(0), alphabet(vocabulary_of(source))
    sequences = [tokens[at : at + length] for at in range(0, len(tokens) - length, length)]
    for nth in range(0, len(sequences), EVERY):
        sequences[nth] = recall_sequence(rng, sequences[nth], pool)
    out.mkdir(parents=True, exist_ok=True)
    write_shard(out / "recall_train_000000.bin", np.concatenate(sequences).astype(np.uint16))
    for path in [*list_shards(source / "*_val_*.bin"), source / "tokenizer.model"]:
        shutil.copyfile(path, out / path.name)
    print(f"{out}: {len(sequences)} sequences of {length} tokens, names in one of {EVERY}")


# ==== HEADS =======================================================================================
def gated_attention(gates: torch.Tensor, mask: torch.Tensor) -> Callable:
    """Return attention that mixes everything and a window, a gate a head of keys and pass."""
    passes = iter(gates)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        gate = next(passes).repeat_interleave(q.size(1) // k.size(1))[None, :, None, None]
        return gate * attend(q, k, v) + (1 - gate) * attend_where(q[0], k[0], v[0], mask)[None]

    return attention


def classify_heads(model: GPT, train: np.ndarray) -> list[list[float]]:
    """Return a gate for each head of keys of each pass: how much recall needs all of the text.

    Gates begin at one and pay for staying open, against the change of the logits in the second half
    of sequences with names (DuoAttention, 2410.10819). The model stays as it is.
    """
    length, passes = model.cfg.train_seq_len, len(model.passes(model.looping))
    rng, pool = np.random.default_rng(1), alphabet(model.cfg.vocab_size)
    gates = torch.ones(passes, model.cfg.num_kv_heads, requires_grad=True)
    optimiser = torch.optim.Adam([gates], lr=GATE_RATE)
    at, key = torch.arange(length)[:, None], torch.arange(length)
    mask = (key <= at) & ((key > at - min(SHORT, length // 4)) | (key < FIRST))
    rope = model.cos[:length], model.sin[:length]
    for _ in range(GATE_STEPS):
        start = int(rng.integers(len(train) - length))
        text = recall_sequence(rng, train[start : start + length], pool)
        tokens = torch.from_numpy(text[None].astype(np.int64))
        with torch.no_grad():
            x = model.embed(tokens)
            exact = model.from_embedded(x, rope)[0, length // 2 :]
        logits = model.from_embedded(x, rope, gated_attention(gates.clamp(0, 1), mask))
        change = F.mse_loss(logits[0, length // 2 :], exact)
        (change + GATE_PRICE * gates.clamp(0, 1).mean()).backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            gates.clamp_(0, 1)
    return gates.tolist()


# ==== MEASUREMENTS ================================================================================
def streams_of(tokens: np.ndarray, count: int) -> list[int]:
    """Return where streams of LONGEST tokens begin, spread over the text."""
    if len(tokens) < LONGEST + 1:
        raise UserError(f"the text has {len(tokens)} tokens; --data needs {LONGEST + 1} or more")
    return [int(at) for at in np.linspace(0, len(tokens) - LONGEST - 1, count)]


def bits_by_context(
    model: GPT, variant: Variant, heads: list, text: Text, starts: list[int]
) -> tuple[list[float], np.ndarray]:
    """Return BPB of the tokens between half of each context and the whole, and the likeliest
    tokens in the second half of the longest context.
    """
    bits, sizes, best = np.zeros(len(CONTEXTS)), np.zeros(len(CONTEXTS)), []
    for start in starts:
        tokens = np.asarray(text.tokens[start : start + LONGEST + 1])
        nats, likeliest = read_all(engine_of(model, variant, heads), tokens)
        best.append(likeliest[LONGEST // 2 :])
        for i, context in enumerate(CONTEXTS):
            part = slice(context // 2, context)
            bits[i] += nats[part].sum() / math.log(2)
            sizes[i] += text.sizes[start : start + LONGEST][part].sum()
    return (bits / sizes).tolist(), np.concatenate(best)


def recall_by_distance(
    model: GPT, variant: Variant, heads: list, text: Text, starts: list[int], told: bool = True
) -> list[float]:
    """Return the share of pieces recalled at each distance; not told, what chance would recall."""
    rng, pool = np.random.default_rng(2), alphabet(model.cfg.vocab_size)
    right = np.zeros(len(DISTANCES))
    for start in starts:
        tokens = np.asarray(text.tokens[start : start + LONGEST])
        names, order = names_of(rng, len(DISTANCES), pool), rng.permutation(len(DISTANCES))
        first = LONGEST - NAME * len(DISTANCES)  # where the first name is asked for
        where = {int(nth): first + NAME * i for i, nth in enumerate(order)}
        places = [where[i] - distance for i, distance in enumerate(DISTANCES)]
        told_names = names if told else names_of(rng, len(DISTANCES), pool)
        tokens = with_names(tokens, told_names, places, names[order])
        _, best = read_all(engine_of(model, variant, heads), tokens)
        for i, at in where.items():
            asked = slice(at + CUE, at + NAME)
            right[i] += np.mean(best[at + CUE - 1 : at + NAME - 1] == tokens[asked])
    return (right / len(starts)).tolist()


def costs(model: GPT, heads: list, text: Text, bar: Any) -> dict[str, list[dict]]:
    """Return milliseconds of a token and bytes kept, by policy and context.

    At each context all policies read one token in turn, so that a slow spell of the machine slows
    all of them alike.
    """
    rows: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    tokens = torch.from_numpy(np.asarray(text.tokens[: LONGEST + PIECE]).astype(np.int64))[None]
    for context in CONTEXTS:
        engines = {name: engine_of(model, v, heads) for name, v in VARIANTS.items()}
        for engine in engines.values():
            for piece in tokens[:, : context - SETTLE - TIMED].split(PIECE, dim=1):
                engine.logits(piece)
        times: dict[str, list[float]] = {name: [] for name in engines}
        for at in range(context - SETTLE - TIMED, context):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.logits(tokens[:, at : at + 1])
                times[name].append(time.perf_counter() - began)
        for name, engine in engines.items():
            low, middle, high = statistics.quantiles(times[name][SETTLE:], n=4)
            ms = dict(median=1e3 * middle, low=1e3 * low, high=1e3 * high)
            rows[name].append(dict(context=context, ms=ms, bytes=engine.bytes))
        bar.update(1)
    return rows


def prefix_reuse(model: GPT, text: Text, rounds: int = 20) -> dict[str, float]:
    """Return the milliseconds of a prompt whose first 1,024 tokens a cache holds, and does not."""
    tokens = torch.from_numpy(np.asarray(text.tokens[: 1024 + 16]).astype(np.int64))[None]
    again, afresh = [], []
    memory = Memory(model, window=2048)
    with torch.inference_mode():
        for piece in tokens[:, :1024].split(PIECE, dim=1):
            memory.logits(piece)
        for _ in range(rounds):
            began = time.perf_counter()
            memory.logits(tokens[:, 1024:])
            memory.crop(1024)
            again.append(time.perf_counter() - began)
            began, other = time.perf_counter(), Memory(model, window=2048)
            for piece in tokens.split(PIECE, dim=1):
                other.logits(piece)
            afresh.append(time.perf_counter() - began)
    return dict(again=1e3 * statistics.median(again), afresh=1e3 * statistics.median(afresh))


def as_a_draft(agree: float, cost: float) -> float:
    """Return how many times as fast a policy could make a text if it drafted for all tokens.

    It guesses n tokens at `cost` each, and one pass that costs as much as a token verifies them:
    no real pass is cheaper. A share `agree` of its guesses is right (TriForce, 2404.11912).
    """
    return max(sum(agree**i for i in range(n + 1)) / (n * cost + 1) for n in range(1, 17))


def measure(options: Any) -> dict[str, Any]:
    """Return everything that the table and the picture show, of one model."""
    torch.set_num_threads(options.threads)
    artifact = read_artifact(options.artifact)
    model, V = build_model(artifact, "cpu").eval(), artifact.config.vocab_size
    text = load_text(EvalConfig(data_path=str(options.data)), artifact)
    shards = [read_shard(p, V) for p in list_shards(options.data / "*_train_*.bin")]
    train = TokenStream(shards).peek(min(1 << 20, sum(map(len, shards))))
    starts = streams_of(text.tokens, options.streams)
    with progress_bar(len(CONTEXTS) + 2 * len(VARIANTS) + 1, "measuring", "step") as bar:
        gates = classify_heads(model, train)
        spent, rows, best = costs(model, gates, text, bar), {}, {}
        for name, variant in VARIANTS.items():
            rows[name] = dict(about=variant.about, cost=spent[name])
            rows[name]["bpb"], best[name] = bits_by_context(model, variant, gates, text, starts)
            bar.update(1)
            rows[name]["recall"] = recall_by_distance(model, variant, gates, text, starts)
            bar.update(1)
        for name, row in rows.items():
            ms = row["cost"][-1]["ms"]["median"] / spent[REFERENCE][-1]["ms"]["median"]
            row["agree"] = float(np.mean(best[name] == best[REFERENCE]))
            row["as_a_draft"] = as_a_draft(row["agree"], ms)
        chance = recall_by_distance(model, VARIANTS["all"], gates, text, starts, told=False)
    cfg = artifact.config
    shape = dict(layers=cfg.num_layers, width=cfg.model_dim, heads=cfg.num_kv_heads)
    shape |= dict(vocabulary=V, trained_on=cfg.train_seq_len)
    shape["weights"] = sum(p.numel() for p in model.parameters())
    found = dict(model=shape, threads=options.threads, text=options.data.name)
    found |= dict(streams=len(starts), gates=gates, chance=chance)
    found["prefix"] = prefix_reuse(model, text)
    return found | dict(contexts=CONTEXTS, distances=DISTANCES, policies=rows)


# ==== TABLE AND PICTURE ===========================================================================
def table(found: dict[str, Any]) -> str:
    """Return the section of a page: what was measured, and a line for each policy."""
    shape, contexts, distances = found["model"], found["contexts"], found["distances"]
    costs_at, bpb_at, recall_at = (256, 2048, 8192), (256, 1024, 2048, 8192), (128, 512, 2048, 7680)
    heads = [
        "policy",
        *(f"ms at {c:,}" for c in costs_at),
        "MB at 8,192",
        *(f"BPB to {c:,}" for c in bpb_at),
        *(f"recall {d:,} back" for d in recall_at),
        "same choice",
        "as a draft, at most",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, row in found["policies"].items():
        cost = {c["context"]: c for c in row["cost"]}
        bpb = dict(zip(contexts, row["bpb"], strict=True))
        recall = dict(zip(distances, row["recall"], strict=True))
        cells = [f"{cost[c]['ms']['median']:.2f}" for c in costs_at]
        cells += [f"{cost[8192]['bytes'] / 1e6:.2f}", *(f"{bpb[c]:.4f}" for c in bpb_at)]
        cells += [f"{recall[d]:.0%}" for d in recall_at]
        cells += [f"{row['agree']:.1%}", f"{row['as_a_draft']:.2f}"]
        lines.append(f"| {name}: {row['about']} | {' | '.join(cells)} |")
    chance = dict(zip(distances, found["chance"], strict=True))
    cells = ["", *("" for _ in costs_at), *("" for _ in bpb_at)]
    cells += [*(f"{chance[d]:.0%}" for d in recall_at), "", ""]
    lines.append(f"| names that were never told | {' | '.join(cells)} |")
    about = (
        f"A model of {shape['weights']:,} weights ({shape['layers']} layers of {shape['width']}, "
        f"{shape['heads']} heads of keys), trained on sequences of {shape['trained_on']:,} tokens, "
        f"one in {EVERY} with names; {found['threads']} thread(s), float32. BPB to n is that of "
        "the tokens between n/2 and n tokens after the start of a stream, over "
        f"{found['streams']} streams; recall is the share of four pieces of a name that are the "
        "likeliest ones, so many tokens after it was told. Milliseconds are medians; all policies "
        "take turns token by token. *Same choice* "
        f"is the share of tokens from 4,096 on whose likeliest piece is that of `{REFERENCE}`, and "
        "*as a draft* the most that such a policy could speed up its greedy text (TriForce). A "
        "prompt of 1,040 tokens whose first 1,024 a cache holds takes "
        f"{found['prefix']['again']:.1f} ms, without the cache {found['prefix']['afresh']:.1f}."
    )
    return f"{about}\n\n" + "\n".join(lines) + "\n"


DRAWN = {  # policies of the picture, with the class of their line
    "all": "#59636e",
    "all, NTK": "#0969da",
    "window 1024": "#cf222e",
    "window 256": "#9a6700",
    "all but one layer": "#8250df",
    "16 pages": "#1a7f37",
}
PANEL, GAP, TOP, HIGH, LEFT = 270, 56, 96, 220, 56


def panel(
    left: float, title: str, at: list[int], lines: dict[str, list[float]], digits: int
) -> list[str]:
    """Draw one panel: numbers over contexts or distances, a line for each policy."""
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    span, first, last = max(high - low, 1e-9), math.log2(at[0]), math.log2(at[-1])
    parts = [label(left, TOP - 14, title, 12, "", "start")]
    for i in range(3):
        y, value = TOP + HIGH * (1 - i / 2), low + span * i / 2
        ends = f'x1="{left:g}" y1="{y:g}" x2="{left + PANEL:g}" y2="{y:g}"'
        parts.append(f'<line {ends} class="grid"/>')
        parts.append(label(left - 6, y + 4, f"{value:.{digits}f}", 10, "soft", "end"))
    for n in at:
        x = left + PANEL * (math.log2(n) - first) / (last - first)
        parts.append(label(x, TOP + HIGH + 18, f"{n:,}", 10, "soft"))
    for name, values in lines.items():
        points = " ".join(
            f"{left + PANEL * (math.log2(n) - first) / (last - first):.1f},"
            f"{TOP + HIGH * (1 - (value - low) / span):.1f}"
            for n, value in zip(at, values, strict=True)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{DRAWN[name]}" stroke-width="2"/>'
        )
    return parts


def picture(found: dict[str, Any]) -> str:
    """Return an SVG of three panels: milliseconds, BPB and recall."""
    rows = {name: found["policies"][name] for name in DRAWN}
    head = "What a layer keeps of the text before: cost, BPB and recall"
    parts = [label(16, 26, head, 14, "", "start")]
    for i, name in enumerate(DRAWN):
        x = 16 + i * 160
        ends = f'x1="{x}" y1="50" x2="{x + 22}" y2="50"'
        parts.append(f'<line {ends} stroke="{DRAWN[name]}" stroke-width="2"/>')
        parts.append(label(x + 28, 54, name, 11, "soft", "start"))
    times = {n: [c["ms"]["median"] for c in row["cost"]] for n, row in rows.items()}
    series = (
        ("milliseconds a token, by context", found["contexts"], times, 1),
        ("BPB, by context", found["contexts"], {n: row["bpb"] for n, row in rows.items()}, 2),
        (
            "share recalled, by distance",
            found["distances"],
            {n: r["recall"] for n, r in rows.items()},
            1,
        ),
    )
    for i, (title, at, lines, digits) in enumerate(series):
        parts += panel(LEFT + i * (PANEL + GAP), title, list(at), lines, digits)
    return svg(LEFT + 3 * (PANEL + GAP), TOP + HIGH + 40, head, parts)


# ==== COMMAND =====================================================================================
def options_parser() -> Parser:
    parser = Parser(prog="bench/context.py", description=__doc__)
    add = parser.add_argument
    add("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    add("--data", type=Path, default=Path("data/embedded"), help="shards (default: %(default)s)")
    add("--streams", type=int, default=12, metavar="N", help="default: %(default)s")
    add("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--recall-data", type=Path, metavar="DIR", help="write training shards with names, and end")
    add("--length", type=int, default=1024, help="of their sequences (default: %(default)s)")
    add_result_options(parser, RESULTS / "context.json")
    add("--picture", type=Path, metavar="FILE", help="draw an SVG")
    return parser


def run() -> int:
    """Measure or read, then print and write what was asked for; return the exit code."""
    options = options_parser().parse_args()
    if options.recall_data:
        write_recall_data(options.data, options.recall_data, options.length)
        return 0
    check_writable("--picture", options.picture)
    found = publish(options, "context", measure, table)
    if options.picture:
        with replacing(options.picture) as f:
            f.write(picture(found).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/context.py", run))
