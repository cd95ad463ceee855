"""The plan of fine-tuning a model of timm: parameters and FLOPs counted on the meta device, memory measured.

The formulas of the other plans are for our ViTs. Here the step itself runs on fake tensors (`plan.exact`), which needs
no GPU and no memory: its peak is the network's own, whatever its blocks are. The time of a step is not estimated.

    timm_plan(task, "auto", micro_batch=64, accumulation=2).as_json()["memory_gib"]["peak"]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from livt_scale.config.capabilities import StrategyName
from livt_scale.plan.exact import Measurement, measure
from livt_scale.plan.memory import GIB, Spread
from livt_scale.plan.stage_plan import checkpoint_bytes, spread_of
from livt_scale.plan.task import PlanTask

NO_TIME = (
    "a plan has no formula for the kernels of this model: train a few steps, and metrics.jsonl has the step's time"
)


@dataclass(frozen=True)
class TimmPlan:
    """Fine-tuning under one strategy."""

    task: PlanTask
    spread: Spread
    measured: Measurement

    @property
    def fits(self) -> bool:
        return self.measured.peak <= self.task.usable_bytes

    def as_json(self) -> dict[str, Any]:
        """The stage, with the fields of other plans as far as they are known; `hours` None, `no_hours` says why."""
        task, spread, found = self.task, self.spread, self.measured
        parts = ("weights", "grads", "optimizer", "activations", "peak")
        return {
            "stage": task.stage,
            "model": task.recipe.model.name,
            "params": sum(w.numel for w in task.weights),
            "trained_params": sum(w.numel for w in task.weights if w.trained),
            "train_flops_per_image": task.flops.train,
            "strategy": spread.strategy,
            "micro_batch": spread.micro_batch,
            "accumulation": spread.accumulation,
            "activation_checkpointing": spread.recompute,
            "memory_gib": {name: round(getattr(found, name) / GIB, 6) for name in parts},
            "usable_gib": round(task.usable_bytes / GIB, 2),
            "fits": self.fits,
            "steps": task.steps,
            "checkpoint_bytes": checkpoint_bytes(task.weights, spread),
            "hours": None,
            "no_hours": NO_TIME,
        }


def timm_plan(task: PlanTask, wanted: StrategyName | None, *, micro_batch: int, accumulation: int) -> TimmPlan:
    """wanted: None: ddp, or fsdp if that does not fit. Raises RunError where the step cannot be measured."""
    names: tuple[StrategyName, ...] = ("ddp", "fsdp") if wanted is None else (wanted,)
    for name in names:
        recompute = task.recipe.parallel.activation_checkpointing
        spread = spread_of(task, name, micro_batch=micro_batch, accumulation=accumulation, recompute=recompute)
        measured = measure(task.recipe, task.stage, spread, num_classes=task.data.classes)
        found = TimmPlan(task, spread, measured)
        if found.fits:
            break
    return found


def lines(answer: dict[str, Any]) -> list[str]:
    """`TimmPlan.as_json` for people."""
    memory = ", ".join(f"{name} {value:.2f} GiB" for name, value in answer["memory_gib"].items())
    fits = "fits" if answer["fits"] else "does NOT fit"
    return [
        f"{answer['stage']}: {answer['model']}, {answer['params'] / 1e6:.1f} M parameters, "
        f"{answer['trained_params'] / 1e6:.1f} M trained; {answer['train_flops_per_image'] / 1e9:.1f} GFLOP an image",
        f"{answer['strategy']}, micro-batch {answer['micro_batch']} x {answer['accumulation']}: {fits} in "
        f"{answer['usable_gib']:.1f} GiB; {answer['steps']:,} steps",
        f"measured on fake tensors, per rank: {memory}",
        f"checkpoint: {answer['checkpoint_bytes'] / 1e9:.2f} GB",
        f"time: not estimated; {NO_TIME}",
    ]
