"""How long a step takes: computing from shapes, exchange that does not hide, AdamW, and the limits of host and input.

    device      products, attention, streams of bytes, gaps between kernels (`plan.kernels`)
    host        kernels that Python launches: if that takes longer than the device, it decides
    exchange    what computing waits for (`plan.exchange`)
    AdamW       passes over the fp32 states of a rank, at the device's memory bandwidth
    offload     pieces of weights to the device, of gradients back; AdamW at the host's bandwidth; none of it hides
    decode      images over what the loader's processes decode
    storage     bytes over what the file system gives all nodes; less from epoch to epoch if the set fits their memory

The slowest of computing, decoding and storage decides, and `Assumptions.overhead` is added to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from livt_scale.config.data import Data
from livt_scale.plan.assumptions import Assumptions
from livt_scale.plan.constants import Chip, End
from livt_scale.plan.exchange import Exchange, Unit, exchange, links_of
from livt_scale.plan.kernels import TENSORS_PER_BLOCK, Parts, block_parts, elapsed_s, host_s, micro_batch
from livt_scale.plan.kernels import optimizer_parts as adamw
from livt_scale.plan.memory import FP32, Spread
from livt_scale.plan.parameters import Weight
from livt_scale.plan.task import PlanTask

Limit = Literal["compute", "host", "exchange", "decode", "storage"]
PASSES_OF_ADAMW = 7  # reads weight, gradient, two moments; writes weight and two moments
USUAL_IMAGE_BYTES, MAX_DECODE_FACTOR = 110 * 1024, 16.0
GATHER_LAUNCHES = 16  # of a block under fsdp and zero3: copies in and out, gathers, reduction, both ways


CALIBRATED_OVERHEAD: dict[End, float] = {"low": 0.02, "likely": 0.05, "high": 0.15}  # what a step does not measure


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step. parts: of the device, all micro-batches. exposed_s: exchange that does not hide.

    decode_s, storage_s: of a step's images, if nothing else limits it; storage_s in the first epoch.
    """

    parts: Parts
    device_s: float
    host_s: float
    exchange: Exchange
    optimizer_s: float
    offload_s: float
    decode_s: float
    storage_s: float
    overhead: float
    decodes_itself: bool = False
    scale: float = 1.0  # of the parts, by a calibration; the other times have it

    @property
    def compute_s(self) -> float:
        return max(self.device_s, self.host_s)

    @property
    def exposed_s(self) -> float:
        return self.exchange.exposed_s

    @property
    def gpu_s(self) -> float:
        """If the input were always there."""
        return self.compute_s + self.exposed_s + self.optimizer_s + self.offload_s

    @property
    def input_s(self) -> float:
        return self.gpu_s + self.decode_s if self.decodes_itself else self.decode_s

    def with_storage(self, storage_s: float) -> float:
        """Seconds of a step whose images take `storage_s` to be read."""
        return (1 + self.overhead) * max(self.gpu_s, self.input_s, storage_s)

    @property
    def step_s(self) -> float:
        """Where files need not be read from storage again."""
        return self.with_storage(0.0)

    @property
    def efficiency(self) -> float:
        """Share of a step that is computing."""
        return self.compute_s / self.step_s

    def limit(self, storage_s: float) -> Limit:
        """What decides, if images take `storage_s` to be read."""
        slowest = max(self.gpu_s, self.input_s, storage_s)
        if slowest == storage_s:
            return "storage"
        if slowest == self.input_s:
            return "decode"
        if self.exposed_s > self.compute_s / 2:  # a third of both
            return "exchange"
        return "host" if self.host_s > self.device_s else "compute"


