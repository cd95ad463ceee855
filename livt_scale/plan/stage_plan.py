"""The plan of a stage on a number of GPUs: memory, time, checkpoints, storage, energy, and the strategy to use.

Pure: from a recipe, the size of its data set and the assumptions to numbers. `candidates` tries every strategy, with
and without activation checkpointing, at every micro-batch that divides a rank's slots; `best` takes the fastest that
fits, or the simpler one if two differ by less than one per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import Recipe, Stage, StagePart
from livt_scale.plan.assumptions import Accelerator, Assumptions, peak_tflops
from livt_scale.plan.flops import Flops, network_flops
from livt_scale.plan.memory import FP32, GIB, Memory, Spread, offloaded_bytes, plan_memory
from livt_scale.plan.parameters import Weight, stage_weights
from livt_scale.plan.step_time import StepTime, daly_interval_s, lost_share, step_time

PIECE_BYTES = 1840  # a tensor's piece in a checkpoint besides its values: archive and index (1810 to 1870, torch 2.14)
OPTIMIZER_TITLES = {"adamw": "AdamW", "lars": "LARS"}
SAME = 0.01  # times that differ by less count as equal: the simpler one is taken


@dataclass(frozen=True)
class DataSet:
    """What the plan needs of the training images. `source`: where the numbers are from."""

    images: int
    classes: int
    image_bytes: float
    source: str


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

    @cached_property  # one task is planned at every strategy and micro-batch
    def weights(self) -> tuple[Weight, ...]:
        return stage_weights(self.recipe, self.stage, num_classes=self.data.classes)

    @cached_property
    def flops(self) -> Flops:
        """Of one image, with what activation checkpointing would compute again."""
        return network_flops(self.recipe, self.stage, num_classes=self.data.classes)

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.per_node)

    @property
    def unit(self) -> int:
        """Images that stay on one rank: mixup pairs neighbours."""
        return 2 if self.recipe.stage(self.stage).mixes else 1

    @property
    def can_be_cut(self) -> bool:
        """Whether the global batch gives all GPUs equal slots, as `train.batch_plan` requires."""
        return self.recipe.stage(self.stage).global_batch % (self.gpus * self.unit) == 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the rest of an epoch that does not fill a batch is left out (`data.order`)."""
        return self.data.images // self.recipe.stage(self.stage).global_batch

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.recipe.stage(self.stage).epochs

    @property
    def usable_bytes(self) -> float:
        return (self.device.memory_gib - self.assumed.reserve_gib) * GIB / (1 + self.assumed.fragmentation)


@dataclass(frozen=True)
class CheckpointPlan:
    """Bytes of all ranks' files; seconds that one holds training up, and takes to be written; steps between two.

    daly_interval_s: seconds of work between saves that lose least at the assumed rate of failures.
    lost_share: of the time, to saves, work done again and restarts, with the recipe's interval, and with Daly's.
    """

    bytes: int
    stall_s: float
    write_s: float
    every_steps: int
    daly_interval_s: float
    lost_share: float
    lost_share_daly: float


@dataclass(frozen=True)
class StagePlan:
    task: PlanTask
    spread: Spread
    memory: Memory
    time: StepTime
    checkpoint: CheckpointPlan

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.task.usable_bytes

    @property
    def hours(self) -> float:
        """Steps and saves; without failures, evaluation and queueing."""
        saves = math.ceil(self.task.steps / self.checkpoint.every_steps)
        return (self.task.steps * self.time.step_s + saves * self.checkpoint.stall_s) / 3600

    @property
    def images_per_s(self) -> float:
        return self.spread.gpus * self.spread.micro_batch * self.spread.accumulation / self.time.step_s

    @property
    def offloaded_node_bytes(self) -> int:
        """Bytes that the ranks of a node keep in its memory or on its disk."""
        return min(self.task.per_node, self.task.gpus) * offloaded_bytes(self.task.weights, self.spread)

    @property
    def why_not(self) -> str:
        """Why it does not fit; empty where it does."""
        if self.fits:
            return ""
        memory, states = self.memory, self.memory.weights + self.memory.optimizer
        usable = self.task.usable_bytes
        what = "weights and moments alone" if states > usable else f"{memory.activations / GIB:.1f} GiB of activations"
        return f"needs {memory.peak / GIB:.1f} GiB of {usable / GIB:.1f} usable ({what})"


def plan_stage(task: PlanTask, spread: Spread) -> StagePlan:
    weights = task.weights
    memory = plan_memory(task.recipe, task.stage, weights, spread)
    time = step_time(task.flops, weights, spread, task.device, task.assumed, per_node=task.per_node)
    return StagePlan(task, spread, memory, time, _checkpoint(task, spread, weights, time))


def _checkpoint(task: PlanTask, spread: Spread, weights: Sequence[Weight], time: StepTime) -> CheckpointPlan:
    size = checkpoint_bytes(weights, spread)
    assumed, part = task.assumed, task.recipe.checkpoint
    own = size / spread.gpus  # replicated tensors are shared out among the ranks too
    copy_s, write_s = own / (assumed.host_copy_gb_s * 1e9), size / (assumed.storage_gb_s * 1e9)
    agree_s = assumed.agree_ms * 1e-3 * math.log2(spread.gpus)
    stall_s = agree_s + copy_s + (0 if part.mode == "async" else write_s)
    every = part.every_steps or max(task.steps_per_epoch, 1)
    mtbf_s = assumed.mtbf_node_days * 86400 / task.nodes
    best_s = max(daly_interval_s(stall_s, mtbf_s), write_s)  # one save at a time
    restart_s = assumed.start_s + size / (assumed.storage_gb_s * 1e9)
    here, daly = (
        lost_share(interval, stall_s, mtbf_s=mtbf_s, restart_s=restart_s) for interval in (every * time.step_s, best_s)
    )
    return CheckpointPlan(size, stall_s, write_s, every, best_s, here, daly)


