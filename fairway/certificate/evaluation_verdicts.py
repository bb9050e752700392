"""Judge a finished evaluation: the verdicts that were asked for, logged and written."""

from __future__ import annotations

import json
from dataclasses import replace

from tqdm import tqdm

from fairway.certificate.judge import Certificate, Verdict, certify
from fairway.scoring.evaluation import Evaluation
from fairway.scoring.mixed import MixedScorer
from fairway.scoring.neural import make_neural
from train_gpt import Runtime


def judge_evaluation(evaluation: Evaluation, with_rules: bool, prove: int) -> bool:
    """Judge a score by every rule, by decoding its first `prove` tokens, or by both.

    Returns whether all of it passed. Writes eval/certificate.json, and the verdicts to score.json.
    """
    certificate = certify_score(evaluation) if with_rules else Certificate([], {})
    if prove:
        from fairway.compression.proof import prove_score

        proof = prove_score(evaluation, prove)
        verdict = "ok" if proof.passed else "FAIL"
        decoded = Verdict("decoded", verdict, proof.figure, proof.details)
        certificate = replace(certificate, verdicts=[*certificate.verdicts, decoded])
    evaluation.log(certificate.table(), "certificate", **certificate.as_json())
    verdicts = {v.rule: v.verdict for v in certificate.verdicts}
    evaluation.add_section("certificate", dict(passed=certificate.passed, rules=verdicts))
    evaluation.write("certificate.json", json.dumps(certificate.as_json(), indent=1))
    return certificate.passed


def certify_score(evaluation: Evaluation) -> Certificate:
    """Run a new scorer with the same settings against every rule, and against what was counted."""
    cfg, text, rt = evaluation.cfg, evaluation.text, evaluation.rt
    # The calls depend on the clock, so that no other rank could follow them.
    neural = make_neural(evaluation.model, cfg, Runtime(0, 1, rt.device, rt.name))
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with (
        evaluation.stage("certificate"),
        tqdm(
            total=1.0, desc="certificate", delay=3, leave=False, bar_format=form, disable=None
        ) as bar,
    ):

        def on_progress(rule: str, fraction: float) -> None:
            bar.set_postfix_str(rule, refresh=False)
            bar.update(fraction - bar.n)

        return certify(
            MixedScorer(neural, cfg, text.table),
            text.tokens,
            byte_table=text.table,
            tokenizer=text.tokenizer,
            claimed=evaluation.logp,
            sizes=evaluation.sizes,
            budget_bytes=cfg.size_budget_bytes,
            seconds=cfg.certify_seconds,
            on_progress=on_progress,
        )
