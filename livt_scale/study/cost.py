"""What a grid of runs would cost, by formula, before anything is started: `--dry-run` of `livt reproduce` and `study`.

    images = epochs · images of the training set        operations = images · those of a training image (`plan.flops`)
    device hours = operations / (peak of the device · the share of it that is reached)

Evaluation, loading and starting are not in it. The share (MFU) is an assumption, and printed as one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.plan.devices import DEVICES, Precision
from livt_scale.plan.flops import stage_flops
from livt_scale.study.runs import Run
from livt_scale.util.errors import UsageError, nearest


@dataclass(frozen=True)
class RunCost:
    """Of one run. flops: model FLOPs, forward and backward."""

    epochs: int
    images: int
    flops: int
    precision: Precision

    def device_hours(self, peak_tflops: float, *, mfu: float) -> float:
        """Hours of one device that reaches the share `mfu` of its peak."""
        return self.flops / (peak_tflops * 1e12 * mfu) / 3600


def cost_of(run: Run, folder: Path, *, num_images: int, num_classes: int) -> RunCost:
    """num_images, num_classes: of its training set. Raises RecipeError where the run's recipe cannot be."""
    recipe = run.load(folder)
    stage = recipe.stage(run.stage)
    images = num_images // stage.global_batch * stage.global_batch * stage.epochs
    flops = images * stage_flops(recipe, run.stage, num_classes=num_classes).train
    return RunCost(stage.epochs, images, flops, recipe.parallel.precision)


@dataclass(frozen=True)
class CostSummary:
    """All runs together. runs: name, stage, after, command, epochs, images and flops of each."""

    runs: list[dict[str, Any]]
    device: str
    mfu: float
    device_hours: float

    def lines(self) -> list[str]:
        """For people: each run's command, then the sum."""
        told = [
            f"{one['command']}{'   # with pretrain/ of ' + str(one['after']) if one['after'] else ''}"
            for one in self.runs
        ]
        images, flops = (sum(one[name] for one in self.runs) for name in ("images", "flops"))
        return [
            *told,
            f"{len(told)} runs, {images:.3g} images, {flops:.3g} model FLOPs;",
            f"at {self.mfu:.0%} of the peak of {self.device} (an assumption: --device, --mfu) "
            f"{self.device_hours:.3g} device hours",
        ]


def summarize_cost(
    runs: Sequence[Run], folder: Path, size_of: Callable[[Run], tuple[int, int]], *, device: str, mfu: float
) -> CostSummary:
    """size_of: (images, classes) of a run's training set. Raises UsageError: no such device or precision."""
    if device not in DEVICES:
        raise UsageError(f"there is no device {device!r}", remedy=nearest(device, DEVICES))
    told, hours = [], 0.0
    for run in runs:
        images, classes = size_of(run)
        cost = cost_of(run, folder, num_images=images, num_classes=classes)
        peak = DEVICES[device].peak_tflops(cost.precision)
        if peak is None:
            raise UsageError(f"a {device} has no {cost.precision}", remedy="--set parallel.precision=fp16")
        hours += cost.device_hours(peak, mfu=mfu)
        facts = {"epochs": cost.epochs, "images": cost.images, "flops": cost.flops}
        words = f"livt {shlex.join(run.words(folder))}"
        told.append({"name": run.name, "stage": run.stage, "after": run.after, "command": words, **facts})
    return CostSummary(told, device, mfu, hours)
