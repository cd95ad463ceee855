"""`livt.to_webdataset`: the samples of a training as a webdataset pipeline, by plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import webdataset

from livt_scale.api.arguments import ImageShape, check_position, checked, open_shards, pixel_data, training_part
from livt_scale.data import pipeline
from livt_scale.data.order.for_stage import training_order
from livt_scale.data.settings import TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import joined


def to_webdataset(
    shards: ShardSet | str | Path,
    *,
    global_batch: int,
    micro_batch: int | None = None,
    sampling: str | Mapping[str, Any] = "instance",
    seed: int = 0,
    epochs: int = 1,
    epoch: int = 0,
    step: int = 0,
) -> webdataset.DataPipeline:
    """The undecoded samples of this rank, from (epoch, step) to the end of `epochs`, as a webdataset.DataPipeline.

    Samples are dictionaries as webdataset's own readers yield them: `__key__`, `jpg` or `png` (bytes), `cls` (b"3"),
    `__url__`, `__epoch__`. The order is that of `livt.TrainLoader` for the same values. With several processes of a
    wds.WebLoader each takes every n-th micro-batch, so end the pipeline in `wds.batched(micro_batch)`. Raises
    UsageError, which names the argument, and DataError where the set does not fill a global batch.
    """
    shards = open_shards(shards)
    part = training_part(
        global_batch=global_batch, micro_batch=micro_batch, sampling=sampling, epochs=epochs, mixup=0.0, cutmix=0.0
    )
    shape = checked(ImageShape, {"image_px": 1, "channels": 3, "seed": seed})  # nothing is decoded here
    data = pixel_data(shards, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    settings = TrainSettings(image_px=1, channels=3, data=data, part=part, seed=shape.seed)
    world, order = joined(), training_order(shards, settings)
    check_position(epoch, step, epochs=part.epochs, steps_per_epoch=order.steps_per_epoch)
    return pipeline.to_webdataset(
        shards, order, epochs=part.epochs, epoch=epoch, step=step, rank=world.rank,
        world_size=world.world_size, micro_batch=micro_batch,
    )  # fmt: skip
