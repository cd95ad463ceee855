"""`livt soup`: the mean of the weights of several models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.change import print_change
from livt_scale.cli.options import AsJson, EvaluationShards, ExportFolder, Force, Weights, WeightsName
from livt_scale.cli.output import echo, starting


def soup(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Runs, exports, or folders of fine-tuning checkpoints.")
    ],
    out: ExportFolder,
    greedy: Annotated[bool, typer.Option("--greedy", help="Add a member only if accuracy does not drop.")] = False,
    all_checkpoints: Annotated[
        bool, typer.Option("--all-checkpoints", help="Use every checkpoint of each run, not only the final one.")
    ] = False,
    data: EvaluationShards = None,
    weights: Weights = WeightsName.raw,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Average the weights of models of one start; export the mean.

    Members are chosen on half of the evaluation set; the figures are from the other half.

    livt soup runs/try --all-checkpoints --greedy --out exports/soup
    """
    starting(f"soup {', '.join(map(str, paths))}")
    from livt_scale.posthoc.soup import make_soup, read_members

    members = read_members(paths, all_checkpoints=all_checkpoints, weights=weights.value)
    result = make_soup(members, out, method="greedy" if greedy else "uniform", data=data, run=paths[0], force=force)
    if as_json:
        echo(json.dumps(result))
        return
    for row in result["members"]:
        state = "in" if row["in"] else "left out"
        echo(f"{row['checkpoint']}  mean class {100 * row['mean_class']:.1f} %  {state}")
    print_change(result)
