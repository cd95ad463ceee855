"""Small sets of real-looking JPEGs and PNGs of many sizes, in tars that Python's own tarfile writes."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from livt_scale.config.recipe import Recipe
from livt_scale.data.build.indexing import index_tars
from livt_scale.data.shard_set import ShardSet

HOSTILE = 'a set\'s "dir"\n$(touch x)'


def photo(height: int, width: int, *, seed: int = 0) -> np.ndarray:
    """uint8 [H, W, 3]: smooth colours with some edges, as photographs have; no two seeds alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = [np.sin(6.3 * (a * x + b * y + c)) for a, b, c in rng.uniform(0.3, 3, (3, 3))]
    pixels = 127 + 70 * np.stack(waves, axis=2)
    cy, cx, r = rng.uniform(0.1, 0.6, 3)
    pixels[(y - cy) ** 2 + (x - cx) ** 2 < r * r / 4] += rng.uniform(-50, 50, 3)
    return (pixels + rng.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def tiny_set(
    folder: Path, *, num_samples: int = 23, per_shard: int = 5, num_classes: int = 3, half: tuple[int, ...] = ()
) -> ShardSet:
    """A set in `folder` (made): JPEGs, every fourth sample a PNG; keys s000, s001 …; label = number mod classes.

    The images of the samples in `half` were cut in the middle before they came into their shard.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(num_samples)
    for first in range(0, num_samples, per_shard):
        with tarfile.open(folder / f"part-{first // per_shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(first, min(first + per_shard, num_samples)):
                pixels = photo(*rng.integers(33, 90, 2).tolist(), seed=i)
                image = ("png", encoded(pixels, "PNG")) if i % 4 == 3 else ("jpg", encoded(pixels))
                if i in half:
                    image = (image[0], image[1][: len(image[1]) // 2])
                for ending, data in (image, ("cls", str(i % num_classes).encode())):
                    member = tarfile.TarInfo(f"s{i:03d}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return index_tars(folder, workers=1)


def tiny_recipe(train: Path, **changes: Any) -> Recipe:
    """Both stages, 32 px, 3 epochs, global batch 8. `changes`: dotted with `__`, as stages__finetune__mixup=0."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "seed": 5,
        "data": {"train": str(train), "val": str(train), "workers": 0, "prefetch": 2},
        "model": {"size": "vit_micro", "image_px": 32, "patch_px": 8},
        "stages": {
            "pretrain": {"epochs": 3, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1},
            "finetune": {"epochs": 3, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1},
        },
    }
    for path, value in changes.items():
        *parents, name = path.split("__")
        part = tree
        for parent in parents:
            part = part.setdefault(parent, {})
        part[name] = value
    return Recipe.model_validate(tree)
