"""Geometry of torchvision, pixels of Pillow, augmentation of timm, and all of it a function of seed, epoch and key."""

from __future__ import annotations

import io
import math
import random
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import transforms as tv_transforms

from livt_scale.data.image import transforms
from livt_scale.data.image.decode import open_image
from livt_scale.data.image.transforms import Box, EvalTransform, TrainTransform, cut, draw_crop, resize
from livt_scale.data.seeds import sample_rng
from livt_scale.data.settings import ImageSettings, TrainSettings
from livt_scale.util.errors import UsageError
from tests.data.tiny_sets import encoded, photo, tiny_recipe

BICUBIC = tv.InterpolationMode.BICUBIC
SIZES = st.integers(1, 300)


def slot_for(px: int, channels: int = 3) -> torch.Tensor:
    return torch.zeros((px, px, channels), dtype=torch.uint8).permute(2, 0, 1)


def as_image(slot: torch.Tensor) -> np.ndarray:
    return slot.permute(1, 2, 0).numpy()


def assert_same_levels(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Both round to 8 bits after each of two passes: hardly ever more than one of 255 levels apart, never three."""
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max() <= 2
    assert (apart > 1).mean() < 0.01


def torchvision_crop(height: int, width: int, *, scale: tuple[float, float], uniforms: list[float], monkeypatch) -> Box:
    """RandomResizedCrop.get_params of torchvision, its random numbers replaced by `uniforms`, in double precision."""
    areas_and_aspects, (top, left) = iter(uniforms[:-2]), uniforms[-2:]
    corner = iter((top, left))

    def uniform(low, high):
        return SimpleNamespace(item=lambda: float(low) + (float(high) - float(low)) * next(areas_and_aspects))

    fake = SimpleNamespace(
        empty=lambda _: SimpleNamespace(uniform_=uniform),
        log=torch.log,
        tensor=lambda ratio: torch.tensor(ratio, dtype=torch.float64),
        exp=lambda drawn: SimpleNamespace(item=lambda: math.exp(drawn.item())),
        randint=lambda low, high, size: SimpleNamespace(item=lambda: low + int(next(corner) * (high - low))),
    )
    with monkeypatch.context() as patch:
        patch.setattr(tv_transforms, "torch", fake)
        shape = torch.empty(3, 1, 1).expand(3, height, width)
        return Box(*tv_transforms.RandomResizedCrop.get_params(shape, list(scale), [3 / 4, 4 / 3]))


@settings(max_examples=300)
@given(height=SIZES, width=SIZES, low=st.floats(0.01, 1), seed=st.integers(0, 10**6))
def test_a_crop_is_torchvision_s_for_the_same_uniforms(height, width, low, seed):
    uniforms = np.random.default_rng(seed).random(22).tolist()
    ours = draw_crop(height, width, scale=(low, 1.0), uniforms=uniforms)
    theirs = torchvision_crop(height, width, scale=(low, 1.0), uniforms=uniforms, monkeypatch=pytest.MonkeyPatch())
    assert ours == theirs
    assert 0 <= ours.top <= height - ours.height
    assert 0 <= ours.left <= width - ours.width


@settings(max_examples=60)
@given(height=st.integers(8, 200), width=st.integers(8, 200), px=st.integers(8, 96), data=st.data())
def test_resizing_a_box_gives_pillow_s_pixels(height, width, px, data):
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    box = Box(data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w)
    channels = data.draw(st.sampled_from([1, 3]))
    pixels = photo(height, width)[:, :, :channels].copy()
    slot = slot_for(px, channels)
    resize(pixels, box, slot)
    image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    image = image.crop((box.left, box.top, box.left + w, box.top + h)).resize((px, px), Image.Resampling.BICUBIC)
    assert_same_levels(as_image(slot), np.asarray(image).reshape(px, px, channels))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_training_image_is_what_torchvision_makes_of_the_same_crop(tmp_path, channels):
    norm = {"data__mean": [0.5] * channels, "data__std": [0.5] * channels}
    recipe = tiny_recipe(tmp_path, model__channels=channels, **norm)
    transform, mirrored = TrainTransform(TrainSettings.of_stage(recipe, "pretrain")), 0
    for k in range(20):
        # under twice the target on one side: decoded in full
        data = encoded(photo(63 - k, 60 + 5 * k, seed=k)[:, :, :channels].squeeze())
        slot = slot_for(32, channels)
        transform(data, slot, epoch=2, key=f"k{k}")
        uniforms = sample_rng(recipe.seed, 2, f"k{k}", "crop").random(23).tolist()
        with Image.open(io.BytesIO(data)) as image:
            box = draw_crop(image.height, image.width, scale=(0.2, 1.0), uniforms=uniforms[1:])
            theirs = tv.resized_crop(image, box.top, box.left, box.height, box.width, [32, 32], BICUBIC)
        if uniforms[0] < 0.5:
            theirs, mirrored = tv.hflip(theirs), mirrored + 1
        assert_same_levels(as_image(slot), np.asarray(theirs).reshape(32, 32, channels))
    assert 0 < mirrored < 20


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_decoding_less_keeps_the_geometry(factor):
    # A ramp: its value says where a pixel came from. 255 levels over 2000 px, so one level is 8 px of the original.
    ramp = np.linspace(0, 255, 2000).round().astype(np.uint8)
    image = open_image(encoded(np.broadcast_to(ramp[None, :, None], (1500, 2000, 3)).copy()), channels=3)
    rng = np.random.default_rng(factor)
    for _ in range(5):
        h, w = rng.integers(factor * 100, min(2 * factor * 100, 1500), size=2).tolist()
        box = Box(int(rng.integers(1501 - h)), int(rng.integers(2001 - w)), h, w)
        less, exact = slot_for(100), slot_for(100)
        pixels, small_box = cut(image, box, target_px=100)
        assert pixels.shape[1] == 2000 // factor
        resize(pixels, small_box, less)
        resize(image.pixels(), box, exact)
        shift_px = np.abs(as_image(less).astype(float).mean(0) - as_image(exact).mean(0)).mean() * 2000 / 255
        assert shift_px < factor


def test_decoding_less_changes_few_levels():
    data = encoded(photo(900, 1200, seed=2))
    image, box = open_image(data, channels=3), Box(37, 101, 811, 733)
    less, exact = slot_for(224), slot_for(224)
    resize(*cut(image, box, target_px=224), less)
    resize(image.pixels(), box, exact)
    assert np.abs(as_image(less).astype(int) - as_image(exact)).mean() < 1.5


@pytest.mark.parametrize(("px", "mean_levels", "psnr_db"), [(224, 0.3, 45), (64, 4.5, 28)])
def test_crops_of_photographs_are_pillow_s_bicubic_to_a_stated_tolerance(px, mean_levels, psnr_db):
    # 224: decoded in full, 64: at half or a quarter; what that does to the loss of an MAE: docs/loader.md
    from skimage import data

    apart = []
    for number, photograph in enumerate((data.chelsea(), data.coffee(), data.rocket())):
        jpeg = encoded(photograph)
        image = open_image(jpeg, channels=3)
        for k in range(8):
            uniforms = sample_rng(0, 0, f"{number} {k}", "crop").random(22).tolist()
            box = draw_crop(image.height, image.width, scale=(0.2, 1.0), uniforms=uniforms)
            slot = slot_for(px)
            resize(*cut(image, box, target_px=px), slot)
            with Image.open(io.BytesIO(jpeg)) as whole:
                crop = whole.crop((box.left, box.top, box.left + box.width, box.top + box.height))
                theirs = np.asarray(crop.resize((px, px), Image.Resampling.BICUBIC))
            apart.append(as_image(slot).astype(float) - theirs)
    if px == 224:  # of 3.6 million values 98 % are equal, 21 more than one level apart, one of them 4
        assert np.abs(apart).max() <= 4
        assert (np.abs(apart) > 1).mean() < 1e-4
    assert np.abs(apart).mean() < mean_levels
    assert 10 * math.log10(255**2 / np.square(apart).mean()) > psnr_db


def test_a_crop_that_is_not_much_larger_than_the_target_is_decoded_in_full():
    image = open_image(encoded(photo(300, 400)), channels=3)
    box = Box(10, 20, 250, 199)
    pixels, same = cut(image, box, target_px=100)
    assert (pixels.shape, same) == ((272, 400, 3), box)  # in full, down to its bottom at 260


@pytest.mark.parametrize(("target_px", "resized_px"), [(32, 36), (224, 256), (256, 256)])
def test_an_evaluation_image_is_torchvision_s_resize_and_centre_crop(tmp_path, target_px, resized_px):
    transform = EvalTransform(ImageSettings.of_recipe(tiny_recipe(tmp_path, model__image_px=target_px)))
    for k, size in enumerate([(90, 160), (161, 73), (64, 64), (20, 31), (300, 299)]):
        data, slot = encoded(photo(*size, seed=k)), slot_for(target_px)
        transform(data, slot)
        with Image.open(io.BytesIO(data)) as image:
            theirs = tv.center_crop(tv.resize(image, resized_px, BICUBIC), [target_px, target_px])
        assert_same_levels(as_image(slot), np.asarray(theirs))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_training_image_depends_on_seed_epoch_and_key_alone(tmp_path, stage):
    def made(*, seed=5, epoch=0, key="k") -> bytes:
        random.seed(made.calls), np.random.seed(made.calls), torch.manual_seed(made.calls)
        made.calls += 1
        slot = slot_for(32)
        TrainTransform(TrainSettings.of_stage(tiny_recipe(tmp_path, seed=seed), stage))(
            data, slot, epoch=epoch, key=key
        )
        return as_image(slot).tobytes()

    made.calls = 0
    data = encoded(photo(90, 120))
    assert made() == made()
    assert len({made(), made(seed=6), made(epoch=1), made(key="l")}) == 4


SMALL_TO_LARGE = [(28, 28), (40, 33), (300, 200), (31, 90), (129, 127)]


@pytest.mark.parametrize(
    "sizes", [SMALL_TO_LARGE, SMALL_TO_LARGE[:2], SMALL_TO_LARGE[:1]], ids=["large among them", "small", "one"]
)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_several_images_become_what_each_becomes_by_itself(tmp_path, sizes, format):
    images = [encoded(photo(*size, seed=k), format) for k, size in enumerate(sizes)]
    keys = [f"k{k}" for k in range(len(images))]
    train = TrainTransform(TrainSettings.of_stage(tiny_recipe(tmp_path), "finetune"))
    evaluation = EvalTransform(ImageSettings.of_recipe(tiny_recipe(tmp_path)))
    slots, crops = (torch.zeros((len(images), *n, 32, 32, 3), dtype=torch.uint8).movedim(-1, -3) for n in ((), (5,)))
    train.all(images, slots, epoch=3, keys=keys)
    evaluation.all(images, crops)
    for k, data in enumerate(images):
        slot, five = torch.empty_like(slots[k]), torch.empty_like(crops[k])
        train(data, slot, epoch=3, key=keys[k])
        evaluation.crops(data, five)
        assert torch.equal(slots[k], slot)
        assert torch.equal(crops[k], five)
    assert len({slot.numpy().tobytes() for slot in slots}) == len(images)


@pytest.mark.parametrize("format", ["WEBP", "PNG", "JPEG"])
def test_of_large_images_one_is_open_at_a_time(tmp_path, monkeypatch, format):
    earlier, alive = [], []

    def opened(data, **options):
        alive.append(sum(reference() is not None for reference in earlier))
        image = open_image(data, **options)
        earlier.append(weakref.ref(image))
        return image

    monkeypatch.setattr(transforms, "open_image", opened)
    images = [encoded(photo(200, 150 + k, seed=k), format) for k in range(4)]
    slots = torch.zeros((4, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    train = TrainTransform(TrainSettings.of_stage(tiny_recipe(tmp_path), "finetune"))
    train.all(images, slots, epoch=0, keys=list("abcd"))
    EvalTransform(ImageSettings.of_recipe(tiny_recipe(tmp_path))).all(images, slots[:, None])
    assert alive == [0] * 8


def test_global_generators_are_left_as_they_were(tmp_path):
    transform = TrainTransform(TrainSettings.of_stage(tiny_recipe(tmp_path), "finetune"))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    for k in range(10):
        transform(encoded(photo(50, 60)), slot_for(32), epoch=0, key=f"k{k}")
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


def test_channels_that_no_image_has_are_refused(tmp_path):
    norm = {"data__mean": [0.5] * 4, "data__std": [0.5] * 4}
    with pytest.raises(UsageError, match="channels is 4"):
        ImageSettings.of_recipe(tiny_recipe(tmp_path, model__channels=4, **norm))
