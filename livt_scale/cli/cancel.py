"""`livt cancel`: parse, call one function, print the outcome."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from livt_scale.cli.output import echo
from livt_scale.util.errors import EXIT_FAILED

if TYPE_CHECKING:
    from livt_scale.slurm.cancel import Stopped


def cancel(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    now: Annotated[bool, typer.Option("--now", help="Kill it immediately; what is not saved is lost.")] = False,
    wait_s: Annotated[float, typer.Option("--wait-s", min=0.0, help="How long its end is waited for.")] = 900.0,
) -> None:
    """Stop runs after they have saved; cancel their waiting jobs.

    A local run is stopped on its own host. Of several runs, all are asked to stop before the end of any is waited for.

    livt cancel runs/try

    livt cancel runs/study-*

    Exit codes: 0 all are over; 1 one is not yet, or did not save.
    """
    from livt_scale.config.recipe import STAGES
    from livt_scale.slurm.cancel import cancel as stop
    from livt_scale.slurm.progress import is_run, read_record
    from livt_scale.util.errors import UsageError

    for run in runs:
        if not is_run(run):
            raise UsageError(f"{run} is not a run directory", remedy="one holds recipe.yaml, or slurm/chain.json")
    runs = list(dict.fromkeys(runs))
    began = {run: [stage for stage in STAGES if read_record(run, stage).state == "running"] for run in runs}
    ended = stop(runs, save=not now, wait_s=wait_s, say=echo)
    if len(ended) == 1 and ended[0].error is not None:
        raise ended[0].error
    saved = [_tell(run, began[run.run_dir], now=now, several=len(ended) > 1) for run in ended]
    if not all(saved):
        raise typer.Exit(EXIT_FAILED)


def _tell(run: Stopped, began: Sequence[str], *, now: bool, several: bool) -> bool:
    """Print how the run ended; False: it is not over, or has not saved."""
    from livt_scale.slurm.progress import read_record

    name = f"{run.run_dir}: " if several else ""
    if run.error is not None:
        echo(f"{name}{run.error}", err=True)
        return False
    if run.nothing:
        echo(f"nothing of {run.run_dir} runs, and none of its jobs waits")
    if now or not (run.running or run.processes):
        return True
    for stage in began:
        record = read_record(run.run_dir, stage)
        saved = f"its newest checkpoint: {record.saved.name}" if record.saved else "it has no checkpoint"
        if record.state not in ("preempted", "done"):
            why = str(record.status.get("why") or "it ended without a record")
            echo(f"{name}{stage}: not saved at the end ({why}); {saved}")
            return False
        echo(f"{name}{stage}: {record.state}, {saved}")
    return True
