"""livt.TrainLoader, EvalLoader, evaluate, to_webdataset: what a recipe sees, by plain values; errors name arguments."""

from __future__ import annotations

import inspect
from itertools import islice

import pytest
import timm
import torch
import torch.distributed as dist
import webdataset as wds
from torch.testing._internal.distributed.fake_pg import FakeStore

import livt_scale as livt
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Data, Finetune, Model
from livt_scale.data.loader import eval_batches, images_and_targets, train_batches
from livt_scale.distributed.world import World
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.util.errors import DataError, UsageError
from tests.data.tiny_sets import tiny_recipe, tiny_set

QUICKSTART = "recipes/fashion_mnist_lt/quickstart.yaml"
VALUES = {
    "global_batch": 64,
    "image_px": 28,
    "channels": 1,
    "mean": [0.286],
    "std": [0.353],
    "crop_scale": (0.4, 1.0),
    "rand_augment": None,
    "random_erasing": 0.0,
    "mixup": 0.8,
    "cutmix": 0.0,
    "smoothing": 0.1,
    "seed": 0,
    "workers": 0,
}
OTHERWISE = {  # values of the loader, and the same of the recipe
    "rand_augment": "rand-m5-mstd0.5-inc1",
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "smoothing": 0.3,
    "flip": False,
    "repeats": 2,
    "crop_scale": (0.2, 0.9),
}


@pytest.fixture(scope="module")
def shards():
    return livt.ShardSet.open("shards/fashion-mnist-lt/train-lt")


@pytest.fixture(scope="module")
def val(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("val") / "set", num_samples=23)


@pytest.fixture
def ranks():
    """`ranks(rank, world_size)`: this process is that rank of a group without any other."""

    def join(rank, world_size):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


def assert_same(ours, theirs):
    assert ours.keys == theirs.keys
    assert torch.equal(ours.images, theirs.images)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.mix.lam, theirs.mix.lam)
    assert torch.equal(ours.mix.box, theirs.mix.box)


@pytest.mark.parametrize(("sampling", "seed", "values"), [("instance", 0, {}), ("class_balanced", 7, OTHERWISE)])
def test_samples_are_bit_for_bit_those_of_a_recipe_with_the_same_values(shards, sampling, seed, values):
    sets = {f"stages.finetune.{name}": value for name, value in values.items()}
    sets |= {"stages.finetune.sampling.policy": sampling, "seed": seed, "data.workers": 0}
    recipe = load_recipe(QUICKSTART, sets=sets)
    loader = livt.TrainLoader(shards, **VALUES | values | {"sampling": sampling, "seed": seed})
    assert loader.steps_per_epoch == 2478 // 64
    for epoch, step in ((0, 0), (3, 36)):
        start = {"rank": 0, "world_size": 1, "micro_batch": 64, "epoch": epoch, "step": step}
        with train_batches(shards, recipe, stage="finetune", **start) as batches:
            theirs = list(islice(batches, 2))
        ours = list(islice(loader.batches(epoch, step=step), 2))
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
        images, targets = next(loader.epoch(epoch, step=step))
        part = recipe.stages.finetune
        expected = images_and_targets(theirs[0], part, recipe.data, num_classes=10)
        assert torch.equal(images, expected[0])
        assert torch.equal(targets, expected[1])
        assert (images.dtype, images.shape) == (torch.float32, (64, 1, 28, 28))
        torch.testing.assert_close(targets.sum(1), torch.ones(64))


def test_ranks_share_each_global_batch_and_micro_batches_cut_it(shards, ranks):
    whole = next(livt.TrainLoader(shards, **VALUES).batches(1))
    found = []
    for rank in range(4):
        ranks(rank, 4)
        loader = livt.TrainLoader(shards, **VALUES, micro_batch=8)
        assert loader.micro_batches_per_step == 2
        found += list(islice(loader.batches(1), 2))
    assert [key for batch in found for key in batch.keys] == whole.keys
    assert torch.equal(torch.cat([batch.images for batch in found]), whole.images)
    ranks(0, 3)
    with pytest.raises(UsageError, match="global batch of 64 cannot be divided equally among 3 ranks"):
        loader.epoch(1)


def test_epochs_in_turn_share_loader_processes_and_others_start_where_they_should(val):
    values = {"global_batch": 8, "image_px": 32, "rand_augment": None, "mixup": 0, "cutmix": 0, "seed": 1}
    alone = livt.TrainLoader(val, **values, workers=0)
    plain = {epoch: [batch.keys for batch in alone.batches(epoch)] for epoch in range(3)}
    loader = livt.TrainLoader(val, **values, workers=1)
    assert [batch.keys for batch in loader.batches(0)] == plain[0]
    processes = [process.pid for process in loader._stream._workers]
    assert [batch.keys for batch in loader.batches(1)] == plain[1]
    assert [process.pid for process in loader._stream._workers] == processes
    for _ in loader.epoch(2):
        break
    assert [batch.keys for batch in loader.batches(2)] == plain[2]  # again, from its beginning
    assert [batch.keys for batch in loader.batches(0, step=1)] == plain[0][1:]
    first, _ = loader.batches(0), loader.batches(1)
    with pytest.raises(UsageError, match="another epoch of this loader was started"):
        next(first)
    loader.close()


