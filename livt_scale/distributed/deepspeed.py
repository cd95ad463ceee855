"""ZeRO stages 1 to 3 by DeepSpeed's engine, with torch's AdamW and autocast; the engine's configuration.

Parameters, moments and everything that is exchanged are fp32 (`engine_config`). The engine gets only the recipe's
settings: no JSON file, no separate precision or batch size.

Source: ZeRO, arXiv 1910.02054. Why not accelerate's DeepSpeed plug-in: it refuses CPUs.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
import weakref
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh

from livt_scale import optim
from livt_scale.config.capabilities import CAPABILITIES, StrategyName
from livt_scale.config.recipe import Parallel
from livt_scale.distributed import precision
from livt_scale.distributed.deepspeed_state import ZeroState
from livt_scale.distributed.strategy import Groups, StepResult
from livt_scale.distributed.world import World, process_group_of_one
from livt_scale.util.errors import UsageError

OLDEST_TO_COMPILE = Version("2.14")  # torch; with 2.11, compiled blocks under stage 3 train wrongly
OLDEST = Version("0.19.8")  # the version tested; we rely on a step with a norm that is not finite changing nothing
BUCKET = 50_000_000  # elements exchanged at a time, at most: 200 MB of gradients


def import_deepspeed(world: World) -> Any:
    """The module `deepspeed`. UsageError if it is missing or too old."""
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
    _import_muon_uncompiled()
    # an all-reduce through shared memory, only for inference: do not compile it at the start of a run
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def check_compiled(parallel: Parallel, *, stage: int, torch_version: str = str(torch.__version__)) -> None:
    """UsageError for compiled blocks whose losses are wrong.

    With torch 2.11 they are 0.8 % off after ten steps: `test_compiled_blocks_follow`. 2.12 and 2.13 were not tried.
    """
    if parallel.compile and stage == 3 and Version(Version(torch_version).base_version) < OLDEST_TO_COMPILE:
        raise UsageError(
            f"zero3 with parallel.compile needs torch {OLDEST_TO_COMPILE} or newer, and {torch_version} is installed: "
            "with older versions it trains wrongly",
            remedy="set parallel.compile: false, or parallel.strategy: fsdp, which shards as zero3 does",
        )


def _import_muon_uncompiled() -> None:
    """Import what the engine imports at its start, without torch.compile.

    Its optimizer Muon is compiled by decorators, which import torch._inductor: 4 s of CPU on each rank, for an
    optimizer that no recipe uses.
    """
    compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = decorator


def start_engine(
    deepspeed: Any,
    model: nn.Module,
    optimizer: Any,
    *,
    stage: int,
    parallel: Parallel,
    world: World,
) -> Any:
    """The engine that takes over `model` and `optimizer`. A collective call."""
    process_group_of_one(world, timeout_s=parallel.timeout_s)
    config = engine_config(model, stage=stage, parallel=parallel, world=world)
    _name_device(world)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    # DeepSpeed uses a copy of the process group, with torch's default timeout.
    group = deepspeed.utils.groups._get_data_parallel_group()
    set_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # torch 2.11 has the latter
    set_timeout(timedelta(seconds=parallel.timeout_s), group)
    return engine


def engine_config(model: nn.Module, *, stage: int, parallel: Parallel, world: World) -> dict[str, Any]:
    """The configuration for `deepspeed.initialize`.

    The engine does not handle precision: it holds and exchanges fp32, and the forward pass runs under autocast.
    Nor does it handle batches: the sizes below satisfy its checks, and the strategy marks the last micro-batch.
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
    # Only stage 3 takes `offload_param`: the others keep all parameters on the device.
    return {"offload_optimizer": to, **({"offload_param": to} if stage == 3 else {})}


def _name_device(world: World) -> None:
    """DeepSpeed takes the device from LOCAL_RANK; srun does not set it, and a task may see only one GPU."""
    index = world.device.index
    os.environ["LOCAL_RANK"] = str(world.local_rank if index is None else index)
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)  # it would have to be the same


