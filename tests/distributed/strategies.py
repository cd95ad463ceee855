"""Runs of ViT-Ti by any strategy and world size, several to a process group, and what they left."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import warm
from tests.whole_runs import REPO, free_port, metrics, small_sets, spelt

FOLLOW = Path(__file__).with_name("follow.py")
TEN_STEPS = {  # of ViT-Ti, 10 an epoch on the 743 images of `small_sets`
    "model.size": "vit_ti",
    "model.patch_px": 7,
    "stages.*.epochs": 1,
    "stages.*.global_batch": 72,
    "stages.*.micro_batch": 18,
    "stages.*.warmup_epochs": 0,
    "stages.finetune.init": "scratch",
    "stages.finetune.clip_grad": 0.4,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 9,
    "checkpoint.mode": "sync",
    "log.every_steps": 1,
    "log.num_reconstructions": 0,
    "log.tensorboard": False,
    "data.workers": 0,
    "data.val": "null",
}
SMALL = {"model.width": 32, "model.heads": 2, "model.depth": 2, "model.decoder.width": 32, "model.decoder.depth": 1,
         "model.decoder.heads": 2}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """How a run is spread: `Kind("fsdp", 2)`; `local`: processes on what passes for a node."""

    strategy: str
    processes: int
    precision: str = "fp32"
    options: tuple[tuple[str, Any], ...] = ()
    local: int | None = None

    @property
    def name(self) -> str:
        words = [self.strategy, str(self.processes), self.precision if self.precision != "fp32" else ""]
        return "-".join([*filter(None, words), *(f"{key}={value}" for key, value in self.options)])

    @property
    def sets(self) -> dict[str, Any]:
        chosen = {"strategy": self.strategy, "precision": self.precision, **dict(self.options)}
        return {f"parallel.{name}": value for name, value in chosen.items()}


@dataclass
class Job:
    kind: Kind
    run_dir: Path
    stage: str = "pretrain"
    sets: dict[str, Any] = field(default_factory=dict)
    goes_on_from: Path | None = None

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in metrics(self.run_dir, self.stage)]

    @property
    def norms(self) -> list[float]:
        return [line["grad_norm"] for line in metrics(self.run_dir, self.stage)]

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / self.stage / "checkpoints" / f"step-{step:08d}"

    def as_json(self) -> dict[str, Any]:
        sets = {
            **TEN_STEPS,
            "data.train": small_sets() / "train-lt",
            **self.sets,
            **self.kind.sets,
            "run_dir": self.run_dir,
        }
        start = str(self.goes_on_from) if self.goes_on_from else None
        return {
            "run_dir": str(self.run_dir), "stage": self.stage, "from": start,
            "sets": {name: spelt(value) for name, value in sets.items()},
        }  # fmt: skip


def train_all(jobs: list[Job], folder: Path, *, timeout_s: float = 900) -> None:
    """Train `jobs`, those of one world size in one set of processes; their output on failure.

    DeepSpeed has processes of its own: it changes torch's functions for good, and with them how sums round.
    """
    sets: dict[tuple[int, int, bool], list[Job]] = {}
    for job in jobs:
        local, is_zero = job.kind.local or job.kind.processes, job.kind.strategy.startswith("zero")
        sets.setdefault((job.kind.processes, local, is_zero), []).append(job)
    for (processes, local, _), mine in sets.items():
        _train(mine, folder, processes=processes, local=local, timeout_s=timeout_s)


def _train(jobs: list[Job], folder: Path, *, processes: int, local: int, timeout_s: float) -> None:
    listed, log = folder / f"jobs-{processes}-{local}.json", folder / f"log-{processes}-{local}"
    listed.write_text(json.dumps([job.as_json() for job in jobs]))
    port = str(free_port())
    warm.run_each(
        [[FOLLOW, listed, str(rank), str(processes), port] for rank in range(processes)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(local), "PYTHONPATH": str(REPO)},
        log=log,
        timeout=timeout_s,
    )
