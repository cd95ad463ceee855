"""`livt reproduce`: parse, run and collect, print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import COST_DEVICE, AsJson, CostDevice, Force, Price, check_cost_options
from livt_scale.cli.output import echo

if TYPE_CHECKING:  # `livt --help` does without what is heavy
    from livt_scale.study.runs import Run

CLAIM_HELP = "balance, two-stages, equal-compute, losses, reconstruction, size or all."
ON_HELP = "Data set: fashion_mnist_lt, fashion_mnist_lt_if10, photographs_lt or imagenet_lt."
DECIDED = {"seed": "give --seeds, their number", "run_dir": "give --out, the folder of all runs"}  # of each run


def reproduce(
    claim: Annotated[str, typer.Argument(metavar="CLAIM", help=CLAIM_HELP)],
    on: Annotated[str, typer.Option(help=ON_HELP)] = "fashion_mnist_lt",
    out: Annotated[Path, typer.Option("--out", help="Runs are in OUT/ON, and resumed there.")] = Path("runs/claims"),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, from 0. A verdict needs 3.")] = 3,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Number of runs in parallel.")] = 1,
    arms: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="<name>", help="Train only this arm. Repeatable.", show_default="all"),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="<a.b=c>", help="Override a recipe value in all runs. Repeatable."),
    ] = None,
    collect_only: Annotated[
        bool, typer.Option("--collect-only", help="Train nothing; evaluate the existing runs.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write this page, from all results in results/ beside it.")
    ] = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print runs and cost; start nothing.")] = False,
    device: CostDevice = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Train and compare the runs of a claim of the paper.

    livt reproduce losses --jobs 2

    livt reproduce two-stages --arm bal_bce --arm scratch

    livt reproduce losses --on imagenet_lt --dry-run
    """
    from livt_scale.study.claims import CLAIMS, SETTINGS, claim_runs
    from livt_scale.util.errors import UsageError, nearest

    if on not in SETTINGS:
        raise UsageError(f"there is no setting {on!r}", remedy=nearest(on, SETTINGS))
    if claim != "all" and claim not in CLAIMS:
        raise UsageError(f"there is no claim {claim!r}", remedy=nearest(claim, [*CLAIMS, "all"]))
    check_cost_options(dry_run=dry_run, device=device, price=price)
    names = list(CLAIMS) if claim == "all" else [claim]
    laid, folder = _parsed(sets or []), out / on  # a run of one setting is never taken for another's
    runs = claim_runs(names, on, seeds=range(seeds), sets=laid, arms=arms)
    if dry_run:
        _tell_cost(runs, on, folder, device=device or COST_DEVICE, price=price, as_json=as_json)
        return
    _check_page(page, force=force)
    failed = {} if collect_only else _run(runs, folder, jobs=jobs)
    results = _collect(names, on, folder, range(seeds), laid)
    if page is not None:
        _write_page(page, results)
    echo(json.dumps(results) if as_json else "\n".join(_told(result) for result in results))
    if failed:
        for name, why in failed.items():
            echo(f"failed: {name}: {why}", err=True)
        raise typer.Exit(1)


def _parsed(sets: list[str]) -> dict[str, str]:
    from livt_scale.util.errors import UsageError

    for text in sets:
        if "=" not in text:
            raise UsageError(f"--set {text}: there is no =", remedy="write --set a.b=c")
        path = text.partition("=")[0]
        if path in DECIDED:
            raise UsageError(f"--set {text} has no effect: each run has a {path} of its own", remedy=DECIDED[path])
    return {path: value for path, _, value in (text.partition("=") for text in sets)}


def _tell_cost(runs: list[Run], on: str, folder: Path, *, device: str, price: float | None, as_json: bool) -> None:
    from dataclasses import asdict

    from livt_scale.study.claims import SETTINGS
    from livt_scale.study.cost import summarize_cost

    summary = summarize_cost(runs, folder, SETTINGS[on].size_of, device=device)
    echo(json.dumps(asdict(summary)) if as_json else "\n".join(summary.lines(price=price)))


def _run(runs: list[Run], folder: Path, *, jobs: int) -> dict[str, str]:
    from livt_scale.study.local_runner import check_runs, run_all

    check_runs(runs, folder)
    outcome = run_all(runs, folder, jobs=jobs)
    return outcome.failed | dict.fromkeys(outcome.waited, "what it starts from has failed")


def _collect(names: list[str], on: str, folder: Path, seeds: range, sets: Mapping[str, Any]) -> list[dict[str, Any]]:
    from livt_scale.study.collect import collect

    results = [collect(name, on, folder, seeds=seeds, sets=sets) for name in names]
    for result in results:
        _keep(result, folder / "results")
    return results


def _check_page(page: Path | None, *, force: bool) -> None:
    """Raise UsageError, before anything is trained, if the page would replace what another command wrote."""
    from livt_scale.study.results_page import MARK
    from livt_scale.util.outputs import check_output

    if page is not None:
        check_output(page, marks=[MARK], command="reproduce", force=force)


def _write_page(page: Path, results: list[dict[str, Any]]) -> None:
    """Keep the results beside the page, with those of earlier runs, and make it of all that are kept.

    A claim of which nothing ran stays as it is kept.
    """
    from livt_scale.study import results_page as pages
    from livt_scale.study.collect import with_kept
    from livt_scale.util.atomic import write_atomic

    kept = page.parent / "results"
    before = {(told["claim"], told["on"]): told for told in pages.read_results(kept)}
    for result in results:
        earlier = before.get((result["claim"], result["on"]))
        if result["values"]:
            _keep(result if earlier is None else with_kept(result, earlier), kept)
    write_atomic(page, pages.page(pages.read_results(kept), pages.read_studies(kept)).encode())


def _keep(result: dict[str, Any], folder: Path) -> None:
    from livt_scale.study.results_figure import draw
    from livt_scale.study.results_page import picture_name, results_json
    from livt_scale.util.atomic import write_atomic

    picture = folder / Path(picture_name(result)).name
    write_atomic(picture.with_suffix(".json"), results_json(result))
    draw(result, picture)


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['claim']} on {result['on']}: {result['word']}", f"  {result['says']}"]
    for verdict in result["verdicts"]:
        lines.append(f"  {verdict['word']:<19} {verdict['says']} ({verdict['num_seeds']} seeds)")
    return "\n".join([*lines, *(f"  not counted: {who}: {why}" for who, why in result["missing"].items())])
