"""Train drafters with heads, and measure every drafter: acceptance, speed, and that texts stay.

    python bench/drafts.py --artifact final_model.int6.ptz --data data/embedded
    python bench/drafts.py --table --into docs/RESULTS.md

One artifact, one thread. Heads (Medusa, EAGLE) are trained here on training shards and on text of
the model's own, and kept in --heads. Then each drafter writes after four kinds of prompt, greedily
and by top-p, in turn with plain decoding, so that a busy machine slows both: read the ratios.

- Roof: what a pass of k tokens costs in passes of one. With all guesses right, drafting is k over
  that times as fast. The challenge's shape of 27 M, with random weights, is beside it, and both
  without the products of few rows (fairway/scoring/few_rows.py).
- Acceptance by place: of the places where the first (second, …) token was guessed, how many were
  right, given that all before were.
- Equal texts: greedy texts after --prompts beginnings of documents, with each drafter and without.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from heads import (
    Cascade,
    Chain,
    Eagle,
    EagleDrafter,
    Hydra,
    HydraDrafter,
    Jacobi,
    Medusa,
    MedusaDrafter,
    TreeMemory,
    TreeSpeculation,
    train_head,
)
from measured import add_result_options, publish

from fairway.command_line import Parser, progress_bar, run_reporting
from fairway.decoding.drafters import NGramDrafter, SuffixDrafter
from fairway.decoding.reader import Reader, decode_plainly
from fairway.decoding.strategies import Strategy
from fairway.decoding.writing import Writer
from fairway.scoring import few_rows
from fairway.scoring.memory import Memory
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_text
from train_gpt import (
    GPT,
    PRESETS,
    Config,
    TokenStream,
    UserError,
    document_bounds,
    initialise,
    list_shards,
    read_shard,
    replacing,
)

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens a pass
PROMPT, REPEATED, MOST = 64, 24, 8
PROMPTS_A_KIND = 4
STRATEGIES = {
    "greedy": Strategy("greedy"),
    "sampled": Strategy("top-p", temperature=0.8, top_p=0.95),
}
BATCH, LENGTH = 4, 256  # of the training of heads
OWN_TEXTS, OWN_LENGTH = 32, 256  # of the model's own text
STEPS = {"medusa": 120, "eagle": 240, "hydra": 1200}
COMMONEST = 1024  # pieces that Hydra guesses from
LISTS = (
    "Name, year, place\nAdams, 1797, Philadelphia\nJefferson, 1801, Washington\n",
    "1. The first article.\n2. The second article.\n3. The third article.\n",
    "def add(a, b):\n    return a + b\n\ndef subtract(a, b):\n    return a - b\n\ndef ",
    "- United States: 1776\n- France: 1789\n- Belgium: 1830\n- Italy: 1861\n- ",
)
RESULTS = Path(__file__).with_name("results") / "drafts"


# ==== HEADS =======================================================================================
@torch.inference_mode()
def own_text(model: GPT, starts: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Let the model go on from the starts [B, T] by sampling, to OWN_LENGTH tokens each."""
    memory, rng = Memory(model, longest=OWN_LENGTH), torch.Generator().manual_seed(seed)
    tokens, logits = starts, memory.logits(starts)[:, -1]
    while tokens.size(1) < OWN_LENGTH:
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=rng)
        tokens, logits = torch.cat([tokens, drawn], dim=1), memory.logits(drawn)[:, -1]
    return tokens


