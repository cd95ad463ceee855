"""Time to the first batch of a run that goes on in the middle of an epoch: at step 10 and at the epoch's last step.

    python benchmarks/resume.py --json resume.json       # a minute or two
    python benchmarks/resume.py --quick

The long-tailed Fashion-MNIST of full size (14,827 images), built from Debian's package dataset-fashion-mnist where its
files lie, else the set that ships. Counted is all that a start does: open the set, start the loader processes, get one
batch. Ours seeks. webdataset has no position: it reads and decodes what was seen before (`webdataset`), or is set up to
skip it undecoded (`webdataset_skip`). mosaicml-streaming gets its own state_dict. Rounds in turn; medians.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))  # beside this script, however it was started
from loader_peers import PEERS

from livt_scale.config.recipe import Recipe
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.loader import train_batches
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import SourceError

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "shards" / "fashion-mnist-lt-full.yaml"
SHIPPED = ROOT / "shards" / "fashion-mnist-lt" / "train-lt"
BATCH = 64
FIRST_STEP = 10
PX = 28

Start = Callable[[ShardSet, Path, int, int], None]  # set, folder of the peers' forms, step, loader processes


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round on the set that ships: figures without meaning")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="livt-resume-") as name:
        shards = ShardSet.open(SHIPPED) if options.quick else full_set(Path(name))
        if PEERS["mosaicml"].is_installed:
            make_mds(shards, Path(name))
        times = measure(shards, Path(name), workers=options.workers, rounds=1 if options.quick else options.rounds)
    result = report(times, shards, options)
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def full_set(folder: Path) -> ShardSet:
    spec = load_spec(SPEC)
    only = spec.build.model_copy(update={"sets": {"train-lt": spec.build.sets["train-lt"]}})
    try:
        build(spec.model_copy(update={"build": only}), folder / "full", workers=1)
    except SourceError as error:
        print(f"{error.message}: the set that ships instead (apt-get install dataset-fashion-mnist)", file=sys.stderr)
        return ShardSet.open(SHIPPED)
    return ShardSet.open(folder / "full" / "train-lt")


def make_mds(shards: ShardSet, folder: Path) -> None:
    from streaming import MDSWriter

    with _quiet(), MDSWriter(out=str(folder / "mds"), columns={"x": "bytes", "y": "int"}) as out:
        for sample in range(shards.num_samples):
            image, label, _ = read_sample(shards, sample)
            out.write({"x": image, "y": label})


def ours(shards: ShardSet, _: Path, step: int, workers: int) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "resume",
            "data": {"train": str(shards.folder), "workers": workers, "mean": [0.5], "std": [0.5]},
            "model": {"size": "vit_micro", "image_px": PX, "channels": 1},
            "stages": {"pretrain": {"global_batch": BATCH, "micro_batch": BATCH, "epochs": 2, "warmup_epochs": 0}},
        }
    )
    start = {"rank": 0, "world_size": 1, "micro_batch": BATCH, "epoch": 0, "step": step}
    with train_batches(ShardSet.open(shards.folder), recipe, stage="pretrain", **start) as batches:
        assert next(batches).step == step


def _webdataset(shards: ShardSet, workers: int, *, skip: int = 0) -> DataLoader[Any]:
    names = [str(shards.folder / shard.name) for shard in shards.manifest.shards]
    dataset = wds.WebDataset(names, shardshuffle=len(names), empty_check=False).repeat()
    if skip:  # by each process its share its share, before anything is decoded
        dataset = dataset.slice(skip // max(workers, 1), sys.maxsize)
    dataset = dataset.decode("pil").to_tuple("png", "cls").map_tuple(np.array, int)
    return DataLoader(dataset, batch_size=BATCH, num_workers=workers)


def webdataset(shards: ShardSet, _: Path, step: int, workers: int) -> None:
    next(itertools.islice(_webdataset(shards, workers), step, None))


def webdataset_skip(shards: ShardSet, _: Path, step: int, workers: int) -> None:
    next(iter(_webdataset(shards, workers, skip=step * BATCH)))


def mosaicml(_: ShardSet, folder: Path, step: int, workers: int) -> None:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = _Decoded(StreamingDataset)(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    loader.load_state_dict(dataset.state_dict(step * BATCH, True))
    next(iter(loader))


def _Decoded(base: type) -> type:
    class Decoded(base):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[np.ndarray, int]:
            sample = super().__getitem__(at)
            return np.array(Image.open(io.BytesIO(sample["x"]))), sample["y"]

    return Decoded


STARTS: dict[str, Start] = {
    "ours": ours,
    "webdataset": webdataset,
    "webdataset_skip": webdataset_skip,
    "mosaicml": mosaicml,
}


def measure(shards: ShardSet, folder: Path, *, workers: int, rounds: int) -> dict[str, dict[int, list[float]]]:
    """Seconds of each start, by step and round."""
    last = shards.num_samples // BATCH - 1
    there = {name: start for name, start in STARTS.items() if name not in PEERS or PEERS[name].is_installed}
    times: dict[str, dict[int, list[float]]] = {name: {FIRST_STEP: [], last: []} for name in there}
    for number in range(rounds + 1):
        for name, start in there.items():
            for step, seconds in times[name].items():
                begun = time.perf_counter()
                with _quiet():
                    start(shards, folder, step, workers)
                if number or rounds == 1:  # the first round fills caches
                    seconds.append(time.perf_counter() - begun)
        if rounds == 1:
            break
    return times


@contextlib.contextmanager
def _quiet() -> Any:
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def report(times: dict[str, dict[int, list[float]]], shards: ShardSet, options: argparse.Namespace) -> dict[str, Any]:
    first_batch = {}
    for name, by_step in times.items():
        first, last = (statistics.median(seconds) for seconds in by_step.values())
        first_batch[name] = {"first": round(first, 4), "last": round(last, 4), "ratio": round(last / first, 3)}
    return {
        "first_batch_s": first_batch,
        "steps": list(next(iter(times.values()))),
        "not_installed": [name for name in STARTS if name not in times],
        "rounds_s": times,
        "conditions": {
            "images": shards.num_samples,
            "batch": BATCH,
            "workers": options.workers,
            "quick": options.quick,
            "storage": "page cache",
            "cores": len(os.sched_getaffinity(0)),
            "machine": platform.machine(),
        },
    }


def table(result: dict[str, Any]) -> str:
    facts, (first, last) = result["conditions"], result["steps"]
    lines = [
        f"{facts['images']:,} images, batches of {facts['batch']}, {facts['workers']} processes: seconds to a batch",
        f"{'':<18}{f'step {first}':>10}{f'step {last}':>10}{'ratio':>8}",
    ]
    for name in STARTS:
        if name in result["not_installed"]:
            lines.append(f"{name:<18}not installed")
        else:
            one = result["first_batch_s"][name]
            lines.append(f"{name:<18}{one['first']:>10.3f}{one['last']:>10.3f}{one['ratio']:>8.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    sys.exit(main())
