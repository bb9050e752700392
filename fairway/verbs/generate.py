r"""Write text with an artifact: sampling, beam search, speculative decoding.

Example:
    fairway generate --prompt "The people of the United States"

    echo "Fellow citizens," | fairway generate --strategy min-p --temperature 1.2 --tokens 200
    fairway generate --prompt-file speech.txt --draft ngram --stop $'\n'
    fairway generate --prompt "We must" --beams 4 --n-best 2
    fairway generate --compare --samples 8 --json compare.json

The text goes to standard output as it is written. It ends with the document, at a --stop string,
after --tokens tokens, or at Ctrl-C. On a terminal the prompt is printed before it. One line of
figures goes to standard error. Log-probabilities are the model's own, in nats, whatever strategy
chooses the tokens. A --draft changes the speed and not the text: greedy decoding gives the same
tokens, and sampling gives the same distribution.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairway.command_line import UsageError, check_writable, json_bytes, progress_bar
from fairway.decoding.strategy_options import (
    DRAFT_KINDS,
    STRATEGY_NAMES,
    STRATEGY_OPTIONS,
    option_name,
)

if TYPE_CHECKING:
    from fairway.decoding.speculative import SpeculationStats
    from fairway.decoding.strategies import Strategy
    from fairway.decoding.writing import GeneratedText, Writer

BEAM_OPTIONS = ("beams", "length_penalty", "n_best")
NAMES = (*STRATEGY_NAMES, "beam")
COMPARED_PROMPTS = (
    b"The people of the United States",
    b"My fellow citizens",
    b"In the last year we have",
)  # of --compare without --prompt


# ==== OPTIONS =====================================================================================
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, group by group."""
    add_model_options(parser)
    add_text_options(parser.add_argument_group("what to write"))
    add_strategy_options(parser.add_argument_group("how to choose tokens"))
    add_draft_options(parser.add_argument_group("how to be fast"))
    add_comparison_options(parser.add_argument_group("side by side"))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare which model runs, where and how."""
    add = parser.add_argument
    add(
        "--artifact",
        default="final_model.int6.ptz",
        metavar="FILE",
        help="the model (default: %(default)s)",
    )
    add("--tokenizer", default="", metavar="FILE", help="the tokenizer, if the artifact holds none")
    add(
        "--device",
        default="",
        choices=("cpu", "cuda", "mps"),
        help="where to run (default: the best device here)",
    )
    add(
        "--cache",
        default="model",
        choices=("fp32", "bf16", "int8"),
        help="precision of cached keys and values (default: as the device computes them, fp32 on a "
        "CPU)",
    )
    add(
        "--engine",
        default="torch",
        choices=("torch", "coreml"),
        help="what runs the model; coreml: the shards of `fairway export-coreml`, by CoreML on a "
        "Mac and interpreted elsewhere (default: %(default)s)",
    )
    add("--shards", metavar="DIR", help="folder of the CoreML shards (default: coreml)")


def add_text_options(group: argparse._ArgumentGroup) -> None:
    """Declare what the text begins with and when it ends."""
    add = group.add_argument
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the beginning of the text; - or no prompt at all: standard input",
    )
    add("--prompt-file", metavar="FILE", help="a file with the prompt; a last newline is ignored")
    add("--tokens", type=int, metavar="N", help="at most N (default: 128; with --compare 40)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be repeated",
    )


def add_strategy_options(group: argparse._ArgumentGroup) -> None:
    """Declare the strategies and their numbers."""
    add = group.add_argument
    add(
        "--strategy",
        metavar="NAME",
        help=f"one of {', '.join(NAMES)} (default: top-p, or the strategy whose option is used)",
    )
    for name, option in STRATEGY_OPTIONS.items():
        add(
            option_name(name),
            type=int if name == "top_k" else float,
            metavar="K" if name == "top_k" else "X",
            help=f"{option.help} (default: {option.default})",
        )
    add("--beams", type=int, metavar="N", help="width of the beam search (default: 4)")
    add(
        "--length-penalty",
        type=float,
        metavar="X",
        help="rank texts by log p / tokens^X: 0 favours short ones, 1 compares means "
        "(default: 1.0)",
    )
    add("--n-best", type=int, metavar="N", help="texts of the beam search to print (default: 1)")
    add(
        "--seed",
        type=int,
        metavar="N",
        help="seed of the sampling (default: a random one, which is printed)",
    )


def add_draft_options(group: argparse._ArgumentGroup) -> None:
    """Declare the drafter of speculative decoding."""
    add = group.add_argument
    add(
        "--draft",
        default="none",
        metavar="KIND",
        help=f"{', '.join(DRAFT_KINDS)}, or the path of a smaller artifact with the same tokenizer "
        "(default: %(default)s)",
    )
    add(
        "--drafts",
        type=int,
        default=8,
        metavar="K",
        help="guesses verified at once (default: %(default)s)",
    )
    add(
        "--no-measure",
        action="store_true",
        help="do not decode again without the draft to measure the speed-up",
    )


def add_comparison_options(group: argparse._ArgumentGroup) -> None:
    """Declare the comparison of all strategies."""
    add = group.add_argument
    add("--compare", action="store_true", help="all strategies and drafts on the same prompts")
    add(
        "--samples",
        type=int,
        metavar="N",
        help="texts of each sampling strategy after each prompt (default: 5)",
    )
    add("--json", metavar="FILE", help="write the texts and figures as JSON")


# ==== CHECKING OPTIONS ============================================================================
def chosen_name(options: argparse.Namespace) -> str:
    """Return the strategy's name: --strategy, or the one whose own option was used."""
    if options.strategy:
        return options.strategy
    if any(getattr(options, name) is not None for name in BEAM_OPTIONS):
        return "beam"
    filters = [name for name in used_numbers(options) if name.replace("_", "-") in NAMES]
    filters = [name for name in filters if name != "temperature"]
    return filters[0].replace("_", "-") if filters else "top-p"


