"""`livt reproduce`: parse, run and collect, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def reproduce(
    claim: Annotated[str, typer.Argument(help="two-stages, losses, reconstruction, size, or all.")],
    on: Annotated[str, typer.Option(help="Data and size: fashion_mnist_lt, fashion_mnist_lt_if10, imagenet_lt.")] = (
        "fashion_mnist_lt"
    ),
    out: Annotated[Path, typer.Option("--out", help="The folder of the runs; they are continued there.")] = Path(
        "runs/claims"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="So many, from 0 on; a verdict needs 3.")] = 3,
    at_once: Annotated[int, typer.Option("--at-once", min=1, help="So many runs at a time.")] = 1,
    sets: Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", help="Laid over all runs alike.")] = None,
    collect_only: Annotated[bool, typer.Option("--collect-only", help="Train nothing: judge what is there.")] = False,
    page: Annotated[
        Path | None, typer.Option("--page", help="Also write this page, of all results kept in results/ beside it.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the runs; start nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a claim of the paper: train its arms over several seeds, compare them, and say what holds.

    livt reproduce losses --at-once 2

    livt reproduce losses --on imagenet_lt --dry-run
    """
    from livt_scale.errors import UsageError, nearest
    from livt_scale.study.claims import CLAIMS, SETTINGS

    if on not in SETTINGS:
        raise UsageError(f"there is no setting {on!r}", remedy=nearest(on, SETTINGS))
    if claim != "all" and claim not in CLAIMS:
        raise UsageError(f"there is no claim {claim!r}", remedy=nearest(claim, [*CLAIMS, "all"]))
    names = list(CLAIMS) if claim == "all" else [claim]
    laid = _parsed(sets or [])
    runs = _runs(names, on, range(seeds), laid)
    if dry_run:
        told = [{"name": r.name, "stage": r.stage, "after": r.after, "sets": dict(r.sets)} for r in runs]
        typer.echo(json.dumps(told) if as_json else "\n".join(f"{r.name}  livt {' '.join(r.words(out))}" for r in runs))
        return
    failed = {} if collect_only else _run(runs, out, at_once=at_once, quiet=as_json)
    results = _collect(names, on, out, range(seeds), laid)
    if page is not None:
        _write_page(page, results)
    typer.echo(json.dumps(results) if as_json else "\n".join(_told(result) for result in results))
    if failed:
        for name, why in failed.items():
            typer.echo(f"failed: {name}: {why}", err=True)
        raise typer.Exit(1)


def _parsed(sets: list[str]) -> dict[str, Any]:
    from livt_scale.errors import UsageError

    for text in sets:
        if "=" not in text:
            raise UsageError(f"--set {text}: there is no =", remedy="write --set a.b=c")
    return dict(text.split("=", 1) for text in sets)


def _runs(names: list[str], on: str, seeds: range, sets: dict[str, Any]) -> list[Any]:
    from livt_scale.study.claims import CLAIMS, SETTINGS, runs_of
    from livt_scale.study.grid import in_order

    found = [runs_of(CLAIMS[name], SETTINGS[on], seeds=seeds, sets=sets) for name in names]
    return in_order(run for of in found for runs in of.values() for run in runs)


def _run(runs: list[Any], out: Path, *, at_once: int, quiet: bool) -> dict[str, str]:
    from livt_scale.study.runner import run_all

    for run in runs:  # what cannot be is said before anything is trained
        run.load(out)
    outcome = run_all(runs, out, at_once=at_once, say=(lambda _: None) if quiet else typer.echo)
    return outcome.failed | dict.fromkeys(outcome.waited, "what it starts from has failed")


def _collect(names: list[str], on: str, out: Path, seeds: range, sets: dict[str, Any]) -> list[dict[str, Any]]:
    from livt_scale.durable import write_whole
    from livt_scale.study.collect import collect
    from livt_scale.study.page import picture

    results = []
    for name in names:
        results.append(collect(name, on, out, seeds=seeds, sets=sets))
        place = out / "results" / f"{name}-{on}.json"
        write_whole(place, (json.dumps(results[-1], indent=1) + "\n").encode())
        picture(results[-1], place.with_suffix(".png"))
    return results


def _write_page(page: Path, results: list[dict[str, Any]]) -> None:
    """Keep the results beside the page, and make it of all that are kept."""
    from livt_scale.durable import write_whole
    from livt_scale.study import page as pages

    kept = page.parent / "results"
    for result in results:
        name = f"{result['claim']}-{result['on']}"
        write_whole(kept / f"{name}.json", (json.dumps(result, indent=1) + "\n").encode())
        pages.picture(result, kept / f"{name}.png")
    write_whole(page, pages.page(pages.read_results(kept)).encode())


def _told(result: dict[str, Any]) -> str:
    lines = [f"{result['claim']} on {result['on']}: {result['word']}", f"  {result['says']}"]
    for verdict in result["verdicts"]:
        lines.append(f"  {verdict['word']:<19} {verdict['says']} ({verdict['num_seeds']} seeds)")
    return "\n".join([*lines, *(f"  not counted: {who}: {why}" for who, why in result["missing"].items())])
