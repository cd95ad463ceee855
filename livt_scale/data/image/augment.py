"""RandAugment and random erasing of one image in its place in the batch; every number drawn from the sample's seeds.

    operations = make_augment("rand-m9-mstd0.5-inc1", image_px=224, mean=mean)
    augment(slot, operations, sample_rng(seed, epoch, key, "augment"))      # slot: uint8 [C, T, T], in place

The operations, their strengths and the way they are drawn are timm's, so the papers' recipes have the same meaning
here. Shearing and shifting take four fifths of timm's time, since Pillow moves every pixel by a general 2-D
filter; along one axis it is a filter of four pixels, and is done so here: the same pixels to within 1 of 255 levels
in a fifth of the time. Colours change on the array itself, to the bit as Pillow does it (colour_ops.py).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from livt_scale.data.image.colour_ops import COLOURS
from livt_scale.data.seeds import python_rng_from
from livt_scale.util.errors import UsageError

if TYPE_CHECKING:
    from timm.data.auto_augment import AugmentOp, RandAugment

ERASE_TRIES = 10  # timm's
ERASE_AREA = (0.02, 1 / 3)  # share of the image, timm's RandomErasing as MAE's fine-tuning calls it
ERASE_ASPECT = (0.3, 1 / 0.3)
_DRAWS = np.random.RandomState(0)  # reseeded before each draw: creating one takes 110 µs, seeding 2


def make_augment(notation: str, *, image_px: int, mean: tuple[float, ...]) -> RandAugment:
    """timm's RandAugment, as `timm.data.create_transform` sets it up for MAE's fine-tuning. Raises UsageError."""
    from timm.data.auto_augment import rand_augment_transform  # slow to import, and pretraining needs none

    fill = tuple(min(255, round(255 * m)) for m in mean)  # for what turns or shears into the picture from outside
    settings = {
        "translate_const": int(image_px * 0.45),
        "img_mean": fill if len(fill) > 1 else fill[0],
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        return rand_augment_transform(notation, settings)
    except (AssertionError, ValueError, KeyError) as error:
        raise UsageError(
            f"rand_augment is {notation!r}, not timm's notation ({str(error) or type(error).__name__})",
            remedy="the papers take rand-m9-mstd0.5-inc1",
        ) from error


def augment(slot: Tensor, operations: RandAugment, rng: np.random.Generator) -> None:
    """Apply `operations` to `slot` [C, T, T] in place.

    What `operations(image)` draws and does, without its detours: NumPy's global generator is left alone, and nothing
    is turned into an image and back for an operation that is drawn but not applied, which is every second.
    """
    python_seed, numpy_seed = rng.integers(0, 2**32, size=2).tolist()
    weights = operations.choice_weights
    _DRAWS.seed(numpy_seed)
    drawn = _DRAWS.choice(len(operations.ops), operations.num_layers, replace=weights is None, p=weights)
    pixels = slot.permute(1, 2, 0).numpy()  # a view [T, T, C]
    changed = pixels
    with python_rng_from(python_seed):
        for number in drawn.tolist():
            changed = _apply(operations.ops[number], changed)
    if changed is not pixels:
        pixels[:] = changed


def _apply(operation: AugmentOp, pixels: np.ndarray) -> np.ndarray:
    """AugmentOp.__call__ on pixels [T, T, C]: returns them unchanged if the draw says so."""
    if operation.prob < 1 and random.random() > operation.prob:
        return pixels
    magnitude = operation.magnitude
    if operation.magnitude_std == math.inf:
        magnitude = random.uniform(0, magnitude)
    elif operation.magnitude_std > 0:
        magnitude = random.gauss(magnitude, operation.magnitude_std)
    magnitude = max(0.0, min(magnitude, operation.magnitude_max or 10))
    level: tuple[Any, ...] = operation.level_fn(magnitude, operation.hparams) if operation.level_fn else ()
    if (move := MOVES.get(operation.name)) is not None:
        return move(pixels, level[0], np.array(operation.kwargs["fillcolor"], dtype=np.uint8))
    if (colour := COLOURS.get(operation.name)) is not None:
        return colour(pixels, *level)
    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    return np.asarray(operation.aug_fn(image, *level, **operation.kwargs)).reshape(pixels.shape)


def _moved(pixels: np.ndarray, moved_px: np.ndarray, fill: np.ndarray, *, axis: int) -> np.ndarray:
    """[H, W, C]: with `axis` 1 pixel (y, x) is that at (y, x + moved_px[y]), with 0 that at (y + moved_px[x], x).

    Cubic (a = −1) between four pixels, `fill` from outside. Lines that move by the same whole number are copied as
    one; then a filter of four taps does the fractions of all.
    """
    if axis == 0:  # the same on views with the axes exchanged: the memory stays in its order
        return _moved(pixels.transpose(1, 0, 2), moved_px, fill, axis=1).transpose(1, 0, 2)
    width = pixels.shape[1]
    whole = np.floor(moved_px).astype(np.int64)
    padded = _like(pixels, width + 4)  # beyond an edge, the pixel of the edge
    padded[:, 2:-2] = pixels
    padded[:, :2], padded[:, -2:] = pixels[:, :1], pixels[:, -1:]
    taps = _like(pixels, width + 3)  # [y, x + k]: the k-th pixel that (y, x) needs
    for first, last in _runs(whole):
        move = int(whole[first]) + 1
        left, right = max(0, -move), min(width + 3, width + 4 - move)
        if left < right:  # else all of these lines are outside
            taps[first:last, left:right] = padded[first:last, left + move : right + move]
    moved = _four_taps(taps, (moved_px - whole).astype(np.float32))
    _fill_outside(moved, moved_px, fill)
    return moved


def _fill_outside(moved: np.ndarray, moved_px: np.ndarray, fill: np.ndarray) -> None:
    """Pixel x of line k comes from x + 1/2 + moved_px[k]: what is not within [0, W) becomes `fill`."""
    width = moved.shape[1]
    lefts = np.ceil(-0.5 - moved_px).clip(0, width).astype(np.int64)
    rights = np.ceil(width - 0.5 - moved_px).clip(0, width).astype(np.int64)
    line = np.tile(fill, (width, 1))  # a row to copy from: spreading three bytes at a time takes twice as long
    for first, last in _runs(lefts * (width + 1) + rights):
        left, right = int(lefts[first]), int(rights[first])
        if left:
            moved[first:last, :left] = line[:left]
        if right < width:
            moved[first:last, right:] = line[right:]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """(first, past the last) of each run of equal neighbours."""
    starts = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()]
    return zip(starts, [*starts[1:], len(values)], strict=True)


def _like(pixels: np.ndarray, width: int) -> np.ndarray:
    """An empty [H, width, C] whose memory has the order of `pixels` [H, W, C], by rows or by columns."""
    height, _, channels = pixels.shape
    if pixels.strides[0] >= pixels.strides[1]:
        return np.empty((height, width, channels), dtype=np.uint8)
    return np.empty((width, height, channels), dtype=np.uint8).transpose(1, 0, 2)


def _four_taps(taps: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """[H, W + 3, C] -> uint8 [H, W, C]. `fraction` [H]: distance of the pixel from the second tap."""
    width = taps.shape[1] - 3
    d = torch.from_numpy(fraction)[:, None, None]
    if taps.strides[0] < taps.strides[1]:  # by columns: weights that run along the memory, else it takes four times
        d = d.repeat(1, 1, taps.shape[2])
    floats = torch.from_numpy(taps).float()
    weights = (((2 - d) * d - 1) * d, (d - 2) * d * d + 1, ((1 - d) * d + 1) * d, (d - 1) * d * d)
    total = floats[:, :width] * weights[0]
    for k in (1, 2, 3):
        total.addcmul_(floats[:, k : k + width], weights[k])
    total.add_(1e-3).clamp_(0, 255)  # Pillow truncates: 1e-3 protects float sums that should be integers
    moved = _like(taps, width)
    np.copyto(moved, total.numpy(), casting="unsafe")  # five times faster than torch's cast
    return moved


_Move = Callable[[np.ndarray, float, np.ndarray], np.ndarray]


def _shear(axis: int) -> _Move:
    """Line k moves by factor · (k + 1/2) pixels."""

    def move(pixels: np.ndarray, factor: float, fill: np.ndarray) -> np.ndarray:
        return _moved(pixels, factor * (np.arange(pixels.shape[1 - axis]) + 0.5), fill, axis=axis)

    return move


def _shift(axis: int, *, relative: bool) -> _Move:
    def move(pixels: np.ndarray, by: float, fill: np.ndarray) -> np.ndarray:
        pixels_by = by * pixels.shape[axis] if relative else by
        return _moved(pixels, np.full(pixels.shape[1 - axis], float(pixels_by)), fill, axis=axis)

    return move


MOVES: dict[str, _Move] = {
    "ShearX": _shear(1),
    "ShearY": _shear(0),
    "TranslateX": _shift(1, relative=False),
    "TranslateY": _shift(0, relative=False),
    "TranslateXRel": _shift(1, relative=True),
    "TranslateYRel": _shift(0, relative=True),
}


def erase(slot: Tensor, rng: np.random.Generator, *, share: float, noise: np.ndarray) -> None:
    """Random erasing (Zhong et al. 2017), in a `share` of images a rectangle becomes noise; in place.

    timm's rule and ranges. timm adds N(0, 1) to normalised floats; here the same noise is put back into pixels, that is
    multiplied by the deviation, added to the mean and cut off at 0 and 255 (about 1.7 deviations on ImageNet-LT).
    `noise`: from `erasing_noise`.
    """
    if rng.random() >= share:
        return
    channels, height, width = slot.shape
    for _ in range(ERASE_TRIES):
        area = height * width * rng.uniform(*ERASE_AREA)
        aspect = math.exp(rng.uniform(math.log(ERASE_ASPECT[0]), math.log(ERASE_ASPECT[1])))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            drawn = np.frombuffer(rng.bytes(2 * channels * h * w), dtype="<u2").reshape(channels, h, w)
            for place, levels, words in zip(slot.numpy(), noise, drawn, strict=True):
                place[top : top + h, left : left + w] = levels[words]
            return


def erasing_noise(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """uint8 [C, 65536]: a uniform 16-bit number to a level of N(mean, std), by the inverse of its distribution.

    Drawing a normal number for each value and rounding it takes six times as long.
    """
    uniforms = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    normal = torch.special.ndtri(uniforms).numpy()
    levels = 255 * (np.outer(std, normal) + np.array(mean)[:, None])
    return np.rint(levels).clip(0, 255).astype(np.uint8)
