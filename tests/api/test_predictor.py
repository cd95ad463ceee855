"""livt.load: probabilities of files, PIL images and tensors, as the evaluation sees them; and livt.train."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import livt_scale as livt
from livt_scale.api.predictor import Predictor
from livt_scale.data.loader import eval_batches, normalise
from livt_scale.evaluation.calibration import Calibration
from livt_scale.export.write_export import export_run
from livt_scale.train.loop import Hook
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import RecipeError, RunError, SampleError, UsageError
from tests.tiny_run import CLASS_NAMES, tiny_recipe, tiny_run, tiny_shards


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run and an export of it."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_run(folder / "run", tiny_recipe(train="gone"))
    export_run(folder / "run", folder / "export")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(paths of images, their shards)"""
    folder = tmp_path_factory.mktemp("photos")
    shards = tiny_shards(folder, {"a": 4, "b": 3}, size_px=37)
    return sorted((folder / "raw").rglob("*.png")), shards


@pytest.mark.parametrize("which", ["run", "export"])
def test_an_image_gets_what_the_evaluation_gives_it_however_it_is_handed_over(runs, photos, which):
    paths, shards = photos
    predictor = livt.load(runs / which, device="cpu")
    assert predictor.class_names == CLASS_NAMES
    assert not predictor.model.training
    recipe = open_trained(runs / which).recipe
    with eval_batches(shards, recipe, rank=0, world_size=1, batch=7) as batches:
        [batch] = list(batches)
    images = normalise(batch.images, recipe.data.mean, recipe.data.std, torch.float32)
    with torch.no_grad():
        expected = dict(zip(batch.keys, predictor.model(images).double().softmax(1).float(), strict=True))

    found = predictor([str(path) for path in paths], batch=3)
    assert len(found) == 7
    for path, row in zip(paths, found.probabilities, strict=True):
        torch.testing.assert_close(row, expected[f"{path.parent.name}/{path.stem}"])
    assert (found.probabilities.dtype, found.probabilities.shape) == (torch.float32, (7, 4))
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(7))
    pixels = [np.asarray(Image.open(path)) for path in paths]
    for others in (
        [Image.open(path) for path in paths],
        [torch.from_numpy(array.copy())[None] for array in pixels],
        [predictor.transform(path) for path in paths],
        [array[None] for array in pixels],
        [predictor.transform(path).double().numpy() for path in paths],
    ):
        assert torch.equal(predictor(others).probabilities, predictor(paths).probabilities)
    assert predictor([]).probabilities.shape == (0, 4)


def test_the_likeliest_classes_come_first_and_a_temperature_divides_the_logits(runs, photos):
    paths, _ = photos
    plain, flat = livt.load(runs / "export"), livt.load(runs / "export", temperature=4.0)
    for row, top in zip(plain(paths).probabilities, plain(paths).top(2), strict=True):
        values, numbers = row.sort(descending=True)
        assert top == [(CLASS_NAMES[numbers[k]], pytest.approx(values[k].item())) for k in range(2)]
    assert len(plain(paths).top(99)[0]) == len(CLASS_NAMES)
    assert (plain.temperature, flat.temperature) == (1.0, 4.0)
    cooled = plain(paths).probabilities.double().log() / 4
    torch.testing.assert_close(flat(paths).probabilities, cooled.softmax(1).float())
    calibration = Calibration(temperature=4.0, images=9, data="val")  # as it comes with the weights
    fitted = dataclasses.replace(open_trained(runs / "export"), calibration=calibration)
    assert torch.equal(Predictor(fitted)(paths).probabilities, flat(paths).probabilities)
    assert Predictor(fitted, temperature=1.0).temperature == 1.0


@pytest.mark.parametrize("kind", ["tiff", "gif", "ppm"])
def test_a_kind_that_init_converts_is_read_by_path_as_by_pillow(runs, tmp_path, kind):
    predictor, path = livt.load(runs / "export"), tmp_path / f"photo.{kind}"
    first, second = np.random.default_rng(0).integers(0, 256, (2, 40, 45, 3), dtype=np.uint8)
    more = {} if kind == "ppm" else {"save_all": True, "append_images": [Image.fromarray(second)]}
    Image.fromarray(first).save(path, **more)
    with Image.open(path) as image:
        assert torch.equal(predictor.transform(path), predictor.transform(image))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(SampleError, match=f"photo.{kind}: "):
        predictor([path])


def test_a_photograph_held_sideways_is_upright_by_path_and_by_pillow(runs, photos, tmp_path):
    predictor, exif = livt.load(runs / "export"), Image.Exif()
    exif[0x0112] = 6
    Image.open(photos[0][0]).resize((40, 30)).save(tmp_path / "turned.png", exif=exif)
    by_path, by_pillow = (
        predictor.transform(i) for i in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png"))
    )
    assert torch.equal(by_path, by_pillow)


