"""Run directories and a replayed Slurm, for the commands that look at runs: status, cancel, logs."""

from __future__ import annotations

import json

import pytest

from tests.slurm.made_runs import MadeRun, row
from tests.slurm.replayed_slurm import ReplayedSlurm


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return ReplayedSlurm(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path):
    return MadeRun(tmp_path / "runs" / "little")


@pytest.fixture
def busy(run, fake):
    """A run in its third start, two ranks, with a chain whose fine-tuning waits."""
    run.status("preempted", why="SIGUSR2 came; saved", step=40)
    run.status("running", step=80)
    run.status("running", step=120, total_steps=1000, failed_saves=2, last_failed_save="disk full")
    run.beat(0)
    run.beat(1, step=119, phase="data")
    run.metrics(4.0, 3.0, None, 2.0, 1.0, 0.5)
    (run.dir / "pretrain" / "anomalies.jsonl").write_text(
        json.dumps({"step": 33, "what": "the loss is nan", "policy": "skip", "loss": float("nan")}) + "\n"
    )
    run.chain(("14", "pretrain"), ("15", "finetune"))
    fake.squeue(row("14", "RUNNING", nodes="livt-n[1-2]"), row("15", "PENDING", "Dependency"))
    return run
