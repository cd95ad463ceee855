"""Crop, flip and augment one sample; every number it draws comes from (seed, epoch, key).

    transform = TrainTransform(TrainSettings.of_stage(recipe, "pretrain"))
    transform(jpeg_bytes, slot, epoch=3, key="img-12")     # slot: uint8 [C, T, T], a place in the batch, is filled
    transform.all(several, slots, epoch=3, keys=keys)      # the same for several images, in less time if they are small

Pixels stay uint8 from the decoder to the device: a quarter of the bytes of floats, and `F.interpolate` has vector code
for uint8 in channels-last order that is several times faster than Pillow's (benchmarks/loader.py). The geometry is
torchvision's RandomResizedCrop, Resize and CenterCrop; the augmentation timm's RandAugment; so the papers' recipes
have the same meaning here. Two deviations, both documented in the code: large crops are decoded at half, quarter or
eighth size, and random erasing draws its noise in the range of a pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from livt_scale.config.recipe import Finetune
from livt_scale.data.image.augment import augment, erase, erasing_noise, make_augment
from livt_scale.data.image.decode import SHRINKS, EncodedImage, Pixels, Workspace, open_image
from livt_scale.data.seeds import sample_rng
from livt_scale.data.settings import ImageSettings, TrainSettings

ASPECT = (3 / 4, 4 / 3)  # width / height of a crop, torchvision's default and both papers'
CROP_TRIES = 10  # torchvision's
EVAL_CROP = 0.875  # share of the resized shorter side that the centre crop takes, up to EVAL_CROP_UP_TO_PX
EVAL_CROP_UP_TO_PX = 224
TOGETHER = 16  # images that a loader gives to `all`: more gain little
SMALL_PX = 128 * 128  # those of at most as many pixels go through each step together
MAX_ELONGATED = 16  # longer side / shorter side up to which the evaluation resizes the full image


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an image: rows [top, top + height), columns [left, left + width)."""

    top: int
    left: int
    height: int
    width: int


class TrainTransform:
    """What happens to a training image: random resized crop, flip, and in fine-tuning RandAugment and erasing."""

    def __init__(self, settings: TrainSettings) -> None:
        part, data = settings.part, settings.data
        finetune = part if isinstance(part, Finetune) else None
        self._seed = settings.seed
        self._workspace = Workspace()
        self._channels = settings.channels
        self._scale, self._rule = part.crop_scale, part.crop_rule
        self._flip = part.flip
        self._interpolation = data.interpolation
        self._erasing = finetune.random_erasing if finetune else 0.0
        self._noise = erasing_noise(data.mean, data.std)
        self._augment = (
            make_augment(finetune.rand_augment, image_px=settings.image_px, mean=data.mean)
            if finetune and finetune.rand_augment
            else None
        )

    def __call__(self, data: bytes, slot: torch.Tensor, *, epoch: int, key: str) -> None:
        """Fill `slot`, uint8 [C, T, T] in channels-last order. Raises BadImage."""
        self.all([data], slot[None], epoch=epoch, keys=[key])

    def all(self, images: Sequence[bytes], slots: torch.Tensor, *, epoch: int, keys: Sequence[str]) -> None:
        """Fill `slots`, uint8 [n, C, T, T], each in channels-last order, as one by one. Raises BadImage."""
        uniforms = [sample_rng(self._seed, epoch, key, "crop").random(2 * CROP_TRIES + 3).tolist() for key in keys]
        places = slots.unbind()
        for together in _opened(images, channels=self._channels):
            workspace = self._workspace if len(together) == 1 else None
            parts = {k: self._part(image, uniforms[k][1:], slots.shape[-1], workspace) for k, image in together}
            for k, (pixels, box) in parts.items():
                resize(pixels, box, places[k], interpolation=self._interpolation)
        for place, drawn in zip(places, uniforms, strict=True):
            if self._flip and drawn[0] < 0.5:
                place.copy_(place[None].flip(-1)[0])
        for place, key in zip(places, keys, strict=True):
            if self._augment is not None:
                augment(place, self._augment, sample_rng(self._seed, epoch, key, "augment"))
            if self._erasing:
                erase(place, sample_rng(self._seed, epoch, key, "erase"), share=self._erasing, noise=self._noise)

    def _part(
        self, image: EncodedImage, uniforms: list[float], target_px: int, workspace: Workspace | None
    ) -> tuple[Pixels, Box]:
        box = draw_crop(image.height, image.width, scale=self._scale, uniforms=uniforms, rule=self._rule)
        return cut(image, box, target_px=target_px, workspace=workspace)


