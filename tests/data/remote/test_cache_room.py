"""A cache too small for an evaluation is refused at the start with the figure that would do, and that figure does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from livt_scale.data.order.instance import eval_positions
from livt_scale.data.remote import prefetch
from livt_scale.data.remote.cache import GIB, ShardCache
from livt_scale.data.remote.shards import held_bytes
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.train.finetune import finetune_task
from livt_scale.util.errors import DataError
from tests.data.tiny_sets import tiny_recipe

BATCH = 4


def least(local: ShardSet) -> int:
    """Bytes: what is held, and the largest shards: a batch of four in a run that may begin anywhere, and one ahead."""
    sizes = sorted((s.bytes for s in local.manifest.shards), reverse=True)
    return held_bytes(local.manifest) + sum(sizes[: 3 + 1])


class Guess(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :3]


def recipe_for(local: ShardSet, url: str, limit: int):
    cache = {"ahead": 1, "limit_gib": limit / GIB}
    return tiny_recipe(local.folder, data__val=url, data__cache=cache, stages__finetune__init="scratch")


def test_an_evaluation_with_the_least_room_counts_each_image_and_stays_below_it(server, local, tmp_path, monkeypatch):
    recipe = recipe_for(local, server.url, least(local))
    val = ShardSet.open(server.url, data=recipe.data)
    most, hold = [], ShardCache.hold

    def watched(cache, *args, **options):
        handle = hold(cache, *args, **options)
        with cache._locked():  # else a file that gets its name meanwhile counts twice
            most.append(cache.used())
        return handle

    monkeypatch.setattr(ShardCache, "hold", watched)
    report = evaluate(Guess(), val, recipe, world=World(), batch=BATCH)
    assert report["num_samples"] == 43
    assert max(most) <= least(local)
    assert max(server.requests[s.name] for s in local.manifest.shards) == 1  # in this room nothing is fetched twice


def test_a_byte_less_is_refused_before_an_image_is_fetched(server, local):
    recipe = recipe_for(local, server.url, least(local) - 1)
    val = ShardSet.open(server.url, data=recipe.data)
    said = rf"an evaluation, with 1 loader processes on the node, needs {least(local):,}.*at least"
    with pytest.raises(DataError, match=said):
        evaluate(Guess(), val, recipe, world=World(), batch=BATCH)
    assert not [name for name in server.requests if name.endswith(".tar")]


def test_fine_tuning_says_at_its_start_that_its_evaluations_have_no_room(server, local, tmp_path):
    recipe = recipe_for(local, server.url, least(local) - 1)
    with pytest.raises(DataError, match="an evaluation, with 1 loader processes on the node, needs"):
        finetune_task(recipe, local, run_dir=tmp_path / "run", world=World())
    everything = sum(s.bytes for s in local.manifest.shards) + held_bytes(local.manifest)
    finetune_task(recipe_for(local, server.url, everything), local, run_dir=tmp_path / "run", world=World())


def test_what_the_training_set_holds_is_counted(server, local):
    recipe = recipe_for(local, server.url, least(local) + held_bytes(local.manifest) - 1)
    val = ShardSet.open(server.url, data=recipe.data)
    options = {"batch": BATCH, "ranks": 1, "workers": 0}
    prefetch.check_evaluation_room(val, **options, train=local)  # in a folder: takes nothing of the cache
    with pytest.raises(DataError, match="an evaluation"):
        prefetch.check_evaluation_room(val, **options, train=val)


@given(
    per_shard=st.lists(st.integers(0, 20), min_size=1, max_size=30),
    run=st.integers(1, 60),
    world=st.integers(1, 5),
)
def test_no_run_of_samples_lies_in_more_shards_than_are_reckoned_with(per_shard, run, world):
    sizes = np.array([n for n in per_shard if n] or [1], dtype=np.int64)
    ends, most = np.cumsum(sizes), prefetch._most_shards(sizes, run)
    for rank in range(world):
        own = eval_positions(int(ends[-1]), rank=rank, world_size=world)
        for first in own:
            last = min(first + run, own.stop) - 1
            first_shard, last_shard = np.searchsorted(ends, [first, last], side="right")
            assert last_shard - first_shard + 1 <= most
