"""One process, or DistributedDataParallel over several: the full model on each rank."""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import Parallel
from livt_scale.distributed import precision
from livt_scale.distributed.optimizer_step import OptimizerStep, TorchOptimizerStep
from livt_scale.distributed.strategy import DeviceResult, Groups, StepResult
from livt_scale.distributed.world import World
from livt_scale.models.resnet import residual_blocks
from livt_scale.optim import MakeOptimizer

LOOK_EVERY = 5  # steps between two reads of what DDP has measured: a read takes 0.1 ms
# Do not broadcast buffers in every forward pass: batch norm's statistics are averaged at each update
# (`distributed.batchnorm`), and no other buffer changes. torch 2.14 renamed the option.
_NAMES = inspect.signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Ddp(TorchOptimizerStep):
    """A `Strategy`; `model` is moved to this rank's device."""

    name: StrategyName = "ddp"
    lockstep = CAPABILITIES["ddp"].shards_parameters

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        *,
        parallel: Parallel,
        betas: tuple[float, float],
        make_optimizer: MakeOptimizer | None,
        world: World,
    ) -> None:
        self.model = with_fast_convolutions(model.to(world.device), world.device, parallel)
        self._device, self._precision = world.device, parallel.precision
        self._updates = OptimizerStep(
            groups(self.model),
            parallel=parallel,
            betas=betas,
            make_optimizer=make_optimizer,
            device_type=world.device.type,
        )
        self._updates_done = 0
        self._exchange_s: float | None = None
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

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        return replace(super().update(lr, max_norm=max_norm), exchange_s=self._look())

    def update_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:
        return replace(super().update_unless(is_bad, lr, max_norm=max_norm), exchange_s=self._look())

    def _look(self) -> float | None:
        """The measured exchange; every LOOK_EVERY-th update reads it again."""
        if self._updates_done % LOOK_EVERY == 0:
            self._exchange_s = self._measured_exchange_s()
        self._updates_done += 1
        return self._exchange_s

    def _measured_exchange_s(self) -> float | None:
        """DDP's own measurement of its newest sampled step: it samples the first ten, then every hundredth."""
        if not isinstance(self._wrapped, DistributedDataParallel):
            return 0.0
        measured = self._wrapped._get_ddp_logging_data()  # there is no public way; None if torch no longer has it
        times = [measured.get(f"backward_{name}") for name in ("comm_time", "compute_comm_overlap_time")]
        return None if None in times else max(times[0] - times[1], 0) / 1e9

    def infer(self, *inputs: Any, **named: Any) -> Any:
        with torch.inference_mode():
            return precision.infer(self.model, self._device, self._precision, *inputs, **named)

    def _exchange(self, *, last: bool) -> AbstractContextManager[None]:
        if last or not isinstance(self._wrapped, DistributedDataParallel):
            return nullcontext()
        return self._wrapped.no_sync()


def with_fast_convolutions(model: nn.Module, device: torch.device, parallel: Parallel) -> nn.Module:
    """A ResNet: weights in channels_last, the faster layout; on a GPU the fastest kernels by trial.

    In place; a convolution gives its output the layout of its weights. Not under sharded strategies: they flatten.
    """
    if residual_blocks(model):
        model.to(memory_format=torch.channels_last)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = not parallel.deterministic
    return model
