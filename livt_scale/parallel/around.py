"""A strategy around another one, to which it leaves everything: what adds something overrides that alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from livt_scale.parallel.strategy import Strategy, Update


class Around:
    """A `Strategy`: the inner one's, call for call."""

    def __init__(self, strategy: Strategy) -> None:
        self._inner = strategy
        self.name, self.model, self.lockstep = strategy.name, strategy.model, strategy.lockstep

    def call(self, *inputs: Any, last: bool) -> Any:
        return self._inner.call(*inputs, last=last)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._inner.backward(loss, last=last)

    def update(self, lr: float, *, max_norm: float | None) -> Update:
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