def checkpoint_bytes(weights: Sequence[Weight], spread: Spread) -> int:
    """Files of a checkpoint: weights, moments and AdamW's step count of each trained one, what torch wraps them in.

    Under ddp a tensor is one piece, else one of each rank that has rows of it.
    """
    ranks = spread.shards if spread.can.shards_moments else 1
    size = pieces = 0
    for w in weights:
        moments, counts = w.moments * w.trained, (w.moments == 2) * w.trained
        size += w.numel * (1 + moments) + counts
        pieces += w.num_pieces(ranks) * (1 + moments) + counts
    return FP32 * size + PIECE_BYTES * pieces


def spread_of(
    task: PlanTask, strategy: StrategyName, *, micro_batch: int, accumulation: int, recompute: bool
) -> Spread:
    """`strategy` on the task's GPUs, as the recipe has it: hybrid within nodes, offloaded, where `strategy` can be."""
    parallel = task.recipe.parallel
    can = CAPABILITIES[strategy]
    hybrid = can.hybrid and parallel.shard_within == "node" and task.gpus > task.per_node
    return Spread(
        strategy,
        task.gpus,
        parallel.precision,
        micro_batch,
        accumulation,
        recompute,
        task.per_node if hybrid else None,
        parallel.offload if can.offload else "none",
    )


def strategies_for(part: StagePart) -> tuple[StrategyName, ...]:
    """The strategies that a recipe may combine with this stage."""
    adamw = part.trained_by.name == "adamw"
    return tuple(
        name
        for name, can in CAPABILITIES.items()
        if (can.frozen_backbone or not part.backbone_frozen) and (can.other_optimizer or adamw)
    )


def candidates(task: PlanTask) -> list[StagePlan]:
    """Each strategy, kept and recomputed, at its largest micro-batch that fits, else at the smallest there is.

    The largest is the fastest: computing is the same, and the fewer micro-batches, the less is exchanged. A frozen
    backbone keeps nothing that could be computed again.
    """
    part = task.recipe.stage(task.stage)
    slots = part.global_batch // task.gpus
    sizes = [m for m in range(slots, 0, -1) if m % task.unit == 0 and slots % m == 0]
    found = []
    for strategy in strategies_for(part):
        for recompute in (False,) if part.backbone_frozen else (False, True):
            for m in sizes:
                spread = spread_of(task, strategy, micro_batch=m, accumulation=slots // m, recompute=recompute)
                planned = plan_stage(task, spread)
                if planned.fits:
                    break
            found.append(planned)
    return found


def best(plans: Sequence[StagePlan]) -> StagePlan | None:
    """The fastest that fits; of those within a per cent of it the one that comes first. None: none fits."""
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    fastest = min(p.hours for p in fitting)
    return next(p for p in fitting if p.hours <= fastest * (1 + SAME))


def energy_kwh(plan: StagePlan) -> float | None:
    """Of all nodes, cooling included; None where the device's power is not known."""
    power = plan.task.device.power_w
    return None if power is None else plan.hours * plan.task.gpus * power * plan.task.assumed.power_overhead / 1000


def figures(plan: StagePlan, *, price: float | None) -> dict[str, Any]:
    """One stage for `--json`."""
    task, hours = plan.task, plan.hours
    images_per_s, device_hours = plan.images_per_s, hours * task.gpus
    peak = peak_tflops(task.device, plan.spread.precision)
    optimizer = task.recipe.stage(task.stage).trained_by.name
    return {
        "stage": task.stage,
        "params": sum(w.numel for w in task.weights),
        "train_flops_per_image": task.flops.train,
        "hardware_flops_per_image": task.flops.hardware if plan.spread.recompute else task.flops.train,
        "strategy": plan.spread.strategy,
        "micro_batch": plan.spread.micro_batch,
        "accumulation": plan.spread.accumulation,
        "activation_checkpointing": plan.spread.recompute,
        "memory_gib": plan.memory.gib(),
        "offload": plan.spread.offload,
        "offloaded_gib_per_node": plan.offloaded_node_bytes / GIB,
        "usable_gib": round(task.usable_bytes / GIB, 2),
        "fits": plan.fits,
        "why_not": plan.why_not or None,
        "steps": task.steps,
        "step_s": plan.time.step_s,
        "compute_s": plan.time.compute_s,
        "exchange_s": plan.time.exchange_s,
        "exposed_exchange_s": plan.time.exposed_s,
        "exchanged_bytes_per_rank": plan.time.exchanged_bytes,
        "optimizer": OPTIMIZER_TITLES.get(optimizer, optimizer),
        "optimizer_s": plan.time.optimizer_s,
        "offload_s": plan.time.offload_s,
        "efficiency": plan.time.efficiency,
        "mfu": images_per_s / task.gpus * task.flops.train / (peak * 1e12),
        "hours": hours,
        "device_hours": device_hours,
        "cost": None if price is None else device_hours * price,
        "energy_kwh": energy_kwh(plan),
        "images_per_s": images_per_s,
        "read_gb_s": images_per_s * task.data.image_bytes / 1e9,
        "read_tb": task.steps * task.recipe.stage(task.stage).global_batch * task.data.image_bytes / 1e12,
        "decode_cores_per_node": images_per_s / task.assumed.decode_images_per_s / task.nodes,
        "checkpoint": {name: getattr(plan.checkpoint, name) for name in plan.checkpoint.__dataclass_fields__},
    }
