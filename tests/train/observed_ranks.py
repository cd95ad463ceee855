"""One rank of a fine-tuning run that records its forks and its loader processes; one rank is slow.

python observed_ranks.py RECIPE FOLDER NAME=VALUE …
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from livt_scale.config.load import load_recipe
from livt_scale.distributed.world import detect
from livt_scale.train.loop import Hook, Loop, Step
from livt_scale.train.run import train
from livt_scale.train.telemetry import rank_times

SLOW_RANK, SLOW_S = 1, 0.2


class Observer(Hook):
    """Slows one rank down before each step, as a busy node would."""

    def __init__(self) -> None:
        self.evaluations: list[list[int | None]] = []

    def before_step(self, loop: Loop, step: Step) -> None:
        if loop.world.rank == SLOW_RANK:
            time.sleep(SLOW_S)

    def after_step(self, loop: Loop, step: Step) -> None:
        if step.evaluation is not None:
            self.evaluations.append(sorted(p.pid for p in multiprocessing.active_children() if p.pid))


def main(recipe: str, folder: str, *sets: str) -> None:
    forks: list[bool] = []  # whether the process group was there
    os.register_at_fork(before=lambda: forks.append(dist.is_initialized()))
    observer = Observer()
    rank_times.LASTING_S = 1.0
    train(load_recipe(recipe, sets=list(sets)), stage="finetune", hooks=[observer])
    found: dict[str, Any] = {
        "forks": forks,
        "evaluations": observer.evaluations,
        "left": [p.pid for p in multiprocessing.active_children()],
    }
    Path(folder, f"rank-{detect().rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
