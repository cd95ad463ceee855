"""What is planned: one stage on a number of GPUs of one kind, with the size of its data set and the assumptions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from livt_scale.config.recipe import Recipe, Stage, StagePart
from livt_scale.plan.assumptions import Accelerator, Assumptions
from livt_scale.plan.constants import End
from livt_scale.plan.flops import Flops, network_flops
from livt_scale.plan.kernels import Software
from livt_scale.plan.memory import FP32, GIB
from livt_scale.plan.parameters import Weight, stage_weights
from livt_scale.plan.shapes import Network, network_of


@dataclass(frozen=True)
class DataSet:
    """What the plan needs of the training images. `source`: where the numbers are from."""

    images: int
    classes: int
    image_bytes: float
    source: str


@dataclass(frozen=True)
class MeasuredRun:
    """A run that was measured: its step over the planned one, and how far another run may be from that."""

    scale: float
    width: float
    source: str

    def at(self, end: End) -> float:
        return self.scale * {"low": 1 - self.width, "likely": 1.0, "high": 1 + self.width}[end]


@dataclass(frozen=True)
class PlanTask:
    """One stage on a number of GPUs of one kind. recipe: as that stage sees it (`Recipe.at`)."""

    recipe: Recipe
    stage: Stage
    data: DataSet
    gpus: int
    per_node: int
    device: Accelerator
    assumed: Assumptions
    calibration: MeasuredRun | None = None
    end: End = "likely"  # of the range of hours

    @cached_property  # one task is planned at every strategy and micro-batch
    def weights(self) -> tuple[Weight, ...]:
        return stage_weights(self.recipe, self.stage, num_classes=self.data.classes)

    @cached_property
    def flops(self) -> Flops:
        """Of one image, with what activation checkpointing would compute again."""
        return network_flops(self.recipe, self.stage, num_classes=self.data.classes)

    @cached_property
    def network(self) -> Network:
        return network_of(self.recipe, self.stage, num_classes=self.data.classes)

    @property
    def software(self) -> Software:
        parallel = self.recipe.parallel
        low = FP32 if parallel.precision == "fp32" else 2
        return Software(low_bytes=low, compiled=parallel.compile, adamw=parallel.adamw)

    @property
    def part(self) -> StagePart:
        return self.recipe.stage(self.stage)

    @property
    def gpus_of_node(self) -> int:
        """Devices of a node that are in use."""
        return min(self.per_node, self.gpus)

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    @property
    def unit(self) -> int:
        """Images that stay on one rank: mixup pairs neighbours."""
        return 2 if self.part.mixes else 1

    @property
    def can_be_cut(self) -> bool:
        """Whether the global batch gives all GPUs equal slots, as `train.batch_plan` requires."""
        return self.part.global_batch % (self.gpus * self.unit) == 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the rest of an epoch that does not fill a batch is left out (`data.order`)."""
        return self.data.images // self.part.global_batch

    @property
    def epochs(self) -> int:
        return self.part.epochs

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    @property
    def usable_bytes(self) -> float:
        return (self.device.memory_gib - self.assumed.reserve_gib) * GIB / (1 + self.assumed.fragmentation)