def batches(train: np.ndarray, own: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield [BATCH, LENGTH]: three quarters training text, a quarter the model's own."""
    rng, texts = np.random.default_rng(0), own[:, :LENGTH]
    while True:
        starts = rng.integers(0, len(train) - LENGTH, BATCH * 3 // 4)
        rows = np.stack([train[at : at + LENGTH] for at in starts])
        some = texts[rng.integers(0, len(texts), BATCH - len(starts))]
        yield torch.cat([torch.from_numpy(rows), some])


def trained_heads(model: GPT, train: np.ndarray, folder: Path) -> dict[str, Any]:
    """Return the heads by name; train those that the folder lacks, and keep them there."""
    made: dict[str, Any] = {"medusa": Medusa, "eagle": Eagle, "hydra": Hydra}
    heads, own = {}, None
    for name, kind in made.items():
        torch.manual_seed(0)
        path, head = folder / f"{name}.pt", kind(model)
        if path.is_file():
            head.load_state_dict(torch.load(path, weights_only=True))
        else:
            if own is None:
                starts = np.random.default_rng(1).integers(0, len(train) - 8, OWN_TEXTS)
                own = own_text(
                    model, torch.stack([torch.from_numpy(train[a : a + 8]) for a in starts])
                )
            with progress_bar(STEPS[name], f"training {name}", "step") as bar:
                loss = train_head(
                    head, model, batches(train, own), STEPS[name], on_step=lambda _: bar.update(1)
                )
            print(f"{name}: {sum(p.numel() for p in head.parameters()):,} weights, loss {loss:.3f}")
            with replacing(path) as f:
                torch.save(head.state_dict(), f)
        heads[name] = head.eval()
    return heads


# ==== DRAFTERS ====================================================================================
def commonest(train: np.ndarray) -> torch.Tensor:
    """Return the COMMONEST pieces of a text, the commonest first."""
    order = np.argsort(-np.bincount(train), kind="stable")[:COMMONEST]
    return torch.from_numpy(order.copy())


def drafters(
    model: GPT, heads: dict[str, Any], pieces: torch.Tensor
) -> dict[str, Callable[[], Any]]:
    """Return a maker of each drafter by name."""

    def ngram() -> Chain:
        return Chain(NGramDrafter())

    def suffix() -> Chain:
        return Chain(SuffixDrafter())

    def medusa() -> MedusaDrafter:
        return MedusaDrafter(heads["medusa"], model)

    def eagle() -> EagleDrafter:
        return EagleDrafter(heads["eagle"], model)

    def hydra() -> HydraDrafter:
        return HydraDrafter(heads["hydra"], model, pieces)

    return {
        "n-gram": ngram,
        "suffix": suffix,
        "Jacobi": Jacobi,
        "Medusa": medusa,
        "EAGLE": eagle,
        "Hydra": hydra,
        "suffix, then EAGLE": lambda: Cascade(suffix(), eagle()),
        "n-gram, then Medusa": lambda: Cascade(ngram(), medusa()),
        "suffix, then Hydra": lambda: Cascade(suffix(), hydra()),
    }


# ==== MEASUREMENTS ================================================================================
def width_costs(model: GPT, rounds: int, before: int = 128) -> dict[str, dict[str, float]]:
    """Return the median cost of a pass of k tokens after `before`, in passes of one: as it is, and
    with F.linear for all products; both in turn.
    """
    memory, rng = Memory(model, longest=before + 32), np.random.default_rng(0)
    tokens = torch.from_numpy(rng.integers(2, model.cfg.vocab_size, (1, before + 16)))
    ways, most = {"": few_rows.MOST_ROWS, ", F.linear": 0}, few_rows.MOST_ROWS
    seconds: dict[Any, list[float]] = {(way, width): [] for way in ways for width in WIDTHS}
    with torch.inference_mode():
        memory.logits(tokens[:, :before])
        for _ in range(rounds):
            for way, width in seconds:
                few_rows.MOST_ROWS = ways[way]
                began = time.perf_counter()
                memory.logits(tokens[:, before : before + width])
                seconds[way, width].append(time.perf_counter() - began)
                memory.crop(before)
    few_rows.MOST_ROWS = most
    costs = {}
    for way in ways:
        one = statistics.median(seconds[way, 1])
        costs[way] = {str(w): statistics.median(seconds[way, w]) / one for w in WIDTHS}
        costs[way]["ms"] = 1e3 * one
    return costs


def challenge_shape() -> GPT:
    """Return a model of the challenge's shape with random weights: only its costs are real."""
    model = GPT(Config(**PRESETS["consensus"] | dict(train_seq_len=1024)))
    initialise(model, model.cfg)
    return model.eval()


def prompts_of(writer: Writer, tokens: np.ndarray) -> dict[str, list[list[int]]]:
    """Return prompts of four kinds."""
    bounds = document_bounds(tokens)[:-1]
    starts = [at for at in bounds if at + 4 * PROMPT < len(tokens)][:PROMPTS_A_KIND]
    passages = [tokens[at + PROMPT :][:REPEATED].tolist() for at in starts]
    copied = [tokens[at : at + 3 * PROMPT].tolist() for at in starts]
    return {
        "repeating": [[1, *p * 3, *p[: REPEATED // 2]] for p in passages],
        "free": [tokens[at : at + PROMPT].tolist() for at in starts],
        "lists and code": [writer.tokens(text.encode()) for text in LISTS],
        "copying": [[*text, *text[1 : PROMPT // 2]] for text in copied],
    }


def speculation(
    model: GPT, prompt: list[int], strategy: Strategy, seed: int, drafter: Any
) -> TreeSpeculation:
    memory = TreeMemory(model, longest=2 * model.cfg.train_seq_len)
    Reader(memory).last(prompt[:-1])
    return TreeSpeculation(memory, prompt, strategy, np.random.default_rng(seed), drafter, MOST)


def plain_steps(model: GPT, prompt: list[int], strategy: Strategy, seed: int) -> Iterator:
    reader = Reader(Memory(model, longest=2 * model.cfg.train_seq_len))
    reader.last(prompt[:-1])
    return decode_plainly(reader, prompt, strategy, np.random.default_rng(seed))


def timed(steps: Iterator, count: int) -> tuple[float, list[int]]:
    """Return seconds a token, and the tokens."""
    began = time.perf_counter()
    tokens = [step.token for step in islice(steps, count)]
    return (time.perf_counter() - began) / count, tokens


def bench_drafter(
    model: GPT, make: Callable, texts: list, strategy: Strategy, count: int, bar: Any
) -> dict[str, Any]:
    """Return ratio to plain decoding, acceptance by place and tokens a pass, over the prompts."""
    ratios, rates, tried, right = [], [], np.zeros(MOST, int), np.zeros(MOST, int)
    tokens = passes = drafted = 0
    for nth, prompt in enumerate(texts):
        plain, _ = timed(plain_steps(model, prompt, strategy, nth), count)
        steps = speculation(model, prompt, strategy, nth, make())
        own, _ = timed(iter(steps), count)
        own = steps.stats.seconds / steps.stats.tokens  # a whole number of passes
        ratios.append(plain / own)
        rates.append(1 / own)
        tried, right = tried + steps.tried[:MOST], right + steps.right[:MOST]
        tokens, passes = tokens + steps.stats.tokens, passes + steps.stats.verifications
        drafted += steps.stats.drafted
        bar.update(1)
    return dict(
        ratio=statistics.median(ratios),
        least=min(ratios),
        most=max(ratios),
        rate=statistics.median(rates),
        tokens_a_pass=tokens / passes,
        drafted_a_pass=drafted / passes,
        accepted=[float(r / t) if t >= 20 else None for r, t in zip(right, tried, strict=True)],
    )


def differing_texts(
    model: GPT, made: dict[str, Callable], tokens: np.ndarray, count: int, bar: Any
) -> dict[str, int]:
    """Return for each drafter how many of `count` greedy texts are not those of plain decoding."""
    bounds = document_bounds(tokens)[:-1]
    starts = np.resize(bounds, count).tolist()
    different = dict.fromkeys(made, 0)
    for nth, at in enumerate(starts):
        prompt = tokens[at + nth // len(bounds) * 16 :][:24].tolist()
        _, wanted = timed(plain_steps(model, prompt, STRATEGIES["greedy"], 0), 40)
        for name, make in made.items():
            steps = speculation(model, prompt, STRATEGIES["greedy"], 0, make())
            different[name] += timed(iter(steps), 40)[1] != wanted
        bar.update(1)
    return different


def measure(options: Any) -> dict[str, Any]:
    """Return everything that the table shows."""
    torch.set_num_threads(options.threads)
    writer = Writer(str(options.artifact), device="cpu")
    model, V = writer.model.eval(), writer.model.cfg.vocab_size
    shards = [read_shard(p, V) for p in list_shards(options.data / "*_train_*.bin")]
    if not shards:
        raise UserError(f"no *_train_*.bin in {options.data}; name a folder of shards with --data")
    train = TokenStream(shards).peek(min(1 << 20, sum(map(len, shards))))
    tokens = np.asarray(load_text(EvalConfig(data_path=str(options.data)), writer.artifact).tokens)
    made = drafters(model, trained_heads(model, train, options.heads), commonest(train))
    texts = prompts_of(writer, tokens)
    rows = []
    runs = len(made) * len(STRATEGIES) * sum(map(len, texts.values())) + options.prompts
    with progress_bar(runs, "measuring", "text") as bar:
        shapes = {"this model": (model, 40), "27 M": (challenge_shape(), 10)}
        costs = {name: width_costs(shape, rounds) for name, (shape, rounds) in shapes.items()}
        widths = {name + way: c for name, ways in costs.items() for way, c in ways.items()}
        for kind, prompts in texts.items():
            for way, strategy in STRATEGIES.items():
                for name, make in made.items():
                    found = bench_drafter(model, make, prompts, strategy, options.tokens, bar)
                    rows.append(dict(text=kind, strategy=way, drafter=name) | found)
        different = differing_texts(model, made, tokens, options.prompts, bar)
    cfg = model.cfg
    shape = dict(layers=cfg.num_layers, width=cfg.model_dim, vocabulary=V)
    shape["weights"] = sum(p.numel() for p in model.parameters())
    found = dict(model=shape, threads=options.threads, tokens=options.tokens)
    return found | dict(prompts=options.prompts, widths=widths, rows=rows, different=different)


# ==== TABLE =======================================================================================
def table(found: dict[str, Any]) -> str:
    """Return the section of a page: the roof, a line for each drafter and text, equal texts."""
    shape, widths = found["model"], found["widths"]
    about = (
        f"A model of {shape['weights']:,} weights ({shape['layers']} layers of {shape['width']}, "
        f"{shape['vocabulary']:,} pieces), {found['threads']} thread, float32, "
        f"{found['tokens']} tokens after each of {PROMPTS_A_KIND} prompts of a kind. Ratios are "
        "medians over prompts of plain decoding's time for a token over that with drafts, with the "
        "least and the largest; both were timed in turn."
    )
    lines = [about, "", "Cost of a pass of k tokens, in passes of one:", ""]
    lines += [f"| model | ms of one | {' | '.join(f'k = {w}' for w in WIDTHS[1:])} |"]
    lines += ["|---|" + "--:|" * len(WIDTHS)]
    for name, costs in widths.items():
        cells = " | ".join(f"{costs[str(w)]:.2f}" for w in WIDTHS[1:])
        lines.append(f"| {name} | {costs['ms']:.2f} | {cells} |")
    heads = "text | way | drafter | times plain | tokens/s | tokens a pass | guesses a pass"
    lines += ["", f"| {heads} | right by place |", "|---|---|---|" + "--:|" * 4 + "---|"]
    for row in found["rows"]:
        places = " ".join("–" if a is None else f"{a:.0%}" for a in row["accepted"][:5])
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
        lines.append(
            f"| {row['text']} | {row['strategy']} | {row['drafter']} | {ratio} "
            f"| {row['rate']:,.0f} | {row['tokens_a_pass']:.2f} | {row['drafted_a_pass']:.2f} "
            f"| {places} |"
        )
    words = [f"{name} {count}" for name, count in found["different"].items()]
    lines += ["", f"Greedy texts that differ, of {found['prompts']}: {', '.join(words)}."]
    return "\n".join(lines) + "\n"


# ==== COMMAND =====================================================================================
def options_parser() -> Parser:
    parser = Parser(prog="bench/drafts.py", description=__doc__)
    add = parser.add_argument
    add("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    add("--data", type=Path, default=Path("data/embedded"), help="shards (default: %(default)s)")
    add(
        "--heads", type=Path, default=Path("out/heads"), help="trained heads (default: %(default)s)"
    )
    add("--tokens", type=int, default=96, metavar="N", help="of each text (default: %(default)s)")
    add(
        "--prompts", type=int, default=50, metavar="N", help="of equal texts (default: %(default)s)"
    )
    add("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
    add_result_options(parser, RESULTS / "drafts.json")
    return parser


def run() -> int:
    """Measure or read, then print and write what was asked for; return the exit code."""
    options = options_parser().parse_args()
    publish(options, "drafts", measure, table)
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/drafts.py", run))
