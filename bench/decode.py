"""Measure what the cache of keys and values saves and holds, and what speculative decoding gains.

    python bench/decode.py [--artifact A] [--val GLOB] [--draft ARTIFACT] [--tokens N] [--repeats R]

It takes one artifact and one thread. Each mode runs in turn with plain decoding, so that a busy
machine slows both: read the ratios. Each is a median over prompts and repeats, with the interval
that holds 80 % of them. A small model repeats itself in greedy decoding whatever its prompt is, so
judge free text where it is sampled. The last line is JSON. By default: the artifact and the
embedded validation split of `make run`.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from fairway.command_line import Parser, run_reporting  # noqa: E402
from fairway.decoding.reader import Reader  # noqa: E402
from fairway.decoding.strategies import Strategy  # noqa: E402
from fairway.decoding.writing import Writer  # noqa: E402
from fairway.scoring.memory import Memory, bytes_per_token, model_rope  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from fairway.scoring.text import load_text  # noqa: E402
from train_gpt import document_bounds  # noqa: E402

ROUNDS = 160  # rounds of cache timing in each repeat
LENGTHS = (64, 256, 1024)  # tokens that precede the timed one
CACHES = ("fp32", "bf16", "int8")
PROMPT, PROMPTS, MOST = 64, 4, 8
REPEATED = 24  # tokens of a passage that is repeated


def spread(values: list[float]) -> dict[str, float]:
    """Return the median and the interval that holds 80 % of the values."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return dict(median=statistics.median(values), low=low, high=high)


def spread_text(spread: dict[str, float]) -> str:
    """Return a spread as text: "1.50 (1.20 to 1.80)"."""
    return f"{spread['median']:.2f} ({spread['low']:.2f} to {spread['high']:.2f})"


# ==== THE CACHE ===================================================================================
def reader_after(writer: Writer, tokens: list[int], cache: str) -> Reader:
    """Return a reader that has read all tokens, in a window that holds them."""
    reader = Reader(Memory(writer.model, window=2 * len(tokens), storage=cache))
    reader.last(tokens)
    return reader


def cached_step(reader: Reader, token: int) -> float:
    """Return the seconds of one more token, which is then forgotten."""
    began = time.perf_counter()
    reader.read([token])
    taken = time.perf_counter() - began
    reader.crop(reader.length - 1)
    return taken


@torch.inference_mode()
def recomputed_step(writer: Writer, tokens: list[int], token: int) -> float:
    """Return the seconds of the same without a cache: a pass over all tokens."""
    rope, text = model_rope(writer.model, len(tokens) + 1), torch.tensor([[*tokens, token]])
    began = time.perf_counter()
    writer.model.from_embedded(writer.model.embed(text), rope)[0, -1].double().numpy()
    return time.perf_counter() - began


def bench_cache(writer: Writer, stream: list[int], rounds: int, bar: tqdm) -> list[dict]:
    """Time each length and cache in turn, so that a slow spell of the machine slows all alike."""
    readers = {
        (cache, length): reader_after(writer, stream[:length], cache)
        for cache in CACHES
        for length in LENGTHS
    }
    seconds = {(way, length): [] for way in (*CACHES, "recomputed") for length in LENGTHS}
    for nth in range(rounds):
        for key, reader in readers.items():
            seconds[key].append(cached_step(reader, stream[nth]))
        if nth % 8 == 0:
            for length in LENGTHS:
                seconds["recomputed", length].append(
                    recomputed_step(writer, stream[:length], stream[nth])
                )
        bar.update(1)
    rows = [
        dict(tokens=length, way=way, ms=spread([1e3 * s for s in times]))
        for (way, length), times in seconds.items()
    ]
    for row in rows:
        if (key := (row["way"], row["tokens"])) in readers:
            row |= dict(
                held=readers[key].engine.stored_bytes,
                expected=key[1] * bytes_per_token(writer.model, key[0]),
            )
    return rows


def print_cache(rows: list[dict]) -> None:
    """Print the time of a token by cache and length, and the bytes of each cache."""
    print("\nMilliseconds a token after so many tokens, with a cache and without\n")
    print(
        f"{'':12}" + "".join(f"{length:>28,}" for length in LENGTHS) + f"{'1,024 against 64':>20}"
    )
    for way in (*CACHES, "recomputed"):
        own = [row for row in rows if row["way"] == way]
        growth = own[-1]["ms"]["median"] / own[0]["ms"]["median"]
        print(
            f"{way:12}"
            + "".join(f"{spread_text(row['ms']):>28}" for row in own)
            + f"{growth:19.2f}x"
        )
    print("\nBytes that the cache holds for a token, measured and computed\n")
    for way in CACHES:
        own = [row for row in rows if row["way"] == way]
        grown = (own[-1]["held"] - own[0]["held"]) / (own[-1]["tokens"] - own[0]["tokens"])
        print(f"{way:12}{grown:14,.1f}{own[0]['expected'] / own[0]['tokens']:14,.1f}")