def test_defaults_are_those_of_a_recipe():
    fields = {**Finetune.model_fields, **Data.model_fields, **Model.model_fields}
    others = {
        "shards",
        "self",
        "device",
        "seed",
        "batch",
        "num_branches",
        "micro_batch",
        "epochs",
        "global_batch",
        "sampling",
    }
    for kind in (livt.TrainLoader, livt.EvalLoader):
        given = {n: p.default for n, p in inspect.signature(kind).parameters.items() if n not in others}
        assert len(given) >= 6
        assert given == {name: fields[name].default for name in given}
    groups = inspect.signature(livt.evaluate).parameters
    assert groups["many_over"].default == Data.model_fields["many_over"].default
    assert groups["few_under"].default == Data.model_fields["few_under"].default


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("global_batch", 0),
        ("global_batch", 65),  # mixup pairs neighbours
        ("micro_batch", 128),
        ("micro_batch", 3),
        ("image_px", 0),
        ("channels", 2),
        ("mean", [0.1, 0.2]),
        ("mean", 0.286),
        ("std", [0.0]),
        ("crop_scale", (0.9, 0.1)),
        ("crop_scale", (0.1, 1.5)),
        ("rand_augment", "hard"),
        ("random_erasing", 2),
        ("mixup", -1),
        ("smoothing", 1.0),
        ("sampling", "instances"),
        ("sampling", {"policy": "progressive", "from": "instance"}),
        ("repeats", 3),
        ("epochs", 0),
        ("seed", -1),
        ("workers", -1),
        ("prefetch", 0),
        ("mean", [128.0]),
        ("mean", [-0.1]),
        ("std", [60.0]),
        ("device", "cud"),
    ],
)
def test_a_value_out_of_range_names_the_argument(shards, argument, value):
    with pytest.raises(UsageError, match=rf"^{argument}\b") as raised:
        livt.TrainLoader(shards, **VALUES | {argument: value})
    assert "stages." not in str(raised.value)
    assert "data." not in str(raised.value)


def test_epochs_and_sets_that_do_not_fit_are_errors(shards):
    loader = livt.TrainLoader(shards, **VALUES, epochs=2)
    for call, name in (
        (lambda: loader.epoch(2), "epoch is 2"),
        (lambda: loader.epoch(-1), "epoch is -1"),
        (lambda: loader.epoch(0, step=39), "step is 39"),
    ):
        with pytest.raises(UsageError, match=f"^{name}"):
            call()
    with pytest.raises(DataError, match="Set global_batch to at most 2478"):
        livt.TrainLoader(shards, **VALUES | {"global_batch": 4096})
    changing = {"policy": "progressive", "from": "instance", "to": "class_balanced"}
    with pytest.raises(UsageError, match=r"^epochs is None"):
        livt.TrainLoader(shards, **VALUES, sampling=changing)
    livt.TrainLoader(shards, **VALUES, sampling=changing, epochs=5)


def test_the_evaluation_loader_gives_each_image_once_as_it_is_evaluated(val, ranks):
    recipe = tiny_recipe(val.folder)
    values = {"image_px": 32, "mean": recipe.data.mean, "std": recipe.data.std, "workers": 0, "batch": 5}
    loader = livt.EvalLoader(val, **values)
    assert len(loader) == 5
    images, labels = map(torch.cat, zip(*loader, strict=True))
    with eval_batches(val, recipe, rank=0, world_size=1, batch=23) as batches:
        [whole] = list(batches)
    assert torch.equal(labels, whole.labels)
    assert (images.dtype, images.shape) == (torch.float32, (23, 3, 32, 32))
    parts = []
    for rank in range(2):
        ranks(rank, 2)
        parts += [labels for _, labels in loader]
    assert torch.equal(torch.cat(parts), whole.labels)
    for argument, value in (("batch", 0), ("channels", 4), ("std", [1.0]), ("device", "cud")):
        with pytest.raises(UsageError, match=f"^{argument}"):
            livt.EvalLoader(val, **values | {argument: value})


def test_a_folder_of_shards_is_opened(val):
    values = {"image_px": 32, "workers": 0}
    assert livt.EvalLoader(str(val.folder), **values).shards.num_samples == 23
    assert livt.TrainLoader(val.folder, global_batch=4, **values).shards.num_samples == 23


