"""Score an artifact in bits per byte, by rules that the score can be held to.

    CHECKPOINT=final_model.int6.ptz python eval_final.py [--certify] [--compare] [--prove N]

The model scores windows; experts that learn from text already scored are mixed in. --certify runs
the scorer against every rule of docs/LEGALITY.md; the exit code is 1 if it breaks one. --compare
adds what simpler ways to score give: windows side by side, the model before test-time training,
other mixtures, experts that know older text only. --prove N
encodes the first N tokens at the price that the score counts, and a new process decodes them from
the artifact and that file alone. USE_CORRECTION=1 adds oracle_bpb and charged_bpb of a correction
table, which are no part of the score. Under torchrun all ranks share the windows; then the first
rank goes on alone, writes the score, and does what else was asked for. Results are in
OUT_DIR/eval/. Settings (environment variables):
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from fairway.command_line import Parser, run_reporting
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.settings import LEAST_CERTIFIED_TOKENS, EvalConfig, settings_help
from train_gpt import Config, Log, UserError, set_up_runtime

INTERRUPTED = "interrupted; run it again, and it continues from its columns"


def parse(arguments: Sequence[str] | None) -> Any:
    """Return the options of a command line."""
    parser = Parser(prog="eval_final.py", description=f"{__doc__.strip()}\n{settings_help()}")
    parser.add_argument("--certify", action="store_true", help="run the scorer against the rules")
    parser.add_argument("--compare", action="store_true", help="also score in simpler ways")
    parser.add_argument(
        "--prove",
        type=int,
        default=0,
        metavar="N",
        help="encode N tokens, decode them in a new process and compare (2 to 11 ms a token)",
    )
    return parser.parse_args(arguments)


def evaluate(options: Any, env: Mapping[str, str]) -> int:
    """Score as the environment says, and return the exit code."""
    cfg = EvalConfig.from_env(env)
    check_request(cfg, options)
    rt = set_up_runtime(Config(device=cfg.device), env)
    log = Log(Config(out_dir=cfg.out_dir), rt, "eval")
    evaluation = Evaluation(cfg, rt, log)
    tokens = len(evaluation.text.tokens)
    if options.certify and tokens < LEAST_CERTIFIED_TOKENS:
        raise UserError(
            f"{evaluation.text.name} holds {tokens} tokens; "
            f"--certify needs {LEAST_CERTIFIED_TOKENS}"
        )
    certified = None
    if evaluation.run(options.compare):
        certified = accompany(evaluation, options)
        evaluation.print_summary(certified)
    log.close()
    return int(certified is False)


def check_request(cfg: EvalConfig, options: Any) -> None:
    """Refuse before the scoring what could not be done after it."""
    ttt, prove = cfg.ttt, options.prove
    if prove < 0 or prove == 1:
        raise UserError(f"--prove is {prove}; it takes 2 tokens or more: the first has no price")
    if prove and ttt != "none":
        raise UserError(f"TTT is {ttt}, but --prove decodes with a fixed model; leave one out")
    optional_parts = (
        (ttt != "none", f"TTT={ttt}", "fairway.scoring.adaptation"),
        (options.compare, "--compare", "fairway.scoring.ablation"),
        (cfg.use_correction, "USE_CORRECTION=1", "fairway.correction"),
        (prove, "--prove", "fairway.compression"),
        (options.certify, "--certify", "fairway.certificate"),
    )
    for wanted, option, part in optional_parts:
        if wanted and importlib.util.find_spec(part) is None:
            raise UserError(f"{option} needs {part}, which a record lacks; run it from a checkout")


def accompany(evaluation: Evaluation, options: Any) -> bool | None:
    """Run the rooms that accompany a score, imported once its code is counted; None: no verdict."""
    if evaluation.cfg.use_correction:
        from fairway.correction.oracle_stage import correction_section

        evaluation.add_section("correction", correction_section(evaluation))
    if not options.certify and not options.prove:
        return None
    from fairway.certificate.evaluation_verdicts import judge_evaluation

    prove = min(options.prove, len(evaluation.text.tokens))
    return judge_evaluation(evaluation, options.certify, prove)


def main(env: Mapping[str, str] = os.environ, arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for an error or a broken rule, 2 for usage."""

    def command() -> int:
        try:
            return evaluate(parse(arguments), env)
        except OSError as e:
            raise UserError(
                f"{e.filename or 'OUT_DIR'}: {e.strerror or e}; free space, or set OUT_DIR to "
                "another folder"
            ) from None

    return run_reporting("eval_final", command, INTERRUPTED)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:  # gloo's threads abort an orderly exit now and then
        os._exit(code)
    sys.exit(code)
