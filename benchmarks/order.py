"""What the order costs: to start, to seek, to take a step; and the bytes that nodes fetch. No image is read.

    python benchmarks/order.py --json order.json      # a minute on two cores
    python benchmarks/order.py --quick                # seconds: does it run?

Cost: one rank of 4096 (rank 2048, global batch 4096), each row in a process of its own: iNaturalist 2018's 437,513
images, and a billion in 100,000 shards; instance sampling, and by class with iNaturalist's 8142 classes. `start`: from
the manifest's numbers to the first batch. `seek`: the same to the last step of epoch 1000 of 1600. `jump`: from another
epoch to 1, 50 and 99 % of one, so that all is drawn anew; `step`: the median of those after it. `peak` and `kept`:
tracemalloc's MiB, NumPy's arrays among them, while starting and after it; `rss`: what the process grew by in all this,
the interpreter and NumPy not counted.

Bytes: over one epoch, by how much the bytes that all nodes fetch exceed those of the set, for every number of nodes
that divides the batch, up to as many as leave each 12 shards: the mean and the worst over random sets, shards of equal
size, and of sizes between 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from livt_scale.config.sampling import ClassBalanced, Progressive, Sampler
from livt_scale.data.order.class_balanced import ClassOrder
from livt_scale.data.order.instance import Order, SampleOrder

RANKS, RANK, FAR_EPOCH, EPOCHS = 4096, 2048, 1000, 1600
INAT, INAT_CLASSES, BILLION = 437_513, 8142, 10**9
PLACES = (0.01, 0.5, 0.99)
MIB = 2**20


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--rounds", type=int, default=5, help="processes a row; a figure is their median")
    parser.add_argument("--sets", type=int, default=20, help="random sets a row of the bytes")
    parser.add_argument("--quick", action="store_true", help="one round, small sets: figures without meaning")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(cost_of(options.one)))
        return 0
    if options.quick:
        options.rounds, options.sets = 1, 2
    names = [name for name in CASES if not (options.quick and "billion" in name)]
    cost = {name: median_of([in_a_process(name) for _ in range(options.rounds)]) for name in names}
    result = {"cost": cost, "bytes": locality(options.sets), "conditions": conditions(options)}
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


# --- cost ---


def instance(samples: int, per_shard: int) -> Order:
    shards = np.full(samples // per_shard, per_shard)
    return Order(np.append(shards, samples % per_shard), RANKS, seed=0)


def by_class(sampler: Sampler) -> ClassOrder:
    return ClassOrder(inat_labels(), RANKS, seed=0, steps=INAT // RANKS, epochs=EPOCHS, shares=sampler.shares)


def inat_labels() -> np.ndarray:
    """Counts that fall from 1000 to 2 as iNaturalist's do, each class at least one image; mixed."""
    weights = 500.0 ** -(np.arange(INAT_CLASSES) / INAT_CLASSES)
    counts = np.maximum(1, (weights / weights.sum() * INAT).astype(np.int64))
    counts[0] += INAT - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(INAT_CLASSES, dtype=np.int32), counts))


CASES: dict[str, Callable[[], SampleOrder]] = {
    "instance, iNat18": lambda: instance(INAT, 1000),
    "instance, a billion": lambda: instance(BILLION, 10_000),
    "class_balanced, iNat18": lambda: by_class(ClassBalanced()),
    "progressive, iNat18": lambda: by_class(Progressive(**{"from": "instance", "to": "class_balanced"})),
}


