"""What a step has come to, read from the device after the next step has been sent to it.

    step.pending = Readout(values, …)        # the copy to the host is enqueued; nobody waits
    …                                        # the next step is enqueued
    step.loss                                # waits for the copy, which is done by now

So the device always has work while the host prepares more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from livt_scale.distributed.strategy import DeviceResult, StepResult


@dataclass(frozen=True)
class StepOutcome:
    """The same on every rank. loss: mean over the ranks. asks_to_stop: a rank has asked to stop."""

    loss: float
    asks_to_stop: bool
    result: StepResult


class Readout:
    """The numbers of one step on their way to the host.

    sums: [2] float64, the ranks' losses and their requests to stop.
    """

    def __init__(self, sums: Tensor, result: DeviceResult, *, world_size: int) -> None:
        values = torch.cat([sums, torch.stack([result.grad_norm.double(), result.applied.double()])])
        self._world_size, self._exchange_s = world_size, result.exchange_s
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> StepOutcome:
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, stops, norm, applied = self._values.tolist()
        result = StepResult(norm, applied=bool(applied), exchange_s=self._exchange_s)
        return StepOutcome(loss / self._world_size, stops > 0, result)
