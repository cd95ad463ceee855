"""torch's `fully_shard`, block by block: each rank holds its share of parameters, gradients and moments.

A block's parameters are gathered in the recipe's precision when it is called and freed afterwards. Those outside the
blocks (patches, tokens, norms, head) are few, and stay gathered in fp32 from forward to backward. Gradients are reduced
in fp32. `shard_within: node` shards over the ranks of a node and replicates over the nodes (hybrid sharding), so that
gathers stay within the node.

Source: PyTorch FSDP2, `torch.distributed.fsdp.fully_shard`; hybrid sharding, arXiv 2304.11277.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import Parallel
from livt_scale.distributed import precision
from livt_scale.distributed.blocks import blocks_of
from livt_scale.distributed.optimizer_step import OptimizerStep, TorchOptimizerStep
from livt_scale.distributed.strategy import Groups
from livt_scale.distributed.world import World, process_group_of_one
from livt_scale.models.timm_backbone import TimmClassifier
from livt_scale.optim import MakeOptimizer


class Fsdp(TorchOptimizerStep):
    """A `Strategy`; the parameters of `model` become DTensors."""

    name: StrategyName = "fsdp"
    lockstep = CAPABILITIES["fsdp"].shards_parameters

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
        process_group_of_one(world, timeout_s=parallel.timeout_s)
        mesh = _mesh(world, within_node=parallel.shard_within == "node")
        pinned = world.device.type == "cuda"
        offload = CPUOffloadPolicy(pin_memory=pinned) if parallel.offload == "cpu" else OffloadPolicy()
        # Inputs are not cast: masking noise in 8 bits would tie. Autocast does it, operation by operation.
        low = MixedPrecisionPolicy(
            param_dtype=precision.LOW.get(parallel.precision), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        full = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        # norms of timm take no weights in another precision than their input (`models.layers.LayerNorm`)
        of_blocks = full if isinstance(model, TimmClassifier) else low
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=of_blocks, offload_policy=offload)
        self.model = model  # sharded in place, and given FSDPModule's methods
        self._sharded: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=full, offload_policy=offload)
        self._device, self._precision = world.device, parallel.precision
        kind = "cpu" if parallel.offload == "cpu" else world.device.type
        self._updates = OptimizerStep(
            groups(self.model), parallel=parallel, betas=betas, make_optimizer=make_optimizer, device_type=kind
        )

    def call(self, *inputs: Any, last: bool) -> Any:
        self._sharded.set_requires_gradient_sync(last)
        self._sharded.set_is_last_backward(last)
        with precision.autocast(self._device, self._precision):
            return self.model(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:  # noqa: ARG002 - `call` has set it
        self._updates.scale(loss).backward()

    def infer(self, *inputs: Any, **named: Any) -> Any:
        with torch.no_grad():  # not inference_mode: the memory of gathered parameters is reused in training
            return precision.infer(self.model, self._device, self._precision, *inputs, **named)


def _mesh(world: World, *, within_node: bool) -> DeviceMesh:
    if not within_node:
        return init_device_mesh(world.device.type, (world.world_size,), mesh_dim_names=("shard",))
    nodes = world.world_size // world.local_size
    return init_device_mesh(world.device.type, (nodes, world.local_size), mesh_dim_names=("copy", "shard"))
