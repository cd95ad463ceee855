"""timm's operations for timm's draws; what is done faster is the same to within one level; erasing as timm does it."""

from __future__ import annotations

import copy
import random
from functools import partial

import numpy as np
import pytest
import scipy
import torch
from PIL import Image

from livt_scale.data.image.augment import MOVES, augment, erase, erasing_noise, make_augment
from livt_scale.data.image.colour_ops import COLOURS
from livt_scale.data.seeds import sample_rng
from livt_scale.util.errors import UsageError
from tests.data.tiny_sets import photo

NOTATION = "rand-m9-mstd0.5-inc1"


def slot_of(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def as_image(slot: torch.Tensor) -> np.ndarray:
    return slot.permute(1, 2, 0).numpy()


def timm_s(operations, pixels: np.ndarray, key: str) -> np.ndarray:
    """`operations` as timm calls them, its global generators seeded as the sample says."""
    python_seed, numpy_seed = sample_rng(0, 0, key, "augment").integers(0, 2**32, size=2).tolist()
    random.seed(python_seed), np.random.seed(numpy_seed)
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    return np.asarray(operations(image)).reshape(pixels.shape)


def with_our_moves(operations):
    """timm's, but for shears and shifts, which are ours: those are not timm's to the bit."""
    theirs = copy.deepcopy(operations)
    for operation in theirs.ops:
        if operation.name in MOVES:
            operation.aug_fn = partial(moved, MOVES[operation.name])
    return theirs


def moved(move, image: Image.Image, by: float, *, fillcolor, **_) -> Image.Image:
    pixels = np.atleast_3d(np.asarray(image))
    return Image.fromarray(move(pixels, by, np.array(fillcolor, dtype=np.uint8)).squeeze())


@pytest.mark.parametrize("channels", [1, 3])
def test_draws_and_operations_are_timm_s_for_the_same_seeds(channels):
    operations = make_augment(NOTATION, image_px=32, mean=(0.5,) * channels)
    pixels, changed = photo(32, 32)[:, :, :channels], 0
    for k in range(40):  # enough to meet every operation
        slot = slot_of(pixels)
        augment(slot, operations, sample_rng(0, 0, f"k{k}", "augment"))
        np.testing.assert_array_equal(as_image(slot), timm_s(with_our_moves(operations), pixels, f"k{k}"))
        changed += not np.array_equal(as_image(slot), pixels)
    assert changed > 15


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(MOVES))
def test_shears_and_shifts_are_timm_s_to_within_one_level(name, channels):
    from timm.data.auto_augment import AugmentOp

    fill = (10, 200, 90)[:channels]
    options = {"translate_const": 20, "img_mean": fill if channels == 3 else fill[0]}
    theirs = AugmentOp(name, prob=1, hparams=options | {"interpolation": Image.Resampling.BICUBIC})
    for height, width in ((48, 48), (31, 57), (1, 1), (3, 2)):
        pixels = photo(height, width, seed=height)[:, :, :channels]
        image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
        for by in (-0.3, -0.013, 0.0, 0.111, 0.3, 2.5) if not name.endswith(("eX", "eY")) else (-19.3, 0.5, 7.0, 60.0):
            ours = MOVES[name](pixels, by, np.array(fill, dtype=np.uint8))
            expected = np.asarray(theirs.aug_fn(image, by, **theirs.kwargs)).reshape(pixels.shape)
            apart = np.abs(ours.astype(int) - expected)
            assert apart.max() <= 1, (height, width, by)
            assert (apart > 0).mean() < 0.02 or apart.size < 100


