"""submission.json: the keys that we write, and the keys that others write.

55 real files use 139 different keys. So `read_submission` knows the usual other names, and
`problems` asks of a foreign file only what a table of records needs. BPB is bits per byte, a loss
is nats per token; both are means over seeds.
"""

from __future__ import annotations

import math
import re
import statistics
from typing import Any, NamedTuple

# No compressor of text gets below the first; 8 bits store a byte as it is.
LOWEST_BPB, HIGHEST_BPB = (
    0.2,
    8.0,
)
LN2 = math.log(2)


class Key(NamedTuple):
    """One key of submission.json: the kind of its value, and its meaning."""

    kind: str  # "text", "number", "count", "seeds", "results" or "table"
    meaning: str
    ours: bool = True  # whether every file of ours has it


KEYS = {
    "author": Key("text", "who"),
    "github_id": Key("text", "their name on GitHub"),
    "name": Key("text", "what the run is called in tables"),
    "blurb": Key("text", "what was done, in a few sentences"),
    "date": Key("text", "YYYY-MM-DD, or with a time after it"),
    "track": Key("text", "10min_16mb or non_record_16mb"),
    "val_loss": Key("number", "nats for each token of the validation split: mean over the seeds"),
    "val_bpb": Key("number", "bits per byte: mean over the seeds, the headline"),
    "val_loss_std": Key("number", "standard deviation over the seeds (n - 1); with one seed, 0"),
    "val_bpb_std": Key("number", "standard deviation over the seeds (n - 1); with one seed, 0"),
    "seeds": Key("seeds", "all that were run"),
    "seed_results": Key(
        "results", "by seed: val_loss, val_bpb, artifact_bytes, steps, step_avg_ms, eval_time_s"
    ),
    "bytes_total": Key("count", "artifact and code of the largest seed"),
    "bytes_code": Key("count", "of everything that ships as code"),
    "hardware": Key("text", "8x NVIDIA H100 80GB HBM3"),
    "pytorch_version": Key("text", "2.13.0+cu128"),
    "technique_summary": Key("text", "the techniques by name", ours=False),
    "compliance": Key("table", "what was verified, by name", ours=False),
}
FIRST_OF = {  # the names of a key in other files; the first one found counts
    "val_bpb": ("val_bpb", "mean_val_bpb", "mean_bpb"),
    "val_loss": (
        "val_loss",
        "mean_val_loss",
        "val_loss_nats",
        "mean_val_loss_nats",
        "val_loss_sliding",
    ),
    "val_bpb_std": ("val_bpb_std", "std_bpb"),
    "val_loss_std": ("val_loss_std", "val_loss_nats_std", "std_val_loss_nats"),
    "bytes_total": ("bytes_total", "artifact_bytes_max"),
    "bytes_code": ("bytes_code", "code_bytes"),
    "hardware": ("hardware", "gpu", "platform"),
    "name": ("name", "run_name"),
}
SEED = {
    "val_bpb": ("val_bpb",),
    "val_loss": ("val_loss",),
    "bytes": ("artifact_bytes", "bytes_total"),
    "steps": ("steps", "step_stop"),
    "step_avg_ms": ("step_avg_ms", "ms_per_step"),
    "eval_seconds": ("eval_time_s", "eval_time_seconds", "eval_s", "ttt_eval_time_s"),
}


class SeedResult(NamedTuple):
    """The figures of one seed; None for each that is not stated."""

    val_loss: float | None
    val_bpb: float | None
    # `artifact_bytes` as stated: usually artifact and code, in some files the artifact alone.
    bytes: int | None
    steps: int | None
    step_avg_ms: float | None
    eval_seconds: float | None


class Submission(NamedTuple):
    """A submission.json; None for each value that is missing or of the wrong type."""

    author: str | None
    github_id: str | None
    name: str | None
    blurb: str | None
    date: str | None
    track: str | None
    val_loss: float | None
    val_bpb: float | None
    val_loss_std: float | None
    val_bpb_std: float | None
    seeds: list[int] | None
    seed_results: dict[int, SeedResult]  # {} if there are none
    bytes_total: int | None
    bytes_code: int | None
    hardware: str | None
    pytorch_version: str | None


# ==== Reading =====================================================================================
def json_number(value: Any) -> float | None:
    """Return a JSON number as a float; None for true, texts, and integers above 2^53."""
    if type(value) not in (int, float) or (type(value) is int and abs(value) > 2**53):
        return None
    return float(value) if math.isfinite(value) else None


def json_count(value: Any) -> int | None:
    """Return a whole number of 0 or more; None for anything else."""
    value = json_number(value)
    return int(value) if value is not None and value >= 0 and value == int(value) else None


def json_text(value: Any) -> str | None:
    """Return a text that is not blank; None for anything else."""
    return value if isinstance(value, str) and value.strip() else None


