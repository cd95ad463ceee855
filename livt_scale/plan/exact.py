"""The peak of a step as counted by torch's memory trackers: the networks and strategies of training, on fake tensors.

fsdp is measured directly, as rank 0, with `FSDPMemTracker` and a fake process group that only has the number of ranks.
Under ddp and the ZeRO stages each rank computes a full replica: `MemTracker` measures that replica's step, and the
formulas of `plan.memory` add the engine's part (buckets, pieces, gathered tensors), because neither torch's reducer nor
DeepSpeed runs without memory. No tensor is allocated. Takes seconds to a minute, in a separate process with limits.

    measure(recipe, "pretrain", spread, num_classes=10) -> Measurement(measured="fsdp", peak=…, …)
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from livt_scale.config.recipe import Finetune, Pretrain, Recipe, Stage
from livt_scale.extensions import load_extensions
from livt_scale.plan.memory import Spread, activation_bytes, held_bytes, peak_of
from livt_scale.plan.parameters import stage_weights
from livt_scale.util.errors import RunError, UsageError

if TYPE_CHECKING:
    import torch

    from livt_scale.optim import MakeOptimizer

BOUND_S = 120
BOUND_BYTES = 4 * 2**30  # of the process's data; it needs about a gigabyte, torch itself


@dataclass(frozen=True)
class Measurement:
    """Bytes. `measured`: "fsdp", the strategy itself; "replica": the step of a full model, without the engine."""

    measured: str
    weights: int
    grads: int
    optimizer: int
    activations: int  # at the peak; inputs and what is casted or temporary included
    peak: int
    resident_bytes: int  # what the measuring process itself took

    @property
    def states(self) -> int:
        return self.weights + self.grads + self.optimizer


def measure(recipe: Recipe, stage: Stage, spread: Spread, *, num_classes: int, bound_s: float = BOUND_S) -> Measurement:
    """Measure in a separate process. RunError: it fails or takes too long. UsageError: fsdp is offloaded."""
    if spread.offload != "none" and spread.strategy == "fsdp":
        raise UsageError(
            "--exact measures fsdp with its states on the device", remedy="--set parallel.offload=none, or leave it out"
        )
    found = measure_computing(recipe, stage, spread, num_classes=num_classes, bound_s=bound_s)
    return with_engine(found, recipe, stage, spread, num_classes=num_classes)


def measure_computing(
    recipe: Recipe, stage: Stage, spread: Spread, *, num_classes: int, bound_s: float = BOUND_S
) -> Measurement:
    """What is run and counted alone: fsdp's rank, or the replica that ddp and the zeros share whatever their ranks."""
    question = {
        "recipe": recipe.model_dump(mode="json"), "stage": stage, "classes": num_classes, "spread": asdict(spread),
    }  # fmt: skip
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "livt_scale.plan.exact"]
    try:
        ended = subprocess.run(
            command, input=json.dumps(question), env=environ, capture_output=True, text=True, timeout=bound_s
        )
    except subprocess.TimeoutExpired as error:
        raise RunError(
            f"measuring {stage} under {spread.strategy} took longer than {bound_s:g} s",
            remedy="leave --exact out: the formula answers immediately",
        ) from error
    if ended.returncode:
        said = ended.stderr.strip().splitlines() or ["nothing"]
        raise RunError(
            f"measuring {stage} under {spread.strategy} failed: {said[-1][:300]}",
            remedy="leave --exact out: the formula answers immediately",
        )
    return Measurement(**json.loads(ended.stdout.splitlines()[-1]))


def with_engine(found: Measurement, recipe: Recipe, stage: Stage, spread: Spread, *, num_classes: int) -> Measurement:
    """A replica's measured computing, with a zero's states and buffers by formula about it; others as they are."""
    if spread.can.zero_stage is None:
        return found
    weights = stage_weights(recipe, stage, num_classes=num_classes)
    # of a model of timm, how much is left at the end of the backward pass is not known: at most what there was
    last = found.activations if recipe.model.timm else activation_bytes(recipe, stage, spread).end
    peak = peak_of(weights, spread, found.activations, last).total
    held, grads, moments = held_bytes(weights, spread)
    return replace(found, weights=held, grads=grads, optimizer=moments, peak=peak)


def _answer(question: dict[str, Any]) -> Measurement:
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed.fake_pg import FakeStore

    load_extensions()
    recipe, stage = Recipe.model_validate(question["recipe"]), question["stage"]
    spread = Spread(**question["spread"])
    sharded = spread.strategy == "fsdp" and spread.gpus > 1
    if sharded:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=spread.gpus)
    with torch.device("meta"):
        network = _network(recipe, stage, question["classes"])
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        network.to_empty(device="cpu")
    return _measured(recipe, stage, spread, network, fake, sharded=sharded)


def _network(recipe: Recipe, stage: Stage, num_classes: int) -> torch.nn.Module:
    from livt_scale.models.mae import build_mae
    from livt_scale.models.parameter_efficient import build_tuned
    from livt_scale.models.timm_backbone import TimmClassifier

    part = recipe.stage(stage)
    if isinstance(part, Pretrain):
        return build_mae(recipe.model, norm_pix=part.norm_pix, mask_ratio=part.mask_ratio)
    assert isinstance(part, Finetune)
    network = build_tuned(
        recipe.model,
        num_classes=num_classes,
        drop_path=part.drop_path,
        tuning=part.train,
        cosine_scale=part.cosine_scale,
    )
    if isinstance(network, TimmClassifier):
        network.facts = replace(network.facts, draws=False)  # a seed cannot be read from fake tensors
    return network


