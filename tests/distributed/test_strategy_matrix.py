"""ViT-Ti on the shipped images: ten steps by every strategy, and all pairs of one that saves and one that goes on.

pytest tests/distributed/test_strategy_matrix.py -m slow -s        prints the tables that docs/strategies.md shows
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from livt_scale.checkpoint.load import read_tensors
from livt_scale.config.capabilities import STRATEGIES
from tests.distributed.strategies import SMALL, Job, Kind, train_all
from tests.whole_runs import REPO

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SHIPPED = {  # all images that ship
    "data.train": REPO / "shards" / "fashion-mnist-lt" / "train-lt",
    "stages.*.global_batch": 240,
    "stages.*.micro_batch": 60,
}
SINGLE = Kind("ddp", 1)
PAIRED = [
    SINGLE,
    Kind("ddp", 2),
    Kind("fsdp", 2),
    Kind("fsdp", 4),
    Kind("zero1", 2),
    Kind("zero2", 2),
    Kind("zero3", 4),
]


def worst(ours: list[float], reference: list[float]) -> float:
    """Largest relative difference of two lists of losses."""
    assert len(ours) == len(reference)
    return max(abs(a - b) / abs(b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_ten_steps_of_every_strategy_follow_one_process(tmp_path: Path, stage: str) -> None:
    kinds = [SINGLE, *(Kind(name, processes) for name in STRATEGIES for processes in (2, 4))]
    jobs = {kind: Job(kind, tmp_path / kind.name, stage, SHIPPED) for kind in kinds}
    train_all(list(jobs.values()), tmp_path)
    off = {kind.name: worst(job.losses, jobs[SINGLE].losses) for kind, job in jobs.items()}
    print(f"\n{stage}: largest relative difference of ten losses from one process, fp32")
    print("\n".join(f"    {name:10} {value:.1e}" for name, value in off.items()))
    assert len(jobs[SINGLE].losses) == 10
    assert max(off.values()) < 1e-4


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_bf16_stays_near(tmp_path: Path, stage: str) -> None:
    """A smaller model: these CPUs emulate bf16."""
    sets = {**SHIPPED, **SMALL}
    single = Job(SINGLE, tmp_path / "single", stage, sets)
    jobs = [Job(Kind(name, 2, "bf16"), tmp_path / name, stage, sets) for name in STRATEGIES]
    train_all([single, *jobs], tmp_path)
    off = {job.kind.name: worst(job.losses, single.losses) for job in jobs}
    print(f"\n{stage}: largest relative difference of ten losses from one process in fp32")
    print("\n".join(f"    {name:14} {value:.1e}" for name, value in off.items()))
    assert all(0 < value < 2e-2 for value in off.values())


def test_all_pairs_go_on_from_each_other(tmp_path: Path) -> None:
    saved = {kind: Job(kind, tmp_path / kind.name, sets=SHIPPED) for kind in PAIRED}
    train_all(list(saved.values()), tmp_path)
    gone_on = {
        (a, b): Job(b, tmp_path / f"{a.name} to {b.name}", sets=SHIPPED, goes_on_from=saved[a].checkpoint(5))
        for a in PAIRED
        for b in PAIRED
    }
    train_all(list(gone_on.values()), tmp_path)
    off = {pair: worst(job.losses, saved[pair[0]].losses[5:]) for pair, job in gone_on.items()}
    print("\nsaved by (rows), continued by: largest relative difference of the next five losses from the unbroken run")
    print(" " * 10 + "".join(f"{kind.name:>10}" for kind in PAIRED))
    for a in PAIRED:
        print(f"{a.name:10}" + "".join(f"{off[a, b]:>10.0e}" if off[a, b] else f"{'same':>10}" for b in PAIRED))
    assert max(off.values()) < 1e-4
    for kind in PAIRED:
        ours, whole = (read_tensors(job.checkpoint(10)) for job in (gone_on[kind, kind], saved[kind]))
        assert all(torch.equal(ours[name], tensor) for name, tensor in whole.items()), kind.name
