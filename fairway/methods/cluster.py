"""Run jobs on the machines of a Ray cluster: the same jobs, the same results.

Repository, model and shards must lie at the same paths on every machine. Results come back through
Ray and are written here. Ray starts a job again elsewhere when its worker dies.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fairway.methods.cell import ROOT, write_json
from fairway.methods.harness import Job, Reporter, follow, run_in_process
from train_gpt import UserError

RETRIES = 3  # of a job whose worker died
PATIENCE_S = 10.0  # with an address where nothing answers


class Delivered(NamedTuple):
    """The answer of a job: its result, and the files that it left."""

    result: dict[str, Any]
    files: dict[str, bytes]


def run_remotely(job: Job) -> Delivered:
    """Run a job on the machine where this is called, in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        here = job.moved(Path(folder))
        result, left = run_in_process(here), here.files
        paths = [p for p in left.rglob("*") if p.is_file()]
        files = {str(p.relative_to(left)): p.read_bytes() for p in paths}
    return Delivered(result, files)


def deliver(job: Job, delivered: Delivered) -> dict[str, Any]:
    """Write what a job sent back, as if it had run here."""
    shutil.rmtree(job.files, ignore_errors=True)
    for name, data in delivered.files.items():
        path = job.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    write_json(job.result, delivered.result)
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


def run_on_cluster(jobs: list[Job], address: str, workers: int, reporter: Reporter) -> None:
    """Run jobs on the cluster at `address`, `workers` at a time, or as many as it has cores for."""
    ray = connect_ray(address)
    task = ray.remote(max_retries=RETRIES)(run_remotely)

    def run(job: Job) -> dict[str, Any]:
        try:
            return deliver(job, ray.get(task.options(num_cpus=job.threads).remote(job)))
        except ray.exceptions.RayError as e:
            error = f"its workers died {RETRIES + 1} times ({str(e).splitlines()[0]:.120})"
            return deliver(job, Delivered(job.failed(error), {}))

    try:
        threads = max((job.threads for job in jobs), default=1)
        count = workers or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        with ThreadPoolExecutor(count) as pool:
            follow(jobs, lambda job: pool.submit(run, job), count, reporter)
    finally:
        ray.shutdown()
