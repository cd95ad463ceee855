"""Images a second from shards to a normalised batch: ours, what people use today, and the limit of decoding.

    python benchmarks/loader.py --json loader.json       # some minutes on two cores
    python benchmarks/loader.py --quick                  # half a minute: does it run?

Real JPEGs, about 500 x 375 px at quality 90, cut from photographs that scikit-image and scikit-learn ship, the same for
all. First MAE's transform at 224 px (random resized crop 0.2 to 1 bicubic, flip, normalise), then the fine-tuning's
(crop 0.08 to 1, RandAugment, erasing). The peers, each as its own documents show it, are in loader_peers.py; `usual` is
webdataset with Pillow and torchvision. All have the same number of loader processes and end with the same thing, a
normalised float32 batch in the main process; ours normalises there (on a GPU it would there, for free: `ours_uint8`
stops before). `ours_prepared` reads shards built with --resize-shorter 256 --quality 92. `decode_only` is
simplejpeg.decode_jpeg of each whole image in the same processes and nothing else; `decode_only_kept` the same into
memory that is kept, as ours decodes. Pipelines take turns in each round, so that a busy machine slows all; a figure is
the median of its rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from livt_scale.config.recipe import Recipe
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.build.writer import Prepare
from livt_scale.data.loader import normalise, train_batches
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet

sys.path.insert(0, str(Path(__file__).parent))  # beside this script, however it was started
from loader_peers import MEAN, PEERS, STD, Place

BATCH = 64
PREFETCH = 4
QUALITY = 90
DISTINCT = 1020  # JPEGs; more are the same again under another key
STAGES = {"pretrain": "MAE: random resized crop 0.2 to 1 bicubic, flip", "finetune": "RandAugment and erasing too"}
PACKAGES = ("torch", "torchvision", "webdataset", "pillow", "simplejpeg", "numpy", "timm")

Pipeline = Callable[[Place, str], contextlib.AbstractContextManager[Iterator[int]]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--workers", type=int, default=min(8, len(os.sched_getaffinity(0))), help="loader processes")
    parser.add_argument("--images", type=int, default=2048, help="images a round and pipeline")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="whose transform")
    parser.add_argument("--quick", action="store_true", help="few images, one round: figures without meaning")
    options = parser.parse_args(arguments)
    if options.quick:
        options.images, options.rounds = min(options.images, 256), 1
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="livt-loader-") as name:
        folder = Path(name)
        shards = make_shards(folder, num_images=64 if options.quick else 2 * DISTINCT)
        make_prepared(folder)
        for peer in PEERS.values():
            if peer.prepare and peer.is_installed:
                with _quiet():
                    peer.prepare(folder)
        tars = [str(shards.folder / shard.name) for shard in shards.manifest.shards]
        place = Place(folder, tars, workers=options.workers, batch=BATCH, prefetch=PREFETCH)
        rates = {stage: measure(place, stage, images=options.images, rounds=options.rounds) for stage in options.stages}
        result = report(rates, conditions(shards, options))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def photographs() -> list[np.ndarray]:
    """uint8 [H, W, 3] each; all come with the packages, nothing is downloaded."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    return [data.astronaut(), data.coffee(), data.chelsea(), data.rocket(), *load_sample_images().images]


