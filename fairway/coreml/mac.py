"""The steps that need a Mac: run shards in CoreML, list the device of each operation.

Written from Apple's documentation of MLModel and MLComputePlan; we have not run it on a Mac.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fairway.coreml.manifest import ShardFolder
from fairway.coreml.tools import import_coremltools
from train_gpt import UserError

COMPUTE_UNITS = "CPU_AND_NE"


def require_mac(option: str) -> None:
    """Raise UserError unless this machine is a Mac."""
    if sys.platform != "darwin":
        raise UserError(
            f"{option} needs CoreML on a Mac, and this machine runs {platform.system()}; run it "
            "on a Mac (--check works here, with the interpreter)"
        )


def coreml_runner(units: str = COMPUTE_UNITS) -> Callable[[ShardFolder, str, str], Any]:
    """Return a runner for `fairway.coreml.engine.ShardChain` that calls CoreML."""

    def load(folder: ShardFolder, shard: str, function: str) -> Any:
        ct, path = import_coremltools(), folder.packages[shard].path
        model = ct.models.MLModel(
            str(path),
            compute_units=ct.ComputeUnit[units],
            function_name=function if folder.manifest.shapes == "multifunction" else None,
        )
        outputs = folder.packages[shard].functions[function].outputs

        def call(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            results = model.predict(inputs)
            return {name: np.asarray(results[name]) for name in outputs}

        return call

    return load


# ==== --audit =====================================================================================
def audit_devices(folder: ShardFolder) -> Iterator[dict[str, Any]]:
    """Yield for each function of each shard how many operations CoreML wants to run on each device.

    `elsewhere` lists the operations that do not run on the Neural Engine, with their share of the
    cost.
    """
    ct = import_coremltools()
    from coremltools.models.compute_plan import MLComputePlan

    for shard, package in folder.packages.items():
        compiled = ct.models.utils.compile_model(str(package.path))
        plan = MLComputePlan.load_from_path(
            path=str(compiled), compute_units=ct.ComputeUnit[COMPUTE_UNITS]
        )
        for name, function in plan.model_structure.program.functions.items():
            devices, elsewhere = Counter(), []
            for operation in nested_operations(function.block):
                usage = plan.get_compute_device_usage_for_mlprogram_operation(operation)
                if usage is None:  # constants run on no device
                    continue
                device = type(usage.preferred_compute_device).__name__
                device = device.removeprefix("ML").removesuffix("ComputeDevice")
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


def nested_operations(block: Any) -> Iterator[Any]:
    """Yield the operations of a block and of the blocks inside them."""
    for operation in block.operations:
        yield operation
        for inner in operation.blocks or []:
            yield from nested_operations(inner)
