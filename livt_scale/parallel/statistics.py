"""A strategy that keeps the running statistics of batch norm alike on all ranks, and true to the steps taken.

In training each rank's batch norm normalises by its own micro-batch, and moves its running mean and variance towards
that one's: r <- 0.9 r + 0.1 x. Ranks would drift apart, and a checkpoint would hold rank 0's. So with each update the
running statistics become the mean over the ranks. As the rule is linear and all ranks began alike, that is the rule
itself with the mean of the ranks' x; so it is over several micro-batches.

    rank 0   r = 1, x = 3  ->  1.2 ─┐
    rank 1   r = 1, x = 7  ->  1.6 ─┴─ 1.4 on both = 0.9 · 1 + 0.1 · (3 + 7) / 2

A step without an update (a loss that is not finite, fp16's overflow) leaves them as they were before it: else one bad
batch would stay in them for good. The mean is of the ranks' variances, within each micro-batch, not of all images.

Why not SyncBatchNorm: torch has it on GPUs alone, and it speaks in each layer, forward and backward. This is one small
all-reduce a step (0.04 MB for ResNet-18). The price: the normalisation sees one micro-batch of one rank.

Source: batch normalisation, arXiv 1502.03167.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from livt_scale.parallel.around import Around
from livt_scale.parallel.strategy import Strategy, Update
from livt_scale.parallel.topology import World


def with_statistics(strategy: Strategy, *, world: World) -> Strategy:
    """`strategy`, which from now on also looks after batch norm's statistics; itself where the model has none."""
    return Statistics(strategy, world) if statistics_of(strategy.model) else strategy


def statistics_of(model: nn.Module) -> list[Tensor]:
    """The live running means, variances and counts of `model`, in the order of its modules."""
    norms = (module for module in model.modules() if isinstance(module, _BatchNorm))
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


class Statistics(Around):
    """A `Strategy`: all of the inner one's, and the statistics of its model's batch norms."""

    def __init__(self, strategy: Strategy, world: World) -> None:
        super().__init__(strategy)
        self._world = world
        self._keep()

    def update(self, lr: float, *, max_norm: float | None) -> Update:
        update = self._inner.update(lr, max_norm=max_norm)
        if update.applied:
            self._average()
            self._keep()
        else:
            self._go_back()
        return update

    def discard(self) -> None:
        self._inner.discard()
        self._go_back()

    def restored(self, state: dict[str, Tensor]) -> None:
        self._inner.restored(state)
        self._keep()

    @torch.no_grad()
    def _average(self) -> None:
        """The same bits on all ranks: one all-reduce, then the same division."""
        if self._world.world_size == 1:
            return
        running = [t for t in statistics_of(self.model) if t.is_floating_point()]  # the counts are alike already
        together = torch.cat([t.flatten() for t in running])
        dist.all_reduce(together)
        together /= self._world.world_size
        parts = together.split([t.numel() for t in running])
        torch._foreach_copy_(running, [part.view_as(t) for part, t in zip(parts, running, strict=True)])

    def _keep(self) -> None:
        self._kept = [tensor.clone() for tensor in statistics_of(self.model)]

    @torch.no_grad()
    def _go_back(self) -> None:
        torch._foreach_copy_(statistics_of(self.model), self._kept)
