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
from livt_scale.slurm.records import ENDS
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
        self.ended: dict[str, str] = {}  # the state of jobs before this one, by the command that knows it
        self.on_change: Callable[[], None] = lambda: None
        self.squeue: dict[str, str] = {}  # by the option that the question has
        self.refused: dict[str, Answer] = {}  # by scontrol's command
        self.steps: list[tuple[str, str]] = []
        self.changes: list[list[str]] = []
        self._capsys = capsys
        monkeypatch.setattr(commands, "query", self._query)

    def status(self, state: str, at: str = "now", stage: str = "pretrain") -> None:
        told = {"stage": stage, "state": state, "at": at, "since": "2026-01-01T00:00:00+0000"}
        (self.run / stage / "status.json").write_text(json.dumps(told))

    def checkpoint(self, step: int) -> None:
        (self.run / "pretrain" / "checkpoints" / f"step-{step:08d}").mkdir()

    def chain(self, stage: str, segments: int) -> None:
        """chain.json as livt submit writes it: the segments of one stage are jobs 77, 78, …"""
        jobs = [{"stage": stage, "segment": k, "id": str(76 + k)} for k in range(1, segments + 1)]
        (self.run / "slurm").mkdir(exist_ok=True)
        (self.run / "slurm" / "chain.json").write_text(json.dumps({"chain": "livt 7cc2", "jobs": jobs}))

    def __call__(self, stage: str = "pretrain", *, slurm: dict | None = None, val: str | None = "/set/val", **plan):
        parts = {name: plan.pop(name) for name in ("stages",) if name in plan}  # of the recipe
        of = recipe(slurm or {}, run_dir=str(self.run), data={"train": "/set/train", "val": val}, **parts)
        ended: list[tuple[str, int]] = []
        signalled = self.signal_in == "before"
        if plan.get("segments", 1) > 1:
            self.chain(stage, plan["segments"])
            self.environ["SLURM_JOB_ID"] = str(76 + plan.get("segment", 1))
        while True:
            job = BatchJob(stage, of, "/code/recipe.yaml", self.run, environ=self.environ, **plan)  # type: ignore[arg-type]
            action = next_action(job, ended, signalled=signalled)
            if isinstance(action, JobExit):
                self.record(action)
                return action.code, self._capsys.readouterr().err
            self.steps.append((action.name, " ".join(action.words)))
            signalled |= action.name == self.signal_in
            end = self.ends.get(action.name, 0)
            ended.append((action.name, end if isinstance(end, int) else end()))

    def record(self, end: JobExit) -> None:
        """As the batch shell does when it exits."""
        (self.run / ENDS).mkdir(parents=True, exist_ok=True)
        text = f"2026-01-01T00:00:00+0000 {end.code} {end.kind}\n{end.why}\n"
        (self.run / ENDS / self.environ["SLURM_JOB_ID"]).write_text(text)

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.steps]

    def _query(self, *words: str) -> Answer:
        if words[:4] == ("scontrol", "--oneliner", "show", "job"):
            if words[4] == self.environ["SLURM_JOB_ID"]:
                return Answer(self.shows.replace("JobId=77 ", f"JobId={words[4]} "))
            known = self.ended.get("scontrol")
            return Answer(f"JobId={words[4]} JobState={known}") if known else Answer("", "Invalid job id", 1)
        if words[0] == "sacct":
            known = self.ended.get("sacct")
            return Answer(f"{words[-2].removeprefix('-j')}|{known} by 1000|0:15|x|x|n1|None" if known else "")
        if words[0] == "squeue":
            return Answer(next((text for option, text in self.squeue.items() if option in words), ""))
        self.changes.append([*words])
        self.on_change()
        return self.refused.get(words[1], Answer(""))
