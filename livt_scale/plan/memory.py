"""The memory of a rank's device at the peak of a step, by formula: states, activations, buffers.

    States       weights, gradients and moments (AdamW's two, LARS's one), fp32: of the fullest rank, as the strategy
                 shares them out
    Activations  what autograd keeps of a forward pass, tensor by tensor as the blocks here make them; with activation
                 checkpointing each block's input and, of one block at a time, the rest
    Buffers      what is gathered, reduced or cast besides

    A block of width D over N tokens keeps, for each of its B·N·D values: the residual stream twice in fp32 and 14
    values more in the products' precision (normed 1, qkv 3, attended 1, normed 1, MLP 4 + 4): 36 bytes in bf16, 64 in
    fp32. The attention's matrix is never kept (fused attention). A frozen block keeps nothing; in its MLP there
    are in fp32 the stream as it entered the blocks, this block and the MLP, and normed, and hidden values twice.

The peak is the higher of two moments: the end of the forward pass, when all activations are there, and the end of the
backward pass, when all gradients are. What the allocator loses to fragments, and the driver's own memory, are the
planner's `reserve_gib`. docs/plan.md compares it with FSDPMemTracker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from livt_scale.config.capabilities import CAPABILITIES, Capabilities, StrategyName
from livt_scale.config.recipe import Model, Pretrain, Recipe, Stage
from livt_scale.config.tuning import Tuning
from livt_scale.plan.parameters import Weight

GIB = 2**30
FP32 = 4
ZERO_BUCKET = 50_000_000  # elements exchanged at a time: `distributed.deepspeed.BUCKET`, which a test compares
ZERO_REUSE = 1_000_000_000  # elements: weights that come again so soon stay gathered (DeepSpeed's max_reuse_distance)
KEPT_FP32 = 2  # values of a block a token and channel: the residual stream before attention and before the MLP
KEPT_LOW = 14
KEPT_LOW_FROZEN = 8  # qkv 3, attended 1, MLP 4 before GELU
FROZEN_FP32, FROZEN_LOW = 4, 8  # of a frozen block, in its MLP
WORKING_LOW = 4  # gradients of the MLP's hidden values, while a block goes back
WORKING_FROZEN_LOW = 7  # and what a block with frozen matrices does not keep, as the input of a product


@dataclass(frozen=True)
class Spread:
    """How the work is distributed. `shards`: ranks that share one copy of the states (all, or those of a node)."""

    strategy: StrategyName
    gpus: int
    precision: Literal["fp32", "bf16", "fp16"]
    micro_batch: int
    accumulation: int = 1
    recompute: bool = False
    within_node: int | None = None  # hybrid fsdp: ranks of a node
    offload: Literal["none", "cpu"] = "none"  # where sharded states are kept

    @property
    def can(self) -> Capabilities:
        return CAPABILITIES[self.strategy]

    @property
    def shards(self) -> int:
        return self.within_node or self.gpus

    @property
    def low_bytes(self) -> int:
        return FP32 if self.precision == "fp32" else 2


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes at the peak of a step, by part. `computing`: activations and the weights that autocast has cast."""

    weights: int
    grads: int
    moments: int
    computing: int
    buffers: int

    @property
    def total(self) -> int:
        return self.weights + self.grads + self.moments + self.computing + self.buffers


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank. The peak is less than the sum of the others: gradients come as activations go."""

    weights: int
    grads: int
    optimizer: int
    activations: int
    buffers: int
    at_peak: MemoryPeak

    @property
    def peak(self) -> int:
        return self.at_peak.total

    @property
    def states(self) -> int:
        return self.weights + self.grads + self.optimizer

    def gib(self) -> dict[str, float]:
        names = ("weights", "grads", "optimizer", "activations", "buffers", "peak")
        return {name: round(getattr(self, name) / GIB, 6) for name in names}


def plan_memory(recipe: Recipe, stage: Stage, weights: Sequence[Weight], spread: Spread) -> Memory:
    """Memory of `stage`'s step on the device; what is offloaded is not on it (`offloaded_bytes`)."""
    kept = activation_bytes(recipe, stage, spread)
    casts, casts_again = cast_bytes(weights, spread)
    peak = peak_of(weights, spread, max(kept.forward + casts, kept.backward + casts_again), kept.end)
    activations = max(kept.forward, kept.backward)
    return Memory(*held_bytes(weights, spread), activations, casts + max(buffer_bytes(weights, spread)), peak)


