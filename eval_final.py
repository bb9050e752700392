"""Score an artifact in bits per byte, by rules that the score can be held to.

    CHECKPOINT=final_model.int6.ptz python eval_final.py [--certify] [--prove N]

Neural windows, then experts that learn from what has been scored, mixed; --certify then runs the scorer against every
rule of docs/LEGALITY.md and exits with 1 if it breaks one. --prove N writes the first N tokens at the price that was
counted for them, and lets a process that sees only the artifact and that file decode them. Under torchrun the windows
are shared out. USE_CORRECTION=1 adds a correction table's oracle_bpb and charged_bpb, apart from the score. Results:
OUT_DIR/eval/. Settings:
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from fairway.scoring.evaluation import Evaluation
from fairway.scoring.settings import EvalConfig, settings_help
from train_gpt import Config, Log, UserError, set_up_runtime


def main(env: Mapping[str, str] = os.environ, arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{__doc__}\n{settings_help()}",
    )
    parser.add_argument("--certify", action="store_true", help="run the scorer against the rules")
    parser.add_argument(
        "--prove",
        type=int,
        default=0,
        metavar="N",
        help="encode the split's first N tokens, decode "
        "them elsewhere, compare (about a millisecond a token, twice)",
    )
    given = parser.parse_args(arguments)
    try:
        cfg = EvalConfig.from_env(env)
        rt = set_up_runtime(Config(device=cfg.device), env)
        log = Log(Config(out_dir=cfg.out_dir, wandb_mode=cfg.wandb_mode), rt, "eval")
        certificate = Evaluation(cfg, rt, log).run(given.certify, given.prove)
        log.close()
        if dist.is_initialized():
            dist.barrier()
        return int(certificate is not None and not certificate.passed)
    except UserError as e:
        print(f"eval_final: error: {str(e).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        print(
            "eval_final: interrupted; run it again, and it goes on from its columns",
            file=sys.stderr,
        )
        return 130
    except OSError as e:
        print(
            f"eval_final: error: {e.filename or 'OUT_DIR'}: {e.strerror or e}; free space, or set OUT_DIR to another "
            "folder",
            file=sys.stderr,
        )
    return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    if "WORLD_SIZE" in os.environ:  # gloo's threads abort an orderly exit now and then
        os._exit(code)
    sys.exit(code)
