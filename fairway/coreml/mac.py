"""The steps that need a Mac: run shards in CoreML, list the device of each operation.

Written from Apple's documentation of MLModel and MLComputePlan; we have not run it on a Mac.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fairway.coreml.manifest import ShardFolder
from fairway.coreml.mlpackage import PackageFunction
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
        return CoreMLFunction(model, folder.packages[shard].functions[function])

    return load


class CoreMLFunction:
    """A function of a package that CoreML has loaded."""

    def __init__(self, model: Any, declared: PackageFunction):
        self.model, self.declared = model, declared

    def __call__(
        self, inputs: Mapping[str, np.ndarray], state: CoreMLState | None = None
    ) -> dict[str, np.ndarray]:
        """Run the function, and return its outputs."""
        kept = {} if state is None else {"state": state.held}
        results = self.model.predict(dict(inputs), **kept)
        return {name: np.asarray(results[name]) for name in self.declared.outputs}

    def new_state(self) -> CoreMLState:
        return CoreMLState(self)


class CoreMLState:
    """The states of a function, all zeros at first; a deep copy has the same numbers."""

    def __init__(self, function: CoreMLFunction):
        self.function, self.held = function, function.model.make_state()

    def __deepcopy__(self, _memo: dict) -> CoreMLState:
        new = CoreMLState(self.function)
        for name in self.function.declared.states:
            new.held.write_state(name, self.held.read_state(name))
        return new


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
