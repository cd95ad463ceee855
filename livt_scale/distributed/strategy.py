"""What a strategy is to the loop: how the model lies on the ranks, is called, updated and read, whatever the engine.

    strategy = make_strategy(recipe.parallel, model, groups, betas=(0.9, 0.95), world=world)
    loss = strategy.call(images, noise, last=True)
    strategy.backward(loss, last=True)
    update = strategy.update(1e-3, max_norm=None)

One file each: `ddp`, `fsdp`, `zero`. Every method but `backward` of a micro-batch that is not the last may be a
collective call: all ranks make it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from livt_scale.config.capabilities import StrategyName
from livt_scale.config.recipe import Parallel
from livt_scale.distributed.world import World
from livt_scale.util.errors import UsageError

Groups = Callable[[nn.Module], list[dict[str, Any]]]  # a model to the optimizer's groups, as `optim.param_groups`
BYTES_A_WEIGHT = 16  # fp32 weight, gradient and two moments; of a frozen one the first alone
SHARE_FOR_STATES = 0.5  # of a device's memory; the rest is for activations, buffers and what fragments


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step came to.

    grad_norm: over all parameters and ranks, before clipping; inf or nan where a gradient is not finite.
    applied: False: weights and moments are as they were. overflow: fp16's loss scale was too high and is lower now.
    exchange_s: seconds that a step's backward pass stood still for other ranks' gradients; None: cannot be told.
    """

    grad_norm: float
    applied: bool
    overflow: bool = False
    exchange_s: float | None = None


class Strategy(Protocol):
    """`model` keeps its plain parameter names. `lockstep`: a forward pass is a collective call."""

    name: StrategyName
    model: nn.Module
    lockstep: bool

    def call(self, *inputs: Any, last: bool) -> Any:
        """Forward of a micro-batch in the recipe's precision; `last` of its step."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gradients add up; ranks exchange what they need not exchange earlier after the last micro-batch alone."""

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        """One step at rate `lr` (times a group's `lr_scale`), the gradient clipped to `max_norm`; gradients end at
        zero. Nothing is changed where the gradient is not finite."""

    def discard(self) -> None:
        """Forget the gradients, without a step."""

    def infer(self, *inputs: Any, **named: Any) -> Any:
        """Forward in evaluation mode and the recipe's precision, without gradients."""

    def state(self) -> dict[str, Tensor]:
        """Weights and moments by plain name (`parallel.state`): plain tensors that are alike on all ranks, or DTensors.
        To be saved, or filled from a checkpoint and handed to `restored`."""

    def restored(self, state: dict[str, Tensor]) -> None:
        """Take `state`, of `state()` and filled since, for the weights and moments."""

    def held_bytes(self) -> int:
        """Bytes of the weights, gradients and moments that this rank keeps now (gradients: from backward to update)."""

    def scaler(self) -> dict[str, float] | None:
        """fp16's dynamic loss scale as JSON values; None where there is none."""

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        """Go on with a saved loss scale; None (saved by a run without one): begin anew."""


def make_strategy(
    parallel: Parallel,
    model: nn.Module,
    groups: Groups,
    *,
    betas: tuple[float, float],
    world: World,
    momentum: float | None = None,
) -> Strategy:
    """`model` (the same on every rank, on the CPU) under the recipe's strategy, with its AdamW. A collective call.

    momentum: LARS's, in AdamW's place; None: AdamW with `betas`.
    """
    from livt_scale.distributed.batchnorm import with_statistics
    from livt_scale.distributed.blocks import prepare_blocks

    name = choose(parallel, model, world=world)
    prepare_blocks(model, recompute=parallel.activation_checkpointing, compiled=parallel.compile)
    engine = _engine(name, parallel, model, groups, betas=betas, momentum=momentum, world=world)
    return with_statistics(engine, world=world)


def _engine(
    name: StrategyName,
    parallel: Parallel,
    model: nn.Module,
    groups: Groups,
    *,
    betas: tuple[float, float],
    momentum: float | None,
    world: World,
) -> Strategy:
    if name == "ddp":
        from livt_scale.distributed.ddp import Ddp

        return Ddp(model, groups, parallel=parallel, betas=betas, momentum=momentum, world=world)
    if name == "fsdp":
        from livt_scale.distributed.fsdp import Fsdp

        return Fsdp(model, groups, parallel=parallel, betas=betas, momentum=momentum, world=world)
    from livt_scale.distributed.deepspeed import Zero

    assert momentum is None, "the recipe has refused it: ZeRO's flat pieces know no layer whose norm LARS asks for"
    return Zero(model, groups, name=name, parallel=parallel, betas=betas, world=world)


def choose(parallel: Parallel, model: nn.Module, *, world: World) -> StrategyName:
    """The strategy's name; `auto`: the simplest whose states fit. UsageError where this many ranks cannot have it."""
    if parallel.shard_within == "node" and world.world_size % world.local_size:
        raise UsageError(
            f"parallel.shard_within is 'node', but {world.world_size} processes are not a multiple of the "
            f"{world.local_size} on this node",
            remedy="start as many processes on each node, or set shard_within: all",
        )
    if parallel.strategy != "auto":
        return parallel.strategy
    states = sum(p.numel() * (BYTES_A_WEIGHT if p.requires_grad else p.element_size()) for p in model.parameters())
    fits = states <= SHARE_FOR_STATES * _device_bytes(world)
    return "ddp" if world.world_size == 1 or fits else "fsdp"


def _device_bytes(world: World) -> int:
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    import psutil

    return int(psutil.virtual_memory().total) // world.local_size
