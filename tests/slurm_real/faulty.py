"""`livt train` as a rank of a Slurm job, with faults that a test lays out as files in the folder $FAULTS.

    pace    "6 2": each step takes 6 s longer in the first 2 starts of the pretraining
    bug     "5": an error in the 5th step of pretraining, on rank 1
    hang    "5": rank 1 sleeps for ever in that step
    leave   stopped before anything is done, as `livt train` says it, with exit code 85: so it comes no further, ever
    starts  is written: "JOB RESTART" a line, for each start of the pretraining
    steps   is written: a line for each of its steps, "START STEP"

The faults are a hook of the loop, as in tests/chaos/sabotage.py. It imports the package that the job froze.
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli import main
from livt_scale.config.load import load_recipe
from livt_scale.train.loop import Hook
from livt_scale.train.run import train
from livt_scale.train.run_dir import Status

FAULTS = Path(os.environ["FAULTS"])
RANK = int(os.environ["SLURM_PROCID"])


def told(name: str) -> list[float] | None:
    """The numbers in a fault's file; None where it is not laid out."""
    file = FAULTS / name
    return [float(word) for word in file.read_text().split()] if file.exists() else None


def note(name: str, *words: object) -> None:
    if RANK == 0:
        with (FAULTS / name).open("a") as file:
            file.write(" ".join(map(str, words)) + "\n")


class Faulty(Hook):
    """The faults of one start of the pretraining."""

    def __init__(self) -> None:
        note("starts", os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.num_start = len((FAULTS / "starts").read_text().splitlines()) if RANK == 0 else 0

    def before_step(self, loop, step) -> None:
        note("steps", self.num_start, step.number)
        if RANK == 0 and (pace := told("pace")) and self.num_start <= pace[1]:
            time.sleep(pace[0])
        if RANK == 1 and told("bug") == [step.number]:
            raise RuntimeError("a planted bug")
        if RANK == 1 and told("hang") == [step.number]:
            time.sleep(1e6)


def leave() -> None:
    """Rank 0 says so and goes; srun then ends the other one, and gives that one's code."""
    note("starts", os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"))
    if RANK == 1:
        time.sleep(1e6)
    folder = FAULTS.parent / "run" / "pretrain"
    folder.mkdir(exist_ok=True)
    Status(folder, stage="pretrain", writes=True).write("preempted", why="stopped before the first step")
    os._exit(85)


if __name__ == "__main__":
    hooks = []
    if "pretrain" in sys.argv:
        if (FAULTS / "leave").exists():
            leave()
        hooks = [Faulty()]

    @main.app.command("train")
    def faulty(
        recipe: Path,
        stage: Annotated[str | None, typer.Option()] = None,
        sets: Annotated[list[str] | None, typer.Option("--set")] = None,
        allow: Annotated[list[str] | None, typer.Option()] = None,
    ) -> None:
        train(load_recipe(recipe, sets=sets or []), stage=stage, allow=allow or (), hooks=hooks)

    main.main()
