"""Run a scorer, ours or anyone's, against the rules that its score must keep.

Example:
    fairway certify fairway.certificate.own_scorer:make_own_scorer --tokens 2000 --seconds 5

    fairway certify mine:Scorer --val 'data/*_val_*.bin' --tokenizer tokenizer.model --json c.json

The first example judges final_model.int6.ptz in the current folder, as eval_final.py --certify does
with its score. `module:Scorer` is a class or a function that is called without arguments; its
result has score(tokens) and distribution(tokens, i), which docs/LEGALITY.md describes. The exit
code is 0 if no rule is broken, 1 if one is, and 2 if nothing could be judged.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairway.command_line import UsageError, check_writable, json_bytes

if TYPE_CHECKING:
    import numpy as np

    from fairway.certificate.judge import Certificate

SYNTHETIC_TOKENS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add(
        "scorer",
        metavar="module:Scorer",
        help="a class or function, called without arguments, that makes the scorer",
    )
    add("--val", metavar="GLOB", help="token shards to test on (default: synthetic tokens)")
    add(
        "--tokenizer", metavar="MODEL", help="SentencePiece model of the shards, to judge bytes too"
    )
    add(
        "--tokens",
        type=int,
        metavar="N",
        help=f"use the first N tokens only (default: all; {SYNTHETIC_TOKENS} synthetic ones)",
    )
    add("--seconds", type=float, default=120.0, metavar="S", help="time to spend (default: 120)")
    add("--json", metavar="FILE", help="write the certificate as JSON as well")
    add("--artifact", metavar="FILE", help="judge the size of this file and of the imported code")
    add(
        "--budget",
        type=int,
        default=16_000_000,
        metavar="BYTES",
        help="for --artifact and code together (default: 16000000)",
    )


def run(options: argparse.Namespace) -> int:
    """Print the certificate; return 1 if a rule is broken."""
    check_options(options)
    from train_gpt import UserError, replacing

    try:
        certificate = certify_named(options)
    except (UserError, OSError) as e:  # not exit code 1, which says that a rule is broken
        raise UsageError(str(e)) from None
    print(certificate.table())
    if options.json:
        with replacing(Path(options.json)) as f:
            f.write(json_bytes({"scorer": options.scorer, **certificate.as_json()}))
    return 0 if certificate.passed else 1


def check_options(options: argparse.Namespace) -> None:
    """Raise UsageError for options that cannot work, before anything is loaded."""
    if options.tokens is not None and options.tokens <= 0:
        raise UsageError(f"--tokens is {options.tokens}; give a positive number")
    if not options.seconds > 0:
        raise UsageError(f"--seconds is {options.seconds:g}; give a positive number")
    if options.artifact is not None and not Path(options.artifact).is_file():
        raise UsageError(f"--artifact {options.artifact} is no file; name the artifact")
    if options.tokenizer is not None and not options.val:
        raise UsageError("--tokenizer without --val: synthetic tokens have no text; add --val")
    check_writable("--json", options.json)


def certify_named(options: argparse.Namespace) -> Certificate:
    """Make the scorer and certify it."""
    from fairway.certificate.judge import certify
    from train_gpt import UserError

    sys.path.insert(0, str(Path.cwd()))
    scorer, tokenizer = make_scorer(options.scorer), read_tokenizer(options.tokenizer)
    vocab_size = vocabulary_of(scorer, options.scorer)
    if tokenizer is not None and tokenizer.vocab_size() != vocab_size:
        raise UserError(
            f"{options.tokenizer} has {tokenizer.vocab_size()} pieces, but the scorer's vocabulary "
            f"is {vocab_size}; give its own tokenizer"
        )
    sizes = None
    if options.artifact:
        sizes = {"artifact": Path(options.artifact).stat().st_size, "code": code_of(scorer)}
    with percent_bar() as on_progress:
        return certify(
            scorer,
            load_tokens(options, vocab_size, tokenizer),
            tokenizer=tokenizer,
            sizes=sizes,
            budget_bytes=options.budget,
            seconds=options.seconds,
            on_progress=on_progress,
        )


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def make_scorer(name: str) -> Any:
    """Return what `module:Scorer` makes."""
    from train_gpt import UserError

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(f"{name!r} names no scorer; write module:Scorer")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except Exception as e:
        raise UserError(
            f"{name} cannot be made: {first_line(e)}; it must be importable from here and need no "
            "arguments"
        ) from None


def vocabulary_of(scorer: Any, name: str) -> int:
    """Return the vocabulary size that the scorer states, or the length of a distribution."""
    import numpy as np

    from train_gpt import BOS_ID, UserError

    try:
        stated = int(getattr(scorer, "vocab_size", 0))
        return stated or len(scorer.distribution(np.array([BOS_ID, BOS_ID]), 1))
    except Exception as e:
        raise UserError(
            f"{name} has no vocab_size, and distribution([1, 1], 1) raised {first_line(e)}; give "
            "it one of them"
        ) from None


def code_of(scorer: Any) -> dict[str, int]:
    """Return the code that counts, path: bytes. It is this repository's imported code except the
    judge's, and the scorer's own module wherever it lies.
    """
    from fairway.certificate.accounts import JUDGES
    from fairway.scoring.shipped import ROOT, imported_code

    code = {path: size for path, size in imported_code().items() if not path.startswith(JUDGES)}
    own = getattr(sys.modules.get(type(scorer).__module__), "__file__", None)
    if own and not Path(own).resolve().is_relative_to(ROOT):
        code[str(Path(own).resolve())] = Path(own).stat().st_size
    return code


def load_tokens(options: argparse.Namespace, vocab_size: int, tokenizer: Any) -> np.ndarray:
    """Return the tokens to test on: those of the shards, or synthetic ones."""
    import numpy as np

    from fairway.certificate.synthetic import synthetic_tokens
    from train_gpt import ByteTable, UserError, check_sidecar, list_shards, read_shard

    if options.val is None:
        return synthetic_tokens(vocab_size, options.tokens or SYNTHETIC_TOKENS)
    if not (paths := list_shards(options.val)):
        raise UserError(
            f"--val {options.val!r} matches no file; quote the pattern, and check that it ends in "
            ".bin"
        )
    shards = [read_shard(path, vocab_size) for path in paths]
    if tokenizer is not None:
        table = ByteTable.of(tokenizer, vocab_size)
        for path, shard in zip(paths, shards, strict=True):
            check_sidecar(path, shard, table)
    tokens = np.concatenate(shards)
    return tokens[: options.tokens or len(tokens)]


def read_tokenizer(path: str | None) -> Any:
    """Return the SentencePiece model at `path`; None without a path."""
    import sentencepiece

    from train_gpt import UserError

    if path is None:
        return None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise UserError(
            f"--tokenizer {path} is no SentencePiece model; give the one that wrote the shards"
        ) from None


@contextlib.contextmanager
def percent_bar() -> Iterator[Any]:
    """Show a bar on a terminal after ten seconds; the value is the callback that moves it."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}% {elapsed}"
    with tqdm(total=100, delay=10, leave=False, bar_format=form, disable=None) as bar:

        def on_progress(rule: str, fraction: float) -> None:
            bar.set_description_str(f"certificate: {rule}", refresh=False)
            bar.update(int(100 * fraction) - bar.n)

        yield on_progress
