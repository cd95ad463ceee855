"""One process, or DistributedDataParallel over several: the whole model on each rank."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from livt_scale.parallel import precision
from livt_scale.parallel.strategy import Groups
from livt_scale.parallel.topology import World
from livt_scale.parallel.updates import TorchUpdates, Updates
from livt_scale.recipe import Parallel

# Our buffers are constants (positions): not to be sent at every forward. torch 2.14 gave the option a new name.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Ddp(TorchUpdates):
    """A `Strategy`; `model` is moved to this rank's device."""

    name = "ddp"
    lockstep = False

    def __init__(
        self, model: nn.Module, groups: Groups, *, parallel: Parallel, betas: tuple[float, float], world: World
    ) -> None:
        self.model = model.to(world.device)
        self._device, self._precision = world.device, parallel.precision
        self._updates = Updates(groups(self.model), parallel=parallel, betas=betas, device_type=world.device.type)
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
        with self._exchange(last=last), precision.autocast(self._device, self._precision):
            return self._wrapped(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        with self._exchange(last=last):
            self._updates.scale(loss).backward()

    def infer(self, *inputs: Any, **named: Any) -> Any:
        with torch.inference_mode():
            return precision.infer(self.model, self._device, self._precision, *inputs, **named)

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()
