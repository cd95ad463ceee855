"""The training loop's interface to a parallel strategy: the protocol, its plain data, and a base for wrappers.

    loss = strategy.call(images, noise, last=True)
    strategy.backward(loss, last=True)
    result = strategy.update(1e-3, max_norm=None)

`livt_scale.distributed.wrap` chooses and builds one; the engines are `ddp`, `fsdp` and `deepspeed`. Every method may be
a collective call, except `backward` of a micro-batch that is not the last: all ranks call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from livt_scale.config.capabilities import StrategyName

Groups = Callable[[nn.Module], list[dict[str, Any]]]  # a model to the optimizer's groups, as `optim.param_groups`


@dataclass(frozen=True)
class StepResult:
    """The outcome of an optimizer step.

    grad_norm: over all parameters and ranks, before clipping; inf or nan if a gradient is not finite.
    applied: False: parameters and moments are unchanged. overflow: fp16's loss scale was too high and is now lower.
    exchange_s: seconds that a step's backward pass waited for other ranks' gradients; None: not measured.
    """

    grad_norm: float
    applied: bool
    overflow: bool = False
    exchange_s: float | None = None


@dataclass(frozen=True)
class DeviceResult:
    """A `StepResult` that is still on the device: grad_norm [] and applied [], bool."""

    grad_norm: Tensor
    applied: Tensor
    exchange_s: float | None = None


class DeviceUpdates(Protocol):
    """Updates that the device decides about: the host enqueues them and does not wait."""

    def update_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:
        """`Strategy.update`; nothing changes where `is_bad` ([], bool, the same on all ranks) or the gradient is not
        finite."""


class Strategy(Protocol):
    """`model` keeps its plain parameter names. `lockstep`: a forward pass is a collective call."""

    name: StrategyName
    model: nn.Module
    lockstep: bool

    @property
    def on_device(self) -> DeviceUpdates | None:
        """None: only the host can decide about an update."""

    def call(self, *inputs: Any, last: bool) -> Any:
        """Forward pass of a micro-batch in the recipe's precision; `last` of its step."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate gradients. Ranks exchange them after the last micro-batch, or earlier where they must."""

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        """One step at rate `lr` (times a group's `lr_scale`), with the gradient clipped to `max_norm`; gradients are
        zero afterwards. Nothing changes if the gradient is not finite."""

    def discard(self) -> None:
        """Drop the gradients without a step."""

    def infer(self, *inputs: Any, **named: Any) -> Any:
        """Forward pass in evaluation mode and the recipe's precision, without gradients."""

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments by plain name (`distributed.state_dict`): plain tensors that are alike on all ranks,
        or DTensors. To be saved, or filled from a checkpoint and passed to `restored`."""

    def restored(self, state: dict[str, Tensor]) -> None:
        """Take over `state`, which came from `state()` and has been filled since."""

    def held_bytes(self) -> int:
        """Bytes of the parameters, gradients and moments on this rank (gradients: between backward and update)."""

    def scaler(self) -> dict[str, float] | None:
        """fp16's dynamic loss scale as JSON values; None without one."""

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        """Restore a saved loss scale; None (saved by a run without one): keep the initial scale."""


class StrategyWrapper:
    """A `Strategy` that passes every call to the one inside; what adds something overrides only that."""

    def __init__(self, strategy: Strategy) -> None:
        self._inner = strategy
        self.name, self.model, self.lockstep = strategy.name, strategy.model, strategy.lockstep

    @property
    def on_device(self) -> DeviceUpdates | None:
        return self._inner.on_device

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
