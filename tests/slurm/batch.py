"""A batch job in this process: the loop of slurm/job.sbatch, with the ends of its steps and Slurm's answers as set.

batch = Batch(tmp_path, monkeypatch, capsys)
batch.ends["train"] = 85                # the exit code of a step; or a function that gives it
batch.shows = "JobId=77 JobState=…"     # what scontrol says of the job
batch()                     (exit code of the script, its log)
batch.steps                 [("train", "srun … train RECIPE --stage pretrain"), …]
batch.changes               [["scontrol", "requeue", "77"]]: what was asked of Slurm, apart from questions
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from livt_scale.slurm import commands
from livt_scale.slurm.commands import Answer
from livt_scale.slurm.job import BatchJob, JobExit, next_action
from tests.slurm.test_script_text import recipe


class Batch:
    """One run directory; each call is a start of a job in it."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.run = folder / "run it's"
        (self.run / "pretrain" / "checkpoints").mkdir(parents=True)
        self.environ = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
        self.ends: dict[str, int | Callable[[], int]] = {}
        self.signal_in = ""  # the step in which the batch shell gets a signal
        self.shows = ""
        self.squeue: dict[str, str] = {}  # by the option that the question has
        self.nodes: tuple[str, ...] = ()
        self.refused: dict[str, Answer] = {}  # by scontrol's command
        self.steps: list[tuple[str, str]] = []
        self.changes: list[list[str]] = []
        self._capsys = capsys
        monkeypatch.setattr(commands, "query", self._query)

    def status(self, state: str, at: str = "now", stage: str = "pretrain") -> None:
        (self.run / stage / "status.json").write_text(json.dumps({"stage": stage, "state": state, "at": at}))

    def checkpoint(self, step: int) -> None:
        (self.run / "pretrain" / "checkpoints" / f"step-{step:08d}").mkdir()

    def __call__(self, stage: str = "pretrain", *, slurm: dict | None = None, val: str | None = "/set/val", **plan):
        of = recipe(slurm or {}, run_dir=str(self.run), data={"train": "/set/train", "val": val})
        ended: list[tuple[str, int]] = []
        signalled = self.signal_in == "before"
        while True:
            job = BatchJob(stage, of, "/code/recipe.yaml", self.run, environ=self.environ, **plan)  # type: ignore[arg-type]
            action = next_action(job, ended, signalled=signalled)
            if isinstance(action, JobExit):
                return action.code, self._capsys.readouterr().err
            self.steps.append((action.name, " ".join(action.words)))
            signalled |= action.name == self.signal_in
            end = self.ends.get(action.name, 0)
            ended.append((action.name, end if isinstance(end, int) else end()))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.steps]

    def _query(self, *words: str) -> Answer:
        if words[:3] == ("scontrol", "show", "hostnames"):
            return Answer("\n".join(self.nodes))
        if words[:4] == ("scontrol", "--oneliner", "show", "job"):
            return Answer(self.shows)
        if words[0] == "squeue":
            return Answer(next((text for option, text in self.squeue.items() if option in words), ""))
        self.changes.append([*words])
        return self.refused.get(words[1], Answer(""))
