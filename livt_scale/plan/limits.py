"""The limit that decides a planned stage's speed, in numbers, and what would lift it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from livt_scale.plan.stage_plan import StagePlan
from livt_scale.plan.step_time import Limit, decode_images_per_s, decoding_cores

LITTLE_WORK_S = 0.025  # of computing a step: what happens between kernels and ranks takes a large share of it


@dataclass(frozen=True)
class Explained:
    """`why`: the limit in numbers. `lift`: what would move it."""

    name: Limit
    why: str
    lift: str


def explain(plan: StagePlan) -> Explained:
    """The limit that decides a stage's speed."""
    limit = plan.limit
    return Explained(limit, *_TOLD[limit](plan))


def parts_s(plan: StagePlan) -> dict[str, float]:
    """Seconds of a step by part; those of the input overlap the others."""
    time = plan.time
    gaps = time.device_s - time.parts.busy_s * time.scale
    return {
        "products": time.parts.products * time.scale,
        "attention": time.parts.attention * time.scale,
        "streams": time.parts.streams * time.scale + time.optimizer_s,
        "launches": gaps + max(0.0, time.host_s - time.device_s),
        "exchange": time.exposed_s + time.offload_s,
        "input": max(0.0, plan.step_s / (1 + time.overhead) - time.gpu_s),
    }


def _decode(plan: StagePlan) -> tuple[str, str]:
    task, time = plan.task, plan.time
    assumed, ranks = task.assumed, min(task.per_node, task.gpus)
    cores = decoding_cores(task.recipe.data, assumed)
    takes = _images(plan) / time.gpu_s / task.nodes
    if cores == 0:
        return "input bound: data.workers is 0, so the training process decodes between steps", "--set data.workers=8"
    each = decode_images_per_s(task, assumed)
    rate = ranks * cores * each
    why = f"input bound: {ranks * cores:.0f} cores a node decode {rate:,.0f} images/s, the GPUs take {takes:,.0f}"
    needed = math.ceil(takes / ranks / each)
    if needed <= assumed.cores_per_gpu:
        return why, f"--set data.workers={needed}"
    return why, f"{needed} cores a GPU, or prepared shards (livt shards build --resize-shorter 256)"


def _storage(plan: StagePlan) -> tuple[str, str]:
    takes = _images(plan) * plan.task.data.image_bytes / plan.time.gpu_s / 1e9
    why = f"storage bound: it gives {plan.task.assumed.storage_gb_s:g} GB/s, the GPUs take {takes:.1f}"
    return why, "prepared shards, slurm.stage_in=true, or nodes whose memory holds the set"


def _exchange(plan: StagePlan) -> tuple[str, str]:
    time = plan.time
    computes, waits = (f"{1000 * seconds:.0f} ms" for seconds in (time.compute_s, time.exposed_s))
    why = f"exchange bound: a step computes {computes} and waits {waits} for other ranks"
    return why, "fewer GPUs, a larger global batch, or a faster network"


def _host(plan: StagePlan) -> tuple[str, str]:
    time = plan.time
    why = (
        f"host bound: launching {time.parts.launches:,.0f} kernels takes {1000 * time.host_s:.0f} ms, "
        f"computing them {1000 * time.device_s:.0f} ms"
    )
    compiled = plan.task.recipe.parallel.compile
    return why, "fewer GPUs or a larger global batch" if compiled else "--set parallel.compile=true"


def _compute(plan: StagePlan) -> tuple[str, str]:
    shares = parts_s(plan)
    total = sum(shares.values())
    named = sorted(((name, value / total) for name, value in shares.items()), key=lambda pair: -pair[1])[:3]
    why = "compute bound: " + ", ".join(f"{name} {share:.0%}" for name, share in named) + " of a step"
    if not plan.task.recipe.parallel.compile:
        return why, "--set parallel.compile=true, or more GPUs"
    return why, "more GPUs" if not plan.spread.recompute else "memory for blocks that are kept, or more GPUs"


_TOLD = {"decode": _decode, "storage": _storage, "exchange": _exchange, "host": _host, "compute": _compute}


def little_work(plan: StagePlan) -> str:
    """A warning where the global batch leaves a GPU next to nothing to do; else empty."""
    if plan.time.compute_s >= LITTLE_WORK_S:
        return ""
    each = plan.spread.micro_batch * plan.spread.accumulation
    return f"each GPU has {each} images, {1000 * plan.time.compute_s:.0f} ms of work a step: use fewer GPUs"


def _images(plan: StagePlan) -> int:
    return plan.spread.gpus * plan.spread.micro_batch * plan.spread.accumulation