# ==== SPECULATION =================================================================================
def prompts(stream: np.ndarray) -> dict[str, list[list[int]]]:
    """Return prompts: starts of documents, and passages repeated three and a half times."""
    starts = [start for start in document_bounds(stream)[:-1] if start + 4 * PROMPT < len(stream)][
        :PROMPTS
    ]
    passages = [stream[start + PROMPT :][:REPEATED].tolist() for start in starts]
    return {
        "free": [stream[start : start + PROMPT].tolist() for start in starts],
        "repeating": [[1, *passage * 3, *passage[: REPEATED // 2]] for passage in passages],
    }


def timed(writer: Writer, prompt: list[int], strategy: Strategy, seed: int, draft: str, count: int):
    """Return seconds a token, the statistics of the draft, and the tokens."""
    steps, stats = writer.steps(prompt, strategy, seed, draft, MOST)
    began = time.perf_counter()
    tokens = [next(steps).token for _ in range(count)]
    taken = time.perf_counter() - began
    return taken / count if stats is None else stats.seconds / stats.tokens, stats, tokens


def bench_draft(
    writer: Writer,
    draft: str,
    texts: list[list[int]],
    strategy: Strategy,
    count: int,
    repeats: int,
    bar: tqdm,
) -> dict:
    """Return the ratio to plain decoding and the statistics of one draft."""
    ratios, rates, same = [], [], True
    sums = dict.fromkeys(("tokens", "verifications", "drafted", "accepted"), 0)
    for nth in range(repeats):
        for prompt in texts:
            plain, _, expected = timed(writer, prompt, strategy, nth, "none", count)
            seconds, stats, tokens = timed(writer, prompt, strategy, nth, draft, count)
            ratios.append(plain / seconds)
            rates.append(1 / seconds)
            same &= tokens == expected
            sums = {name: value + getattr(stats, name) for name, value in sums.items()}
            bar.update(1)
    return dict(
        draft=draft,
        strategy=strategy.name,
        ratio=spread(ratios),
        tokens_per_second=spread(rates),
        **sums,
        acceptance=sums["accepted"] / max(sums["drafted"], 1),
        identical=same if strategy.greedy else None,
        tokens_per_verification=sums["tokens"] / sums["verifications"],
    )


def print_drafts(rows: list[dict]) -> None:
    """Print a line for each text, strategy and draft."""
    print(
        f"\n{'text':10} {'strategy':12} {'draft':10} {'accepted':>9} {'tok/verify':>11} "
        f"{'tokens/s':>10}  {'times plain decoding':22} same text"
    )
    for row in rows:
        same = {None: "-", True: "yes", False: "NO"}[row["identical"]]
        print(
            f"{row['text']:10} {row['strategy']:12} {Path(row['draft']).name[:10]:10} "
            f"{row['acceptance']:9.0%} {row['tokens_per_verification']:11.2f} "
            f"{row['tokens_per_second']['median']:10,.0f}  {spread_text(row['ratio']):22} {same}"
        )


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = Parser(prog="bench/decode.py", description=__doc__)
    add = parser.add_argument
    add("--artifact", default="final_model.int6.ptz", help="default: %(default)s")
    add("--val", metavar="GLOB", default="", help="shards to take prompts from")
    add("--draft", metavar="ARTIFACT", help="a smaller model with the same tokenizer")
    add("--tokens", type=int, default=160, metavar="N", help="of each text (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="R", help="default: %(default)s")
    return parser.parse_args()


def run() -> int:
    """Measure and print; return the exit code."""
    options = parse()
    torch.set_num_threads(1)
    writer = Writer(options.artifact, device="cpu")
    stream = load_text(EvalConfig(val_files=options.val), writer.artifact).tokens
    layers, texts = writer.model.cfg.num_layers, prompts(stream)
    drafts = ["ngram", "suffix"] + ["layers"] * (layers > 1)
    drafts += [options.draft] if options.draft else []
    strategies = [Strategy("greedy"), Strategy("top-p")]
    timed(writer, texts["free"][0], strategies[0], 0, "ngram", 64)  # warm-up
    runs = len(drafts) * len(strategies) * sum(map(len, texts.values()))
    rows, total = [], options.repeats * (ROUNDS + runs)
    with tqdm(total=total, desc="timing", delay=3, leave=False, disable=None) as bar:
        cache = bench_cache(writer, stream.tolist(), options.repeats * ROUNDS, bar)
        for text, own in texts.items():
            for strategy in strategies:
                rows += [
                    dict(text=text)
                    | bench_draft(
                        writer, draft, own, strategy, options.tokens, options.repeats, bar
                    )
                    for draft in drafts
                ]
    print(
        f"{layers} layers of {writer.model.cfg.model_dim}, {writer.model.cfg.vocab_size} tokens, "
        f"trained on {writer.context} at a time; prompts of {PROMPT}, {options.tokens} tokens "
        "after each"
    )
    print_cache(cache)
    print_drafts(rows)
    print(json.dumps(dict(cache=cache, speculation=rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_reporting("bench/decode.py", run))
