"""Choose a parallel strategy and put a model under it.

    strategy = make_strategy(recipe.parallel, model, groups, betas=(0.9, 0.95), world=world)

The order of the steps matters: blocks are changed before an engine shards or wraps them, batch norm's statistics are
kept right below the average of the parameters, which is outermost because evaluation asks it for the average.
"""

from __future__ import annotations

import psutil
import torch
from torch import nn

from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import Ema, Parallel
from livt_scale.distributed.batchnorm import with_batchnorm
from livt_scale.distributed.blocks import prepare_blocks
from livt_scale.distributed.ddp import Ddp
from livt_scale.distributed.deepspeed import Zero
from livt_scale.distributed.ema import with_ema
from livt_scale.distributed.fsdp import Fsdp
from livt_scale.distributed.strategy import Groups, Strategy
from livt_scale.distributed.world import World
from livt_scale.optim import MakeOptimizer
from livt_scale.util.errors import UsageError

STATE_BYTES_PER_PARAMETER = 16  # fp32 parameter, gradient and two moments; a frozen one has only the first
SHARE_FOR_STATES = 0.5  # of a device's memory; the rest is for activations, buffers and fragmentation


def make_strategy(
    parallel: Parallel,
    model: nn.Module,
    groups: Groups,
    *,
    betas: tuple[float, float],
    world: World,
    make_optimizer: MakeOptimizer | None = None,
    ema: Ema | None = None,
) -> Strategy:
    """`model` (the same on every rank, on the CPU) under the recipe's strategy, with its optimizer. A collective call.

    make_optimizer: None: AdamW with `betas`. ema: also keep an average of the parameters.
    """
    name = choose(parallel, model, world=world)
    prepare_blocks(model, recompute=parallel.activation_checkpointing, compiled=parallel.compile)
    strategy = _engine(name, parallel, model, groups, betas=betas, make_optimizer=make_optimizer, world=world)
    strategy = with_batchnorm(strategy, world=world)
    return with_ema(strategy, ema)


def choose(parallel: Parallel, model: nn.Module, *, world: World) -> StrategyName:
    """The strategy's name; `auto`: the simplest whose states fit. UsageError if it cannot run on this many ranks."""
    if parallel.shard_within == "node" and world.world_size % world.local_size:
        raise UsageError(
            f"parallel.shard_within is 'node', but {world.world_size} processes are not a multiple of the "
            f"{world.local_size} on this node",
            remedy="start the same number of processes on each node, or set shard_within: all",
        )
    if parallel.strategy != "auto":
        return parallel.strategy

    per_parameter = STATE_BYTES_PER_PARAMETER
    states = sum(p.numel() * (per_parameter if p.requires_grad else p.element_size()) for p in model.parameters())
    fits = states <= SHARE_FOR_STATES * device_bytes(world)
    return "ddp" if world.world_size == 1 or fits else "fsdp"


def device_bytes(world: World) -> int:
    """Memory of this rank's device; on CPUs, its part of the host's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return int(psutil.virtual_memory().total) // world.local_size


def _engine(
    name: StrategyName,
    parallel: Parallel,
    model: nn.Module,
    groups: Groups,
    *,
    betas: tuple[float, float],
    make_optimizer: MakeOptimizer | None,
    world: World,
) -> Strategy:
    if CAPABILITIES[name].zero_stage is not None:
        assert make_optimizer is None, "the recipe check refuses other optimizers than AdamW with ZeRO"
        return Zero(model, groups, name=name, parallel=parallel, betas=betas, world=world)

    engine = Fsdp if CAPABILITIES[name].shards_parameters else Ddp
    return engine(model, groups, parallel=parallel, betas=betas, make_optimizer=make_optimizer, world=world)
