"""`livt job`: the commands that a batch script (slurm/job.sbatch) calls while it runs. Not for interactive use."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import Allow, Sets

app = typer.Typer(help="Decisions of a batch job, for slurm/job.sbatch.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `next` a command, although it is the only one."""


@app.command("next")
def next_(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="pretrain, finetune or evaluate.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe that the job trains.")],
    sets: Sets = None,
    allow: Allow = None,
    when_stopped: Annotated[str, typer.Option(help="requeue, next or last: how a stage that stopped continues.")] = (
        "requeue"
    ),
    segment: Annotated[int, typer.Option(min=1, help="Number of this segment.")] = 1,
    segments: Annotated[int, typer.Option(min=1, help="Number of segments of the stage.")] = 1,
    exclude: Annotated[str, typer.Option(help="Nodes that the submission excludes.")] = "",
    stage_in_dir: Annotated[
        str | None, typer.Option(help="Folder for a copy of the shards.", show_default="$TMPDIR")
    ] = None,
    signalled: Annotated[str, typer.Option(help="yes: the batch shell has received a signal.")] = "no",
    ended: Annotated[
        list[str] | None, typer.Option(metavar="<step:code>", help="Steps that have ended, in order, with exit codes.")
    ] = None,
) -> None:
    """Print what the batch script does next.

    Prints `run STEP WORD...` or `exit CODE KIND WHY`, each word followed by a NUL character.
    """
    from typing import cast, get_args

    from livt_scale.config.load import load_recipe
    from livt_scale.config.run_place import absolute_run_dir
    from livt_scale.slurm.job import BatchJob, JobExit, next_action, parse_ended
    from livt_scale.slurm.script import WhenStopped
    from livt_scale.slurm.sites import JobKind
    from livt_scale.util.errors import UsageError, nearest

    for value, allowed in ((stage, get_args(JobKind)), (when_stopped, get_args(WhenStopped))):
        if value not in allowed:
            raise UsageError(f"{value!r} is not one of {', '.join(allowed)}", remedy=nearest(value, allowed))
    loaded = load_recipe(recipe, sets=sets or [])
    job = BatchJob(
        cast("JobKind", stage),
        loaded,
        str(recipe),
        absolute_run_dir(loaded.run_dir, name=loaded.name),
        tuple(sets or ()),
        tuple(allow or ()),
        cast("WhenStopped", when_stopped),
        segment,
        segments,
        exclude,
        loaded.slurm.stage_in_dir or stage_in_dir or os.environ.get("TMPDIR") or "/tmp",  # noqa: S108 - as Slurm has it
    )
    action = next_action(job, parse_ended(ended or ()), signalled=signalled == "yes")
    if isinstance(action, JobExit):
        words: tuple[str, ...] = ("exit", str(action.code), action.kind, action.why)
    else:
        words = ("run", action.name, *action.words)
    sys.stdout.buffer.write(b"".join(os.fsencode(word) + b"\0" for word in words))