def json_seed(value: Any) -> int | None:
    """Return a seed given as a number or as digits; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 15:
        return int(value)
    return json_count(value)


def first_known(data: dict[str, Any], names: tuple[str, ...], read: Any) -> Any:
    """Return the first value under one of these names that `read` accepts; None if there is
    none.
    """
    return next(
        (value for value in (read(data.get(name)) for name in names) if value is not None), None
    )


def seed_result(value: Any) -> SeedResult:
    """Read one entry of seed_results: an object, or a bare BPB."""
    if not isinstance(value, dict):
        return SeedResult(None, json_number(value), None, None, None, None)
    readers = dict(bytes=json_count, steps=json_count)
    return SeedResult(
        **{
            name: first_known(value, names, readers.get(name, json_number))
            for name, names in SEED.items()
        }
    )


def results_of(data: dict[str, Any]) -> dict[int, SeedResult]:
    """Return the results by seed: `seed_results`, or `seeds` if that is a table of results
    (#1413).
    """
    table = next(
        (v for v in (data.get("seed_results"), data.get("seeds")) if isinstance(v, dict)), {}
    )
    return {
        seed: seed_result(value)
        for key, value in table.items()
        if (seed := json_seed(key)) is not None
    }


def read_submission(data: Any) -> Submission:
    """Return the values of a submission.json of anyone; any JSON value gives a Submission."""
    data = data if isinstance(data, dict) else {}
    results, listed = results_of(data), data.get("seeds")
    seeds = (
        [s for s in map(json_seed, listed) if s is not None]
        if isinstance(listed, list)
        else list(results) or None
    )
    readers = dict(text=json_text, number=json_number, count=json_count)
    plain = {
        name: first_known(data, FIRST_OF.get(name, (name,)), readers[key.kind])
        for name, key in KEYS.items()
        if key.kind in readers and name in Submission._fields
    }
    return Submission(**plain, seeds=seeds, seed_results=results)


# ==== Judging =====================================================================================
VALUE_KINDS = {
    "text": (json_text, "a text"),
    "number": (json_number, "a number"),
    "count": (json_count, "a whole number"),
    "seeds": (lambda v: v if isinstance(v, list | dict) else None, "a list of whole numbers"),
    "results": (lambda v: v if isinstance(v, dict) else None, "an object with one entry a seed"),
    "table": (lambda v: v if isinstance(v, dict) else None, "an object"),
}


def problems(data: Any, complete: bool = False) -> list[str]:
    """Return one sentence for each fault: the key, the value found, the value wanted.

    `complete` asks for every key that our own files have; otherwise for what a table needs.
    """
    if not isinstance(data, dict):
        return [f"submission.json holds {describe(data)}, wanted an object"]
    values = read_submission(data)
    return [
        *wrong_types(data),
        *missing_keys(data, values, complete),
        *wrong_scores(values),
        *wrong_seeds(data, values),
        *wrong_bytes(data, values),
    ]


def describe(value: Any) -> str:
    """Return a JSON value as short text; a long list or object by its length."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list) and not (
        len(value) < 8 and all(type(v) is int and abs(v) < 2**53 for v in value)
    ):
        return f"a list of {len(value)}"
    if type(value) is int and abs(value) >= 2**63:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def wrong_types(data: dict[str, Any]) -> list[str]:
    """Return the keys with values of a wrong type; null counts as absent."""
    return [
        f"{name} is {describe(data[name])}, wanted {VALUE_KINDS[key.kind][1]}"
        for name, key in KEYS.items()
        if data.get(name) not in (None, "") and VALUE_KINDS[key.kind][0](data[name]) is None
    ]


def missing_keys(data: dict[str, Any], values: Submission, complete: bool) -> list[str]:
    """Return the keys that are absent, and a date of the wrong form."""
    faults = [
        f"{name} is missing: {key.meaning}"
        for name, key in KEYS.items()
        if complete and key.ours and data.get(name) in (None, "", {}, [])
    ]
    if not complete:
        faults += [
            f"{name} is missing: {KEYS[name].meaning}"
            for name in ("name", "date", "val_bpb")
            if getattr(values, name) is None and data.get(name) in (None, "")
        ]
        if values.author is None and values.github_id is None:
            faults.append("author and github_id are missing; one of them is wanted")
    if values.date is not None and not re.match(
        r"20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])([T ].{0,40})?$", values.date
    ):
        faults.append(f"date is {describe(values.date)}, wanted YYYY-MM-DD")
    return faults


