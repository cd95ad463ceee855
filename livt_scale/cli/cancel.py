"""`livt cancel`: parse, call one function, say what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from livt_scale.util.errors import EXIT_FAILED


def cancel(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    now: Annotated[bool, typer.Option("--now", help="Kill it immediately; what is not saved is lost.")] = False,
    wait_s: Annotated[float, typer.Option("--wait-s", min=0.0, help="How long its end is waited for.")] = 900.0,
) -> None:
    """Stop a run after it has saved; cancel its waiting jobs.

    A local run is stopped on its own host.

    livt cancel runs/try

    Exit codes: 0 it is over; 1 not yet, or it did not save.
    """
    from livt_scale.config.recipe import STAGES
    from livt_scale.slurm.cancel import cancel as stop
    from livt_scale.slurm.progress import is_run, read_record
    from livt_scale.util.errors import UsageError

    if not is_run(run):
        raise UsageError(f"{run} is not a run directory", remedy="one holds recipe.yaml, or slurm/chain.json")
    began = [stage for stage in STAGES if read_record(run, stage).state == "running"]
    done = stop(run, save=not now, wait_s=wait_s, say=typer.echo)
    if done.nothing:
        typer.echo(f"nothing of {run} runs, and none of its jobs waits")
    if now or not (done.running or done.processes):
        return
    for stage in began:
        record = read_record(run, stage)
        saved = f"its newest checkpoint: {record.saved.name}" if record.saved else "it has no checkpoint"
        if record.state in ("preempted", "done"):
            typer.echo(f"{stage}: {record.state}, {saved}")
        else:
            why = str(record.status.get("why") or "it ended without a record")
            typer.echo(f"{stage}: not saved at the end ({why}); {saved}")
            raise typer.Exit(EXIT_FAILED)
