"""Score one artifact on one text, and write the score to OUT_DIR/eval/.

The folder then holds the columns, final_logp.npy, commits.jsonl and score.json. Later rooms judge
or accompany the score (certificate, correction table, proof): this module imports none of them.
"""

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
import torch.distributed as dist
from tqdm import tqdm

from fairway.artifact_reader import read_artifact
from fairway.scoring.columns import Columns, open_columns
from fairway.scoring.counting import CountedText, usable_threads
from fairway.scoring.experts.match import Matches
from fairway.scoring.experts.mixing import EXPERTS
from fairway.scoring.mixed import MixedScorer, count_ahead, find_matches
from fairway.scoring.neural import KINDS, Neural, OnRows, make_neural
from fairway.scoring.settings import EvalConfig
from fairway.scoring.shipped import code_hashes, code_sizes, counted_code_bytes, extra_code
from fairway.scoring.text import Text, load_text
from train_gpt import (
    Log,
    Runtime,
    build_model,
    file_sha256,
    names_with_role,
    replacing,
)

DELAY = 1024  # tokens; the last comparison shows what experts gain that know only older text
# Stages that the score does not need: their seconds are no part of eval_seconds.
UNCOUNTED_STAGES = ("ablation", "delayed", "correction", "certificate", "proof")
TRACE_POINTS = 256  # points of the mixture weights over the text, in score.json
# Settings that decide the neural columns; other values need other columns.
NEURAL_SETTINGS = (*names_with_role(EvalConfig, "neural", "ttt"), "eval_compile")


