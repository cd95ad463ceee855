"""`livt init`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.output import echo
from livt_scale.cli.progress import progress_of


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="CLASS/**/image, or train/ and val/ of it; or a list file.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must be new.")],
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Weights to start from.", show_default="train from scratch")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out images that cannot be used; the manifest lists them.")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes.", show_default="one per core")] = None,
) -> None:
    """Write shards and a recipe for a folder of images.

    livt init photos --out project

    livt train project/recipe.yaml
    """
    from livt_scale.api.init import init as run
    from livt_scale.api.init import train_command

    with progress_of("images") as progress:
        recipe = run(
            folder, out=out, weights=weights, skip_bad=skip_bad, workers=workers, report=echo, progress=progress
        )
    echo(f"wrote {recipe} and the shards beside it; read the reasons in both, then: {train_command(recipe)}")
