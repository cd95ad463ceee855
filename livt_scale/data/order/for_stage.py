"""The order in which a stage of a recipe sees a set of shards. Needs no torch, so `livt status` can use it.

order = stage_order(shards, recipe, "finetune")
order.steps_per_epoch, order.positions(epoch=3, step=100)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from livt_scale.config.recipe import Recipe, Stage, StagePart
from livt_scale.data.order.class_balanced import ClassOrder, Repeated, check_shares
from livt_scale.data.order.instance import Ints, Order, SampleOrder
from livt_scale.data.settings import TrainSettings
from livt_scale.data.shard_set import SetFacts, ShardSet
from livt_scale.util.errors import DataError, LivtError


def stage_order(shards: ShardSet, recipe: Recipe, stage: Stage) -> SampleOrder:
    """The order in which `stage` of `recipe` sees `shards`. Raises DataError if they do not fill a global batch."""
    return training_order(shards, TrainSettings.of_stage(recipe, stage))


def training_order(shards: ShardSet, settings: TrainSettings) -> SampleOrder:
    """The order in which these settings see `shards`. Raises DataError if they do not fill a global batch."""
    return order_for(
        settings.part,
        shards.usable_per_shard,
        lambda: usable_labels(shards),
        seed=settings.seed,
        lane_groups=settings.data.lane_groups,
        window=settings.data.shuffle_window,
    )


def check_order(shards: SetFacts, recipe: Recipe, stage: Stage) -> None:
    """Raise DataError where `shards` gives `stage` no order. Reads no label, whatever the sampling."""
    part, data = recipe.stage(stage), recipe.data
    _check_fits(part, shards.num_samples)
    if part.sampling.each_image_once:
        _instance_order(part, shards.usable_per_shard, seed=0, lane_groups=data.lane_groups, window=data.shuffle_window)
    else:
        check_shares(np.asarray(part.sampling.shares(shards.class_counts, 0.0)), shards.class_counts, epoch=0)


def planned_steps(recipe: Recipe, stage: Stage) -> int | None:
    """Optimizer steps of the stage, by recipe and manifest; None if the shards cannot be read from this machine."""
    try:
        shards = SetFacts.read(recipe.data.train, data=recipe.data)
        check_order(shards, recipe, stage)
    except (LivtError, OSError):
        return None
    part = recipe.stage(stage)
    return part.epochs * (shards.num_samples // part.global_batch)


def usable_labels(shards: ShardSet) -> Ints:
    """[num_samples] The class of each position among the usable samples."""
    return shards.labels(shards.usable_to_sample(np.arange(shards.num_samples, dtype=np.int64)))


def order_for(
    part: StagePart,
    samples_per_shard: npt.ArrayLike,
    labels: Callable[[], Ints],
    *,
    seed: int,
    lane_groups: int | None = None,
    window: int = 65536,
) -> SampleOrder:
    """The order that the stage `part` requests. `labels()`: int64 [N], the class of each position; called if needed.

    Raises DataError if an epoch does not fill one global batch.
    """
    num_samples = int(np.sum(np.asarray(samples_per_shard, dtype=np.int64)))
    _check_fits(part, num_samples)
    steps, batch = num_samples // part.global_batch, part.global_batch // part.repeats
    base: SampleOrder
    if part.sampling.each_image_once:
        base = _instance_order(part, samples_per_shard, seed=seed, lane_groups=lane_groups, window=window)
    else:
        base = ClassOrder(labels(), batch, seed=seed, steps=steps, epochs=part.epochs, shares=part.sampling.shares)
    return base if part.repeats == 1 else Repeated(base, part.repeats, steps=steps, paired=part.mixes)


def _check_fits(part: StagePart, num_samples: int) -> None:
    if num_samples >= part.global_batch:
        return
    unit = part.repeats * (2 if part.mixes and part.repeats > 1 else 1)
    largest = num_samples // unit * unit
    raise DataError(
        f"the set has {num_samples} samples, fewer than one global batch of {part.global_batch}",
        remedy=f"set global_batch to at most {largest}" if largest else "add samples, or lower repeats",
    )


def _instance_order(
    part: StagePart, samples_per_shard: npt.ArrayLike, *, seed: int, lane_groups: int | None, window: int
) -> Order:
    batch = part.global_batch // part.repeats
    if lane_groups is not None and part.global_batch % lane_groups == 0 and batch % lane_groups:
        raise DataError(
            f"data.lane_groups is {lane_groups} and does not divide the {batch} samples of a global batch of "
            f"{part.global_batch} with {part.repeats} views each",
            remedy="remove it, or choose a divisor",
        )
    return Order(samples_per_shard, batch, seed=seed, lane_groups=lane_groups, window=window)
