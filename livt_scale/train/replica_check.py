"""Checks that replicas still agree: compares tensors that must be equal on several ranks bit for bit.

Plain tensors are equal on all ranks. Of a DTensor, the ranks that hold the same shard are: none in plain sharding, the
ranks at the same place of other nodes where the shards are replicated over nodes. Each tensor becomes one number (the
sum of its bits, as 32- or 8-bit integers), so 16 bytes per tensor and rank are exchanged.

Why: a flipped bit in a GPU's memory, or a kernel that differs, raises no error. The losses of the ranks are averaged,
and training continues with weights that are not those of one model (arXiv 2407.21783, section 3.3.4, reports such
faults).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from livt_scale.distributed.world import World
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.util.errors import DivergedError


class ReplicaCheck(Hook):
    """`faults.digest_every_steps`: compares the weights and moments of the ranks every `every_steps` steps."""

    def __init__(self, *, every_steps: int) -> None:
        self._every_steps = every_steps

    def after_step(self, loop: Loop, step: Step) -> None:
        if step.number % self._every_steps == 0:
            check_alike(loop.state.strategy.state(), step=step.number, world=loop.world)


def check_alike(state: Mapping[str, Tensor], *, step: int, world: World) -> None:
    """Raise DivergedError on all ranks if `state` (a strategy's) differs between replicas. A collective call."""
    if world.world_size == 1:
        return
    names = list(state)
    shares = torch.tensor([shard_index(state[name]) for name in names], device=world.device)
    digests = torch.stack([digest_of(state[name]).to(world.device) for name in names])
    mine = torch.stack([shares, digests], dim=1)  # [names, 2]
    gathered = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(gathered, mine)
    ranks = torch.stack(gathered).tolist()  # [ranks, names, 2]
    differing = {name: odd for k, name in enumerate(names) if (odd := odd_ranks([rank[k] for rank in ranks]))}
    if not differing:
        return
    first, odd = next(iter(differing.items()))
    raise DivergedError(
        f"after step {step} {_who(odd)} another {first} than the other ranks ({len(differing)} of {len(names)} tensors "
        "differ somewhere): memory or arithmetic of that process failed, or it runs other code",
        remedy="remove the checkpoints since the last successful comparison, exclude that rank's node, and start again",
    )


def _who(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} holds"
    return f"ranks {', '.join(map(str, ranks))} hold"


def odd_ranks(values: list[list[int]]) -> list[int]:
    """The ranks whose digest is not that of most ranks with the same shard; of two that differ, both.

    values: (shard index, digest) of each rank.
    """
    odd = []
    for share in {share for share, _ in values}:
        digests = {rank: digest for rank, (own, digest) in enumerate(values) if own == share}
        (usual, most), *others = Counter(digests.values()).most_common()
        tie = bool(others) and others[0][1] == most
        odd += [rank for rank, digest in digests.items() if others and (tie or digest != usual)]
    return sorted(odd)


def shard_index(tensor: Tensor) -> int:
    """Which shard of `tensor` this rank holds: the same number on the ranks that hold the same shard."""
    number = 0
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        places = mesh.get_coordinate() or [0] * mesh.ndim
        for place, size, placement in zip(places, mesh.shape, tensor.placements, strict=True):
            number = number * size + (0 if isinstance(placement, Replicate) else place)
    return number


def digest_of(tensor: Tensor) -> Tensor:
    """The sum of the bits of this rank's shard, an int64 that wraps: one changed bit always changes it."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    as_integers = torch.int32 if local.element_size() % 4 == 0 else torch.uint8
    flat = local.view(-1) if local.dim() else local.view(1)
    return flat.view(as_integers).sum(dtype=torch.int64)
