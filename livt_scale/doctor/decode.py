"""This machine's decode rate: one core, all cores, and whether that suffices for a number of GPUs.

    facts = bench(shards, recipe, "pretrain", seconds=3)
    facts["images_per_s"]       {"core": 1100.0, "machine": 8400.0}
    facts = needed(facts, gpus=8, images_per_s_per_gpu=900)      -> suffices or not, and the cores that it takes

The loader itself is measured, with its own transforms and one process per core that this process may use; no training
runs meanwhile. Shards in the page cache cost no reading time: for a first epoch, add the time of the storage.
"""

from __future__ import annotations

import time
from typing import Any

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.data.loader import core_rate, train_batches
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.process_pool import usable_cores

BATCH = 64
NO_END = 10**6  # epochs: the clock ends it


def bench(
    shards: ShardSet, recipe: Recipe, stage: Stage, *, seconds: float, cores: int | None = None
) -> dict[str, Any]:
    """Decode rates for the transform of `stage`; about 2 x `seconds` long. Raises LivtError for a bad sample."""
    cores = cores or usable_cores()
    recipe = endless(recipe.at(stage), stage, num_samples=shards.num_samples, workers=cores)
    one, _ = core_rate(shards, recipe, stage, seconds=seconds)
    return {
        "set": shards.manifest.name,
        "stage": stage,
        "image_px": recipe.model.image_px,
        "cores": cores,
        "images_per_s": {"core": round(one, 1), "machine": round(_loader_rate(shards, recipe, stage, seconds), 1)},
    }


def needed(facts: dict[str, Any], *, gpus: int, images_per_s_per_gpu: float) -> dict[str, Any]:
    """`facts` with what `gpus` take: images/s, the cores of this kind, and whether this machine has them."""
    rates, need = facts["images_per_s"], gpus * images_per_s_per_gpu
    each = rates["machine"] / facts["cores"]  # of a core when all are at work
    demand = {
        "gpus": gpus,
        "images_per_s": need,
        "cores": round(need / each, 1),
        "share": round(rates["machine"] / need, 3),
        "suffices": rates["machine"] >= need,
    }
    return {**facts, "needed": demand}


def endless(recipe: Recipe, stage: Stage, *, num_samples: int, workers: int) -> Recipe:
    """`recipe` with a batch that a small set fills too, one process a core, and epochs enough."""
    part = recipe.stage(stage)
    unit = part.repeats * (2 if part.mixes else 1)  # what a batch is a multiple of
    batch = max(min(BATCH, num_samples) // unit, 1) * unit
    part = part.model_copy(update={"global_batch": batch, "micro_batch": batch, "epochs": NO_END})
    stages = recipe.stages.model_copy(update={stage: part})
    data = recipe.data.model_copy(update={"workers": workers, "lane_groups": None})  # they divide the recipe's batch
    return recipe.model_copy(update={"stages": stages, "data": data})


def _loader_rate(shards: ShardSet, recipe: Recipe, stage: Stage, seconds: float) -> float:
    size = recipe.stage(stage).global_batch
    start = {"rank": 0, "world_size": 1, "micro_batch": size, "epoch": 0, "step": 0}
    with train_batches(shards, recipe, stage=stage, **start) as batches:
        for _ in range(batches.loading.workers * (batches.loading.prefetch + 1)):  # what was ready is not counted
            next(batches)
        images, begun = 0, time.perf_counter()
        while (passed := time.perf_counter() - begun) < seconds:
            images += len(next(batches).images)
        return images / passed
