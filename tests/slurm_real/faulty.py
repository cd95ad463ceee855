"""`livt train` as a rank of a Slurm job, with faults that a test lays out as files in the folder $FAULTS.

    pace    "6 2": each step takes 6 s longer in the first 2 starts of the pretraining
    bug     "5": an error in the 5th step of pretraining, on rank 1
    hang    "5": rank 1 sleeps for ever in that step
    leave   stopped before anything is done, as `livt train` says it, with exit code 85: so it comes no further, ever
    starts  is written: "JOB RESTART" a line, for each start of the pretraining
    steps   is written: a line for each of its steps, "START STEP"

It stands in the loop's own functions, as tests/chaos/sabotage.py does, and imports the package that the job froze.
"""

import os
import sys
import time
from pathlib import Path

from livt_scale.cli import main
from livt_scale.train import loop
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


def install() -> None:
    rate, accumulate = loop._learning_rate, loop._accumulate
    note("starts", os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0"))
    num_start = len((FAULTS / "starts").read_text().splitlines()) if RANK == 0 else 0
    at = [0]

    def learning_rate(part, schedule, step):
        at[0] = step + 1
        return rate(part, schedule, step)

    def accumulates(*args, **named):
        note("steps", num_start, at[0])
        if RANK == 0 and (pace := told("pace")) and num_start <= pace[1]:
            time.sleep(pace[0])
        if RANK == 1 and told("bug") == [at[0]]:
            raise RuntimeError("a planted bug")
        if RANK == 1 and told("hang") == [at[0]]:
            time.sleep(1e6)
        return accumulate(*args, **named)

    loop._learning_rate, loop._accumulate = learning_rate, accumulates


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
    if "pretrain" in sys.argv:
        if (FAULTS / "leave").exists():
            leave()
        install()
    main.main()
