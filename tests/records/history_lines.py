"""Lines of runs.jsonl, and the logs that belong to them."""

import hashlib
import json
from pathlib import Path

LINE = "=" * 100


def training_line(run_id: str, when: int, code: str = "pass\n", **settings) -> dict:
    artifact = hashlib.sha256(f"{run_id}{when}".encode()).hexdigest()
    return dict(
        time=when,
        run_id=run_id,
        start=dict(
            settings=dict(seed=1337, num_layers=4, compile=False, codec="auto", device="")
            | settings,
            run_id=run_id,
            sha256=dict(
                code=hashlib.sha256(code.encode()).hexdigest(), settings="5" * 64, data="d" * 64
            ),
            world_size=2,
            preset="cpu",
            device="cpu x86_64",
            torch="2.13",
        ),
        val=dict(step=600 + when, loss=3.3, bpb=1.7, seconds=150.5),
        artifact=dict(
            path="a", codec="brotli", bytes=700_000 + when, code_bytes=99_000, sha256=artifact
        ),
        final=dict(
            label="final", loss=3.3, bpb=1.6 + when / 1000, eval_seconds=7.0, tokens=10, bytes=20
        ),
    )


def evaluation_line(
    training: dict, when: int, bpb: float, certified: bool | None = True, **settings
) -> dict:
    return dict(
        time=when,
        run_id="eval",
        start=dict(
            settings=dict(mix_weights="sets", device="cpu") | settings,
            device="cpu x86_64",
            world_size=1,
            sha256=dict(artifact=training["artifact"]["sha256"], data="e" * 64),
        ),
        final=dict(
            bpb=bpb,
            loss=3.0,
            tokens=10,
            bytes=20,
            seconds=30.0 + when,
            artifact_bytes=700_000,
            code_bytes=350_000,
            certified=certified,
        ),
    )


def write_lines(path: Path, *lines: dict | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((line if type(line) is str else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def write_log(folder: Path, run_id: str, code: str) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(code.encode()).hexdigest()
    (folder / f"logs/{run_id}.txt").write_text(
        f"{code}\n{LINE}\nRunning Python "
        f"3.11\n{LINE}\nrun_id:{run_id}\ncode_sha256:{digest}\nseed:1337\n"
    )


A, B, C = (
    training_line("first", 10),
    training_line("second", 20, num_layers=6, compile=True),
    training_line("third", 30),
)
