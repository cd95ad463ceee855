"""Who am I: rank and world size from torchrun, accelerate or srun, or alone; and the process group.

    nothing                 World(rank 0 of 1)
    torchrun, accelerate    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun                    SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID; master: the first host of SLURM_STEP_NODELIST

Every collective has a bound (`parallel.timeout_s`): a rank that waits longer ends with an error, never at the job's
time limit. Why not accelerate's PartialState for this: it reads no Slurm variables.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from livt_scale.errors import UsageError
from livt_scale.parallel.peers import Peers

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class World:
    """One process's place among those that train together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes what one process writes for all."""
        return self.rank == 0

    @property
    def peers(self) -> Peers:
        """All ranks, speaking over the process group of the training."""
        return Peers(self.rank, self.world_size)

    @property
    def device(self) -> torch.device:
        import torch

        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())


def detect(environ: Mapping[str, str] = os.environ) -> World:
    """The launcher's word on rank and world size. Raises UsageError where its variables contradict each other."""
    if "RANK" in environ and "WORLD_SIZE" in environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE")
    else:
        return World()
    try:
        rank, world_size = int(environ[names[0]]), int(environ[names[1]])
        local_rank, local_size = int(environ.get(names[2], rank)), int(environ.get(names[3], world_size))
    except (KeyError, ValueError) as error:
        raise UsageError(f"the launcher's variables {', '.join(names)} are not all numbers: {error}") from error
    if not 0 <= rank < world_size:
        raise UsageError(f"{names[0]} is {rank} with {names[1]} = {world_size}", remedy="start by torchrun or srun")
    return World(rank, world_size, local_rank, local_size)


@contextmanager
def process_group(world: World, *, timeout_s: int) -> Iterator[None]:
    """The process group of `world` (gloo on CPU, nccl with gloo beside it on GPU); none where it is alone."""
    import torch
    import torch.distributed as dist

    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        yield
        return
    master = _slurm_master(os.environ)
    os.environ.setdefault("MASTER_ADDR", master[0])
    os.environ.setdefault("MASTER_PORT", master[1])
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=world.rank, world_size=world.world_size, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def _slurm_master(environ: Mapping[str, str]) -> tuple[str, str]:
    """(host, port) that every task of a Slurm step derives alike; localhost outside Slurm."""
    nodes = environ.get("SLURM_STEP_NODELIST", "")
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)  # "gpu[03-07,12],cpu1" -> "gpu03"
    host = (first[1] + (first[2] or "")) if first else "127.0.0.1"
    return host, str(20000 + int(environ.get("SLURM_JOB_ID", "0")) % 20000)
