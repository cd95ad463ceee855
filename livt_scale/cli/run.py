"""`livt train` and `livt quickstart`: parse, call one function, print."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

ALLOW_HELP = (
    "A field of the recipe that may have changed in mid-stage, e.g. stages.pretrain.base_lr. Can be given again."
)
SETS_HELP = "Lay a value over the recipe's: a.b=c. Can be given again."


class StageName(StrEnum):
    pretrain = "pretrain"
    finetune = "finetune"


def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe, e.g. recipes/fashion_mnist_lt/quickstart.yaml.")],
    stage: Annotated[StageName | None, typer.Option(help="One stage alone; without it, all that are not done.")] = None,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help=SETS_HELP)] = None,
    allow: Annotated[list[str] | None, typer.Option("--allow", metavar="FIELD", help=ALLOW_HELP)] = None,
) -> None:
    """Train what a recipe says, and go on by itself where it stopped.

    The same under nothing, torchrun and srun:

        livt train RECIPE --set run_dir=runs/try --set stages.pretrain.epochs=2

        torchrun --nproc-per-node 2 -m livt_scale train RECIPE
    """
    from livt_scale.config.load import load_recipe

    loaded = load_recipe(recipe, sets=sets or [])
    from livt_scale.train.run import train as run  # torch comes with it: not before the recipe is known to be right

    run(loaded, stage=stage.value if stage else None, allow=allow or ())


def quickstart(
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help=SETS_HELP)] = None,
) -> None:
    """Run both stages on the long-tailed images that ship with the project, then print the table."""
    from livt_scale.config.load import load_recipe
    from livt_scale.evaluation.results import results_table
    from livt_scale.train.run_dir import is_done
    from livt_scale.train.run_files import EVAL, read_eval
    from livt_scale.util.resources import shipped

    recipe = load_recipe(shipped("recipes/fashion_mnist_lt/quickstart.yaml"), sets=sets or [])
    run_dir = Path(recipe.run_dir or "")
    if all(is_done(run_dir, stage) for stage in recipe.stage_names):
        typer.echo(f"This run is done; to run it anew, remove {run_dir}.")
    else:
        from livt_scale.train.run import train as run

        run(recipe)
    results_table(run_dir, read_eval(run_dir / "finetune" / EVAL))