def _measured(
    recipe: Recipe, stage: Stage, spread: Spread, network: torch.nn.Module, fake: Any, *, sharded: bool
) -> Measurement:
    import torch
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker

    from livt_scale import optim
    from livt_scale.distributed import state_dict

    def groups(model: torch.nn.Module) -> list[dict[str, Any]]:
        return optim.param_groups(model, lr=1e-3, weight_decay=0.05)

    make_optimizer = optim.optimizer_maker(recipe.stage(stage))
    call, backward, optimizer = (
        _sharded(recipe, spread, network, groups, make_optimizer)
        if sharded
        else _replica(spread, network, groups, make_optimizer)
    )
    cpu = torch.device("cpu")
    tracker: Any = FSDPMemTracker(network, optimizer) if sharded else MemTracker()
    tracker.memory_tracking = _modules_unlisted()
    with fake:
        inputs = _inputs(recipe, stage, spread.micro_batch)
        state_dict.collect(network, optimizer)  # AdamW's moments; its fused step itself needs no memory besides
        for parameter in network.parameters():
            if not sharded and parameter.requires_grad and spread.gpus > 1:
                parameter.grad = torch.zeros_like(parameter)  # there from the start: views of DDP's buckets, which stay
        if sharded:
            tracker.track_inputs(inputs)
        else:
            tracker.track_external(network, optimizer, *inputs)
        with tracker:
            for k in range(spread.accumulation):
                last = k == spread.accumulation - 1
                out = call(*inputs, last=last)
                backward(out if stage == "pretrain" else out.square().mean(), last=last)
                del out
                tracker.reset_mod_stats()
    held = _by_kind(tracker.get_tracker_snapshot("current")[cpu])
    top = _by_kind(tracker.get_tracker_snapshot("peak")[cpu])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    activations = sum(top.get(kind, 0) for kind in ("Activation", "Temp", "Inputs", "Other"))
    return Measurement(
        "fsdp" if sharded else "replica", _sum(held, "Param") + held.get("Buffer", 0), _sum(held, "Grad"),
        held.get("Optstate", 0), activations, top["Total"], resident,
    )  # fmt: skip


def _modules_unlisted() -> Any:
    """A tracker's table that lists no modules: their peaks are not needed, and it would walk all at each operation."""
    from torch.utils.weak import WeakIdKeyDictionary

    class Unlisted(WeakIdKeyDictionary):
        def values(self) -> Any:
            return ()

    return Unlisted()


def _sharded(
    recipe: Recipe, spread: Spread, network: torch.nn.Module, groups: Any, make_optimizer: MakeOptimizer | None
) -> tuple[Any, Any, Any]:
    """How to call, go back and step. Not in the fake mode: a mesh of ranks is read as numbers."""
    from livt_scale.distributed.world import World
    from livt_scale.distributed.wrap import make_strategy

    within = "node" if spread.within_node else "all"
    parallel = recipe.parallel.model_copy(
        update={
            "strategy": "fsdp", "precision": spread.precision, "offload": "none", "compile": False,
            "activation_checkpointing": spread.recompute, "shard_within": within,
        }
    )  # fmt: skip
    world = World(0, spread.gpus, 0, spread.within_node or spread.gpus)
    strategy: Any = make_strategy(
        parallel, network, groups, betas=(0.9, 0.95), make_optimizer=make_optimizer, world=world
    )
    return strategy.call, strategy.backward, strategy._updates.optimizer


def _replica(
    spread: Spread, network: torch.nn.Module, groups: Any, make_optimizer: MakeOptimizer | None
) -> tuple[Any, Any, Any]:
    """The same for a full model on one rank, as ddp and the ZeRO stages compute it, without their engines."""
    import torch

    from livt_scale import optim
    from livt_scale.distributed import precision
    from livt_scale.distributed.blocks import prepare_blocks

    prepare_blocks(network, recompute=spread.recompute, compiled=False)
    for name, parameter in list(network.named_parameters()):
        if not parameter.requires_grad:  # the tracker takes a parameter to have a gradient
            owner, _, own_name = name.rpartition(".")
            module = network.get_submodule(owner)
            delattr(module, own_name)
            module.register_buffer(own_name, parameter.detach())

    def call(*inputs: torch.Tensor, last: bool) -> torch.Tensor:  # noqa: ARG001 - nothing is exchanged
        with precision.autocast(torch.device("cpu"), spread.precision):
            out: torch.Tensor = network(*inputs)
        return out

    def backward(loss: torch.Tensor, *, last: bool) -> None:  # noqa: ARG001
        loss.backward()

    made = groups(network)
    if make_optimizer is not None:
        return call, backward, make_optimizer(made)
    return call, backward, optim.make_adamw(made, betas=(0.9, 0.95))


def _by_kind(snapshot: dict[Any, int]) -> dict[str, int]:
    return {str(getattr(kind, "value", kind)).replace("OptState", "Optstate"): size for kind, size in snapshot.items()}


def _sum(held: dict[str, int], what: str) -> int:
    return sum(size for kind, size in held.items() if what in kind)


def _inputs(recipe: Recipe, stage: Stage, images: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    model = recipe.model
    batch = torch.empty(images, model.channels, model.image_px, model.image_px)
    part = recipe.stage(stage)
    if isinstance(part, Finetune):
        beside = model.num_uniforms(drop_path=part.drop_path) + part.tuning.uniforms
    else:
        beside = model.num_patches  # masking noise
    return batch, torch.empty(images, beside)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (BOUND_BYTES, BOUND_BYTES))
    print(json.dumps(asdict(_answer(json.loads(sys.stdin.read())))))
