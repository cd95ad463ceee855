"""What a rank would see, step by step, without reading an image: the loader's own order, keys from the index."""

from __future__ import annotations

import itertools
from typing import Any

from livt_scale.data.manifest import ShardSet
from livt_scale.data.order import Order
from livt_scale.data.stream import RankOrder, stage_order
from livt_scale.errors import UsageError
from livt_scale.recipe import Recipe, Stage


def trace(
    recipe: Recipe, stage: Stage, *, rank: int, world_size: int, epoch: int, step: int | None = None
) -> dict[str, Any]:
    """{"steps": [{"step": s, "keys": [...]}, …]}: the rank's keys in slot order, for one epoch or one step of it.

    Where a sample may come more than once in an epoch, "views" beside the keys counts its appearances from 0.
    """
    shards = ShardSet.open(recipe.data.train, data=recipe.data)
    order = stage_order(shards, recipe, stage)
    if epoch < 0 or not (step is None or 0 <= step < order.steps_per_epoch):
        raise UsageError(f"there is no step {step} of epoch {epoch}: an epoch has {order.steps_per_epoch} steps")
    ranks = RankOrder(shards, order, epochs=epoch + 1, rank=rank, world_size=world_size)  # all slots of a step at once
    batches = ranks.micro_batches(epoch=epoch, step=step or 0)
    if step is not None:
        batches = itertools.islice(batches, 1)
    once = isinstance(order, Order)
    steps = []
    for batch in batches:
        views = {} if once or batch.views is None else {"views": batch.views.tolist()}
        steps.append({"step": batch.step, "keys": shards.keys(batch.samples), **views})
    return {
        "stage": stage,
        "epoch": epoch,
        "rank": rank,
        "world_size": world_size,
        "steps_per_epoch": order.steps_per_epoch,
        "steps": steps,
    }
