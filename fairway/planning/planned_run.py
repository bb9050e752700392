"""The whole plan of a run: one object that the text, JSON and the comparison with a log read."""

from __future__ import annotations

from typing import Any, NamedTuple

from fairway.planning.evaluation_time import evaluation_seconds
from fairway.planning.machines import GpuHost
from fairway.planning.memory_need import training_bytes
from fairway.planning.roofline import Stage, attention_of, stages
from fairway.planning.size_budget import SizePlan, size_plan
from fairway.planning.workload import Parameters, Work, count_parameters, work_of_pass

# Outside the 600 seconds, and paid for all the same; round figures for a warm machine.
START_UP_SECONDS = 150.0  # data, torch.compile, warm-up steps
EXPORT_SECONDS = 60.0  # GPTQ's rounding, coding, writing


class RunPlan(NamedTuple):
    """Time, memory, bytes and dollars of a run with these settings on this machine."""

    preset: str
    cfg: Any
    machine: GpuHost
    attention: str  # the kernel
    parameters: Parameters
    work: Work  # of a token, without loops
    stages: list[Stage]
    memory_bytes: dict[int, float]  # at the peak of training, by the number of GPUs
    size: SizePlan
    val_tokens: int
    evaluation: dict[str, float]  # seconds by mode
    dollars_hour: float  # of the whole machine

    @property
    def steps(self) -> float:
        return sum(stage.steps for stage in self.stages)

    @property
    def train_seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def step_seconds(self) -> float:
        """The mean over the run."""
        return self.train_seconds / self.steps

    @property
    def mfu(self) -> float:
        """FLOPs of a plain step over what the GPUs could do at most, as the trainer's log counts.

        That is 6 for each parameter and token, and attention without regard to causality.
        """
        cfg = self.cfg
        attention = cfg.num_layers * cfg.model_dim * cfg.train_seq_len
        flops = 6 * (self.parameters.total + attention) * cfg.train_batch_tokens
        seconds = self.stages[0].step.total
        return flops / seconds / self.machine.count / self.machine.gpu.peak_flops

    def dollars(self, seconds: float) -> float:
        return seconds / 3600 * self.dollars_hour

    @property
    def run_seconds(self) -> float:
        """From start-up to the score of sliding windows with experts."""
        modes = list(self.evaluation.values())
        return START_UP_SECONDS + self.train_seconds + EXPORT_SECONDS + modes[1] + modes[-1]


def plan_run(
    preset: str, cfg: Any, machine: GpuHost, val_tokens: int, dollars_hour: float | None = None
) -> RunPlan:
    """Predict everything that the settings and the machine decide."""
    price = machine.gpu.dollars_hour * machine.count
    return RunPlan(
        preset,
        cfg,
        machine,
        attention_of(machine),
        count_parameters(cfg),
        work_of_pass(cfg, False),
        stages(cfg, machine),
        {world: training_bytes(cfg, world) for world in sorted({1, machine.count, 8})},
        size_plan(cfg),
        val_tokens,
        evaluation_seconds(cfg, machine, val_tokens),
        price if dollars_hour is None else dollars_hour,
    )


def plan_data(plan: RunPlan) -> dict[str, Any]:
    """Return the plan's numbers, with units in their names."""
    return {
        "preset": plan.preset,
        "machine": plan.machine.name,
        "attention": plan.attention,
        "parameters": plan.parameters.total,
        "token_product_flops": plan.work.product_flops,
        "token_attention_flops": plan.work.attention_flops,
        "token_traffic_bytes": plan.work.traffic_bytes,
        "stages": [
            {
                "name": stage.name,
                "steps": round(stage.steps),
                "seconds": stage.seconds,
                "step_ms": 1000 * stage.step.total,
                "bound": stage.step.bound,
                "parts_ms": {k: 1000 * v for k, v in stage.step._asdict().items()},
            }
            for stage in plan.stages
        ],
        "step_ms": 1000 * plan.step_seconds,
        "steps": round(plan.steps),
        "tokens": round(plan.steps * plan.cfg.train_batch_tokens),
        "train_seconds": plan.train_seconds,
        "mfu": plan.mfu,
        "memory_bytes": {str(world): round(need) for world, need in plan.memory_bytes.items()},
        "size": plan.size._asdict() | {"total_bytes": plan.size.total_bytes},
        "val_tokens": plan.val_tokens,
        "evaluation_seconds": plan.evaluation,
        "dollars_hour": plan.dollars_hour,
        "train_dollars": plan.dollars(plan.train_seconds),
        "run_dollars": plan.dollars(plan.run_seconds),
    }