def peak_of(weights: Sequence[Weight], spread: Spread, used: int, used_last: int) -> MemoryPeak:
    """The peak, if a replica's computation (activations, casts) uses at most `used`, and `used_last` at the end."""
    held, grads, moments = held_bytes(weights, spread)
    forward, backward = buffer_bytes(weights, spread)
    early, late = 0, grads  # gradients when the activations are at their most, and when all gradients are there
    if (spread.strategy == "ddp" and spread.gpus > 1) or spread.can.zero_stage == 3:
        early = grads  # views of DDP's buckets, or stage 3's flat buffer, which stay
    elif spread.strategy == "fsdp" and spread.accumulation > 1:
        early = FP32 * _trained(weights)  # accumulate unsharded until the last micro-batch
        late = early
    elif spread.can.zero_stage == 1:
        late = grads + FP32 * _trained(weights)
        early = FP32 * _trained(weights) if spread.accumulation > 1 else 0
    elif spread.accumulation > 1:
        early = grads
    if spread.recompute or spread.strategy != "fsdp":
        forward = backward
    moments_of_height = (
        MemoryPeak(held, early, moments, used, forward),
        MemoryPeak(held, late, moments, used_last, backward),
    )
    return max(moments_of_height, key=lambda peak: peak.total)


def held_bytes(weights: Sequence[Weight], spread: Spread) -> tuple[int, int, int]:
    """(weights, gradients, moments) that a rank's device keeps after a backward pass.

    Moments without AdamW's step counts. Offloaded: fsdp keeps nothing, stage 3 what it always has gathered, stages 1
    and 2 the weights.
    """
    shared, kept, own, moments = _held(weights, spread)
    if spread.offload != "none":
        return kept, 0, 0
    return shared + kept, own, moments


def offloaded_bytes(weights: Sequence[Weight], spread: Spread) -> int:
    """Of a rank: pieces of weights, gradients and moments that are kept in the host's memory."""
    shared, _, own, moments = _held(weights, spread)
    return 0 if spread.offload == "none" else shared + own + moments


def _held(weights: Sequence[Weight], spread: Spread) -> tuple[int, int, int, int]:
    """Of a rank: shards of weights, weights that it always holds unsharded, gradients, moments."""
    whole = FP32 * sum(w.numel for w in weights)
    trained = FP32 * _trained(weights)
    if spread.strategy == "ddp":
        return 0, whole, trained, FP32 * sum(w.moments * w.numel for w in weights if w.trained)
    if spread.strategy == "fsdp":
        rows = FP32 * sum(w.rows_numel(spread.shards) for w in weights)
        own = FP32 * sum(w.rows_numel(spread.shards) for w in weights if w.trained)
        return rows, 0, own, FP32 * sum(w.moments * w.rows_numel(spread.shards) for w in weights if w.trained)
    own = FP32 * math.ceil(_trained(weights) / spread.shards)
    if spread.can.shards_parameters:
        shared = FP32 * sum(math.ceil(w.numel / spread.shards) for w in weights)
        persistent = FP32 * _persistent(weights) if spread.gpus > 1 else 0
        return shared, persistent, own, 2 * own
    return own, whole, own, 2 * own  # a separate fp32 piece besides the weights, even if they are fp32


def cast_bytes(weights: Sequence[Weight], spread: Spread) -> tuple[int, int]:
    """Weights that autocast has made 16 bits wide, at the end of the forward pass and while a block goes back.

    It keeps them until the forward pass ends, autograd those that it needs until they were used; fsdp gathers blocks in
    16 bits, so that nothing is to be cast there.
    """
    if spread.low_bytes == FP32 or (spread.strategy == "fsdp" and spread.gpus > 1):
        return 0, 0
    casts = spread.low_bytes * sum(w.numel for w in weights if len(w.shape) > 1 and (w.trained or w.leads_back))
    return casts, spread.low_bytes * _largest_block(weights) if spread.recompute else casts


