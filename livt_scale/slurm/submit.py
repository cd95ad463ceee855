"""Submits a run's chain of jobs, completely or not at all, and only once.

    RUN/slurm/chain.json      what was submitted: mode, code, and for each job stage, segment, id, script, log, time
    RUN/slurm/scripts/        the batch scripts, as they were submitted
    RUN/slurm/logs/           JOB-ID.log, added to by each restart
    RUN/slurm/starts-STAGE.json   what the jobs record (`livt_scale.slurm.job`)
    RUN/slurm/ends/ID         how each job ended (`livt_scale.slurm.records`)
    RUN/slurm/submitted.yaml     what the jobs train
    RUN/code/                 what the jobs run from (`livt_scale.slurm.code_snapshot`)

chain.json is written before the first job and after each one, so that a submission that is killed leaves no job that
is not recorded: all jobs of a chain carry its name as their comment, by which they are found again.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from livt_scale.config.load import load_saved, to_yaml
from livt_scale.config.recipe import STAGES, Recipe, Stage, differences
from livt_scale.config.run_place import absolute_run_dir
from livt_scale.slurm import commands, inherited
from livt_scale.slurm.bad_nodes import BAD_NODES, excluding, read_bad_nodes
from livt_scale.slurm.chain import ChainPlan, dependencies, plan_chain
from livt_scale.slurm.code_snapshot import PACKAGE, Code, Frozen, freeze, keep_git_view, read_code
from livt_scale.slurm.facts import ClusterFacts
from livt_scale.slurm.planned_time import planned_time
from livt_scale.slurm.records import CHAIN, ENDS, is_evaluated, read_chain, what_it_runs
from livt_scale.slurm.script import LOGS, ChainSettings, JobPlan, log_name, render
from livt_scale.slurm.sites import Site, load_site, with_site
from livt_scale.slurm.step_times import measure
from livt_scale.train.compare_run import check_start
from livt_scale.train.preflight import check_run, is_absent, refuse
from livt_scale.train.resume_rules import check_allowable
from livt_scale.train.resume_rules import describe as describe_change
from livt_scale.train.run_files import read_status
from livt_scale.util.atomic import LockHeld, file_lock, write_atomic
from livt_scale.util.errors import ClusterError, LivtError, UsageError
from livt_scale.util.resources import shipped
from livt_scale.util.urls import is_url

VERSION = 1


@dataclass(frozen=True)
class Prepared:
    """All that is decided before anything is written or submitted."""

    recipe: Recipe
    run_dir: Path
    site: Site | None
    plan: ChainPlan
    allow: tuple[str, ...] = ()

    @property
    def recipe_path(self) -> Path:
        """Of the file that the jobs read. Not recipe.yaml: beside a lock, that is the saved recipe of a run."""
        return self.run_dir / "slurm" / "submitted.yaml"

    @cached_property
    def recipe_bytes(self) -> bytes:
        return to_yaml(self.recipe).encode("utf-8", "surrogateescape")

    @cached_property
    def recipe_sha256(self) -> str:
        return hashlib.sha256(self.recipe_bytes).hexdigest()


@dataclass(frozen=True)
class ClusterLook:
    """What the controller reports; None: it was not reached. notes: what is therefore not checked."""

    facts: ClusterFacts | None
    notes: tuple[str, ...] = ()


def prepare(recipe: Recipe, *, cluster: ClusterLook | None = None, allow: Sequence[str] = ()) -> Prepared:
    """Look at site and run, and plan the jobs. Writes nothing. cluster: as seen a moment ago; None: it is asked.

    allow: fields that may have changed in mid-stage. Raises UsageError, ClusterError, RunError, CheckpointMismatch.
    """
    allowed = check_allowable(allow)
    run_dir = absolute_run_dir(recipe.run_dir, name=recipe.name)
    check_start(recipe, run_dir, allow=allowed)
    site = load_site(recipe.slurm.site) if recipe.slurm.site else None
    recipe = recipe.model_copy(update={"run_dir": str(run_dir), "slurm": with_site(recipe.slurm, site)})
    if recipe.slurm.stage_in and is_url(recipe.data.train):
        raise UsageError("slurm.stage_in copies local shards, and data.train is a URL", remedy="data.cache keeps those")
    measured = {stage: measure(recipe, stage, run_dir) for stage in recipe.stage_names}
    since = (read_status(run_dir, "finetune") or {}).get("since", "")
    exported = is_evaluated(run_dir, has_val=bool(recipe.data.val), since=since)
    cluster = cluster or look_at_cluster()
    plan = plan_chain(recipe, site, cluster.facts, measured, exported=exported, planned=planned_time)
    plan.notes += [*cluster.notes, *inherited.notes(os.environ, recipe.slurm)]
    for node in read_bad_nodes(run_dir):
        then = "left out" if recipe.slurm.check_nodes == "exclude" else "not left out: slurm.check_nodes is not exclude"
        plan.notes.append(f"node {node.name} was bad at {node.at} ({node.why}): {then}; see RUN/{BAD_NODES}")
    plan.notes += _impossible(recipe, plan)
    return Prepared(recipe, run_dir, site, plan, allowed)


def _impossible(recipe: Recipe, plan: ChainPlan) -> list[str]:
    """Raise RecipeError for a run that cannot start. Returns notes on what is not seen from here."""
    sizes: dict[Stage, int] = {job.job: job.resources.world_size for job in plan.jobs if job.job in STAGES}
    problems = check_run(recipe, stages=list(sizes), world_sizes=sizes) if sizes else []
    unseen = [problem for problem in problems if problem.absent] if is_absent(recipe.data.train) else []
    refuse(problem for problem in problems if problem not in unseen)
    return [
        f"{problem.field}: there is no {problem.where}, seen from here; the nodes need it there" for problem in unseen
    ]


def look_at_cluster() -> ClusterLook:
    """Ask the controller. A plan can be made without one, but it is not checked then."""
    try:
        facts = commands.cluster_facts()
    except ClusterError as error:
        return ClusterLook(None, (f"partition, account, limits and PreemptMode are not checked: {error}",))
    if facts is None:
        why = "partition, account, limits and PreemptMode are not checked: there is no scontrol here"
        return ClusterLook(None, (why,))
    return ClusterLook(facts)


def scripts(prepared: Prepared, frozen: Frozen | None) -> list[str]:
    """The batch script of each job of the plan."""
    chain = settings_of(prepared, frozen)
    return [render(template(), job, chain) for job in prepared.plan.jobs]


def template() -> str:
    """The batch script before a recipe's values are filled in."""
    return shipped("slurm/job.sbatch").read_text(encoding="utf-8")