def used_numbers(options: argparse.Namespace) -> dict[str, float]:
    """Return the strategy's numbers that were set on the command line."""
    return {n: value for n in STRATEGY_OPTIONS if (value := getattr(options, n)) is not None}


def chosen_strategy(options: argparse.Namespace) -> Strategy | None:
    """Return the strategy, or None for beam search, after checking that all options go together."""
    from fairway.decoding.strategies import Strategy
    from train_gpt import UserError

    numbers, name = used_numbers(options), chosen_name(options)
    if name not in NAMES:
        raise UsageError(f"--strategy is {name!r}; take one of {', '.join(NAMES)}")
    try:
        Strategy("temperature", **numbers)  # checks the range of each number
    except UserError as e:
        raise UsageError(str(e)) from None
    if unused := unused_options(options, name, list(numbers)):
        choice = "--compare" if options.compare else f"--strategy {name}"
        raise UsageError(
            f"{option_name(unused[0])} does nothing with {choice}; leave one of them out"
        )
    if options.compare:
        return Strategy(**numbers)
    return None if name == "beam" else Strategy(name, **numbers)


def unused_options(options: argparse.Namespace, name: str, numbers: list[str]) -> list[str]:
    """Return the options that were set and have no effect with strategy `name` or --compare."""
    if options.compare:
        idle = ("strategy", "beams", "n_best", "stop", "no_measure")
        return [option for option in idle if getattr(options, option)]
    if name == "beam":
        unused = numbers + ["draft"] * (options.draft != "none")
    else:
        unused = [option for option in BEAM_OPTIONS if getattr(options, option) is not None]
    if name == "greedy" and "temperature" in numbers:
        unused.append("temperature")
    filters = [n for n in numbers if n not in ("temperature", "repetition_penalty")]
    unused += [n for n in filters if n.replace("_", "-") != name]
    return unused + ["samples"] * (options.samples is not None)


def shards_folder(options: argparse.Namespace) -> str:
    """Return the folder of the CoreML shards; "" for PyTorch."""
    if options.engine == "torch":
        if options.shards:
            raise UsageError(
                "--shards does nothing with --engine torch; leave it out, or take --engine coreml"
            )
        return ""
    if options.cache != "model":
        raise UsageError(
            "--cache does nothing with --engine coreml; leave it out (shards have a precision of "
            "their own: fairway export-coreml --precision)"
        )
    return options.shards or "coreml"


