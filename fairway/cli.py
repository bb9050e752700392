"""The command `fairway`: its verbs are the front doors of the rooms.

Each verb is one module of fairway/verbs/: its docstring is the description, `add_arguments(parser)`
declares its options, `run(options)` does the work and returns the exit code. A verb imports its
room when it runs, so that `--help` never waits for torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fairway.command_line import Parser, UsageError, did_you_mean, run_reporting

# In the order of the pipeline: the verb and what it does. `export-coreml` is in
# fairway/verbs/export_coreml.py.
VERBS = {
    "plan": "predict time, memory, bytes and dollars of a run before a machine is rented",
    "certify": "run a scorer, ours or anyone's, against the rules that its score must keep",
    "compress": "compress any files without loss into one bitstream",
    "decompress": "get the files of a bitstream back, every byte or an error",
    "describe": "print what a bitstream says about itself",
    "decode-proof": "decode the tokens of a proof that eval_final.py --prove wrote",
    "generate": "write text with an artifact: sampling, beam search, speculative decoding",
    "export-coreml": "convert an artifact to CoreML shards for the Neural Engine, and check them",
    "compare": "compare compression methods: score, bytes as shipped, speed, memory",
    "report": "draw one run or several as one HTML page with its pictures",
    "runs": "list what was run, newest last",
    "diff": "show what differs between two runs, and what it did",
    "pack": "write a record's folder from finished runs",
    "check": "judge record folders, ours or anyone's, one line a check",
    "significance": "test one record against another, in nats",
    "table": "rewrite records/README.md from the records",
    "pr": "print branch, commit and body of the pull request that adds a record",
    "code": "list the files that a record ships next to train_gpt.py",
}


def overview() -> str:
    lines = [f"  {verb:15}{line}" for verb, line in VERBS.items()]
    return "\n".join(
        [
            "usage: fairway VERB [options]",
            "",
            "Train with train_gpt.py and score with eval_final.py; these verbs do the rest:",
            "",
            *lines,
            "",
            "fairway VERB --help describes a verb and gives an example.",
        ]
    )


def dispatch(arguments: Sequence[str]) -> int:
    """Run the verb that `arguments` name."""
    if not arguments:
        raise UsageError("a verb is missing; see fairway --help")
    verb, *rest = arguments
    if verb in ("-h", "--help"):
        print(overview())
        return 0
    if verb not in VERBS:
        hint = did_you_mean(verb, list(VERBS))
        raise UsageError(f"{verb!r} is no verb{hint}; see fairway --help")
    module = importlib.import_module(f"fairway.verbs.{verb.replace('-', '_')}")
    parser = Parser(prog=f"fairway {verb}", description=module.__doc__)
    module.add_arguments(parser)
    return module.run(parser.parse_args(rest))


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    known = bool(arguments) and arguments[0] in VERBS
    return run_reporting(
        f"fairway {arguments[0]}" if known else "fairway", lambda: dispatch(arguments)
    )
