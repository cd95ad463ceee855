"""Run directories as a run leaves them, written by the writers of the run itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from livt_scale.slurm.records import CHAIN, ENDS
from livt_scale.train import heartbeat
from livt_scale.train import run_dir as rundir
from livt_scale.train.heartbeat import Heartbeat

CHAIN_NAME = "livt 7cc21f825d085e88"
RECIPE = """\
name: little
data: {train: /data/train, val: /data/val}
stages:
  pretrain: {epochs: 50}
  finetune: {epochs: 10}
"""


def ended_pid() -> int:
    """The number of a process of this host that is gone."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


class MadeRun:
    """RUN with both stages to do. Each method adds what one part of the program would have written."""

    def __init__(self, run_dir: Path) -> None:
        self.dir = run_dir
        run_dir.mkdir(parents=True)
        (run_dir / "recipe.yaml").write_text(RECIPE)

    def status(
        self, state: str, stage: str = "pretrain", *, pid: int = 0, host: str = "", old_s: float = 0, **facts: Any
    ) -> None:
        """status.json, as written `old_s` seconds ago by process `pid` (this one) on `host` (this one)."""
        rundir.Status(self.dir / stage, stage=stage, writes=True).write(state, **facts)
        path = self.dir / stage / "status.json"
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - old_s))
        named = {"pid": pid or os.getpid(), "host": host or socket.gethostname(), "at": at, "since": at}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))

    def beat(self, rank: int, *, stage: str = "pretrain", old_s: float = 0, pid: int = 0, **facts: Any) -> None:
        at = time.time() - old_s
        named = {"rank": rank, "host": socket.gethostname(), "pid": pid or os.getpid(), "state": "running"}
        named |= {"phase": "step", "step": 120, "since": at - 2, "at": at}
        heartbeat.write(self.dir / stage, Heartbeat(**(named | facts)))

    def metrics(self, *losses: float | None, stage: str = "pretrain", **facts: Any) -> None:
        """A line a loss, 20 steps each, 0.05 s a step."""
        line = {"images_per_s": 5120.0, "step_s": 0.05, "data_wait_s": 0.001, "mfu": 0.412, "world_size": 8} | facts
        path = self.dir / stage / "metrics.jsonl"
        path.parent.mkdir(exist_ok=True)
        lines = [line | {"step": 20 * (i + 1), "epoch": (i + 1) / 5, "loss": loss} for i, loss in enumerate(losses)]
        path.write_text("".join(json.dumps(each) + "\n" for each in lines))

    def chain(self, *jobs: tuple[str, str], old_s: float = 600, **facts: Any) -> None:
        """chain.json with (id, stage), submitted `old_s` seconds ago."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - old_s))
        written = [
            {"stage": stage, "segment": 1, "segments": 1, "id": job, "name": stage, "submitted_at": at}
            | {"script": f"slurm/scripts/01-{stage}.sbatch", "log": f"slurm/logs/{stage}-{job}.log"}
            for job, stage in jobs
        ]
        path = self.dir / CHAIN
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"version": 1, "chain": CHAIN_NAME, "mode": "requeue", "jobs": written} | facts))

    def end(self, job: str, kind: str = "failed", why: str = "", *, code: int = 1, old_s: float = 1) -> None:
        """The record that the batch script of `job` writes when it exits."""
        path = self.dir / ENDS / job
        path.parent.mkdir(parents=True, exist_ok=True)
        at = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - old_s))
        path.write_text(f"{at} {code} {kind}\n{why}\n")

    def log(self, job: str, stage: str = "pretrain", text: str = "a line\n") -> None:
        path = self.dir / "slurm" / "logs" / f"{stage}-{job}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def row(job: str, state: str, reason: str = "None", *, start: str = "N/A", end: str = "N/A", nodes: str = "") -> str:
    """A line of squeue, as 22.05 prints it for our format."""
    return f"{job}|{state}|{reason}|{end}|0:51|{start}|{nodes}|{CHAIN_NAME}"


def ended(job: str, state: str, code: str = "0:0", *, old_s: float = 1) -> str:
    """A line of sacct --parsable2, as 22.05 prints it."""
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - old_s))
    return f"{job}|{state}|{code}|{end}|{end}|livt-n[1-2]|None"
