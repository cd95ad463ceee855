"""Images a second that one core decodes and crops, one by one and in groups as the loader has them: 28 px PNGs.

    python benchmarks/small_images.py --json small.json       # some seconds
    python benchmarks/small_images.py --quick

The images of the shipped set, read before the clock starts, through the quickstart's transform of pretraining. Both
sides do the same work and take turns; a figure is the median of the rounds. In a group each step goes over all images
before the next step begins, so that its code stays in the processor's caches (`livt_scale/data/image/transforms.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from livt_scale.config.load import load_recipe
from livt_scale.data.image.transforms import TOGETHER, TrainTransform
from livt_scale.data.reader import RawSample, SampleReader
from livt_scale.data.settings import TrainSettings
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.resources import shipped

RECIPE = "recipes/fashion_mnist_lt/quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few images: figures without meaning")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.rounds = 64, 1
    torch.set_num_threads(1)
    recipe = load_recipe(shipped(RECIPE))
    shards = ShardSet.open(recipe.data.train)
    with closing(SampleReader(shards)) as reader:
        samples = list(reader.read(np.arange(options.images) % shards.num_samples))
    transform = TrainTransform(TrainSettings.of_stage(recipe, "pretrain"))
    rates: dict[int, list[float]] = {1: [], TOGETHER: []}
    for _ in range(options.rounds):
        for group, found in rates.items():
            found.append(_rate(transform, samples, group=group, px=recipe.model.image_px))
    one, together = (statistics.median(rates[group]) for group in (1, TOGETHER))
    print(f"one by one            {one:>7,.0f} images/s")
    print(f"in groups of {TOGETHER:<7}  {together:>7,.0f} images/s, {together / one:.2f} times as many")
    if options.json:
        options.json.write_text(json.dumps({"one": one, "together": together, "rates": rates}, indent=1) + "\n")
    return 0


def _rate(transform: TrainTransform, samples: list[RawSample], *, group: int, px: int) -> float:
    slots = torch.empty((group, px, px, 1), dtype=torch.uint8).permute(0, 3, 1, 2)
    begun = time.perf_counter()
    for first in range(0, len(samples), group):
        part = samples[first : first + group]
        keys = [sample.key for sample in part]
        transform.all([sample.image for sample in part], slots[: len(part)], epoch=0, keys=keys)
    return len(samples) / (time.perf_counter() - begun)


if __name__ == "__main__":
    raise SystemExit(main())