def step_time(task: PlanTask, spread: Spread) -> StepTime:
    known, frozen = task.calibration, task.part.backbone_frozen
    chip = task.device.chip(spread.precision, "likely" if known else task.end)
    scale = known.at(task.end) if known else 1.0
    assumed = task.assumed.at(task.end)
    forward, backward = micro_batch(
        task.network, spread.micro_batch, chip, task.software, recompute=spread.recompute, frozen=frozen
    )
    gathers = spread.can.shards_parameters * spread.gpus > 1
    extra = Parts(launches=GATHER_LAUNCHES * task.network.num_blocks) if gathers else Parts()
    computing = (forward + backward + extra).times(spread.accumulation)
    device_s = computing.busy_s + computing.launches * chip.gap_us * 1e-6
    units = units_of(task, spread, chip)
    moved = exchange(units, spread, links_of(task.device, assumed, per_node=task.gpus_of_node))
    optimizer_s, offload_s = _update_s(task, spread, chip, assumed)
    images = spread.micro_batch * spread.accumulation
    workers = decoding_cores(task.recipe.data, assumed)
    return StepTime(
        parts=computing,
        device_s=scale * device_s,
        host_s=scale * host_s(computing, chip, task.software),
        exchange=Exchange(scale * moved.exchange_s, scale * moved.exposed_s, moved.traffic),
        optimizer_s=scale * optimizer_s,
        offload_s=scale * offload_s,
        decode_s=images / (max(workers, 1) * decode_images_per_s(task, assumed)),
        storage_s=images * spread.gpus * task.data.image_bytes / (assumed.storage_gb_s * 1e9),
        overhead=CALIBRATED_OVERHEAD[task.end] if known else assumed.overhead,
        decodes_itself=workers == 0,
        scale=scale,
    )


def decode_images_per_s(task: PlanTask, assumed: Assumptions) -> float:
    """Of one core: the assumption is for images of ImageNet's size; smaller ones are faster by the root of their bytes.

    Two cores decode shards of 256 px 1.45 times as fast as their originals (docs/benchmarks.md).
    """
    if "decode_images_per_s" in assumed.model_fields_set:
        return assumed.decode_images_per_s
    factor = math.sqrt(USUAL_IMAGE_BYTES / max(task.data.image_bytes, 1.0))
    return assumed.decode_images_per_s * min(max(factor, 1.0), MAX_DECODE_FACTOR)


def decoding_cores(data: Data, assumed: Assumptions) -> float:
    """Cores that decode for one rank; 0: the training process does it itself."""
    return assumed.cores_per_gpu if data.workers == "auto" else min(data.workers, assumed.cores_per_gpu)


def units_of(task: PlanTask, spread: Spread, chip: Chip) -> list[Unit]:
    """Blocks with their weights and times, in the order of the forward pass; before them all other weights."""
    blocks: dict[str | None, list[Weight]] = {None: []}
    for weight in task.weights:
        blocks.setdefault(weight.block, []).append(weight)
    times = []
    for same in task.network.blocks:
        there, back = block_parts(same, spread.micro_batch, chip, task.software, recompute=spread.recompute)
        times += [(elapsed_s([there], chip, task.software), elapsed_s([back], chip, task.software))] * same.depth
    outside = blocks.pop(None)
    units = [Unit(*_sizes(outside), gathered_wide=True)]
    for weights, (forward_s, backward_s) in zip(blocks.values(), times, strict=True):
        units.append(Unit(*_sizes(weights), forward_s, 0.0 if task.part.backbone_frozen else backward_s))
    return units


def _sizes(weights: Sequence[Weight]) -> tuple[int, int]:
    return sum(w.numel for w in weights), sum(w.numel for w in weights if w.trained)


def _update_s(task: PlanTask, spread: Spread, chip: Chip, assumed: Assumptions) -> tuple[float, float]:
    """Seconds of (AdamW, moving offloaded pieces)."""
    trained = sum(w.numel for w in task.weights if w.trained)
    own = trained / spread.shards if spread.can.shards_moments else trained
    if spread.offload != "none":
        optimizer_s = PASSES_OF_ADAMW * FP32 * own * task.gpus_of_node / (assumed.host_gb_s * 1e9)
        gathers = 2 * spread.accumulation if spread.can.shards_parameters else 1  # otherwise the updated weights, once
        reduced = spread.accumulation if spread.can.reduces_each_micro_batch else 1
        return optimizer_s, (gathers + reduced) * FP32 * own / (assumed.host_copy_gb_s * 1e9)
    tensors = TENSORS_PER_BLOCK * task.network.num_blocks
    parts = adamw(own, tensors, chip, task.software, clipped=task.part.clip_grad is not None)
    return elapsed_s([parts], chip, task.software), 0.0


def storage_shares(epochs: int, *, nodes: int, fits_memory: bool) -> list[float]:
    """Share of an epoch's images that is read from storage, epoch by epoch until it stays the same.

    A node reads a random part of the set in each epoch and keeps what it has read, if the set fits its memory: of N
    nodes, (1 − 1/N)^e of the set is still unread on one after e epochs.
    """
    if not fits_memory:
        return [1.0]
    shares: list[float] = []
    left = 1.0
    while len(shares) < epochs and left > 0.001:
        shares.append(left)
        left *= 1 - 1 / nodes
    return shares if len(shares) == epochs else [*shares, 0.0]
