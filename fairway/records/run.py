"""The files that one run left in its OUT_DIR: logs, artifact, and eval/ once it was scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from fairway.records.files import RecordError, read_events, read_json, sha256

EVALUATION = "eval"  # the run id under which eval_final.py logs


class RunFiles(NamedTuple):
    """A run on disk. Score, certificate and eval_log are None unless they are of this artifact."""

    folder: Path  # OUT_DIR
    run_id: str
    log: Path
    events: list[dict[str, Any]]
    # These three are of an evaluation of this run's artifact.
    eval_log: Path | None
    score: dict[str, Any] | None
    certificate: dict[str, Any] | None
    artifact: Path | None  # None if it is gone, or another run has replaced it

    def event(self, name: str) -> dict[str, Any]:
        """Return the last event of that name; {} if there is none."""
        return next((e for e in reversed(self.events) if e.get("event") == name), {})

    def all_events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("event") == name]

    @property
    def settings(self) -> dict[str, Any]:
        return dict_at(self.event("start"), "settings")

    @property
    def seed(self) -> int | None:
        """The seed that the log states; None if it is none that the trainer takes."""
        seed = self.settings.get("seed")
        return seed if type(seed) is int and 0 <= seed < 1 << 63 else None


def dict_at(data: Any, *keys: str) -> dict[str, Any]:
    """Return data[keys[0]][keys[1]]… if every step is a dict, else {}."""
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, dict) else {}


def read_run(path: str | Path) -> RunFiles:
    """Read the run of an OUT_DIR, or of a log in its logs/."""
    path = Path(path)
    if path.suffix in (".txt", ".jsonl") and path.parent.name == "logs":
        folder, log = path.parent.parent, path.with_suffix(".txt")
    else:
        if not path.is_dir():
            raise RecordError(f"{path} is no folder; name a run's OUT_DIR, or its logs/RUN_ID.txt")
        folder, log = path, training_log(path)
    if not log.is_file():
        raise RecordError(f"{log} is not there; name a run's OUT_DIR, or its logs/RUN_ID.txt")
    events, _ = (
        read_events(log.with_suffix(".jsonl")) if log.with_suffix(".jsonl").is_file() else ([], 0)
    )
    run = RunFiles(folder, log.stem, log, events, None, None, None, None)
    wanted, score = (
        run.event("artifact").get("sha256"),
        object_or_none(folder / "eval" / "score.json"),
    )
    if wanted is not None:
        artifact = next(
            (a for a in sorted(folder.glob("final_model.*.ptz")) if sha256(a) == wanted), None
        )
        run = run._replace(artifact=artifact)
    if wanted is not None and dict_at(score, "sha256").get("artifact") == wanted:
        eval_log = folder / "logs" / f"{EVALUATION}.txt"
        run = run._replace(
            score=score,
            certificate=object_or_none(folder / "eval" / "certificate.json")
            if score.get("certificate")
            else None,
            eval_log=eval_log if eval_log.is_file() else None,
        )
    return run


def training_log(folder: Path) -> Path:
    """Return the training log of an OUT_DIR.

    Of several, it is the one whose artifact is still there, else the newest.
    """
    logs = [p for p in (folder / "logs").glob("*.txt") if p.stem != EVALUATION and p.is_file()]
    if not logs:
        raise RecordError(
            f"{folder}/logs holds no log of a training run; name a run's OUT_DIR, or its "
            "logs/RUN_ID.txt"
        )
    logs.sort(key=lambda p: p.stat().st_mtime)
    if len(logs) > 1:
        hashes = {sha256(a) for a in folder.glob("final_model.*.ptz")}
        own = [
            p
            for p in logs
            if p.with_suffix(".jsonl").is_file()
            and any(
                e.get("event") == "artifact" and e.get("sha256") in hashes
                for e in read_events(p.with_suffix(".jsonl"))[0]
            )
        ]
        logs = own or logs
    return logs[-1]


def object_or_none(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if there is none or it is damaged."""
    try:
        data = read_json(path) if path.is_file() else None
    except RecordError:
        return None
    return data if isinstance(data, dict) else None
