"""Measure the seconds from the last step to the artifact, with GPTQ, for a 27 M state.

    python bench/export.py [--before FOLDER]

The state has the shapes of the consensus model (`bench/artifact.py`); inputs of its matrices are
correlated random vectors. The tokenizer is random bytes and is not in the file. `--before` names a
checkout of older code, which then does the same work first. Seconds are processor time of one
thread. Operators are those of one GPTQ pass that compute something: on a GPU each is a launch of
about 5 microseconds. The last line is JSON.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from artifact import consensus_state
from eager_operators import Operators

import train_gpt

K = 5.0  # near the k that fits 16,000,000 bytes


def load_trainer(folder: str) -> ModuleType:
    """Return the train_gpt.py of another checkout as a module."""
    spec = importlib.util.spec_from_file_location("older_train_gpt", Path(folder, "train_gpt.py"))
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def random_hessians(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the sum of x x^T for each matrix that multiplies activations, of falling scale."""
    noise, hessians = torch.Generator().manual_seed(0), {}
    for name, weight in state.items():
        if name.endswith(".weight") and "emb" not in name and "table" not in name:
            width = weight.shape[1]
            scale = torch.linspace(2, 0.05, width)[torch.randperm(width, generator=noise)]
            mix = torch.randn(width, width, generator=noise) * scale
            x = torch.randn(2 * width, width, generator=noise) @ mix
            hessians[name] = x.T @ x
    return hessians


def fitting_run(trainer: ModuleType, state, folder: str) -> SimpleNamespace:
    """Return what `fit_artifact` reads of a run, with this code's settings of consensus."""
    tokenizer = Path(folder) / "tokenizer.model"
    tokenizer.write_bytes(torch.randint(256, (1000,)).to(torch.uint8).numpy().tobytes())
    settings = dict(size_margin_bytes=1000, embed_tokenizer=False)
    cfg = trainer.Config(**trainer.PRESETS["consensus"] | settings)
    model = SimpleNamespace(named_parameters=lambda: state.items(), looping=False)
    data, lines = SimpleNamespace(tokenizer_path=tokenizer), []
    return SimpleNamespace(
        cfg=cfg,
        model=model,
        data=data,
        k=0.0,
        lines=lines,
        log=lambda line, *_, **__: lines.append(line),
    )


def measure(trainer: ModuleType, state, hessians, folder: str) -> dict[str, float]:
    """Return the seconds of each part, then of the whole fit, and what the fit came to."""
    run, seconds = fitting_run(trainer, state, folder), {}
    stacked = hasattr(trainer, "gptq_factor")

    def timed(part: str, function):
        began = time.process_time()
        result = function()
        seconds[part] = time.process_time() - began
        print(f"{trainer.__name__:16} {part:24}{seconds[part]:8.2f} s", flush=True)
        return result

    def factors() -> dict:
        return {n: trainer.gptq_factor(h) for n, h in hessians.items()} if stacked else hessians

    inputs = timed("factors", factors)
    timed("bisection", lambda: trainer.bisect_k(state, trainer.size_target(run.cfg), run.cfg))
    rounded = timed("codes", lambda: trainer.quantised(state, K, run.cfg, inputs))
    with Operators() as operators:
        trainer.quantised(state, K, run.cfg, inputs)
    planes = trainer.planes_of(rounded)
    timed("entropy coder", lambda: trainer.encode_planes("ans", planes))
    blob, rounded, codec = timed("fit, all of it", lambda: trainer.fit_artifact(run, factors()))
    timed("errors", lambda: trainer.log_errors(run, rounded))
    left = trainer.size_target(run.cfg) - len(blob)
    print(
        f"{trainer.__name__:16} {codec}, k {run.k:.4f}, {len(blob)} bytes, {left} below the target"
    )
    print(f"{trainer.__name__:16} {operators.counts.total()} operators", flush=True)
    error = 0.0
    for name, hessian in hessians.items():
        difference = rounded[name].weight() - state[name]
        error += float(((difference @ hessian) * difference).sum())
    return seconds | dict(operators=operators.counts.total(), left=left, k=run.k, error=error)


def main() -> None:
    """Measure this code and, if asked, older code, and print one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="", help="a checkout of older code to compare with")
    options = parser.parse_args()
    torch.set_num_threads(1)
    state = {name: w.detach() for name, w in consensus_state()[0].items()}
    hessians, rows = random_hessians(state), {}
    trainers = [load_trainer(options.before)] if options.before else []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for trainer in [*trainers, train_gpt]:
            rows[trainer.__name__] = measure(trainer, state, hessians, folder)
    print(json.dumps({"bench": "export", "threads": 1, "rows": rows}))


if __name__ == "__main__":
    main()
