"""The data of the figures, taken from a run's files: small arrays and names, every value
checked.
"""

from __future__ import annotations

import math
import re
import shlex
from typing import Any, NamedTuple

import numpy as np

from fairway.records.files import RecordError
from fairway.records.logs import read_log
from fairway.records.run import RunFiles, dict_at

DEFAULT_BUDGET = 16_000_000  # bytes, if no setting says otherwise
MOST_POINTS = 200_000  # training steps that are read
MOST_ROWS = 64  # items that are read of any list in a file


class Missing(Exception):
    """One line: what a figure lacks, and the command that makes it."""


# ==== VALUES ======================================================================================
def finite_number(value: Any) -> float:
    """Return a JSON number as a float; NaN for anything else."""
    if type(value) not in (int, float) or abs(value) > 1e18:
        return math.nan
    return float(value)


def whole_number(value: Any) -> int | None:
    """Return a count or a size; None for anything else."""
    return value if type(value) is int and 0 <= value < 1 << 53 else None


def clean_text(value: Any, limit: int = 80) -> str:
    """Return one line of printable text of at most `limit` characters; "" for a list or an
    object.
    """
    if type(value) not in (str, int, float, bool):
        return ""
    text = "".join(c if c.isprintable() else " " for c in str(value)[: 4 * limit]).strip()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def objects_in(value: Any, limit: int = MOST_ROWS) -> list[dict[str, Any]]:
    """Return the objects of a list."""
    return [v for v in value[:limit] if isinstance(v, dict)] if isinstance(value, list) else []


def run_names(runs: list[RunFiles]) -> list[str]:
    """Return what legends call each run: its run id, else its folder, seed or number, until all
    differ.
    """
    ids = [clean_text(run.run_id, 24) or "run" for run in runs]
    folders = [
        clean_text(run.folder.resolve().name, 24) or name
        for run, name in zip(runs, ids, strict=True)
    ]
    seeds = [f"{name}, seed {run.seed}" for run, name in zip(runs, ids, strict=True)]
    numbered = [f"{name} ({i + 1})" for i, name in enumerate(ids)]
    return next((way for way in (ids, folders, seeds) if len(set(way)) == len(way)), numbered)


# ==== TRAINING ====================================================================================
class Curve(NamedTuple):
    """Training by the log; arrays [n], in the order of tokens seen."""

    tokens: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray  # nats per token
    val: np.ndarray  # [m, 3]: tokens, seconds, loss
    qat: tuple[float, float] | None  # tokens and seconds at which quantisation-aware training began
    final: float  # loss of the artifact as read back; NaN if it was not scored


def no_export(run: RunFiles, event: str) -> Missing:
    if not run.events:
        return no_events(run)
    return Missing(
        f"no `{event}` event in logs/{clean_text(run.run_id)}.jsonl: training did not reach its "
        "export; RESUME=1 python train_gpt.py continues from its checkpoint"
    )


def no_events(run: RunFiles) -> Missing:
    return Missing(
        f"no training events in logs/{clean_text(run.run_id)}.jsonl; train_gpt.py writes that file "
        "next to the log, so copy it too or train again"
    )


def training_curve(run: RunFiles) -> Curve:
    """Return the curve of a run with at least two logged steps."""
    rows = np.array(
        [
            [finite_number(e.get(name)) for name in ("step", "tokens", "seconds", "loss")]
            for e in run.all_events("train")[-MOST_POINTS:]
        ]
    ).reshape(-1, 4)
    rows = rows[
        np.isfinite(rows).all(axis=1) & (rows[:, 0] > 0) & (rows[:, 1] > 0) & (rows[:, 2] >= 0)
    ]
    if len(rows) < 2:
        raise no_events(run)
    rows = rows[np.argsort(rows[:, 1], kind="stable")]
    each = rows[-1, 1] / rows[-1, 0]  # tokens per step

    def place(event: dict[str, Any]) -> tuple[float, float]:
        at = finite_number(event.get("step")) * each
        return at, float(np.interp(at, rows[:, 1], rows[:, 2]))

    val = np.array(
        [[*place(e), finite_number(e.get("loss"))] for e in run.all_events("val")[-MOST_POINTS:]]
    ).reshape(-1, 3)
    val, qat = val[np.isfinite(val).all(axis=1) & (val[:, 0] > 0)], place(run.event("qat"))
    return Curve(
        rows[:, 1],
        rows[:, 2],
        rows[:, 3],
        val,
        qat if math.isfinite(qat[0]) else None,
        finite_number(run.event("final").get("loss")),
    )