def test_what_is_no_run_and_no_export_no_image_and_no_value_is_an_error(runs, photos, tmp_path):
    with pytest.raises(UsageError, match="neither a run nor an export"):
        livt.load(tmp_path)
    with pytest.raises(UsageError, match="neither a run nor an export"):
        livt.load(tmp_path / "none")
    tiny_run(tmp_path / "half", tiny_recipe(train="gone"), steps=(40,), final=False)
    with pytest.raises(RunError, match="fine-tuning has not ended"):
        livt.load(tmp_path / "half")
    livt.load(tmp_path / "half", checkpoint="newest")
    for argument, value in (("temperature", 0.0), ("weights", "emma"), ("checkpoint", "best"), ("checkpoint", "first")):
        with pytest.raises(UsageError, match=f"^{argument} "):
            livt.load(runs / ("run" if value == "first" else "export"), **{argument: value})

    predictor = livt.load(runs / "export")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(SampleError, match=r"text\.png: not an image"):
        predictor([photos[0][0], tmp_path / "text.png"])
    with pytest.raises(SampleError, match=r"gone\.png cannot be read"):
        predictor([tmp_path / "gone.png"])
    for wrong in (torch.zeros(3, 28, 28), torch.zeros(1, 30, 30), torch.zeros(3, 28, 28, dtype=torch.uint8), 7, b"x"):
        with pytest.raises(UsageError, match=r"^an image is"):
            predictor([wrong])
    for call in (lambda: predictor("photo.png"), lambda: predictor(photos[0], batch=0)):
        with pytest.raises(UsageError, match=r"^(images|batch) is"):
            call()


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_a_pil_image_of_32_bits_is_refused_as_a_file_of_it_is(runs, dtype, tmp_path):
    image = Image.fromarray(np.full((28, 28), 200).astype(dtype))
    image.save(tmp_path / "wide.tif")
    predictor = livt.load(runs / "export")
    with Image.open(tmp_path / "wide.tif") as opened:
        for given in (image, opened):
            with pytest.raises(SampleError, match="32 bits"):
                predictor([given])


def test_a_checkpoint_is_named_by_its_step_as_a_number_too(runs, photos):
    step = max(int(path.name.removeprefix("step-")) for path in (runs / "run/finetune/checkpoints").glob("step-*"))
    by_number = livt.load(runs / "run", checkpoint=step)(photos[0])
    assert torch.equal(by_number.probabilities, livt.load(runs / "run")(photos[0]).probabilities)


@pytest.mark.parametrize("argument", ["tau", "temperature"])
@pytest.mark.parametrize("value", ["x", float("nan"), float("inf")])
def test_what_is_no_number_is_refused_when_the_predictor_is_made(runs, argument, value):
    with pytest.raises(UsageError, match=f"^{argument} is {value!r}"):
        livt.load(runs / "export", **{argument: value})


def test_an_array_without_channels_is_refused_with_its_shape(runs):
    with pytest.raises(UsageError, match=r"^an image is \[28, 28\] of uint8"):
        livt.load(runs / "export")([np.zeros((28, 28), dtype=np.uint8)])


def test_a_pil_image_of_16_bits_is_its_upper_eight(runs):
    pixels = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    transform = livt.load(runs / "export").transform
    wide = Image.fromarray(pixels.astype(np.uint16) << 8)
    assert torch.equal(transform(wide), transform(Image.fromarray(pixels)))


class OnGpu(Hook):
    """Sets what a ResNet in low precision sets on a GPU."""

    def at_start(self, loop):
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def test_training_returns_the_run_directory_and_takes_values_by_name(tmp_path):
    shards = tiny_shards(tmp_path / "set", {"a": 4, "b": 3})
    finetune = {"init": "scratch", "epochs": 1, "warmup_epochs": 0, "global_batch": 4, "micro_batch": 4}
    overrides = {f"stages.finetune.{name}": value for name, value in finetune.items()}
    overrides |= {"stages.pretrain": None, "data.train": shards.folder, "data.val": None, "data.workers": 0}
    overrides |= {"run_dir": tmp_path / "run", "model.depth": 1, "parallel.deterministic": True}
    run = livt.train("recipes/fashion_mnist_lt/quickstart.yaml", overrides=overrides, hooks=[OnGpu()])
    assert not torch.are_deterministic_algorithms_enabled()
    # else a recipe in fp32 that follows would train in TF32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("highest", False)
    assert run == tmp_path / "run"
    assert livt.load(run).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"sed": 1}, r"overrides\['sed'\]: there is no field sed: did you mean 'seed'"),
        ({"stages.finetune.epochs": 0}, r"overrides\['stages.finetune.epochs'\]: stages.finetune.epochs is 0"),
        ({"seed": object()}, r"overrides\['seed'\] is <object"),
        ({"extends": "x"}, r"overrides\['extends'\]: no field"),
        (["seed"], "--set 'seed' is not of the form"),
    ],
)
def test_an_override_that_cannot_be_is_named(overrides, message):
    with pytest.raises(UsageError, match=message):
        livt.train("recipes/fashion_mnist_lt/quickstart.yaml", overrides=overrides)
    with pytest.raises(RecipeError, match="there is no recipe"):
        livt.train("none.yaml")