def check_ranges(options: argparse.Namespace) -> None:
    """Raise UsageError for a number out of range."""
    for name, least in (("tokens", 1), ("seed", 0), ("samples", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UsageError(f"--{name} is {value}; it must be at least {least}")


def beam_numbers(options: argparse.Namespace) -> tuple[int, int, float]:
    """Return width, number of texts and length penalty of the beam search."""
    return (
        4 if options.beams is None else options.beams,
        1 if options.n_best is None else options.n_best,
        1.0 if options.length_penalty is None else options.length_penalty,
    )


def check_against_room(options: argparse.Namespace) -> None:
    """Let the decoding room refuse numbers and stop strings before the model is loaded."""
    from fairway.decoding.beam import check_beam_options
    from fairway.decoding.writing import TextStream, check_most_drafts
    from train_gpt import UserError

    try:
        check_beam_options(*beam_numbers(options))
        check_most_drafts(options.drafts)
        TextStream(options.stop)
    except UserError as e:
        raise UsageError(str(e)) from None


def read_prompts(options: argparse.Namespace) -> list[bytes]:
    """Return the prompts as bytes, which need not be valid text: from arguments, file or pipe."""
    if options.prompt and options.prompt_file:
        raise UsageError("--prompt and --prompt-file are both set; leave one out")
    if options.prompt_file:
        try:
            return [Path(options.prompt_file).read_bytes().removesuffix(b"\n")]
        except OSError as e:
            raise UsageError(
                f"--prompt-file {options.prompt_file}: {e.strerror or e}; name a file that can be "
                "read"
            ) from None
    if options.prompt and options.prompt != ["-"]:
        return [os.fsencode(prompt) for prompt in options.prompt]
    if options.compare and not options.prompt:
        return list(COMPARED_PROMPTS)
    if sys.stdin.isatty():
        return [b""]  # a text from its start
    return [sys.stdin.buffer.read().removesuffix(b"\n")]


# ==== OUTPUT ======================================================================================
def print_error_line(line: str) -> None:
    """Print to stderr at once."""
    print(line, file=sys.stderr, flush=True)


def print_text(text: str) -> None:
    """Print to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def save_json(path: str | None, results: dict[str, Any]) -> None:
    """Write the results to the file of --json, if there is one."""
    from train_gpt import replacing

    if path:
        with replacing(Path(path)) as f:
            f.write(json_bytes(results))


# ==== ONE TEXT ====================================================================================
def generate_text(
    options: argparse.Namespace, writer: Writer, strategy: Strategy | None, prompt: bytes
) -> int:
    """Write a text after one prompt; return the exit code."""
    tokens = writer.tokens(prompt)
    limit = 128 if options.tokens is None else options.tokens
    if len(tokens) > writer.context:
        print_error_line(
            f"prompt: {len(tokens)} tokens, but the model sees {writer.context} at a time; its "
            "window slides over the prompt, and the text goes on from the end"
        )
    if sys.stdout.isatty():
        print_text(prompt.decode("utf-8", "replace"))
    if strategy is None:
        results = search_by_beams(options, writer, tokens, limit)
    else:
        results = sample_text(options, writer, strategy, tokens, limit)
    about = dict(artifact=options.artifact, prompt=prompt.decode("utf-8", "replace"))
    save_json(options.json, about | results)
    return 130 if results["texts"][0]["ended"] == "interrupted" else 0


def sample_text(
    options: argparse.Namespace, writer: Writer, strategy: Strategy, prompt: list[int], limit: int
) -> dict[str, Any]:
    """Print a text token by token and a line about it; return both for JSON."""
    from fairway.decoding.writing import write_text

    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    with progress_bar(len(prompt), "reading", "tok") as reading:
        steps, stats = writer.steps(
            prompt, strategy, seed, options.draft, options.drafts, reading.update
        )
    calls_before = writer.engines.calls if writer.engines else 0
    text = write_text(
        steps, writer.speller, limit, options.stop, print_text, fresh=len(prompt) == 1
    )
    print_text("\n")
    line = (
        f"{len(text.tokens)} tokens, {text.rate:.0f} tokens/s, mean log-probability "
        f"{text.mean_logp:.2f}" + ("" if strategy.greedy else f", seed {seed}")
    )
    results = dict(strategy=strategy.name, seed=seed, texts=[as_json(text)])
    if writer.engines:
        calls = writer.engines.calls - calls_before
        per_call = len(text.tokens) / max(calls, 1)
        results["coreml"] = dict(calls=calls, tokens_per_call=per_call)
        line += f"; coreml: {calls} calls, {per_call:.2f} tokens a call"
    if stats is not None:
        results["draft"] = draft_report(options, writer, strategy, prompt, text, stats)
        line += f"; {options.draft}: {draft_line(results['draft'])}"
    print_error_line(line + (", interrupted" if text.ended == "interrupted" else ""))
    return results


def as_json(text: GeneratedText) -> dict[str, Any]:
    """Return a text as --json has it."""
    return dict(
        text=text.text,
        tokens=text.tokens,
        logps=text.logps,
        ended=text.ended,
        mean_logp=text.mean_logp,
        seconds=text.seconds,
        tokens_per_second=text.rate,
    )


def draft_report(
    options: argparse.Namespace,
    writer: Writer,
    strategy: Strategy,
    prompt: list[int],
    text: GeneratedText,
    stats: SpeculationStats,
) -> dict[str, Any]:
    """Return what the draft did and, unless --no-measure is set, the speed-up over plain decoding
    of as many tokens.
    """
    from fairway.decoding.writing import time_plain_decoding

    report = dict(
        kind=options.draft,
        **vars(stats),
        acceptance=stats.acceptance,
        tokens_per_second=stats.rate,
        tokens_per_verification=stats.tokens_per_verification,
    )
    if options.no_measure or text.ended == "interrupted" or not stats.tokens:
        return report
    try:
        with progress_bar(stats.tokens, "the same without the draft", "tok") as bar:
            seconds = time_plain_decoding(writer, prompt, strategy, 0, stats.tokens, bar.update)
    except KeyboardInterrupt:  # the text is printed already: leave the speed-up out
        return report
    return report | dict(plain_seconds=seconds, ratio=seconds / stats.seconds)


def draft_line(report: dict[str, Any]) -> str:
    """Return acceptance and speed-up in words."""
    line = (
        f"{report['accepted']} of {report['drafted']} guesses accepted "
        f"({report['acceptance']:.0%}), {report['tokens_per_verification']:.2f} tokens a "
        "verification"
    )
    if "ratio" in report:
        line += f", {report['ratio']:.2f}x as fast as plain decoding"
    return line


def search_by_beams(
    options: argparse.Namespace, writer: Writer, prompt: list[int], limit: int
) -> dict[str, Any]:
    """Print the best texts of a beam search and a line about them; return both for JSON."""
    from fairway.decoding.writing import search_texts

    width, best, penalty = beam_numbers(options)
    with progress_bar(limit, "searching", "tok") as bar:
        texts = search_texts(writer, prompt, width, limit, penalty, best, options.stop, bar.update)
    for nth, text in enumerate(texts, 1):
        print_text((f"[{nth}] " if best > 1 else "") + text.text + "\n")
    first = texts[0]
    line = (
        f"{len(first.tokens)} tokens, {first.rate:.0f} tokens/s, mean log-probability "
        f"{first.mean_logp:.2f}; the best of {width} beams"
    )
    if best > 1:
        line += ": " + ", ".join(f"[{n}] {text.mean_logp:.2f}" for n, text in enumerate(texts, 1))
    print_error_line(line)
    return dict(
        strategy="beam",
        beams=width,
        length_penalty=penalty,
        texts=[as_json(text) for text in texts],
    )


# ==== ALL STRATEGIES ==============================================================================
def print_comparison(
    options: argparse.Namespace, writer: Writer, strategy: Strategy, prompts: list[bytes]
) -> int:
    """Print the tables of all strategies and drafters; return the exit code."""
    from rich.console import Console

    from fairway.decoding.strategy_table import (
        StrategyComparison,
        compare_strategies,
        comparison_tables,
    )

    drafts = ["ngram", "suffix"] + ["layers"] * (writer.model.cfg.num_layers > 1)
    drafts += [options.draft] * (options.draft != "none")
    task = StrategyComparison(
        prompts=tuple(dict.fromkeys(prompts)),
        strategy=strategy,
        tokens=40 if options.tokens is None else options.tokens,
        samples=5 if options.samples is None else options.samples,
        seed=0 if options.seed is None else options.seed,
        drafts=tuple(dict.fromkeys(drafts)),
        most=options.drafts,
    )
    with progress_bar(task.runs, "writing", "text") as bar:
        results = compare_strategies(writer, task, bar.update)
    console = Console()
    for table in comparison_tables(results):
        console.print(table)
    save_json(options.json, dict(artifact=options.artifact, **results))
    return 0


def connect(folder: str, artifact: str) -> Callable | None:
    """Return what connects a Writer to CoreML shards; None without a folder."""
    if not folder:
        return None
    from fairway.coreml.engine import connect_shards

    return connect_shards(folder, artifact)


def run(options: argparse.Namespace) -> int:
    """Check the options, load the artifact, write."""
    strategy = chosen_strategy(options)
    check_ranges(options)
    check_against_room(options)
    check_writable("--json", options.json)
    prompts = read_prompts(options)
    if len(prompts) > 1 and not options.compare:
        raise UsageError(f"{len(prompts)} prompts are set; several go with --compare only")
    folder = shards_folder(options)
    from fairway.decoding.writing import Writer

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not show every character
    writer = Writer(
        options.artifact,
        options.tokenizer,
        options.device,
        options.cache,
        connect(folder, options.artifact),
    )
    if options.compare:
        return print_comparison(options, writer, strategy, prompts)
    return generate_text(options, writer, strategy, prompts[0])
