"""`livt report`: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from livt_scale.cli.options import Force
from livt_scale.cli.output import echo


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, finished or not.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write.", show_default="report.html in RUN")] = None,
    force: Force = False,
) -> None:
    """Write an HTML page of a run: curves, accuracy, speed, cost.

    livt report runs/try
    """
    from livt_scale.study.report.run_page import MARK, REPORT, write_run_report
    from livt_scale.util.outputs import check_output

    path = out or run / REPORT
    check_output(path, marks=[MARK], command="report", force=force)
    echo(str(write_run_report(run, path)))