def settings_of(prepared: Prepared, frozen: Frozen | None) -> ChainSettings:
    recipe = prepared.recipe
    return ChainSettings(
        recipe=recipe,
        recipe_path=str(prepared.recipe_path),
        recipe_sha256=prepared.recipe_sha256 if frozen else "",
        run_dir=str(prepared.run_dir),
        work_dir=str(Path.cwd()),
        python=recipe.slurm.python or sys.executable,
        code=str(frozen.folder if frozen else PACKAGE.parent),
        code_sha256=frozen.sha256 if frozen else "",
        slurm=excluding(recipe.slurm, read_bad_nodes(prepared.run_dir)),
        site=prepared.site,
        allow=prepared.allow,
    )


def submit(prepared: Prepared) -> dict[str, Any]:
    """Submit the chain; returns chain.json, with `joined` if the same chain is already in the queue.

    Raises ClusterError: sbatch's message, after the jobs before it were cancelled; or another chain of this run is
    still in the queue.
    """
    run_dir, code = prepared.run_dir, code_now(prepared)
    with alone(run_dir):
        earlier = read_chain(run_dir)
        (waiting,) = commands.alive([earlier])
        if earlier and waiting:
            return _join(earlier, waiting, prepared, runs=what_runs(prepared, code))
        frozen = freeze(code, run_dir) if code else None
        start_over(prepared)
        git = keep_git_view(run_dir / "slurm") if code else None
        written = write_scripts(run_dir, prepared.plan.jobs, scripts(prepared, frozen))
        chain = describe(prepared, frozen, runs=what_runs(prepared, code), git=git, earlier=earlier)
        return _submit_all(prepared, written, chain)


def code_now(prepared: Prepared) -> Code | None:
    """The package that the jobs run a copy of; None where they follow the checkout."""
    return read_code() if prepared.recipe.slurm.code == "frozen" else None


def what_runs(prepared: Prepared, code: Code | None) -> str:
    """Equal if two submissions run the same: package and recipe, or the recipe alone where jobs follow the checkout."""
    return hashlib.sha256(f"{code.sha256 if code else ''} {prepared.recipe_sha256}".encode()).hexdigest()


def start_over(prepared: Prepared) -> None:
    """Write the recipe that the jobs of a new chain read, and remove what would end them immediately."""
    write_atomic(prepared.recipe_path, prepared.recipe_bytes)
    for old in (*prepared.recipe_path.parent.glob("starts-*"), *(prepared.run_dir / ENDS).glob("*")):
        old.unlink()  # who submits again has seen why it stopped


