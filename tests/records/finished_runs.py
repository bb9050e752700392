"""Finished runs as train_gpt.py and eval_final.py leave them, and a small repository that made
them.
"""

import hashlib
import json
from pathlib import Path

from fairway.records.packing import pack_record
from fairway.records.readme import Entry

TRAIN = '''"""Trains."""
import os
import sys
from pathlib import Path

import numpy


def knob(default, help): return default


class Config:
    seed: int = knob(1337, "seed")
    num_layers: int = knob(9, "layers")
    mlp_mult: float = knob(2.0, "width")
    codec: str = knob("auto", "codec")
    gptq: bool = knob(False, "GPTQ")


CONSENSUS = dict(num_layers=11, mlp_mult=3.0)
CPU = CONSENSUS | dict(num_layers=4)
PRESETS: dict = {"cpu": CPU, "wide": {**CPU} if False else CPU | dict(mlp_mult=-4.0)}
if __name__ == "__main__":
    print("train", *sys.argv[1:], Path(__file__).read_text().splitlines()[0])
    sys.stdout.flush()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    print(Path(__file__).is_file(), Path(__file__).parent)
    if "leave" in sys.argv:
        sys.stdout.flush()
        os._exit(7)
'''


CODE = {
    "train_gpt.py": TRAIN,
    "eval_final.py": 'from fairway.scoring.evaluation import name\n\nif __name__ == "__main__":\n'
    '    print("eval", name())\n',
    "fairway/__init__.py": "",
    "fairway/unused.py": "import torch\n",
    "fairway/scoring/evaluation.py": "from train_gpt import Config\n\n\n"
    "def name():\n    import tqdm\n    return 'Config'",
    "requirements.txt": "# pinned\ntorch==2.0\nnumpy==2.4.6\ntqdm==4.70.1\npytest==9.2.0\n",
}


SHIPPED = ["eval_final.py", "fairway/__init__.py", "fairway/scoring/evaluation.py", "train_gpt.py"]


RULES = (
    "causal",
    "normalised",
    "target-blind",
    "score first",
    "one pass",
    "coverage",
    "canary",
    "sizes",
)


def write_files(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if type(content) is bytes else content.encode())
    return folder


def made_run(folder: Path, seed: int, evaluated: bool = True, **changes) -> Path:
    """Write an OUT_DIR as train_gpt.py and eval_final.py leave it; `changes` are settings."""
    bpb, run_id = 1.2 + seed / 1e5, f"train_seed{seed}"
    artifact = f"artifact of {seed}".encode() * (10_000 + seed)
    settings = dict(seed=seed, run_id=run_id, out_dir=folder.name, data_path="data/embedded")
    settings |= dict(num_layers=5, mlp_mult=3.0, codec="a b", gptq=True, num_heads=4)
    settings |= dict(train_batch_tokens=2048) | changes
    line = "=" * 100
    log = (
        f"{TRAIN}\n{line}\nRunning Python 3\n{line}\nsettings: "
        f"{json.dumps(settings)}\nseed:{seed}\nval_loader:shards pattern=x tokens:1000 "
        f"bytes:2885\nstep:{500 + seed}/9000 val_loss:3.5000 val_bpb:{bpb:.4f}\nfinal_int6_exact "
        f"val_loss:{2 * bpb:.8f} val_bpb:{bpb:.8f}\n"
    )
    events = training_events(folder.name, seed, bpb, artifact, settings)
    files = {
        f"logs/{run_id}.txt": log,
        "final_model.int6.ptz": artifact,
        f"logs/{run_id}.jsonl": "".join(json.dumps(e) + "\n" for e in events),
    }
    if evaluated:
        files |= evaluation_files(folder, bpb, artifact)
    return write_files(folder, files)


def training_events(
    out_dir: str, seed: int, bpb: float, artifact: bytes, settings: dict
) -> list[dict]:
    """Return the events that a finished training run leaves in its .jsonl log."""
    hashes = dict(
        code=hashlib.sha256(TRAIN.encode()).hexdigest(),
        settings="5" * 64,
        tokenizer="7" * 64,
        data="d" * 64,
    )
    start = dict(event="start", settings=settings, sha256=hashes, world_size=1)
    start |= dict(run_id=settings["run_id"], preset="cpu", device="cpu x", torch="2.13.0")
    exported = dict(event="artifact", path=f"{out_dir}/final_model.int6.ptz", codec="brotli")
    exported |= dict(k=2.5, bytes=len(artifact), code_bytes=len(TRAIN), budget_bytes=16_000_000)
    exported |= dict(sha256=hashlib.sha256(artifact).hexdigest())
    final = dict(event="final", label="final_int6", loss=2 * bpb, bpb=bpb, eval_seconds=1.5)
    return [
        start,
        dict(event="model", parameters=1_000_000),
        *(
            dict(event="train", step=i, loss=7 - i / 200, seconds=i / 3, tokens=2048 * i)
            for i in (1, 100, 500)
        ),
        dict(event="val", step=500 + seed, loss=3.5, bpb=bpb + 0.01, seconds=150.0 + seed / 100),
        exported,
        final | dict(tokens=1000, bytes=2885),
    ]


def evaluation_files(folder: Path, bpb: float, artifact: bytes) -> dict[str, str]:
    """Return the files that an evaluation leaves: its score, its log, its certificate."""
    final, rules = bpb - 0.1, [dict(rule=rule, verdict="ok", figure="") for rule in RULES]
    score = dict(val_bpb=final, val_loss=2 * final, tokens=1000, bytes=2885, eval_seconds=3.5)
    score["ladder"] = [
        dict(name="neural", loss=2 * bpb, bpb=bpb),
        dict(name="mixed", loss=2 * final, bpb=final),
    ]
    score["seconds"] = dict(load=1.0, mix=2.5, ablation=7.0, certificate=30.0)
    score["sizes"] = dict(artifact=len(artifact), code={n: len(CODE[n]) for n in SHIPPED})
    score["code"] = {n: hashlib.sha256(CODE[n].encode()).hexdigest() for n in SHIPPED}
    digest = hashlib.sha256(artifact).hexdigest()
    score["sha256"] = dict(artifact=digest, data="e" * 64, tokenizer="7" * 64)
    settings = dict(eval_mode="sliding", eval_stride=64, checkpoint=str(folder), ttt="none")
    score |= dict(device="cpu x", world_size=1, settings=settings | dict(mix_weights="sets"))
    weights = dict(experts=["neural", "match"], trace=[[0.75, 0.25], [0.5, 0.5]])
    score |= dict(weights=weights, certificate=dict(passed=True))
    log = (
        f"final_exact val_loss:{2 * final:.8f} val_bpb:{final:.8f}\n"
        f"val_bpb:{final:.8f} val_loss:{2 * final:.8f}\n"
    )
    return {
        "eval/score.json": json.dumps(score),
        "logs/eval.txt": log,
        "eval/certificate.json": json.dumps(dict(passed=True, rules=rules)),
    }


def draw_nothing(logs: list[Path], path: Path) -> None:
    path.write_bytes(b"\x89PNG")


ENTRY = Entry(
    "non_record_16mb",
    "Gates_v2.1",
    "A. N. Author",
    "an-author",
    date="2026-05-01",
    pack_code="none",
)


def pack_runs(runs, root, out, entry=ENTRY, draw=draw_nothing, **options) -> Path:
    return pack_record(runs, entry, root, out, draw, on_progress=lambda line: None, **options)


def names_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
