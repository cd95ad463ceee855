"""The CPU cores of a rank for its loader processes: each core is divided by the ranks that may use it.

    torchrun on 16 cores, 4 ranks       each may use 0-15                      16 · 1/4 = 4 cores a rank
    srun --cpus-per-task=4, 4 tasks     bound to 0-3, 4-7, 8-11, 12-15         4 · 1/1 = 4 cores a rank

The ranks exchange what they may use: alone, a rank cannot know whether its 4 cores are its own or
shared.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import torch.distributed as dist

from livt_scale.data.num_workers import cores_are
from livt_scale.distributed.world import World

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # of the machine, also inside containers


def share(own: Set[int], on_machine: Sequence[Set[int]]) -> int:
    """The number of cores for the rank that may use `own`; `on_machine`: the cores of each rank, `own` included."""
    parts = (Fraction(1, sum(core in cores for cores in on_machine)) for core in own)
    return max(1, int(sum(parts, Fraction())))


@contextmanager
def share_with_loader(world: World) -> Iterator[None]:
    """Within the block, `data.workers: auto` counts with this rank's share. Enter on all ranks of the process group."""
    if world.world_size == 1:  # everything that it may use
        yield
        return
    with cores_are(exchange(world)):
        yield


def exchange(world: World) -> int:
    """The share of this rank, from the machine and cores of every rank. Call on all ranks of the process group."""
    every: list[tuple[str, frozenset[int]]] = [("", frozenset())] * world.world_size
    own = _machine(), _cores()
    dist.all_gather_object(every, own)
    return share(own[1], [cores for machine, cores in every if machine == own[0]])


def _machine() -> str:
    return BOOT_ID.read_text() if BOOT_ID.is_file() else socket.gethostname()


def _cores() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))
