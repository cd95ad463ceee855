"""Mixup and cutmix of neighbours: slots 2k and 2k + 1 of the global batch are mixed with each other, both ways.

    pair (a, b), mixup with λ = 0.7     a' = 0.7 a + 0.3 b      b' = 0.7 b + 0.3 a      targets likewise
    pair (a, b), cutmix with a box      a' = a, but b inside the box; b' = b, but a inside; λ = 1 − box / image

The parameters are drawn from (seed, epoch, key of the sample in slot 2k), so they do not depend on how the global
batch is spread over ranks; timm's Mixup ("pair" mode) draws them from NumPy's global state. The mixing itself runs
on the device. Mixup: arXiv 1710.09412. Cutmix: arXiv 1905.04899; its box as in timm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from livt_scale.config.recipe import Finetune
from livt_scale.data.seeds import sample_rng


@dataclass
class Mix:
    """How each pair (2k, 2k + 1) of a batch of B images is mixed."""

    lam: Tensor  # float32 [B / 2] the share of an image's own target
    box: Tensor  # int64 [B / 2, 4] top, bottom, left, right of the exchanged box; all 0: mixup


def draw_mix(
    part: Finetune, first_keys: list[str], *, seed: int, epoch: int, image_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """(lam float32 [pairs], box int64 [pairs, 4]) for the pairs whose even slots hold `first_keys`.

    With both mixup and cutmix in the recipe, each pair gets either with probability one half (timm's switch_prob).
    """
    lam = np.ones(len(first_keys), dtype=np.float32)
    box = np.zeros((len(first_keys), 4), dtype=np.int64)
    for k, key in enumerate(first_keys):
        rng = sample_rng(seed, epoch, key, "mix")
        cuts = part.cutmix > 0 and (part.mixup == 0 or rng.random() < 0.5)
        lam[k] = rng.beta(part.cutmix, part.cutmix) if cuts else rng.beta(part.mixup, part.mixup)
        if cuts:
            box[k] = _draw_box(float(lam[k]), image_px, rng)
            lam[k] = 1 - (box[k, 1] - box[k, 0]) * (box[k, 3] - box[k, 2]) / image_px**2
            if lam[k] == 1:  # an empty box at the border exchanges nothing: one representation only
                box[k] = 0
    return lam, box


def apply_mix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Mix normalised `images` [B, C, H, W] and soft `targets` [B, classes], on their device; new tensors."""
    assert len(images) == len(targets) == 2 * len(mix.lam), (images.shape, targets.shape, mix.lam.shape)
    is_cut = (mix.box != 0).any(dim=1)  # [pairs]
    inside = _inside(mix.box, images.shape[2], images.shape[3])  # [pairs, H, W]
    own = torch.where(is_cut[:, None, None], (~inside).to(mix.lam.dtype), mix.lam[:, None, None])
    return _both_ways(images, own[:, None]), _both_ways(targets, mix.lam[:, None])


def _both_ways(values: Tensor, own: Tensor) -> Tensor:
    """Pairs (a, b) of `values` [B, …] to (own·a + (1 − own)·b, own·b + (1 − own)·a), in their places."""
    a, b = values[0::2], values[1::2]
    own = own.to(values.dtype)
    # [pairs, 2, …] -> [B, …]; lerp gives an end exactly where `own` is 0 or 1
    return torch.stack((torch.lerp(b, a, own), torch.lerp(a, b, own)), dim=1).flatten(0, 1)


def _inside(box: Tensor, height: int, width: int) -> Tensor:
    top, bottom, left, right = box.T[:, :, None]  # each [pairs, 1]
    rows = torch.arange(height, device=box.device)
    columns = torch.arange(width, device=box.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows[:, :, None] & in_columns[:, None, :]


def _draw_box(lam: float, image_px: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box of side √(1 − λ) of the image's around a uniform centre, cut off at the border (timm's rand_bbox)."""
    half = int(image_px * math.sqrt(1 - lam)) // 2
    y, x = rng.integers(0, image_px, size=2).tolist()
    low, high = (lambda c: max(c - half, 0)), (lambda c: min(c + half, image_px))
    return low(y), high(y), low(x), high(x)
