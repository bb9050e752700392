"""What only a Mac can do: run the shards by CoreML, ask which device each operation runs on, and time it.

Written from Apple's documentation of MLModel and MLComputePlan; not run by us on any Mac."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fairway.coreml.manifest import Folder
from fairway.coreml.tools import import_coremltools
from train_gpt import UserError, need

UNITS = "CPU_AND_NE"


def need_mac(option: str) -> None:
    need(
        sys.platform == "darwin",
        f"{option} asks CoreML on a Mac, and this is {platform.system()}; run it there "
        "(--check runs here, by interpreting)",
        UserError,
    )


def predicted(units: str = UNITS) -> Callable[[Folder, str, str], Any]:
    """A runner for fairway.coreml.engine.Chain: each function of each shard as CoreML loads it."""

    def load(folder: Folder, shard: str, function: str) -> Any:
        ct, path = import_coremltools(), folder.packages[shard].path
        model = ct.models.MLModel(
            str(path),
            compute_units=ct.ComputeUnit[units],
            function_name=function if folder.manifest.shapes == "multifunction" else None,
        )
        outputs = folder.packages[shard].functions[function].outputs

        def call(given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            made = model.predict(given)
            return {name: np.asarray(made[name]) for name in outputs}

        return call

    return load


# ==== --audit =========================================================================================================
def audited(folder: Folder) -> Iterator[dict[str, Any]]:
    """Of each function of each shard: how many operations are preferred on which device, what share of the cost that
    is, and every operation whose device is not the Neural Engine."""
    ct = import_coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    for shard, package in folder.packages.items():
        compiled = ct.models.utils.compile_model(str(package.path))
        plan = MLComputePlan.load_from_path(path=str(compiled), compute_units=ct.ComputeUnit[UNITS])
        for name, function in plan.model_structure.program.functions.items():
            devices, elsewhere = Counter(), []
            for operation in operations_of(function.block):
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                if usage is None:  # constants, which run nowhere
                    continue
                device = (
                    type(usage.preferred_compute_device)
                    .__name__.removeprefix("ML")
                    .removesuffix("ComputeDevice")
                )
                cost = plan.get_estimated_cost_for_mlprogram_operation(operation)
                devices[device] += 1
                if device != "NeuralEngine":
                    elsewhere.append(
                        dict(
                            operation=operation.operator_name,
                            device=device,
                            output=operation.outputs[0].name if operation.outputs else "",
                            cost=cost.weight if cost else None,
                        )
                    )
            yield dict(shard=shard, function=name, devices=dict(devices), elsewhere=elsewhere)


def operations_of(block: Any) -> Iterator[Any]:
    for operation in block.operations:
        yield operation
        for inner in operation.blocks or []:
            yield from operations_of(inner)


# ==== --bench =========================================================================================================
def timed(call: Callable[[], int], seconds: float = 5.0) -> list[float]:
    """Tokens a second of one call after another, each of which says how many tokens it wrote."""
    call()  # the first one loads
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        began = time.perf_counter()
        tokens = call()
        rates.append(tokens / (time.perf_counter() - began))
    return rates
