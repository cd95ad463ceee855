"""Photographs without a download: crops of the 15 that scikit-image and scikit-learn bring along.

    python scripts/photographs.py build/photographs        # training/CLASS/NNN.png and evaluation/CLASS/NNN.png
    livt shards build shards/photographs-lt.yaml           # a long tail of them

A class is a quarter of a photograph. Crops for training lie in the left three fifths of it, those for evaluation in the
rest, so no pixel is in both: a network has to know the place, not the crop.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 64  # px of a crop
FOR_TRAINING, FOR_EVALUATION = 300, 20  # crops of a class
OF_SKIMAGE = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "retina", "rocket",
)  # fmt: skip
OF_SKLEARN = ("china", "flower")
Pixels = NDArray[np.uint8]


def photographs() -> dict[str, Pixels]:
    """uint8 [H, W, 3] by name."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    found = {name: getattr(data, name)() for name in OF_SKIMAGE}
    found |= {name: load_sample_image(f"{name}.jpg") for name in OF_SKLEARN}
    return {name: photo if photo.ndim == 3 else np.stack([photo] * 3, axis=-1) for name, photo in found.items()}


def quarters(photo: Pixels) -> list[Pixels]:
    """Top left, top right, bottom left, bottom right."""
    rows, columns = (side // 2 for side in photo.shape[:2])
    return [photo[y : y + rows, x : x + columns] for y in (0, rows) for x in (0, columns)]


def parts(quarter: Pixels) -> tuple[Pixels, Pixels]:
    """(for training, for evaluation), side by side."""
    cut = quarter.shape[1] * 3 // 5
    return quarter[:, :cut], quarter[:, cut:]


def crops(part: Pixels, count: int, *, rng: np.random.Generator) -> list[Pixels]:
    """`count` crops of SIDE x SIDE, no two at the same place."""
    height, width = (side - SIDE + 1 for side in part.shape[:2])
    chosen = rng.choice(height * width, size=count, replace=False)
    corners = zip(*np.unravel_index(chosen, (height, width)), strict=True)
    return [part[top : top + SIDE, left : left + SIDE] for top, left in corners]


def write(out: Path, *, seed: int = 0) -> int:
    """Below `out`, which must not exist; how many classes."""
    out.mkdir(parents=True)
    regions = [(name, photo, k) for k in range(4) for name, photo in photographs().items()]
    for number, (name, photo, k) in enumerate(regions):  # the head of the tail has the first quarter of each
        rng = np.random.default_rng([seed, number])
        both = zip(("training", "evaluation"), parts(quarters(photo)[k]), (FOR_TRAINING, FOR_EVALUATION), strict=True)
        for folder, part, count in both:
            place = out / folder / f"{number:02}-{name}-{k}"
            place.mkdir(parents=True)
            for i, crop in enumerate(crops(part, count, rng=rng)):
                Image.fromarray(crop).save(place / f"{i:03}.png")
    return len(regions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists: remove it first, or give another folder")
    print(f"{options.out}: {write(options.out, seed=options.seed)} classes")
