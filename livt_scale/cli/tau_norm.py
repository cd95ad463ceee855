"""`livt tau-norm`: the head of a finished run with normalised rows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from livt_scale.cli.change import print_change
from livt_scale.cli.options import AsJson, EvaluationShards, ExportFolder, Force, RunOrExport, WhichCheckpoint
from livt_scale.cli.output import echo, starting


def tau_norm(
    source: RunOrExport,
    out: ExportFolder,
    taus: Annotated[
        list[float] | None, typer.Option("--tau", min=0, help="Value to try. Repeatable.", show_default="0 to 2 by 0.1")
    ] = None,
    keep_bias: Annotated[bool, typer.Option("--keep-bias", help="Keep the head's bias; the paper drops it.")] = False,
    data: EvaluationShards = None,
    which: WhichCheckpoint = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Normalise the head's rows by the power tau; export it.

    Each row is divided by its norm to the power tau. Nothing is trained. Tau is chosen on half of the evaluation set;
    the figures are from the other half.

    livt tau-norm runs/try --out exports/tau
    """
    starting(f"tau-norm {source}")
    from livt_scale.posthoc.tau_norm import TAUS, tau_normalise

    result = tau_normalise(source, out, taus=taus or TAUS, keep_bias=keep_bias, data=data, which=which, force=force)
    if as_json:
        echo(json.dumps(result))
        return
    chosen_on = result["held_out"]["chosen_on"]
    for row in result["sweep"]:
        mark = "  <- chosen" if row["tau"] == result["tau"] else ""
        echo(f"tau {row['tau']:<4g}  mean class {100 * row['mean_class']:.1f} % of {chosen_on} images{mark}")
    print_change(result)