class EvalTransform:
    """What happens to an evaluation image: the shorter side to T / `crop_pct`, centre crop to T."""

    def __init__(self, settings: ImageSettings) -> None:
        self._workspace = Workspace()
        self._channels = settings.channels
        data = settings.data
        self._interpolation = data.interpolation
        self._resized_px = int(settings.image_px / eval_crop(settings.image_px, crop_pct=data.crop_pct))

    def __call__(self, data: bytes, slot: torch.Tensor) -> None:
        """Fill `slot`, uint8 [C, T, T]. Raises BadImage."""
        self.crops(data, slot[None])

    def crops(self, data: bytes, slots: torch.Tensor) -> None:
        """Fill `slots`, uint8 [n, C, T, T]: the centre crop; with n = 5 then the corners of the resized image too, left
        before right, top before bottom. Raises BadImage."""
        self.all([data], slots[None])

    def all(self, images: Sequence[bytes], slots: torch.Tensor) -> None:
        """`crops` of several images: fill `slots`, uint8 [images, n, C, T, T]. Raises BadImage."""
        for together in _opened(images, channels=self._channels):
            workspace = self._workspace if len(together) == 1 else None
            decoded = {k: image.pixels(workspace=workspace) for k, image in together}
            for k, pixels in decoded.items():
                self.crops_of(pixels, slots[k])

    def crops_of(self, pixels: Pixels, slots: torch.Tensor) -> None:
        """`crops` of an image that is decoded, uint8 [H, W, C]."""
        pixels = _centre(pixels)
        height, width = _shorter_side_to(pixels.shape[0], pixels.shape[1], self._resized_px)
        resized = _channels_last(height, width, self._channels)
        resize(pixels, Box(0, 0, pixels.shape[0], pixels.shape[1]), resized, interpolation=self._interpolation)
        px = slots.shape[-1]  # torchvision's CenterCrop rounds half to even, so do we
        centre = round((height - px) / 2), round((width - px) / 2)
        corners = [(top, left) for top in (0, height - px) for left in (0, width - px)]
        for slot, (top, left) in zip(slots, [centre, *corners], strict=False):
            slot.copy_(resized[:, top : top + px, left : left + px])


def _opened(images: Sequence[bytes], *, channels: int) -> Iterator[list[tuple[int, EncodedImage]]]:
    """(number, image) of those that go through each step together: every large one alone, then all small ones.

    A step that comes again finds its code and its branches in the processor's caches: images of 28 px take half of the
    time in groups of 16 (benchmarks/small_images.py). Large ones gain nothing, and an open one has memory for its
    pixels (Pillow's WebP), so only one is open at a time.
    """
    small: list[tuple[int, EncodedImage]] = []
    for k, data in enumerate(images):
        alone = [(k, open_image(data, channels=channels))]
        if alone[0][1].height * alone[0][1].width <= SMALL_PX:
            small += alone
        else:
            yield alone
        alone.clear()
    if small:
        yield small


def eval_crop(image_px: int, *, crop_pct: float | None) -> float:
    """Share of the resized shorter side that evaluation crops; `crop_pct` None: 0.875 up to 224 px, else 1."""
    if crop_pct is not None:
        return crop_pct
    return EVAL_CROP if image_px <= EVAL_CROP_UP_TO_PX else 1.0


