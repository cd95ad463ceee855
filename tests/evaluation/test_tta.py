"""Test-time views: which crops they are, how they are averaged, and each sample once at any world size."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.transforms.functional import five_crop

from livt_scale.data.classes import TrainingClasses
from livt_scale.data.image.transforms import EvalTransform
from livt_scale.data.loader import eval_batches
from livt_scale.data.settings import ImageSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.world import World, process_group
from livt_scale.evaluation.evaluate import evaluate
from livt_scale.evaluation.logits import About, gather
from livt_scale.evaluation.tta import NUMBERS, Views
from livt_scale.util.errors import RunError, UsageError
from tests import warm
from tests.evaluation.test_evaluate import _sharded, a_model
from tests.tiny_run import tiny_recipe, tiny_shards
from tests.whole_runs import free_port

CLASSES = TrainingClasses(("a", "b", "c"), (300, 50, 4), where="the training set")
ABOUT = About(CLASSES.names, CLASSES.counts, 100, 20, "ce", 1.0, {"data": {}, "weights": {}})


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return tiny_shards(tmp_path / "set", {"a": 3, "b": 5, "c": 3}, size_px=40)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_five_crops_are_the_centre_and_the_corners_of_the_resized_image(tmp_path: Path) -> None:
    recipe = tiny_recipe(train=tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 50), dtype=np.uint8)  # 28 / 0.875 = 32: not resized
    slots = torch.empty(5, 28, 28, 1, dtype=torch.uint8).permute(0, 3, 1, 2)
    EvalTransform(ImageSettings.of_recipe(recipe)).crops(png(pixels), slots)
    expected = [pixels[2:30, 11:39], pixels[:28, :28], pixels[:28, 22:], pixels[4:, :28], pixels[4:, 22:]]
    for slot, crop in zip(slots, expected, strict=True):
        np.testing.assert_array_equal(slot[0].numpy(), crop)
    alone = torch.empty(28, 28, 1, dtype=torch.uint8).permute(2, 0, 1)
    EvalTransform(ImageSettings.of_recipe(recipe))(png(pixels), alone)
    assert torch.equal(alone, slots[0])


@pytest.mark.parametrize("resize_px", [28, 29, 31, 40])
def test_the_views_of_a_resized_image_are_its_five_crops(shards: ShardSet, resize_px: int) -> None:
    """LIFT's test-time ensembling: torchvision's Resize(px) and FiveCrop(T)."""
    views, usual = Views(5, resize_px=resize_px), ImageSettings.of_recipe(tiny_recipe(train=shards.folder))
    pixels = np.random.default_rng(0).integers(0, 256, (resize_px, resize_px + 3), dtype=np.uint8)  # not resized
    slots = torch.empty(5, 28, 28, 1, dtype=torch.uint8).permute(0, 3, 1, 2)
    EvalTransform(views.settings(usual)).crops(png(pixels), slots)
    image = torch.from_numpy(pixels)[None]
    top_left, top_right, bottom_left, bottom_right, centre = five_crop(image, [28, 28])
    expected = torch.stack([centre, top_left, top_right, bottom_left, bottom_right])
    assert torch.equal(slots, expected)
    with pytest.raises(UsageError, match="takes 28 px"):
        Views(5, resize_px=27).settings(usual)


def test_the_loader_gives_the_crops_of_an_image_as_neighbours(shards: ShardSet) -> None:
    recipe = tiny_recipe(train=shards.folder)
    single = torch.cat([b.images for b in eval_batches(shards, recipe, rank=0, world_size=1, batch=4)])
    with eval_batches(shards, recipe, rank=0, world_size=1, batch=4, crops=5) as batches:
        several = torch.cat([b.images for b in batches])
    assert several.shape == (55, 1, 28, 28)
    assert torch.equal(several[0::5], single)
    assert not torch.equal(several[1::5], single)


@pytest.mark.parametrize("average", ["logits", "probs"])
@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_views_are_averaged_as_a_plain_loop_does(shards: ShardSet, number: int, average: str) -> None:
    recipe, model = tiny_recipe(train=shards.folder), a_model().eval()
    views = Views(number, average)  # type: ignore[arg-type]
    kept: list[torch.Tensor] = []
    evaluate(model, shards, recipe, world=World(), classes=CLASSES, batch=3, views=views, keep=kept)
    found = torch.cat(kept)
    crops, mirrored = NUMBERS[number]
    with eval_batches(shards, recipe, rank=0, world_size=1, batch=1, crops=crops) as batches, torch.no_grad():
        for row, batch in zip(found, batches, strict=True):
            seen = []
            for crop in batch.images.double() / 255:
                for view in [crop, crop.flip(-1)] if mirrored else [crop]:
                    seen.append(model(((view - 0.3) / 0.25).float()[None])[0].double())
            assert len(seen) == number
            if average == "logits":
                torch.testing.assert_close(row, torch.stack(seen).mean(0).float(), rtol=0, atol=2e-4)
            else:
                mean = torch.stack([s.softmax(0) for s in seen]).mean(0)
                torch.testing.assert_close(row.double().softmax(0), mean, rtol=0, atol=1e-4)


def test_one_view_is_the_plain_evaluation_to_the_bit(shards: ShardSet) -> None:
    recipe = tiny_recipe(train=shards.folder)
    plain = evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES)
    assert evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES, views=Views(1)) == plain
    assert plain["views"] == {"number": 1, "average": "logits"}


def test_other_numbers_and_words_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match="1, 2, 5, 10"):
        Views(3)
    with pytest.raises(UsageError, match="Did you mean 'probs'"):
        Views(2, "prob")  # type: ignore[arg-type]


def _rank(rank: int, port: str, folder: str, out: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    shards, recipe, world = ShardSet.open(folder), tiny_recipe(train=folder), World(rank, 2)
    options = {"world": world, "classes": CLASSES, "batch": 1, "views": Views(10)}
    with process_group(world, timeout_s=60):
        result, passes, sharded = {}, [], _sharded(world)
        infer = sharded.infer
        sharded.infer = lambda images: passes.append(len(images)) or infer(images)
        for name, model in (("plain", a_model()), ("sharded", sharded)):
            kept: list[torch.Tensor] = []
            report = evaluate(model, shards, recipe, keep=kept, **options)
            gathered = gather(kept, shards, ABOUT, world=world)
            assert (gathered is None) == (rank > 0)
            result[name] = {"report": report, "logits": gathered.logits.tolist() if gathered else None}
        spoilt = [k.fill_(float("nan")) if rank else k for k in kept]
        try:
            gather(spoilt, shards, ABOUT, world=world)
        except RunError as error:
            result["error"] = str(error)
        result["passes"] = len(passes)
        dist.barrier()
    Path(out, f"{rank}.json").write_text(json.dumps(result))


def test_two_ranks_give_the_report_and_the_logits_of_one(shards: ShardSet, tmp_path: Path) -> None:
    recipe = tiny_recipe(train=shards.folder)
    kept: list[torch.Tensor] = []
    options = {"world": World(), "classes": CLASSES, "batch": 1, "views": Views(10)}
    alone = evaluate(a_model(), shards, recipe, keep=kept, **options)
    outputs = gather(kept, shards, ABOUT, world=World())
    assert outputs is not None
    code = "import sys; from tests.evaluation.test_tta import _rank; _rank(int(sys.argv[1]), *sys.argv[2:])"
    words = (str(free_port()), shards.folder, tmp_path)
    warm.run_each([["-c", code, str(rank), *words] for rank in range(2)], log=tmp_path / "log")  # 11 samples: 5 and 6
    for rank in range(2):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in ("plain", "sharded"):
            assert result[name]["report"] == json.loads(json.dumps(alone))
            if rank == 0:
                assert result[name]["logits"] == outputs.logits.tolist()
        assert result["passes"] == 60  # rank 0 has 5 images and calls the sharded model for the sixth of rank 1 too
        assert "not finite for 6 of 11 images" in result["error"]


def test_gathered_logits_stand_in_the_order_of_the_set_with_its_keys_and_labels(shards: ShardSet) -> None:
    recipe = tiny_recipe(train=shards.folder)
    kept: list[torch.Tensor] = []
    evaluate(a_model(), shards, recipe, world=World(), classes=CLASSES, batch=4, keep=kept)
    outputs = gather(kept, shards, ABOUT, world=World())
    assert outputs is not None
    with eval_batches(shards, recipe, rank=0, world_size=1, batch=1) as batches:
        seen = [(b.keys[0], int(b.labels)) for b in batches]
    assert list(zip(outputs.keys, outputs.labels.tolist(), strict=True)) == seen
