"""The optimizer step of torch's strategies, for plain parameters and DTensors.

AdamW or another optimizer, an exact global gradient norm over all ranks, and fp16's dynamic loss scale.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.tensor import DTensor

from livt_scale import optim
from livt_scale.config.recipe import Parallel
from livt_scale.distributed.precision import LOWEST_SCALE
from livt_scale.distributed.state_dict import collect
from livt_scale.distributed.strategy import DeviceResult, DeviceUpdates, StepResult
from livt_scale.models import head_norm
from livt_scale.util.errors import UsageError


class OptimizerStep:
    """The optimizer of a strategy whose parameters are `groups`'; `make_optimizer`: None: AdamW with `betas`."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        parallel: Parallel,
        betas: tuple[float, float],
        make_optimizer: optim.MakeOptimizer | None,
        device_type: str,
    ) -> None:
        self.optimizer: torch.optim.Optimizer
        if make_optimizer is None:
            self.optimizer = optim.make_adamw(groups, betas=betas, implementation=parallel.adamw)
        else:
            self.optimizer = make_optimizer(groups)
        self._state_is_checked = make_optimizer is None
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._scaler = GradScaler(device_type) if parallel.precision == "fp16" else None
        # fp16's scale is kept by the host, and torch's other optimizers cannot leave out a step on the device
        is_fused = make_optimizer is None and parallel.adamw == "fused"
        self.decides_on_device = is_fused and self._scaler is None and parallel.offload == "none"

    def scale(self, loss: Tensor) -> Tensor:
        """The loss whose gradient does not underflow in fp16."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def step(self, lr: float, *, max_norm: float | None) -> StepResult:
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        total, norm_tensor = self._total_norm()
        norm = float(norm_tensor)
        finite = math.isfinite(norm)
        overflow = False
        if finite:
            if max_norm is not None:
                nn.utils.clip_grads_with_norm_(self._parameters, max_norm, total, foreach=True)
            optim.set_lr(self.optimizer, lr)
            self._step()
        if self._scaler is not None:
            overflow = not finite and self._scaler.get_scale() > LOWEST_SCALE
            self._scaler.update()
        self.optimizer.zero_grad()
        return StepResult(norm, applied=finite, overflow=overflow)

    def step_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:
        """`step` without waiting for the device: fused AdamW leaves out a step whose `found_inf` is 1."""
        total, norm = self._total_norm()
        skipped = is_bad | ~norm.isfinite()
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(self._parameters, max_norm, total, foreach=True)
        optim.set_lr(self.optimizer, lr)
        self.optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf  # type: ignore[attr-defined]
        self.optimizer.zero_grad()
        return DeviceResult(norm, ~skipped)

    def _total_norm(self) -> tuple[Tensor, Tensor]:
        """Norm of the gradients of all ranks, []: as torch clips by it, and as a plain tensor."""
        total = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        return total, total.full_tensor() if isinstance(total, DTensor) else total

    def _step(self) -> None:
        if self._state_is_checked:
            self.optimizer.step()
            return

        # its first step: a checkpoint is read into the tensors that an optimizer has before it
        before = [set(self.optimizer.state[p]) for p in self._parameters]
        self.optimizer.step()
        for parameter, names in zip(self._parameters, before, strict=True):
            state = self.optimizer.state[parameter]
            lost = [name for name, value in state.items() if name not in names or not isinstance(value, Tensor)]
            if lost:
                raise UsageError(
                    f"the optimizer {type(self.optimizer).__name__} keeps {', '.join(sorted(lost))} of a parameter, "
                    "which a resumed run would not have",
                    remedy="make it in `build`, as a tensor in optimizer.state[parameter]",
                )
        self._state_is_checked = True

    def scaler(self) -> dict[str, float] | None:
        if self._scaler is None:
            return None
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "good_steps": state["_growth_tracker"]}

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        if self._scaler is not None and saved is not None:
            state = self._scaler.state_dict()
            self._scaler.load_state_dict(
                {**state, "scale": saved["scale"], "_growth_tracker": int(saved["good_steps"])}
            )

    def discard(self) -> None:
        self.optimizer.zero_grad()
        if self._scaler is not None:
            self._scaler.update(self._scaler.get_scale())  # forgets what it saw of this step


class TorchOptimizerStep:
    """What strategies share whose gradients are torch's own: `update`, `state` and the loss scale of a `Strategy`."""

    model: nn.Module
    _updates: OptimizerStep

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        update = self._updates.step(lr, max_norm=max_norm)
        head_norm.settle(self.model, keep=update.applied)
        return update

    @property
    def on_device(self) -> DeviceUpdates | None:
        return self if self._updates.decides_on_device and head_norm.of(self.model) is None else None

    def update_unless(self, is_bad: Tensor, lr: float, *, max_norm: float | None) -> DeviceResult:
        return self._updates.step_unless(is_bad, lr, max_norm=max_norm)

    def discard(self) -> None:
        self._updates.discard()
        head_norm.settle(self.model, keep=False)

    def state(self) -> dict[str, Tensor]:
        return collect(self.model, self._updates.optimizer)

    def restored(self, state: dict[str, Tensor]) -> None:
        """Nothing to do: `state()` gave the live tensors, and they have been filled."""

    def held_bytes(self) -> int:
        gradients = {f"grad.{n}": p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return sum(_local(tensor).nbytes for tensor in (self.state() | gradients).values())

    def scaler(self) -> dict[str, float] | None:
        return self._updates.scaler()

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        self._updates.set_scaler(saved)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