def draw_crop(
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    uniforms: list[float],
    rule: Literal["torchvision", "mae"] = "torchvision",
) -> Box:
    """A random resized crop from 22 uniforms: (area, aspect) for ten tries, then top and left.

    An area from U(scale) and an aspect from exp(U(log 3/4, log 4/3)). `torchvision`: drawn again until the box fits;
    after ten tries the largest centre crop whose aspect is in that range (RandomResizedCrop.get_params). `mae`: drawn
    once, each side at most the image's (util/crop.py of MAE's public code, after BYOL's).
    """
    log_aspect = math.log(ASPECT[0]), math.log(ASPECT[1])
    for k in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * uniforms[2 * k])
        aspect = math.exp(log_aspect[0] + (log_aspect[1] - log_aspect[0]) * uniforms[2 * k + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rule == "mae":
            w, h = min(max(w, 1), width), min(max(h, 1), height)
        if 0 < w <= width and 0 < h <= height:
            top, left = (int(u * n) for u, n in zip(uniforms[-2:], (height - h + 1, width - w + 1), strict=True))
            return Box(top, left, h, w)
    w, h = width, height
    if width / height < ASPECT[0]:
        h = round(width / ASPECT[0])
    elif width / height > ASPECT[1]:
        w = round(height * ASPECT[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def cut(image: EncodedImage, box: Box, *, target_px: int, workspace: Workspace | None = None) -> tuple[Pixels, Box]:
    """Decode what `box` needs: (pixels, the box in them).

    Where both sides of the box are at least 2, 4 or 8 times the target, a JPEG is decoded at 1/2, 1/4 or 1/8 of its
    size, which libjpeg-turbo does in a fraction of the time. The box is then rounded to pixels of that size, so an
    edge moves by at most half of one: a quarter of a percent of the crop at 224 px.
    """
    shrink = next((s for s in SHRINKS if image.shrinks and min(box.height, box.width) >= s * target_px), 1)
    pixels = image.pixels(shrink=shrink, workspace=workspace, bottom=box.top + box.height)
    if shrink == 1:
        return pixels, box
    top, left = round(box.top / shrink), round(box.left / shrink)
    bottom, right = round((box.top + box.height) / shrink), round((box.left + box.width) / shrink)
    return pixels, Box(top, left, bottom - top, right - left)


def resize(
    pixels: Pixels, box: Box, slot: torch.Tensor, *, interpolation: Literal["bicubic", "bilinear"] = "bicubic"
) -> None:
    """Fill `slot` [C, h, w] with `box` of `pixels` [H, W, C], with antialias.

    On photographs Pillow's `resize` gives the same to within 1 of 255 levels, in 6 values of a million 2 to 4 (both
    round between two passes).
    The operator that F.interpolate calls, with `out=`: written into a slot of the batch in channels-last order it
    takes 128 µs for 320 x 330 -> 224 (one core), F.interpolate and a copy 179 µs.
    """
    crop = torch.from_numpy(pixels[box.top : box.top + box.height, box.left : box.left + box.width])
    source = crop.permute(2, 0, 1)[None]  # [h, w, C] -> [1, C, h, w], a view
    if source.shape[2:] == slot.shape[1:]:
        slot.copy_(source[0])
        return
    operators = {"bicubic": torch.ops.aten._upsample_bicubic2d_aa, "bilinear": torch.ops.aten._upsample_bilinear2d_aa}
    operators[interpolation].out(source, slot.shape[1:], False, None, None, out=slot[None])


def _centre(pixels: Pixels) -> Pixels:
    """The middle of a strip: resizing all of one of 1 x 65,500 would take 13 GB. The part kept reaches far beyond the
    centre crop, whose pixels do not change except by the rounding of the longer side."""
    height, width = pixels.shape[:2]
    top, left = (max(0, (long - MAX_ELONGATED * short) // 2) for long, short in ((height, width), (width, height)))
    return pixels[top : height - top, left : width - left]


def _shorter_side_to(height: int, width: int, target_px: int) -> tuple[int, int]:
    """torchvision's Resize(int): the longer side is cut to an integer."""
    if height <= width:
        return target_px, int(target_px * width / height)
    return int(target_px * height / width), target_px


def _channels_last(height: int, width: int, channels: int) -> torch.Tensor:
    """An empty uint8 [C, H, W] whose memory is [H, W, C]."""
    return torch.empty((height, width, channels), dtype=torch.uint8).permute(2, 0, 1)