def smooth_curve(
    x: np.ndarray, y: np.ndarray, cells: int = 240, decades: float = 0.035
) -> tuple[np.ndarray, np.ndarray]:
    """Return a weighted mean of neighbours on a logarithmic axis.

    Early points stand alone; late points are averaged over many.
    """
    log = np.log10(x)
    at = np.linspace(log[0], log[-1], cells)
    cell = np.clip(np.searchsorted(at, log, side="right") - 1, 0, cells - 1)
    count = np.bincount(cell, minlength=cells)
    filled = count > 0
    place, mean = (np.bincount(cell, v, cells)[filled] / count[filled] for v in (log, y))
    near = np.exp(-0.5 * ((at[:, None] - at) / decades) ** 2)
    return 10**at, near @ np.interp(at, place, mean) / near.sum(axis=1)


# ==== THE LADDER ==================================================================================
class Rung(NamedTuple):
    """One row of the ladder."""

    group: str  # one of GROUPS
    name: str
    bpb: float


GROUPS = {
    "score": "The score, step by step",
    "alone": "One expert added to the neural model",
    "other": "Other mixtures, for comparison",
    "apart": "Not a score: no record may use it",
}


def no_score(run: RunFiles) -> Missing:
    return Missing(
        f"no evaluation of this run's artifact in eval/; {evaluation_command(run)} makes one"
    )


def evaluation_command(run: RunFiles) -> str:
    """Return the command that scores a run's artifact."""
    artifact = run.artifact or run.folder / "final_model.int6.ptz"
    paths = [shlex.quote(clean_text(str(path), 200)) for path in (artifact, run.folder)]
    return f"CHECKPOINT={paths[0]} OUT_DIR={paths[1]} python eval_final.py --certify"


def score_of(run: RunFiles) -> dict[str, Any]:
    if run.score is None:
        raise no_score(run)
    return run.score


def ladder_rungs(run: RunFiles) -> list[Rung]:
    """Return the rungs of the score, of single experts, of other mixtures, and of what is no
    score.
    """
    score = score_of(run)
    rungs = [
        Rung("score", clean_text(r.get("name"), 40), finite_number(r.get("bpb")))
        for r in objects_in(score.get("ladder"))
    ]
    for r in objects_in(score.get("ablation")):
        name = clean_text(r.get("name"), 40)
        rungs.append(
            Rung("alone" if name.startswith("+") else "other", name, finite_number(r.get("bpb")))
        )
    table = dict_at(score, "correction")
    rungs += [
        Rung("apart", "oracle: knows the answers", finite_number(table.get("oracle_bpb"))),
        Rung("apart", "correction table, bits charged", finite_number(table.get("charged_bpb"))),
    ]
    rungs = list({(r.group, r.name): r for r in rungs if 0 <= r.bpb < 100 and r.name}.values())
    if not rungs:
        raise Missing("eval/score.json holds no ladder; run eval_final.py again")
    return rungs


# ==== QUANTISER AND MIXTURE =======================================================================
class MatrixError(NamedTuple):
    """The quantisation error of one matrix."""

    kind: str  # "attn.q"
    layer: int  # -1: in no layer
    error: float  # relative: |W - Q| / |W|
    bits: float  # per weight, estimated from the entropy of its codes


def matrix_errors(run: RunFiles) -> list[MatrixError]:
    errors = []
    for name, estimate in list(dict_at(run.event("quantised"), "tensors").items())[:2048]:
        error, bits = (
            (finite_number(v) for v in estimate[:2])
            if isinstance(estimate, list) and len(estimate) >= 2
            else (math.nan,) * 2
        )
        if 0 <= error < 1e6 and 0 <= bits <= 32:
            place = re.fullmatch(r"blocks\.(\d{1,3})\.(.+?)(?:\.weight)?", name)
            kind = place[2] if place else name.removesuffix(".weight")
            errors.append(
                MatrixError(clean_text(kind, 20), int(place[1]) if place else -1, error, bits)
            )
    if not errors:
        raise no_export(run, "quantised")
    return errors


class Trace(NamedTuple):
    """The weights of the mixture along the split."""

    experts: list[str]  # those with a weight of half a per cent anywhere
    weights: np.ndarray  # [points, experts], means over equal parts of the split
    tokens: float


def weight_trace(run: RunFiles) -> Trace:
    weights = dict_at(score_of(run), "weights")
    experts, rows = weights.get("experts"), weights.get("trace")
    if isinstance(experts, list) and isinstance(rows, list):
        experts = [clean_text(e, 16) for e in experts[:16]]
        table = [
            [finite_number(w) for w in row]
            for row in rows[:4096]
            if isinstance(row, list) and len(row) == len(experts)
        ]
        grid = np.array(table).reshape(-1, len(experts)) if experts else np.zeros((0, 0))
        grid = grid[np.isfinite(grid).all(axis=1)] if grid.size else grid
        grid = np.clip(grid, 0, 1)
        if len(grid) >= 2 and grid.max() >= 0.005:
            heavy = grid.max(axis=0) >= 0.005
            return Trace(
                [e for e, k in zip(experts, heavy, strict=True) if k],
                grid[:, heavy],
                finite_number(score_of(run).get("tokens")),
            )
    raise Missing("eval/score.json holds no weights of the mixture; run eval_final.py again")


