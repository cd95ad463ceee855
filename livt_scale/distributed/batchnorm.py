"""A strategy around another one, to which it leaves everything: what adds something overrides that alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from livt_scale.distributed.strategy import StepResult, Strategy
from livt_scale.distributed.world import World


class Around:
    """A `Strategy`: the inner one's, call for call."""

    def __init__(self, strategy: Strategy) -> None:
        self._inner = strategy
        self.name, self.model, self.lockstep = strategy.name, strategy.model, strategy.lockstep

    def call(self, *inputs: Any, last: bool) -> Any:
        return self._inner.call(*inputs, last=last)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._inner.backward(loss, last=last)

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        return self._inner.update(lr, max_norm=max_norm)

    def discard(self) -> None:
        self._inner.discard()

    def infer(self, *inputs: Any, **named: Any) -> Any:
        return self._inner.infer(*inputs, **named)

    def state(self) -> dict[str, Tensor]:
        return self._inner.state()

    def restored(self, state: dict[str, Tensor]) -> None:
        self._inner.restored(state)

    def held_bytes(self) -> int:
        return self._inner.held_bytes()

    def scaler(self) -> dict[str, float] | None:
        return self._inner.scaler()

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        self._inner.set_scaler(saved)


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

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
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