def make_shards(folder: Path, *, num_images: int) -> ShardSet:
    """Cuts of the photographs as JPEGs, one class a photograph, and the shards of them."""
    rng = np.random.default_rng(0)
    photos = photographs()
    for k in range(num_images):
        file = folder / "raw" / f"photo{k % len(photos)}" / f"{k:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        if k >= DISTINCT:  # DISTINCT is a multiple of the photographs: the same class
            shutil.copy(file.with_name(f"{k - DISTINCT:05d}.jpg"), file)
            continue
        photo = Image.fromarray(photos[k % len(photos)])
        size = (500, 375) if k % 4 else (375, 500)  # as in ImageNet, most lie on their side
        share = rng.uniform(0.7, 1.0) * min(photo.width / size[0], photo.height / size[1])
        width, height = size[0] * share, size[1] * share
        left, top = rng.uniform(0, photo.width - width), rng.uniform(0, photo.height - height)
        cut = photo.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
        cut.save(file, "JPEG", quality=QUALITY)
    spec = {
        "name": "photographs",
        "sources": {"cuts": {"folder": {"root": "raw"}}},
        "sets": {"train": {"source": "cuts", "shard_samples": num_images // 16}},
    }
    (folder / "spec.yaml").write_text(json.dumps(spec))  # JSON is YAML
    build(load_spec(folder / "spec.yaml"), folder / "shards", workers=1)
    return ShardSet.open(folder / "shards" / "train")


def make_prepared(folder: Path) -> None:
    """The same shards from images made smaller once, as `livt shards build --resize-shorter 256 --quality 92` does."""
    spec = load_spec(folder / "spec.yaml", prepare=Prepare(resize_shorter=256, quality=92))
    build(spec, folder / "prepared", workers=1)


@contextlib.contextmanager
def _ours(place: Place, stage: str, *, shards: str = "shards", to_floats: bool = True) -> Iterator[Iterator[int]]:
    folder = place.folder / shards / "train"
    processes = {"workers": place.workers, "prefetch": PREFETCH}
    recipe = Recipe.model_validate(
        {
            "name": "loader",
            "data": {"train": str(folder), "mean": MEAN, "std": STD, **processes},
            "model": {"size": "vit_b", "image_px": 224},
            "stages": {name: {"global_batch": BATCH, "micro_batch": BATCH, "epochs": 10**6} for name in STAGES},
        }
    )
    start = {"rank": 0, "world_size": 1, "micro_batch": BATCH, "epoch": 0, "step": 0}
    with train_batches(ShardSet.open(folder), recipe, stage=stage, **start) as batches:
        floats = torch.empty((BATCH, 3, 224, 224))

        def sizes() -> Iterator[int]:
            for batch in batches:
                if to_floats:
                    normalise(batch.images, MEAN, STD, torch.float32, out=floats)
                yield len(batch.images)

        yield sizes()


class DecodeOnly(IterableDataset[int]):
    """simplejpeg on JPEGs that lie in memory, shared by all processes; yields a number for each batch."""

    def __init__(self, shards: ShardSet, *, kept: bool) -> None:
        super().__init__()
        self.images = [read_sample(shards, k)[0] for k in range(min(DISTINCT, shards.num_samples))]
        self.memory = np.empty(500 * 375 * 3, dtype=np.uint8) if kept else None

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        k = 0 if worker is None else worker.id * 17
        while True:
            for _ in range(BATCH):
                simplejpeg.decode_jpeg(self.images[k % len(self.images)], buffer=self.memory)
                k += 1
            yield BATCH


@contextlib.contextmanager
def _decode_only(place: Place, _: str, *, kept: bool = False) -> Iterator[Iterator[int]]:
    dataset = DecodeOnly(ShardSet.open(place.folder / "shards" / "train"), kept=kept)
    options = place.loader_options() | {"batch_size": None}
    yield iter(DataLoader(dataset, **options))


PIPELINES: dict[str, Pipeline] = {
    "ours": _ours,
    **{name: peer.pipeline for name, peer in PEERS.items()},
    "decode_only": _decode_only,
    "ours_uint8": partial(_ours, to_floats=False),
    "ours_prepared": partial(_ours, shards="prepared"),
    "decode_only_kept": partial(_decode_only, kept=True),
}


def measure(place: Place, stage: str, *, images: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each pipeline that is installed, round by round."""
    there = {name: pipe for name, pipe in PIPELINES.items() if name not in PEERS or PEERS[name].is_installed}
    rates: dict[str, list[float]] = {name: [] for name in there}
    for number in range(rounds):
        print(f"{stage}: round {number + 1} of {rounds}", file=sys.stderr)
        for name, pipeline in there.items():
            with _quiet(), pipeline(place, stage) as sizes:
                for _ in range(place.workers * PREFETCH + 2):  # prepared while nobody took it: not counted
                    next(sizes)
                done, start = 0, time.perf_counter()
                while done < images:
                    done += next(sizes)
                rates[name].append(done / (time.perf_counter() - start))
                del sizes
    return rates


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the peers print and log as they start is not part of the table."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def conditions(shards: ShardSet, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "transforms": STAGES,
        "jpegs": shards.num_samples,
        "jpeg_px": [500, 375],
        "jpeg_quality": QUALITY,
        "jpeg_bytes_mean": round(float(shards.index["data_size"].mean())),
        "workers": options.workers,
        "batch": BATCH,
        "images_a_round": options.images,
        "rounds": options.rounds,
        "quick": options.quick,
        "storage": "page cache",
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES}
        | {peer.package: version(peer.package) for peer in PEERS.values() if peer.is_installed},
    }


def report(rates: dict[str, dict[str, list[float]]], conditions: dict[str, Any]) -> dict[str, Any]:
    """The first stage's figures at the top, as scripts rely on; each stage's under its name."""
    stages = {stage: _figures(of_stage) for stage, of_stage in rates.items()}
    missing = [name for name, peer in PEERS.items() if not peer.is_installed]
    return {**next(iter(stages.values())), **stages, "not_installed": missing, "conditions": conditions}


def _figures(rates: dict[str, list[float]]) -> dict[str, Any]:
    medians = {name: statistics.median(of_round) for name, of_round in rates.items()}
    best = max((name for name in PEERS if name in medians), key=lambda name: medians[name])
    return {
        "images_per_s": {name: round(rate, 1) for name, rate in medians.items()},
        "ratio": round(medians["ours"] / medians["usual"], 3),
        "best_peer": best,
        "of_best_peer": round(medians["ours"] / medians[best], 3),
        "of_limit": round(medians["ours"] / medians["decode_only"], 3),
        "rounds": {name: [round(rate, 1) for rate in of_round] for name, of_round in rates.items()},
    }


def table(result: dict[str, Any]) -> str:
    facts = result["conditions"]
    stages = [stage for stage in STAGES if stage in result]
    lines = [
        f"{facts['jpegs']} JPEGs of 500 x 375, {facts['jpeg_bytes_mean']:,} bytes each; {facts['workers']} processes, "
        f"{facts['cores']} cores; median of {facts['rounds']} rounds of {facts['images_a_round']} images",
        "".join([f"{'images/s':<18}", *(f"{stage:>10}{'of usual':>10}" for stage in stages)]),
    ]
    for name in PIPELINES:
        rates = [(result[stage]["images_per_s"].get(name), result[stage]["images_per_s"]["usual"]) for stage in stages]
        cells = ["not installed" if rate is None else f"{rate:>10.0f}{rate / usual:>10.2f}" for rate, usual in rates]
        lines.append(f"{name:<18}" + (cells[0] if None in rates[0] else "".join(cells)))
    for stage in stages:
        one = result[stage]
        lines.append(
            f"{stage}: ours is {one['ratio']:.2f} times the usual, {one['of_best_peer']:.2f} times {one['best_peer']}, "
            f"{one['of_limit']:.0%} of decode_only"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    sys.exit(main())
