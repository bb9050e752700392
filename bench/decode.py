"""What a cache of keys and values saves, what it holds, and what speculative decoding gives.

    python bench/decode.py [--artifact A] [--val GLOB] [--draft ARTIFACT] [--tokens N] [--repeats R]

One artifact, one thread. Each mode runs in turn with plain decoding, so that a busy machine slows
both alike: ratios are the figures to read; each is a median over prompts and repeats, with what 80
% of them lie between. A small model repeats itself greedily, whatever it is given: free text is
free where it is sampled. The last line is JSON. Without arguments: the artifact and the embedded
validation split of `make run`.
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

from fairway.decoding.search import Reader  # noqa: E402
from fairway.decoding.strategies import Strategy  # noqa: E402
from fairway.decoding.writing import Writer  # noqa: E402
from fairway.scoring.memory import Memory, bytes_a_token, rotations  # noqa: E402
from fairway.scoring.settings import EvalConfig  # noqa: E402
from fairway.scoring.text import load_text  # noqa: E402
from train_gpt import document_bounds  # noqa: E402

ROUNDS = 160  # of the cache's timing, for each repeat
LENGTHS = (64, 256, 1024)  # tokens that have been read when a token is timed
KEPT = ("fp32", "bf16", "int8")
PROMPT, PROMPTS, MOST = 64, 4, 8
REPEATED = 24  # tokens of a passage that is written four times over


def spread(values: list[float]) -> dict[str, float]:
    """The median, and what 80 % of the values lie between."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive")
    return dict(median=statistics.median(values), low=low, high=high)


def shown(found: dict[str, float], form: str = ".2f") -> str:
    return f"{found['median']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


# ==== THE CACHE ===================================================================================
def begun(writer: Writer, tokens: list[int], kept: str) -> Reader:
    """A reader that has read so many tokens, and sees all of them."""
    reader = Reader(Memory(writer.model, window=2 * len(tokens), kept=kept))
    reader.last(tokens)
    return reader


def cached_step(reader: Reader, token: int) -> float:
    """Seconds of one token more, which is then taken back."""
    began = time.perf_counter()
    reader.read([token])
    taken = time.perf_counter() - began
    reader.crop(reader.length - 1)
    return taken


@torch.inference_mode()
def recomputed_step(writer: Writer, tokens: list[int], token: int) -> float:
    """The same without a cache: a pass over all tokens."""
    rope, text = rotations(writer.model, len(tokens) + 1), torch.tensor([[*tokens, token]])
    began = time.perf_counter()
    writer.model.from_embedded(writer.model.embed(text), rope)[0, -1].double().numpy()
    return time.perf_counter() - began


def bench_cache(writer: Writer, stream: list[int], rounds: int, told: tqdm) -> list[dict]:
    """Every length and way in turn, round after round: what slows the machine down for a while
    slows all alike.
    """
    readers = {
        (kept, length): begun(writer, stream[:length], kept) for kept in KEPT for length in LENGTHS
    }
    seconds = {(way, length): [] for way in (*KEPT, "recomputed") for length in LENGTHS}
    for nth in range(rounds):
        for key, reader in readers.items():
            seconds[key].append(cached_step(reader, stream[nth]))
        if nth % 8 == 0:
            for length in LENGTHS:
                seconds["recomputed", length].append(
                    recomputed_step(writer, stream[:length], stream[nth])
                )
        told.update(1)
    rows = [
        dict(tokens=length, way=way, ms=spread([1e3 * s for s in found]))
        for (way, length), found in seconds.items()
    ]
    for row in rows:
        if (key := (row["way"], row["tokens"])) in readers:
            row |= dict(
                held=readers[key].engine.held, expected=key[1] * bytes_a_token(writer.model, key[0])
            )
    return rows


def print_cache(rows: list[dict]) -> None:
    print("\nMilliseconds a token, with so many tokens before it: with a cache, and without\n")
    print(
        f"{'':12}" + "".join(f"{length:>28,}" for length in LENGTHS) + f"{'1,024 against 64':>20}"
    )
    for way in (*KEPT, "recomputed"):
        own = [row for row in rows if row["way"] == way]
        growth = own[-1]["ms"]["median"] / own[0]["ms"]["median"]
        print(f"{way:12}" + "".join(f"{shown(row['ms']):>28}" for row in own) + f"{growth:19.2f}x")
    print("\nBytes a token that the cache holds, measured and by arithmetic\n")
    for way in KEPT:
        own = [row for row in rows if row["way"] == way]
        grown = (own[-1]["held"] - own[0]["held"]) / (own[-1]["tokens"] - own[0]["tokens"])
        print(f"{way:12}{grown:14,.1f}{own[0]['expected'] / own[0]['tokens']:14,.1f}")


