"""The samples of a run as a webdataset pipeline, in the order of the run.

    order = stage_order(shards, recipe, "finetune")
    data = to_webdataset(shards, order, epochs=10, rank=3, world_size=8, micro_batch=64)
    data = data.compose(wds.decode("pil"), wds.to_tuple("jpg;png", "cls"), wds.batched(64))
    for images, labels in wds.WebLoader(data, batch_size=None, num_workers=4):
        ...

Samples are dictionaries as webdataset's own readers yield them, so all its stages apply. Why not
`webdataset.WebDataset` as the source: it reads tars from their beginning, so starting in the middle of an epoch means
replaying it, and it divides by shard, so ranks get unequal shares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import webdataset
from torch.utils.data import IterableDataset

from livt_scale.data.num_workers import this_worker
from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.instance import SampleOrder
from livt_scale.data.reader import SampleReader
from livt_scale.data.remote.prefetch import fetched_ahead
from livt_scale.data.shard_set import ShardSet


def to_webdataset(
    shards: ShardSet,
    order: SampleOrder,
    *,
    epochs: int,
    epoch: int = 0,
    step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int | None = None,
) -> webdataset.DataPipeline:
    """The samples of one rank from (epoch, step) to the end of `epochs`, as the first stage of a pipeline.

    With several loader processes each one takes every n-th micro-batch. The order of the run is kept if the pipeline
    ends in `wds.batched(micro_batch)` and the loader takes its batches as they are (`batch_size=None`).
    """
    ranks = RankOrder(shards, order, epochs=epochs, rank=rank, world_size=world_size, micro_batch=micro_batch)
    return webdataset.DataPipeline(_SampleStream(shards, ranks, epoch=epoch, step=step))


class _SampleStream(IterableDataset[dict[str, Any]]):
    """Yields {"__key__": str, "__url__": path of the shard, "__epoch__": int, "jpg" or "png": bytes, "cls": b"3"}."""

    def __init__(self, shards: ShardSet, rank_order: RankOrder, *, epoch: int, step: int) -> None:
        super().__init__()
        self._shards = shards
        self._rank_order = rank_order
        self._start = {"epoch": epoch, "step": step}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker, num_workers = this_worker()
        batches = self._rank_order.micro_batches(**self._start, worker=worker, num_workers=num_workers)
        with closing(SampleReader(self._shards)) as reader, closing(fetched_ahead(batches, self._shards)) as ahead:
            for batch in ahead:
                for raw in reader.read(batch.samples):
                    yield {
                        "__key__": raw.key,
                        "__url__": raw.shard,
                        "__epoch__": batch.epoch,
                        raw.image_type: raw.image,
                        "cls": b"%d" % raw.label,
                    }
