"""One process, or DistributedDataParallel over several: the whole model on each rank.

What a strategy is to the loop (`fsdp` and `zero*` will answer to the same names):

    call(*inputs)              forward, in the recipe's precision
    backward(loss, last=...)   gradients add up; ranks exchange them after the last micro-batch alone
    clip(max_norm) -> norm     the exact global gradient norm, clipped where `max_norm` says so
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from livt_scale.parallel.topology import World

# Our buffers are constants (positions): not to be sent at every forward. torch 2.14 gave the option a new name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Ddp:
    """`model` is moved to this rank's device and keeps its plain parameter names; it is what gets saved."""

    name = "ddp"

    def __init__(self, model: nn.Module, *, world: World, precision: str) -> None:
        self.model = model.to(world.device)
        self._autocast = precision == "bf16"
        self._device_type = world.device.type
        self._wrapped: nn.Module = self.model
        if world.world_size > 1:
            # Buckets are views of .grad: no copy before the exchange. No unused parameters in either stage.
            self._wrapped = DistributedDataParallel(
                self.model,
                device_ids=[world.device.index] if world.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_OWN_BUFFERS,
            )

    def call(self, *inputs: Any, last: bool) -> Any:
        """Forward of a micro-batch; `last` of its step: then the backward that follows exchanges gradients."""
        with self._exchange(last=last), torch.autocast(self._device_type, torch.bfloat16, enabled=self._autocast):
            return self._wrapped(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._exchange(last=last):
            loss.backward()

    def clip(self, max_norm: float | None) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients, foreach=True)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, norm, foreach=True)
        return norm

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()
