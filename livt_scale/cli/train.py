"""`livt train`: parse, call one function."""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Annotated

import typer

from livt_scale.cli.options import Allow, RecipeFile, Sets
from livt_scale.cli.output import starting


class StageName(StrEnum):
    pretrain = "pretrain"
    finetune = "finetune"


def train(
    recipe: RecipeFile,
    stage: Annotated[StageName | None, typer.Option(help="Run one stage.", show_default="every unfinished one")] = None,
    sets: Sets = None,
    allow: Allow = None,
    allow_download: Annotated[
        bool, typer.Option("--allow-download", help="Download the weights of model.timm, where the recipe asks for it.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Write report.html into the run directory at the end.")
    ] = True,
) -> None:
    """Train a recipe; resume from its newest checkpoint.

    One process, torchrun and srun take the same command:

        livt train RECIPE --set run_dir=runs/try --set stages.pretrain.epochs=2

        torchrun --nproc-per-node 2 -m livt_scale train RECIPE
    """
    starting(f"train {recipe}")
    if allow_download:
        from livt_scale.config.stages import ALLOW_DOWNLOAD

        os.environ[ALLOW_DOWNLOAD] = "1"
    from livt_scale.api.train import train as run

    run_dir = run(recipe, overrides=sets or (), stage=stage.value if stage else None, allow=allow or ())
    if report:
        from livt_scale.study.report.at_end import write_at_end

        write_at_end(run_dir)
