"""Many runs submitted together, for a study: one array job per stage, with a bounded number of runs in parallel.

    livt submit runs/*.yaml --jobs 4

    pretrain[0-11%4] ──aftercorr──> finetune[0-11%4] ──aftercorr──> evaluate[0-11%4]

Element k is run k in each array, and waits for element k of the one before it alone: a run that fails stops no other.
Where jobs are not requeued, each segment of a stage is an array, whose elements wait until all of the segment before it
have ended.
Each run has its own directory, recipe and chain.json, whose jobs are its elements (12_3), so that livt status, cancel
and logs treat it as any other. All run the same code: one copy in PARENT/code. Their scripts and logs are in
PARENT/array-HEX/slurm; PARENT is the folder of the first run.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import Recipe
from livt_scale.slurm import commands, inherited
from livt_scale.slurm.bad_nodes import excluding, read_bad_nodes
from livt_scale.slurm.chain import Mode, array_dependencies
from livt_scale.slurm.code_snapshot import Code, Frozen, freeze, keep_git_view
from livt_scale.slurm.records import read_chain, what_it_runs
from livt_scale.slurm.script import LOGS, ArraySettings, JobPlan, log_name, render
from livt_scale.slurm.sites import JobKind
from livt_scale.slurm.submit import (
    Prepared,
    alone,
    code_now,
    describe,
    entry,
    look_at_cluster,
    prepare,
    settings_of,
    start_over,
    take_back,
    template,
    what_runs,
    write_chain,
    write_scripts,
)
from livt_scale.util.errors import ClusterError, UsageError


@dataclass(frozen=True)
class PreparedArray:
    """The runs that are not done, and the jobs that any of them needs."""

    runs: tuple[Prepared, ...]
    jobs: tuple[JobPlan, ...]
    max_parallel: int
    mode: Mode
    why: str  # this mode
    notes: list[str] = field(default_factory=list)

    @property
    def parent(self) -> Path:
        """The folder beside the first run, for what all have in common: of runs on two disks, none holds both but /."""
        return self.runs[0].run_dir.parent


def prepare_array(
    recipes: Sequence[Recipe], *, max_parallel: int | None = None, allow: Sequence[str] = ()
) -> PreparedArray:
    """Plan each run, and the arrays. Writes nothing. max_parallel None: all. UsageError: they do not fit together."""
    cluster = look_at_cluster()
    prepared = [prepare(recipe, cluster=cluster, allow=allow) for recipe in recipes]
    _check_apart(prepared)
    runs = tuple(run for run in prepared if run.plan.jobs)
    notes = [f"done already: {run.run_dir}" for run in prepared if not run.plan.jobs]
    if not runs:
        return PreparedArray((), (), 0, "requeue", "", notes)
    first = runs[0]
    for run in runs:
        if run.recipe.slurm != first.recipe.slurm:
            raise UsageError(
                f"{run.recipe.name} and {first.recipe.name} ask Slurm for different things, and an array asks once",
                remedy="submit them in two commands, or set the same slurm.* for all with --set",
            )
    notes += list(dict.fromkeys(note for run in runs for note in run.plan.notes))
    jobs = tuple(job for kind in ("pretrain", "finetune", "evaluate") for job in _longest(runs, kind))
    most = min(max_parallel or len(runs), len(runs))
    return PreparedArray(runs, jobs, most, first.plan.mode, first.plan.why, notes)


def _longest(runs: Sequence[Prepared], kind: JobKind) -> list[JobPlan]:
    """The jobs of a stage of the run that has most of them: its segments."""
    return max(([job for job in run.plan.jobs if job.job == kind] for run in runs), key=len)


def _check_apart(prepared: Sequence[Prepared]) -> None:
    seen: dict[Path, str] = {}
    for run in prepared:
        if run.run_dir in seen:
            raise UsageError(
                f"two recipes have the same run directory {run.run_dir}: {seen[run.run_dir]} and {run.recipe.name}",
                remedy="give each recipe a different name, and no run_dir",
            )
        seen[run.run_dir] = run.recipe.name


def array_scripts(prepared: PreparedArray, frozen: Frozen | None) -> list[str]:
    """The batch script of each array."""
    runs = [settings_of(run, frozen) for run in prepared.runs]
    bad = {node.name: node for run in prepared.runs for node in read_bad_nodes(run.run_dir)}
    slurm = excluding(prepared.runs[0].recipe.slurm, list(bad.values()))  # no run uses a node that another found bad
    array = ArraySettings(tuple(replace(run, slurm=slurm) for run in runs), prepared.max_parallel)
    return [render(template(), job, array.runs[0], array=array) for job in prepared.jobs]


def submit_array(prepared: PreparedArray) -> dict[str, Any]:
    """Submit all or nothing: `folder`, `chain`, `jobs`, `runs`; with `joined` if the same array is in the queue.

    Raises ClusterError: sbatch's message, after the jobs before it were cancelled; or some of the runs have jobs in
    the queue.
    """
    code = code_now(prepared.runs[0])
    with ExitStack() as locks:
        for run in prepared.runs:
            locks.enter_context(alone(run.run_dir))
        earlier = [read_chain(run.run_dir) for run in prepared.runs]
        joined = _in_the_queue(prepared, code, earlier)
        if joined is not None:
            return joined
        name = f"livt {secrets.token_hex(8)}"
        folder = prepared.parent / f"array-{name.split()[1]}"
        frozen = freeze(code, prepared.parent) if code else None
        for run in prepared.runs:
            start_over(run)
        written = write_scripts(folder, prepared.jobs, array_scripts(prepared, frozen))
        git = keep_git_view(folder / "slurm") if code else None
        chains = [
            describe(run, frozen, runs=what_runs(run, code), git=git, earlier=before)
            for run, before in zip(prepared.runs, earlier, strict=True)
        ]
        for k, chain in enumerate(chains):
            chain["chain"] = name
            chain["array"] = {
                "index": k,
                "runs": len(chains),
                "max_parallel": prepared.max_parallel,
                "folder": str(folder),
            }
        return _submit_all(prepared, folder, written, chains)


def _in_the_queue(
    prepared: PreparedArray, code: Code | None, earlier: Sequence[dict[str, Any] | None]
) -> dict[str, Any] | None:
    """The array that is in the queue, if it is the same one; None: no job of it is; else the second one is refused."""
    waiting = commands.alive(earlier)
    if not any(waiting):
        return None
    same = all(
        chain and what_it_runs(chain) == what_runs(run, code) and not chain.get("taken_back")
        for run, chain in zip(prepared.runs, earlier, strict=True)
    )
    if same and all(waiting) and len({chain["chain"] for chain in earlier if chain}) == 1:
        return {"jobs": [], "joined": {job: state for jobs in waiting for job, state in jobs.items()}}
    told = [f"{run.run_dir} ({', '.join(jobs)})" for run, jobs in zip(prepared.runs, waiting, strict=True) if jobs]
    raise ClusterError(
        f"jobs of {len(told)} of these {len(waiting)} runs are still in the queue: {'; '.join(told[:5])}",
        remedy="leave those recipes out, or end the runs first: livt cancel RUN",
    )


def _submit_all(
    prepared: PreparedArray, folder: Path, written: Sequence[Path], chains: list[dict[str, Any]]
) -> dict[str, Any]:
    environ = inherited.for_sbatch(os.environ, prepared.runs[0].recipe.slurm)
    ids: list[str] = []
    told: list[dict[str, Any]] = []
    places = [(run.run_dir, chain) for run, chain in zip(prepared.runs, chains, strict=True)]
    try:
        _write_all(places)
        for number, (job, script) in enumerate(zip(prepared.jobs, written, strict=True)):
            waits = [(kind, ids[other]) for kind, other in array_dependencies(prepared.jobs, number)]
            after = ",".join(f"{kind}:{array}" for kind, array in waits) or None
            log = f"{LOGS}/{log_name(job, array=True)}"
            submitted = commands.sbatch(
                script, chdir=folder, log=log, comment=chains[0]["chain"], environ=environ, dependency=after
            )
            ids.append(submitted)
            told.append(entry(job, id=ids[-1], script=str(script), log=str(folder / log), dependency=after))
            for k, chain in enumerate(chains):
                own = str(folder / log).replace("%A_%a", f"{ids[-1]}_{k}")
                chain["jobs"].append(
                    entry(job, id=f"{ids[-1]}_{k}", script=str(script), log=own, dependency=_of_element(waits, k))
                )
        _write_all(places)  # not after each array: if this is killed before, the jobs are found by their comment
    except BaseException as error:
        take_back(places, ids, error)
        raise
    return {
        "chain": chains[0]["chain"],
        "mode": prepared.mode,
        "why": prepared.why,
        "folder": str(folder),
        "max_parallel": prepared.max_parallel,
        "jobs": told,
        "runs": [str(run.run_dir) for run in prepared.runs],
    }


def _of_element(waits: Sequence[tuple[str, str]], k: int) -> str | None:
    """What element k of an array waits for, for its run's chain.json."""
    own = (f"{kind}:{array}_{k}" if kind == "aftercorr" else f"{kind}:{array}" for kind, array in waits)
    return ",".join(own) or None


def _write_all(places: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    for run_dir, chain in places:
        write_chain(run_dir, chain)
