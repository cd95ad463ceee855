"""A run submitted by `livt submit` to the cluster of the tests: two tasks a stage, over two nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import warm
from tests.slurm_real.cluster import Cluster, wait_for
from tests.slurm_real.ordinary import User
from tests.whole_runs import TINY, Livt, assert_same_run, small_data, small_sets, spelt

FAULTY = Path(__file__).with_name("faulty.py")
RECIPE = {**TINY, "stages.pretrain.epochs": 3}  # 27 steps and 18
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "PREEMPTED", "NODE_FAIL")
CHAIN_S = 600.0  # a whole chain beside others on 2 cores; alone it takes one minute

# slurm.python: `livt train` with the faults, all else as it is.
PYTHON = """#!/bin/sh
if [ "$1 $2 $3 $4" = "-P -m livt_scale train" ]; then
  shift 3
  exec '{python}' -P '{faulty}' "$@"
fi
while [ "$4" = export ] && [ -e "$FAULTS/hold-export" ]; do sleep 0.2; done
if [ "$5" = --node ] && [ -e "$FAULTS/bad-$SLURMD_NODENAME" ]; then
  echo "planted: no doctor on $SLURMD_NODENAME" >&2
  exit 1
fi
exec '{python}' "$@"
"""


class Chain:
    """One run and its jobs. Its faults are files that tests/slurm_real/faulty.py reads at each step.

    user: whose it is, with a copy of the data; None: root's.
    """

    def __init__(self, cluster: Cluster, folder: Path, *, user: User | None = None, **sets: Any) -> None:
        folder.mkdir()
        self.cluster, self.folder, self.run_dir, self.user = cluster, folder, folder / "run", user
        self.faults = folder / "faults"
        self.faults.mkdir()
        python = folder / "python"
        python.write_text(PYTHON.format(python=user.python if user else sys.executable, faulty=FAULTY))
        python.chmod(0o755)
        slurm = {
            "nodes": 2,
            "time_min": 10,
            "signal_lead_s": 60,
            "start_s": 20,
            "evaluate.time_min": 10,
            "python": python,
        }
        slurm["check_nodes"] = "no"  # but for the tests of it: it takes seconds at each start
        slurm["environment"] = {"FAULTS": str(self.faults), "OMP_NUM_THREADS": "1"}
        self.sets = {**RECIPE, **small_data(), "run_dir": self.run_dir}
        self.sets |= {f"slurm.{name}": value for name, value in slurm.items()}
        self.sets |= {name.replace("__", "."): value for name, value in sets.items()}
        if user is not None:
            shutil.copytree(small_sets(), folder / "data")
            self.sets |= {"data.train": folder / "data" / "train-lt", "data.val": folder / "data" / "val"}
            for path in (folder, *folder.rglob("*")):
                os.chown(path, user.uid, -1)

    def livt(self, *words: str | Path, expect: int | tuple[int, ...] = 0) -> warm.CompletedProcess[str]:
        """A `livt` command, as on a login node."""
        environ, livt = self.cluster.environ | {"OMP_NUM_THREADS": "1"}, ("-m", "livt_scale", *words)
        if self.user is None:
            done = warm.run(livt, cwd=self.folder, env=environ)
        else:
            environ |= self.user.environ(self.folder)
            command = self.user.command(self.user.python, *livt)
            done = subprocess.run(command, cwd=self.folder, env=environ, capture_output=True, text=True, timeout=240)
        allowed = expect if isinstance(expect, tuple) else (expect,)
        assert done.returncode in allowed, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def submit(self, *, expect: int | tuple[int, ...] = 0) -> str:
        """Submit it; what `livt submit` said on both streams."""
        sets = (f"--set={name}={spelt(value)}" for name, value in self.sets.items())
        done = self.livt("submit", Livt(self.folder).recipe, *sets, expect=expect)
        return done.stdout + done.stderr

    @property
    def jobs(self) -> dict[str, str]:
        """Ids of the chain's jobs by name, as chain.json has them."""
        chain = json.loads((self.run_dir / "slurm" / "chain.json").read_text())
        return {job["name"]: job["id"] for job in chain["jobs"]}

    @property
    def requeues(self) -> bool:
        """Whether a stage is one job that is requeued; else it is several, its segments."""
        return bool(json.loads((self.run_dir / "slurm" / "chain.json").read_text())["mode"] == "requeue")

    def names(self, stage: str) -> list[str]:
        """The names of its jobs: "pretrain", or "pretrain-1", "pretrain-2" and so on."""
        return [name for name in self.jobs if stage_of(name) == stage]

    def first(self, stage: str) -> str:
        """The id of its first job."""
        return self.jobs[self.names(stage)[0]]

    def running(self, stage: str) -> str:
        """The name of its job that runs."""

        def running() -> str | None:
            states = {name: self.cluster.show(self.jobs[name])["JobState"] for name in self.names(stage)}
            return next((name for name, state in states.items() if state == "RUNNING"), None)

        return wait_for(running, lambda: f"a job that runs\n{self.tell()}", seconds=180)

    def log(self, name: str) -> str:
        return (self.run_dir / "slurm" / "logs" / f"{name}-{self.jobs[name]}.log").read_text()

    def status(self, stage: str) -> dict[str, Any]:
        return json.loads((self.run_dir / stage / "status.json").read_text())

    def await_state(self, name: str, *states: str) -> dict[str, str]:
        """Until the job has one of the states; what Slurm shows of it."""
        return self.cluster.wait(self.jobs[name], *states, seconds=CHAIN_S)

    def lay(self, fault: str, text: str = "") -> None:
        """The fault is there from the next step on, whole at once."""
        (self.folder / "new").write_text(text)
        (self.folder / "new").replace(self.faults / fault)

    def mend(self, fault: str) -> None:
        (self.faults / fault).unlink()

    def lines(self, name: str) -> list[str]:
        """What faulty.py noted: a line for each start, or for each step, of the pretraining."""
        file = self.faults / name
        return file.read_text().splitlines() if file.exists() else []

    def await_steps(self, more: int, *, seconds: float = 180) -> None:
        """Until the pretraining has begun `more` steps from now on."""
        until = len(self.lines("steps")) + more
        wait_for(lambda: len(self.lines("steps")) >= until, lambda: f"{more} steps\n{self.tell()}", seconds=seconds)

    def ended(self, *, seconds: float = CHAIN_S) -> dict[str, str]:
        """Once none of its jobs is in the queue any more: their states."""

        def states() -> dict[str, str]:
            return {name: self.cluster.show(job)["JobState"] for name, job in self.jobs.items()}

        wait_for(lambda: set(states().values()) <= set(ENDED), lambda: f"the chain\n{self.tell()}", seconds=seconds)
        return states()

    def stages_ended(self, *, seconds: float = CHAIN_S) -> dict[str, str]:
        """The same by stage; of one whose segments ended in several ways, all of these states."""
        return by_stage(self.ended(seconds=seconds))

    def assert_pretrains_like(self, reference: Path) -> None:
        """The first stage ends well, with the weights of the undisturbed run. The jobs after it are not waited for."""
        last = self.names("pretrain")[-1]
        assert self.await_state(last, *ENDED)["JobState"] == "COMPLETED", self.tell()
        assert_same_run(self.run_dir, reference, stages=("pretrain",))

    def preempt(self, *nodes: str, seconds: int = 8) -> None:
        """A more urgent job takes the nodes."""
        where = ("--partition=urgent", f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", "--exclusive")
        self.cluster.run("sbatch", *where, "--time=5", f"--wrap=sleep {seconds}", cwd=self.folder)

    def signal(self, name: str) -> None:
        """Ask the job to save and stop, as its user would."""
        command = ("scancel", "--signal=USR2", "--batch", self.jobs[name])
        self.cluster.run(*(self.user.command(*command) if self.user else command))

    def restarts(self, name: str) -> int:
        return int(self.cluster.show(self.jobs[name])["Restarts"])

    def await_restart(self, name: str, *, more_than: int = 0) -> None:
        """Until Slurm has put the job back into the queue, or started it again."""
        wait_for(lambda: self.restarts(name) > more_than, lambda: f"a restart\n{self.tell()}", seconds=180)

    def tell(self) -> str:
        """Queue and logs, for a test that fails."""
        queue = self.cluster.run("squeue", "--format=%i %j %T %r %M").stdout
        logs = sorted((self.run_dir / "slurm" / "logs").glob("*.log"))
        texts = [f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]) for log in logs]
        return "\n".join([queue, *texts])


def stage_of(name: str) -> str:
    return name.partition("-")[0]


def by_stage(states: dict[str, str]) -> dict[str, str]:
    """{"pretrain-1": "FAILED", "pretrain-2": "FAILED", "finetune": "CANCELLED"}: FAILED and CANCELLED."""
    found: dict[str, list[str]] = {}
    for name, state in states.items():
        found.setdefault(stage_of(name), []).append(state)
    return {stage: " ".join(sorted(set(ends))) for stage, ends in found.items()}


def rank_pid(run_dir: Path, stage: str, rank: int) -> int:
    """The process of a rank, from its heartbeat."""
    return int(json.loads((run_dir / stage / "heartbeats" / f"rank-{rank}.json").read_text())["pid"])
