"""`livt shards info --recipe` tells what loading would show: counted against trace, loader and quarantine."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.data.build.verify import verify
from livt_scale.data.inspect import rank_samples
from livt_scale.data.loader import train_batches
from livt_scale.data.order.for_stage import stage_order
from livt_scale.data.pipeline import to_webdataset
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import UsageError
from tests.data.tiny_sets import tiny_recipe, tiny_set

PROGRESSIVE = {"policy": "progressive", "from": "instance", "to": "class_balanced"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """34 samples of 3 classes, 12, 11 and 11; two of class 1 are damaged and in quarantine."""
    folder = tmp_path_factory.mktemp("seen") / "set"
    tiny_set(folder, num_samples=34, half=(4, 10))
    verify(folder, decode=True, quarantine=True, workers=1)
    return ShardSet.open(folder)


def livt(*args: object) -> str:
    result = CliRunner().invoke(app, ["shards", *map(str, args)])
    if result.exception:
        raise result.exception
    return result.stdout


def recipe_of(shards, **changes):
    return tiny_recipe(shards.folder, **{f"stages__finetune__{name}": value for name, value in changes.items()})


def batches_of(shards, recipe, *, rank=0, world_size=1, step=0, workers=0):
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": workers})})
    with train_batches(
        shards, recipe, stage="finetune", rank=rank, world_size=world_size, micro_batch=2, epoch=0, step=step
    ) as batches:
        yield from batches


@pytest.mark.parametrize(
    ("sampling", "repeats"),
    [("instance", 1), ("instance", 2), ("class_balanced", 1), ("sqrt", 4), (PROGRESSIVE, 1), (PROGRESSIVE, 2)],
    ids=str,
)
def test_info_tells_how_often_trace_shows_each_class(shards, tmp_path, sampling, repeats):
    sampling = sampling if isinstance(sampling, dict) else {"policy": sampling}
    recipe = recipe_of(shards, sampling=sampling, repeats=repeats, epochs=5)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    told = json.loads(livt("info", shards.folder, "--recipe", file, "--json"))["seen"]
    assert (told["stage"], told["epochs"], told["repeats"]) == ("finetune", 5, repeats)
    label = {key: int(key[1:]) % 3 for key in shards.keys(np.arange(34))}
    epochs = []
    for epoch in range(5):
        steps = rank_samples(recipe, "finetune", rank=0, world_size=1, epoch=epoch)["steps"]
        epochs.append(Counter(label[key] for step in steps for key in step["keys"]))
    for c, row in enumerate(told["classes"]):
        assert row["images"] == [12, 9, 11][c]
        assert (row["first_epoch"], row["last_epoch"]) == (epochs[0][c], epochs[4][c])
        assert row["stage"] == sum(e[c] for e in epochs)
    assert sum(row["first_epoch"] for row in told["classes"]) == told["draws_per_epoch"] == 32


def test_info_shows_a_row_for_each_class_and_takes_set(shards, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe_of(shards).model_dump(mode="json")))
    choose = ["--recipe", file, "--stage", "pretrain", "--set", "stages.pretrain.sampling.policy=class_balanced"]
    shown = livt("info", shards.folder, *choose).splitlines()
    assert "pretrain draws class_balanced: 3 epochs of 4 steps, 32 draws" in shown
    assert [line.split()[0] for line in shown[-3:]] == ["0", "2", "1"]  # the largest class first
    assert [int(line.split()[-2]) for line in shown[-3:]] == [32, 32, 32]


@pytest.mark.parametrize("wrong", [["--stage", "pretrain"], ["--set", "seed=1"]])
def test_what_is_about_a_recipe_needs_one(shards, wrong):
    with pytest.raises(UsageError, match="--recipe"):
        livt("info", shards.folder, *wrong)


@pytest.mark.parametrize("sampling", [{"policy": "instance"}, {"policy": "class_balanced"}], ids=str)
def test_each_view_of_an_image_is_augmented_on_its_own(shards, sampling):
    recipe = recipe_of(shards, sampling=sampling, repeats=2, mixup=0.0, cutmix=0.0, epochs=2)
    for batch in batches_of(shards, recipe):
        assert batch.keys[0] == batch.keys[1]
        assert not torch.equal(batch.images[0], batch.images[1])
        assert not torch.equal(batch.drop[0], batch.drop[1])


def test_an_image_drawn_often_in_an_epoch_is_augmented_anew_each_time(tmp_path):
    tiny_set(tmp_path / "set", num_samples=34, half=tuple(range(1, 29, 3)))  # class 1: s031 is left
    verify(tmp_path / "set", decode=True, quarantine=True, workers=1)
    shards = ShardSet.open(tmp_path / "set")
    assert shards.class_counts.tolist() == [12, 1, 11]
    recipe = recipe_of(shards, sampling={"policy": "class_balanced"}, epochs=2, warmup_epochs=0)
    seen = [
        (batch.epoch, image.numpy().tobytes(), drop.numpy().tobytes())
        for batch in batches_of(shards, recipe)
        for key, image, drop in zip(batch.keys, batch.images, batch.drop, strict=True)
        if key == "s031"
    ]
    assert Counter(epoch for epoch, *_ in seen) == {0: 8, 1: 8}
    assert len({image for _, image, _ in seen}) == len({drop for *_, drop in seen}) == 16


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (4, 2)])
def test_ranks_load_the_batches_of_one_process_from_any_step_on(shards, world_size, workers):
    recipe = recipe_of(shards, sampling=PROGRESSIVE, repeats=2)
    alone = list(batches_of(shards, recipe))  # 3 epochs of 4 steps, 4 micro-batches of 2 each
    for rank in range(world_size):
        mine = batches_of(shards, recipe, rank=rank, world_size=world_size, step=5, workers=workers)
        slots = 4 // world_size
        expected = [b for b in alone[20:] if rank * slots <= b.micro_index < (rank + 1) * slots]
        for one, other in itertools.zip_longest(mine, expected):
            assert one.keys == other.keys
            for name in ("images", "labels", "drop"):
                assert torch.equal(getattr(one, name), getattr(other, name)), name
            assert torch.equal(one.mix.lam, other.mix.lam)


def test_trace_and_stream_follow_the_policy(shards):
    recipe = recipe_of(shards, sampling={"policy": "class_balanced"}, repeats=2)
    told = rank_samples(recipe, "finetune", rank=0, world_size=1, epoch=1)["steps"]
    assert sorted(told[0]["views"])[:4] == [0, 0, 0, 0]
    assert 1 in told[0]["views"]
    stream = to_webdataset(shards, stage_order(shards, recipe, "finetune"), epochs=2, epoch=1)
    assert [s["__key__"] for s in stream] == [key for step in told for key in step["keys"]]
    assert "views" not in rank_samples(recipe_of(shards), "finetune", rank=0, world_size=1, epoch=1)["steps"][0]
