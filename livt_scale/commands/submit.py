"""`livt submit`: parse, plan, then print or submit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from livt_scale.cluster.submit import Prepared

SETS_HELP = "Lay a value over the recipe's: a.b=c. Can be given again."


def submit(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/fashion_mnist_lt/quickstart.yaml.")],
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help=SETS_HELP)] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print plan and scripts; write and submit nothing.")
    ] = False,
    follow_checkout: Annotated[
        bool, typer.Option("--follow-checkout", help="Run the code as it lies when a job starts, not a frozen copy.")
    ] = False,
    stage_in: Annotated[
        bool, typer.Option("--stage-in", help="Copy local shards to each node's own disk first (slurm.stage_in).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Submit both stages, evaluation and export to Slurm, as a chain that comes to its end by itself.

    livt submit RECIPE --set slurm.nodes=4 --set slurm.time_min=720

    livt submit RECIPE --dry-run
    """
    from livt_scale.recipe_file import load_recipe

    extra = ["slurm.code=checkout"] * follow_checkout + ["slurm.stage_in=true"] * stage_in
    loaded = load_recipe(recipe, sets=[*(sets or []), *extra])
    from livt_scale.cluster import submit as chains  # reads cluster, run and shards

    prepared = chains.prepare(loaded)
    if dry_run:
        _print_dry_run(prepared, as_json=as_json)
        return
    if not prepared.plan.jobs:
        typer.echo(json.dumps({"jobs": []}) if as_json else f"This run is done: {prepared.run_dir}")
        return
    chain = chains.submit(prepared)
    typer.echo(json.dumps(chain)) if as_json else _print_chain(chain, prepared)


def _print_chain(chain: dict[str, Any], prepared: Prepared) -> None:
    if chain.get("joined"):
        states = ", ".join(f"{job} {state.lower()}" for job, state in chain["joined"].items())
        typer.echo(f"In the queue already, so nothing was submitted: {states}")
        return
    for note in prepared.plan.notes:
        typer.echo(f"note: {note}")
    for job in chain["jobs"]:
        typer.echo(f"{job['id']:>8}  {job['name']:<14} {_asked(job['ask'])}  {job['dependency'] or 'starts first'}")
    typer.echo(f"{chain['mode']}, because {chain['why']}; record: {prepared.run_dir / 'slurm' / 'chain.json'}")


def _asked(ask: dict[str, Any]) -> str:
    gpus = f" · {ask['gpus_per_node']} GPUs" if ask["gpus_per_node"] else ""
    return f"{ask['nodes']} nodes · {ask['tasks_per_node']} tasks{gpus}, {ask['time_min']} min"


def _print_dry_run(prepared: Prepared, *, as_json: bool) -> None:
    from dataclasses import asdict

    from livt_scale.cluster.chain import dependency
    from livt_scale.cluster.freeze import Frozen
    from livt_scale.cluster.submit import scripts

    plan = prepared.plan
    place = Frozen(prepared.run_dir / "code" / "SHA256", "SHA256", "", {})  # known when it is frozen
    texts = scripts(prepared, place if prepared.recipe.slurm.code == "frozen" else None)
    if as_json:
        jobs = [
            {"name": job.name, "ask": asdict(job.ask), "after": dependency(plan.jobs, k), "script": text}
            for k, (job, text) in enumerate(zip(plan.jobs, texts, strict=True))
        ]
        typer.echo(json.dumps({"mode": plan.mode, "why": plan.why, "notes": plan.notes, "jobs": jobs}))
        return
    for job, text in zip(plan.jobs, texts, strict=True):
        typer.echo(f"# ===== {job.name} =====\n{text}")
    typer.echo(f"# plan: {plan.mode}, because {plan.why}")
    for k, job in enumerate(plan.jobs):
        after = dependency(plan.jobs, k)
        waits = f"{after[0]} {plan.jobs[after[1]].name}" if after else "starts first"
        typer.echo(f"#   {job.name:<14} {_asked(asdict(job.ask))}  {waits}")
    for note in plan.notes:
        typer.echo(f"# note: {note}")
