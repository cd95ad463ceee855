"""How long the check before a run takes (`train/preflight.py`): the shipped set, and a billion simulated samples.

    python benchmarks/preflight.py --json preflight.json     # a minute; makes 100,000 empty files in a temporary folder
    python benchmarks/preflight.py --quick                   # 1,000 shards

`check_s`: check_run of the quickstart's recipe with these sets, everything read for the first time; `check_cpu_s`: CPU
time of the same, which other work on the machine changes little. `process_s`: with the start of Python and the imports,
as `livt recipe check --data` has them. The simulated set has a manifest of 1000
classes and files of the sizes that it gives, an index of 41 GB among them: sparse or empty, for the check reads none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from livt_scale.config.load import load_recipe
from livt_scale.data.manifest import INDEX, INDEX_DTYPE, KEYS, MANIFEST, FileInfo, ShardInfo, ShardManifest
from livt_scale.train.preflight import check_run
from livt_scale.util.resources import shipped

BILLION, SHARDS, CLASSES = 10**9, 100_000, 1000
SHA = "0" * 64
RECIPE = "recipes/fashion_mnist_lt/quickstart.yaml"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="a figure is their median")
    parser.add_argument("--quick", action="store_true", help="one round, fewer shards: figures without meaning")
    parser.add_argument("--one", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(seconds_of_check(Path(options.one))))
        return 0
    rounds, shards = (1, 1000) if options.quick else (options.rounds, SHARDS)
    with tempfile.TemporaryDirectory(prefix="livt-preflight-") as folder:
        names = [str(k) for k in range(CLASSES)]
        large = simulated_set(Path(folder) / "large", num_shards=shards, num_samples=BILLION, class_names=names)
        sets = {"shipped": shipped("shards/fashion-mnist-lt/train-lt"), f"a billion in {shards:,} shards": large}
        result = {name: measured(place, rounds) for name, place in sets.items()}
    for name, figures in result.items():
        print(f"{name:<30} " + ", ".join(f"{what} {seconds:.3f}" for what, seconds in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measured(place: Path, rounds: int) -> dict[str, float]:
    """Medians, each round in a process of its own."""
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        said = subprocess.run(
            [sys.executable, __file__, "--one", str(place)], check=True, capture_output=True, text=True
        )
        found.append({**json.loads(said.stdout), "process_s": time.perf_counter() - began})
    return {what: statistics.median(figures[what] for figures in found) for what in found[0]}


def seconds_of_check(place: Path) -> dict[str, float]:
    val = place if place.name == "large" else place.parent / "val"
    recipe = load_recipe(
        shipped(RECIPE), sets=[f"data.train={place}", f"data.val={val}", "run_dir=/tmp/livt-preflight"]
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    problems = check_run(recipe)
    took = {"check_s": time.perf_counter() - began, "check_cpu_s": time.process_time() - began_cpu}
    assert not problems, problems
    assert "torch" not in sys.modules
    return took


def simulated_set(folder: Path, *, num_shards: int, num_samples: int, class_names: Sequence[str]) -> Path:
    """A folder with the manifest of such a set, and files of the sizes that it gives: sparse, without contents."""
    folder.mkdir(parents=True)
    names = [f"large-{k:06}.tar" for k in range(num_shards)]
    for name in names:
        (folder / name).touch()
    per_shard = shares(num_samples, num_shards)
    files = {INDEX: num_samples * INDEX_DTYPE.itemsize + 256, KEYS: num_samples * 16}
    for name, size in files.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    index, keys = (FileInfo(name=name, bytes=size, sha256=SHA) for name, size in files.items())
    manifest = ShardManifest(
        name="large",
        seed=0,
        num_samples=num_samples,
        image_types=["jpg"],
        class_names=list(class_names),
        class_counts=shares(num_samples, len(class_names)),
        shards=[ShardInfo(name=n, bytes=0, sha256=SHA, samples=s) for n, s in zip(names, per_shard, strict=True)],
        index=index,
        keys=keys,
        source={},
    )
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def shares(total: int, parts: int) -> list[int]:
    return np.diff(np.arange(parts + 1, dtype=np.int64) * total // parts).tolist()


if __name__ == "__main__":
    sys.exit(main())
