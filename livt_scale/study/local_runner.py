"""Runs a study's runs on this machine, a given number in parallel, each in a separate process.

Finished runs are not run again, so the same command continues a study that was killed; a run that was stopped resumes
from its checkpoint, as `livt train` does. A failed run is reported with its log, and so are the runs that would have
started from it; the others continue.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NoReturn

from livt_scale.study.runs import Run, in_order
from livt_scale.train.compare_run import check_start
from livt_scale.train.preflight import KnownSets, Problem, check_run, disk_problems, refuse
from livt_scale.train.resume_rules import TEACHER
from livt_scale.train.run_dir import is_done
from livt_scale.util.atomic import new_folder
from livt_scale.util.errors import Preempted
from livt_scale.util.outside import open_checked, real_path

_log = logging.getLogger(__name__)
OUTPUT = "output.txt"  # all that the process printed; log.txt is its own
TAIL_BYTES = 2**16  # of a log, for its last line
SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)  # as `livt train` takes them
POLL_S = 0.2


@dataclass
class Outcome:
    """Names of the runs by how they ended. waited: for one that failed."""

    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # why, and its log
    waited: list[str] = field(default_factory=list)


def check_starts(runs: Sequence[Run], folder: Path) -> None:
    """Raise what `check_start` raises if a run of another recipe is where one of `runs` would be."""
    for run in runs:
        check_start(run.load(folder), run.at(folder))


def check_runs(runs: Sequence[Run], folder: Path, *, to_build: Collection[Path] = ()) -> None:
    """Raise RecipeError, before anything is written, for all that keeps the runs that are left from starting.

    to_build: training sets that are built before the runs start, and are looked at then.
    """
    check_starts(runs, folder)
    known, later = KnownSets(), {str(path.absolute()) for path in to_build}
    problems: list[Problem] = []
    to_train = [run for run in runs if not is_done(run.at(folder), run.stage)]
    taught_by = {real_path(run.at(folder)) for run in to_train}  # a teacher is trained before the runs that it teaches
    left = [(run.load(folder), run.stage) for run in to_train]
    for recipe, stage in left:
        found = check_run(recipe, stages=[stage], known=known)
        problems += [
            problem
            for problem in found
            if not (problem.absent and problem.where in later)
            and not (problem.field == TEACHER and real_path(Path(problem.where)) in taught_by)
        ]
    refuse([*problems, *disk_problems(left, folder, known=known)])


def run_all(runs: Sequence[Run], folder: Path, *, jobs: int = 1) -> Outcome:
    """Bring all runs to their end. Raises Preempted on SIGNALS, when those that run have saved."""
    left, outcome = in_order(runs), Outcome()
    known = {run.name: run for run in left}
    active: dict[str, tuple[Run, subprocess.Popen[bytes], float]] = {}
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    try:
        while left or active:
            for name in [name for name, (_, process, _) in active.items() if process.poll() is not None]:
                _ended(*active.pop(name), folder=folder, outcome=outcome)
            for run in list(left):
                if any(name in outcome.failed or name in outcome.waited for name in run.needs):
                    left.remove(run)
                    outcome.waited.append(run.name)
                elif is_done(run.at(folder), run.stage):
                    left.remove(run)
                    outcome.done.append(run.name)
                elif len(active) < jobs and all(name in outcome.done for name in run.needs):
                    left.remove(run)
                    source = known[run.after].at(folder) if run.after is not None else None
                    active[run.name] = (run, start(run, folder, source=source), time.monotonic())
            if active:
                time.sleep(POLL_S)
    finally:
        for _, process, _ in active.values():
            process.terminate()  # livt train saves on SIGTERM
        for _, process, _ in active.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
    return outcome


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise Preempted(f"stopped by {signal.Signals(number).name}; the runs are saved", remedy="start again to resume")


def start(run: Run, folder: Path, *, source: Path | None) -> subprocess.Popen[bytes]:
    """Start a process with both streams in RUN/output.txt. source: the folder of the pretraining it starts from."""
    place = run.at(folder)
    place.mkdir(parents=True, exist_ok=True)
    if source is not None and not (place / "pretrain").exists():
        lay_pretraining(source, place)
    with (place / OUTPUT).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "livt_scale", *run.words(folder)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def lay_pretraining(source: Path, target: Path) -> None:
    """Copy the pretraining in `source` atomically, by hard links if the file system supports them."""
    with new_folder(target / "pretrain") as new:
        shutil.copytree(source / "pretrain", new, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _ended(run: Run, process: subprocess.Popen[bytes], began: float, *, folder: Path, outcome: Outcome) -> None:
    took, log = time.monotonic() - began, run.at(folder) / OUTPUT
    if process.returncode == 0 and is_done(run.at(folder), run.stage):
        outcome.done.append(run.name)
        _log.info("%s: done in %.0f s", run.name, took)
    else:
        with open_checked(log, "log") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            last = file.read(TAIL_BYTES).decode(errors="replace").strip().splitlines()[-1:]
        why = f"exit code {process.returncode}: {''.join(last)[:300]} (log: {log})"
        outcome.failed[run.name] = why
        _log.warning("%s: failed, %s", run.name, why)
