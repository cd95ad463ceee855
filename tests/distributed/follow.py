"""Trains a list of jobs, one after another, in one process group: follow.py JOBS.json RANK WORLD_SIZE PORT.

A job is {"run_dir", "stage", "sets": {field: value}, "from": (folder of a checkpoint, or null)}: the stage is trained
from that checkpoint, or from its beginning, to its end, by the same code as `livt train`. The losses stand in
RUN/STAGE/metrics.jsonl. Whole processes for each job would spend their time on importing torch.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from livt_scale.config.load import load_recipe
from livt_scale.distributed.world import World, process_group
from livt_scale.train.run import train_together

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = REPO / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"


def train_job(job: dict[str, Any], *, world: World) -> None:
    run_dir, stage = Path(job["run_dir"]), job["stage"]
    if job["from"] is not None:
        if world.is_main:
            shutil.copytree(job["from"], run_dir / stage / "checkpoints" / Path(job["from"]).name)
        if world.world_size > 1:
            dist.barrier()
    recipe = load_recipe(QUICKSTART, sets=[f"{name}={value}" for name, value in job["sets"].items()])
    train_together(recipe, (stage,), world=world)


def main() -> None:
    jobs, rank, world_size, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    world = World(rank, world_size, local_rank=rank % local, local_size=local)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank % local)}
    torch.set_num_threads(1)
    with process_group(world, timeout_s=600):
        for job in json.loads(jobs.read_text()):
            train_job(job, world=world)


if __name__ == "__main__":
    main()
