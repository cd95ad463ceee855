"""What a grid of runs would cost, by formula, before anything is started: `livt reproduce … --dry-run`.

    images = epochs · images of the training set        operations = images · those of a training image (`plan.flops`)
    device hours = operations / (peak of the device · the share of it that is reached)

Evaluation, loading and starting are not in it. The share (MFU) is an assumption, and printed as one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from livt_scale.plan.devices import Precision
from livt_scale.plan.flops import stage_flops
from livt_scale.study.claims import Setting
from livt_scale.study.grid import Run


@dataclass(frozen=True)
class Cost:
    """Of one run. flops: model FLOPs, forward and backward."""

    epochs: int
    images: int
    flops: int
    precision: Precision

    def device_hours(self, peak_tflops: float, *, mfu: float) -> float:
        """Hours of one device that reaches the share `mfu` of its peak."""
        return self.flops / (peak_tflops * 1e12 * mfu) / 3600


def cost_of(run: Run, setting: Setting, folder: Path) -> Cost:
    """Raises RecipeError where the run's recipe cannot be."""
    recipe = run.load(folder)
    stage = recipe.stage(run.stage)
    of_set = setting.num_balanced if run.sets.get("data.train") == setting.balanced else setting.num_images
    images = of_set // stage.global_batch * stage.global_batch * stage.epochs
    flops = images * stage_flops(recipe, run.stage, num_classes=setting.num_classes).train
    return Cost(stage.epochs, images, flops, recipe.parallel.precision)
