"""DeepSpeed's engine from a recipe's `parallel` part alone: imported late, quiet, and held to our time-out.

No JSON of the user's, no launcher of DeepSpeed's, no MPI: it works in the process group that is up. On a machine
without a GPU it is told so (DS_ACCELERATOR) before it is imported, because it would look for one.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from packaging.version import Version
from torch import nn
from torch.distributed import distributed_c10d

from livt_scale.errors import UsageError
from livt_scale.parallel.topology import World
from livt_scale.recipe import Parallel

OLDEST = Version("0.19.8")  # the one tried: that its step changes nothing on a norm that is not finite is not promised
BUCKET = 50_000_000  # elements exchanged at a time, at most: 200 MB of gradients


def import_deepspeed(world: World) -> Any:
    """The module `deepspeed`. UsageError where it is missing or too old."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UsageError(
            f"the zero strategies need deepspeed, which cannot be imported: {error}",
            remedy=f"run pip install 'deepspeed>={OLDEST}', or set parallel.strategy: fsdp, which shards as zero3 does",
        ) from error
    found = Version(Version(deepspeed.__version__).base_version)
    if found < OLDEST:
        raise UsageError(
            f"the zero strategies need deepspeed {OLDEST} or newer, and {deepspeed.__version__} is installed",
            remedy=f"run pip install 'deepspeed>={OLDEST}', or set parallel.strategy: fsdp",
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings(  # names that torch 2.14 has renamed, used by deepspeed 0.19.8
        "ignore", r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated", FutureWarning
    )
    # an all-reduce through shared memory, for inference alone: not to be compiled at the start of a run
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def start_engine(
    deepspeed: Any,
    model: nn.Module,
    optimizer: Any,
    *,
    stage: int,
    parallel: Parallel,
    world: World,
) -> Any:
    """The engine that holds `model` and `optimizer` from now on. A collective call."""
    _process_group_of_one(world, timeout_s=parallel.timeout_s)
    config = engine_config(model, stage=stage, parallel=parallel, world=world)
    _name_device(world)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # DeepSpeed speaks over a copy of the process group, which has torch's own time-out.
    group = deepspeed.utils.groups._get_data_parallel_group()
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # torch 2.11 has the latter
    set_timeout(timedelta(seconds=parallel.timeout_s), group)
    return engine


def engine_config(model: nn.Module, *, stage: int, parallel: Parallel, world: World) -> dict[str, Any]:
    """What `deepspeed.initialize` is given. UsageError where the machine has not what `offload` needs.

    Precision is not the engine's: it holds and exchanges fp32, and the forward pass runs under autocast (`zero`).
    Batches are not its either: the sizes below satisfy its checks, and the strategy tells it which micro-batch is last.
    """
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": min(BUCKET, numel),  # allocated in full
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        # biases, norms and tokens stay gathered: a few thousandths of the weights, and half of the messages
        "stage3_param_persistence_threshold": 1 + max((p.numel() for p in model.parameters() if p.ndim < 2), default=0),
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for CPUs is compiled on the spot; torch's is fused too
        "zero_optimization": {**zero, **_offloaded(parallel, stage=stage, world=world)},
    }


def _offloaded(parallel: Parallel, *, stage: int, world: World) -> dict[str, Any]:
    if parallel.offload == "none":
        return {}
    to: dict[str, Any] = {"device": parallel.offload, "pin_memory": world.device.type == "cuda"}
    if parallel.offload == "nvme":
        assert parallel.offload_dir is not None, "the recipe has checked it"
        to["nvme_path"] = _usable_disk(parallel.offload_dir)
    # `offload_param` is stage 3's alone: the others keep all weights on the device
    return {"offload_optimizer": to, **({"offload_param": to} if stage == 3 else {})}


def _usable_disk(folder: str) -> str:
    builder = importlib.import_module("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise UsageError(
            "parallel.offload is nvme, and deepspeed cannot build its asynchronous file access here",
            remedy="install libaio's headers (Debian: libaio-dev) and a C++ compiler on all nodes, or take cpu",
        )
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"parallel.offload_dir {folder} cannot be written: {error.strerror}", remedy="name a folder on a local disk"
        ) from error
    return folder


def _name_device(world: World) -> None:
    """DeepSpeed takes the device of LOCAL_RANK, now and later; srun sets none, and a task may see one GPU alone."""
    index = world.device.index
    os.environ["LOCAL_RANK"] = str(world.local_rank if index is None else index)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # it would have to be the same


def _process_group_of_one(world: World, *, timeout_s: int) -> None:
    """DeepSpeed wants a process group where a process is alone too."""
    if world.world_size > 1 or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=timeout_s))
    atexit.register(_end_process_group)


def _end_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