SOME_LEVELS = {  # of each kind of operation, as far as timm's strengths go
    "Invert": [()],
    "Posterize": [(bits,) for bits in range(1, 9)],
    "Solarize": [(level,) for level in (0, 1, 55, 128, 255, 256)],
    "SolarizeAdd": [(level,) for level in (0, 1, 55, 110, 128)],
    "": [(factor,) for factor in (0.0, 0.1, 0.37, 0.9, 1.0, 1.0001, 1.3, 1.73, 1.9)],
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(COLOURS))
def test_colour_operations_are_pillow_s_to_the_bit(name, channels):
    from timm.data.auto_augment import NAME_TO_OP

    kind = name.removesuffix("Increasing").removesuffix("Original")
    for height, width in ((48, 48), (31, 57), (1, 1), (2, 9), (9, 3)):
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for pixels in (photo(height, width, seed=height), noise):
            pixels = pixels[:, :, :channels].copy()
            image = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
            before = pixels.copy()
            for level in SOME_LEVELS.get(kind, SOME_LEVELS[""]):
                expected = np.asarray(NAME_TO_OP[name](image, *level)).reshape(pixels.shape)
                np.testing.assert_array_equal(COLOURS[name](pixels, *level), expected, err_msg=str(level))
            np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_posterizing_to_no_bits_is_black_and_not_the_end_of_the_run(channels):
    operations = make_augment("rand-m10-inc1", image_px=16, mean=(0.5,) * channels)  # strength 10: always 0 bits
    operations.ops = [op for op in operations.ops if op.name.startswith("Posterize")]
    operations.ops[0].prob = 1
    slot = slot_of(photo(16, 16)[:, :, :channels])
    augment(slot, operations, sample_rng(0, 0, "k", "augment"))
    assert not slot.any()


def test_an_image_that_nothing_is_applied_to_stays_as_it_is():
    operations = make_augment(NOTATION, image_px=16, mean=(0.5,) * 3)
    for operation in operations.ops:
        operation.prob = 0
    pixels = photo(16, 16)
    slot = slot_of(pixels)
    augment(slot, operations, sample_rng(0, 0, "k", "augment"))
    np.testing.assert_array_equal(as_image(slot), pixels)


def test_erasing_fills_a_rectangle_in_its_share_of_images():
    mean, std, erased = (0.4, 0.5, 0.6), (0.2, 0.1, 0.15), []
    noise = erasing_noise(mean, std)
    for k in range(400):
        slot = slot_of(np.zeros((64, 64, 3), dtype=np.uint8))
        slot.fill_(7)
        erase(slot, sample_rng(0, 0, f"k{k}", "erase"), share=0.25, noise=noise)
        changed = (as_image(slot) != 7).any(axis=2)
        if changed.any():
            rows, columns = changed.any(axis=1).nonzero()[0], changed.any(axis=0).nonzero()[0]
            inside = as_image(slot)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (inside != 7).any(axis=2).mean() > 0.99
            erased.append((changed.mean(), inside.reshape(-1, 3) / 255))
    assert 70 < len(erased) < 130
    areas = [area for area, _ in erased]
    assert 0.015 < min(areas) < 0.06
    assert 0.28 < max(areas) < 0.35
    drawn = np.concatenate([pixels for _, pixels in erased])
    np.testing.assert_allclose(drawn.mean(axis=0), mean, atol=0.02)
    np.testing.assert_allclose(drawn.std(axis=0), std, atol=0.02)


def test_erasing_noise_has_the_levels_of_rounded_normal_numbers():
    mean, std = 0.45, 0.22
    counted = np.bincount(erasing_noise((mean,), (std,))[0], minlength=256) / 65536
    edges = (np.arange(1, 256) - 0.5) / 255
    exact = np.diff(scipy.stats.norm(mean, std).cdf(edges), prepend=0, append=1)  # all beyond an end is at it
    assert np.abs(counted - exact).max() <= 1 / 65536


def test_no_share_erases_nothing():
    slot = slot_of(np.zeros((16, 16, 3), dtype=np.uint8))
    erase(slot, sample_rng(0, 0, "k", "erase"), share=0.0, noise=erasing_noise((0.5,) * 3, (0.5,) * 3))
    assert not slot.any()


@pytest.mark.parametrize("notation", ["augmix-m3", "rand-x9"])
def test_a_wrong_notation_is_named(notation):
    with pytest.raises(UsageError, match="not timm's notation"):
        make_augment(notation, image_px=32, mean=(0.5,))
