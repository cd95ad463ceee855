"""A DeepSpeed engine's weights and moments by plain name, and back, as `state_dict` does for torch's engines.

ZeRO holds flat pieces that know no parameter. Each parameter is put together from the pieces of all ranks, one at a
time, and each rank keeps its own rows of it as a DTensor, split as `fully_shard` splits: memory peaks at one parameter,
and the checkpoint store sees what it sees under fsdp. All functions here are collective calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from livt_scale.distributed.state_dict import plain_name
from livt_scale.util.errors import CheckpointMismatch


class ZeroState:
    """The state of `engine`, whose ranks form `mesh`; None: a process alone, whose state is plain tensors."""

    def __init__(self, deepspeed: Any, engine: Any, *, mesh: DeviceMesh | None) -> None:
        self._deepspeed, self._zero, self._mesh = deepspeed, engine.optimizer, mesh
        self._model: nn.Module = engine.module
        self._sharded = engine.zero_optimization_stage() == 3
        if self._sharded and not self._zero.offload_optimizer:
            self._hold_weights_once()
        self._make_moments()

    def flats(self) -> list[Tensor]:
        """This rank's pieces of the fp32 weights: what AdamW steps on."""
        own: list[Tensor] = (
            self._zero.fp32_partitioned_groups_flat if self._sharded else self._zero.single_partition_of_fp32_groups
        )
        return own

    def collect(self) -> dict[str, Tensor]:
        """Copies of all tensors, each rank's own rows; buffers and counts are plain tensors, complete on each rank."""
        state = {
            f"model.{name}": self._rows(self._weight(t)) if isinstance(t, nn.Parameter) else t.detach()
            for name, t in self._tensors().items()
        }
        steps = self._steps()
        for name, parameter in self._trained().items():
            for moment in ("exp_avg", "exp_avg_sq"):
                full = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment)
                state[f"optim.{name}.{moment}"] = self._rows(full)
            state[f"optim.{name}.step"] = torch.tensor(steps)
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take `state`, of `collect` and filled since. CheckpointMismatch where parameters have had unequal steps."""
        trained = self._trained()
        steps = {float(state[f"optim.{name}.step"]) for name in trained}
        if len(steps) > 1:
            raise CheckpointMismatch(
                f"the parameters of this checkpoint have had {sorted(steps)[:4]} steps, and zero keeps one count",
                remedy="continue it by ddp or fsdp",
            )
        for name, tensor in self._tensors().items():
            if isinstance(tensor, nn.Parameter):
                self._set_weight(tensor, _whole(state[f"model.{name}"]))
        for name, parameter in trained.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                self._set_own(parameter, _whole(state[f"optim.{name}.{moment}"]), moment)
        for flat in self.flats():
            self._zero.optimizer.state[flat]["step"].fill_(steps.copy().pop())

    def storages(self) -> list[torch.UntypedStorage]:
        """Of all weights, gradients and moments that this rank has now, each once."""
        held: list[Tensor] = []
        for parameter in self._model.parameters():
            held += [parameter.data, getattr(parameter, "ds_tensor", parameter.data)]
            held += [parameter.grad] if parameter.grad is not None else []
        for flat in self.flats():
            held += [flat, *(t for t in self._zero.optimizer.state[flat].values() if t.ndim)]
            held += [flat.grad] if flat.grad is not None else []
        if self._sharded:
            held.append(self._zero.grad_partitions_flat_buffer)
        else:
            held += [grad for group in self._zero.averaged_gradients.values() for grad in group or ()]
        return list({storage.data_ptr(): storage for storage in (t.untyped_storage() for t in held)}.values())

    def _hold_weights_once(self) -> None:
        """Let AdamW step on what is gathered: deepspeed 0.19.8 means to, but compares a device with its name."""
        for flat, gathered in zip(self.flats(), self._zero.fp16_partitioned_groups_flat, strict=True):
            assert flat.shape == gathered.shape
            flat.data = gathered.data

    def _make_moments(self) -> None:
        """Zero moments before the first step, as `state_dict.collect` makes them; the engine makes them in it."""
        for flat in self.flats():
            beside = self._zero.optimizer.defaults["fused"]
            self._zero.optimizer.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=flat.device if beside else "cpu"),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if not self._sharded:
            self._zero._lazy_init_hp_params_optimizer_state()  # the parameters learn where their moments lie

    def _tensors(self) -> dict[str, Tensor]:
        return {plain_name(name): tensor for name, tensor in self._model.state_dict(keep_vars=True).items()}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: t for n, t in self._tensors().items() if isinstance(t, nn.Parameter) and t.requires_grad}

    def _steps(self) -> float:
        return float(self._zero.optimizer.state[self.flats()[0]]["step"])

    def _weight(self, parameter: nn.Parameter) -> Tensor:
        if not self._sharded:
            return parameter.detach()
        if parameter.requires_grad:
            full: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            return full
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """The fp32 weight, and what the forward pass reads where that is a copy of it."""
        if parameter.requires_grad:
            self._set_own(parameter, value, None)
        if not self._sharded:
            parameter.data.copy_(value)
            return
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)

    def _set_own(self, parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
        """This rank's piece of a weight (None) or moment."""
        api, args = self._deepspeed.utils, () if moment is None else (moment,)
        if not self._sharded:
            set_full = api.safe_set_full_fp32_param if moment is None else api.safe_set_full_optimizer_state
            set_full(parameter, value, *args)
            return
        # not `safe_set_full_…`: it fails where the last rank's piece is padded (deepspeed 0.19.8)
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        first = size * (self._mesh.get_rank() if self._mesh is not None else 0)
        own = value.new_zeros(size)
        mine = value.flatten()[first : first + size]
        own[: mine.numel()] = mine
        set_local = api.safe_set_local_fp32_param if moment is None else api.safe_set_local_optimizer_state
        set_local(parameter, own, *args)

    def _rows(self, full: Tensor) -> Tensor:
        """A copy of this rank's rows of `full`."""
        if self._mesh is None:
            return full.clone()
        chunks = full.chunk(self._mesh.size())
        rank = self._mesh.get_local_rank()
        own = chunks[rank].clone() if rank < len(chunks) else full.new_empty((0, *full.shape[1:]))
        return DTensor.from_local(own, self._mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
