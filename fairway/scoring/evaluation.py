"""The stages of an evaluation, and what it leaves on disk: OUT_DIR/eval/ holds the columns, the final
log-probabilities, the commit log, score.json and, when asked for, certificate.json."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fairway.certificate import LEAST_TOKENS, Certificate, Verdict, certify
from fairway.scoring.ablation import ablation, as_rows, delayed
from fairway.scoring.adaptation import adapting
from fairway.scoring.columns import Columns, open_columns
from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import EXPERTS
from fairway.scoring.mixed import MixedScorer, find_matches
from fairway.scoring.neural import KINDS, Neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import code_hashes, code_sizes
from fairway.scoring.text import Text, load_text
from train_gpt import (
    Log,
    Runtime,
    build_model,
    file_sha256,
    names_with_role,
    need,
    read_artifact,
    replacing,
)

DELAY = 1024  # tokens: what is left of the experts' gain when they may use older text only
BESIDE = (
    "ablation",
    "delayed",
    "correction",
    "certificate",
    "proof",
)  # stages that the score does not need
TRACE_POINTS = 256  # of the weights over the split, in score.json
# Settings that decide the neural columns; other values need other columns.
NEURAL_SETTINGS = names_with_role(EvalConfig, "neural", "ttt")


class Evaluation:
    """One artifact on one split. `run` goes through the stages, printing as it goes; `score` is what score.json holds.
    Under torchrun all ranks share the neural stages, and the first does the rest alone."""

    def __init__(self, cfg: EvalConfig, rt: Runtime, log: Log):
        self.cfg, self.rt, self.log, self.seconds, self.timed = cfg, rt, log, {}, True
        self.folder = Path(cfg.out_dir) / "eval"
        with self.stage("load"):
            artifact = read_artifact(cfg.checkpoint)
            self.text: Text = load_text(cfg, artifact)
            self.model = build_model(artifact, rt.device)
        self.label = f"final_{Path(cfg.checkpoint).suffixes[0][1:] if Path(cfg.checkpoint).suffixes[1:] else 'model'}"
        self.hashes = dict(
            artifact=file_sha256(cfg.checkpoint),
            data=self.text.sha256,
            tokenizer=artifact.header["tokenizer_sha256"],
        )
        self.ladder: list[dict[str, Any]] = []
        self.score: dict[str, Any] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def bar(self, what: str, rows: int) -> tqdm:
        """A progress bar, on the first rank, for what takes longer than a few seconds."""
        return tqdm(
            total=rows,
            desc=what,
            unit="tok",
            unit_scale=True,
            delay=3,
            leave=False,
            disable=self.rt.rank > 0,
        )

    # ==== STAGES ======================================================================================================
    def run(self, with_certificate: bool, prove: int = 0) -> Certificate | None:
        cfg, text = self.cfg, self.text
        need(
            prove == 0 or prove >= 2,
            f"--prove is {prove}; it takes 2 tokens or more: the first has no price",
        )
        need(
            prove == 0 or cfg.ttt == "none",
            f"TTT is {cfg.ttt}, but --prove decodes with a model that stays as it "
            "is; leave one of them out",
        )
        need(
            not with_certificate or len(text.tokens) >= LEAST_TOKENS,
            f"{text.name} holds {len(text.tokens)} tokens; --certify needs {LEAST_TOKENS}",
        )
        size, sha256 = Path(cfg.checkpoint).stat().st_size, self.hashes["artifact"]
        self.log(f"artifact:{cfg.checkpoint} bytes:{size} sha256:{sha256}")
        self.log(
            f"val_loader:shards pattern={text.name} tokens:{len(text.tokens) - 1} bytes:{text.bytes} "
            f"sha256:{text.sha256}",
            "start",
            settings=dataclasses.asdict(cfg),
            sha256=self.hashes,
            device=self.rt.name,
            torch=str(torch.__version__),
            world_size=self.rt.world,
        )
        with self.stage("match"):
            matches = find_matches(text.tokens, self.model.cfg.vocab_size, cfg)
        columns, neural = self.neural_stages(matches)
        if self.rt.rank > 0:
            return None
        scorer = MixedScorer(neural, cfg, text.table)
        logp = self.mix(scorer, columns, matches)
        self.try_others(columns, matches)
        if cfg.use_correction:
            self.correct(columns, logp)
        certificate = self.judged(logp, with_certificate, prove)
        self.finish(logp, certificate, scorer)
        return certificate

    def neural_stages(self, matches: Matches) -> tuple[Columns, Neural]:
        """The ladder's first rungs, each read from disk where it was computed before; the last one's columns and
        scorer."""
        cfg = self.cfg
        length = cfg.eval_seq_len or self.model.cfg.train_seq_len
        plain = replace(
            cfg, eval_mode="sliding", eval_stride=length, eval_documents=False, ttt="none"
        )
        frozen = replace(cfg, ttt="none")
        rungs = [
            ("blocks", "neural, windows side by side", f"{self.label}_roundtrip", plain),
            (
                cfg.eval_mode,
                f"neural, {cfg.eval_mode}",
                f"{self.label}_{cfg.eval_mode}_window",
                frozen,
            ),
        ]
        if cfg.ttt != "none":
            rungs.append((f"ttt_{cfg.ttt}", f"+ test-time training ({cfg.ttt})", "legal_ttt", cfg))
        for name, rung, label, settings in rungs:
            wanted = KINDS if name == rungs[-1][0] else {"logp": "f8"}
            neural = adapting(self.model, settings, self.rt)
            columns = self.neural(name, neural, wanted, matches)
            extra = f" stride:{settings.eval_stride}" if name == "sliding" else ""
            self.rung(rung, columns["logp"], name, label, extra)
        return columns, neural

    def columns_of(
        self, name: str, neural: Neural, kinds: dict[str, str], matches: Matches
    ) -> Columns:
        """The columns of a rung: the first rank makes them or finds them, the others follow."""
        key = dict(
            self.hashes,
            **{n: getattr(neural.cfg, n) for n in NEURAL_SETTINGS},
            device=self.rt.device.type,
            hints=hashlib.sha256(matches.hint).hexdigest() if "hint" in kinds else "",
        )
        for first in (True, False):
            if first == (self.rt.rank == 0):
                columns = open_columns(
                    self.folder / "columns" / name, len(self.text.tokens) - 1, kinds, key, first
                )
            neural.wait()
        return columns

    def neural(self, name: str, neural: Neural, kinds: dict[str, str], matches: Matches) -> Columns:
        with self.stage(name):
            columns, rows = self.columns_of(name, neural, kinds, matches), len(self.text.tokens) - 1
            if there := int(np.count_nonzero(columns.covered)):
                self.log(f"columns:{name} {100 * there / rows:.0f}% were there already")
            with self.bar(name, -(-(rows - there) // self.rt.world)) as bar:
                bits, size = 0.0, 0

                def told(rows: np.ndarray, logp: np.ndarray) -> None:
                    nonlocal bits, size
                    bits, size = (
                        bits - float(logp.sum()) / np.log(2),
                        size + int(self.text.sizes[rows].sum()),
                    )
                    bar.set_postfix_str(f"bpb {bits / max(size, 1):.4f}", refresh=False)
                    bar.update(len(rows))

                neural.fill(self.text.tokens, columns, matches.hint, told)
        assert columns.complete(), "each row must be scored exactly once"
        self.count_earlier(name, there == rows, there > 0)
        return columns

    def count_earlier(self, name: str, complete: bool, begun: bool) -> None:
        """Columns that were read back took time as well: a run that made them alone left its seconds beside them."""
        path = self.folder / "columns" / name / "seconds.json"
        if self.rt.rank > 0:
            return
        if not begun:
            with replacing(path) as f:
                f.write(json.dumps(self.seconds[name]).encode())
        elif complete and path.is_file():
            self.seconds[name] += float(json.loads(path.read_text()))
        else:
            self.timed = False

    def mix(self, scorer: MixedScorer, columns: Columns, matches: Matches) -> np.ndarray:
        with self.stage("mixture"), self.bar("mixture", columns.rows) as bar:
            logp = scorer.mixed(
                self.text.tokens, columns, matches, lambda done: bar.update(done - bar.n)
            )
        self.rung("+ experts, mixed: final", logp, "mixture", "final", "")
        return logp

    def try_others(self, columns: Columns, matches: Matches) -> None:
        """Every other mixture on the same columns, and the default one with experts that must not look close by."""
        text, vocab_size, base = (
            self.text,
            self.model.cfg.vocab_size,
            self.text.bpb(columns["logp"]),
        )
        with self.stage("ablation"), self.bar("ablation", columns.rows) as bar:
            sums = ablation(
                text.tokens,
                text.sizes,
                columns,
                matches,
                vocab_size,
                self.cfg,
                lambda done: bar.update(done - bar.n),
            )
        with self.stage("delayed"):
            sums["all, delayed"] = delayed(
                text.tokens, text.sizes, columns, vocab_size, self.cfg, DELAY
            )
        self.score["ablation"] = as_rows(sums, text, base)
        for row in self.score["ablation"]:
            self.log(
                f"ablation:{row['name']:20} val_bpb:{row['bpb']:.8f} gain:{row['gain']:+.8f}",
                "ablation",
                **row,
            )
        left, whole = self.score["ablation"][-1]["gain"], base - self.ladder[-1]["bpb"]
        self.log(f"gain:{whole:.8f} of which {left:.8f} with text older than {DELAY} tokens only")

    def correct(self, columns: Columns, logp: np.ndarray) -> None:
        """What a correction table would make of the score: an oracle, with its price. The one that lies beside the
        artifact, or one that is made here."""
        from fairway.correction import (
            oracle,
            table,
        )  # code that counts where it is used, and only there

        cfg, tokens, path = self.cfg, self.text.tokens, table.sidecar(self.cfg.checkpoint)
        neural, artifact = (
            oracle.viewer(self.model, self.rt),
            bytes.fromhex(self.hashes["artifact"]),
        )
        with self.stage("correction"), self.bar("correction", len(logp)) as bar:
            if path.exists():
                made, entries = oracle.stored_table(path, neural, tokens, artifact, bar.update)
            else:
                budget = {-1: oracle.default_budget(len(logp)), 0: None}.get(
                    cfg.correction_bytes, cfg.correction_bytes
                )
                made, entries = oracle.build_table(
                    neural,
                    tokens,
                    columns["logp"],
                    cfg.correction_codec,
                    budget,
                    artifact,
                    bar.update,
                )
            size = len(table.table_bytes(made))
            table.apply(
                logp, entries, tokens[1:]
            )  # refuses entries that are not this split's targets
            cost = table.charge(logp, entries, size, self.text.bytes)
        self.score["correction"] = dict(
            entries=len(entries.tokens),
            bytes=size,
            codec=made.codec,
            stored=path.exists(),
            **cost._asdict(),
        )
        self.log(
            f"{table.NOTICE}\ncorrection:{made.codec} entries:{len(entries.tokens)} bytes:{size} "
            f"saved_bits:{cost.saved_bits:.0f} paid_bits:{cost.paid_bits:.0f}\noracle_bpb:{cost.oracle_bpb:.8f}\n"
            f"charged_bpb:{cost.charged_bpb:.8f}",
            "correction",
            **self.score["correction"],
        )

    def judged(self, logp: np.ndarray, with_certificate: bool, prove: int) -> Certificate | None:
        """The verdicts that were asked for: of every rule, and of a decoder that has never seen the text."""
        found = self.certificate(logp) if with_certificate else None
        if prove:
            verdict = self.decoded(logp, min(prove, len(self.text.tokens)))
            found = replace(
                found or Certificate([], {}), verdicts=[*(found.verdicts if found else []), verdict]
            )
        if found is not None:
            self.log(found.table(), "certificate", **found.as_json())
        return found

    def certificate(self, logp: np.ndarray) -> Certificate:
        """A scorer made anew, run against every rule and against what was counted."""
        alone = Runtime(
            0, 1, self.rt.device, self.rt.name
        )  # its calls follow the clock: no other rank could
        with (
            self.stage("certificate"),
            tqdm(
                total=1.0,
                desc="certificate",
                delay=3,
                leave=False,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            ) as bar,
        ):

            def told(rule: str, fraction: float) -> None:
                bar.set_postfix_str(rule, refresh=False)
                bar.update(fraction - bar.n)

            return certify(
                MixedScorer(adapting(self.model, self.cfg, alone), self.cfg, self.text.table),
                self.text.tokens,
                byte_table=self.text.table,
                tokenizer=self.text.tokenizer,
                claimed=logp,
                sizes=self.sizes(),
                budget_bytes=self.cfg.size_budget_bytes,
                seconds=self.cfg.certify_seconds,
                progress=told,
            )

    def decoded(self, logp: np.ndarray, count: int) -> Verdict:
        """eval/proof.fwy: the first tokens at the price that was counted, as another process decodes them."""
        from fairway.compression import proof  # code that counts where it is used, and only there

        cfg = replace(
            self.cfg, tokenizer_path=self.text.tokenizer_path
        )  # it may lie beside the shards
        tokens, path = self.text.tokens[:count], self.folder / "proof.fwy"
        with self.stage("proof"):
            with self.bar("encoding", count - 1) as bar:
                proof.write_proof(cfg, tokens, path, bar.update)
            return proof.prove(cfg, tokens, logp[: count - 1], path)

    # ==== WHAT IS SAID AND WRITTEN ====================================================================================
    def rung(self, name: str, logp: np.ndarray, stage: str, label: str, extra: str) -> None:
        loss, bpb = -float(np.mean(logp, dtype=np.float64)), self.text.bpb(logp)
        before = self.ladder[-1]["bpb"] if self.ladder else bpb
        self.ladder.append(
            dict(name=name, loss=loss, bpb=bpb, gain=before - bpb, seconds=self.seconds[stage])
        )
        self.log(
            f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * self.seconds[stage]:.0f}ms{extra}"
        )
        self.log(
            f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}{extra}",
            "rung",
            label=label,
            **self.ladder[-1],
        )

    def sizes(self) -> dict[str, Any]:
        return dict(
            artifact=Path(self.cfg.checkpoint).stat().st_size,
            code=code_sizes(self.cfg.extra_code_files),
        )

    def finish(
        self, logp: np.ndarray, certificate: Certificate | None, scorer: MixedScorer
    ) -> None:
        """The ladder on the screen, everything in eval/."""
        sizes, final = self.sizes(), self.ladder[-1]
        code = sum(sizes["code"].values())
        needed = (
            sum(s for name, s in self.seconds.items() if name not in BESIDE) if self.timed else None
        )
        for rung in self.ladder:
            self.log(
                f"ladder:{rung['name']:32} val_bpb:{rung['bpb']:.8f} gain:{rung['gain']:+.8f} "
                f"seconds:{rung['seconds']:.1f}"
            )
        total = (
            "unknown (an interrupted run made part of the columns)"
            if needed is None
            else f"{1000 * needed:.0f}ms"
        )
        self.log(
            "stages:"
            + " ".join(f"{name}:{s:.1f}s" for name, s in self.seconds.items())
            + f" total_eval_time:{total}"
        )
        self.log(
            f"Total submission size: {sizes['artifact'] + code} bytes (artifact:{sizes['artifact']} code:{code} "
            f"in {len(sizes['code'])} files, budget:{self.cfg.size_budget_bytes})"
        )
        self.score.update(
            val_bpb=final["bpb"],
            val_loss=final["loss"],
            tokens=len(logp),
            bytes=self.text.bytes,
            ladder=self.ladder,
            seconds=self.seconds,
            eval_seconds=needed,
            sizes=sizes,
            sha256=self.hashes,
            code=code_hashes(sizes["code"]),
            settings=dataclasses.asdict(self.cfg),
            weights=dict(
                experts=EXPERTS,
                trace=[
                    np.round(np.mean(part, axis=0), 4).tolist()
                    for part in np.array_split(
                        scorer.mixture.trace, min(TRACE_POINTS, len(scorer.mixture.trace))
                    )
                ],
            ),
            device=self.rt.name,
            world_size=self.rt.world,
            torch=str(torch.__version__),
            certificate=None
            if certificate is None
            else dict(
                passed=certificate.passed, rules={v.rule: v.verdict for v in certificate.verdicts}
            ),
        )
        self.write("score.json", json.dumps(self.score, indent=1))
        self.write(
            "commits.jsonl",
            "".join(json.dumps(commit._asdict()) + "\n" for commit in scorer.commits),
        )
        if certificate is not None:
            self.write("certificate.json", json.dumps(certificate.as_json(), indent=1))
        with replacing(self.folder / "final_logp.npy") as f:
            np.save(f, logp)
        self.log(
            f"val_bpb:{final['bpb']:.8f} val_loss:{final['loss']:.8f}",
            "final",
            bpb=final["bpb"],
            loss=final["loss"],
            tokens=len(logp),
            bytes=self.text.bytes,
            seconds=needed,
            artifact_bytes=sizes["artifact"],
            code_bytes=code,
            certified=certificate and certificate.passed,
        )

    def write(self, name: str, text: str) -> None:
        with replacing(self.folder / name) as f:
            f.write(text.encode())
