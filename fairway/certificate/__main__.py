"""python -m fairway.certificate module:Scorer: run anyone's scorer against the rules."""

from __future__ import annotations

import argparse
import contextlib
import glob
import importlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from tqdm import tqdm

from fairway.certificate import certify
from fairway.scoring.shipped import ROOT, imported_code
from train_gpt import BOS_ID, UserError, need, read_shard, replacing

SYNTHETIC_TOKENS = 20_000


def synthetic_tokens(vocab_size: int, n: int, seed: int = 0) -> np.ndarray:
    """uint16[n]: documents of about 200 tokens, in which few tokens are frequent and each has its usual followers."""
    rng = np.random.default_rng(seed)
    ordinary = np.setdiff1d(np.arange(vocab_size), [BOS_ID])
    often = 1 / np.arange(1, len(ordinary) + 1)
    followers = rng.permuted(rng.choice(ordinary, (vocab_size, 4), p=often / often.sum()), axis=1)
    tokens, anew = np.empty(n, np.uint16), rng.choice(ordinary, n, p=often / often.sum())
    at, choice, kind = BOS_ID, rng.integers(0, 4, n), rng.random(n)
    for i in range(n):
        at = (
            BOS_ID
            if i == 0 or kind[i] < 0.005
            else anew[i]
            if kind[i] < 0.3
            else followers[at, choice[i]]
        )
        tokens[i] = at
    return tokens


def make_scorer(name: str) -> Any:
    """`module:Scorer`, called without arguments."""
    module, _, attribute = name.partition(":")
    need(module and attribute, f"{name!r} names no scorer; write module:Scorer")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except Exception as e:
        raise UserError(
            f"{name} cannot be made: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}; it must be "
            "importable from here and need no arguments"
        ) from None


def code_of(scorer: Any) -> dict[str, int]:
    """This repository's code, and the scorer's own module wherever it lies: path → bytes."""
    code, own = imported_code(), getattr(sys.modules.get(type(scorer).__module__), "__file__", None)
    if own and not Path(own).resolve().is_relative_to(ROOT):
        code[str(Path(own).resolve())] = os.path.getsize(own)
    return code


def load_tokens(args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    if args.val is None:
        return synthetic_tokens(vocab_size, args.tokens or SYNTHETIC_TOKENS)
    paths = sorted(glob.glob(args.val))
    need(
        paths,
        f"--val {args.val!r} matches no file; quote the pattern, and see that it ends in .bin",
    )
    tokens = np.concatenate([read_shard(path, vocab_size) for path in paths])
    return tokens[: args.tokens or len(tokens)]


def load_tokenizer(path: str | None) -> Any:
    if path is None:
        return None
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError):
        raise UserError(
            f"--tokenizer {path} is no SentencePiece model; give the one that wrote the shards"
        ) from None


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fairway.certificate",
        description="Run a scorer against the rules "
        "that its score must keep; exits 1 where one is broken, 2 where nothing was run.",
    )
    parser.add_argument(
        "scorer",
        metavar="module:Scorer",
        help="a class or factory, called without arguments, whose "
        "result has score(tokens) and distribution(tokens, i)",
    )
    parser.add_argument(
        "--val", metavar="GLOB", help="token shards to test on (default: synthetic tokens)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="MODEL",
        help="SentencePiece model of the shards: bytes are judged too",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help=f"use the first N tokens only (synthetic: {SYNTHETIC_TOKENS} unless given)",
    )
    parser.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="time to spend (default: 120)"
    )
    parser.add_argument("--json", metavar="OUT", help="write the certificate here as JSON as well")
    parser.add_argument(
        "--artifact", metavar="FILE", help="judge the size of this file and of the code imported"
    )
    parser.add_argument(
        "--budget",
        type=int,
        default=16_000_000,
        metavar="BYTES",
        help="for --artifact and code (default: 16000000)",
    )

    def usage(message: str) -> None:
        raise UserError(f"{message}; --help lists what there is")

    parser.error = usage
    args = parser.parse_args(argv)
    need(
        args.tokens is None or args.tokens > 0, f"--tokens is {args.tokens}; give a positive number"
    )
    need(args.seconds > 0, f"--seconds is {args.seconds:g}; give a positive number")
    need(
        args.artifact is None or os.path.isfile(args.artifact),
        f"--artifact {args.artifact} is no file",
    )
    need(
        args.tokenizer is None or args.val,
        "--tokenizer without --val: synthetic tokens have no text; add --val",
    )
    return args


@contextlib.contextmanager
def progress_bar() -> Iterator[Any]:
    """On stderr, once ten seconds have gone by."""
    form = "{desc} {percentage:3.0f}% {elapsed}"
    with tqdm(total=100, delay=10, file=sys.stderr, leave=False, bar_format=form) as bar:

        def show(rule: str, fraction: float) -> None:
            bar.set_description_str(f"certificate: {rule}", refresh=False)
            bar.update(int(100 * fraction) - bar.n)

        yield show


def run(argv: list[str]) -> int:
    args = parse(argv)
    sys.path.insert(0, os.getcwd())
    scorer, tokenizer = make_scorer(args.scorer), load_tokenizer(args.tokenizer)
    try:
        vocab_size = int(getattr(scorer, "vocab_size", 0)) or len(
            scorer.distribution(np.array([BOS_ID, BOS_ID]), 1)
        )
    except Exception as e:
        raise UserError(
            f"{args.scorer} has no vocab_size, and distribution([1, 1], 1) raised {type(e).__name__}: "
            f"{(str(e).splitlines() or [''])[0]}"
        ) from None
    need(
        tokenizer is None or tokenizer.vocab_size() == vocab_size,
        f"{args.tokenizer} has "
        f"{tokenizer and tokenizer.vocab_size()} pieces, the scorer's vocabulary is {vocab_size}; give its own",
    )
    tokens = load_tokens(args, vocab_size)
    sizes = (
        {"artifact": os.path.getsize(args.artifact), "code": code_of(scorer)}
        if args.artifact
        else None
    )
    with progress_bar() as progress:
        certificate = certify(
            scorer,
            tokens,
            tokenizer=tokenizer,
            sizes=sizes,
            budget_bytes=args.budget,
            seconds=args.seconds,
            progress=progress,
        )
    print(certificate.table())
    if args.json:
        with replacing(Path(args.json)) as f:
            f.write(
                json.dumps({"scorer": args.scorer, **certificate.as_json()}, indent=1).encode()
                + b"\n"
            )
    return 0 if certificate.passed else 1


def main() -> int:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends in silence
    try:
        return run(sys.argv[1:])
    except (UserError, OSError) as e:
        print(f"certificate: error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