def in_a_process(name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def cost_of(name: str) -> dict[str, float]:
    """One rank's figures, in this process."""
    labels = inat_labels() if "instance" not in name else None  # the index has them: making them up is not counted
    if labels is not None:
        globals()["inat_labels"] = lambda: labels
    process = psutil.Process()
    before = process.memory_info().rss
    figures = {"start_s": seconds(lambda: take(CASES[name](), 0, 0))}
    figures["seek_s"] = seconds(lambda: seek(CASES[name]()))
    order = CASES[name]()
    for epoch, place in zip((3, 5, 7), PLACES, strict=True):
        steps = around(order, place)
        take(order, epoch - 1, 0)
        figures[f"jump_ms_{place:.0%}"] = seconds(lambda at=(epoch, steps.start): take(order, *at)) * 1e3
        taken = [seconds(lambda at=(epoch, step): take(order, *at)) for step in steps[1:]]
        figures[f"step_us_{place:.0%}"] = statistics.median(taken) * 1e6
    figures["rss_mib"] = (process.memory_info().rss - before) / MIB
    tracemalloc.start()
    measured = CASES[name]()
    take(measured, 0, 0)
    kept, peak = tracemalloc.get_traced_memory()
    return figures | {"peak_mib": peak / MIB, "kept_mib": kept / MIB}


def seek(order: SampleOrder) -> None:
    take(order, FAR_EPOCH, order.steps_per_epoch - 1)


def around(order: SampleOrder, place: float) -> range:
    steps = min(1000, order.steps_per_epoch // 4)
    first = min(int(order.steps_per_epoch * place), order.steps_per_epoch - steps)
    return range(first, first + steps)


def take(order: SampleOrder, epoch: int, step: int) -> None:
    slots = order.global_batch // RANKS
    order.draws(epoch, step, first_slot=RANK * slots, num_slots=slots)


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}


# --- bytes ---


def locality(sets: int) -> dict[str, dict[str, float]]:
    """What all nodes fetch over what the set has, for random sets with 12 to 16 shards a node."""
    rng = np.random.default_rng(0)
    rows = {}
    for batch in (64, 96, 120):
        for uneven in (False, True):
            ratios, most = [], 0
            for _ in range(sets):
                nodes = int(rng.choice([n for n in range(4, 33) if batch % n == 0]))
                count = nodes * int(rng.integers(12, 17))
                shards = (
                    rng.integers(20, 41, count) if uneven else np.append(np.full(count - 1, 30), 1 + rng.integers(30))
                )
                order = Order(shards, batch, seed=int(rng.integers(1000)))
                epoch = np.stack([order.positions(0, step) for step in range(order.steps_per_epoch)])
                shard_of = np.searchsorted(np.cumsum(shards), epoch, side="right")
                most = max(most, order.most_nodes)
                for n in (n for n in range(1, order.most_nodes + 1) if batch % n == 0):
                    read = sum(int(shards[np.unique(part)].sum()) for part in np.split(shard_of, n, axis=1))
                    ratios.append(read / int(shards.sum()))
            name = f"batch {batch}, {'uneven' if uneven else 'equal'} shards"
            rows[name] = {"most_nodes": most, "mean": float(np.mean(ratios)), "worst": max(ratios)}
    return rows


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "ranks": RANKS, "rank": RANK, "seek_to_epoch": FAR_EPOCH, "rounds": options.rounds, "sets": options.sets,
        "cores": len(os.sched_getaffinity(0)), "load_1min": round(os.getloadavg()[0], 1), "quick": options.quick,
        "python": platform.python_version(), "numpy": np.__version__,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    heads = list(next(iter(result["cost"].values())))
    width = max(map(len, [*result["cost"], *result["bytes"]]))
    lines = [f"{'':<{width}}" + "".join(f"{head:>16}" for head in heads)]
    for name, row in result["cost"].items():
        lines.append(f"{name:<{width}}" + "".join(f"{row[head]:>16,.3f}" for head in heads))
    lines.append(f"\n{'bytes fetched / bytes of the set':<{width}}  nodes up to      mean     worst")
    for name, row in result["bytes"].items():
        lines.append(f"{name:<{width}}  {row['most_nodes']:>11}  {row['mean']:>8.3f}  {row['worst']:>8.3f}")
    lines.append(", ".join(f"{k} {v}" for k, v in result["conditions"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
