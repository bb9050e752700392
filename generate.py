"""Text from an artifact.

    python generate.py --prompt "The people of the United States"
    echo "Fellow citizens," | python generate.py --strategy min-p --temperature 1.2 --tokens 200
    python generate.py --prompt-file speech.txt --draft ngram --stop $'\\n'
    python generate.py --prompt "We must" --beams 4 --n-best 2
    python generate.py --compare --samples 8 --json compare.json

The text goes to standard output as it is written, until a document ends, a --stop string comes, --tokens are written,
or Ctrl-C; on a terminal the prompt stands before it. One line about it goes to standard error. Log-probabilities are
the model's own, in nats, whatever the strategy does with them. A --draft changes the speed and not the text: greedily
it is the same token for token, and sampled it is distributed the same.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm import tqdm

from fairway.decoding.compare import Task, compare, tables
from fairway.decoding.speculative import Stats
from fairway.decoding.strategies import FILTERS, KNOBS, Strategy
from fairway.decoding.writing import DRAFTS, Writer, Written, measure_plain, search, write
from fairway.options import Parser, need_place, save_json
from train_gpt import UserError, need

SEARCH = ("beams", "length_penalty", "n_best")  # options of beam search alone
PROMPTS = (
    b"The people of the United States",
    b"My fellow citizens",
    b"In the last year we have",
)  # of --compare
NAMES = (*FILTERS, "beam")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--artifact",
        default="final_model.int6.ptz",
        metavar="FILE",
        help="the model (default: %(default)s)",
    )
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="the tokenizer, where the artifact holds none",
    )
    add("--device", default="", choices=("cpu", "cuda", "mps"), help="default: the best there is")
    add(
        "--cache",
        default="model",
        choices=("fp32", "bf16", "int8"),
        help="how keys and values are kept (default: as the device computes them: fp32 on a CPU)",
    )
    add(
        "--engine",
        default="torch",
        choices=("torch", "coreml"),
        help="what runs the model; coreml: the shards that "
        "export_coreml.py wrote, by CoreML on a Mac and interpreted elsewhere (default: %(default)s)",
    )
    add("--shards", metavar="DIR", help="the folder of those (default: coreml)")
    what = parser.add_argument_group("what to write")
    add = what.add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what the text goes on from; - or nothing: standard input",
    )
    add(
        "--prompt-file",
        metavar="FILE",
        help="the same from a file; one newline at its end is left out",
    )
    add("--tokens", type=int, metavar="N", help="at most (default: 128; with --compare 40)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this; may be given again",
    )
    how = parser.add_argument_group("how to choose tokens")
    add = how.add_argument
    add(
        "--strategy",
        metavar="NAME",
        help=f"one of {', '.join(NAMES)} (default: top-p, or the one whose option is given)",
    )
    for name, knob in KNOBS.items():
        add(
            f"--{name.replace('_', '-')}",
            type=int if name == "top_k" else float,
            metavar="K" if name == "top_k" else "X",
            help=f"{knob.help} (default: {getattr(Strategy, name)})",
        )
    add("--beams", type=int, metavar="N", help="width of the beam search (default: 4)")
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="a text scores log p / tokens^X: 0 favours short ones, 1 "
        "compares means (default: 1.0)",
    )
    add("--n-best", type=int, metavar="N", help="texts to show of the beam search (default: 1)")
    add("--seed", type=int, metavar="N", help="of the sampling (default: a new one, which is told)")
    fast = parser.add_argument_group("how to be fast")
    add = fast.add_argument
    add(
        "--draft",
        default="none",
        metavar="KIND",
        help=f"{', '.join(DRAFTS)}, or the path of a smaller artifact of "
        "the same tokenizer (default: %(default)s)",
    )
    add(
        "--drafts",
        type=int,
        default=8,
        metavar="K",
        help="guesses that are verified at once (default: %(default)s)",
    )
    add(
        "--no-measure",
        action="store_true",
        help="do not decode again without the draft to tell the speed-up",
    )
    many = parser.add_argument_group("side by side")
    add = many.add_argument
    add("--compare", action="store_true", help="all strategies and drafts on the same prompts")
    add(
        "--samples",
        type=int,
        metavar="N",
        help="texts of each sampling strategy and prompt (default: 5)",
    )
    add("--json", metavar="FILE", help="write what was found there")
    return parser.parse_args(arguments)


# ==== WHAT WAS ASKED ==================================================================================================
def strategy_of(given: argparse.Namespace) -> Strategy | None:
    """The strategy, once all options are known to go together; None: beam search."""
    numbers = {name: value for name in KNOBS if (value := getattr(given, name)) is not None}
    own = [name.replace("_", "-") for name in numbers]
    filters = [name for name in own if name in FILTERS and name != "temperature"]
    searched = [name.replace("_", "-") for name in SEARCH if getattr(given, name) is not None]
    name = given.strategy or ("beam" if searched else filters[0] if filters else "top-p")
    need(name in NAMES, f"--strategy is {name!r}; take one of {', '.join(NAMES)}")
    Strategy("temperature", **numbers)  # what the numbers themselves may be
    if given.compare:
        idle = [
            option
            for option in ("strategy", "beams", "n_best", "stop", "no_measure")
            if getattr(given, option)
        ]
    else:
        idle = own + ["draft"] * (given.draft != "none") if name == "beam" else searched
        idle += ["temperature"] * (name == "greedy" and "temperature" in own) + [
            f for f in filters if f != name
        ]
        idle += ["samples"] * (given.samples is not None)
    chosen = "--compare" if given.compare else f"--strategy {name}"
    need(
        not idle,
        f"--{''.join(idle[:1]).replace('_', '-')} does nothing with {chosen}; leave one of them out",
    )
    return (
        Strategy(**numbers)
        if given.compare
        else None
        if name == "beam"
        else Strategy(name, **numbers)
    )


def shards_of(given: argparse.Namespace) -> str:
    """The folder of the CoreML engine; none of the other."""
    if given.engine == "torch":
        need(
            not given.shards,
            "--shards does nothing with --engine torch; leave it out, or take --engine coreml",
        )
        return ""
    need(
        given.cache == "model",
        "--cache does nothing with --engine coreml; leave it out (shards have a precision of "
        "their own: export_coreml.py --precision)",
    )
    return given.shards or "coreml"


def prompts_of(given: argparse.Namespace) -> list[bytes]:
    """Bytes, whatever they are: of arguments, of a file or of a pipe."""
    need(
        not (given.prompt and given.prompt_file),
        "--prompt and --prompt-file are both given; leave one out",
    )
    if given.prompt_file:
        try:
            return [Path(given.prompt_file).read_bytes().removesuffix(b"\n")]
        except OSError as e:
            raise UserError(f"--prompt-file {given.prompt_file}: {e.strerror or e}") from None
    if given.prompt and given.prompt != ["-"]:
        return [os.fsencode(prompt) for prompt in given.prompt]
    if given.compare and not given.prompt:
        return list(PROMPTS)
    if sys.stdin.isatty():
        return [b""]  # a text from its start
    return [sys.stdin.buffer.read().removesuffix(b"\n")]


def bar(total: int, what: str, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, delay=3, leave=False)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ==== ONE TEXT ========================================================================================================
def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def generate(
    given: argparse.Namespace, writer: Writer, strategy: Strategy | None, prompt: bytes
) -> int:
    tokens, limit = writer.tokens(prompt), 128 if given.tokens is None else given.tokens
    if len(tokens) > writer.context:
        tell(
            f"prompt: {len(tokens)} tokens; the model sees {writer.context} at a time, so that the window slides: all "
            "is read, and the text goes on from the end"
        )
    if sys.stdout.isatty():
        show(prompt.decode("utf-8", "replace"))
    found = (
        beams(given, writer, tokens, limit)
        if strategy is None
        else one(given, writer, strategy, tokens, limit)
    )
    save_json(
        given.json, dict(artifact=given.artifact, prompt=prompt.decode("utf-8", "replace"), **found)
    )
    return 130 if found["texts"][0]["ended"] == "interrupted" else 0


def one(
    given: argparse.Namespace, writer: Writer, strategy: Strategy, prompt: list[int], limit: int
) -> dict[str, Any]:
    seed = secrets.randbelow(2**32) if given.seed is None else given.seed
    with bar(len(prompt), "reading", "tok") as reading:
        steps, stats = writer.steps(
            prompt, strategy, seed, given.draft, given.drafts, reading.update
        )
    before = writer.chain.used.calls if writer.chain else 0
    written = write(steps, writer.speller, limit, given.stop, show, fresh=len(prompt) == 1)
    show("\n")
    line = f"{len(written.tokens)} tokens, {written.rate:.0f} tokens/s, mean log-probability {written.mean_logp:.2f}"
    line += "" if strategy.greedy else f", seed {seed}"
    found = dict(strategy=strategy.name, seed=seed, texts=[record(written)])
    if writer.chain:
        calls = writer.chain.used.calls - before
        found["coreml"] = dict(calls=calls, tokens_per_call=len(written.tokens) / max(calls, 1))
        line += f"; coreml: {calls} calls, {found['coreml']['tokens_per_call']:.2f} tokens a call"
    if stats is not None:
        found["draft"] = speculated(given, writer, strategy, prompt, written, stats)
        line += f"; {given.draft}: {described(found['draft'])}"
    tell(line + (", interrupted" if written.ended == "interrupted" else ""))
    return found


def record(written: Written) -> dict[str, Any]:
    return dict(
        text=written.text,
        tokens=written.tokens,
        logps=written.logps,
        ended=written.ended,
        mean_logp=written.mean_logp,
        seconds=written.seconds,
        tokens_per_second=written.rate,
    )


def speculated(
    given: argparse.Namespace,
    writer: Writer,
    strategy: Strategy,
    prompt: list[int],
    written: Written,
    stats: Stats,
) -> dict[str, Any]:
    """What the draft did; unless it is told not to, beside the time of plain decoding, after a fresh start."""
    found = dict(
        kind=given.draft,
        **vars(stats),
        acceptance=stats.acceptance,
        tokens_per_second=stats.rate,
        tokens_per_verification=stats.tokens_per_verification,
    )
    if given.no_measure or written.ended == "interrupted" or not stats.tokens:
        return found
    try:
        with bar(stats.tokens, "the same without the draft", "tok") as progress:
            seconds = measure_plain(writer, prompt, strategy, 0, stats.tokens, progress.update)
    except KeyboardInterrupt:  # the text is written: what is told of it says less
        return found
    return found | dict(plain_seconds=seconds, ratio=seconds / stats.seconds)


def described(draft: dict[str, Any]) -> str:
    text = (
        f"{draft['accepted']} of {draft['drafted']} guesses accepted ({draft['acceptance']:.0%}), "
        f"{draft['tokens_per_verification']:.2f} tokens a verification"
    )
    return text + (f", {draft['ratio']:.2f}x as fast as plain decoding" if "ratio" in draft else "")


def beams(
    given: argparse.Namespace, writer: Writer, prompt: list[int], limit: int
) -> dict[str, Any]:
    width, best, penalty = (
        value if value is not None else default
        for value, default in ((given.beams, 4), (given.n_best, 1), (given.length_penalty, 1.0))
    )
    with bar(limit, "searching", "tok") as progress:
        texts = search(writer, prompt, width, limit, penalty, best, given.stop, progress.update)
    for nth, text in enumerate(texts, 1):
        show((f"[{nth}] " if best > 1 else "") + text.text + "\n")
    first = texts[0]
    tell(
        f"{len(first.tokens)} tokens, {first.rate:.0f} tokens/s, mean log-probability {first.mean_logp:.2f}; the best "
        f"of {width} beams"
        + (
            ": " + ", ".join(f"[{n}] {t.mean_logp:.2f}" for n, t in enumerate(texts, 1))
            if best > 1
            else ""
        )
    )
    return dict(
        strategy="beam", beams=width, length_penalty=penalty, texts=[record(text) for text in texts]
    )


# ==== ALL OF THEM =====================================================================================================
def side_by_side(
    given: argparse.Namespace, writer: Writer, strategy: Strategy, prompts: list[bytes]
) -> int:
    samples = 5 if given.samples is None else given.samples
    need(samples >= 1, f"--samples is {samples}; it must be at least 1")
    own = ["ngram", "suffix"] + ["layers"] * (writer.model.cfg.num_layers > 1)
    drafts = tuple(dict.fromkeys([*own, *([given.draft] if given.draft != "none" else [])]))
    task = Task(
        tuple(dict.fromkeys(prompts)),
        strategy,
        40 if given.tokens is None else given.tokens,
        samples,
        0 if given.seed is None else given.seed,
        drafts,
        given.drafts,
    )
    with bar(task.runs, "writing", "text") as progress:
        found = compare(writer, task, progress.update)
    console = Console()
    for table in tables(found):
        console.print(table)
    save_json(given.json, dict(artifact=given.artifact, **found))
    return 0


def run(given: argparse.Namespace) -> int:
    strategy = strategy_of(given)
    need(
        given.tokens is None or given.tokens >= 1,
        f"--tokens is {given.tokens}; it must be at least 1",
    )
    need_place(given.json)
    need(given.seed is None or given.seed >= 0, f"--seed is {given.seed}; it must be at least 0")
    prompts = prompts_of(given)
    need(
        len(prompts) == 1 or given.compare,
        f"{len(prompts)} prompts are given; several go with --compare",
    )
    writer = Writer(given.artifact, given.tokenizer, given.device, given.cache, shards_of(given))
    return (
        side_by_side(given, writer, strategy, prompts)
        if given.compare
        else generate(given, writer, strategy, prompts[0])
    )


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parsed(arguments))
    except KeyboardInterrupt:
        tell("generate: interrupted")
        return 130
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as e:
        tell(f"generate: error: {str(e).splitlines()[0]}")
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # of a terminal that cannot show every character
    sys.exit(main())
