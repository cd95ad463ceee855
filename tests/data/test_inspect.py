"""What trace prints is what the real loader gives, at any world size, in any process."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from livt_scale.config.load import load_recipe
from livt_scale.data.inspect import rank_samples
from livt_scale.data.loader import train_batches
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import UsageError

QUICKSTART = Path(__file__).parents[2] / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


@pytest.fixture(scope="module")
def recipe():
    return load_recipe(
        QUICKSTART, sets=[f"stages.*.{s}" for s in ("global_batch=96", "epochs=2", "micro_batch=8", "warmup_epochs=1")]
    )


def keys(recipe, *, rank: int, world_size: int, epoch: int = 0) -> list[list[str]]:
    told = rank_samples(recipe, "pretrain", rank=rank, world_size=world_size, epoch=epoch)
    assert [s["step"] for s in told["steps"]] == list(range(told["steps_per_epoch"]))
    return [s["keys"] for s in told["steps"]]


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 8, 16])
def test_ranks_together_see_the_global_batches_of_one_process(recipe, world_size):
    for epoch in range(3):
        alone = keys(recipe, rank=0, world_size=1, epoch=epoch)
        ranks = [keys(recipe, rank=r, world_size=world_size, epoch=epoch) for r in range(world_size)]
        assert [list(itertools.chain(*step)) for step in zip(*ranks, strict=True)] == alone
        assert len(set(itertools.chain(*alone))) == sum(map(len, alone))  # nobody twice


@pytest.mark.parametrize("world_size", [64, 512])
def test_ranks_of_a_large_world_see_their_slots_of_the_global_batches(world_size):
    sets = [f"stages.*.{s}" for s in ("global_batch=1536", "epochs=3", "micro_batch=2", "warmup_epochs=1")]
    recipe, slots = load_recipe(QUICKSTART, sets=sets), 1536 // world_size
    for epoch in range(3):
        alone = keys(recipe, rank=0, world_size=1, epoch=epoch)
        for rank in {0, 1, *range(epoch, world_size, world_size // 8), world_size - 1}:
            mine = [step[rank * slots : (rank + 1) * slots] for step in alone]
            assert keys(recipe, rank=rank, world_size=world_size, epoch=epoch) == mine


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 0)])
def test_the_loader_gives_what_trace_tells(recipe, world_size, workers):
    loading = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    shards = ShardSet.open(recipe.data.train)
    rank = world_size - 1
    told = list(itertools.chain(*keys(recipe, rank=rank, world_size=world_size, epoch=1)))
    batches = train_batches(
        shards, loading, stage="pretrain", rank=rank, world_size=world_size, micro_batch=8, epoch=1, step=0
    )
    assert list(itertools.chain.from_iterable(batch.keys for batch in batches)) == told


def test_one_step_is_that_step_of_the_epoch(recipe):
    told = rank_samples(recipe, "finetune", rank=1, world_size=2, epoch=1, step=7)
    assert told["steps"] == [{"step": 7, "keys": told["steps"][0]["keys"]}]
    whole = rank_samples(recipe, "finetune", rank=1, world_size=2, epoch=1)
    assert told["steps"][0] == whole["steps"][7]


@pytest.mark.parametrize("wrong", [{"rank": 2}, {"world_size": 5}, {"step": 10**6}, {"epoch": -1}])
def test_what_is_not_there_is_a_usage_error(recipe, wrong):
    with pytest.raises(UsageError):
        rank_samples(recipe, "pretrain", **{"rank": 0, "world_size": 2, "epoch": 0, **wrong})
