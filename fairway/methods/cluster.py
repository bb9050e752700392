"""Run cells on the machines of a Ray cluster: the same cells, the same results.

Repository, model and shards must lie at the same paths on every machine. Results come back through
Ray and are written here. Ray starts a cell again elsewhere when its worker dies.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from fairway.methods.cell import ROOT, Spec, header, shipped_folder, write_json
from fairway.methods.harness import follow, result_path, run_in_process
from train_gpt import UserError

RETRIES = 3  # of a cell whose worker died
PATIENCE_S = 10.0  # with an address where nothing answers


class Delivered(NamedTuple):
    """The answer of a cell: its result, and the files that it would ship."""

    result: dict[str, Any]
    files: dict[str, bytes]


def run_remotely(settings: dict[str, Any]) -> Delivered:
    """Run a cell on the machine where this is called, in a folder that is deleted afterwards."""
    spec = Spec(**settings)
    with tempfile.TemporaryDirectory() as folder:
        here = replace(spec, out=str(Path(folder, "raw", Path(spec.out).name)))
        result, shipped = run_in_process(here), shipped_folder(here)
        paths = [p for p in shipped.rglob("*") if p.is_file()]
        files = {str(p.relative_to(shipped)): p.read_bytes() for p in paths}
    return Delivered(result, files)


def deliver(spec: Spec, delivered: Delivered) -> dict[str, Any]:
    """Write what a cell sent back, as if it had run here."""
    folder = shipped_folder(spec)
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in delivered.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_json(result_path(spec), delivered.result)
    return delivered.result


def connect_ray(address: str) -> Any:
    """Return Ray, connected to the cluster at `address`."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError(
            "--cluster needs ray, which is not installed; pip install -r requirements-methods.txt"
        ) from None
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        host, _, port = address.rpartition("//")[2].rpartition(":")
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=40)
    except (OSError, ValueError, RuntimeError) as e:
        line = str(e).splitlines()[0]
        raise UserError(f"--cluster {address}: {line}; start one with `ray start --head`") from None
    return ray


def run_on_cluster(
    specs: list[Spec], address: str, workers: int, report: Callable[[str], None]
) -> None:
    """Run cells on the cluster at `address`, `workers` at a time, or one for each of its cores."""
    ray = connect_ray(address)
    task = ray.remote(num_cpus=1, max_retries=RETRIES)(run_remotely)

    def run(spec: Spec) -> dict[str, Any]:
        try:
            return deliver(spec, ray.get(task.remote(asdict(spec))))
        except ray.exceptions.RayError as e:
            error = f"its workers died {RETRIES + 1} times ({str(e).splitlines()[0]:.120})"
            result = {**header(spec), "status": "failed", "error": error}
            return deliver(spec, Delivered(result, {}))

    try:
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        with ThreadPoolExecutor(count) as pool:
            follow(specs, lambda spec: pool.submit(run, spec), count, report)
    finally:
        ray.shutdown()
