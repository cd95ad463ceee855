"""What a grid of runs would cost, before anything is started: `--dry-run` of `livt reproduce` and `study`.

A ViT's hours are those of `livt plan` on one device, low, likely and high. A ResNet's are its FLOPs over a share of the
device's peak, in a wide range. Evaluation of finished runs and queueing are not in them.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.plan.assumptions import Accelerator, Assumptions, accelerator, peak_tflops
from livt_scale.plan.flops import stage_flops
from livt_scale.plan.stage_plan import plan_stage, spread_of
from livt_scale.plan.task import DataSet, PlanTask
from livt_scale.study.runs import Run
from livt_scale.train.batch_plan import plan_batches

RESNET_SHARES = (0.45, 0.25, 0.1)  # of the peak, for low, likely and high hours: round numbers
BYTES_OF_A_VALUE = 0.75  # of an image that is stored in the size of the crops
KINDS = ("hours_low", "hours", "hours_high")


@dataclass(frozen=True)
class RunCost:
    """Of one run on one device. flops: model FLOPs, forward and backward. hours: low, likely, high."""

    epochs: int
    images: int
    flops: int
    hours: tuple[float, float, float]


def cost_of(recipe: Recipe, of_stage: Stage, *, data: DataSet, device: Accelerator) -> RunCost:
    """data: its training set. Raises UsageError: the device has no such precision."""
    stage = recipe.stage(of_stage)
    images = data.images // stage.global_batch * stage.global_batch * stage.epochs
    flops = images * stage_flops(recipe, of_stage, num_classes=data.classes).train
    peak = 1e12 * peak_tflops(device, recipe.parallel.precision)
    if recipe.model.is_vit:
        return RunCost(stage.epochs, images, flops, _planned(recipe, of_stage, data, device))
    low, likely, high = (flops / (share * peak) / 3600 for share in RESNET_SHARES)
    return RunCost(stage.epochs, images, flops, (low, likely, high))


def _planned(recipe: Recipe, stage: Stage, data: DataSet, device: Accelerator) -> tuple[float, float, float]:
    task = PlanTask(recipe.at(stage), stage, data, 1, 1, device, Assumptions())
    part = task.part
    batches = plan_batches(part.global_batch, part.micro_batch, world_size=1, pairs=part.mixes)
    recompute = recipe.parallel.activation_checkpointing
    cut = {"micro_batch": batches.micro_batch, "accumulation": batches.accumulation}
    planned = plan_stage(task, spread_of(task, "ddp", recompute=recompute, **cut))
    low, high = planned.range
    return low, planned.hours, high


@dataclass(frozen=True)
class CostSummary:
    """All runs together. runs: name, stage, after, command, epochs, images, flops and hours of each."""

    runs: list[dict[str, Any]]
    device: str
    device_hours_low: float
    device_hours: float
    device_hours_high: float

    def lines(self, *, price: float | None = None) -> list[str]:
        """For people: the sum, then each run's command. price: of a device hour."""
        images, flops = (sum(one[name] for one in self.runs) for name in ("images", "flops"))
        cost = []
        if price is not None:
            hours = (self.device_hours_low, self.device_hours, self.device_hours_high)
            low, likely, high = (price * each for each in hours)
            cost = [f"{low:,.0f} to {high:,.0f} at {price:g} an hour, likely {likely:,.0f}"]
        return [
            f"{len(self.runs)} runs, {images:.3g} images, {flops:.3g} model FLOPs",
            f"{self.device_hours_low:.3g} to {self.device_hours_high:.3g} device hours on {self.device}, likely "
            f"{self.device_hours:.3g} (another one: --device)",
            *cost,
            *(
                f"{one['command']}{'   # with pretrain/ of ' + str(one['after']) if one['after'] else ''}"
                for one in self.runs
            ),
        ]


def summarize_cost(
    runs: Sequence[Run], folder: Path, size_of: Callable[[Run], tuple[int, int]], *, device: str
) -> CostSummary:
    """size_of: (images, classes) of a run's training set.

    Raises RecipeError where a run's recipe cannot be; UsageError: no such device or precision.
    """
    kind, usual = accelerator(device), Assumptions().image_kib * 1024
    told, sums = [], [0.0, 0.0, 0.0]
    for run in runs:
        images, classes = size_of(run)
        recipe = run.load(folder)
        stored = min(usual, BYTES_OF_A_VALUE * recipe.model.channels * recipe.model.image_px**2)
        data = DataSet(images, classes, stored, "the setting's size")
        cost = cost_of(recipe, run.stage, data=data, device=kind)
        sums = [total + hours for total, hours in zip(sums, cost.hours, strict=True)]
        facts = {"epochs": cost.epochs, "images": cost.images, "flops": cost.flops}
        hours = dict(zip(KINDS, cost.hours, strict=True))
        words = f"livt {shlex.join(run.words(folder))}"
        told.append({"name": run.name, "stage": run.stage, "after": run.after, "command": words, **facts, **hours})
    return CostSummary(told, device, *sums)
