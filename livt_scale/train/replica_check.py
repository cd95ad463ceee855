"""Whether the ranks still hold the same: what should be alike on several of them is compared, bit for bit.

Plain tensors are alike on all ranks. Of a DTensor, ranks that hold the same shard are alike: none in plain sharding,
those of the same place on other nodes where the shards are copied over nodes. A rank's tensors become one number each
(the sum of their bits, as 32- or 8-bit integers), so what travels is 16 bytes a tensor and rank.

Why: a flipped bit in a GPU's memory, or a kernel that differs, is in no error message. The losses of the ranks are
averaged, and the run goes on with weights that are not one model's (arXiv 2407.21783, section 3.3.4, has such faults).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from livt_scale.distributed.world import World
from livt_scale.util.errors import DivergedError


def check_alike(state: Mapping[str, Tensor], *, step: int, world: World) -> None:
    """Raise DivergedError on all ranks where `state` (a strategy's) is not alike. A collective call."""
    if world.world_size == 1:
        return
    names = list(state)
    shares = torch.tensor([_share(state[name]) for name in names], device=world.device)
    digests = torch.stack([_digest(state[name]).to(world.device) for name in names])
    mine = torch.stack([shares, digests], dim=1)  # [names, 2]
    gathered = [torch.empty_like(mine) for _ in range(world.world_size)]
    dist.all_gather(gathered, mine)
    ranks = torch.stack(gathered).tolist()  # [ranks, names, 2]
    differing = {name: odd for k, name in enumerate(names) if (odd := _odd_ones([rank[k] for rank in ranks]))}
    if not differing:
        return
    first, odd = next(iter(differing.items()))
    raise DivergedError(
        f"after step {step} {_who(odd)} another {first} than the other ranks ({len(differing)} of {len(names)} tensors "
        "differ somewhere): memory or arithmetic of that process failed, or its code is another",
        remedy="remove the checkpoints since the last comparison that held, keep that rank's node out, and start again",
    )


def _who(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} holds"
    return f"ranks {', '.join(map(str, ranks))} hold"


def _odd_ones(values: list[list[int]]) -> list[int]:
    """The ranks whose digest is not that of most ranks with the same share; of two that differ, both."""
    odd = []
    for share in {share for share, _ in values}:
        digests = {rank: digest for rank, (own, digest) in enumerate(values) if own == share}
        (usual, most), *others = Counter(digests.values()).most_common()
        tie = bool(others) and others[0][1] == most
        odd += [rank for rank, digest in digests.items() if others and (tie or digest != usual)]
    return sorted(odd)


def _share(tensor: Tensor) -> int:
    """Which part of the whole this rank holds: a number that is the same on the ranks that hold the same."""
    number = 0
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        places = mesh.get_coordinate() or [0] * mesh.ndim
        for place, size, placement in zip(places, mesh.shape, tensor.placements, strict=True):
            number = number * size + (0 if isinstance(placement, Replicate) else place)
    return number


def _digest(tensor: Tensor) -> Tensor:
    """The sum of the bits of what this rank holds, int64 that wraps: one changed bit always changes it."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    as_integers = torch.int32 if local.element_size() % 4 == 0 else torch.uint8
    flat = local.view(-1) if local.dim() else local.view(1)
    return flat.view(as_integers).sum(dtype=torch.int64)
