"""The pipeline has the samples of the run in its order, at any number of workers and from any position."""

from __future__ import annotations

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.data.order.for_rank import RankOrder
from livt_scale.data.order.instance import Order
from livt_scale.data.pipeline import to_webdataset
from livt_scale.data.shard_set import ShardSet
from tests.data.tiny_sets import HOSTILE, tiny_set

EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("set") / HOSTILE, num_samples=43)


def order_of(shards: ShardSet, batch: int = 8) -> Order:
    return Order(shards.usable_per_shard, batch, seed=5)


def keys(pipeline: wds.DataPipeline) -> list[str]:
    return [sample["__key__"] for sample in pipeline]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("rank", "world_size", "micro_batch"), [(0, 1, 4), (1, 2, 2)])
def test_batches_come_in_the_order_of_the_run_at_any_number_of_workers(shards, workers, rank, world_size, micro_batch):
    order = order_of(shards)
    where = {"epochs": EPOCHS, "rank": rank, "world_size": world_size, "micro_batch": micro_batch}
    pipeline = to_webdataset(shards, order, step=3, **where)
    pipeline = pipeline.compose(wds.to_tuple("__key__", "cls", "__epoch__"), wds.batched(micro_batch))
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=workers)
    found = [(epoch, keys) for keys, _, epochs in loader for epoch in np.unique(epochs)]
    batches = RankOrder(shards, order, **where).micro_batches(epoch=0, step=3)
    assert found == [(batch.epoch, shards.keys(batch.samples)) for batch in batches]


@settings(max_examples=20)
@given(epoch=st.integers(0, 2), step=st.integers(0, 5))
def test_entering_late_gives_the_tail_of_the_whole(shards, epoch, step):
    order = order_of(shards)
    whole = keys(to_webdataset(shards, order, epochs=EPOCHS, rank=1, world_size=2))
    late = keys(to_webdataset(shards, order_of(shards), epochs=EPOCHS, epoch=epoch, step=step, rank=1, world_size=2))
    assert late == whole[(epoch * order.steps_per_epoch + step) * 4 :]


def test_a_step_of_the_run_and_a_step_of_the_epoch_are_the_same_position(shards):
    steps = order_of(shards).steps_per_epoch
    assert keys(to_webdataset(shards, order_of(shards), epochs=EPOCHS, step=steps + 2)) == keys(
        to_webdataset(shards, order_of(shards), epochs=EPOCHS, epoch=1, step=2)
    )


def test_webdataset_stages_follow(shards):
    data = to_webdataset(shards, order_of(shards), epochs=1).compose(
        wds.decode("pil"),
        wds.rename(image="jpg;png"),
        wds.map(lambda sample: {**sample, "size": sample["image"].size}),
        wds.to_tuple("__key__", "image", "cls", "size"),
    )
    rows = list(data)
    assert len(rows) == 40
    for key, image, label, size in rows:
        assert label == int(key[1:]) % 3
        assert image.mode == "RGB"
        assert image.size == size
