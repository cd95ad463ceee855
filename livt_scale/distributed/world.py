"""Rank and world size of this process, from torchrun, accelerate or srun, or alone; and the process group.

    nothing                 World(rank 0 of 1)
    torchrun, accelerate    RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; deepspeed: the same
    mpirun                  OMPI_COMM_WORLD_RANK, …; MASTER_ADDR where there are several nodes
    srun                    SLURM_PROCID, SLURM_STEP_NUM_TASKS (else SLURM_NTASKS), SLURM_LOCALID;
                            master: the first host of SLURM_STEP_NODELIST

Every collective has a bound (`parallel.timeout_s`): a rank that waits longer ends with an error, never at the job's
time limit. Why not accelerate's PartialState for this: it reads no Slurm variables.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from livt_scale.data.fork_server import fork_server
from livt_scale.distributed.collectives import Peers
from livt_scale.distributed.ports import port_of_job
from livt_scale.distributed.process_setup import set_up_process
from livt_scale.distributed.rendezvous import meet
from livt_scale.util.errors import EXIT_FAILED, LauncherError, LivtError, UsageError
from livt_scale.util.host_list import expand

LEAVE_S = 30.0  # for destroying the process group
FIRST_SPECIAL_STEP = (
    0xFFFFFFF0  # slurm.h numbers the steps that are not srun's from the top: interactive, batch, extern
)


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
    def for_loader(self) -> dict[str, Any]:
        """This process's part of what all ranks load, as arguments of `data.loader.evaluation_batches`."""
        return {"rank": self.rank, "world_size": self.world_size, "local_ranks": self.local_size}

    @property
    def device(self) -> torch.device:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus > 1:  # one: Slurm may show each task its own
            raise UsageError(
                f"process {self.local_rank} of this node, of {self.local_size}, has no GPU: {gpus} are visible",
                remedy=f"start {gpus} processes on each node, or see CUDA_VISIBLE_DEVICES",
            )
        return torch.device("cuda", self.local_rank if gpus > 1 else 0)


def detect(environ: Mapping[str, str] = os.environ) -> World:
    """The launcher's word on rank and world size. Raises UsageError where its variables contradict each other.

    torchrun's word comes before mpirun's, and both before srun's: inside a task that srun started, they start more.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        here = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in environ else "LOCAL_SIZE"  # LOCAL_SIZE: deepspeed's
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", here)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        mpi = "OMPI_COMM_WORLD_"
        names = (f"{mpi}RANK", f"{mpi}SIZE", f"{mpi}LOCAL_RANK", f"{mpi}LOCAL_SIZE")
    elif _srun_started_several(environ):
        names = ("SLURM_PROCID", _tasks_variable(environ), "SLURM_LOCALID", "")
    else:
        _refuse_lone_accelerate(environ)
        return World()
    rank, world_size = _number(environ, names[0]), _number(environ, names[1])
    if not 0 <= rank < world_size:
        raise UsageError(f"{names[0]} is {rank} with {names[1]} = {world_size}", remedy="start by torchrun or srun")
    local_rank, local_size = _number(environ, names[2], rank), _number(environ, names[3], 0)
    if not local_size and _srun_started_several(environ) and _number(environ, _tasks_variable(environ)) == world_size:
        # Also where a batch script has set RANK from Slurm's variables.
        local_size = _slurm_tasks_here(environ) or world_size
        local_rank = _number(environ, names[2], _number(environ, "SLURM_LOCALID", local_rank))
    local_size = local_size or world_size
    if not 0 <= local_rank < local_size <= world_size:
        raise UsageError(
            f"{names[2]} is {local_rank} with {local_size} processes on this node and {world_size} in all",
            remedy="start by torchrun or srun",
        )
    return World(rank, world_size, local_rank, local_size)


def joined() -> World:
    """This process's place in torch's process group, whoever created it; a world of one rank without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank, local_size = os.environ.get("LOCAL_RANK", ""), os.environ.get("LOCAL_WORLD_SIZE", "")
    if local_rank.isdecimal() and local_size.isdecimal():
        return World(rank, world_size, int(local_rank), int(local_size))
    return World(rank, world_size, rank, world_size)  # on one node, as far as is known


def _srun_started_several(environ: Mapping[str, str]) -> bool:
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return False
    # Steps that are not srun's, as the shell that `salloc` opens: one task, whatever the job may start later.
    if _number(environ, "SLURM_STEP_ID") >= FIRST_SPECIAL_STEP:
        return False
    return _number(environ, _tasks_variable(environ), 1) > 1