class Zero:
    """A `Strategy`; the engine takes over the model's parameters."""

    on_device = None  # the engine reads whether the gradient overflowed

    def __init__(
        self,
        model: nn.Module,
        groups: Groups,
        *,
        name: StrategyName,
        parallel: Parallel,
        betas: tuple[float, float],
        world: World,
    ) -> None:
        can = CAPABILITIES[name]
        assert can.zero_stage is not None, f"{name} is not an engine of DeepSpeed"
        check_compiled(parallel, stage=can.zero_stage)
        deepspeed = import_deepspeed(world)
        self.name, self.model, self.lockstep = name, model.to(world.device), can.shards_parameters
        self._device, self._precision = world.device, parallel.precision
        self._adamw = optim.make_adamw(groups(model), betas=betas, implementation=parallel.adamw)
        # Inside the module, because the engine disables an autocast around it.
        model.forward = partial(_under_autocast, model.forward, world.device, parallel.precision)
        self._engine = start_engine(deepspeed, model, self._adamw, stage=can.zero_stage, parallel=parallel, world=world)
        self._zero = self._engine.optimizer  # DeepSpeed's, around AdamW
        mesh = init_device_mesh(world.device.type, (world.world_size,)) if world.world_size > 1 else None
        self._state = ZeroState(deepspeed, self._engine, mesh=mesh)
        # Its hooks keep engine and model alive out of the garbage collector's reach; the next stage needs the memory.
        weakref.finalize(self, _end, self._engine, self._state).atexit = False
        self._scale = precision.DynamicScale() if parallel.precision == "fp16" else None
        self._set_scale()

    def call(self, *inputs: Any, last: bool) -> Any:
        self._engine.set_gradient_accumulation_boundary(last)
        return self._engine(*inputs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def update(self, lr: float, *, max_norm: float | None) -> StepResult:
        optim.set_lr(self._adamw, lr)
        self._zero.clip_grad = max_norm or 0.0
        self._engine.step()  # changes nothing if the norm is not finite
        finite = self._engine.was_step_applied()
        overflow = False
        if self._scale is not None:
            overflow = self._scale.note(finite=finite)
            self._set_scale()
        return StepResult(float(self._engine.get_global_grad_norm()), applied=finite, overflow=overflow)

    def discard(self) -> None:
        """Use the engine's own way to skip a step: a norm that is not finite."""
        of = "_get_norm_groups" if self.lockstep else "scaled_global_norm"
        refused = torch.tensor(float("inf"), device=self._device)
        setattr(self._zero, of, lambda: [refused] if self.lockstep else refused)
        try:
            self._engine.step()
        finally:
            delattr(self._zero, of)
        assert not self._engine.was_step_applied(), "deepspeed takes a step on a norm that is not finite"

    def infer(self, *inputs: Any, **named: Any) -> Any:
        with torch.no_grad():  # not inference_mode: the memory of gathered parameters is reused in training
            return precision.infer(self.model, self._device, self._precision, *inputs, **named)

    def state(self) -> dict[str, Tensor]:
        return self._state.collect()

    def restored(self, state: dict[str, Tensor]) -> None:
        self._state.restore(state)

    def scaler(self) -> dict[str, float] | None:
        return None if self._scale is None else self._scale.saved()

    def set_scaler(self, saved: dict[str, float] | None) -> None:
        if self._scale is not None and saved is not None:
            self._scale = precision.DynamicScale(saved["scale"], int(saved["good_steps"]))
            self._set_scale()

    def held_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._state.storages())

    def _set_scale(self) -> None:
        if self._scale is not None:
            self._zero.override_loss_scale(self._scale.value)


def _under_autocast(forward: Any, device: torch.device, kind: str, *inputs: Any, **named: Any) -> Any:
    with precision.autocast(device, kind):
        return forward(*inputs, **named)


def _end(engine: Any, state: ZeroState) -> None:
    storages = state.storages() if engine.zero_optimization_stage() == 3 else []
    engine.destroy()
    for storage in storages:  # stage 3's engine stays alive nevertheless
        storage.resize_(0)
