"""How a global batch is divided into slots of a rank and micro-batches of a step, at any world size.

>>> plan_batches(1024, 64, world_size=4, pairs=True)  # 4 micro-batches, gradients accumulated
BatchPlan(global_batch=1024, world_size=4, micro_batch=64, accumulation=4)
>>> plan_batches(1024, 64, world_size=32, pairs=True)
BatchPlan(global_batch=1024, world_size=32, micro_batch=32, accumulation=1)
"""

from __future__ import annotations

from dataclasses import dataclass

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.util.errors import UsageError
from livt_scale.util.text import counted


@dataclass(frozen=True)
class BatchPlan:
    """What one rank does in one step: `accumulation` forward passes of `micro_batch` images."""

    global_batch: int
    world_size: int
    micro_batch: int
    accumulation: int

    @property
    def slots(self) -> int:
        """Slots of the global batch that one rank takes."""
        return self.micro_batch * self.accumulation

    def __str__(self) -> str:
        ranks, steps = counted(self.world_size, "rank"), counted(self.accumulation, "micro-batch", "micro-batches")
        return f"global batch {self.global_batch} = {ranks} × {steps} × {counted(self.micro_batch, 'image')}"


def stage_batches(recipe: Recipe, stage: Stage, *, world_size: int) -> BatchPlan:
    """The batches of `stage` on `world_size` ranks. Raises UsageError where they cannot be equal."""
    part = recipe.stage(stage)
    return plan_batches(part.global_batch, part.micro_batch, world_size=world_size, pairs=part.mixes)


def plan_batches(global_batch: int, micro_batch: int, *, world_size: int, pairs: bool) -> BatchPlan:
    """Divide `global_batch`; `pairs`: mixup pairs neighbours, so a rank's slots must be even. Raises UsageError."""
    unit = 2 if pairs else 1
    if global_batch % (world_size * unit):
        fitting = [w for w in range(1, global_batch + 1) if global_batch % (w * unit) == 0]
        near = sorted(sorted(fitting, key=lambda w: abs(w - world_size))[:3])
        even = " an even number of" if pairs else ""
        raise UsageError(
            f"a global batch of {global_batch} does not give {world_size} ranks{even} equal slots",
            remedy=f"start {' or '.join(map(str, near))} processes, or change global_batch",
        )
    slots = global_batch // world_size
    micro = min(micro_batch, slots)
    if slots % micro:
        fitting = [m for m in range(unit, slots + 1, unit) if slots % m == 0]
        near = sorted(sorted(fitting, key=lambda m: abs(m - micro))[:3])
        raise UsageError(
            f"micro_batch is {micro_batch} and does not divide the {slots} slots of a rank "
            f"(global batch {global_batch} on {world_size} ranks)",
            remedy=f"take {' or '.join(map(str, near))}",
        )
    return BatchPlan(global_batch, world_size, micro, slots // micro)
