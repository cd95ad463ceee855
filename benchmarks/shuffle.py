"""How well an epoch is shuffled, and what that costs in bytes: our order beside those that people use.

    pip install --no-deps --target build/streaming mosaicml-streaming     # its order alone: its pins are not ours
    python benchmarks/shuffle.py --streaming build/streaming --json shuffle.json      # a minute
    python benchmarks/shuffle.py --quick                                               # does it run?

A long-tailed set as large as iNaturalist 2018 (437,513 images, 8142 classes), in shards of 1000, read by 8 nodes of one
rank with 4 loader processes, in global batches of 1024. No image is read: each pipeline gives its two first epochs as
arrays [steps, 1024]. webdataset's is `webdataset.filters.detshuffle` over the shards, dealt to nodes and processes,
then `webdataset.filters.shuffle` with a buffer in each process. mosaicml-streaming's are its own `get_partitions` and
`get_shuffle`, with its defaults. `independent` is one random order of all images: the best there is, without locality.

chi2, mixed and sorted   chi-square of a batch's class histogram over its degrees of freedom: 1 for independent draws,
                         more where classes clump. Mixed: shards as our builder writes them; sorted: class after class.
tv, mixed and sorted     the same by total variation, over that of independent draws.
distance                 of an image's places in two epochs, as a share of the epoch: 1/3 for independent orders.
retention                pairs that were neighbours in one epoch and share a batch in the next, over what chance gives.
bytes                    fetched by the 8 nodes together in an epoch, over those of the set.
twice, never             images that come twice, or not at all, in the first epoch.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import platform
import random
import sys
import types
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from webdataset import filters

from livt_scale.data.order.instance import Ints, Order
from livt_scale.longtail import class_counts_exponential

NODES, PROCESSES, SEED = 8, 4, 7
Pipeline = Callable[[int], Ints]  # epoch -> [steps, batch] sample numbers
METRICS = ("chi2_mixed", "chi2_sorted", "tv_mixed", "tv_sorted", "distance", "retention", "bytes", "twice", "never")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--samples", type=int, default=437_513)
    parser.add_argument("--classes", type=int, default=8142)
    parser.add_argument("--batch", type=int, default=1024, help="global batch, a multiple of 8")
    parser.add_argument("--shard-samples", type=int, default=1000)
    parser.add_argument("--streaming", type=Path, metavar="DIR", help="where mosaicml-streaming was installed")
    parser.add_argument("--quick", action="store_true", help="a small set: figures without meaning")
    options = parser.parse_args(arguments)
    if options.quick:
        options.samples, options.classes, options.batch, options.shard_samples = 12_000, 50, 128, 100
    shards = shard_sizes(options.samples, options.shard_samples)
    labels = long_tailed_labels(options.samples, options.classes)
    pipelines, notes = all_pipelines(shards, options.batch, options.streaming)
    figures = {name: measure(pipeline, labels, shards) for name, pipeline in pipelines.items()}
    chance = {name: figures["independent"][f"tv_{name}"] for name in ("mixed", "sorted")}
    for row in figures.values():
        row.update({f"tv_{name}": row[f"tv_{name}"] / by_chance for name, by_chance in chance.items()})
    result = {"shuffle": figures, "notes": notes, "conditions": conditions(options)}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def shard_sizes(samples: int, shard_samples: int) -> Ints:
    full, rest = divmod(samples, shard_samples)
    return np.array([shard_samples] * full + [rest] * bool(rest), dtype=np.int64)


def long_tailed_labels(samples: int, classes: int) -> Ints:
    """[samples] Class after class, the largest first; counts fall exponentially by a factor of 500 (iNaturalist's)."""
    profile = class_counts_exponential(10**6, classes, 500)
    counts = np.maximum(1, profile * samples // profile.sum())
    counts[0] += samples - counts.sum()
    return np.repeat(np.arange(classes), counts)


# --- the pipelines ---


def all_pipelines(shards: Ints, batch: int, streaming: Path | None) -> tuple[dict[str, Pipeline], list[str]]:
    pipelines: dict[str, Pipeline] = {
        "independent": lambda epoch: in_batches(np.random.default_rng(epoch).permutation(int(shards.sum())), batch),
        "ours": lambda epoch: ours(shards, batch, epoch),
        "ours, one lane group": lambda epoch: ours(shards, batch, epoch, lane_groups=1),
        "webdataset, buffer 1000": lambda epoch: webdataset(shards, batch, epoch, buffer=1000),
        "webdataset, buffer 5000": lambda epoch: webdataset(shards, batch, epoch, buffer=5000),
    }
    algorithms = mosaic_functions(streaming)
    if algorithms is None:
        return pipelines, ["mosaicml-streaming is not here (see the head of this script): its rows are left out"]
    for name in ("py1e", "py1br", "py1s"):
        pipelines[f"mosaicml-streaming, {name}"] = mosaic(algorithms, name, shards, batch)
    return pipelines, []


def ours(shards: Ints, batch: int, epoch: int, *, lane_groups: int | None = None) -> Ints:
    order = Order(shards, batch, seed=SEED, lane_groups=lane_groups)
    return np.stack([order.positions(epoch, step) for step in range(order.steps_per_epoch)])


def webdataset(shards: Ints, batch: int, epoch: int, *, buffer: int) -> Ints:
    first = np.cumsum(shards) - shards
    shuffled_shards = filters.detshuffle(bufsize=len(shards), initial=len(shards), seed=SEED, epoch=epoch - 1)
    row = list(shuffled_shards.run(iter(range(len(shards)))))
    ranks = []
    for node in range(NODES):
        processes = []
        for process in range(PROCESSES):
            mine = row[node::NODES][process::PROCESSES]
            samples = chain.from_iterable(range(first[k], first[k] + shards[k]) for k in mine)
            shuffled = filters.shuffle(buffer, rng=random.Random(f"{epoch} {node} {process}"))(samples)
            processes.append(in_batches(np.fromiter(shuffled, dtype=np.int64), batch // NODES))
        steps = min(map(len, processes))
        ranks.append(np.stack([p[:steps] for p in processes], axis=1).reshape(-1, batch // NODES))  # in turn
    steps = min(map(len, ranks))
    return np.concatenate([rank[:steps] for rank in ranks], axis=1)


def mosaic(get: types.SimpleNamespace, algorithm: str, shards: Ints, batch: int) -> Pipeline:
    nodes = 64 * NODES if algorithm == "py1s" else NODES  # canonical nodes, as StreamingDataset chooses them
    total, block = int(shards.sum()), max(4_000_000 // nodes, 1 << 18)

    def epoch_of(epoch: int) -> Ints:
        places = get.partitions("relaxed", total, nodes, NODES, 1, PROCESSES, batch // NODES)
        ids = get.shuffle(algorithm, shards, nodes, SEED, epoch, block)
        # [nodes, 1, processes, batches, batch / nodes] -> [batches, processes, nodes, …] -> [steps, batch]
        steps = places[:, 0].transpose(2, 1, 0, 3).reshape(-1, batch)
        return np.asarray(ids[steps[(steps >= 0).all(axis=1)]])

    return epoch_of


def mosaic_functions(folder: Path | None) -> types.SimpleNamespace | None:
    """Its order alone: the package itself imports clients of five clouds."""
    found = importlib.util.find_spec("streaming")
    installed = next(iter(found.submodule_search_locations or ()), None) if found else None
    root = folder / "streaming" if folder else Path(installed) if installed else None
    if root is None or not (root / "base" / "shuffle").is_dir():
        return None
    for name in ("streaming", "streaming.base"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.parent / name.replace(".", "/"))]
        sys.modules[name] = package
    shuffle = importlib.import_module("streaming.base.shuffle").get_shuffle
    partitions = importlib.import_module("streaming.base.partition").get_partitions
    return types.SimpleNamespace(shuffle=shuffle, partitions=partitions)


def in_batches(samples: Ints, batch: int) -> Ints:
    return samples[: len(samples) // batch * batch].reshape(-1, batch)


# --- the figures ---


def measure(pipeline: Pipeline, labels: Ints, shards: Ints) -> dict[str, float]:
    one, two = pipeline(0), pipeline(1)
    mixed = np.random.default_rng(0).permutation(labels)
    figures = {}
    for name, layout in (("mixed", mixed), ("sorted", labels)):
        figures[f"chi2_{name}"], figures[f"tv_{name}"] = clumping(layout[one], layout)
    total = int(shards.sum())
    steps = np.full((2, total), -1, dtype=np.int64)
    for places, epoch in zip(steps, (one, two), strict=True):
        places[epoch] = np.arange(len(epoch))[:, None]
    both = (steps >= 0).all(axis=0)
    figures["distance"] = float(np.abs(steps[0, both] / len(one) - steps[1, both] / len(two)).mean())
    left, right = steps[1, one[:, :-1]], steps[1, one[:, 1:]]
    known = (left >= 0) & (right >= 0)
    figures["retention"] = float((left == right)[known].mean() * two.size / (one.shape[1] - 1))
    figures["bytes"] = read_by_nodes(one, shards) / total
    different = np.unique(one).size
    figures["twice"], figures["never"] = one.size - different, total - different
    return figures


def clumping(seen: Ints, labels: Ints) -> tuple[float, float]:
    """(mean chi-square over degrees of freedom, mean total variation) of the rows of `seen` from all `labels`."""
    share = np.bincount(labels) / labels.size
    expected = share * seen.shape[1]
    histograms = (np.bincount(row, minlength=share.size) for row in seen)
    both = [(((h - expected) ** 2 / expected).sum(), np.abs(h - expected).sum()) for h in histograms]
    chi2, distance = np.mean(both, axis=0)
    return float(chi2 / (share.size - 1)), float(distance / 2 / seen.shape[1])


def read_by_nodes(epoch: Ints, shards: Ints) -> int:
    ends = np.cumsum(shards)
    parts: Iterator[Ints] = iter(np.split(epoch, NODES, axis=1))
    return sum(int(shards[np.unique(np.searchsorted(ends, part, side="right"))].sum()) for part in parts)


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    packages = {name: version(name) for name in ("webdataset", "numpy")}
    found = list(options.streaming.glob("mosaicml_streaming-*.dist-info")) if options.streaming else []
    if found:
        packages["mosaicml-streaming"] = found[0].name.split("-")[1].removesuffix(".dist")
    return {
        "samples": options.samples, "classes": options.classes, "batch": options.batch,
        "shard_samples": options.shard_samples, "nodes": NODES, "processes": PROCESSES, "quick": options.quick,
        "python": platform.python_version(), **packages,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    width = max(map(len, result["shuffle"]))
    lines = [f"{'':<{width}}" + "".join(f"{name:>13}" for name in METRICS)]
    for name, row in result["shuffle"].items():
        shown = (f"{row[m]:>13,}" if isinstance(row[m], int) else f"{row[m]:>13.3f}" for m in METRICS)
        lines.append(f"{name:<{width}}" + "".join(shown))
    told = ", ".join(f"{k} {v}" for k, v in result["conditions"].items())
    return "\n".join([*lines, *result["notes"], told])


if __name__ == "__main__":
    sys.exit(main())