def _tasks_variable(environ: Mapping[str, str]) -> str:
    """The variable with the number of tasks of this step; SLURM_NTASKS may be the number of the job's."""
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _refuse_lone_accelerate(environ: Mapping[str, str]) -> None:
    """`accelerate launch --cpu --num_processes 4` starts one process and gives it a meeting place for four."""
    if environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") and "MASTER_ADDR" in environ:
        raise LauncherError(
            "accelerate launch starts one process, whatever num_processes is, with --cpu or with use_cpu: true in its "
            "config file (unless it has an MPI hostfile)",
            remedy="give --multi_gpu, which starts processes on CPUs too (in the config file use_cpu: false and "
            "distributed_type: MULTI_GPU), or use torchrun",
        )


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError as error:
        raise UsageError(
            f"the launcher's variable {name} is {text!r}: not a number", remedy="start by torchrun or srun"
        ) from error


def _slurm_tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of the step on this node, if Slurm reports it."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if name in environ:
            by_node = tasks_by_node(environ[name])
            node = _number(environ, "SLURM_NODEID", 0)
            return by_node[min(node, len(by_node) - 1)]  # SLURM_NTASKS_PER_NODE is one number for all of them
    return None


def tasks_by_node(text: str) -> list[int]:
    """Slurm's number of tasks on each node. Raises UsageError for what is not of that form.

    >>> tasks_by_node("2(x3),1")
    [2, 2, 2, 1]
    """
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"Slurm's tasks by node are {text!r}: not of the form 2(x3),1")
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


@contextmanager
def process_group(world: World, *, timeout_s: int, loads: bool = False) -> Iterator[None]:
    """The process group of `world` (gloo on CPU, nccl with gloo beside it on GPU); none where it is alone.

    loads: loader processes will be started in the block. They are forked from a server that is started before.
    """
    set_up_process(world.world_size)
    threads = world.world_size > 1 or world.device.type == "cuda"  # of gloo, NCCL or CUDA
    with fork_server() if loads and threads else nullcontext(), _joined_group(world, timeout_s=timeout_s):
        yield


@contextmanager
def _joined_group(world: World, *, timeout_s: int) -> Iterator[None]:
    if world.device.type == "cuda":
        if settings := allocator_settings(os.environ):
            torch._C._accelerator_setAllocatorSettings(settings)  # of torch 2.9 or newer
        torch.cuda.set_device(world.device)
    if world.world_size == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _slurm_master(os.environ)
    os.environ.setdefault("MASTER_PORT", _slurm_port(os.environ))
    store = meet(world.rank, world.world_size, timeout_s=timeout_s)
    timeout = timedelta(seconds=timeout_s)
    gpu = world.device if world.device.type == "cuda" else None
    dist.init_process_group(
        _backend(world), store=store, rank=world.rank, world_size=world.world_size, timeout=timeout, device_id=gpu
    )
    try:
        yield
    except BaseException as error:
        _leave(world, error)
        raise
    _leave(world, None)


def process_group_of_one(world: World, *, timeout_s: int) -> None:
    """The process group, also where `world` is alone: `fully_shard` and DeepSpeed need one. Ended with the process."""
    if world.world_size > 1 or dist.is_initialized():
        return
    store, timeout = dist.HashStore(), timedelta(seconds=timeout_s)
    dist.init_process_group(_backend(world), rank=0, world_size=1, store=store, timeout=timeout)
    atexit.register(_end_process_group)


def _backend(world: World) -> str:
    return "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"


def _end_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def allocator_settings(environ: Mapping[str, str]) -> str | None:
    """Of torch's GPU memory: it grows in place and does not fragment. None where the user has set the allocator.

    Not by the variable, which torch may have read when it was imported.
    """
    is_set = "PYTORCH_ALLOC_CONF" in environ or "PYTORCH_CUDA_ALLOC_CONF" in environ
    return None if is_set else "expandable_segments:True"


def _leave(world: World, error: BaseException | None) -> None:
    """Destroy the process group; if that lasts longer than LEAVE_S, print `error` and end the process.

    NCCL waits there for the other ranks, which may be gone (pytorch/torchtitan#1342).
    """
    leaving = threading.Thread(target=dist.destroy_process_group, name="destroy process group", daemon=True)
    leaving.start()
    leaving.join(LEAVE_S)
    if not leaving.is_alive():
        return
    if error is not None and not isinstance(error, LivtError):
        traceback.print_exception(error)
    why = error or f"the other ranks did not leave the process group within {LEAVE_S:.0f} s"
    print(f"livt: error on rank {world.rank}: {why}", file=sys.stderr, flush=True)
    os._exit(error.exit_code if isinstance(error, LivtError) else EXIT_FAILED)


def _slurm_master(environ: Mapping[str, str]) -> str:
    """The host that every task of a Slurm step derives alike; localhost outside Slurm."""
    return next(expand(environ.get("SLURM_STEP_NODELIST", "")), "127.0.0.1")


def _slurm_port(environ: Mapping[str, str]) -> str:
    """The port that every task of a Slurm step derives alike."""
    return str(port_of_job(_number(environ, "SLURM_JOB_ID", 0)))
