"""DeepSpeed's ZeRO: stage 1 shares out AdamW's moments and fp32 pieces, stage 2 gradients too, stage 3 weights too.

Stages 1 and 2 hold the whole model on each rank: a forward pass is no collective call. In stage 3 a layer's weights are
gathered when it is called and freed after it. Stage 2 and 3 exchange gradients after each micro-batch, because no rank
has room for all of them; stage 1 after the last alone.

Precision is autocast's, as under ddp: weights, moments and what ranks exchange are fp32, sensitive operations too.
Why not the engine's own modes: `bf16`/`fp16` cast the model itself, fixed positions and norms with it, and round the
inputs, masking noise among them; `torch_autocast` adds gradients up in 16 bits and, in fp16, moves its loss scale once
a parameter group. The price: stage 3 gathers twice the bytes that fsdp does in bf16.

Source: ZeRO, arXiv 1910.02054; ZeRO-Infinity, arXiv 2104.07857; deepspeed 0.19.8.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from livt_scale import optim
from livt_scale.parallel import precision
from livt_scale.parallel.loss_scale import DynamicScale
from livt_scale.parallel.strategy import Groups, Update
from livt_scale.parallel.topology import World
from livt_scale.parallel.zero_engine import import_deepspeed, start_engine
from livt_scale.parallel.zero_state import ZeroState
from livt_scale.recipe import Parallel

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


class Zero:
    """A `Strategy`; the model's parameters are the engine's from now on."""

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        *,
        name: str,
        parallel: Parallel,
        betas: tuple[float, float],
        world: World,
    ) -> None:
        stage = STAGES[name]
        deepspeed = import_deepspeed(world)
        self.name, self.model, self.lockstep = name, model.to(world.device), stage == 3
        self._device, self._precision = world.device, parallel.precision
        self._adamw = optim.make_adamw(groups(model), betas=betas, implementation=parallel.adamw)
        # Inside the module: the engine switches an autocast around it off.
        model.forward = partial(_under_autocast, model.forward, world.device, parallel.precision)
        self._engine = start_engine(deepspeed, model, self._adamw, stage=stage, parallel=parallel, world=world)
        self._zero = self._engine.optimizer  # DeepSpeed's, around AdamW
        mesh = init_device_mesh(world.device.type, (world.world_size,)) if world.world_size > 1 else None
        self._state = ZeroState(deepspeed, self._engine, mesh=mesh)
        # Its hooks hold engine and model where no garbage collector looks, and the next stage wants the room.
        weakref.finalize(self, _end, self._engine, self._state).atexit = False
        self._scale = DynamicScale() if parallel.precision == "fp16" else None
        self._tell_scale()

    def call(self, *inputs: Any, last: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def update(self, lr: float, *, max_norm: float | None) -> Update:
        optim.set_lr(self._adamw, lr)
        self._zero.clip_grad = max_norm or 0.0
        self._engine.step()  # leaves everything as it was where the norm is not finite
        finite = self._engine.was_step_applied()
        overflow = False
        if self._scale is not None:
            overflow = self._scale.note(finite=finite)
            self._tell_scale()
        return Update(float(self._engine.get_global_grad_norm()), applied=finite, overflow=overflow)

    def discard(self) -> None:
        """By the engine's own way of leaving out a step: a norm that says so."""
        of = "_get_norm_groups" if self.lockstep else "scaled_global_norm"
        refused = torch.tensor(float("inf"), device=self._device)
        setattr(self._zero, of, lambda: [refused] if self.lockstep else refused)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, of)
        assert not self._engine.was_step_applied(), "deepspeed takes a step on a norm that is not finite"

    def infer(self, *inputs: Any, **named: Any) -> Any:
        with torch.no_grad():  # not inference_mode: the gathered weights' memory is used again in training
            return precision.infer(self.model, self._device, self._precision, *inputs, **named)

    def state(self) -> dict[str, Tensor]:
        return self._state.collect()

    def restored(self, state: dict[str, Tensor]) -> None:
        self._state.restore(state)

    def scaler(self) -> dict[str, float] | None:
        return None if self._scale is None else self._scale.saved()

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        if self._scale is not None and saved is not None:
            self._scale = DynamicScale(saved["scale"], int(saved["good_steps"]))
            self._tell_scale()

    def held_bytes(self) -> int:
        """Bytes of weights, gradients and moments that this rank holds now: call it before `update`."""
        return sum(storage.nbytes() for storage in self._state.storages())

    def _tell_scale(self) -> None:
        if self._scale is not None:
            self._zero.override_loss_scale(self._scale.value)


def _under_autocast(forward: Any, device: torch.device, kind: str, *inputs: Any, **named: Any) -> Any:
    with precision.autocast(device, kind):
        return forward(*inputs, **named)


def _end(engine: Any, state: ZeroState) -> None:
    storages = state.storages() if engine.zero_optimization_stage() == 3 else []
    engine.destroy()
    for storage in storages:  # stage 3's engine stays alive for all that
        storage.resize_(0)