def buffer_bytes(weights: Sequence[Weight], spread: Spread) -> tuple[int, int]:
    """What is gathered and exchanged, in the forward and in the backward pass."""
    low, trained, largest = spread.low_bytes, _trained(weights), _largest_block(weights)
    goes_back = _largest_block([w for w in weights if w.trained or w.leads_back])
    reduced_back = _largest_block([w for w in weights if w.trained])
    if spread.strategy == "ddp" or (spread.gpus == 1 and spread.strategy == "fsdp"):
        return 0, 0
    bucket = FP32 * min(ZERO_BUCKET, trained)
    if spread.can.zero_stage in (1, 2):
        return bucket, bucket
    if spread.can.zero_stage == 3:
        # at the end of the forward pass the last half of that distance is still there: it comes again going back
        gathered = FP32 * min(max(2 * largest + ZERO_BUCKET, ZERO_REUSE // 2), trained) if spread.gpus > 1 else 0
        # the bucket, its copy in the order of ranks, and this rank's share of the sum
        reduced = 2 * bucket + bucket // spread.shards
        return gathered + reduced, gathered + reduced
    outside = FP32 * sum(w.numel for w in weights if w.block is None)  # stays gathered
    # this block and the next; going back: one, its gradient, and what is reduced in fp32
    return 2 * low * largest + outside, low * goes_back + (low + FP32) * reduced_back + outside


@dataclass(frozen=True)
class Kept:
    """Bytes of activations when the forward pass ends, when a block goes back, and when the first one does."""

    forward: int
    backward: int
    end: int


def activation_bytes(recipe: Recipe, stage: Stage, spread: Spread) -> Kept:
    """Of one micro-batch, its images included."""
    model, low, images = recipe.model, spread.low_bytes, spread.micro_batch
    width, depth, _, patch_px = model.dims
    part = recipe.stage(stage)
    patches, prefix = model.num_patches, model.prefix_tokens
    if isinstance(part, Pretrain):
        patches, prefix = model.num_kept(part.mask_ratio), 1
    encoder_tokens = prefix + patches + part.tuning.tokens
    encoder = images * encoder_tokens * width
    blocks = [encoder] * depth
    given = FP32 * images * model.channels * model.image_px**2
    ends = low * images * (encoder_tokens - 1) * model.channels * patch_px**2  # patches, embedded
    ends += (2 * FP32 + low) * encoder  # tokens with positions, the last norm's input
    if isinstance(part, Pretrain):
        blocks += [images * (1 + model.num_patches) * model.decoder.width] * model.decoder.depth
        ends += _prediction_bytes(model, part, images, low)
    if part.backbone_frozen:
        holds = given + (FROZEN_FP32 * FP32 + FROZEN_LOW * low) * encoder
        return Kept(holds, holds, given)
    kept_low = kept_values(model, part.tuning)
    whole = [round((KEPT_FP32 * FP32 + kept_low * low) * values) for values in blocks]
    working_low = WORKING_FROZEN_LOW if part.tuning.freezes else WORKING_LOW
    working = max((FP32 + working_low * low) * values for values in blocks)
    if not spread.recompute:
        return Kept(given + sum(whole) + ends, given + sum(whole) + working, given + whole[0] + working)
    inputs = FP32 * sum(blocks)
    return Kept(given + inputs + ends, given + inputs + max(whole) + working, given + whole[0] + working)


def kept_values(model: Model, tuning: Tuning) -> float:
    """Values of a block that are kept in the products' precision, of a token and channel.

    A frozen matrix needs no input to go back: those of qkv and of the MLP are kept where something is trained on them.
    """
    if not tuning.freezes:
        return KEPT_LOW
    shapes, head = model.tunable_shapes
    width = model.dims.width
    kept = float(KEPT_LOW_FROZEN)
    for layer in tuning.adapted(shapes, head=head):
        added = [shape for _, shape in tuning.added(layer, shapes) if len(shape) == 2]
        if layer.startswith("blocks.0.") and added:
            inputs = 0 if layer.endswith("attn.proj") else added[0][1]  # attention keeps its own output
            kept += (inputs + added[0][0]) / width  # the input of the first matrix and its output
    return kept


def _prediction_bytes(model: Model, part: Pretrain, images: int, low: int) -> int:
    """Of the masked patches: prediction in both precisions, target, their difference; of all: the decoder's input."""
    masked = model.num_patches - model.num_kept(part.mask_ratio)
    values = images * masked * model.channels * model.dims.patch_px**2
    return (low + 3 * FP32) * values + 2 * FP32 * images * (1 + model.num_patches) * model.decoder.width


def _trained(weights: Sequence[Weight]) -> int:
    return sum(w.numel for w in weights if w.trained)


def _largest_block(weights: Sequence[Weight]) -> int:
    numels: dict[str, int] = {}
    for weight in weights:
        if weight.block is not None:
            numels[weight.block] = numels.get(weight.block, 0) + weight.numel
    return max(numels.values(), default=0)


def _persistent(weights: Sequence[Weight]) -> int:
    """Elements that DeepSpeed's stage 3 keeps gathered: parameters no larger than the largest bias."""
    largest = max((w.numel for w in weights if len(w.shape) < 2), default=0)
    return sum(w.numel for w in weights if w.numel <= largest)
