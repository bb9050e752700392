"""Our own scorer, for `fairway certify`: that of eval_final.py, without a split to score."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from fairway.artifact_reader import read_artifact
from fairway.scoring.mixed import MixedScorer
from fairway.scoring.neural import make_neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.text import load_tokenizer
from train_gpt import ByteTable, Config, build_model, set_up_runtime


def make_own_scorer(env: Mapping[str, str] = os.environ) -> MixedScorer:
    """Return the scorer of the artifact at CHECKPOINT (final_model.int6.ptz by default), with the
    settings that the environment gives to eval_final.py.
    """
    cfg = EvalConfig.from_env(env)
    artifact = read_artifact(cfg.checkpoint)
    folder = Path(cfg.checkpoint).parent
    tokenizer, _ = load_tokenizer(cfg.tokenizer_path, artifact, folder)
    table = ByteTable.of(tokenizer, artifact.config.vocab_size)
    rt = set_up_runtime(Config(device=cfg.device), {})  # one process: its calls follow the clock
    return MixedScorer(make_neural(build_model(artifact, rt.device), cfg, rt), cfg, table)
