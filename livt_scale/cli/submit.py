"""`livt submit`: parse, plan, then print or submit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import Allow, AsJson, Sets, check_needs
from livt_scale.cli.output import echo

if TYPE_CHECKING:
    from livt_scale.config.recipe import Recipe
    from livt_scale.slurm.chain import ChainPlan
    from livt_scale.slurm.script import JobPlan

WEEK_S = 7 * 24 * 3600.0
EXIT_INTERRUPTED = 130  # as a shell gives it for SIGINT


def submit(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="One recipe, or several for an array.")],
    sets: Sets = None,
    allow: Allow = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan and scripts; write and submit nothing.")
    ] = False,
    follow_checkout: Annotated[
        bool, typer.Option("--follow-checkout", help="Run the checkout as it is when a job starts, not a frozen copy.")
    ] = False,
    stage_in: Annotated[
        bool, typer.Option("--stage-in", help="Copy local shards to each node's own disk first (slurm.stage_in).")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="With several recipes: runs in parallel in each stage.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the runs are over; exit with 0, 1 failed or 85 preempted.")
    ] = False,
    wait_s: Annotated[
        float | None, typer.Option("--wait-s", min=0.0, help="How long --wait waits at most.", show_default="a week")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submit a run to Slurm as a chain of jobs that restarts itself.

    Jobs: both stages, evaluation and export.

    livt submit RECIPE --set slurm.nodes=4 --set slurm.time_min=720

    livt submit RECIPE --dry-run

    livt submit RECIPE RECIPE RECIPE --jobs 2

    livt submit RECIPE --wait
    """
    from livt_scale.config.load import load_recipe
    from livt_scale.util.errors import UsageError

    extra = ["slurm.code=checkout"] * follow_checkout + ["slurm.stage_in=true"] * stage_in
    loaded = [load_recipe(recipe, sets=[*(sets or []), *extra], to_start=True) for recipe in recipes]
    if jobs is not None and len(loaded) == 1:
        raise UsageError(
            "--jobs applies to several recipes, and there is one", remedy="leave it out, or give more recipes"
        )
    check_needs("--wait-s", "--wait", given=wait_s is not None, there=wait)
    if wait and dry_run:
        raise UsageError("--dry-run submits nothing that --wait could wait for", remedy="leave one of them out")
    if len(loaded) > 1:
        runs = _submit_array(loaded, jobs=jobs, allow=allow or (), dry_run=dry_run, as_json=as_json)
    else:
        runs = _submit_one(loaded[0], allow=allow or (), dry_run=dry_run, as_json=as_json)
    if wait and runs:
        _wait(runs, wait_s=WEEK_S if wait_s is None else wait_s)


def _wait(runs: list[Path], *, wait_s: float) -> None:
    """Exit with the code of the runs."""
    from livt_scale.slurm.wait import wait as wait_for

    try:
        code = wait_for(runs, wait_s=wait_s, say=lambda text: echo(text, err=True))
    except KeyboardInterrupt:
        echo("no longer waiting; the jobs continue: livt status, livt cancel", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    raise typer.Exit(code)


def _submit_one(recipe: Recipe, *, allow: Sequence[str], dry_run: bool, as_json: bool) -> list[Path]:
    """The run directory, if it has jobs now."""
    from livt_scale.slurm import submit as chains  # reads cluster, run and shards
    from livt_scale.slurm.chain import dependencies

    prepared = chains.prepare(recipe, allow=allow)
    plan = prepared.plan
    if dry_run:
        code = chains.code_now(prepared)
        texts = chains.scripts(prepared, code.frozen_in(prepared.run_dir) if code else None)
        waits = [dependencies(plan.jobs, k) for k in range(len(plan.jobs))]
        _print_dry_run(plan.jobs, texts, waits, plan, as_json=as_json)
        return []
    if not plan.jobs:
        echo(json.dumps({"jobs": []}) if as_json else f"This run is done: {prepared.run_dir}")
        return []
    chain = chains.submit(prepared)
    if as_json:
        echo(json.dumps(chain))
        return [prepared.run_dir]
    _print_chain(chain, plan.notes)
    if not chain.get("joined"):
        echo(f"{chain['mode']}, because {chain['why']}; record: {prepared.run_dir / 'slurm' / 'chain.json'}")
    return [prepared.run_dir]


def _submit_array(
    recipes: list[Recipe], *, jobs: int | None, allow: Sequence[str], dry_run: bool, as_json: bool
) -> list[Path]:
    """The run directories that have jobs now."""
    from livt_scale.slurm import array
    from livt_scale.slurm.chain import ChainPlan, array_dependencies
    from livt_scale.slurm.submit import code_now

    prepared = array.prepare_array(recipes, max_parallel=jobs, allow=allow)
    if not prepared.jobs:
        echo(json.dumps({"jobs": []}) if as_json else "These runs are done.")
        return []
    if dry_run:
        code = code_now(prepared.runs[0])
        texts = array.array_scripts(prepared, code.frozen_in(prepared.parent) if code else None)
        waits = [array_dependencies(prepared.jobs, k) for k in range(len(prepared.jobs))]
        plan = ChainPlan(prepared.mode, prepared.why, notes=prepared.notes)
        _print_dry_run(prepared.jobs, texts, waits, plan, as_json=as_json)
        return []
    told, runs = array.submit_array(prepared), [run.run_dir for run in prepared.runs]
    if as_json:
        echo(json.dumps(told))
        return runs
    _print_chain(told, prepared.notes)
    if not told.get("joined"):
        bounded = f"{len(runs)} runs, at most {told['max_parallel']} in parallel in each stage"
        echo(f"{bounded}; scripts and logs: {told['folder']}")
    return runs


def _print_chain(chain: dict[str, Any], notes: Sequence[str]) -> None:
    if chain.get("joined"):
        states = ", ".join(f"{job} {state.lower()}" for job, state in chain["joined"].items())
        echo(f"In the queue already, so nothing was submitted: {states}")
        return
    for note in notes:
        echo(f"note: {note}")
    for job in chain["jobs"]:
        echo(f"{job['id']:>8}  {job['name']:<14} {_asked(job['resources'])}  {job['dependency'] or 'starts first'}")


def _asked(resources: dict[str, Any]) -> str:
    gpus = f" · {resources['gpus_per_node']} GPUs" if resources["gpus_per_node"] else ""
    return f"{resources['nodes']} nodes · {resources['tasks_per_node']} tasks{gpus}, {resources['time_min']} min"


def _print_dry_run(
    jobs: Sequence[JobPlan],
    texts: Sequence[str],
    waits: Sequence[Sequence[tuple[str, int]]],
    plan: ChainPlan,
    *,
    as_json: bool,
) -> None:
    """waits: for each job, how it waits and for which. plan: mode, why and notes."""
    if as_json:
        told = [
            {"name": job.name, "resources": asdict(job.resources), "after": after, "script": text}
            for job, text, after in zip(jobs, texts, waits, strict=True)
        ]
        echo(json.dumps({"mode": plan.mode, "why": plan.why, "notes": plan.notes, "jobs": told}))
        return
    for job, text in zip(jobs, texts, strict=True):
        echo(f"# ===== {job.name} =====\n{text}")
    echo(f"# plan: {plan.mode}, because {plan.why}")
    for job, after in zip(jobs, waits, strict=True):
        then = ", ".join(f"{kind} {jobs[number].name}" for kind, number in after) or "starts first"
        echo(f"#   {job.name:<14} {_asked(asdict(job.resources))}  {then}")
    for note in plan.notes:
        echo(f"# note: {note}")