def wrong_scores(values: Submission) -> list[str]:
    """Return scores that cannot be, alone or together."""
    faults, bpb, loss = [], values.val_bpb, values.val_loss
    if bpb is not None and not LOWEST_BPB < bpb < HIGHEST_BPB:
        faults.append(
            f"val_bpb is {bpb:g}, wanted bits for each byte, {LOWEST_BPB} to {HIGHEST_BPB:g}"
        )
    if loss is not None and not 0 < loss < 25:
        faults.append(f"val_loss is {loss:g}, wanted nats for each token, 0 to 25")
    elif loss is not None and bpb is None:
        faults.append(
            f"val_loss is {loss:g} and val_bpb is missing: is it BPB under the wrong key? wanted "
            "both"
        )
    elif loss is not None and bpb and loss / bpb < LN2 * 0.98:  # a token has at least one byte
        faults.append(
            f"val_loss is {loss:g} with val_bpb {bpb:g}: that is {loss / bpb / LN2:.2f} bytes per "
            "token; wanted nats for each token under val_loss, not BPB"
        )
    ratios = {
        seed: r.val_loss / r.val_bpb
        for seed, r in values.seed_results.items()
        if r.val_loss and r.val_bpb
    }
    typical = statistics.median(ratios.values()) if ratios else loss / bpb if loss and bpb else 0
    for name, ratio in [
        ("val_loss and val_bpb", loss / bpb if loss and bpb else typical),
        *((f"seed {s}'s val_loss and val_bpb", r) for s, r in ratios.items()),
    ]:
        if typical > 0 and abs(ratio / typical - 1) > 0.002:  # both have five digits
            faults.append(
                f"{name} are in the ratio {ratio:.4f}, wanted {typical:.4f} as the other seeds: "
                "one split has one number of bytes per token"
            )
    return faults


def rounding_of(value: Any) -> float:
    """Return half a unit of the last digit a number was written with, and a little."""
    digits = repr(value).partition(".")[2] if type(value) is float else ""
    return 0.51 * 10.0 ** -(len(digits) if digits.isdigit() else 0 if type(value) is int else 9)


def wrong_seeds(data: dict[str, Any], submission: Submission) -> list[str]:
    """Return seeds listed twice, and means and deviations that the seeds do not give.

    A standard deviation may be taken with n - 1 or with n.
    """
    faults, results = [], submission.seed_results
    if submission.seeds and len(set(submission.seeds)) < len(submission.seeds):
        faults.append(f"seeds are {describe(submission.seeds)}, wanted distinct ones")
    if submission.seeds and results and set(submission.seeds) != set(results):
        faults.append(
            f"seeds are {describe(sorted(set(submission.seeds)))} but seed_results has "
            f"{describe(sorted(results))}"
        )
    for name in ("val_bpb", "val_loss"):
        values = [getattr(r, name) for r in results.values()]
        key = next((k for k in FIRST_OF[name] if json_number(data.get(k)) is not None), None)
        if key is None or not values or None in values:
            continue
        mean = statistics.fmean(values)
        # JSON drops trailing zeros, so the longest value shows the number of decimals.
        digits = min(rounding_of(v) for v in values)
        slack = min(rounding_of(data[key]), 6e-4) + digits
        if abs(data[key] - mean) > slack:
            best = " (that is the best seed)" if abs(data[key] - min(values)) <= slack else ""
            faults.append(
                f"{key} is {data[key]:.8g}{best}, wanted the mean of {len(values)} seeds, "
                f"{mean:.8g}"
            )
        std = getattr(submission, f"{name}_std")
        if std is None or len(values) < 2:
            continue
        wanted, other = statistics.stdev(values), statistics.pstdev(values)
        slack = max(0.05 * wanted, min(rounding_of(std), 6e-4)) + digits
        if min(abs(std - wanted), abs(std - other)) > slack:
            faults.append(f"{name}_std is {std:.4g}, wanted {wanted:.4g} from {len(values)} seeds")
    return faults


def wrong_bytes(data: dict[str, Any], values: Submission) -> list[str]:
    """Return byte counts that cannot be, alone or together."""
    faults, total, code = [], values.bytes_total, values.bytes_code
    for name, value in (("bytes_total", total), ("bytes_code", code)):
        if value is not None and 0 < value < (100_000 if name == "bytes_total" else 100):
            faults.append(f"{name} is {value}, wanted bytes")
    largest = max(
        (r.bytes for r in values.seed_results.values() if r.bytes is not None), default=None
    )
    top = json_count(data.get("artifact_bytes_max"))
    if total is not None and code is not None and code >= total:
        faults.append(f"bytes_code is {code}, wanted less than bytes_total, {total}")
    if total is not None and largest is not None and total < largest:
        faults.append(f"bytes_total is {total}, wanted the largest seed's, at least {largest}")
    if total is not None and top is not None and total < top:
        faults.append(f"bytes_total is {total}, wanted at least artifact_bytes_max, {top}")
    return faults
