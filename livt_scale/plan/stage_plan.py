"""The plan of a stage on a number of GPUs: memory, time, checkpoints, storage, energy, and the strategy to use.

Pure: from a recipe, the size of its data set and the assumptions to numbers. `candidates` tries every strategy, with
and without activation checkpointing, at every micro-batch that divides a rank's slots; `best` takes the fastest that
fits, or the simpler one if two differ by less than one per cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import StagePart
from livt_scale.plan.constants import End
from livt_scale.plan.memory import FP32, GIB, Memory, Spread, offloaded_bytes, plan_memory
from livt_scale.plan.parameters import Weight
from livt_scale.plan.step_time import Limit, StepTime, step_time, storage_shares
from livt_scale.plan.task import PlanTask

PIECE_BYTES = 1840  # a tensor's piece in a checkpoint besides its values: archive and index (1810 to 1870, torch 2.14)
SAME = 0.01  # times that differ by less count as equal: the simpler one is taken


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

    @cached_property
    def hours(self) -> float:
        """Steps and saves; without failures and queueing."""
        task = self.task
        saves = math.ceil(task.steps / self.checkpoint.every_steps)
        shares = self.storage_shares
        epoch_s = [task.steps_per_epoch * self.time.with_storage(s * self.time.storage_s) for s in shares]
        steps_s = sum(epoch_s) + (task.epochs - len(shares)) * epoch_s[-1]
        return (steps_s + saves * self.checkpoint.stall_s) / 3600

    @property
    def storage_wait_hours(self) -> float:
        """Of `hours`: the first epochs, until the nodes' memory holds the set, over as many of the last kind."""
        first = [self.time.with_storage(share * self.time.storage_s) for share in self.storage_shares]
        return self.task.steps_per_epoch * sum(step_s - first[-1] for step_s in first) / 3600

    @property
    def epochs_read(self) -> float:
        """How many times the set is read from storage."""
        shares = self.storage_shares
        return sum(shares) + (self.task.epochs - len(shares)) * shares[-1]

    @cached_property
    def storage_shares(self) -> list[float]:
        """Share of an epoch's images that is read from storage, epoch by epoch; the last one stays."""
        task = self.task
        size = task.data.images * task.data.image_bytes
        return storage_shares(
            task.epochs,
            nodes=task.nodes,
            fits_memory=size <= task.assumed.node_memory_gib * GIB,
        )

    @property
    def limit(self) -> Limit:
        """What decides in most epochs."""
        return self.time.limit(self.storage_shares[-1] * self.time.storage_s)

    @property
    def step_s(self) -> float:
        """Of most epochs."""
        return self.time.with_storage(self.storage_shares[-1] * self.time.storage_s)

    @property
    def images_per_s(self) -> float:
        return self.spread.gpus * self.spread.micro_batch * self.spread.accumulation / self.step_s

    @cached_property
    def ends(self) -> tuple[StagePlan, StagePlan]:
        """The same spread at the low and at the high end."""
        return self._at("low"), self._at("high")

    def _at(self, end: End) -> StagePlan:
        return plan_stage(replace(self.task, end=end), self.spread)

    @property
    def range(self) -> tuple[float, float]:
        """(low, high) hours."""
        low, high = self.ends
        return low.hours, high.hours

    @property
    def step_s_high(self) -> float:
        return self.ends[1].step_s

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


def plan_stage(task: PlanTask, spread: Spread, *, memory: Memory | None = None) -> StagePlan:
    """`memory`: if it is known already."""
    weights = task.weights
    memory = memory or plan_memory(task.recipe, task.stage, weights, spread)
    time = step_time(task, spread)
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


def daly_interval_s(save_s: float, mtbf_s: float) -> float:
    """Seconds of work between saves that lose least, if a save holds up `save_s` and failures come every `mtbf_s`.

    √(2δM)·(1 + √(δ/2M)/3 + (δ/2M)/9) − δ where δ < 2M, else M: Daly 2006, doi 10.1016/j.future.2004.11.016, eq. 37.
    """
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return math.sqrt(2 * save_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def lost_share(interval_s: float, save_s: float, *, mtbf_s: float, restart_s: float) -> float:
    """Share of the time that goes to saves, to work done again and to restarts (first order in interval / mtbf)."""
    return save_s / (interval_s + save_s) + (interval_s / 2 + save_s + restart_s) / mtbf_s


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
        if (can.frozen_parameters or not part.tuning.freezes) and (can.other_optimizer or adamw)
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
                memory = plan_memory(task.recipe, task.stage, task.weights, spread)
                if memory.peak <= task.usable_bytes:
                    break
            found.append(plan_stage(task, spread, memory=memory))
    return found


def best(plans: Sequence[StagePlan]) -> StagePlan | None:
    """The fastest that fits; of those within a per cent of it the one that comes first. None: none fits."""
    fitting = [p for p in plans if p.fits]
    if not fitting:
        return None
    fastest = min(p.hours for p in fitting)
    return next(p for p in fitting if p.hours <= fastest * (1 + SAME))