def describe(
    prepared: Prepared,
    frozen: Frozen | None,
    *,
    runs: str,
    git: dict[str, object] | None,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """chain.json before its first job. runs: of `what_runs`."""
    return {
        "version": VERSION,
        "chain": f"livt {secrets.token_hex(8)}",
        "name": prepared.recipe.name,
        "submitted_at": _now(),
        "mode": prepared.plan.mode,
        "why": prepared.plan.why,
        "code": {
            "folder": str(frozen.folder if frozen else PACKAGE.parent),
            "sha256": frozen.sha256 if frozen else None,
            "runs": runs,
            "git": git,
        },
        "jobs": [],
        "earlier": [*(earlier or {}).get("earlier", []), *([_short(earlier)] if earlier else [])],
    }


def _short(chain: dict[str, Any]) -> dict[str, Any]:
    return {
        "chain": chain["chain"],
        "submitted_at": chain.get("submitted_at"),
        "ids": [job["id"] for job in chain["jobs"]],
    }


def _submit_all(prepared: Prepared, written: Sequence[Path], chain: dict[str, Any]) -> dict[str, Any]:
    run_dir, jobs = prepared.run_dir, prepared.plan.jobs
    environ = inherited.for_sbatch(os.environ, prepared.recipe.slurm)
    ids: list[str] = []
    try:
        write_chain(run_dir, chain)
        for number, (job, script) in enumerate(zip(jobs, written, strict=True)):
            after = ",".join(f"{kind}:{ids[other]}" for kind, other in dependencies(jobs, number)) or None
            log = f"{LOGS}/{log_name(job, array=False)}"
            submitted = commands.sbatch(
                script, chdir=run_dir, log=log, comment=chain["chain"], environ=environ, dependency=after
            )
            ids.append(submitted)
            paths = {"script": str(script.relative_to(run_dir)), "log": log.replace("%j", ids[-1])}
            chain["jobs"].append(entry(job, id=ids[-1], dependency=after, **paths))
            write_chain(run_dir, chain)
    except BaseException as error:
        take_back([(run_dir, chain)], ids, error)
        raise
    return chain


def entry(job: JobPlan, *, id: str, script: str, log: str, dependency: str | None) -> dict[str, Any]:
    """A job of chain.json. script, log: relative to the run directory, or absolute."""
    return {
        "stage": job.job,
        "segment": job.segment,
        "segments": job.segments,
        "id": id,
        "name": job.name,
        "script": script,
        "log": log,
        "dependency": dependency,
        "submitted_at": _now(),
        "resources": asdict(job.resources),
    }


def take_back(chains: Sequence[tuple[Path, dict[str, Any]]], ids: list[str], error: BaseException) -> None:
    """Cancel the jobs of a partial submission and report it; if that fails too, report which jobs are left."""
    try:
        commands.cancel(ids)
    except ClusterError as second:
        raise ClusterError(
            f"{error}. And jobs {', '.join(ids)}, submitted before, could not be cancelled: {second}",
            remedy=f"end them: scancel {' '.join(ids)}",
        ) from error
    for run_dir, chain in chains:
        chain["taken_back"] = f"{error}"
        with suppress(OSError):
            write_chain(run_dir, chain)
    if isinstance(error, ClusterError) and ids:
        raise ClusterError(
            f"{error.message}; jobs {', '.join(ids)}, submitted before it, were taken back", remedy=error.remedy
        ) from error


def _join(chain: dict[str, Any], waiting: dict[str, str], prepared: Prepared, *, runs: str) -> dict[str, Any]:
    """The chain that is in the queue, if it runs the same; else the second one is refused."""
    told = ", ".join(f"{job} {state.lower()}" for job, state in waiting.items())
    if what_it_runs(chain) == runs and not chain.get("taken_back"):
        return {**chain, "joined": waiting}
    raise ClusterError(
        f"this run's jobs of {chain.get('submitted_at')} are still in the queue ({told}), with {_other(prepared)}: "
        f"{prepared.run_dir}",
        remedy=f"end them first (scancel {' '.join(waiting)}), or set another run_dir",
    )


def _other(prepared: Prepared) -> str:
    """What differs between the jobs in the queue and `prepared`: fields of the recipe, as far as they can be read."""
    with suppress(OSError):
        if prepared.recipe_path.read_bytes() == prepared.recipe_bytes:
            return "other code"
    lines = ""
    with suppress(LivtError):
        changed = differences(load_saved(prepared.recipe_path), prepared.recipe)
        lines = "; ".join(describe_change(change, where="in the queue") for change in changed)
    return f"another recipe ({lines})" if lines else "another recipe"


def write_scripts(folder: Path, jobs: Sequence[JobPlan], texts: Sequence[str]) -> list[Path]:
    """FOLDER/slurm/scripts/01-pretrain.sbatch and so on, and the folder of the logs."""
    (folder / LOGS).mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (job, text) in enumerate(zip(jobs, texts, strict=True), start=1):
        path = folder / "slurm" / "scripts" / f"{number:02}-{job.name}.sbatch"
        write_atomic(path, text.encode("utf-8", "surrogateescape"))
        paths.append(path)
    return paths


def write_chain(run_dir: Path, chain: dict[str, Any]) -> None:
    write_atomic(run_dir / CHAIN, (json.dumps(chain, indent=2) + "\n").encode())


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """One submission at a time for a run. Raises ClusterError if another is running, or the folder is not writable."""
    try:
        (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
        lock = file_lock(run_dir / "slurm" / ".lock")
    except LockHeld as error:
        raise ClusterError(
            f"another livt submit is at work in {run_dir}: {error.holder}", remedy=error.remedy
        ) from None
    except OSError as error:
        raise ClusterError(
            f"the run directory {run_dir} cannot be written: {error.strerror}",
            remedy="set run_dir to a folder that all nodes can write to",
        ) from error
    with lock:
        yield


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