# ==== SPECULATION =================================================================================
def prompts(stream: np.ndarray) -> dict[str, list[list[int]]]:
    """Starts of documents, and passages that are written three times over and begun a fourth
    time.
    """
    starts = [start for start in document_bounds(stream)[:-1] if start + 4 * PROMPT < len(stream)][
        :PROMPTS
    ]
    passages = [stream[start + PROMPT :][:REPEATED].tolist() for start in starts]
    return {
        "free": [stream[start : start + PROMPT].tolist() for start in starts],
        "repeating": [[1, *passage * 3, *passage[: REPEATED // 2]] for passage in passages],
    }


def timed(writer: Writer, prompt: list[int], strategy: Strategy, seed: int, draft: str, count: int):
    """Seconds a token, what the draft did, and the tokens."""
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
    told: tqdm,
) -> dict:
    ratios, rates, sums, same = (
        [],
        [],
        dict.fromkeys(("tokens", "verifications", "drafted", "accepted"), 0),
        True,
    )
    for nth in range(repeats):
        for prompt in texts:
            plain, _, expected = timed(writer, prompt, strategy, nth, "none", count)
            seconds, stats, tokens = timed(writer, prompt, strategy, nth, draft, count)
            ratios.append(plain / seconds)
            rates.append(1 / seconds)
            same &= tokens == expected
            sums = {name: value + getattr(stats, name) for name, value in sums.items()}
            told.update(1)
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
    print(
        f"\n{'text':10} {'strategy':12} {'draft':10} {'accepted':>9} {'tok/verify':>11} {'tokens/s':>10}  "
        f"{'times plain decoding':22} same text"
    )
    for row in rows:
        print(
            f"{row['text']:10} {row['strategy']:12} {Path(row['draft']).name[:10]:10} {row['acceptance']:9.0%} "
            f"{row['tokens_per_verification']:11.2f} {row['tokens_per_second']['median']:10,.0f}  "
            f"{shown(row['ratio']):22} {dict([(None, '-'), (True, 'yes'), (False, 'NO')])[row['identical']]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifact", default="final_model.int6.ptz")
    parser.add_argument("--val", metavar="GLOB", default="")
    parser.add_argument("--draft", metavar="ARTIFACT", help="a smaller model of the same tokenizer")
    parser.add_argument(
        "--tokens", type=int, default=160, metavar="N", help="of each text (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="R", help="default: %(default)s")
    given = parser.parse_args()
    torch.set_num_threads(1)
    writer = Writer(given.artifact, device="cpu")
    stream = load_text(EvalConfig(val_files=given.val), writer.artifact).tokens
    layers, texts = writer.model.cfg.num_layers, prompts(stream)
    drafts = [
        "ngram",
        "suffix",
        *(["layers"] if layers > 1 else []),
        *([given.draft] if given.draft else []),
    ]
    strategies = [Strategy("greedy"), Strategy("top-p")]
    timed(
        writer, texts["free"][0], strategies[0], 0, "ngram", 64
    )  # what is compiled or allocated once
    total = given.repeats * (ROUNDS + len(drafts) * sum(map(len, texts.values())) * len(strategies))
    with tqdm(total=total, desc="timing", delay=3, leave=False) as told:
        cache, rows = bench_cache(writer, stream.tolist(), given.repeats * ROUNDS, told), []
        for text, own in texts.items():
            for strategy in strategies:
                rows += [
                    dict(text=text)
                    | bench_draft(writer, draft, own, strategy, given.tokens, given.repeats, told)
                    for draft in drafts
                ]
    print(
        f"{layers} layers of {writer.model.cfg.model_dim}, {writer.model.cfg.vocab_size} tokens, trained on "
        f"{writer.context} at a time; prompts of {PROMPT}, {given.tokens} tokens after each"
    )
    print_cache(cache)
    print_drafts(rows)
    print(json.dumps(dict(cache=cache, speculation=rows)))


if __name__ == "__main__":
    main()