class Evaluation:
    """One artifact on one text. `run` computes the score and writes it.

    What comes later reads `text`, `model`, `columns`, `logp` and `sizes`, times itself with
    `stage`, and adds its part of score.json with `add_section`; `print_summary` comes last. Under
    torchrun all ranks share the neural stages and part after them: the first rank does the rest
    alone, and none waits for it.
    """

    columns: Columns  # of the last neural rung
    scorer: MixedScorer
    logp: np.ndarray  # float64[n - 1]: the log-probabilities that are counted

    def __init__(self, cfg: EvalConfig, rt: Runtime, log: Log):
        self.cfg, self.rt, self.log = cfg, rt, log
        self.folder = Path(cfg.out_dir) / "eval"
        self.seconds: dict[str, float] = {}  # of each stage
        self.uncounted = set(UNCOUNTED_STAGES)
        self.time_known = True  # False once columns are read that a killed run began
        extra_code(cfg.extra_code_files)  # a wrong name must not show only after the scoring
        with self.stage("load"):
            artifact = read_artifact(cfg.checkpoint)
            self.text: Text = load_text(cfg, artifact)
            self.model = build_model(artifact, rt.device)
        suffixes = Path(cfg.checkpoint).suffixes  # final_model.int6.ptz logs as final_int6
        self.label = f"final_{suffixes[0][1:] if suffixes[1:] else 'model'}"
        self.hashes = dict(
            artifact=file_sha256(cfg.checkpoint),
            data=self.text.sha256,
            tokenizer=artifact.header["tokenizer_sha256"],
        )
        self.ladder: list[dict[str, Any]] = []
        self.score: dict[str, Any] = {}  # what score.json holds

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the body takes to `seconds[name]`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def bar(self, label: str, rows: int) -> tqdm:
        """Return a progress bar: shown after 3 s, on the first rank, if stderr is a terminal."""
        return tqdm(
            total=rows,
            desc=label,
            unit="tok",
            unit_scale=True,
            delay=3,
            leave=False,
            disable=True if self.rt.rank else None,  # None: disabled where stderr is a file
        )

    # ==== STAGES =================================================================================
    def run(self, compare: bool = False) -> bool:
        """Compute the score and write it; True on the first rank, which alone has the result.

        To `compare`, simpler ways to score are scored before it, and other mixtures after it.
        """
        self.log_start()
        tokens, vocab_size = self.text.tokens, self.model.cfg.vocab_size
        threads = usable_threads(self.rt.world) if self.rt.rank == 0 else 1
        with count_ahead(tokens, vocab_size, self.cfg, threads) as counted:
            with self.stage("match"):
                matches = find_matches(tokens, vocab_size, self.cfg)
            self.columns, neural = self.score_neural(matches, compare)
            if self.rt.world > 1:
                dist.destroy_process_group()
            if self.rt.rank > 0:
                return False
            self.scorer = MixedScorer(neural, self.cfg, self.text.table)
            self.mix(matches, counted)
        self.save_score()
        if compare:
            self.compare_mixtures(matches, threads)
        return True

    def log_start(self) -> None:
        """Log hashes and settings."""
        cfg, text = self.cfg, self.text
        size, sha256 = Path(cfg.checkpoint).stat().st_size, self.hashes["artifact"]
        self.log(f"artifact:{cfg.checkpoint} bytes:{size} sha256:{sha256}")
        self.log(
            f"val_loader:shards pattern={text.name} tokens:{len(text.tokens) - 1} "
            f"bytes:{text.bytes} sha256:{text.sha256}",
            "start",
            settings=dataclasses.asdict(cfg),
            sha256=self.hashes,
            device=self.rt.name,
            torch=str(torch.__version__),
            world_size=self.rt.world,
        )

    def score_neural(self, matches: Matches, compare: bool) -> tuple[Columns, Neural]:
        """Fill the columns of each neural rung; return the last one's columns and scorer.

        The last one is what the score needs; only to `compare`, the others are filled too. Columns
        that an earlier run left on disk are read, not computed again.
        """
        cfg, mode = self.cfg, self.cfg.eval_mode
        length = cfg.eval_seq_len or self.model.cfg.train_seq_len
        frozen = replace(cfg, ttt="none")
        # Windows that do not overlap: what training's own validation prints.
        plain = replace(frozen, eval_mode="sliding", eval_stride=length, eval_documents=False)
        rungs = [
            ("blocks", "neural, windows side by side", f"{self.label}_roundtrip", plain),
            (mode, f"neural, {mode}", f"{self.label}_{mode}_window", frozen),
        ]
        if cfg.ttt != "none":
            rungs.append((f"ttt_{cfg.ttt}", f"+ test-time training ({cfg.ttt})", "legal_ttt", cfg))
        self.uncounted.update(name for name, *_ in rungs[:-1])
        for name, rung, label, settings in rungs if compare else rungs[-1:]:
            kinds = KINDS if name == rungs[-1][0] else {"logp": "f8"}
            neural = make_neural(self.model, settings, self.rt)
            columns = self.fill_columns(name, neural, kinds, matches)
            extra = f" stride:{settings.eval_stride}" if name == "sliding" else ""
            self.add_rung(rung, columns["logp"], name, label, extra)
        return columns, neural

    def fill_columns(
        self, name: str, neural: Neural, kinds: dict[str, str], matches: Matches
    ) -> Columns:
        """Open the columns of a rung and fill the rows that an earlier run did not fill."""
        rows = len(self.text.tokens) - 1
        with self.stage(name):
            columns = self.open_rung(name, neural, kinds, matches)
            if filled := int(np.count_nonzero(columns.covered)):
                self.log(f"columns:{name} {100 * filled / rows:.0f}% read from disk")
            with self.bar(name, -(-(rows - filled) // self.rt.world)) as bar:
                neural.fill(self.text.tokens, columns, matches.hint, self.show_bpb(bar))
        assert columns.complete(), "each row must be scored exactly once"
        self.count_earlier_time(name, filled, rows)
        return columns

    def open_rung(
        self, name: str, neural: Neural, kinds: dict[str, str], matches: Matches
    ) -> Columns:
        """Open a rung's columns: the first rank creates them or finds them, the others follow."""
        key = dict(
            self.hashes,
            **{n: getattr(neural.cfg, n) for n in NEURAL_SETTINGS},
            device=self.rt.device.type,
            hints=hashlib.sha256(matches.hint).hexdigest() if "hint" in kinds else "",
        )
        folder, rows = self.folder / "columns" / name, len(self.text.tokens) - 1
        for first in (True, False):
            if first == (self.rt.rank == 0):
                columns = open_columns(folder, rows, kinds, key, first)
            neural.wait()
        return columns

    def show_bpb(self, bar: tqdm) -> OnRows:
        """Return a callback that advances the bar and shows the bits per byte up to now."""
        bits, size = 0.0, 0

        def on_progress(rows: np.ndarray, logp: np.ndarray) -> None:
            nonlocal bits, size
            bits -= float(logp.sum()) / np.log(2)
            size += int(self.text.sizes[rows].sum())
            bar.set_postfix_str(f"bpb {bits / max(size, 1):.4f}", refresh=False)
            bar.update(len(rows))

        return on_progress

    def count_earlier_time(self, name: str, filled: int, rows: int) -> None:
        """Add the seconds that an earlier run took for the `filled` rows that this one found.

        A run that fills all rows itself leaves its seconds next to them; a killed run cannot.
        """
        path = self.folder / "columns" / name / "seconds.json"
        if self.rt.rank > 0:
            return
        if not filled:
            with replacing(path) as f:
                f.write(json.dumps(self.seconds[name]).encode())
        elif filled == rows and path.is_file():
            self.seconds[name] += float(json.loads(path.read_text()))
        else:
            self.time_known = False

    def mix(self, matches: Matches, counted: CountedText) -> None:
        """Mix the columns with the experts: `logp` is the score."""
        with self.stage("mixture"), self.bar("mixture", self.columns.rows) as bar:
            self.logp = self.scorer.mixed(
                self.text.tokens,
                self.columns,
                matches,
                counted,
                lambda done: bar.update(done - bar.n),
            )
        self.add_rung("+ experts, mixed: final", self.logp, "mixture", "final", "")

    def compare_mixtures(self, matches: Matches, threads: int) -> None:
        """Log every other mixture of the same columns, and the default one with delayed experts."""
        from fairway.scoring.ablation import ablation, as_rows, delayed  # no part of the score

        text, columns, vocab_size = self.text, self.columns, self.model.cfg.vocab_size
        base = text.bpb(columns["logp"])
        with self.stage("ablation"), self.bar("ablation", columns.rows) as bar:
            sums = ablation(
                text.tokens,
                text.sizes,
                columns,
                matches,
                vocab_size,
                self.cfg,
                threads,
                lambda done: bar.update(done - bar.n),
            )
        with self.stage("delayed"):
            sums["all, delayed"] = delayed(
                text.tokens, text.sizes, columns, vocab_size, self.cfg, DELAY, threads
            )
        rows = as_rows(sums, text, base)
        self.add_section("ablation", rows)
        for row in rows:
            self.log(
                f"ablation:{row['name']:20} val_bpb:{row['bpb']:.8f} gain:{row['gain']:+.8f}",
                "ablation",
                **row,
            )
        total_gain, delayed_gain = base - self.ladder[-1]["bpb"], rows[-1]["gain"]
        self.log(
            f"gain:{total_gain:.8f} of which {delayed_gain:.8f} with text older than {DELAY} "
            "tokens only"
        )

    # ==== RESULTS ================================================================================
    def add_rung(self, name: str, logp: np.ndarray, stage: str, label: str, extra: str) -> None:
        """Add a rung to the ladder and log it in the challenge's two lines."""
        loss, bpb = -float(np.mean(logp, dtype=np.float64)), self.text.bpb(logp)
        before = self.ladder[-1]["bpb"] if self.ladder else bpb
        seconds = self.seconds[stage]
        self.ladder.append(dict(name=name, loss=loss, bpb=bpb, gain=before - bpb, seconds=seconds))
        self.log(
            f"{label} val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:{1000 * seconds:.0f}ms{extra}"
        )
        self.log(
            f"{label}_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}{extra}",
            "rung",
            label=label,
            **self.ladder[-1],
        )

    def save_score(self) -> None:
        """Write the score, the commit log and the log-probabilities as soon as they are known.

        The code that counts is what was imported up to here: the score needed no more.
        """
        code, final = code_sizes(self.cfg.extra_code_files), self.ladder[-1]
        trace = self.scorer.mixture.trace
        points = np.array_split(trace, min(TRACE_POINTS, len(trace)))
        counted = [s for name, s in self.seconds.items() if name not in self.uncounted]
        self.score.update(
            val_bpb=final["bpb"],
            val_loss=final["loss"],
            tokens=len(self.logp),
            bytes=self.text.bytes,
            ladder=self.ladder,
            seconds=self.seconds,
            eval_seconds=sum(counted) if self.time_known else None,
            sizes=dict(artifact=Path(self.cfg.checkpoint).stat().st_size, code=code),
            sha256=self.hashes,
            code=code_hashes(code),
            settings=dataclasses.asdict(self.cfg),
            weights=dict(
                experts=EXPERTS,
                trace=[np.round(np.mean(part, axis=0), 4).tolist() for part in points],
            ),
            device=self.rt.name,
            world_size=self.rt.world,
            torch=str(torch.__version__),
            certificate=None,
        )
        self.write("score.json", json.dumps(self.score, indent=1))
        commits = [json.dumps(commit._asdict()) + "\n" for commit in self.scorer.commits]
        self.write("commits.jsonl", "".join(commits))
        with replacing(self.folder / "final_logp.npy") as f:
            np.save(f, self.logp)

    @property
    def sizes(self) -> dict[str, Any]:
        """Bytes of the artifact and of each counted file: {"artifact": n, "code": {path: n}}."""
        return self.score["sizes"]

    def add_section(self, name: str, section: Any) -> None:
        """Put a section into score.json, and write the file again."""
        self.score[name] = section
        self.write("score.json", json.dumps(self.score, indent=1))

    def print_summary(self, certified: bool | None) -> None:
        """Log the ladder, times and sizes, and the score on the last line."""
        seconds, final = self.score["eval_seconds"], self.ladder[-1]
        for rung in self.ladder:
            self.log(
                f"ladder:{rung['name']:32} val_bpb:{rung['bpb']:.8f} gain:{rung['gain']:+.8f} "
                f"seconds:{rung['seconds']:.1f}"
            )
        unknown = "unknown (an interrupted run made part of the columns)"
        self.log(
            "stages:"
            + " ".join(f"{name}:{s:.1f}s" for name, s in self.seconds.items())
            + f" total_eval_time:{unknown if seconds is None else f'{1000 * seconds:.0f}ms'}"
        )
        artifact, files = self.sizes["artifact"], self.sizes["code"]
        code = counted_code_bytes(files)
        self.log(
            f"Total submission size: {artifact + code} bytes (artifact:{artifact} code:{code} "
            f"packed, in {len(files)} files, budget:{self.cfg.size_budget_bytes})"
        )
        self.log(
            f"val_bpb:{final['bpb']:.8f} val_loss:{final['loss']:.8f}",
            "final",
            bpb=final["bpb"],
            loss=final["loss"],
            tokens=len(self.logp),
            bytes=self.text.bytes,
            seconds=seconds,
            artifact_bytes=artifact,
            code_bytes=code,
            certified=certified,
        )

    def write(self, name: str, text: str) -> None:
        """Replace a file of OUT_DIR/eval/."""
        with replacing(self.folder / name) as f:
            f.write(text.encode())