# ==== TABLES ======================================================================================
def count_text(value: float | None, unit: str = "") -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.0f}{unit}"


def decimal_text(value: Any, places: int = 4) -> str:
    value = finite_number(value)
    return f"{value:.{places}f}" if math.isfinite(value) else ""


def duration_text(seconds: Any) -> str:
    value = finite_number(seconds)
    if not math.isfinite(value):
        return ""
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def code_files(run: RunFiles) -> dict[str, int]:
    """Return the bytes of each file that counts as code; train_gpt.py alone without an
    evaluation.
    """
    files = {
        clean_text(name): whole_number(size) or 0
        for name, size in list(dict_at(run.score, "sizes", "code").items())[:4096]
    }
    alone = whole_number(run.event("artifact").get("code_bytes"))
    return files or ({"train_gpt.py": alone} if alone else {})


def packed_share(run: RunFiles) -> float:
    """Return counted bytes / plain bytes of the code: below 1 if a record would ship it packed."""
    plain = sum(code_files(run).values())
    try:
        counted = read_log(run.eval_log).code_bytes if run.eval_log else None
    except RecordError:
        counted = None
    return counted / plain if counted and counted < plain else 1.0


def summary_values(run: RunFiles) -> dict[str, str]:
    """Return the rows of the first table: title → text, "" if the files do not say."""
    start, exported, final, score = (
        run.event("start"),
        run.event("artifact"),
        run.event("final"),
        run.score or {},
    )
    sizes, last = dict_at(score, "sizes"), (run.all_events("train") or [{}])[-1]
    seconds = [finite_number(s) for s in dict_at(score, "seconds").values()]
    code = round(sum(code_files(run).values()) * packed_share(run)) or None
    artifact = whole_number(sizes.get("artifact")) or whole_number(exported.get("bytes"))
    budget = whole_number(exported.get("budget_bytes")) or DEFAULT_BUDGET
    rungs = objects_in(score.get("ladder"))
    rows = {
        "val_bpb (bits per byte)": decimal_text(score.get("val_bpb", final.get("bpb")), 6),
        "scored by": "eval_final.py" if score else "train_gpt.py, neural only" if final else "",
        "val_loss (nats per token)": decimal_text(score.get("val_loss", final.get("loss")), 6),
        "neural alone (bits per byte)": decimal_text(rungs[-2].get("bpb"), 6)
        if len(rungs) > 1
        else "",
        "certificate": certificate_summary(run),
        "validation tokens": count_text(whole_number(score.get("tokens", final.get("tokens")))),
        "validation bytes": count_text(whole_number(score.get("bytes", final.get("bytes")))),
        "artifact": count_text(artifact, " bytes"),
        "code": count_text(code, " bytes"),
        "budget left": count_text(budget - artifact - (code or 0), " bytes") if artifact else "",
        "codec": clean_text(exported.get("codec")),
        "parameters": count_text(whole_number(run.event("model").get("parameters"))),
        "steps": count_text(whole_number(last.get("step"))),
        "training tokens": count_text(whole_number(last.get("tokens"))),
        "training time": duration_text(last.get("seconds")),
        "evaluation time": duration_text(sum(seconds)) if seconds else "",
        "device": clean_text(start.get("device")),
        "world size": clean_text(start.get("world_size")),
        "torch": clean_text(start.get("torch")),
        "preset": clean_text(start.get("preset")),
        "seed": clean_text(run.seed),
    }
    trained, judged = dict_at(start, "sha256"), dict_at(score, "sha256")
    hashes = {
        "training code": trained.get("code"),
        "settings": trained.get("settings"),
        "all data": trained.get("data"),
        "scored split": judged.get("data"),
        "tokenizer": trained.get("tokenizer", judged.get("tokenizer")),
        "artifact": exported.get("sha256"),
    }
    return rows | {
        f"SHA-256 of {name}": clean_text(value, 64)[:16] for name, value in hashes.items()
    }


def certificate_summary(run: RunFiles) -> str:
    rules = rule_verdicts(run)
    if not rules:
        return "none"
    failed = [r[0] for r in rules if r[1] != "ok"]
    return f"{len(rules) - len(failed)} of {len(rules)} rules ok" + (
        f"; not: {', '.join(failed)}" if failed else ""
    )


def rule_verdicts(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return (rule, verdict, figure) of the certificate; [] without one."""
    rows = [
        (
            clean_text(r.get("rule"), 40),
            clean_text(r.get("verdict"), 20),
            clean_text(r.get("figure"), 300),
        )
        for r in objects_in((run.certificate or {}).get("rules"))
    ]
    return [r for r in rows if r[0]]


def no_certificate(run: RunFiles) -> Missing:
    if run.score is None:
        return no_score(run)
    return Missing(f"this evaluation was not certified; {evaluation_command(run)} judges it")
