"""A strategy that also keeps batch norm's running statistics alike on all ranks.

Each rank's batch norm sees only its own micro-batches. After an update that was applied, the running means and
variances become their mean over the ranks, the same bits everywhere. After a step that was not applied (a loss that is
not finite, fp16's overflow) they are what they were before it.

Why not torch's SyncBatchNorm: it runs only on GPUs.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from livt_scale.distributed.strategy import StepResult, Strategy, StrategyWrapper
from livt_scale.distributed.world import World


def with_batchnorm(strategy: Strategy, *, world: World) -> Strategy:
    """`strategy` wrapped so that it also keeps batch norm's statistics; unchanged if the model has none."""
    return WithBatchNorm(strategy, world) if running_statistics(strategy.model) else strategy


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The live running means, variances and counts of `model`, in the order of its modules."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


class WithBatchNorm(StrategyWrapper):
    """A `Strategy`: the inner one, and the statistics of its model's batch norms."""

    def __init__(self, strategy: Strategy, world: World) -> None:
        super().__init__(strategy)
        self._world = world
        self._keep()

    @property
    def on_device(self) -> None:
        """Whether the statistics are kept depends on the update."""

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        update = self._inner.update(lr, max_norm=max_norm)
        if update.applied:
            self._average_over_ranks()
            self._keep()
        else:
            self._undo()
        return update

    def discard(self) -> None:
        self._inner.discard()
        self._undo()

    def restored(self, state: dict[str, Tensor]) -> None:
        self._inner.restored(state)
        self._keep()

    @torch.no_grad()
    def _average_over_ranks(self) -> None:
        """The same bits on all ranks: one all-reduce, then the same division."""
        if self._world.world_size == 1:
            return
        running = [t for t in running_statistics(self.model) if t.is_floating_point()]  # the counts are alike already
        together = torch.cat([t.flatten() for t in running])
        dist.all_reduce(together)
        together /= self._world.world_size
        parts = together.split([t.numel() for t in running])
        torch._foreach_copy_(running, [part.view_as(t) for part, t in zip(parts, running, strict=True)])

    def _keep(self) -> None:
        self._kept = [tensor.clone() for tensor in running_statistics(self.model)]

    @torch.no_grad()
    def _undo(self) -> None:
        torch._foreach_copy_(running_statistics(self.model), self._kept)