def test_an_argument_of_another_kind_is_named(val):
    model = livt.build_classifier("vit_micro", num_classes=val.num_classes, image_px=32)
    loader = livt.EvalLoader(val, image_px=32, workers=0)
    training = livt.TrainLoader(val, image_px=32, workers=0, global_batch=4)
    for call, name in (
        (lambda: livt.TrainLoader(val.class_counts, global_batch=4), "shards"),
        (lambda: livt.EvalLoader([val]), "shards"),
        (lambda: livt.to_webdataset(None, global_batch=4), "shards"),
        (lambda: livt.evaluate(model, loader, val.class_counts), "shards"),
        (lambda: livt.evaluate(model, training, val), "loader"),
        (lambda: livt.evaluate(model, [], val), "loader"),
        (lambda: livt.evaluate(model.forward, loader, val), "model"),
        (lambda: livt.losses.make("bal_bce", val), "class_counts"),
        (lambda: livt.losses.make("bal_bce", ["a", "b"]), "class_counts"),
    ):
        with pytest.raises(UsageError, match=f"^{name} is of the type "):
            call()


def test_the_report_is_that_of_livt_eval(val):
    recipe = tiny_recipe(val.folder)
    torch.manual_seed(0)
    model = livt.build_classifier("vit_micro", num_classes=val.num_classes, image_px=32, drop_path=0.2).train()
    torch.nn.init.normal_(model.head.weight)
    loader = livt.EvalLoader(val, image_px=32, mean=recipe.data.mean, std=recipe.data.std, workers=0)
    report = livt.evaluate(model, loader, val, many_over=7, few_under=3)
    assert report["num_samples"] == 23
    data = recipe.data.model_copy(update={"many_over": 7, "few_under": 3})
    assert report == evaluate(model, val, recipe.model_copy(update={"data": data}), world=World())
    assert model.training
    for arguments, name in (({"few_under": 200}, "few_under"), ({"precision": "fp8"}, "precision")):
        with pytest.raises(UsageError, match=f"^{name}"):
            livt.evaluate(model, loader, val, **arguments)
    for wrong in (torch.nn.Flatten(), torch.nn.LSTM(32, 3)):
        with pytest.raises(UsageError, match="the model returns"):
            livt.evaluate(torch.nn.Sequential(torch.nn.Flatten(0, 2), wrong), loader, val)
    other = livt.ShardSet.open("shards/fashion-mnist-lt/train-lt")
    with pytest.raises(DataError, match="do not have the same classes"):
        livt.evaluate(model, loader, other)


def test_a_webdataset_pipeline_has_the_samples_of_the_loader(shards):
    options = {"global_batch": 64, "seed": 3, "sampling": "class_balanced"}
    keys = [batch.keys for batch in islice(livt.TrainLoader(shards, **VALUES | options).batches(1), 2)]
    pipeline = livt.to_webdataset(shards, **options, epochs=2, epoch=1)
    samples = list(islice(pipeline.compose(wds.decode("l8"), wds.to_tuple("__key__", "png", "cls")), 128))
    assert [key for key, _, _ in samples] == keys[0] + keys[1]
    assert samples[0][1].shape == (28, 28)
    with pytest.raises(UsageError, match=r"^global_batch"):
        livt.to_webdataset(shards, global_batch=-1)
    for position in ({"epoch": -1}, {"epoch": 2}, {"step": -1}, {"step": 39}):
        [(name, value)] = position.items()
        with pytest.raises(UsageError, match=f"^{name} is {value}"):
            livt.to_webdataset(shards, **options, epochs=2, **position)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("size", "vit_x"), ("size", "timm/resnet5"), ("num_classes", 0), ("image_px", 30), ("drop_path", 1.0),
        ("heads", 5), ("channels", 0),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_names_the_argument(argument, value):
    usual = {"size": "vit_micro", "num_classes": 10, "image_px": 28}
    with pytest.raises(UsageError, match=f"^{argument} is {value!r}"):
        livt.build_classifier(**usual | {argument: value})


def test_a_model_of_each_kind_is_trained_by_images_alone():
    for size in ("vit_micro", "resnet_micro", "timm/test_vit"):
        model = livt.build_classifier(size, num_classes=3, image_px=32, channels=1, drop_path=0.3).train()
        loss = livt.losses.make("bal_bce", [5, 3, 1])(model(torch.zeros(2, 1, 32, 32)), torch.tensor([0, 2]))
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_a_model_of_timm_takes_the_images_of_its_weights():
    model = livt.build_classifier("timm/test_vit.r160_in1k", num_classes=3)
    ours, theirs = model.state_dict(), timm.create_model("test_vit", num_classes=3).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    assert model(torch.zeros(1, 3, 160, 160)).shape == (1, 3)
    with pytest.raises(UsageError, match="160"):
        model(torch.zeros(1, 3, 224, 224))
