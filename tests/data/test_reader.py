"""The same samples at any number of ranks and workers, from any position; damage is named; webdataset agrees."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.order.instance import Order
from livt_scale.data.reader import RankOrder, SampleReader, SampleStream, read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import LivtError, SampleError, ShardError, UsageError
from tests.data.tiny_sets import HOSTILE, tiny_recipe, tiny_set

EPOCHS = 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return tiny_set(tmp_path_factory.mktemp("stream") / HOSTILE, num_samples=43)


@pytest.fixture
def own_shards(tmp_path) -> ShardSet:
    """A set that the test may damage."""
    return tiny_set(tmp_path / "set", num_samples=8, per_shard=4)


def order_of(shards: ShardSet, batch: int = 8) -> Order:
    return Order(shards.usable_per_shard, batch, seed=5)


def keys(stream: SampleStream) -> list[str]:
    return [sample["__key__"] for sample in stream]


def flat(rank_order: RankOrder, **where) -> list[tuple]:
    return [(b.epoch, b.step, b.micro, tuple(b.samples.tolist())) for b in rank_order.micro_batches(**where)]


@settings(max_examples=25)
@given(world=st.sampled_from([1, 2, 4, 8]), micro=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 14))
def test_ranks_and_micro_batches_together_give_the_global_batch(shards, world, micro, step):
    order = order_of(shards)
    micro = min(micro, 8 // world)
    ranks = [
        flat(RankOrder(shards, order, epochs=EPOCHS, rank=r, world_size=world, micro_batch=micro), epoch=0, step=step)
        for r in range(world)
    ]
    alone = flat(RankOrder(shards, order, epochs=EPOCHS, rank=0, world_size=1), epoch=0, step=step)
    assert len(alone) == EPOCHS * order.steps_per_epoch - step
    for epoch, at, _, samples in alone:
        together = [s for rank in ranks for e, t, _, part in rank if (e, t) == (epoch, at) for s in part]
        assert tuple(together) == samples


@settings(max_examples=25)
@given(workers=st.integers(1, 5), start=st.integers(0, 15), world=st.sampled_from([1, 2]))
def test_workers_take_turns_and_together_give_the_rank_s_micro_batches(shards, workers, start, world):
    rank_order = RankOrder(shards, order_of(shards), epochs=EPOCHS, rank=0, world_size=world, micro_batch=2)
    alone = flat(rank_order, epoch=0, step=start)
    shares = [flat(rank_order, epoch=0, step=start, worker=w, num_workers=workers) for w in range(workers)]
    assert [shares[k % workers][k // workers] for k in range(len(alone))] == alone


@settings(max_examples=20)
@given(epoch=st.integers(0, 2), step=st.integers(0, 5))
def test_entering_late_gives_the_tail_of_the_whole(shards, epoch, step):
    order = order_of(shards)
    whole = keys(SampleStream(shards, order, epochs=EPOCHS, rank=1, world_size=2))
    late = keys(SampleStream(shards, order_of(shards), epochs=EPOCHS, epoch=epoch, step=step, rank=1, world_size=2))
    assert late == whole[(epoch * order.steps_per_epoch + step) * 4 :]


def test_a_step_of_the_run_and_a_step_of_the_epoch_are_the_same_position(shards):
    steps = order_of(shards).steps_per_epoch
    assert keys(SampleStream(shards, order_of(shards), epochs=EPOCHS, step=steps + 2)) == keys(
        SampleStream(shards, order_of(shards), epochs=EPOCHS, epoch=1, step=2)
    )


def test_each_sample_at_most_once_an_epoch(shards):
    rank_order = RankOrder(shards, order_of(shards), epochs=EPOCHS, rank=0, world_size=1)
    for epoch in range(EPOCHS):
        seen = [s for e, _, _, samples in flat(rank_order, epoch=0, step=0) if e == epoch for s in samples]
        assert len(seen) == len(set(seen)) == 40


def test_seeking_far_asks_the_order_for_one_step_alone(shards, monkeypatch):
    order, asked = order_of(shards), []
    positions = order.positions
    monkeypatch.setattr(order, "positions", lambda *a, **k: asked.append(a) or positions(*a, **k))
    far = RankOrder(shards, order, epochs=10**6, rank=0, world_size=1).micro_batches(epoch=0, step=1_000_000)
    next(far)
    assert asked == [(200_000, 0)]


def test_workers_of_a_data_loader_read_what_one_process_reads(shards):
    order = order_of(shards)
    alone = keys(SampleStream(shards, order, epochs=1, world_size=2, micro_batch=2))
    stream = SampleStream(shards, order, epochs=1, world_size=2, micro_batch=2)
    batches = DataLoader(stream, batch_size=2, num_workers=2, collate_fn=lambda samples: samples)
    assert [sample["__key__"] for batch in batches for sample in batch] == alone


def test_webdataset_stages_follow_the_stream(shards):
    stream = SampleStream(shards, order_of(shards), epochs=1)
    data = wds.DataPipeline(
        stream,
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


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_itself_reads_the_same_samples(shards, monkeypatch):
    monkeypatch.chdir(shards.folder)  # webdataset takes names as URLs: the folder's is hostile, the tars' are not
    names = [shard.name for shard in shards.manifest.shards]
    theirs = {s["__key__"]: s for s in wds.WebDataset(names, shardshuffle=False)}
    gc.collect()  # webdataset leaves its files to the collector: let the warning come here
    with_ours = {raw.key: raw for raw in SampleReader(shards).read(np.arange(shards.num_samples))}
    assert theirs.keys() == with_ours.keys()
    for key, raw in with_ours.items():
        assert theirs[key][raw.image_type] == raw.image
        assert theirs[key]["cls"] == b"%d" % raw.label


def test_read_sample_gives_image_label_and_key(shards):
    image, label, key = read_sample(shards, 7)
    assert (label, key) == (1, "s007")
    assert image[:4] == b"\x89PNG"


def test_open_files_stay_under_the_limit_and_are_closed(shards):
    def open_tars() -> int:
        files = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
        return sum(file.endswith(".tar") for file in files)

    before = open_tars()
    reader, most = SampleReader(shards, most_open=3), 0
    for _ in reader.read(np.random.default_rng(0).permutation(shards.num_samples)):
        most = max(most, open_tars())
    assert most == before + 3
    reader.close()
    assert open_tars() == before


def all_of(shards: ShardSet) -> None:
    list(SampleReader(shards).read(np.arange(shards.num_samples)))


def test_a_changed_byte_is_named_with_shard_offset_and_key(own_shards):
    path, offset = own_shards.shard_path(1), int(own_shards.index["start"][5])
    contents = bytearray(path.read_bytes())
    contents[offset + 700] ^= 1
    path.write_bytes(contents)
    with pytest.raises(SampleError, match=f"part-001.tar, byte {offset}, sample 's005'") as caught:
        all_of(own_shards)
    assert "quarantine" in caught.value.remedy


def test_a_shard_that_is_cut_is_named_with_the_sample(own_shards):
    path, offset = own_shards.shard_path(1), int(own_shards.index["start"][6])
    os.truncate(path, offset + 100)
    with pytest.raises(ShardError, match=r"part-001.tar is cut: sample 's006'"):
        all_of(own_shards)


def test_a_shard_that_vanishes_is_named(own_shards):
    own_shards.shard_path(0).unlink()
    with pytest.raises(ShardError, match=r"part-000.tar cannot be read .*'s000'.*No such file"):
        all_of(own_shards)


def test_an_error_about_a_hostile_folder_is_one_line(tmp_path):
    shards = tiny_set(tmp_path / HOSTILE, num_samples=4)
    shards.shard_path(0).write_bytes(b"\0" * shards.shard_path(0).stat().st_size)
    with pytest.raises(LivtError) as caught:
        all_of(shards)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"rank": 0, "world_size": 3}, "does not give 3 ranks equal slots"),
        ({"rank": 0, "world_size": 2, "micro_batch": 3}, "does not divide the 4 slots"),
    ],
)
def test_what_does_not_divide_is_refused(shards, where, said):
    with pytest.raises(UsageError, match=said):
        SampleStream(shards, order_of(shards), epochs=1, **where)


def test_the_recipe_s_stage_gives_the_order(shards):
    recipe = tiny_recipe(shards.folder, seed=9, data__lane_groups=2)
    order = stage_order(shards, recipe, "finetune")
    assert (order.seed, order.global_batch, order.lane_groups) == (9, 8, 2)
